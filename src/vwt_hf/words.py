"""Which patches stay: functions on tensors, with no model in sight.

Patches are numbered in row-major order, as a ViT's own patch embedding numbers them, and flattened as (channel, row,
column), as its projection's weight is.
"""

from __future__ import annotations

import functools

import torch


def patch_grid(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole patches in `pixel_values` (batch, channels, height, width).

    Raises:
        ValueError: the image is smaller than one patch.
    """
    height, width = pixel_values.shape[-2:]
    rows, columns = height // patch_size[0], width // patch_size[1]
    if rows < 1 or columns < 1:
        raise ValueError(
            f"pixel_values are {height}×{width}, smaller than one {patch_size[0]}×{patch_size[1]} patch; "
            "resize the images to the model's input size."
        )
    return rows, columns


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Cuts images into their patches.

    Args:
        pixel_values: (batch, channels, height, width); rows and columns beyond the last whole patch are left out, as a
            strided convolution does.
        patch_size: height and width of a patch, in pixels.

    Returns:
        (batch, patches, channels · patch height · patch width).
    """
    rows, columns = patch_grid(pixel_values, patch_size)
    height, width = patch_size
    whole = pixel_values[..., : rows * height, : columns * width]
    grid = whole.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def variance_scores(patches: torch.Tensor) -> torch.Tensor:
    """Unbiased variance of each patch's values, in float32 (paper, intra-image approach).

    Args:
        patches: (batch, patches, channels · patch height · patch width).

    Returns:
        (batch, patches).
    """
    values = patches.float()
    # Two passes over contiguous rows: an order of magnitude faster on a CPU than torch.var, and as exact.
    centred = values - values.mean(dim=-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1).square() / (values.shape[-1] - 1)


def highest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest scores in ascending order; of equal scores the earlier patch wins.

    Args:
        scores: (batch, patches).

    Returns:
        (batch, keep), int64.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, :keep].sort(dim=1).values


@functools.lru_cache(maxsize=64)
def random_patches(patches: int, keep: int, seed: int, device: torch.device) -> torch.Tensor:
    """A seeded random subset of `keep` patches, ascending, (1, keep): the same on every device and for every image."""
    # Cached: made outside inference mode, so that a later training step may save it for its backward pass.
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(patches, generator=generator)[:keep].sort().values
        return chosen.unsqueeze(0).to(device)


@functools.lru_cache(maxsize=64)
def grid_patches(rows: int, columns: int, keep: int, device: torch.device) -> torch.Tensor:
    """An even cover of a rows × columns grid by `keep` patches, ascending, (1, keep).

    The order is that of ordered dithering (Bayer 1973): half of the patches is a checkerboard, a quarter is every other
    row and column, and a larger cover contains the smaller ones.
    """
    with torch.inference_mode(False):
        dither = torch.zeros(1, 1, dtype=torch.int64)
        while dither.shape[0] < max(rows, columns):
            dither = torch.cat(
                (torch.cat((4 * dither, 4 * dither + 2), 1), torch.cat((4 * dither + 3, 4 * dither + 1), 1))
            )
        chosen = dither[:rows, :columns].flatten().argsort()[:keep].sort().values
        return chosen.unsqueeze(0).to(device)


def gather_patches(patches: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The kept patches alone, or the rows of any table that has one for each patch.

    Args:
        patches: (batch or 1, patches, values).
        kept: (batch or 1, keep) patch indices.

    Returns:
        (batch, keep, values).
    """
    if kept.shape[0] == 1:
        return patches[:, kept[0]]
    if patches.shape[0] == 1:
        return patches[0, kept]
    return patches[torch.arange(len(patches), device=kept.device).unsqueeze(1), kept]


def patch_strip(patches: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Lays patches side by side as one image, one patch high, that a patch projection turns into their tokens.

    Args:
        patches: (batch, patches, channels · patch height · patch width).
        patch_size: height and width of a patch, in pixels.

    Returns:
        (batch, channels, patch height, patches · patch width).
    """
    return patches.unflatten(-1, (-1, *patch_size)).permute(0, 2, 3, 1, 4).flatten(-2)
