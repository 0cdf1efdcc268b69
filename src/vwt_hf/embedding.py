"""`embed`: writes the features of every image of a collection into files; an interrupted run can go on."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .answers import answer, are_finite, classifies, on_device, require_finite
from .checks import require_whole
from .compress import require_whole_images, setting_of
from .data_loading import token_lengths
from .decoding import UnreadableImage, read_image
from .embedded_files import AGAIN, FORMATS, Shard, Shards
from .families import family_of, find_tower, model_of
from .forward import forward_within
from .image_processing import HostTokenizer
from .image_source import ImageRows, image_rows
from .plans import PATCH_WORDS
from .printable import shown
from .processed_images import one_batch, processed
from .processes import everywhere, gathered, join, place, usable_cores
from .processors import described_processor, processor_of, without_words
from .provenance import compression_of, run_of
from .timing import return_memory
from .token_count import count_tokens
from .weights import require_unsharded
from .whole_saves import require_folder

FORMAT = 4
"""Of the manifest and the files."""
MOST_AGAIN = 16
"""A file is not made if it has at least this many images and all are out of reach."""
WINDOW = 16
"""Batches that are sorted together, so that each has images of about the same length."""
_UNGUARDED = (
    "embed starts processes that read images. Where these are not forked (macOS, Windows, Python 3.14), each runs the "
    'program\'s file again: call embed below `if __name__ == "__main__":`, or give workers=0.'
)

Batch = tuple[list[int], dict[str, torch.Tensor]]
"""Rows of images, and what the image processor made of them."""


@dataclasses.dataclass
class Embedded:
    """What lies in a folder that `embed` wrote, and what its last run took."""

    images: int
    """Rows in all files: the images that could be read."""
    unreadable: list[dict[str, Any]]
    """`row`, `name` and `reason` of each image that could not be read; `again` of those that were out of reach."""
    values: int
    """Numbers in an image's features."""
    files: list[Path]
    made: int
    """Images that this run read, unreadable ones included; the files of the others were there already."""
    embedded: int
    """Images that this run made features of."""
    tokens: float | None
    """Of an image of this run, mean over images and layers, prefix tokens included; `None` if it made none."""
    processes: int
    elapsed: float
    """Seconds of this run, of the slowest process."""
    busy: float
    """Seconds of this run without waiting for images, of the process that has most."""
    seconds: dict[str, float]
    """Seconds of this run, summed over processes: `total`, of which `waiting` for images, `forward` and `writing`; and
    `reading`, which workers spend on reading and processing images at the same time (without workers: in `waiting`)."""

    @property
    def rate(self) -> float:
        """Images per second of this run, unreadable ones left out."""
        return self.embedded / self.elapsed

    @property
    def rate_without_reading(self) -> float:
        """Images per second of the time without waiting for images: as if all had been decoded and processed before."""
        return self.embedded / self.busy


