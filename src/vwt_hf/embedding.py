"""`embed`: the features of every image of a collection, in files that a run which was cut off goes on from."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from .families import family_of, find_tower, model_of
from .forward import forward_within
from .image_processing import HostTokenizer, without_words
from .image_source import ImageRows, UnreadableImage, image_rows, one_batch, processed, read_image
from .plans import PATCH_WORDS
from .printable import difference, shown
from .processes import everywhere, gathered, in_main, join, place
from .processors import described_processor, processor_of
from .provenance import compression_of, made_with
from .timing import return_memory
from .token_count import count_tokens
from .weights import fingerprint_of, require_unsharded
from .whole_saves import require_folder, saving, write_files

MANIFEST = "embed.json"
KEY = "vwt_hf"
"""The key in a file's metadata under which JSON says how many images it has, which could not be read and, in
safetensors, the names of all."""
FORMAT = 4
"""Of the manifest and the files."""
AGAIN = "again"
"""Key in the list of unreadable images: this one was out of reach, as on a drive that was gone, and a later run tries
it again."""
MOST_AGAIN = 16
"""A file is not made if all its images are out of reach and they are at least so many."""
WINDOW = 16
"""Batches among which images of like length are brought together."""

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
    """How many an image's features are."""
    files: list[Path]
    made: int
    """Images that this run read, unreadable ones included; the files of the others were there."""
    embedded: int
    """Images that this run made features of."""
    tokens: float | None
    """Of an image of this run, mean over images and layers, prefix tokens included; `None` if it made none."""
    processes: int
    elapsed: float
    """Seconds of this run, those of the slowest process."""
    busy: float
    """Seconds of this run that were no waiting for images, those of the process that had most."""
    seconds: dict[str, float]
    """Seconds of this run, summed over processes: `total`, of which `waiting` for images, `forward` and `writing`; and
    `reading`, which workers spend on reading and processing images at the same time (without workers: in `waiting`)."""

    @property
    def rate(self) -> float:
        """Images per second of this run, unreadable ones left out."""
        return self.embedded / self.elapsed

    @property
    def rate_without_reading(self) -> float:
        """Images per second if all had been decoded and processed before: of the time that is no waiting for them."""
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
    """Writes the features of every image of a folder or data set into files; a run that was cut off is gone on with.

    The files in `output` are `train-00000-of-00012.parquet` and so on, in the images' order, with the columns `name`
    (path below the folder; of a data set `__key__` or the path that it has for the image), `row` (number of the image)
    and `embedding` (`values` float32): the image embedding of models of two towers, else the pooled output, else CLS
    or, without one, the mean of the tokens. Images that cannot be read have no row; they are in `embed.json`, which
    also holds what the files were made by. Each file is written whole or not at all: the same call again makes those
    that are missing, and those that lack images which were out of reach, as of a drive that was gone. It is refused
    where it is of another model, setting, processor, list of images, attention, kind of device, or version of a
    library.

    Under `accelerate launch`, or in any program of several processes, each makes its share of the missing files, in one
    folder that all see, and all have to make this call. It joins those that are not joined yet: each then waits for the
    others for up to 30 days, in all that the program does.

    Args:
        model: a transformers model of a supported family, plain or compressed, in the mode of evaluation, on the device
            and in the data type that it is to run in.
        images: a folder, searched through all levels, or a `datasets.Dataset`.
        output: a folder, made if need be.
        image_processor: the model's; by default that of the checkpoint it was loaded from.
        column: the data set's image column; by default its first.
        batch_size: images in one forward pass.
        shard_size: images of a file: what a kill may lose for each process. One process makes a file, so that there
            should be at least as many files as processes.
        format: `"parquet"`, or `"safetensors"`: tensors `embedding` (images, values) and `row` (images,), and names in
            the metadata, `json.loads(metadata["vwt_hf"])["names"]`.
        workers: processes that read images, beside each that runs the model; 0: none. By default as many as there are
            cores, at most 4.
        progress: whether to show a bar.

    Raises:
        ValueError: an argument is not valid, the model is not supported, classifies, is in training, leaves patches out
            at random or gives NaN or infinity for an image, there are no images, or `output` holds something else.
        TypeError: `model` is no transformers model, or `images` neither a folder nor a data set.
        OSError: a file cannot be written, or processes wrote into different folders; or, once the other files are made,
            all images of one (16 or more) are out of reach.

    Example:
        >>> made = embed(model, "photographs/", "features")  # doctest: +SKIP
        >>> datasets.load_dataset("parquet", data_dir="features", split="train")[0]  # doctest: +SKIP
        {'name': 'cats/1.jpg', 'row': 0, 'embedding': [0.3, ...]}
    """
    workers = min(4, os.cpu_count() or 1) if workers is None else workers

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
    own = shards.missing(lambda row: _is_in_reach(rows, row))
    total = sum(len(shards.rows(number)) for number in own)

    def make() -> None:
        hidden = not progress or place()[0] > 0
        with run.timed("total"), tqdm(total=total, desc="Embedding", unit="image", disable=hidden) as bar:
            out_of_reach = []
            for number, shard in run.shards(rows, own, shards, workers, trial.values, bar):
                lacking = [image for image in shard.unreadable if AGAIN in image]
                if len(lacking) == len(shards.rows(number)) >= MOST_AGAIN:
                    out_of_reach += lacking
                    continue
                with run.timed("writing"):
                    shards.write(number, shard)
                return_memory()
        if out_of_reach:
            raise OSError(
                f"{len(out_of_reach)} images could not be had, from {out_of_reach[0]['name']} on "
                f"({out_of_reach[0]['reason']}), and no file was made of them. Once they are in reach, the same call "
                "makes it."
            )

    everywhere(make)
    return shards.end(of, run, trial.values)


