"""`vwt-hf calibrate`: how far a model's sequences may be shortened on a folder of images, without labels."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..printable import printable
from ..terminal import aligned, do_all, json_file, options, png_file, require_alone
from ..whole_saves import naming, require_folder, require_writable, write_file
from .loading import add_device, add_dtype, load_model, load_whole, tokenizer_beside
from .sources import IMAGES, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..calibrate import Calibration, Level
    from ..config import VWTConfig

HELP = "find how far a model may be shortened on your own images, without labels"
DESCRIPTION = """\
Compares a model with itself, plain and shortened, on at least 50 images like those that it is for. Finds which of
twelve settings (methods gradual and coarse) meets your target: the fastest that keeps this share of the answers
(--agreement), or the lightest that is so fast (--speed) or has so few tokens (--tokens). No labels are
needed.

Prints for each setting that was tried
  tokens      of an image, mean over images and layers
  speed       how many times as fast as the plain model, at this batch size
  agreement   share of the images with the plain model's first answer, and its 95 % interval; for a model without a
              classifier the mean cosine of its output"""
EXAMPLES = """\
examples:
  vwt-hf calibrate google/vit-base-patch16-224 photographs/ --agreement 0.98
  vwt-hf calibrate my-classifier photographs/ --speed 1.5 --output my-fast-classifier --plot front.png
  vwt-hf calibrate facebook/dinov2-small photographs/ --tokens 150 --max-images 500 --resume front.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a supported model")
    parser.add_argument("images", metavar="IMAGES", help=IMAGES)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--agreement", type=float, metavar="SHARE", help="least share of equal answers, or cosine")
    target.add_argument("--speed", type=float, metavar="RATIO", help="least speed, of the plain model's")
    target.add_argument("--tokens", type=float, metavar="NUMBER", help="most tokens of an image")
    parser.add_argument(
        "--by",
        choices=("time", "flops"),
        default="time",
        help="what speed is of: time on this machine, or floating point operations (default: time)",
    )
    parser.add_argument("--max-images", type=int, default=200, help="look at no more than these (default: 200)")
    parser.add_argument("--batch-size", type=int, default=32, help="images in one forward pass (default: 32)")
    parser.add_argument("--split", help="of the data set (default: its only one, or train)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images (default: 0)")
    parser.add_argument("--output", metavar="FOLDER", help="save the whole model here, shortened by the setting")
    parser.add_argument(
        "--json", type=json_file, metavar="FILE", help="write the setting and all that was measured here"
    )
    parser.add_argument("--plot", type=png_file, metavar="FILE.png", help="draw all that was measured here")
    parser.add_argument(
        "--resume", metavar="FILE", help="keep here what was measured, and go on from it if it is there already"
    )
    add_device(parser)
    add_dtype(parser)


def work(args: argparse.Namespace) -> None:
    require_alone()
    require_writable(args.json, args.plot, args.resume)
    if args.output is not None:
        require_folder(args.output)

    from ..calibrate import Calibration, target_of
    from ..image_source import require_apart
    from ..model_saving import PROCESSOR_NAME, read_in_place
    from ..processes import usable_device
    from ..processors import load_processor, require_checkpoint
    from ..visualize import front_figure, require_matplotlib, write_png

    targets = options(args, "agreement", "speed", "tokens")
    target_of(**targets)
    if args.output is not None and read_in_place(Path(args.output)) is not None:
        raise FileExistsError(
            f"{args.output} holds {PROCESSOR_NAME}, whose image processor transformers would read in place of that "
            "which is saved there. Name another folder, or remove that file."
        )
    if args.plot is not None:
        require_matplotlib()
    require_checkpoint(args.model)
    device = usable_device(args.device)
    source, _ = open_source(args.images, split=args.split)
    if args.plot is not None and isinstance(source, Path):
        require_apart(args.plot, source)
    processor = load_processor(args.model)
    model = load_model(args.model, device, args.dtype)
    whole = tokenizer = None
    if args.output is not None:  # refused before anything is measured
        whole, tokenizer = load_whole(args.model), tokenizer_beside(args.model)
    search = Calibration(
        model,
        source,
        image_processor=processor,
        **options(args, "batch_size", "by", "seed", "max_images", "resume"),
    )
    setting = search.find(**targets)

    outputs: list[Callable[[], object]] = []
    if args.json is not None:
        content = {"vwt": setting.to_dict(), "tried": [dataclasses.asdict(level) for level in search.tried]}
        outputs.append(lambda: write_file(args.json, json.dumps(content, indent=1)))
    if args.plot is not None:
        title = f"{Path(args.model).name}, {search.images} images"
        outputs.append(lambda: write_png(front_figure(search.tried, search.measure, title), Path(args.plot)))
    outputs.append(lambda: report(f"{type(model).__name__} from {printable(args.model)}", search, setting))
    if whole is not None:
        outputs.append(lambda: save(whole, setting, (processor, tokenizer), args.output))
    do_all(*outputs)


def report(model: str, search: Calibration, setting: VWTConfig) -> None:
    """Prints what was tried and what was found."""
    print(f"{model}, {search.images} images\n")
    print(aligned(table(search.tried, search.measure, setting), right=True))
    print(f"\nvwt={json.dumps({name: getattr(setting, name) for name in ('method', 'tolerance', 'similarity')})}")


def save(whole: PreTrainedModel, setting: VWTConfig, others: Iterable[Any], folder: str) -> None:
    """Saves a model with a setting, and the `others` that are not `None`, such as its tokenizer, beside it."""
    from ..compress import compress

    with naming(folder):
        compress(whole, setting).save_pretrained(folder)
        for beside in others:
            if beside is not None:
                beside.save_pretrained(folder)
    print(f"saved with it: {printable(folder)}")


def table(levels: list[Level], measure: str, setting: VWTConfig) -> list[tuple[str, ...]]:
    """Rows of a table, the chosen setting marked by an arrow."""
    titles = ("", "method", "tolerance", "similarity", "tokens", "speed", measure, "95 % interval")
    chosen = (setting.method, setting.tolerance, setting.similarity)
    rows = [
        (
            "→" if level.choice == chosen else "",
            level.method,
            f"{level.tolerance:g}",
            f"{level.similarity:g}",
            f"{level.tokens:.1f} of {level.of_tokens:g}",
            f"{level.speed:.2f}",
            f"{level.value:.4f}",
            " to ".join(f"{end:.4f}" for end in level.interval),
        )
        for level in levels
    ]
    return [titles, *rows]
