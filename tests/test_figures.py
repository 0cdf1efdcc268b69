"""Each figure has one definition, checked against figures worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from vwt_hf import figures
from vwt_hf.answers import true_labels
from vwt_hf.figures import (
    accuracy,
    agreement,
    are_right,
    cosines,
    divergence,
    first_answers,
    mean_interval,
    ranks,
    share_interval,
    token_f1,
    worst_group,
    worst_group_interval,
)


def test_agreement_and_divergence_are_those_worked_out_by_hand():
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 0.0], [0.0, 2.0]])
    assert agreement(logits, expected) == pytest.approx(2 / 3)
    # One image of (1/2, 1/2) against (1/4, 3/4): KL = log(4/3) / 2.
    assert divergence(logits, expected) == pytest.approx(math.log(4 / 3) / 2 / 3, rel=1e-6)
    assert are_right(first_answers(logits).tolist(), [{1}, (), {0}]) == [True, None, False]
    assert are_right(first_answers(logits).tolist(), [(), {0, 1}, ()]) == [None, True, None]
    assert accuracy([True, None, False]) == 0.5 and accuracy([None, True]) == 1 and accuracy([None]) is None
    assert cosines(expected[1:], logits[1:] * 2).tolist() == pytest.approx([1, 1])


def test_one_logit_is_no_and_yes_by_the_sigmoid():
    expected, logits = torch.tensor([[0.0], [1.0], [-2.0]]), torch.tensor([[math.log(3)], [1.0], [-2.0]])
    assert first_answers(logits).tolist() == [1, 1, 0] and first_answers(expected).tolist() == [0, 1, 0]
    assert agreement(logits, expected) == pytest.approx(2 / 3)
    # One image of (1/2, 1/2) against (1/4, 3/4), as for two labels above.
    assert divergence(logits, expected) == pytest.approx(math.log(4 / 3) / 2 / 3, rel=1e-6)
    truth, said = true_labels(
        ["hot dog", "hot dog", "tea"], SimpleNamespace(id2label={0: "hot dog"}, label2id={"hot dog": 0})
    )
    assert truth == [{1}, {1}, set()] and are_right(first_answers(logits).tolist(), truth) == [True, True, None]
    assert said == ["1 of 3 images have a label that is none of the model's: top-1 is of the others."]


def test_intervals_do_not_depend_on_torchs_defaults():
    right, groups = [True] * 9 + [False] * 6, ["a"] * 7 + ["b"] * 8

    def found_now():
        found = torch.tensor(right, dtype=torch.float32, device="cpu")
        return mean_interval(found, 0), worst_group_interval(right, groups), figures.share_alike(right, groups)

    expected = found_now()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert found_now() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_intervals_are_those_worked_out_by_hand():
    # Wilson's interval of 196 of 200, and its closed forms at the ends.
    assert share_interval(0.98, 200) == pytest.approx((0.949722, 0.992193), abs=1e-5)
    assert share_interval(1.0, 50) == pytest.approx((50 / (50 + 1.959964**2), 1), abs=1e-6)
    assert share_interval(0.0, 50) == pytest.approx((0, 1 - 50 / (50 + 1.959964**2)), abs=1e-6)
    for count in range(1, 200):
        for share in (0, 1 / count, 1):
            low, high = share_interval(share, count)
            assert 0 <= low <= share <= high <= 1
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = mean_interval(values, seed=0)
    half = 1.96 * values.std().item() / 20
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.015)
    assert mean_interval(values, seed=0) == (low, high) != mean_interval(values, seed=1)
    assert mean_interval(torch.full((9,), 0.5), seed=0) == (0.5, 0.5)


def test_resamples_are_the_same_however_many_are_held_at_once(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    expected = mean_interval(values, seed=3)
    monkeypatch.setattr(figures, "DRAWN_AT_ONCE", 730)
    assert mean_interval(values, seed=3) == expected


def test_the_interval_of_the_worst_of_many_groups_holds_it():
    correct = [True] + [False] * 4 + 99 * ([True] * 2 + [False] * 3)
    groups = [str(number) for number in range(100) for _ in range(5)]
    low, high = worst_group_interval(correct, groups)
    assert low < worst_group(correct, groups) == 0.2 < high  # groups drawn anew have one of none right nearly always
    assert (low, high) == pytest.approx((0.0051, 0.9148), abs=0.001)


def test_the_interval_of_the_worst_group_holds_it_19_times_of_20():
    generator = torch.Generator().manual_seed(0)
    for groups, size in ((5, 100), (40, 10), (100, 20)):
        names = [str(number) for number in range(groups) for _ in range(size)]
        held = by_one_group = 0
        for _ in range(100):
            correct = (torch.rand(groups * size, generator=generator) < 0.9).tolist()
            low, high = worst_group_interval(correct, names)
            held += low <= 0.9 <= high
            assert low <= worst_group(correct, names) <= high
            low, high = share_interval(worst_group(correct, names), size)
            by_one_group += low <= 0.9 <= high
        # Of one that holds it in 95 % there are fewer than 90 in one of 50 runs.
        assert held >= 90 > 80 > by_one_group


@pytest.mark.parametrize(("right", "count"), [(0, 6), (1, 5), (40, 100), (299, 300), (6, 6), (7, 4000)])
def test_ends_of_intervals_are_scipys(right, count):
    stats = pytest.importorskip("scipy.stats")
    for chance in (0.025, 0.025 / 101):
        expected = stats.beta.ppf(1 - chance, right + 1, count - right) if right < count else 1
        assert figures._highest_share(right, count, chance) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_the_worst_group_is_of_its_images():
    correct = [True] * 40 + [False] * 60 + [True] * 95 + [False] * 5
    groups = ["poor"] * 100 + ["good"] * 100
    low, high = worst_group_interval(correct, groups)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 100)
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.025)
    # By hand: of six alike, the share whose sixth power is a chance of 0.025, of 0.0125 for each of two groups.
    low, high = worst_group_interval([False] * 6 + [True] * 9, ["a"] * 6 + ["b"] * 9)
    assert (low, high) == (0, pytest.approx(1 - 0.0125 ** (1 / 6)))
    low, high = worst_group_interval([True] * 15, ["a"] * 6 + ["b"] * 9)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 6)), 1)
    of_none = [False] * 9, [None] * 9
    assert worst_group_interval([True] * 15 + of_none[0], ["a"] * 6 + ["b"] * 9 + of_none[1]) == (low, high)
    with pytest.raises(ValueError, match="no group has 5 images"):
        worst_group_interval([True] * 4, ["a"] * 4)


def test_cosines_are_those_of_full_precision():
    features, expected = torch.rand(2, 5, 400, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(cosines(features, expected), cosines(features.float(), expected.float()))


def test_articles_do_not_count_as_words():
    assert token_f1("The cat ate an apple, a pear", ["cat ate apple pear"]) == 1


def test_wrong_candidates_that_are_as_near_as_the_right_one_stand_before_it():
    similarity = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    right = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    assert ranks(similarity, right).tolist() == [0, 2, 1]


def test_the_worst_group_is_the_one_with_the_lowest_accuracy_among_those_of_five_images_and_more():
    correct = [True] * 5 + [True, True, True, False, False] + [False] * 4 + [None] * 9
    groups = ["good"] * 5 + ["poor"] * 5 + ["few"] * 4 + ["few"] * 4 + ["unknown"] * 5
    assert worst_group(correct, groups) == 0.6
    assert worst_group([*correct, False], [*groups, "few"]) == 0
    assert worst_group([*correct, *[False] * 5], [*groups, *[None] * 5]) == 0.6
    assert worst_group(correct[:5], ["a", "a", "a", "a", "b"]) is None and worst_group([], []) is None
