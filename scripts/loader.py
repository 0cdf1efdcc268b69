#!/usr/bin/env python3
r"""What tokenising in the data loader costs there, and saves in the model.

Loader: images a second out of a `DataLoader` whose workers read photographs and process each batch, by the plain image
processor and under each setting; ratio is that of the plain one's median time. Forward: the model on a batch, plain,
by words that it searches itself, and by words that it is given; speed ratio is that of the plain model's median time,
FLOPs ratio that of its floating point operations. Padding: the share of a padded batch that holds no token, with images
in any order and grouped by their lengths. Those that are compared run in turn in one process.

    python scripts/loader.py --model my-model --images photographs/
    python scripts/loader.py --model my-model --images photographs/ --vwt '{"method": "inter"}' --workers 4
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmark import Method, count
from compare_processor import SETTINGS
from vwt_hf import compress, token_lengths
from vwt_hf.checks import require_whole
from vwt_hf.cli.loading import load_model
from vwt_hf.decoding import read_image
from vwt_hf.evaluate_model import name_of, require_shortening
from vwt_hf.image_source import find_images
from vwt_hf.plans import PATCH_WORDS
from vwt_hf.printable import printable
from vwt_hf.terminal import json_file, markdown, require_alone, require_whole_options, run_command, vwt_option
from vwt_hf.timing import time_in_turn
from vwt_hf.weights import copy_sharing_weights
from vwt_hf.whole_saves import require_writable, write_file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a model with its image processor")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument("--vwt", action="append", type=vwt_option, help="a setting as JSON; may be given several times")
    parser.add_argument("--workers", type=int, default=2, help="processes that load (default: 2)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, default=256, help="images (default: 256), spread evenly over the folder")
    parser.add_argument("--turns", type=int, default=7, help="timed epochs and forwards of each (default: 7)")
    parser.add_argument("--json", type=json_file, help="also write the rows here")
    options = parser.parse_args(arguments)
    require_alone()
    require_writable(options.json)
    require_whole_options(options, "batch_size", "limit", "turns")
    require_whole("--workers", options.workers, least=0)
    settings = options.vwt or SETTINGS
    require_shortening(settings)
    paths = find_images([options.images], options.limit)
    print(
        f"{printable(options.model)}, {len(paths)} images, batch {options.batch_size}, {options.workers} workers, "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    processors = [AutoImageProcessor.from_pretrained(options.model, vwt=vwt) for vwt in (False, *settings)]
    loaders = [
        DataLoader(
            paths,  # type: ignore[arg-type]
            options.batch_size,
            num_workers=options.workers,
            collate_fn=functools.partial(processed, processor),
            persistent_workers=options.workers > 0,
        )
        for processor in processors
    ]
    names = ["plain", *map(name_of, settings)]
    rows = {"loader": loading(names, loaders, len(paths), options.turns)}
    batches = [next(iter(loader)) for loader in loaders]
    rows["forward"] = forwards(options.model, names, settings, batches, options.turns)
    rows["padding"] = padding(names, processors, loaders, options.batch_size)
    if options.json:
        write_file(options.json, json.dumps(rows, indent=1))
    for table in filter(None, rows.values()):  # there is no padding where all images have the same number of tokens
        print(markdown(table))


def processed(processor: Any, paths: Sequence[Path]) -> Any:
    return processor([read_image(path) for path in paths], return_tensors="pt")


def loading(names: Sequence[str], loaders: Sequence[Any], images: int, turns: int) -> list[dict[str, Any]]:
    def epoch(loader: Any) -> None:
        for _ in loader:
            pass

    cpu = torch.device("cpu")
    medians = [*map(statistics.median, time_in_turn([functools.partial(epoch, each) for each in loaders], cpu, turns))]
    return [
        {"setting": name, "images / s": round(images / seconds, 1), "ratio": round(medians[0] / seconds, 3)}
        for name, seconds in zip(names, medians, strict=True)
    ]


@torch.inference_mode()
def forwards(
    source: str, names: Sequence[str], settings: Sequence[Any], batches: Sequence[Any], turns: int
) -> list[dict[str, Any]]:
    """Rows of the plain model, and of each setting by words that the model searches and by words that it is given."""
    plain = load_model(source, torch.device("cpu"), "float32")
    pixels = batches[0]["pixel_values"]
    runs: list[tuple[str, str, Any, Callable[[], object]]] = [
        (names[0], "", plain, functools.partial(plain, pixel_values=pixels))
    ]
    for name, setting, batch in zip(names[1:], settings, batches[1:], strict=True):
        model = compress(copy_sharing_weights(plain), setting)
        runs.append((name, "searched", model, functools.partial(model, pixel_values=pixels)))
        runs.append((name, "given", model, functools.partial(model, **batch)))
    counts = [count(Method(name, name, model), [pixels]) for name, _, model, _ in runs]
    taken = time_in_turn([run for *_, run in runs], pixels.device, turns)
    medians = [statistics.median(seconds) for seconds in taken]
    return [
        {
            "setting": name,
            "words": words,
            "tokens": counted["tokens"],
            "ms": round(1000 * seconds, 1),
            "speed ratio": round(medians[0] / seconds, 3),
            "FLOPs ratio": round(counts[0]["flops"] / counted["flops"], 3),
        }
        for (name, words, *_), counted, seconds in zip(runs, counts, medians, strict=True)
    ]


def padding(
    names: Sequence[str], processors: Sequence[Any], loaders: Sequence[Any], batch_size: int
) -> list[dict[str, Any]]:
    """Rows of the settings under which images have different numbers of tokens."""
    rows = []
    for name, processor, loader in zip(names, processors, loaders, strict=True):
        if processor.vwt is None:
            continue
        lengths = token_lengths(torch.cat([batch[PATCH_WORDS] for batch in loader]))
        if len(set(lengths)) == 1:
            continue
        seeded = torch.Generator().manual_seed(0)
        orders = {
            "any order": torch.randperm(len(lengths), generator=seeded).tolist(),
            "grouped by length": list(LengthGroupedSampler(batch_size, lengths=lengths, generator=seeded)),
        }
        shares = {order: f"{100 * padded(lengths, places, batch_size):.1f} %" for order, places in orders.items()}
        rows.append({"setting": name, "tokens": round(statistics.mean(lengths), 1), **shares})
    return rows


def padded(lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """The share of batches in that order, each as long as its longest image, that holds no token."""
    batches = [[lengths[place] for place in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


if __name__ == "__main__":
    sys.exit(run_command("loader.py", main))
