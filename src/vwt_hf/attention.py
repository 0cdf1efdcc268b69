"""Attention over ragged batches, reached through transformers' `AttentionInterface`.

The config of a compressed tower names these functions while its `Forward` has a plan of groups, which they go by.

On a GPU in half precision a kernel of our own attends, which knows where images end and how many patches each token
stands for; where gradients are taken, variable-length flash attention. Elsewhere a padded batch attends under a bias
that hides the padding, and a packed one length by length: images of one length lie side by side and are a view of the
sequence, so nothing is copied and no image is padded.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .forward import Forward, current_forward, forward_of, forward_within, run_within, traced_within
from .model_configs import BY_PLAN, is_by_plan
from .on_gpu import is_compiling, kernels_for
from .plans import Grouped

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_SCALES = "scale" in inspect.signature(varlen_attn).parameters
except ImportError:  # torch before 2.10
    VARLEN_SCALES = False

BASES = ("eager", "sdpa", "flash_attention_2")
"""The attention implementations of transformers that this package has a counterpart of."""
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")
"""Where layers of transformers, and torch's wrappers around them (`checkpoint_wrapper`), keep what checkpoints them."""
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key and value, (sequences, heads, tokens, head size) each."""
Pairs = tuple[torch.Tensor, ...] | None
"""For each run of a packed batch, or for the whole of a padded one: (images or 1, heads, tokens, tokens), added to the
attention logits of one layer."""
HALF = (torch.float16, torch.bfloat16)
HIDDEN = 3e4
"""Size of the negative bias that hides a key: its softmax weight becomes 0, and half precision can hold it."""
FOLDED = 8
"""Dimensions that a bias adds to a head: two hold it, and flash kernels take multiples of eight."""


def register() -> None:
    """Registers `vwt_eager`, `vwt_sdpa` and `vwt_flash_attention_2` with transformers."""
    for base, forward in zip(BASES, (eager, sdpa, flash_attention_2), strict=True):
        AttentionInterface.register(BY_PLAN + base, _by_plan_or_plain(forward, base))
        mask = functools.partial(_given_mask, ALL_MASK_ATTENTION_FUNCTIONS[base])
        AttentionMaskInterface.register(BY_PLAN + base, mask)


def unregister() -> None:
    """Takes back what `register` did."""
    for base in BASES:
        for interface in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            type(interface)._global_mapping.pop(BY_PLAN + base, None)


def _given_mask(base: Callable[..., Any], *args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """The mask for a caller's `attention_mask`; `None` without one, as models make their own in export."""
    if attention_mask is None:
        return None
    forward = current_forward()
    if forward is not None and forward.relative:  # it would be added to the bias, and attention could not tell
        refuse_mask(attention_mask)
    return base(*args, attention_mask=attention_mask, **kwargs)


def refuse_mask(attention_mask: torch.Tensor) -> NoReturn:
    """Raises `ValueError` for a mask of patches where tokens have taken their place."""
    raise ValueError(
        f"attention_mask {tuple(attention_mask.shape)} masks patches of the whole image, and tokens have taken their "
        "place. Leave it out, or call vwt_hf.restore(model) first."
    )


def without_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a tower, less an `attention_mask` that hides nothing.

    Raises:
        ValueError: the mask hides patches, whose place tokens have taken.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    # It has a value for each patch or, in floating point, one to add for each pair of patches.
    hides = mask < 0 if mask.is_floating_point() and mask.dim() > 2 else mask == 0
    if hides.any():
        refuse_mask(mask)
    return kwargs | {"attention_mask": None}


def _base_of(tower: Any) -> str:
    """The attention implementation of transformers that a tower was given, also while it attends by a plan."""
    return (tower.config._attn_implementation or "eager").removeprefix(BY_PLAN)


