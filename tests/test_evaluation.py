"""Each figure has one definition, checked against figures worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate.utils import compile_regions

import vwt_hf
from settings import SETTINGS, gradual, inter
from test_families import sample_images
from tiny import MODELS, TINY, answers, padded_patches, sample_pixel_values, tiny_model
from vwt_hf import compress, evaluation
from vwt_hf.evaluation import (
    accuracy,
    agreement,
    answer,
    are_finite,
    are_right,
    classifies,
    copy_sharing_weights,
    cosines,
    count_flops,
    divergence,
    first_answers,
    label_ids,
    mean_interval,
    ranks,
    require_finite,
    share_interval,
    time_in_turn,
    true_labels,
    worst_group,
    worst_group_interval,
)

CPU = torch.device("cpu")
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 4, "clip": 1, "beit": 1, "ijepa": 0, "siglip": 0, "dinov3": 4}


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
    truth, said = true_labels(["hot dog", "hot dog", "tea"], labels({0: "hot dog"}, {"hot dog": 0}))
    assert truth == [{1}, {1}, set()] and are_right(first_answers(logits).tolist(), truth) == [True, True, None]
    assert said == ["1 of 3 images have a label that is none of the model's: top-1 is of the others."]


def test_an_answer_that_is_not_finite_is_refused_with_its_image():
    answers = torch.tensor([[1.0, 2.0], [0.0, math.inf], [math.nan, 0.0]])
    assert are_finite(answers) == [True, False, False]
    model = tiny_model("vit")
    require_finite(model, [True], ["a.png"])
    with pytest.raises(ValueError, match=r"the plain model, in float32, answers b\.png by NaN or infinity; expected"):
        require_finite(model, are_finite(answers), ["a.png", "b.png", "c.png"])
    with pytest.raises(ValueError, match=r"the model shortened by VWTConfig\(method='coarse'"):
        require_finite(compress(model, {"method": "coarse", "image_std": [0.5] * 3}), [False], ["a.png"])


def test_intervals_do_not_depend_on_torchs_defaults():
    right, groups = [True] * 9 + [False] * 6, ["a"] * 7 + ["b"] * 8

    def figures():
        found = torch.tensor(right, dtype=torch.float32, device="cpu")
        return mean_interval(found, 0), worst_group_interval(right, groups), evaluation.share_alike(right, groups)

    expected = figures()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert figures() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_intervals_are_those_worked_out_by_hand():
    # Wilson's interval of 196 of 200, and its closed forms at the ends.
    assert share_interval(0.98, 200) == pytest.approx((0.949722, 0.992193), abs=1e-5)
    assert share_interval(1.0, 50) == pytest.approx((50 / (50 + 1.959964**2), 1), abs=1e-6)
    assert share_interval(0.0, 50) == pytest.approx((0, 1 - 50 / (50 + 1.959964**2)), abs=1e-6)
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    low, high = mean_interval(values, seed=0)
    half = 1.96 * values.std().item() / 20
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.015)
    assert mean_interval(values, seed=0) == (low, high) != mean_interval(values, seed=1)
    assert mean_interval(torch.full((9,), 0.5), seed=0) == (0.5, 0.5)


def test_resamples_are_the_same_however_many_are_held_at_once(monkeypatch):
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    expected = mean_interval(values, seed=3)
    monkeypatch.setattr(evaluation, "DRAWN_AT_ONCE", 730)
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
        assert evaluation._highest_share(right, count, chance) == pytest.approx(expected, abs=1e-9)


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
    with pytest.raises(ValueError, match="no group has 5 images"):
        worst_group_interval([True] * 4, ["a"] * 4)


def test_wrong_candidates_that_are_as_near_as_the_right_one_stand_before_it():
    similarity = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    right = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    assert ranks(similarity, right).tolist() == [0, 2, 1]


def test_operations_of_a_product_are_two_for_each_pair_of_factors():
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    assert count_flops(lambda: left @ right) == 2 * 3 * 4 * 5


def test_a_stopwatch_gives_what_was_made_and_its_seconds(monkeypatch):
    clock = iter([5.0, 7.5])
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    assert evaluation.stopwatch(lambda: "made", CPU) == ("made", 2.5)


def test_an_answer_that_is_no_row_for_each_image_is_refused(pixel_values):
    """A segmenter's cosine would be that of rows of pixels."""
    segmenter = transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(**TINY | {"num_hidden_layers": 4}, num_labels=2, out_indices=[1, 2, 3, 4])
    )
    stages = {"out_features": ["stage1"], "reshape_hidden_states": False}
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(**TINY, **stages))
    for model, given in ((segmenter.eval(), r"\(3, 2, \d+, \d+\)"), (backbone.eval(), "a BackboneOutput")):
        with pytest.raises(ValueError, match=rf"{type(model).__name__} gives {given} .*expected a row of values"):
            answer(model, pixel_values=pixel_values)


