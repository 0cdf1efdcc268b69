"""Checks of numbers that a user or a file gives, and of packages that a user's own files may hide."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from typing import Any, TypeGuard

from .printable import shown

LARGEST_MEAN = 1e6
STD_RANGE = (1e-6, 1e6)


def checked_statistics(field: str, value: Any, *, positive: bool) -> tuple[float, ...]:
    """Means, or with `positive` standard deviations, as floats.

    Args:
        field: their name in an error.
        value: a list or tuple with one number for each channel.

    Raises:
        ValueError: `value` is something else, or a number lies beyond `LARGEST_MEAN` or outside of `STD_RANGE`.
    """
    low, high = STD_RANGE if positive else (-LARGEST_MEAN, LARGEST_MEAN)
    allowed = isinstance(value, (list, tuple)) and value and all(is_number(number, low, high) for number in value)
    if not allowed:
        raise ValueError(f"{field} is {shown(value)}; expected one number in [{low:g}, {high:g}] for each channel.")
    return tuple(map(float, value))


def is_number(value: object, low: float = -sys.float_info.max, high: float = sys.float_info.max) -> TypeGuard[float]:
    """Whether `value` is a number in [low, high], and not True or False; by default any finite one."""
    # Not made a float before: an integer may be larger than any float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is a whole number, and not True or False."""
    return isinstance(value, int) and not isinstance(value, bool)


def sides(size: Any) -> Any:
    """Height and width, in pixels, of a size that is stated as one number or as both."""
    return (size, size) if isinstance(size, int) else size


def require_whole(name: str, value: object, least: int = 1) -> None:
    """Raises `ValueError` unless `value` is a whole number of at least `least` that Python can count to."""
    if not is_int(value) or not least <= value <= sys.maxsize:
        most = ", and less than 2**63" if is_int(value) and value > least else ""
        raise ValueError(f"{name} is {shown(value)}; expected a whole number of at least {least}{most}.")


def require_seed(value: object, name: str = "seed") -> None:
    """Raises `ValueError` unless `value` can be the seed of a generator."""
    if not is_int(value) or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {shown(value)}; expected a whole number in [0, 2**63).")


def require_share(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} is {shown(value)}; expected a number in (0, 1].")


def require_count(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is `None` or a possible number of patches."""
    if value is not None and not (is_int(value) and 1 <= value < 2**31):
        raise ValueError(f"{name} is {shown(value)}; expected None or an integer of at least 1, and less than 2**31.")


def require_unhidden(package: str, module: str) -> None:
    """Raises `ImportError` if a user's own file, without that `module`, hides a package; the file is not run."""
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # something stands in for the package, without a spec
        return
    if found is None or not os.path.isfile(found.origin or ""):
        return
    if importlib.machinery.PathFinder.find_spec(f"{package}.{module}", found.submodule_search_locations or []) is None:
        raise ImportError(
            f"{found.origin} hides the package {package!r}, which is needed for the figures; expected no file or "
            "folder of that name beside the program or in the current folder. Rename it."
        )
