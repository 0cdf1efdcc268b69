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

TOLERANCE = 0.034
SIMILARITY = 0.88
DEPTHS = (5 / 12, 6 / 12, 7 / 12, 8 / 12)
"""After which share of its layers a model's tokens are joined, if a setting does not say."""


@dataclasses.dataclass(frozen=True, repr=False)
class GradualConfig(LocalConfig):
    """As `method="local"`, and after some layers tokens that have become alike are joined, too.

    Tokens are alike as the cosine of their keys says, which are means over the heads of the layer's attention. Every
    second token of an image looks for the one among the others that is most like it, and is joined with it if they are
    alike enough: their states become the mean, weighed by how many patches each stands for.

    Args:
        similarity (`float`, default 0.88):
            Least cosine, in [-1, 1], at which two tokens are joined. Each image has as many as it needs.
        layers (sequence of `int`, *optional*):
            After which layers, 1 for the first. Default: of each twelve layers, those from the fifth to the eighth.
        tolerance, keep_ratio, num_patches, image_std, layout:
            As for `method="local"`; the default of `tolerance` is 0.034. With `tolerance=0` all patches enter the first
            layer.
    """

    method: str = "gradual"
    similarity: float = SIMILARITY
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tolerance is None and self.keep_ratio is None and self.num_patches is None:
            object.__setattr__(self, "tolerance", TOLERANCE)
        super().__post_init__()
        if not is_number(self.similarity, -1, 1):
            raise ValueError(f"VWTConfig.similarity is {shown(self.similarity)}; expected a cosine in [-1, 1].")
        if self.layers is not None:
            allowed = isinstance(self.layers, (list, tuple)) and self.layers
            if not allowed or not all(is_int(layer) and 0 < layer < 2**15 for layer in self.layers):
                raise ValueError(
                    f"VWTConfig.layers is {shown(self.layers)}; expected None or numbers of layers, 1 for the first."
                )
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    @property
    def shortens(self) -> bool:
        return True

    def joins(self, layers: int) -> tuple[int, ...]:
        if self.layers is not None:
            if self.layers[-1] >= layers:
                raise ValueError(
                    f"VWTConfig.layers is {self.layers}, and the model has {layers} layers, after the last of which "
                    f"nothing is to be saved; expected numbers from 1 to {layers - 1}."
                )
            return self.layers
        return tuple(sorted({round(depth * layers) for depth in DEPTHS} - {0, layers}))

    def join(self, plan: Grouped, keys: torch.Tensor, layer: int, not_as: Collection[tuple[int, ...]]) -> Grouped:
        into = join_alike(keys.float().mean(dim=1), plan.layout, self.similarity)
        joined = plan.joined(into, not_as)
        return plan if joined.layout.tokens == plan.layout.tokens else joined
