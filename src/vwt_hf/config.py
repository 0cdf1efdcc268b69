"""What a user asks for: `VWTConfig`, validated on creation, to and from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from typing import Any

METHODS = ("intra", "inter")
CRITERIA = ("variance", "random", "grid")
LAYOUTS = ("auto", "packed", "padded")
DROPPED = ("discard", "merge")
OUTPUTS = ("compressed", "full")
OWNERS = dict.fromkeys(("keep_ratio", "num_patches", "criterion", "seed", "dropped"), "intra") | dict.fromkeys(
    ("vocabulary", "revision", "threshold", "layout", "image_mean", "image_std", "saved_as"), "inter"
)
"""The method that a field belongs to."""
SAVED_AS = re.compile(r"[0-9a-f]{16}")
"""What tells the folder that one save of a model puts its words into from those of others."""
LARGEST_MEAN = LARGEST_STD = 1e6
"""The mean and the deviation that pixels are normalised by lie within; the smallest deviation is one in that."""
MOST_CHANNELS = 1024
SHOWN = 120
"""Characters of a value that an error shows."""


@dataclasses.dataclass(frozen=True)
class VWTConfig:
    """How a vision transformer's patch sequence is shortened before its first layer (arXiv 2411.15397).

    Args:
        method (`str`, default `"intra"`):
            `"intra"` keeps a subset of an image's own patches. `"inter"` replaces patches that are near one word of a
            vocabulary by one token, the average of their embeddings.
        keep_ratio (`float`, default 0.5):
            intra: share of patches kept, in (0, 1]; `int(patches * keep_ratio)` stay. 1.0 is the plain model.
        num_patches (`int`, *optional*):
            intra: number of patches kept, whatever the image size; overrides `keep_ratio`. An image with no more
            patches than that keeps all of them.
        criterion (`str`, default `"variance"`):
            intra: which patches stay. `"variance"`: those whose channel and pixel values vary most (the paper's).
            `"random"`: a random subset, drawn once from `seed` and shared by all images of one size.
            `"grid"`: an even cover of the image, whatever it shows.
        seed (`int`, default 0):
            intra: seed of `criterion="random"`.
        dropped (`str`, default `"discard"`):
            intra: what becomes of the patches that do not stay. `"discard"`: nothing sees them (the paper's).
            `"merge"`: each joins the nearest patch that stays, which then stands for both.
        vocabulary (`str` or `VisualVocabulary`, *optional*):
            inter: a Hub id, a folder, or the vocabulary itself. `None`: the one that was saved with the model.
        revision (`str`, *optional*):
            inter: branch, tag or commit of a vocabulary on the Hub. The setting of a loaded model holds the commit.
        threshold (`float`, default 0.1):
            inter: largest cosine distance from a word, in [0, 2], at which a patch takes it. 0 is the plain model.
        layout (`str`, default `"auto"`):
            inter: how a batch of images with different numbers of tokens is run. `"packed"`: as one sequence, of which
            only attention knows where images end. `"padded"`: each image as long as the longest. `"auto"`: packed
            where attention takes packed tokens as they are (on a CPU; on CUDA in half precision by sdpa or
            flash_attention_2), else padded, as is training with stochastic depth. The answers are the same.
        proportional_attention (`bool`, default `True`):
            inter, and intra with `dropped="merge"`: whether a token that stands for s patches gets + log s on its
            attention logits, so that it draws as much attention as its patches would.
        output (`str`, *optional*):
            `"full"`: `last_hidden_state` has its usual length, each patch with the hidden state of its token, so heads
            and decoders that read every patch work and means weigh tokens by their sizes. `"compressed"`: it has
            prefix + kept patches. Default: full where every patch is part of a token, which is under inter and
            `dropped="merge"`; else compressed. Each is refused where it has no meaning.
        image_mean, image_std (sequence of `float`, *optional*):
            inter: how the model's images are normalised, for each channel; by default as its image processor says.
        saved_as (`str`, *optional*):
            inter: which words beside the model's weights are its own, by their folder `visual_words-...`. Written by
            `save_pretrained`.

    Raises:
        ValueError: a field holds a value that is not allowed; the message names the field, the value and what is.

    Example:
        >>> VWTConfig(keep_ratio=0.7).patches_kept(196)
        137
    """

    method: str = "intra"
    keep_ratio: float = 0.5
    num_patches: int | None = None
    criterion: str = "variance"
    seed: int = 0
    dropped: str = "discard"
    vocabulary: Any = None
    revision: str | None = None
    threshold: float = 0.1
    proportional_attention: bool = True
    layout: str = "auto"
    output: str | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    saved_as: str | None = None

    def __post_init__(self) -> None:
        _require_choice("method", self.method, METHODS)
        _require_choice("criterion", self.criterion, CRITERIA)
        _require_choice("layout", self.layout, LAYOUTS)
        _require_choice("dropped", self.dropped, DROPPED)
        if self.output is not None:
            _require_choice("output", self.output, OUTPUTS)
        if not _is_number(self.keep_ratio) or not 0 < self.keep_ratio <= 1:
            raise ValueError(f"VWTConfig.keep_ratio is {shown(self.keep_ratio)}; expected a number in (0, 1].")
        if self.num_patches is not None and not (_is_int(self.num_patches) and 1 <= self.num_patches < 2**31):
            raise ValueError(
                f"VWTConfig.num_patches is {shown(self.num_patches)}; expected None or an integer of at least 1, and "
                "less than 2**31."
            )
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"VWTConfig.seed is {shown(self.seed)}; expected an integer in [0, 2**63).")
        if not _is_number(self.threshold) or not 0 <= self.threshold <= 2:
            raise ValueError(f"VWTConfig.threshold is {shown(self.threshold)}; expected a cosine distance in [0, 2].")
        if not isinstance(self.proportional_attention, bool):
            raise ValueError(
                f"VWTConfig.proportional_attention is {shown(self.proportional_attention)}; expected True or False."
            )
        if not (self.vocabulary is None or _is_vocabulary(self.vocabulary)):
            raise ValueError(
                f"VWTConfig.vocabulary is a {type(self.vocabulary).__name__}; expected a Hub id, a folder or a "
                "VisualVocabulary."
            )
        if self.revision is not None and not isinstance(self.revision, str):
            raise ValueError(
                f"VWTConfig.revision is {shown(self.revision)}; expected None, a branch, a tag or a commit."
            )
        if self.saved_as is not None and not (isinstance(self.saved_as, str) and SAVED_AS.fullmatch(self.saved_as)):
            raise ValueError(f"VWTConfig.saved_as is {shown(self.saved_as)}; expected None or 16 digits from 0 to f.")
        self._set_statistics("image_mean", positive=False)
        self._set_statistics("image_std", positive=True)
        for field in dataclasses.fields(self):
            owner = OWNERS.get(field.name, self.method)
            if owner != self.method and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"VWTConfig.{field.name} is {shown(getattr(self, field.name))}, but method is {self.method!r}; the "
                    f"field belongs to method={owner!r}."
                )

        if self.output == "full" and not self.groups:
            raise ValueError(
                "VWTConfig.output is 'full', but dropped is 'discard', which leaves dropped patches without a hidden "
                "state; use dropped='merge'."
            )
        if self.output == "compressed" and self.method == "inter":
            raise ValueError(
                "VWTConfig.output is 'compressed', but under method='inter' the images of a batch have different "
                "numbers of tokens, which no one tensor holds; use output='full'."
            )

    @property
    def groups(self) -> bool:
        """Whether every patch is part of a token."""
        return self.method == "inter" or self.dropped == "merge"

    @property
    def restores(self) -> bool:
        """Whether what a model gives out has a hidden state for every patch."""
        return self.groups if self.output is None else self.output == "full"

    def _set_statistics(self, field: str, positive: bool) -> None:
        values = getattr(self, field)
        if values is None:
            return
        least = 1 / LARGEST_STD if positive else -LARGEST_MEAN
        allowed = isinstance(values, (list, tuple)) and 0 < len(values) <= MOST_CHANNELS
        if not allowed or not all(_is_number(value) and least <= value <= LARGEST_MEAN for value in values):
            kind = "positive numbers" if positive else "numbers"
            raise ValueError(
                f"VWTConfig.{field} is {shown(values)}; expected None or {kind} from {least:g} to {LARGEST_MEAN:g}, "
                "one for each channel."
            )
        object.__setattr__(self, field, tuple(map(float, values)))

    @classmethod
    def parse(cls, value: Any) -> VWTConfig | None:
        """Reads what users write as `vwt=...`: a `VWTConfig`, a dict of its fields, `True` (the defaults), a vocabulary
        (its Hub id, its folder or itself), or `False` / `None` (no compression, returns `None`).

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
                    near = difflib.get_close_matches(str(name)[:SHOWN], names, 1)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    raise ValueError(f"VWTConfig has no field {shown(name)}; its fields are {', '.join(names)}.{hint}")
            return cls(**value)
        if _is_vocabulary(value):
            return cls(method="inter", vocabulary=value)
        raise TypeError(
            f"vwt is {shown(value)}; expected True, False, None, a VWTConfig, a dict of its fields, or a vocabulary: "
            "its Hub id, its folder or a VisualVocabulary."
        )

    def to_dict(self) -> dict[str, Any]:
        """The method's fields as a JSON-ready dict; `VWTConfig.parse` reads it back.

        A vocabulary that is no Hub id becomes `None`: it is saved beside the model's weights.
        """
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if OWNERS.get(field.name, self.method) == self.method
        }
        if self.method == "inter":
            fields["vocabulary"] = self.vocabulary if isinstance(self.vocabulary, str) else None
            for name in ("image_mean", "image_std"):
                fields[name] = fields[name] and list(fields[name])
        return fields

    def is_plain(self, patches: int) -> bool:
        """Whether a model with this setting sees an image of so many `patches` as the plain model does."""
        return self.threshold == 0 if self.method == "inter" else self.patches_kept(patches) == patches

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
        near = difflib.get_close_matches(value[:SHOWN], allowed, 1) if isinstance(value, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"VWTConfig.{field} is {shown(value)}; expected one of {', '.join(map(repr, allowed))}.{hint}")


def shown(value: object) -> str:
    """A value as an error message shows it: as Python writes it, without control characters, cut where it is long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 20]} ... {text[-15:]}"


def _is_vocabulary(value: object) -> bool:
    if isinstance(value, (str, os.PathLike)):
        return bool(os.fspath(value))
    return hasattr(value, "words") and hasattr(value, "normalized")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
