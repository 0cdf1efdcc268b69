"""Blocks of 2 × 2 patches, and how they look at half the size: functions on tensors alone.

Blocks do not overlap: the first patch of each lies in an even row and column. Where images are padded, each block is
cut out and is an image of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import pad

from .neighbours import at
from .words import gather_patches, same_for_all, whole_numbers


def halve(images: torch.Tensor) -> torch.Tensor:
    """Images, (batch, channels, height, width), at half the size, each pixel the mean of 2 × 2.

    An odd last row or column is left out. The result is float32, or float64 if `images` are.
    """
    first, *others = _quarters(images)
    return sum(others, first.to(torch.promote_types(first.dtype, torch.float32))) / 4


def detail_lost(
    images: torch.Tensor, halves: torch.Tensor, patch_size: tuple[int, int], image_std: tuple[float, ...]
) -> torch.Tensor:
    """How much each block loses at half the size: the mean square of the differences of its pixels, in raw RGB.

    Args:
        halves: what `halve` makes of the images.
        image_std: what each channel was divided by.

    Returns:
        (batch, rows // 2, columns // 2), float32.
    """
    first, *others = _quarters(images)
    squares = (first - halves).square()
    for other in others:
        squares = squares + (other - halves).square()
    means = torch.nn.functional.avg_pool2d(squares / 4, patch_size)
    # One channel after another, as torch may sum in an order that depends on the shape of the batch.
    total = torch.zeros_like(means[:, 0])
    for channel, deviation in zip(means.unbind(1), image_std, strict=True):
        total = total + channel * deviation**2
    return total / len(image_std)


def _quarters(images: torch.Tensor) -> list[torch.Tensor]:
    """The upper left pixel of each 2 × 2, the upper right, ...: (batch, channels, height // 2, width // 2) each."""
    height, width = (size // 2 * 2 for size in images.shape[-2:])
    return [images[..., row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]


def with_halves(
    images: torch.Tensor, halves: torch.Tensor, chosen: torch.Tensor, patch_size: tuple[int, int], enlarged: bool
) -> torch.Tensor:
    """Images of which some blocks are shown at half the size.

    Args:
        halves: what `halve` makes of the images.
        chosen: (batch, rows // 2, columns // 2) bool: which blocks.
        enlarged: whether the four patches of a block show it together, for pictures. Else each of them shows the whole
            block, for the model.

    Returns:
        The changed images, of the same shape and dtype; float32 where `images` are whole numbers.
    """
    (height, width), (rows, columns) = patch_size, chosen.shape[1:]
    high, wide = rows * height, columns * width
    halves = halves[..., :high, :wide]
    if images.is_floating_point():  # means of whole numbers have fractions
        halves = halves.to(images.dtype)
    if enlarged:
        instead = halves.repeat_interleave(2, dim=-2).repeat_interleave(2, dim=-1)
    else:
        blocks = halves.unflatten(-1, (columns, 1, width)).unflatten(-4, (rows, 1, height))
        instead = blocks.expand(-1, -1, -1, 2, -1, -1, 2, -1).flatten(-3).flatten(-4, -2)
    mask = chosen.repeat_interleave(2 * height, dim=1).repeat_interleave(2 * width, dim=2).unsqueeze(1)
    within = torch.where(mask, instead, images[..., : 2 * high, : 2 * wide])
    if within.shape == images.shape:
        return within
    right = torch.cat((within, images[..., : 2 * high, 2 * wide :]), dim=-1)
    return torch.cat((right, images[..., 2 * high :, :]), dim=-2)


@same_for_all
def grid_blocks(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """The four patches of each block of a grid, row by row: (1, blocks, 4), int64."""
    first = np.arange(rows // 2)[:, None] * 2 * columns + np.arange(columns // 2) * 2
    four = first.reshape(-1, 1) + np.array([0, 1, columns, columns + 1])
    return whole_numbers(four, device).view(1, -1, 4)


def padded_blocks(places: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The four patches of each block where images are padded: (batch, blocks, 4), int64.

    Args:
        places: (batch, patches, 2), int64: row and column of each patch.
        real: (batch, patches), bool: which are no padding.

    Returns:
        A row for each block, padded to `patches // 4` rows by ones that hold the number of patches, which is no index,
        in all four places.
    """
    batch, patches = real.shape
    row, column = places.unbind(-1)
    columns = column.amax(dim=1, keepdim=True) + 1
    own = torch.arange(patches, device=real.device).expand(batch, -1)
    four = torch.stack((own, own + 1, own + columns, own + columns + 1), dim=2)
    whole = (at(real, four.clamp(max=patches - 1)) & (four < patches)).all(dim=2)
    # Without this, a patch at the end of a row would form a block with patches of the next row.
    whole &= (row % 2 == 0) & (column % 2 == 0) & (column + 1 < columns)
    order = whole.long().argsort(dim=1, descending=True, stable=True)[:, : patches // 4]
    four = torch.where(whole.unsqueeze(2), four, patches)
    return four.gather(1, order.unsqueeze(2).expand(-1, -1, 4))


def cut_blocks(patches: torch.Tensor, members: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Blocks of padded patches, by `padded_blocks`, as images of their own: (batch · blocks, channels, 2 · height,
    2 · width); zeros where there is no block."""
    pixels = gather_patches(pad(patches, (0, 0, 0, 1)), members.flatten(1))
    blocks = pixels.unflatten(1, (-1, 2, 2)).unflatten(-1, (*patch_size, -1))
    return blocks.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4).flatten(0, 1)


def put_back(patches: torch.Tensor, blocks: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Padded patches with `blocks`, as `cut_blocks` gives them, in place of their own."""
    height, width = (size // 2 for size in blocks.shape[-2:])
    tiles = blocks.unflatten(0, members.shape[:2]).unflatten(-1, (2, width)).unflatten(-3, (2, height))
    rows = tiles.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(1, 3)
    index = members.flatten(1).unsqueeze(2).expand_as(rows)
    return pad(patches.to(rows.dtype), (0, 0, 0, 1)).scatter(1, index, rows)[:, :-1]


def words_of(chosen: torch.Tensor, members: torch.Tensor, patches: int) -> torch.Tensor:
    """The word of each patch, (batch, patches), int64: its own index, or that of the first of its block, if that is
    chosen to become one token, (batch, blocks), bool."""
    members = members.expand(chosen.shape[0], -1, -1)
    words = torch.where(chosen.unsqueeze(2), members[:, :, :1], members).flatten(1)
    own = torch.arange(patches + 1, device=chosen.device).expand(chosen.shape[0], -1)
    return own.scatter(1, members.flatten(1), words)[:, :-1]


def chosen_by(words: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """The way back from `words_of`: a block was chosen if all of its patches have the word of the first."""
    return (at(pad(words, (0, 1), value=-1), members) == members[:, :, :1]).all(dim=2)
