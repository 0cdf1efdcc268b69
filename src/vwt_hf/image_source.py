"""The images of a folder, a data set or an iterable, found without reading any."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch

from .decoding import FORMATS
from .decoding import UnreadableImage as UnreadableImage  # programs import both from here
from .decoding import read_image as read_image
from .printable import printable, shown

SHUFFLED = 1000
"""Images of a stream that are shuffled together; they are held encoded."""
OWN_PICTURES = ("vwt-show.png", "vwt-vocab.png", "kept_patches.png")
"""What commands draw if no name is given, into the folder that one is in or, `demo`, into one there."""
UNREAD = {".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
"""Endings of photographs that Pillow does not decode by itself."""
METADATA = ("metadata.csv", "metadata.jsonl")
"""Files of a folder that `datasets` reads for its images, if they name them."""
_HEAD = 2**16
"""Bytes at the beginning of a file in which the names of its columns stand."""


class ImagePart(NamedTuple):
    """Images in a fixed order, to be read once."""

    items: Iterator[tuple[str, Any]]
    """Name, and what `read_image` takes."""
    total: int | None
    """How many there are, skipped ones included, if known."""


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """Images in a fixed order, none of which is read yet."""

    name: str | None
    """Name of the data set, if known."""
    order: str
    """What they are, as part of a sentence: "a folder of 12 image files ...". Images with the same text and seed come
    in the same order, so a checkpoint records it and refuses others."""
    cut: Callable[[int, int, int, int | None], ImagePart]
    """What `part` calls, as cut(index, number, skip, max_images)."""
    divides: bool = True
    """Whether processes get different images of it by `part`. Else each process has images of its own."""

    def part(self, *, skip: int = 0, max_images: int | None = None, index: int = 0, number: int = 1) -> ImagePart:
        """The images that one of several processes reads: of a folder or `Dataset` each `number`-th, from `index` on.

        Args:
            skip: leave out this many from the start of the part.
            max_images: end the part after this many, skipped ones included.
            index: which part, counted from 0.
            number: how many parts there are.

        Raises:
            ValueError: while the images are iterated over: a stream or iterable has fewer than `skip`.
        """
        return self.cut(index, number, skip, max_images)


def open_images(images: Any, *, column: str | None = None, seed: int = 0) -> ImageSource:
    """The images of a data set, a folder or an iterable, without reading any.

    Folders and data sets are shuffled by `seed`, since they often lie class by class (a streaming data set within a
    window of `SHUFFLED` images); any other iterable keeps its order.

    Args:
        images: a `datasets.Dataset`, a `datasets.IterableDataset`, a folder (searched recursively), or an iterable of
            PIL images or paths.
        column: the data set's image column; by default its first.

    Raises:
        ValueError: the folder has no images or is given a column; the data set has no such column or several splits.
        TypeError: `images` is of another type.
    """
    folder = folder_of(images)
    is_dataset = type(images).__module__.split(".")[0] == "datasets"
    if column is not None and not is_dataset:
        raise ValueError(f"column is {shown(column)}, which is for data sets; leave it out.")
    if folder is not None:
        files = find_images([folder])
        cut_files = _shuffled(len(files), seed, lambda i: (str(files[i]), files[i]))
        return ImageSource(folder.resolve().name, described_files(folder, files), cut_files)
    if is_dataset:
        return _dataset(images, column, seed)
    if not hasattr(images, "__iter__"):
        raise TypeError(
            f"images is a {type(images).__name__}; expected a data set of `datasets`, a folder, or an iterable of PIL "
            "images or paths. Of a torch data set of images and labels give (data[i][0] for i in range(len(data)))."
        )

    def cut(_index: int, _number: int, skip: int, max_images: int | None) -> ImagePart:
        total = len(range(len(images))[:max_images]) if hasattr(images, "__len__") else None
        numbered = ((f"image {i}", image) for i, image in enumerate(images))
        return ImagePart(_after(skip, itertools.islice(numbered, max_images)), total)

    return ImageSource(None, "images in their own order", cut, divides=False)


def folder_of(images: Any) -> Path | None:
    """The folder of images; `None` for no path. Raises `ValueError` for another path, or splits of a data set."""
    if isinstance(images, Mapping):
        splits = list(map(str, images))
        raise ValueError(
            f"images has the splits {', '.join(splits)}; pass one of them, as images[{(splits or ['train'])[0]!r}]."
        )
    if not isinstance(images, (str, os.PathLike)):
        return None
    if not os.fspath(images) or not Path(images).is_dir():  # an empty text would be the folder that one is in
        raise ValueError(f"images is {str(images)!r}, which is no folder; expected a folder of image files.")
    return Path(images)


def _shuffled(images: int, seed: int, get: Callable[[int], tuple[str, Any]]) -> Callable[..., ImagePart]:
    """`ImageSource.cut` for images that `get` finds by their numbers, in the order of a seed."""

    def cut(index: int, number: int, skip: int, max_images: int | None) -> ImagePart:
        generator = torch.Generator("cpu").manual_seed(seed)
        mine = torch.randperm(images, generator=generator, device="cpu").tolist()[index::number][:max_images]
        return ImagePart(map(get, mine[skip:]), len(mine))

    return cut


def _after(skip: int, items: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """`items` without the first `skip`."""
    skipped = sum(1 for _ in itertools.islice(items, skip))
    if skipped < skip:
        raise ValueError(
            f"images holds {skipped} images, fewer than the {skip} that were learned from already; give the same "
            "images, from their start."
        )
    yield from items


def described_files(folder: Path, files: Iterable[Path]) -> str:
    """A text that changes when an image of the folder is added, removed, renamed or gets another size.

    Of a link only its target's path counts, so the text is the same while the drive there is gone.
    """
    digest, count = hashlib.sha256(), 0
    for file in files:
        count += 1
        if os.path.islink(file):
            known: Any = os.readlink(file)
        else:
            known = os.path.getsize(file) if os.path.exists(file) else 0
        digest.update(f"{file.relative_to(folder).as_posix()}\0{known}\0".encode(errors="surrogateescape"))
    return f"a folder of {count} image files (names and sizes: {digest.hexdigest()[:16]})"


def find_images(places: Sequence[str | os.PathLike[str]], limit: int | None = None) -> list[Path]:
    """Image files: those named, and those that `image_names` finds in folders named; at most `limit`, spread evenly.

    Raises:
        ValueError: a folder holds no image, or a place is an empty text.
        FileNotFoundError: a path does not exist.
    """
    files: list[Path] = []
    for given in places:
        if not os.fspath(given):  # which would be the folder that one is in
            raise ValueError("An image is named by an empty text; expected its path, or that of a folder of images.")
        place = Path(given)
        if place.is_dir():
            within = [place / name for name in image_names(place)]
            if not within:
                raise ValueError(_no_images(place))
            files += within
        elif place.exists():
            files.append(place)
        else:
            raise FileNotFoundError(f"{place} does not exist; expected an image or a folder of images.")
    return [files[index] for index in spread(len(files), limit)]


def spread(count: int, limit: int | None) -> list[int]:
    """Indices of at most `limit` of `count` things, spread evenly, the first among them.

    >>> spread(5, 3)
    [0, 1, 3]
    """
    taken = count if limit is None else min(count, limit)
    return [number * count // taken for number in range(taken)]


def _no_images(folder: Path) -> str:
    if is_saved_data_set(folder):
        return (
            f"{folder} is a data set that save_to_disk wrote; expected a folder of images or, in Python, what "
            "datasets.load_from_disk(...) makes of it."
        )
    return (
        f"{folder} holds no image files; expected some that end in .jpg, .png, .webp, .tiff, .gif, .bmp and so on, and "
        "are not hidden. Parquet and tar files become a data set by datasets.load_dataset(...).save_to_disk(...)."
    )


def is_saved_data_set(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    return any((folder / name).exists() for name in ("state.json", "dataset_dict.json"))


def names_images(file: Path) -> bool:
    """Whether a file of `METADATA` has a column `file_name`, without which `datasets` does not read it."""
    with file.open("rb") as opened:
        return b"file_name" in opened.read(_HEAD).replace(b"\0", b"")  # in UTF-16, too


def image_names(folder: Path) -> Iterator[str]:
    """The paths, relative to `folder` and with /, of the image files at any depth below it, in their order.

    Links are followed. A folder that several links lead to is searched once: where it lies if that is below `folder`,
    else at the first link. A link to nothing is among the files, so that it is named when it cannot be read. Hidden
    files, `OWN_PICTURES`, and the picture of words beside a vocabulary, are left out. Photographs of formats that are
    not read are warned of, unless an image beside them has the same name but for its ending.
    """
    endings = _endings()
    top = os.path.realpath(folder)
    searched = set()
    unread: collections.Counter[str] = collections.Counter()

    def within(path: str, below: str) -> Iterator[str]:
        searched.add(os.path.realpath(path))
        try:
            with os.scandir(path) as found:
                entries = sorted((entry for entry in found if entry.name[0] != "."), key=lambda entry: entry.name)
        except PermissionError as error:
            raise PermissionError(
                f"{printable(path)} cannot be searched for images ({error.strerror}); make it readable, or name "
                "folders that are."
            ) from error
        is_of_words = any(entry.name == "vocabulary.json" for entry in entries)
        drawn = (*OWN_PICTURES, "words.png") if is_of_words else OWN_PICTURES
        entries = [entry for entry in entries if entry.name not in drawn]
        others, stems = [], set()
        for entry in entries:
            if _is_folder(entry):
                real = os.path.realpath(entry.path)
                lies_elsewhere = entry.is_symlink() and _is_searched(real, top)
                if real not in searched and not lies_elsewhere:
                    yield from within(entry.path, f"{below}{entry.name}/")
                continue
            stem, ending = os.path.splitext(entry.name)
            if ending.lower() in endings and _is_file(entry):
                stems.add(stem)
                yield below + entry.name
            elif ending.lower() in UNREAD:
                others.append((stem, ending.lower()))
        unread.update(ending for stem, ending in others if stem not in stems)

    yield from within(os.fspath(folder), "")
    for ending, count in unread.items():
        warnings.warn(
            f"{printable(folder)} holds {count} files that end in {ending}, which are left out: photographs of this "
            "format are not read. Convert them, as to .jpg.",
            stacklevel=2,
        )


def _endings() -> set[str]:
    """How names of image files end, in small letters."""
    return {ending for ending, kind in PIL.Image.registered_extensions().items() if kind in FORMATS}


def require_apart(picture: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Refuses a picture to be written where a search of the folder of images would find it from then on."""
    for path in (os.path.realpath, os.path.abspath):  # a folder that a link among the images leads to is searched, too
        name = os.path.basename(path(picture))
        is_image = os.path.splitext(name)[1].lower() in _endings() and name not in OWN_PICTURES
        if is_image and _is_searched(path(picture), path(folder)):
            raise ValueError(
                f"{printable(picture)} would be a picture among the images of {printable(folder)}, and one of them in "
                "the next run; name a file elsewhere."
            )


