"""`method="given"`: patches become tokens as the caller of the model says."""

from __future__ import annotations

import dataclasses

import torch

from ..config import require_choice
from ..patches import Patches
from ..plans import DROPPED, Grouped, Kept
from .ragged import RaggedConfig

TOKENS = ("means", "representatives")


@dataclasses.dataclass(frozen=True, repr=False)
class GivenConfig(RaggedConfig):
    """Go by the `patch_words` that each call of the model is given, (batch, patches) integers; search nothing.

    Words among which is −1 leave patches out: a patch that stays has its own index, and as many stay of each image. All
    other words say which patches share a token. Those of method="coarse" do so, too, but no block is shown at half the
    size.

    Args:
        tokens (`str`, default `"means"`):
            What patches with one word become. `"means"`: the average of their embeddings, whatever number the word has,
            as under method="inter". `"representatives"`: the patch whose index the word is, as under dropped="merge".
        layout (`str`, default `"auto"`):
            As `RaggedConfig` says.
    """

    method: str = "given"
    tokens: str = "means"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("tokens", self.tokens, TOKENS)

    searches = False

    def plan(self, patches: Patches) -> Kept | Grouped | None:
        raise ValueError(
            f"The model goes by the words of its caller and was given none with {len(patches.pixel_values)} images; "
            "call it with patch_words=..., which an image processor loaded with `vwt` makes, or compress it by another "
            "method. Of BLIP and its like compress the whole model, as its `generate` hands no words to a part."
        )

    def plan_of(self, patches: Patches, words: torch.Tensor) -> Kept | Grouped:
        left_out = words == DROPPED if patches.real is None else (words == DROPPED) & patches.real
        if self.output is None and bool(left_out.any()):
            if patches.real is not None:
                raise ValueError(
                    "patch_words leave patches out, and the images come as padded patches (SigLIP 2 NaFlex), of which "
                    "method='given' takes words that groups share. Load the model with the `vwt` of the image "
                    "processor that made them."
                )
            return patches.kept_by(words)
        if self.tokens == "representatives":
            return patches.led_by(words, self.packs(patches), self.size_exponent)
        return patches.grouped_by(words, self.packs(patches), self.size_exponent)
