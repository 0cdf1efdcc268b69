"""Reading words from a file that a stranger may have written, safetensors or what `torch.save` writes.

What a file claims is first checked against its length, so that it cannot take more memory than it is long. Then it is
read piece by piece into float32, so that memory holds the words and little else.
"""

from __future__ import annotations

import collections
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checks import is_int
from ..printable import printable, shown

MOST_BYTES = 2**32
"""The most bytes of words in float32: 1.4 million words of 16×16 RGB pixels."""
_MOST_HEADER_BYTES = 2**16
_PIECE = 2**20
"""Values that are converted at once."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
"""Bits of a value, by dtype of the format."""

_MOST_RECORDS = 64
_MOST_PICKLE_BYTES = 2**12
# What torch.save writes for one tensor, and nothing that could make an object of another kind or fill memory.
_OPCODES = {
    "PROTO", "GLOBAL", "BINPUT", "BINGET", "MARK", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPERSID", "NEWTRUE", "NEWFALSE", "REDUCE", "STOP",
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
}  # fmt: skip


def read_safetensors(
    path: Path, shape: tuple[Any, ...], sha256: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Words, float32 of `shape`, and frequencies (size,) int64 if the file has them.

    Args:
        shape: (size, channels, p, p) that the words must have.
        sha256: of the file, in hexadecimal; `None` if it is not known.

    Raises:
        ValueError: the file is damaged, holds something else, or is another than that of `sha256`.
    """
    with open(path, "rb") as file:
        try:
            start, header = _header(file)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"it is truncated or no safetensors file ({printable(str(error))[:200]}); save or download it again"
            ) from error
        words, counts = _described_tensors(header, shape)
        if sha256 is not None:
            _require_content(file, sha256)
        read = _values(file, start, words, _DTYPES[words["dtype"]], torch.float32)
        return read, None if counts is None else _values(file, start, counts, torch.int64, torch.int64)


def _header(file: io.BufferedReader) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where the tensors of a safetensors file begin, and what its header says about each.

    The package safetensors maps whole files into memory, so it cannot read one piece by piece.

    Raises:
        ValueError: the tensors that the header describes are not all bytes of the file, each once.
        TypeError, KeyError, RecursionError: there is no valid header.
    """
    length = os.fstat(file.fileno()).st_size
    size = int.from_bytes(_exactly(file, 8), "little")
    if size > _MOST_HEADER_BYTES:
        raise ValueError(f"its header claims {size:,} bytes; expected {_MOST_HEADER_BYTES:,} at most")
    header = json.loads(_exactly(file, size).decode("utf-8"))
    if not isinstance(header, dict):
        raise TypeError(f"its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    end = 0
    for name, tensor in sorted(header.items(), key=lambda named: named[1]["data_offsets"]):
        begin, stop = tensor["data_offsets"]
        shape, bits = tensor["shape"], _BITS.get(tensor["dtype"])
        if bits is None:
            raise ValueError(f"the dtype of {shown(name)} is {shown(tensor['dtype'])}")
        if not isinstance(shape, list) or not all(map(_count, (begin, stop, *shape))):
            raise ValueError(f"the shape or the offsets of {shown(name)} are no lists of integers")
        if begin != end or 8 * (stop - begin) != math.prod(shape) * bits:
            raise ValueError(f"the values of {shown(name)}, {shown(shape)}, are not the bytes {begin} to {stop}")
        end = stop
    if 8 + size + end != length:
        raise ValueError(f"its header tells of {8 + size + end:,} bytes, and it has {length:,}")
    return 8 + size, header


def _described_tensors(
    tensors: dict[str, dict[str, Any]], shape: tuple[Any, ...]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the header says about words and frequencies; raises `ValueError` if that is not what is expected."""
    names = list(tensors)
    if "words" not in names:
        raise ValueError(f"it has no tensor 'words', only {_listed(names)}")
    if not set(names) <= {"words", "frequencies"}:
        raise ValueError(f"it has the tensors {_listed(names)}; expected 'words', and at most 'frequencies' beside it")
    words, counts = tensors["words"], tensors.get("frequencies")
    if words["dtype"] not in _DTYPES:
        raise ValueError(f"words are {shown(words['dtype'])}; expected floating point: {', '.join(_DTYPES)}")
    words_shape = tuple(words["shape"])
    if words_shape != shape:
        raise ValueError(f"words have shape {shown(words_shape)}, but vocabulary.json says {shown(shape)}")
    _require_bytes(math.prod(words_shape))
    if counts is not None and (counts["dtype"] != "I64" or tuple(counts["shape"]) != words_shape[:1]):
        raise ValueError(
            f"frequencies are {shown(counts['dtype'])} of shape {shown(tuple(counts['shape']))}; "
            f"expected I64 {words_shape[:1]}"
        )
    return words, counts


