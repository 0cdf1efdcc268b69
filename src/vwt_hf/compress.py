"""`compress` and `restore`: put the tokenizer into a model that is in memory, and take it out again."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from transformers import PreTrainedConfig, PreTrainedModel

from . import attention
from .config import VWTConfig
from .families import (
    Family,
    family_of,
    find_embeddings,
    find_layers,
    find_stack,
    find_tower,
    model_of,
    patch_shape,
    require_supported,
)
from .layout import Layout, expand, medoids
from .lexicon import Lexicon
from .tokenizer import Tokenizer, choose_patches, embed, embed_padded, forward_under_way, relate
from .words import patch_grid, patchify


def compress(model: PreTrainedModel, config: Any = True, **hub_kwargs: Any) -> PreTrainedModel:
    """Makes `model` group or drop patches before its first layer, in place, without changing a weight.

    A model that is compressed already gets the new setting instead of the old one. `model.config.vwt` holds the setting
    (a JSON-ready dict) until `restore`, and `save_pretrained` writes it.

    Args:
        model: a transformers model of a supported family (`vwt_hf.supported()`).
        config: a `VWTConfig`, a dict of its fields, `True` for the defaults, or a vocabulary (its Hub id, its folder or
            itself) for inter-image words. `False` restores the plain model.
        hub_kwargs: `token`, `cache_dir`, `local_files_only`, ... for a vocabulary and an image processor on the Hub.

    Returns:
        The same `model`. Its `last_hidden_state` is (batch, prefix tokens + kept patches, hidden) where patches are
        discarded, and else (batch, prefix tokens + patches, hidden), each patch with its token's hidden state.

    Raises:
        TypeError: `model` is no transformers model.
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
    setting = VWTConfig.parse(config)
    if setting is None:
        return restore(model)
    own_config(model)
    return compress_by(model, setting, trusted=True, **hub_kwargs)


def compress_by(
    model: PreTrainedModel, setting: VWTConfig, *, trusted: bool, source: Any = None, **hub_kwargs: Any
) -> PreTrainedModel:
    """As `compress`, of a model that shares its config with no other.

    Args:
        trusted: whether a user wrote `setting`. One from a config.json names words on the Hub alone, no folder.
        source: Hub id or folder that words and image processor of `model` lie in; by default what it was loaded from.
    """
    require_supported(type(model), setting.restores)
    family = family_of(model)
    embeddings = find_embeddings(model, family)
    channels, patch_size = patch_shape(embeddings, family)
    _require_whole_images(embeddings, family)
    lexicon = None
    if setting.method == "inter":
        source = str(source or model.name_or_path or "")
        lexicon = Lexicon.resolve(setting, source, lexicon_of(model), trusted=trusted, **hub_kwargs)
        lexicon.vocabulary.require(patch_size, channels)
        setting = lexicon.setting
    tower = find_tower(model, embeddings)
    attentions = [module for module in tower.modules() if type(module).__name__ in family.attentions]
    relative = [module for module in tower.modules() if type(module).__name__ == family.relative]
    for module in (embeddings, *attentions, *relative):
        _require_replaceable(module)
    tokenizer = Tokenizer(family, setting, lexicon, bool(relative))
    if tokenizer.attends:
        attention.require_usable(tower)
    restore(model)
    if tokenizer.tells:
        tower.register_forward_pre_hook(functools.partial(_open, tokenizer), with_kwargs=True)
        for module in relative:
            _replace_forward(module, relate, len(family.prefix))
    if tokenizer.attends:
        attention.use_for(tower)
        for module in attentions:
            _replace_forward(module, family.attentions[type(module).__name__])
        if setting.restores:
            last = find_layers(tower)[-1]
            for module in (last, find_stack(tower, last)):
                module.register_forward_hook(_restore_within)
    if tokenizer.tells:
        tower.register_forward_hook(_restore_patches if setting.restores else _leave, always_call=True)
    _replace_forward(embeddings, embed if family.padded is None else embed_padded, tokenizer)
    for module in tower.modules():
        if tokenizer.attends and type(module).__name__ == family.padded:
            module.register_forward_pre_hook(_mask_padding)
        if type(module).__name__ == family.rotary:
            module.register_forward_hook(functools.partial(_rotate, tokenizer, patch_size))
    model.config.vwt = setting.to_dict()
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Takes the tokenizer out of `model`, in place: the exact plain model is back, and `model.config.vwt` is `None`.

    A model that is not compressed stays as it is.

    Raises:
        TypeError: `model` is no transformers model.
    """
    model = model_of(model)
    for module in model.modules():
        if _is_ours(module.__dict__.get("forward")):
            del module.forward
        if _is_ours(module.__dict__.get("_old_forward")):
            module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
        for key in [key for key, hook in module._forward_pre_hooks.items() if _func(hook) in INPUT_HOOKS]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key in [key for key, hook in module._forward_hooks.items() if _func(hook) in OUTPUT_HOOKS]:
            del module._forward_hooks[key]
            module._forward_hooks_always_called.pop(key, None)
        attention.give_back_checkpoint(module)
    for config in configs_of(model):
        attention.give_back(config)
        if getattr(config, "vwt", None) is not None:
            config.vwt = None
    return model


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that the modules of `model` go by, and those within them."""
    found: dict[int, PreTrainedConfig] = {}
    ahead = [module.__dict__.get("config") for module in model.modules()]
    while ahead:
        config = ahead.pop()
        if isinstance(config, PreTrainedConfig) and id(config) not in found:
            found[id(config)] = config
            ahead += vars(config).values()
    return list(found.values())


