"""Which tokens of an image are alike, so that one may stand for both: functions on tensors alone.

Every second token of an image may become part of one of the others. How alike the two are is
1 − √s · (1 − c) / (1 − m). c is the cosine of their hidden states, and m the mean of these cosines over all such pairs
of the image, as tokens are much more alike in some models and layers than in others. s is how many patches the token
stands for that would become part of the other: the more, the closer the two must be, as in Ward's clustering.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .layout import Layout
from .on_gpu import is_compiling, kernels_for
from .words import HELD, best, whole_share, without_autocast

EARLIER, PLACES = 1e-4, 128
"""Where the token most like another is chosen, candidate i counts as `EARLIER` · min(i, `PLACES`) less alike. So of
many that are equal but for rounding, as in a plain background, the first is taken in every batch."""
FLAT = 0.01
"""1 − m counts as no less than this: where all tokens are the same, it would be nothing but rounding."""
SAME = 1 - 1e-3
"""Tokens are never asked to be more alike than this: two that are the same are, but for rounding."""


class Pairs(NamedTuple):
    """Every second token of each image, and the token among the others that is most like it."""

    tokens: torch.Tensor
    """(images, pairs), int64: the row of each second token, counted over all sequences. An image with fewer pairs than
    others has its first row in place of those that it lacks."""
    others: torch.Tensor
    """(images, pairs), int64: the row of the other token; any row for pairs that an image lacks."""
    alike: torch.Tensor
    """(images, pairs), float32: how alike the two are; −inf for pairs that an image lacks."""

    def into(self, joins: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The row of the token that each becomes part of, its own if it stays: (sequences, prefix + tokens), int64.

        Args:
            joins: (images, pairs), bool: which of `tokens` become part of the other of their pair.
        """
        own = torch.arange(layout.sizes.numel(), device=joins.device)
        targets = torch.where(joins, self.others, self.tokens)
        return own.scatter(0, self.tokens.flatten(), targets.flatten()).view_as(layout.sizes)


