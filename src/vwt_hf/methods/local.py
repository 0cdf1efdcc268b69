"""`method="local"`: a patch that looks like its neighbour is left to it, as many as the image has of them."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, ClassVar

import torch

from ..checks import is_number, require_count, require_share
from ..config import ModelFacts
from ..neighbours import (
    Neighbours,
    are_numbers,
    at,
    cover,
    cover_by,
    describe,
    find_leaders,
    find_neighbours,
    find_padded_neighbours,
    leaders,
)
from ..patches import Patches
from ..plans import Grouped
from ..printable import shown
from ..processors import model_statistics
from ..words import highest, marked, whole_share, without_autocast
from .ragged import RaggedConfig

ASSUMED_STD = 0.5
"""The standard deviation that most image processors of transformers normalise by."""
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, repr=False)
class LocalConfig(RaggedConfig):
    """Leave out patches that look like the patch beside them, which then stands for both, as it is.

    How much two patches differ is measured in raw RGB from 0 to 1, by their colours, how these rise and fall across the
    patch, and how strongly it is textured (`neighbours.describe`).

    Args:
        tolerance (`float`, *optional*):
            A patch may be left to a neighbour that differs by less, so each image has as many tokens as it needs. Where
            that neighbour is left to another, too, the most similar of those around that stay stands for the patch,
            which may differ by more. Default 0.045, if neither of the next two is given. 0 is the plain model.
        keep_ratio (`float`, *optional*):
            Share of patches kept, in (0, 1], of every image: those that differ most from their neighbours, and one in
            each 4 × 4 block, however small the share.
        num_patches (`int`, *optional*):
            Number of patches kept, of every image; as for `keep_ratio`. An image with no more patches than that keeps
            all.
        image_std (sequence of `float`, *optional*):
            What the model's images are divided by for each channel, after their mean was taken off; by default as its
            image processor says.
        layout (`str`, default `"auto"`):
            As `RaggedConfig` says.
    """

    usual_tolerance: ClassVar[float] = 0.045
    """The tolerance where nothing says how many patches stay."""
    statistics: ClassVar[dict[str, bool]] = {"image_std": True}

    method: str = "local"
    tolerance: float | None = None
    keep_ratio: float | None = None
    num_patches: int | None = None
    image_std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("tolerance", "keep_ratio", "num_patches") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"VWTConfig.{given[0]} is {shown(getattr(self, given[0]))} and {given[1]} is "
                f"{shown(getattr(self, given[1]))}; expected one of them, which says how many patches stay."
            )
        if not given:
            object.__setattr__(self, "tolerance", self.usual_tolerance)
        if self.tolerance is not None and not is_number(self.tolerance, 0, 1):
            raise ValueError(
                f"VWTConfig.tolerance is {shown(self.tolerance)}; expected a difference of raw RGB, in [0, 1]."
            )
        if self.keep_ratio is not None:
            require_share("VWTConfig.keep_ratio", self.keep_ratio)
        require_count("VWTConfig.num_patches", self.num_patches)

    @property
    def even(self) -> bool:
        return self.tolerance is None

    @property
    def cuts(self) -> bool:
        """Whether any image may have fewer tokens before the first layer."""
        return self.tolerance != 0 and self.keep_ratio != 1

    @property
    def shortens(self) -> bool:
        return self.cuts

    def with_saved(self, saved: dict[str, Any]) -> LocalConfig:
        if self.image_std is not None or saved.get("image_std") is None:
            return self
        setting = dataclasses.replace(self, image_std=saved["image_std"])
        setting.require_sane()
        return setting

    def prepared(self, model: ModelFacts) -> LocalConfig:
        if self.image_std is not None:
            if len(self.image_std) != model.channels:
                raise ValueError(
                    f"VWTConfig.image_std is {shown(self.image_std)}; expected {model.channels} numbers, one for each "
                    "channel of the model's images."
                )
            return self
        present = getattr(model.present, "image_std", None)
        if present is not None:
            return dataclasses.replace(self, image_std=present)
        try:
            _, std = model_statistics(model, model.channels, f"VWTConfig(method={self.method!r}, image_std=...)")
        except ValueError as error:
            std = (ASSUMED_STD,) * model.channels
            logger.warning(f"{error} Taken and saved: {ASSUMED_STD} for each channel.")
        return dataclasses.replace(self, image_std=std)

    def plan(self, patches: Patches) -> Grouped:
        with without_autocast(patches.device), torch.no_grad():
            if not self.even or patches.grid is None:
                return patches.lead(self._leaders(patches), self.packs(patches), self.size_exponent)
            kept, nearest = self._stay_on_grid(patches)
            return patches.represent(nearest, kept, None, self.size_exponent)

    def patch_words(self, patches: Patches) -> torch.Tensor | None:
        with without_autocast(patches.device), torch.no_grad():
            return patches.without_padding(self._leaders(patches))

    def _leaders(self, patches: Patches) -> torch.Tensor:
        """Which patch stands for each: (batch, patches), int64."""
        if patches.grid is not None and self.tolerance is not None:
            std = self.ready("image_std")
            return find_leaders(patches.pixel_values, patches.patch_size, patches.grid, std, self.tolerance)
        if patches.grid is not None:
            return at(*self._stay_on_grid(patches))
        assert patches.real is not None
        neighbours = find_padded_neighbours(self._looks(patches), patches.places, patches.real)
        if self.tolerance is not None:
            stays = cover(neighbours, self.tolerance)
        else:
            stays = self._stay_by_number(patches, neighbours)
        return leaders(neighbours, stays)

    def _looks(self, patches: Patches) -> torch.Tensor:
        return describe(patches.pixels_as_words().float(), patches.patch_size, self.ready("image_std"))

    def _stay_on_grid(self, patches: Patches) -> tuple[torch.Tensor, torch.Tensor]:
        """Which patches stay, as many of each image, where images are not padded.

        Returns:
            Which patches stay, (batch, keep) int64, ascending; and which of these stands for each patch, (batch,
            patches) int64 in [0, keep).
        """
        assert patches.grid is not None
        rows, columns = patches.grid
        fewest = -(-rows // 4) * -(-columns // 4)  # so many always stay
        keep = min(max(self._wanted(patches.count), fewest), patches.count)
        looks = self._looks(patches)
        neighbours = find_neighbours(looks, patches.grid)
        scores = cover_by(neighbours, keep)
        if keep == fewest:
            # A patch that holds NaN takes the place of one that always stays, which any other may stand for then.
            scores = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(~are_numbers(looks), torch.inf)
        kept = highest(scores, keep)
        stays = marked(kept, patches.count)
        places = stays.cumsum(dim=1) - 1
        if keep == fewest:  # the first patch may not stay
            places = places.clamp(min=0)
        return kept, at(places, leaders(neighbours, stays))

    def _stay_by_number(self, patches: Patches, neighbours: Neighbours) -> torch.Tensor:
        """Which patches stay, (batch, patches) bool, where images are padded."""
        assert patches.real is not None
        counts = patches.real.sum(dim=1)
        always = (patches.places.long() % 4 == 0).all(dim=-1) & patches.real
        numbers = always.sum(dim=1).clamp(min=self._wanted(counts)).minimum(counts)
        # Padding has no neighbours, so it counts among what stays.
        scores = cover_by(neighbours, numbers + (~patches.real).sum(dim=1))
        scores = scores.masked_fill(~patches.real, -torch.inf)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return order.argsort(dim=1) < numbers.unsqueeze(1)

    def plan_of(self, patches: Patches, words: torch.Tensor) -> Grouped:
        if self.tolerance is None and patches.grid is not None:
            if self.even:
                return patches.represented_by(words, self.size_exponent)
            patches.even_number(words)  # refuses words by which images differ in it
        return patches.led_by(words, self.packs(patches), self.size_exponent)

    def _wanted(self, count: Any) -> Any:
        """How many patches `num_patches` or `keep_ratio` asks for.

        Args:
            count: patches of an image, or (batch,), int64, of each of several.
        """
        return whole_share(count, self.keep_ratio) if self.keep_ratio is not None else self.num_patches or 0
