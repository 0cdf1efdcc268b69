"""Registration with transformers: `register`, which `import vwt_hf` calls, makes `from_pretrained(..., vwt=...)` work.

Models and configs stay transformers' own. Every config has `vwt`, which is `None`. One that is given a setting becomes
an instance of a subclass of its class, which writes it to config.json, until the setting is taken from it.

What `vwt` asks for is done in one place, where every loading path of transformers meets: `PreTrainedModel`'s
`from_pretrained` and `_from_config`. So a class loaded by its own name (`CLIPVisionModelWithProjection`, which no Auto
class reaches) takes `vwt` too, and a folder saved with a setting never loads as a plain model that claims to have one.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.pipelines.base import Pipeline

from . import attention, image_processing
from .compress import (
    HUB_KWARGS,
    compress_by,
    configs_of,
    own_config,
    parts_of,
    require_same_layers,
    restore,
    setting_of,
    takes_words,
)
from .config import VWTConfig
from .evidence import write_section
from .families import family_of, find_tower, require_supported
from .forward import GivenWords, call_with, words_to_generate_by
from .model_configs import SETTING, is_typed, take_over
from .printable import shown
from .processors import configs_within, saved_setting
from .saved_words import remove_other_words, require_same_words, seal_words, words_folder, write_words
from .weights import remember_load
from .whole_saves import sharing

PUSH_KWARGS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
_NOT_GIVEN: Any = object()
_TURN = 60.0
"""Seconds for which a save with words waits for another into its folder. Not for ever: processes that save together
may wait for each other within it."""
_saving_one = threading.RLock()
"""Held while a compressed model is saved, whose config names the words of that save meanwhile."""
_replaced: dict[tuple[type, str], tuple[Any, Any]] = {}
"""Of each method of transformers in whose place another was put: it, and that other, by which `unregister` sees whether
another library has wrapped it. `_NOT_GIVEN` is for what a class inherits."""
_building: contextvars.ContextVar[bool] = contextvars.ContextVar("vwt_hf building", default=False)
"""True while a model is loaded or built: models built within it stay plain, and it compresses its parts afterwards."""


def register() -> None:
    """Makes transformers' loading, saving and configs take `vwt`. A second call changes nothing."""
    if _replaced:
        return
    PreTrainedConfig.vwt = SETTING  # type: ignore[attr-defined]
    ImageProcessingMixin.vwt = image_processing.SETTING  # type: ignore[attr-defined]
    attention.register()
    for (owner, name), wrap in _WRAPS.items():
        present = vars(owner).get(name, _NOT_GIVEN)
        bound = isinstance(present, classmethod)
        wrapped = wrap(present.__func__ if bound else getattr(owner, name))
        setattr(owner, name, classmethod(wrapped) if bound else wrapped)
        _replaced[owner, name] = present, vars(owner)[name]


def unregister() -> None:
    """Takes everything back that `register` did: transformers is as if vwt_hf had not been imported.

    Models that are compressed lose what their layers attend by; `restore` them before.

    Raises:
        RuntimeError: another library has wrapped a method after this one did, and would lose what it calls.
    """
    for (owner, name), (_, ours) in _replaced.items():
        if vars(owner)[name] is not ours:
            raise RuntimeError(
                f"{owner.__name__}.{name} was replaced after vwt_hf registered, by "
                f"{getattr(vars(owner)[name], '__module__', 'something else')}; take that out before."
            )
    for (owner, name), (original, _) in _replaced.items():
        if original is _NOT_GIVEN:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    if _replaced:
        del PreTrainedConfig.vwt  # type: ignore[attr-defined]
        del ImageProcessingMixin.vwt  # type: ignore[attr-defined]
        attention.unregister()
    _replaced.clear()


def _reading(original: Any) -> Any:
    """`PreTrainedConfig.from_dict` that takes `vwt`, and hands it on to the model where one is loaded."""

    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: dict[str, Any], vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        made = original(cls, config_dict, **kwargs)
        if vwt is _NOT_GIVEN:
            return made
        if isinstance(made, tuple):
            return made[0], made[1] | {"vwt": vwt}
        setting = VWTConfig.parse(vwt)
        for _, config in configs_within(made):
            config.vwt = None
        made.vwt = setting
        return made

    return from_dict


