#!/usr/bin/env python3
r"""What compression costs and gains on your own model, images and device, beside other ways to make the model cheaper.

For each data type, batch size and method, in turn with the uncompressed model of that data type, in one process:

  tokens        of an image, the mean over all layers
  ms            of a whole forward of a batch, tokenising included: the median of its turns, the mean over the batches
                that --timed images of --images make; and p95 of all turns
  speed ratio   of the uncompressed model's ms over those of the method (a ratio of medians, not of single turns)
  FLOPs ratio   the same of floating point operations; none for int8, whose operations are not floating point
  quotient      speed ratio over FLOPs ratio: 1.0 says that nothing is lost to tokenising and bookkeeping
  embedding %   time from pixels to the first layer (choosing, grouping and projecting patches), as a share of the
                uncompressed model's whole forward; in brackets what the uncompressed model's own embeddings take
  memory MiB    weights, and the most that a forward allocates on top of what was there
  memory ratio  that of the uncompressed model over it
  J/image       where the device has an energy counter; its idling counts

Every ratio is uncompressed over method, so more is better. A second table has one row a method, with its ratios at each
batch size. Over the whole folder (or --limit images), and against the uncompressed model in the first data type:
agreement (same top-1), mean KL divergence to its output, and, where the images lie in folders named as the model's
labels, top-1 accuracy, and the same within the group of images where it is lowest. Groups are the folders, or what
--groups says; those of fewer than 5 images are left out. For a model without a classifier, the mean cosine of its
pooled output. A run that is cut off goes on where it stopped if it is started again with the same --json.

    python scripts/benchmark.py --model google/vit-base-patch16-224 --images photographs/
    python scripts/benchmark.py --model my-model --images photographs/ --peers all --dtype float32 bfloat16 \
        --json results.json --markdown results.md --plot results.png
    python scripts/benchmark.py --model my-model --images photographs/ --vocabulary my-words/ \
        --vwt '{"keep_ratio": 0.6, "criterion": "grid"}'
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModel, AutoModelForImageClassification, CLIPVisionModelWithProjection, PreTrainedModel

import peers
import vwt_hf
from energy import Meter, NoMeter, find_meter
from vwt_hf import count_tokens
from vwt_hf.answers import answer, are_finite, classifies, true_labels
from vwt_hf.cli.evaluate import add_groups
from vwt_hf.cli.loading import DTYPES, leave_out_random
from vwt_hf.evaluate_model import fields_of, name_of, require_shortening
from vwt_hf.families import family_of, find_layers, find_tower
from vwt_hf.figures import accuracy, agreement, are_right, cosines, divergence, first_answers, worst_group
from vwt_hf.hooks import is_even
from vwt_hf.image_source import described_files, find_images, require_apart
from vwt_hf.labelled_images import folder_name, groups_of
from vwt_hf.on_gpu import has_kernels
from vwt_hf.printable import printable
from vwt_hf.processed_images import pixel_batches
from vwt_hf.processes import usable_device
from vwt_hf.processors import described_processor, load_processor, whole_images
from vwt_hf.provenance import compression_of, cpu_name
from vwt_hf.terminal import markdown, require_alone, run_command, vwt_option
from vwt_hf.timing import FEWEST_TURNS, count_flops, stopwatch, synchronize, time_in_turn
from vwt_hf.visualize import require_matplotlib
from vwt_hf.weights import copy_sharing_weights, fingerprint_of
from vwt_hf.whole_saves import require_writable, write_file

MERGING: dict[str, tuple[str, str, Callable[[PreTrainedModel, Any], PreTrainedModel]]] = {
    "tome": ("ToMe, r {}", "tome_r", peers.tome),
    "tome-decreasing": ("ToMe decreasing, r {}", "tome_r", peers.tome_decreasing),
    "pitome": ("PiToMe, r {}", "tome_r", peers.pitome),
    "tps": ("TPS, keep {}", "tps_keep", peers.tps),
}
"""Peers that merge tokens and learn nothing: name, with a place for a number; its option; what changes a model."""
FITTED: dict[str, tuple[str, Callable[..., PreTrainedModel]]] = {
    "tome-alike": ("ToMe alike, r {}", peers.tome_alike),
    "ppt": ("PPT, r {}", peers.ppt),
}
"""Peers that merge tokens, with the numbers of `--tome-r`, and are fitted to images."""
FIRST_SETTINGS: list[Any] = [True, {"method": "local"}]
"""Settings that are measured first if none is asked for."""
RATIOS = (0.75, 0.5, 0.25)
PEERS = ["random", *MERGING, *FITTED, "int8", "bf16", "bf16+settings"]
WARM_UP = 2
EMBEDDING_TURNS = 3
TURNS = 1000
"""The most timed turns of a batch size, unless its batches need more (`TURNS_OF_BATCH`)."""
TURNS_OF_BATCH = 3
"""Of each batch, however long they take."""
ENERGY_SECONDS = 3.0
QUALITY_BATCH = 32
LEARN_FROM = 64
"""Images that peers are fitted to."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    require_alone()
    require_writable(options.json, options.markdown, options.plot)
    if options.plot:
        require_format(options.plot)
        require_apart(options.plot, options.images)
    require_shortening(options.settings)
    device = usable_device(options.device)
    paths = find_images([options.images], options.limit)
    groups = groups_of(paths, options.images, options.groups)
    reference = load(options.model).to(device).eval()
    plain = {name: copy.deepcopy(reference).to(getattr(torch, name)) for name in options.dtype}
    machine = describe(reference, device)
    print(f"{printable(options.model)} ({type(reference).__name__}), {machine}")
    meter = energy_meter(device)
    processor = load_processor(options.model)
    by_words = [compressed(reference, setting) for setting in all_settings(options)]
    of = {
        "images": described_files(options.images, paths),
        "groups": hashlib.sha256(json.dumps(groups).encode()).hexdigest()[:16],
        "weights": fingerprint_of(reference),
        "words": {method.name: compression_of(method.model)["words"] for method in by_words},
        "image_processor": described_processor(processor),
    }
    results = Results(options.json, header(options, machine, of))

    methods = functools.cache(lambda dtype: methods_of(options, plain[dtype]))
    # Answers first: a damaged image, or answers by NaN, are found before hours of timing.
    for dtype in options.dtype:
        if not results.rows("quality", dtype=dtype):
            rows = judge(methods(dtype), plain[options.dtype[0]], paths, groups, processor)
            results.add("quality", [{"dtype": dtype} | row for row in rows])
    for dtype in options.dtype:
        batch_sizes = [size for size in options.batch_sizes if not results.rows("timing", dtype=dtype, batch=size)]
        if not batch_sizes:
            continue
        images = sample(options, plain[dtype], max(options.timed, *options.batch_sizes))
        for size in batch_sizes:
            rows = measure(methods(dtype), batches_of(images, size), options, meter)
            results.add("timing", [{"dtype": dtype, "batch": size} | row for row in rows])

    text = f"{markdown(table(results))}\n{markdown(summary(results))}"
    if options.markdown:
        write_file(options.markdown, f"{printable(options.model)}, {machine}\n\n{text}")
    if options.plot:
        plot(results, max(options.batch_sizes), options.plot)
    print(f"\n{text}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a supported model")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, searched through all levels")
    parser.add_argument(
        "--vwt", action="append", type=vwt_option, help="a setting as JSON; may be given several times", metavar="JSON"
    )
    parser.add_argument(
        "--vocabulary",
        action="append",
        default=[],
        help="folder or Hub id of words, used at threshold 0.1; may be given several times",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32"], choices=DTYPES, help="agreement is with the first; default float32"
    )
    parser.add_argument("--device", help="torch device; default: cuda where there is one, else cpu")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[],
        choices=[*PEERS, "all"],
        help="also: random patches at the settings' keep ratios; Token Merging, also with fewer pairs from layer "
        "to layer, and of all patches that are alike enough; PiToMe; PPT; TPS without training; dynamic 8-bit layers "
        "(float32 on a CPU); the model in bfloat16; and each setting in bfloat16",
    )
    parser.add_argument(
        "--tome-r",
        nargs="+",
        type=int,
        default=[5, 8, 10, 13, 16],
        help="how many patches ToMe, PiToMe and PPT take from each layer: of tome-decreasing the mean over layers, of "
        f"tome-alike the mean over images. Tome-alike and ppt are fitted to {LEARN_FROM} of --images",
    )
    parser.add_argument(
        "--tps-keep", nargs="+", type=float, default=[0.9, 0.7], help="share of patches that each pruning of TPS keeps"
    )
    parser.add_argument(
        "--timed", type=int, default=64, help="time the batches of so many images, spread evenly over the folder"
    )
    parser.add_argument(
        "--turns",
        type=int,
        help=f"timed turns of a batch size at most; default: {TURNS}, or {TURNS_OF_BATCH} of each batch",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help=f"no turn of a batch size starts later than this, if there were {FEWEST_TURNS}, and {TURNS_OF_BATCH} of "
        "each batch",
    )
    add_groups(parser)
    parser.add_argument("--limit", type=int, help="judge so many images, spread evenly over the folder; default: all")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=["default", "reduce-overhead"],
        help="time what torch.compile makes of each model, the uncompressed too (where images differ in their "
        "number of tokens: of its layers); all else is as without",
    )
    parser.add_argument("--json", type=Path, help="write everything here, raw times too, after each finished piece")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.add_argument("--plot", type=Path, help="draw agreement against time of an image at the largest batch size")
    options = parser.parse_args(arguments)
    numbers = [*options.batch_sizes, options.timed, options.turns, options.limit]
    if min(number for number in numbers if number is not None) < 1:
        parser.error("--batch-sizes, --timed, --turns and --limit take whole numbers from 1 on.")
    if not options.seconds >= 0:  # nor NaN
        parser.error(f"--seconds is {options.seconds}; expected a number of at least 0.")
    options.peers = PEERS if "all" in options.peers else options.peers
    settings = options.vwt or [
        *FIRST_SETTINGS,
        *({"criterion": "variance", "keep_ratio": ratio} for ratio in RATIOS),
    ]
    words = [{"method": "inter", "vocabulary": name, "threshold": 0.1} for name in options.vocabulary]
    options.settings = [*settings, *words]
    return options