def _require_content(file: io.BufferedReader, sha256: str) -> None:
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"it is not the file that vocabulary.json was written for: its sha256 is {digest.hexdigest()}, expected "
            f"{sha256}; save or download both again"
        )


def _values(
    file: io.BufferedReader, start: int, told: dict[str, Any], stored: torch.dtype, dtype: torch.dtype
) -> torch.Tensor:
    """A tensor as its file's header has `told`, read piece by piece. The tensors begin at `start`."""
    file.seek(start + told["data_offsets"][0])
    read = torch.empty(told["shape"], dtype=dtype, device="cpu")
    for part in read.view(-1).split(_PIECE):
        if len(part):
            part.copy_(torch.frombuffer(bytearray(_exactly(file, len(part) * stored.itemsize)), dtype=stored))
    return read


def _listed(names: list[str]) -> str:
    return ", ".join(shown(name).strip("'") for name in names[:5]) + (", …" if len(names) > 5 else "") or "none"


def _require_bytes(values: int) -> None:
    if 4 * values > MOST_BYTES:
        raise ValueError(f"its words take {4 * values:,} bytes in float32; expected {MOST_BYTES:,} at most")


class _Stored(NamedTuple):
    """A record that holds a tensor's values."""

    key: str
    dtype: torch.dtype
    values: int


