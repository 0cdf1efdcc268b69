#!/usr/bin/env python3
r"""Learns the words that come with the package, for patches of 14, 16 and 32 pixels, and writes them into it.

    python scripts/learn_packaged_words.py ../shared/data/imagenet-sample/train \
        --image-processor ../shared/models/dinov2-small-caltech101

Prints what model_cards/packaged-words.md says of each. Words of few patches are left out: they show parts of
photographs. The others are kept in float16, which moves a value by a sixteenth of the step between two colours of
8 bits at most.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from vwt_hf import VisualVocabulary
from vwt_hf.packaged_words import FOLDER
from vwt_hf.processors import load_processor
from vwt_hf.terminal import markdown, require_alone, run_command
from vwt_hf.vocabulary.files import WORDS_FILE, vocabulary_files, write_vocabulary

SIZES = {14: 1000, 16: 1000, 32: 500}
"""Words to learn by patch size. An image of 224 pixels has only 49 patches of 32, and words of that size are large."""
FEWEST_PATCHES = 10
"""That a word is the mean of."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--image-processor", required=True, help="Hub id or folder of a model, for its resizing")
    parser.add_argument("--patch-sizes", type=int, nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (default: in the package)")
    options = parser.parse_args(arguments)
    require_alone()
    processor = load_processor(options.image_processor)
    rows = []
    for patch_size in options.patch_sizes:
        learned = VisualVocabulary.learn(
            options.images, processor, size=SIZES[patch_size], patch_size=patch_size, dataset=options.images.parent.name
        )
        assert learned.frequencies is not None
        stays = learned.frequencies >= FEWEST_PATCHES
        info = learned.info
        files = vocabulary_files(learned.words[stays].half(), learned.frequencies[stays], info)
        write_vocabulary(options.output / f"patch{patch_size}", files)
        rows.append(
            {
                "patch": patch_size,
                "words": int(stays.sum()),
                "images": info.images,
                "patches": info.patches,
                "inertia": f"{info.inertia:.4g}",
                "bytes": len(files[WORDS_FILE]),
                "sha256": hashlib.sha256(files[WORDS_FILE]).hexdigest(),
            }
        )
    print(markdown(rows), end="")


if __name__ == "__main__":
    sys.exit(run_command("learn_packaged_words.py", main))
