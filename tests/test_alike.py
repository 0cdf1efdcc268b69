"""Tokens that are joined where they are alike, against a loop that says what is meant."""

from __future__ import annotations

import math

import pytest
import torch

from vwt_hf import alike
from vwt_hf.alike import find_pairs, join_alike, join_share, number_to_join
from vwt_hf.layout import Layout, group, join, represent
from vwt_hf.plans import Grouped

WORDS = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 2, 3], [5, 5, 5, 5, 5, 5, 5]])
COUNTS = (7, 4, 1)
PREFIX = 2


def by_loops(values: torch.Tensor, layout: Layout, image: int, count: int) -> list[tuple[float, int, int]]:
    """For each second row of an image's tokens: how alike the other is that is most like it, itself and the other."""
    start, sizes, values = int(layout.rows[image, 0]), layout.sizes.flatten(), values.flatten(0, 1)
    rows = [start + PREFIX + token for token in range(count)]
    found = []
    cosines = [torch.cosine_similarity(values[one], values[row], dim=0) for one in rows[1::2] for row in rows[0::2]]
    spread = 1 - float(sum(cosines)) / max(len(cosines), 1)
    for source in rows[1::2]:
        cosine, other = max(
            (torch.cosine_similarity(values[source], values[row], dim=0).item(), -row) for row in rows[0::2]
        )  # random values have no two that are equally alike
        found.append((1 - math.sqrt(sizes[source]) * (1 - cosine) / spread, source, -other))
    return found


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("least", [-1.0, 0.2, 0.6, 1.0])
def test_every_second_token_joins_the_one_that_is_most_like_it_if_it_is_alike(packed, least):
    layout = group(WORDS, PREFIX, packed)
    values = torch.randn(*layout.sizes.shape, 3, generator=torch.Generator().manual_seed(0))
    into = join_alike(values, layout, least).flatten()
    expected = torch.arange(layout.sizes.numel())
    for image, count in enumerate(COUNTS):
        for likeness, row, other in by_loops(values, layout, image, count):
            if likeness >= least:
                expected[row] = other
    assert torch.equal(into, expected)


