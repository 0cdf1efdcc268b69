"""`compress` puts the hooks of a setting into a model in memory, and `restore` takes them out again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import inspect
import itertools
import logging
import types
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin

from . import attention, hooks
from .config import ModelFacts, VWTConfig
from .evidence import is_evidence_of
from .families import (
    Family,
    Tower,
    family_of,
    find_layers,
    find_places,
    find_stacks,
    find_tower,
    is_of,
    model_of,
    models_around,
    refuse_masked,
    refuse_to_drop,
    why_every_patch,
)
from .forward import GivenWords, call_with, current_forward, traced_within, words_to_generate_by
from .model_configs import attend_by_plan, configs_of_modules, is_among, is_by_plan, read_setting, write_setting
from .own_thread import in_own_thread
from .processors import configs_within
from .stand_ins import StandIn, class_forward, is_ours, own_forward, require_replaceable, slot_of
from .vouch import may_change_rows, vouch, vouch_rows
from .weights import loaded_by, source_of

logger = logging.getLogger(__name__)
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Keyword arguments of transformers' `from_pretrained` that say where files are read from."""


def compress(model: PreTrainedModel, config: Any = True, **hub_kwargs: Any) -> PreTrainedModel:
    """Makes `model` group or drop patches before its first layer or also later, in place, without changing a weight.

    A model that is compressed already gets the new setting instead of the old one. `model.config.vwt` holds the setting
    (a JSON-ready dict) until `restore`, and `save_pretrained` writes it. Do not call it while another thread runs the
    model, nor between a forward and its backward.

    Args:
        model: a transformers model of a supported family (`vwt_hf.supported()`).
        config: a `VWTConfig`, a dict of its fields (without `method` that of the paper, `"intra"`), `True` for
            `method="gradual"` with its defaults, or a vocabulary (its Hub id, its folder or itself) for inter-image
            words. `False` restores the plain model.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, ... for a vocabulary and an image processor on the Hub;
            by default those that the model was loaded with. `revision` and `subfolder` are those of the image
            processor: a vocabulary's revision is a field of the setting.

    Returns:
        The same `model`. Its `last_hidden_state` is (batch, prefix tokens + kept patches, hidden) where patches are
        discarded, and else (batch, prefix tokens + patches, hidden), each patch with its token's hidden state.

    Raises:
        TypeError: `model` is no transformers model, or a keyword is none of those.
        ValueError: the family is not supported, the task needs every patch, or `config` is not valid.
        OSError: the vocabulary or the image processor cannot be read.

    Example:
        >>> import torch
        >>> from transformers import ViTConfig, ViTModel
        >>> model = ViTModel(ViTConfig(num_hidden_layers=1))
        >>> compress(model, VWTConfig(keep_ratio=0.25)).config.vwt["keep_ratio"]
        0.25
        >>> model(pixel_values=torch.zeros(1, 3, 224, 224)).last_hidden_state.shape  # CLS + 49 of 196 patches
        torch.Size([1, 50, 768])
    """
    model = model_of(model)
    if unknown := sorted(hub_kwargs.keys() - set(HUB_KWARGS)):
        raise TypeError(
            f"compress() got {', '.join(unknown)}; beside the model and its setting it takes {', '.join(HUB_KWARGS)}. "
            "What belongs to the setting goes into it: compress(model, VWTConfig(keep_ratio=...))."
        )
    setting = VWTConfig.parse(config)
    if setting is None:
        return restore(model)
    own_config(model)
    return compress_by(model, setting, trusted=True, **hub_kwargs)


