"""What strangers wrote, made fit to be printed: on a terminal, in an error, in a model card."""

from __future__ import annotations

LONGEST = 200
"""Characters of a stranger's value that an error shows."""


def plain(text: str) -> str:
    """`text` with � for what a terminal acts upon: escape sequences, line ends, marks that turn text around."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def shown(value: object) -> str:
    """A value as an error names it: like `repr`, printable, of at most `LONGEST` characters."""
    try:
        text = plain(repr(value))
    except (ValueError, RecursionError):  # an integer of more digits than Python writes out; a list in itself
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
