"""Images with their labels, groups and captions, from a folder or a data set, shared among processes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import image_source
from .checks import require_whole
from .printable import composed, printable, shown

LABEL_COLUMNS = ("label", "labels")
"""Columns that hold labels if none is of classes."""
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences")
_SPLITS = frozenset(("train", "training", "validation", "valid", "val", "test", "testing", "eval"))
"""What folders are called that each hold a part of a data set, and in it the classes."""


class Sample(NamedTuple):
    """One image, and what is known of it."""

    name: str
    """What a message calls it."""
    item: Any
    """What `read_image` takes."""
    label: str | int | None
    """Its name, or its number if labels have no names; `None` if it has no label."""
    group: str | None
    """`None` if it is in none."""
    captions: tuple[str, ...]
    content: str = ""
    """Tells a resumed run whether the image is still the same: a hash of what a stream holds, or the size of the file
    that a row names. Empty for files of a folder, and where nothing is to be resumed."""


@dataclasses.dataclass
class LabelledImages:
    """Images in a fixed order, with their labels, groups and captions. Made by `open_labelled`."""

    data: Any
    """A list of files, a `datasets.Dataset` or a `datasets.IterableDataset`."""
    name: str
    """Of the folder or data set."""
    total: int | None
    """How many images there are, if known beforehand; of a stream with a limit the most that there can be."""
    label_names: tuple[str, ...] | None
    """All labels, in the order of their numbers; `None` if they have no names, or not all are known beforehand."""
    columns: dict[str, str]
    """The data set's columns for `image`, `label`, `captions` and `group`."""
    groups: Sequence[str] | None = None
    """The group of each file."""
    group_names: tuple[str, ...] | None = None
    """The names of a data set's groups, if they are numbers with names."""
    rows: Sequence[int] | None = None
    """The row of each image in the whole data set, which messages name."""
    source: str = ""
    """Where a stream comes from, such as a Hub id; set by whoever opened it."""
    column_names: tuple[str, ...] = ()
    """All columns of the data set, which messages name."""
    whole: frozenset[str] = frozenset()
    """Which of the columns for `label` and `group` may hold whole numbers as floats: pandas writes them so where a cell
    is empty. Of a stream, whose other rows are not known, each number is told by itself."""

    @property
    def has_labels(self) -> bool:
        return isinstance(self.data, list) or "label" in self.columns

    @property
    def has_captions(self) -> bool:
        return "captions" in self.columns

    def order(self, processes: int) -> str:
        """A text that differs for images of another number, order, name, size, label or group.

        For a stream, which is unknown before it is read, it differs by source, first image and number of processes.
        """
        known = hashlib.sha256(repr((self.label_names, self.groups, self.columns)).encode("utf-8", "backslashreplace"))
        if isinstance(self.data, list):
            folder = Path(os.path.commonpath([file.parent for file in self.data]))
            files = image_source.described_files(folder, self.data)
        elif hasattr(self.data, "__len__"):
            files = f"a data set of {len(self.data)} rows (fingerprint: {self.data._fingerprint})"
        else:
            of = f"{self.name}, {self.data.info.config_name}, {self.data.split}, {self.source}"
            first = image_source.described_images(itertools.islice(self.data, 1), self.columns["image"])
            files = f"{self.total or 'all'} images of a stream ({of}, first: {first}) for {processes} processes"
        return f"{files}, known of them: {known.hexdigest()[:16]}"

    def batches(
        self, process: int, processes: int, batch_size: int, known: Mapping[int, Sequence[Sample]] | None = None
    ) -> Iterator[tuple[int, list[Sample] | None]]:
        """The batches of one process of several, numbered in the order of all processes' batches.

        Files and rows come in the same batches however many processes there are: of two, each takes every second. A
        stream is split by `datasets.distributed.split_dataset_by_node`; but row by row if it has a limit, as the first
        images are wanted and not the first of each shard.

        Args:
            known: the samples, without images, of the batches that were measured before, by number. In place of such a
                batch comes `None`, unless a stream has other images there now, or a file that a row names has another
                size. `None` if nothing is to be resumed, now or later: then images are not hashed.
        """
        if not hasattr(self.data, "__len__"):
            yield from self._of_stream(process, processes, batch_size, known)
            return
        images, files = range(len(self.data)), None
        if known is not None and not isinstance(self.data, list):
            files = image_source.files_of_rows(self.data, self.columns["image"])
        for number in range(process, -(-len(images) // batch_size), processes):
            batch = images[number * batch_size : (number + 1) * batch_size]
            named = [None] * len(batch) if files is None else files[batch.start : batch.stop].to_pylist()
            sizes = list(map(_size_of, named))
            before = (known or {}).get(number)
            if before is not None and all(size in ("", one.content) for size, one in zip(sizes, before, strict=True)):
                yield number, None
            else:
                samples = [self._sample(index, self.data[index]) for index in batch]
                yield number, [one._replace(content=size) for one, size in zip(samples, sizes, strict=True)]

    def _of_stream(
        self, process: int, processes: int, batch_size: int, known: Mapping[int, Sequence[Sample]] | None
    ) -> Iterator[tuple[int, list[Sample] | None]]:
        """As `batches`, from a stream."""
        from datasets.distributed import split_dataset_by_node

        if self.total is None:
            rows = iter(split_dataset_by_node(self.data, rank=process, world_size=processes))
        else:
            rows = itertools.islice(self.data, process, None, processes)
        for number in itertools.count(process, processes):
            batch = list(itertools.islice(rows, batch_size))
            if not batch:
                return
            first, whose = number // processes * batch_size, f" of process {process}" if processes > 1 else ""
            samples = [self._sample(first + index, row, whose) for index, row in enumerate(batch)]
            if known is not None:
                contents = [image_source.described_images([row], self.columns["image"]) for row in batch]
                samples = [one._replace(content=of) for one, of in zip(samples, contents, strict=True)]
            before = (known or {}).get(number)
            # Not by name: a stream's files may lie elsewhere now.
            now, then = ([one._replace(item=None, name="") for one in each] for each in (samples, before or ()))
            is_same = before is not None and now == then
            yield number, None if is_same else samples

    def _sample(self, number: int, row: Any, whose: str = "") -> Sample:
        if isinstance(row, Path):
            name = folder_name(row)
            return Sample(str(row), row, name, name if self.groups is None else self.groups[number], ())
        label = _named(self._cell(row, "label"), self.label_names)
        group = _named(self._cell(row, "group"), self.group_names) if "group" in self.columns else label
        item = row[self.columns["image"]]
        path = item.get("path") if isinstance(item, Mapping) else None
        return Sample(
            f"row {number if self.rows is None else self.rows[number]}{whose}{f' ({path})' if path else ''}",
            item,
            label,
            None if group is None else str(group),
            self._captions(row.get(self.columns.get("captions"))),
        )

    def _cell(self, row: Any, kind: str) -> Any:
        """What a row holds in the column for `label` or `group`."""
        value = row.get(self.columns.get(kind))
        value = value.item() if isinstance(value, np.generic) else value
        is_whole = kind in self.whole and isinstance(value, float) and value.is_integer()
        return int(value) if is_whole else value

    def first_captions(self, most: int) -> list[str]:
        """At most `most` captions, those of the first images; none of a stream, which is read once."""
        if not hasattr(self.data, "__len__"):
            return []
        column = self.columns["captions"]
        rows = self.data.select_columns(column)[:most][column]  # and not their images
        return [text for row in rows for text in self._captions(row)][:most]

    def _captions(self, value: Any) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) or value is None else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) or text is None for text in texts):
            raise ValueError(
                f"column {shown(self.columns['captions'])} holds {shown(value)}; expected a text or a list of texts "
                "about the image. Name another caption_column."
            )
        return tuple(filter(None, texts))


