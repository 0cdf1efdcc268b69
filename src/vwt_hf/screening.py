"""Which words may be the nearest to a patch, told from a few numbers of each instead of from all their pixels; on CPUs.

Words and most patches are smooth: nearly all that there is of them lies along a few directions. What a patch and a word
have in common beyond these is at most the product of the lengths of what is left of the two (Cauchy and Schwarz), so
most words are ruled out without a look at their pixels, and none wrongly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

DIRECTIONS = 47
"""How many there are; with the length of what is left, 48 numbers tell of a word."""
FEWEST = 256
"""Words, and values of each: with fewer of either, cosines with all words are found as fast."""
LIKELY = 64
"""Words of a patch: if more of them may be the nearest, it is faster to find its cosines with all."""
PAIRS = 128
"""Patches and words of which cosines are found at once: few enough that their pixels stay in the cache."""
SAMPLE = 4096
"""Most words that directions are found from."""
TURNS = 3
"""Rounds by which random directions become, nearly, those along which words are longest."""
ROUNDING = 1.2e-5
"""By how much a product along the directions may be off: by six millionths for the patch, and as much for the word."""
ROUNDING_OF_SQUARES = 2.5e-5
"""By how much the square of what is along the directions may be too large: by twice what its length is off by, six
millionths for the product and three for the patch's own length, and some more."""
TINY = float(np.finfo(np.float32).tiny)
"""A length counts as no less, so that patches of zeros have cosines of 0."""


class Screen(NamedTuple):
    """What is known of words before any patch is."""

    directions: torch.Tensor
    """(values, DIRECTIONS), float32: orthonormal; 0 where fewer say all."""
    words: torch.Tensor
    """(size, DIRECTIONS + 1), float32: each word along them, and the length of what is left of it."""


def make_screen(words: np.ndarray) -> Screen | None:
    """Makes words ready for `screened_cosines`; `None` if they are too few, or of too few values, to gain by it.

    Args:
        words: (size, values), float32: each of length 1, or 0.
    """
    size, values = words.shape
    if min(size, values) < FEWEST:
        return None
    sample = words[:: -(-size // SAMPLE)]
    directions = np.random.RandomState(0).standard_normal((values, DIRECTIONS)).astype(np.float32)
    for _ in range(TURNS):
        directions = _orthonormal(sample.T @ (sample @ directions))
    parts = [_along(words[start : start + SAMPLE], directions) for start in range(0, size, SAMPLE)]
    return Screen(torch.from_numpy(directions), torch.from_numpy(np.concatenate(parts)))


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """Directions of length 1 that are at right angles and span the same as `columns`, (values, n), one after the other.

    0 in place of one that is within what those before it span. `np.linalg.qr` does so in many steps, before each of
    which its threads wait for one another: a second and more where other processes have the cores.
    """
    found = np.zeros(columns.shape[::-1])
    for number, column in enumerate(columns.T.astype(np.float64)):
        before, rest = found[:number], column
        for _ in range(2):  # what rounding leaves of the others goes the second time
            rest = rest - np.einsum("ij,i->j", before, np.einsum("ij,j->i", before, rest))
        length = np.sqrt(np.einsum("i,i", rest, rest))
        if length > 1e-9 * np.sqrt(np.einsum("i,i", column, column)):
            found[number] = rest / length
    return found.T.astype(columns.dtype)


def _along(words: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """`Screen.words`, of some words."""
    along = words @ directions
    left = np.linalg.norm(words - along @ directions.T, axis=1, keepdims=True)
    return np.concatenate((along, left), axis=1)


def screened_cosines(
    patches: torch.Tensor, lengths: torch.Tensor, words: torch.Tensor, screen: Screen, least: float, slack: float
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """For each patch its largest cosine with a word, and the first word that has it but for `slack`.

    Args:
        patches: (patches, values), float32.
        lengths: (patches,): of each.
        words: (size, values), float32, of length 1.
        screen: of the words.
        least: no smaller cosine matters as the largest one of a patch.
        slack: cosines that differ by no more are the same.

    Returns:
        (patches,) float32 and (patches,) int64; of patches that have no cosine of `least`, any smaller cosine, or NaN,
        and any number. `None` if of most patches many words may be the nearest, so that it is faster to look at all.
    """
    scale = lengths.clamp(min=TINY).reciprocal().unsqueeze(1)
    along = (patches @ screen.directions).mul_(scale)
    left = (1 + ROUNDING_OF_SQUARES - along.square().sum(dim=1, keepdim=True)).clamp_(min=0).sqrt_()
    most = (torch.cat((along, left), dim=1) @ screen.words.T).numpy()
    best = most.argmax(axis=1)
    # Of the word that may have the largest cosine: it has no smaller one than that.
    surely = most[np.arange(len(most)), best] - (2 * left[:, 0] * screen.words[best, -1]).numpy()
    # The first of those that are the same may have a cosine that is smaller by the slack.
    likely = most >= (np.maximum(surely, least) - slack - 2 * ROUNDING)[:, None]
    patch, word = np.divmod(np.flatnonzero(likely), len(words))
    counts = np.bincount(patch, minlength=len(most))
    many = np.flatnonzero(counts > LIKELY)
    if 2 * len(many) > len(most):
        return None
    largest, first = np.full(len(most), np.nan, np.float32), np.zeros(len(most), np.int64)
    if len(many):  # in double precision, so that a patch gets the same word whatever others are beside it
        of_all = (patches[many].double() @ words.double().T).numpy() * scale.numpy()[many]
        top = of_all.max(axis=1, keepdims=True)
        largest[many], first[many] = top[:, 0], (of_all >= top - slack).argmax(axis=1)
        few = counts[patch] <= LIKELY
        patch, word = patch[few], word[few]
    if len(patch):
        starts = np.flatnonzero(np.diff(patch, prepend=-1))
        cosines = _products(patches.numpy(), patch, words.numpy(), word) * scale.numpy()[patch, 0]
        largest[patch[starts]] = np.maximum.reduceat(cosines, starts)
        has_it = cosines >= largest[patch] - np.float32(slack)
        first[patch[starts]] = np.minimum.reduceat(np.where(has_it, word, len(words)), starts)
    return torch.from_numpy(largest), torch.from_numpy(first)


def _products(patches: np.ndarray, patch: np.ndarray, words: np.ndarray, word: np.ndarray) -> np.ndarray:
    """The inner product of each of some patches with one of some words, by their numbers: (pairs,)."""
    parts = [slice(start, start + PAIRS) for start in range(0, len(patch), PAIRS)]
    # By BLAS, which rounds by less than a millionth: einsum and torch.bmm by ten and forty times as much.
    found = [patches[patch[part]][:, None] @ words[word[part]][:, :, None] for part in parts]
    return np.concatenate(found)[:, 0, 0]
