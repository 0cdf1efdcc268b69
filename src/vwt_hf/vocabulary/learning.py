"""Learning words from images: the loop between the patch stream and k-means, with progress and checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from .. import __version__
from ..processors import processor_statistics
from ..whole_saves import write_files
from .files import VocabularyInfo, tensor_bytes
from .image_source import PatchBatch, open_images, patch_batches
from .kmeans import MiniBatchKMeans

CHECKPOINT = "learning.safetensors"
CHECKPOINT_EVERY = 100
"""Batches between checkpoints: what a kill loses at most."""
CHECKPOINT_FORMAT = 2
"""Of checkpoints: one of another format is refused."""
NAMED = 5
"""How many unreadable images a warning names."""
CUTS = ("do_resize", "size", "resample", "do_center_crop", "crop_size")
"""What an image processor's settings say about the pixels that patches are cut from."""


@dataclasses.dataclass
class Progress:
    """How far a run of learning has come: what it has counted."""

    images: int = 0
    unreadable: int = 0
    first_unreadable: list[str] = dataclasses.field(default_factory=list)
    order: str = ""
    """`ImageSource.order` of the images that it learns from."""

    def add(self, batch: PatchBatch) -> None:
        """Counts a batch's images."""
        self.images += batch.images
        self.unreadable += len(batch.unreadable)
        self.first_unreadable = (self.first_unreadable + batch.unreadable)[:NAMED]


def learn_words(
    images: Any,
    image_processor: Any,
    *,
    size: int,
    patch_size: int,
    seed: int,
    batch_size: int,
    column: str | None,
    checkpoint: str | os.PathLike[str] | None,
    resume: bool,
    max_images: int | None,
    device: torch.device | str | None,
    progress: bool,
    dataset: str | None,
    base_model: str | None,
) -> tuple[torch.Tensor, torch.Tensor, VocabularyInfo]:
    """Words (size, channels, p, p) in raw RGB, how often each was met (size,), and how they came about.

    See `VisualVocabulary.learn` for the arguments and errors.
    """
    image_processor = getattr(image_processor, "image_processor", image_processor)
    for name, value in {"size": size, "patch_size": patch_size, "batch_size": batch_size}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a positive integer.")
    if resume and checkpoint is None:
        raise ValueError("resume=True needs checkpoint=..., the folder given to the run that was interrupted.")
    # The channels are RGB's: images are read as such.
    channels = 3
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kmeans = MiniBatchKMeans(size, channels * patch_size**2, seed=seed, device=device)
    mean, std = processor_statistics(image_processor, channels)
    made = image_processor.to_dict()
    settings = {
        "size": size, "patch_size": patch_size, "seed": seed, "batch_size": batch_size,
        "image_mean": list(mean), "image_std": list(std),
        "image_processor": ", ".join(f"{name} {made[name]}" for name in CUTS if name in made),
    }  # fmt: skip
    done = Progress()
    file = None if checkpoint is None else Path(checkpoint) / CHECKPOINT
    if file is not None and file.exists():
        if not resume:
            raise FileExistsError(
                f"{file} holds an earlier run; pass resume=True to go on with it, or another checkpoint folder."
            )
        done = load_checkpoint(file, kmeans, settings)

    skip = done.images + done.unreadable
    if max_images is not None and max_images < skip:
        raise ValueError(
            f"{file} has learned from {skip} images, and max_images is {max_images}; give at least {skip}, or another "
            "checkpoint folder to learn from fewer."
        )
    source = open_images(images, column=column, seed=seed, skip=skip, max_images=max_images)
    if skip and done.order != source.order:
        raise ValueError(
            f"{file} is of a run that learned from {done.order}, and images is {source.order}; give the same images, "
            "or another checkpoint folder."
        )
    done.order = source.order
    whole = True
    bar = tqdm(total=source.total, initial=skip, unit="image", desc="Learning words", disable=not progress)
    started, before = time.monotonic(), kmeans.seen
    with bar:
        for number, batch in enumerate(patch_batches(source.items, image_processor, patch_size, batch_size), start=1):
            whole = batch.images + len(batch.unreadable) == batch_size
            if file is not None and not whole:  # a run of more images makes another batch of the last ones
                save_checkpoint(file, kmeans, settings, done)
            done.add(batch)
            if batch.images:
                kmeans.update(batch.patches)
            bar.update(batch.images + len(batch.unreadable))
            if kmeans.seen:
                rate = (kmeans.seen - before) / (time.monotonic() - started)
                bar.set_postfix({"inertia": f"{kmeans.inertia:.4g}", "patches/s": f"{rate:.0f}"}, refresh=False)
            if file is not None and whole and number % CHECKPOINT_EVERY == 0:
                save_checkpoint(file, kmeans, settings, done)
    if file is not None and whole:
        save_checkpoint(file, kmeans, settings, done)
    _report(done)
    words, counts = kmeans.finish()
    if len(words) < size:
        warnings.warn(
            f"{size} words were asked for, but the images have only {len(words)} patches that differ: the vocabulary "
            f"has {len(words)} words.",
            stacklevel=3,
        )
    info = VocabularyInfo(
        image_mean=mean,
        image_std=std,
        dataset=dataset or source.name,
        base_model=base_model,
        patches=kmeans.seen,
        images=done.images,
        unreadable=done.unreadable,
        inertia=kmeans.inertia,
        seed=seed,
        library_version=__version__,
    )
    return words.cpu().unflatten(1, (channels, patch_size, patch_size)), counts.cpu(), info