def _is_searched(folder: str, top: str) -> bool:
    """Whether a folder or file lies below `top`, and neither it nor a folder on the way is hidden."""
    within = os.path.join(folder, "").startswith(os.path.join(top, ""))
    return within and not any(part.startswith(".") for part in os.path.relpath(folder, top).split(os.sep))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # `is_dir` raises for a link that leads to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a link to a file or to nothing."""
    if entry.is_symlink():
        return os.path.isfile(entry.path) or not os.path.exists(entry.path)
    return entry.is_file()


class _FolderRows:
    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        # In Arrow, in which a million names take some 50 MB. As bytes, since names of files may not be valid text.
        names, chunks = map(os.fsencode, image_names(folder)), []
        while some := list(itertools.islice(names, 10_000)):
            chunks.append(pa.array(some, pa.binary()))
        self._folder = folder
        self._names = pa.chunked_array(chunks, pa.binary())
        if not len(self):
            raise ValueError(_no_images(folder))
        self.order = described_files(folder, (folder / os.fsdecode(name.as_py()) for name in self._names))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, row: int) -> tuple[str, Any]:
        stored = self._names[row].as_py()
        # Whatever the locale's encoding is, a name is the same text.
        name = stored.decode("utf-8", "surrogateescape").encode("utf-8", "backslashreplace").decode()
        return name, self._folder / os.fsdecode(stored)