def test_an_answer_is_the_logits_the_embedding_or_the_pooled_output():
    images = sample_pixel_values()
    classifier, clip, vit, ijepa = (tiny_model(name) for name in ("vit-classifier", "clip", "vit", "ijepa"))
    assert torch.equal(answer(classifier, pixel_values=images), classifier(images).logits)
    assert torch.equal(answer(clip, pixel_values=images), clip.visual_projection(clip.vision_model(images)[1]))
    assert torch.equal(answer(vit, pixel_values=images), vit(images).pooler_output)
    vit.pooler = None
    assert torch.equal(answer(vit, pixel_values=images), vit(images).last_hidden_state[:, 0])
    assert torch.equal(answer(ijepa, pixel_values=images), ijepa(images).last_hidden_state.mean(1))


def test_the_worst_group_is_the_one_with_the_lowest_accuracy_among_those_of_five_images_and_more():
    correct = [True] * 5 + [True, True, True, False, False] + [False] * 4 + [None] * 9
    groups = ["good"] * 5 + ["poor"] * 5 + ["few"] * 4 + ["few"] * 4 + ["unknown"] * 5
    assert worst_group(correct, groups) == 0.6
    assert worst_group([*correct, False], [*groups, "few"]) == 0
    assert worst_group(correct[:5], ["a", "a", "a", "a", "b"]) is None and worst_group([], []) is None


def test_a_class_of_ones_own_classifies_as_the_one_it_is_made_from():
    class Mine(transformers.ViTForImageClassification):
        pass

    assert classifies(Mine(tiny_model("vit").config)) and not classifies(tiny_model("vit"))


@pytest.mark.parametrize("name", PREFIX)
def test_tokens_of_a_plain_and_a_compressed_model_are_counted(name):
    model = tiny_model(name)
    for setting, tokens in ((None, 64), ({"keep_ratio": 0.5}, 32), (SETTINGS["merge"], 32)):
        if setting is not None:
            compress(model, setting)
        with vwt_hf.count_tokens(model) as count:
            answers(model, sample_pixel_values())
            answers(model, sample_pixel_values(batch=2))
        assert (count.images, count.mean) == (5, PREFIX[name] + tokens)
    assert not any(hook for module in vwt_hf.restore(model).modules() for hook in module._forward_hooks)


@pytest.mark.parametrize("name", sorted({*MODELS} - {"siglip2"}))
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_padding_is_left_out_and_a_batch_has_the_tokens_of_its_images(name, layout):
    model = compress(tiny_model(name), inter(layout=layout))
    images = sample_pixel_values()
    images[1] = 1.0
    with vwt_hf.count_tokens(model) as batch:
        answers(model, images)
    with vwt_hf.count_tokens(model) as alone:
        for image in images:
            answers(model, image[None])
    assert (batch.tokens, batch.images) == (alone.tokens, 3) and batch.mean < 60


@pytest.mark.parametrize("setting", [None, {"keep_ratio": 1.0}, {"keep_ratio": 0.5}])
def test_patches_that_come_padded_count_without_their_padding(setting):
    images = torch.cat((sample_pixel_values(), torch.ones(1, 3, 32, 32)))
    given = padded_patches(images, 4)
    assert not given["pixel_attention_mask"].all()
    model = tiny_model("siglip2-vision")
    if setting is not None:
        compress(model, setting)
    with vwt_hf.count_tokens(model) as count:
        model(**given)
    real = given["pixel_attention_mask"].sum(1)
    expected = real if setting != {"keep_ratio": 0.5} else real // 2
    assert (count.tokens, count.images) == (int(expected.sum()), 4)


