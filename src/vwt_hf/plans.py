"""A plan says which tokens the patches of a batch become, and shortens any tensor that has a row for each patch.

There are two kinds. `Kept`: some patches of each image stay, the same number of every image. `Grouped`: each token
stands for one or more patches or, where images are padded, for none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from .layout import Layout, attention_bias, by_token, lazy, medoids, pool, pool_pairs, regroup, represent
from .words import gather_pairs, gather_patches, with_prefix

PATCH_WORDS = "patch_words"
"""The key under which an image processor gives, and a model takes, what becomes of each patch."""
DROPPED = -1
"""The word, in `patch_words`, of a patch that is part of no token."""
Rotations = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of the angles by which rotary positions turn queries and keys."""


@dataclasses.dataclass(frozen=True)
class Kept:
    """Some patches stay, the same number of each image, and the others are left out."""

    kept: torch.Tensor
    """(batch, keep), or (1, keep) if it is the same for all images; int64: which patches stay, ascending."""
    prefix: int
    """Prefix tokens of each image, which always stay."""

    def reduce(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, prefix + patches, hidden) → (batch, prefix + keep, hidden)."""
        return gather_patches(tokens, with_prefix(self.kept, self.prefix).to(tokens.device))

    def expand(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns them unchanged: patches that were left out have no hidden state."""
        return hidden_states

    def rotate(self, rotations: Rotations) -> Rotations:
        """(patches, head size) → (batch or 1, 1, keep, head size)."""
        kept = self.kept.to(rotations[0].device)
        cosine, sine = (gather_patches(part[None], kept).unsqueeze(1) for part in rotations)
        return cosine, sine

    def bias(self, values: torch.Tensor) -> torch.Tensor:
        """A bias between patches, (1, heads, prefix + patches, prefix + patches) → (batch or 1, heads, prefix + keep,
        prefix + keep)."""
        return gather_pairs(values, with_prefix(self.kept, self.prefix).to(values.device))

    def patch_words(self, batch: int, patches: int) -> torch.Tensor:
        """The plan as a caller may give it, (batch, patches) int64: a kept patch has its own index, others have −1."""
        kept = self.kept.expand(batch, -1)
        return torch.full((batch, patches), DROPPED, device=kept.device).scatter_(1, kept, kept)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Tokens stand for groups of patches: each is the mean of its group, or one patch of it as it is."""

    layout: Layout
    """Which token each patch is part of, and where the tokens of a batch lie."""
    exponent: float
    """A token of s patches draws s to this power as much attention as a token of one."""
    grid: tuple[int, int] | None
    """Rows and columns of patches; `None` where images are padded, and differ in them."""
    sources: torch.Tensor | None = None
    """(sequences, prefix + tokens), int64: if each token is one patch as it is, its row in the output of the
    embeddings, counted over all images; `None` if tokens are means."""
    stays: torch.Tensor | None = None
    """(batch, tokens), bool: which tokens count, where images are padded; `None` if all do."""
    words: torch.Tensor | None = None
    """(batch, patches), int64: the words that patches were grouped by, if tokens are means."""
    folded: dict[Any, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict, compare=False)
    """Cache of what `attention.fold_bias` adds to queries and keys, the same in every layer that goes by this plan."""

    @lazy
    def key_bias(self) -> torch.Tensor | None:
        """(sequences, tokens), float32: added to the attention logits of every key; `None` for nothing."""
        return attention_bias(self.layout, self.exponent)

    @property
    def shape(self) -> torch.Size:
        """Sequences, and tokens of each with its prefix."""
        return self.layout.sizes.shape

    def reduce(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, prefix + patches, hidden) → (sequences, prefix + tokens, hidden); 0 for padding between images."""
        if self.sources is not None:
            rows = tokens.flatten(0, 1)[self.sources.to(tokens.device)]
            if self.layout.gapless:
                return rows
            # Padding got the first image's first row. If that holds NaN, no mask would hide it.
            return rows.masked_fill((self.layout.sizes == 0).unsqueeze(-1).to(rows.device), 0)
        prefix = self.layout.prefix
        means = pool(tokens[:, prefix:], self.layout)
        if not prefix:
            return means
        rows = self.layout.rows[:, :prefix].flatten().to(means.device)
        # Not in place: torch makes the gradient of a view anew once that was written to, and crashes there under FSDP.
        return means.flatten(0, 1).index_copy(0, rows, tokens[:, :prefix].flatten(0, 1)).view_as(means)

    def expand(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(sequences, prefix + tokens, hidden) → (batch, prefix + patches, hidden): each patch gets its token's."""
        return hidden_states.flatten(0, 1)[self.layout.rows.to(hidden_states.device)]

    def rotate(self, rotations: Rotations) -> Rotations:
        """(patches, head size) → (sequences, 1, prefix + tokens, head size).

        A token that is a mean has the rotation of that of its patches which is nearest to the mean of their places, as
        the model knows this rotation, and jitters it in training. The rotation of the mean of the coordinates agrees
        less with the plain model (scripts/compare_rotary.py).
        """
        if self.sources is not None:
            place = self.places_in_image() - self.layout.prefix
        else:
            assert self.grid is not None  # no family has both padded images and rotations
            place = medoids(self.layout, self.grid)
        # Tokens without a place get a row after the last, of cosine 1 and sine 0, which leaves them as they are.
        still = (torch.ones_like(rotations[0][:1]), torch.zeros_like(rotations[1][:1]))
        place = torch.where(place < 0, len(rotations[0]), place).to(rotations[0].device)
        cosine, sine = (torch.cat(pair)[place].unsqueeze(1) for pair in zip(rotations, still, strict=True))
        return cosine, sine

    def bias(self, values: torch.Tensor) -> torch.Tensor:
        """Returns them unchanged: each layer makes of them what it adds, by `pairs`."""
        return values

    def pairs(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A bias between patches, (1, heads, prefix + patches, prefix + patches), as one between tokens.

        Returns:
            For each run of a packed batch, or for the whole of a padded one: (images, heads, tokens, tokens).
        """
        if self.sources is None:
            return pool_pairs(values, self.layout)
        rows = self.layout.by_run(self.places_in_image().to(values.device))
        return tuple(gather_pairs(values, run) for run in rows)

    def places_in_image(self) -> torch.Tensor:
        """(sequences, prefix + tokens), where tokens are no means: the row of each among those of its own image."""
        assert self.sources is not None
        return self.sources % self.layout.rows.shape[1]

    def joined(
        self, into: torch.Tensor, number: int | None = None, not_as: Collection[tuple[int, ...]] = ()
    ) -> Grouped:
        """The plan after some tokens were joined with others of their image; this plan itself, if none was.

        A new token takes the place of the first of those that it was joined from; where `number` is given, of the one
        that stays.

        Args:
            into: (sequences, prefix + tokens), int64: the row of the token that each becomes part of, its own if it
                stays; rows are counted over all sequences.
            number: how many tokens of each image become part of others; `None` where images differ in that.
            not_as: shapes of plans of the same forward, which this one must not have.
        """
        before, prefix, sources = self.layout, self.layout.prefix, self.sources
        into = into.to(before.rows.device)
        if number is None:
            layout, sources = regroup(before, into, not_as, sources)
        else:
            into = into.flatten()
            rows, stays = into[before.rows], into == torch.arange(into.numel(), device=into.device)
            place = (stays.view(self.shape).cumsum(dim=1) - 1 - prefix).flatten()
            layout = represent(place[rows[:, prefix:]], before.longest - prefix - number, prefix)
            sources = None if sources is None else by_token(sources.flatten()[rows], layout)
        if layout.tokens == before.tokens:
            return self
        return dataclasses.replace(self, layout=layout, sources=sources, stays=None, folded={})

    def patch_words(self, batch: int, patches: int) -> torch.Tensor:
        """The plan as a caller may give it, (batch, patches) int64: the word of each patch, or the index of the patch
        that stands for it; −1 for one that no token stands for. `batch` and `patches` are those of the plan."""
        layout = self.layout
        if self.sources is None:
            assert self.words is not None  # `Patches.group` made the plan
            words = self.words
        else:
            words = self.places_in_image().flatten()[layout.rows[:, layout.prefix :]] - layout.prefix
        return words if layout.real is None else words.masked_fill(~layout.real, DROPPED)
