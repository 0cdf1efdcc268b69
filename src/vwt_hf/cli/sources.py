"""Opens what a user names as images: a folder, a data set saved to disk, or one on the Hub."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..printable import printable

IMAGES = (
    "a folder of images, searched recursively but for what is hidden, a data set saved to disk, or the Hub id of one"
)
"""Help of an option or argument that names them."""
_OF_EMBED = re.compile(r"train-\d+-of-\d+\.parquet")


def open_source(
    images: str,
    *,
    column: str | None = None,
    config: str | None = None,
    split: str | None = None,
    usual: Sequence[str] = ("train",),
    streaming: bool = False,
    described: bool = False,
) -> tuple[Any, str | None]:
    """A folder of images or a data set; and the name of the split, if there are several.

    Args:
        images: a folder of images, one that `save_to_disk` of `datasets` wrote, or a data set's Hub id.
        column: as a user named it; only data sets have columns.
        usual: the splits to choose from, the best first, if `split` names none.
        described: whether a folder may be read as a data set, by its files for `datasets`: metadata.jsonl, Parquet, ...

    Raises:
        ValueError: `images` is a file, a folder with options that only a data set has, a data set that is damaged or
            saved without rows, or has no such split.
        OSError: `images` is neither a folder nor a data set on the Hub, or lacks files.
    """
    from ..image_source import is_saved_data_set

    path = Path(images)
    expected = "expected a folder of images, a data set saved to disk, or the Hub id of a data set"
    if not images:  # it would be the current folder
        raise ValueError(f"no images are named, but an empty text; {expected}.")
    if path.is_dir():
        if is_saved_data_set(path):
            return _saved(path, config, split, usual, streaming)
        if not described or not _is_described(path):
            options = {"column": column, "config": config, "split": split, "streaming": streaming or None}
            given = [f"--{name}" for name, value in options.items() if value is not None]
            if given:
                raise ValueError(f"{', '.join(given)}: of data sets alone, and {images} is a folder; leave it out.")
            return path, None
    elif path.exists():
        raise ValueError(f"{images} is a file; {expected}.")
    # A Hub id has one slash at most, and load_dataset takes a path for a file to read.
    elif path.is_absolute() or len(path.parts) > 2 or images.startswith((".", "~")) or images.endswith("/"):
        raise FileNotFoundError(f"{images} does not exist; {expected}.")

    import datasets

    with _naming(images):
        splits = [split] if split else datasets.get_dataset_split_names(str(path), config)
    split = _one_of(splits, usual, images)
    with _naming(images):
        return datasets.load_dataset(str(path), config, split=split, streaming=streaming), split


def photographs_beside(output: str | os.PathLike[str], images: Sequence[str]) -> list[Path]:
    """The photographs that a user names, in the order of `find_images`.

    The picture `output` may be none of them, and none that a search of their folders would find from then on.
    """
    from ..image_source import find_images, require_apart

    paths = find_images(images)
    if os.path.realpath(output) in map(os.path.realpath, paths):
        raise ValueError(f"{printable(output)} is a photograph to draw, and to be written; name another output.")
    for folder in filter(os.path.isdir, images):
        require_apart(output, folder)
    return paths


@contextlib.contextmanager
def _naming(images: str) -> Iterator[None]:
    """Has errors of `datasets` name the images that it was asked for."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except OSError as error:
        what = "cannot be read" if Path(images).is_dir() else "is no folder here, and cannot be had as a data set"
        raise OSError(f"{images} {what}: {error}") from error
    except IndexError as error:  # of saved data without files
        raise ValueError(f"{images}, or a split of it, has no rows; expected images.") from error
    except (ValueError, KeyError, DatasetsError) as error:
        reasons = "; ".join(f"{type(one).__name__}: {one}" for one in (error, error.__cause__) if one is not None)
        raise ValueError(
            f"{images} cannot be read as a data set ({reasons}); expected whole files, and a split that there is."
        ) from error


def _saved(
    folder: Path, config: str | None, split: str | None, usual: Sequence[str], streaming: bool
) -> tuple[Any, str | None]:
    import datasets

    with _naming(str(folder)):
        data = datasets.load_from_disk(folder)
    if isinstance(data, datasets.DatasetDict):
        split = split or _one_of(list(data), usual, str(folder))
        if split not in data:
            raise ValueError(f"{folder} has no split {split!r}; its splits are {', '.join(data)}.")
        data = data[split]
    else:
        _require_same(folder, "split", split, data.split and str(data.split))
    _require_same(folder, "config", config, data.info.config_name)
    return data.to_iterable_dataset() if streaming else data, split


def _require_same(folder: Path, name: str, asked: str | None, own: str | None) -> None:
    """Refuses another split or configuration than that of saved data."""
    if asked not in (None, own):
        known = f"no {name}" if own is None else repr(own)
        raise ValueError(
            f"--{name} is {asked!r}, and the data saved in {folder} are of {known}. Leave it out, or name another data "
            "set."
        )


def _is_described(folder: Path) -> bool:
    """Whether a folder has files that `datasets` reads for its images.

    In the folder, or one folder down, these are Parquet and Arrow files that `embed` did not write, and metadata files
    with a column `file_name` or like it. Archives count if there are no more images than these, and metadata files
    further down if each image lies below one.
    """
    from ..image_source import METADATA, image_names

    kinds = (*METADATA, *(f"[!.]*.{ending}" for ending in ("parquet", "arrow", "tar")))
    found = (file for within in ("", "[!.]*/") for kind in kinds for file in folder.glob(f"{within}{kind}"))
    near = list(filter(Path.is_file, found))
    if any(map(_describes, near)):
        return True
    archives = sum(file.suffix == ".tar" for file in near)
    if archives and len(list(itertools.islice(image_names(folder), archives + 1))) <= archives:
        return True
    deep = (file for name in METADATA for file in folder.glob(f"[!.]*/[!.]*/**/{name}") if file.is_file())
    above = tuple(f"{file.parent.relative_to(folder).as_posix()}/" for file in deep if _describes(file))
    return bool(above) and all(name.startswith(above) for name in image_names(folder))


def _describes(file: Path) -> bool:
    """Whether a file, other than an archive, is one that `datasets` reads for images."""
    from ..image_source import METADATA, names_images

    if file.name not in METADATA:
        of_embed = _OF_EMBED.fullmatch(file.name) and (file.parent / "embed.json").exists()
        return file.suffix != ".tar" and not of_embed
    if not names_images(file):
        warnings.warn(
            f"{printable(file)} names no images in a column file_name, and is left out; add one if it describes "
            "images.",
            stacklevel=2,
        )
        return False
    return True


def _one_of(splits: Sequence[str], usual: Sequence[str], name: str) -> str:
    choices = splits if len(splits) == 1 else [split for split in usual if split in splits]
    if not choices:
        raise ValueError(f"{name} has the splits {', '.join(splits)}; name one by --split.")
    return choices[0]
