"""Registration with transformers: importing this module makes `from_pretrained(..., vwt=...)` work.

Configs are subclasses with one more field, `vwt`; models are transformers' own classes. A config subclass keeps its
parent's name, by which the Auto mappings find models and processors, so `AutoModel*` load the ordinary class for it.
What `vwt` asks for is done in one place, where every loading path of transformers meets: `PreTrainedModel`'s
`from_pretrained` and `_from_config`. So a class loaded by its own name (`CLIPVisionModelWithProjection`, which no Auto
class reaches) takes `vwt` too, and a folder saved with a setting never loads as a plain model that claims to have one.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .compress import compress, restore
from .config import VWTConfig
from .families import FAMILIES, family_of

_NOT_GIVEN: Any = object()


def register() -> None:
    """Gives every family's config the field `vwt` and has transformers' loading act on it. Idempotent."""
    for family in FAMILIES:
        for model_type in family.model_types:
            plain = CONFIG_MAPPING[model_type]
            if "vwt" not in vars(plain):
                config_class = _config_with_vwt(plain)
                globals()[config_class.__name__] = config_class  # where pickle looks for it
                AutoConfig.register(model_type, config_class, exist_ok=True)
    for name, wrap in (("from_pretrained", _loading), ("_from_config", _building)):
        original = vars(PreTrainedModel)[name].__func__
        if not hasattr(original, "takes_vwt"):
            setattr(PreTrainedModel, name, classmethod(wrap(original)))


def _config_with_vwt(plain: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A subclass of `plain`, of the same name, with the field `vwt`; serialised as `plain` where it is `None`."""

    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        fields = plain.to_dict(self)
        if fields.get("vwt") is None:
            fields.pop("vwt", None)
        elif isinstance(fields["vwt"], VWTConfig):
            fields["vwt"] = fields["vwt"].to_dict()
        return fields

    return type(
        plain.__name__,
        (plain,),
        {
            "__module__": __name__,
            "__qualname__": plain.__name__,
            "__doc__": plain.__doc__,
            "__annotations__": {"vwt": Any},
            "vwt": None,
            "to_dict": to_dict,
        },
    )


def _loading(original: Any) -> Any:
    """`PreTrainedModel.from_pretrained` that takes `vwt`, or else follows the config's."""

    @functools.wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        if vwt is _NOT_GIVEN:
            vwt = getattr(kwargs.get("config"), "vwt", _NOT_GIVEN)
        _refuse_early(cls, vwt)
        loaded = original(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _apply(model, getattr(model.config, "vwt", None) if vwt is _NOT_GIVEN else vwt)
        return loaded

    from_pretrained.takes_vwt = True  # type: ignore[attr-defined]
    return from_pretrained


def _building(original: Any) -> Any:
    """`PreTrainedModel._from_config` (behind `AutoModel.from_config`) that takes `vwt`, or else follows the config's."""

    @functools.wraps(original)
    def _from_config(cls: type[PreTrainedModel], config: Any, *, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        asked = getattr(config, "vwt", None) if vwt is _NOT_GIVEN else vwt
        _refuse_early(cls, asked)
        if vwt is not _NOT_GIVEN:
            config = copy.deepcopy(config)
        model = original(cls, config, **kwargs)
        _apply(model, asked)
        return model

    _from_config.takes_vwt = True  # type: ignore[attr-defined]
    return _from_config


def _refuse_early(cls: type[PreTrainedModel], vwt: Any) -> None:
    """Raises before any weight is read or made, where class and setting alone tell that `vwt` cannot be had."""
    if vwt is not _NOT_GIVEN and VWTConfig.parse(vwt) is not None:
        family_of(cls)


def _apply(model: PreTrainedModel, vwt: Any) -> None:
    """Compresses a model just loaded, or leaves it, and its config, without a setting."""
    setting = VWTConfig.parse(vwt)
    if setting is not None:
        compress(model, setting)
    elif getattr(model.config, "vwt", None) is not None:
        restore(model)
