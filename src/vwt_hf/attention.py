"""Attention over ragged batches, reached through transformers' `AttentionInterface`.

The embeddings of a compressed model leave the layout of the batch in a context variable, and the attention of the same
forward finds it there: each thread and each asyncio task has its own, so one model may serve many.
"""

from __future__ import annotations

import contextvars
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .layout import Layout

PREFIX = "vwt_"
BASES = ("eager", "sdpa")


@dataclasses.dataclass
class Forward:
    """A forward of a vision tower under way."""

    batch: Batch | None = None
    """What its embeddings laid out; `None` before."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a forward knows of the batch that it runs on."""

    layout: Layout
    prefix: int
    """Prefix tokens of each image."""
    bias: torch.Tensor
    """(batch, 1, 1, prefix + tokens): added to the attention logits of every layer."""


current: contextvars.ContextVar[Forward | None] = contextvars.ContextVar("vwt_hf forward", default=None)


def register() -> None:
    """Registers `vwt_eager` and `vwt_sdpa` with transformers."""
    for base, forward in (("eager", eager_attention), ("sdpa", sdpa_attention)):
        AttentionInterface.register(PREFIX + base, forward)
        AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


def use_for(tower: nn.Module) -> None:
    """Has `tower` attend by the layout of its batch.

    Raises:
        ValueError: the model uses an attention implementation that takes no bias.
    """
    config: Any = tower.config
    base = config._attn_implementation or "eager"
    if base.startswith(PREFIX):
        return
    if base not in BASES:
        raise ValueError(
            f"The model's attention implementation is {base!r}; inter-image words need one that takes a bias. Load it "
            "with attn_implementation='sdpa' (or 'eager')."
        )
    config._attn_implementation = PREFIX + base


def give_back(config: Any) -> None:
    """Undoes `use_for`, in the config of a model or tower."""
    if (getattr(config, "_attn_implementation", None) or "").startswith(PREFIX):
        config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def _bias(query: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The bias of the current batch, with the caller's mask if there is one, (batch, 1, 1 or tokens, tokens)."""
    forward = current.get()
    batch = None if forward is None else forward.batch
    if batch is None or batch.bias.shape[0] != query.shape[0] or batch.bias.shape[-1] != query.shape[2]:
        raise RuntimeError(
            f"A layer attends to {tuple(query.shape)} (batch, heads, tokens, head size) outside the forward that laid "
            "its batch out, as gradient checkpointing does when it repeats a layer. Inter-image words cannot be "
            "used there; turn gradient checkpointing off, or use method='intra'."
        )
    bias = batch.bias.to(query)
    if attention_mask is None:
        return bias
    if attention_mask.dtype == torch.bool:
        return bias.masked_fill(~attention_mask, float("-inf"))
    return bias + attention_mask


def sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` under the layout's bias; tensors are (batch, heads, tokens, head size)."""
    return sdpa_attention_forward(module, query, key, value, _bias(query, attention_mask), **kwargs)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager` under the layout's bias; tensors are (batch, heads, tokens, head size)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.transpose(2, 3) * scaling + _bias(query, attention_mask)
    weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
