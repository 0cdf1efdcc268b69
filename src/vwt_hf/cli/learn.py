"""`vwt-hf learn`: words from a folder of images or a data set on the Hub, saved where a model finds them."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printable import printable
from ..terminal import aligned, options
from ..whole_saves import require_folder
from .loading import add_device
from .sources import IMAGES, open_source

if TYPE_CHECKING:
    from ..vocabulary import VisualVocabulary

HELP = "learn a vocabulary of visual words from images"
DESCRIPTION = """\
Learns visual words, each a patch that stands for all patches like it, in one pass of mini-batch k-means over images.
Writes them to OUTPUT: vocabulary.safetensors, vocabulary.json, a card and a picture of the words. Every model with the
words' patch size can use them: AutoModel.from_pretrained(..., vwt="OUTPUT").

Images go through the resizing and cropping of a model's image processor; none of its weights are needed. Images that
cannot be read are counted and left out. Memory does not grow with the number of images.

Progress is saved every 100 batches: after an interruption the same command with --resume goes on from there, and the
words are those of a run never interrupted.

Several processes, on one machine or many, learn the words that one would, but for rounding: each reads its part of the
images. If they see different folders, as on machines with a disk each, each reads all of its own. The first process
writes and prints. Use --multi_gpu without GPUs, too: accelerate's --cpu starts only one process."""
EXAMPLES = """\
examples:
  vwt-hf learn photographs/ --image-processor google/vit-base-patch16-224
  vwt-hf learn photographs/ --image-processor google/vit-base-patch16-224 --resume
  vwt-hf learn ethz/food101 --image-processor facebook/dinov2-small --streaming --max-images 20000 --output food-words
  vwt-hf learn photographs/ --image-processor openai/clip-vit-base-patch32 --push-to-hub me/words-p32 --private
  accelerate launch --multi_gpu --num_processes 2 -m vwt_hf.cli learn photographs/ --image-processor me/my-model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help=IMAGES)
    parser.add_argument(
        "--image-processor", required=True, metavar="MODEL", help="Hub id or folder of a model, or of its processor"
    )
    parser.add_argument("--size", type=int, default=1000, help="words to learn (default: 1000)")
    parser.add_argument("--patch-size", type=int, help="side of a word in pixels (default: as MODEL cuts its patches)")
    parser.add_argument("--output", default="vwt-words", metavar="FOLDER", help="for the words (default: vwt-words)")
    parser.add_argument("--seed", type=int, default=0, help="of the images' order and of k-means (default: 0)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images in a batch, of all processes together (default: 32)"
    )
    parser.add_argument("--max-images", type=int, help="learn from no more than these (default: all)")
    parser.add_argument("--column", help="the data set's image column (default: its first)")
    parser.add_argument("--split", help="of the data set (default: its only one, or train)")
    parser.add_argument(
        "--streaming", action="store_true", help="read the data set over the network instead of downloading it first"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="for the progress, to keep: with --resume and a larger --max-images, learning goes on after the end "
        "(default: OUTPUT/.checkpoint, removed at the end)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    add_device(parser)
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the words to this repository, made if need be")
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="make the repository private; one that is public is refused (default: as Hub settings say)",
    )


def work(args: argparse.Namespace) -> None:
    from ..processes import everywhere, in_main, joined

    with joined(args.device):
        (images, how), _ = everywhere(lambda: _prepared(args))

        from ..vocabulary import VisualVocabulary

        progress = _progress(args)
        started = time.monotonic()
        try:
            vocabulary = VisualVocabulary.learn(images, **how, checkpoint=progress, resume=args.resume)
        except FileExistsError as error:
            raise FileExistsError(
                f"{progress} holds the progress of an earlier run; add --resume to go on with it, by the "
                "same arguments, or delete that folder to start again."
            ) from error
        in_main(lambda: _keep(args, vocabulary, time.monotonic() - started))


def _progress(args: argparse.Namespace) -> str:
    return os.path.join(args.output, ".checkpoint") if args.checkpoint is None else args.checkpoint


def _prepared(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Images, and how to learn from them: arguments of `VisualVocabulary.learn`."""
    from ..processes import place, usable_device

    if args.private and args.push_to_hub is None:
        raise ValueError("--private is of the repository that --push-to-hub names, and none is named; give both.")
    is_main = place()[0] == 0
    if is_main:
        for folder in (args.output, _progress(args)):
            require_folder(folder)

    from ..processors import load_processor, patch_size_of

    images, _ = open_source(args.images, column=args.column, split=args.split, streaming=args.streaming)
    processor = load_processor(args.image_processor)
    patch_size = args.patch_size if args.patch_size is not None else patch_size_of(args.image_processor)
    device = usable_device(args.device)
    if args.push_to_hub is not None and is_main:
        _require_hub(args.push_to_hub, args.private)
    return images, {
        "image_processor": processor,
        **options(args, "size", "seed", "batch_size", "column", "max_images"),
        "patch_size": patch_size,
        "device": device,
        "dataset": None if Path(args.images).exists() else args.images,
        "base_model": None if Path(args.image_processor).exists() else args.image_processor,
    }


def _keep(args: argparse.Namespace, vocabulary: VisualVocabulary, seconds: float) -> None:
    """Writes the words, pushes them if asked to, and prints what came of it."""
    from ..vocabulary.learning import remove_checkpoint

    vocabulary.save_pretrained(args.output, repo_id=args.push_to_hub)
    if args.checkpoint is None:
        remove_checkpoint(Path(_progress(args)))

    info = vocabulary.info
    print(f"{len(vocabulary):,} words of {vocabulary.patch_size}×{vocabulary.patch_size} pixels\n")
    rows = [
        ("patches", f"{info.patches:,}"),
        ("images", f"{info.images:,}"),
        ("unreadable", f"{info.unreadable:,}"),
        ("inertia", f"{info.inertia:.4g}, the mean squared distance of a patch to its word"),
        ("seconds", f"{seconds:.1f}" + (", since it was resumed" if args.resume else "")),
        ("vocabulary", args.output),
    ]
    print(aligned(rows))
    if args.push_to_hub:
        # The words are safe in the output folder already, whatever the network does.
        commit = vocabulary.push_to_hub(args.push_to_hub, private=args.private)
        print(f"on the Hub: {printable(commit.commit_url)}")


def _require_hub(repo_id: str, private: bool | None) -> None:
    """Refuses a repository that could not be pushed to, before words are learned for it."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    from ..hub_names import require_private

    validate_repo_id(repo_id)
    api = HfApi()
    api.whoami()
    if private and api.repo_exists(repo_id):
        require_private(api, repo_id)