class _DatasetRows:
    KEY = "__key__"
    """The column in which WebDataset keeps the name of each sample."""

    def __init__(self, dataset: Any, column: str | None) -> None:
        self._column = find_image_column(dataset.features, column)
        key = dataset.features.get(self.KEY)
        named = getattr(key, "dtype", None) in ("string", "large_string")
        self._rows = undecoded(dataset, self._column, [self.KEY] if named else [])
        if not len(self):
            raise ValueError("the data set has no rows; expected images.")
        self.order = f"column {self._column!r} of a data set of {len(self)} rows (fingerprint: {dataset._fingerprint})"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[str, Any]:
        cells = self._rows[row]
        item = cells[self._column]
        name = cells.get(self.KEY) if self._column != self.KEY else None
        return name or (item and item["path"]) or f"row {row}", item


ImageRows = _FolderRows | _DatasetRows
"""Images in a fixed order, made by `image_rows`. `rows[i]` is the name of image `i`, and what `read_image` takes.

Names of files that are not valid text have escapes. `order` is a text that differs for other images, or another order.
"""


def image_rows(images: Any, column: str | None = None) -> ImageRows:
    """The images of a folder or a data set, without reading any, for work that takes them in any order.

    Args:
        images: a folder, searched through all levels, or a `datasets.Dataset`.
        column: the data set's image column; by default its first.

    Raises:
        ValueError: there are no images, or the data set has no such column or several splits.
        TypeError: `images` is of another type.
    """
    import datasets

    folder = folder_of(images)
    if folder is not None:
        if column is not None:
            raise ValueError(f"column is {column!r}, and images is a folder; columns are of data sets.")
        return _FolderRows(folder)
    if not isinstance(images, datasets.Dataset):
        raise TypeError(
            f"images is a {type(images).__name__}; expected a folder or a datasets.Dataset, whose rows come in any "
            "order. Paths and PIL images: Dataset.from_dict({'image': images}).cast_column('image', Image())."
        )
    return _DatasetRows(images, column)


