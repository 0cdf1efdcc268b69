"""Loading: the `vwt` that a user gives, or else the one that a file holds, becomes the setting of a model or an image
processor."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import hub

from . import image_processing
from .compress import HUB_KWARGS, compress_by, configs_of, own_config, parts_of, restore, setting_of
from .config import VWTConfig, naming_file
from .families import require_supported
from .model_configs import is_among, is_typed
from .processors import configs_within, saved_setting, stated_patch_size
from .saved_words import weights_in
from .shared_changes import holding
from .weights import remember_load

resolve_revision: Any = getattr(hub, "resolve_revision", None)  # an older transformers keeps the commit in the config
NOT_GIVEN: Any = object()
"""The default of `vwt`, as `None` asks for the plain model."""
_building: contextvars.ContextVar[bool] = contextvars.ContextVar("vwt_hf building", default=False)
"""True while a model is loaded or built: models that are built within it stay plain until all of it is there."""


def reading_configs(original: Any) -> Any:
    """`PreTrainedConfig.from_dict` that takes `vwt`, and hands it on to the model that is being loaded, if one is."""

    @functools.wraps(original)
    def from_dict(cls: Any, config_dict: dict[str, Any], vwt: Any = NOT_GIVEN, **kwargs: Any) -> Any:
        loaded = original(cls, config_dict, **kwargs)
        if vwt is NOT_GIVEN:
            return loaded
        if isinstance(loaded, tuple):
            return loaded[0], loaded[1] | {"vwt": vwt}
        # Without `patch_size` of an image processor: its `vwt` also reaches the config by which a tokenizer is found.
        setting, patch_size = image_processing.parse_vwt(vwt)
        own = stated_patch_size(loaded)
        if None not in (patch_size, own) and patch_size != own:
            raise ValueError(f"vwt['patch_size'] is {patch_size}, and the model's config says {own}; leave it out.")
        for _, config in configs_within(loaded):
            config.vwt = None
        loaded.vwt = setting
        return loaded

    return from_dict


def loading_models(original: Any) -> Any:
    """`PreTrainedModel.from_pretrained` that takes `vwt`, or else follows the settings in the config."""

    @functools.wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, vwt: Any = NOT_GIVEN, **kwargs: Any) -> Any:
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if vwt is not NOT_GIVEN:
            setting = _checked_setting(cls, vwt)
        else:
            # Without a config given there is none to refuse before the weights are read.
            _checked_setting(cls, getattr(kwargs.get("config"), "vwt", None), source)
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        resolved = _resolved_revision(source, hub_kwargs)
        if resolved is not None:
            kwargs["revision"] = resolved
        folder = Path(source, kwargs.get("subfolder") or "") if source and os.path.isdir(source) else None
        before = None if folder is None else weights_in(folder)
        with holding(_building, True):
            loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        named = "" if source is None else model.name_or_path
        if folder is None and named == source:
            # What lies beside the weights is read of the same commit, also by a `compress` after another push.
            hub_kwargs["revision"] = _commit_of(model, kwargs) or resolved
        if source is None:  # transformers names such a model "None"
            for config in configs_of(model):
                config.name_or_path = ""
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                part.name_or_path = named  # a config.json can name any folder as that of a part
                remember_load(part, hub_kwargs)
        if vwt is NOT_GIVEN:
            _follow(model, named or source, hub_kwargs)  # of an adapter's folder: that of its base
        else:
            _apply(model, setting, hub_kwargs)
        has_own_words = any(getattr(setting_of(part), "saved_as", None) for part in parts_of(model))
        if folder is not None and has_own_words and weights_in(folder) != before:
            raise ValueError(
                f"{folder}: a model was saved into it while this one was loaded, so weights and words may be of two "
                "models. Load it again."
            )
        return loaded

    return from_pretrained


def _resolved_revision(source: Any, hub_kwargs: dict[str, Any]) -> Any:
    """The revision to load by: with its commit where transformers can find that, and else as it was asked for."""
    revision = hub_kwargs.get("revision")
    if resolve_revision is None:
        return revision
    where = {name: hub_kwargs[name] for name in ("token", "cache_dir", "local_files_only") if name in hub_kwargs}
    return resolve_revision(source, revision, **where)


def _commit_of(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """The commit that the config of a model was read from, as an older transformers keeps it there."""
    given = kwargs.get("config")
    is_its_own = given is None or getattr(given, "name_or_path", None) == model.name_or_path
    return getattr(model.config, "_commit_hash", None) if is_its_own else None


def building_models(original: Any) -> Any:
    """`_from_config`, which is behind `AutoModel.from_config`, that takes `vwt`, or else follows the config's."""

    @functools.wraps(original)
    def _from_config(cls: type[PreTrainedModel], config: Any, *, vwt: Any = NOT_GIVEN, **kwargs: Any) -> Any:
        inner = _building.get()
        if vwt is not NOT_GIVEN:
            setting = _checked_setting(cls, vwt)
            config = copy.deepcopy(config)
        elif not inner:
            _checked_setting(cls, config.vwt)
        with holding(_building, True):
            model = original(cls, config, **kwargs)
        if vwt is not NOT_GIVEN:
            _apply(model, setting, {})
        elif not inner:
            _follow(model, None, {})
        return model

    return _from_config


