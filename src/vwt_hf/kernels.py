"""Kernels for NVIDIA GPUs, in Triton: attention by layout, choosing patches, joining tokens.

A GPU runs a small operation faster than the host can launch it, and torch would take many for each of these. Here each
is a few launches. `on_gpu.kernels_for` says when they are used: not where gradients are taken or graphs are made. There
torch's operations run, with the same answers but for rounding.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl

from .layout import Layout

BLOCK = 64
"""Patches or tokens that a program works on at once."""
DIMS = 32
"""Dimensions of hidden states that a product of tokens reads at once."""
ROWS, KEYS = 64, 32
"""Queries of one program of attention, and keys that it reads at once."""
LOG2_E = tl.constexpr(1.4426950408889634)
"""The logarithm of e to base 2: exp(x) = 2^(x · LOG2_E), and a power of 2 takes one instruction."""


def try_out(device: torch.device) -> None:
    """Compiles and launches a kernel; raises if Triton lacks something for that."""
    rows = torch.zeros(1, dtype=torch.int64, device=device)
    number_words(rows, (rows, rows + 1), 1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_bias: torch.Tensor, layout: Layout, scaling: float
) -> torch.Tensor:
    """Attention within each image of a batch, packed or padded, with a bias by key.

    It computes softmax block by block of keys, as FlashAttention does (arXiv 2205.14135).

    Args:
        query, key, value: (sequences, heads, tokens, head size), float16 or bfloat16.
        key_bias: (sequences, tokens), float32; −inf on padding between images.
        layout: where images begin and end.
        scaling: what the products of queries and keys are multiplied by.

    Returns:
        (sequences, tokens, heads, head size).
    """
    sequences, heads, tokens, size = query.shape
    query, key, value = (one if one.stride(3) == 1 else one.contiguous() for one in (query, key, value))
    output = query.new_empty(sequences, tokens, heads, size)
    first, ends = _bounds(layout, query)
    blocks = triton.cdiv(layout.longest if layout.packed else tokens, ROWS)
    with _on(query):
        _attend[(blocks * heads * len(first),)](
            *(query, key, value, output, key_bias, first, ends, blocks, heads),
            *(stride for one in (query, key, value) for stride in one.stride()[:3]),
            heads * size,
            tokens,
            scaling * LOG2_E.value,
            SIZE=size,
            WIDTH=max(triton.next_power_of_2(size), 16),
            PACKED=layout.packed,
            ROWS=ROWS,
            KEYS=KEYS,
            num_warps=4,
            num_stages=2,
        )
    return output


@triton.jit(do_not_specialize=["blocks", "heads", "tokens"])
def _attend(
    query, key, value, output, key_bias, first, ends, blocks, heads,
    query_sequence, query_head, query_token,
    key_sequence, key_head, key_token,
    value_sequence, value_head, value_token,
    output_token, tokens, scaling,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block, head, image = program % blocks, (program // blocks % heads).to(tl.int64), program // blocks // heads
    sequence = image.to(tl.int64)
    begin, length = sequence * 0, tokens
    if PACKED:
        begin = tl.load(first + image)
        length, sequence = (tl.load(ends + image) - begin).to(tl.int32), sequence * 0
    if block * ROWS >= length:
        return
    rows, dims, columns = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, KEYS)
    query += sequence * query_sequence + head * query_head + begin * query_token
    key += sequence * key_sequence + head * key_head + begin * key_token
    value += sequence * value_sequence + head * value_head + begin * value_token
    key_bias += sequence * tokens + begin
    output += (sequence * tokens + begin) * output_token + head * SIZE
    real_rows = (rows < length)[:, None] & (dims < SIZE)[None, :]
    queries = tl.load(query + rows[:, None] * query_token + dims[None, :], mask=real_rows, other=0.0)
    most = tl.full([ROWS], -1e30, tl.float32)  # not −inf: for a hidden key −inf − −inf would be NaN
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, length, KEYS):
        at = start + columns
        real = (at < length)[:, None] & (dims < SIZE)[None, :]
        keys = tl.load(key + at[:, None] * key_token + dims[None, :], mask=real, other=0.0)
        values = tl.load(value + at[:, None] * value_token + dims[None, :], mask=real, other=0.0)
        bias = tl.load(key_bias + at, mask=at < length, other=-float("inf"))
        logits = tl.dot(queries, tl.trans(keys)) * scaling + bias[None, :] * LOG2_E
        higher = tl.maximum(most, tl.max(logits, 1))
        weights, shrunk = tl.exp2(logits - higher[:, None]), tl.exp2(most - higher)
        total = total * shrunk + tl.sum(weights, 1)
        found = tl.dot(weights.to(values.dtype), values, found * shrunk[:, None])
        most = higher
    found = found / tl.where(total > 0, total, 1.0)[:, None]  # 0 where all keys are hidden
    tl.store(output + rows[:, None] * output_token + dims[None, :], found.to(output.dtype.element_ty), mask=real_rows)


def find_leaders(
    pixel_values: torch.Tensor,
    patch_size: tuple[int, int],
    grid: tuple[int, int],
    waves: torch.Tensor,
    weights: torch.Tensor,
    fine: float,
    beside: torch.Tensor,
    limits: torch.Tensor,
    tolerance: float,
) -> torch.Tensor:
    """Which patch stands for each, as `neighbours.find_leaders` says.

    Args:
        waves, weights, fine: `neighbours._waves`, (pixels, 4); `neighbours._weights`, (channels,); `neighbours.FINE`.
        beside, limits: `neighbours._beside` and `neighbours._limits` of the grid.
    """
    batch, channels = pixel_values.shape[:2]
    patches, pixels = grid[0] * grid[1], patch_size[0] * patch_size[1]
    values = 4 * channels + 1
    looks = pixel_values.new_empty(batch, patches, values, dtype=torch.float32)
    distance = looks.new_empty(batch, patches, 8)
    stays = looks.new_empty(batch, patches, dtype=torch.bool)
    first = looks.new_empty(batch, patches, dtype=torch.int64)
    blocks = (batch, triton.cdiv(patches, BLOCK))
    with _on(pixel_values):
        _describe[(batch * patches,)](
            *(pixel_values, waves, weights, looks, *pixel_values.stride(), patches, grid[1], fine),
            CHANNELS=channels,
            ACROSS=patch_size[1],
            DOWN=patch_size[0],
            PIXELS=pixels,
            WIDTH=triton.next_power_of_2(pixels),
            num_warps=1,
        )
        _compare[blocks](looks, beside, limits, distance, stays, patches, tolerance, VALUES=values, BLOCK=BLOCK)
        _nearest[blocks](distance, beside, stays, first, patches, BLOCK=BLOCK)
    return first.gather(1, first)


@triton.jit(do_not_specialize=["patches", "columns", "image_stride", "channel_stride", "row_stride"])
def _describe(
    pixel_values, waves, weights, looks, image_stride, channel_stride, row_stride, column_stride, patches, columns,
    fine_weight,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    image, patch = (tl.program_id(0) // patches).to(tl.int64), tl.program_id(0) % patches
    pixel = tl.arange(0, WIDTH)
    real = pixel < PIXELS
    row, column = patch // columns * DOWN + pixel // ACROSS, patch % columns * ACROSS + pixel % ACROSS
    pixel_values += image * image_stride + row.to(tl.int64) * row_stride + column * column_stride
    looks += (image * patches + patch) * (4 * CHANNELS + 1)
    fine = 0.0
    for channel in range(CHANNELS):
        values = tl.load(pixel_values, mask=real, other=0.0).to(tl.float32)
        pixel_values += channel_stride
        weight = tl.load(weights + channel)
        fine += tl.sum(values * values, 0) * weight * weight
        for number in tl.static_range(4):
            wave = tl.load(waves + pixel * 4 + number, mask=real, other=0.0)
            slow = tl.sum(values * wave, 0) * weight
            fine -= slow * slow
            tl.store(looks + channel * 4 + number, slow)
    tl.store(looks + 4 * CHANNELS, tl.sqrt(tl.maximum(fine, 0.0)) * fine_weight)


@triton.jit(do_not_specialize=["patches"])
def _compare(
    looks, beside, limits, distance, stays, patches, tolerance, VALUES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """`Neighbours.distance`, and `neighbours.cover` by it."""
    image, patch = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (patch < patches)[:, None]
    entry = patch[:, None] * 8 + tl.arange(0, 8)[None, :]
    index = tl.load(beside + entry, mask=real, other=0)
    later = tl.load(beside + patches * 8 + entry, mask=real, other=0) != 0
    factor = tl.load(limits + entry, mask=real, other=1.0)
    none = tl.load(limits + patches * 8 + entry, mask=real, other=0.0)
    looks += image * patches * VALUES
    squares = tl.zeros([BLOCK, 8], tl.float32)
    for value in range(VALUES):
        own = tl.load(looks + patch * VALUES + value, mask=patch < patches, other=0.0)
        difference = own[:, None] - tl.load(looks + index * VALUES + value, mask=real, other=0.0)
        squares += difference * difference
    differs = none + tl.sqrt(squares) * factor
    tl.store(distance + image * patches * 8 + entry, differs, mask=real)
    goes = tl.max(((differs < tolerance) & later).to(tl.int32), 1)
    tl.store(stays + image * patches + patch, goes == 0, mask=patch < patches)


@triton.jit(do_not_specialize=["patches"])
def _nearest(distance, beside, stays, first, patches, BLOCK: tl.constexpr):
    """For each patch itself if it stays, else the nearest of those that it may be left to."""
    image, patch = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = (patch < patches)[:, None]
    places = tl.arange(0, 8)[None, :]
    entry = patch[:, None] * 8 + places
    index = tl.load(beside + entry, mask=real, other=0)
    passes = tl.load(beside + 2 * patches * 8 + entry, mask=real, other=0) != 0
    takes = (tl.load(stays + image * patches + index, mask=real, other=0) != 0) | passes
    near = tl.load(distance + image * patches * 8 + entry, mask=real, other=0.0)
    near = tl.where(takes, near, float("inf"))
    which = tl.min(tl.where(near == tl.min(near, 1)[:, None], places, 8), 1)
    chosen = tl.sum(tl.where(places == which[:, None], index, 0), 1)
    own = tl.load(stays + image * patches + patch, mask=patch < patches, other=0) != 0
    tl.store(first + image * patches + patch, tl.where(own, patch.to(tl.int64), chosen), mask=patch < patches)


def join_alike(
    hidden_states: torch.Tensor, layout: Layout, least: float, earlier: float, places: int, flat: float
) -> torch.Tensor:
    """`alike.join_alike`, which hands over its constants `EARLIER`, `PLACES` and `FLAT`."""
    sequences, tokens, hidden = hidden_states.shape
    values, rows = hidden_states.contiguous(), sequences * tokens
    lengths = values.new_empty(rows, dtype=torch.float32)
    into = values.new_empty(sequences, tokens, dtype=torch.int64)
    first, ends = _bounds(layout, values)
    spread = lengths.new_empty(len(first))
    pairs = max((layout.longest - layout.prefix) // 2, 1)
    with _on(values):
        _lengths[(rows,)](values, lengths, into, hidden, WIDTH=triton.next_power_of_2(hidden))
        _spread[(len(first),)](
            *(values, lengths, spread, first, ends, layout.prefix, hidden, flat), DIMS=DIMS, BLOCK=BLOCK
        )
        _pairs[(len(first), triton.cdiv(pairs, BLOCK))](
            *(values, lengths, layout.sizes.to(values.device), spread, into, first, ends, layout.prefix, least),
            HIDDEN=hidden,
            DIMS=DIMS,
            BLOCK=BLOCK,
            EARLIER=earlier,
            PLACES=places,
        )
    return into


@triton.jit
def _lengths(values, lengths, into, hidden, WIDTH: tl.constexpr):
    """Finds the length of each token's hidden state, and has each token stay: in `into` it has its own row."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    value = tl.load(values + row * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(lengths + row, tl.maximum(tl.sqrt(tl.sum(value * value, 0)), 1e-12))
    tl.store(into + row, row)


