"""`compress` and `restore`: hooks into a model that is in memory, and out again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import types
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from . import attention
from .config import ModelFacts, VWTConfig
from .families import (
    Family,
    Tower,
    family_of,
    find_layers,
    find_stack,
    find_tower,
    is_of,
    model_of,
    models_around,
    refuse_masked,
    refuse_to_drop,
    why_every_patch,
)
from .forward import (
    Forward,
    GivenWords,
    begin_call,
    begin_forward,
    begin_traced,
    call_with,
    current_forward,
    end_call,
    end_forward,
    forward_of,
    forward_within,
    given_words,
    traced_within,
    words_are_given,
    words_to_generate_by,
)
from .layout import join
from .model_configs import attend_by_plan, attend_plainly, is_by_plan
from .patches import Patches
from .plans import DROPPED, Grouped, Kept
from .processors import loaded_by
from .vouch import may_change_rows, vouch, vouch_rows

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""What tells `from_pretrained` of transformers where to look."""
ONE_GRAPH = torch.__version__ >= "2.11.0a0"
"""Whether one graph of torch.compile can hold a forward. With an older torch graphs break in transformers anyway, so
forwards run natively between them."""


def compress(model: PreTrainedModel, config: Any = True, **hub_kwargs: Any) -> PreTrainedModel:
    """Makes `model` group or drop patches before its first layer or also later, in place, without changing a weight.

    A model that is compressed already gets the new setting instead of the old one. `model.config.vwt` holds the setting
    (a JSON-ready dict) until `restore`, and `save_pretrained` writes it. No other thread may run the model meanwhile,
    and gradients of its last forward should have been taken.

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
    """As `compress`, of a model that shares its config with no other.

    Args:
        trusted: whether a user wrote `setting`. One from a config.json names words on the Hub alone, no folder.
        source: Hub id or folder that words and image processor of `model` lie in, "" for none; by default what it was
            loaded from.
        image_processor: the one that makes the model's images; by default the one that lies in `source`.
    """
    family = family_of(model)
    tower = find_tower(model, family)
    needs_all = why_every_patch(model, tower)
    if needs_all is not None and not setting.searches and setting.output is None:
        setting = dataclasses.replace(setting, output="full")  # words that leave patches out are refused
    if needs_all is not None and not setting.restores:
        refuse_to_drop(needs_all)
    for part in models_around(model, tower):
        refuse_masked(type(part))
    require_whole_images(tower, family)
    if setting_of(model) is None:
        if any(isinstance(hook, Hook) for part in tower.module.modules() for hook in part._forward_hooks.values()):
            raise ValueError(
                f"Layers of the {type(tower.module).__name__} belong to another vision tower, too, which is "
                "compressed. Call vwt_hf.restore on that model first, or give each tower layers of its own "
                "(copy.deepcopy)."
            )
        if family.tried:
            vouch(model, tower)
        elif family.padded is None and not family.masks and may_change_rows(tower):
            vouch_rows(model, tower)
    facts = ModelFacts(
        str((model.name_or_path or "") if source is None else source),
        tower.patch_size,
        tower.channels,
        setting_of(model),
        trusted,
        loaded_by(model) | hub_kwargs,
        image_processor=image_processor,
    )
    setting = setting.prepared(facts)
    relative = [module for module in tower.module.modules() if is_of(module, family.relative)]
    attentions = [
        (module, stand_in)
        for module in tower.module.modules()
        for name, stand_in in family.attentions.items()
        if is_of(module, name)
    ]
    by_sizes = setting.shortens and (setting.groups or family.padded is not None)
    joins = setting.joins(len(find_layers(tower.module))) if by_sizes else {}
    if by_sizes:
        attention.require_usable(tower.module, family.padded is not None)
        if not attentions:
            attention.require_registered(tower.module)
        for module, _ in attentions:
            _require_replaceable(module)
        _require_each_once(tower)
    _take_out(model)  # nothing is refused from here on: a model keeps the setting that it has
    _hook_in(model, tower, family, setting, by_sizes, joins, relative, attentions)
    model.config.vwt = setting.to_dict()
    return model


def _hook_in(
    model: PreTrainedModel,
    tower: Tower,
    family: Family,
    setting: VWTConfig,
    by_sizes: bool,
    joins: dict[int, float],
    relative: list[nn.Module],
    attentions: list[tuple[nn.Module, Any]],
) -> None:
    """Registers what a compressed tower needs.

    Args:
        by_sizes: whether tokens stand for different numbers of patches, so that attention needs the plan.
        relative: the modules that give attention a bias by where patches lie to each other.
        attentions: attention modules that do not use transformers' `AttentionInterface`, each with the function that
            replaces its forward.
    """
    follows = setting.shortens and (by_sizes or bool(relative))
    layers = find_layers(tower.module)
    entered = models_around(model, tower)
    for holder in entered:
        holder.register_forward_pre_hook(TakeWords(follows), with_kwargs=True)
    model_class: Any = type(model)
    for name in _methods_for_images(model_class):
        if name not in vars(model):
            setattr(model, name, _stand_in_for(model, name))
    if _own_forward(model) is None:
        model.forward = _forward_with_words(model, begins=follows and model is tower.module)
    if follows:
        strips_mask = by_sizes and family.padded is not None
        by_interface = by_sizes and not attentions
        begin = Begin(bool(relative), by_sizes, strips_mask, by_interface, even=is_even(setting, family))
        tower.module.register_forward_pre_hook(begin, with_kwargs=True)
    if setting.shortens and not by_sizes:
        tower.module.register_forward_pre_hook(RefuseMask(), with_kwargs=True)
    stack = find_stack(tower.module)[0]
    own_rows = any(not type(part).forward.__module__.startswith("transformers.") for part in (tower.module, stack))
    reduce = Reduce(setting, family, tower.patch_size, tower.channels, follows, own_rows)
    if setting.shortens and setting.repaints:
        tower.embeddings.register_forward_pre_hook(Repaint(reduce), with_kwargs=True)
    tower.embeddings.register_forward_hook(reduce, with_kwargs=True)
    for module in tower.module.modules():
        if is_of(module, family.rotary):
            module.register_forward_hook(Rotate(reduce), with_kwargs=True)
        if by_sizes and is_of(module, family.padded):
            module.register_forward_pre_hook(MaskPadding())
    if follows:
        for module in relative:
            module.register_forward_pre_hook(OfWholeImage(), with_kwargs=True)
            module.register_forward_hook(Bias())
    if by_sizes:
        # More than one where a part is a copy, as PEFT's modules to save are.
        for config in [module.__dict__.get("config") for module in tower.module.modules()]:
            if isinstance(config, PreTrainedConfig):
                attend_by_plan(config)
        for module, stand_in in attentions:
            setattr(module, _slot(module), StandIn(stand_in, module))
        for number, wanted in joins.items():
            # The first hook: what transformers records as the layer's hidden states is the same whenever it began to.
            layers[number - 1].register_forward_hook(Join(setting, wanted), prepend=True)
        if joins and family.rotary is not None:
            for layer in layers[min(joins) :]:
                layer.register_forward_pre_hook(RotateTokens(), with_kwargs=True)
        if setting.restores:
            expanding = dict.fromkeys((layers[-1], stack, tower.module))
            if isinstance(tower.module, BackboneMixin) and len(expanding) == 3:
                # Its maps are of what the stack gave, expanded, less prefix tokens: they may have the shape of a plan.
                expanding.popitem()
            for module in expanding:
                module.register_forward_hook(Expand())
    if follows:
        tower.module.register_forward_hook(
            End(len(_attending_layers(tower.module)) if by_sizes else 0), always_call=True
        )
    for holder in entered:
        holder.register_forward_hook(EndWords(follows), always_call=True)


def is_even(setting: VWTConfig, family: Family) -> bool:
    """Whether all images of a batch have the same number of tokens in every layer, so that one graph of torch.compile
    can hold a forward."""
    return setting.even and family.padded is None


@functools.cache
def _methods_for_images(model_class: type) -> tuple[str, ...]:
    """Names of the methods beside `forward` by which a user gives images to a model of that class."""
    methods = inspect.getmembers(model_class, inspect.isfunction)
    return tuple(
        name
        for name, method in methods
        if not name.startswith(("_", "prepare_"))
        and name != "forward"
        and "pixel_values" in inspect.signature(method).parameters
    )


def _stand_in_for(model: PreTrainedModel, name: str) -> StandIn:
    stand_in = StandIn(_call_by_words, model, name)
    method = getattr(type(model), name)
    functools.update_wrapper(stand_in, method)
    stand_in.__signature__ = inspect.signature(method.__get__(model))  # type: ignore[attr-defined]
    return stand_in


def _forward_with_words(model: PreTrainedModel, begins: bool) -> StandIn:
    """The forward of `model`, whose signature has `patch_words`, which `TakeWords` takes from every call before it.

    `Trainer` drops the columns of a data set that this signature does not have.

    Args:
        begins: whether `model` is a tower that goes by a plan, which is found within a call alone.
    """
    forward = type(model).forward
    stand_in = StandIn(_forward_within_a_call if begins else _forward_by_words, model)
    functools.update_wrapper(stand_in, forward)
    signature = inspect.signature(forward.__get__(model))
    words = inspect.Parameter(
        "patch_words", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="torch.Tensor | None"
    )
    parameters = sorted((*signature.parameters.values(), words), key=lambda parameter: parameter.kind)
    stand_in.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    stand_in.__func__ = _class_forward(stand_in.__signature__)  # type: ignore[attr-defined]
    return stand_in


def _class_forward(signature: inspect.Signature) -> Any:
    """The forward of a model's class as a function with `patch_words` in its signature; `_is_class_forward` finds it.

    accelerate makes a method of it where it wraps and unwraps a forward for mixed precision. A function and no other
    object, as torch.compile and torch.export read the code of every forward.
    """

    def forward(self: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    function: Any = forward
    function.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return function


def _is_class_forward(function: Any) -> bool:
    return getattr(function, "__qualname__", None) == "_class_forward.<locals>.forward"


def _forward_by_words(model: PreTrainedModel, /, *args: Any, patch_words: Any = None, **kwargs: Any) -> Any:
    """The forward of the class of `model`: by itself and with words, which it does not know, it becomes a call."""
    if patch_words is None:
        return type(model).forward(model, *args, **kwargs)
    return model(*args, patch_words=patch_words, **kwargs)


def _forward_within_a_call(model: PreTrainedModel, /, *args: Any, **kwargs: Any) -> Any:
    """The forward of the class of `model`: by itself, as sentence-transformers runs it, it becomes a call.

    It may be left after `restore`, in what somebody wrapped `model.forward` in.
    """
    if _runs(model) or not any(isinstance(hook, Begin) for hook in model._forward_pre_hooks.values()):
        return type(model).forward(model, *args, **kwargs)
    return model(*args, **kwargs)


@traced_within
def _runs(tower: PreTrainedModel) -> bool:
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
    """Takes the tokenizer out of `model`, in place: the exact plain model is back, and `model.config.vwt` is `None`.

    A model that is not compressed stays as it is. For threads and gradients see `compress`.

    Raises:
        TypeError: `model` is no transformers model.
    """
    model = model_of(model)
    if setting_of(model) is None and any(config.vwt is not None or is_by_plan(config) for config in configs_of(model)):
        own_config(model)  # which it may share with a compressed one
    _take_out(model)
    return model


_KEPT_BY_ACCELERATE = ("_old_forward", "_original_forward")
"""Where accelerate keeps the forward of a module that it wraps, for its hooks and for `Accelerator.unwrap_model`."""


def _take_out(model: PreTrainedModel) -> None:
    """As `restore`, of a model that shares its config with no other."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if _is_ours(value)]:
            if name in _KEPT_BY_ACCELERATE:
                module.__dict__[name] = types.MethodType(type(module).forward, module)
            else:
                delattr(module, name)
        for hooks, beside in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
                del hooks[key]
                for also in beside:
                    also.pop(key, None)
        attention.give_back_checkpoint(module)
    for config in configs_of(model):
        config.vwt = None
        attend_plainly(config)


