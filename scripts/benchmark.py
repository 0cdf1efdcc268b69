#!/usr/bin/env python3
"""How much faster a compressed model is on this machine: whole model, tokenising included, against the plain model.

Plain and compressed models run in turn on the same images in one process; medians are compared. For each batch size and
setting it prints tokens, the FLOPs ratio (what the shorter sequence is worth on paper), the speed ratio, and their
quotient: 1.0 says that nothing is lost to tokenising and bookkeeping.

    python scripts/benchmark.py --model google/vit-base-patch16-224 --images photographs/
    python scripts/benchmark.py --model my-model --images photographs/ --dtype bfloat16 --vwt '{"keep_ratio": 0.6}'
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import AutoModel, AutoModelForImageClassification

import vwt_hf
from compare import RATIOS, TokenCounter, find_images, name_of, print_table
from vwt_hf.processors import load_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a supported model")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--vwt", action="append", type=json.loads, help="a setting as JSON; may be given several times")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed turns at the largest batch; smaller ones get more"
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()

    plain = load(options.model, getattr(torch, options.dtype)).to(options.device).eval()
    settings = options.vwt or [{"keep_ratio": ratio} for ratio in RATIOS]
    models = [vwt_hf.compress(copy.deepcopy(plain), setting) for setting in settings]
    pixel_values = read(options, plain)
    machine = {
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attention": plain.config._attn_implementation,
    }
    print(f"{options.model} ({type(plain).__name__}), {machine}")

    rows = []
    for batch_size in options.batch_sizes:
        batch = pixel_values[torch.arange(batch_size) % len(pixel_values)]
        repeats = max(options.repeats, min(60, options.repeats * max(options.batch_sizes) // batch_size))
        seconds = in_turn([plain, *models], batch, repeats)
        whole = facts(plain, batch)
        for setting, model, taken in zip(settings, models, seconds[1:], strict=True):
            short = facts(model, batch)
            speed = statistics.median(seconds[0]) / statistics.median(taken)
            flops = whole["flops"] / short["flops"]
            rows.append(
                {
                    "batch": batch_size,
                    "setting": name_of(setting),
                    "tokens": f"{whole['tokens']} → {short['tokens']}",
                    "plain ms": round(1e3 * statistics.median(seconds[0]), 1),
                    "ms": round(1e3 * statistics.median(taken), 1),
                    "FLOPs ratio": round(flops, 2),
                    "speed ratio": round(speed, 2),
                    "quotient": round(speed / flops, 2),
                }
            )
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "machine": machine, "rows": rows}, indent=1))


def load(name: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(name)
    classifies = any("ForImageClassification" in architecture for architecture in config.architectures or [])
    return (AutoModelForImageClassification if classifies else AutoModel).from_pretrained(name, dtype=dtype, vwt=False)


def read(options: argparse.Namespace, model: transformers.PreTrainedModel) -> torch.Tensor:
    """As many images as the largest batch takes, as `pixel_values` (images, channels, height, width)."""
    paths = find_images(options.images, max(options.batch_sizes))
    processor = load_processor(options.model)
    images = [Image.open(path).convert("RGB") for path in paths]
    return processor(images, return_tensors="pt")["pixel_values"].to(options.device, model.dtype)


@torch.inference_mode()
def in_turn(models: list[transformers.PreTrainedModel], batch: torch.Tensor, repeats: int) -> list[list[float]]:
    """Seconds of each forward, by model; the models take turns, so that a machine that slows down slows them all."""
    seconds: list[list[float]] = [[] for _ in models]
    for turn in tqdm(range(-2, repeats), desc=f"batch {len(batch)}", leave=False):
        for model, taken in zip(models, seconds, strict=True):
            synchronize(batch)
            start = time.perf_counter()
            model(pixel_values=batch)
            synchronize(batch)
            if turn >= 0:
                taken.append(time.perf_counter() - start)
    return seconds


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


@torch.inference_mode()
def facts(model: transformers.PreTrainedModel, batch: torch.Tensor) -> dict[str, Any]:
    """Tokens that enter the first layer, and floating point operations of a forward."""
    # The counter sees the matrix products of this attention, and not what fused kernels do on a CPU.
    tokens = TokenCounter(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixel_values=batch)
    return {"tokens": tokens.mean(), "flops": counter.get_total_flops()}


if __name__ == "__main__":
    main()
