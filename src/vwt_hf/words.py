"""Which patches stay: functions on tensors, with no model in sight.

Patches are numbered in row-major order, as a ViT's own patch embedding numbers them, and flattened as (channel, row,
column), as its projection's weight is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

SKETCHED = 500
"""Words from which on it is cheaper to look at sketches first."""
_PRODUCTS = 2**24
"""Inner products held at once (64 MiB), which bounds memory for large vocabularies."""


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
    """Where patches lie, (1, patches, 2) float32: row and column, counted in patches.

    Args:
        grid: rows and columns of patches.
    """
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


def variance_scores(patches: torch.Tensor) -> torch.Tensor:
    """Unbiased variance of each patch's values, in float32 (paper, intra-image approach).

    Args:
        patches: (batch, patches, channels · patch height · patch width).

    Returns:
        (batch, patches).
    """
    values = patches.float()
    # Two passes over contiguous rows: an order of magnitude faster on a CPU than torch.var, and as exact.
    centred = values - values.mean(dim=-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1).square() / (values.shape[-1] - 1)


def highest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest scores in ascending order; of equal scores the earlier patch wins.

    Args:
        scores: (batch, patches).

    Returns:
        (batch, keep), int64.
    """
    return best(scores, keep).sort(dim=1).values


def best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """As `highest`, the highest first."""
    if torch.onnx.is_in_onnx_export():  # which has no stable sort; its TopK keeps the earlier of equals
        return scores.topk(keep, dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)[:, :keep]


