"""Tokens that are joined where they are alike, against a loop that says what is meant."""

from __future__ import annotations

import pytest
import torch

from vwt_hf.alike import join_alike
from vwt_hf.layout import group, join
from vwt_hf.plans import Grouped

WORDS = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 2, 3], [5, 5, 5, 5, 5, 5, 5]])
COUNTS = (7, 4, 1)
PREFIX = 2


def by_loops(values: torch.Tensor, start: int, count: int, least: float) -> dict[int, int]:
    """The row that each row of an image's tokens becomes part of."""
    rows = [start + PREFIX + token for token in range(count)]
    into = {row: row for row in rows}
    for source in rows[1::2]:
        cosine, target = max(
            (torch.cosine_similarity(values[source], values[row], dim=0).item(), -row) for row in rows[0::2]
        )
        if cosine >= least:
            into[source] = -target
    return into


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("least", [-1.0, 0.2, 0.6, 1.0])
def test_every_second_token_joins_the_one_that_is_most_like_it_if_it_is_alike(packed, least):
    layout = group(WORDS, PREFIX, packed)
    values = torch.randn(*layout.sizes.shape, 3, generator=torch.Generator().manual_seed(0))
    into = join_alike(values, layout, least).flatten()
    expected = torch.arange(layout.sizes.numel())
    for image, count in enumerate(COUNTS):
        for row, target in by_loops(values.flatten(0, 1), int(layout.rows[image, 0]), count, least).items():
            expected[row] = target
    assert torch.equal(into, expected)


@pytest.mark.parametrize("leads", [True, False], ids=["representatives", "means"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_joined_tokens_are_means_by_size_at_the_place_of_the_one_that_was_joined(packed, leads):
    layout = group(WORDS, PREFIX, packed)
    sources = None
    if leads:
        sources = torch.zeros(layout.sizes.numel(), dtype=torch.int64)
        sources[layout.rows.flatten()] = torch.arange(layout.rows.numel())
        sources = sources.view_as(layout.sizes)
    plan = Grouped(layout, True, (1, 7), sources)
    first = int(layout.rows[1, 0])  # of the image of sizes 2, 2, 2, 1
    into = torch.arange(layout.sizes.numel())
    into[first + PREFIX + 3] = first + PREFIX
    after = plan.joined(into.view_as(layout.sizes), {plan.shape})
    assert after.layout.tokens == layout.tokens - 1 and after.shape != plan.shape
    values = torch.randn(*layout.sizes.shape, 5, generator=torch.Generator().manual_seed(0))
    found = join(values, layout, after.layout)
    for image, count in enumerate(COUNTS):
        old, new = int(layout.rows[image, 0]), int(after.layout.rows[image, 0])
        was, now = values.flatten(0, 1)[old:], found.flatten(0, 1)[new:]
        if image != 1:
            assert torch.equal(was[: PREFIX + count], now[: PREFIX + count])
            continue
        mean = (2 * was[PREFIX] + was[PREFIX + 3]) / 3
        mean = mean * ((2 * was[PREFIX].norm() + was[PREFIX + 3].norm()) / 3 / mean.norm())
        expected = torch.stack((was[0], was[1], mean, was[PREFIX + 1], was[PREFIX + 2]))
        torch.testing.assert_close(now[: PREFIX + 3], expected)
        assert after.layout.sizes.flatten()[new : new + PREFIX + 3].tolist() == [1, 1, 3, 2, 2]
        assert (after.layout.rows[1] - new).tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 2]
        if leads:
            assert torch.equal(
                after.sources.flatten()[new : new + PREFIX + 3], sources.flatten()[old : old + PREFIX + 3]
            )
