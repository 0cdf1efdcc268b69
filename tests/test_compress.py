"""What `compress` and `restore` promise, on every family."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers

import vwt_hf
from vwt_hf import VWTConfig, compress, restore


def answers(model: transformers.PreTrainedModel, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pixel_values, **kwargs)[0]


def test_keeping_everything_equals_the_plain_model(model, pixel_values):
    plain = answers(model, pixel_values)
    assert torch.equal(answers(compress(model, {"keep_ratio": 1.0}), pixel_values), plain)


def test_compressed_tokens_are_those_of_the_kept_patches_alone(model, pixel_values):
    """The embeddings of a compressed model are a selection of the plain model's own, in order."""
    compress(model, {"keep_ratio": 0.5})
    embeddings = next(m for m in model.modules() if "forward" in vars(m))
    prefix = embeddings(pixel_values).shape[1] - 32
    with torch.no_grad():
        short, whole = embeddings(pixel_values), type(embeddings).forward(embeddings, pixel_values)
    patches = torch.nn.functional.unfold(pixel_values, 4, stride=4)
    for image in range(3):
        kept = patches[image].var(dim=0).topk(32).indices.sort().values
        expected = torch.cat((whole[image, :prefix], whole[image, prefix:][kept]))
        torch.testing.assert_close(short[image], expected)


@pytest.mark.parametrize("criterion", ["variance", "random", "grid"])
def test_a_batch_answers_as_its_images_do_alone(model, pixel_values, criterion):
    compress(model, {"criterion": criterion})
    alone = torch.cat([answers(model, image[None]) for image in pixel_values])
    torch.testing.assert_close(answers(model, pixel_values), alone, atol=1e-5, rtol=1e-5)


def test_restore_gives_the_exact_plain_model_back(model, pixel_values):
    plain, names = answers(model, pixel_values), list(model.state_dict())
    compress(compress(model, {"keep_ratio": 0.3}), {"keep_ratio": 0.6})
    assert model.config.vwt["keep_ratio"] == 0.6
    assert not torch.equal(answers(model, pixel_values), plain)
    restore(model)
    assert torch.equal(answers(model, pixel_values), plain)
    assert model.config.vwt is None and list(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_compressed_and_independent(model, pixel_values, copied):
    compress(model, {"keep_ratio": 0.5})
    expected = answers(model, pixel_values)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(answers(twin, pixel_values), expected)


def test_gradients_reach_every_parameter_that_the_plain_model_trains(model, pixel_values):
    def trained() -> set[str]:
        model.zero_grad(set_to_none=True)
        model.train()(pixel_values=pixel_values)[0].float().pow(2).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain = trained()
    for criterion in ("variance", "random", "grid"):
        compress(model, {"criterion": criterion})
        with torch.inference_mode():
            model(pixel_values=pixel_values)
        assert trained() == plain


def test_masked_image_modelling_is_refused():
    model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(hidden_size=12, num_attention_heads=1))
    with pytest.raises(ValueError, match="a value for every patch"):
        compress(model)


def test_an_unsupported_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"BertModel .*cannot be compressed.*ViT, DeiT, DINOv2"):
        compress(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=12)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep_ratio": 1.3}, "keep_ratio is 1.3.*\\(0, 1\\]"),
        ({"method": "intre"}, "method is 'intre'.*'intra'.*Did you mean"),
        ({"keep": 0.3}, "no field 'keep'.*keep_ratio"),
        ({"num_patches": 0}, "num_patches is 0.*at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"criterion": 3}, "criterion is 3.*variance"),
    ],
)
def test_a_bad_setting_is_refused_by_field_value_and_range(fields, words):
    with pytest.raises(ValueError, match=words):
        VWTConfig.parse(fields)


def test_supported_lists_the_families():
    assert vwt_hf.supported() == ["ViT", "DeiT", "DINOv2", "DINOv2 with registers", "CLIP"]
