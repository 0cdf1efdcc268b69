"""Whatever holds a user's images, as a stream of patches: read, resized as for the model, cut, a batch at a time."""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .processors import whole_images
from .words import patchify

SHUFFLED = 1000
"""Images among which a streaming data set is shuffled; they are held encoded."""


class ImageSource(NamedTuple):
    """Images in a fixed order."""

    items: Iterator[tuple[str, Any]]
    """Name, and what `read_image` takes."""
    total: int | None
    """How many there are in all, if known."""
    name: str | None
    """Of the data set, if known."""
    order: str
    """What decides which image comes when, beside the seed: where it is another, so are the first so many images.
    Reads as a part of a sentence."""


class PatchBatch(NamedTuple):
    """What became of one batch of images."""

    patches: torch.Tensor
    """(patches, channels · patch height · patch width) float32, raw RGB in [0, 1]."""
    images: int
    """How many were read."""
    unreadable: list[str]
    """Name and reason of each image that was not."""


def open_images(
    images: Any, *, column: str | None = None, seed: int = 0, skip: int = 0, max_images: int | None = None
) -> ImageSource:
    """The images of a data set, a folder or an iterable, without reading any.

    Folders and data sets are shuffled by `seed`, since they often lie class by class (a streaming data set within a
    window of `SHUFFLED` images); any other iterable keeps its order.

    Args:
        images: a `datasets.Dataset`, a `datasets.IterableDataset`, a folder (searched recursively), or an iterable of
            PIL images or paths.
        column: the data set's image column; by default its first.
        skip: leave out this many from the start of the order.
        max_images: end after this many, the skipped ones included.

    Raises:
        ValueError: the folder has no images, the data set has no such column or several splits; while the images are
            iterated over: a stream or iterable has fewer than `skip`.
        TypeError: `images` is of another type.
    """
    if isinstance(images, (str, os.PathLike)):
        files = _image_files(Path(images))
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()[:max_images]
        items: Iterator[tuple[str, Any]] = ((str(files[i]), files[i]) for i in order[skip:])
        return ImageSource(items, len(order), Path(images).resolve().name, _described(Path(images), files))
    if isinstance(images, Mapping):
        raise ValueError(f"images has the splits {', '.join(map(str, images))}; pass one of them, as images['train'].")
    if type(images).__module__.split(".")[0] == "datasets":
        return _dataset(images, column, seed, skip, max_images)
    if not hasattr(images, "__iter__"):
        raise TypeError(
            f"images is a {type(images).__name__}; expected a data set, a folder or an iterable of PIL images."
        )
    total = len(images) if hasattr(images, "__len__") else None
    if max_images is not None and total is not None:
        total = min(total, max_images)
    numbered = ((f"image {i}", image) for i, image in enumerate(images))
    return ImageSource(_after(skip, itertools.islice(numbered, max_images)), total, None, "images in their own order")


def _after(skip: int, items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """`items` without the first `skip`."""
    skipped = sum(1 for _ in itertools.islice(items, skip))
    if skipped < skip:
        raise ValueError(
            f"images holds {skipped} images, fewer than the {skip} that were learned from already; give the same "
            "images, from their start."
        )
    yield from items


def _described(folder: Path, files: list[Path]) -> str:
    """A folder's images: as many others differ in their number, or in the digest of their names and sizes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(
            f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode(errors="surrogateescape")
        )
    return f"a folder of {len(files)} image files (names and sizes: {digest.hexdigest()[:16]})"


def _image_files(folder: Path) -> list[Path]:
    import PIL.Image

    if not folder.is_dir():
        raise ValueError(f"images is {str(folder)!r}, which is no folder; expected a folder of image files.")
    endings = PIL.Image.registered_extensions()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no image files; expected some of {', '.join(sorted(endings)[:8])} and so on.")
    return files


def _dataset(dataset: Any, column: str | None, seed: int, skip: int, max_images: int | None) -> ImageSource:
    import datasets

    name = getattr(dataset.info, "dataset_name", None)
    if isinstance(dataset, datasets.Dataset):
        column = _image_column(dataset.features, column)
        encoded = _undecoded(dataset, column).with_format(None)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[:max_images]
        items = ((f"row {i}", encoded[i][column]) for i in order[skip:])
        return ImageSource(items, len(order), name, f"column {column!r} of a data set of {len(dataset)} rows")
    if not isinstance(dataset, datasets.IterableDataset):
        raise TypeError(f"images is a {type(dataset).__name__}; expected a Dataset or an IterableDataset.")
    features = dataset.features
    if features is None:
        # Some streams say only with their first row what they hold.
        features = {key: datasets.Image() for key, value in next(iter(dataset)).items() if _looks_like_image(value)}
        column = _image_column(features, column)
        shuffled = dataset.shuffle(seed=seed, buffer_size=SHUFFLED)
    else:
        column = _image_column(features, column)
        shuffled = _undecoded(dataset, column).shuffle(seed=seed, buffer_size=SHUFFLED)
    rows = itertools.islice(((f"row {i}", row[column]) for i, row in enumerate(shuffled)), max_images)
    return ImageSource(_after(skip, rows), max_images, name, f"column {column!r} of a streaming data set")


def _undecoded(dataset: Any, column: str) -> Any:
    """The same rows with the images as stored: decoded later, one that cannot be is no error of the whole data set."""
    import datasets

    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _looks_like_image(value: Any) -> bool:
    import PIL.Image

    return isinstance(value, PIL.Image.Image) or (isinstance(value, Mapping) and {"bytes", "path"} <= set(value))


def _image_column(features: Mapping[str, Any], column: str | None) -> str:
    import datasets

    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if column is None and found:
        return found[0]
    if column in found:
        return str(column)
    asked = "no column of images" if column is None else f"no column of images {column!r}"
    raise ValueError(
        f"the data set has {asked}; its columns are {', '.join(features)}, those with images: "
        f"{', '.join(found) or 'none'}. Cast one with dataset.cast_column(name, datasets.Image())."
    )


def read_image(item: Any) -> Any:
    """An RGB PIL image, upright, from a PIL image, a path, or a data set's undecoded `{"bytes", "path"}`."""
    import PIL.Image
    import PIL.ImageOps

    if isinstance(item, Mapping):
        import datasets

        item = datasets.Image().decode_example(dict(item))
    image = item if isinstance(item, PIL.Image.Image) else PIL.Image.open(item)
    return PIL.ImageOps.exif_transpose(image).convert("RGB")


def image_patches(image: Any, image_processor: Any, patch_size: int) -> torch.Tensor:
    """The patches of one PIL image as the model would see them, but in raw RGB.

    Returns:
        (patches, channels · p · p) float32 in [0, 1].

    Raises:
        ValueError: what the processor returns has other values, or is smaller than a patch.
    """
    # Raw RGB for any processor, whatever its own rescale factor and statistics are.
    made = image_processor(
        images=[image], do_normalize=False, do_rescale=True, rescale_factor=1 / 255, return_tensors="pt"
    )
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
    """Reads images in threads, a few batches ahead, and yields what became of each batch, in order."""

    def make(batch: list[tuple[str, Any]]) -> PatchBatch:
        patches, unreadable = [], []
        for name, item in batch:
            try:
                patches.append(image_patches(read_image(item), image_processor, patch_size))
            # Decoders raise nearly anything for a broken file; one is no reason to lose a run of hours.
            except Exception as error:
                unreadable.append(f"{name} ({type(error).__name__}: {error})")
        return PatchBatch(torch.cat(patches) if patches else torch.zeros(0, 1), len(patches), unreadable)

    workers = min(4, os.cpu_count() or 1)
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