def _size_of(file: str | None) -> str:
    """The size of a file in bytes; empty if there is none."""
    try:
        return str(os.stat(file).st_size) if file else ""
    except OSError:
        return ""


def _named(value: Any, names: Sequence[str] | None) -> str | int | None:
    """A label or group as a data set has it: its name, or its number where there are no names."""
    if value is None or isinstance(value, str):
        return value
    if value != value:  # as pandas has cells that are empty
        return None
    if not isinstance(value, int):  # a date, say
        return str(value)
    if names is None:
        return value
    return names[value] if 0 <= value < len(names) else None  # -1 is unknown to datasets


def open_labelled(
    images: Any,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
    groups: str | os.PathLike[str] | None = None,
    limit: int | None = None,
) -> LabelledImages:
    """The images of a folder or data set with their labels, captions and groups, without reading any.

    Args:
        images: a folder, searched through all levels, whose images' labels are the names of the folders that they lie
            in; a `datasets.Dataset`; or a `datasets.IterableDataset`.
        image_column: by default the first column of images.
        label_column: by default the first column of classes (`datasets.ClassLabel`), or the one called label or labels.
        caption_column: of a text, or a list of texts, about the image; by default the first of `CAPTION_COLUMNS`.
        group_column: of an image's group; by default its label. Images without one are in none.
        groups: for a folder: a JSON file, an object from each image's path below the folder, with /, to its group.
        limit: take at most so many images, spread evenly; of a stream the first.

    Raises:
        ValueError: there are no images, no such column, or `groups` does not name the group of every image.
        TypeError: `images` is of another type.
    """
    if limit is not None:
        require_whole("limit", limit)
    columns = {"image": image_column, "label": label_column, "captions": caption_column, "group": group_column}
    folder = image_source.folder_of(images)
    if not isinstance(groups, (str, os.PathLike, type(None))):
        raise TypeError(f"groups is a {type(groups).__name__}; expected the name of a JSON file.")
    if folder is not None:
        asked = [name for name, column in columns.items() if column is not None]
        if asked:
            raise ValueError(f"a column for {asked[0]} is for data sets, and {images} is a folder; leave it out.")
        return _of_folder(folder, groups, limit)
    if groups is not None:
        raise ValueError("a file of groups is for folders of images; name a data set's column of groups instead.")
    import datasets

    if not isinstance(images, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(f"images is a {type(images).__name__}; expected a folder or a data set of `datasets`.")
    return _of_dataset(images, columns, limit)


def _of_folder(folder: Path, groups: str | os.PathLike[str] | None, limit: int | None) -> LabelledImages:
    files = image_source.find_images([folder])
    splits = sorted({file.parts[len(folder.parts)] for file in files})
    if len(splits) > 1 and _SPLITS.issuperset(map(str.lower, splits)):
        one = max(splits, key=lambda name: (not name.lower().startswith("train"), name))
        warnings.warn(
            f"{printable(folder)} holds {', '.join(splits)}, which are taken together. If they are splits, name one: "
            f"{printable(folder / one)}",
            stacklevel=2,
        )
    for file in (folder / name for name in image_source.METADATA):
        named = False
        with contextlib.suppress(OSError):  # it is not used, so it need not be readable
            named = file.is_file() and image_source.names_images(file)
        if named:
            warnings.warn(
                f"{printable(file)} is left out, and labels are the names of folders. To go by the file, give what "
                'datasets.load_dataset("imagefolder", data_dir=..., split="train") makes of the folder.',
                stacklevel=2,
            )
    names = tuple(sorted(set(map(folder_name, files))))  # also those of which the limit leaves no image
    files = [files[index] for index in image_source.spread(len(files), limit)]
    group_of_each = None if groups is None else groups_of(files, folder, Path(groups))
    return LabelledImages(files, folder.resolve().name, len(files), names, {}, group_of_each)


def folder_name(image: Path) -> str:
    """The name of the folder that an image lies in, also where its path names it by "." or ".." alone."""
    folder = image.parent
    return _text_of(folder.resolve().name if folder.name in ("", "..") else folder.name)


def _text_of(path: str) -> str:
    """What a path says, whatever the locale's encoding is, as `composed` gives it."""
    return composed(os.fsencode(path).decode(errors="surrogateescape"))


def groups_of(paths: Sequence[Path], images: Path, groups: Path | None) -> list[str]:
    """The name of each image's group.

    Args:
        images: the folder that the images lie below.
        groups: a JSON object from paths below `images`, with /, to names; `None`: an image's group is its folder.

    Raises:
        ValueError: the file is no such object, or an image is not in it.
    """
    if groups is None:
        return [folder_name(path) for path in paths]
    try:
        table = json.loads(groups.read_bytes())  # in UTF-16 or with a byte order mark, too
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"groups is {groups}, which cannot be read as JSON ({error}); expected a file with an object."
        ) from error
    if not isinstance(table, dict):
        raise ValueError(f"groups is {groups}, which holds a {type(table).__name__}; expected an object.")
    table = {composed(name): group for name, group in table.items()}
    names = [_text_of(path.relative_to(images).as_posix()) for path in paths]
    missing = [name for name in names if table.get(name) is None]
    if missing:
        raise ValueError(
            f"groups is {groups}, which names no group of {len(missing)} of {len(names)} images, such as "
            f"{missing[0]!r}; expected one for each path below {images}."
        )
    return [str(table[name]) for name in names]