def _report(done: Progress) -> None:
    """Warns of unreadable images; they are an error where there are no others."""
    total = done.images + done.unreadable
    names = "; ".join(done.first_unreadable)
    if not total:
        raise ValueError("images holds no images; pass a data set, folder or iterable that does.")
    if not done.images:
        raise ValueError(f"none of the {total} images could be read. The first: {names}.")
    if done.unreadable:
        warnings.warn(
            f"{done.unreadable} of {total} images could not be read and were left out. The first: {names}.",
            stacklevel=4,
        )


def save_checkpoint(file: Path, kmeans: MiniBatchKMeans, settings: dict[str, Any], done: Progress) -> None:
    """Writes everything a run needs to go on, in one file, which is whole or not there.

    Args:
        kmeans, done: after a whole batch, so that what comes next is cut into batches as if never interrupted.
    """
    state = kmeans.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    numbers = {name: value for name, value in state.items() if name not in tensors}
    state = {
        "format": CHECKPOINT_FORMAT, "settings": settings, "numbers": numbers, "done": dataclasses.asdict(done)
    }  # fmt: skip
    write_files(file.parent, {file.name: tensor_bytes(tensors, {"state": json.dumps(state)})})


def load_checkpoint(file: Path, kmeans: MiniBatchKMeans, settings: dict[str, Any]) -> Progress:
    """Puts `kmeans` where the checkpoint left it.

    Raises:
        ValueError: the file is damaged, of another format, or of a run with other settings.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            # Copies are aligned as what they were saved from, without which products may round otherwise.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (it is no dict)
            header = json.loads(opened.metadata()["state"])
    except Exception as error:
        raise ValueError(f"{file} cannot be read ({error}); delete it to start again.") from error
    if header.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{file} was written by another version of vwt-hf (format {header.get('format', 1)}; this one reads "
            f"{CHECKPOINT_FORMAT}); go on with that version, or delete the file to start again."
        )
    for name, value in settings.items():
        if header["settings"].get(name) != value:
            raise ValueError(
                f"{file} is of a run with {name}={header['settings'].get(name)!r}, this one has {name}={value!r}; "
                "give the same, or another checkpoint folder."
            )
    kmeans.load_state_dict({**tensors, **header["numbers"]})
    return Progress(**header["done"])
