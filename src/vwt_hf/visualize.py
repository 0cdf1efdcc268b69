"""Pictures of what a setting does to photographs: which patches stay, and which share a word."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .config import VWTConfig
from .data_loading import token_lengths
from .patches import Patches
from .pictures import by_pixel, photographs_of, seen_pictures
from .plans import Grouped, Kept
from .printable import printable
from .whole_saves import write_file
from .words import index_words, nearest_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .calibrate import Level

PANEL = 2.0  # inches
WORD_PANEL = 2.5
"""Wider, as there are many small patches in many colours."""
TINT, EDGE = 0.55, 1.0
"""Share of a word's colour in its patches, and on their outline."""


def kept_patches_figure(
    pixel_values: torch.Tensor,
    patch_size: tuple[int, int],
    settings: Mapping[str, VWTConfig | None],
    *,
    names: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Figure:
    """Draws each photograph as the model sees it, and beside it, for each setting, what enters the first layer.

    Dropped patches are faded, or show the patch that stands for them, or their block at half the size. The number of
    tokens is written below.

    Args:
        pixel_values: (photographs, channels, height, width), as the model gets them.
        patch_size: height and width of a patch, in pixels.
        settings: one for each further column, by its heading, as `setting_of` a compressed model gives it; `None` for a
            plain model.
        names: one for each photograph.
        captions: [photograph][setting], written after the number of tokens.
        image_mean, image_std: the image processor's, per channel; `None` for pixel values in [0, 1].

    Returns:
        A `matplotlib.figure.Figure`, independent of `pyplot`; `write_png` or its `savefig` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an image is smaller than a patch, or a setting keeps no patch.
    """
    photographs = photographs_of(pixel_values, image_mean, image_std)
    patches = Patches.of_images(pixel_values, patch_size)
    columns = [Column("what the model sees", photographs, [""] * len(photographs))]
    for index, (heading, setting) in enumerate(settings.items()):
        plan = setting.plan(patches) if setting is not None and setting.shortens else None
        seen, counts = photographs, token_counts(patches, plan)
        if setting is not None and plan is not None:
            left = setting.seen(patches, plan)
            seen = torch.stack(seen_pictures(patches, plan, left, image_mean, image_std))
        more = [""] * len(counts) if captions is None else [f", {row[index]}" for row in captions]
        below = [f"{count} of {patches.count} patches{caption}" for count, caption in zip(counts, more, strict=True)]
        columns.append(Column(heading, seen, below))
    return draw(columns, names, PANEL)


def token_counts(patches: Patches, plan: Kept | Grouped | None) -> list[int]:
    """How many tokens the patches of each image become by a plan; with `None` all stay."""
    batch = len(patches.pixel_values)
    return [patches.count] * batch if plan is None else token_lengths(plan.patch_words(batch, patches.count))


def words_figure(
    patches: Patches,
    plan: Grouped,
    *,
    names: Sequence[str],
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> Figure:
    """Draws each photograph as the model sees it, its patches coloured by the word that they share, and what is left.

    A word has the same colour in every photograph; patches that share no word keep their own. What is left is each
    patch as its token shows it.

    Args:
        patches, plan: of the photographs as the model gets them, as `group_by_words` gives them.
        names: one for each photograph.
        image_mean, image_std: the image processor's, per channel; `None` for pixel values in [0, 1].

    Returns:
        A `matplotlib.figure.Figure`, as `kept_patches_figure` does.

    Raises:
        ImportError: matplotlib is not installed.
    """
    photographs = photographs_of(patches.pixel_values, image_mean, image_std)
    tinted = tint(photographs, shared_words(patches, plan), patches.patch_size)
    seen = torch.stack(seen_pictures(patches, plan, patches.seen(plan), image_mean, image_std))
    columns = [
        Column("what the model sees", photographs, [""] * len(photographs)),
        Column("same word, same colour", tinted, word_captions(patches, plan)),
        Column("what its tokens show", seen, [""] * len(photographs)),
    ]
    return draw(columns, names, WORD_PANEL)


def word_captions(patches: Patches, plan: Grouped) -> list[str]:
    """For each photograph: "256 patches → 145 tokens, 37 words"."""
    captions = []
    for image, count in zip(shared_words(patches, plan), token_counts(patches, plan), strict=True):
        words = len(image[image >= 0].unique())
        captions.append(f"{image.numel()} patches → {count} tokens, {words} word{'' if words == 1 else 's'}")
    return captions


class Column(NamedTuple):
    """A column of a figure: all photographs, drawn in one way."""

    heading: str
    pictures: torch.Tensor
    """(photographs, height, width, channels) in [0, 1]."""
    below: Sequence[str]
    """Written below each picture."""


def draw(columns: Sequence[Column], names: Sequence[str], panel: float) -> Figure:
    """A figure with a row for each photograph. Pictures are `panel` inches wide; the first heading is not bold."""
    figure_class = require_matplotlib()
    height, width = columns[0].pictures.shape[1:3]
    size = (panel * len(columns) + 0.3, (panel * height / width + 0.2) * len(names) + 0.3)
    figure = figure_class(figsize=size, dpi=110, layout="constrained", facecolor="white")
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for x, column in enumerate(columns):
        axes[0, x].set_title(column.heading, fontsize=10, fontweight="bold" if x else "normal")
        for y, picture in enumerate(column.pictures):
            # Rounded here: matplotlib truncates, and normalising and back leaves colours a little below what they were.
            axes[y, x].imshow((picture * 255).round().to(torch.uint8).numpy())
            axes[y, x].set_xlabel(column.below[y], fontsize=8.5, labelpad=3, parse_math=False)
            axes[y, x].set(xticks=[], yticks=[])
            axes[y, x].spines[:].set_visible(False)
    for y, name in enumerate(names):
        axes[y, 0].set_ylabel(printable(name), fontsize=10, parse_math=False)
    return figure


def front_figure(levels: Sequence[Level], measure: str, title: str) -> Figure:
    """Draws the agreement of each setting with the plain model, and its 95 % interval, against the tokens it leaves.

    Args:
        levels: from light to heavy.
        measure: the name of their values, `"agreement"` or `"cosine"`.
    """
    figure = require_matplotlib()(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    tokens = [level.tokens for level in levels]
    low, high = zip(*(level.interval for level in levels), strict=True)
    axes.vlines(tokens, low, high, colors="C0", alpha=0.5)
    axes.plot(tokens, [level.value for level in levels], marker="o", color="C0")
    for level in levels:
        text = f" {level.speed:.2f} × as fast"
        axes.annotate(text, (level.tokens, level.value), fontsize="x-small", verticalalignment="bottom")
    axes.set_xlabel(f"tokens of an image, of {levels[0].of_tokens:g}")
    axes.set_ylabel(f"{measure} with the plain model, 95 % interval")
    axes.set_title(printable(title), fontsize="medium", parse_math=False)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    return figure


def require_matplotlib() -> type[Figure]:
    """The class of matplotlib's figures that need no display; raises `ImportError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'matplotlib, which draws the picture, is not installed; pip install "vwt-hf[demo]".'
        ) from error
    return Figure


def write_png(figure: Figure, path: Path, *, small: bool = True) -> None:
    """Writes `figure` as a PNG, whole or not at all; makes its folder. `small`: in 256 colours, a third of the size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if small:
        # The octree keeps rare hues that median cut, the default, merges away; Pillow dithers to a given palette only.
        palette = picture.quantize(256, Image.Quantize.FASTOCTREE)
        picture = picture.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    write_file(path, file.getvalue())


def group_by_words(
    pixel_values: torch.Tensor, patch_size: tuple[int, int], words: torch.Tensor, threshold: float
) -> tuple[Patches, Grouped]:
    """The patches of whole images, and the plan by which patches that share a word become one token, as in a model.

    Args:
        pixel_values: (batch, channels, height, width), as a model gets them.
        patch_size: height and width of a patch, in pixels.
        words: (size, channels · patch height · patch width), normalised as `pixel_values` are.
        threshold: largest cosine distance at which a patch takes a word.

    Raises:
        ValueError: an image is smaller than a patch.
    """
    patches = Patches.of_images(pixel_values, patch_size)
    nearest = nearest_words(patches.pixels_as_words(), index_words(words), threshold)
    return patches, patches.group(nearest, packed=False, exponent=0)


def shared_words(patches: Patches, plan: Grouped) -> torch.Tensor:
    """The word of each patch that shares one with another patch of its image, of what `group_by_words` gives.

    Returns:
        (batch, rows, columns) int64 on the CPU; −1 for a patch that is near no word, or the only one near its word.
    """
    assert plan.words is not None and patches.grid is not None
    alone = plan.layout.sizes.flatten()[plan.layout.rows] < 2
    return plan.words.masked_fill(alone, -1).unflatten(1, patches.grid).cpu()


def word_color(word: int) -> tuple[float, float, float]:
    """A vivid colour for a word's number, the same in every picture, in [0, 1].

    Numbers that follow one another have the most different colours. As words are numbered from the most frequent, those
    that fill pictures are the easiest to tell apart.
    """
    # Steps of the golden ratio come late to a hue that is near an earlier one. Of three words one is darker, one paler.
    hue = (0.58 + word * 0.618034) % 1
    return colorsys.hsv_to_rgb(hue, *((0.95, 0.95), (0.6, 1.0), (1.0, 0.6))[word % 3])


def tint(photographs: torch.Tensor, shared: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """`photographs` with the patches of one word in its colour, outlined where another word or none begins.

    Args:
        photographs: (batch, height, width, channels) in [0, 1].
        shared: (batch, rows, columns), the word of each patch; −1 leaves it as it is.
    """
    pixels = by_pixel(shared, photographs, patch_size, beyond=-1)
    edge = torch.zeros_like(pixels, dtype=torch.bool)
    across, down = pixels[:, :, 1:] != pixels[:, :, :-1], pixels[:, 1:] != pixels[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    strength = torch.where(edge, EDGE, TINT).unsqueeze(-1)
    words, place = pixels.unique(return_inverse=True)
    palette = [word_color(word) for word in words.tolist()]
    colors = torch.tensor(palette, dtype=torch.float32, device=words.device)[place]
    # Over grey, as a green word over a red sign would look brown.
    grey = photographs.mean(dim=-1, keepdim=True)
    colored = grey + strength * (colors - grey)
    return torch.where((pixels >= 0).unsqueeze(-1), colored, photographs)
