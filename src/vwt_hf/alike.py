"""Which tokens of an image are alike, so that one may stand for both: functions on tensors alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .layout import Layout
from .words import best, whole_share, whole_shares, without_autocast


class Pairs(NamedTuple):
    """Every second token of each image, and the token among the others that is most like it."""

    tokens: torch.Tensor
    """(images, pairs), int64: rows, of all sequences one after another."""
    others: torch.Tensor
    """(images, pairs), int64: as `tokens`."""
    cosines: torch.Tensor
    """(images, pairs), float32: how alike the two are; −inf where an image has no such token."""
    counts: torch.Tensor
    """(images,), int64: how many tokens each image has, without prefix tokens."""

    def into(self, joins: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The row of the token that each becomes part of, its own if it stays: (sequences, prefix + tokens), int64.

        Args:
            joins: (images, pairs), bool: which of `tokens` become part of their other.
        """
        own = torch.arange(layout.sizes.numel(), device=joins.device)
        sources = torch.where(joins, self.tokens, own.shape[0])  # what stays goes to a last place, which is none
        into = torch.cat((own, own[:1])).scatter(0, sources.flatten(), self.others.flatten())
        return into[:-1].view_as(layout.sizes)


@torch.no_grad()
def find_pairs(values: torch.Tensor, layout: Layout) -> Pairs:
    """Finds for every second token of an image the one among the others that is most like it.

    Args:
        values: (sequences, prefix + tokens, size), float32: tokens are as alike as the cosine of these.
        layout: where the tokens of each image lie. Its prefix tokens are in no pair.
    """
    first, ends = (bound.to(values.device) for bound in layout.bounds)
    first = first + layout.prefix
    rows = first.unsqueeze(1) + torch.arange(layout.longest - layout.prefix, device=values.device)
    real = rows < ends.unsqueeze(1)
    rows = rows.clamp(max=layout.sizes.numel() - 1)
    with without_autocast(values.device):
        directions = torch.nn.functional.normalize(values.flatten(0, 1), dim=-1)[rows]
        cosines = directions[:, 1::2] @ directions[:, 0::2].transpose(1, 2)
    if len(layout.runs) > 1 or layout.real is not None:  # else all images have as many tokens
        cosines.masked_fill_(~(real[:, 1::2, None] & real[:, None, 0::2]), -torch.inf)
    cosine, which = cosines.max(dim=2)
    return Pairs(rows[:, 1::2], rows[:, 0::2].gather(1, which), cosine, ends - first)


def join_alike(values: torch.Tensor, layout: Layout, least: float) -> torch.Tensor:
    """Joins every second token of an image with the one among the others that is most like it, if they are alike.

    Args:
        values, layout: as for `find_pairs`.
        least: the cosine from which on tokens are joined.

    Returns:
        As `Pairs.into`.
    """
    pairs = find_pairs(values, layout)
    return pairs.into(pairs.cosines >= least, layout)


def join_share(values: torch.Tensor, layout: Layout, share: float) -> torch.Tensor:
    """As `join_alike`, for a share of each image's tokens: of every second one those that are most like another.

    Args:
        share: of the tokens that are no prefix tokens, in [0, 0.5], rounded down.
    """
    pairs = find_pairs(values, layout)
    # In descending order of their cosines, the earlier of equals first: as many of each image as it is to lose.
    order = best(pairs.cosines, pairs.cosines.shape[1])
    if (number := number_to_join(layout, share)) is not None:
        joins = torch.zeros_like(pairs.tokens, dtype=torch.bool).scatter(1, order[:, :number], True)
    else:
        joins = order.argsort(dim=1) < whole_shares(pairs.counts, share).unsqueeze(1)
    return pairs.into(joins, layout)


def number_to_join(layout: Layout, share: float) -> int | None:
    """How many tokens of each image `join_share` joins; `None` where images have different numbers of tokens."""
    if layout.packed or layout.real is not None or len(layout.runs) != 1:
        return None
    return whole_share(layout.longest - layout.prefix, share)
