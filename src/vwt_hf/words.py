"""Cutting images into patches, choosing those that stay and finding each patch's word: functions on tensors alone.

Patches are numbered in row-major order, as a ViT's own patch embedding numbers them, and flattened as (channel, row,
column), as its projection's weight is.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .on_gpu import is_followed
from .screening import TINY, Screen, make_screen, screened_cosines

_ROWS = 1024
"""Patches whose inner products a CPU makes at once: few enough that the products are still in its cache when read."""
HELD = 2**24
"""Distances, or inner products, of pairs of patches, tokens or words that are held at once (64 MiB)."""
_SAME = 1e-5
"""Cosines that differ by no more than this count as equal: matrix products round by up to 6·10⁻⁶, and differently for
other batch shapes, so that a patch could otherwise get another word in another batch."""
_NOTHING = 1e-5
"""A squared distance counts as 0 if it is at most this share of the squared lengths that it is the difference of."""
_EQUALLY_NEAR = 1e-5
"""Distances that differ by no more than this count as equal; the unit is the mean over the image."""
_WHOLE = 2**44
"""Ratios are turned into whole numbers of this fraction, as some devices have no double precision."""
_ROUNDED = round(1e-8 * _WHOLE)
"""How far below an integer, in the unit of `_WHOLE`, a share may lie by rounding: 0.29 * 100 is 28.999999999999996."""
_CACHE_BYTES = 2**24
"""Most bytes that `same_for_all` caches."""
_CACHE_ENTRIES = 64
"""Most tensors that `same_for_all` caches."""


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast, which would compute in half precision.

    Where autocast is off it does nothing, as torch cannot load an exported program that switches it.
    """
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def patch_grid(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole patches in `pixel_values` (batch, channels, height, width).

    Raises:
        ValueError: the image is smaller than one patch.
    """
    height, width = pixel_values.shape[-2:]
    rows, columns = height // patch_size[0], width // patch_size[1]
    if rows < 1 or columns < 1:
        raise ValueError(
            f"pixel_values are {height}×{width}, smaller than one {patch_size[0]}×{patch_size[1]} patch; "
            "resize the images to the model's input size."
        )
    return rows, columns


def patch_places(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The row and column of each patch of a grid of so many rows and columns: (1, patches, 2) float32."""
    return torch.cartesian_prod(*(torch.arange(n, device=device, dtype=torch.float32) for n in grid)).view(1, -1, 2)


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Cuts images into their patches.

    Args:
        pixel_values: (batch, channels, height, width); rows and columns beyond the last whole patch are left out, as a
            strided convolution does.
        patch_size: height and width of a patch, in pixels.

    Returns:
        (batch, patches, channels · patch height · patch width).
    """
    rows, columns = patch_grid(pixel_values, patch_size)
    height, width = patch_size
    whole = pixel_values[..., : rows * height, : columns * width]
    grid = whole.unflatten(-1, (columns, width)).unflatten(-3, (rows, height))
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class Centred(NamedTuple):
    """Patches, each without the mean of its values."""

    level: torch.Tensor
    """(batch, patches, 1), float32: the mean of each patch's values."""
    rest: torch.Tensor
    """(batch, patches, channels · patch height · patch width), float32: the values less their mean."""
    squares: torch.Tensor
    """(batch, patches, 1), float32: the squared length of `rest`."""

    @property
    def variance(self) -> torch.Tensor:
        """(batch, patches): unbiased variance of each patch's values (paper, intra-image approach)."""
        return self.squares.squeeze(2) / (self.rest.shape[2] - 1)


def centre(patches: torch.Tensor) -> Centred:
    """Subtracts from each patch, (batch, patches, channels · patch height · patch width), the mean of its values."""
    values = patches.float()
    # Two passes over contiguous rows: an order of magnitude faster on a CPU than torch.var, and as exact.
    level = values.mean(dim=2, keepdim=True)
    rest = values - level
    return Centred(level, rest, torch.linalg.vector_norm(rest, dim=2, keepdim=True).square())


def highest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest of (batch, patches) scores, ascending; of equal scores the earlier patch wins.

    Returns:
        (batch, keep), int64.
    """
    return best(scores, keep).sort(dim=1).values


def best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """As `highest`, the highest first."""
    if torch.onnx.is_in_onnx_export():  # which has no stable sort; its TopK keeps the earlier of equals
        return scores.topk(keep, dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep]


def whole_share(patches: Any, ratio: float) -> Any:
    """`patches * ratio`, a number or (batch,) int64, rounded down as if `ratio` were exact."""
    return (patches * round(ratio * _WHOLE) + _ROUNDED) // _WHOLE


def marked(index: torch.Tensor, count: int) -> torch.Tensor:
    """(batch, count), bool: true in the places that `index`, (batch, any), int64, names."""
    none = torch.zeros(index.shape[0], count, dtype=torch.bool, device=index.device)
    return none.scatter(1, index, torch.ones_like(index, dtype=torch.bool))  # torch.jit.trace takes no number for it


_cache: collections.OrderedDict[tuple[Any, ...], torch.Tensor] = collections.OrderedDict()
"""What `same_for_all` has made, the least recently used first."""
_cache_lock = threading.Lock()


def same_for_all(choose: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Decorator: caches a tensor that depends on sizes alone, and makes it a constant of graphs that torch records.

    Args:
        choose: takes whole numbers or tuples of numbers and, last, a device. It computes without torch, and makes the
            tensor in one call at the end: torch.export and torch.jit.trace would record any other call of torch, and
            repeat it, with other random numbers, whenever their program runs.
    """

    @torch.compiler.assume_constant_result
    def constant(*args: Any) -> torch.Tensor:
        key = (choose, *args)
        tensor = _cached(key)
        if tensor is None:
            # Outside inference mode, so that a later training step may save it for its backward pass.
            with torch.inference_mode(False):
                tensor = choose(*args)
            # Static sizes. Else dynamo takes a length that was less in a constant for another image size for one that
            # changes, and finds no input that it comes from. (`mark_static` is for inputs alone.)
            tensor._dynamo_static_indices = set(range(tensor.dim()))  # type: ignore[attr-defined]
            # torch.export sees tensors without values, and torch.jit.trace checks that it sees the same steps twice.
            if type(tensor) is torch.Tensor and tensor.nbytes <= _CACHE_BYTES and not torch.jit.is_tracing():
                _cache_for(key, tensor)
        _hold(tensor)
        return tensor

    # Torch names a constant after the code of the function that gave it, and a graph cannot hold two of one name.
    constant.__code__ = constant.__code__.replace(co_name=choose.__name__)

    @functools.wraps(choose)
    def chosen(*args: Any) -> torch.Tensor:
        # Sizes are tensors in torch.jit.trace, and symbols in torch.compile.
        tensor = constant(*[one if isinstance(one, tuple) else operator.index(one) for one in args[:-1]], args[-1])
        # `detach`, as dynamo computes sums and indexing of a constant itself while it traces, without static sizes.
        return tensor.detach() if torch.compiler.is_dynamo_compiling() else tensor

    return chosen


def _cached(key: tuple[Any, ...]) -> torch.Tensor | None:
    with _cache_lock:
        tensor = _cache.get(key)
        if tensor is not None:
            _cache.move_to_end(key)
        return tensor


def _cache_for(key: tuple[Any, ...], made: torch.Tensor) -> None:
    """Caches a tensor, and drops the least recently used ones while there are too many or too large ones."""
    with _cache_lock:
        _cache[key] = made
        while len(_cache) > _CACHE_ENTRIES or sum(one.nbytes for one in _cache.values()) > _CACHE_BYTES:
            _cache.popitem(last=False)


_held: dict[int, torch.Tensor] = {}
"""Constants that CUDA graphs read, by their address."""


def _hold(constant: torch.Tensor) -> None:
    """Keeps a constant for good if a CUDA graph is being captured, which keeps its address and not the tensor."""
    if constant.is_cuda and torch.cuda.is_current_stream_capturing():
        _held[constant.data_ptr()] = constant


def whole_numbers(values: Any, device: torch.device) -> torch.Tensor:
    """An array or lists of integers as an int64 tensor."""
    return torch.tensor(np.asarray(values).tolist(), dtype=torch.int64, device=device)


def _draws(patches: int, seed: int) -> np.ndarray:
    """A random number for each patch, (patches,) uint32; the first ones are the same however many there are."""
    return np.random.RandomState(seed % 2**32).randint(0, 2**32, size=patches, dtype=np.uint32)


def _shuffled(patches: int, seed: int) -> list[int]:
    """`torch.randperm` on a CPU with a generator of that seed, without torch: Fisher-Yates, by the Mersenne Twister."""
    draws = _draws(patches, seed).tolist()
    order = list(range(patches))
    for place in range(patches - 1):
        other = place + draws[place] % (patches - place)
        order[place], order[other] = order[other], order[place]
    return order


@same_for_all
def random_ranks(patches: int, seed: int, device: torch.device) -> torch.Tensor:
    """The rank of each patch in a seeded random order, (patches,): the same on every device. Of fewer patches the order
    is the same, so that an image has it with padding as without."""
    return whole_numbers(_draws(patches, seed).argsort(kind="stable").argsort(), device)


@same_for_all
def random_patches(patches: int, keep: int, seed: int, device: torch.device) -> torch.Tensor:
    """A seeded random subset of `keep` patches, ascending, (1, keep): the same on every device and for every image."""
    return whole_numbers([sorted(_shuffled(patches, seed)[:keep])], device)


def _spread(size: int) -> np.ndarray:
    """The bits of each number in reverse order, read as digits of base four.

    For the numbers from 0 to below the least power of two that is at least `size`.
    """
    bits = (size - 1).bit_length()
    numbers = np.arange(2**bits)
    return sum(((numbers >> bit & 1) << 2 * (bits - 1 - bit) for bit in range(bits)), np.zeros_like(numbers))


@same_for_all
def _spread_on(size: int, device: torch.device) -> torch.Tensor:
    return whole_numbers(_spread(size), device)


def _dither(row: Any, column: Any, spread: Any) -> Any:
    """The rank of each place of a grid in ordered dithering (Bayer 1973), by `_spread` of more rows and columns.

    The first half of the ranks is a checkerboard, the first quarter is every other row and column.
    """
    return 2 * spread[row ^ column] + spread[row]


def dithered(row: torch.Tensor, column: torch.Tensor, size: int) -> torch.Tensor:
    """`_dither` for tensors: int64, of the shape of `row` and `column`, which are below `size`."""
    return _dither(row, column, _spread_on(size, row.device))


@same_for_all
def grid_patches(rows: int, columns: int, keep: int, device: torch.device) -> torch.Tensor:
    """An even cover of a rows × columns grid by `keep` patches, ascending, (1, keep).

    The order is that of `_dither`, so a larger cover contains the smaller ones.
    """
    order = _dither(np.arange(rows)[:, None], np.arange(columns), _spread(max(rows, columns)))
    return whole_numbers([np.sort(order.ravel().argsort()[:keep])], device)


def with_prefix(kept: torch.Tensor, prefix: int) -> torch.Tensor:
    """(batch or 1, keep) indices of patches → (batch or 1, prefix + keep) rows of tokens, prefix tokens first."""
    own = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
    return torch.cat((own, kept + prefix), dim=1)


def gather_pairs(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of a table of pairs of rows, (1, channels, all, all), the part about some: (batch or 1, some) → (batch or 1,
    channels, some, some)."""
    return values[0][:, rows.unsqueeze(2), rows.unsqueeze(1)].transpose(0, 1)


def nearest_kept(
    patches: Centred,
    kept: torch.Tensor,
    places: torch.Tensor,
    real: torch.Tensor | None = None,
    stays: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kept patch that each patch is nearest to; a kept patch is nearest to itself.

    Near is what looks alike and lies close by: distances of pixels and of places are each divided by their mean over
    the image, then added. Of kept patches that are equally near but for rounding the first is taken, so that an image
    gets the same answer alone and in a batch.

    Args:
        patches: all of them, as `centre` gives them.
        kept: (batch or 1, keep) patch indices, ascending.
        places: (batch or 1, patches, 2), as `patch_places` gives them.
        real: (batch, patches), bool: which patches are no padding; `None` if all are.
        stays: (batch, keep), bool: which of `kept` do stay; `None` if all do.

    Returns:
        (batch, patches), int64 in [0, keep).
    """
    with without_autocast(kept.device), torch.no_grad():
        parts = (*patches, places)
        of_kept = [gather_patches(part, kept) for part in parts]
        # Many patches are compared in pieces, and these twice, as the means come first.
        step = max(1, HELD // kept.shape[1])
        pieces = list(zip(*(part.split(step, dim=1) for part in parts), strict=True))
        marks = [None] * len(pieces) if real is None else real.split(step, dim=1)
        sums = []
        for piece, mark in zip(pieces, marks, strict=True):
            distances = _distances(piece, of_kept)
            counts = None if mark is None or stays is None else mark.unsqueeze(2) & stays.unsqueeze(1)
            sums.append(_sums(distances, counts))
        look, place, number = (functools.reduce(operator.add, each) for each in zip(*sums, strict=True))
        means = [(total / number).clamp(min=1e-6) for total in (look, place)]
        if len(pieces) == 1:
            nearest = _nearest(distances, means, stays)
        else:
            nearest = torch.cat([_nearest(_distances(piece, of_kept), means, stays) for piece in pieces], dim=1)
        kept = kept.expand(nearest.shape[0], -1)
        own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        if stays is not None:
            own = torch.where(stays, own, nearest.gather(1, kept))
        return nearest.scatter(1, kept, own)


def _distances(patches: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean distances of patches to those kept: of their pixels, 0 where rounding may have made them, and of their
    places; (batch, patches, keep) both.

    Args:
        patches, kept: level, rest and squares, as in `Centred`, and places.
    """
    # Patches differ most in their means, which need no product. The rest is short, so its products round by less.
    level, rest, squares, places = patches
    lengths = squares + kept[2].transpose(1, 2)
    squared = torch.baddbmm(lengths, rest, kept[1].transpose(1, 2), alpha=-2)
    squared.masked_fill_(squared <= lengths.mul_(_NOTHING), 0)
    levels = level - kept[0].transpose(1, 2)
    return squared.add_(levels.square_(), alpha=rest.shape[2]).sqrt_(), torch.cdist(places, kept[3])


def _sums(distances: Sequence[torch.Tensor], counts: torch.Tensor | None) -> list[Any]:
    """For each image the sum of each kind of distances, and their number; of those that `counts` marks, if given."""
    if counts is None:
        number: Any = distances[0].shape[1] * distances[0].shape[2]
    else:
        distances, number = [each * counts for each in distances], counts.sum((1, 2), keepdim=True)
    return [*(each.sum((1, 2), keepdim=True) for each in distances), number]


def _nearest(
    distances: Sequence[torch.Tensor], means: Sequence[torch.Tensor], stays: torch.Tensor | None
) -> torch.Tensor:
    """The first kept patch that each patch is nearest to, (batch, patches); distances are overwritten."""
    look, place = (each.div_(mean) for each, mean in zip(distances, means, strict=True))
    distance = look.add_(place)
    if stays is not None:
        distance = distance.masked_fill(~stays.unsqueeze(1), torch.inf)
    return first_of(distance.le_(distance.amin(dim=2, keepdim=True) + _EQUALLY_NEAR))


def gather_patches(patches: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Of (batch or 1, patches, values) the rows of some patches, (batch or 1, keep): (batch, keep, values)."""
    if not torch.jit.is_tracing():  # what is traced with one image is for batches of any size
        if kept.shape[0] == 1:
            return patches.index_select(1, kept[0])
        if patches.shape[0] == 1:
            return patches[0, kept]
    return patches[torch.arange(patches.shape[0], device=kept.device).unsqueeze(1), kept]


class WordIndex(NamedTuple):
    """Words made ready for `nearest_words` by `index_words`."""

    words: torch.Tensor
    """(size, channels · patch height · patch width), float32: each of length 1."""
    screen: Screen | None = None
    """What rules most words out, on a CPU; `None` where products with all words are as fast."""


def index_words(words: torch.Tensor) -> WordIndex:
    """Makes words, (size, channels · patch height · patch width), ready for `nearest_words`.

    A word of zeros stays one, at distance 1 from every patch.
    """
    # By numpy: torch's threads wait for one another, for long where other processes have the cores.
    values = words.detach().float().cpu().numpy()
    length = np.sqrt(values[:, None] @ values[:, :, None])[:, 0]  # several times as fast as np.linalg.norm
    values = values / np.maximum(length, 1e-12)
    return WordIndex(torch.from_numpy(values).to(words.device), make_screen(values) if words.is_cpu else None)


@torch.no_grad()
def nearest_words(patches: torch.Tensor, index: WordIndex, threshold: float) -> torch.Tensor:
    """The word of each patch, by cosine distance (paper, inter-image approach); computed in float32.

    A patch farther than `threshold` from every word stays alone: its number is past the words' and no other patch of
    its image has it. Of words that are equally near but for rounding the first wins, so that an image gets the same
    words alone and in a batch. A patch of zeros has cosine 0 with every word, so distance 1.

    Args:
        patches: (batch, patches, channels · patch height · patch width).
        index: of the words.
        threshold: largest distance 1 − cos at which a patch takes a word, in [0, 2]; at 0 none does.

    Returns:
        (batch, patches), int64: a word in [0, size), or size + the patch's own index.
    """
    patches = patches.float()
    own = (torch.arange(patches.shape[1], device=patches.device) + len(index.words)).expand(patches.shape[:2])
    if threshold == 0:
        return own
    lengths = torch.linalg.vector_norm(patches, dim=2).flatten()
    least = 1 - threshold - _SAME
    at_once = max(1, HELD // len(index.words))
    at_once = min(at_once, _ROWS) if patches.is_cpu else at_once
    parts = zip(patches.flatten(0, 1).split(at_once), lengths.split(at_once), strict=True)
    with without_autocast(patches.device):  # which would search in half precision
        cosines = [_largest_cosines(rows, length, index, least) for rows, length in parts]
    largest, words = (torch.cat(each) for each in zip(*cosines, strict=True))
    near = largest >= least
    if threshold < 1:
        near &= lengths > 0
    return torch.where(near.view_as(own), words.view_as(own), own)


def _rounds_as_float32() -> bool:
    """Whether products of matrices on a CPU are in float32, as they are unless a user allows for less."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return precision in ("none", "ieee")  # the function above raises where this is set for one kind of device alone


def _largest_cosines(
    rows: torch.Tensor, lengths: torch.Tensor, index: WordIndex, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row its largest cosine with a word, and the first word that has it but for rounding; for rows without a
    cosine of `least`, what `screened_cosines` says."""
    # Where torch may round to fewer bits, a screen would rule words out wrongly.
    if index.screen is not None and not is_followed() and _rounds_as_float32():
        screened = screened_cosines(rows, lengths, index.words, index.screen, least, _SAME)
        if screened is not None:
            return screened
    cosines = (rows @ index.words.T).div_(lengths.clamp(min=TINY).unsqueeze(1))
    largest = cosines.amax(dim=1)
    return largest, first_of(cosines.ge_((largest - _SAME).unsqueeze(1)))


def first_of(marks: torch.Tensor) -> torch.Tensor:
    """The first place along the last dimension where `marks`, float32 zeros and ones, are 1; `marks` is overwritten.

    On a CPU it is several times as fast as `argmax`.
    """
    places = marks.shape[-1]
    from_last = marks.mul_(torch.arange(places, 0, -1, device=marks.device, dtype=marks.dtype)).amax(dim=-1)
    return (places - from_last).clamp_(max=places - 1).to(torch.int64)
