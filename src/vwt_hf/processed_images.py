"""What image processors make of images, and the patches of that, read one by one."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import PIL.Image
import torch

from .decoding import FORMATS, UnreadableImage, read_image
from .printable import printable
from .processes import usable_cores
from .processors import whole_images
from .words import patchify


class PatchBatch(NamedTuple):
    """The patches of one batch of images, and the images that could not be read."""

    patches: torch.Tensor
    """(patches, channels · patch height · patch width) float32, raw RGB in [0, 1]."""
    lengths: list[int]
    """Patches of each image, 0 if it could not be read."""
    unreadable: list[str]
    """Name and reason of each image that was not read."""


def pixel_batches(items: Sequence[Any], image_processor: Any, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """What an image processor makes of items that `read_image` takes, one by one, in batches of tensors (images, ...).

    Raises:
        UnreadableImage: one cannot be read, or the processor cannot take it.
        ValueError: the processor gives images of a batch different sizes.
    """
    for start in range(0, len(items), batch_size):
        images = [processed(item, image_processor) for item in items[start : start + batch_size]]
        yield one_batch(images, image_processor)


def one_batch(made: Sequence[dict[str, torch.Tensor]], image_processor: Any) -> dict[str, torch.Tensor]:
    """One batch, tensors (images, ...), of images processed one by one; raises `ValueError` if sizes differ."""
    sizes = sorted({tuple(one["pixel_values"].shape[1:]) for one in made})
    if len(sizes) > 1:
        raise ValueError(
            f"{type(image_processor).__name__} gives pixel_values of shapes {sizes[0]} and {sizes[-1]}; expected one "
            "for all images of a batch. Use batches of one image, or another image processor."
        )
    return {name: torch.cat([one[name] for one in made]) for name in made[0]}


def processed(
    item: Any, image_processor: Any, name: str | None = None, formats: Sequence[str] = FORMATS, **options: Any
) -> dict[str, torch.Tensor]:
    """What an image processor makes of one image, tensors (1, ...).

    It gets the image in RGB, or in grey if its mean is a list of one number and it makes no RGB of grey by itself.

    Args:
        item, formats: as `read_image` takes them.
        name: what an error calls it.
        options: of the image processor, in place of its own.

    Raises:
        UnreadableImage: it cannot be read, or the processor cannot take it.
    """
    image = read_image(item, name, formats)
    mean, makes_rgb = getattr(image_processor, "image_mean", None), getattr(image_processor, "do_convert_rgb", None)
    if isinstance(mean, (list, tuple)) and len(mean) == 1 and not makes_rgb:
        image = image.convert("L")
    try:
        require_room(image, image_processor)
        with torch.device("cpu"):  # whatever torch's default is
            return dict(image_processor(images=[image], return_tensors="pt", **options))
    except Exception as error:
        name = name or (os.fspath(item) if isinstance(item, (str, os.PathLike)) else "an image")
        called = f"{printable(name)} ({image.width}×{image.height})"
        raise UnreadableImage(f"{called} is refused by {type(image_processor).__name__}: {printable(error)}") from error


def require_room(image: Any, image_processor: Any) -> None:
    """Refuses an image that a processor would give more pixels than Pillow decodes without a warning.

    The limit is `PIL.Image.MAX_IMAGE_PIXELS`. Without one, a file of a few bytes could take all memory.
    """
    most, pixels = PIL.Image.MAX_IMAGE_PIXELS, max(_pixels_between(image, image_processor))
    if most is not None and pixels > most:
        raise ValueError(
            f"it would have {pixels:,} pixels on its way through the image processor; expected at most {most:,}. Crop "
            "it if it is narrow, or give another processor"
        )


def _pixels_between(image: Any, image_processor: Any) -> Iterator[int]:
    """Numbers of pixels that an image processor makes of an image, by the sizes that it states; one at least."""
    stated = functools.partial(_stated, image_processor)
    longer, shorter = max(image.size), min(image.size)
    area = stated("size", "do_resize", "height") * stated("size", "do_resize", "width")
    # Some resize to more, of which they crop this share.
    share = min(1, max(_numbers(getattr(image_processor, "crop_pct", None)), default=1))
    yield round(max(_by_edges(image_processor, longer, shorter), area) / max(share, 1e-6) ** 2)
    for field, asked, height, width in (
        ("size", "do_resize", "max_height", "max_width"),
        ("crop_size", "do_center_crop", "height", "width"),
        ("pad_size", "do_pad", "height", "width"),
    ):
        yield stated(field, asked, height) * stated(field, asked, width)
    if stated("size", "do_pad", "height"):  # to a square, as OWLv2's does
        yield longer**2
    # Images are resized to the one of these that fits best, and cut into tiles.
    for tall, wide in getattr(image_processor, "image_grid_pinpoints", None) or ():
        yield int(tall) * int(wide)
    if type(image_processor).__name__.startswith("Perceiver"):  # which crops first, to a share of the shorter side
        yield shorter**2 * area // max(1, stated("crop_size", "do_center_crop", "height")) ** 2
    yield from _by_names(image_processor, longer, area)


def _stated(image_processor: Any, field: str, asked: str, name: str) -> int:
    """The number `name` in a field of sizes, if the field `asked` says that it is used; else 0."""
    sizes = getattr(image_processor, field, None) if getattr(image_processor, asked, False) else None
    number: Any = sizes.get(name) if sizes is not None and hasattr(sizes, "get") else None
    return int(number or 0)


def _by_edges(image_processor: Any, longer: int, shorter: int) -> int:
    """Pixels of an image, with sides of these lengths, that is resized to a shortest edge, a longest one, or both."""
    longest = _stated(image_processor, "size", "do_resize", "longest_edge")
    if hasattr(image_processor, "temporal_patch_size"):  # Qwen2-VL's and those like it state numbers of pixels there
        return longest
    by_shortest = _stated(image_processor, "size", "do_resize", "shortest_edge") ** 2 * longer // shorter
    by_longest = longest**2
    return min(by_shortest, by_longest) if by_shortest and by_longest else by_shortest or by_longest


def _by_names(image_processor: Any, longer: int, area: int) -> Iterator[int]:
    """Pixels by every field whose name says that it holds a side, a multiple, or a number of patches or tiles."""
    patch = max(_numbers(getattr(image_processor, "patch_size", None)), default=0)
    for name, value in vars(image_processor).items():
        most = int(max(_numbers(value), default=0))
        if _COUNTS.search(name):
            yield most * (area or int(patch) ** 2)
        elif _MULTIPLES.search(name):
            yield most * max(most, longer)
        elif _SIDES.search(name) and name not in ("size", "crop_size", "pad_size"):
            yield most**2


_SIDES = re.compile("size|resolution")
_MULTIPLES = re.compile("divisor|multiple")
_COUNTS = re.compile("patches|tiles|slice|tokens")
"""Names of fields that state the length of a side, what sides are a multiple of, or a number of patches or tiles."""


def _numbers(value: Any) -> list[float]:
    """The finite numbers in a field of an image processor, also within lists and tables."""
    if isinstance(value, (int, float)):
        return [value] if math.isfinite(value) else []
    if isinstance(value, Mapping) or hasattr(value, "longest_edge"):  # transformers' own tables of sizes
        return _numbers([value[name] for name in dict(value)])
    return [number for one in value for number in _numbers(one)] if isinstance(value, (list, tuple)) else []


def image_patches(item: Any, image_processor: Any, name: str, patch_size: int) -> torch.Tensor:
    """The patches of one image as the model would see them, but in raw RGB. Arguments are those of `processed`.

    Returns:
        (patches, channels · p · p) float32 in [0, 1].

    Raises:
        UnreadableImage: it cannot be read, or the processor cannot take it.
        ValueError: what the processor returns has other values, or is smaller than a patch.
    """
    # Raw RGB for any processor, whatever its own rescale factor and statistics are.
    made = processed(item, image_processor, name, do_normalize=False, do_rescale=True, rescale_factor=1 / 255)
    pixels = whole_images(made).float()
    low, high = pixels.aminmax()
    # Resizing in floating point overshoots a little.
    if low < -0.1 or high > 1.1:
        raise ValueError(
            f"{type(image_processor).__name__} returned values in [{low:.3g}, {high:.3g}] with do_normalize=False; "
            "expected raw RGB in [0, 1]."
        )
    return patchify(pixels.clamp(0, 1), (patch_size, patch_size)).flatten(0, 1)


def patch_batches(
    items: Iterator[tuple[str, Any]], image_processor: Any, patch_size: int, batch_size: int
) -> Iterator[PatchBatch]:
    """Reads images in threads, a few batches ahead, and yields the patches of each batch, in order."""

    def make(batch: list[tuple[str, Any]]) -> PatchBatch:
        patches, lengths, unreadable = [], [], []
        for name, item in batch:
            lengths.append(0)
            try:
                patches.append(image_patches(item, image_processor, name, patch_size))
                lengths[-1] = len(patches[-1])
            except UnreadableImage as error:  # one is no reason to lose a run of hours
                unreadable.append(str(error))
            except Exception as error:
                unreadable.append(f"{printable(name)} ({type(error).__name__}: {printable(error)})")
        none = torch.zeros(0, 3 * patch_size**2, dtype=torch.float32, device="cpu")
        return PatchBatch(torch.cat(patches) if patches else none, lengths, unreadable)

    # In a process that was forked, torch makes a new pool of threads with this call. The threads that read images would
    # make it, too, and if two do so at once, torch raises an error in one.
    torch.set_num_threads(torch.get_num_threads())
    workers = min(4, usable_cores())
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vwt-images")
    ahead: collections.deque[Future[PatchBatch]] = collections.deque()
    try:
        while batch := list(itertools.islice(items, batch_size)):
            ahead.append(pool.submit(make, batch))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