class ReadBatch(NamedTuple):
    """What a worker made of consecutive images."""

    names: dict[int, str]
    """Of each row that could be read."""
    batches: list[tuple[list[int], dict[str, np.ndarray]]]
    """As `Batch`, but arrays, which a worker sends through a pipe: tensors need shared memory, of which containers have
    little."""
    unreadable: list[dict[str, Any]]
    seconds: float


class Reader(Dataset[ReadBatch]):
    """Reads and processes images, in any process: `reader[range(32)]` is a batch."""

    def __init__(self, rows: ImageRows, image_processor: Any) -> None:
        self._rows, self._image_processor = rows, image_processor

    def __getitem__(self, numbers: range) -> ReadBatch:
        begun = time.perf_counter()
        names: dict[int, str] = {}
        made: list[Batch] = []
        unreadable = []
        for row in numbers:
            name, item = self._rows[row]
            try:
                made.append(([row], processed(item, self._image_processor, name)))
                names[row] = name
            except UnreadableImage as error:  # one is no reason to lose a run of hours
                known = {"row": row, "name": name, "reason": str(error)}
                unreadable.append(known | ({AGAIN: True} if error.is_out_of_reach else {}))
        alike = _alike(made, len(numbers), self._image_processor)
        batches = [(rows, {name: value.numpy() for name, value in own.items()}) for rows, own in alike]
        return ReadBatch(names, batches, unreadable, time.perf_counter() - begun)


def _alike(made: Sequence[Batch], size: int, image_processor: Any) -> Iterator[Batch]:
    """Batches of at most `size` images of one shape, those with the most tokens first where words tell how many."""
    images = []
    for rows, values in made:
        lengths = token_lengths(values[PATCH_WORDS]) if PATCH_WORDS in values else [0] * len(rows)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            own = {name: value[index : index + 1] for name, value in values.items()}
            images.append((own["pixel_values"].shape, -length, row, own))
    images.sort(key=lambda image: image[:3])
    for _, same in itertools.groupby(images, key=lambda image: image[0]):
        while some := list(itertools.islice(same, size)):
            yield [image[2] for image in some], one_batch([image[3] for image in some], image_processor)


class Shard(NamedTuple):
    """What a file holds."""

    names: list[str]
    rows: list[int]
    features: torch.Tensor
    """(images, values) float32."""
    unreadable: list[dict[str, Any]]


