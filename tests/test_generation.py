"""Models that write text about images: a compressed tower feeds a decoder that expects the tokens of an image."""

from __future__ import annotations

import pytest
import torch
import transformers

from settings import SETTINGS
from tiny import TINY, sample_pixel_values
from vwt_hf import VWTConfig, compress, restore
from vwt_hf.families import family_of

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}
IMAGE_TOKEN = 98


def blip() -> transformers.PreTrainedModel:
    text = TEXT | {"bos_token_id": 1, "eos_token_id": 97, "sep_token_id": 97, "pad_token_id": 0}
    config = transformers.BlipConfig(vision_config=TINY, text_config=text | {"encoder_hidden_size": 32})
    return transformers.BlipForConditionalGeneration(config)


def blip_2() -> transformers.PreTrainedModel:
    qformer = TEXT | {"encoder_hidden_size": 32, "cross_attention_frequency": 1}
    text = {"model_type": "opt", "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "ffn_dim": 32}
    text |= {"num_attention_heads": 2, "word_embed_proj_dim": 32, "max_position_embeddings": 60}
    config = transformers.Blip2Config(
        vision_config=TINY, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=IMAGE_TOKEN
    )
    return transformers.Blip2ForConditionalGeneration(config)


def llava() -> transformers.PreTrainedModel:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TINY, projection_dim=16),
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=IMAGE_TOKEN,
    )
    return transformers.LlavaForConditionalGeneration(config)


def paligemma() -> transformers.PreTrainedModel:
    config = transformers.PaliGemmaConfig(
        vision_config=TINY | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 32},
        text_config=TEXT | {"model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16},
        image_token_index=IMAGE_TOKEN,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def llava_like(kind: str, tower: type, **fields) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(
        vision_config=tower(**TINY),
        text_config=transformers.LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=IMAGE_TOKEN,
        **fields,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def vipllava() -> transformers.PreTrainedModel:
    return llava_like("VipLlava", transformers.CLIPVisionConfig, vision_feature_layers=[-1, -2])


def llava_next() -> transformers.PreTrainedModel:
    return llava_like("LlavaNext", transformers.CLIPVisionConfig, image_grid_pinpoints=[[32, 64]])


def llava_onevision() -> transformers.PreTrainedModel:
    return llava_like("LlavaOnevision", transformers.SiglipVisionConfig, image_grid_pinpoints=[[32, 64]])


IMAGE_TOKENS = {
    blip: 0,
    blip_2: 4,
    llava: 64,
    vipllava: 64,
    # The whole image, its two tiles side by side, and an end for each of their rows.
    llava_next: 200,
    llava_onevision: 200,
    paligemma: 64,
}
"""How many of them a prompt of the model holds."""
TILED = (llava_next, llava_onevision)


@pytest.fixture(params=list(IMAGE_TOKENS), ids=lambda make: make.__name__)
def make(request):
    return request.param


def built(make) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def images() -> torch.Tensor:
    pixel_values = sample_pixel_values(3)
    pixel_values[0] = 1.3
    pixel_values[2, :, :16] = 0.7
    return pixel_values


def inputs(make, images: torch.Tensor) -> dict[str, torch.Tensor]:
    prompt = torch.tensor([[IMAGE_TOKEN] * IMAGE_TOKENS[make] + [1, 5, 7]]).repeat(len(images), 1)
    sizes = {}
    if make in TILED:
        images = torch.stack((images, images.flip(2), images.flip(3)), dim=1)
        sizes = {"image_sizes": torch.tensor([[32, 64]] * len(images))}
    return sizes | {"pixel_values": images, "input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


def logits(model, make, images) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs(make, images)).logits


def allowed(make) -> list[VWTConfig]:
    every_token = IMAGE_TOKENS[make] >= 64
    return [setting for name, setting in SETTINGS.items() if not (every_token and name == "discard")]


def test_a_batch_answers_as_its_images_do_alone_and_unlike_the_plain_model(make, images):
    model = built(make)
    plain = logits(model, make, images)
    for setting in allowed(make):
        compress(model, setting)
        alone = torch.cat([logits(model, make, image[None]) for image in images])
        found = logits(model, make, images)
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
        assert (found - plain).abs().max() > 1e-4
    assert torch.equal(logits(restore(model), make, images), plain)


@pytest.mark.parametrize("beams", [1, 3])
def test_text_is_generated_for_a_batch_as_for_its_images_alone(make, images, beams):
    model = built(make)
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    how |= {} if make is blip else {"pad_token_id": 0}
    for setting in allowed(make):
        compress(model, setting)
        together = model.generate(**inputs(make, images), **how)
        for image, expected in zip(images, together, strict=True):
            assert model.generate(**inputs(make, image[None]), **how)[0].tolist() == expected.tolist()


def test_a_language_model_that_expects_every_patch_gets_no_fewer(images):
    for make in (llava, vipllava, llava_next, llava_onevision, paligemma):
        with pytest.raises(ValueError, match=r"reads a value for every patch.*Use vwt=True.*dropped='merge'"):
            compress(built(make), SETTINGS["discard"])


@pytest.mark.parametrize("holder", [llava, vipllava, llava_next, llava_onevision, paligemma])
def test_a_model_around_a_tower_goes_by_the_row_of_the_tower_and_is_not_tried(holder):
    row = {"clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP"}
    with torch.device("meta"):
        model = holder()
    assert family_of(compress(model, SETTINGS["merge"])).name == row[model.config.vision_config.model_type]


@pytest.mark.parametrize("kind", ["DINOv3ViT", "Data2VecVision", "InternVLVision"])
def test_a_tower_of_any_kind_feeds_a_language_model(kind, images):
    """By its row: one of rotary positions, and one of attention that reads no interface; and one without a row."""
    both = {"image_size": [32, 32], "patch_size": [4, 4]} if kind == "InternVLVision" else {}

    def of_this_kind() -> transformers.PreTrainedModel:
        return llava_like("Llava", lambda **fields: getattr(transformers, f"{kind}Config")(**fields | both))

    model = built(of_this_kind)
    plain = logits(model, llava, images)
    found = logits(compress(model, SETTINGS["merge"]), llava, images)
    alone = torch.cat([logits(model, llava, image[None]) for image in images])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-4


def test_a_saved_model_is_the_same_when_loaded(make, images, tmp_path):
    for setting in allowed(make):
        model = compress(built(make), setting)
        expected = logits(model, make, images)
        model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        torch.testing.assert_close(logits(loaded, make, images), expected, atol=1e-5, rtol=1e-5)
        plain = type(model).from_pretrained(tmp_path, vwt=False)
        torch.testing.assert_close(logits(plain, make, images), logits(built(make), make, images), atol=1e-5, rtol=1e-5)
