"""`vwt-hf vocab`: a vocabulary's facts as an aligned list, and its sheet of words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .printable import plain
from .vocabulary import VisualVocabulary
from .vocabulary_card import SHOWN, render_words

UNKNOWN = "not recorded"


def vocab(vocabulary: str, *, revision: str | None = None, output: str = "vwt-vocab.png") -> VisualVocabulary:
    """Prints what a vocabulary is and where it is from, and writes a picture of its most frequent words.

    Args:
        vocabulary: Hub id or folder.
        revision: branch, tag or commit on the Hub.
        output: where the PNG is written.

    Raises:
        ValueError: a file of it is damaged.
        OSError: there is no such vocabulary, or the picture cannot be written.
    """
    loaded = VisualVocabulary.from_pretrained(vocabulary, revision=revision)
    print(aligned(facts(loaded)))
    picture = Path(output)
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(render_words(loaded.words, loaded.frequencies))
    shown = f"the {min(SHOWN, len(loaded))} most frequent" if loaded.frequencies is not None else "the first words"
    print(f"\nsheet of words: {picture} ({shown}, row by row)")
    return loaded


def facts(vocabulary: VisualVocabulary) -> list[tuple[str, str]]:
    """Label and value of everything known about a vocabulary, for people."""
    info, size = vocabulary.info, vocabulary.patch_size
    return [
        ("size", f"{len(vocabulary):,} words"),
        ("patch size", f"{size}×{size} pixels"),
        ("channels", str(vocabulary.channels)),
        ("data set", plain(info.dataset or UNKNOWN)),
        ("image processor of", plain(info.base_model or UNKNOWN)),
        ("its mean", numbers(info.image_mean)),
        ("its standard deviation", numbers(info.image_std)),
        ("patches", number(info.patches)),
        ("images", number(info.images)),
        ("unreadable images", number(info.unreadable)),
        ("inertia", UNKNOWN if info.inertia is None else f"{info.inertia:.4g}"),
        ("seed", UNKNOWN if info.seed is None else str(info.seed)),
        ("ten most frequent words", top_share(vocabulary)),
        ("vwt-hf", plain(info.library_version or UNKNOWN)),
        ("source", plain(vocabulary.source or UNKNOWN)),
        ("commit", vocabulary.revision or "none: it is a folder"),
    ]


def top_share(vocabulary: VisualVocabulary) -> str:
    """Share of the patches that the ten most frequent words stand for: how much of the data is a few flat colours."""
    counts = vocabulary.frequencies
    # In float64, which the sum of counts that a stranger wrote does not overflow.
    total = 0.0 if counts is None else float(counts.double().sum())
    if counts is None or not total:
        return UNKNOWN
    top = float(counts.double().sort(descending=True).values[:10].sum())
    return f"{100 * top / total:.1f} % of the patches"


def number(value: int | None) -> str:
    """A count for people, or that it is not known."""
    return UNKNOWN if value is None else f"{value:,}"


def numbers(values: Sequence[float] | None) -> str:
    """Statistics, one for each channel, for people, or that they are not known."""
    return UNKNOWN if values is None else ", ".join(f"{value:.4g}" for value in values)


def aligned(rows: Sequence[tuple[str, str]]) -> str:
    """Label and value, one pair a line, the values below each other."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label.ljust(width)}   {value}" for label, value in rows)
