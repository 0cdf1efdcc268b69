"""`method="gradual"`: a light cut before the first layer, and tokens that are alike are joined after some layers."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from ..alike import join_alike, join_share, number_to_join
from ..checks import is_int, is_number
from ..plans import Grouped
from ..printable import shown
from .local import LocalConfig

DEPTHS = (5 / 12, 7 / 12, 9 / 12)
"""After which share of the layers tokens are joined by default."""


@dataclasses.dataclass(frozen=True, repr=False)
class GradualConfig(LocalConfig):
    """As `method="local"`, and after some layers tokens that have become alike are joined, too.

    Every second token of an image looks for the one among the others that is most like it, and is joined with it if
    they are alike enough: their states become the mean, weighed by how many patches each stands for, and scaled to
    their mean length. Tokens stand in the order of the first patch of each or, with `keep_ratio` or `num_patches`, of
    the patches that were kept.

    How alike they are is 1 − √s · (1 − c) / (1 − m): c is the cosine of their hidden states, m the mean of these
    cosines over all such pairs of the image, and s how many patches the token stands for that becomes part of the
    other. So two tokens of a patch each are 1 alike if they are the same, and 0 if they differ as two of the image do
    on average.

    A token of s patches draws s to the power of 0.9 as much attention as a token of one patch.

    Args:
        similarity (`float` or sequence of `float`, default 0.61):
            How alike two tokens must be to be joined, a number in [-1, 1]: one for each layer, or one for all.
        join_ratio (`float` or sequence of `float`, *optional*):
            In place of `similarity`: the share of an image's tokens that become part of others, in [0, 0.5], those that
            are most alike; one for each layer, or one number for all. With `keep_ratio` or `num_patches` all images of
            a batch then have the same number of tokens, as export needs.
        layers (sequence of `int`, *optional*):
            After which layers, 1 for the first. Default: 5, 7 and 9 of 12; 10, 14 and 18 of 24, and so on.
        tolerance, keep_ratio, num_patches, image_std, layout:
            As for `method="local"`; the default of `tolerance` is 0.022. With `tolerance=0` all patches enter the first
            layer.
    """

    usual_tolerance: ClassVar[float] = 0.022
    usual_exponent: ClassVar[float] = 0.9
    usual_similarity: ClassVar[float | None] = 0.61
    """The similarity where nothing says how many tokens are joined; `None`: then none are."""
    chooses_as: ClassVar[str | None] = "local"
    beside_choice: ClassVar[frozenset[str]] = LocalConfig.beside_choice | {"similarity", "join_ratio", "layers"}

    method: str = "gradual"
    similarity: float | tuple[float, ...] | None = None
    join_ratio: float | tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            self._require_layers(self.layers)
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.similarity is not None and self.join_ratio is not None:
            raise ValueError(
                f"VWTConfig.similarity is {shown(self.similarity)} and join_ratio is {shown(self.join_ratio)}; "
                "expected one of them, which says how many tokens are joined."
            )
        if self.join_ratio is not None:
            self._require_for_layers("join_ratio", 0, 0.5, "a share of the tokens in [0, 0.5]")
            return
        if self.similarity is None:
            object.__setattr__(self, "similarity", self.usual_similarity)
        if self.similarity is not None:
            self._require_for_layers("similarity", -1, 1, "a number in [-1, 1]")
        elif self.layers is not None:
            raise ValueError(
                f"VWTConfig.layers is {shown(self.layers)}, and neither similarity nor join_ratio says which tokens "
                "are joined after them; expected one of the two, or no layers."
            )

    @staticmethod
    def _require_layers(layers: Any) -> None:
        """Refuses `layers` that are not numbers of layers, ascending."""
        listed = isinstance(layers, (list, tuple)) and 0 < len(layers) < 2**10
        if not listed or not all(is_int(layer) and 0 < layer < 2**15 for layer in layers):
            raise ValueError(
                f"VWTConfig.layers is {shown(layers)}; expected None or numbers of layers, 1 for the first."
            )
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"VWTConfig.layers is {shown(layers)}; expected each once, ascending.")

    def _require_for_layers(self, field: str, least: float, most: float, kind: str) -> None:
        """Refuses a field that is neither a number nor one for each layer; of a list it makes a tuple.

        Args:
            least, most: what each number is at least, and at most.
            kind: says in the message what such a number is.
        """
        value, wanted = getattr(self, field), len(DEPTHS if self.layers is None else self.layers)
        given = tuple(value) if isinstance(value, (list, tuple)) else (value,) * wanted
        if len(given) != wanted or not all(is_number(one, least, most) for one in given):
            raise ValueError(
                f"VWTConfig.{field} is {shown(value)}; expected {kind}, or {wanted} of them, one for each layer that "
                "tokens are joined after."
            )
        if isinstance(value, list):
            object.__setattr__(self, field, given)

    @property
    def even(self) -> bool:
        # Torch before 2.13 traces no super().even.
        return self.tolerance is None and self.similarity is None

    @property
    def shortens(self) -> bool:
        return self.cuts or self.similarity is not None or self.join_ratio is not None

    def joins(self, layers: int) -> dict[int, float]:
        if self.layers is not None and self.layers[-1] >= layers:
            raise ValueError(
                f"VWTConfig.layers is {self.layers}, and the model has {layers} layers, of which the last leaves "
                f"nothing to save; expected numbers from 1 to {layers - 1}."
            )
        numbers = self.layers or [round(depth * layers) for depth in DEPTHS]
        given = self.similarity if self.join_ratio is None else self.join_ratio
        if given is None:
            return {}
        by_layer = given if isinstance(given, tuple) else (given,) * len(numbers)
        wanted: dict[int, float] = {}
        for number, one in zip(numbers, by_layer, strict=True):
            if 0 < number < layers:
                wanted.setdefault(number, one)  # a model of few layers has one for several depths
        return wanted

    def seek(self, plan: Grouped, hidden_states: torch.Tensor, wanted: float) -> tuple[torch.Tensor, int | None] | None:
        if not plan.layout.runs:  # no images
            return None
        if self.join_ratio is None:
            self.require_untraced()
            return join_alike(hidden_states, plan.layout, wanted), None
        # By the setting, and not by whether the images of a padded batch happen to have the same number.
        number = number_to_join(plan.layout, wanted) if self.even else None
        return join_share(hidden_states, plan.layout, wanted), number
