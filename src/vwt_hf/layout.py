"""Ragged batches: which patches of an image share a token, how many each token stands for, and the way back.

Pure tensors. A batch's tokens are laid out padded: (batch, tokens), as many as the image with the most has.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the patches of a batch of images became tokens."""

    token_of_patch: torch.Tensor
    """(batch, patches), int64: the token that each patch is part of."""
    sizes: torch.Tensor
    """(batch, tokens), float32: how many patches each token stands for; 0 where there is padding."""

    @property
    def lengths(self) -> torch.Tensor:
        """(batch,), int64: tokens of each image."""
        return (self.sizes > 0).sum(dim=1)


def group(patch_words: torch.Tensor) -> Layout:
    """Lays patches out as tokens: those of one image that share a word become one.

    Tokens come in the order of their first patches, so the numbers of the words do not matter.

    Args:
        patch_words: (batch, patches), integers.
    """
    batch, patches = patch_words.shape
    ordered, order = patch_words.sort(dim=1, stable=True)
    starts = torch.ones_like(patch_words, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = torch.arange(patches, device=patch_words.device).expand(batch, -1)
    # The sort is stable, so the patch that starts a run is the first in the image that has the run's word.
    run_start = torch.where(starts, place, 0).cummax(dim=1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, run_start))
    leads = first == place
    token_of_patch = (leads.cumsum(dim=1) - 1).gather(1, first)
    tokens = int(leads.sum(dim=1).max()) if batch else 0  # the one synchronisation with the device
    sizes = torch.zeros(batch, tokens, device=patch_words.device)
    sizes.scatter_add_(1, token_of_patch, torch.ones_like(token_of_patch, dtype=sizes.dtype))
    return Layout(token_of_patch, sizes)


def pool(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The mean of each token's patches, summed in float32.

    Args:
        values: (batch, patches, channels).

    Returns:
        (batch, tokens, channels), in the dtype of `values`; 0 where there is padding.
    """
    batch, tokens = layout.sizes.shape
    offset = torch.arange(batch, device=values.device).unsqueeze(1) * tokens
    sums = values.new_zeros(batch * tokens, values.shape[-1], dtype=torch.float32)
    sums = sums.index_add(0, (layout.token_of_patch + offset).flatten(), values.flatten(0, 1).float())
    means = sums / layout.sizes.clamp(min=1).view(-1, 1)
    return means.view(batch, tokens, -1).to(values.dtype)


def expand(hidden_states: torch.Tensor, layout: Layout, prefix: int) -> torch.Tensor:
    """Gives each patch its token's hidden state: the way back to one value a patch.

    Args:
        hidden_states: (batch, prefix + tokens, hidden).
        prefix: how many prefix tokens come first; they stay as they are.

    Returns:
        (batch, prefix + patches, hidden).
    """
    batch = len(hidden_states)
    own = torch.arange(prefix, device=hidden_states.device).expand(batch, -1)
    index = torch.cat((own, layout.token_of_patch.to(own.device) + prefix), dim=1)
    return hidden_states[torch.arange(batch, device=index.device).unsqueeze(1), index]


def attention_bias(layout: Layout, prefix: int, proportional: bool) -> torch.Tensor:
    """What is added to attention logits: −inf on padding and, if `proportional`, log s on a token of s patches.

    A token of s patches then draws as much attention as its s patches would together (proportional attention).

    Args:
        prefix: how many prefix tokens come first, each of size 1.

    Returns:
        (batch, 1, 1, prefix + tokens), float32.
    """
    logits = layout.sizes.log()
    if not proportional:
        logits = torch.where(layout.sizes > 0, 0.0, logits)
    return torch.nn.functional.pad(logits, (prefix, 0)).view(len(logits), 1, 1, -1)
