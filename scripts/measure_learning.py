#!/usr/bin/env python3
r"""Measures how fast words are learned from files and from patches in memory, by the processes that a launcher starts.

    python scripts/measure_learning.py --images photographs/ --processor google/vit-base-patch16-224
    accelerate launch --multi_gpu --num_processes 2 scripts/measure_learning.py --images photographs/ \
        --processor google/vit-base-patch16-224

Rates are those after the words are seeded, which the main process does alone, in the seconds that stand beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from vwt_hf.cli.loading import add_device
from vwt_hf.image_source import open_images
from vwt_hf.processed_images import PatchBatch, patch_batches
from vwt_hf.processes import joined, place, usable_device
from vwt_hf.processors import load_processor
from vwt_hf.terminal import markdown, run_command
from vwt_hf.vocabulary.kmeans import MiniBatchKMeans
from vwt_hf.vocabulary.learning import learn_step, steps_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--processor", required=True, help="Hub id or folder of a model, whose image processor is used")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=1000, help="words to learn")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a batch, of all processes together")
    parser.add_argument("--max-images", type=int, help="they are held as patches (default: all)")
    add_device(parser)
    options = parser.parse_args()
    with joined(options.device):
        measure(options)


def measure(options: argparse.Namespace) -> None:
    index, processes = place()
    most = None if options.max_images is None else len(range(index, options.max_images, processes))
    part = open_images(options.images).part(max_images=most, index=index, number=processes)
    share = -(-options.batch_size // processes)
    from_files = patch_batches(part.items, load_processor(options.processor), options.patch_size, share)
    held: list[PatchBatch] = []

    def hold() -> Iterable[PatchBatch]:
        for batch in from_files:
            held.append(batch)
            yield batch

    rows = [rates("files", hold(), options), rates("patches in memory", held, options)]
    if index == 0:
        print(f"{torch.get_num_threads()} threads a process, {usable_device(options.device)}")
        print(markdown(rows), end="")


def rates(source: str, batches: Iterable[PatchBatch], options: argparse.Namespace) -> dict[str, Any]:
    """Learns from batches; how many images and patches of all processes a second."""
    values = 3 * options.patch_size**2
    kmeans = MiniBatchKMeans(options.size, values, device=usable_device(options.device))
    images, seeded, seeding, started = 0, 0, 0.0, 0.0
    for batch, reads in steps_of(iter(batches), kmeans):
        was_seeded, before = kmeans.words is not None, time.perf_counter()
        learn_step(kmeans, batch)
        if was_seeded:
            images += sum(read.images for read in reads)
        elif kmeans.words is not None:
            started, seeded = time.perf_counter(), kmeans.seen
            seeding = started - before
    if not images:
        raise ValueError(
            "there are too few images to seed the words and learn from more; give more, or a smaller --size."
        )
    seconds = time.perf_counter() - started
    return {
        "learned from": source,
        "processes": place()[1],
        "images": images,
        "images/s": round(images / seconds, 1),
        "patches/s": round((kmeans.seen - seeded) / seconds),
        "seeding s": round(seeding, 1),
        "inertia": round(kmeans.inertia, 3),
    }


if __name__ == "__main__":
    sys.exit(run_command("measure_learning.py", main))
