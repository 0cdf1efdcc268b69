"""Other ways to make a vision transformer cheaper, to stand beside vwt_hf in scripts/benchmark.py.

Token Merging (Bolya et al., arXiv 2210.09461), PiToMe (Tran et al., arXiv 2405.16148), PPT (Wu et al., arXiv
2310.01812) and TPS (Wei et al., arXiv 2304.10716) are written from their descriptions or from memory of them, never
from their code, and run without training; 8-bit linear layers are torch's. All four shorten the sequence between the
attention and the MLP of a layer, and differ in which tokens they pair or drop.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vwt_hf.compress import lexicon_of
from vwt_hf.families import family_of, find_tower
from vwt_hf.token_count import TokenCount

ATTENTION = "token_merging"
TPS_DEPTHS = (4 / 12, 7 / 12, 10 / 12)
"""After the attention of which layers TPS prunes, as shares of all layers."""


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
    """Which tokens of a batch one merge takes together.

    Rows count the tokens of all images, one image after another.
    """

    kept: torch.Tensor
    """(batch, tokens left): the tokens that stay, in their order, and any token in place of padding."""
    merged: torch.Tensor
    """(merges,): the rows of the tokens that become part of another, before the merge."""
    into: torch.Tensor
    """(merges,): the row, after the merge, of the token that each merged one becomes part of."""
    place: torch.Tensor
    """(batch, tokens): the place among `kept` of the token that each becomes part of."""
    padding: torch.Tensor | None = None
    """(batch, tokens left), bool: which of `kept` are padding, if images differ in how many are left."""
    weights: torch.Tensor | None = None
    """(batch, tokens), float32: how much each counts in the average; `None` for its size, which then adds up."""
    dropped: torch.Tensor | None = None
    """(merges,), bool: which of `merged` count for nothing in the token that they end in; `None` for none."""


def match(keys: torch.Tensor, prefix: int, r: int) -> Merge:
    """Pairs the `r` patches that are most like another: bipartite soft matching.

    The patches are split alternately into two sets. Each of the first set is matched to the one of the second whose key
    has the largest cosine with its own, and the `r` best matches are merged. Prefix tokens take no part.

    Args:
        keys: (batch, tokens, head size), averaged over heads.
        prefix: how many tokens come before the patches.
        r: at most half of the patches.
    """
    return merge_of(keys.shape[1], *best_matches(keys, prefix, r))


def best_matches(keys: torch.Tensor, prefix: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that `match` merges, and what each becomes part of: (batch, r) each."""
    cosine, partner = nearest(keys[:, prefix::2], keys[:, prefix + 1 :: 2])
    chosen = cosine.topk(r, dim=-1).indices
    return prefix + 2 * chosen, prefix + 2 * partner.gather(1, chosen) + 1


def match_alike(keys: torch.Tensor, prefix: int, least: float, sizes: torch.Tensor) -> Merge | None:
    """As `match`, of all patches whose best match has a cosine of at least `least`; `None` if no image has such.

    `sizes`, (batch, tokens), are 0 for padding, which is matched to nothing.
    """
    batch, tokens = sizes.shape
    real = sizes > 0
    cosine, partner = cosines_of(keys, prefix, real)
    image, chosen = (cosine >= least).nonzero(as_tuple=True)
    if not len(chosen):
        return None
    merged = prefix + 2 * chosen
    stays = real.index_put((image, merged), real.new_zeros(()))
    place = stays.cumsum(dim=1) - 1
    left = stays.sum(dim=1, keepdim=True)
    longest = int(left.max())
    index = torch.arange(tokens, device=keys.device).expand(batch, -1)
    kept = index.new_zeros(batch, longest + 1).scatter_(1, torch.where(stays, place, longest), index)[:, :-1]
    into = place[image, prefix + 2 * partner[image, chosen] + 1]
    place[image, merged] = into
    return Merge(kept, image * tokens + merged, image * longest + into, place, index[:, :longest] >= left)