@pytest.mark.parametrize("words", [WORDS, torch.arange(9).expand(4, -1)], ids=["ragged", "even"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_pairs_of_many_tokens_are_found_in_pieces(packed, words, monkeypatch):
    layout = group(words, PREFIX, packed)
    values = torch.randn(*layout.sizes.shape, 3, generator=torch.Generator().manual_seed(0))
    expected, pieces, cosines = find_pairs(values, layout), [], alike._cosines
    monkeypatch.setattr(alike, "_cosines", lambda *given: pieces.append(cosines(*given)) or pieces[-1])
    monkeypatch.setattr(alike, "HELD", 24)
    found = find_pairs(values, layout)
    assert len(pieces) > 2 and max(piece.numel() for piece in pieces) <= 24
    assert torch.equal(found.others, expected.others)
    torch.testing.assert_close(found.alike, expected.alike)


def test_a_token_that_stands_for_many_patches_is_joined_only_with_one_that_is_more_alike():
    token_of_patch = torch.tensor([[0, 1, 2, 3, 1, 1, 1], [0, 1, 2, 3, 0, 0, 0]])
    layout = represent(token_of_patch, 4, prefix=0)
    assert layout.sizes.tolist() == [[1, 4, 1, 1], [4, 1, 1, 1]]
    angles = torch.tensor([0.0, 0.3, 2.0, 2.3]).expand(2, -1)
    values = torch.stack((angles.cos(), angles.sin()), dim=-1)
    mean = (2 * math.cos(0.3) + math.cos(1.7) + math.cos(2.3)) / 4  # of the second and fourth with the others
    distance = (1 - math.cos(0.3)) / (1 - mean)
    pairs = find_pairs(values, layout)
    torch.testing.assert_close(1 - pairs.alike, torch.tensor([[2 * distance, distance], [distance, distance]]))
    assert join_alike(values, layout, 1 - 1.5 * distance).tolist() == [[0, 1, 2, 2], [4, 4, 6, 6]]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_tokens_that_are_the_same_but_for_rounding_are_alike_enough_for_any_similarity(packed):
    layout = group(WORDS, PREFIX, packed)
    values = torch.rand(1, 1, 384, generator=torch.Generator().manual_seed(0)).expand(*layout.sizes.shape, -1)
    rounded = values * torch.linspace(1, 3, layout.sizes.numel()).view_as(layout.sizes).unsqueeze(-1)
    assert (find_pairs(rounded, layout).alike < 1).any()
    assert torch.equal(join_alike(rounded, layout, 1.0), join_alike(rounded, layout, 0.5))


def test_what_all_tokens_of_an_image_share_makes_them_no_more_alike():
    layout = represent(torch.arange(20).view(1, -1), 20, prefix=0)
    values = torch.randn(1, 20, 6, generator=torch.Generator().manual_seed(0))
    values[..., 0] = 0
    shared = values + 15 * torch.eye(6)[0]
    assert torch.cosine_similarity(shared[0, :, None], shared[0, None], dim=-1).min() > 0.9
    # Of small angles, 1 - cosine is half of the square.
    squares = torch.cdist(values[0, 1::2], values[0, 0::2]).square()
    pairs = find_pairs(shared, layout)
    torch.testing.assert_close(pairs.alike[0], 1 - squares.amin(dim=1) / squares.mean(), atol=0.05, rtol=0)
    assert pairs.others[0].tolist() == (2 * squares.argmin(dim=1)).tolist()


def test_of_tokens_that_are_equally_alike_but_for_rounding_the_first_is_taken():
    layout = represent(torch.arange(200).view(1, -1), 200, prefix=0)
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).expand(1, 200, 8)
    for seed in range(3):
        noise = 1e-4 * torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(seed))
        pairs = find_pairs(values + noise, layout)
        assert not pairs.others.any()
        torch.testing.assert_close(pairs.alike, torch.ones(1, 100), atol=1e-4, rtol=0)


def test_in_a_long_image_a_token_far_down_is_chosen_if_it_is_more_alike():
    values = torch.zeros(1, 1000, 2)
    values[:, 1::2, 0] = values[:, 0::2, 1] = 1
    for place, cosine in ((0, 0.5), (450, 0.53)):
        values[0, 2 * place] = torch.tensor((cosine, math.sqrt(1 - cosine**2)))
    pairs = find_pairs(values, represent(torch.arange(1000).view(1, -1), 1000, prefix=0))
    assert pairs.others.unique().tolist() == [900]
    torch.testing.assert_close(pairs.alike, 1 - torch.full((1, 500), 0.47 / (1 - 1.03 / 500)))


def test_the_only_two_tokens_of_an_image_are_not_alike():
    """They differ as much as two of the image do on average."""
    values = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    assert find_pairs(values, represent(torch.tensor([[0, 1]]), 2)).alike.item() == pytest.approx(0, abs=1e-4)


def test_images_of_one_length_have_the_pairs_that_they_have_without_padding_behind_each():
    words = torch.arange(6).expand(2, -1)
    tight, wide = group(words, 0, packed=True), group(words, 0, packed=False)
    values = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(values, (0, 0, 0, 1))
    assert tight.even and wide.sizes.shape == (2, 7) and not wide.even
    found, expected = find_pairs(padded, wide), find_pairs(values.view(1, 12, 4), tight)
    torch.testing.assert_close(found.alike, expected.alike)
    assert torch.equal(found.others[1] - 7, expected.others[1] - 6)


def test_images_with_padding_may_differ_in_how_many_of_a_share_are_joined():
    real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert number_to_join(represent(torch.arange(6).expand(2, -1), 6, real=real), 0.5) is None


