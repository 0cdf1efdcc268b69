"""Attention over ragged batches, reached through transformers' `AttentionInterface`.

The embeddings of a compressed model leave the layout of the batch in a context variable, and the attention of the same
forward finds it there: each thread and each asyncio task has its own, so one model may serve many.

A padded batch attends under a bias that hides the padding. A packed one attends by a kernel that knows where images
end (variable-length flash attention, on CUDA in half precision), else length by length: images of one length lie side
by side and are a view of the sequence, so nothing is copied and nothing is padded.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .layout import Layout, pool_pairs

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_SCALES = "scale" in inspect.signature(varlen_attn).parameters
except ImportError:  # torch before 2.10
    VARLEN_SCALES = False

PREFIX = "vwt_"
BASES = ("eager", "sdpa", "flash_attention_2")
Pairs = tuple[torch.Tensor, ...] | None
"""For each run of a packed batch, or for the whole of a padded one: (images or 1, heads, tokens, tokens), added to the
attention logits of one layer."""
FOLDED = 8
"""Dimensions that a bias adds to a head: two hold it, and flash kernels take multiples of eight."""


@dataclasses.dataclass
class Forward:
    """A forward of a vision tower under way."""

    implementation: str
    """The attention implementation of the tower's layers."""
    draws_by_sequence: bool = False
    """Whether layers draw random numbers for each sequence, as stochastic depth does in training."""
    relative: bool = False
    """Whether its attention is given a bias by where patches lie to each other, in place of a mask."""
    real: torch.Tensor | None = None
    """(batch, patches or kept patches): which of the tower's output is real, not padding, where its images are padded;
    before its embeddings ran, what the caller gave as such."""
    batch: Batch | None = None
    """What its embeddings laid out; `None` before, and where patches were dropped."""
    kept: torch.Tensor | None = None
    """(batch or 1, patches kept), int64: which patch each token is, where it is one of them and not a mean."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a forward knows of the batch that it runs on."""

    layout: Layout
    bias: torch.Tensor | None
    """(sequences, tokens), float32: added to the attention logits of every layer, by key."""
    folded: dict[Any, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)
    """What `fold_bias` adds to queries and keys, which is the same in every layer."""


current: contextvars.ContextVar[Forward | None] = contextvars.ContextVar("vwt_hf forward", default=None)


def register() -> None:
    """Registers `vwt_eager`, `vwt_sdpa` and `vwt_flash_attention_2` with transformers."""
    for base, forward in (("eager", eager), ("sdpa", sdpa), ("flash_attention_2", flash_attention_2)):
        AttentionInterface.register(PREFIX + base, forward)
        mask = functools.partial(_given_mask, ALL_MASK_ATTENTION_FUNCTIONS[base])
        AttentionMaskInterface.register(PREFIX + base, mask)


