"""Patches that look like a patch beside them, which may stand for both: functions on tensors alone.

A patch of odd row or column may be left to one of the eight beside it, and one of even row and column to one two
patches away. A patch whose row and column are multiples of four always stays, so that every other patch of even row and
column has such a one two patches away.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from .on_gpu import kernels_for
from .printable import shown
from .words import first_of, gather_patches, patchify, same_for_all, whole_numbers

OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, -1), (-1, 0), (-1, -1), (-1, 1))
"""Rows and columns from a patch to its neighbours; twice that for a patch of even row and column."""
TURNS = 3
"""Patches take turns: first those of odd row and column, then those of odd column, then those of odd row. No two of a
turn are neighbours. Those of even row and column come later, in three turns by the same rule on half of their row and
column."""
ALWAYS = 2 * TURNS
"""In place of the number of a turn: the patch always stays."""
FAR = 0.25
"""Patches two apart must differ by less than this share of the tolerance."""
FINE = 0.5
"""Weight of how strongly patches are textured; colours and slopes have weight 1."""
STEPS = 12
"""Halvings of the interval in which a tolerance is sought: it is found to 1/4096 of the largest distance."""


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The eight neighbours of each patch, to one of which it may be left."""

    index: torch.Tensor
    """(batch or 1, patches, 8), int64: which patches they are; 0 where there is none."""
    distance: torch.Tensor
    """(batch, patches, 8): the patch may be left to a neighbour if this is below the tolerance. Infinite where there is
    no neighbour, and for patches that always stay."""
    later: torch.Tensor
    """(batch or 1, patches, 8), bool: whether the neighbour's turn comes after the patch's own, or it always stays."""
    passes: torch.Tensor
    """(batch or 1, patches, 8), bool: whether the patch may be left to the neighbour even if that goes itself. What
    stands for the neighbour then stands for both."""


