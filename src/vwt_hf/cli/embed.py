"""`vwt-hf embed`: the features of every image of a folder or a data set, in files."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..printable import printable
from ..terminal import aligned, options, vwt_option
from ..whole_saves import require_folder
from .loading import add_device, add_dtype, features_class, load
from .sources import IMAGES, open_source

if TYPE_CHECKING:
    from ..embedding import Embedded

HELP = "write the features of every image of a folder or a data set into files"
DESCRIPTION = """\
Runs a model, plain or shortened, on every image and writes what it makes of them to OUTPUT, in files of --shard-size
images: the image embedding of models of two towers (CLIP), else the pooled output, else CLS or the mean of the tokens.
Each row has the image's name, its number and its features (float32).

After an interruption the same command goes on: files are whole or not there. It then refuses another model, setting,
list of images, attention, kind of device, or version of torch or transformers. Images that cannot be read are left out
and named, at the end and in OUTPUT/embed.json; if none can be read, that is an error. Those that were out of reach, as
on a drive that was gone, are read by the next run that finds them.

Several processes, on one machine or many that see OUTPUT, share the files out under `accelerate launch --multi_gpu`,
also on CPUs."""
EXAMPLES = """\
examples:
  vwt-hf embed photographs/ --model facebook/dinov2-small --vwt true --output features
  vwt-hf embed ethz/food101 --split validation --model openai/clip-vit-base-patch16 --output food --dtype bfloat16
  accelerate launch --multi_gpu --num_processes 4 -m vwt_hf.cli embed photographs/ --model MODEL --output OUT"""
NAMED = 10
"""Unreadable images that are printed; the file has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help=IMAGES)
    parser.add_argument("--model", required=True, metavar="MODEL", help="Hub id or folder of a supported model")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the files")
    parser.add_argument(
        "--vwt",
        type=vwt_option,
        metavar="JSON",
        help="how to shorten: true, or a setting's fields; false: not at all (default: as MODEL says)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images in one forward pass (default: 32)")
    parser.add_argument(
        "--shard-size",
        type=int,
        default=1024,
        help="images of a file, which one process makes: there should be a file for each process (default: 1024)",
    )
    parser.add_argument(
        "--format", choices=("parquet", "safetensors"), default="parquet", help="of the files (default: parquet)"
    )
    parser.add_argument("--column", help="the data set's image column (default: its first)")
    parser.add_argument("--split", help="of the data set (default: its only one, or train)")
    parser.add_argument(
        "--workers", type=int, help="processes that read images; 0: none (default: as many as cores, at most 4)"
    )
    add_device(parser)
    add_dtype(parser)


def work(args: argparse.Namespace) -> None:
    require_folder(args.output)

    from transformers import AutoConfig

    from ..embedding import embed
    from ..processes import everywhere, joined, place, usable_device
    from ..processors import load_processor, require_checkpoint

    def prepare() -> tuple[Any, Any, Any]:
        require_checkpoint(args.model)
        device = usable_device(args.device)
        source, _ = open_source(args.images, column=args.column, split=args.split)
        auto = features_class(AutoConfig.from_pretrained(args.model, trust_remote_code=False))
        model = load(args.model, device, auto=auto, dtype=args.dtype, vwt=args.vwt)
        return model, source, load_processor(args.model)

    with joined(args.device):
        (model, source, processor), _ = everywhere(prepare)
        embedded = embed(
            model,
            source,
            args.output,
            image_processor=processor,
            **options(args, "column", "batch_size", "shard_size", "format", "workers"),
        )
        if place()[0] > 0:
            return
        print(f"{type(model).__name__} from {printable(args.model)}\n")
        print(aligned(facts(embedded)))
        for image in embedded.unreadable[:NAMED]:
            print(f"unreadable: {printable(image['reason'])}")
        if len(embedded.unreadable) > NAMED:
            print(f"and {len(embedded.unreadable) - NAMED:,} more: {printable(args.output)}/embed.json")
        if not embedded.images:
            raise ValueError(
                f"none of {len(embedded.unreadable):,} images of {printable(args.images)} can be read, so that the "
                "files have no rows."
            )


def facts(made: Embedded) -> list[tuple[str, str]]:
    """What was written and where the time went, for people."""
    first, seconds = made.files[0], made.seconds
    rows = [
        ("images", f"{made.images:,} of {made.values} values each"),
        ("unreadable", f"{len(made.unreadable):,}"),
        ("files", f"{len(made.files):,}, {first} the first"),
    ]
    if not made.made:
        return [*rows, ("this run", "found all files there")]
    other = seconds["total"] - seconds["waiting"] - seconds["forward"] - seconds["writing"]
    return [
        *rows,
        ("this run", f"{made.embedded:,} images in {made.elapsed:.1f} s, processes: {made.processes}"),
        ("tokens", "none" if made.tokens is None else f"{made.tokens:.1f} of an image"),
        ("images/s", f"{made.rate:.2f}"),
        ("without reading", f"{made.rate_without_reading:.2f} images/s, if all had been decoded and resized before"),
        (
            "seconds",
            f"{seconds['waiting']:.1f} waiting for images, {seconds['forward']:.1f} in the model, "
            f"{seconds['writing']:.1f} writing, {other:.1f} else; reading and resizing took {seconds['reading']:.1f}",
        ),
    ]