def loading_processors(original: Any) -> Any:
    """`from_pretrained` of image processors that takes `vwt`, or else follows the setting in the processor's file."""

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, vwt: Any = NOT_GIVEN, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if source and os.path.isfile(source):  # the image processor's own, with words and a model's config beside it
            source = os.path.dirname(os.path.abspath(source))
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        if vwt is NOT_GIVEN:
            image_processing.follow(processor, source, hub_kwargs, kwargs)
        else:
            image_processing.apply(processor, vwt, source, hub_kwargs)
        return loaded

    return from_pretrained


def loading_tokenizers(original: Any) -> Any:
    """`from_pretrained` of text tokenizers that ignores `vwt`: a pipeline hands them the model's keyword arguments, and
    they would keep and save it."""

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, vwt: Any = None, **kwargs: Any) -> Any:
        return original(cls, *args, **kwargs)

    return from_pretrained


def _checked_setting(cls: type[PreTrainedModel], vwt: Any, source: Any = None) -> VWTConfig | None:
    """Reads `vwt`, and refuses a setting that is not valid or that a model of this class cannot have.

    Args:
        source: the repository or folder whose config holds `vwt`, for the message; `None` if a user gave it.
    """
    with _naming_source(source):
        setting = VWTConfig.parse(vwt)
        if setting is not None:
            require_supported(cls, not setting.drops)
    return setting


def _naming_source(source: Any) -> contextlib.AbstractContextManager[None]:
    """Has errors name `source`, the repository or folder whose config.json holds the setting; `None` changes none."""
    return contextlib.nullcontext() if source is None else naming_file(f"in config.json of {source}", "model")


def _follow(model: PreTrainedModel, source: Any, hub_kwargs: dict[str, Any]) -> None:
    """Compresses a model that was just made, or its parts, if their configs hold a setting.

    Args:
        source: where the model was loaded from; `None` for nowhere. In that case only a setting that a user typed may
            read files from where its config says that it is from: a config.json can name any folder there.
    """
    parts = parts_of(model)
    if parts:
        own_config(model)
    asked = [(part.config, part.config.vwt) for part in parts]
    for part in parts:
        vwt = part.config.vwt
        setting = _checked_setting(type(part), vwt, source)
        if setting is None:
            part.config.vwt = None
            continue
        with _naming_source(source):
            typed = is_typed(vwt)
            named = "" if source is None and not typed else source
            compress_by(part, setting, trusted=typed, source=named, **hub_kwargs)
    for config in configs_of(model):
        if config.vwt is None or is_among(config, [part.config for part in parts]):
            continue
        if any(_ask_alike(config.vwt, vwt) and type(config) == type(own) for own, vwt in asked):  # noqa: E721 (a subclass with a setting is equal)
            config.vwt = None  # a copy that the model made of a tower's, as for layers of a decoder
        else:
            with _naming_source(source):
                raise ValueError(
                    f"the setting is in a {type(config).__name__} that belongs to no model within this "
                    f"{type(model).__name__}; move it to the config of the whole or of its vision tower."
                )


def _ask_alike(vwt: Any, other: Any) -> bool:
    """Whether two values of `vwt` ask for the same setting, also where one holds a copy of the other's vocabulary."""
    return vwt == other or (
        type(vwt) is type(other) and isinstance(vwt, VWTConfig) and vwt.to_dict() == other.to_dict()
    )


def _apply(model: PreTrainedModel, setting: VWTConfig | None, hub_kwargs: dict[str, Any]) -> None:
    """Gives a model that was just made a user's setting, in place of any in its config; `None`: the plain model."""
    saved = saved_setting(model.config)
    if setting is not None and saved is not None:
        setting = setting.with_saved(saved)
    for config in configs_of(model):
        config.vwt = None
    if setting is None:
        restore(model)
    else:
        compress_by(model, setting, trusted=True, source=model.name_or_path or None, **hub_kwargs)