@torch.no_grad()
def find_pairs(hidden_states: torch.Tensor, layout: Layout) -> Pairs:
    """Finds for every second token of an image the one among the others that is most like it; prefix tokens are in no
    pair.

    Args:
        hidden_states: (sequences, prefix + tokens, hidden).
    """
    values, scale, rows, real, tokens = _by_image(hidden_states, layout)
    pieces = _in_pieces(values, scale)
    pairs = (tokens // 2) * (tokens - tokens // 2) + (tokens < 2)  # 1 in place of 0
    mean = functools.reduce(operator.add, (cosines().sum(dim=(1, 2)) for cosines in pieces)) / pairs
    spread = (1 - mean).clamp(min=FLAT).unsqueeze(1)
    places = torch.arange(rows[:, 0::2].shape[1], device=values.device).clamp(max=PLACES) * EARLIER
    if real is not None:
        places = places.where(real[:, 0::2], torch.inf)
    # The tie-break is taken off to choose, and added again to say how alike the two are.
    later = (spread * places).unsqueeze(1)
    chosen = [cosines().sub_(later).max(dim=2) for cosines in pieces]
    most, which = chosen[0] if len(chosen) == 1 else (torch.cat(each, dim=1) for each in zip(*chosen, strict=True))
    sizes = layout.sizes.to(values.device).flatten()[rows[:, 1::2]].clamp(min=1)
    alike = 1 - sizes.sqrt() * ((1 - most) / spread - EARLIER * which.clamp(max=PLACES))
    if real is not None:
        alike = alike.masked_fill(~real[:, 1::2], -torch.inf)
    return Pairs(rows[:, 1::2], rows[:, 0::2].gather(1, which), alike)


def _by_image(
    hidden_states: torch.Tensor, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Any]:
    """The tokens of hidden states, (sequences, prefix + tokens, hidden), by image and without prefix tokens.

    Returns:
        Their values, (images, tokens, hidden) float32. What makes each of length 1, (images, tokens): 0 for padding, so
        that its cosines are 0. The row of each, (images, tokens) int64, counted over all sequences. Which are no
        padding, (images, tokens) bool; `None` where all images have as many. How many each image has.
    """
    values, real = hidden_states.float().flatten(0, 1), None
    scale = torch.linalg.vector_norm(values, dim=1).clamp(min=1e-12).reciprocal()
    tokens: Any
    if layout.even:
        tokens, rows = layout.longest - layout.prefix, torch.arange(layout.tokens, device=values.device)
        rows, values, scale = (
            each[: layout.tokens].unflatten(0, (-1, layout.longest))[:, layout.prefix :]
            for each in (rows, values, scale)
        )
    else:
        first, ends = (bound.to(values.device).unsqueeze(1) for bound in layout.bounds)
        rows = first + torch.arange(layout.prefix, layout.longest, device=values.device)
        real, tokens = rows < ends, (ends - first).flatten() - layout.prefix
        rows = torch.where(real, rows, first)
        values, scale = values[rows], scale[rows].masked_fill(~real, 0)
    return values, scale, rows, real, tokens


def _in_pieces(values: torch.Tensor, scale: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    """What gives the cosines of second tokens with the others, (images, seconds, others), for `HELD` of them each.

    If all fit into one piece, they are made once, else anew at each call.
    """
    others, of_others, seconds, of_seconds = values[:, 0::2], scale[:, 0::2], values[:, 1::2], scale[:, 1::2]
    step = max(1, HELD // max(1, of_others.numel()))
    if is_compiling() or seconds.shape[1] <= step:
        cosines = _cosines(others, of_others, seconds, of_seconds)
        return [lambda: cosines]
    parts = zip(seconds.split(step, dim=1), of_seconds.split(step, dim=1), strict=True)
    return [functools.partial(_cosines, others, of_others, *part) for part in parts]


def _cosines(
    others: torch.Tensor, of_others: torch.Tensor, seconds: torch.Tensor, of_seconds: torch.Tensor
) -> torch.Tensor:
    """The cosines of two groups of tokens of each image, (images, seconds, others).

    Args:
        others, seconds: (images, tokens, hidden).
        of_others, of_seconds: (images, tokens), what makes each of length 1.
    """
    with without_autocast(others.device):
        products = seconds @ others.transpose(1, 2)
    return products.mul_(of_seconds.unsqueeze(2)).mul_(of_others.unsqueeze(1))


def join_alike(hidden_states: torch.Tensor, layout: Layout, least: float) -> torch.Tensor:
    """Joins every second token of an image with the one among the others that is most like it, if the two are at least
    so much alike, or `SAME` if that is less: as `Pairs.into`."""
    least = min(least, SAME)
    if kernels := kernels_for(hidden_states):
        return kernels.join_alike(hidden_states, layout, least, EARLIER, PLACES, FLAT)
    pairs = find_pairs(hidden_states, layout)
    return pairs.into(pairs.alike >= least, layout)


def join_share(hidden_states: torch.Tensor, layout: Layout, share: float) -> torch.Tensor:
    """`join_alike` for those of an image's tokens that are most like another: a share of all but prefix tokens, in
    [0, 0.5], rounded down."""
    pairs = find_pairs(hidden_states, layout)
    # The most alike first, of equals the earlier first.
    order = best(pairs.alike, pairs.alike.shape[1])
    first, ends = layout.bounds
    counts = (ends - first - layout.prefix).to(order.device)
    return pairs.into(order.argsort(dim=1) < whole_share(counts, share).unsqueeze(1), layout)


def number_to_join(layout: Layout, share: float) -> int | None:
    """How many tokens of each image `join_share` joins; `None` where images have different numbers of tokens."""
    if layout.real is not None or len(layout.runs) != 1:
        return None
    return whole_share(layout.longest - layout.prefix, share)
