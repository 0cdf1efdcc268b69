"""Learning words from images by k-means, with progress and checkpoints, in one process or several.

Several processes learn the words that one would, but for rounding. Each of n processes reads every n-th image in the
order in which one would read them, so together they have the images of its batch in each step; their statistics are
summed. Where single patches matter (to seed words, and to start rare ones again) the main process gets all patches, in
that order, and hands out the result.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from .. import __version__
from ..checks import is_int, require_whole
from ..image_source import ImagePart, ImageSource, open_images
from ..printable import shown
from ..processed_images import PatchBatch, patch_batches
from ..processes import everywhere, gathered, in_main, join, place, require_same, summed, together, usable_device
from ..processors import inner_processor, processor_statistics, white_of, without_words
from ..whole_saves import require_folder, write_files
from .files import VocabularyInfo, tensor_bytes
from .kmeans import MiniBatchKMeans, statistics
from .word_files import MOST_BYTES

if TYPE_CHECKING:
    from .visual_vocabulary import VisualVocabulary

CHECKPOINT = "learning.safetensors"
CHECKPOINT_EVERY = 100
"""Batches between checkpoints: what a kill loses at most."""
CHECKPOINT_FORMAT = 4
"""Of checkpoints: one of another format is refused."""
CHANNELS = 3
"""Of a word: images are read as RGB."""
NAMED = 5
"""How many unreadable images a warning names."""
CUTS = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "crop_pct", "do_pad", "pad_size")
"""What an image processor's settings say about the pixels that patches are cut from."""


class StepRead(NamedTuple):
    """What one process read in one step."""

    number: int
    """Images, with those that could not be read."""
    unreadable: list[str]
    """Name and reason of each of these."""

    @property
    def images(self) -> int:
        return self.number - len(self.unreadable)


@dataclasses.dataclass
class Progress:
    """How far a run of learning has come."""

    images: int = 0
    unreadable: int = 0
    first_unreadable: list[str] = dataclasses.field(default_factory=list)
    read: list[int] = dataclasses.field(default_factory=lambda: [0])
    """Images that each process has read or found unreadable."""
    order: list[str] = dataclasses.field(default_factory=list)
    """`ImageSource.order` of the images that each process learns from."""

    def add(self, reads: Sequence[StepRead]) -> None:
        """Counts the images of a step."""
        self.images += sum(read.images for read in reads)
        unreadable = [name for read in reads for name in read.unreadable]
        self.unreadable += len(unreadable)
        self.first_unreadable = (self.first_unreadable + unreadable)[:NAMED]
        self.read = [before + read.number for before, read in zip(self.read, reads, strict=True)]