def _is_ours(value: Any) -> bool:
    """Whether an attribute of a module is a forward or method of ours, or what accelerate left of one."""
    return isinstance(value, StandIn) or (isinstance(value, types.MethodType) and _is_class_forward(value.__func__))


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config that a module of `model` holds, and the configs within those, each once."""
    found: dict[int, PreTrainedConfig] = {}
    ahead = [module.__dict__.get("config") for module in model.modules()]
    while ahead:
        config = ahead.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            ahead += vars(config).values()
    return list(found.values())


def parts_of(model: nn.Module) -> list[PreTrainedModel]:
    """`model` if its config holds a setting, else the models within it whose own configs do: parts compressed alone."""
    if isinstance(model, PreTrainedModel) and model.config.vwt is not None:
        return [model]
    return list(dict.fromkeys(part for child in model.children() for part in parts_of(child)))


def setting_of(model: nn.Module) -> VWTConfig | None:
    """The setting whose hooks `model` has; `None` for a plain model, whatever its config says."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, Reduce):
                return hook.setting
    return None


def takes_words(model: nn.Module) -> bool:
    """Whether a call of `model` itself hands `patch_words` to its vision tower."""
    return any(isinstance(hook, TakeWords) for hook in model._forward_pre_hooks.values())


def lexicon_of(model: nn.Module) -> Any:
    """The words that `model` groups patches by, mapped to its pixel values; `None` if it has none."""
    return getattr(setting_of(model), "words", None)