@same_for_all
def _waves(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Four patterns to multiply patches by: flat, falling downwards, falling to the right, and the product of the two.

    They are the slowest waves of the orthonormal cosine transform (DCT-II): (height · width, 4) float32.
    """
    rows, columns = (np.cos(np.pi * (np.arange(size) + 0.5) / size) for size in (height, width))
    flat = np.ones((height, width))
    waves = [wave.ravel() for wave in (flat, flat * rows[:, None], flat * columns, np.outer(rows, columns))]
    # A patch of one row or column has no slope along it.
    normed = [wave / max(float(np.linalg.norm(wave)), 1e-6) for wave in waves]
    return torch.tensor(np.stack(normed, axis=1).tolist(), dtype=torch.float32, device=device)


@same_for_all
def _weights(image_std: tuple[float, ...], values: int, device: torch.device) -> torch.Tensor:
    """What the pixels of each channel are multiplied by, so that the length of a patch is the root mean square of its
    `values` in raw RGB."""
    weights = np.asarray(image_std, np.float32) * np.float32(values**-0.5)
    return torch.tensor(weights.tolist(), dtype=torch.float32, device=device)


def describe(patches: torch.Tensor, patch_size: tuple[int, int], image_std: tuple[float, ...]) -> torch.Tensor:
    """What patches look like from afar: their colours, how these rise and fall, and how strongly they are textured.

    Args:
        patches: (batch, patches, channels · patch height · patch width), float32, as a model gets them.
        patch_size: height and width of a patch, in pixels.
        image_std: what raw RGB was divided by, for each channel.

    Returns:
        (batch, patches, 4 · channels + 1). The length of the difference of two rows says how much the patches differ in
        raw RGB, from 0 to 1; without texture it is the root mean square of the difference of their pixels.
    """
    waves = _waves(*patch_size, patches.device)
    pixels = patches.unflatten(-1, (len(image_std), len(waves)))
    std = _weights(tuple(image_std), patches.shape[-1], patches.device)
    slow = (pixels @ waves) * std.unsqueeze(1)
    lengths = torch.linalg.vector_norm(pixels, dim=-1) * std
    fine = (lengths.square().sum(dim=-1) - slow.square().sum(dim=(-2, -1))).clamp(min=0).sqrt()
    return torch.cat((slow.flatten(2), FINE * fine.unsqueeze(-1)), dim=-1)


def are_numbers(looks: torch.Tensor) -> torch.Tensor:
    """Whether each patch is free of NaN and infinity, by what `describe` gives: (batch, patches), bool."""
    return looks[..., -1] < torch.inf  # else the texture is NaN


def find_neighbours(looks: torch.Tensor, grid: tuple[int, int]) -> Neighbours:
    """The neighbours of each patch of a grid of so many rows and columns, by what `describe` gives."""
    index, later, passes = _beside(*grid, looks.device).unbind(0)
    factor, none = _limits(*grid, looks.device).unbind(0)
    return Neighbours(index, _distances(looks, index, factor, none), later.bool(), passes.bool())


def find_padded_neighbours(looks: torch.Tensor, places: torch.Tensor, real: torch.Tensor) -> Neighbours:
    """`find_neighbours` where images are padded; padding has no neighbours, and is no patch's neighbour.

    Args:
        places: (batch, patches, 2): row and column of each patch, in row-major order, padding included.
        real: (batch, patches), bool: which patches are no padding. A caller may mask any patch.
    """
    row, column = places.long().unsqueeze(2).unbind(-1)
    rows = row.masked_fill(~real.unsqueeze(2), -1).amax(dim=1, keepdim=True) + 1
    columns = column.amax(dim=1, keepdim=True) + 1  # over masked patches, too, as they are numbered like the others
    around = _around(row, column, rows, columns, _offsets(places.device).unbind(1))
    exists = around.exists & real.unsqueeze(2) & at(real, around.index * around.exists)
    none = torch.zeros_like(looks[..., :1]).masked_fill(~exists, torch.inf)
    index = around.index * exists
    return Neighbours(index, _distances(looks, index, around.factor, none), around.later, around.passes & exists)


@same_for_all
def _offsets(device: torch.device) -> torch.Tensor:
    return whole_numbers(OFFSETS, device)


class _Around(NamedTuple):
    """The eight neighbours of patches by where these lie, as arrays of numpy or of torch: (..., patches, 8)."""

    index: Any
    later: Any
    passes: Any
    """As in `Neighbours`. All three mean something only where a neighbour exists."""
    factor: Any
    """(..., patches, 1): what the difference from each neighbour is multiplied by."""
    exists: Any
    """Whether the neighbour exists, and the patch may be left to it."""


def _on_grid(rows: int, columns: int) -> _Around:
    """The neighbours of all patches of a grid, as arrays of numpy."""
    row, column = np.divmod(np.arange(rows * columns)[:, None], columns)
    return _around(row, column, rows, columns, np.array(OFFSETS).T)


@same_for_all
def _beside(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """`index`, `later` and `passes` of `Neighbours`: (3, 1, patches, 8), int64."""
    around = _on_grid(rows, columns)
    return whole_numbers(np.stack((around.index, around.later, around.passes))[:, None] * around.exists, device)


@same_for_all
def _limits(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """What each difference is multiplied by, and what is added: infinity where there is no neighbour, else 0.
    (2, 1, patches, 8), float32."""
    around = _on_grid(rows, columns)
    both = np.stack((around.factor * np.ones_like(around.exists), np.where(around.exists, 0, np.inf)))
    return torch.tensor(both[:, None].tolist(), dtype=torch.float32, device=device)


def _around(row: Any, column: Any, rows: Any, columns: Any, offsets: Any) -> _Around:
    """Finds the neighbours of patches by where these lie.

    Args:
        row, column: (..., patches, 1): of each patch.
        rows, columns: of its image.
        offsets: `OFFSETS`, downwards and to the right: (8,) each.
    """
    turn = _turn(row, column)
    even = turn >= TURNS
    there_row, there_column = row + (1 + even) * offsets[0], column + (1 + even) * offsets[1]
    exists = (there_row >= 0) & (there_row < rows) & (there_column >= 0) & (there_column < columns) & (turn != ALWAYS)
    index, turn_there = there_row * columns + there_column, _turn(there_row, there_column)
    factor = 1 + even * (1 / FAR - 1)  # 1 / FAR for patches of even row and column, else 1
    return _Around(index, turn_there > turn, ~even & (turn_there >= TURNS), factor, exists)


def _turn(row: Any, column: Any) -> Any:
    """The number of each patch's turn, from 0 to `ALWAYS`."""

    def of_odd(row: Any, column: Any) -> Any:
        return TURNS - row % 2 - 2 * (column % 2)

    turn = of_odd(row, column)
    return turn + (turn == TURNS) * of_odd(row // 2, column // 2)


def _distances(looks: torch.Tensor, index: torch.Tensor, factor: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
    """`Neighbours.distance`: how much looks differ from those of the neighbours, times `factor`, and `none` added."""
    there = gather_patches(looks, index.flatten(1)).unflatten(1, index.shape[1:])
    distance = torch.linalg.vector_norm(looks.unsqueeze(2) - there, dim=-1)
    # A patch that holds NaN is like no other: it stays, and the answer is NaN, as without a setting.
    return (none + distance * factor).nan_to_num(torch.inf, torch.inf)


def at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of (batch, patches) values those of the patches that `index`, (batch or 1, ...), names: (batch, ...)."""
    index = index.expand(values.shape[0], *index.shape[1:])
    return values.gather(1, index.flatten(1)).view(index.shape)


def cover(neighbours: Neighbours, tolerance: float | torch.Tensor) -> torch.Tensor:
    """Which patches stay, if one goes where a neighbour of a later turn differs from it by less than a tolerance.

    All turns are decided at once. Neighbours of later turns are still there at a patch's turn. An alike one of an
    earlier turn is gone: at its turn, this patch was still there.

    Args:
        tolerance: a number, or (batch, 1, 1).

    Returns:
        (batch, patches), bool.
    """
    return ~((neighbours.distance < tolerance) & neighbours.later).any(dim=-1)


def cover_by(neighbours: Neighbours, keep: int | torch.Tensor) -> torch.Tensor:
    """Scores whose `keep` highest are the patches that stay: as `cover` says, by the tolerance that leaves so many.

    Where no tolerance leaves exactly so many, those of the patches that would go stay that differ most.

    Args:
        keep: how many patches stay, of every image, or (batch,), of each.

    Returns:
        (batch, patches), float32.
    """
    known = neighbours.distance.masked_fill(neighbours.distance.isinf(), 0)
    high = known.amax(dim=(1, 2), keepdim=True) * 1.001 + 1e-6
    low = torch.zeros_like(high)
    wanted = keep.view(-1, 1, 1) if isinstance(keep, torch.Tensor) else keep
    for _ in range(STEPS):
        middle = (low + high) / 2
        fewer = cover(neighbours, middle).sum(dim=1).view(-1, 1, 1) <= wanted
        low, high = torch.where(fewer, low, middle), torch.where(fewer, middle, high)
    stays = cover(neighbours, high)
    least, _ = _nearest(neighbours, stays)
    return least.masked_fill(stays, torch.inf)


def leaders(neighbours: Neighbours, stays: torch.Tensor) -> torch.Tensor:
    """Which patch stands for each: itself if it stays, else the one that stands for the neighbour that differs least.

    The neighbour is one that stays or, of a patch of odd row or column, one of even row and column. Of neighbours that
    differ equally the first by `OFFSETS` is taken. A patch that padding leaves no such neighbour stands for itself.

    Args:
        stays: (batch, patches), bool: those of every fourth row and column among them.

    Returns:
        (batch, patches), int64.
    """
    own = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
    least, nearest = _nearest(neighbours, stays)
    first = torch.where(stays | least.isinf(), own, nearest)
    return at(first, first)


def find_leaders(
    pixel_values: torch.Tensor,
    patch_size: tuple[int, int],
    grid: tuple[int, int],
    image_std: tuple[float, ...],
    tolerance: float,
) -> torch.Tensor:
    """`leaders` of images of one size, (batch, channels, height, width), if those patches stay that `cover` says."""
    if pixel_values.shape[1] != len(image_std):
        raise ValueError(
            f"pixel_values {tuple(pixel_values.shape)} have {pixel_values.shape[1]} channels, and image_std "
            f"{shown(image_std)} numbers for {len(image_std)}; expected as many. Compress the model, whose images have "
            "other channels now, again, with their VWTConfig(image_std=...)."
        )
    if kernels := kernels_for(pixel_values):
        device, values = pixel_values.device, len(image_std) * math.prod(patch_size)
        looks_by = _waves(*patch_size, device), _weights(tuple(image_std), values, device), FINE
        around = _beside(*grid, device), _limits(*grid, device)
        return kernels.find_leaders(pixel_values, patch_size, grid, *looks_by, *around, tolerance)
    looks = describe(patchify(pixel_values, patch_size).float(), patch_size, image_std)
    neighbours = find_neighbours(looks, grid)
    return leaders(neighbours, cover(neighbours, tolerance))


def _nearest(neighbours: Neighbours, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each patch differs from the most similar neighbour that it may be left to, and the index of that."""
    takes = at(stays, neighbours.index) | neighbours.passes
    near = neighbours.distance.masked_fill(~takes, torch.inf)
    least = near.amin(dim=-1, keepdim=True)
    which = first_of((near == least).float()).unsqueeze(-1)
    return least.squeeze(-1), neighbours.index.expand(near.shape).gather(-1, which).squeeze(-1)
