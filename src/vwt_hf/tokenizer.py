"""What stands in for the embeddings of a compressed model: patches in, the tokens that they become out."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from . import attention
from .config import VWTConfig
from .families import Family, attribute, patch_shape, position_table, weight_of
from .layout import attention_bias, group, pool, put_prefix, represent
from .lexicon import Lexicon
from .padded import choose_padded, padded_places
from .words import (
    gather_pairs,
    gather_patches,
    grid_patches,
    highest,
    nearest_kept,
    nearest_words,
    patch_grid,
    patch_places,
    patch_strip,
    patchify,
    random_patches,
    variance_scores,
)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """What a compressed model's embeddings go by."""

    family: Family
    setting: VWTConfig
    lexicon: Lexicon | None
    relative: bool
    """Whether the model gives attention a bias by where patches lie to each other."""

    @property
    def attends(self) -> bool:
        """Whether attention goes by how many patches a token stands for, which may be none."""
        if self.setting.method == "inter":
            return self.setting.threshold > 0
        shortens = self.setting.keep_ratio < 1 or self.setting.num_patches is not None
        return self.setting.groups or (self.family.padded is not None and shortens)

    @property
    def tells(self) -> bool:
        """Whether layers must know what the embeddings did: which patches a token stands for, or which of them stay."""
        return self.attends or (self.relative and self.setting.method == "intra")


def embed(
    module: nn.Module,
    tokenizer: Tokenizer,
    pixel_values: torch.Tensor,
    *,
    bool_masked_pos: torch.Tensor | None = None,
    interpolate_pos_encoding: bool | None = False,
    noise: torch.Tensor | None = None,
) -> Any:
    """Stands in for the forward of a family's embeddings: prefix tokens, and the tokens that the patches became.

    Args:
        module: the embeddings module, whose parameters are used.
        tokenizer: the family's row, the setting and its words.
        pixel_values: (batch, channels, height, width).
        bool_masked_pos: not supported; see Raises.
        interpolate_pos_encoding: as for the family's models.
        noise: the order that ViT-MAE shuffles the patches of the whole image to; tokens keep the order of the patches.

    Returns:
        (batch, prefix tokens + tokens, hidden), and what else the family's embeddings return.

    Raises:
        ValueError: `bool_masked_pos` is given, or the images do not fit the model in channels or size.
    """
    if bool_masked_pos is not None:
        raise ValueError(
            "bool_masked_pos masks patches of the whole image, of which a compressed model sees a part; "
            "call vwt_hf.restore(model) first."
        )
    family, setting = tokenizer.family, tokenizer.setting
    projection = attribute(module, family.projection)
    channels, patch_size = patch_shape(module, family)
    grid = patch_grid(pixel_values, patch_size)
    count = grid[0] * grid[1]
    if setting.is_plain(count):
        extra: dict[str, Any] = {} if noise is None else {"noise": noise}
        if family.masks and noise is None:  # else patches come in a random order
            extra["noise"] = torch.arange(count, device=pixel_values.device).expand(pixel_values.shape[0], -1)
        if not family.always_interpolates and not callable(family.positions):
            extra["interpolate_pos_encoding"] = interpolate_pos_encoding
        embeddings = type(module).forward(module, pixel_values, **extra)
        if tokenizer.attends:
            tokens = embeddings[0] if isinstance(embeddings, tuple) else embeddings
            itself = torch.arange(count, device=tokens.device).unsqueeze(0)
            layout = represent(itself.expand(tokens.shape[0], -1), count, tokens.shape[1] - count)
            _lay_out(itself, attention.Batch(layout, None))
        return embeddings
    if pixel_values.shape[1] != channels:
        raise ValueError(f"pixel_values have {pixel_values.shape[1]} channels; the model expects {channels}.")
    prefix, positions = _prefix_and_positions(
        module, family, pixel_values, grid, weight_of(projection).shape[0], bool(interpolate_pos_encoding)
    )
    norm = None if family.norm is None else attribute(module, family.norm)

    patches = patchify(pixel_values, patch_size)
    kept = None
    if tokenizer.lexicon is None:
        kept = choose_patches(patches, grid, setting.patches_kept(count), setting)
        if setting.groups:
            layout = represent(
                nearest_kept(patches, kept, patch_places(grid, patches.device)), kept.shape[1], prefix.shape[1]
            )
            _lay_out(kept, attention.Batch(layout, attention_bias(layout, setting.proportional_attention)))
        elif tokenizer.tells:
            _lay_out(kept, None)
        tokens = _project(projection, gather_patches(patches, kept))
        tokens = tokens if norm is None else norm(tokens)
        tokens = tokens if positions is None else tokens + gather_patches(positions, kept)
        embeddings = torch.cat((prefix.expand(tokens.shape[0], -1, -1), tokens), dim=1)
    else:
        embeddings = _group(tokenizer, projection, norm, patches, prefix, positions)
    dropout = getattr(module, "dropout", None)
    embeddings = embeddings if dropout is None else dropout(embeddings)
    if family.outputs is None:
        return embeddings
    return family.outputs(embeddings, None if setting.groups else kept, pixel_values.shape[0], grid)


