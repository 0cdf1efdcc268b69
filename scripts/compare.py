#!/usr/bin/env python3
r"""What compression changes in a classifier's answers, measured on your own checkpoint and images.

Loads the model uncompressed and under each setting; prints one row a setting: tokens, top-1 accuracy where the images
lie in folders named as the model's labels, agreement (same top-1 as the uncompressed model) and the mean KL divergence
to its output.

    python scripts/compare.py --model google/vit-base-patch16-224 --images photographs/
    python scripts/compare.py --model my-model --images validation/ --vwt '{"keep_ratio": 0.6, "criterion": "grid"}'
    python scripts/compare.py --model my-model --images validation/ --vwt \
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
from vwt_hf.evaluation import accuracy, agreement, divergence, on_device, true_labels, usable_device
from vwt_hf.printable import printable
from vwt_hf.processors import load_processor
from vwt_hf.terminal import markdown, require_writable, run_command, write_file
from vwt_hf.vocabulary.image_source import find_images, pixel_batches

RATIOS = (0.75, 0.5, 0.25)
DEFAULT_SETTINGS = [
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
        rows.append(row(name_of(setting), tokens, logits, plain, truth, seconds))
        if setting is not None:
            rows[-1]["vwt"] = setting
        if options.json:
            result = {"model": options.model, "dtype": options.dtype, "rows": rows}
            write_file(options.json, json.dumps(result, indent=1))
    print(markdown([{name: own[name] for name in rows[0]} for own in rows]), end="")


def name_of(setting: Any) -> str:
    """A setting as a table shows it: its values, which speak for themselves."""
    if setting is None:
        return "uncompressed"
    return " ".join(str(value) for value in setting.values()) if isinstance(setting, dict) else str(setting)


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
    seconds: float,
) -> dict[str, Any]:
    right = accuracy(logits, truth)
    return {
        "setting": name,
        "tokens": tokens,
        "top-1 %": None if right is None else round(100 * right, 2),
        "agree %": round(100 * agreement(logits, plain), 2),
        "kl": round(divergence(logits, plain), 4),
        "max Δ logit": float(f"{(logits - plain).abs().max().item():.1e}"),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(run_command("compare.py", main))
