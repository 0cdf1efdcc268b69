"""A picture of which patches a model keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .compress import choose_patches
from .config import VWTConfig
from .words import patch_grid, patchify

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL = 2.0  # inches


def kept_patches_figure(
    pixel_values: torch.Tensor,
    patch_size: tuple[int, int],
    settings: Sequence[VWTConfig],
    *,
    names: Sequence[str],
    captions: Sequence[Sequence[str]],
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Figure:
    """Draws each photograph as the model sees it, and beside it, for each setting, with the dropped patches faded.

    Args:
        pixel_values: (photographs, channels, height, width), as the model gets them.
        patch_size: height and width of a patch, in pixels.
        settings: one for each column after the first, which shows the whole photograph.
        names: one for each photograph.
        captions: [photograph][setting], written below each picture.
        image_mean, image_std: the image processor's, per channel; `None` for pixel values in [0, 1].

    Returns:
        A `matplotlib.figure.Figure`, independent of `pyplot`; `write_png` or its `savefig` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an image is smaller than a patch, or a setting keeps no patch.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'matplotlib, which draws the picture, is not installed; pip install "vwt-hf[demo]".'
        ) from error

    photographs = photographs_of(pixel_values, image_mean, image_std)
    columns = [(photographs, "what the model sees", [""] * len(photographs))]
    for index, setting in enumerate(settings):
        faded = fade(photographs, kept_mask(pixel_values, patch_size, setting), patch_size)
        columns.append((faded, f"keep_ratio={setting.keep_ratio:g}", [row[index] for row in captions]))

    size = (PANEL * len(columns) + 0.3, (PANEL * photographs.shape[1] / photographs.shape[2] + 0.2) * len(names) + 0.3)
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for x, (pictures, heading, below) in enumerate(columns):
        axes[0, x].set_title(heading, fontsize=10, fontweight="bold" if x else "normal")
        for y, picture in enumerate(pictures):
            axes[y, x].imshow(picture.numpy())
            axes[y, x].set_xlabel(below[y], fontsize=8.5, labelpad=3)
            axes[y, x].set(xticks=[], yticks=[])
            axes[y, x].spines[:].set_visible(False)
    for y, name in enumerate(names):
        axes[y, 0].set_ylabel(name, fontsize=10)
    return figure


def write_png(figure: Figure, path: Path) -> None:
    """Writes `figure` as a PNG of 256 dithered colours, a third of the size of a full one: small enough for a README.

    Raises:
        OSError: `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = canvas.buffer_rgba()
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), pixels, "raw", "RGBA", 0, 1).convert("RGB")
    # The octree keeps rare hues that median cut, Pillow's default, merges away; Pillow dithers to a given palette only.
    palette = picture.quantize(256, Image.Quantize.FASTOCTREE)
    picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


def kept_mask(pixel_values: torch.Tensor, patch_size: tuple[int, int], setting: VWTConfig) -> torch.Tensor:
    """Which patches stay, (batch, rows, columns), bool: the choice of the compressed model itself."""
    rows, columns = patch_grid(pixel_values, patch_size)
    keep = setting.patches_kept(rows * columns)
    kept = choose_patches(patchify(pixel_values, patch_size), (rows, columns), keep, setting)
    mask = torch.zeros(len(pixel_values), rows * columns, dtype=torch.bool, device=pixel_values.device)
    mask.scatter_(1, kept.expand(len(pixel_values), -1), True)
    return mask.unflatten(1, (rows, columns)).cpu()


def photographs_of(
    pixel_values: torch.Tensor, image_mean: Sequence[float] | None, image_std: Sequence[float] | None
) -> torch.Tensor:
    """Pixel values as colours in [0, 1], (batch, height, width, channels), float32 on the CPU."""
    images = pixel_values.detach().float().cpu().permute(0, 2, 3, 1)
    if image_mean is not None and image_std is not None:
        images = images * torch.tensor(image_std) + torch.tensor(image_mean)
    return images.clamp(0, 1)


def fade(photographs: torch.Tensor, mask: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """`photographs` with every patch outside `mask` pale grey; so are the pixels beyond the last whole patch.

    Args:
        photographs: (batch, height, width, channels) in [0, 1].
        mask: (batch, rows, columns), bool.

    Returns:
        Of the shape of `photographs`.
    """
    pixels = torch.zeros(photographs.shape[:3], dtype=torch.bool)
    whole = mask.repeat_interleave(patch_size[0], 1).repeat_interleave(patch_size[1], 2)
    pixels[:, : whole.shape[1], : whole.shape[2]] = whole
    # Faint enough that what stays stands out, and strong enough that one sees what was dropped.
    pale = 0.64 + 0.2 * photographs.mean(dim=-1, keepdim=True)
    return torch.where(pixels.unsqueeze(-1), photographs, pale)