class _Run:
    """The work of one process, and what its time goes to."""

    def __init__(self, model: PreTrainedModel, image_processor: Any, batch_size: int, window: int) -> None:
        self._model, self._image_processor = model, image_processor
        self._batch_size, self._window = batch_size, window
        self.seconds = dict.fromkeys(("total", "waiting", "forward", "writing", "reading"), 0.0)
        self.images = 0
        """Read, unreadable ones included."""
        self.embedded, self.tokens = 0, 0.0
        """Images that the model saw; the sum of their tokens, mean over layers."""

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
        """Reads and embeds the images of the shards `own`, one after the other."""
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
            collate_fn=_as_it_is,
            # A window is read while the model runs on the one before.
            prefetch_factor=max(2, -(-self._window // workers)) if workers else None,
            generator=torch.Generator(),  # of seeds that nothing uses, which it would draw from the caller's
        )
        with self.timed("waiting"), torch.device("cpu"):  # whatever torch's default is: it draws a seed
            stream = iter(loader)
        for number in own:
            yield number, self._shard(stream, len(shards.rows(number)), values, bar)

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
        found = dict(zip(order, torch.cat(features), strict=True))
        rows = sorted(found)
        together = torch.stack([found[row] for row in rows]) if rows else features[0]
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


def _to_parquet(shard: Shard) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    flat = pa.array(shard.features.flatten().numpy())
    columns = {
        "name": pa.array(shard.names, pa.string()),
        "row": pa.array(shard.rows, pa.int64()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, shard.features.shape[1]),
    }
    said = {"images": len(shard.rows), "unreadable": shard.unreadable}
    table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(said)})
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, use_dictionary=False) as writer:
        if shard.rows:  # `datasets` refuses a group without rows, which is what no rows would make
            writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _said_in_parquet(file: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    return json.loads(pq.read_schema(file).metadata[KEY.encode()])


def _to_safetensors(shard: Shard) -> bytes:
    from safetensors.torch import save

    said = {"images": len(shard.rows), "unreadable": shard.unreadable, "names": shard.names}
    tensors = {"embedding": shard.features, "row": torch.tensor(shard.rows, dtype=torch.int64, device="cpu")}
    return save(tensors, {KEY: json.dumps(said)})  # one entry, since entries come in any order


def _said_in_safetensors(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()[KEY])


FORMATS: dict[str, tuple[Callable[[Shard], bytes], Callable[[Path], dict[str, Any]]]] = {
    "parquet": (_to_parquet, _said_in_parquet),
    "safetensors": (_to_safetensors, _said_in_safetensors),
}
"""What files of features may be, by their ending: what makes one, and what reads how many `images` a file says that it
has, and which are `unreadable`."""


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
        """This process's share of the files that are not there, whichever process made those that are, and of those
        that lack images which were out of reach and are not now.

        Args:
            is_in_reach: tells of a row whether its image can be read.
        """
        index, processes = place()

        def is_missing(file: Path) -> bool:
            if not file.exists():
                return True
            return any(AGAIN in image and is_in_reach(image["row"]) for image in self._said_in(file)[1])

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
        """Writes a file, whole or not at all. One that is there and has more images stays, with a warning."""
        file = self.files[number]
        if file.exists() and (before := self._said_in(file)[0]) > len(shard.rows):
            warnings.warn(
                f"{file} stays as it is: it has {before} images, of which {len(shard.rows)} alone could be had now.",
                stacklevel=4,
            )
            return
        write_files(self._folder, {file.name: self._to_bytes(shard)})

    def begin(self, of: dict[str, Any]) -> None:
        """Writes the manifest, or compares it with what an earlier run wrote.

        Raises:
            ValueError: the folder holds something else, or processes see different images or models.
        """
        others = gathered(lambda: of)
        everywhere(lambda: self._require_same(of, others))
        everywhere(lambda: self._require_own(of))
        in_main(lambda: self._claim(of))  # no file without a manifest

    def _claim(self, of: dict[str, Any]) -> None:
        """Writes the manifest where there is none; another run may have since this one looked."""
        with saving(self._folder) as save:
            save.write({MANIFEST: _encoded({"of": of})})
            is_new = save.place_new(MANIFEST)
        self._require_own(of)
        if not is_new and not all(file.exists() for file in self.files):
            self._write_manifest({"of": of})  # that of a run that had ended tells of files which are gone

    @staticmethod
    def _require_same(of: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
        for process, other in enumerate(others):
            if other != of:
                raise ValueError(
                    f"process {process} has another run ({difference(other, of)}); expected the same for all."
                )

    def _require_own(self, of: dict[str, Any]) -> None:
        manifest = self._folder / MANIFEST
        if not manifest.exists():
            if any(self._folder.glob("train-*")):
                raise ValueError(f"{self._folder} holds train-* files and no {MANIFEST}; name another folder.")
            return
        found = _read_manifest(manifest)
        if found != of:
            raise ValueError(
                f"{self._folder} holds features of another run ({difference(found, of)}); name another folder, or "
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
        said = [self._said_in(file) for file in self.files]
        return sum(images for images, _ in said), [image for _, unreadable in said for image in unreadable]

    def _said_in(self, file: Path) -> tuple[int, list[dict[str, Any]]]:
        try:
            said = self._metadata_of(file)
            return said["images"], said["unreadable"]
        except Exception as error:  # of a damaged file libraries raise nearly anything
            raise ValueError(
                f"{file} does not say what `embed` writes into its metadata, as if it was damaged or written anew by "
                f"something else ({type(error).__name__}: {error}); delete it, and the same call makes it again."
            ) from error

    def end(self, of: dict[str, Any], run: _Run, values: int) -> Embedded:
        """Writes into the manifest what came of it, once all files are there.

        Raises:
            OSError: some are not, as where machines have a folder of this name each.
        """
        (images, unreadable), _ = everywhere(self._read_all)
        everywhere(lambda: self._require_own(of))
        in_main(lambda: self._write_manifest({"of": of, "images": images, "values": values, "unreadable": unreadable}))
        own: Any = (run.images, run.embedded, run.tokens, run.seconds)
        runs = gathered(lambda: own)
        made, embedded, tokens = (sum(own[part] for own in runs) for part in range(3))
        times = [own[3] for own in runs]
        return Embedded(
            images,
            unreadable,
            values,
            self.files,
            made,
            embedded,
            tokens / embedded if embedded else None,
            len(runs),
            max(own["total"] for own in times),
            max(own["total"] - own["waiting"] for own in times),
            {what: sum(own[what] for own in times) for what in run.seconds},
        )

    def _write_manifest(self, content: dict[str, Any]) -> None:
        write_files(self._folder, {MANIFEST: _encoded(content)})


def _encoded(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["of"]
        if not isinstance(found, dict):
            raise TypeError(f"`of` is a {type(found).__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no manifest of features ({error}); name another folder.") from error
    return found


class Trial(NamedTuple):
    """What one image tells of a model and its image processor."""

    values: int
    """How many an image's features are."""
    pads: bool
    """Whether images of different lengths are run as a padded batch."""
    sizes_differ: bool
    """Whether the image processor gives images of other proportions another size."""


def require_features(model: PreTrainedModel) -> None:
    """Refuses a model whose answers are no features of the images that it is given.

    Raises:
        ValueError: it classifies, is in training, leaves patches out at random, or lies in parts in several processes.
    """
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
    """The image processor for a model that searches words: one that finds them as it would, or one that finds none."""
    setting = setting_of(model)
    if setting is None or not setting.searches:
        return image_processor
    if not finds:
        return without_words(image_processor)
    own = copy.deepcopy(image_processor)
    own.vwt = HostTokenizer(setting, find_tower(model, family_of(model)).patch_size)
    return own


def _fingerprint(model: PreTrainedModel, image_processor: Any, rows: ImageRows) -> dict[str, Any]:
    """What files must share to belong together, as JSON holds it."""
    of = {
        "format": FORMAT,
        "model": fingerprint_of(model),
        **made_with(model),
        **compression_of(model),
        "image_processor": described_processor(image_processor),
        "truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
        "most_pixels": Image.MAX_IMAGE_PIXELS,
        "images": rows.order,
    }
    return json.loads(json.dumps(of))