def own_config(model: PreTrainedModel) -> None:
    """Gives `model` a copy of its config, so that what is written there does not reach models that share it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):  # of layers it may be another than that of the model they are in
            module.__dict__["config"] = copy.deepcopy(config, copies)


def _slot(module: nn.Module) -> str:
    """The attribute that holds the forward of `module`: accelerate (`device_map`) moves it to another and wraps it."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _own_forward(module: nn.Module) -> Any:
    """The forward that `module` has in place of its class's; accelerate leaves that in it when hooks are removed."""
    present = module.__dict__.get("forward")
    function = getattr(present, "__func__", None)
    return None if function is type(module).forward or _is_class_forward(function) else present


def _require_replaceable(module: nn.Module) -> None:
    """Raises `ValueError` where the forward of `module` is not its class's, nor one of ours."""
    present = _own_forward(module)
    if _slot(module) == "forward" and present is not None and not isinstance(present, StandIn):
        raise ValueError(
            f"Something else replaced the forward of {type(module).__name__} in this model; take that out before "
            "compressing it."
        )


def _require_each_once(tower: Tower) -> None:
    """Raises `ValueError` where a tower runs one layer in several places, which hooks of it could not tell apart."""
    run = find_stack(tower.module)[1]
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


class StandIn(functools.partial):
    """A function of ours in place of a module's forward; `restore` finds it by its type."""

    @property
    def __code__(self) -> types.CodeType:
        """The code of that function, which torch.export of torch 2.6 reads of every forward."""
        return self.func.__code__

    def __reduce__(self) -> Any:
        state: Any = super().__reduce__()
        made, given, (func, args, kwargs, fields) = state
        if "__func__" in (fields or {}):  # a function that `pickle` does not find by its name
            fields = fields | {"__func__": None}
        return made, given, (func, args, kwargs, fields)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if "__func__" in vars(self):
            self.__func__ = _class_forward(self.__signature__)  # type: ignore[attr-defined]


