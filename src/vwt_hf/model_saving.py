"""Saving models and image processors that have a setting: it goes into config.json, its words beside the weights, and
its evidence into the card."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from . import image_processing
from .compress import configs_of, own_config, require_same_layers, setting_of, takes_words
from .config import VWTConfig
from .evidence import write_section
from .families import family_of, find_tower, why_every_patch
from .model_configs import attend_by_plan, configs_of_modules, is_among, is_by_plan
from .processors import configs_within
from .saved_words import (
    PROCESSOR_FOLDER,
    SAVED_AS,
    left_in,
    remove_other_words,
    require_same_words,
    seal_words,
    weights_in,
    words_folder,
    write_words,
)
from .weights import lasting
from .whole_saves import require_place, sharing

PUSH_KWARGS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
"""Keyword arguments of `save_pretrained` that are for the upload alone."""
_TURN = 60.0
"""For how many seconds a save with words waits until no other save into its folder runs. Not for ever, as processes
that save together may wait for each other meanwhile."""
logger = logging.getLogger(__name__)
_saving_one = threading.RLock()
"""Held while a compressed model is saved, as its config names the words of that save meanwhile."""


def saving_models(original: Any) -> Any:
    """`PreTrainedModel.save_pretrained` that writes the settings of parts to config.json, and words beside the weights,
    sealed when all is written (`saved_words.py`)."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        # Threads that save one model would write into its one config at once.
        turn = contextlib.nullcontext() if setting_of(self) is None else _saving_one
        with turn, _parts_to_save(self) as parts:
            # Every process of a distributed save comes here. That which writes config.json, where words are named,
            # writes the words, too, and removes what killed saves left.
            writes = self.should_save_on_this_rank(call.arguments["is_main_process"])
            saved = _save_parts(self, original, call, parts, writes)
            if writes:
                try:
                    write_section(Path(save_directory), _evidence_of(parts.values()), adds=False)
                except OSError as error:  # the model is saved
                    logger.warning(
                        f"The model card in {save_directory} could not be read or written ({error}), and may tell the "
                        "evidence of an earlier setting. Remove that section from it."
                    )
            return saved

    return save_pretrained


def _save_parts(
    model: PreTrainedModel, original: Any, call: Any, parts: dict[PreTrainedModel, VWTConfig], writes: bool
) -> Any:
    """Calls `original` as `call` says, and saves the words of `parts` if this process `writes`."""
    words = {}
    for part, setting in parts.items():
        require_same_layers(part)
        if not setting.is_saved_as(part.config.vwt):
            part.config.vwt = setting.to_dict()  # a user changed the config, and the model runs by the setting
        if (vocabulary := setting.words_to_save()) is not None:
            words[part] = vocabulary
    folder, variant = Path(call.arguments["save_directory"]), call.arguments["variant"]
    if writes and parts:  # where a file lies there, transformers logs that and saves nothing
        require_place(call.arguments["save_directory"])
    # With adapters of transformers' own no config.json is written, in which words could be named.
    if not writes or folder.is_file() or getattr(model, "_hf_peft_config_loaded", False):
        return original(*call.args, **call.kwargs)
    with sharing(folder, _TURN if words else 0) as (_, is_alone):
        saved_as = []
        for part, vocabulary in words.items():
            saved_as.append(write_words(folder, vocabulary))
            part.config.vwt = part.config.vwt | {"saved_as": saved_as[-1]}
        require_same_words(folder, saved_as, variant)
        before = weights_in(folder)

        def seal() -> None:
            seal_words(folder, saved_as, left=left_in(folder, before, variant))

        with _uploading_sealed(model, saved_as, seal) if saved_as else contextlib.nullcontext():
            saved = original(*call.args, **call.kwargs)
        seal()
        if is_alone():
            remove_other_words(folder, saved_as)
        return saved


@contextlib.contextmanager
def _parts_to_save(model: PreTrainedModel) -> Iterator[dict[PreTrainedModel, VWTConfig]]:
    """Yields the models whose configs hold a setting to save with `model`, each with that setting.

    A part of `model` may have been compressed alone: then a copy of the config of `model` holds its setting meanwhile.
    `model` may be part of another model whose config alone holds the setting: then its own holds it meanwhile.
    """
    if any(config.vwt for config in configs_of(model)):
        _require_embeddings(model)
    parts = _compressed_parts(model)
    configs = [(module, module.__dict__["config"]) for module in model.modules() if "config" in module.__dict__]
    setting = None if parts else setting_of(model)
    try:
        _gather_settings(model, parts)
        if setting is not None:
            model.config.vwt = setting.to_dict()
        yield parts if setting is None else {model: setting}
    finally:
        if setting is not None:
            model.config.vwt = None
        for module, config in configs:
            module.__dict__["config"] = config