def _dataset(dataset: Any, column: str | None, seed: int) -> ImageSource:
    import datasets
    from datasets.distributed import split_dataset_by_node

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(f"images is a {type(dataset).__name__}; expected a Dataset or an IterableDataset.")
    name = getattr(dataset.info, "dataset_name", None)
    of = "".join(f"{known}, " for known in (name, dataset.info.config_name, dataset.split) if known)
    column = find_image_column(features_of(dataset), column)
    encoded = undecoded(dataset, column)
    if isinstance(dataset, datasets.Dataset):
        cut_rows = _shuffled(len(dataset), seed, lambda i: (f"row {i}", encoded[i][column]))
        ends = [encoded[i] for i in sorted({0, len(dataset) - 1})] if len(dataset) else []
        of += f"first and last: {described_images(ends, column)}"
        return ImageSource(name, f"column {column!r} of a data set of {len(dataset)} rows ({of})", cut_rows)
    # Streams of files have the same name, whichever the files are.
    of += f"first: {described_images(itertools.islice(encoded, 1), column)}, "
    shuffled = encoded.shuffle(seed=seed, buffer_size=SHUFFLED)

    def cut(index: int, number: int, skip: int, max_images: int | None) -> ImagePart:
        # In whole shards if their number allows it; else every process reads all rows and keeps its own.
        mine = split_dataset_by_node(shuffled, index, number)
        whose = "" if number == 1 else f" of part {index}"
        rows = ((f"image {i} of the shuffled stream{whose}", row[column]) for i, row in enumerate(mine))
        return ImagePart(_after(skip, itertools.islice(rows, max_images)), max_images)

    return ImageSource(name, f"column {column!r} of a streaming data set ({of}as it comes)", cut)


