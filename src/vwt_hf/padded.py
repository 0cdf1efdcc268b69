"""Images of many sizes in one batch, as SigLIP 2 takes them: patches in rows and columns of each image's own, followed
by padding to one number of patches."""

from __future__ import annotations

import torch

from .config import VWTConfig
from .words import best, dithered, random_order, variance_scores


def padded_places(spatial_shapes: torch.Tensor, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where patches lie, and which are real.

    Args:
        spatial_shapes: (batch, 2), rows and columns of patches of each image.
        patches: of each image, padding included.

    Returns:
        (batch, patches, 2) float32, row and column counted in patches, and (batch, patches) bool: False for padding.
    """
    rows, columns = spatial_shapes.unbind(1)
    index = torch.arange(patches, device=spatial_shapes.device)
    columns = columns.unsqueeze(1)
    places = torch.stack((index // columns, index % columns), dim=-1)
    return places.float(), index < rows.unsqueeze(1) * columns


def choose_padded(
    patches: torch.Tensor, places: torch.Tensor, real: torch.Tensor, setting: VWTConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The patches that stay, of which images of different sizes have different numbers.

    Args:
        patches: (batch, patches, channels · patch height · patch width).
        places, real: as `padded_places` gives them.
        setting: says how many, of an image's real patches, and by which criterion. At least one stays.

    Returns:
        Indices of patches, (batch, keep), ascending, and which of them stay, (batch, keep) bool: `keep` is as many as
        stay of an image without padding.
    """
    length = patches.shape[1]
    if setting.criterion == "variance":
        scores = variance_scores(patches)
    elif setting.criterion == "random":
        scores = -random_order(length, setting.seed, patches.device).argsort().float()
    else:
        row, column = places.long().unbind(-1)
        scores = -dithered(row, column, length).float()
    counts = real.sum(dim=1)
    if setting.num_patches is not None:
        counts = counts.clamp(max=setting.num_patches)
    else:  # as VWTConfig.patches_kept
        counts = (counts.double() * setting.keep_ratio + 1e-9).long().clamp(min=1)
    keep = setting.patches_kept(length)
    kept, order = best(scores.expand_as(real).masked_fill(~real, -torch.inf), keep).sort(dim=1)
    return kept, order < counts.unsqueeze(1)