def _of_dataset(dataset: Any, asked: dict[str, str | None], limit: int | None) -> LabelledImages:
    import datasets

    features = image_source.features_of(dataset)
    columns = _columns(features, asked)
    dataset = image_source.undecoded(dataset, columns["image"], columns.values())
    name = getattr(dataset.info, "dataset_name", None) or "a data set"
    names, group_names = (getattr(features.get(columns.get(kind, "")), "names", None) for kind in ("label", "group"))
    total, rows, whole = limit, None, {"label", "group"} & columns.keys()
    if isinstance(dataset, datasets.Dataset):
        if names is None and _may_hold_texts(features, columns.get("label")):
            # Of all rows: the limit says how many are looked at, not of what.
            written = dataset[columns["label"]][:]
            names = sorted({label for label in written if isinstance(label, str)}) or None
        for kind in tuple(whole):
            is_float = str(getattr(features[columns[kind]], "dtype", None)).startswith("float")
            written = dataset[columns[kind]][:] if is_float else ()
            if any(value == value and not value.is_integer() for value in written if value is not None):
                whole.remove(kind)
        rows = image_source.spread(len(dataset), limit)
        dataset, total = dataset.select(rows), len(rows)
    elif limit is not None:
        dataset = dataset.take(limit)
    label_names, group_names = (None if known is None else tuple(known) for known in (names, group_names))
    return LabelledImages(
        dataset,
        name,
        total,
        label_names,
        columns,
        rows=rows,
        group_names=group_names,
        column_names=tuple(features),
        whole=frozenset(whole),
    )