@pytest.mark.parametrize("compiled", ["by accelerate", "embeddings"])
@pytest.mark.parametrize("before", [True, False], ids=["before compress", "after it"])
@pytest.mark.parametrize("setting", [gradual(), SETTINGS["discard"]], ids=["gradual", "discard"])
def test_parts_that_are_compiled_alone_are_counted(setting, before, compiled):
    model = compress(tiny_model("vit", num_hidden_layers=3), setting)
    with vwt_hf.count_tokens(model) as expected:
        answers(model, sample_images())
    if before:
        vwt_hf.restore(model)
    if compiled == "by accelerate":
        model = compile_regions(model, backend="eager")
    else:
        model.embeddings = torch.compile(model.embeddings, backend="eager")
    if before:
        compress(model, setting)
    for _ in range(2):
        with vwt_hf.count_tokens(model) as count:
            answers(model, sample_images())
        assert (count.by_layer, count.images) == (expected.by_layer, 4)
    assert count.by_layer[0] < 65 * 4
    assert (count.by_layer[0] > count.by_layer[2]) == (setting.method == "gradual")


def test_a_mean_of_nothing_is_an_error_and_an_unsupported_model_is_refused():
    with vwt_hf.count_tokens(tiny_model("vit")) as count:
        pass
    with pytest.raises(ValueError, match="no tokens were counted"):
        _ = count.mean
    swin = transformers.SwinModel(transformers.SwinConfig(depths=[1], num_heads=[1], embed_dim=8))
    with pytest.raises(ValueError, match="Swin"), vwt_hf.count_tokens(swin):
        pass


def test_a_copy_shares_the_weights_and_takes_its_own_hooks():
    model = tiny_model("vit")
    copied = copy_sharing_weights(model)
    for own, of_copy in zip(model.parameters(), copied.parameters(), strict=True):
        assert own is of_copy
    compress(copied, {"keep_ratio": 0.5})
    assert model(pixel_values=sample_pixel_values()).last_hidden_state.shape[1] == 65
    assert copied(pixel_values=sample_pixel_values()).last_hidden_state.shape[1] == 33


def test_every_turn_runs_every_model_and_only_turns_after_the_warm_up_count():
    order = []
    runs = [lambda: order.append("plain"), lambda: order.append("short")]
    seconds = time_in_turn(runs, CPU, 3, warm_up=2)
    assert [len(own) for own in seconds] == [3, 3]
    assert order == ["plain", "short"] * (2 + 3)
    out_of_time = time_in_turn(runs, CPU, 50, seconds=0)
    assert [len(own) for own in out_of_time] == [evaluation.FEWEST_TURNS] * 2


def labels(id2label, label2id) -> SimpleNamespace:
    return SimpleNamespace(id2label=id2label, label2id=label2id)


def test_labels_are_found_by_number_whatever_their_table_looks_like():
    assert label_ids(labels({0: "crane", 1: "dog", 2: "crane"}, {"crane": 2, "dog": 1})) == {
        "crane": {0, 2},
        "dog": {1},
    }
    assert label_ids(labels({"0": "cat"}, {"cat": "0"})) == {"cat": {0}}
    assert label_ids(labels({0: "LABEL_0", 1: "LABEL_1"}, {"cat": "0", "dog": 1}))["dog"] == {1}
    assert label_ids(labels({0: "cat"}, {"cat": 0, "dog": "last"})) == {"cat": {0}}
    assert label_ids(labels(None, None)) == {}


def test_what_is_ambiguous_about_labels_is_said():
    cranes = labels({0: "crane", 1: "dog", 2: "crane"}, {"crane": 2, "dog": 1})
    assert true_labels(["dog", "dog"], cranes) == ([{1}, {1}], [])
    truth, said = true_labels(["crane", "dog", "holiday"], cranes)
    assert truth == [{0, 2}, {1}, set()]
    assert said == [
        "Labels 0, 2 are all called 'crane': each is right for it.",
        "1 of 3 images have a label that is none of the model's: top-1 is of the others.",
    ]
    _, said = true_labels(["cat"], labels({0: "cat", 1: "dog"}, {"cat": 1, "dog": 0}))
    assert said == ["'cat' is label 1 by label2id; id2label, which says otherwise, is trusted."]
    assert true_labels(["holiday"] * 2, cranes) == ([set(), set()], [])
    beyond = labels({0: "cat"}, {"cat": 0, "unknown": -1, "dog": "last"})
    truth, said = true_labels(["cat", "unknown", "dog"], beyond)
    assert truth == [{1}, set(), set()] and said == [said[0]] and said[0].startswith("2 of 3 images have a label")
