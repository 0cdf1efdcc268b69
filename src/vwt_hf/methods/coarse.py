"""`method="coarse"`: blocks of 2 × 2 patches with little detail are shown at half the size, as one patch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from .. import blocks
from ..patches import Patches
from ..plans import Grouped, Kept
from ..words import highest, marked, without_autocast
from .gradual import GradualConfig


@dataclasses.dataclass(frozen=True, repr=False)
class CoarseConfig(GradualConfig):
    """Show blocks of 2 × 2 patches with little detail at half the size, as one patch; the others stay as they are.

    This small patch is embedded four times, once at each of the four positions, and the mean of these is the token.
    With rotary positions it has that of the first. A block loses the root mean square of the differences between its
    pixels and those at half the size, in raw RGB from 0 to 1.

    A token of s patches, joined ones too, draws s to the power of 2/3 as much attention as a token of one patch. With s
    it would draw too much, with 1 too little.

    Args:
        tolerance (`float`, *optional*):
            A block becomes one token if it loses less, so each image has as many tokens as it needs. Default 0.08, if
            neither of the next two is given. With 0 all patches enter the first layer.
        keep_ratio (`float`, *optional*):
            The most tokens that an image may have, as a share of its patches in (0, 1]: the blocks that lose least
            become one token. It has no fewer than a quarter, and an odd last row or column always stays.
        num_patches (`int`, *optional*):
            Most tokens of every image, prefix tokens left out; as for `keep_ratio`.
        similarity, join_ratio, layers (*optional*):
            As for `method="gradual"`: which tokens are joined after some layers. Default: none.
        image_std, layout:
            As for `method="local"`.
    """

    usual_tolerance: ClassVar[float] = 0.08
    usual_similarity: ClassVar[float | None] = None
    usual_exponent: ClassVar[float] = 2 / 3
    chooses_as: ClassVar[str | None] = None

    method: str = "coarse"

    repaints = True

    def repainted(
        self, patches: Patches, words: torch.Tensor | None = None, enlarged: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        members = _members(patches)
        with without_autocast(patches.device):
            images = _images(patches, members)
            halves = blocks.halve(images)
            if words is None:
                words = self._choose(patches, members, images.detach(), halves.detach())
            if not _has_blocks(patches, members):
                return words, patches.pixel_values
            grid = (1, 1) if patches.grid is None else (patches.grid[0] // 2, patches.grid[1] // 2)
            chosen = blocks.chosen_by(words, members).reshape(-1, *grid)
            shown = blocks.with_halves(images, halves, chosen, patches.patch_size, enlarged)
            return words, shown if patches.grid is not None else blocks.put_back(patches.pixel_values, shown, members)

    def _choose(
        self, patches: Patches, members: torch.Tensor, images: torch.Tensor, halves: torch.Tensor
    ) -> torch.Tensor:
        """The word of each patch, (batch, patches) int64: its own index, or where its block becomes one token that of
        the block's first patch."""
        batch = patches.pixel_values.shape[0]
        if not _has_blocks(patches, members):
            return torch.arange(patches.count, device=patches.device).repeat(batch, 1)
        std = self.ready("image_std")
        lost = blocks.detail_lost(images, halves, patches.patch_size, std).view(batch, members.shape[1])
        if self.tolerance is not None:
            chosen = lost < self.tolerance**2  # also where there is no block: no patch has its word
        elif patches.grid is None:
            chosen = self._choose_padded(patches, lost.masked_fill(members[:, :, 0] == patches.count, torch.inf))
        else:
            number = self._number_of_blocks(*patches.grid)
            chosen = marked(highest(-lost, number), lost.shape[1])
        return blocks.words_of(chosen, members, patches.count)

    def _number_of_blocks(self, rows: int, columns: int) -> int:
        """How many blocks of an image of so many rows and columns of patches become one token; each saves three."""
        count = rows * columns
        return min(max(-(-(count - self._wanted(count)) // 3), 0), (rows // 2) * (columns // 2))

    def _choose_padded(self, patches: Patches, lost: torch.Tensor) -> torch.Tensor:
        """Which blocks of padded images become one token, (batch, blocks) bool: those that lose least.

        Args:
            lost: (batch, blocks): what each loses; infinite where there is no block.
        """
        assert patches.real is not None
        counts = patches.real.sum(dim=1)
        numbers = (counts - self._wanted(counts) + 2).div(3, rounding_mode="floor")
        return lost.argsort(dim=1, stable=True).argsort(dim=1) < numbers.unsqueeze(1)

    def plan(self, patches: Patches) -> Grouped:
        return self.plan_repainted(patches, self._own_words(patches))

    def patch_words(self, patches: Patches) -> torch.Tensor | None:
        return patches.without_padding(self._own_words(patches))

    def _own_words(self, patches: Patches) -> torch.Tensor:
        """The words that the setting chooses: as `_choose` gives them."""
        members = _members(patches)
        with without_autocast(patches.device), torch.no_grad():
            images = _images(patches, members)
            return self._choose(patches, members, images, blocks.halve(images))

    def plan_repainted(self, patches: Patches, words: torch.Tensor) -> Grouped:
        if self.even and patches.grid is not None:
            tokens = patches.count - 3 * self._number_of_blocks(*patches.grid)
            return patches.group_evenly(words, tokens, self.size_exponent)
        return patches.group(words, self.packs(patches), self.size_exponent)

    def plan_of(self, patches: Patches, words: torch.Tensor) -> Grouped:
        words = patches.of_blocks(words, _members(patches))
        if self.tolerance is None and patches.grid is not None:
            tokens = patches.even_number(words)
            if self.even:
                return patches.group_evenly(words, tokens, self.size_exponent)
        return patches.group(words, self.packs(patches), self.size_exponent)

    def seen(self, patches: Patches, plan: Kept | Grouped) -> torch.Tensor:
        assert isinstance(plan, Grouped) and plan.words is not None
        _, shown = self.repainted(patches, plan.words, enlarged=True)
        return dataclasses.replace(patches, pixel_values=shown).pixels_as_words().float()


def _members(patches: Patches) -> torch.Tensor:
    """The patches of each block: (batch or 1, blocks, 4)."""
    if patches.grid is not None:
        return blocks.grid_blocks(*patches.grid, patches.device)
    assert patches.real is not None
    return blocks.padded_blocks(patches.places.long(), patches.real)


def _has_blocks(patches: Patches, members: torch.Tensor) -> bool:
    """Whether there is any block: an image of a single row or column of patches has none."""
    return members.shape[1] > 0 and patches.pixel_values.shape[0] > 0


def _images(patches: Patches, members: torch.Tensor) -> torch.Tensor:
    """The images that blocks are part of; where these are padded, an image of each block."""
    if patches.grid is not None or not _has_blocks(patches, members):
        return patches.pixel_values
    return blocks.cut_blocks(patches.pixel_values, members, patches.patch_size)