class _Tensor(NamedTuple):
    """A tensor as a pickle describes it; its values are elsewhere."""

    stored: _Stored
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_bare_tensor(path: Path, shape: tuple[int, ...], scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The one tensor (size, values) of a file that `torch.save` wrote, as values · scale + shift in float32.

    Args:
        shape: of one row; the result is (size, *shape).
        scale, shift: float64, to broadcast over `shape`.

    Raises:
        ValueError: the file is damaged, holds anything else, or would take more memory than it is long.
    """
    values = math.prod(shape)
    expected = (
        f"expected one float tensor (size, {values}), 16×16 RGB patches normalised as CLIP's, as torch.save writes"
    )
    try:
        _require_short_directory(path)
        with zipfile.ZipFile(path) as archive:
            records = _records(archive, path.stat().st_size)
            tensor = _tensor_in(archive.read(records["data.pkl"]))
            record = _record_of(tensor, values, records)
            read = torch.empty(tensor.shape[0], *shape, dtype=torch.float32, device="cpu")
            with archive.open(record) as file:
                for part in read.split(max(1, _PIECE // values)):
                    raw = bytearray(_exactly(file, part.numel() * tensor.stored.dtype.itemsize))
                    part.copy_(torch.frombuffer(raw, dtype=tensor.stored.dtype).view_as(part).double() * scale + shift)
        return read
    except _Another as error:
        raise ValueError(f"{error}; {expected}") from error
    except Exception as error:  # whatever zipfile, zlib and pickle raise on what is no such file
        reason = printable(str(error).strip())[:200] or type(error).__name__
        raise ValueError(f"it cannot be read as tensors alone, and nothing else is ({reason}); {expected}") from error


class _Another(ValueError):
    """The file is whole, but holds something else."""


def _require_short_directory(path: Path) -> None:
    """Refuses a zip with a longer list of records than one tensor needs: the list is read as a whole."""
    length = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, length - 98))
        tail = file.read(98)
    end = tail[-22:]
    if len(end) < 22 or end[:4] != b"PK\5\6" or end[20:] != b"\0\0":
        raise ValueError("it does not end as a file that torch.save wrote")
    size = int.from_bytes(end[12:16], "little")
    if tail[-42:-38] == b"PK\6\7":  # zip64, whose larger numbers are right before the end
        if tail[:4] != b"PK\6\6" or int.from_bytes(tail[-34:-26], "little") != length - 98:
            raise ValueError("it does not end as a file that torch.save wrote")
        size = int.from_bytes(tail[40:48], "little")
    if size > _MOST_HEADER_BYTES:
        raise _Another(f"its list of records takes {size:,} bytes, and that of one tensor is short")


def _records(archive: zipfile.ZipFile, length: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's records, by their names within its one folder."""
    entries = archive.infolist()
    if len(entries) > _MOST_RECORDS:
        raise _Another(f"it has {len(entries)} records, and one tensor has {_MOST_RECORDS} at most")
    for record in entries:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise _Another(f"its record {shown(record.filename)} is compressed, which torch.save does not do")
        if record.file_size > length:
            raise _Another(f"its record {shown(record.filename)} claims more bytes than the file has")
    records = {record.filename.partition("/")[2]: record for record in entries}
    if len(records) != len(entries) or "data.pkl" not in records:
        raise _Another("its records are not those of a file that torch.save wrote")
    if records["data.pkl"].file_size > _MOST_PICKLE_BYTES:
        raise _Another("it holds a description that is longer than one tensor's")
    if "byteorder" in records and archive.read(records["byteorder"])[:16] != b"little":
        raise _Another("it holds a tensor whose bytes are not in little-endian order")
    return records


def _tensor_in(pickled: bytes) -> _Tensor:
    """The tensor that a pickle describes. Nothing else is understood, and nothing is called but the functions below."""
    for opcode, _, _ in pickletools.genops(pickled):
        if opcode.name not in _OPCODES:
            raise _Another(f"it holds a pickle of more than one tensor ({opcode.name})")
    tensor = _Unpickler(io.BytesIO(pickled)).load()
    if not isinstance(tensor, _Tensor):
        raise _Another(f"it holds a {type(tensor).__name__}")
    return tensor


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuilt_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return _no_hooks
        raise ValueError(f"it asks for {module}.{name}")

    def persistent_load(self, saved: Any) -> _Stored:
        kind, dtype, key, _, values = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not _count(values):
            raise ValueError("it describes no storage")
        return _Stored(key, dtype, values)


def _no_hooks() -> dict[str, Any]:
    """The backward hooks of a saved tensor: none. Hashing a key for them could take forever, for nested tuples."""
    return collections.OrderedDict()


def _rebuilt_tensor(stored: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    """In place of `torch._utils._rebuild_tensor_v2`."""
    counts = isinstance(shape, tuple) and isinstance(stride, tuple) and all(map(_count, (offset, *shape, *stride)))
    if not isinstance(stored, _Stored) or not counts:
        raise ValueError("it describes no tensor")
    return _Tensor(stored, offset, shape, stride)


def _count(value: Any) -> bool:
    return is_int(value) and 0 <= value < 2**63


def _record_of(tensor: _Tensor, values: int, records: dict[str, zipfile.ZipInfo]) -> zipfile.ZipInfo:
    """The record of the tensor's values, if there is one value for each place, row by row."""
    dtype, shape = tensor.stored.dtype, tensor.shape
    if dtype not in _DTYPES.values() or len(shape) != 2 or shape[1] != values:
        raise _Another(f"it holds a {dtype} tensor {shown(shape)}")
    if tensor.offset or tensor.stride != (values, 1) or tensor.stored.values != math.prod(shape):
        raise _Another(
            f"it holds a tensor {shape} of stride {shown(tensor.stride)} in a storage of {tensor.stored.values:,} "
            "values, which is not one value for each place; save tensor.contiguous().clone()"
        )
    _require_bytes(math.prod(shape))
    record = records.get(f"data/{tensor.stored.key}")
    if record is None or record.file_size != math.prod(shape) * dtype.itemsize:
        raise _Another(f"it holds a tensor {shape} whose values are missing or too few")
    return record


def _exactly(file: Any, count: int) -> bytes:
    raw = file.read(count)
    if len(raw) != count:
        raise ValueError("it ends too early")
    return raw