def embed_padded(
    module: Any, tokenizer: Tokenizer, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor
) -> torch.Tensor:
    """Stands in for the forward of embeddings whose images come as padded patches: the tokens that the patches became.

    Args:
        module: the embeddings module, whose parameters are used.
        tokenizer: the family's row, the setting and its words.
        pixel_values: (batch, patches, patch height · patch width · channels).
        spatial_shapes: (batch, 2), rows and columns of patches of each image; what is beyond them is padding.

    Returns:
        (sequences, tokens, hidden).

    Raises:
        ValueError: the patches do not fit the model.
    """
    if not tokenizer.attends:
        return type(module).forward(module, pixel_values, spatial_shapes)
    family, setting = tokenizer.family, tokenizer.setting
    projection = attribute(module, family.projection)
    channels, patch_size = patch_shape(module, family)
    values = weight_of(projection).shape[1]
    if pixel_values.dim() != 3 or pixel_values.shape[2] != values:
        raise ValueError(
            f"pixel_values are {tuple(pixel_values.shape)}; the model expects (batch, patches, {values}), patches of "
            f"{patch_size[0]}×{patch_size[1]} pixels and {channels} channels as its image processor cuts them."
        )
    count = pixel_values.shape[1]
    # Called, not read: the weights of an offloaded module are there only while it runs.
    table = module.position_embedding(torch.arange(module.num_patches, device=pixel_values.device))
    table = table.unflatten(0, (module.position_embedding_size, -1))
    positions = module.resize_positional_embeddings(table, spatial_shapes, max_length=count)
    places, real = padded_places(spatial_shapes.to(pixel_values.device), count)
    forward = forward_under_way()
    if forward.real is not None:
        real = real & forward.real.bool()
    forward.real = real
    if tokenizer.lexicon is not None:
        as_words = pixel_values.unflatten(-1, (*patch_size, channels)).movedim(-1, 2).flatten(2)
        none = positions.new_empty(1, 0, positions.shape[-1])
        return _group(tokenizer, projection, None, pixel_values, none, positions, (as_words, real))
    kept, stays = choose_padded(pixel_values, places, real, setting)
    if setting.groups:
        token_of_patch = nearest_kept(pixel_values, kept, places, real, stays)
    else:  # those that do not stay count nowhere
        own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        token_of_patch = torch.zeros_like(real, dtype=torch.int64).scatter_(1, kept, own)
        real = torch.zeros_like(real).scatter_(1, kept, stays)
    layout = represent(token_of_patch, kept.shape[1], real=real)
    _lay_out(kept, attention.Batch(layout, attention_bias(layout, setting.proportional_attention)))
    if not setting.restores:
        forward.real = stays
    return _project(projection, gather_patches(pixel_values, kept)) + gather_patches(positions, kept)


@torch.compiler.disable
def forward_under_way() -> attention.Forward:
    """The forward of the vision tower that this code runs in.

    Raises:
        RuntimeError: there is none.
    """
    forward = attention.current.get()
    if forward is None:
        raise RuntimeError(
            "Embeddings that group patches ran outside the model's call, which undoes the grouping at its end. Call "
            "model(...), not model.forward(...)."
        )
    return forward


@torch.compiler.disable
def _lay_out(kept: torch.Tensor, batch: attention.Batch | None) -> None:
    """Leaves, for the layers of the forward under way, which patches stay, and what they stand for."""
    forward = forward_under_way()
    forward.kept, forward.batch = kept, batch


