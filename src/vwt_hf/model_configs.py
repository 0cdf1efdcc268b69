"""The field `vwt` of transformers' configs, and the class of a config that has a setting.

A config without a setting is of its plain class. One that is given a setting becomes an instance of a subclass of the
same name. So does every config of a compressed vision tower: layers read there which attention to use, and while a
forward groups patches they read the name of this package's. Nothing about a forward is ever stored in a config.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import os
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .config import VWTConfig
from .forward import current_forward
from .vocabulary import VisualVocabulary

PLAIN = "_vwt_plain_class"
"""The attribute of a subclass, of a config or an image processor that has a setting, which holds the plain class."""
BY_PLAN = "vwt_"
"""Prefix of the names of this package's attention implementations: `vwt_sdpa` is sdpa by the plan of the forward."""


def read_setting(config: PreTrainedConfig) -> Any:
    """`config.vwt`, also where `unregister` took that field out of transformers."""
    return config.__dict__.get("vwt")


def write_setting(config: PreTrainedConfig, vwt: Any) -> None:
    """Sets `config.vwt`, as `read_setting` reads it."""
    config.__dict__.pop("vwt", None)
    if vwt is not None and vwt is not False:
        config.__dict__["vwt"] = vwt
    attend_by_plan(config, is_by_plan(config))


def attend_by_plan(config: PreTrainedConfig, by_plan: bool = True) -> None:
    """Has layers that read `config` use this package's attention in forwards that group patches, or ends that.

    It does not depend on `config.vwt`, which a user may delete while the model is still compressed.
    """
    plain = plain_class(type(config))
    config.__class__ = config_subclass(plain, by_plan) if by_plan or "vwt" in config.__dict__ else plain


def is_by_plan(config: PreTrainedConfig) -> bool:
    """Whether `attend_by_plan` was called for a config and not ended."""
    return isinstance(type(config), _StandsFor) and "__getattribute__" in vars(type(config))


def plain_class(made: type) -> type:
    """The plain class of a subclass that this package made; any other class itself."""
    return vars(made).get(PLAIN, made)


class _StandsFor(type):
    """Metaclass of the subclasses: they are equal to their plain class, so that Auto classes find its models."""

    def __eq__(cls, other: object) -> bool:
        return isinstance(other, type) and plain_class(other) is plain_class(cls)

    def __hash__(cls) -> int:
        plain = plain_class(cls)
        return super().__hash__() if plain is cls else hash(plain)


@functools.cache
def config_subclass(plain: Any, by_plan: bool) -> type[PreTrainedConfig]:
    """The subclass of a config class, of the same name, whose instances have a setting and write it to config.json.

    Args:
        by_plan: whether layers that read such a config use this package's attention in forwards that group patches.
            Not for every config, as reading one breaks the graph of a compiled model where no forward is traced.
    """

    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        fields = plain.to_dict(self)
        if is_typed(fields.get("vwt")):
            setting = VWTConfig.parse(fields["vwt"])
            fields["vwt"] = setting and setting.to_dict()
        return fields

    def read(self: PreTrainedConfig, name: str) -> Any:
        value = plain.__getattribute__(self, name)
        if name != "_attn_implementation":
            return value
        forward = current_forward()
        if forward is None or forward.grouped is None:
            return value  # else this package's attention asks whether it is of that forward: configs may be shared
        return BY_PLAN + (value or "eager")

    def reduce(self: PreTrainedConfig, protocol: Any) -> Any:
        made, given, *state = plain.__reduce_ex__(self, protocol)
        if made is not copyreg.__newobj__ or vars(type(self)).get(PLAIN) is not plain:  # type: ignore[attr-defined]
            return made, given, *state
        return _new_config, (plain, by_plan), *state  # cloudpickle and dill would write the class itself

    def equal(self: PreTrainedConfig, other: Any) -> Any:
        if plain_class(type(self)) is not plain_class(type(other)):
            return NotImplemented
        names = ["vwt", *(field.name for field in dataclasses.fields(plain) if field.compare)]
        one, two = self.to_dict(), other.to_dict()
        return all(one.get(name) == two.get(name) for name in names)

    body: dict[str, Any] = {
        PLAIN: plain,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,  # where transformers finds example checkpoints
        "to_dict": to_dict,
        "__reduce_ex__": reduce,
        "__eq__": equal,
        "__hash__": plain.__hash__,
    }
    if by_plan:
        # Configs of transformers have a `__getattribute__`, and of such classes torch before 2.13 traces no properties.
        body["__getattribute__"] = read
    return _metaclass(plain, by_plan)(plain.__name__, (plain,), body)


def _metaclass(plain: Any, by_plan: bool) -> Any:
    """The metaclass of one `config_subclass`, by which that is equal to its plain class, and pickled as itself."""
    kinds = (type(plain),) if isinstance(plain, _StandsFor) else (_StandsFor, type(plain))
    metaclass = type("_ConfigWithSetting", kinds, {})
    # By its name `pickle` would find the plain class.
    copyreg.pickle(
        metaclass, lambda own: (config_subclass, (plain, by_plan)) if PLAIN in vars(own) else own.__qualname__
    )
    return metaclass


def _new_config(plain: Any, by_plan: bool) -> PreTrainedConfig:
    """An instance of `config_subclass` without fields, which unpickling sets."""
    config_class = config_subclass(plain, by_plan)
    return config_class.__new__(config_class)


def is_typed(vwt: Any) -> bool:
    """Whether a user's own code set this value of `vwt`: a config.json gives none of these types."""
    return isinstance(vwt, (VWTConfig, VisualVocabulary, os.PathLike))


SETTING = property(read_setting, write_setting, doc="What `vwt` asks for: a setting as JSON, or `None`.")


def configs_of_modules(modules: Iterable[nn.Module]) -> list[PreTrainedConfig]:
    """The configs that these modules hold, each once; a layer may have another than the model around it."""
    held = (module.__dict__.get("config") for module in modules)
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())


def is_among(config: PreTrainedConfig, configs: list[PreTrainedConfig]) -> bool:
    """Whether `configs` holds this very object: `in` would find others of the same values."""
    return any(config is other for other in configs)