def _cached(choose: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Keeps what `choose` gave for its last arguments.

    `functools.lru_cache` would keep the tensors without values that it sees while torch.export traces, too.
    """
    kept: dict[tuple[Any, ...], torch.Tensor] = {}

    @functools.wraps(choose)
    def chosen(*args: Any) -> torch.Tensor:
        found = kept.get(args)
        if found is None:
            # Outside inference mode, so that a later training step may save it for its backward pass.
            with torch.inference_mode(False):
                found = choose(*args)
            if type(found) is torch.Tensor:
                if len(kept) >= 64:
                    kept.clear()
                kept[args] = found
        return found

    return chosen


@_cached
def random_order(patches: int, seed: int, device: torch.device) -> torch.Tensor:
    """Patches in a seeded random order, (patches,): the same on every device."""
    return torch.randperm(patches, generator=torch.Generator().manual_seed(seed)).to(device)


@_cached
def random_patches(patches: int, keep: int, seed: int, device: torch.device) -> torch.Tensor:
    """A seeded random subset of `keep` patches, ascending, (1, keep): the same on every device and for every image."""
    return random_order(patches, seed, device)[:keep].sort().values.unsqueeze(0)


@_cached
def dither(size: int, device: torch.device) -> torch.Tensor:
    """Places of a square of at least `size` rows and columns in the order of ordered dithering (Bayer 1973), (rows,
    columns) int64: half of them is a checkerboard, a quarter is every other row and column."""
    order = torch.zeros(1, 1, dtype=torch.int64)
    while order.shape[0] < size:
        order = torch.cat((torch.cat((4 * order, 4 * order + 2), 1), torch.cat((4 * order + 3, 4 * order + 1), 1)))
    return order.to(device)


@_cached
def grid_patches(rows: int, columns: int, keep: int, device: torch.device) -> torch.Tensor:
    """An even cover of a rows × columns grid by `keep` patches, ascending, (1, keep).

    The order is that of `dither`, so a larger cover contains the smaller ones.
    """
    order = dither(max(rows, columns), device)
    return order[:rows, :columns].flatten().argsort()[:keep].sort().values.unsqueeze(0)


def gather_pairs(values: torch.Tensor, kept: torch.Tensor, prefix: int) -> torch.Tensor:
    """What the patches that stay, and the prefix tokens, have for each other.

    Args:
        values: (1, channels, prefix + patches, prefix + patches).
        kept: (batch or 1, keep), indices of patches.
        prefix: prefix tokens, which come first.

    Returns:
        (batch or 1, channels, prefix + keep, prefix + keep).
    """
    own = torch.arange(prefix, device=kept.device).expand(kept.shape[0], -1)
    index = torch.cat((own, kept + prefix), dim=1)
    return values[0][:, index.unsqueeze(2), index.unsqueeze(1)].transpose(0, 1)


def nearest_kept(
    patches: torch.Tensor,
    kept: torch.Tensor,
    places: torch.Tensor,
    real: torch.Tensor | None = None,
    stays: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kept patch that each patch is nearest to; a kept patch is nearest to itself.

    Near is what looks alike and lies close by: distances of pixels and places are each measured by their mean over the
    image, then added.

    Args:
        patches: (batch, patches, channels · patch height · patch width).
        kept: (batch or 1, keep) patch indices, ascending.
        places: (batch or 1, patches, 2), as `patch_places` gives them.
        real: (batch, patches), bool: which patches are no padding; `None` if all are.
        stays: (batch, keep), bool: which of `kept` do stay; `None` if all do.

    Returns:
        (batch, patches), int64 in [0, keep).
    """
    with torch.autocast(patches.device.type, enabled=False), torch.no_grad():
        values = patches.float()
        counts = None if real is None or stays is None else real.unsqueeze(2) & stays.unsqueeze(1)
        distance = _relative(torch.cdist(values, gather_patches(values, kept)), counts)
        distance = distance + _relative(torch.cdist(places, gather_patches(places, kept)), counts)
        if stays is not None:
            distance = distance.masked_fill(~stays.unsqueeze(1), torch.inf)
        nearest = distance.argmin(dim=2)
        kept = kept.expand(patches.shape[0], -1)
        own = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        if stays is not None:
            own = torch.where(stays, own, nearest.gather(1, kept))
        return nearest.scatter(1, kept, own)


def _relative(distance: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Distances (batch, patches, keep) over the mean of those of their image which count."""
    if counts is None:
        mean = distance.mean(dim=(1, 2), keepdim=True)
    else:
        mean = (distance * counts).sum((1, 2), keepdim=True) / counts.sum((1, 2), keepdim=True)
    return distance / mean.clamp(min=1e-6)


def gather_patches(patches: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The kept patches alone, or the rows of any table that has one for each patch.

    Args:
        patches: (batch or 1, patches, values).
        kept: (batch or 1, keep) patch indices.

    Returns:
        (batch, keep, values).
    """
    if kept.shape[0] == 1:
        return patches[:, kept[0]]
    if patches.shape[0] == 1:
        return patches[0, kept]
    return patches[torch.arange(patches.shape[0], device=kept.device).unsqueeze(1), kept]


def patch_strip(patches: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Lays patches side by side as one image, one patch high, that a patch projection turns into their tokens.

    Args:
        patches: (batch, patches, channels · patch height · patch width).
        patch_size: height and width of a patch, in pixels.

    Returns:
        (batch, channels, patch height, patches · patch width).
    """
    return patches.unflatten(-1, (-1, *patch_size)).permute(0, 2, 3, 1, 4).flatten(-2)


class WordIndex(NamedTuple):
    """Words made ready for `nearest_words` by `index_words`; each of length 1, in float32."""

    words: torch.Tensor
    """(size, channels · patch height · patch width)."""
    basis: torch.Tensor
    """(channels · patch height · patch width, axes): orthonormal axes along which the words differ most."""
    sketch: torch.Tensor
    """(size, axes + 1): coordinates on the axes, and the length of what is left of the word beside them."""

    def to(self, device: torch.device) -> WordIndex:
        """The same index on another device."""
        return WordIndex(*(tensor.to(device) for tensor in self))


def index_words(words: torch.Tensor, axes: int = 31) -> WordIndex:
    """Makes words ready for the search; a word of zeros stays one, at distance 1 from every patch.

    Args:
        words: (size, channels · patch height · patch width).
        axes: how many axes a sketch has.
    """
    with torch.autocast(words.device.type, enabled=False):
        unit = torch.nn.functional.normalize(words.float(), dim=1)
        if len(unit) < unit.shape[1]:  # the smaller of two matrices that give the same axes
            along = unit.T @ torch.linalg.eigh(unit @ unit.T).eigenvectors[:, -axes:]
            basis = torch.linalg.qr(along).Q
        else:
            basis = torch.linalg.eigh(unit.T @ unit).eigenvectors[:, -axes:]
        return WordIndex(unit, basis, _sketch(unit, basis))


@torch.no_grad()
def nearest_words(patches: torch.Tensor, index: WordIndex, threshold: float) -> torch.Tensor:
    """The word of each patch, by cosine distance (paper, inter-image approach); computed in float32.

    A patch farther than `threshold` from every word stays alone: its number is past the words' and no other patch of
    its image has it. Of words equally near the first wins. The cosine with a patch of zeros is taken as 0, its distance
    as 1.

    On a CPU and with `SKETCHED` words, patches that are provably farther than `threshold` from all words are told by
    their sketches and never compared in full. Elsewhere that would cost a synchronisation.

    Args:
        patches: (batch, patches, channels · patch height · patch width).
        index: of the words.
        threshold: largest distance 1 − cos at which a patch takes a word, in [0, 2].

    Returns:
        (batch, patches), int64: a word in [0, size), or size + the patch's own index.
    """
    # Autocast would search in half precision.
    with torch.autocast(patches.device.type, enabled=False):
        return _nearest_words(patches.float(), index, threshold)


def _nearest_words(patches: torch.Tensor, index: WordIndex, threshold: float) -> torch.Tensor:
    batch, count = patches.shape[:2]
    values = patches.flatten(0, 1)
    length = torch.linalg.vector_norm(values, dim=1)
    least = (1 - threshold) * length
    if values.is_cpu and len(index.words) >= SKETCHED:
        bound = torch.cat(
            [
                (part @ index.sketch.T).amax(dim=1)
                for part in _sketch(values, index.basis).split(max(1, _PRODUCTS // 8 // len(index.sketch)))
            ]
        )
        # The slack is what rounding may take from the bound.
        candidates = (bound >= least - 1e-4 * length).nonzero().squeeze(1)
        similarity, word = torch.full_like(length, -torch.inf), torch.zeros_like(length, dtype=torch.int64)
        similarity[candidates], word[candidates] = _largest_products(values[candidates], index.words)
    else:
        similarity, word = _largest_products(values, index.words)
    near = similarity >= least
    if threshold < 1:
        near &= length > 0
    own = torch.arange(count, device=patches.device) + len(index.words)
    return torch.where(near.view(batch, count), word.view(batch, count), own)


def _sketch(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """(vectors, axes + 1): coordinates on the axes, and the length of the rest.

    By Cauchy and Schwarz the product of two sketches is never less than that of their vectors.
    """
    along = vectors @ basis
    rest = (vectors.square().sum(dim=1) - along.square().sum(dim=1)).clamp(min=0).sqrt()
    return torch.cat((along, rest.unsqueeze(1)), dim=1)


def _largest_products(rows: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row its largest inner product with a word, and the first word that has it; (rows,) each."""
    found = [(part @ words.T).max(dim=1) for part in rows.split(max(1, _PRODUCTS // len(words)))]
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])