def _given_mask(base: Callable[..., Any], *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """The mask that a caller gave, if one did: models make one of their own while they are exported."""
    if attention_mask is None:
        return None
    forward = current.get()
    if forward is not None and forward.relative:  # attention could not tell it from the bias that it is added to
        _refuse_mask(attention_mask)
    return base(*args, attention_mask=attention_mask, **kwargs)


def _refuse_mask(attention_mask: torch.Tensor) -> NoReturn:
    raise ValueError(
        f"attention_mask {tuple(attention_mask.shape)} masks patches of the whole image, and tokens have taken their "
        "place. Leave it out, or call vwt_hf.restore(model) first."
    )


def require_usable(tower: Any) -> None:
    """Raises `ValueError` if `tower` uses an attention implementation that cannot attend by a layout."""
    base = (tower.config._attn_implementation or "eager").removeprefix(PREFIX)
    if base not in BASES:
        raise ValueError(
            f"The model's attention implementation is {base!r}; grouped patches need one of {', '.join(BASES)}. Load "
            "it with attn_implementation='sdpa'."
        )


def use_for(tower: Any) -> None:
    """Has `tower` attend by the layout of its batch.

    Raises:
        ValueError: the model uses an attention implementation that cannot.
    """
    base = tower.config._attn_implementation or "eager"
    if not base.startswith(PREFIX):
        require_usable(tower)
        tower.config._attn_implementation = PREFIX + base


def give_back(config: Any) -> None:
    """Undoes `use_for`, in the config of a model or tower."""
    if (getattr(config, "_attn_implementation", None) or "").startswith(PREFIX):
        config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def carry_through_checkpoints(layers: list[nn.Module]) -> None:
    """Has gradient checkpointing, where it is on, repeat layers with the layout that they first ran with."""
    for layer in layers:
        checkpoint: Any = layer.__dict__.get("_gradient_checkpointing_func")
        if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpoint:
            layer.__dict__["_gradient_checkpointing_func"] = functools.partial(_checkpoint, checkpoint)


def give_back_checkpoint(layer: nn.Module) -> None:
    """Undoes `carry_through_checkpoints`."""
    checkpoint: Any = layer.__dict__.get("_gradient_checkpointing_func")
    if getattr(checkpoint, "func", None) is _checkpoint:
        layer.__dict__["_gradient_checkpointing_func"] = checkpoint.args[0]


def _checkpoint(checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any) -> Any:
    """`checkpoint(layer, *args)`; the backward pass, which repeats `layer`, may run in another thread."""
    forward = current.get()

    def within(*args: Any) -> Any:
        token = current.set(forward)
        try:
            return layer(*args)
        finally:
            current.reset(token)

    return checkpoint(within, *args)


def packs(implementation: str, device: torch.device, dtype: torch.dtype, relative: bool = False) -> bool:
    """Whether `implementation` attends to packed batches as fast as it can to padded ones.

    On a CPU it does, length by length. On other devices a call for each length would leave the device waiting for
    the host, so it takes a kernel that knows where images end, and such a kernel takes no bias for pairs of tokens.

    Args:
        relative: whether attention is given such a bias.
    """
    if relative:
        return device.type == "cpu"
    if implementation == PREFIX + "flash_attention_2":
        return True
    return device.type == "cpu" or (implementation == PREFIX + "sdpa" and _has_flash(device, dtype))


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own variable-length flash attention takes tensors like these."""
    if device.type != "cuda" or not VARLEN_SCALES or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _batch(query: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[Batch, Pairs]:
    """The batch under way, which `query` (sequences, heads, tokens, head size) must be of, and the bias for pairs of
    its tokens that a family gives in place of `attention_mask`."""
    forward = current.get()
    batch = None if forward is None else forward.batch
    if batch is None or batch.layout.sizes.shape != (query.shape[0], query.shape[2]):
        raise RuntimeError(
            f"A layer attends to {tuple(query.shape)} (sequences, heads, tokens, head size) outside the forward that "
            "laid its batch out. Call the model, not its layers, and repeat no layer outside its forward."
        )
    if attention_mask is None:
        return batch, None
    assert forward is not None  # it has a batch
    if not forward.relative:
        _refuse_mask(attention_mask)
    return batch, (attention_mask,) if forward.kept is not None else pool_pairs(attention_mask, batch.layout)


# Compiled models call attention as it is: what it finds in the context variable is not for a graph to hold, and lengths
# differ from batch to batch.
@torch.compiler.disable
def sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` by the layout of the batch; tensors are (sequences, heads, tokens, head size)."""
    batch, pairs = _batch(query, attention_mask)
    kwargs["is_causal"] = False  # taken for causal where an attention does not say
    head_size = query.shape[-1]
    if (
        batch.layout.packed
        and pairs is None
        and not dropout
        and _has_flash(query.device, query.dtype)
        and head_size % 8 == 0
        and head_size + FOLDED <= 256
    ):
        return _by_boundaries(varlen_attn, query, key, value, batch, scaling), None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return sdpa_attention_forward(module, query, key, value, bias, scaling=scaling, dropout=dropout, **kwargs)[0]

    return _by_layout(attend, query, key, value, batch, pairs), None


@torch.compiler.disable
def eager(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager` by the layout of the batch; tensors are (sequences, heads, tokens, head size).

    The second value stands for the attention weights.
    """
    batch, pairs = _batch(query, attention_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = query @ key.transpose(2, 3) * scaling
        logits = logits if bias is None else logits + bias
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        return (weights @ value).transpose(1, 2)

    return _by_layout(attend, query, key, value, batch, pairs), _no_weights(query)


@torch.compiler.disable
def flash_attention_2(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`flash_attention_2` over a packed batch; tensors are (1, heads, tokens, head size)."""
    from flash_attn import flash_attn_varlen_func  # transformers refuses to load a model for it where it is missing

    batch, _ = _batch(query, attention_mask)
    if not batch.layout.dense:
        raise ValueError(
            "layout is 'padded' and the attention implementation 'flash_attention_2', which takes no bias to hide "
            "padding with; use layout='auto' or 'packed', or attn_implementation='sdpa'."
        )

    def attend(*packed: Any, scale: float) -> torch.Tensor:
        return flash_attn_varlen_func(*packed, dropout_p=dropout, softmax_scale=scale, causal=False)

    return _by_boundaries(attend, query, key, value, batch, scaling), None


def fused(module: Any, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands in for the forward of an attention with one `qkv` projection that knows no interface (BLIP).

    Args:
        module: the attention, whose parameters are used.
        hidden_states: (sequences, tokens, hidden).
    """
    heads = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    dropout = module.dropout.p if module.training else 0.0
    output, _ = sdpa(module, *heads, None, scaling=module.scale, dropout=dropout)
    return module.projection(output.flatten(2)), _no_weights(heads[0])


def separate(
    module: Any,
    hidden_states: torch.Tensor,
    output_attentions: bool = False,
    relative_position_bias: torch.Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Stands in for the forward of an attention with `query`, `key` and `value` projections and a relative position
    bias that knows no interface (Data2Vec-vision).

    Args:
        module: the attention, whose parameters are used.
        hidden_states: (sequences, tokens, hidden).
        output_attentions: whether to give what stands for attention weights, too, which `compress` refuses.
        relative_position_bias: as the modules that `Family.relative` names give it, if layers share one.
        interpolate_pos_encoding: without effect, as a bias is of the size of its image.
        resolution: height and width of the images.
    """
    query, key, value = (
        projection(hidden_states).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for projection in (module.query, module.key, module.value)
    )
    bias = relative_position_bias
    if module.has_relative_position_bias:
        assert resolution is not None
        own = module.relative_position_bias(tuple(size // module.config.patch_size for size in resolution))
        bias = own if bias is None else own + bias
    dropout = module.dropout.p if module.training else 0.0
    attend = eager if module.config._attn_implementation == PREFIX + "eager" else sdpa
    output, _ = attend(module, query, key, value, bias, dropout=dropout)
    return (output.flatten(2), _no_weights(query)) if output_attentions else (output.flatten(2),)


def _no_weights(query: torch.Tensor) -> torch.Tensor:
    """What stands for attention weights where no one tensor holds them; `compress` refuses to give it out."""
    return query.new_zeros(()).expand(*query.shape[:3], query.shape[2])


def _by_layout(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    pairs: Pairs = None,
) -> torch.Tensor:
    """Calls `attend` on the batch if it is padded, else on the images of each length.

    Args:
        attend: takes query, key and value (images, heads, tokens, head size) and a bias (images, 1, 1, tokens),
            (images or 1, heads, tokens, tokens) or `None`, and gives (images, tokens, heads, head size).

    Returns:
        (sequences, tokens, heads, head size).
    """
    bias = None if batch.bias is None else batch.bias.to(query)
    layout = batch.layout
    if not layout.runs:  # no images, of which an interface may not tell the shape
        return value.transpose(1, 2)
    if not layout.packed:
        return attend(query, key, value, _sum(query, bias, None if pairs is None else pairs[0]))
    rows = [images * length for length, images in layout.runs]
    parts = zip(*(tensor[0].split(rows, dim=1) for tensor in (query, key, value)), strict=True)
    biases = [None] * len(rows) if bias is None else bias[0].split(rows)
    between = [None] * len(rows) if pairs is None else pairs
    outputs = [
        attend(
            *(tensor.unflatten(1, (images, length)).transpose(0, 1) for tensor in part),
            _sum(query, None if one is None else one.view(images, length), pair),
        ).flatten(0, 1)
        for part, one, pair, (length, images) in zip(parts, biases, between, layout.runs, strict=True)
    ]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def _sum(query: torch.Tensor, bias: torch.Tensor | None, pairs: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to logits: a bias by key (images, tokens) and one for pairs of tokens, if there are any."""
    by_key = None if bias is None else bias[:, None, None]
    if pairs is None:
        return by_key
    return pairs.to(query) if by_key is None else pairs.to(query) + by_key


def _by_boundaries(
    attend: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    scaling: float | None,
) -> torch.Tensor:
    """Calls `attend`, a kernel for sequences of different lengths, on a batch without padding.

    Args:
        attend: takes query, key and value (tokens, heads, head size), for the first and the others where each image
            starts (images + 1,) and the tokens of the longest, and `scale`; gives (tokens, heads, head size).

    Returns:
        (sequences, tokens, heads, head size).
    """
    head_size = query.shape[-1]
    scaling = head_size**-0.5 if scaling is None else scaling
    if batch.bias is not None:
        query, key, value = fold_bias(query, key, value, batch, scaling)
    boundaries, longest = batch.layout.boundaries.to(query.device), batch.layout.longest
    packed = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    output = attend(*packed, boundaries, boundaries, longest, longest, scale=scaling)
    return output[..., :head_size].contiguous().unflatten(0, batch.layout.sizes.shape)


def fold_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: Batch, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Folds a bias by key into further dimensions of the heads, for kernels that take none.

    With 1 for the query and b / scaling for the key, their product grows by b / scaling, which scaling makes b. A
    second pair of dimensions carries what half precision loses of the first.

    Args:
        query, key, value: (sequences, heads, tokens, head size).
        batch: with a bias.
        scaling: what the kernel multiplies products by.

    Returns:
        The three with `FOLDED` more dimensions a head; those of the value are zero.
    """
    form = (key.dtype, key.device, scaling)
    if form not in batch.folded:
        assert batch.bias is not None
        wanted = batch.bias.to(key.device) / scaling
        of_query, of_key = key.new_zeros(FOLDED), key.new_zeros(*wanted.shape, FOLDED)
        of_query[:2] = 1
        of_key[..., 0] = wanted
        of_key[..., 1] = wanted - of_key[..., 0].float()
        batch.folded[form] = of_query, of_key.unsqueeze(1)
    of_query, of_key = batch.folded[form]
    shape = (*query.shape[:3], FOLDED)
    return (
        torch.cat((query, of_query.to(query.dtype).expand(shape)), dim=-1),
        torch.cat((key, of_key.expand(shape)), dim=-1),
        nn.functional.pad(value, (0, FOLDED)),
    )
