"""Which tokens of an image are alike, so that one may stand for both: functions on tensors alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layout import Layout
from .on_gpu import kernels_for
from .words import best, whole_share, whole_shares, without_autocast

LARGEST_HEAD = 128
"""Size of a head up to which a kernel finds pairs: for more, not every GPU has the memory at hand."""


class Pairs(NamedTuple):
    """Every second token of each image, and the token among the others that is most like it."""

    tokens: torch.Tensor
    """(images, pairs), int64: the row of each second token, counted over all sequences; an image with fewer pairs has
    its first row there."""
    others: torch.Tensor
    """(images, pairs), int64: rows; of pairs that an image does not have they say nothing."""
    cosines: torch.Tensor
    """(images, pairs), float32: how alike the two are; −inf where an image has no such token."""

    def into(self, joins: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The row of the token that each becomes part of, its own if it stays: (sequences, prefix + tokens), int64.

        Args:
            joins: (images, pairs), bool: which of `tokens` become part of their other.
        """
        own = torch.arange(layout.sizes.numel(), device=joins.device)
        targets = torch.where(joins, self.others, self.tokens)
        return own.scatter(0, self.tokens.flatten(), targets.flatten()).view_as(layout.sizes)


@torch.no_grad()
def find_pairs(keys: torch.Tensor, layout: Layout) -> Pairs:
    """Finds for every second token of an image the one among the others that is most like it.

    Args:
        keys: (sequences, heads, prefix + tokens, head size): tokens are as alike as the cosine of the means of these
            over the heads.
        layout: where the tokens of each image lie. Its prefix tokens are in no pair.
    """
    values, real = keys.float().mean(dim=1), None
    if layout.even:
        rows = torch.arange(layout.tokens, device=values.device).view(-1, layout.longest)[:, layout.prefix :]
        values = values.flatten(0, 1)[: layout.tokens].unflatten(0, (-1, layout.longest))[:, layout.prefix :]
    else:
        first, ends = (bound.to(values.device).unsqueeze(1) for bound in layout.bounds)
        rows = first + torch.arange(layout.prefix, layout.longest, device=values.device)
        real = rows < ends
        rows = torch.where(real, rows, first)
        values = values.flatten(0, 1)[rows]
    with without_autocast(values.device):
        directions = torch.nn.functional.normalize(values, dim=-1)
        cosines = directions[:, 1::2] @ directions[:, 0::2].transpose(1, 2)
    if real is not None:
        cosines.masked_fill_(~(real[:, 1::2, None] & real[:, None, 0::2]), -torch.inf)
    cosine, which = cosines.max(dim=2)
    return Pairs(rows[:, 1::2], rows[:, 0::2].gather(1, which), cosine)


def join_alike(keys: torch.Tensor, layout: Layout, least: float) -> torch.Tensor:
    """Joins every second token of an image with the one among the others that is most like it, if they are alike.

    Args:
        keys, layout: as for `find_pairs`.
        least: the cosine from which on tokens are joined.

    Returns:
        As `Pairs.into`.
    """
    if keys.shape[3] <= LARGEST_HEAD and (kernels := kernels_for(keys)):
        return kernels.join_alike(keys, layout, least)
    pairs = find_pairs(keys, layout)
    return pairs.into(pairs.cosines >= least, layout)


def join_share(keys: torch.Tensor, layout: Layout, share: float) -> torch.Tensor:
    """As `join_alike`, for a share of each image's tokens: of every second one those that are most like another.

    Args:
        share: of the tokens that are no prefix tokens, in [0, 0.5], rounded down.
    """
    pairs = find_pairs(keys, layout)
    # In descending order of their cosines, the earlier of equals first: as many of each image as it is to lose.
    order = best(pairs.cosines, pairs.cosines.shape[1])
    if (number := number_to_join(layout, share)) is not None:
        joins = torch.zeros_like(pairs.tokens, dtype=torch.bool).scatter(1, order[:, :number], True)
    else:
        first, ends = layout.bounds
        counts = (ends - first - layout.prefix).to(order.device)
        joins = order.argsort(dim=1) < whole_shares(counts, share).unsqueeze(1)
    return pairs.into(joins, layout)


def number_to_join(layout: Layout, share: float) -> int | None:
    """How many tokens of each image `join_share` joins; `None` where images have different numbers of tokens."""
    if layout.packed or layout.real is not None or len(layout.runs) != 1:
        return None
    return whole_share(layout.longest - layout.prefix, share)
