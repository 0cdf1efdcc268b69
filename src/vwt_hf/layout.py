"""Ragged batches: which patches of an image share a token, where the tokens of a batch lie, and the way back.

Functions on tensors alone. The tokens of a batch lie in rows, image by image. Packed, they are one sequence without
padding between images, the image with the fewest tokens first, so that images of equal length lie side by side. Padded,
each image is a sequence, as long as the longest of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from .on_gpu import kernels_for
from .words import patch_places, with_prefix

if TYPE_CHECKING:
    from functools import cached_property as lazy
else:

    class lazy:
        """`functools.cached_property` that torch.compile can trace: while it traces, the value is computed each time.

        Before Python 3.12 that of functools takes a lock, which no graph can hold.
        """

        def __init__(self, function: Callable[[Any], Any]) -> None:
            functools.update_wrapper(self, function)
            self.function = function

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            value = self.function(instance)
            if not torch.compiler.is_dynamo_compiling():
                instance.__dict__[self.function.__name__] = value
            return value


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the patches of a batch of images became tokens, and where these lie."""

    rows: torch.Tensor
    """(batch, prefix tokens + patches), int64: the row of each prefix token, and of the token that each patch is in."""
    sizes: torch.Tensor
    """(sequences, tokens), float32: how many patches each token stands for; 1 for prefix tokens, 0 for padding.
    One sequence if packed, else one for each image."""
    prefix: int
    """Prefix tokens of each image."""
    runs: tuple[tuple[int, int], ...]
    """The lengths of the batch's images, ascending: (tokens, images that have so many)."""
    packed: bool
    bounds: tuple[torch.Tensor, torch.Tensor]
    """The row in which each image starts, and the one after its last: (batch,), int64, both."""
    real: torch.Tensor | None = None
    """(batch, patches), bool: which patches count; `None` if all do. The others, padding and what a caller left out,
    are assigned to a token, too, so that each gets a hidden state, but add nothing to its mean and size."""
    rounds: bool = False
    """Whether a packed batch ends with padding, so that its number of rows is one of few (`_rounded`)."""

    @property
    def tokens(self) -> int:
        """Tokens of the batch, prefix tokens included and padding left out."""
        return sum(length * images for length, images in self.runs)

    @lazy
    def dense(self) -> bool:
        """Whether every row is a token that stands for something, as without padding."""
        return self.tokens == self.sizes.numel() and self.real is None

    @property
    def gapless(self) -> bool:
        """Whether every row up to the end of the last image is a token that stands for something."""
        return self.dense or (self.packed and self.real is None)

    @property
    def even(self) -> bool:
        """Whether `gapless`, and all images have the same number of tokens."""
        return len(self.runs) == 1 and self.gapless

    @property
    def longest(self) -> int:
        """Tokens of the longest image."""
        return self.runs[-1][0] if self.runs else 0

    @lazy
    def bags(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches of the batch in the order of their rows, (batch · patches,), and where those of each row start,
        (rows,)."""
        patch_rows, rows = self.rows[:, self.prefix :].flatten(), self.sizes.numel()
        if self.real is not None:  # those that do not count go to a row after the last
            patch_rows, rows = torch.where(self.real.flatten(), patch_rows, rows), rows + 1
        return _bags(patch_rows, rows)

    @lazy
    def whole_bags(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`bags` of prefix tokens and patches."""
        return _bags(self.rows.flatten(), self.sizes.numel())

    @lazy
    def shares(self) -> tuple[torch.Tensor, ...]:
        """How much each prefix token or patch counts in each token: 1 / size of the token that it is in, else 0.

        (images, prefix + patches, tokens) for each run if packed, else once for all images. Images are in the order of
        their rows.
        """
        starts = self.rows[:, :1]
        order = starts.flatten().argsort()
        runs = self.runs if self.packed else ((self.sizes.shape[1], order.shape[0]),)
        share = self.sizes.flatten()[self.rows].reciprocal().unsqueeze(-1)
        shares = share.new_zeros(*self.rows.shape, runs[-1][0])
        shares.scatter_(2, (self.rows - starts).unsqueeze(-1), share)
        parts = shares[order].split([images for _, images in runs])
        return tuple(part[..., :length] for part, (length, _) in zip(parts, runs, strict=True))

    def by_run(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(sequences, tokens) → (images, tokens), for each run if packed, else once for all images."""
        if not self.packed:
            return (values,)
        parts = values[0, : self.tokens].split([length * images for length, images in self.runs])
        return tuple(part.view(-1, length) for part, (length, _) in zip(parts, self.runs, strict=True))

    @lazy
    def boundaries(self) -> torch.Tensor:
        """(batch + 1,), int32: where each image starts among the rows, and where the last one ends."""
        starts = self.bounds[0].sort().values
        return torch.nn.functional.pad(starts, (0, 1), value=self.tokens).to(torch.int32)


def _bags(row_of: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of values by the row that each goes to, of so many `rows`, and where in it those of each row start."""
    if torch.onnx.is_in_onnx_export():  # which knows neither a stable sort nor searchsorted
        held = torch.zeros(rows, dtype=torch.int64, device=row_of.device)
        held.scatter_add_(0, row_of, torch.ones_like(row_of))
        return row_of.topk(row_of.shape[0], largest=False).indices, held.cumsum(0) - held
    ordered, order = row_of.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(rows, device=row_of.device))


def group(
    patch_words: torch.Tensor,
    prefix: int = 0,
    packed: bool = True,
    real: torch.Tensor | None = None,
    not_as: Collection[tuple[int, ...]] = (),
    rounds: bool = False,
) -> Layout:
    """Lays patches out as tokens: those of one image that share a word become one.

    The tokens of an image come in the order of their first patches, so the numbers of the words do not matter.

    Args:
        patch_words: (batch, patches), integers.
        prefix: prefix tokens of each image, which come before its patches.
        packed: whether the batch becomes one sequence with no padding between images, or one padded sequence for each
            image. A batch without images is padded.
        real: (batch, patches), bool: which patches are no padding, the first of each image among them; `None` if all
            are.
        not_as: shapes (sequences, tokens) that the batch must not have, where padding can make it another.
        rounds: as `Layout.rounds`, if the batch is packed.
    """
    if real is not None:
        patch_words = torch.where(real, patch_words, patch_words[:, :1])
    token_of_patch, lengths = _number_tokens(patch_words)
    counted = (lengths + prefix).tolist()  # the one synchronisation with the device
    whole, device = prefix + patch_words.shape[1], patch_words.device
    shape, runs, packed, bounds = _lay_out(counted, whole, packed, not_as, rounds, device)
    rows = with_prefix(token_of_patch, prefix) + bounds[0].unsqueeze(1)
    sizes = _sizes(rows, prefix, shape, real)
    return Layout(rows, sizes, prefix, runs, packed, bounds, real, rounds and packed)


def lead(
    leaders: torch.Tensor, prefix: int, packed: bool, real: torch.Tensor | None = None, rounds: bool = False
) -> tuple[Layout, torch.Tensor]:
    """Lays patches out as tokens, each of which is one patch of a group, which stands for all of the group.

    Args:
        leaders: (batch, patches), int64: the index of the patch that stands for each, its own if it stays.
        prefix, packed, real, rounds: as for `group`.

    Returns:
        The layout, and the row of each token before any patch was left out: (sequences, prefix + tokens), int64,
        counted over all images; 0 for padding.
    """
    batch, patches = leaders.shape
    into = whole_rows(leaders, batch, prefix, patches)
    if real is None and (kernels := kernels_for(leaders)):
        bounds = _even_bounds(batch, prefix + patches, leaders.device)
        first, place, counts = kernels.number_words(into, bounds, prefix + patches)
        counted = counts.tolist()  # the one synchronisation with the device
        shape, runs, packed, bounds = _lay_out(counted, prefix + patches, packed, (), rounds, leaders.device)
        own = torch.arange(into.numel(), device=leaders.device).view_as(into)
        rows, sizes, sources = kernels.rows_of(into, first, place, bounds[0], shape, own, own)
        return Layout(rows, sizes, prefix, runs, packed, bounds, None, rounds and packed), sources
    layout = group(leaders, prefix, packed, real, rounds=rounds)
    return layout, by_token(into, layout)


def whole_rows(kept: torch.Tensor, batch: int, prefix: int, patches: int) -> torch.Tensor:
    """The rows of prefix tokens and of some patches, (batch or 1, keep) indices, before any token is left out: (batch,
    prefix + keep), int64, counted over all images of so many prefix tokens and patches."""
    first, _ = _even_bounds(batch, prefix + patches, kept.device)
    return with_prefix(kept, prefix) + first.unsqueeze(1)


def _even_bounds(batch: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`Layout.bounds` of images that all have `length` rows."""
    first = torch.arange(batch, device=device) * length
    return first, first + length


def regroup(
    before: Layout, into: torch.Tensor, not_as: Collection[tuple[int, ...]] = (), sources: torch.Tensor | None = None
) -> tuple[Layout, torch.Tensor | None]:
    """A new layout after some tokens were joined with others of their image.

    Each new token takes the place of the first of those that it was joined from.

    Args:
        before: the layout until then.
        into: (sequences, prefix + tokens), int64, on the device of `before`: the row of the token that each becomes
            part of, its own if it stays.
        not_as: as for `group`.
        sources: (sequences, prefix + tokens), int64: any number for each token.

    Returns:
        The new layout, and the numbers of the tokens that stayed, 0 for padding. `before` and `sources` themselves if
        all tokens stay.
    """
    into, kernels = into.flatten(), kernels_for(into)
    # `first`: for each row the first of those joined with it. `place`: for such a first row the number of its token.
    if kernels:
        first, place, counts = kernels.number_words(into, before.bounds, before.longest)
        begin: torch.Tensor | int = 0  # each image's tokens are numbered from 0, and below through all images
    else:
        own = torch.arange(into.numel(), device=into.device)
        first = own.scatter_reduce(0, into, own, "amin")[into]
        place = (first == own).cumsum(0) - 1  # rows of padding, too, which lie behind those of their image
        starts, ends = before.bounds
        begin = place[starts]
        counts = place[ends - 1] - begin + 1
    counted = counts.tolist()  # the one synchronisation with the device
    if sum(counted) == before.tokens:
        return before, sources
    whole, device = before.rows.shape[1], before.rows.device
    shape, runs, packed, bounds = _lay_out(counted, whole, before.packed, not_as, before.rounds, device)
    rest = before.prefix, runs, packed, bounds, before.real, before.rounds
    if kernels and before.real is None:
        rows, sizes, sources = kernels.rows_of(into, first, place, bounds[0], shape, before.rows, sources)
        return Layout(rows, sizes, *rest), sources
    rows = place[first][before.rows] + (bounds[0] - begin).unsqueeze(1)
    layout = Layout(rows, _sizes(rows, before.prefix, shape, before.real), *rest)
    return layout, None if sources is None else by_token(sources.flatten()[into[before.rows]], layout)


def _lay_out(
    counted: list[int],
    whole: int,
    packed: bool,
    not_as: Collection[tuple[int, ...]],
    rounds: bool,
    device: torch.device,
) -> tuple[tuple[int, int], tuple[tuple[int, int], ...], bool, tuple[torch.Tensor, torch.Tensor]]:
    """Decides where images lie: the shape (sequences, tokens) of their batch, and `Layout.runs`, `packed` and `bounds`.

    Args:
        counted: tokens of each image, prefix tokens included.
        whole: prefix tokens and patches of an image.
        packed, not_as, rounds: as for `group`.
    """
    batch = len(counted)
    packed = packed and batch > 0  # convolutions take no sequence of length 0
    if packed:
        filled, starts = 0, [0] * batch
        for image in sorted(range(batch), key=counted.__getitem__):
            starts[image] = filled
            filled += counted[image]
        rows = _rounded(filled) if rounds else filled
        if (1, rows) in not_as or (batch, rows) == (1, whole):
            rows = filled
        shape = 1, rows
    else:
        longest = max(counted, default=1)
        # Never as many rows as prefix tokens and patches: hooks tell tokens from expanded patches by the shape alone.
        while longest == whole or (batch, longest) in not_as:
            longest += 1
        shape, starts = (batch, longest), [image * longest for image in range(batch)]
    ends = [start + count for start, count in zip(starts, counted, strict=True)]
    both = torch.tensor([starts, ends], dtype=torch.int64, device="cpu")
    first, after = both.to(device, non_blocking=device.type == "cuda")
    return shape, tuple(sorted(Counter(counted).items())), packed, (first, after)


def _rounded(rows: int) -> int:
    """`rows` rounded up, by 6 % at most: to one of 16 numbers between two powers of two."""
    step = 1 << max(rows.bit_length() - 5, 0)
    return -(-rows // step) * step


def represent(token_of_patch: torch.Tensor, tokens: int, prefix: int = 0, real: torch.Tensor | None = None) -> Layout:
    """Lays out images that all have `tokens` tokens, each of which stands for the patches that chose it.

    Args:
        token_of_patch: (batch, patches), int64 in [0, tokens): the token that each patch is part of.
        tokens: of each image, prefix tokens left out.
        prefix: prefix tokens of each image, which come before its patches.
        real: (batch, patches), bool: which patches count; `None` if all do. A token whose patches do not is padding.
    """
    batch, length = token_of_patch.shape[0], prefix + tokens
    bounds, runs = _even_bounds(batch, length, token_of_patch.device), ((length, batch),) if batch else ()
    rows = with_prefix(token_of_patch, prefix) + bounds[0].unsqueeze(1)
    return Layout(rows, _sizes(rows, prefix, (batch, length), real), prefix, runs, False, bounds, real)


def _sizes(rows: torch.Tensor, prefix: int, shape: tuple[int, int], real: torch.Tensor | None) -> torch.Tensor:
    """`Layout.sizes`, of this shape, by `Layout.rows`."""
    counts = torch.ones(rows.shape, device=rows.device, dtype=torch.float32)
    if real is not None:
        counts[:, prefix:] = real
    return counts.new_zeros(shape[0] * shape[1]).scatter_add_(0, rows.flatten(), counts.flatten()).view(shape)


def _number_tokens(patch_words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each patch's token within its image, (batch, patches), and how many each image has, (batch,)."""
    batch, patches = patch_words.shape
    if kernels := kernels_for(patch_words):
        bounds = _even_bounds(batch, patches, patch_words.device)
        first, place, counts = kernels.number_words(patch_words.long(), bounds, patches)
        return place[first].view(batch, patches), counts
    place = torch.arange(patches, device=patch_words.device).expand_as(patch_words)
    ordered, order = patch_words.sort(dim=1, stable=True)
    starts = torch.ones_like(patch_words, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    # The first patch of the image that has the same word: the sort is stable, so it is the one that starts a run.
    run_start = torch.where(starts, place, 0).cummax(dim=1).values
    first = torch.empty_like(order).scatter_(1, order, order.gather(1, run_start))
    leads = first == place
    return (leads.cumsum(dim=1) - 1).gather(1, first), leads.sum(dim=1)


def pool(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The mean of each token's patches, summed in float32, or in float64 if `values` are.

    Args:
        values: (batch, patches, channels).

    Returns:
        (sequences, tokens, channels), in the dtype of `values`; 0 for prefix tokens and padding.
    """
    # Embeddings may lie on another device than the images, where the layout is.
    order, starts = (bag.to(values.device) for bag in layout.bags)
    table = _at_least_single(values.flatten(0, 1))
    means = _means(order, table, starts)[: layout.sizes.numel()]
    return means.view(*layout.sizes.shape, table.shape[1]).to(values.dtype)


def _at_least_single(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32, or as they are in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _means(order: torch.Tensor, table: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The mean of the rows of `table` in each bag that `_bags` gives, 0 in an empty one: (bags, channels)."""
    # It reads each row once, in parallel. index_add takes two to four times as long.
    if not torch.onnx.is_in_onnx_export():
        return torch.nn.functional.embedding_bag(order, table, starts, mode="mean")
    # onnxruntime 1.32 crashes as it loads what the mean becomes.
    counts = torch.diff(starts, append=torch.full_like(starts[:1], order.shape[0])).clamp(min=1)
    return torch.nn.functional.embedding_bag(order, table, starts, mode="sum") / counts.unsqueeze(1)


def pool_pairs(values: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, ...]:
    """The mean over all pairs of a patch of one token and a patch of another, for every two tokens of an image.

    Args:
        values: (1, channels, prefix + patches, prefix + patches), shared by all images.

    Returns:
        For each run if packed, else for all images: (images, channels, tokens, tokens), in float32, or in float64 if
        `values` are; 0 for padding.
    """
    table = _at_least_single(values[0]).transpose(0, 1)
    # A layer may lie on another device than the embeddings, which made the layout.
    order, starts = (bag.to(values.device) for bag in layout.whole_bags)
    order, shares = order % layout.rows.shape[1], [share.to(table) for share in layout.shares]
    means = _means(order, table.flatten(1), starts)
    # Means over the one token's patches, (rows, channels, prefix + patches); those over the other's are a product.
    rows = [share.shape[0] * share.shape[2] for share in shares]
    parts = means[: sum(rows)].view(-1, *table.shape[1:]).split(rows)
    return tuple(
        (part.view(share.shape[0], -1, share.shape[1]) @ share).unflatten(1, (share.shape[2], -1)).transpose(1, 2)
        for part, share in zip(parts, shares, strict=True)
    )


def by_token(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(batch, prefix + patches) → (sequences, tokens), int64: the number that all patches of a token share; 0 for
    padding."""
    numbers = torch.zeros_like(layout.sizes, dtype=torch.int64).flatten()
    return numbers.scatter_(0, layout.rows.flatten(), values.flatten()).view_as(layout.sizes)


def join(values: torch.Tensor, before: Layout, after: Layout) -> torch.Tensor:
    """Averages the tokens that become one, weighted by how many patches each stands for, in float32 or float64.

    The average is scaled to their mean length, as that of vectors which point different ways is shorter.

    Args:
        values: (sequences, tokens, hidden), of `before`.

    Returns:
        (sequences, tokens, hidden), of `after`; 0 for padding.
    """
    rows = after.sizes.numel()
    # The row of each token that it becomes part of.
    into = torch.full((before.sizes.numel(),), rows, device=before.rows.device)
    into.scatter_(0, before.rows.flatten(), after.rows.flatten())
    if kernels := kernels_for(values):
        return kernels.join(values, into, before, after)
    sizes = after.sizes.flatten().clamp(min=1)
    if not before.dense:  # padding goes to a row after the last
        sizes = torch.nn.functional.pad(sizes, (0, 1), value=1.0)
    order, starts = _bags(into, sizes.numel())
    table = _at_least_single(values.flatten(0, 1))
    weights = (before.sizes.flatten() / sizes[into])[order].to(table)
    order, starts = order.to(values.device), starts.to(values.device)

    def mean(table: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding_bag(order, table, starts, mode="sum", per_sample_weights=weights)

    means = mean(table)
    lengths = mean(torch.linalg.vector_norm(table, dim=1, keepdim=True))
    means = means * (lengths / torch.linalg.vector_norm(means, dim=1, keepdim=True).clamp(min=1e-12))
    return means[:rows].view(*after.sizes.shape, -1).to(values.dtype)


def medoids(layout: Layout, grid: tuple[int, int]) -> torch.Tensor:
    """For each token, which of its patches lies nearest to the mean of their places.

    Args:
        grid: rows and columns of patches.

    Returns:
        (sequences, tokens), int64: the index of a patch; the number of patches for prefix tokens and padding.
    """
    patch_rows = layout.rows[:, layout.prefix :]
    patches = patch_rows.shape[1]
    places = patch_places(grid, patch_rows.device).expand(patch_rows.shape[0], -1, -1)
    means = pool(places, layout).flatten(0, 1)
    distance = (places - means[patch_rows]).square().sum(dim=-1)
    rows = patch_rows.flatten()
    least = torch.full_like(layout.sizes.flatten(), torch.inf).scatter_reduce(0, rows, distance.flatten(), "amin")
    index = torch.arange(patches, device=patch_rows.device).expand_as(patch_rows)
    nearest = torch.where(distance == least[patch_rows], index, patches).flatten()
    none = torch.full_like(least, patches, dtype=torch.int64)
    return none.scatter_reduce(0, rows, nearest, "amin").view_as(layout.sizes)


def attention_bias(layout: Layout, exponent: float) -> torch.Tensor | None:
    """What is added to attention logits: −inf on padding, and `exponent` times log s on a token of s patches.

    With 1 a token draws as much attention as its patches would together (proportional attention), with 0 as one patch.

    Returns:
        (sequences, tokens), float32; `None` if there is nothing to add.
    """
    if exponent:
        return layout.sizes.log() * exponent
    if layout.gapless:  # attention does not look at what follows the last image
        return None
    return torch.where(layout.sizes > 0, 0.0, -torch.inf)
