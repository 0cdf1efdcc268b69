"""`vwt-hf learn`: words from a folder of images or a data set on the Hub, saved where a model finds them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from .demo import usable_device
from .facts import aligned
from .processors import load_processor, patch_size_of
from .vocabulary import VisualVocabulary


def learn(
    images: str,
    image_processor: str,
    *,
    size: int = 1000,
    patch_size: int | None = None,
    output: str = "vwt-words",
    seed: int = 0,
    batch_size: int = 32,
    max_images: int | None = None,
    column: str | None = None,
    split: str = "train",
    streaming: bool = False,
    checkpoint: str | None = None,
    resume: bool = False,
    device: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> VisualVocabulary:
    """Learns a vocabulary, writes it to `output`, pushes it where asked to, and prints what came of it.

    Args:
        images: a folder of images, or the Hub id of a data set.
        image_processor: Hub id or folder of the model whose image processor resizes and crops them.
        size, seed, batch_size, max_images, resume: see `VisualVocabulary.learn`.
        patch_size: height and width of a word, in pixels; by default of that model's patches.
        output: folder that the vocabulary is written to.
        column, split, streaming: of a data set: its image column (by default the first), its split, and whether to
            read it over the network as it is learned from.
        checkpoint: folder for the progress, which stays; by default one inside `output`, removed at the end.
        device: torch device; by default CUDA where there is one, else the CPU.
        push_to_hub: Hub id to upload the vocabulary to.
        private: whether a repository made for it is private; by default as the organisation has it.

    Raises:
        ValueError: a setting or the images cannot be used, or nothing tells the patch size.
        OSError: images, image processor or checkpoint cannot be read, or `output` cannot be written.
    """
    source, dataset = open_source(images, column=column, split=split, streaming=streaming)
    processor = load_processor(image_processor)
    patch_size = patch_size if patch_size is not None else patch_size_of(image_processor)
    if patch_size is None:
        raise ValueError(f"{image_processor} has no model config that says its patch size; give --patch-size.")
    progress = Path(checkpoint) if checkpoint else Path(output) / ".checkpoint"

    started = time.monotonic()
    try:
        vocabulary = VisualVocabulary.learn(
            source,
            processor,
            size,
            patch_size=patch_size,
            seed=seed,
            batch_size=batch_size,
            column=column,
            checkpoint=progress,
            resume=resume,
            max_images=max_images,
            device=usable_device(device),
            dataset=dataset,
            base_model=None if Path(image_processor).exists() else image_processor,
        )
    except FileExistsError as error:
        raise FileExistsError(
            f"{progress} holds the progress of an earlier run; add --resume to go on with it, or delete that folder to "
            "start again."
        ) from error
    seconds = time.monotonic() - started
    vocabulary.save_pretrained(output, repo_id=push_to_hub)
    if checkpoint is None:
        shutil.rmtree(progress)

    info = vocabulary.info
    print(f"{len(vocabulary):,} words of {vocabulary.patch_size}×{vocabulary.patch_size} pixels\n")
    rows = [
        ("patches", f"{info.patches:,}"),
        ("images", f"{info.images:,}"),
        ("unreadable", f"{info.unreadable:,}"),
        ("inertia", f"{info.inertia:.4g}, the mean squared distance of a patch to its word"),
        ("seconds", f"{seconds:.1f}" + (", since it was resumed" if resume else "")),
        ("vocabulary", output),
    ]
    print(aligned(rows))
    if push_to_hub:
        # The words are safe in `output` already, whatever the network does.
        commit = vocabulary.push_to_hub(push_to_hub, private=private)
        print(f"on the Hub: {commit.commit_url}")
    return vocabulary


def open_source(images: str, *, column: str | None, split: str, streaming: bool) -> tuple[Any, str | None]:
    """What `VisualVocabulary.learn` takes as images, and the name to record; `None` for the folder's own.

    Raises:
        ValueError: `images` is a file, or a folder with options that only a data set has.
        OSError: `images` is neither a folder nor a data set on the Hub.
    """
    path = Path(images)
    if path.is_dir():
        if column is not None or streaming:
            raise ValueError(f"--column and --streaming are for data sets, and {images} is a folder; leave them out.")
        return path, None
    expected = "expected a folder of images, or the Hub id of a data set"
    if path.exists():
        raise ValueError(f"{images} is a file; {expected}.")
    # A Hub id has one slash at most, and load_dataset takes a path for a file to read.
    if path.is_absolute() or len(path.parts) > 2 or images.startswith((".", "~")) or images.endswith("/"):
        raise FileNotFoundError(f"{images} does not exist; {expected}.")

    import datasets

    try:
        return datasets.load_dataset(images, split=split, streaming=streaming), images
    except OSError as error:
        raise OSError(f"{images} is no folder here, and cannot be had as a data set: {error}") from error
