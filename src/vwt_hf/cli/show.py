"""`vwt-hf show`: what a tokenizer does to photographs, drawn over them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import CRITERIA, ModelFacts, VWTConfig
from ..printable import printable, shown
from ..terminal import add_picture, options, require_alone, vwt_option
from ..whole_saves import require_writable
from .demo import ROWS
from .sources import photographs_beside

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from ..vocabulary import VisualVocabulary

HELP = "draw what the tokenizer does to photographs"
DESCRIPTION = """\
Draws each photograph as a model sees it, and beside it what is left of its patches before the model's first layer.

With --vwt: by any setting. Dropped patches are faded; others show the patch that stands for them, their word's mean, or
their block at half the size. What --vwt true joins later, within the model, is not drawn: `vwt-hf demo` counts it.
With --keep-ratio: by the paper's rule, which drops the other patches.
With --vocabulary: patches that share a word, and so become one token, are tinted in the word's colour, the same in all
photographs. Patches that stay alone are untouched. The last column shows each patch as its token does.

Loads no weights. Without --model, photographs are cropped to a square of 224 pixels (or the nearest multiple of the
patch size) and normalised as --vocabulary records; without a vocabulary, by 0.5 with patches of 16×16 pixels."""
EXAMPLES = """\
examples:
  vwt-hf show cat.jpg dog.jpg --vwt true --model facebook/dinov2-small
  vwt-hf show cat.jpg --vwt '{"method": "local", "keep_ratio": 0.5}'
  vwt-hf show cat.jpg dog.jpg --vocabulary vwt-words
  vwt-hf show holiday/ --vocabulary me/words-p14 --threshold 0.05 --model facebook/dinov2-small
  vwt-hf show cat.jpg --keep-ratio 0.5 --criterion grid --output kept.png"""
SIDE = 224
"""Pixels of a photograph's sides if no model says otherwise; made the nearest multiple of the patch size."""
PATCH_SIZE = 16
"""Of the patches, if neither a vocabulary nor a model says."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="photographs, or folders of them")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vwt", type=vwt_option, metavar="JSON", help="a setting: draw what is left by it")
    what.add_argument("--vocabulary", metavar="WORDS", help="Hub id or folder of a vocabulary: draw who shares a word")
    what.add_argument(
        "--keep-ratio", type=float, metavar="RATIO", help="share of the patches that stay, in (0, 1]: draw which"
    )
    parser.add_argument("--revision", help="of the vocabulary: branch, tag or commit on the Hub (default: main)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="largest cosine distance at which a patch takes a word, in [0, 2] (default: 0.1)",
    )
    parser.add_argument("--criterion", choices=CRITERIA, help="which patches stay (default: variance)")
    parser.add_argument(
        "--model", help="Hub id or folder of a model: use its image processor, its patch size, mean and deviation"
    )
    add_picture(parser, "picture", "vwt-show.png")


def work(args: argparse.Namespace) -> None:
    require_alone()
    setting = asked_setting(args)
    require_writable(args.output)

    from ..visualize import require_matplotlib, write_png
    from ..vocabulary import VisualVocabulary

    require_matplotlib()
    paths = photographs_beside(args.output, args.images)
    drawn = paths[:ROWS]
    words = None
    if args.vocabulary is not None:
        words = VisualVocabulary.from_pretrained(args.vocabulary, revision=args.revision)
    seen = load_seen(drawn, args.model, words)
    if words is None:
        heading = f"keep_ratio={args.keep_ratio:g}" if args.vwt is None else f"method={setting.method}"
        figure, captions = kept(seen, setting, heading, args.model)
    else:
        figure, captions = shared(seen, words, setting.threshold)
    # A palette would make neighbours of the words' many colours one.
    write_png(figure, Path(args.output), small=words is None)
    for path, caption in zip(drawn, captions, strict=True):
        print(f"{printable(path)}: {caption}")
    more = f" (the first {ROWS} of {len(paths)} photographs)" if len(paths) > ROWS else ""
    print(f"picture: {printable(args.output)}{more}")


def asked_setting(args: argparse.Namespace) -> VWTConfig:
    """The setting that the options name, if it can be drawn."""
    fields = options(args, "vocabulary", "revision", "threshold", "keep_ratio", "criterion")
    given = {name: value for name, value in fields.items() if value is not None}
    if args.vwt is None:
        return VWTConfig(method="intra" if args.vocabulary is None else "inter", **given)
    setting = VWTConfig.parse(args.vwt)
    if given:
        raise ValueError(
            f"--{next(iter(given)).replace('_', '-')} is given beside --vwt; expected all fields within --vwt."
        )
    if setting is None or not setting.searches:
        raise ValueError(f"--vwt is {shown(args.vwt)}, by which nothing is left out; expected a setting that shortens.")
    return setting


class Seen(NamedTuple):
    """Photographs as a model sees them."""

    names: list[str]
    pixel_values: torch.Tensor
    """(photographs, channels, height, width)."""
    patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_seen(paths: Sequence[Path], model: str | None, words: VisualVocabulary | None) -> Seen:
    """Photographs as `model` sees them, or without one as the vocabulary records, or else as ViT does."""
    from ..processed_images import pixel_batches
    from ..processors import load_processor, patch_size_of, processor_statistics, whole_images

    names = [path.stem.replace("_", " ") for path in paths]
    if model is None:
        patch_size = words.patch_size if words else PATCH_SIZE
        mean, std = default_statistics(words)
        return Seen(names, default_pixel_values(paths, patch_size, mean, std), patch_size, mean, std)
    processor = load_processor(model)
    patch_size = patch_size_of(model)
    mean, std = processor_statistics(processor, channels=3)
    (made,) = pixel_batches(paths, processor, len(paths))
    return Seen(names, whole_images(made).float(), patch_size, mean, std)


def kept(seen: Seen, setting: VWTConfig, heading: str, model: str | None) -> tuple[Figure, list[str]]:
    """A picture of what a setting leaves, and a line for each photograph."""
    from ..patches import Patches
    from ..visualize import kept_patches_figure, token_counts

    size = (seen.patch_size, seen.patch_size)
    patches = Patches.of_images(seen.pixel_values, size)
    normalised: dict[str, Any] = {"image_mean": seen.mean, "image_std": seen.std}
    unknown = {name: normalised[name] for name in setting.statistics if getattr(setting, name) is None}
    setting = dataclasses.replace(setting, **unknown).prepared(ModelFacts(model or "", size, channels=3))
    captions = [f"{count} of {patches.count} patches" for count in token_counts(patches, setting.plan(patches))]
    return kept_patches_figure(seen.pixel_values, size, {heading: setting}, names=seen.names, **normalised), captions


def shared(seen: Seen, words: VisualVocabulary, threshold: float) -> tuple[Figure, list[str]]:
    """A picture of which patches share a word, and a line for each photograph."""
    from ..visualize import group_by_words, word_captions, words_figure

    size = (seen.patch_size, seen.patch_size)
    words.require(size, channels=seen.pixel_values.shape[1])
    patches, plan = group_by_words(seen.pixel_values, size, words.normalized(seen.mean, seen.std), threshold)
    figure = words_figure(patches, plan, names=seen.names, image_mean=seen.mean, image_std=seen.std)
    return figure, word_captions(patches, plan)


def default_statistics(words: VisualVocabulary | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel values without a model: those that the vocabulary records, or ViT's."""
    if words is not None and words.info.image_mean is not None and words.info.image_std is not None:
        return words.info.image_mean, words.info.image_std
    # ViT's own. Without any, all patches point to the same side of the origin, and cosine distances tell little.
    return (0.5,) * 3, (0.5,) * 3


def default_pixel_values(
    paths: Sequence[Path], patch_size: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """The middle square of each photograph, (photographs, 3, side, side), normalised."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from ..decoding import read_image

    side = max(1, round(SIDE / patch_size)) * patch_size
    squares = [ImageOps.fit(read_image(path), (side, side), Image.Resampling.BICUBIC) for path in paths]
    pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2).float() / 255
    subtract, divide = (torch.tensor(one, dtype=torch.float32, device="cpu").view(-1, 1, 1) for one in (mean, std))
    return (pixels - subtract) / divide