def compress_by(
    model: PreTrainedModel,
    setting: VWTConfig,
    *,
    trusted: bool,
    source: Any = None,
    image_processor: Any = None,
    **hub_kwargs: Any,
) -> PreTrainedModel:
    """`compress` by a setting that is read already, of a model that shares its config with no other.

    Args:
        trusted: whether a user wrote `setting`. One from a config.json names words on the Hub alone, no folder.
        source: Hub id or folder that words and image processor of `model` lie in, "" for none; by default what it was
            loaded from.
        image_processor: the one that makes the model's images; by default the one that lies in `source`.
    """
    _free_dropped(model)
    family = family_of(model)
    tower = find_tower(model, family)
    needs_all = why_every_patch(model, tower)
    if needs_all is not None and not setting.searches and setting.output is None:
        setting = dataclasses.replace(setting, output="full")  # words that leave patches out are refused
    if needs_all is not None and setting.drops:
        refuse_to_drop(needs_all)
    for part in models_around(model, tower):
        refuse_masked(type(part))
    require_whole_images(tower, family)
    present = setting_of(model)
    _require_own_parts(model, tower)
    if present is None:
        if family.tried:
            in_own_thread(vouch, model, tower)
        elif family.padded is None and not family.masks and may_change_rows(tower):
            in_own_thread(vouch_rows, model, tower)
    saved = read_setting(model.config)
    if present is not None and present.is_saved_as(saved) and saved.get("saved_as"):
        name = {"saved_as": saved["saved_as"]}  # of its words since the last save
        present = dataclasses.replace(present, **name)
    facts = ModelFacts(
        source_of(model) if source is None else str(source),
        tower.patch_size,
        tower.channels,
        present,
        trusted,
        loaded_by(model) | hub_kwargs,
        image_processor=image_processor,
    )
    setting = in_own_thread(setting.prepared, facts)
    if setting.evidence is not None and not is_evidence_of(setting.evidence, setting.to_dict()):
        logger.warning("The setting was changed since its evidence was measured, which is left out.")
        setting = dataclasses.replace(setting, evidence=None)
    if _attends_by_sizes(setting, family):
        setting.joins(len(find_layers(tower.module)))  # refuses layers that the model lacks
        _require_usable_attention(tower, family)
    try:  # nothing is refused from here on: a model keeps the setting that it has
        _take_out(model)
        _hook_in(model, tower, family, setting)
        write_setting(model.config, setting.to_dict())
    except BaseException:  # an interrupt, which is not to leave half of a setting
        _take_out(model)
        raise
    return model


_LARGE = 2**26
"""Bytes of weights (64 MiB) from which on a compressed model must not be left in memory."""
_large: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
"""Models of that size that were compressed and are still in memory."""


def _free_dropped(model: PreTrainedModel) -> None:
    """Frees compressed models that nobody holds any more, before another large one is compressed.

    A compressed model holds methods bound to itself, a cycle that only Python's garbage collector frees. That goes by
    the number of objects, not by gigabytes of weights. A user who has turned it off is left alone.
    """
    if sum(each.nbytes for each in model.parameters()) < _LARGE:
        return
    if gc.isenabled() and any(other is not model and takes_words(other) for other in list(_large)):
        gc.collect()
    _large.add(model)


def _has_hooked_parts(module: nn.Module) -> bool:
    """Whether embeddings or layers within a module have hooks of this package."""
    return any(isinstance(hook, hooks.Hook) for part in module.modules() for hook in part._forward_hooks.values())


def _require_own_parts(model: PreTrainedModel, tower: Tower) -> None:
    """Raises `ValueError` where a plain tower shares embeddings or layers with a compressed one."""
    pre_hooks = (part._forward_pre_hooks.values() for part in (tower.module, *models_around(model, tower)))
    is_plain = not any(isinstance(hook, hooks.Hook) for each in pre_hooks for hook in each)
    if is_plain and _has_hooked_parts(tower.module):
        raise ValueError(
            f"Embeddings or layers of the {type(tower.module).__name__} belong to another vision tower, too, which is "
            "compressed. Call vwt_hf.restore on that model first, or give each tower its own (copy.deepcopy)."
        )


def _attends_by_sizes(setting: VWTConfig, family: Family) -> bool:
    """Whether tokens stand for different numbers of patches, so that attention needs the plan."""
    return setting.shortens and (setting.groups or family.padded is not None)


def _replaced_attentions(tower: Tower, family: Family) -> list[tuple[nn.Module, Any]]:
    """Attention modules that do not use transformers' `AttentionInterface`, each with the function that replaces its
    forward."""
    return [
        (module, stand_in)
        for module in tower.module.modules()
        for name, stand_in in family.attentions.items()
        if is_of(module, name)
    ]


def _require_usable_attention(tower: Tower, family: Family) -> None:
    """Refuses a tower whose attention cannot go by a plan, or which runs one layer twice."""
    attention.require_usable(tower.module, family.padded is not None)
    replaced = _replaced_attentions(tower, family)
    if not replaced:
        attention.require_registered(tower.module)
    for module, _ in replaced:
        require_replaceable(module)
    _require_each_once(tower)


