#!/usr/bin/env python3
r"""Whether words from the image processor are the model's own, and pipelines answer alike by either's.

For each classifier and setting, over all images, in single precision: how many images have other words by the image
processor than by the model, and how many get another first answer from the pipeline that tokenises on the host than
from the one that tokenises in the model, with the largest difference of a score. Ends with status 1 if any differs.

    python scripts/compare_processor.py --model my-model --images validation/
    python scripts/compare_processor.py --model my-model --images validation/ \
        --vwt '{"method": "inter", "threshold": 0.3}'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vwt_hf.decoding import read_image
from vwt_hf.evaluate_model import name_of, require_shortening
from vwt_hf.hooks import Reduce
from vwt_hf.image_source import find_images
from vwt_hf.printable import printable
from vwt_hf.processors import quiet_transformers
from vwt_hf.terminal import json_file, markdown, require_alone, require_whole_options, run_command, vwt_option
from vwt_hf.whole_saves import require_writable, write_file

SETTINGS: list[dict[str, Any]] = [
    *({"criterion": criterion} for criterion in ("variance", "random", "grid")),
    {"dropped": "merge"},
    {"method": "inter"},
    {"method": "local"},
    {"method": "gradual"},
    {"method": "coarse"},
]
LARGEST = 1e-5
"""Difference of scores that rounding makes."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, action="append", help="Hub id or folder; may be given several times")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--vwt", action="append", type=vwt_option, help="a setting as JSON; may be given several times")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="use the first so many images, spread evenly over the folder")
    parser.add_argument("--json", type=json_file, help="also write the rows here, after each setting")
    options = parser.parse_args(arguments)
    require_alone()
    require_writable(options.json)
    require_whole_options(options, "batch_size", "limit")
    settings = options.vwt or SETTINGS
    require_shortening(settings)
    paths = find_images([options.images], options.limit)
    images = [read_image(path) for path in paths]
    print(f"{len(images)} images of {printable(options.images)}, transformers {transformers.__version__}, float32")
    rows: list[dict[str, Any]] = []
    for model in options.model:
        for setting in settings:
            rows.append({"model": Path(model).name, "setting": name_of(setting)})
            rows[-1] |= compare(model, setting, images, options.batch_size)
            if options.json:
                write_file(options.json, json.dumps(rows, indent=1))
    print(markdown(rows), end="")
    if any(row["other words"] or row["other answers"] or row["max Δ score"] > LARGEST for row in rows):
        raise ValueError("words or answers of the image processor are not those of the model.")


def compare(source: str, setting: Any, images: Sequence[Any], batch_size: int) -> dict[str, Any]:
    """One row: how many images differ, of those that one classifier is shown."""
    pipes = {}
    for host in (True, False):
        with quiet_transformers():
            model = AutoModelForImageClassification.from_pretrained(source, vwt=setting, dtype=torch.float32)
            processor = AutoImageProcessor.from_pretrained(source, vwt=setting if host else False)
        pipes[host] = pipeline("image-classification", model=model, image_processor=processor)
    with words_by_which_models_went() as made:
        scores = {host: all_scores(pipe, images, batch_size) for host, pipe in pipes.items()}
    given, found = (torch.cat([words for by_caller, words in made if by_caller is host]) for host in (True, False))
    return {
        "images": len(images),
        "other words": int((given != found).any(dim=1).sum()) if given.shape == found.shape else len(images),
        "other answers": int((scores[True].argmax(1) != scores[False].argmax(1)).sum()),
        "max Δ score": float(f"{(scores[True] - scores[False]).abs().max().item():.1e}"),
    }


def all_scores(pipe: Any, images: Sequence[Any], batch_size: int) -> torch.Tensor:
    """(images, labels): what a pipeline says of each label, by their names, and of labels of one name by score."""
    answers = pipe(list(images), batch_size=batch_size, top_k=len(pipe.model.config.id2label))
    by_name = (sorted(answer, key=lambda label: (label["label"], -label["score"])) for answer in answers)
    return torch.tensor([[label["score"] for label in answer] for answer in by_name])


@contextlib.contextmanager
def words_by_which_models_went() -> Iterator[list[tuple[bool, torch.Tensor]]]:
    """For each batch that models embed in this block: whether the caller gave the words, and (batch, patches) words."""
    plan, made = Reduce.plan, []

    def watched(self: Reduce, patches: Any, given: Any, words: Any = None) -> Any:
        found = plan(self, patches, given, words)
        made.append((given is not None, found.patch_words(len(patches.pixel_values), patches.count)))
        return found

    with unittest.mock.patch.object(Reduce, "plan", watched):
        yield made


if __name__ == "__main__":
    sys.exit(run_command("compare_processor.py", main))
