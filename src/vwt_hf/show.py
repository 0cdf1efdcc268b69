"""`vwt-hf show`: what a tokenizer does to photographs, drawn over them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .config import VWTConfig
from .demo import ROWS, find_images
from .image_source import read_image
from .processors import load_processor, patch_size_of, processor_statistics, whole_images
from .visualize import kept_mask, kept_patches_figure, shared_words, word_captions, words_figure, write_png
from .vocabulary import VisualVocabulary

SIDE = 224
"""Pixels of a photograph's sides where no model says otherwise, or the multiple of the patch size that is nearest."""
PATCH_SIZE = 16
"""Where neither a vocabulary nor a model says."""


def show(
    images: Sequence[str],
    *,
    vocabulary: str | None = None,
    revision: str | None = None,
    threshold: float | None = None,
    keep_ratio: float | None = None,
    criterion: str | None = None,
    model: str | None = None,
    output: str = "vwt-show.png",
) -> list[str]:
    """Writes a picture of which patches share a word, or of which ones are kept, and prints their numbers.

    Args:
        images: photographs, or folders of them; the first `ROWS` are drawn.
        vocabulary: Hub id or folder: draws inter-image words.
        revision, threshold: see `VWTConfig`; with `vocabulary` only.
        keep_ratio: draws which patches are kept, instead.
        criterion: see `VWTConfig`; with `keep_ratio` only.
        model: Hub id or folder of the model whose image processor makes the pixel values. By default photographs are
            cropped to a square of about `SIDE` pixels, normalised by the statistics that the vocabulary records.
        output: where the PNG is written.

    Returns:
        A line for each photograph.

    Raises:
        ImportError: matplotlib or Pillow is not installed.
        ValueError: a setting, the vocabulary, the model or the images cannot be used.
        OSError: one of them cannot be read, or the picture cannot be written.
    """
    fields = {"vocabulary": vocabulary, "revision": revision, "threshold": threshold}
    fields |= {"keep_ratio": keep_ratio, "criterion": criterion}
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    setting = VWTConfig(method="intra" if vocabulary is None else "inter", **given)
    paths = find_images(images)
    drawn = paths[:ROWS]
    names = [path.stem.replace("_", " ") for path in drawn]
    words = None if vocabulary is None else VisualVocabulary.from_pretrained(vocabulary, revision=revision)

    if model is None:
        patch_size = words.patch_size if words else PATCH_SIZE
        mean, std = default_statistics(words)
        pixel_values = default_pixel_values(drawn, patch_size, mean, std)
    else:
        processor = load_processor(model)
        patch_size = required_patch_size(model)
        mean, std = processor_statistics(processor, channels=3)
        made = processor(images=[read_image(path) for path in drawn], return_tensors="pt")
        pixel_values = whole_images(made).float()
    size = (patch_size, patch_size)

    if words is None:
        mask = kept_mask(pixel_values, size, setting)
        captions = [f"{int(kept.sum())} of {kept.numel()} patches" for kept in mask]
        below = [[caption] for caption in captions]
        figure = kept_patches_figure(
            pixel_values, size, [setting], names=names, captions=below, image_mean=mean, image_std=std
        )
    else:
        words.require(size, channels=pixel_values.shape[1])
        seen = words.normalized(mean, std)
        captions = word_captions(*shared_words(pixel_values, size, seen, setting.threshold))
        figure = words_figure(pixel_values, size, seen, setting.threshold, names=names, image_mean=mean, image_std=std)
    picture = Path(output)
    picture.parent.mkdir(parents=True, exist_ok=True)
    # A palette would make neighbours of the words' many colours one.
    write_png(figure, picture, small=words is None)

    lines = [f"{path}: {caption}" for path, caption in zip(drawn, captions, strict=True)]
    print("\n".join(lines))
    more = f" (the first {ROWS} of {len(paths)} photographs)" if len(paths) > ROWS else ""
    print(f"picture: {picture}{more}")
    return lines


def default_statistics(words: VisualVocabulary | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel values where no model has any: those that the vocabulary records."""
    if words is not None and words.info.image_mean is not None and words.info.image_std is not None:
        return words.info.image_mean, words.info.image_std
    # ViT's own. Without any, all patches point to the same side of the origin, and cosine distances tell little.
    return (0.5,) * 3, (0.5,) * 3


def default_pixel_values(
    paths: Sequence[Path], patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """The middle square of each photograph, (photographs, 3, side, side), normalised.

    Raises:
        OSError: a file is no image that Pillow reads.
    """
    import numpy as np
    from PIL import Image, ImageOps

    side = max(1, round(SIDE / patch_size)) * patch_size
    squares = [ImageOps.fit(read_image(path), (side, side), Image.Resampling.BICUBIC) for path in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def required_patch_size(model: str) -> int:
    """The patch size of a Hub id's or folder's model.

    Raises:
        ValueError: its config does not say.
    """
    patch_size = patch_size_of(model)
    if patch_size is None:
        raise ValueError(f"{model} has no model config that says its patch size; name a vision transformer.")
    return patch_size