def _hook_in(model: PreTrainedModel, tower: Tower, family: Family, setting: VWTConfig) -> None:
    """Puts hooks, stand-ins for methods and configs into a plain model, by which it runs compressed."""
    by_sizes = _attends_by_sizes(setting, family)
    relative = any(is_of(module, family.relative) for module in tower.module.modules())
    follows = by_sizes or (setting.shortens and relative)
    entered = models_around(model, tower)
    for holder in entered:
        holder.register_forward_pre_hook(hooks.TakeWords(), with_kwargs=True)
        _replace_methods(holder, begins=follows and holder is tower.module)
    if follows:
        by_interface = by_sizes and not _replaced_attentions(tower, family)
        begin = hooks.Begin(relative, by_sizes, family.padded is not None, by_interface, hooks.is_even(setting, family))
        tower.module.register_forward_pre_hook(begin, with_kwargs=True)
    if setting.shortens and not by_sizes:
        tower.module.register_forward_pre_hook(hooks.RefuseMask(), with_kwargs=True)
    _hook_embeddings(tower, family, setting, follows)
    for module in tower.module.modules():
        if by_sizes and is_of(module, family.padded):
            module.register_forward_pre_hook(hooks.MaskPadding())
        if follows and is_of(module, family.relative):
            module.register_forward_pre_hook(hooks.OfWholeImage(), with_kwargs=True)
            module.register_forward_hook(hooks.Bias())
    if by_sizes:
        _hook_layers(tower, family, setting)
    if follows:
        layers = len(hooks.attending_layers(tower.module)[0]) if by_sizes else 0
        tower.module.register_forward_hook(hooks.End(layers), always_call=True)
    for holder in entered:
        holder.register_forward_hook(hooks.EndWords(), always_call=True)


def _hook_embeddings(tower: Tower, family: Family, setting: VWTConfig, follows: bool) -> None:
    """Has the embeddings of a tower make tokens, and its rotary positions follow."""
    runs: list[Any] = [tower.module, *(stack for stack, _ in find_stacks(tower.module))]
    own_rows = any(not type(part).forward.__module__.startswith("transformers.") for part in runs)
    reduce = hooks.Reduce(setting, family, tower.patch_size, tower.channels, follows, own_rows)
    if setting.shortens and setting.repaints:
        tower.embeddings.register_forward_pre_hook(hooks.Repaint(reduce), with_kwargs=True)
    tower.embeddings.register_forward_hook(reduce, with_kwargs=True)
    for module in tower.module.modules():
        if setting.shortens and is_of(module, family.rotary):
            module.register_forward_hook(hooks.Rotate(reduce), with_kwargs=True)


def _hook_layers(tower: Tower, family: Family, setting: VWTConfig) -> None:
    """Has the layers of a tower attend by the plan and join tokens, and what comes after them see every patch."""
    for config in configs_of_modules(tower.module.modules()):  # copies of PEFT's have configs of their own
        attend_by_plan(config)
    for module, stand_in in _replaced_attentions(tower, family):
        setattr(module, slot_of(module), StandIn(stand_in, module))
    places = find_places(tower.module)
    joins = setting.joins(len(places))
    # The first hooks of a layer, of which joining is the first: what transformers records as the layer's hidden states
    # is what the layer gives, whenever it began to. Reentrant checkpointing knows no other tensor's gradient.
    if setting.restores:
        for layer in places[-1]:
            layer.register_forward_hook(hooks.Expand(), prepend=True)
    for number, wanted in joins.items():
        for layer in places[number - 1]:
            layer.register_forward_hook(hooks.Join(setting, wanted), prepend=True)
    if joins and family.rotary is not None:
        for layer in itertools.chain(*places[min(joins) :]):
            layer.register_forward_pre_hook(hooks.RotateTokens(), with_kwargs=True)
    if setting.restores:
        expanding = [stack for stack, _ in find_stacks(tower.module)]
        # A backbone's maps are of what the stack gave, expanded, less prefix tokens: they may have the shape of a plan.
        if not isinstance(tower.module, BackboneMixin):
            expanding.append(tower.module)
        for module in dict.fromkeys(expanding):
            module.register_forward_hook(hooks.Expand())


def _replace_methods(model: PreTrainedModel, begins: bool) -> None:
    """Gives `model` methods that take `patch_words` in place of those by which a user gives it images."""
    model_class: Any = type(model)
    for name in _methods_for_images(model_class):
        if name not in vars(model):
            setattr(model, name, _stand_in_for(model, name, _call_by_words, name))
    if own_forward(model) is None:
        model.forward = _forward_with_words(model, begins)


_names: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()
"""What `_methods_for_images` found of each class."""


