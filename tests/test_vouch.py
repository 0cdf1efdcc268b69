"""Model types without a row in the family table: what the general rule holds for runs, the others are refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

from settings import SETTINGS, inter
from tiny import TINY, sample_pixel_values, traces, watch_embeddings
from vwt_hf import VWTConfig, compress, restore
from vwt_hf.answers import named_answer
from vwt_hf.families import FAMILIES, HOLDERS, require_supported

BOTH = {"image_size": [32, 32], "patch_size": [4, 4]}
PREFIX = {
    "Pixio": 8,
    **dict.fromkeys(("InternVLVision", "Kosmos2Vision", "InstructBlipVision", "InstructBlipVideoVision"), 1),
}
"""Prefix tokens of what the rule holds for, by the names of their classes."""
rule = pytest.mark.parametrize("kind", list(PREFIX))
setting = pytest.mark.parametrize("fields", [*SETTINGS.values(), inter(layout="padded")], ids=[*SETTINGS, "padded"])


def made(kind: str, **fields) -> transformers.PreTrainedModel:
    model_class = Kosmos2VisionModel if kind == "Kosmos2Vision" else getattr(transformers, f"{kind}Model", None)
    if model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}Model")
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**TINY | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tiny(kind: str, **fields) -> transformers.PreTrainedModel:
    return made(kind, **(BOTH if kind == "InternVLVision" else {}), **fields)


def states(model, images) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=images).last_hidden_state


@pytest.fixture
def images() -> torch.Tensor:
    """White, noise and half flat."""
    pixel_values = sample_pixel_values()
    pixel_values[0] = 1.3
    pixel_values[2, :, :16] = 0.7
    return pixel_values


@rule
def test_a_model_type_of_these_tests_has_no_row(kind):
    model_type = tiny(kind).config.model_type
    assert model_type not in HOLDERS and not any(model_type in row.model_types for row in FAMILIES)


@setting
@rule
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_answers_as_its_images_do_alone_and_unlike_the_plain_model(kind, attention, fields, images):
    model = tiny(kind)
    model.set_attn_implementation(attention)
    plain = states(model, images)
    found = states(compress(model, fields), images)
    assert found.shape[1] == plain.shape[1] - (0 if fields.restores else 32)
    torch.testing.assert_close(found, torch.cat([states(model, i[None]) for i in images]), atol=1e-4, rtol=1e-4)
    assert found.shape != plain.shape or (found - plain).abs().max() > 1e-3


@rule
def test_tokens_are_the_embeddings_of_the_patches_that_stay(kind, images):
    model = tiny(kind)
    plain = watch_embeddings(model)
    states(model, images)
    short = watch_embeddings(compress(model, VWTConfig(criterion="grid", keep_ratio=0.25)))
    states(model, images)
    whole, prefix = plain[0][0], PREFIX[kind]
    assert whole.shape[1] == prefix + 64 and short[0][0].shape[1] == prefix + 16
    assert torch.equal(short[0][0][:, :prefix], whole[:, :prefix])
    for token in short[0][0][0, prefix:]:
        assert (whole[0, prefix:] == token).all(1).sum() == 1


@rule
def test_keeping_every_patch_is_the_plain_model(kind, images):
    model = tiny(kind)
    plain = states(model, images)
    assert torch.equal(states(compress(model, {"keep_ratio": 1.0}), images), plain)
    merged = states(compress(model, {"keep_ratio": 1.0, "dropped": "merge"}), images)
    torch.testing.assert_close(merged, plain, atol=1e-5, rtol=1e-5)


@setting
@rule
def test_a_saved_model_is_the_same_when_loaded_plain_where_asked_and_restored(kind, fields, images, tmp_path):
    model = tiny(kind)
    plain, before = states(model, images), traces(model)
    expected = states(compress(model, fields), images)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vwt"]["method"] == fields.method
    listed = type(model.config) in transformers.AutoModel._model_mapping
    for auto in (transformers.AutoModel, type(model)) if listed else (type(model),):
        torch.testing.assert_close(states(auto.from_pretrained(tmp_path), images), expected)
        torch.testing.assert_close(states(auto.from_pretrained(tmp_path, vwt=False), images), plain)
    restore(model)
    assert torch.equal(states(model, images), plain) and traces(model) == before


@rule
def test_trying_a_model_leaves_it_as_it_was(kind, images):
    """Its random numbers, and what of it trains; dropout is no reason to refuse it."""
    model = tiny(kind, hidden_dropout_prob=0.5).train()
    next(model.children()).eval()
    training = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    compress(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == training


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        (
            "Yolos",
            {"image_size": [32, 32], "num_detection_tokens": 5},
            r"it changes rows \[37\] with patch 36, which should be row 42",
        ),
        ("MLCDVision", {}, "it answers by where in the sequence a patch lies, by more than the positions"),
        (
            "DonutSwin",
            {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2},
            "it has attention that does not go through transformers' AttentionInterface",
        ),
        (
            "SamHQVision",
            {"output_channels": 8, "global_attn_indexes": [0], "window_size": 2},
            "it has attention that does not go through transformers' AttentionInterface",
        ),
        ("PixtralVision", {}, "it has no embeddings whose only convolution makes a row of each patch"),
    ],
)
def test_what_the_rule_does_not_hold_for_is_refused_with_the_reason_and_stays_plain(kind, fields, reason):
    size = {name: value for name, value in TINY.items() if kind != "DonutSwin" or name in ("image_size", "patch_size")}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**size | fields)).eval()
    before = traces(model)
    with pytest.raises(ValueError, match=rf"{kind}Model \(model type '.*'\) cannot be compressed: .*{reason}.*`vwt`"):
        compress(model)
    assert traces(model) == before and model.config.vwt is None


def test_a_class_that_reads_every_patch_is_refused(tmp_path):
    model = transformers.YolosForObjectDetection(transformers.YolosConfig(**TINY | {"image_size": [32, 32]}))
    for fields in SETTINGS.values():
        with pytest.raises(ValueError, match=r"YolosForObjectDetection .*cannot be compressed"):
            compress(model, fields)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"YolosForObjectDetection .*cannot be compressed"):
        type(model).from_pretrained(tmp_path, vwt=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_in_half_precision_is_told_from_positions(dtype):
    deep = {"num_hidden_layers": 16, "hidden_size": 64, "intermediate_size": 128}
    for kind in PREFIX:
        compress(made(kind, **deep | (BOTH if kind == "InternVLVision" else {})).to(dtype))
    model = transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**TINY)).eval()
    model.load_state_dict(
        {name: value * 20 if "_proj" in name else value for name, value in model.state_dict().items()}
    )
    with pytest.raises(ValueError, match="it answers by where in the sequence a patch lies"):
        compress(model.to(dtype))


def test_a_whole_of_no_family_says_which_towers_can_be_compressed_alone():
    with pytest.raises(ValueError, match=r"Kosmos2For.* compressed alone, .*\(model\.its_tower\), if .* general rule"):
        require_supported(transformers.Kosmos2ForConditionalGeneration, restores=True)


@rule
def test_weights_that_are_elsewhere_cannot_be_tried(kind):
    model = tiny(kind).to("meta")
    with pytest.raises(ValueError, match="it has weights that are elsewhere, so it cannot be tried; load it whole"):
        compress(model)


def test_a_model_whose_patch_projection_has_lora_gets_another_setting(images):
    peft = pytest.importorskip("peft")
    model = compress(tiny("InternVLVision"), SETTINGS["merge"])
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["projection", "q_proj"]))
    expected = states(compress(tiny("InternVLVision"), SETTINGS["discard"]), images)
    torch.testing.assert_close(states(compress(model, SETTINGS["discard"]), images), expected)  # it has learned nothing


class OwnConfig(transformers.ViTConfig):
    model_type = "own-vit"


class Own(transformers.ViTModel):
    config_class = OwnConfig


class OwnIJepaConfig(transformers.IJepaConfig):
    model_type = "own-ijepa"


class OwnIJepa(transformers.IJepaModel):
    config_class = OwnIJepaConfig


class OwnMasked(transformers.ViTForMaskedImageModeling):
    config_class = OwnConfig


def test_a_class_of_a_user_is_tried_whatever_its_name_and_type_are(images):
    torch.manual_seed(0)
    own = Own(OwnConfig(**TINY)).eval()
    listed = transformers.ViTModel(transformers.ViTConfig(**TINY)).eval()
    listed.load_state_dict(own.state_dict())
    setting = {"keep_ratio": 0.5, "dropped": "merge"}
    assert torch.equal(states(compress(own, setting), images), states(compress(listed, setting), images))
    with pytest.raises(ValueError, match=r"OwnMasked \(model type 'own-vit'\) cannot be compressed"):
        compress(OwnMasked(OwnConfig(**TINY)), setting)


class OwnOfFrames(Own):
    """Images of a batch are the frames of a video, and see each other."""

    def forward(self, pixel_values: torch.Tensor, **kwargs: object) -> object:
        output = super().forward(pixel_values, **kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(dim=0)
        return output


def test_images_that_see_each_other_are_refused():
    with pytest.raises(ValueError, match="it answers of an image by what else is in the batch, as of the frames"):
        compress(OwnOfFrames(OwnConfig(**TINY)).eval(), SETTINGS["discard"])


def test_what_a_model_of_a_user_answers_is_its_cls_token_or_the_mean_of_all(images):
    without = OwnIJepa(OwnIJepaConfig(**TINY)).eval()
    with_cls = Own(OwnConfig(**TINY), add_pooling_layer=False).eval()
    for model, name in ((without, "mean of the tokens"), (with_cls, "CLS token")):
        tokens = states(model, images)
        called, answers = named_answer(model, pixel_values=images)
        assert called == name and torch.equal(answers, tokens[:, 0] if name == "CLS token" else tokens.mean(dim=1))


def test_a_model_that_is_quantised_while_it_runs_is_not_taken_for_one_whose_images_see_each_other(images):
    """One scale for all images of a batch rounds an image otherwise than alone."""
    model = tiny("Pixio", hidden_size=64, num_attention_heads=4, intermediate_size=128)
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert states(compress(quantised, SETTINGS["discard"]), images).shape[1] == 32 + PREFIX["Pixio"]


class OwnOfTexts(Own):
    """Takes texts that it does without."""

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor | None = None, **kwargs: object) -> object:
        return super().forward(pixel_values, **kwargs)


def test_a_model_that_may_be_given_a_text_answers_without(images):
    model = OwnOfTexts(OwnConfig(**TINY), add_pooling_layer=False).eval()
    assert torch.equal(named_answer(model, pixel_values=images)[1], states(model, images)[:, 0])
