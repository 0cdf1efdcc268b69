"""The files of features that `embed` writes: which images each is of, which are there, and the manifest beside them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .printable import difference
from .processes import everywhere, gathered, in_main, place, require_same
from .whole_saves import saving, write_files

MANIFEST = "embed.json"
KEY = "vwt_hf"
"""Key in a file's metadata, of JSON: how many images it has, which could not be read and, in safetensors, all names."""
AGAIN = "again"
"""Key of an unreadable image that was out of reach, as on a drive that was gone: a later run tries it again."""


class Shard(NamedTuple):
    """What a file holds."""

    names: list[str]
    rows: list[int]
    features: torch.Tensor
    """(images, values) float32."""
    unreadable: list[dict[str, Any]]


def _to_parquet(shard: Shard) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(shard.features.flatten().numpy())
    columns = {
        "name": pa.array(shard.names, pa.string()),
        "row": pa.array(shard.rows, pa.int64()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, shard.features.shape[1]),
    }
    metadata = {"images": len(shard.rows), "unreadable": shard.unreadable}
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(metadata)})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, use_dictionary=False) as writer:
        if shard.rows:  # `datasets` refuses a group without rows, which is what no rows would make
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _parquet_metadata(file: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    with file.open("rb") as opened:  # pyarrow itself opens nothing in a folder whose name is no text
        return json.loads(pq.read_schema(opened).metadata[KEY.encode()])


def _to_safetensors(shard: Shard) -> bytes:
    from safetensors.torch import save

    metadata = {"images": len(shard.rows), "unreadable": shard.unreadable, "names": shard.names}
    tensors = {"embedding": shard.features, "row": torch.tensor(shard.rows, dtype=torch.int64, device="cpu")}
    return save(tensors, {KEY: json.dumps(metadata)})  # one entry, since entries come in any order


def _safetensors_metadata(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as opened:  # safetensors itself opens nothing in a folder whose name is no text
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(min(length, size)))
    metadata = header.pop("__metadata__")
    if 8 + length + max(tensor["data_offsets"][1] for tensor in header.values()) != size:
        raise ValueError("it is cut short")
    return json.loads(metadata[KEY])


FORMATS: dict[str, tuple[Callable[[Shard], bytes], Callable[[Path], dict[str, Any]]]] = {
    "parquet": (_to_parquet, _parquet_metadata),
    "safetensors": (_to_safetensors, _safetensors_metadata),
}
"""By a file's ending: what writes it, and what reads from it how many `images` it has and which are `unreadable`."""


class Shards:
    """The files of one collection: which images each is of, which are there, and the manifest beside them."""

    def __init__(self, folder: Path, format: str, images: int, size: int) -> None:
        self._folder, self._images, self._size = folder, images, size
        self._to_bytes, self._metadata_of = FORMATS[format]
        count = -(-images // size)
        # So called, `datasets` takes them for the split "train", and nothing else in the folder.
        self.files = [folder / f"train-{number:05}-of-{count:05}.{format}" for number in range(count)]

    def rows(self, number: int) -> range:
        """The numbers of the images of a file."""
        return range(number * self._size, min((number + 1) * self._size, self._images))

    def missing(self, is_in_reach: Callable[[int], bool]) -> list[int]:
        """This process's share of the files to make: those that are not there, and those that lack images which were
        out of reach and can be read now, as `is_in_reach` says of a row.
        """
        index, processes = place()

        def is_missing(file: Path) -> bool:
            if not file.exists():
                return True
            return any(AGAIN in image and is_in_reach(image["row"]) for image in self._contents_of(file)[1])

        # The main process looks, so that all share out the same list, while some write files already.
        missing = in_main(lambda: [number for number, file in enumerate(self.files) if is_missing(file)])
        if missing and len(self.files) < processes and index == 0:
            warnings.warn(
                f"{self._images} images make {len(self.files)} files of up to {self._size}, fewer than the {processes} "
                "processes, of which the others have nothing to do; a smaller shard_size makes more.",
                stacklevel=3,
            )
        return missing[index::processes]

    def write(self, number: int, shard: Shard) -> None:
        """Writes a file, whole or not at all. A file that has more images already stays, with a warning."""
        file = self.files[number]
        if file.exists() and (before := self._contents_of(file)[0]) > len(shard.rows):
            warnings.warn(
                f"{file} stays as it is: it has {before} images, of which {len(shard.rows)} alone could be had now.",
                stacklevel=6,
            )
            return
        write_files(self._folder, {file.name: self._to_bytes(shard)})

    def begin(self, of: dict[str, Any]) -> None:
        """Writes the manifest, or checks that an earlier run wrote the same.

        Raises:
            ValueError: the folder holds something else, or processes see different images or models.
        """
        all_of = gathered(lambda: of)
        everywhere(lambda: require_same(all_of))
        everywhere(lambda: self._require_own(of))
        in_main(lambda: self._claim(of))  # no file without a manifest

    def _claim(self, of: dict[str, Any]) -> None:
        """Writes the manifest if there still is none."""
        with saving(self._folder) as save:
            save.write({MANIFEST: _encoded({"of": of})})
            is_new = save.place_new(MANIFEST)
        self._require_own(of)
        if not is_new and not all(file.exists() for file in self.files):
            self._write_manifest({"of": of})  # that of a run that had ended tells of files which are gone

    def _require_own(self, of: dict[str, Any]) -> None:
        manifest = self._folder / MANIFEST
        if not manifest.exists():
            if any(self._folder.glob("train-*")):
                raise ValueError(f"{self._folder} holds train-* files and no {MANIFEST}; name another folder.")
            return
        earlier = _read_manifest(manifest)
        if earlier != of:
            raise ValueError(
                f"{self._folder} holds features of another run ({difference(earlier, of)}); name another folder, or "
                "delete it."
            )

    def _read_all(self) -> tuple[int, list[dict[str, Any]]]:
        """How many images all files have together, and which could not be read."""
        missing = [file.name for file in self.files if not file.exists()]
        if missing:
            raise FileNotFoundError(
                f"{self._folder} lacks {len(missing)} of {len(self.files)} files, such as {missing[0]}, which other "
                "processes should have written; expected one folder that all see."
            )
        contents = [self._contents_of(file) for file in self.files]
        return sum(images for images, _ in contents), [image for _, unreadable in contents for image in unreadable]

    def _contents_of(self, file: Path) -> tuple[int, list[dict[str, Any]]]:
        try:
            metadata = self._metadata_of(file)
            return metadata["images"], metadata["unreadable"]
        except Exception as error:  # of a damaged file libraries raise nearly anything
            raise ValueError(
                f"{file} does not say what `embed` writes into its metadata, as if it was damaged or written anew by "
                f"something else ({type(error).__name__}: {error}); delete it, and the same call makes it again."
            ) from error

    def end(self, of: dict[str, Any], values: int) -> tuple[int, list[dict[str, Any]]]:
        """Completes the manifest once all files are there.

        Returns:
            How many images all files have together, and which could not be read.

        Raises:
            OSError: some are not there, for example because each machine has a folder of its own.
        """
        (images, unreadable), _ = everywhere(self._read_all)
        everywhere(lambda: self._require_own(of))
        in_main(lambda: self._write_manifest({"of": of, "images": images, "values": values, "unreadable": unreadable}))
        return images, unreadable

    def _write_manifest(self, content: dict[str, Any]) -> None:
        write_files(self._folder, {MANIFEST: _encoded(content)})


def _encoded(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["of"]
        if not isinstance(found, dict):
            raise TypeError(f"`of` is a {type(found).__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is no manifest of features ({error}); name another folder.") from error
    return found