def _methods_for_images(model_class: type) -> list[str]:
    """Names of the methods beside `forward` by which a user gives images to a model of that class."""
    if model_class not in _names:
        _names[model_class] = [
            name
            for name, method in inspect.getmembers(model_class, inspect.isfunction)
            if not name.startswith(("_", "prepare_"))
            and name != "forward"
            and not isinstance(inspect.getattr_static(model_class, name), staticmethod)
            and "pixel_values" in inspect.signature(method).parameters
        ]
    return _names[model_class]


def _stand_in_for(model: PreTrainedModel, name: str, function: Any, *given: Any) -> StandIn:
    """What calls `function(model, *given, ...)` under the name and signature of a method of the class of `model`."""
    stand_in = StandIn(function, model, *given)
    method = getattr(type(model), name)
    functools.update_wrapper(stand_in, method)
    stand_in.__signature__ = inspect.signature(method.__get__(model))  # type: ignore[attr-defined]
    return stand_in


def _forward_with_words(model: PreTrainedModel, begins: bool) -> StandIn:
    """A forward for `model` with `patch_words` in its signature: `Trainer` drops the columns of a data set that the
    signature lacks. In a call of the model `TakeWords` takes the words out before.

    Args:
        begins: whether `model` is a tower that goes by a plan, which is found within a call alone.
    """
    stand_in = _stand_in_for(model, "forward", _forward_within_a_call if begins else _forward_by_words)
    signature = stand_in.__signature__  # type: ignore[attr-defined]
    words = inspect.Parameter(
        "patch_words", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.Tensor | None"
    )
    named = dict(signature.parameters) | {"patch_words": words}  # a class of a user's may have it itself
    parameters = sorted(named.values(), key=lambda parameter: parameter.kind)
    stand_in.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    stand_in.__func__ = class_forward(stand_in.__signature__)  # type: ignore[attr-defined]
    return stand_in


def _forward_by_words(model: PreTrainedModel, /, *args: Any, patch_words: Any = None, **kwargs: Any) -> Any:
    """The forward of the class of `model`. Where it is called by itself and with words, the model is called instead."""
    if patch_words is None:
        return type(model).forward(model, *args, **kwargs)
    return model(*args, patch_words=patch_words, **kwargs)