def cosines_of(keys: torch.Tensor, prefix: int, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine of each patch of the first set of `match` with its best match, and which of the second set that is.

    Args:
        real: (batch, tokens), bool: what is no padding.

    Returns:
        (batch, half of the patches) each; a cosine of −inf for padding, and where there is nothing to match.
    """
    cosine, partner = nearest(keys[:, prefix::2], keys[:, prefix + 1 :: 2], real[:, prefix + 1 :: 2])
    return cosine.masked_fill(~real[:, prefix::2], -torch.inf), partner


def match_by_energy(keys: torch.Tensor, prefix: int, r: int, margin: float) -> Merge:
    """Pairs `r` patches among the `2 r` that have most others like them: PiToMe's order.

    The energy of a patch is the mean of f(cosine with another patch's key), f(x) = x from `margin` on, else
    exp(x − margin) − 1. The `2 r` of the highest energy are split alternately, in the order of energy, into two sets,
    and each of the first is merged with the one of the second that is most like it. Args as of `match`.
    """
    directions = nn.functional.normalize(keys[:, prefix:], dim=-1)
    cosine = directions @ directions.transpose(1, 2)
    # A patch's cosine with itself adds the same to each energy.
    energy = torch.where(cosine >= margin, cosine, (cosine - margin).exp() - 1).sum(dim=-1)
    order = energy.topk(2 * r, dim=-1).indices
    first, second = order[:, 0::2], order[:, 1::2]
    partner = take(cosine, first).gather(2, second.unsqueeze(1).expand(-1, r, -1)).argmax(dim=-1)
    return merge_of(keys.shape[1], prefix + first, prefix + second.gather(1, partner))


def match_pruned(hidden_states: torch.Tensor, scores: torch.Tensor, prefix: int, keep: int) -> Merge:
    """Keeps the `keep` patches of the highest score and squeezes each other one into the kept one most like it: TPS.

    Tokens are as alike as the cosine of their states. In the average a pruned token counts by exp(cosine), and the one
    that it is squeezed into, whose cosine with itself is 1, by e.

    Args:
        hidden_states: (batch, tokens, hidden).
        scores: (batch, patches).
    """
    order = scores.argsort(dim=-1, descending=True)
    kept, pruned = prefix + order[:, :keep], prefix + order[:, keep:]
    cosine, partner = nearest(take(hidden_states, pruned), take(hidden_states, kept))
    pairs = merge_of(hidden_states.shape[1], pruned, kept.gather(1, partner))
    weights = hidden_states.new_full(hidden_states.shape[:2], math.e, dtype=torch.float32)
    return dataclasses.replace(pairs, weights=weights.scatter(1, pruned, cosine.float().exp()))


def match_or_drop(keys: torch.Tensor, scores: torch.Tensor, drops: torch.Tensor, prefix: int, r: int) -> Merge:
    """Takes `r` patches from each image: those of the lowest score, or as `match` does (PPT).

    A dropped patch ends in the one left that is most like it, in which it counts for nothing.

    Args:
        scores: (batch, patches).
        drops: (batch,), bool: of which images patches are dropped.
    """
    lowest = scores.topk(r, dim=-1, largest=False).indices
    stays = torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)
    _, hosts = nearest(take(keys, prefix + lowest), keys[:, prefix:], stays)
    merged, partner = best_matches(keys, prefix, r)
    merged = torch.where(drops.unsqueeze(1), prefix + lowest, merged)
    pairs = merge_of(keys.shape[1], merged, torch.where(drops.unsqueeze(1), prefix + hosts, partner))
    return dataclasses.replace(pairs, dropped=drops.repeat_interleave(r))


def nearest(
    tokens: torch.Tensor, others: torch.Tensor, allowed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest cosine of each token with one of the others, and which it is, (batch, tokens) each.

    Args:
        tokens: (batch, tokens, size).
        others: (batch, others, size).
        allowed: (batch, others), bool: which of the others count; `None` for all.
    """
    cosine = nn.functional.normalize(tokens, dim=-1) @ nn.functional.normalize(others, dim=-1).transpose(1, 2)
    if allowed is not None:
        cosine = cosine.masked_fill(~allowed.unsqueeze(1), -torch.inf)
    best = cosine.max(dim=-1)
    return best.values, best.indices


def merge_of(tokens: int, merged: torch.Tensor, partner: torch.Tensor) -> Merge:
    """The merge by which `merged` become part of `partner`, in every image as many; (batch, merges) each."""
    batch, r = merged.shape
    stays = torch.ones(batch, tokens, dtype=torch.bool, device=merged.device).scatter_(1, merged, False)
    place = stays.cumsum(dim=1) - 1
    # Tokens that go are written behind the end: `nonzero` would make a GPU wait.
    index = torch.arange(tokens, device=merged.device).expand(batch, -1)
    kept = index.new_empty(batch, tokens - r + 1).scatter_(1, torch.where(stays, place, tokens - r), index)[:, :-1]
    into = place.gather(1, partner)
    return Merge(kept, _rows(merged, tokens), _rows(into, tokens - r), place.scatter(1, merged, into))


def merge(hidden_states: torch.Tensor, sizes: torch.Tensor, pairs: Merge) -> tuple[torch.Tensor, torch.Tensor]:
    """The averages of merged tokens, weighted by their sizes, and their sizes.

    Args:
        hidden_states: (batch, tokens, hidden).
        sizes: (batch, tokens), float32: how many patches each token stands for; 1 for a prefix token, 0 for padding.

    Returns:
        (batch, tokens left, hidden) and (batch, tokens left).
    """
    kept_sizes, merged_sizes = sizes.gather(1, pairs.kept), sizes.flatten()[pairs.merged]
    if pairs.padding is not None:
        kept_sizes = kept_sizes.masked_fill(pairs.padding, 0.0)
    if pairs.dropped is not None:
        merged_sizes = merged_sizes.masked_fill(pairs.dropped, 0.0)
    total = kept_sizes.flatten().index_add(0, pairs.into, merged_sizes)
    # Shares, not sums of size · token divided again: a token that nothing is merged into keeps its exact value.
    shares = kept_sizes / total.view_as(kept_sizes).clamp(min=1.0)
    result = take(hidden_states, pairs.kept) * shares.unsqueeze(-1).to(hidden_states.dtype)
    parts = (merged_sizes / total[pairs.into]).unsqueeze(-1).to(hidden_states.dtype)
    parts = hidden_states.flatten(0, 1).index_select(0, pairs.merged) * parts
    result.view(-1, result.shape[-1]).index_add_(0, pairs.into, parts)
    return result, total.view_as(kept_sizes)


def take(hidden_states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The tokens at `index` (batch, n), as (batch, n, hidden)."""
    # Whole rows are copied at once; `gather` with an expanded index is several times as slow on a CPU.
    rows = hidden_states.flatten(0, 1).index_select(0, _rows(index, hidden_states.shape[1]))
    return rows.view(*index.shape, -1)


def _rows(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """`index` (batch, n) into sequences of `tokens`, as one index into all of them laid end to end."""
    return (index + torch.arange(len(index), device=index.device).unsqueeze(1) * tokens).flatten()


class Merging:
    """The tokens of a forward under way, as its layers merge them."""

    def __init__(self, prefix: int, pair: Pairing) -> None:
        self.prefix, self.pair = prefix, pair
        self.start()

    def start(self) -> None:
        self.layer = 0
        """The number of the layer under way, 0 for the first."""
        self.query: torch.Tensor | None = None
        """(batch, heads, tokens, head size), of the attention under way; the first is that of CLS."""
        self.key: torch.Tensor | None = None
        """As `query`."""
        self.value: torch.Tensor | None = None
        """As `query`."""
        self.scaling = 1.0
        """What the attention under way multiplies products of queries and keys by."""
        self.sizes: torch.Tensor | None = None
        """(batch, tokens), float32; `None` as long as every token is one patch or counts as one."""
        self.place: torch.Tensor | None = None
        """(batch, prefix + patches): the token that each patch is part of."""

    @property
    def keys(self) -> torch.Tensor:
        """(batch, tokens, head size): means over the heads."""
        assert self.key is not None  # attention came before
        return self.key.mean(dim=1)

    def bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """(batch, 1, 1, tokens): the log of the tokens' sizes, which is added to logits; `None` for nothing."""
        return None if self.sizes is None else self.sizes.log().to(dtype)[:, None, None]

    def sizes_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The size of each token of (batch, tokens, hidden)."""
        if self.sizes is not None:
            return self.sizes
        return hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.float32)

    def step(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Merges the tokens of a layer, (batch, tokens, hidden), by what its attention left here."""
        pairs = self.pair(self, hidden_states)
        self.query = self.key = self.value = None  # they would take memory while the MLP runs
        self.layer += 1
        if pairs is None:
            return hidden_states
        if pairs.weights is None:
            hidden_states, self.sizes = merge(hidden_states, self.sizes_of(hidden_states), pairs)
        else:
            hidden_states, _ = merge(hidden_states, pairs.weights, pairs)
        self.place = pairs.place if self.place is None else pairs.place.gather(1, self.place)
        return hidden_states

    def finish(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Gives each patch its token's hidden state, so that heads that average patches weigh tokens by their sizes."""
        place = self.place
        self.start()  # nothing of a forward stays in memory after it
        return hidden_states if place is None else take(hidden_states, place)


Pairing = Callable[[Merging, torch.Tensor], "Merge | None"]
"""What a layer merges of its tokens (batch, tokens, hidden), as the forward under way has them; `None` for nothing."""


def tome(model: PreTrainedModel, r: int | Sequence[int]) -> PreTrainedModel:
    """Token Merging (arXiv 2210.09461): every layer merges `r` pairs of patches between its attention and its MLP.

    Attention is proportional: a token that stands for s patches gets + log s on its logits. For inference: dropout and
    stochastic depth are left out, and so is an attention mask, which images do not have.

    Args:
        model: of a family of vwt_hf, changed in place; its output is as long as without merging.
        r: pairs a layer, or of each layer; no layer merges more than half of its patches. 0 is the plain model.

    Raises:
        Unsupported: the layers are of a class that is not known here.
        ValueError: `r` is negative, or of another number of layers.
    """
    return merge_in_layers(model, functools.partial(_best_pairs, _by_layer(model, r)))


def _best_pairs(by_layer: Sequence[int], merging: Merging, hidden_states: torch.Tensor) -> Merge | None:
    """What Token Merging merges in the layer under way."""
    r = _pairs(by_layer, merging, hidden_states)
    return match(merging.keys, merging.prefix, r) if r else None


def tome_decreasing(model: PreTrainedModel, r: int) -> PreTrainedModel:
    """Token Merging with a decreasing schedule: pairs fall linearly, from 2 r in the first layer to 0 in the last.

    Args and errors as of `tome`.
    """
    layers = len(layers_of(model))
    return tome(model, [round(2 * r * (1 - layer / max(layers - 1, 1))) for layer in range(layers)])


@torch.inference_mode()
def tome_alike(model: PreTrainedModel, r: int, pixel_values: torch.Tensor) -> PreTrainedModel:
    """Token Merging with as many pairs as each image has: every layer merges those whose cosine is at least its own.

    The cosine of a layer is the one at which `pixel_values` merge `r` pairs an image, on average. This is no setting of
    the paper, which merges as many of every image. Images of a batch that have fewer tokens left are padded, so a batch
    takes the time of its longest image, while padding counts as no token. As `tome` in all else.

    Args:
        pixel_values: (images, channels, height, width), as `model` wants them.
    """
    by_layer = _by_layer(model, r)
    found: list[float] = []

    def learn(merging: Merging, hidden_states: torch.Tensor) -> Merge | None:
        cosine, _ = cosines_of(merging.keys, merging.prefix, merging.sizes_of(hidden_states) > 0)
        wanted = min(by_layer[merging.layer] * len(cosine), int(cosine.isfinite().sum()))
        found.append(cosine.flatten().topk(wanted).values[-1].item() if wanted else math.inf)
        return pair(merging, hidden_states)

    def pair(merging: Merging, hidden_states: torch.Tensor) -> Merge | None:
        return match_alike(merging.keys, merging.prefix, found[merging.layer], merging.sizes_of(hidden_states))

    merge_in_layers(model, learn)(pixel_values=pixel_values)
    return merge_in_layers(model, pair)


def pitome(model: PreTrainedModel, r: int) -> PreTrainedModel:
    """PiToMe (arXiv 2405.16148): as Token Merging, but only patches that have many others like them are merged.

    The margin of `match_by_energy` falls linearly with the layers, from 0.9 in the first towards 0. This and the energy
    were written down from memory of the paper and not compared with it. The paper merges a share of the tokens in each
    layer; here it is `r` pairs, to compare with `tome`.

    Args and errors as of `tome`.
    """
    by_layer = _by_layer(model, r)

    def pair(merging: Merging, hidden_states: torch.Tensor) -> Merge | None:
        r = _pairs(by_layer, merging, hidden_states)
        margin = 0.9 * (1 - merging.layer / len(by_layer))
        return match_by_energy(merging.keys, merging.prefix, r, margin) if r else None

    return merge_in_layers(model, pair)


@torch.inference_mode()
def ppt(model: PreTrainedModel, r: int, pixel_values: torch.Tensor) -> PreTrainedModel:
    """PPT (arXiv 2310.01812): every layer takes `r` patches from each image, by dropping or by merging them.

    The score of a patch is the attention of CLS to it times the length of its value, the mean over heads, as a share of
    those of all patches. In an image whose scores vary by more than a threshold those of the lowest score are dropped,
    in another one pairs are merged as in Token Merging. The paper sets the threshold for each model; here it is the
    median over images and layers while all of `pixel_values` are merged. The score and the choice were written down
    from memory of the paper and not compared with it. A dropped patch has the state of the one left most like it.

    Args:
        model: as for `tome`, with a CLS token.
        r: patches a layer; no layer takes more than half of its patches.
        pixel_values: (images, channels, height, width), as `model` wants them.

    Raises:
        Unsupported: the layers are of a class that is not known here, or there is no CLS token.
        ValueError: `r` is negative.
    """
    _require_cls(model, "ppt")
    by_layer = _by_layer(model, r)
    found: list[torch.Tensor] = []

    def scores_of(merging: Merging) -> torch.Tensor:
        assert merging.value is not None  # attention came before
        lengths = torch.linalg.vector_norm(merging.value.float(), dim=-1)
        scores = (cls_attentions(merging).float() * lengths).mean(dim=1)[:, merging.prefix :]
        return scores / scores.sum(dim=-1, keepdim=True)

    def learn(merging: Merging, hidden_states: torch.Tensor) -> Merge | None:
        found.append(scores_of(merging).var(dim=-1))
        return _best_pairs(by_layer, merging, hidden_states)

    merge_in_layers(model, learn)(pixel_values=pixel_values)
    threshold = torch.cat(found).median()

    def pair(merging: Merging, hidden_states: torch.Tensor) -> Merge | None:
        r = _pairs(by_layer, merging, hidden_states)
        if not r:
            return None
        scores = scores_of(merging)
        return match_or_drop(merging.keys, scores, scores.var(dim=-1) > threshold, merging.prefix, r)

    return merge_in_layers(model, pair)


def tps(model: PreTrainedModel, keep: float) -> PreTrainedModel:
    """TPS (arXiv 2304.10716) without its training: a third, seven and ten twelfths into the layers, patches that CLS
    attends to least are pruned and squeezed into the kept ones that are most like them.

    The score is the attention of CLS, the mean over heads (the paper's eTPS). Attention is not proportional. The
    weights of `match_pruned` and the depths were written down from memory of the paper and not compared with it. It
    trains the model, which this does not; a pruned patch has the hidden state of the one it is squeezed into.

    Args:
        model: as for `tome`, with a CLS token.
        keep: the share of the patches left that each pruning keeps, in (0, 1].

    Raises:
        Unsupported: the layers are of a class that is not known here, or there is no CLS token.
        ValueError: `keep` is out of its range.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; expected the share of patches that stay, in (0, 1].")
    _require_cls(model, "tps")
    at = {round(depth * len(layers_of(model))) - 1 for depth in TPS_DEPTHS}

    def pair(merging: Merging, hidden_states: torch.Tensor) -> Merge | None:
        patches = hidden_states.shape[1] - merging.prefix
        kept = max(1, math.ceil(keep * patches))
        if merging.layer not in at or kept == patches:
            return None
        scores = cls_attentions(merging).mean(dim=1)[:, merging.prefix :]
        return match_pruned(hidden_states, scores, merging.prefix, kept)

    return merge_in_layers(model, pair)


def _require_cls(model: PreTrainedModel, peer: str) -> None:
    if not family_of(model).prefix.startswith("CLS"):
        raise Unsupported(f"{type(model).__name__} has no CLS token, whose attention scores patches. Leave {peer} out.")


def cls_attentions(merging: Merging) -> torch.Tensor:
    """How much the first token attends to each in the attention under way, (batch, heads, tokens)."""
    assert merging.query is not None and merging.key is not None  # attention came before
    logits = merging.query[:, :, :1] @ merging.key.transpose(2, 3) * merging.scaling
    bias = merging.bias(logits.dtype)
    return (logits if bias is None else logits + bias).softmax(dim=-1)[:, :, 0]


def _by_layer(model: PreTrainedModel, r: int | Sequence[int]) -> list[int]:
    """Pairs of each layer."""
    layers = len(layers_of(model))
    by_layer = [r] * layers if isinstance(r, int) else list(r)
    if min(by_layer) < 0:
        raise ValueError(f"r is {r}; expected how many pairs of patches each layer merges, 0 or more.")
    if len(by_layer) != layers:
        raise ValueError(f"r has numbers for {len(by_layer)} layers; expected {layers}, which the model has.")
    return by_layer


def _pairs(by_layer: Sequence[int], merging: Merging, hidden_states: torch.Tensor) -> int:
    """Pairs of the layer under way: those of `by_layer`, or half of the patches if these are fewer."""
    return min(by_layer[merging.layer], (hidden_states.shape[1] - merging.prefix) // 2)


def merge_in_layers(model: PreTrainedModel, pair: Pairing) -> PreTrainedModel:
    """Changes `model` in place: each layer merges what `pair` says between its attention and its MLP."""
    family = family_of(model)
    registers = getattr(find_tower(model, family).module.config, "num_register_tokens", 0)
    counts = {"none": 0, "registers": registers}
    prefix = sum(counts.get(token, 1) for token in family.prefix.split(", "))
    layers = layers_of(model)
    merging = Merging(prefix, pair)
    for layer in layers:
        parts = PARTS[type(layer).__name__]
        for module in getattr(layer, parts.attention).modules():
            module.token_merging = merging
            if hasattr(module, "config"):
                module.config._attn_implementation = ATTENTION
        layer.forward = functools.partial(merging_layer, layer, parts, merging, layer is layers[0], layer is layers[-1])
    return model


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a model's vision tower, in order; raises `Unsupported` if it has none of a class in `PARTS`."""
    tower = find_tower(model, family_of(model)).module
    layers = [module for module in tower.modules() if type(module).__name__ in PARTS]
    if not layers:
        raise Unsupported(
            f"{type(model).__name__} has no layer whose tokens can be merged; known are {', '.join(PARTS)}. "
            "Leave tome, tome-decreasing, tome-alike, pitome, ppt and tps out."
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
    """`sdpa` under the log of the tokens' sizes; leaves query, key and value, (batch, heads, tokens, head size)."""
    merging = module.token_merging
    merging.query, merging.key, merging.value = query, key, value
    merging.scaling = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    return sdpa_attention_forward(module, query, key, value, merging.bias(query.dtype), **kwargs)


AttentionInterface.register(ATTENTION, proportional_attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextlib.contextmanager
def count_layer_tokens(model: PreTrainedModel) -> Iterator[TokenCount]:
    """As `vwt_hf.count_tokens`, of a model that merges tokens by `merge_in_layers`."""
    layers = layers_of(model)
    count = TokenCount([0] * len(layers))

    def add(number: int, layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        count.images += args[0].shape[0] if number == 0 else 0
        sizes = None if number == 0 else getattr(layer, PARTS[type(layer).__name__].attention).token_merging.sizes
        tokens = args[0].shape[0] * args[0].shape[1] if sizes is None else int((sizes > 0).sum())
        count.by_layer[number] += tokens

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
        index = words.on(next(model.parameters()).device)
        total += sum(tensor.nbytes for tensor in (index.words, *(index.screen or ())))
    for module in model.modules():
        if isinstance(module, torch.ao.nn.quantized.Linear):
            weight, bias = module.weight(), module.bias()
            total += weight.numel() * weight.element_size() + (0 if bias is None else bias.nbytes)
    return total
