#!/usr/bin/env python3
r"""What compression changes in a classifier's answers, measured on your own checkpoint and images.

Runs `pipeline("image-classification", model_kwargs={"vwt": ...})` uncompressed and under each setting; prints one row
a setting: tokens, top-1 accuracy where the images lie in folders named as the model's labels, agreement (same top-1 as
the uncompressed model) and the mean KL divergence to its output.

    python scripts/compare.py --model google/vit-base-patch16-224 --images photographs/
    python scripts/compare.py --model my-model --images validation/ --vwt '{"keep_ratio": 0.6, "criterion": "grid"}'
    python scripts/compare.py --model my-model --images validation/ --vwt \
        '{"method": "inter", "vocabulary": "my-words/", "threshold": 0.1}'
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import pipeline

import vwt_hf  # noqa: F401  registers `vwt`
from vwt_hf.attention import current
from vwt_hf.families import family_of, find_embeddings

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
RATIOS = (0.75, 0.5, 0.25)
DEFAULT_SETTINGS = [
    {"keep_ratio": 1.0},
    *(
        {"criterion": criterion, "keep_ratio": ratio}
        for criterion in ("variance", "random", "grid")
        for ratio in RATIOS
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of an image classifier")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--vwt", action="append", type=json.loads, help="a setting as JSON; may be given several times")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default=None, help="as for pipeline; default: a GPU if there is one")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="use the first so many images, spread evenly over the folder")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()

    paths = find_images(options.images, options.limit)
    images = [Image.open(path).convert("RGB") for path in tqdm(paths, desc="reading images")]
    print(
        f"{options.model}, {len(images)} images of {options.images}, {options.dtype}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )

    plain, labels, tokens, seconds = classify(options, images, None)
    truth = [labels.get(path.parent.name) for path in paths]
    rows = [row("uncompressed", tokens, plain, plain, truth, seconds)]
    for setting in options.vwt or DEFAULT_SETTINGS:
        logits, _, tokens, seconds = classify(options, images, setting)
        rows.append(row(name_of(setting), tokens, logits, plain, truth, seconds) | {"vwt": setting})
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "dtype": options.dtype, "rows": rows}, indent=1))


def name_of(setting: Any) -> str:
    """A setting as a table shows it: its values, which speak for themselves."""
    return " ".join(str(value) for value in setting.values()) if isinstance(setting, dict) else str(setting)


def find_images(folder: Path, limit: int | None) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); give a folder that does.")
    return paths if limit is None else paths[:: max(1, len(paths) // limit)][:limit]


def classify(
    options: argparse.Namespace, images: list[Image.Image], setting: Any
) -> tuple[torch.Tensor, dict[str, int], float, float]:
    """Logits (images, labels), the model's label2id, tokens that enter its first layer, and seconds taken."""
    classifier = pipeline(
        "image-classification",
        model=options.model,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        model_kwargs={"vwt": setting},
    )
    labels = classifier.model.config.label2id
    tokens = TokenCounter(classifier.model)
    logits = torch.empty(len(images), len(labels))
    start = time.perf_counter()
    answers = classifier(
        (image for image in images), batch_size=options.batch_size, top_k=len(labels), function_to_apply="none"
    )
    for index, answer in enumerate(tqdm(answers, total=len(images), desc=str(setting), leave=False)):
        for entry in answer:
            logits[index, labels[entry["label"]]] = entry["score"]
    return logits, labels, tokens.mean(), time.perf_counter() - start


class TokenCounter:
    """Counts the tokens that enter a model's first layer, padding left out."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.tokens = self.images = 0
        find_embeddings(model, family_of(model)).register_forward_hook(self._count)

    def _count(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output  # some embeddings give more than tokens
        forward = current.get()
        batch = forward and forward.batch
        if batch is None:
            self.images += len(output)
            self.tokens += output.shape[0] * output.shape[1]
        else:
            self.images += len(batch.layout.rows)
            self.tokens += batch.layout.tokens

    def mean(self) -> float:
        """Tokens of an image."""
        return round(self.tokens / self.images, 1)


def row(
    name: str,
    tokens: float,
    logits: torch.Tensor,
    plain: torch.Tensor,
    truth: list[int | None],
    seconds: float,
) -> dict[str, Any]:
    expected, found = plain.log_softmax(-1), logits.log_softmax(-1)
    top = logits.argmax(-1)
    labelled = [index for index, label in enumerate(truth) if label is not None]
    right = sum(int(top[index]) == truth[index] for index in labelled)
    return {
        "setting": name,
        "tokens": tokens,
        "top-1 %": round(100 * right / len(labelled), 2) if labelled else None,
        "agree %": round(100 * (top == plain.argmax(-1)).double().mean().item(), 2),
        "kl": round((expected.exp() * (expected - found)).sum(-1).mean().item(), 4),
        "max Δ logit": float(f"{(logits - plain).abs().max().item():.1e}"),
        "seconds": round(seconds, 1),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    columns = [name for name in rows[0]]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for entry in rows:
        print("| " + " | ".join("" if entry[name] is None else str(entry[name]) for name in columns) + " |")


if __name__ == "__main__":
    main()
