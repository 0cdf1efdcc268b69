"""`compress` and `restore`: put the tokenizer into a model that is in memory, and take it out again."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import VWTConfig
from .families import Family, attribute, family_of, find_embeddings, model_of
from .words import (
    gather_patches,
    grid_patches,
    highest,
    patch_grid,
    patch_strip,
    patchify,
    random_patches,
    variance_scores,
)


def compress(model: PreTrainedModel, config: VWTConfig | dict[str, Any] | bool = True) -> PreTrainedModel:
    """Makes `model` drop patches before its first layer, in place, without changing a weight.

    A model that is compressed already gets the new setting instead of the old one. `model.config.vwt` holds the setting
    (a JSON-ready dict) until `restore`, and `save_pretrained` writes it.

    Args:
        model: a transformers model of a supported family (`vwt_hf.supported()`).
        config: a `VWTConfig`, a dict of its fields, or `True` for the defaults. `False` restores the plain model.

    Returns:
        The same `model`. Its `last_hidden_state` is (batch, prefix tokens + kept patches, hidden).

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: the family is not supported, the task needs every patch, or `config` is not valid.

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
    family = family_of(type(model))
    embeddings = find_embeddings(model, family)
    restore(model)
    # accelerate's hooks (`device_map`) wrap the forward that they find in a module, and keep it under this name.
    slot = "_old_forward" if hasattr(embeddings, "_hf_hook") else "forward"
    setattr(embeddings, slot, functools.partial(embed_kept, embeddings, family, setting))
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
    if getattr(model.config, "vwt", None) is not None:
        model.config.vwt = None
    return model


def _is_ours(forward: object) -> bool:
    return isinstance(forward, functools.partial) and forward.func is embed_kept


def embed_kept(
    module: nn.Module,
    family: Family,
    setting: VWTConfig,
    pixel_values: torch.Tensor,
    *,
    bool_masked_pos: torch.Tensor | None = None,
    interpolate_pos_encoding: bool | None = False,
) -> torch.Tensor:
    """Stands in for the forward of a family's embeddings: the same tokens, of the kept patches alone.

    Args:
        module: the embeddings module, whose parameters are used.
        pixel_values: (batch, channels, height, width).
        bool_masked_pos: not supported; see Raises.
        interpolate_pos_encoding: as for the family's models.

    Returns:
        (batch, prefix tokens + kept patches, hidden).

    Raises:
        ValueError: `bool_masked_pos` is given, or the images do not fit the model in channels or size.
    """
    if bool_masked_pos is not None:
        raise ValueError(
            "bool_masked_pos masks patches of the whole image, of which a compressed model sees a part; "
            "call vwt_hf.restore(model) first."
        )
    projection = attribute(module, family.projection)
    rows, columns = patch_grid(pixel_values, projection.kernel_size)
    keep = setting.patches_kept(rows * columns)
    if keep == rows * columns:
        extra = {} if family.always_interpolates else {"interpolate_pos_encoding": interpolate_pos_encoding}
        return type(module).forward(module, pixel_values, **extra)
    if pixel_values.shape[1] != projection.in_channels:
        raise ValueError(
            f"pixel_values have {pixel_values.shape[1]} channels; the model expects {projection.in_channels}."
        )
    positions = _positions(module, family, pixel_values, rows * columns, bool(interpolate_pos_encoding))

    patches = patchify(pixel_values, projection.kernel_size)
    kept = choose_patches(patches, (rows, columns), keep, setting)
    strip = patch_strip(gather_patches(patches, kept).to(projection.weight.dtype), projection.kernel_size)
    tokens = projection(strip).flatten(2).transpose(1, 2)

    prefix_length = len(family.prefix)
    tokens = tokens + gather_patches(positions[:, prefix_length:], kept)
    prefix = torch.cat([attribute(module, name).reshape(1, -1, tokens.shape[-1]) for name in family.prefix], dim=1)
    prefix = prefix + positions[:, :prefix_length]
    if family.registers is not None:
        prefix = torch.cat((prefix, attribute(module, family.registers)), dim=1)
    embeddings = torch.cat((prefix.expand(len(tokens), -1, -1), tokens), dim=1)
    dropout = getattr(module, "dropout", None)
    return embeddings if dropout is None else dropout(embeddings)


def choose_patches(patches: torch.Tensor, grid: tuple[int, int], keep: int, setting: VWTConfig) -> torch.Tensor:
    """Indices of the patches that stay, ascending.

    Args:
        patches: (batch, patches, channels · patch height · patch width), as `patchify` gives them.
        grid: rows and columns of patches.
        keep: how many stay.
        setting: says by which criterion.

    Returns:
        (batch, keep) for `criterion="variance"`, else (1, keep): the same for all images.
    """
    if setting.criterion == "variance":
        return highest(variance_scores(patches), keep)
    if setting.criterion == "random":
        return random_patches(grid[0] * grid[1], keep, setting.seed, patches.device)
    return grid_patches(*grid, keep, patches.device)


def _positions(
    module: nn.Module, family: Family, pixel_values: torch.Tensor, patches: int, interpolate: bool
) -> torch.Tensor:
    """The position table for images of this size, (1, prefix tokens with a position + patches, hidden)."""
    height, width = pixel_values.shape[-2:]
    table = attribute(module, family.positions)
    table = table.reshape(1, -1, table.shape[-1])
    if interpolate or family.always_interpolates:
        # The models' own method reads only the shape of what it is given.
        whole = table.new_empty(1, 1, table.shape[-1]).expand(1, len(family.prefix) + patches, -1)
        return attribute(module, "interpolate_pos_encoding")(whole, height, width)
    size = attribute(module, "image_size")
    expected = (size, size) if isinstance(size, int) else tuple(size)
    if (height, width) != expected:
        raise ValueError(
            f"pixel_values are {height}×{width}; the model expects {expected[0]}×{expected[1]}. Resize the images, or "
            "pass interpolate_pos_encoding=True."
        )
    return table
