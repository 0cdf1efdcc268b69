"""The patches of a batch, and the plans that methods make of them."""

from __future__ import annotations

import pytest
import torch

from vwt_hf.patches import Patches
from vwt_hf.plans import Grouped, Kept

SHAPES = torch.tensor([[2, 3], [1, 2]])
KEPT = torch.tensor([[0, 2, 4]])


def whole() -> Patches:
    """Two images of 2 × 3 patches of 2 × 2 pixels."""
    return Patches(torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0)), (2, 2), 1, (2, 3))


def padded() -> Patches:
    """The same patches, in the order of an image processor that pads; of the second image two are real."""
    cut = whole().pixel_values.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3)
    return Patches.of_padded(cut.flatten(1, 2), (2, 2), SHAPES)


def test_patches_have_values_in_the_order_of_words_however_images_come():
    assert torch.equal(whole().pixels_as_words(), padded().pixels_as_words())
    first = whole().pixel_values[0, :, :2, 2:4].flatten()
    assert torch.equal(whole().pixels_as_words()[0, 1], first)
    assert whole().count == padded().count == 6


def test_places_are_rows_and_columns_of_each_images_own_grid():
    places = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert whole().places.tolist() == [places]
    assert padded().places[0].tolist() == places and padded().places[1, :2].tolist() == places[:2]
    assert padded().real.tolist() == [[True] * 6, [True, True] + [False] * 4]


def test_keeping_is_a_plan_of_the_kept_patches():
    plan = whole().keep(KEPT)
    assert isinstance(plan, Kept) and plan.prefix == 1 and torch.equal(plan.kept, KEPT)


@pytest.mark.parametrize("how", ["keep", "represent"])
def test_tokens_of_padding_count_nowhere(how):
    patches = padded()
    if how == "keep":
        plan, sizes = patches.keep(KEPT), [[1, 1, 1], [1, 0, 0]]
    else:
        nearest = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
        plan, sizes = patches.represent(nearest, KEPT, None, False), [[2, 2, 2], [2, 0, 0]]
    assert isinstance(plan, Grouped) and plan.stays.tolist() == [[True, True, True], [True, False, False]]
    assert plan.layout.sizes.tolist() == sizes
    assert plan.key_bias.tolist() == [[0, 0, 0], [0, -torch.inf, -torch.inf]]
    assert torch.equal(plan.reduce(torch.arange(12.0).view(2, 6, 1))[..., 0], torch.tensor([[0.0, 2, 4], [6, 0, 0]]))


def test_some_that_are_kept_may_not_stay():
    stays = torch.tensor([[True, False, True], [True, True, True]])
    plan = padded().keep(KEPT, stays)
    assert plan.stays.tolist() == [[True, True, False], [True, False, False]]
    values = torch.arange(12.0).view(2, 6, 1)
    first = [row[:number] for row, number in zip(plan.reduce(values)[..., 0].tolist(), (2, 1), strict=True)]
    kept = KEPT.tolist()
    assert first == [[kept[0][0], kept[0][2]], [6 + kept[-1][0]]]  # what stays comes first, in its order


@pytest.mark.parametrize(("tokens", "width"), [(None, 3), (4, 4), (1, 3)])
def test_words_of_padded_images_make_as_many_tokens_as_are_asked_for_or_the_longest_has(tokens, width):
    own, stays = torch.arange(6), torch.tensor([[True, False, True, False, True, False]])
    kept = padded().kept_by(torch.where(stays, own, -1).expand(2, -1), tokens)
    led = padded().represented_by(own.div(2, rounding_mode="floor").mul(2).expand(2, -1), 1.0, tokens)
    for plan in (kept, led):
        assert plan.stays.shape == (2, width) and plan.stays.sum(dim=1).tolist() == [3, 1]


def test_words_are_repeated_where_images_come_oftener_and_tiles_that_are_none_have_none():
    own = torch.arange(6).view(1, 6)
    with_padding = torch.stack((own, torch.full_like(own, -1)), dim=1)
    for words in (own, with_padding):
        assert torch.equal(whole().of_words(words, 2), own.expand(2, -1))
    two = torch.cat((own, own.clamp(max=3)))
    assert torch.equal(whole().of_words(two, 2), two)


@pytest.mark.parametrize("packed", [True, False])
def test_groups_are_means_of_real_patches(packed):
    plan = padded().group(torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), packed, True)
    values = torch.arange(12.0).view(2, 6, 1)
    found = plan.expand(plan.reduce(values))[..., 0]
    assert found[0].tolist() == [0.5, 0.5, 2.5, 2.5, 4.5, 4.5] and found[1, :2].tolist() == [6.5, 6.5]
    assert sorted(plan.layout.sizes[plan.layout.sizes > 0].tolist()) == [2, 2, 2, 2]
    assert plan.layout.runs == ((1, 1), (3, 1))  # padding makes no tokens


@pytest.mark.parametrize("packed", [True, False])
def test_padding_leads_no_token_and_stands_for_none(packed):
    plan = padded().lead(torch.tensor([[0, 0, 2, 2, 4, 4], [1, 1, 2, 3, 4, 5]]), packed, 1.0)
    assert plan.layout.runs == ((1, 1), (3, 1))
    found = plan.expand(plan.reduce(torch.arange(12.0).view(2, 6, 1)))[..., 0]
    assert found[0].tolist() == [0, 0, 2, 2, 4, 4] and found[1, :2].tolist() == [7, 7]


def test_a_leader_that_is_padding_or_does_not_stand_for_itself_is_refused():
    words = torch.tensor([[1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
    with pytest.raises(ValueError, match="give patch 0 of image 0 the word 1; expected the index of one that has its"):
        padded().led_by(words, True, 1.0)
    with pytest.raises(ValueError, match="give patch 0 of image 1 the word 4; expected the index of one that has its"):
        padded().led_by(torch.tensor([[0, 1, 2, 3, 4, 5], [4, 1, 2, 3, 4, 5]]), True, 1.0)  # of padding


def test_of_whole_images_words_keep_some_patches_and_of_no_images_none_need_to():
    with pytest.raises(ValueError, match="keep 0 to 0 patches of an image; expected the same number of each"):
        whole().kept_by(torch.full((2, 6), -1))
    none = Patches(torch.zeros(0, 3, 4, 6), (2, 2), 1, (2, 3))
    assert none.kept_by(torch.zeros(0, 6, dtype=torch.int64)).kept.shape == (0, 0)
