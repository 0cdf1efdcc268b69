"""`vwt-hf vocab`: a vocabulary's facts as an aligned list, and its sheet of words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..printable import printable
from ..terminal import add_picture, aligned, require_alone
from ..whole_saves import require_writable, write_file

if TYPE_CHECKING:
    from ..vocabulary import VisualVocabulary

HELP = "print a vocabulary's facts and draw its words"
DESCRIPTION = """\
Prints what a vocabulary is and how it came about, as far as its files say, and writes a sheet of its words: the most
frequent first, row by row."""
EXAMPLES = """\
examples:
  vwt-hf vocab vwt-words
  vwt-hf vocab me/words-p16 --revision v1 --output words-p16.png"""
UNKNOWN = "not recorded"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("vocabulary", metavar="VOCABULARY", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    add_picture(parser, "sheet", "vwt-vocab.png")


def work(args: argparse.Namespace) -> None:
    require_alone()
    require_writable(args.output)
    from ..vocabulary import VisualVocabulary
    from ..vocabulary.card import SHOWN, render_words

    vocabulary = VisualVocabulary.from_pretrained(args.vocabulary, revision=args.revision)
    write_file(args.output, render_words(vocabulary.words, vocabulary.frequencies))
    print(aligned(facts(vocabulary)))
    frequent = vocabulary.frequencies is not None
    shown = f"the {min(SHOWN, len(vocabulary))} most frequent" if frequent else "the first words"
    print(f"\nsheet of words: {printable(args.output)} ({shown}, row by row)")


def facts(vocabulary: VisualVocabulary) -> list[tuple[str, str]]:
    """Label and value of everything known about a vocabulary, for people."""
    info, size = vocabulary.info, vocabulary.patch_size
    return [
        ("size", f"{len(vocabulary):,} words"),
        ("patch size", f"{size}×{size} pixels"),
        ("channels", str(vocabulary.channels)),
        ("data set", printable(info.dataset or UNKNOWN)),
        ("image processor of", printable(info.base_model or UNKNOWN)),
        ("its mean", _numbers(info.image_mean)),
        ("its standard deviation", _numbers(info.image_std)),
        ("patches", _known(info.patches, ",")),
        ("images", _known(info.images, ",")),
        ("unreadable images", _known(info.unreadable, ",")),
        ("inertia", _known(info.inertia, ".4g")),
        ("seed", _known(info.seed, "d")),
        ("ten most frequent words", _top_share(vocabulary)),
        ("vwt-hf", printable(info.library_version or UNKNOWN)),
        ("source", printable(vocabulary.source or UNKNOWN)),
        ("commit", vocabulary.revision or "none: it is a folder"),
    ]


def _top_share(vocabulary: VisualVocabulary) -> str:
    """Share of the patches that the ten most frequent words stand for: how much of the data is a few flat colours."""
    # In float64, which the sum of counts that a stranger wrote does not overflow.
    counts = None if vocabulary.frequencies is None else vocabulary.frequencies.double()
    if counts is None or not float(counts.sum()):
        return UNKNOWN
    top = counts.sort(descending=True).values[:10].sum()
    return f"{100 * float(top / counts.sum()):.1f} % of the patches"


def _known(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def _numbers(values: Sequence[float] | None) -> str:
    return UNKNOWN if values is None else ", ".join(f"{value:.4g}" for value in values)