@triton.jit(do_not_specialize=["prefix"])
def _spread(values, lengths, spread, first, ends, prefix, hidden, flat, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """1 minus the mean cosine of every second token and the others, which is the product of their mean directions."""
    image, dims = tl.program_id(0), tl.arange(0, DIMS)
    begin = tl.load(first + image) + prefix
    patches = (tl.load(ends + image) - begin).to(tl.int32)
    total = 0.0
    for dim in range(0, hidden, DIMS):
        here = (dim + dims < hidden)[None, :]
        odd, even = tl.zeros([DIMS], tl.float32), tl.zeros([DIMS], tl.float32)
        for start in range(0, patches, BLOCK):
            token = start + tl.arange(0, BLOCK)
            real = token < patches
            at = (begin + token)[:, None] * hidden + dim + dims[None, :]
            value = tl.load(values + at, mask=real[:, None] & here, other=0.0).to(tl.float32)
            value = value / tl.load(lengths + begin + token, mask=real, other=1.0)[:, None]
            odd += tl.sum(tl.where((token % 2 == 1)[:, None], value, 0.0), 0)
            even += tl.sum(tl.where((token % 2 == 0)[:, None], value, 0.0), 0)
        total += tl.sum(odd * even, 0)
    pairs = tl.maximum((patches // 2) * ((patches + 1) // 2), 1)
    tl.store(spread + image, tl.maximum(1 - total / pairs, flat))


@triton.jit(do_not_specialize=["prefix"])
def _pairs(
    values, lengths, sizes, spread, into, first, ends, prefix, least,
    HIDDEN: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
    EARLIER: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Has every second token of an image become part of the most alike of the others, if the two are alike enough."""
    image, pair, dims = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIMS)
    begin = tl.load(first + image) + prefix
    patches = (tl.load(ends + image) - begin).to(tl.int32)
    odd = 2 * pair + 1
    values += begin * HIDDEN
    lengths += begin
    most, which = tl.full([BLOCK], -float("inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    whole = tl.load(spread + image)
    of_odd = tl.load(lengths + odd, mask=odd < patches, other=1.0)
    for start in range(0, patches, 2 * BLOCK):
        even = start + 2 * tl.arange(0, BLOCK)
        of_even = tl.load(lengths + even, mask=even < patches, other=1.0)
        products = tl.zeros([BLOCK, BLOCK], tl.float32)
        for dim in range(0, HIDDEN, DIMS):
            column = dim + dims
            here = (column < HIDDEN)[None, :]
            seconds = tl.load(
                values + odd[:, None] * HIDDEN + column[None, :], mask=(odd < patches)[:, None] & here, other=0.0
            )
            others = tl.load(
                values + even[:, None] * HIDDEN + column[None, :], mask=(even < patches)[:, None] & here, other=0.0
            )
            seconds, others = seconds.to(tl.float32), others.to(tl.float32)
            products = tl.dot(seconds, tl.trans(others), products, input_precision="ieee")
        cosines = products / of_odd[:, None] / of_even[None, :]
        cosines -= (EARLIER * whole * tl.minimum(even // 2, PLACES))[None, :]
        cosines = tl.where((even < patches)[None, :], cosines, -float("inf"))
        highest, place = tl.max(cosines, 1, return_indices=True)
        which = tl.where(highest > most, start + 2 * place, which)
        most = tl.maximum(most, highest)
    size = tl.load(sizes + begin + odd, mask=odd < patches, other=1.0)
    alike = 1 - tl.sqrt(tl.maximum(size, 1.0)) * ((1 - most) / whole - EARLIER * tl.minimum(which // 2, PLACES))
    tl.store(into + begin + odd, begin + which, mask=(odd < patches) & (alike >= least))


def number_words(
    words: torch.Tensor, bounds: tuple[torch.Tensor, torch.Tensor], longest: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers the words of each image, in the order in which they first come.

    Args:
        words: the word of each row, of any shape; int64.
        bounds: the row in which each image starts, and the one after its last: (images,), int64, both.
        longest: rows of the longest image.

    Returns:
        `lead`, (rows,) int64: for each row the first one of its image that has the same word; 0 for rows of no image.
        `place`, (rows,) int64: for each of these first rows the number of its word; undefined for other rows.
        How many words each image has, (images,) int64.
    """
    words = words.contiguous()
    lead, place = words.new_zeros(words.numel()), words.new_empty(words.numel())
    counts = words.new_empty(len(bounds[0]))
    with _on(words):
        _lead[(len(counts), triton.cdiv(longest, BLOCK))](words, *bounds, lead, BLOCK=BLOCK)
        _count[(len(counts),)](lead, *bounds, place, counts, BLOCK=4 * BLOCK)
    return lead, place, counts


@triton.jit
def _lead(words, first, ends, lead, BLOCK: tl.constexpr):
    image, block = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(first + image), tl.load(ends + image)
    row = begin + block * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + row, mask=row < end, other=0)
    found = row
    for start in range(0, (block + 1) * BLOCK, BLOCK):
        other = begin + start + tl.arange(0, BLOCK)
        same = word[:, None] == tl.load(words + other, mask=other < end, other=0)[None, :]
        found = tl.minimum(found, tl.min(tl.where(same & (other < end)[None, :], other[None, :], end), 1))
    tl.store(lead + row, found, mask=row < end)


@triton.jit
def _count(lead, first, ends, place, counts, BLOCK: tl.constexpr):
    image = tl.program_id(0)
    begin, end = tl.load(first + image), tl.load(ends + image)
    before = begin * 0
    for start in range(0, (end - begin).to(tl.int32), BLOCK):
        row = begin + start + tl.arange(0, BLOCK)
        leads = (tl.load(lead + row, mask=row < end, other=-1) == row).to(tl.int64)
        tl.store(place + row, before + tl.cumsum(leads, 0) - leads, mask=row < end)
        before += tl.sum(leads, 0)
    tl.store(counts + image, before)


def rows_of(
    into: torch.Tensor,
    lead: torch.Tensor,
    place: torch.Tensor,
    starts: torch.Tensor,
    shape: tuple[int, int],
    before: torch.Tensor,
    sources: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`Layout.rows` and `Layout.sizes` after tokens were joined, and `sources` of those left, as `layout.regroup`.

    Args:
        into: (rows,), int64: the row of the token that each becomes part of, its own if it stays.
        lead, place: what `number_words` gives for `into`.
        starts: (images,), int64: the row in which each image will start.
        shape: of the sizes.
        before: (images, prefix + patches), int64: `Layout.rows` before.
        sources: a number of each token before, or `None`.
    """
    rows, patches = before.new_empty(before.shape), before.shape[1]
    sizes = torch.zeros(shape, dtype=torch.float32, device=starts.device)
    found = None if sources is None else sources.new_zeros(shape)
    with _on(starts):
        _rows[(len(starts), triton.cdiv(patches, BLOCK))](
            *(into, lead, place, before, starts, rows, sizes, sources, found, patches),
            NUMBERED=found is not None,
            BLOCK=BLOCK,
        )
    return rows, sizes, found


@triton.jit(do_not_specialize=["patches"])
def _rows(
    into, lead, place, before, starts, rows, sizes, sources, found, patches,
    NUMBERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    image, patch = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = patch < patches
    at = image * patches + patch
    old = tl.load(before + at, mask=real, other=0)
    first = tl.load(lead + old, mask=real, other=0)
    row = tl.load(starts + image) + tl.load(place + first, mask=real, other=0)
    tl.store(rows + at, row, mask=real)
    tl.atomic_add(sizes + row, 1.0, mask=real)  # whole numbers, so in any order the same
    if NUMBERED:
        number = tl.load(sources + tl.load(into + old, mask=real, other=0), mask=real, other=0)
        tl.store(found + row, number, mask=real)  # all patches of a token have the same


def join(values: torch.Tensor, into: torch.Tensor, before: Layout, after: Layout) -> torch.Tensor:
    """`layout.join`, by `into`, (rows,), int64: the row of `after` that each token of `before` becomes part of."""
    values, hidden = values.contiguous(), values.shape[-1]
    joined = values.new_zeros(*after.sizes.shape, hidden)
    old, new = _bounds(before, values), _bounds(after, values)
    with _on(values):
        _join[(len(old[0]) * after.longest,)](
            *(values, into.to(values.device), before.sizes.to(values.device), after.sizes.to(values.device), joined),
            *(*old, *new, after.longest, hidden),
            TOKENS=triton.next_power_of_2(before.longest),
            WIDTH=triton.next_power_of_2(hidden),
        )
    return joined


@triton.jit(do_not_specialize=["longest"])
def _join(
    values, into, sizes, new_sizes, joined, first, ends, new_first, new_ends, longest, hidden,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) // longest
    row = tl.load(new_first + image) + tl.program_id(0) % longest
    if row >= tl.load(new_ends + image):
        return
    begin, end = tl.load(first + image), tl.load(ends + image)
    token, column = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    mine = tl.load(into + begin + token, mask=begin + token < end, other=-1) == row
    size = tl.maximum(tl.load(new_sizes + row), 1.0)
    total, lengths = tl.zeros([WIDTH], tl.float32), 0.0
    last = -1
    for _ in range(0, tl.sum(mine.to(tl.int32), 0)):
        last = tl.min(tl.where(mine & (token > last), token, TOKENS), 0)
        old = begin + last
        value = tl.load(values + old * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
        share = tl.load(sizes + old) / size
        total += share * value
        lengths += share * tl.sqrt(tl.sum(value * value, 0))
    total = total * (lengths / tl.maximum(tl.sqrt(tl.sum(total * total, 0)), 1e-12))
    tl.store(joined + row * hidden + column, total.to(joined.dtype.element_ty), mask=column < hidden)


def _bounds(layout: Layout, beside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`Layout.bounds` on the device of a tensor."""
    first, ends = layout.bounds
    return first.to(beside.device), ends.to(beside.device)


def _on(tensor: torch.Tensor) -> Any:
    """A context in which Triton launches where the tensor lies."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
