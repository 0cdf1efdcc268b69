"""What a user asks for: `VWTConfig`, validated on creation, to and from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

METHODS = ("intra",)
CRITERIA = ("variance", "random", "grid")


@dataclasses.dataclass(frozen=True)
class VWTConfig:
    """How a vision transformer's patch sequence is shortened before its first layer.

    Args:
        method (`str`, default `"intra"`):
            `"intra"` keeps a subset of an image's own patches (arXiv 2411.15397, intra-image approach).
        keep_ratio (`float`, default 0.5):
            Share of patches kept, in (0, 1]; `int(patches * keep_ratio)` stay. 1.0 is the plain model.
        num_patches (`int`, *optional*):
            Number of patches kept, whatever the image size; overrides `keep_ratio`. An image with no more patches
            than that keeps all of them.
        criterion (`str`, default `"variance"`):
            Which patches stay. `"variance"`: those whose channel and pixel values vary most (the paper's).
            `"random"`: a random subset, drawn once from `seed` and shared by all images of one size.
            `"grid"`: an even cover of the image, whatever it shows.
        seed (`int`, default 0):
            Seed of `criterion="random"`.

    Raises:
        ValueError: a field holds a value that is not allowed; the message names the field, the value and what is.

    Example:
        >>> VWTConfig(keep_ratio=0.7).to_dict()["keep_ratio"]
        0.7
    """

    method: str = "intra"
    keep_ratio: float = 0.5
    num_patches: int | None = None
    criterion: str = "variance"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choice("method", self.method, METHODS)
        _require_choice("criterion", self.criterion, CRITERIA)
        if not _is_number(self.keep_ratio) or not 0 < self.keep_ratio <= 1:
            raise ValueError(f"VWTConfig.keep_ratio is {self.keep_ratio!r}; expected a number in (0, 1].")
        if self.num_patches is not None and (not _is_int(self.num_patches) or self.num_patches < 1):
            raise ValueError(
                f"VWTConfig.num_patches is {self.num_patches!r}; expected None or an integer of at least 1."
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"VWTConfig.seed is {self.seed!r}; expected an integer in [0, 2**63).")

    @classmethod
    def parse(cls, value: VWTConfig | dict[str, Any] | bool | None) -> VWTConfig | None:
        """Reads what users write as `vwt=...`: a `VWTConfig`, a dict of its fields, `True` (the defaults), or `False` /
        `None` (no compression, returns `None`).

        Raises:
            ValueError: a field is unknown or its value is not allowed.
            TypeError: `value` is of another type.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, VWTConfig):
            return value
        if isinstance(value, dict):
            names = [field.name for field in dataclasses.fields(cls)]
            for name in value:
                if name not in names:
                    near = difflib.get_close_matches(str(name), names, 1)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"VWTConfig has no field {name!r}; its fields are {', '.join(names)}.{hint}")
            return cls(**value)
        raise TypeError(f"vwt is {value!r}; expected True, False, None, a dict of VWTConfig's fields or a VWTConfig.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict; `VWTConfig.parse` reads it back."""
        return dataclasses.asdict(self)

    def patches_kept(self, patches: int) -> int:
        """How many of an image's `patches` stay (paper: k = int(N · (1 − drop rate)), here without float error).

        Raises:
            ValueError: none would stay.
        """
        if self.num_patches is not None:
            return min(self.num_patches, patches)
        # 0.29 * 100 is 28.999999999999996: a product this close to an integer means that integer.
        kept = int(patches * self.keep_ratio + 1e-9)
        if kept < 1:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} keeps none of an image's {patches} patches; "
                f"use a keep_ratio of at least {math.ceil(1000 / patches) / 1000}."
            )
        return kept


def _require_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"VWTConfig.{field} is {value!r}; expected one of {', '.join(map(repr, allowed))}.{hint}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