def require_registered(tower: Any, or_else: str = "") -> None:
    """Raises `RuntimeError` where `unregister` took this package's attention out of transformers.

    Args:
        or_else: what else to do about it than to register.
    """
    name = BY_PLAN + _base_of(tower)
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise RuntimeError(
            f"transformers knows no attention {name!r}, by which the {type(tower).__name__} is to attend: "
            f"vwt_hf.unregister() took it out. Call vwt_hf.register(){or_else}."
        )


def require_usable(tower: Any, padded: bool) -> None:
    """Raises `ValueError` if `tower` uses an attention implementation that cannot attend by a layout.

    Args:
        padded: whether its images come as padded patches.
    """
    base = _base_of(tower)
    if base not in BASES:
        raise ValueError(
            f"The model's attention implementation is {base!r}; grouped patches need one of {', '.join(BASES)}. Load "
            "it with attn_implementation='sdpa'."
        )
    if padded and base == "flash_attention_2":
        raise ValueError(
            f"The images of {type(tower).__name__} come as padded patches, and the attention implementation is "
            "'flash_attention_2', which takes no bias to hide padding with. Load it with attn_implementation='sdpa'."
        )


def checkpoints(tower: nn.Module) -> bool:
    """Whether layers of `tower` may run again for their gradients (gradient checkpointing)."""
    return any(getattr(module, name, None) is not None for module in tower.modules() for name in CHECKPOINTS)


def carry_through_checkpoints(tower: nn.Module) -> None:
    """Has gradient checkpointing, where it is on, repeat each layer within the `Forward` that it first ran in."""
    for module in tower.modules():
        for name in CHECKPOINTS:
            checkpoint: Any = module.__dict__.get(name)
            if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpoint:
                module.__dict__[name] = functools.partial(_checkpoint, checkpoint)


def give_back_checkpoint(module: nn.Module) -> None:
    """Undoes `carry_through_checkpoints` for one module."""
    for name in CHECKPOINTS:
        checkpoint: Any = module.__dict__.get(name)
        if getattr(checkpoint, "func", None) is _checkpoint:
            module.__dict__[name] = checkpoint.args[0]


