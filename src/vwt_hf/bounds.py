"""How images may be normalised: the mean and standard deviation that a file or a user may give."""

from __future__ import annotations

from typing import Any

from .printable import shown

LARGEST_MEAN = 1e6
STD_RANGE = (1e-6, 1e6)


def checked_statistics(field: str, value: Any, *, positive: bool) -> tuple[float, ...]:
    """Means, or with `positive` standard deviations, as floats.

    Args:
        field: what an error calls them.
        value: list or tuple with one number for each channel.

    Raises:
        ValueError: it is none, or a number lies beyond `LARGEST_MEAN` or outside of `STD_RANGE`.
    """
    low, high = STD_RANGE if positive else (-LARGEST_MEAN, LARGEST_MEAN)
    allowed = isinstance(value, (list, tuple)) and value and all(is_number(number, low, high) for number in value)
    if not allowed:
        raise ValueError(f"{field} is {shown(value)}; expected one number in [{low:g}, {high:g}] for each channel.")
    return tuple(map(float, value))


def is_number(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number in [low, high], however large an integer it is."""
    # Compared before it is made a float: an integer may be larger than any.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