def _columns(features: Mapping[str, Any], asked: Mapping[str, str | None]) -> dict[str, str]:
    """The columns for `image`, `label`, `captions` and `group`: those asked for, else those that a data set has."""
    import datasets

    columns = {"image": image_source.find_image_column(features, asked["image"])}
    for kind, found in {
        "label": _label_column(features),
        "captions": next((name for name in CAPTION_COLUMNS if _may_hold_texts(features, name)), None),
        "group": None,
    }.items():
        name = asked[kind]
        if name is not None and name not in features:
            known = ", ".join(map(printable, features))
            raise ValueError(f"the data set has no column {shown(name)} for {kind}; its columns are {known}.")
        if kind in ("label", "group") and name and isinstance(features.get(name), datasets.Image):
            raise ValueError(f"column {shown(name)} holds images; name another for {kind}.")
        if name or found:
            columns[kind] = str(name or found)
    return columns


def _may_hold_texts(features: Mapping[str, Any], name: str | None) -> bool:
    """Whether there is a column of that name that holds texts or lists of texts, as far as is known."""
    feature = features.get(name) if name else None
    if feature is None:
        return name in features
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _label_column(features: Mapping[str, Any]) -> str | None:
    import datasets

    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    # Masks of segmentation are called labels, too.
    named = [name for name in LABEL_COLUMNS if name in features and not isinstance(features[name], datasets.Image)]
    return next(iter(classes + named), None)
