#!/usr/bin/env python3
r"""What compression changes in a classifier's answers, measured on your own checkpoint and images.

Loads the model uncompressed and under each setting; prints one row a setting: tokens, top-1 accuracy where the images
lie in folders named as the model's labels, and the same within the group of images where it is lowest (groups are the
folders, or what --groups says; those of fewer than 5 images are left out), agreement (same top-1 as the uncompressed
model) and the mean KL divergence to its output.

    python scripts/compare.py --model google/vit-base-patch16-224 --images photographs/
    python scripts/compare.py --model my-model --images validation/ --vwt '{"keep_ratio": 0.6, "criterion": "grid"}'
    python scripts/compare.py --model my-model --images validation/ --groups groups.json --vwt \
        '{"method": "inter", "vocabulary": "my-words/", "threshold": 0.1}'
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageClassification

import vwt_hf
from vwt_hf.config import RECOMMENDED
from vwt_hf.evaluation import (
    accuracy,
    agreement,
    correctness,
    divergence,
    on_device,
    true_labels,
    usable_device,
    worst_group,
)
from vwt_hf.printable import printable
from vwt_hf.processors import load_processor
from vwt_hf.terminal import markdown, require_writable, run_command, write_file
from vwt_hf.vocabulary.image_source import find_images, pixel_batches

RATIOS = (0.75, 0.5, 0.25)
FIRST_SETTINGS: list[Any] = [True, {"method": "local"}]
"""Settings that both scripts measure first where none is asked for."""
DEFAULT_SETTINGS = [
    *FIRST_SETTINGS,
    {"keep_ratio": 1.0},
    *(
        {"criterion": criterion, "keep_ratio": ratio}
        for criterion in ("variance", "random", "grid")
        for ratio in RATIOS
    ),
]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of an image classifier")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--vwt", action="append", type=json.loads, help="a setting as JSON; may be given several times")
    add_groups(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", help="torch device; default: a GPU if there is one")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="use the first so many images, spread evenly over the folder")
    parser.add_argument("--json", type=Path, help="also write the rows here, after each setting")
    options = parser.parse_args(arguments)
    if options.batch_size < 1 or (options.limit is not None and options.limit < 1):
        parser.error("--batch-size and --limit take whole numbers from 1 on.")
    settings = options.vwt or DEFAULT_SETTINGS
    for setting in settings:
        vwt_hf.VWTConfig.parse(setting)
    require_writable(options.json)
    device = usable_device(options.device)
    paths = find_images([options.images], options.limit)
    groups = groups_of(paths, options.images, options.groups)
    processor = load_processor(options.model)
    print(
        f"{printable(options.model)}, {len(paths)} images of {printable(options.images)}, {options.dtype}, "
        f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    rows: list[dict[str, Any]] = []
    for setting in (None, *settings):
        model = AutoModelForImageClassification.from_pretrained(
            options.model, dtype=getattr(torch, options.dtype), vwt=setting, trust_remote_code=False
        )
        model = model.to(device).eval()
        batches = pixel_batches(paths, processor, options.batch_size)
        total = -(-len(paths) // options.batch_size)
        with tqdm(batches, total=total, desc=name_of(setting), leave=False) as bar:
            logits, tokens, seconds = classify(model, bar, functools.partial(logits_of, model))
        if setting is None:
            plain = logits
            truth, said = true_labels([path.parent.name for path in paths], model.config)
            for sentence in said:
                print(printable(sentence))
        rows.append(row(name_of(setting), tokens, logits, plain, truth, groups, seconds))
        if setting is not None:
            rows[-1]["vwt"] = setting
        if options.json:
            result = {"model": options.model, "dtype": options.dtype, "rows": rows}
            write_file(options.json, json.dumps(result, indent=1))
    print(markdown([{name: own[name] for name in rows[0]} for own in rows]), end="")


def fields_of(setting: Any) -> dict[str, Any]:
    """The fields that a setting, as it stands in JSON, gives a value."""
    if setting is True:
        return {"method": RECOMMENDED}
    return setting if isinstance(setting, dict) else {"vocabulary": str(setting)}


def name_of(setting: Any) -> str:
    """A setting as a table shows it: words speak for themselves, numbers come after the name of their field."""
    if setting is None:
        return "uncompressed"
    return ", ".join(
        value if isinstance(value, str) else f"{name.replace('_', ' ')} {value}"
        for name, value in fields_of(setting).items()
    )


def add_groups(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--groups`, which `groups_of` reads."""
    parser.add_argument(
        "--groups",
        type=Path,
        help="JSON file with the group of each image: its path below --images, and the group's name; default: folders",
    )


def groups_of(paths: Sequence[Path], images: Path, groups: Path | None) -> list[str]:
    """The name of each image's group.

    Args:
        images: the folder that the images lie below.
        groups: a JSON object from paths below `images`, with /, to names; `None`: an image's group is its folder.

    Raises:
        ValueError: the file is no such object, or an image is not in it.
    """
    if groups is None:
        return [path.parent.name for path in paths]
    try:
        table = json.loads(groups.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--groups is {groups}, which is no JSON ({error}); expected an object.") from error
    if not isinstance(table, dict):
        raise ValueError(f"--groups is {groups}, which holds a {type(table).__name__}; expected an object.")
    names = [path.relative_to(images).as_posix() for path in paths]
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"--groups is {groups}, which names no group of {len(missing)} of {len(names)} images, such as "
            f"{missing[0]!r}; expected one for each path below {images}."
        )
    return [str(table[name]) for name in names]


@torch.inference_mode()
def classify(
    model: transformers.PreTrainedModel,
    batches: Iterable[Any],
    answer: Callable[[Any], torch.Tensor],
) -> tuple[torch.Tensor, float, float]:
    """What `answer` gives for all batches, (images, labels), tokens of an image, and seconds, reading included."""
    start = time.perf_counter()
    with vwt_hf.count_tokens(model) as count:
        logits = torch.cat([answer(on_device(made, model)).float().cpu() for made in batches])
    return logits, round(count.mean, 1), time.perf_counter() - start


def logits_of(model: transformers.PreTrainedModel, made: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**made).logits


def row(
    name: str,
    tokens: float,
    logits: torch.Tensor,
    plain: torch.Tensor,
    truth: Sequence[Collection[int]],
    groups: Sequence[str],
    seconds: float,
) -> dict[str, Any]:
    correct = correctness(logits, truth)
    return {
        "setting": name,
        "tokens": tokens,
        "top-1 %": percent(accuracy(correct)),
        "worst group %": percent(worst_group(correct, groups)),
        "agree %": round(100 * agreement(logits, plain), 2),
        "kl": round(divergence(logits, plain), 4),
        "max Δ logit": float(f"{(logits - plain).abs().max().item():.1e}"),
        "seconds": round(seconds, 1),
    }


def percent(part: float | None) -> float | None:
    return None if part is None else round(100 * part, 2)


if __name__ == "__main__":
    sys.exit(run_command("compare.py", main))
