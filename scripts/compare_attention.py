#!/usr/bin/env python3
r"""How attention over a batch of images of different lengths is best run on this machine: times of one layer.

The lengths are those that your images get from a vocabulary. Compared, in turn, medians: a call for each distinct
length on views of the packed batch (what vwt_hf does on a CPU), a call for each image, groups of images padded to their
longest, and the padded batch.

    python scripts/compare_attention.py --model my-model --images photographs/ --vocabulary my-words/
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from vwt_hf import VisualVocabulary
from vwt_hf.attention import _by_layout
from vwt_hf.image_source import find_images
from vwt_hf.layout import Layout, attention_bias, group
from vwt_hf.plans import Grouped
from vwt_hf.processed_images import pixel_batches
from vwt_hf.processors import load_processor, processor_statistics, whole_images
from vwt_hf.terminal import markdown, require_alone, require_whole_options, run_command
from vwt_hf.timing import time_in_turn
from vwt_hf.words import index_words, nearest_words, patchify

Run = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder whose image processor prepares the images")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--vocabulary", required=True, help="folder or Hub id of words, used at threshold 0.1")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args(arguments)
    require_alone()
    require_whole_options(options, "batch_sizes", "heads", "head_size", "turns")
    processor = load_processor(options.model)
    vocabulary = VisualVocabulary.from_pretrained(options.vocabulary)
    index = index_words(vocabulary.normalized(*processor_statistics(processor, vocabulary.channels)))
    rows = []
    for size in options.batch_sizes:
        paths = find_images([options.images], size)
        (made,) = pixel_batches(paths, processor, len(paths))
        pixel_values = whole_images(made)
        patch_words = nearest_words(patchify(pixel_values, (vocabulary.patch_size,) * 2), index, 0.1)
        runs = back_ends(group(patch_words, 1), options)
        with torch.inference_mode():
            taken = time_in_turn(list(runs.values()), torch.device("cpu"), options.turns)
        medians = (round(1e3 * statistics.median(seconds), 2) for seconds in taken)
        rows.append({"batch": len(pixel_values)} | dict(zip(runs, medians, strict=True)))
    print(f"ms a layer, {options.dtype}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(markdown(rows), end="")


def back_ends(layout: Layout, options: argparse.Namespace) -> dict[str, Run]:
    """What runs one layer's attention over a packed batch, by name."""
    dtype = getattr(torch, options.dtype)
    shape = (3, 1, layout.tokens, options.heads, options.head_size)
    packed = list(torch.randn(shape, dtype=dtype).transpose(2, 3))
    bias = attention_bias(layout, exponent=1)
    plan = Grouped(layout, 1, None)
    lengths = [length for length, images in layout.runs for _ in range(images)]
    runs: dict[str, Run] = {
        "by length": functools.partial(_by_layout, attend, packed, plan, None),
        "by image": functools.partial(by_image, packed, bias.to(dtype), lengths),
    }
    for count in (8, 4, 2, 1):
        name = "padded inside" if count == 1 else f"{count} groups"
        runs[name] = functools.partial(by_group, packed, bias.to(dtype), lengths, count)
    longest = (3, len(lengths), layout.longest, options.heads, options.head_size)
    padding = torch.zeros(len(lengths), 1, 1, layout.longest, dtype=dtype)
    runs["padded batch"] = functools.partial(attend, *torch.randn(longest, dtype=dtype).transpose(2, 3), padding)
    return runs


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(images, tokens, heads, head size)."""
    return scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)


def by_image(packed: list[torch.Tensor], bias: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    parts = zip(*(tensor.split(lengths, 2) for tensor in packed), bias[:, None, None].split(lengths, 3), strict=True)
    return torch.cat([attend(*part) for part in parts], dim=1)


def by_group(packed: list[torch.Tensor], bias: torch.Tensor, lengths: list[int], count: int) -> torch.Tensor:
    """Images in `count` groups of equal size, each gathered into a padded batch and back."""
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    outputs = []
    for part in torch.arange(len(lengths)).tensor_split(min(count, len(lengths))):
        place = torch.arange(int(sizes[part].max()))
        index = (starts[part, None] + place).clamp(max=bias.shape[1] - 1)
        valid = place < sizes[part, None]
        padded = (tensor[0][:, index].transpose(0, 1) for tensor in packed)
        masked = bias[0, index].masked_fill(~valid, -torch.inf)[:, None, None]
        outputs.append(attend(*padded, masked)[valid])
    return torch.cat(outputs)


if __name__ == "__main__":
    sys.exit(run_command("compare_attention.py", main))
