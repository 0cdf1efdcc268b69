"""The patches of a batch of images, as a method sees them, and the plans that it can make of them."""

from __future__ import annotations

import dataclasses

import torch

from .layout import attention_bias, group, represent
from .plans import Grouped, Kept
from .words import patch_places, patchify


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patches of a batch: what they show, where they lie, and which of them are real."""

    pixel_values: torch.Tensor
    """(batch, channels, height, width) as the model gets them; where images come as padded patches, (batch, patches,
    patch height · patch width · channels)."""
    patch_size: tuple[int, int]
    """Height and width of a patch, in pixels."""
    channels: int
    """3 for RGB."""
    prefix: int
    """Prefix tokens, such as CLS, that come before the patches of each image."""
    grid: tuple[int, int] | None
    """Rows and columns of patches, the same for all images; `None` where they are padded."""
    real: torch.Tensor | None = None
    """(batch, patches), bool: which patches are no padding; `None` if all are real."""
    padded_places: torch.Tensor | None = None
    """(batch, patches, 2) float32: what `places` gives, where images are padded."""
    packs: bool = True
    """Whether attention takes a batch without padding, as one sequence, as fast as it takes a padded one."""
    draws: bool = False
    """Whether layers draw random numbers for each sequence, so that images in one sequence would share them."""

    @property
    def count(self) -> int:
        """Patches of each image, padding included."""
        return self.pixel_values.shape[1] if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def places(self) -> torch.Tensor:
        """(batch or 1, patches, 2) float32: row and column of each patch, counted in patches."""
        if self.padded_places is not None:
            return self.padded_places
        assert self.grid is not None  # else images are padded
        return patch_places(self.grid, self.device)

    @property
    def device(self) -> torch.device:
        return self.pixel_values.device

    def pixels(self) -> torch.Tensor:
        """(batch, patches, values): each patch's values, all patches in one order of values, whichever it is."""
        return self.pixel_values if self.grid is None else patchify(self.pixel_values, self.patch_size)

    def pixels_as_words(self) -> torch.Tensor:
        """(batch, patches, channels · patch height · patch width): values in the order of a vocabulary's words."""
        if self.grid is not None:
            return patchify(self.pixel_values, self.patch_size)
        return self.pixel_values.unflatten(-1, (*self.patch_size, self.channels)).movedim(-1, 2).flatten(2)

    def keep(self, kept: torch.Tensor, stays: torch.Tensor | None = None) -> Kept | Grouped:
        """A plan by which some patches stay, as they are, and the others are left out.

        Args:
            kept: (batch, keep) int64, ascending, or (1, keep) for all images.
            stays: (batch, keep) bool: which of them do stay, where images have different numbers; `None`: all.
        """
        if self.real is None:
            return Kept(kept, self.prefix)
        kept, stays = self._real_ones(self.real, kept, stays)
        # Tokens are padding where their patch is; those that do not stay count nowhere.
        own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        token_of_patch = torch.zeros_like(self.real, dtype=torch.int64).scatter_(1, kept, own)
        layout = represent(
            token_of_patch, kept.shape[1], self.prefix, torch.zeros_like(self.real).scatter_(1, kept, stays)
        )
        return Grouped(layout, attention_bias(layout, False), self.grid, kept, stays)

    def represent(
        self, nearest: torch.Tensor, kept: torch.Tensor, stays: torch.Tensor | None, proportional: bool
    ) -> Grouped:
        """A plan by which some patches stay, as they are, and stand for the others, too.

        Args:
            nearest: (batch, patches) int64 in [0, keep): which of `kept` each patch is represented by.
            kept, stays: as for `keep`.
            proportional: whether a token draws as much attention as the patches that it stands for would.
        """
        if self.real is not None:
            kept, stays = self._real_ones(self.real, kept, stays)
        layout = represent(nearest, kept.shape[1], self.prefix, self.real)
        return Grouped(layout, attention_bias(layout, proportional), self.grid, kept, stays)

    @staticmethod
    def _real_ones(
        real: torch.Tensor, kept: torch.Tensor, stays: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`kept` of each image, and which of them stay and are no padding: (batch, keep) both."""
        kept = kept.expand(real.shape[0], -1)
        counts = real.gather(1, kept)
        return kept, counts if stays is None else stays & counts

    def group(self, words: torch.Tensor, packed: bool, proportional: bool) -> Grouped:
        """A plan by which the patches of an image that share a word become one token, their mean.

        Args:
            words: (batch, patches), integers.
            packed: whether the batch becomes one sequence without padding, or one padded sequence for each image.
            proportional: as for `represent`.
        """
        layout = group(words, self.prefix, packed, self.real)
        return Grouped(layout, attention_bias(layout, proportional), self.grid)


def padded_places(spatial_shapes: torch.Tensor, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the patches of padded images lie, and which are real.

    Args:
        spatial_shapes: (batch, 2), rows and columns of patches of each image.
        patches: of each image, padding included.

    Returns:
        (batch, patches, 2) float32, row and column counted in patches, and (batch, patches) bool: False for padding.
    """
    rows, columns = spatial_shapes.unbind(1)
    index = torch.arange(patches, device=spatial_shapes.device)
    columns = columns.unsqueeze(1)
    places = torch.stack((index // columns, index % columns), dim=-1)
    return places.float(), index < rows.unsqueeze(1) * columns
