"""`method="coarse"`: blocks of 2 × 2 patches with little detail are shown at half the size, as one patch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..blocks import (
    chosen_by,
    cut_blocks,
    grid_blocks,
    halve,
    lost,
    padded_blocks,
    put_back,
    with_halves,
    words_of,
)
from ..patches import Patches
from ..plans import Grouped, Kept
from ..words import highest, whole_share, whole_shares, without_autocast
from .gradual import GradualConfig


@dataclasses.dataclass(frozen=True, repr=False)
class CoarseConfig(GradualConfig):
    """Show blocks of 2 × 2 patches with little detail at half the size, as one patch; the others stay as they are.

    Such a patch is embedded four times, at the places of the four that it stands for, and their mean is the token;
    rotary positions are those of the first. What a block loses is the root mean square of what its pixels differ by at
    half the size, in raw RGB from 0 to 1.

    A token of s patches, also of joined ones, draws as much attention as s to the power of 2/3: as all s it would draw
    too much, as one too little.

    Args:
        tolerance (`float`, *optional*):
            A block becomes one token if it loses less, so each image has as many tokens as it needs. Default 0.08, if
            neither of the next two is given. With 0 all patches enter the first layer.
        keep_ratio (`float`, *optional*):
            Share of patches, in (0, 1], that the tokens of every image are at most, as far as there are blocks: a
            quarter is the least, and an odd last row or column stays. The blocks that lose least become one token.
        num_patches (`int`, *optional*):
            Most tokens of every image, prefix tokens left out; as for `keep_ratio`.
        similarity, join_ratio, layers (*optional*):
            As for `method="gradual"`: which tokens are joined after some layers. Default: none.
        image_std, layout:
            As for `method="local"`.
    """

    usual_tolerance: ClassVar[float] = 0.08
    usual_similarity: ClassVar[float | None] = None
    attention_exponent: ClassVar[float] = 2 / 3

    method: str = "coarse"

    @property
    def repaints(self) -> bool:
        return True

    def repainted(
        self, patches: Patches, words: torch.Tensor | None = None, enlarged: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        members = _members(patches)
        batch, blocks = patches.pixel_values.shape[0], members.shape[1]
        if not blocks or not batch:  # as in a single row or column of patches
            own = torch.arange(patches.count, device=patches.device).repeat(batch, 1)
            return (own if words is None else words), patches.pixel_values
        padded = patches.grid is None
        images = cut_blocks(patches.pixel_values, members, patches.patch_size) if padded else patches.pixel_values
        with without_autocast(patches.device):
            halves = halve(images)
            if words is None:
                chosen = self._choose(patches, images.detach(), halves.detach(), members)
                words = words_of(chosen, members, patches.count)
            else:
                chosen = chosen_by(words, members)
            grid = (1, 1) if patches.grid is None else (patches.grid[0] // 2, patches.grid[1] // 2)
            shown = with_halves(images, halves, chosen.reshape(-1, *grid), patches.patch_size, enlarged)
            return words, put_back(patches.pixel_values, shown, members) if padded else shown

    def _choose(
        self, patches: Patches, images: torch.Tensor, halves: torch.Tensor, members: torch.Tensor
    ) -> torch.Tensor:
        """Which blocks become one token, (batch, blocks), bool.

        Args:
            images: those that blocks lie in, or one of each block where images are padded.
            halves: what `blocks.halve` makes of them.
            members: the patches of each block.
        """
        assert self.image_std is not None  # `prepared` came before
        found = lost(images, halves, patches.patch_size, self.image_std)
        found = found.view(patches.pixel_values.shape[0], members.shape[1])
        there = members[:, :, 0] < patches.count
        if self.tolerance is not None:
            return (found < self.tolerance**2) & there
        if patches.grid is None:
            return self._choose_padded(patches, found.masked_fill(~there, torch.inf), there)
        number = self._blocks_of(*patches.grid)
        return torch.zeros_like(found, dtype=torch.bool).scatter(1, highest(-found, number), True)

    def _blocks_of(self, rows: int, columns: int) -> int:
        """How many blocks of an image of so many rows and columns of patches become one token."""
        count = rows * columns
        wanted = self.num_patches if self.keep_ratio is None else whole_share(count, self.keep_ratio)
        assert wanted is not None  # one of the two is given
        return min(max(-(-(count - wanted) // 3), 0), (rows // 2) * (columns // 2))

    def _choose_padded(self, patches: Patches, found: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """As many blocks of each image as it is to be shortened by: (batch, blocks), bool."""
        assert patches.real is not None
        counts = patches.real.sum(dim=1)
        wanted = torch.full_like(counts, self.num_patches or 0)
        if self.keep_ratio is not None:
            wanted = whole_shares(counts, self.keep_ratio)
        numbers = (counts - wanted + 2).div(3, rounding_mode="floor").clamp(min=0)
        order = found.argsort(dim=1, stable=True).argsort(dim=1)
        return (order < numbers.unsqueeze(1)) & there

    def plan(self, patches: Patches) -> Grouped:
        return self.plan_by(patches, self.repainted(patches)[0])

    def plan_by(self, patches: Patches, words: torch.Tensor) -> Grouped:
        if self.tolerance is None and patches.grid is not None:
            tokens = patches.count - 3 * self._blocks_of(*patches.grid)
            return patches.group_evenly(words, tokens, self.attention)
        return patches.group(words, self.packs(patches), self.attention, by_index=True)

    def plan_of(self, patches: Patches, words: torch.Tensor) -> Grouped:
        words = patches.of_blocks(words, _members(patches))
        if self.tolerance is None and patches.grid is not None:
            return patches.group_evenly(words, patches.even_number(words), self.attention)
        return patches.group(words, self.packs(patches), self.attention, by_index=True)

    def seen(self, patches: Patches, plan: Kept | Grouped) -> torch.Tensor:
        assert isinstance(plan, Grouped) and plan.words is not None
        _, shown = self.repainted(patches, plan.words, enlarged=True)
        return dataclasses.replace(patches, pixel_values=shown).pixels_as_words().float()


def _members(patches: Patches) -> torch.Tensor:
    """The patches of each block: (batch or 1, blocks, 4)."""
    if patches.grid is not None:
        return grid_blocks(*patches.grid, patches.device)
    assert patches.real is not None
    return padded_blocks(patches.places.long(), patches.real)
