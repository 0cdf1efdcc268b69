"""A log of what an evaluation measured of each batch, by which an interrupted evaluation is resumed.

A folder holds a file of JSON lines for each process. A line is a batch, or says which evaluation the batches after it
are of. A line that a kill cut short is ignored.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checks import is_int, is_number
from .labelled_images import Sample
from .printable import difference, shown
from .token_count import TokenCount
from .whole_saves import naming


@dataclasses.dataclass
class Batch:
    """What was seen and measured of one batch of images."""

    number: int
    samples: list[Sample]
    """The images that could be read, without their pixels."""
    unreadable: list[str]
    """Name and reason of each image that could not be read."""
    answers: list[dict[str, Any]]
    """For each model, by name: a list or a tensor with an entry for each sample."""
    counts: list[TokenCount]
    """For each model."""
    seconds: list[float]
    """For each model, the seconds that its answers took."""


class BatchLog:
    """The batches that were measured before, and a file for those that this process adds.

    Earlier batches with an image that could not be read are left out.

    Args:
        folder: made if it is not there.
        process: the number of this process.
        of: what batches must have in common to belong together, as JSON holds it.

    Raises:
        ValueError: the folder holds batches of something else.
        OSError: it cannot be read or written.
    """

    def __init__(self, folder: Path, process: int, of: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        batches = (batch for file in sorted(folder.glob("evaluate-*.jsonl")) for batch in _read(file, of))
        # An image that could not be read may be readable now, as on a disk that was not there.
        self.before = {batch.number: batch for batch in batches if not batch.unreadable}
        self._path = folder / f"evaluate-{process}.jsonl"
        self._file = self._path.open("ab")
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that was cut short
        self._write({"of": of})

    def add(self, batch: Batch) -> None:
        """Writes a batch to the file of this process."""
        answers = [{name: _to_json(values) for name, values in by_name.items()} for by_name in batch.answers]
        self._write({**vars(batch), "answers": answers, "counts": [vars(count) for count in batch.counts]})

    def close(self) -> None:
        with naming(self._path):  # what a full disk did not take is written once more
            self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        with naming(self._path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()


def _read(file: Path, of: dict[str, Any]) -> Iterator[Batch]:
    known = False
    for line in file.read_bytes().splitlines():
        try:
            try:
                content = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            if "of" in content:
                if content["of"] != of:
                    raise ValueError(f"it is of another evaluation: {difference(content['of'], of)}")
                known = True
                continue
            if not known:
                raise ValueError("it does not say what its batches are of")
            yield _batch(content)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{file} holds no batches of this evaluation ({error}); name another folder, or delete {file.parent}."
            ) from error


def _batch(content: dict[str, Any]) -> Batch:
    samples = [Sample._make(fields) for fields in content["samples"]]
    samples = [sample._replace(captions=tuple(sample.captions)) for sample in samples]
    answers = [{name: _from_json(values) for name, values in by_name.items()} for by_name in content["answers"]]
    counts = [TokenCount(**count) for count in content["counts"]]
    batch = Batch(**content | {"samples": samples, "answers": answers, "counts": counts})
    of_each_image = [values for by_name in answers for values in by_name.values()]
    models = len(counts) if samples else 0  # of no image there are no answers
    if (
        len(counts) != len(batch.seconds)
        or len(answers) != models
        or any(len(values) != len(samples) for values in of_each_image)
    ):
        raise ValueError(f"batch {shown(batch.number)} has no answer of each model for each image")
    if not is_int(batch.number) or not all(map(is_number, batch.seconds)) or not isinstance(batch.unreadable, list):
        raise ValueError(f"batch {shown(batch.number)} has a number, seconds or names of another type than are written")
    return batch


def _to_json(values: Any) -> Any:
    if not isinstance(values, torch.Tensor):
        return values
    array = values.numpy()
    return {"dtype": array.dtype.str, "shape": array.shape, "values": base64.b64encode(array.tobytes()).decode()}


def _from_json(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    array = np.frombuffer(base64.b64decode(values["values"]), np.dtype(values["dtype"]))
    return torch.from_numpy(array.reshape(values["shape"]).copy())
