"""`method="gradual"`: a light cut before the first layer, and tokens that are alike are joined after some layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch

from ..alike import join_alike
from ..bounds import is_int, is_number
from ..plans import Grouped
from ..printable import shown
from .local import LocalConfig

TOLERANCE = 0.028
SIMILARITIES = {5 / 12: 0.846, 6 / 12: 0.867, 7 / 12: 0.914, 8 / 12: 0.902}
"""After which share of its layers a model's tokens are joined, and how alike they must be, if a setting does not say.
Each layer has its own, as keys are alike in some layers and less so in others."""


@dataclasses.dataclass(frozen=True, repr=False)
class GradualConfig(LocalConfig):
    """As `method="local"`, and after some layers tokens that have become alike are joined, too.

    Tokens are as alike as the cosine of their keys says, means over the heads of the layer's attention. Every second
    token of an image looks for the one among the others that is most like it, and is joined with it if they are alike
    enough: their states become the mean, weighed by how many patches each stands for.

    Args:
        similarity (`float` or sequence of `float`, *optional*):
            Least cosine, in [-1, 1], at which two tokens are joined; one for all of `layers`, or one for each. Default:
            0.846, 0.867, 0.914 and 0.902 after the layers that are the default, which leave each image as many tokens
            as it needs.
        layers (sequence of `int`, *optional*):
            After which layers, 1 for the first. Default: of each twelve layers the fifth to the eighth.
        tolerance, keep_ratio, num_patches, image_std, layout:
            As for `method="local"`; the default of `tolerance` is 0.028. With `tolerance=0` all patches enter the first
            layer.
    """

    method: str = "gradual"
    similarity: float | tuple[float, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tolerance is None and self.keep_ratio is None and self.num_patches is None:
            object.__setattr__(self, "tolerance", TOLERANCE)
        super().__post_init__()
        if self.layers is not None:
            listed = isinstance(self.layers, (list, tuple)) and 0 < len(self.layers) < 2**10
            if not listed or not all(is_int(layer) and 0 < layer < 2**15 for layer in self.layers):
                raise ValueError(
                    f"VWTConfig.layers is {shown(self.layers)}; expected None or numbers of layers, 1 for the first."
                )
            if list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"VWTConfig.layers is {shown(self.layers)}; expected each once, ascending.")
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.similarity, (list, tuple)):
            object.__setattr__(self, "similarity", tuple(self.similarity))
        wanted = len(SIMILARITIES) if self.layers is None else len(self.layers)
        given = self.similarity if isinstance(self.similarity, tuple) else (self.similarity,) * wanted
        if len(given) != wanted or not (
            self.similarity is None or all(is_number(similarity, -1, 1) for similarity in given)
        ):
            raise ValueError(
                f"VWTConfig.similarity is {shown(self.similarity)}; expected None, a cosine in [-1, 1], or {wanted} of "
                "them, one for each layer that tokens are joined after."
            )
        if self.similarity is None and self.layers is not None:
            raise ValueError(
                f"VWTConfig.layers is {shown(self.layers)} and similarity is None, whose default is of other layers; "
                "give similarity, too."
            )

    @property
    def shortens(self) -> bool:
        return True

    def joins(self, layers: int) -> dict[int, float]:
        numbers = self.layers or tuple(round(depth * layers) for depth in SIMILARITIES)
        if self.layers is not None and self.layers[-1] >= layers:
            raise ValueError(
                f"VWTConfig.layers is {self.layers}, and the model has {layers} layers, of which the last leaves "
                f"nothing to save; expected numbers from 1 to {layers - 1}."
            )
        if self.similarity is None:
            similarities = tuple(SIMILARITIES.values())
        else:
            similarities = self.similarity if isinstance(self.similarity, tuple) else (self.similarity,) * len(numbers)
        pairs = zip(numbers, similarities, strict=True)
        return {number: similarity for number, similarity in pairs if 0 < number < layers}

    def join(self, plan: Grouped, keys: torch.Tensor, least: float, not_as: Collection[tuple[int, ...]]) -> Grouped:
        into = join_alike(keys.float().mean(dim=1), plan.layout, least)
        joined = plan.joined(into, not_as)
        return plan if joined.layout.tokens == plan.layout.tokens else joined
