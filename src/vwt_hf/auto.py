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
import inspect
import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import attention
from .compress import compress, lexicon_of, restore
from .config import VWTConfig
from .families import ROWS, require_supported
from .lexicon import BESIDE_WEIGHTS
from .vocabulary import VisualVocabulary

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
PUSH_KWARGS = ("repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags")
_NOT_GIVEN: Any = object()


def register() -> None:
    """Gives every family's config the field `vwt` and has transformers' loading act on it. Idempotent."""
    for row in ROWS:
        for model_type in row.model_types:
            plain = CONFIG_MAPPING[model_type]
            if "vwt" not in vars(plain):
                config_class = _config_with_vwt(plain)
                globals()[config_class.__name__] = config_class  # where pickle looks for it
                AutoConfig.register(model_type, config_class, exist_ok=True)
    attention.register()
    if not hasattr(PreTrainedModel.save_pretrained, "knows_vwt"):
        loading, building = (vars(PreTrainedModel)[name].__func__ for name in ("from_pretrained", "_from_config"))
        PreTrainedModel.from_pretrained = classmethod(_loading(loading))  # type: ignore[method-assign,assignment]
        PreTrainedModel._from_config = classmethod(_building(building))  # type: ignore[method-assign,assignment]
        PreTrainedModel.save_pretrained = _saving(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]
        tokenizing = vars(PreTrainedTokenizerBase)["from_pretrained"].__func__
        PreTrainedTokenizerBase.from_pretrained = classmethod(_unasked(tokenizing))  # type: ignore[method-assign,assignment]


def _config_with_vwt(plain: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """A subclass of `plain`, of the same name, with the field `vwt`; serialised as `plain` where it is `None`."""

    def to_dict(self: PreTrainedConfig) -> dict[str, Any]:
        fields = plain.to_dict(self)
        if fields.get("vwt") is None:
            fields.pop("vwt", None)
        elif isinstance(fields["vwt"], (VWTConfig, VisualVocabulary, os.PathLike)):
            setting = VWTConfig.parse(fields["vwt"])
            fields["vwt"] = setting and setting.to_dict()
        return fields

    return type(
        plain.__name__,
        (plain,),
        {
            "__module__": __name__,
            "__qualname__": plain.__name__,
            "__doc__": plain.__doc__,  # where transformers finds example checkpoints
            "__annotations__": {"vwt": Any},
            "vwt": None,
            "to_dict": to_dict,
        },
    )


def _loading(original: Any) -> Any:
    """`PreTrainedModel.from_pretrained` that takes `vwt`, or else follows the config's."""

    @functools.wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        if vwt is not _NOT_GIVEN:
            setting = _setting(cls, vwt)
            loaded = original(cls, *args, **kwargs)
        else:
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            # With no config given there is none to look at before the weights are read.
            setting = _setting(cls, getattr(kwargs.get("config"), "vwt", None), source)
            loaded = original(cls, *args, **kwargs)
            setting = setting or _setting(cls, getattr(_model(loaded).config, "vwt", None), source)
        _apply(_model(loaded), setting, {name: kwargs[name] for name in HUB_KWARGS if name in kwargs})
        return loaded

    return from_pretrained


def _unasked(original: Any) -> Any:
    """`from_pretrained` of text tokenizers, without `vwt`: pipelines hand them the model's keyword arguments, which
    they keep and save."""

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, vwt: Any = None, **kwargs: Any) -> Any:
        return original(cls, *args, **kwargs)

    return from_pretrained


def _building(original: Any) -> Any:
    """`_from_config`, which is behind `AutoModel.from_config`, that takes `vwt`, or else follows the config's."""

    @functools.wraps(original)
    def _from_config(cls: type[PreTrainedModel], config: Any, *, vwt: Any = _NOT_GIVEN, **kwargs: Any) -> Any:
        setting = _setting(cls, getattr(config, "vwt", None) if vwt is _NOT_GIVEN else vwt)
        if vwt is not _NOT_GIVEN:
            config = copy.deepcopy(config)
        model = original(cls, config, **kwargs)
        _apply(model, setting, {})
        return model

    return _from_config


def _saving(original: Any) -> Any:
    """`PreTrainedModel.save_pretrained` that writes a vocabulary which is not on the Hub beside the weights."""

    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        lexicon = lexicon_of(self)
        if lexicon is None or lexicon.setting.to_dict()["vocabulary"] is not None:
            return original(self, save_directory, *args, **kwargs)
        call = signature.bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        if call.arguments["is_main_process"]:
            lexicon.vocabulary.save_pretrained(Path(save_directory, BESIDE_WEIGHTS), card=False)
        if not call.arguments["push_to_hub"]:
            return original(*call.args, **call.kwargs)
        # The original uploads what it wrote itself; `push_to_hub` uploads the words, too.
        call.arguments["push_to_hub"] = False
        rest = call.arguments["kwargs"]
        push = {name: rest.pop(name) for name in PUSH_KWARGS if name in rest}
        saved = original(*call.args, **call.kwargs)
        self.push_to_hub(push.pop("repo_id", Path(save_directory).name), token=call.arguments["token"], **push)
        return saved

    save_pretrained.knows_vwt = True  # type: ignore[attr-defined]
    return save_pretrained


def _setting(cls: type[PreTrainedModel], vwt: Any, source: Any = None) -> VWTConfig | None:
    """What `vwt` asks for, refused where it is not valid, or where a model of this class cannot have it.

    Args:
        source: the repository or folder whose config may be where `vwt` comes from.
    """
    try:
        setting = VWTConfig.parse(vwt)
        if setting is not None:
            require_supported(cls, setting.restores)
    except (TypeError, ValueError) as error:
        if source is None:
            raise
        raise ValueError(
            f"`vwt`, as given or in config.json of {source}: {error} `vwt=False` loads the plain model."
        ) from error
    return setting


def _model(loaded: Any) -> PreTrainedModel:
    return loaded[0] if isinstance(loaded, tuple) else loaded


def _apply(model: PreTrainedModel, setting: VWTConfig | None, hub_kwargs: dict[str, Any]) -> None:
    """Compresses a model just loaded, or leaves it, and its config, without a setting."""
    if setting is not None:
        compress(model, setting, **hub_kwargs)
    elif getattr(model.config, "vwt", None) is not None:
        restore(model)