def learn(
    cls: type[VisualVocabulary],
    images: Any,
    image_processor: Any,
    size: int = 1000,
    *,
    patch_size: int = 16,
    seed: int = 0,
    batch_size: int = 32,
    column: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    max_images: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    dataset: str | None = None,
    base_model: str | None = None,
) -> VisualVocabulary:
    """Learns words by mini-batch k-means over the patches of images, in one pass.

    Memory does not grow with the number of images: it holds a few batches of images and, until there are enough
    patches to seed the words, a buffer of 16 patches a word (16,384 at least). The same images and seed give the
    same words, bit for bit, on one machine.

    Under `accelerate launch`, or in a program whose processes an `accelerate.Accelerator`, `PartialState` or
    `torch.distributed` has joined (`vwt_hf.processes.join`), processes learn together, and all have to make this call.
    Each reads its part of the images, and all get the same words, which as many processes find again, bit for bit. They
    are the words of one process, but for rounding, if `batch_size` is a multiple of the number of processes and no
    shards of a stream are divided. An error in one process is raised in all.

    Images that cannot be read are left out with a warning. If the images have fewer distinct patches than words are
    wanted, the vocabulary is smaller, with a warning.

    Args:
        images: a `datasets.Dataset`, a `datasets.IterableDataset`, a folder or an iterable of PIL images. A folder is
            searched recursively. Folders and data sets are shuffled by `seed`; any other iterable is taken in its
            order, which should be mixed. Processes with the same folder (by its files' names and sizes), `Dataset` (by
            its column and number of rows) or stream divide it; a stream by
            `datasets.distributed.split_dataset_by_node`. Processes with different ones, such as machines with a disk
            each, read all of their own. Any other iterable is read by its process alone.
        image_processor: the model's, which resizes and crops the images. Its mean and standard deviation are only
            recorded.
        size: words to learn.
        patch_size: height and width of a patch, in pixels, as the model cuts them.
        seed: of the order of the images and of the random choices of k-means.
        batch_size: images in a batch, of all processes together: each reads its share, rounded up.
        column: the data set's image column; by default its first.
        checkpoint: a folder where the main process saves progress, every 100 batches and at the end, so that a kill
            loses 100 at most. It holds whole batches alone, so that a run of more images can go on from it.
        resume: whether to go on from `checkpoint`, with the same images and arguments; the result is that of a run
            never interrupted, bit for bit. `max_images` may be another, but not less than the checkpoint has learned
            from, and an iterable that keeps its order may have more images at its end. Without progress in the folder,
            learning starts anew.
        max_images: most images to learn from, in all processes together; each may read its share.
        device: of the clustering; by default a CUDA GPU if there is one, for each process its own.
        progress: whether to show a bar, with inertia and patches per second.
        dataset: name to record, the Hub id if there is one; by default the data set's own name.
        base_model: Hub id of the model whose processor it is, to record.

    Raises:
        ValueError: torch cannot use `device`, there are no images, none can be read, they have fewer patches than words
            are wanted, or the checkpoint is damaged, of another version, of a run with other arguments, over other
            images (a folder's names and sizes, a data set's rows, and how many there are, are looked at), by another
            number of processes or over more than `max_images`; or processes have different arguments.
        vwt_hf.processes.ProcessLost: another process was killed or cannot be reached; `resume` goes on.
        FileExistsError: `checkpoint` holds an earlier run and `resume` is `False`.
        OSError: nothing can be written into `checkpoint`.
        TypeError: `images` or `image_processor` is of another type.

    Example:
        >>> vocabulary = VisualVocabulary.learn("photographs/", image_processor, size=1000)  # doctest: +SKIP
        >>> vocabulary.push_to_hub("me/my-words")  # doctest: +SKIP
    """
    join(device)
    index, processes = place()
    image_processor = without_words(inner_processor(image_processor))

    def prepare() -> tuple[MiniBatchKMeans, dict[str, Any], ImageSource]:
        _require_arguments(size, patch_size, seed, batch_size, max_images)
        if resume and checkpoint is None:
            raise ValueError("resume=True needs checkpoint=..., the folder given to the run that was interrupted.")
        VocabularyInfo(dataset=dataset, base_model=base_model)  # refuses what it could not record at the end
        usable = usable_device(_own_device() if device is None else device)
        if usable.type == "mps":
            raise ValueError("device is 'mps', where torch has no float64, which words need; expected cpu or cuda.")
        kmeans = MiniBatchKMeans(size, CHANNELS * patch_size**2, seed=seed, device=usable)
        numbers = {
            "size": size, "patch_size": patch_size, "seed": seed, "batch_size": batch_size, "processes": processes
        }  # fmt: skip
        return kmeans, numbers | _facts_of(image_processor), open_images(images, column=column, seed=seed)

    (kmeans, settings, source), peers = everywhere(prepare, lambda own: (own[1], own[2].order, own[2].name))
    all_settings, orders, names = map(list, zip(*peers, strict=True))
    everywhere(lambda: require_same(all_settings))
    file = None
    if checkpoint is not None:
        in_main(lambda: require_folder(checkpoint))  # now, and not when the first images are learned
        file = Path(checkpoint) / CHECKPOINT
    done = in_main(lambda: _start_or_resume(file, resume, kmeans, settings, orders, max_images))
    _hand_out(kmeans)
    part, totals = everywhere(lambda: _own_images(source, orders, done, max_images), lambda found: found.total)

    def save() -> None:
        if file is not None:
            in_main(lambda: save_checkpoint(file, kmeans, settings, done))

    share = -(-batch_size // processes)
    with tqdm(
        total=None if None in totals else sum(totals),
        initial=sum(done.read),
        unit="image",
        desc="Learning words" + _how_shared(source, orders),
        disable=not progress or index > 0,
    ) as bar:
        _learn(kmeans, patch_batches(part.items, image_processor, patch_size, share), share, done, save, bar)
    everywhere(lambda: _require_images(done))
    if done.unreadable and index == 0:
        warnings.warn(
            f"{done.unreadable} of {done.images + done.unreadable} images could not be read and were left out. The "
            f"first: {'; '.join(done.first_unreadable)}.",
            stacklevel=2,
        )
    words, counts, seen, inertia = in_main(lambda: (*kmeans.finish(), kmeans.seen, kmeans.inertia))
    if len(words) < size and index == 0:
        warnings.warn(
            f"{size} words were asked for, but the images have only {len(words)} patches that differ: the vocabulary "
            f"has {len(words)} words.",
            stacklevel=2,
        )
    info = VocabularyInfo(
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
        dataset=dataset or names[0],
        base_model=base_model,
        patches=seen,
        images=done.images,
        unreadable=done.unreadable,
        inertia=inertia,
        seed=seed,
        library_version=__version__,
    )
    return cls(words.unflatten(1, (CHANNELS, patch_size, patch_size)), counts, info)


def _require_arguments(size: Any, patch_size: Any, seed: Any, batch_size: Any, max_images: Any) -> None:
    for name, value in {"size": size, "patch_size": patch_size, "batch_size": batch_size}.items():
        require_whole(name, value)
    if max_images is not None:
        require_whole("max_images", max_images)
    if not is_int(seed) or not -(2**63) <= seed < 2**64:  # what a generator of torch takes
        raise ValueError(f"seed is {shown(seed)}; expected a whole number in [−2**63, 2**64).")
    takes = 4 * size * CHANNELS * patch_size**2
    if takes > MOST_BYTES:
        raise ValueError(
            f"size is {size:,} and patch_size {patch_size}, so words would take {takes:,} bytes; expected "
            f"{MOST_BYTES:,} at most. Learn fewer, or smaller ones."
        )


def _facts_of(image_processor: Any) -> dict[str, Any]:
    """What of an image processor must be the same for a run to go on. With the words, mean and deviation are saved."""
    is_known = white_of(image_processor) is not None  # else nothing says of which values they are
    mean, std = map(list, processor_statistics(image_processor, CHANNELS)) if is_known else (None, None)
    fields = image_processor.to_dict()
    cuts = ", ".join(f"{name} {fields[name]}" for name in CUTS if name in fields)
    # With its class: Pillow resizes to other pixels than torchvision.
    return {"image_mean": mean, "image_std": std, "image_processor": f"{type(image_processor).__name__}, {cuts}"}


def _learn(
    kmeans: MiniBatchKMeans,
    batches: Iterator[PatchBatch],
    share: int,
    done: Progress,
    save: Callable[[], None],
    bar: Any,
) -> None:
    """Learns from this process's batches, `share` images in each, in step with the others, and saves progress."""
    ended = [False] * place()[1]
    whole = True
    started, before = time.monotonic(), kmeans.seen
    for number, (batch, reads) in enumerate(steps_of(batches, kmeans), start=1):
        # A batch is whole if each process read its share of it, or had come to the end of its images before.
        whole = all(read.number == (0 if over else share) for read, over in zip(reads, ended, strict=True))
        ended = [read.number < share for read in reads]
        if not whole:  # a run of more images makes another batch of the last ones
            save()
        done.add(reads)
        learn_step(kmeans, batch)
        bar.update(sum(read.number for read in reads))
        if kmeans.seen:
            rate = (kmeans.seen - before) / (time.monotonic() - started)
            bar.set_postfix({"inertia": f"{kmeans.inertia:.4g}", "patches/s": f"{rate:.0f}"}, refresh=False)
        if whole and number % CHECKPOINT_EVERY == 0:
            save()
    if whole:
        save()


def _own_device() -> torch.device | None:
    """The device that accelerate gave this process, if it is one of several."""
    if not together():
        return None
    from accelerate import PartialState

    return PartialState().device


def _start_or_resume(
    file: Path | None,
    resume: bool,
    kmeans: MiniBatchKMeans,
    settings: dict[str, Any],
    orders: list[str],
    max_images: int | None,
) -> Progress:
    """How far learning has come already: not at all, or as far as the checkpoint says."""
    if file is None or not file.exists():
        return Progress(read=[0] * len(orders), order=orders)
    if not resume:
        raise FileExistsError(
            f"{file} holds an earlier run; pass resume=True to go on with it, or another checkpoint folder."
        )
    done = load_checkpoint(file, kmeans, settings)
    skip = sum(done.read)
    if max_images is not None and max_images < skip:
        raise ValueError(
            f"{file} has learned from {skip} images, and max_images is {max_images}; give at least {skip}, or another "
            "checkpoint folder to learn from fewer."
        )
    for number, (learned, given) in enumerate(zip(done.order, orders, strict=True)):
        if skip and learned != given:
            where = f" in process {number}" if len(orders) > 1 else ""
            raise ValueError(
                f"{file} is of a run that learned from {learned}{where}, and images is {given}; give the same images, "
                "or another checkpoint folder."
            )
    return dataclasses.replace(done, order=orders)


def _own_images(source: ImageSource, orders: Sequence[str], done: Progress, max_images: int | None) -> ImagePart:
    """The images that this process reads; processes that have the same images share them."""
    index, processes = place()
    sharers = [i for i, order in enumerate(orders) if order == orders[index]] if source.divides else [index]
    most = None if max_images is None else len(range(index, max_images, processes))
    return source.part(skip=done.read[index], max_images=most, index=sharers.index(index), number=len(sharers))


def _how_shared(source: ImageSource, orders: Sequence[str]) -> str:
    """How the processes divide the images, for the progress bar."""
    if len(orders) == 1:
        return ""
    if not source.divides:
        return f" ({len(orders)} processes, each its own images)"
    different = len(set(orders))
    if different == 1:
        return f" ({len(orders)} processes share the images)"
    return f" ({len(orders)} processes, {different} different folders or data sets)"


def steps_of(batches: Iterator[PatchBatch], kmeans: MiniBatchKMeans) -> Iterator[tuple[PatchBatch, list[StepRead]]]:
    """This process's batches, each with what all processes read in that step, until no process has images left.

    A process that has none left gets empty batches.
    """
    nothing = PatchBatch(torch.zeros(0, kmeans.values, dtype=torch.float32, device="cpu"), [], [])

    def read() -> PatchBatch:
        batch = next(batches, nothing)
        return batch._replace(patches=kmeans.checked(batch.patches))

    while True:
        batch, reads = everywhere(read, lambda batch: StepRead(len(batch.lengths), batch.unreadable))
        if not any(read.number for read in reads):
            return
        yield batch, reads


def learn_step(kmeans: MiniBatchKMeans, batch: PatchBatch) -> None:
    """`kmeans.update` with the patches of all processes, as if one process had read all images."""
    if not together():
        kmeans.update(batch.patches)
        return
    learn = kmeans.update
    if kmeans.words is not None:
        if not kmeans.merge(summed(statistics(batch.patches, kmeans.words))):
            return
        learn = kmeans.restart_rare
    parts = gathered(lambda: (batch.patches.cpu(), batch.lengths))
    _hand_out(kmeans, lambda: learn(_in_turn(parts).to(kmeans.device)))


def _in_turn(parts: Sequence[tuple[torch.Tensor, list[int]]]) -> torch.Tensor:
    """The patches of all processes, in the order in which one process would read the images.

    `parts` are each process's patches (patches, values), and how many each of its images has.
    """
    images = itertools.zip_longest(*(patches.split(lengths) for patches, lengths in parts))
    return torch.cat([patches for turn in images for patches in turn if patches is not None])


def _hand_out(kmeans: MiniBatchKMeans, learn: Callable[[], None] = lambda: None) -> None:
    """Has the main process do `learn`, and gives its words, if there are some, to the others.

    So all have the same words, also if machines round differently.
    """

    def state() -> dict[str, Any]:
        learn()
        held = {} if kmeans.words is None else kmeans.state_dict()
        return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in held.items()}

    handed = in_main(state)
    if handed and place()[0] > 0:
        kmeans.load_state_dict(handed)