class Hook:
    """A hook of ours; `restore` finds it by its type."""


@dataclasses.dataclass(eq=False)
class TakeWords(Hook):
    """Forward pre-hook of every model that is or holds the tower: takes `patch_words` out of the call, since
    transformers' forwards do not know them, and keeps them for the embeddings."""

    follows: bool
    """Whether the tower goes by a plan that is found while it runs."""

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "patch_words" not in kwargs:
            return None
        kwargs = dict(kwargs)
        patch_words = kwargs.pop("patch_words")
        if patch_words is not None:
            if not self.follows and torch.compiler.is_compiling():
                self._refuse_in_graph()
            self._begin(model, patch_words)
        return args, kwargs

    # An error that is raised while a graph is traced sends the call the usual way, of which parts are compiled again.
    @torch.compiler.disable
    def _refuse_in_graph(self) -> None:
        raise ValueError(
            "patch_words were given to a compiled or exported model that chooses patches by itself, within its one "
            'graph. Leave them out, or compress it by vwt_hf.compress(model, {"method": "given"}).'
        )

    @torch.compiler.disable
    def _begin(self, model: Any, patch_words: Any) -> None:
        begin_call(model, patch_words)


@dataclasses.dataclass(eq=False)
class EndWords(Hook):
    """Forward hook of the models that have `TakeWords`: ends the words of a call, and refuses those that no embeddings
    used."""

    follows: bool

    def __call__(self, model: Any, args: Any, output: Any) -> None:
        if words_are_given() and (self.follows or not torch.compiler.is_compiling()):
            self._end(model, output)

    @torch.compiler.disable
    def _end(self, model: Any, output: Any) -> None:
        given = end_call(model)
        if given is not None and output is not None:  # no output: the forward raised
            given.require_taken()