def embed(
    model: PreTrainedModel,
    images: Any,
    output: str | os.PathLike[str],
    *,
    image_processor: Any = None,
    column: str | None = None,
    batch_size: int = 32,
    shard_size: int = 1024,
    format: str = "parquet",
    workers: int | None = None,
    progress: bool = True,
) -> Embedded:
    """Writes the features of every image of a folder or data set into files; the same call resumes a run.

    The files in `output` are `train-00000-of-00012.parquet` and so on, in the images' order, with the columns `name`
    (path below the folder; of a data set `__key__` or the path that it has for the image), `row` (number of the image)
    and `embedding` (`values` float32): the image embedding of models of two towers, else the pooled output, else CLS
    or, without one, the mean of the tokens. Images that cannot be read have no row; they are in `embed.json`, which
    also says what the files were made with. Each file is written whole or not at all: the same call again makes those
    that are missing, and those that lack images which were out of reach, as on a drive that was gone. It is refused
    with another model, setting, processor, list of images, attention, kind of device, or version of a library.

    Under `accelerate launch`, or in any program of several processes, all have to make this call, with one folder that
    all see, and each makes its share of the missing files (`vwt_hf.processes.join` says how they are joined).

    Args:
        model: a transformers model of a supported family, plain or compressed, in the mode of evaluation, on the device
            and in the data type that it is to run in.
        images: a folder, searched through all levels, or a `datasets.Dataset`.
        output: a folder, made if need be.
        image_processor: the model's; by default that of the checkpoint it was loaded from.
        column: the data set's image column; by default its first.
        batch_size: images in one forward pass.
        shard_size: images of a file, which one process makes: there should be a file for each process at least. A kill
            loses at most one file for each.
        format: `"parquet"`, or `"safetensors"`: tensors `embedding` (images, values) and `row` (images,), and names in
            the metadata, `json.loads(metadata["vwt_hf"])["names"]`.
        workers: processes that read images, beside each that runs the model; 0: none. By default as many as cores
            may be used, at most 4. On macOS, Windows and Python 3.14 they run the file of your program again: make this
            call below `if __name__ == "__main__":`.
        progress: whether to show a bar.

    Raises:
        ValueError: an argument is not valid, the model is not supported, classifies, is in training, leaves patches out
            at random or gives NaN or infinity for an image, there are no images, or `output` holds another run's files.
        TypeError: `model` is no transformers model, or `images` neither a folder nor a data set.
        OSError: a file cannot be written, or processes wrote into different folders; or, once the other files are made,
            all images of one (16 or more) are out of reach.
        RuntimeError: a worker ended, as where it ran a file that makes this call again.

    Example:
        >>> made = embed(model, "photographs/", "features")  # doctest: +SKIP
        >>> datasets.load_dataset("parquet", data_dir="features", split="train")[0]  # doctest: +SKIP
        {'name': 'cats/1.jpg', 'row': 0, 'embedding': [0.3, ...]}
    """
    if workers != 0 and getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker that begins
        raise RuntimeError(_UNGUARDED)
    workers = min(4, usable_cores()) if workers is None else workers

    def begin() -> tuple[Any, Trial, ImageRows, dict[str, Any]]:
        for name, value in {"batch_size": batch_size, "shard_size": shard_size}.items():
            require_whole(name, value)
        require_whole("workers", workers, least=0)
        if format not in FORMATS:
            raise ValueError(f"format is {shown(format)}; expected one of {', '.join(map(repr, FORMATS))}.")
        require_features(model)
        processor = _with_words(processor_of(model, image_processor), model, finds=False)
        require_folder(output)
        trial = _try(model, processor)
        rows = image_rows(images, column)
        of = _fingerprint(model, processor, rows) | {"shard_size": shard_size, "files": format}
        return processor, trial, rows, of

    join(model_of(model).device)
    (processor, trial, rows, of), _ = everywhere(begin)
    shards = Shards(Path(output), format, len(rows), shard_size)
    shards.begin(of)

    if trial.pads:
        processor = _with_words(processor, model, finds=True)
    run = _Run(model, processor, batch_size, WINDOW if trial.pads or trial.sizes_differ else 1)
    numbers = shards.missing(lambda row: _is_in_reach(rows, row))
    total = sum(len(shards.rows(number)) for number in numbers)

    def make() -> None:
        hidden = not progress or place()[0] > 0
        with run.timed("total"), tqdm(total=total, desc="Embedding", unit="image", disable=hidden) as bar:
            out_of_reach = _write(run, run.shards(rows, numbers, shards, workers, trial.values, bar), shards)
        if out_of_reach:
            raise OSError(
                f"{len(out_of_reach)} images could not be had, from {out_of_reach[0]['name']} on "
                f"({out_of_reach[0]['reason']}), and no file was made of them. Once they are in reach, the same call "
                "makes it."
            )

    everywhere(make)
    return _embedded(shards, *shards.end(of, trial.values), trial.values, run)


def _write(run: _Run, made: Iterator[tuple[int, Shard]], shards: Shards) -> list[dict[str, Any]]:
    """Writes files, but for those of which all images are out of reach, and returns these images."""
    out_of_reach = []
    for number, shard in made:
        lacking = [image for image in shard.unreadable if AGAIN in image]
        if len(lacking) == len(shards.rows(number)) >= MOST_AGAIN:
            out_of_reach += lacking
            continue
        with run.timed("writing"):
            shards.write(number, shard)
        return_memory()
    return out_of_reach


def _embedded(shards: Shards, images: int, unreadable: list[dict[str, Any]], values: int, run: _Run) -> Embedded:
    """What lies in the folder, and what all processes took."""
    work = (run.images, run.embedded, run.tokens, run.seconds)
    read, embedded, tokens, times = zip(*gathered(lambda: work), strict=True)
    return Embedded(
        images=images,
        unreadable=unreadable,
        values=values,
        files=shards.files,
        made=sum(read),
        embedded=sum(embedded),
        tokens=sum(tokens) / sum(embedded) if sum(embedded) else None,
        processes=len(times),
        elapsed=max(seconds["total"] for seconds in times),
        busy=max(seconds["total"] - seconds["waiting"] for seconds in times),
        seconds={what: sum(seconds[what] for seconds in times) for what in run.seconds},
    )


class ReadBatch(NamedTuple):
    """What a worker made of consecutive images."""

    names: dict[int, str]
    """By row, of the images that could be read."""
    batches: list[tuple[list[int], dict[str, np.ndarray]]]
    """As `Batch`, of arrays, which go through pipes: tensors need shared memory, of which containers have little."""
    unreadable: list[dict[str, Any]]
    seconds: float


