"""Which tokens of an image are alike, so that one may stand for both: functions on tensors alone."""

from __future__ import annotations

import torch

from .layout import Layout
from .words import without_autocast


@torch.no_grad()
def join_alike(values: torch.Tensor, layout: Layout, least: float) -> torch.Tensor:
    """Joins every second token of an image with the one among the others that is most like it.

    Args:
        values: (sequences, prefix + tokens, size), float32: tokens are as alike as the cosine of these.
        layout: where the tokens of each image lie. Its prefix tokens stay alone.
        least: the cosine from which on tokens are joined.

    Returns:
        (sequences, prefix + tokens), int64: the row, of all sequences one after another, of the token that each becomes
        part of; its own if it stays.
    """
    own = torch.arange(layout.sizes.numel(), device=values.device)
    first = layout.rows.to(values.device).amin(dim=1) + layout.prefix
    ends = layout.rows.to(values.device).amax(dim=1) + 1
    place = torch.arange(layout.longest - layout.prefix, device=values.device)
    rows = first.unsqueeze(1) + place  # (images, tokens)
    real = rows < ends.unsqueeze(1)
    rows = rows.clamp(max=len(own) - 1)
    with without_autocast(values.device):
        directions = torch.nn.functional.normalize(values.flatten(0, 1), dim=-1)[rows]
        cosines = directions[:, 1::2] @ directions[:, 0::2].transpose(1, 2)
    cosines.masked_fill_(~real[:, None, 0::2], -torch.inf)
    cosine, which = cosines.max(dim=2)
    joins = (cosine >= least) & real[:, 1::2]
    sources = torch.where(joins, rows[:, 1::2], len(own))  # what stays goes to a last place, which is none
    into = torch.cat((own, own[:1])).scatter(0, sources.flatten(), rows[:, 0::2].gather(1, which).flatten())
    return into[:-1].view_as(layout.sizes)
