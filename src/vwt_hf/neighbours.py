"""Patches that look like a patch beside them, which may stand for both: functions on tensors alone.

Twice, patches are left to a neighbour: first to one beside them, then, of those in every second row and column, which
have stayed until then, to one two patches away.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from .words import first_of, gather_patches, same_for_all, whole_numbers

OFFSETS = ((0, 1), (1, 0), (1, 1), (1, -1), (0, -1), (-1, 0), (-1, -1), (-1, 1))
"""Rows and columns from a patch to its neighbours. The last four are opposite to the first four, in their order."""
CLASSES = ((1, 1), (0, 1), (1, 0))
"""Row and column, modulo two, of the patches that may go, class after class. No two patches of a class are neighbours,
and each of them has a neighbour of even row and even column, which stays."""
STAYS = len(CLASSES)
"""In place of the number of a class: the patch may not go at a spacing."""
NONE = -1
"""In place of the index of a patch: there is none."""
SPACINGS = (1, 2)
"""How many patches away neighbours are, first and then."""
FAR = 0.25
"""Share of the tolerance within which patches two apart must be alike."""
FINE = 0.5
"""Weight of how strongly patches are textured, beside the weight of 1 of their colours and gradients."""
STEPS = 12
"""Halvings by which a tolerance is found that leaves a given number of patches: to 1/4096 of the largest distance."""


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The eight neighbours of each patch, at one spacing."""

    index: torch.Tensor
    """(batch or 1, patches, 8), int64: which patches they are; 0 where there is none."""
    distance: torch.Tensor
    """(batch, patches, 8): how much the patch differs from each; infinite where there is none."""
    classes: torch.Tensor
    """(batch or 1, patches), int64: the number in `CLASSES` of each patch, or `STAYS`."""
    within: float
    """Share of the tolerance within which they are alike."""


@same_for_all
def _waves(height: int, width: int, device: torch.device) -> torch.Tensor:
    """The mean of a patch, its slopes down and to the right, and their product: (height · width, 4) float32.

    They are the slowest waves of the orthonormal cosine transform (DCT-II).
    """
    rows, columns = (np.cos(np.pi * (np.arange(size) + 0.5) / size) for size in (height, width))
    flat = np.ones((height, width))
    waves = [wave.ravel() for wave in (flat, flat * rows[:, None], flat * columns, np.outer(rows, columns))]
    # A patch of one row or column has no slope along it.
    normed = [wave / max(float(np.linalg.norm(wave)), 1e-6) for wave in waves]
    return torch.tensor(np.stack(normed, axis=1).tolist(), dtype=torch.float32, device=device)


@same_for_all
def _weights(image_std: tuple[float, ...], values: int, device: torch.device) -> torch.Tensor:
    """What makes a sum over the values of a patch one of raw RGB, for each channel."""
    return torch.tensor(image_std, device=device) * values**-0.5


def describe(patches: torch.Tensor, patch_size: tuple[int, int], image_std: tuple[float, ...]) -> torch.Tensor:
    """What patches look like from afar: colours, their slopes across the patch, and how strongly it is textured.

    Args:
        patches: (batch, patches, channels · patch height · patch width), float32, as a model gets them.
        patch_size: height and width of a patch, in pixels.
        image_std: what raw RGB was divided by, for each channel.

    Returns:
        (batch, patches, 4 · channels + 1): the length of a difference of these is one of raw RGB, in [0, 1]: that of
        the pixels in root mean square, where patches have the same texture.
    """
    waves = _waves(*patch_size, patches.device)
    pixels = patches.unflatten(-1, (len(image_std), len(waves)))
    std = _weights(tuple(image_std), patches.shape[-1], patches.device)
    slow = (pixels @ waves) * std.unsqueeze(1)
    lengths = torch.linalg.vector_norm(pixels, dim=-1) * std
    fine = (lengths.square().sum(dim=-1) - slow.square().sum(dim=(-2, -1))).clamp(min=0).sqrt()
    return torch.cat((slow.flatten(2), FINE * fine.unsqueeze(-1)), dim=-1)


def find_neighbours(looks: torch.Tensor, grid: tuple[int, int]) -> list[Neighbours]:
    """The neighbours of each patch, those beside it and those two patches away.

    Args:
        looks: (batch, patches, values), as `describe` gives them.
        grid: rows and columns of patches.
    """
    beside = _beside(*grid, looks.device)
    return [
        _neighbours(looks, part[..., :-1], part[..., -1], spacing)
        for part, spacing in zip(beside, SPACINGS, strict=True)
    ]


def find_padded_neighbours(looks: torch.Tensor, places: torch.Tensor, real: torch.Tensor) -> list[Neighbours]:
    """As `find_neighbours`, of images that are padded; padding has no neighbours and is none.

    Args:
        looks: (batch, patches, values).
        places: (batch, patches, 2): row and column of each patch, in row-major order.
        real: (batch, patches), bool: which patches are no padding.
    """
    row, column = places.long().unsqueeze(2).unbind(-1)
    inside_row, inside_column = (place.masked_fill(~real.unsqueeze(2), -1) for place in (row, column))
    rows, columns = (place.amax(dim=1, keepdim=True) + 1 for place in (inside_row, inside_column))
    offsets = _offsets(places.device).unbind(1)
    found = []
    for spacing in SPACINGS:
        index = _index(inside_row, inside_column, rows, columns, offsets, spacing)
        index = index.masked_fill(~real.unsqueeze(2), NONE)
        found.append(_neighbours(looks, index, _classes(row, column, spacing).squeeze(2), spacing))
    return found


@same_for_all
def _offsets(device: torch.device) -> torch.Tensor:
    return whole_numbers(OFFSETS, device)