def _checkpoint(checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`checkpoint(layer, ...)`; the backward pass, which repeats `layer`, may run in another thread."""
    return checkpoint(functools.partial(_run_again, current_forward(), layer), *args, **kwargs)


def _run_again(forward: Forward | None, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a layer within the forward that it belongs to, at first and for its gradient."""
    if forward is not None and forward.plans and not is_by_plan(forward.tower.config):
        raise RuntimeError(
            f"The setting of the {type(forward.tower).__name__} was taken out or changed between forward and backward, "
            "which repeats its layers (gradient checkpointing). Call backward first, or use a copy of the model."
        )
    return run_within(forward, layer, *args, **kwargs)


def packs(forward: Forward, knows_interface: bool, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a tower attends to packed batches as fast as to padded ones.

    On a CPU it does, length by length. On other devices a call for each length would leave the device waiting for the
    host. There only a kernel that knows where images end is as fast, and it takes no bias for pairs of tokens.

    Args:
        knows_interface: whether its attention goes through transformers' `AttentionInterface`; else it is by sdpa.
    """
    if device.type == "cpu":
        return True
    if forward.relative:
        return False
    implementation = _base_of(forward.tower) if knows_interface else "sdpa"
    return implementation == "flash_attention_2" or (implementation == "sdpa" and _has_flash(device, dtype))


def is_slow_for_new_lengths(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers are slow for each number of rows that they meet for the first time.

    In half precision on a CPU they are: torch's matrix products are oneDNN's, which writes a kernel for each number.
    """
    if device.type != "cpu":
        return False
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return dtype in HALF and torch.backends.mkldnn.is_available()


def _has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own variable-length flash attention takes tensors like these."""
    if device.type != "cuda" or not VARLEN_SCALES or dtype not in HALF:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _plan_and_pairs(
    module: nn.Module, query: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[Grouped, Pairs]:
    """The plan of the forward under way that has the tokens of `query`, (sequences, heads, tokens, head size), and the
    bias for pairs of them that a family gives as `attention_mask`."""
    forward = forward_of(module)
    plan = forward.plan_of_shape(query.shape[0], query.shape[2])
    forward.attended += 1
    if not is_compiling():
        forward.by_plan.add(id(module))
    if plan is None:
        raise RuntimeError(
            f"A layer attends to {tuple(query.shape)} (sequences, heads, tokens, head size), which are not the tokens "
            "of the forward under way. Call the model, not its layers, repeat no layer outside its forward, and put "
            "no tokens between embeddings and layers, but by method='intra' with dropped='discard'."
        )
    if attention_mask is None:
        return plan, None
    if not forward.relative:
        refuse_mask(attention_mask)
    return plan, plan.pairs(attention_mask)


def _by_plan_or_plain(by_plan: Callable[..., Any], base: str) -> Callable[..., Any]:
    """`by_plan` in modules of the tower that runs, and transformers' own `base` in others that share its config."""

    @functools.wraps(by_plan)
    def attend(module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if forward_within(module) is not None:
            return by_plan(module, (query, key, value), *args, **kwargs)
        eager_forward: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager_forward)(module, query, key, value, *args, **kwargs)

    return attend


# Not in graphs where images differ in their number of tokens: lengths then differ from batch to batch.
@traced_within
def sdpa(
    module: nn.Module,
    heads: Heads,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` by the layout of the batch."""
    query = heads[0]
    plan, pairs = _plan_and_pairs(module, query, attention_mask)
    kwargs["is_causal"] = False  # taken for causal where an attention does not say
    head_size = query.shape[-1]
    if pairs is None and not dropout:  # which no kernel takes
        if plan.key_bias is not None and query.dtype in HALF and (kernels := _kernels_that_attend(heads)):
            scale = head_size**-0.5 if scaling is None else scaling
            return kernels.attend(*heads, plan.key_bias.to(query.device), plan.layout, scale), None
        # One image takes a bias, which is fewer operations than folding it.
        is_packed = plan.layout.packed and plan.layout.rows.shape[0] > 1
        fits = head_size % 8 == 0 and head_size + FOLDED <= 256
        if is_packed and fits and _has_flash(query.device, query.dtype):
            return _by_boundaries(varlen_attn, heads, plan, scaling), None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return sdpa_attention_forward(module, query, key, value, bias, scaling=scaling, dropout=dropout, **kwargs)[0]

    return _by_layout(attend, heads, plan, pairs), None


def _kernels_that_attend(heads: Heads) -> ModuleType | None:
    """The kernels of our own, if they take these: of one shape and data type, with heads of 256 at most."""
    query = heads[0]
    alike = all((one.shape, one.dtype) == (query.shape, query.dtype) for one in heads)
    return kernels_for(*heads) if alike and query.shape[-1] <= 256 else None


@traced_within
def eager(
    module: nn.Module,
    heads: Heads,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`eager` by the layout of the batch. The second value stands for the attention weights."""
    query = heads[0]
    plan, pairs = _plan_and_pairs(module, query, attention_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = query @ key.transpose(2, 3) * scaling
        logits = logits if bias is None else logits + bias
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        weights = nn.functional.dropout(weights, p=dropout, training=module.training)
        return (weights @ value).transpose(1, 2)

    return _by_layout(attend, heads, plan, pairs), _no_weights(query)


@traced_within
def flash_attention_2(
    module: nn.Module,
    heads: Heads,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`flash_attention_2` over a packed batch."""
    from flash_attn import flash_attn_varlen_func  # transformers refuses to load a model for it where it is missing

    query, key, value = heads
    plan, _ = _plan_and_pairs(module, query, attention_mask)
    if not plan.layout.dense:
        raise ValueError(
            "The batch is padded (by layout='padded', or as the model is in training with drop_path_rate), and the "
            "attention implementation is 'flash_attention_2', which takes no bias to hide padding with; use "
            "layout='auto' and a model loaded with drop_path_rate=0, or attn_implementation='sdpa'."
        )

    # Under autocast, rotary positions and norms leave queries and keys in float32, and values in half precision.
    if (dtype := get_target_dtype(query, module)) is not None:
        heads = query.to(dtype), key.to(dtype), value.to(dtype)
    deterministic = os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"  # by transformers' Trainer

    def attend(*packed: Any, scale: float) -> torch.Tensor:
        return flash_attn_varlen_func(
            *packed, dropout_p=dropout, softmax_scale=scale, causal=False, deterministic=deterministic
        )

    return _by_boundaries(attend, heads, plan, scaling), None


def fused(module: Any, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces the forward of an attention module with one `qkv` projection that uses no interface (BLIP)."""
    if forward_of(module).grouped is None:
        return type(module).forward(module, hidden_states, **kwargs)
    heads = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = module.dropout.p if module.training else 0.0
    output, _ = sdpa(module, heads, None, scaling=module.scale, dropout=dropout)
    return module.projection(output.flatten(2)), _no_weights(heads[0])


def separate(
    module: Any,
    hidden_states: torch.Tensor,
    output_attentions: bool = False,
    relative_position_bias: torch.Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    resolution: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Replaces the forward of an attention module with `query`, `key` and `value` projections and a relative position
    bias that uses no interface (Data2Vec-vision).

    Args:
        output_attentions: whether to return what stands for attention weights, too; `hooks.End` refuses them.
        relative_position_bias: as the modules that `Family.relative` names give it, if layers share one.
        interpolate_pos_encoding: without effect, as the bias is always made for the size of the image.
        resolution: height and width of the images.
    """
    if forward_of(module).grouped is None:
        return type(module).forward(
            module, hidden_states, output_attentions, relative_position_bias, interpolate_pos_encoding, resolution
        )
    query, key, value = (
        projection(hidden_states).unflatten(-1, (module.num_attention_heads, -1)).transpose(1, 2)
        for projection in (module.query, module.key, module.value)
    )
    bias = relative_position_bias
    if module.has_relative_position_bias:
        assert resolution is not None
        layer_bias = module.relative_position_bias(tuple(size // module.config.patch_size for size in resolution))
        bias = layer_bias if bias is None else layer_bias + bias
    dropout = module.dropout.p if module.training else 0.0
    attend = eager if module.config._attn_implementation == BY_PLAN + "eager" else sdpa
    output, _ = attend(module, (query, key, value), bias, dropout=dropout)
    return (output.flatten(2), _no_weights(query)) if output_attentions else (output.flatten(2),)


def _no_weights(query: torch.Tensor) -> torch.Tensor:
    """Zeros in place of attention weights, which no one tensor holds; `hooks.End` refuses to return them."""
    return query.new_zeros(()).expand(*query.shape[:3], query.shape[2])


def _by_layout(attend: Callable[..., torch.Tensor], heads: Heads, plan: Grouped, pairs: Pairs) -> torch.Tensor:
    """Attends to a padded batch at once, and to a packed one for each length of images: (sequences, tokens, heads,
    head size).

    Args:
        attend: takes query, key and value (images, heads, tokens, head size) and a bias (images, 1, 1, tokens),
            (images or 1, heads, tokens, tokens) or `None`, and gives (images, tokens, heads, head size).
    """
    (query, _, value), layout = heads, plan.layout
    bias = None if plan.key_bias is None else plan.key_bias.to(query)
    if not layout.runs:  # no images, of which an interface may not give the right shape
        return value.transpose(1, 2)
    padding = layout.sizes.numel() - layout.tokens
    if not layout.packed or (layout.rows.shape[0] == 1 and not padding):
        return attend(*heads, _sum(query, bias, None if pairs is None else pairs[0]))
    rows = [images * length for length, images in layout.runs]
    packed = (tensor[0, :, : layout.tokens] for tensor in heads)
    parts = zip(*(tensor.split(rows, dim=1) for tensor in packed), strict=True)
    biases: list[torch.Tensor | None] = [None] * len(rows)
    if bias is not None:  # kernels read a mask in steps of 16 bytes, where a slice may not begin
        biases = [one.clone() if one.is_cuda else one for one in layout.by_run(bias)]
    between = [None] * len(rows) if pairs is None else pairs
    outputs = [
        attend(
            *(tensor.unflatten(1, (images, length)).transpose(0, 1) for tensor in part), _sum(query, one, pair)
        ).flatten(0, 1)
        for part, one, pair, (length, images) in zip(parts, biases, between, layout.runs, strict=True)
    ]
    if padding:
        outputs.append(outputs[0].new_zeros(padding, *outputs[0].shape[1:]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def _sum(query: torch.Tensor, bias: torch.Tensor | None, pairs: torch.Tensor | None) -> torch.Tensor | None:
    """What is added to the logits of `query`: a bias by key, (images, tokens), and one for pairs of tokens."""
    by_key = None if bias is None else bias[:, None, None]
    if pairs is None:
        return by_key
    return pairs.to(query) if by_key is None else pairs.to(query) + by_key


def _by_boundaries(attend: Callable[..., Any], heads: Heads, plan: Grouped, scaling: float | None) -> torch.Tensor:
    """Attends to a batch without padding by a kernel for sequences of different lengths: (sequences, tokens, heads,
    head size).

    Args:
        attend: takes query, key and value, (tokens, heads, head size); where images start, (images + 1,), for queries
            and for keys; the tokens of the longest image, for both; and `scale`. Gives (tokens, heads, head size).
    """
    head_size = heads[0].shape[-1]
    scaling = head_size**-0.5 if scaling is None else scaling
    if plan.key_bias is not None:
        heads = fold_bias(heads, plan.key_bias, plan.folded, scaling)
    boundaries, longest = plan.layout.boundaries.to(heads[0].device), plan.layout.longest
    packed = (tensor.transpose(1, 2).flatten(0, 1) for tensor in heads)
    output = attend(*packed, boundaries, boundaries, longest, longest, scale=scaling)
    return output[..., :head_size].contiguous().unflatten(0, plan.shape)


def fold_bias(
    heads: Heads, key_bias: torch.Tensor, folded: dict[Any, tuple[torch.Tensor, torch.Tensor]], scaling: float
) -> Heads:
    """Folds a bias by key into further dimensions of the heads, for kernels that take none.

    One dimension is 1 in the query and b / scaling in the key, which adds b to their scaled product. A second one
    carries what half precision loses of the first.

    Args:
        key_bias: (sequences, tokens), added to the attention logits by key.
        folded: a cache of the added dimensions, by data type, device and scaling (`Grouped.folded`).
        scaling: what the kernel multiplies products by.

    Returns:
        The three with `FOLDED` more dimensions a head; those of the value are zero.
    """
    query, key, value = heads
    form = (key.dtype, key.device, scaling)
    if form not in folded:
        # That of padding is infinite, which would make the second dimension NaN.
        wanted = (key_bias.to(key.device) / scaling).clamp(min=-HIDDEN)
        of_query, of_key = key.new_zeros(FOLDED), key.new_zeros(*wanted.shape, FOLDED)
        of_query[:2] = 1
        of_key[..., 0] = wanted
        of_key[..., 1] = wanted - of_key[..., 0].float()
        folded[form] = of_query, of_key.unsqueeze(1)
    of_query, of_key = folded[form]
    shape = (*query.shape[:3], FOLDED)
    return (
        torch.cat((query, of_query.to(query.dtype).expand(shape)), dim=-1),
        torch.cat((key, of_key.expand(shape)), dim=-1),
        nn.functional.pad(value, (0, FOLDED)),
    )