def test_a_token_that_stands_for_no_patch_is_no_more_alike_than_one_of_a_single_patch():
    token_of_patch = torch.arange(6).view(1, -1)
    values = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[True] * 5 + [False]])
    assert represent(token_of_patch, 6, real=real).sizes[0, -1] == 0
    found, expected = (find_pairs(values, represent(token_of_patch, 6, real=one)).alike for one in (real, None))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("share", "numbers"), [(0, (0, 0, 0)), (0.3, (2, 1, 0)), (0.5, (3, 2, 0))])
def test_of_a_share_those_are_joined_that_are_most_alike_in_each_image(packed, share, numbers):
    layout = group(WORDS, PREFIX, packed)
    assert number_to_join(layout, share) is None
    values = torch.randn(*layout.sizes.shape, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.arange(layout.sizes.numel())
    for image, (count, number) in enumerate(zip(COUNTS, numbers, strict=True)):
        pairs = sorted(by_loops(values, layout, image, count), reverse=True)
        for _, row, other in pairs[:number]:
            expected[row] = other
    assert torch.equal(join_share(values, layout, share).flatten(), expected)


def test_images_of_as_many_tokens_have_as_many_when_a_share_of_them_is_joined():
    """And the same ones as where images differ in their number."""
    token_of_patch = torch.tensor([[0, 1, 2, 3, 4, 4, 4], [0, 0, 1, 2, 2, 3, 4]])
    even, padded = represent(token_of_patch, 5, PREFIX), group(token_of_patch, PREFIX, packed=False)
    sources = torch.arange(even.sizes.numel()).view_as(even.sizes)
    values = torch.randn(*even.sizes.shape, 3, generator=torch.Generator().manual_seed(0))
    number = number_to_join(even, 0.4)
    plan = Grouped(even, True, (1, 7), sources)
    after = plan.joined(join_share(values, even, 0.4), number)
    assert number == 2 and after.shape == (2, PREFIX + 3) and after.layout.runs == ((PREFIX + 3, 2),)
    assert padded.sizes.shape[1] == PREFIX + 5  # so values are of the same tokens
    plan = Grouped(padded, True, (1, 7), sources)
    wide = plan.joined(join_share(values, padded, 0.4))
    # In another order: here that of the tokens that stay, there that of the first patches.
    for one, other in zip(wide.layout.rows, after.layout.rows, strict=True):
        assert torch.equal(one.unsqueeze(0) == one.unsqueeze(1), other.unsqueeze(0) == other.unsqueeze(1))
    assert torch.equal(wide.sources.flatten()[wide.layout.rows], after.sources.flatten()[after.layout.rows])


@pytest.mark.parametrize("real", [None, torch.ones(2, 6, dtype=torch.bool)], ids=["whole", "with-padding"])
def test_the_first_patch_may_be_part_of_another_token_than_the_first(real):
    """As in plans that a caller's words tell."""
    layout = represent(torch.tensor([[2, 0, 1, 3, 2, 1], [1, 0, 2, 3, 3, 3]]), 4, prefix=0, real=real)
    assert [bound.tolist() for bound in layout.bounds] == [[0, 4], [4, 8]]
    values = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    pairs = find_pairs(values, layout)
    assert pairs.tokens.tolist() == [[1, 3], [5, 7]] and set(pairs.others.flatten().tolist()) <= {0, 2, 4, 6}
    into = torch.tensor([[0, 0, 2, 2], [4, 5, 6, 7]])
    plan = Grouped(layout, True, (1, 6), torch.arange(8).view(2, 4))
    after = plan.joined(into)
    first, second = (rows - rows.min() for rows in after.layout.rows)
    assert first.tolist() == [1, 0, 0, 1, 1, 0] and second.tolist() == [1, 0, 2, 3, 3, 3]


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
    after = plan.joined(into.view_as(layout.sizes), not_as={plan.shape})
    assert after.layout.tokens == layout.tokens - 1 and after.shape != plan.shape
    values = torch.randn(*layout.sizes.shape, 5, generator=torch.Generator().manual_seed(0))
    values[layout.sizes == 0] = torch.nan  # no token is told by what padding holds
    found = join(values, layout, after.layout)
    assert not found[after.layout.sizes == 0].any()
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