@dataclasses.dataclass(eq=False)
class Begin(Hook):
    """Forward pre-hook of a vision tower: begins the `Forward` that its embeddings, attention and heads share."""

    relative: bool
    """Whether its attention is given a bias by where patches lie to each other."""
    by_sizes: bool
    """Whether tokens stand for different numbers of patches, so that attention needs the plan."""
    strips_mask: bool
    """Whether images come as padded patches. Then `pixel_attention_mask` is kept from the layers, which see tokens and
    not patches, and stored in the `Forward` for the head."""
    by_interface: bool
    """Whether its attention is this package's by transformers' `AttentionInterface`."""
    even: bool = False
    """What `is_even` says."""
    _members: weakref.WeakSet[nn.Module] | None = None

    def __call__(self, tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_dynamo_compiling() and self._is_for_one_graph(tower):
            if self.relative and kwargs.get("attention_mask") is not None:
                raise ValueError("A graph of torch.compile cannot ask what attention_mask hides; leave it out.")
            begin_traced(tower, self.relative)
            # Not before: outside a traced forward, reading the config reads the context variable, which no graph can.
            if self.by_sizes:
                attention.require_usable(tower, self.strips_mask)
            return None
        return self._begin(tower, args, kwargs)

    def _is_for_one_graph(self, tower: Any) -> bool:
        """Whether torch.compile is to trace this forward, and not to run it natively.

        It runs natively where a caller gave words, since checking them depends on their values, and under gradient
        checkpointing, since torch traces no checkpointed layer that changes the `Forward`.
        """
        if not (self.even and ONE_GRAPH) or words_are_given():
            return False
        return not (torch.is_grad_enabled() and attention.checkpoints(tower))

    @torch.compiler.disable
    def _begin(self, tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.by_sizes:
            # `set_attn_implementation` and `unregister` may have come after `compress`.
            attention.require_usable(tower, self.strips_mask)
        if self.by_interface:
            attention.require_registered(tower)
        if torch.is_grad_enabled():
            attention.carry_through_checkpoints(tower)
        members = self._members
        if members is None or tower not in members:  # as in a copy for another thread, which has these hooks, too
            members = self._members = weakref.WeakSet(tower.modules())
        if self.relative:  # layers would add it to the bias, which they read of one image
            kwargs = attention.without_mask(kwargs)
        forward = begin_forward(tower, members, self.relative)
        if not self.strips_mask:
            return args, kwargs
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        kwargs = dict(zip(names, args, strict=False), **kwargs)
        forward.real = kwargs.get("pixel_attention_mask")
        return args[len(names) :], kwargs | {"pixel_attention_mask": None}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_members": None}


class RefuseMask(Hook):
    """Forward pre-hook of a tower that leaves patches out: refuses a mask of some of them, which is of whole images."""

    def __call__(self, tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():  # no graph can ask what a mask holds
            return None
        return args, attention.without_mask(kwargs)


@dataclasses.dataclass(eq=False)
class Reduce(Hook):
    """Forward hook of the embeddings: patches become tokens by the plan that the setting makes of them."""

    setting: VWTConfig
    family: Family
    patch_size: tuple[int, int]
    channels: int
    follows: bool
    """Whether modules that run after the embeddings need the plan, so that it is stored in the `Forward`."""
    own_rows: bool = False
    """Whether each image is to have a row of its own: what runs the layers is not transformers', and may read CLS
    between them."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.setting.shortens:
            self._require_alone(module, output, args, kwargs)
            return output
        if kwargs.get("bool_masked_pos") is not None:
            raise ValueError(
                "bool_masked_pos masks patches of the whole image, of which a compressed model sees a part; "
                "call vwt_hf.restore(model) first."
            )
        if self.follows:
            return self._reduce_and_store(module, args, kwargs, output)
        given = None if torch.compiler.is_compiling() else given_words(module)
        patches = self.patches(output, args, kwargs)
        plan = self.plan(patches, given and given.take(patches.pixel_values))
        return output if plan is None else self.family.reduces(output, plan)

    @traced_within
    def _reduce_and_store(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        forward, tokens = forward_of(module), _tokens_of(output)
        patches = self.patches(output, args, kwargs, forward.real)
        if forward.plan is not None:
            forward = forward.begin_again()
        if not is_even(self.setting, self.family):
            packs = attention.packs(forward, not self.family.attentions, tokens.device, tokens.dtype)
            packs = packs and not self.own_rows
            rounds = attention.is_slow_for_new_lengths(tokens.device, tokens.dtype)
            patches = dataclasses.replace(patches, packs=packs, rounds=rounds, draws=forward.draws_by_sequence)
        plan = self.plan(patches, forward.given and forward.given.take(patches.pixel_values), forward.words)
        if plan is None:
            return output
        forward.go_by(plan)
        if patches.real is not None:
            forward.real = patches.real if self.setting.restores else plan.stays if isinstance(plan, Grouped) else None
        return self.family.reduces(output, plan)

    def plan(
        self, patches: Patches, given: GivenWords | None, words: torch.Tensor | None = None
    ) -> Kept | Grouped | None:
        """What becomes of the patches: as the caller's words say, if there are any, or those that `Repaint` chose."""
        if given is None:
            return self.setting.plan(patches) if words is None else self.setting.plan_repainted(patches, words)
        return self.setting.plan_of(patches, patches.of_words(given.words, given.repeats))

    def _require_alone(self, module: nn.Module, output: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuses words by which patches are no tokens of their own."""
        given = None if torch.compiler.is_compiling() else given_words(module)
        if given is None:
            return
        patches = self.patches(output, args, kwargs)
        for image in patches.of_words(given.take(patches.pixel_values).words, given.repeats):
            stay = image[image != DROPPED]
            tokens, own = len(stay.unique()), patches.count if self.family.padded is None else len(stay)
            if tokens != own:
                raise ValueError(
                    f"patch_words leave {tokens} tokens of {own} patches, and the setting of the model keeps all. Load "
                    "image processor and model with the same `vwt`."
                )

    def patches(self, output: Any, args: Any, kwargs: dict[str, Any], mask: torch.Tensor | None = None) -> Patches:
        """The patches of a batch that embeddings were called with.

        Args:
            output: what the embeddings made of it; `None` before they did, when nobody knows their prefix tokens.
            args, kwargs: what they were called with.
            mask: (batch, patches), which of padded patches the caller takes for real; `None`: all but padding.
        """
        pixel_values = args[0] if args else kwargs["pixel_values"]
        if self.family.padded is not None:
            spatial_shapes = args[1] if len(args) > 1 else kwargs["spatial_shapes"]
            return Patches.of_padded(pixel_values, self.patch_size, spatial_shapes, mask)
        rows = None if output is None else _tokens_of(output).shape[1]
        return Patches.of_images(pixel_values, self.patch_size, rows)


@dataclasses.dataclass(eq=False)
class Repaint(Hook):
    """Forward pre-hook of the embeddings: has them embed what the setting shows in place of the images, and keeps for
    `Reduce` what is to become of the patches."""

    reduce: Reduce

    @traced_within
    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward, setting, given = forward_of(module), self.reduce.setting, None
        pixel_values = args[0] if args else kwargs["pixel_values"]
        if self.reduce.family.padded is None and pixel_values.shape[1] != self.reduce.channels:
            return None  # the embeddings say what is wrong
        patches = self.reduce.patches(None, args, kwargs, forward.real)
        if forward.given is not None:  # `Reduce` takes them, and refuses what they must not be
            given = patches.of_words(forward.given.words, forward.given.repeats)
        words, shown = setting.repainted(patches, given)
        if given is None:
            forward.words = words
        if args:
            return (shown, *args[1:]), kwargs
        return args, kwargs | {"pixel_values": shown}


def _tokens_of(output: Any) -> torch.Tensor:
    """(batch, prefix + patches, hidden): what embeddings give, or the first of it."""
    return output[0] if isinstance(output, tuple) else output


@dataclasses.dataclass(eq=False)
class Rotate(Hook):
    """Forward hook of rotary positions: the rotations of patches become those of tokens."""

    reduce: Reduce

    def __call__(self, rotary: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.reduce.setting.shortens:
            return output
        if self.reduce.follows:
            return self._rotate_as_stored(rotary, output)
        pixel_values = args[0] if args else kwargs["pixel_values"]
        patches = Patches.of_images(pixel_values, self.reduce.patch_size, output[0].shape[0])
        plan = self.reduce.plan(patches, None if torch.compiler.is_compiling() else given_words(rotary))
        return output if plan is None else plan.rotate(output)

    @traced_within
    def _rotate_as_stored(self, rotary: nn.Module, output: Any) -> Any:
        forward = forward_within(rotary)
        if forward is None or forward.plan is None:
            return output
        forward.rotations = output
        return forward.plan.rotate(output)


class RotateTokens(Hook):
    """Forward pre-hook of a layer after one that tokens are grouped behind: hands it the rotations of its tokens."""

    @traced_within
    def __call__(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        forward = forward_within(layer)
        if forward is None or "position_embeddings" not in kwargs:
            return None
        tokens = args[0] if args else kwargs["hidden_states"]
        plan = forward.plan_of_shape(tokens.shape[0], tokens.shape[1])
        return None if plan is None else (args, kwargs | {"position_embeddings": plan.rotate(forward.rotations)})


@dataclasses.dataclass(eq=False)
class Join(Hook):
    """Forward hook of a layer: its output becomes fewer tokens, as some have become alike."""

    setting: VWTConfig
    wanted: float
    """What `VWTConfig.joins` says of the layer."""

    @traced_within
    def __call__(self, layer: nn.Module, args: Any, output: Any) -> Any:
        forward = forward_within(layer)
        if forward is None:
            return output
        tokens = _tokens_of(output)
        before = forward.plan_of_shape(tokens.shape[0], tokens.shape[1])
        after = forward.after.get(layer)
        if before is not None and after is None:  # else the layer is repeated for its gradient
            found = self.setting.seek(before, tokens.detach(), self.wanted)
            after = before if found is None else before.joined(*found, [plan.shape for plan in forward.plans])
            forward.after[layer] = after
        if before is None or after is None or after is before:
            return output
        forward.go_by(after)
        joined = join(tokens, before.layout, after.layout)
        return (joined, *output[1:]) if isinstance(output, tuple) else joined


class OfWholeImage(Hook):
    """Forward pre-hook of a relative position bias: has it computed for the whole image, not for the fewer tokens."""

    def __call__(self, bias: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args[:1], {}


class Bias(Hook):
    """Forward hook of a relative position bias: that between patches becomes that between tokens."""

    @traced_within
    def __call__(self, bias: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        forward = forward_within(bias)
        return output if forward is None or forward.plan is None else forward.plan.bias(output)


class MaskPadding(Hook):
    """Forward pre-hook of a head that takes a mask of padded patches: gives it the mask of the rows that it gets."""

    @torch.compiler.disable
    def __call__(self, head: nn.Module, args: Any) -> Any:
        forward = forward_within(head)
        return args if forward is None else (args[0], forward.real)


class Expand(Hook):
    """Forward hook of a tower's last layer, of what holds the layers, and of the tower: what comes after sees every
    patch, with its token's hidden state."""

    @traced_within
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        forward = forward_within(module)
        if forward is None or not forward.plans:
            return output

        def expanded(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dim() < 3:
                return value
            plan = forward.plan_of_shape(value.shape[0], value.shape[1])
            return value if plan is None else plan.expand(value)

        return _pytree.tree_map(expanded, output)


@dataclasses.dataclass(eq=False)
class End(Hook):
    """Forward hook of a vision tower: ends its `Forward`, and refuses layers that attended by no plan, and attention
    weights, which grouped patches lack."""

    layers: int
    """How many of its layers must attend by a plan of groups, if there is one."""

    @traced_within
    def __call__(self, tower: nn.Module, args: Any, output: Any) -> None:
        forward = end_forward(tower)
        if forward is None or output is None:  # no output: the forward raised
            return
        if forward.attended < self.layers and any(map(_needs_attention, forward.plans)):
            _require_attention(tower, forward)
        squares = [(plan.shape[1],) * 2 for plan in forward.plans]
        if isinstance(tower, BackboneMixin):  # its maps of patches may be as many rows high as a plan has
            output = output[1:] if isinstance(output, tuple) else output.attentions
        for value in _pytree.tree_leaves(output):
            if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2:] in squares:
                raise ValueError(
                    "output_attentions gives the attention between patches, and grouped patches attend as one token. "
                    "Leave it out, or call vwt_hf.restore(model) first."
                )


def _needs_attention(plan: Grouped) -> bool:
    """Whether attention that knows nothing of the plan would answer otherwise than by it."""
    return (plan.layout.packed and plan.layout.rows.shape[0] > 1) or plan.key_bias is not None


def _attending_layers(tower: nn.Module) -> list[nn.Module]:
    """What a tower runs as layers and is to attend: transformers' layers, and others that hold an attention."""

    def attends(layer: nn.Module) -> bool:
        return any(
            isinstance(part, (GradientCheckpointingLayer, nn.MultiheadAttention)) or "Attention" in type(part).__name__
            for part in layer.modules()
        )

    return [layer for layer in find_stack(tower)[1] if attends(layer)]


def _form(layer: nn.Module) -> list[tuple[type, bool]]:
    """What layers that compute alike have in common: the classes of their modules, and which forwards are replaced."""
    return [
        (type(part), not isinstance(part.__dict__.get("forward", None), (StandIn, type(None))))
        for part in layer.modules()
    ]


def joining_layers(tower: nn.Module) -> list[int]:
    """After which of its layers, 1 for the first, a compressed tower joins tokens."""
    return [
        number
        for number, layer in enumerate(find_layers(tower), 1)
        if any(isinstance(hook, Join) for hook in layer._forward_hooks.values())
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


def _require_attention(tower: Any, forward: Forward) -> None:
    """Raises `ValueError` where layers of a tower attended by no plan of a forward.

    Those that are like one which did attend did not run, as where a forward ends early or leaves layers out.
    """
    layers = _attending_layers(tower)  # some may have been taken out since it was compressed
    by_plan = [layer for layer in layers if any(id(part) in forward.by_plan for part in layer.modules())]
    forms = [_form(layer) for layer in by_plan]
    others = [layer for layer in layers if layer not in by_plan and _form(layer) not in forms]
    if others and (by_plan or not forward.attended):
        raise ValueError(
            f"{len(others)} of the {len(layers)} layers of the {type(tower).__name__} did not attend by the tokens of "
            "each image: attention that was replaced, or a layer of another kind, does not go through transformers' "
            "AttentionInterface, and would mix the images of a batch. Call vwt_hf.restore(model), or give it attention "
            "that does."
        )