def load(name: str) -> PreTrainedModel:
    """The uncompressed model in float32."""
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    if any("ForImageClassification" in architecture for architecture in config.architectures or []):
        model_class = AutoModelForImageClassification
    else:
        # The whole of CLIP wants texts as well.
        model_class = CLIPVisionModelWithProjection if config.model_type == "clip" else AutoModel
    loaded: Any = model_class.from_pretrained(
        name, dtype=torch.float32, vwt=False, trust_remote_code=False, output_loading_info=True
    )
    model, report = loaded
    # So do others that have a tower for them: what is measured is the vision tower.
    tower = next((getattr(model, name) for name in ("vision_model", "vision_tower") if hasattr(model, name)), None)
    if hasattr(model, "text_model") or hasattr(model, "language_model"):
        if not isinstance(tower, PreTrainedModel):
            raise SystemExit(f"{name} is a {type(model).__name__}, whose vision tower cannot be run by itself.")
        start = next(path for path, module in model.named_modules() if module is tower) + "."
        own = [key.removeprefix(start) for key in report["missing_keys"] if key.startswith(start)]
        leave_out_random(tower, own, name)
        return tower
    leave_out_random(model, report["missing_keys"], name)
    return model


def describe(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vwt_hf": vwt_hf.__version__,
        "attention": model.config._attn_implementation,
        "kernels": has_kernels(device),
    }


