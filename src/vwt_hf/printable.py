"""What strangers wrote, made fit to be printed, on a terminal, in an error, in a model card, or to be compared."""

from __future__ import annotations

import unicodedata
from typing import Any

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


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What differs between two tables, field by field, also within tables of theirs."""
    said = []
    for name in here | there:
        one, other = there.get(name), here.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            said += [f"{name}: {difference(one, other)}"] if one != other else []
        elif one != other:
            said.append(f"{name} {shown(one)} there, {shown(other)} here")
    return "; ".join(said)


def composed(name: Any) -> str:
    """A name with its accents within its letters, as most write it; macOS may part them in names of folders."""
    return unicodedata.normalize("NFC", str(name))
