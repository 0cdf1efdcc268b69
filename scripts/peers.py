"""Other ways to make a vision transformer cheaper, to stand beside vwt_hf in scripts/benchmark.py.

Token Merging (Bolya et al., arXiv 2210.09461) is written from its description alone; 8-bit linear layers are torch's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vwt_hf.compress import lexicon_of
from vwt_hf.evaluation import TokenCount
from vwt_hf.families import family_of, find_tower

ATTENTION = "token_merging"


class Unsupported(ValueError):
    """A peer cannot be had for this model or device; the message says why."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Names of what a layer is made of: x + attention(norm(x)), then x + mlp(norm(x))."""

    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str
    scales: tuple[str, str] | None = None
    """LayerScale of the attention's output and of the MLP's."""


VIT = Parts("layernorm_before", "attention", "layernorm_after", "mlp")
DINOV2 = Parts("norm1", "attention", "norm2", "mlp", ("layer_scale1", "layer_scale2"))
PARTS = {
    "ViTLayer": VIT,
    "DeiTLayer": VIT,
    "Dinov2Layer": DINOV2,
    "Dinov2WithRegistersLayer": DINOV2,
    "CLIPEncoderLayer": Parts("layer_norm1", "self_attn", "layer_norm2", "mlp"),
}


@dataclasses.dataclass(frozen=True)
class Merge:
    """Which tokens of a batch one merge takes together: indices, each (batch, ...)."""

    kept: torch.Tensor
    """(batch, tokens - r): the tokens that stay, in their order."""
    merged: torch.Tensor
    """(batch, r): the tokens that become part of another."""
    into: torch.Tensor
    """(batch, r): the place among `kept` of the token that each merged one becomes part of."""
    place: torch.Tensor
    """(batch, tokens): the place among `kept` where each token ends."""


