"""Which words may be the nearest to a patch, told from a few numbers of each instead of from all their pixels; on CPUs.

Words and most patches are smooth: nearly all that there is of them lies along a few directions. What a patch and a word
have in common beyond these is at most the product of what is left of the two (Cauchy and Schwarz), so most words are
ruled out without a look at them, and none wrongly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

DIRECTIONS = 47
"""With what is left as one more number, a row of 48."""
FEWEST_WORDS = 256
"""With fewer, and with patches of fewer values than that, the inner products with all are made as fast."""
LIKELY = 6
"""Words of a patch, in the mean, from which on the inner products with all words are made as fast."""
PAIRS = 128
"""Patches and words of which products are made at once: few enough that their pixels stay in the cache."""
SAMPLE = 4096
"""Most words that directions are found from."""
TURNS = 3
"""Products by which random directions become nearly those along which words are longest."""
ROUNDING = 5e-6
"""Share of lengths, and of their squares, that rounding may make too little."""


class Screen(NamedTuple):
    """What is known of words before any patch is."""

    directions: torch.Tensor
    """(values, DIRECTIONS), float32: orthonormal."""
    words: torch.Tensor
    """(size, DIRECTIONS + 1), float32: each word along them, and the length of what is left of it."""


def make_screen(words: np.ndarray) -> Screen | None:
    """Makes words ready for `screened_products`; `None` if they are too few, or of too few values, to gain by it.

    Args:
        words: (size, values), float32: each of length 1, or 0.
    """
    size, values = words.shape
    if min(size, values) < FEWEST_WORDS:
        return None
    sample = words[:: -(-size // SAMPLE)]
    directions = np.random.RandomState(0).standard_normal((values, DIRECTIONS)).astype(np.float32)
    for _ in range(TURNS):
        directions, _ = np.linalg.qr(sample.T @ (sample @ directions))
    along = words @ directions
    left = np.linalg.norm(words - along @ directions.T, axis=1, keepdims=True)
    return Screen(torch.from_numpy(directions), torch.from_numpy(np.concatenate((along, left), axis=1)))


def screened_products(
    rows: torch.Tensor,
    lengths: torch.Tensor,
    least: torch.Tensor,
    slack: torch.Tensor,
    words: torch.Tensor,
    screen: Screen,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """For each row its largest inner product with a word, and the first word that has it but for `slack`.

    Args:
        rows: (rows, values), float32.
        lengths: (rows,): of each.
        least: (rows,): products that matter are no less.
        slack: (rows,).
        words: (size, values), float32.
        screen: of the words.

    Returns:
        (rows,) float32 and (rows,) int64: of rows without a product of `least`, less than that and any number. `None`
        if so many words may be the nearest that it is faster to look at all.
    """
    along, squares = rows @ screen.directions, lengths.square()
    left = (squares - along.square().sum(dim=1)).clamp_(min=0).add_(squares, alpha=ROUNDING).sqrt_()
    # No product is larger than these.
    most = (torch.cat((along, left.unsqueeze(1)), dim=1) @ screen.words.T).numpy()
    best = most.argmax(axis=1)
    found = most[np.arange(len(most)), best] - (2 * left * screen.words[best, -1]).numpy()
    floor = np.maximum(found, least.numpy()) - (slack + 2 * ROUNDING * lengths).numpy()
    likely = most >= floor[:, None]
    if np.count_nonzero(likely) > LIKELY * len(rows):
        return None
    row, word = np.divmod(np.flatnonzero(likely), len(words))
    largest, first = np.full(len(most), -np.inf, np.float32), np.zeros(len(most), np.int64)
    if len(row):
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        products = _products(rows.numpy(), row, words.numpy(), word)
        largest[row[starts]] = np.maximum.reduceat(products, starts)
        has_it = products >= (largest - slack.numpy())[row]
        first[row[starts]] = np.minimum.reduceat(np.where(has_it, word, len(words)), starts)
    return torch.from_numpy(largest), torch.from_numpy(first)


def _products(rows: np.ndarray, row: np.ndarray, words: np.ndarray, word: np.ndarray) -> np.ndarray:
    """The inner product of each of some rows with one of some words, by their numbers: (pairs,)."""
    parts = [slice(start, start + PAIRS) for start in range(0, len(row), PAIRS)]
    return np.concatenate([np.einsum("ij,ij->i", rows[row[part]], words[word[part]]) for part in parts])