def _loading(original: Any) -> Any:
    """`PreTrainedModel.from_pretrained` that takes `vwt`, or else follows the settings in the config."""

    @functools.wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if vwt is not _NOT_GIVEN:
            setting = _setting(cls, vwt)
        else:
            # With no config given there is none to look at before the weights are read.
            _setting(cls, getattr(kwargs.get("config"), "vwt", None), source)
        with _parts_stay_plain():
            loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        named = "" if source is None else model.name_or_path
        if source is None:  # of which transformers makes "None"
            for config in configs_of(model):
                config.name_or_path = ""
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.name_or_path = named  # a config.json can name any folder as that of a part
                remember_load(part, hub_kwargs)
        if vwt is _NOT_GIVEN:
            _follow(model, named or source, hub_kwargs)  # of an adapter's folder: that of its base
        else:
            _apply(model, setting, hub_kwargs)
        return loaded

    return from_pretrained


def _building_from(original: Any) -> Any:
    """`_from_config`, which is behind `AutoModel.from_config`, that takes `vwt`, or else follows the config's."""

    @functools.wraps(original)
    def _from_config(cls: type[PreTrainedModel], config: Any, *, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        inner = _building.get()
        if vwt is not _NOT_GIVEN:
            setting = _setting(cls, vwt)
            config = copy.deepcopy(config)
        elif not inner:
            _setting(cls, config.vwt)
        with _parts_stay_plain():
            model = original(cls, config, **kwargs)
        if vwt is not _NOT_GIVEN:
            _apply(model, setting, {})
        elif not inner:
            _follow(model, None, {})
        return model

    return _from_config


@contextlib.contextmanager
def _parts_stay_plain() -> Iterator[None]:
    token = _building.set(True)
    try:
        yield
    finally:
        _building.reset(token)


def _calling(original: Any) -> Any:
    """Calls of models, of which a plain one refuses `patch_words`.

    The forward of every supported family takes any keyword and leaves out those that it does not know, so a plain model
    would see all patches without a word, and who loads an image processor with `vwt` and a model without would never
    learn why nothing is faster. A hook could say so only if plain models had one. Calls without `patch_words` go on to
    what `torch.nn.Module` has, also where another library has replaced that since, as `torch.fx` does while it traces.
    """

    @functools.wraps(original)
    def __call__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("patch_words") is not None and not takes_words(self):
            if setting_of(self) is not None:
                return _with_words_for_a_part(self, args, kwargs)
            raise ValueError(
                f"patch_words were given to a {type(self).__name__} that is not compressed. Load it with the `vwt` of "
                'the image processor that made them, or call vwt_hf.compress(model, {"method": "given"}).'
            )
        return super(PreTrainedModel, self).__call__(*args, **kwargs)

    return __call__


@torch.compiler.disable
def _with_words_for_a_part(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a model of which a part alone is compressed, to which its forward may not hand what it was called with."""
    kwargs = dict(kwargs)
    with call_with(model, GivenWords(kwargs.pop("patch_words"))):
        return model(*args, **kwargs)


def _generating(original: Any) -> Any:
    """`generate` that takes `patch_words`: it knows no other arguments than those of `forward`, and repeats images."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, patch_words: Any = None, **kwargs: Any) -> Any:
        if patch_words is None:
            return original(self, *args, **kwargs)
        if setting_of(self) is None:
            raise ValueError(
                f"patch_words were given to `generate` of a {type(self).__name__}, of which no part is compressed. "
                "Compress it. Where it writes the text of a model whose vision tower alone is compressed, as in BLIP, "
                "compress that model itself or, as of InstructBLIP, leave patch_words out: the tower finds its own."
            )
        with call_with(self, words_to_generate_by(self, patch_words, args, kwargs)):
            return original(self, *args, **kwargs)

    return generate


def _loading_processor(original: Any) -> Any:
    """`from_pretrained` of image processors that takes `vwt`, or else follows the setting in the processor's file."""

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if vwt is _NOT_GIVEN:
            image_processing.follow(processor, source, hub_kwargs)
        else:
            image_processing.apply(processor, vwt, source, hub_kwargs)
        return loaded

    return from_pretrained


def _saving_processor(original: Any) -> Any:
    """`save_pretrained` of image processors, and of processors that hold one, that writes its words below the folder.

    They are written first and found by the name that the processor's file gives, so that a save which was killed leaves
    what was there before.
    """

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        processor = self if isinstance(self, ImageProcessingMixin) else getattr(self, "image_processor", None)
        folder = Path(save_directory)
        left = folder.glob(f"{image_processing.PROCESSOR_FOLDER}-*")  # words of one that was saved here before
        if getattr(processor, "vwt", None) is None and next(left, None) is None:
            return original(self, save_directory, push_to_hub=push_to_hub, **kwargs)
        if folder.is_file():
            return original(self, save_directory, **kwargs)
        if isinstance(processor, image_processing.Tokenizing):
            processor.require_statistics()
        options = {name: kwargs.pop(name) for name in PUSH_KWARGS if name in kwargs} if push_to_hub else {}
        # Every process of a distributed run may come here: each leaves the words that it named.
        with sharing(folder, _TURN if image_processing.words_of(processor) else 0) as (_, is_alone):
            saved_as = image_processing.write_words_of(processor, folder)
            saved = original(self, save_directory, **kwargs)
            if is_alone():
                in_use = saved_as + image_processing.words_named_in(folder)
                remove_other_words(folder, in_use, image_processing.PROCESSOR_FOLDER)
        if push_to_hub:  # the original uploads what it wrote itself
            self.push_to_hub(options.pop("repo_id", folder.name), token=kwargs.get("token"), **options)
        return saved

    return save_pretrained


def _leaving_out(original: Any) -> Any:
    """`from_pretrained` of text tokenizers, without `vwt`: pipelines hand them the model's keyword arguments, which
    they keep and save."""

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, vwt: Any = None, **kwargs: Any) -> Any:
        return original(cls, *args, **kwargs)

    return from_pretrained


def _explaining(original: Any) -> Any:
    """`Pipeline.__init__` that says where `vwt` goes: some pipelines take any argument and leave it out silently."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> None:
        if vwt is not _NOT_GIVEN:
            raise TypeError(
                f"vwt={shown(vwt)} was given to a pipeline, which hands it on to no model. Write pipeline(..., "
                'model_kwargs={"vwt": ...}), or compress the model and give that to the pipeline.'
            )
        original(self, *args, **kwargs)

    return __init__


def _saving(original: Any) -> Any:
    """`PreTrainedModel.save_pretrained` that writes the settings of parts to config.json, and words beside the weights.

    Words lie in a new folder of their own, which config.json names. It is sealed when all is written, so a save that
    was killed leaves what was there before, or what a load notices (`saved_words.py`).
    """

    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        # Threads that save one model write into one config what is to be saved of it.
        turn = contextlib.nullcontext() if setting_of(self) is None else _saving_one
        with turn, _parts_to_save(self) as parts:
            return save_parts(self, call, parts)

    def save_parts(self: PreTrainedModel, call: Any, parts: list[PreTrainedModel]) -> Any:
        words = {}
        for part in parts:
            setting = setting_of(part)
            require_same_layers(part)
            if setting is not None and not setting.is_saved_as(part.config.vwt):
                part.config.vwt = setting.to_dict()  # it was changed in the config, and the model runs by the setting
            vocabulary = None if setting is None else setting.words_to_save()
            if vocabulary is not None:
                words[part] = vocabulary
        folder = Path(call.arguments["save_directory"])
        # Every process of a distributed save comes here. The one that writes config.json, which names the words, writes
        # them, too, and removes what killed saves left; with adapters of transformers' own none writes config.json.
        writes = self.should_save_on_this_rank(call.arguments["is_main_process"]) and not folder.is_file()
        writes = writes and not getattr(self, "_hf_peft_config_loaded", False)
        turn = _TURN if words else 0
        with sharing(folder, turn) if writes else contextlib.nullcontext((None, lambda: False)) as (_, is_alone):
            saved_as = []
            if writes:
                for part, vocabulary in words.items():
                    saved_as.append(write_words(folder, vocabulary))
                    part.config.vwt = part.config.vwt | {"saved_as": saved_as[-1]}
                require_same_words(folder, saved_as, call.arguments["variant"])
            saved = _save_sealed(self, call, original, folder, saved_as)
            if writes:
                seal_words(folder, saved_as)
                if is_alone():
                    remove_other_words(folder, saved_as)
            return saved

    return save_pretrained


@contextlib.contextmanager
def _parts_to_save(model: PreTrainedModel) -> Iterator[list[PreTrainedModel]]:
    """The models in whose configs a setting stands that is to be saved with `model`."""
    parts = _compressed_parts(model)
    _gather_settings(model, parts)
    setting = None if parts else setting_of(model)
    if setting is None:
        yield parts
        return
    model.config.vwt = setting.to_dict()  # it is part of a model in whose config alone the setting stands
    try:
        yield [model]
    finally:
        model.config.vwt = None


def _save_sealed(model: PreTrainedModel, call: Any, original: Any, folder: Path, saved_as: list[str]) -> Any:
    """What `original` gives, called as `call` says; where it uploads what it wrote, the words go along, sealed."""
    if not saved_as:
        return original(*call.args, **call.kwargs)
    upload = model._upload_modified_files

    def upload_sealed(working_dir: Any, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any) -> Any:
        """What the original calls when all is written, to upload what was not there before it began."""
        seal_words(folder, saved_as)
        own = set(map(words_folder, saved_as))
        before = {name: time for name, time in files_timestamps.items() if name not in own}
        return upload(working_dir, repo_id, before, **kwargs)

    model.__dict__["_upload_modified_files"] = upload_sealed
    try:
        return original(*call.args, **call.kwargs)
    finally:
        model.__dict__.pop("_upload_modified_files", None)


def _uploading(original: Any) -> Any:
    """`_upload_modified_files`, by which all ways of pushing a model end, with evidence for its setting in its card."""

    @functools.wraps(original)
    def _upload_modified_files(self: PreTrainedModel, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        settings = map(setting_of, _compressed_parts(self))
        write_section(Path(working_dir), [setting.evidence for setting in settings if setting and setting.evidence])
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def _compressed_parts(model: nn.Module) -> list[PreTrainedModel]:
    """The models in whose config the setting stands that is followed: `model`, or else those of its parts."""
    inner = list(dict.fromkeys(part for child in model.children() for part in _compressed_parts(child)))
    if not isinstance(model, PreTrainedModel) or model.config.vwt is None:
        return inner
    setting = setting_of(model)
    # A part may have been compressed anew by itself, and then the whole's setting is none that is followed.
    return [model] if setting is not None and (setting.is_saved_as(model.config.vwt) or not inner) else inner


def _gather_settings(model: PreTrainedModel, parts: list[PreTrainedModel]) -> None:
    """Has the config of `model` hold the settings of those of its `parts` that are compressed, and no other.

    Raises:
        ValueError: a part was compressed alone, and which config within the model's is the part's cannot be told.
    """
    held = [config for _, config in configs_within(model.config)]
    mine = [part.config for part in parts]
    if all(_among(config, held) for config in mine) and all(c.vwt is None or _among(c, mine) for c in held):
        return
    own_config(model)
    for part in parts:
        if _among(part.config, [config for _, config in configs_within(model.config)]):
            continue
        alike = [
            (path, config) for path, config in configs_within(model.config) if _same_but_setting(config, part.config)
        ]
        if len(alike) != 1 or not _is_of_part_alone(alike[0][1], model, part):
            raise ValueError(
                f"{type(model).__name__} holds a {type(part).__name__} that was compressed alone, and which of the "
                f"configs within its own is that of this part alone cannot be told: {len(alike)} of them could be, and "
                "other parts may go by them. Save the part by itself, vwt_hf.restore(part), or vwt_hf.compress the "
                "whole, if its family is supported."
            )
        (path, config), *_ = alike
        if path:
            *holders, name = path.split(".")
            setattr(functools.reduce(getattr, holders, model.config), name, part.config)
            continue
        own = part.config
        take_over(config, own)
        for module in part.modules():
            if module.__dict__.get("config") is own:
                module.__dict__["config"] = config
    mine = [part.config for part in parts]
    for _, config in list(configs_within(model.config)):
        if not _among(config, mine):
            config.vwt = None


def _is_of_part_alone(config: PreTrainedConfig, model: PreTrainedModel, part: PreTrainedModel) -> bool:
    """Whether a part that is loaded by `config`, within that of `model`, is `part` and no other."""
    if config is model.config:
        return find_tower(model, family_of(model)).module in part.modules()
    inside = set(part.modules())
    return not any(module.__dict__.get("config") is config for module in model.modules() if module not in inside)


def _among(config: PreTrainedConfig, configs: list[PreTrainedConfig]) -> bool:
    return any(config is other for other in configs)


def _same_but_setting(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    def fields(config: PreTrainedConfig) -> dict[str, Any]:
        # What differs between a config on its own and the same one within another says nothing of the model.
        left_out = ("vwt", "dtype", "architectures", "transformers_version", "problem_type")
        return {k: v for k, v in config.to_dict().items() if k not in left_out and not k.startswith("_")}

    return type(one) == type(other) and fields(one) == fields(other)  # noqa: E721 (a subclass with a setting is equal)


def _setting(cls: type[PreTrainedModel], vwt: Any, source: Any = None) -> VWTConfig | None:
    """What `vwt` asks for, refused where it is not valid, or where a model of this class cannot have it.

    Args:
        source: the repository or folder whose config may be where `vwt` comes from.
    """
    with _said_of(source):
        setting = VWTConfig.parse(vwt)
        if setting is not None:
            require_supported(cls, not setting.drops)
    return setting


@contextlib.contextmanager
def _said_of(source: Any) -> Iterator[None]:
    """Makes errors name the repository or folder `source` whose config.json holds the setting; `None` for none."""
    try:
        yield
    except (FileNotFoundError, TypeError, ValueError) as error:
        if source is None:
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"`vwt` in config.json of {source}: {error} `vwt=False` loads the plain model.") from error


def _follow(model: PreTrainedModel, source: Any, hub_kwargs: dict[str, Any]) -> None:
    """Compresses a model that was just made, or those of its parts, whose configs hold a setting.

    Args:
        source: where the model was loaded from; `None` for nowhere. Then a setting that a user typed may go by where
            its config is from, and no other: a config.json can name any folder as that.
    """
    parts = parts_of(model)
    if parts:
        own_config(model)
    asked = [(part.config, part.config.vwt) for part in parts]
    for part in parts:
        vwt = part.config.vwt
        setting = _setting(type(part), vwt, source)
        if setting is None:
            part.config.vwt = None
            continue
        with _said_of(source):
            typed = is_typed(vwt)
            named = "" if source is None and not typed else source
            compress_by(part, setting, trusted=typed, source=named, **hub_kwargs)
    for config in configs_of(model):
        if config.vwt is None or _among(config, [part.config for part in parts]):
            continue
        if any(_ask_alike(config.vwt, vwt) and type(config) == type(own) for own, vwt in asked):  # noqa: E721 (a subclass with a setting is equal)
            config.vwt = None  # a copy that the model made of a tower's, as for layers of a decoder
        else:
            with _said_of(source):
                raise ValueError(
                    f"the setting is in a {type(config).__name__} that belongs to no model within this "
                    f"{type(model).__name__}; move it to the config of the whole or of its vision tower."
                )


def _ask_alike(vwt: Any, other: Any) -> bool:
    """Whether two values of `vwt` ask for the same setting, of which one may hold a copy of the other's vocabulary."""
    return vwt == other or (
        type(vwt) is type(other) and isinstance(vwt, VWTConfig) and vwt.to_dict() == other.to_dict()
    )


def _apply(model: PreTrainedModel, setting: VWTConfig | None, hub_kwargs: dict[str, Any]) -> None:
    """Gives a model that was just made the setting that a user asks for, whatever its config says."""
    saved = saved_setting(model.config)
    if setting is not None and saved is not None:
        setting = setting.with_saved(saved)
    for config in configs_of(model):
        config.vwt = None
    if setting is None:
        restore(model)
    else:
        compress_by(model, setting, trusted=True, source=model.name_or_path or None, **hub_kwargs)


_WRAPS = {
    (PreTrainedConfig, "from_dict"): _reading,
    (PreTrainedModel, "from_pretrained"): _loading,
    (PreTrainedModel, "_from_config"): _building_from,
    (PreTrainedModel, "save_pretrained"): _saving,
    (PreTrainedModel, "_upload_modified_files"): _uploading,
    (PreTrainedModel, "__call__"): _calling,
    (GenerationMixin, "generate"): _generating,
    (ImageProcessingMixin, "from_pretrained"): _loading_processor,
    (ImageProcessingMixin, "save_pretrained"): _saving_processor,
    (ProcessorMixin, "save_pretrained"): _saving_processor,
    (PreTrainedTokenizerBase, "from_pretrained"): _leaving_out,
    (Pipeline, "__init__"): _explaining,
}
"""The methods of transformers that `register` puts others in place of, and what makes each of those."""