@torch.compiler.disable
def _group(
    tokenizer: Tokenizer,
    projection: Any,
    norm: Any,
    patches: torch.Tensor,
    prefix: torch.Tensor,
    positions: torch.Tensor | None,
    padded: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Groups patches by words, and leaves their layout for the layers to attend by.

    Compiled models call it as it is: how many tokens there are is known only when it has run.

    Args:
        norm: what comes between projection and positions; `None` if nothing does.
        patches: (batch, patches, values), in the order that the projection takes.
        prefix: (1, prefix tokens, hidden).
        positions: (1 or batch, patches, hidden); `None` if they are not added.
        padded: where some patches are padding: all in the order of words, (batch, patches, channels · patch height ·
            patch width), and which are real, (batch, patches) bool.

    Returns:
        (sequences, tokens, hidden).

    Raises:
        ValueError: the model is being exported, or trained packed with stochastic depth.
    """
    setting, lexicon = tokenizer.setting, tokenizer.lexicon
    assert lexicon is not None  # it comes with method="inter"
    if torch.compiler.is_compiling():  # by torch.export: torch.compile leaves this function alone
        raise ValueError(
            "method='inter' gives every image its own number of tokens, which an exported program cannot hold. Export "
            "a model compressed with method='intra'."
        )
    forward = forward_under_way()
    patches = patches.float()
    as_words, real = (patches, None) if padded is None else padded
    words = nearest_words(as_words.float(), lexicon.on(patches.device), setting.threshold)
    if forward.draws_by_sequence and setting.layout == "packed":
        raise ValueError(
            "layout is 'packed' and the model is in training with stochastic depth (drop_path_rate), which draws once "
            "for each sequence: all images would skip the same layers. Use layout='auto' or 'padded'."
        )
    packed = setting.layout == "packed"
    if setting.layout == "auto" and not forward.draws_by_sequence:
        own = "vwt_sdpa" if tokenizer.family.attentions else forward.implementation
        packed = attention.packs(own, patches.device, projection.weight.dtype, forward.relative)
    layout = group(words, prefix.shape[1], packed, real)
    forward.batch = attention.Batch(layout, attention_bias(layout, setting.proportional_attention))
    if norm is not None:
        embedded = norm(_project(projection, patches))
        return put_prefix(pool(embedded if positions is None else embedded + positions, layout), prefix, layout)
    # The projection is linear: the mean of patches is projected onto the mean of their projections, once. What a
    # convolution gives is laid out channel by channel, and is added to what is not.
    projected = _project(projection, pool(patches, layout))
    tokens = projected.contiguous() if positions is None else pool(positions, layout).add_(projected)
    return put_prefix(tokens, prefix, layout)


def _project(projection: Any, patches: torch.Tensor) -> torch.Tensor:
    """The tokens (batch, patches, hidden) that a patch projection makes of patches (batch, patches, values)."""
    weight = weight_of(projection)
    if weight.is_floating_point():  # a linear one may be quantized
        patches = patches.to(weight.dtype)
    if weight.dim() == 2:
        return projection(patches)
    strip = patch_strip(patches, (weight.shape[2], weight.shape[3]))
    return projection(strip).flatten(2).transpose(1, 2)


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


@torch.compiler.disable
def relate(
    module: nn.Module,
    prefix: int,
    window_size: tuple[int, int],
    interpolate_pos_encoding: bool = False,
    dim_size: int | None = None,
) -> torch.Tensor:
    """Stands in for the forward of a relative position bias.

    Args:
        module: the bias, whose table is used.
        prefix: prefix tokens of each image.
        window_size: rows and columns of patches.
        interpolate_pos_encoding, dim_size: what the plain forward fits a bias of another size to. This one is of the
            right size, which is that of the image.

    Returns:
        (batch or 1, heads, prefix + kept, prefix + kept). Where tokens are means of patches, the bias of the whole
        image, (1, heads, prefix + patches, prefix + patches): attention, which knows the lengths, takes the means.
    """
    kept = forward_under_way().kept
    whole = type(module).forward(module, window_size)
    return whole if kept is None else gather_pairs(whole, kept, prefix)


def _prefix_and_positions(
    module: nn.Module,
    family: Family,
    pixel_values: torch.Tensor,
    grid: tuple[int, int],
    hidden: int,
    interpolate: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The prefix tokens, (1, prefix tokens, hidden), and the positions of the patches, (1, patches, hidden), or `None`
    if they are not added."""
    own = [attribute(module, name).reshape(1, -1, hidden) for name in family.prefix]
    positions = None
    table = _positions(module, family, pixel_values, grid, interpolate)
    if table is None:
        prefix = torch.cat(own, dim=1)
    else:
        prefix, positions = table[:, : len(own)], table[:, len(own) :]
        prefix = torch.cat(own, dim=1) + prefix if own else prefix
    if family.registers is not None:
        prefix = torch.cat((prefix, attribute(module, family.registers)), dim=1)
    return prefix, positions


def _positions(
    module: nn.Module, family: Family, pixel_values: torch.Tensor, grid: tuple[int, int], interpolate: bool
) -> torch.Tensor | None:
    """The position table for images of this size, (1, prefix tokens with a position + patches, hidden); `None` if
    positions are not added."""
    height, width = pixel_values.shape[-2:]
    table = position_table(module, family, grid)
    length = len(family.prefix) + grid[0] * grid[1]
    if table is None or (callable(family.positions) and table.shape[1] == length):
        return table
    if interpolate or family.always_interpolates:
        # The models' own method reads only the shape of what it is given.
        whole = table.new_empty(1, 1, table.shape[-1]).expand(1, length, -1)
        return attribute(module, "interpolate_pos_encoding")(whole, height, width)
    size = attribute(module if hasattr(module, "image_size") else module.config, "image_size")
    expected = (size, size) if isinstance(size, int) else tuple(size)
    if (height, width) != expected:
        can = hasattr(module, "interpolate_pos_encoding")
        raise ValueError(
            f"pixel_values are {height}×{width}; the model expects {expected[0]}×{expected[1]}. Resize the images"
            + (", or pass interpolate_pos_encoding=True." if can else ".")
        )
    return table
