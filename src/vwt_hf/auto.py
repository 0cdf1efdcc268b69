"""Registration with transformers' Auto classes: importing this module makes `from_pretrained(..., vwt=...)` work.

Configs are subclasses with one more field, `vwt`; models are not. What is registered for such a config loads the
ordinary Hugging Face class, so that class names, weight renaming and state dicts are transformers' own, and then calls
`compress` on it.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .compress import compress
from .config import VWTConfig
from .families import FAMILIES, Family, require_compressible, unsupported_message


def register() -> None:
    """Registers every family of the table with `AutoConfig` and with each `AutoModel*` that knows it. Idempotent."""
    auto_classes = [
        value
        for value in vars(modeling_auto).values()
        if isinstance(value, type) and issubclass(value, _BaseAutoModelClass) and value._model_mapping is not None
    ]
    for family in FAMILIES:
        for model_type in family.model_types:
            plain = CONFIG_MAPPING[model_type]
            if "vwt" in vars(plain):
                continue
            config_class = _config_with_vwt(plain)
            globals()[config_class.__name__] = config_class
            AutoConfig.register(model_type, config_class, exist_ok=True)
            for auto_class in auto_classes:
                names = auto_class._model_mapping._model_mapping.get(model_type)
                if names is not None:
                    auto_class.register(config_class, _loader(family, auto_class, plain, names), exist_ok=True)
    _refuse_unsupported()


def _config_with_vwt(plain: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A subclass of `plain` with the field `vwt`. It keeps the name, by which transformers finds processors."""
    return type(
        plain.__name__,
        (plain,),
        {
            "__module__": __name__,
            "__qualname__": plain.__name__,
            "__doc__": plain.__doc__,
            "__annotations__": {"vwt": Any},
            "vwt": None,
        },
    )


def _loader(
    family: Family, auto_class: type[_BaseAutoModelClass], plain: type[PreTrainedConfig], names: str | tuple[str, ...]
) -> type:
    """What stands for the model class in `auto_class` where the config has `vwt`: it loads that class, then compresses.

    It carries the name and module of the class that it loads, because libraries read both from the mapping.
    """
    candidates = (names,) if isinstance(names, str) else tuple(names)

    def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        asked = [name for name in (config.architectures or []) if name in candidates]
        return getattr(transformers, (asked or candidates)[0])

    def load(build: Any, config: PreTrainedConfig, kwargs: dict[str, Any]) -> Any:
        setting = VWTConfig.parse(kwargs.pop("vwt", getattr(config, "vwt", None)))
        if setting is not None:
            require_compressible(family, model_class(config), config)
        config = copy.deepcopy(config)
        config.vwt = None
        loaded = build(config=config, **kwargs)
        if setting is not None:
            compress(loaded[0] if isinstance(loaded, tuple) else loaded, setting)
        return loaded

    class Loader:
        @classmethod
        def from_pretrained(cls, name: Any, *args: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
            return load(functools.partial(model_class(config).from_pretrained, name, *args), config, kwargs)

        @classmethod
        def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Any:
            plain_class = model_class(config)
            return load(lambda config, **rest: plain_class._from_config(config, **rest), config, kwargs)

    Loader.__name__ = Loader.__qualname__ = candidates[0]
    Loader.__module__ = plain.__module__.replace("configuration_", "modeling_")
    return Loader


def _refuse_unsupported() -> None:
    """Has `AutoConfig.from_pretrained(..., vwt=...)` name the supported families where a config does not take `vwt`.

    Without this the keyword travels on to the model's constructor, whose TypeError says nothing of vwt_hf.
    """
    original = AutoConfig.from_pretrained.__func__  # type: ignore[attr-defined]
    if hasattr(original, "__wrapped__") and original.__module__ == __name__:
        return

    @functools.wraps(original, assigned=("__name__", "__qualname__", "__doc__"))
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        if "vwt" not in kwargs:
            return result
        config = result[0] if isinstance(result, tuple) else result
        if not hasattr(type(config), "vwt"):
            if VWTConfig.parse(kwargs["vwt"]) is not None:
                raise ValueError(unsupported_message(config.model_type))
            if isinstance(result, tuple):
                result[1].pop("vwt", None)
        return result

    AutoConfig.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]