def parts_of(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models whose config holds a setting: `model`, or else models within it that are compressed alone."""
    found: dict[PreTrainedModel, None] = {}

    def look(module: nn.Module) -> None:
        if isinstance(module, PreTrainedModel) and getattr(module.config, "vwt", None) is not None:
            found[module] = None
        else:
            for child in module.children():
                look(child)

    look(model)
    return list(found)


def _slot(module: nn.Module) -> str:
    """Where the forward of `module` is kept: accelerate's hooks (`device_map`) wrap it, and keep it elsewhere."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _replace_forward(module: nn.Module, function: Callable[..., Any], *args: Any) -> None:
    setattr(module, _slot(module), functools.partial(function, module, *args))


def _func(hook: Any) -> Any:
    return getattr(hook, "func", hook)


def _is_ours(forward: object) -> bool:
    """Whether `_replace_forward` put it there."""
    return isinstance(forward, functools.partial) and forward.func in STAND_INS


def _require_replaceable(module: nn.Module) -> None:
    """Raises `ValueError` where the forward of `module` is not its class's, nor one of ours."""
    present = module.__dict__.get("forward")
    if _slot(module) == "forward" and present is not None and not _is_ours(present):
        raise ValueError(
            f"Something else replaced the forward of {type(module).__name__} in this model; take that out before "
            "compressing it."
        )


def own_config(model: PreTrainedModel) -> None:
    """Gives `model` a copy of its config, so that what is written there does not reach models that share it."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


def _require_whole_images(embeddings: Any, family: Family) -> None:
    """Raises `ValueError` where the embeddings of a family drop patches of their own."""
    share = getattr(embeddings.config, family.masks) if family.masks else 0
    if share:
        raise ValueError(
            f"{family.name} drops {share:.0%} of the patches at random before its first layer, to be trained "
            f"({family.masks} is {share}). For features of whole images load it with {family.masks}=0.0, or set "
            f"model.config.{family.masks} = 0.0; else load it without `vwt`."
        )


def _tokenizer_of(forward: object) -> Tokenizer | None:
    if isinstance(forward, functools.partial) and forward.func in (embed, embed_padded):
        return forward.args[1]
    return None


def _tokenizer_within(model: PreTrainedModel) -> Tokenizer | None:
    for module in model.modules():
        for name in ("forward", "_old_forward"):
            tokenizer = _tokenizer_of(module.__dict__.get(name))
            if tokenizer is not None:
                return tokenizer
    return None


def is_compressed(model: PreTrainedModel) -> bool:
    """Whether `model` is compressed; one that was built from the config of another has its setting and is plain."""
    return _tokenizer_within(model) is not None


def lexicon_of(model: PreTrainedModel) -> Lexicon | None:
    """The vocabulary that `model` tokenises by, as its pixel values are normalised; `None` if it does not."""
    tokenizer = _tokenizer_within(model)
    return None if tokenizer is None else tokenizer.lexicon


@torch.compiler.disable
def _open(tokenizer: Tokenizer, tower: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of a vision tower: opens a forward, whose layers attend by what its embeddings lay out.

    Where images come as padded patches, what tells padding from them is taken from the tower and left for its head:
    layers see tokens, of which none is padding or the layout says so.
    """
    if tokenizer.attends:
        attention.use_for(tower)  # a `set_attn_implementation` may have come after `compress`
    if torch.is_grad_enabled():
        attention.carry_through_checkpoints(find_layers(tower))
    draws = tower.training and getattr(tower.config, "drop_path_rate", 0) > 0
    forward = attention.Forward(tower.config._attn_implementation, draws, tokenizer.relative)
    attention.current.set(forward)
    if not tokenizer.attends or tokenizer.family.padded is None:
        return None
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    kwargs = dict(zip(names, args, strict=False), **kwargs)
    forward.real = kwargs.get("pixel_attention_mask")
    return args[len(names) :], kwargs | {"pixel_attention_mask": None}


@torch.compiler.disable
def _mask_padding(head: nn.Module, args: Any) -> Any:
    """Forward pre-hook of a head that is told which patches are padding."""
    forward = attention.current.get()
    return args if forward is None else (args[0], forward.real)


@torch.compiler.disable
def _restore_within(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a tower's last layer and of what holds the layers: what comes after sees every patch, with its
    token's hidden state."""
    forward = attention.current.get()
    return output if forward is None or forward.batch is None else _restored(output, forward.batch.layout)


@torch.compiler.disable
def _restore_patches(tower: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a vision tower: restores what its earlier layers gave, and lets the forward's layout go."""
    forward = attention.current.get()
    attention.current.set(None)
    if forward is None or forward.batch is None or output is None:  # the forward raised
        return output
    return _restored(output, forward.batch.layout)


@torch.compiler.disable
def _leave(tower: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a vision tower that gives its tokens out as they are."""
    forward = attention.current.get()
    attention.current.set(None)
    if forward is not None and forward.batch is not None:
        _refuse_attentions(output, forward.batch.layout.sizes.shape)


def _restored(output: Any, layout: Layout) -> Any:
    """`output` with every tensor of tokens, (sequences, tokens, hidden), expanded to (batch, prefix + patches, hidden).

    Raises:
        ValueError: there are attention weights in it.
    """
    shape = layout.sizes.shape
    _refuse_attentions(output, shape)

    def restored(value: Any) -> Any:
        tokens = isinstance(value, torch.Tensor) and value.dim() >= 3 and value.shape[:2] == shape
        return expand(value, layout) if tokens else value

    return _pytree.tree_map(restored, output)


def _refuse_attentions(output: Any, shape: torch.Size) -> None:
    """Raises `ValueError` where `output` holds attention weights between tokens (sequences, tokens) of `shape`."""
    for value in _pytree.tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2:] == (shape[1], shape[1]):
            raise ValueError(
                "output_attentions gives the attention between patches, and grouped patches attend as one token. Leave "
                "it out, or call vwt_hf.restore(model) first."
            )


def _rotate(
    tokenizer: Tokenizer, patch_size: tuple[int, int], rotary: nn.Module, args: Any, output: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Forward hook of rotary positions, which makes the rotations (patches, head size) of patches those of tokens.

    A token that is a patch has its rotation. One that is a mean has that of the patch nearest to the mean of its
    places, which is a rotation that the model knows, jittered in training as the others are. The rotation of the mean
    of the coordinates agrees less with the plain model (scripts/compare_rotary.py).

    Returns:
        (batch or sequences, 1, tokens, head size), or (tokens, head size) where all images share them.
    """
    setting, (pixel_values,) = tokenizer.setting, args
    grid = patch_grid(pixel_values, patch_size)
    if tokenizer.attends:
        return _rotate_group(grid, output)
    count = grid[0] * grid[1]
    if setting.is_plain(count):
        return output
    kept = choose_patches(patchify(pixel_values, patch_size), grid, setting.patches_kept(count), setting)
    return tuple(_of_kept(values, kept) for values in output)


@torch.compiler.disable
def _rotate_group(grid: tuple[int, int], output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    forward = forward_under_way()
    if forward.kept is not None:
        return tuple(_of_kept(values, forward.kept) for values in output)
    assert forward.batch is not None  # the embeddings ran before
    place = medoids(forward.batch.layout, grid)
    # A last row for tokens without a place: cosine 1 and sine 0 leave them as they are.
    still = (torch.ones_like(output[0][:1]), torch.zeros_like(output[1][:1]))
    return tuple(torch.cat(pair)[place].unsqueeze(1) for pair in zip(output, still, strict=True))


def _of_kept(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return values[kept[0]] if kept.shape[0] == 1 else values[kept].unsqueeze(1)


STAND_INS = (embed, embed_padded, relate, attention.fused, attention.separate)
INPUT_HOOKS = (_open, _mask_padding)
OUTPUT_HOOKS = (_restore_within, _restore_patches, _leave, _rotate)
