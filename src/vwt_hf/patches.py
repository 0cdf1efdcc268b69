"""The patches of a batch of images, as a method sees them, and the plans that it can make of them."""

from __future__ import annotations

import dataclasses

import torch

from .blocks import chosen_by, words_of
from .layout import group, lead, represent, whole_rows
from .plans import DROPPED, Grouped, Kept
from .words import patch_grid, patch_places, patchify


@dataclasses.dataclass(frozen=True)
class Patches:
    """The patches of a batch: what they show, where they lie, and which of them are real."""

    pixel_values: torch.Tensor
    """(batch, channels, height, width) as the model gets them; where images come as padded patches, (batch, patches,
    patch height · patch width · channels)."""
    patch_size: tuple[int, int]
    """Height and width of a patch, in pixels."""
    prefix: int
    """Prefix tokens, such as CLS, that come before the patches of each image."""
    grid: tuple[int, int] | None
    """Rows and columns of patches, the same for all images; `None` where they are padded."""
    real: torch.Tensor | None = None
    """(batch, patches), bool: which patches are no padding; `None` if all are real."""
    padded_places: torch.Tensor | None = None
    """(batch, patches, 2) float32: `places` where images are padded; else `None`."""
    packs: bool = True
    """Whether attention takes a batch as one sequence as fast as it takes a padded one."""
    rounds: bool = False
    """Whether a packed sequence runs faster if its length is one of few numbers."""
    draws: bool = False
    """Whether layers draw random numbers for each sequence, so that images in one sequence would share them."""

    @classmethod
    def of_images(cls, pixel_values: torch.Tensor, patch_size: tuple[int, int], rows: int | None = None) -> Patches:
        """The patches of whole images, (batch, channels, height, width).

        Args:
            rows: how many rows the embeddings made of each image, prefix tokens and patches. Without it `prefix` is 0.
        """
        grid = patch_grid(pixel_values, patch_size)
        prefix = 0 if rows is None else rows - grid[0] * grid[1]
        if prefix < 0:
            raise ValueError(
                f"The embeddings of the model made {rows} tokens of an image of {grid[0]}×{grid[1]} patches; expected "
                "one of each patch. Call vwt_hf.restore(model)."
            )
        return cls(pixel_values, patch_size, prefix, grid)

    @classmethod
    def of_padded(
        cls,
        pixel_values: torch.Tensor,
        patch_size: tuple[int, int],
        spatial_shapes: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> Patches:
        """The patches of images that come as padded ones, (batch, patches, patch height · patch width · channels).

        Args:
            spatial_shapes: (batch, 2), rows and columns of patches of each image.
            mask: (batch, patches), which patches a caller takes for real; `None`: all but padding.
        """
        places, real = padded_places(spatial_shapes.to(pixel_values.device), pixel_values.shape[1])
        if mask is not None:
            real = real & mask.to(real.device).bool()
        return cls(pixel_values, patch_size, 0, None, real, places)

    @property
    def channels(self) -> int:
        """3 for RGB."""
        if self.grid is not None:
            return self.pixel_values.shape[1]
        return self.pixel_values.shape[2] // (self.patch_size[0] * self.patch_size[1])

    @property
    def count(self) -> int:
        """Patches of each image, padding included."""
        return self.pixel_values.shape[1] if self.grid is None else self.grid[0] * self.grid[1]

    @property
    def places(self) -> torch.Tensor:
        """(batch or 1, patches, 2) float32: row and column of each patch, counted in patches."""
        if self.padded_places is not None:
            return self.padded_places
        assert self.grid is not None
        return patch_places(self.grid, self.device)

    @property
    def device(self) -> torch.device:
        return self.pixel_values.device

    def pixels(self) -> torch.Tensor:
        """(batch, patches, values): the values of each patch, in an order that is the same for all of them."""
        return self.pixel_values if self.grid is None else patchify(self.pixel_values, self.patch_size)

    def pixels_as_words(self) -> torch.Tensor:
        """(batch, patches, channels · patch height · patch width): the values in the order of a vocabulary's words."""
        if self.grid is not None:
            return patchify(self.pixel_values, self.patch_size)
        return self.pixel_values.unflatten(-1, (*self.patch_size, self.channels)).movedim(-1, 2).flatten(2)

    def without_padding(self, words: torch.Tensor) -> torch.Tensor:
        """The words of patches, (batch, patches) int64, with −1 in place of those of padding."""
        return words if self.real is None else words.masked_fill(~self.real, DROPPED)

    def keep(self, kept: torch.Tensor, stays: torch.Tensor | None = None) -> Kept | Grouped:
        """A plan by which some patches stay, as they are, and the others are left out.

        Args:
            kept: (batch, keep) int64, ascending, or (1, keep) for all images.
            stays: (batch, keep) bool: which of `kept` do stay, where images keep different numbers; `None`: all.
        """
        if self.real is None:
            return Kept(kept, self.prefix)
        kept, stays = self._real_ones(kept, stays)
        stays, order = stays.sort(dim=1, descending=True, stable=True)  # what does not stay is padding, at the end
        kept = kept.gather(1, order)
        # A token is padding where its patch does not stay. Patches that are left out count in no token.
        own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        token_of_patch = torch.zeros_like(self.real, dtype=torch.int64).scatter_(1, kept, own)
        counts = torch.zeros_like(self.real).scatter_(1, kept, stays)
        layout = represent(token_of_patch, kept.shape[1], self.prefix, counts)
        sources = whole_rows(kept, self.pixel_values.shape[0], self.prefix, self.count)
        return Grouped(layout, 0, self.grid, sources, stays)

    def represent(
        self, nearest: torch.Tensor, kept: torch.Tensor, stays: torch.Tensor | None, exponent: float
    ) -> Grouped:
        """A plan by which some patches stay, as they are, and stand for the others, too.

        Args:
            nearest: (batch, patches) int64 in [0, keep): which of `kept` each patch is represented by.
            kept, stays: as for `keep`.
            exponent: a token of s patches draws s to this power as much attention as a token of one.
        """
        if self.real is not None:
            kept, stays = self._real_ones(kept, stays)
        layout = represent(nearest, kept.shape[1], self.prefix, self.real)
        sources = whole_rows(kept, self.pixel_values.shape[0], self.prefix, self.count)
        return Grouped(layout, exponent, self.grid, sources, stays)

    def lead(self, leaders: torch.Tensor, packed: bool, exponent: float) -> Grouped:
        """A plan by which some patches stay, as many of each image as it needs, and stand for the others, too.

        Args:
            leaders, packed: as for `layout.lead`.
            exponent: as for `represent`.
        """
        if self.real is not None:  # padding is part of the first patch's token, and does not count
            leaders = torch.where(self.real, leaders, leaders[:, :1])
        layout, sources = lead(leaders, self.prefix, packed, self.real, self.rounds)
        return Grouped(layout, exponent, self.grid, sources)

    def _real_ones(self, kept: torch.Tensor, stays: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`kept` for each image, and which of these stay and are no padding: (batch, keep) both."""
        assert self.real is not None
        kept = kept.expand(self.real.shape[0], -1)
        counts = self.real.gather(1, kept)
        return kept, counts if stays is None else stays & counts

    def group(self, words: torch.Tensor, packed: bool, exponent: float) -> Grouped:
        """A plan by which the patches of an image that share a word become one token, their mean.

        Args:
            words, packed: as for `layout.group`.
            exponent: as for `represent`.
        """
        layout = group(words, self.prefix, packed, self.real, rounds=self.rounds)
        return Grouped(layout, exponent, self.grid, words=words)

    def group_evenly(self, words: torch.Tensor, tokens: int, exponent: float) -> Grouped:
        """`group` by words that are the index of the first patch of each token, where each image has so many `tokens`,
        prefix tokens left out."""
        leads = words == torch.arange(self.count, device=words.device)
        token_of_patch = (leads.cumsum(dim=1) - 1).gather(1, words)
        return Grouped(represent(token_of_patch, tokens, self.prefix), exponent, self.grid, words=words)

    def seen(self, plan: Kept | Grouped) -> torch.Tensor:
        """What is left of each patch: the mean of its group, or the patch that stands for it, as `pixels_as_words` in
        float32."""
        rows = self.pixels_as_words().float()
        # Without the prefix tokens, which pixels have none of.
        return plan.expand(plan.reduce(rows)) if isinstance(plan, Grouped) else rows

    def of_words(self, patch_words: torch.Tensor, repeats: int = 1) -> torch.Tensor:
        """`patch_words` that a caller gave, as (batch, patches) int64 on the device of the patches.

        Args:
            patch_words: (..., patches) integers, one row for each image. Rows of nothing but −1 are skipped where there
                are too many: a processor pads tiles with them. The grid of the words is not known: words of 7 × 28
                patches pass for those of 14 × 14.
            repeats: how many times in a row each image, with its tiles, may come; it may also come once.

        Raises:
            TypeError: they are no integers in a tensor.
            ValueError: they are of other images: another number of patches, or of images.
        """
        if not isinstance(patch_words, torch.Tensor) or not _holds_integers(patch_words.dtype):
            kind = patch_words.dtype if isinstance(patch_words, torch.Tensor) else type(patch_words).__name__
            raise TypeError(f"patch_words is a {kind}; expected a tensor of integers (batch, patches).")
        batch, given = len(self.pixel_values), tuple(patch_words.shape)
        number = f"{self.count}" if self.grid is None else f"{self.count} ({self.grid[0]} × {self.grid[1]})"
        wanted = f"({batch}, {self.count}). Make them with an image processor for this model, from the same images."
        if patch_words.dim() < 2 or given[-1] != self.count:
            raise ValueError(
                f"patch_words are {given}, and the model cuts {batch} images into {number} patches each: expected "
                f"{wanted}"
            )
        images = int((patch_words != DROPPED).any(dim=-1).sum())
        if repeats > 1 and images * repeats == batch:
            patch_words = patch_words.repeat_interleave(repeats, dim=0)
        words = patch_words.to(self.device, torch.int64).flatten(0, -2)
        if len(words) > batch:
            words = words[(words != DROPPED).any(dim=1)]
        if len(words) != batch:
            raise ValueError(
                f"patch_words are {given}, of {len(words)} images, and the model is given {batch} images: expected "
                f"{wanted}"
            )
        return words

    def kept_by(self, words: torch.Tensor, tokens: int | None = None) -> Kept | Grouped:
        """The plan of `keep` that a caller's words tell: a patch that stays has its own index, others −1.

        Args:
            words: (batch, patches) int64. Here and below, padding may have any, and words that tell no such plan raise
                `ValueError`.
            tokens: least number of tokens of each image, where images are padded.
        """
        stays = self._require_same_number(words != DROPPED)
        own = torch.arange(self.count, device=words.device).expand_as(words)
        self._refuse(words, stays & (words != own), "its own index, or −1 if it is left out")
        return self.keep(*self._kept_of(stays, tokens))

    def represented_by(self, words: torch.Tensor, exponent: float, tokens: int | None = None) -> Grouped:
        """The plan of `represent` that a caller's words tell: each is the index of the patch that stands for the patch,
        and for itself, too. `tokens` is as for `kept_by`."""
        stays, target = self._require_leaders(words)
        kept, counts = self._kept_of(self._require_same_number(stays), tokens)
        place = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        nearest = torch.zeros_like(words).scatter_(1, kept, place).gather(1, target)
        return self.represent(nearest, kept, counts, exponent)

    def led_by(self, words: torch.Tensor, packed: bool, exponent: float) -> Grouped:
        """The plan of `lead` that a caller's words tell, which are as for `represented_by`."""
        _, target = self._require_leaders(words)
        return self.lead(target, packed, exponent)

    def _require_leaders(self, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each patch stands for itself, and the index of the patch that stands for it, (batch, patches) both.
        Refuses words by which a patch stands for others and not for itself."""
        own = torch.arange(self.count, device=words.device).expand_as(words)
        stays = words == own if self.real is None else (words == own) & self.real
        target = words.clamp(0, self.count - 1)
        fits = (words == target) & stays.gather(1, target)
        self._refuse(words, ~fits, "the index of one that has its own")
        return stays, target

    def grouped_by(self, words: torch.Tensor, packed: bool, exponent: float) -> Grouped:
        """The plan of `group` that a caller's words tell, which are not negative."""
        self._refuse(words, words < 0, "the number of a word")
        return self.group(words, packed, exponent)

    def of_blocks(self, words: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
        """A caller's words of blocks, checked, with its own index for padding: each word is the index of the patch or,
        for all of a block, that of its first patch.

        Args:
            members: as `blocks.grid_blocks` or `blocks.padded_blocks` gives them.
        """
        clean = words_of(chosen_by(words, members), members, self.count)
        self._refuse(words, words != clean, "its own index or, as all four of its block, that of the first of them")
        return clean

    def even_number(self, words: torch.Tensor) -> int:
        """How many tokens each image has by words that are the index of each token's first patch. Refuses images that
        differ in it."""
        leads = self._require_same_number(words == torch.arange(self.count, device=words.device))
        return int(leads.sum(dim=1).amax()) if len(words) else self.count

    def _require_same_number(self, stays: torch.Tensor) -> torch.Tensor:
        """`stays` without padding. Refuses images without padding that keep different numbers of patches, or none."""
        if self.real is not None:
            return stays & self.real
        counts = stays.sum(dim=1)
        if counts.numel() and (int(counts.min()) < 1 or int(counts.min()) != int(counts.max())):
            raise ValueError(
                f"patch_words keep {int(counts.min())} to {int(counts.max())} patches of an image; expected the same "
                "number of each image of a batch, and at least one. Images may differ in it where the setting has a "
                "tolerance, or is of method='inter' or 'given'."
            )
        return stays

    def _refuse(self, words: torch.Tensor, wrong: torch.Tensor, expected: str) -> None:
        """Raises `ValueError` if any word of a patch that is no padding is wrong, (batch, patches) bool."""
        wrong = wrong if self.real is None else wrong & self.real
        if bool(wrong.any()):
            image, patch = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"patch_words {tuple(words.shape)} give patch {patch} of image {image} the word "
                f"{int(words[image, patch])}; expected {expected}. They were made for another kind of setting: load "
                'image processor and model with the same `vwt`, or the model with vwt={"method": "given"}.'
            )

    def _kept_of(self, stays: torch.Tensor, tokens: int | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`kept` and `stays`, as `keep` takes them, of which patches stay, (batch, patches) bool."""
        counts = stays.sum(dim=1)
        longest = int(counts.max()) if len(counts) else 0
        if self.real is not None:
            longest = max(longest, tokens or 1)
        kept, order = stays.long().argsort(dim=1, descending=True, stable=True)[:, :longest].sort(dim=1)
        return kept, None if self.real is None else order < counts.unsqueeze(1)


def padded_places(spatial_shapes: torch.Tensor, patches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`Patches.padded_places` and `Patches.real` of images with so many patches each, padding included.

    Args:
        spatial_shapes: (batch, 2), rows and columns of patches of each image.
    """
    rows, columns = spatial_shapes.unbind(1)
    index = torch.arange(patches, device=spatial_shapes.device)
    columns = columns.unsqueeze(1)
    places = torch.stack((index // columns, index % columns), dim=-1)
    return places.float(), index < rows.unsqueeze(1) * columns


def _holds_integers(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