def described_images(rows: Iterable[Any], column: str) -> str:
    """A hash of undecoded images of a data set, the same on every machine."""
    digest = hashlib.sha256()
    for row in rows:
        image = row[column] or {}
        if not isinstance(image, Mapping):  # decoded, by a stream that does not say what it holds
            image = {"bytes": image.tobytes()}
        content, path = image.get("bytes"), image.get("path") or ""
        if content is None:
            size = os.path.getsize(path) if os.path.exists(path) else 0  # of an address
            content = f"{os.path.basename(path)}\0{size}\0".encode(errors="surrogateescape")
        digest.update(content)
    return digest.hexdigest()[:16]


def files_of_rows(dataset: Any, column: str) -> Any:
    """For each row of a `Dataset` the path of its file, in Arrow; `None` where the row holds the image itself."""
    import pyarrow.compute as pc

    # Of stored images only whether they are there is asked.
    content, path = (pc.struct_field(dataset.data.column(column), name) for name in ("bytes", "path"))
    paths = pc.if_else(pc.is_null(content), path, None)
    return paths if dataset._indices is None else paths.take(dataset._indices.column(0))


def features_of(dataset: Any) -> Mapping[str, Any]:
    """The type of each column of a data set.

    Streams that do not say it are judged by their first row: which columns are images, and `None` for all others.
    """
    import datasets

    if dataset.features is not None:
        return dataset.features
    first: Mapping[str, Any] = next(iter(dataset.with_format(None)), {})
    return {key: datasets.Image() if _looks_like_image(value) else None for key, value in first.items()}


def undecoded(dataset: Any, column: str, others: Iterable[str] = ()) -> Any:
    """The same rows with the images as stored, so that an image which cannot be decoded does not fail the data set.

    Only the column of images and `others` stay.

    Raises:
        ValueError: the data set changes its images as it decodes them, by a transform or into another mode than RGB.
    """
    import datasets

    if dataset.features is None:  # a stream of which nothing is known before
        return dataset.with_format(None)
    formatted: Mapping[str, Any] = dataset.format if isinstance(dataset, datasets.Dataset) else {}
    if formatted.get("type") == "custom" and column in formatted["columns"]:
        raise ValueError(
            f"the data set has a transform (set_transform, with_transform) of its column {column!r}, which is not "
            "applied here; expected images as stored. Use dataset.map in its place, or give dataset.with_format(None)."
        )
    mode = getattr(dataset.features[column], "mode", None)
    if mode not in (None, "RGB", "RGBA", "RGBX"):  # transparency is left out in any case
        raise ValueError(
            f"column {column!r} of the data set is of datasets.Image(mode={mode!r}), and images are read in RGB; "
            "expected datasets.Image(). Change them by dataset.map, or cast the column."
        )
    encoded = dataset.select_columns(sorted({column, *others})).cast_column(column, datasets.Image(decode=False))
    return encoded.with_format(None)


def _looks_like_image(value: Any) -> bool:
    return isinstance(value, PIL.Image.Image) or (isinstance(value, Mapping) and {"bytes", "path"} <= set(value))


def find_image_column(features: Mapping[str, Any], column: str | None) -> str:
    """The column of images that is asked for, by default the first; raises `ValueError` if there is no such column."""
    import datasets

    image_columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if column is None and image_columns:
        return image_columns[0]
    if column in image_columns:
        return str(column)
    asked = "no column of images" if column is None else f"no column of images {column!r}"
    raise ValueError(
        f"the data set has {asked}; its columns are {', '.join(map(printable, features))}, those with images: "
        f"{', '.join(map(printable, image_columns)) or 'none'}. Cast one with dataset.cast_column(name, "
        "datasets.Image())."
    )
