"""What strangers wrote, made fit to be printed: on a terminal, in an error, in a model card."""

from __future__ import annotations

LONGEST = 200
"""Characters of a stranger's value that an error shows."""


def printable(text: object) -> str:
    """`text` on one line, with control characters and bytes that are no text (as file names may hold) as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def shown(value: object) -> str:
    """A value as an error names it: like `repr`, printable, of at most `LONGEST` characters."""
    try:
        text = printable(repr(value))
    except (ValueError, RecursionError):  # an integer of more digits than Python writes out; a list in itself
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
