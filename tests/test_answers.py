"""An answer is a row of finite values for each image, and labels are found by number."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from tiny import TINY, sample_pixel_values, tiny_model
from vwt_hf import compress
from vwt_hf.answers import answer, are_finite, classifies, label_ids, require_finite, require_labels, true_labels


def test_an_answer_that_is_not_finite_is_refused_with_its_image():
    answers = torch.tensor([[1.0, 2.0], [0.0, math.inf], [math.nan, 0.0]])
    assert are_finite(answers) == [True, False, False]
    model = tiny_model("vit")
    require_finite(model, [True], ["a.png"])
    with pytest.raises(ValueError, match=r"the plain model, in float32, answers b\.png by NaN or infinity; expected"):
        require_finite(model, are_finite(answers), ["a.png", "b.png", "c.png"])
    with pytest.raises(ValueError, match=r"the model shortened by VWTConfig\(method='coarse'"):
        require_finite(compress(model, {"method": "coarse", "image_std": [0.5] * 3}), [False], ["a.png"])


class Maps(torch.nn.Module):
    """Gives a map for each image, as convolutions do."""

    def forward(self, pixel_values):
        return SimpleNamespace(last_hidden_state=pixel_values)


def test_an_answer_that_is_no_row_for_each_image_is_refused(pixel_values):
    """A segmenter's cosine would be that of rows of pixels."""
    segmenter = transformers.BeitForSemanticSegmentation(
        transformers.BeitConfig(**TINY | {"num_hidden_layers": 4}, num_labels=2, out_indices=[1, 2, 3, 4])
    )
    stages = {"out_features": ["stage1"], "reshape_hidden_states": False}
    backbone = transformers.Dinov2Backbone(transformers.Dinov2Config(**TINY, **stages))
    for model, given in (
        (segmenter.eval(), r"\(3, 2, \d+, \d+\)"),
        (backbone.eval(), "a BackboneOutput"),
        (Maps(), r"\(3, 3, \d+, \d+\)"),
    ):
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


@pytest.mark.parametrize("name", ["clip", "vit"])
def test_what_a_model_says_of_an_image_is_not_taken_for_want_of_a_text(name, pixel_values):
    with pytest.raises(ValueError, match=r"^Input image size"):
        answer(tiny_model(name), pixel_values=pixel_values[:, :, :16])


def test_labels_of_which_an_image_has_several_are_refused_where_the_first_is_compared():
    model = tiny_model("vit-classifier")
    model.config.problem_type = "multi_label_classification"
    require_labels(model, several=True)
    with pytest.raises(ValueError, match="it gives each image any number of labels"):
        require_labels(model)


def test_a_class_of_ones_own_classifies_as_the_one_it_is_made_from():
    class Mine(transformers.ViTForImageClassification):
        pass

    assert classifies(Mine(tiny_model("vit").config)) and not classifies(tiny_model("vit"))


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
    truth, said = true_labels([None, "dog", None, "holiday"], cranes)
    assert truth == [set(), {1}, set(), set()]
    assert said == [
        "2 of 4 images have no label: top-1 is of the others.",
        "1 of 4 images have a label that is none of the model's: top-1 is of the others.",
    ]
    unnamed = labels({0: "", 1: "dog"}, {"": 0, "dog": 1})
    assert true_labels([None, ""], unnamed)[0] == [set(), {0}]
    _, said = true_labels(["cat"], labels({0: "cat", 1: "dog"}, {"cat": 1, "dog": 0}))
    assert said == ["'cat' is label 1 by label2id; id2label, which says otherwise, is trusted."]
    assert true_labels(["holiday"] * 2, cranes) == ([set(), set()], [])
    beyond = labels({0: "cat"}, {"cat": 0, "unknown": -1, "dog": "last"})
    truth, said = true_labels(["cat", "unknown", "dog"], beyond)
    assert truth == [{1}, set(), set()] and said == [said[0]] and said[0].startswith("2 of 3 images have a label")


def test_labels_are_found_however_their_accents_are_written():
    """As macOS and most others write them: parted from their letters, and within these."""
    parted, within = "ka\u0308tzchen", "k\u00e4tzchen"
    assert parted != within
    for name, other in ((parted, within), (within, parted)):
        config = SimpleNamespace(id2label={0: name, 1: "hund"}, label2id={other: 0, "hund": 1})
        assert label_ids(config) == {within: {0}, "hund": {1}}
        assert true_labels([other, "hund", None], config) == (
            [{0}, {1}, set()],
            ["1 of 3 images have no label: top-1 is of the others."],
        )