@same_for_all
def _beside(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """For each spacing the neighbours of each patch, or `NONE`, and its class: (2, 1, patches, 9) int64."""
    row, column = np.divmod(np.arange(rows * columns)[:, None], columns)
    parts = [
        np.hstack((_index(row, column, rows, columns, np.array(OFFSETS).T, spacing), _classes(row, column, spacing)))
        for spacing in SPACINGS
    ]
    return whole_numbers(np.stack(parts)[:, None], device)


def _index(row: Any, column: Any, rows: Any, columns: Any, offsets: Any, spacing: int) -> Any:
    """Which patches the neighbours are, or `NONE`; of arrays of numpy or of torch."""
    there_row, there_column = row + spacing * offsets[0], column + spacing * offsets[1]
    exists = (there_row >= 0) & (there_row < rows) & (there_column >= 0) & (there_column < columns)
    return (there_row * columns + there_column - NONE) * exists + NONE


def _classes(row: Any, column: Any, spacing: int) -> Any:
    """`Neighbours.classes`, of arrays of numpy or of torch."""
    found = 0 * (row + column) + STAYS
    for number, (down, right) in enumerate(CLASSES):
        of_class = (row % (2 * spacing) == down * spacing) & (column % (2 * spacing) == right * spacing)
        found = found + (number - STAYS) * of_class
    return found


def _neighbours(looks: torch.Tensor, index: torch.Tensor, classes: torch.Tensor, spacing: int) -> Neighbours:
    none, index = index == NONE, index.clamp(min=0)
    distance = _distances(looks, index).masked_fill(none, torch.inf)
    return Neighbours(index, distance, classes, 1.0 if spacing == 1 else FAR)


def _distances(looks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(batch, patches, 8): how much each patch differs from its neighbours, the same seen from either."""
    half = len(OFFSETS) // 2
    there = gather_patches(looks, index[..., :half].flatten(1)).unflatten(1, (-1, half))
    ahead = torch.linalg.vector_norm(looks.unsqueeze(2) - there, dim=-1)
    behind = ahead.gather(1, index[..., half:].expand_as(ahead))
    return torch.cat((ahead, behind), dim=-1)


def at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The (batch, patches) values of the patches that `index`, (batch or 1, ...), names: (batch, ...)."""
    index = index.expand(values.shape[0], *index.shape[1:])
    return values.gather(1, index.flatten(1)).view(index.shape)


def cover(neighbours: list[Neighbours], tolerance: float | torch.Tensor) -> torch.Tensor:
    """Which patches stay, if one goes where a neighbour that stays differs from it by less than a tolerance.

    At each spacing the three classes of `CLASSES` are looked at in turn, all patches of one at once. The patches of
    every fourth row and column always stay.

    Args:
        neighbours: as `find_neighbours` gives them.
        tolerance: a number, or (batch, 1, 1).

    Returns:
        (batch, patches), bool.
    """
    stays = torch.ones_like(neighbours[0].distance[..., 0], dtype=torch.bool)
    for near in neighbours:
        alike = near.distance < near.within * tolerance
        for number in range(len(CLASSES)):
            stays = stays & ~((near.classes == number) & (alike & at(stays, near.index)).any(dim=-1))
    return stays


def cover_by(neighbours: list[Neighbours], keep: int | torch.Tensor) -> torch.Tensor:
    """Scores by which the patches that stay are the highest: as `cover`, by the tolerance that leaves so many.

    Where no tolerance leaves just so many, of the patches that would go those stay that differ most.

    Args:
        neighbours: as for `cover`.
        keep: patches of each image, or (batch,).

    Returns:
        (batch, patches), float32.
    """
    known = torch.cat([near.distance.masked_fill(near.distance.isinf(), 0) / near.within for near in neighbours], dim=2)
    high = known.amax(dim=(1, 2), keepdim=True) * 1.001 + 1e-6
    low = torch.zeros_like(high)
    wanted = keep.view(-1, 1, 1) if isinstance(keep, torch.Tensor) else keep
    for _ in range(STEPS):
        middle = (low + high) / 2
        fewer = cover(neighbours, middle).sum(dim=1).view(-1, 1, 1) <= wanted
        low, high = torch.where(fewer, low, middle), torch.where(fewer, middle, high)
    stays = cover(neighbours, high)
    near, far = neighbours
    even = near.classes == STAYS
    beside, _ = _nearest(near, stays | even)
    apart, _ = _nearest(far, stays)
    return torch.where(stays, torch.inf, torch.where(even, apart / far.within, beside / near.within))


def leaders(neighbours: list[Neighbours], stays: torch.Tensor) -> torch.Tensor:
    """Which patch stands for each: itself if it stays, else the one that stands for the neighbour that differs least.

    The neighbour is one that stays or is of even row and column, and for a patch that is so itself one that stays, two
    patches away. Of neighbours that differ equally the first by `OFFSETS` is taken.

    Args:
        neighbours: as for `cover`.
        stays: (batch, patches), bool: those of every fourth row and column among them.

    Returns:
        (batch, patches), int64.
    """
    near, far = neighbours
    own = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
    even = near.classes == STAYS
    first = stays | even
    beside = torch.where(first, own, _nearest(near, first)[1])
    apart = torch.where(stays, own, _nearest(far, stays)[1])
    return at(apart, beside)


def _nearest(neighbours: Neighbours, stays: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each patch differs from the neighbour that stays and differs least, and which that is."""
    near = neighbours.distance.masked_fill(~at(stays, neighbours.index), torch.inf)
    least = near.amin(dim=-1, keepdim=True)
    which = first_of((near == least).float()).unsqueeze(-1)
    return least.squeeze(-1), neighbours.index.expand(near.shape).gather(-1, which).squeeze(-1)
