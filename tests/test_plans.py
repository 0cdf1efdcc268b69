"""Plans: what becomes of anything that has one row a patch, against loops that say what is meant."""

from __future__ import annotations

import pytest
import torch

from vwt_hf.layout import group, lead, represent
from vwt_hf.plans import Grouped, Kept, with_prefix

PREFIX = 2
KEPT = torch.tensor([[0, 2, 5], [1, 2, 3]])
WORDS = torch.tensor([[4, 2, 4, 7, 2, 2], [3, 3, 3, 3, 3, 3]])
NEAREST = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]])


def tokens() -> torch.Tensor:
    return torch.randn(2, PREFIX + 6, 4, generator=torch.Generator().manual_seed(0))


def grouped(packed: bool) -> Grouped:
    layout = group(WORDS, PREFIX, packed)
    return Grouped(layout, True, (2, 3))


def represented() -> Grouped:
    layout = represent(NEAREST, 3, PREFIX)
    first_rows = torch.arange(2).unsqueeze(1) * (PREFIX + 6)
    return Grouped(layout, True, (2, 3), with_prefix(KEPT, PREFIX) + first_rows)


@pytest.mark.parametrize("kept", [KEPT, KEPT[:1]], ids=["of each image", "of all images"])
def test_patches_that_stay_are_as_they_were_behind_the_prefix(kept):
    plan, whole = Kept(kept, PREFIX), tokens()
    short = plan.reduce(whole)
    for image in range(2):
        rows = [0, 1, *(PREFIX + patch for patch in kept[image % len(kept)].tolist())]
        assert torch.equal(short[image], whole[image, rows])
    assert plan.expand(short) is short
    assert with_prefix(kept, PREFIX).shape == (len(kept), PREFIX + 3)


@pytest.mark.parametrize("kept", [KEPT, KEPT[:1]], ids=["of each image", "of all images"])
def test_rotations_and_biases_are_those_of_the_patches_that_stay(kept):
    plan = Kept(kept, PREFIX)
    cosine, sine = torch.randn(2, 6, 4)
    values = torch.randn(1, 3, PREFIX + 6, PREFIX + 6)
    for whole, found in zip((cosine, sine), plan.rotate((cosine, sine)), strict=True):
        for image in range(len(kept)):
            assert torch.equal(found.reshape(len(kept), 3, 4)[image], whole[kept[image]])
    found = plan.bias(values)
    for image in range(len(kept)):
        rows = [0, 1, *(PREFIX + kept[image]).tolist()]
        assert torch.equal(found[image], values[0][:, rows][:, :, rows])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_tokens_of_groups_are_means_and_every_patch_gets_its_tokens_state_back(packed):
    plan, whole = grouped(packed), tokens()
    short = plan.reduce(whole)
    assert short.shape[:2] == plan.shape
    full = plan.expand(short)
    for image in range(2):
        assert torch.equal(full[image, :PREFIX], whole[image, :PREFIX])
        for patch in range(6):
            alike = whole[image, PREFIX:][WORDS[image] == WORDS[image, patch]]
            torch.testing.assert_close(full[image, PREFIX + patch], alike.mean(0))


def test_padding_behind_representatives_is_zero_whatever_the_first_image_shows():
    """A mask hides no NaN."""
    leaders = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]])
    layout, sources = lead(leaders, PREFIX, packed=False)
    whole = tokens()
    whole[0, 0] = torch.nan
    short = Grouped(layout, True, (2, 3), sources).reduce(whole)
    assert torch.equal(short[1, : PREFIX + 1], whole[1, : PREFIX + 1])
    assert layout.sizes[1, PREFIX + 1 :].eq(0).all() and short[1, PREFIX + 1 :].eq(0).all()
    assert short.shape[1] > PREFIX + 6  # so that its shape is not that of whole images


def test_representatives_are_as_they_were_and_stand_for_those_that_chose_them():
    plan, whole = represented(), tokens()
    short = plan.reduce(whole)
    assert torch.equal(short, Kept(KEPT, PREFIX).reduce(whole))
    full = plan.expand(short)
    for image in range(2):
        for patch in range(6):
            assert torch.equal(full[image, PREFIX + patch], whole[image, PREFIX + KEPT[image, NEAREST[image, patch]]])
    rotations = tuple(torch.randn(2, 6, 4))
    for found, expected in zip(plan.rotate(rotations), Kept(KEPT, PREFIX).rotate(rotations), strict=True):
        assert torch.equal(found[:, :, PREFIX:], expected)
    cosine, sine = plan.rotate(rotations)
    assert (cosine[:, :, :PREFIX] == 1).all() and (sine[:, :, :PREFIX] == 0).all()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_mean_is_rotated_as_one_of_its_patches_and_prefix_tokens_are_not(packed):
    plan = grouped(packed)
    cosine, sine = (part.unsqueeze(1).expand(-1, 4) for part in (torch.arange(1.0, 7), torch.arange(11.0, 17)))
    turned, by = plan.rotate((cosine, sine))
    assert turned.shape == (*plan.shape[:1], 1, plan.shape[1], 4)
    for image in range(2):
        rows = plan.layout.rows[image]
        assert (turned.flatten(0, 2)[rows[:PREFIX]] == 1).all() and (by.flatten(0, 2)[rows[:PREFIX]] == 0).all()
        for patch in range(6):
            patches = (WORDS[image] == WORDS[image, patch]).nonzero().flatten()
            assert turned.flatten(0, 2)[rows[PREFIX + patch], 0].item() - 1 in patches.tolist()