def match(keys: torch.Tensor, prefix: int, r: int) -> Merge:
    """Pairs the `r` patches that are most like another: bipartite soft matching.

    The patches are split alternately into two sets. Each of the first set is matched to the one of the second whose key
    has the largest cosine with its own, and the `r` best matches are merged. Prefix tokens take no part.

    Args:
        keys: (batch, tokens, head size), averaged over heads.
        prefix: how many tokens come before the patches.
        r: at most half of the patches.
    """
    batch, tokens, _ = keys.shape
    directions = nn.functional.normalize(keys[:, prefix:], dim=-1)
    similarity = directions[:, 0::2] @ directions[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(dim=-1)
    chosen = best.topk(r, dim=-1).indices
    merged, partner = prefix + 2 * chosen, prefix + 2 * partner.gather(1, chosen) + 1

    stays = torch.ones(batch, tokens, dtype=torch.bool, device=keys.device).scatter_(1, merged, False)
    place = stays.cumsum(dim=1) - 1
    # Tokens that go are written behind the end: `nonzero` would make a GPU wait.
    index = torch.arange(tokens, device=keys.device).expand(batch, -1)
    kept = index.new_empty(batch, tokens - r + 1).scatter_(1, torch.where(stays, place, tokens - r), index)[:, :-1]
    into = place.gather(1, partner)
    return Merge(kept, merged, into, place.scatter(1, merged, into))


def merge(hidden_states: torch.Tensor, sizes: torch.Tensor, pairs: Merge) -> tuple[torch.Tensor, torch.Tensor]:
    """The averages of merged tokens, weighted by their sizes, and their sizes.

    Args:
        hidden_states: (batch, tokens, hidden).
        sizes: (batch, tokens), float32: how many patches each token stands for; 1 for a prefix token.

    Returns:
        (batch, tokens - r, hidden) and (batch, tokens - r).
    """
    kept_sizes, merged_sizes = sizes.gather(1, pairs.kept), sizes.gather(1, pairs.merged)
    total = kept_sizes.scatter_add(1, pairs.into, merged_sizes)
    # Shares, not sums of size · token divided again: a token that nothing is merged into keeps its exact value.
    result = take(hidden_states, pairs.kept) * _share(kept_sizes, total, hidden_states)
    parts = take(hidden_states, pairs.merged) * _share(merged_sizes, total.gather(1, pairs.into), hidden_states)
    result.view(-1, result.shape[-1]).index_add_(0, _rows(pairs.into, result.shape[1]), parts.flatten(0, 1))
    return result, total


def take(hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens at `index` (batch, n), as (batch, n, hidden)."""
    # Whole rows are copied at once; `gather` with an expanded index is several times as slow on a CPU.
    rows = hidden_states.flatten(0, 1).index_select(0, _rows(index, hidden_states.shape[1]))
    return rows.view(*index.shape, -1)


def _rows(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """`index` (batch, n) into sequences of `tokens`, as one index into all of them laid end to end."""
    return (index + torch.arange(len(index), device=index.device).unsqueeze(1) * tokens).flatten()


def _share(part: torch.Tensor, total: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (part / total).unsqueeze(-1).to(like.dtype)


class Merging:
    """The tokens of a forward under way, as its layers merge them."""

    def __init__(self, prefix: int, r: int) -> None:
        self.prefix, self.r = prefix, r
        self.start()

    def start(self) -> None:
        self.keys: torch.Tensor | None = None
        """(batch, tokens, head size), of the layer under way."""
        self.sizes: torch.Tensor | None = None
        """(batch, tokens), float32; `None` as long as every token is one patch."""
        self.place: torch.Tensor | None = None
        """(batch, prefix + patches): the token that each patch is part of."""

    def step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Merges the tokens of a layer, (batch, tokens, hidden), by the keys that its attention left here."""
        r = min(self.r, (hidden_states.shape[1] - self.prefix) // 2)
        if r == 0:
            return hidden_states
        pairs = match(self.keys, self.prefix, r)
        sizes = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.float32)
        hidden_states, self.sizes = merge(hidden_states, sizes if self.sizes is None else self.sizes, pairs)
        self.place = pairs.place if self.place is None else pairs.place.gather(1, self.place)
        return hidden_states

    def finish(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Gives each patch its token's hidden state, so that heads that average patches weigh tokens by their sizes."""
        place = self.place
        self.start()  # nothing of a forward stays in memory after it
        return hidden_states if place is None else take(hidden_states, place)


def tome(model: PreTrainedModel, r: int) -> PreTrainedModel:
    """Token Merging (arXiv 2210.09461): every layer merges `r` pairs of patches between its attention and its MLP.

    Attention is proportional: a token that stands for s patches gets + log s on its logits. For inference: dropout and
    stochastic depth are left out, and so is an attention mask, which images do not have.

    Args:
        model: of a family of vwt_hf, changed in place; its output is as long as without merging.
        r: pairs a layer; no layer merges more than half of its patches. 0 is the plain model.

    Raises:
        Unsupported: the layers are of a class that is not known here.
        ValueError: `r` is negative.
    """
    if r < 0:
        raise ValueError(f"r is {r}; expected how many pairs of patches each layer merges, 0 or more.")
    family = family_of(model)
    registers = getattr(find_tower(model, family).module.config, "num_register_tokens", 0)
    counts = {"none": 0, "registers": registers}
    prefix = sum(counts.get(token, 1) for token in family.prefix.split(", "))
    layers = layers_of(model)
    merging = Merging(prefix, r)
    for layer in layers:
        parts = PARTS[type(layer).__name__]
        for module in getattr(layer, parts.attention).modules():
            module.token_merging = merging
            if hasattr(module, "config"):
                module.config._attn_implementation = ATTENTION
        layer.forward = functools.partial(merging_layer, layer, parts, merging, layer is layers[0], layer is layers[-1])
    return model


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model's vision tower, in order.

    Raises:
        Unsupported: none of its modules is a layer of a class in `PARTS`.
    """
    tower = find_tower(model, family_of(model)).module
    layers = [module for module in tower.modules() if type(module).__name__ in PARTS]
    if not layers:
        raise Unsupported(
            f"{type(model).__name__} has no layer whose tokens can be merged; known are {', '.join(PARTS)}. "
            "Leave tome out."
        )
    return layers


def merging_layer(
    layer: nn.Module,
    parts: Parts,
    merging: Merging,
    first: bool,
    last: bool,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Stands in for a layer's forward; `hidden_states` are (batch, tokens, hidden), and the result has fewer tokens."""
    if first:
        merging.start()
    attended = getattr(layer, parts.attention)(getattr(layer, parts.attention_norm)(hidden_states))
    attended = attended[0] if isinstance(attended, tuple) else attended
    hidden_states = hidden_states + _scaled(layer, parts, 0, attended)
    hidden_states = merging.step(hidden_states)
    output = getattr(layer, parts.mlp)(getattr(layer, parts.mlp_norm)(hidden_states))
    hidden_states = hidden_states + _scaled(layer, parts, 1, output)
    return merging.finish(hidden_states) if last else hidden_states


def _scaled(layer: nn.Module, parts: Parts, place: int, output: torch.Tensor) -> torch.Tensor:
    return output if parts.scales is None else getattr(layer, parts.scales[place])(output)


def proportional_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`sdpa` under the log of the tokens' sizes; tensors are (batch, heads, tokens, head size). Leaves the keys."""
    merging = module.token_merging
    merging.keys = key.mean(dim=1)
    bias = None if merging.sizes is None else merging.sizes.log().to(query.dtype)[:, None, None, :]
    return sdpa_attention_forward(module, query, key, value, bias, **kwargs)


AttentionInterface.register(ATTENTION, proportional_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextlib.contextmanager
def count_layer_tokens(model: PreTrainedModel) -> Iterator[TokenCount]:
    """As `vwt_hf.count_tokens`, of a model that merges tokens by `tome`."""
    layers = layers_of(model)
    count = TokenCount([0] * len(layers))

    def add(number: int, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        count.images += args[0].shape[0] if number == 0 else 0
        count.by_layer[number] += args[0].shape[0] * args[0].shape[1]

    hooks = [layer.register_forward_pre_hook(functools.partial(add, number)) for number, layer in enumerate(layers)]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def dynamic_int8(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` whose linear layers multiply in 8 bits; activations are quantised as they come.

    Raises:
        Unsupported: the model is not in float32 on a CPU, which is all that torch has kernels for, or torch has none.
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise Unsupported(
            f"dynamic int8 runs float32 models on a CPU; this one is {model.dtype} on {model.device}. Leave int8 out, "
            "or choose --device cpu --dtype float32."
        )
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise Unsupported(f"torch {torch.__version__} has no torch.ao.quantization; leave int8 out.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torchao is to take this over
        return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` in bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers, quantised weights and visual words."""
    total = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    words = lexicon_of(model)
    if words is not None:
        total += sum(tensor.nbytes for tensor in words.on(next(model.parameters()).device))
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.Linear):
            weight, bias = module.weight(), module.bias()
            total += weight.numel() * weight.element_size() + (0 if bias is None else bias.nbytes)
    return total
