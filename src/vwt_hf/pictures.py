"""Pictures of what a model still sees of images. Tensors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .patches import Patches
from .plans import DROPPED, Grouped, Kept


def seen_pictures(
    patches: Patches,
    plan: Kept | Grouped,
    seen: torch.Tensor,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
) -> list[torch.Tensor]:
    """Pictures of what is left of each image.

    Patches without a token are pale grey, and so are pixels beyond the last whole patch.

    Args:
        patches: of a batch, whole images or padded patches.
        plan: what becomes of the patches.
        seen: (batch, patches, channels · patch height · patch width), what each patch shows (`VWTConfig.seen`).
        image_mean, image_std: the image processor's, per channel; `None` for pixel values in [0, 1].

    Returns:
        For each image (height, width, channels) in [0, 1], float32 on the CPU.
    """
    height, width = patches.patch_size
    words = plan.patch_words(len(patches.pixel_values), patches.count)
    pictures = []
    for image, row in enumerate(seen):
        grid = patches.grid
        if grid is None:
            assert patches.real is not None  # padded patches say which are real
            high, wide = (int(end) + 1 for end in patches.places[image][patches.real[image]].amax(dim=0))
            whole = row.new_zeros(1, patches.channels, high * height, wide * width)
            grid = (high, wide)
        else:
            whole = patches.pixel_values[image : image + 1].clone()
        tiles = row[: grid[0] * grid[1]].unflatten(-1, (patches.channels, height, width)).unflatten(0, grid)
        whole[0, :, : grid[0] * height, : grid[1] * width] = tiles.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        mask = (words[image, : grid[0] * grid[1]] != DROPPED).view(1, *grid).cpu()
        pictures.append(fade(photographs_of(whole, image_mean, image_std), mask, patches.patch_size)[0])
    return pictures


def photographs_of(
    pixel_values: torch.Tensor, image_mean: Sequence[float] | None, image_std: Sequence[float] | None
) -> torch.Tensor:
    """Pixel values as colours in [0, 1], (batch, height, width, channels), float32 on the CPU."""
    images = pixel_values.detach().float().cpu().permute(0, 2, 3, 1)
    if image_mean is not None and image_std is not None:
        std, mean = (torch.tensor(own, dtype=torch.float32, device="cpu") for own in (image_std, image_mean))
        images = images * std + mean
    return images.clamp(0, 1)


def fade(photographs: torch.Tensor, mask: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """`photographs` with all patches outside `mask`, and pixels beyond the last whole patch, in pale grey.

    Args:
        photographs: (batch, height, width, channels) in [0, 1].
        mask: (batch, rows, columns), bool.
    """
    pixels = by_pixel(mask, photographs, patch_size, beyond=False)
    # Faint enough that what stays stands out, and strong enough that one sees what was dropped.
    pale = 0.64 + 0.2 * photographs.mean(dim=-1, keepdim=True)
    return torch.where(pixels.unsqueeze(-1), photographs, pale)


def by_pixel(
    of_patches: torch.Tensor, photographs: torch.Tensor, patch_size: tuple[int, int], beyond: float
) -> torch.Tensor:
    """The value of each pixel's patch, (batch, height, width), from those of patches, (batch, rows, columns).

    Pixels beyond the last whole patch get the value `beyond`.
    """
    pixels = of_patches.new_full(photographs.shape[:3], beyond)
    whole = of_patches.repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)
    pixels[:, : whole.shape[1], : whole.shape[2]] = whole
    return pixels