def energy_meter(device: torch.device) -> Meter | None:
    try:
        return find_meter(device)
    except NoMeter as reason:
        print(f"Energy cannot be measured here: {reason}.")
        return None


def header(options: argparse.Namespace, machine: dict[str, Any], judged: dict[str, str]) -> dict[str, Any]:
    """What two runs must have in common to share a file; `judged` tells images and weights from others so called."""
    apart = ("json", "markdown", "plot", "vwt", "vocabulary")  # where results go, and what `settings` holds
    asked = {name: value for name, value in vars(options).items() if name not in apart}
    places = {"images": str(options.images), "groups": options.groups and str(options.groups)}
    return {"options": asked | places, "judged": judged, "machine": machine}


class Results:
    """Rows of finished pieces of work, kept in a JSON file if one is named."""

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        """Raises `SystemExit` if `path` holds another run's results."""
        self._path = path
        self.content = json.loads(json.dumps(header)) | {"timing": [], "quality": []}
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                different = self._different(found)
            except (ValueError, AttributeError, RecursionError) as error:
                raise SystemExit(
                    f"{path} is no file of this benchmark ({error}); delete it or name another file."
                ) from error
            if different:
                raise SystemExit(f"{path} holds another run ({different}); delete it or name another file.")
            self.content = found

    def _different(self, found: dict[str, Any]) -> str:
        """The options and facts of the machine in which `found` differs."""
        return "; ".join(
            f"{key} {found.get(part, {}).get(key)!r} there, {value!r} here"
            for part in ("options", "judged", "machine")
            for key, value in self.content[part].items()
            if found.get(part, {}).get(key) != value
        )

    def rows(self, kind: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of that kind that have these values."""
        return [row for row in self.content[kind] if values.items() <= {key: row.get(key) for key in values}.items()]

    def add(self, kind: str, rows: list[dict[str, Any]]) -> None:
        self.content[kind] += rows
        if self._path is not None:
            write_file(self._path, json.dumps(self.content, indent=1))


@dataclasses.dataclass(frozen=True)
class Method:
    """A model to measure."""

    name: str
    line: str
    """Methods that share it are joined by a line in the plot."""
    model: PreTrainedModel
    count: Callable[[PreTrainedModel], Any] = count_tokens
    """What counts its tokens, as `count_tokens` does."""
    counts_flops: bool = True


def methods_of(options: argparse.Namespace, plain: PreTrainedModel) -> list[Method]:
    """The uncompressed model `plain` first, then each setting, then the peers that can be had."""
    methods = [Method("uncompressed", "uncompressed", plain)]
    methods += [compressed(plain, setting) for setting in all_settings(options)]
    for make in peers_of(options, plain):
        try:
            methods.append(make())
        except peers.Unsupported as reason:
            print(f"Left out: {reason}")
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise SystemExit(f"The method {name!r} is asked for {names.count(name)} times; once is enough.")
    return methods


def all_settings(options: argparse.Namespace) -> list[Any]:
    """The settings, and random patches at their keep ratios if those are among the peers."""
    if "random" not in options.peers:
        return options.settings
    parsed = map(vwt_hf.VWTConfig.parse, options.settings)
    fields = [setting.to_dict() for setting in parsed if setting is not None]
    ratios = [own["keep_ratio"] for own in fields if own.get("keep_ratio") and own.get("num_patches") is None]
    random = [{"criterion": "random", "keep_ratio": ratio} for ratio in dict.fromkeys(ratios or RATIOS)]
    return [*options.settings, *(setting for setting in random if setting not in options.settings)]


def peers_of(options: argparse.Namespace, plain: PreTrainedModel) -> Iterator[Callable[[], Method]]:
    for peer, (name, numbers, make) in MERGING.items():
        for number in getattr(options, numbers) if peer in options.peers else ():
            yield functools.partial(merging, plain, name, number, make)
    for peer, (name, fit) in FITTED.items():
        if peer in options.peers:
            learn = functools.partial(fit, pixel_values=sample(options, plain, LEARN_FROM))
            for r in options.tome_r:
                yield functools.partial(merging, plain, name, r, learn)
    if "int8" in options.peers:
        yield lambda: Method("int8", "int8", peers.dynamic_int8(plain), counts_flops=False)
    if plain.dtype == torch.bfloat16 or not {"bf16", "bf16+settings"}.intersection(options.peers):
        return
    bf16 = peers.bfloat16(plain)
    if "bf16" in options.peers:
        yield lambda: Method("bf16", "bf16", bf16)
    for setting in options.settings if "bf16+settings" in options.peers else ():
        yield functools.partial(compressed, bf16, setting, "bf16 + ")


def compressed(plain: PreTrainedModel, setting: Any, before: str = "") -> Method:
    """A copy of `plain` under a setting, whose name comes after `before`."""
    model = vwt_hf.compress(copy_sharing_weights(plain), setting)
    return Method(before + name_of(setting), before + line_of(setting), model)


def merging(
    plain: PreTrainedModel, name: str, number: float, make: Callable[[PreTrainedModel, Any], PreTrainedModel]
) -> Method:
    """A copy of `plain` that merges tokens; see `MERGING`."""
    line, _, _ = name.partition(",")
    return Method(name.format(number), line, make(copy_sharing_weights(plain), number), peers.count_layer_tokens)


def line_of(setting: Any) -> str:
    """A setting's name without its numbers."""
    fields = fields_of(setting)
    words = [Path(value).name for value in fields.values() if isinstance(value, str)]
    return " ".join(words) or " ".join(fields)


def sample(options: argparse.Namespace, model: PreTrainedModel, count: int) -> torch.Tensor:
    """So many images, if there are, as `pixel_values` (images, channels, height, width)."""
    paths = find_images([options.images], count)
    (made,) = pixel_batches(paths, load_processor(options.model), len(paths))
    return whole_images(made).to(model.device, model.dtype)


def batches_of(images: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Batches of `size` images, each spread evenly over all; with fewer images, one batch that repeats them."""
    number = len(images) // size
    if not number:
        return [images[torch.arange(size) % len(images)]]
    spread = torch.arange(number * size) * len(images) // (number * size)
    return [images[spread[start::number]] for start in range(number)]


@torch.inference_mode()
def measure(
    methods: list[Method], batches: list[torch.Tensor], options: argparse.Namespace, meter: Meter | None
) -> list[dict[str, Any]]:
    """One row a method on batches of one size, (batch, channels, height, width) each, which take turns.

    The uncompressed model comes first. Memory and energy are those of the first batch.
    """
    device, size = batches[0].device, len(batches[0])
    given = [[batch.to(method.model.dtype) for batch in batches] for method in methods]
    forwards = [forward_of(method.model, options.compile) for method in methods]
    runs = [run_on_each(forward, own) for forward, own in zip(forwards, given, strict=True)]
    fewest = max(FEWEST_TURNS, TURNS_OF_BATCH * len(batches))
    seconds = time_in_turn(
        runs,
        device,
        options.turns or max(TURNS, fewest),
        # Kernels are made ready for each shape when it first comes, so each batch has been seen before it is timed.
        warm_up=max(WARM_UP, len(batches)),
        fewest=fewest,
        seconds=options.seconds,
        label=f"batch {size}",
    )
    rows = []
    measured = list(zip(methods, given, forwards, seconds, strict=True))
    with tqdm(measured, "memory, operations", leave=False) as described:
        for method, own, forward, taken in described:
            run = functools.partial(forward, pixel_values=own[0])
            rows.append(
                {
                    "method": method.name,
                    "line": method.line,
                    "seconds": taken,
                    "ms": 1e3 * typical(taken, len(own)),
                    "p95_ms": 1e3 * torch.tensor(taken, dtype=torch.float64).quantile(0.95).item(),
                    "embedding_seconds": embedding_seconds(method.model, own[0]),
                    "weight_bytes": peers.weight_bytes(method.model),
                    "activation_bytes": peak_bytes(run, device),
                    "joules_per_image": None if meter is None else joules(meter, run, device) / size,
                }
                | count(method, own)
            )
    for row in rows:
        compare_rows(row, rows[0], options.compile is not None)
    return rows


def typical(seconds: Sequence[float], batches: int) -> float:
    """The mean over batches, which took turns, of the median of their seconds.

    Batches differ in how many tokens they need, and the median of all seconds would be that of one of them.
    """
    turns = [seconds[first::batches] for first in range(min(batches, len(seconds)))]
    return statistics.mean(map(statistics.median, turns))


def compare_rows(row: dict[str, Any], plain: dict[str, Any], compiled: bool) -> None:
    """Adds to a row how it stands to that of the uncompressed model."""
    row["speed_ratio"] = plain["ms"] / row["ms"]
    row["flops_ratio"] = row["flops"] and plain["flops"] / row["flops"]
    row["quotient"] = row["flops_ratio"] and row["speed_ratio"] / row["flops_ratio"]
    # Embeddings are timed eagerly, so they have no share in the time of a compiled forward.
    timed = None if compiled else 1e3 / plain["ms"]
    row["embedding_share"] = timed and timed * row["embedding_seconds"]
    row["plain_embedding_share"] = timed and timed * plain["embedding_seconds"]
    row["memory_ratio"] = memory_of(row) and memory_of(plain) / memory_of(row)


def memory_of(row: dict[str, Any]) -> int | None:
    return row["activation_bytes"] and row["weight_bytes"] + row["activation_bytes"]


def run_on_each(forward: Callable[..., object], batches: Sequence[torch.Tensor]) -> Callable[[], object]:
    """What runs a model on the next of some batches, again and again."""
    ahead = itertools.cycle(batches)
    return lambda: forward(pixel_values=next(ahead))


def forward_of(model: PreTrainedModel, mode: str | None) -> Callable[..., object]:
    """What runs `model` on `pixel_values`; `mode`: how torch compiles it first, if at all."""
    if mode is None:
        return model
    # All models share their classes' code, and each is one more version of it; past the limit they would run eagerly.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    setting = vwt_hf.VWTConfig.parse(model.config.vwt)
    if setting is None or is_even(setting, family_of(model)):
        return torch.compile(model, mode=mode, dynamic=False, fullgraph=setting is not None)
    # Where images differ in their number of tokens, the graph breaks, after which torch would compile no model's outer
    # forward as a whole: layers alone here.
    model = copy_sharing_weights(model)
    for layer in find_layers(find_tower(model, family_of(model)).module):
        layer.compile(mode=mode)
    return model


def embedding_seconds(model: PreTrainedModel, batch: torch.Tensor) -> float:
    """Median seconds from pixels to the first layer's input, inside whole forwards."""
    module = find_tower(model, family_of(model)).embeddings
    clock: list[float] = []

    def stamp(*_: Any) -> None:
        synchronize(batch.device)
        clock.append(time.perf_counter())

    # Before all that compression does there.
    hooks = [module.register_forward_pre_hook(stamp, prepend=True), module.register_forward_hook(stamp)]
    for _ in range(EMBEDDING_TURNS):
        model(pixel_values=batch)
    for hook in hooks:
        hook.remove()
    return statistics.median(end - start for start, end in zip(clock[0::2], clock[1::2], strict=True))


def count(method: Method, batches: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Tokens of an image, and floating point operations of a forward: the means over batches of one size."""
    with method.count(method.model) as tokens:
        flops = [count_flops(functools.partial(method.model, pixel_values=batch)) for batch in batches]
    return {"tokens": round(tokens.mean, 1), "flops": statistics.mean(flops) if method.counts_flops else None}


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """The most bytes that `run` holds at once, above what was allocated before; `None` if torch cannot say."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == "cpu":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        # The process's own peak would hold whatever ran before. Each event is one allocation (+) or release (−).
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return max(itertools.accumulate(changes, initial=0))
    return None


def joules(meter: Meter, run: Callable[[], object], device: torch.device) -> float:
    """Joules of one call of `run`, from calls enough for a counter that is renewed a few times a second."""
    calls = 0

    def repeat() -> None:
        nonlocal calls
        end = time.perf_counter() + ENERGY_SECONDS
        # The first call is made whatever the clock says: a busy machine may stop this process for longer than that.
        while calls == 0 or time.perf_counter() < end:
            stopwatch(run, device)
            calls += 1

    return meter.measure(repeat) / calls


@torch.inference_mode()
def judge(
    methods: list[Method], reference: PreTrainedModel, paths: list[Path], groups: list[str], processor: Any
) -> list[dict[str, Any]]:
    """One row a method: how its answers on all images stand to those of `reference`, and to the folders' names.

    `groups` has the name of each image's group.
    """
    models = [reference, *(method.model for method in methods)]
    parts: list[list[torch.Tensor]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        counts = [stack.enter_context(method.count(method.model)) for method in methods]
        batches, total = pixel_batches(paths, processor, QUALITY_BATCH), -(-len(paths) // QUALITY_BATCH)
        for made in stack.enter_context(tqdm(batches, desc="answers", total=total, leave=False)):
            pixel_values = whole_images(made).to(reference.device)
            names = [str(path) for path in paths[len(parts[0]) * QUALITY_BATCH :][: len(pixel_values)]]
            for index, (model, own) in enumerate(zip(models, parts, strict=True)):
                own.append(answer(model, pixel_values=pixel_values.to(model.dtype)).float().cpu())
                finite = are_finite(own[-1])
                if not all(finite):
                    whose = ["the uncompressed model", *(method.name for method in methods)][index]
                    raise ValueError(
                        f"{whose}, in {str(model.dtype).removeprefix('torch.')}, answers "
                        f"{printable(names[finite.index(False)])} by NaN or infinity, which would agree with itself. "
                        "Leave out the method or the data type, or check the weights."
                    )
    expected, *found = (torch.cat(own) for own in parts)
    truth, said = true_labels([folder_name(path) for path in paths], reference.config)
    if classifies(reference):
        print(*map(printable, said), sep="\n", end="\n" if said else "")
    return [
        {"method": method.name, "line": method.line, "images": len(paths), "tokens": round(count.mean, 1)}
        | (
            judged(own, expected, truth, groups)
            if classifies(reference)
            else {"cosine": cosines(own, expected).mean().item()}
        )
        for method, count, own in zip(methods, counts, found, strict=True)
    ]


def judged(
    logits: torch.Tensor, expected: torch.Tensor, truth: Sequence[Collection[int]], groups: Sequence[str]
) -> dict[str, float | None]:
    """Shares in [0, 1], and KL in nats; see `vwt_hf.figures`."""
    correct = are_right(first_answers(logits).tolist(), truth)
    return {
        "agreement": agreement(logits, expected),
        "kl": divergence(logits, expected),
        "top1": accuracy(correct),
        "worst_group": worst_group(correct, groups),
    }


def table(results: Results) -> list[dict[str, Any]]:
    """Rows as they are printed: rounded, with times and answers side by side."""
    rows = []
    for row in results.content["timing"]:
        (judged,) = results.rows("quality", dtype=row["dtype"], method=row["method"])
        memory = memory_of(row)
        rows.append(
            {
                "batch": row["batch"],
                "dtype": row["dtype"],
                "method": row["method"],
                "tokens": row["tokens"],
                "ms": rounded(row["ms"], 2),
                "ms p95": rounded(row["p95_ms"], 2),
                "speed ratio": rounded(row["speed_ratio"], 2),
                "FLOPs ratio": rounded(row["flops_ratio"], 2),
                "quotient": rounded(row["quotient"], 2),
                "embedding %": row["embedding_share"]
                and f"{100 * row['embedding_share']:.1f} ({100 * row['plain_embedding_share']:.1f})",
                "memory MiB": memory and rounded(memory / 2**20, 1),
                "memory ratio": rounded(row["memory_ratio"], 2),
                "J/image": rounded(row["joules_per_image"], 4),
            }
            | answers_of(judged)
        )
    return rows


def summary(results: Results) -> list[dict[str, Any]]:
    """One row a method: its answers, and how fast it is at each batch size."""
    rows = []
    for judged in results.content["quality"]:
        timed = results.rows("timing", dtype=judged["dtype"], method=judged["method"])
        largest = max(timed, key=lambda row: row["batch"])
        names = {"dtype": judged["dtype"], "method": judged["method"], "tokens": judged["tokens"]}
        operations = {f"FLOPs ratio, {largest['batch']}": rounded(largest["flops_ratio"], 2)}
        speeds = {f"speed ratio, {row['batch']}": rounded(row["speed_ratio"], 2) for row in timed}
        memory = {f"memory ratio, {largest['batch']}": rounded(largest["memory_ratio"], 2)}
        rows.append(names | answers_of(judged) | operations | speeds | memory)
    return rows


def answers_of(judged: dict[str, Any]) -> dict[str, str | None]:
    """The columns of both tables that tell of a method's answers."""
    return {
        "agree %": rounded(judged.get("agreement"), 2, 100),
        "KL": rounded(judged.get("kl"), 4),
        "top-1 %": rounded(judged.get("top1"), 2, 100),
        "worst group %": rounded(judged.get("worst_group"), 2, 100),
        "cosine": rounded(judged.get("cosine"), 4),
    }


def rounded(value: float | None, digits: int, times: int = 1) -> str | None:
    return None if value is None else f"{times * value:.{digits}f}"


def require_format(path: Path) -> None:
    """Raises `ValueError` if matplotlib cannot draw into a file with that ending, and `ImportError` without it."""
    kinds = require_matplotlib()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--plot is {path}; expected a name that ends in .{', .'.join(sorted(kinds))}.")


def plot(results: Results, batch: int, path: Path) -> None:
    """Agreement (or cosine) against milliseconds of an image, one point a method, methods of one kind joined."""
    figure = require_matplotlib()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    measure_name = "agreement" if "agreement" in results.content["quality"][0] else "cosine"
    dtypes = results.content["options"]["dtype"]
    colours: dict[str, str] = {}
    labels: list[str] = []
    for (dtype, line), points in points_of(results, batch, measure_name).items():
        is_plain = line == "uncompressed"
        axes.plot(
            *zip(*points, strict=True),
            marker="*" if is_plain else "o",
            markersize=14 if is_plain else 5,
            color=colours.setdefault(line, f"C{len(colours)}"),
            linestyle=("-", "--", ":")[dtypes.index(dtype)],
            fillstyle=("full", "none", "left")[dtypes.index(dtype)],
            label=str(len(labels)),  # not the label, which may have a leading _ or $ that matplotlib acts on
        )
        labels.append(line if len(dtypes) == 1 else f"{line}, {dtype}")
    axes.set_xlabel(f"milliseconds of an image, in batches of {batch}")
    axes.set_ylabel("same top-1 as the uncompressed model" if measure_name == "agreement" else "cosine to uncompressed")
    name = Path(results.content["options"]["model"]).name
    title = printable(f"{name}, {results.content['machine']['device']}")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.grid(alpha=0.3)
    for text, label in zip(axes.legend(fontsize="small").get_texts(), labels, strict=True):
        text.set(text=printable(label), parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format=path.suffix[1:].lower())
    write_file(path, file.getvalue())


def points_of(results: Results, batch: int, value: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(ms of an image, value) of each method, by data type and line, the fastest first."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in results.rows("timing", batch=batch):
        (judged,) = results.rows("quality", dtype=row["dtype"], method=row["method"])
        lines.setdefault((row["dtype"], row["line"]), []).append((row["ms"] / batch, judged[value]))
    return {key: sorted(points) for key, points in lines.items()}


if __name__ == "__main__":
    sys.exit(run_command("benchmark.py", main))