def _require_images(done: Progress) -> None:
    if not done.images + done.unreadable:
        raise ValueError("images holds no images; pass a data set, folder or iterable that does.")
    if not done.images:
        names = "; ".join(done.first_unreadable)
        raise ValueError(f"none of the {done.unreadable} images could be read. The first: {names}.")


def save_checkpoint(file: Path, kmeans: MiniBatchKMeans, settings: dict[str, Any], done: Progress) -> None:
    """Writes what a run needs to go on into one file, whole or not at all.

    That is the state after a whole batch, so that the run which goes on has the same batches.
    """
    state = kmeans.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in state.items() if name not in tensors}
    state = {
        "format": CHECKPOINT_FORMAT, "settings": settings, "numbers": numbers, "done": dataclasses.asdict(done)
    }  # fmt: skip
    write_files(file.parent, {file.name: tensor_bytes(tensors, {"state": json.dumps(state)})})


def remove_checkpoint(folder: Path) -> None:
    """Removes the checkpoint in a folder, and the folder if nothing else lies in it."""
    (folder / CHECKPOINT).unlink(missing_ok=True)  # by another run into the same output
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def load_checkpoint(file: Path, kmeans: MiniBatchKMeans, settings: dict[str, Any]) -> Progress:
    """Loads a checkpoint of a run with the same settings into `kmeans`, and returns how far learning had come."""
    try:
        with safe_open(file, framework="pt") as opened:
            # Copied, so that they are aligned as the tensors that were saved: otherwise products may round differently.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            header = json.loads(opened.metadata()["state"])
        version = header.get("format", 1)
        if version == CHECKPOINT_FORMAT:
            learned_by, numbers = dict(header["settings"]), dict(header["numbers"])
            done = Progress(**header["done"])
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it to start again.") from error
    if version != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{file} was written by another version of vwt-hf (format {version}; this one reads "
            f"{CHECKPOINT_FORMAT}); go on with that version, or delete the file to start again."
        )
    for name, value in settings.items():
        if learned_by.get(name) != value:
            raise ValueError(
                f"{file} is of a run with {name}={learned_by.get(name)!r}, this one has {name}={value!r}; "
                "give the same, or another checkpoint folder."
            )
    kmeans.load_state_dict({**tensors, **numbers})
    return done