def _forward_within_a_call(model: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class of `model`. Where it is called by itself, as by sentence-transformers, the model is.

    A wrapper that somebody put around `model.forward` may still call this after `restore`.
    """
    if _is_running(model) or not any(isinstance(hook, hooks.Begin) for hook in model._forward_pre_hooks.values()):
        return type(model).forward(model, *args, **kwargs)
    return model(*args, **kwargs)


@traced_within
def _is_running(tower: PreTrainedModel) -> bool:
    """Whether a call of `tower` is under way, and its embeddings have not run yet."""
    forward = current_forward()
    return forward is not None and forward.tower is tower and forward.plan is None


def _call_by_words(model: PreTrainedModel, name: str, /, *args: Any, patch_words: Any = None, **kwargs: Any) -> Any:
    """Calls a method of the class of `model`, and has the tower go by `patch_words` if there are any."""
    method = getattr(type(model), name)
    if patch_words is None:
        return method(model, *args, **kwargs)
    generates = name == "generate"
    given = words_to_generate_by(model, patch_words, args, kwargs) if generates else GivenWords(patch_words)
    with call_with(model, given):
        return method(model, *args, **kwargs)


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Takes all hooks out of `model`, in place: the exact plain model is back, and `model.config.vwt` is `None`.

    A model that is not compressed stays as it is. For threads and gradients see `compress`.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: it is not compressed, and shares embeddings or layers with a model that is.
    """
    model = model_of(model)
    if _has_hooked_parts(model) and not any(map(takes_words, model.modules())):
        raise ValueError(
            f"Embeddings or layers of the {type(model).__name__} belong to another model, too, which is compressed. "
            "Call vwt_hf.restore on that one."
        )
    is_plain, held = setting_of(model) is None, configs_of_modules(model.modules())
    told = [config for config in configs_of(model) if read_setting(config) is not None or is_by_plan(config)]
    if any(is_plain or not is_among(config, held) for config in told):
        own_config(model)  # others may go by these, or be built from them
    _take_out(model)
    return model


_KEPT_BY_ACCELERATE = ("_old_forward", "_original_forward")
"""Where accelerate keeps the forward of a module that it wraps, for its hooks and for `Accelerator.unwrap_model`."""


def _take_out(model: PreTrainedModel) -> None:
    """`restore` for a model that shares its config with no other."""
    # From the inside out: what an interrupt leaves is known by the hooks of the whole, and can be taken out again.
    for module in reversed([*model.modules()]):
        for name in [name for name, value in vars(module).items() if is_ours(value)]:
            if name in _KEPT_BY_ACCELERATE:
                module.__dict__[name] = types.MethodType(type(module).forward, module)
            else:
                delattr(module, name)
        for present, beside in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key in [key for key, hook in present.items() if isinstance(hook, hooks.Hook)]:
                del present[key]
                for also in beside:
                    also.pop(key, None)
        attention.give_back_checkpoint(module)
    for config in configs_of(model):
        write_setting(config, None)
        attend_by_plan(config, False)


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that a module of `model` holds, and the configs within those, each once."""
    held = configs_of_modules(model.modules())
    return list({id(config): config for outer in held for _, config in configs_within(outer)}.values())


def parts_of(model: nn.Module) -> list[PreTrainedModel]:
    """`model` if its config holds a setting, else the models within it whose configs do: parts compressed alone."""
    if isinstance(model, PreTrainedModel) and read_setting(model.config) is not None:
        return [model]
    return list(dict.fromkeys(part for child in model.children() for part in parts_of(child)))


def setting_of(model: nn.Module) -> VWTConfig | None:
    """The setting whose hooks `model` has; `None` for a plain model, whatever its config says."""
    for module in model.modules():
        if (hook := reduce_hook_of(module)) is not None:
            return hook.setting
    return None


def reduce_hook_of(module: nn.Module) -> hooks.Reduce | None:
    """The hook of embeddings that makes tokens of their patches; `None` for a module without it."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, hooks.Reduce)), None)


def takes_words(model: nn.Module) -> bool:
    """Whether a call of `model` itself hands `patch_words` to its vision tower."""
    return any(isinstance(hook, hooks.TakeWords) for hook in model._forward_pre_hooks.values())


def lexicon_of(model: nn.Module) -> Any:
    """The words that `model` groups patches by, mapped to its pixel values; `None` if it has none."""
    return getattr(setting_of(model), "words", None)


def own_config(model: PreTrainedModel) -> None:
    """Gives `model` a copy of its config, so that what is written there does not reach models that share it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.__dict__["config"] = copy.deepcopy(config, copies)


def _require_each_once(tower: Tower) -> None:
    """Raises `ValueError` where a tower runs one layer in several places, which hooks of it could not tell apart."""
    for _, run in find_stacks(tower.module):
        for place, layer in enumerate(run):
            if layer in run[:place] and any(True for _ in layer.parameters()):
                raise ValueError(
                    f"{type(tower.module).__name__} runs its layer {run.index(layer) + 1} again as layer {place + 1}; "
                    "expected each once. Give it copies (copy.deepcopy) before you compress it."
                )


def require_whole_images(tower: Tower, family: Family) -> None:
    """Raises `ValueError` where the embeddings of a family drop patches of their own."""
    share = getattr(tower.module.config, family.masks, 0) if family.masks else 0
    if share:
        raise ValueError(
            f"{family.name} drops {share:.0%} of the patches at random before its first layer, to be trained "
            f"({family.masks} is {share}). For features of whole images load it with {family.masks}=0.0, or set "
            f"model.config.{family.masks} = 0.0, which a saved config.json keeps."
        )


def joining_layers(tower: nn.Module) -> list[int]:
    """After which of its layers, 1 for the first, a compressed tower joins tokens."""
    return [
        number
        for number, copies in enumerate(find_places(tower), 1)
        if any(isinstance(hook, hooks.Join) for layer in copies for hook in layer._forward_hooks.values())
    ]


def require_same_layers(model: PreTrainedModel) -> None:
    """Refuses a compressed model that joins tokens after other layers than it would once saved and loaded.

    Raises:
        ValueError: it is one, as layers were taken out or put in since it was compressed.
    """
    setting = setting_of(model)
    if setting is None or not setting.shortens:
        return
    tower = find_tower(model, family_of(model)).module
    now, layers = joining_layers(tower), len(find_layers(tower))
    if now != list(setting.joins(layers)):
        raise ValueError(
            f"the {type(model).__name__} joins tokens after layers {now} of its {layers}, and loaded it would join "
            "them after others: layers were taken out or put in since it was compressed. Call "
            "vwt_hf.compress(model, model.config.vwt), then save it."
        )