class Reader(Dataset[ReadBatch]):
    """Reads and processes images, in any process: `reader[range(32)]` is a batch."""

    def __init__(self, rows: ImageRows, image_processor: Any) -> None:
        self._rows, self._image_processor = rows, image_processor

    def __getitem__(self, numbers: range) -> ReadBatch:
        begun = time.perf_counter()
        names: dict[int, str] = {}
        images: list[Batch] = []
        unreadable = []
        for row in numbers:
            name, item = self._rows[row]
            try:
                images.append(([row], processed(item, self._image_processor, name)))
                names[row] = name
            except UnreadableImage as error:  # one is no reason to lose a run of hours
                known = {"row": row, "name": name, "reason": str(error)}
                unreadable.append(known | ({AGAIN: True} if error.is_out_of_reach else {}))
        alike = _alike(images, len(numbers), self._image_processor)
        batches = [(rows, {name: value.numpy() for name, value in own.items()}) for rows, own in alike]
        return ReadBatch(names, batches, unreadable, time.perf_counter() - begun)


def _alike(made: Sequence[Batch], size: int, image_processor: Any) -> Iterator[Batch]:
    """Batches of at most `size` images of one shape; those with the most tokens come first if words tell how many."""
    images = []
    for rows, values in made:
        lengths = token_lengths(values[PATCH_WORDS]) if PATCH_WORDS in values else [0] * len(rows)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            single = {name: value[index : index + 1] for name, value in values.items()}
            images.append((single["pixel_values"].shape, -length, row, single))
    images.sort(key=lambda image: image[:3])
    for _, same in itertools.groupby(images, key=lambda image: image[0]):
        while some := list(itertools.islice(same, size)):
            yield [image[2] for image in some], one_batch([image[3] for image in some], image_processor)


