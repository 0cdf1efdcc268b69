"""`method="intra"`: some of an image's own patches stay (paper, intra-image approach)."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..checks import require_count, require_seed, require_share
from ..config import CRITERIA, VWTConfig, require_choice
from ..patches import Patches
from ..plans import Grouped, Kept
from ..words import (
    Centred,
    best,
    centre,
    dithered,
    grid_patches,
    highest,
    nearest_kept,
    random_patches,
    random_ranks,
    whole_share,
)

FATES = ("discard", "merge")


@dataclasses.dataclass(frozen=True, repr=False)
class IntraConfig(VWTConfig):
    """Keep some of an image's own patches.

    Args:
        keep_ratio (`float`, default 0.5):
            Share of patches kept, in (0, 1], rounded down to whole patches. 1.0 is the plain model.
        num_patches (`int`, *optional*):
            Number of patches kept, whatever the image size; overrides `keep_ratio`. An image with no more patches than
            that keeps all of them.
        criterion (`str`, default `"variance"`):
            Which patches stay. `"variance"`: those whose channel and pixel values vary most (the paper's).
            `"random"`: a random subset, drawn once from `seed` and shared by all images of one size.
            `"grid"`: an even cover of the image, whatever it shows.
        seed (`int`, default 0):
            Of the random subset of `criterion="random"`.
        dropped (`str`, default `"discard"`):
            What happens to the patches that do not stay. `"discard"`: they are left out before the first layer (the
            paper's). `"merge"`: each joins the nearest patch that stays, which then stands for both.
    """

    method: str = "intra"
    keep_ratio: float = 0.5
    num_patches: int | None = None
    criterion: str = "variance"
    seed: int = 0
    dropped: str = "discard"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("criterion", self.criterion, CRITERIA)
        require_choice("dropped", self.dropped, FATES)
        require_share("VWTConfig.keep_ratio", self.keep_ratio)
        require_count("VWTConfig.num_patches", self.num_patches)
        require_seed(self.seed, "VWTConfig.seed")
        if self.output == "full" and not self.groups:
            raise ValueError(
                "VWTConfig.output is 'full', but dropped is 'discard', which leaves dropped patches without a hidden "
                "state; use dropped='merge'."
            )

    @property
    def groups(self) -> bool:
        return self.dropped == "merge"

    @property
    def shortens(self) -> bool:
        return self.keep_ratio < 1 or self.num_patches is not None

    even = True

    def patches_kept(self, patches: int) -> int:
        """How many of an image's `patches` stay (paper: k = int(N · (1 − drop rate)), here without float error).

        Raises:
            ValueError: none would stay.
        """
        if self.num_patches is not None:
            return min(self.num_patches, patches)
        kept = whole_share(patches, self.keep_ratio)
        if kept < 1:
            raise ValueError(
                f"keep_ratio={self.keep_ratio} keeps none of an image's {patches} patches; "
                f"use a keep_ratio of at least {math.ceil(1000 / patches) / 1000}."
            )
        return kept

    def plan(self, patches: Patches) -> Kept | Grouped | None:
        if (chosen := self._chosen(patches)) is None:
            return None
        kept, stays, nearest = chosen
        if nearest is None:
            return patches.keep(kept, stays)
        return patches.represent(nearest, kept, stays, self.size_exponent)

    def patch_words(self, patches: Patches) -> torch.Tensor | None:
        if not self.groups:
            return super().patch_words(patches)
        if (chosen := self._chosen(patches)) is None:
            return None
        kept, _, nearest = chosen
        assert nearest is not None
        return patches.without_padding(kept.expand(len(nearest), -1).gather(1, nearest))

    def _chosen(self, patches: Patches) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None:
        """Decides which patches stay; `None`: all do.

        Returns:
            `kept` and `stays`, as `Patches.keep` takes them, and `nearest`, as `Patches.represent` does, or `None` if
            dropped patches are represented by none.
        """
        keep = self.patches_kept(patches.count)
        if patches.real is None and keep == patches.count:
            return None
        values = centre(patches.pixels()) if self.criterion == "variance" or self.groups else None
        if patches.real is not None:
            kept, stays = self._choose_padded(patches, values, keep)
        else:
            kept, stays = self._choose(patches, values, keep), None
        if not self.groups:
            return kept, stays, None
        assert values is not None
        return kept, stays, nearest_kept(values, kept, patches.places, patches.real, stays)

    def plan_of(self, patches: Patches, words: torch.Tensor) -> Kept | Grouped:
        tokens = None if patches.real is None else self.patches_kept(patches.count)
        if self.groups:
            return patches.represented_by(words, self.size_exponent, tokens)
        return patches.kept_by(words, tokens)

    def _choose(self, patches: Patches, values: Centred | None, keep: int) -> torch.Tensor:
        """Indices of the patches that stay, ascending, (batch, keep), or (1, keep): the same for all images."""
        if self.criterion == "variance":
            assert values is not None
            return highest(values.variance, keep)
        if self.criterion == "random":
            return random_patches(patches.count, keep, self.seed, patches.device)
        assert patches.grid is not None  # images are not padded
        return grid_patches(*patches.grid, keep, patches.device)

    def _choose_padded(self, patches: Patches, values: Centred | None, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses patches where images are padded: `keep_ratio` of each image's real patches stay, at least one.

        Returns:
            Indices of patches, (batch, keep), ascending, and which of them stay, (batch, keep) bool.
        """
        real = patches.real
        assert real is not None
        if self.criterion == "variance":
            assert values is not None
            scores = values.variance
        elif self.criterion == "random":
            scores = -random_ranks(patches.count, self.seed, patches.device).float()
        else:
            row, column = patches.places.long().unbind(-1)
            scores = -dithered(row, column, patches.count).float()
        counts = real.sum(dim=1)
        if self.num_patches is not None:
            counts = counts.clamp(max=self.num_patches)
        else:
            counts = whole_share(counts, self.keep_ratio).clamp(min=1)
        kept, order = best(scores.expand_as(real).masked_fill(~real, -torch.inf), keep).sort(dim=1)
        return kept, order < counts.unsqueeze(1)