def _require_embeddings(model: PreTrainedModel) -> None:
    """Raises `ValueError` where the embeddings of a tower were replaced after it was compressed."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel) or not takes_words(part) or setting_of(part) is not None:
            continue
        # If it holds other models, one of these is a tower that was restored or replaced, which is no mistake.
        if not any(isinstance(inner, PreTrainedModel) for inner in part.modules() if inner is not part):
            raise ValueError(
                f"the embeddings of the {type(part).__name__} were replaced after it was compressed, so that it runs "
                "as the plain model does. Call vwt_hf.restore on the model and, if it is to be short, vwt_hf.compress."
            )


@contextlib.contextmanager
def _uploading_sealed(model: PreTrainedModel, saved_as: list[str], seal: Callable[[], None]) -> Iterator[None]:
    """Within it, a save of `model` that uploads what it wrote uploads the words with it, sealed."""
    upload = model._upload_modified_files

    def upload_sealed(working_dir: Any, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any) -> Any:
        """Called when all is written, with the files that were there before: these are not uploaded."""
        seal()
        new = set(map(words_folder, saved_as))
        before = {name: time for name, time in files_timestamps.items() if name not in new}
        return upload(working_dir, repo_id, before, **kwargs)

    model.__dict__["_upload_modified_files"] = upload_sealed
    try:
        yield
    finally:
        model.__dict__.pop("_upload_modified_files", None)


def _evidence_of(settings: Iterable[VWTConfig]) -> list[dict[str, Any]]:
    return [setting.evidence for setting in settings if setting.evidence]


def uploading_models(original: Any) -> Any:
    """`_upload_modified_files`, which every way of pushing a model or a pipeline calls last, that writes evidence into
    the card."""

    @functools.wraps(original)
    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        model, folder = self if isinstance(self, nn.Module) else self.model, Path(working_dir)
        if (folder / CONFIG_NAME).is_file():  # else it is an adapter alone, which has no setting
            settings = list(_compressed_parts(model).values())
            if not settings and (own := setting_of(model)) is not None:  # it is a part of what was compressed
                settings = [own]
            write_section(folder, _evidence_of(settings))
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def saving_processors(original: Any) -> Any:
    """`save_pretrained` of image processors, and of processors that hold one, that writes words into their own folder.

    Words are written first, and the processor's file, which names their folder, last. So a save that is killed leaves
    what was there before.
    """

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        processor: Any = self if isinstance(self, ImageProcessingMixin) else getattr(self, "image_processor", None)
        folder = Path(save_directory)
        left = folder.glob(f"{PROCESSOR_FOLDER}-*")  # words of earlier saves
        is_plain = getattr(processor, "vwt", None) is None
        if is_plain and next(left, None) is None and not (read_in_place(folder) or {}).get("vwt"):
            return original(self, save_directory, push_to_hub=push_to_hub, **kwargs)
        require_place(save_directory)
        if isinstance(processor, image_processing.Tokenizing):
            processor.require_ready()
        options = {name: kwargs.pop(name) for name in PUSH_KWARGS if name in kwargs} if push_to_hub else {}
        held: Any = getattr(processor, "__dict__", {}).get("vwt")
        vocabulary = held.setting.words_to_save() if isinstance(held, image_processing.HostTokenizer) else None
        # Every process of a distributed run may come here. None removes the words that another's file names.
        with sharing(folder, 0 if vocabulary is None else _TURN) as (_, is_alone):
            saved_as = []
            if vocabulary is not None:
                saved_as.append(write_words(folder, vocabulary, PROCESSOR_FOLDER))
                seal_words(folder, saved_as, PROCESSOR_FOLDER)
                processor.vwt = dataclasses.replace(held, saved_as=saved_as[0])
            saved = original(self, save_directory, **kwargs)
            if is_alone():
                remove_other_words(folder, saved_as + _words_named_in(folder), PROCESSOR_FOLDER)
        if processor is self:
            _warn_if_not_read(processor, folder)
        if push_to_hub:  # the original uploads what it wrote itself
            self.push_to_hub(options.pop("repo_id", folder.name), token=kwargs.get("token"), **options)
        return saved

    return save_pretrained


def _words_named_in(folder: Path) -> list[str]:
    """The `saved_as` of the words that the processors' files in this folder name.

    A processor that holds an image processor is saved to another file than an image processor alone.
    """
    files = [folder / name for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)]
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()]
    return [name for text in texts for name in re.findall(rf'"saved_as": "({SAVED_AS.pattern})"', text)]


def read_in_place(folder: Path) -> dict[str, Any] | None:
    """The image processor within the processor_config.json of a folder, as JSON; `None` if there is none.

    transformers reads it in place of an image processor that is saved beside that file.
    """
    try:
        held = json.loads((folder / PROCESSOR_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # there is no file; or it is damaged, as loading it says
        return None
    inner = held.get("image_processor") if isinstance(held, dict) else None
    return inner if isinstance(inner, dict) else None


def _warn_if_not_read(processor: Any, folder: Path) -> None:
    """Warns if an image processor was saved beside a processor_config.json that holds one with another setting.

    Each save gives words another name, so these are not compared.
    """
    other = read_in_place(folder)
    if other is None:
        return
    own, read = ({} if vwt is None else vwt for vwt in (processor.vwt, other.get("vwt")))
    nameless = {"saved_as": None}
    if not isinstance(read, dict) or read | nameless != own | nameless:
        logger.warning(
            f"{folder} holds {PROCESSOR_NAME} with another image processor, and transformers reads that one, not the "
            f"{type(processor).__name__} that was saved beside it. Save the processor of texts and images that holds "
            "it, or into another folder."
        )


def _compressed_parts(model: nn.Module) -> dict[PreTrainedModel, VWTConfig]:
    """The models that run by the setting in their config, each with it: `model`, or else those of its parts that do."""
    inner = {part: own for child in model.children() for part, own in _compressed_parts(child).items()}
    if not isinstance(model, PreTrainedModel) or model.config.vwt is None:
        return inner
    setting = setting_of(model)
    # A part may have been compressed anew by itself, and then nothing runs by the setting of the whole.
    if setting is not None and (setting.is_saved_as(model.config.vwt) or not inner):
        return {model: setting}
    return inner


def _gather_settings(model: PreTrainedModel, parts: Collection[PreTrainedModel]) -> None:
    """Makes the config of `model` hold the settings of its compressed `parts`, and no other.

    Raises:
        ValueError: a part was compressed alone, and no config within that of `model` belongs to it alone.
    """
    held = [config for _, config in configs_within(model.config)]
    mine = [part.config for part in parts]
    if all(is_among(config, held) for config in mine) and all(c.vwt is None or is_among(c, mine) for c in held):
        return
    own_config(model)
    for part in parts:
        if not is_among(part.config, [config for _, config in configs_within(model.config)]):
            _take_setting_of(part, model, parts)
    mine = [part.config for part in parts]
    for _, config in list(configs_within(model.config)):
        if not is_among(config, mine):
            config.vwt = None


def _take_setting_of(part: PreTrainedModel, model: PreTrainedModel, parts: Collection[PreTrainedModel]) -> None:
    """Puts the setting of `part` into the config of that part within the config of `model`.

    That is the only one with the same fields. There may be several if all parts with such a config are among `parts`
    and have the same setting, without words of their own.

    Raises:
        ValueError: there is none, or something else goes by it, too.
    """
    own = part.config
    alike = [(path, config) for path, config in configs_within(model.config) if _same_but_setting(config, own)]
    twins = [one for one in parts if one is part or _are_twins(one, part)]
    if len(alike) == 1 or (alike and len(twins) > 1):
        why_not = _why_shared(alike[0][1], model, part, twins)
    else:
        why_not = f"{len(alike)} are like it"
    if why_not is not None:
        raise ValueError(
            f"{type(model).__name__} holds a {type(part).__name__} that was compressed alone, and no config "
            f"within its own is that of this part alone: {why_not}. Save the part by itself, vwt_hf.restore(part), "
            "or, if that is supported, vwt_hf.compress what is around it."
        )
    for path, config in alike:
        if path:
            *holders, name = path.split(".")
            setattr(functools.reduce(getattr, holders, model.config), name, own)
            continue
        config.vwt = own.vwt  # type: ignore[attr-defined]
        attend_by_plan(config, is_by_plan(own))
        for module in part.modules():
            if module.__dict__.get("config") is own:
                module.__dict__["config"] = config


def _are_twins(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two compressed parts have equal configs, and settings that are equal without words in memory."""
    setting = setting_of(one)
    has_words = setting is not None and setting.words_to_save() is not None
    return not has_words and one.config.vwt == other.config.vwt and _same_but_setting(one.config, other.config)


def _why_shared(
    config: PreTrainedConfig, model: PreTrainedModel, part: PreTrainedModel, twins: Collection[PreTrainedModel]
) -> str | None:
    """Why `config`, within that of `model`, cannot hold the setting of `part`: what else goes by it than `part` and its
    `twins`, which have this setting, too. `None` if nothing does.
    """
    if config is model.config:
        try:
            tower = find_tower(model, family_of(model))
        except ValueError:
            return "the one like it is that of the whole, which cannot be compressed"
        setting = setting_of(part)
        if setting is not None and setting.drops and why_every_patch(model, tower) is not None:
            return "the one like it is that of the whole, of which no patch may be dropped"
        return None if tower.module in part.modules() else "the one like it is that of the whole"
    inside = {module for twin in twins for module in twin.modules()}
    others = configs_of_modules(module for module in model.modules() if module not in inside)
    # By value: a part that was compressed and restored holds a copy of its config.
    if any(_same_but_setting(config, other) for other in others):
        return "the one like it is that of other parts, too"
    return None


def _same_but_setting(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    is_same_class = type(one) == type(other)  # noqa: E721 (a subclass with a setting is equal)
    return is_same_class and lasting(one.to_dict()) == lasting(other.to_dict())
