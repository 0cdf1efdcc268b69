"""Finds which words may be the nearest to a patch by a few numbers of each instead of by all their pixels; on CPUs.

Words and most patches are smooth: they lie nearly within a few directions. What is left of a patch and of a word beyond
these adds at most the product of its lengths to their inner product (Cauchy-Schwarz). So most words are ruled out
without a look at their pixels, and none wrongly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

DIRECTIONS = 47
"""How many directions. With the length of what is left beyond them, 48 numbers stand for a word."""
FEWEST = 256
"""With fewer words, or fewer values in each, cosines with all words are found as fast, and there is no screen."""
LIKELY = 64
"""If more words than this may be the nearest to a patch, it is faster to find its cosines with all."""
PAIRS = 128
"""Pairs of a patch and a word whose cosines are found at once: few enough that their pixels stay in the cache."""
SAMPLE = 4096
"""Most words that directions are found from."""
TURNS = 3
"""Rounds of subspace iteration, which turn random directions into, nearly, those along which words are longest."""
ROUNDING = 1.2e-5
"""Error of a product along the directions: six millionths for the patch, and as much for the word."""
ROUNDING_OF_SQUARES = 2.5e-5
"""How much too large the squared length along the directions may be: twice the error of that length (six millionths for
the product, three for the patch's own length), and some more."""
TINY = float(np.finfo(np.float32).tiny)
"""Lengths are clamped to at least this, so that patches of zeros have cosines of 0."""


class Screen(NamedTuple):
    """The words, made ready before any patch is known."""

    directions: torch.Tensor
    """(values, DIRECTIONS), float32: orthonormal columns; 0 where fewer span all words."""
    words: torch.Tensor
    """(size, DIRECTIONS + 1), float32: each word's coordinates along them, and the length of what is left of it."""


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
    """Gram-Schmidt: orthonormal columns that span the same as `columns`, (values, n); 0 for one that adds nothing.

    Before each of the many steps of `np.linalg.qr` threads wait for one another: for seconds, on cores that are busy.
    """
    basis = np.zeros(columns.shape[::-1])
    for number, column in enumerate(columns.T.astype(np.float64)):
        before, rest = basis[:number], column
        for _ in range(2):  # the second time removes what rounding left the first time
            rest = rest - np.einsum("ij,i->j", before, np.einsum("ij,j->i", before, rest))
        length = np.sqrt(np.einsum("i,i", rest, rest))
        if length > 1e-9 * np.sqrt(np.einsum("i,i", column, column)):
            basis[number] = rest / length
    return basis.T.astype(columns.dtype)


def _along(words: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """`Screen.words` for some words."""
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
        least: patches whose largest cosine is smaller do not matter.
        slack: cosines that differ by no more count as equal.

    Returns:
        (patches,) float32 and (patches,) int64. For patches that do not matter any cosine below `least`, or NaN, and
        any number. `None` if for most patches many words may be the nearest, so that it is faster to look at all.
    """
    scale = lengths.clamp(min=TINY).reciprocal().unsqueeze(1)
    along = (patches @ screen.directions).mul_(scale)
    left = (1 + ROUNDING_OF_SQUARES - along.square().sum(dim=1, keepdim=True)).clamp_(min=0).sqrt_()
    most = (torch.cat((along, left), dim=1) @ screen.words.T).numpy()
    best = most.argmax(axis=1)
    # A bound from below on the cosine of the word that may have the largest one.
    surely = most[np.arange(len(most)), best] - (2 * left[:, 0] * screen.words[best, -1]).numpy()
    # The first of equal words may have a cosine that is smaller by the slack.
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
    """The inner products of pairs of a patch and a word, which are given by their numbers: (pairs,)."""
    parts = [slice(start, start + PAIRS) for start in range(0, len(patch), PAIRS)]
    # By BLAS, which rounds by less than a millionth: einsum and torch.bmm by ten and forty times as much.
    products = [patches[patch[part]][:, None] @ words[word[part]][:, :, None] for part in parts]
    return np.concatenate(products)[:, 0, 0]