class _Run:
    """The work of one process, and where its time goes."""

    def __init__(self, model: PreTrainedModel, image_processor: Any, batch_size: int, window: int) -> None:
        self._model, self._image_processor = model, image_processor
        self._batch_size, self._window = batch_size, window
        self.seconds = dict.fromkeys(("total", "waiting", "forward", "writing", "reading"), 0.0)
        self.images = 0
        """Read, unreadable ones included."""
        self.embedded, self.tokens = 0, 0.0
        """Images that the model saw, and the sum of their tokens (means over layers)."""

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - begun

    def shards(
        self, rows: ImageRows, own: Sequence[int], shards: Shards, workers: int, values: int, bar: Any
    ) -> Iterator[tuple[int, Shard]]:
        """Reads and embeds the images of the files `own`, one file after the other."""
        size = self._batch_size
        batches: Any = (
            range(start, min(start + size, shard.stop)) for shard in map(shards.rows, own) for start in shard[::size]
        )
        workers = workers if own else 0
        loader: Any = DataLoader(
            Reader(rows, self._image_processor),
            batch_size=None,
            sampler=batches,  # a batch is what the reader has by one index
            num_workers=workers,
            worker_init_fn=functools.partial(_begin_worker, **_reading_limits()),
            collate_fn=_as_it_is,
            # A window is read while the model runs on the one before.
            prefetch_factor=max(2, -(-self._window // workers)) if workers else None,
            generator=torch.Generator(),  # of seeds that nothing uses, which it would draw from the caller's
        )
        with self.timed("waiting"), torch.device("cpu"):  # whatever torch's default is: it draws a seed
            stream = iter(loader)
        try:
            for number in own:
                yield number, self._shard(stream, len(shards.rows(number)), values, bar)
        except RuntimeError as error:
            # As by a system that is out of memory. In other threads than the main one torch does not say so.
            killed = "killed by signal" in str(error.__cause__)
            killed |= any((worker.exitcode or 0) < 0 for worker in getattr(stream, "_workers", ()))
            if "exited unexpectedly" in str(error) and not killed and multiprocessing.get_start_method() != "fork":
                raise RuntimeError(f"{error}. {_UNGUARDED}") from error
            raise

    def _shard(self, stream: Iterator[ReadBatch], count: int, values: int, bar: Any) -> Shard:
        names: dict[int, str] = {}
        unreadable: list[dict[str, Any]] = []
        order: list[int] = []
        features = [torch.zeros(0, values, dtype=torch.float32, device="cpu")]
        left = -(-count // self._batch_size)
        while left:
            with self.timed("waiting"):
                reads = list(itertools.islice(stream, min(left, self._window)))
            left -= len(reads)
            for read in reads:
                names |= read.names
                unreadable += read.unreadable
                self.seconds["reading"] += read.seconds
            batches = [
                (rows, {name: torch.from_numpy(value) for name, value in made.items()})
                for read in reads
                for rows, made in read.batches
            ]
            if self._window > 1:
                batches = list(_alike(batches, self._batch_size, self._image_processor))
            for rows, made in batches:
                features.append(self._features(made))
                require_finite(self._model, are_finite(features[-1]), [names[row] for row in rows])
                order += rows
                bar.update(len(rows))
                bar.set_postfix_str(f"{self.tokens / self.embedded:.1f} tokens", refresh=False)
        bar.update(len(unreadable))
        self.images += count
        by_row = dict(zip(order, torch.cat(features), strict=True))
        rows = sorted(by_row)
        together = torch.stack([by_row[row] for row in rows]) if rows else features[0]
        return Shard([names[row] for row in rows], rows, together, unreadable)

    def _features(self, made: dict[str, torch.Tensor]) -> torch.Tensor:
        with self.timed("forward"), torch.no_grad(), count_tokens(self._model) as count:
            features = answer(self._model, **on_device(made, self._model)).float().cpu()
        self.embedded += count.images
        self.tokens += count.mean * count.images
        return features


def _is_in_reach(rows: ImageRows, row: int) -> bool:
    name, item = rows[row]
    try:
        read_image(item, name)
    except UnreadableImage as error:
        return not error.is_out_of_reach
    return True


def _as_it_is(read: Any) -> Any:
    return read


def _reading_limits() -> dict[str, Any]:
    """What a program told Pillow: whether it reads cut files, and of how many pixels an image may be."""
    return {"truncated": ImageFile.LOAD_TRUNCATED_IMAGES, "most_pixels": Image.MAX_IMAGE_PIXELS}


def _begin_worker(worker: int, truncated: bool, most_pixels: int | None) -> None:
    """Has a worker read by the limits of the process that began it, and end once that is killed."""
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = truncated, most_pixels
    threading.Thread(target=_end_when_killed, daemon=True).start()


def _end_when_killed() -> None:
    """Ends this worker once the process that began it is gone: it would wait forever for its images to be taken."""
    began_it, above = multiprocessing.parent_process(), os.getppid()
    # A fork server is above its workers and lives on; other forks may keep open what tells of the process.
    while began_it is not None and began_it.is_alive() and os.getppid() == above:
        time.sleep(1)
    os._exit(1)


class Trial(NamedTuple):
    """What a first image shows of a model and its image processor."""

    values: int
    """Numbers in an image's features."""
    pads: bool
    """Whether batches of images of different lengths are padded."""
    sizes_differ: bool
    """Whether the image processor gives images of different proportions different sizes."""


def require_features(model: PreTrainedModel) -> None:
    """Refuses a model that classifies, is in training, drops patches at random, or is spread over several processes."""
    require_unsharded(model)
    if classifies(model):
        raise ValueError(
            f"the {type(model).__name__} answers with labels; expected a model without a classifier, as "
            "AutoModel.from_pretrained loads it."
        )
    if model.training:
        raise ValueError(f"the {type(model).__name__} is in training, where answers are random; call model.eval().")
    family = family_of(model)
    require_whole_images(find_tower(model, family), family)


def _try(model: PreTrainedModel, image_processor: Any) -> Trial:
    """Runs the model on a blank picture, so that what cannot be run is refused before images are read."""
    wide, high = (
        processed(Image.new("RGB", size, "grey"), image_processor, "a blank picture")
        for size in ((320, 240), (240, 320))
    )
    padded = []

    def look(embeddings: nn.Module, args: Any, output: Any) -> None:
        forward = forward_within(embeddings)
        if forward is not None and forward.grouped is not None:
            padded.append(not forward.grouped.layout.packed)

    embeddings = find_tower(model, family_of(model)).embeddings
    with embeddings.register_forward_hook(look), torch.no_grad():
        features = answer(model, **on_device(wide, model))
    if len(features) != 1:
        raise ValueError(
            f"the {type(model).__name__} gives {tuple(features.shape)} for an image; expected features of shape "
            "(1, values). Give a model of images alone, such as its vision tower."
        )
    return Trial(features.shape[1], any(padded), wide["pixel_values"].shape != high["pixel_values"].shape)


def _with_words(image_processor: Any, model: PreTrainedModel, finds: bool) -> Any:
    """The image processor for a model: as it is or, if the model searches words, one that finds them, or finds none."""
    setting = setting_of(model)
    if setting is None or not setting.searches:
        return image_processor
    if not finds:
        return without_words(image_processor)
    copied = copy.deepcopy(image_processor)
    tower = find_tower(model, family_of(model))
    copied.vwt = HostTokenizer(setting, tower.patch_size, channels=tower.channels)
    return copied


def _fingerprint(model: PreTrainedModel, image_processor: Any, rows: ImageRows) -> dict[str, Any]:
    """What the files of one collection must have in common."""
    by = compression_of(model) | {"image_processor": described_processor(image_processor)} | _reading_limits()
    return run_of(model, FORMAT, **by, images=rows.order)
