"""The conformance matrix: every family, its heads, both methods, both layouts, both dtypes, on tiny random models."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import cpu_offload

from settings import WORDS, inter
from tiny import MODELS, MORE_MODELS, TINY, answers, forward, sample_pixel_values, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, compress, restore
from vwt_hf.compress import choose_patches
from vwt_hf.families import family_of
from vwt_hf.words import gather_patches, patchify

EVERY = [*MODELS, *MORE_MODELS]
CONTRASTIVE = ["clip", "metaclip-2", "chinese-clip", "altclip", "clipseg", "siglip"]
BACKBONES = [name for name in EVERY if not name.endswith(("classifier", "projection")) and name not in CONTRASTIVE]
"""Those whose first output is hidden states."""
NEAR = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
SETTINGS = {
    "discard": VWTConfig(keep_ratio=0.5),
    "merge": VWTConfig(keep_ratio=0.5, dropped="merge"),
    "packed": inter(layout="packed"),
    "padded": inter(layout="padded"),
}
setting = pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))
dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every = pytest.mark.parametrize("name", EVERY)


@pytest.fixture
def images() -> torch.Tensor:
    """White, noise, nearly flat and half flat: very different lengths."""
    pixel_values = sample_pixel_values(4)
    pixel_values[0] = 1.3
    pixel_values[2] = pixel_values[2] * 0.1 + 1
    pixel_values[3, :, :16] = 0.7
    return pixel_values


@every
def test_keeping_everything_equals_the_plain_model(name, images):
    model = tiny_model(name)
    plain = answers(model, images)
    assert torch.equal(answers(compress(model, {"keep_ratio": 1.0}), images), plain)
    merged = answers(compress(model, {"keep_ratio": 1.0, "dropped": "merge"}), images)
    torch.testing.assert_close(merged, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(answers(compress(model, inter(threshold=0)), images), plain)


@every
def test_without_words_in_reach_a_model_answers_as_the_plain_one(name, images):
    model = tiny_model(name)
    plain = answers(model, images)
    far = VisualVocabulary(-WORDS.words - 5)
    for layout in ("packed", "padded"):
        fields = inter(far, layout=layout, threshold=1e-9)
        torch.testing.assert_close(answers(compress(model, fields), images), plain, atol=1e-5, rtol=1e-5)


@dtype
@setting
@every
def test_a_batch_answers_as_its_images_do_alone_and_unlike_the_plain_model(name, setting, dtype, images):
    model = tiny_model(name).to(dtype)
    images = images.to(dtype)
    plain = answers(model, images)
    compress(model, setting)
    alone = torch.cat([answers(model, image[None]) for image in images])
    found = answers(model, images)
    torch.testing.assert_close(found, alone, atol=NEAR[dtype], rtol=NEAR[dtype])
    assert found.shape != plain.shape or (found - plain).abs().max() > 1e-3


@setting
@every
def test_a_saved_model_is_the_same_when_loaded_and_plain_where_it_is_asked_to_be(name, setting, images, tmp_path):
    model = compress(tiny_model(name), setting)
    expected = answers(model, images)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(answers(loaded, images), expected)
    plain = type(model).from_pretrained(tmp_path, vwt=False)
    torch.testing.assert_close(answers(plain, images), answers(tiny_model(name), images))


@setting
@every
def test_gradients_are_finite_and_reach_what_the_plain_model_trains(name, setting, images):
    model = tiny_model(name).train()

    def trained() -> set[str]:
        model.zero_grad(set_to_none=True)
        forward(model, images).float().square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain = trained()
    compress(model, setting)
    assert trained() == plain


@pytest.mark.parametrize("name", BACKBONES)
def test_every_patch_has_the_hidden_state_of_its_token_where_none_is_lost(name, images):
    model = tiny_model(name)
    usual = answers(model, images).shape
    for fields in (SETTINGS["merge"], SETTINGS["packed"], SETTINGS["padded"]):
        full = answers(compress(model, fields), images)
        assert full.shape == usual
        patches = full[1, -64:]
        assert len(patches.unique(dim=0)) < 64 or fields is not SETTINGS["merge"]
    compressed = answers(compress(model, VWTConfig(dropped="merge", output="compressed")), images)
    assert compressed.shape[1] == usual[1] - 32
    # The tokens that were given out for the patches are those.
    merged = answers(compress(model, SETTINGS["merge"]), images)
    for image in range(len(images)):
        assert torch.equal(merged[image].unique(dim=0), compressed[image].unique(dim=0))


def test_rotary_tokens_are_rotated_as_their_patches_are(images):
    """DINOv3's layers by hand, on the tokens and rotations of the patches that stay."""
    model = tiny_model("dinov3")
    kept = choose_patches(patchify(images, (4, 4)), (8, 8), 32, SETTINGS["discard"])
    with torch.no_grad():
        whole = model.embeddings(images)
        hidden = torch.cat((whole[:, :4], gather_patches(whole[:, 4:], kept)), 1)
        rotations = tuple(values[kept].unsqueeze(1) for values in model.rope_embeddings(images))
        expected = model.norm(model.model(hidden, position_embeddings=rotations).last_hidden_state)
    found = answers(compress(model, SETTINGS["discard"]), images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    alike = answers(compress(model, VWTConfig(dropped="merge", proportional_attention=False)), images)
    torch.testing.assert_close(alike[:, :4], expected[:, :4], atol=1e-5, rtol=1e-5)


# The plain models with SigLIP's head cannot be offloaded: torch's own attention reads weights that are elsewhere.
@setting
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("siglip", "siglip-classifier")])
def test_offloaded_weights_are_fetched(name, setting, images):
    model = tiny_model(name, **({"vision_use_head": False} if name == "siglip-vision" else {}))
    expected = answers(compress(model, setting), images)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(answers(model, images), expected)


def test_models_that_predict_masked_patches_are_refused():
    for fields in SETTINGS.values():
        with pytest.raises(ValueError, match="masked in the whole image"):
            compress(transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**TINY)), fields)


def test_a_segmentation_head_reads_every_patch_or_is_refused(images):
    _, config = MORE_MODELS["clipseg"]
    torch.manual_seed(0)
    size = {"reduce_dim": 8, "extract_layers": [0, 1], "decoder_num_attention_heads": 2, "decoder_intermediate_size": 8}
    segmenting = config(**TINY)
    for name, value in size.items():
        setattr(segmenting, name, value)
    model = transformers.CLIPSegForImageSegmentation(segmenting).eval()
    with pytest.raises(ValueError, match=r"CLIPSegForImageSegmentation reads a value for every patch.*'merge'"):
        compress(model, SETTINGS["discard"])
    texts = torch.tensor([[97, 5, 98]]).expand(4, -1)
    plain = model(pixel_values=images, input_ids=texts).logits
    for fields in (SETTINGS["merge"], SETTINGS["packed"]):
        found = compress(model, fields)(pixel_values=images, input_ids=texts).logits
        alone = model(pixel_values=images[2:3], input_ids=texts[:1]).logits
        assert found.shape == plain.shape and not torch.equal(found, plain)
        torch.testing.assert_close(found[2], alone.reshape(found[2].shape), atol=1e-4, rtol=1e-4)


@setting
@every
def test_restore_gives_the_exact_plain_model_back(name, setting, images):
    model = tiny_model(name)
    plain = answers(model, images)
    compress(model, setting)
    restore(model)
    assert torch.equal(answers(model, images), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@setting
@every
def test_images_of_another_size_are_interpolated_or_refused_with_both_sizes(name, setting):
    model = compress(tiny_model(name), setting)
    pixel_values = sample_pixel_values(2, 24, 40)
    if family_of(model).always_interpolates:
        assert answers(model, pixel_values).isfinite().all()
        return
    assert answers(model, pixel_values, interpolate_pos_encoding=True).isfinite().all()
    with pytest.raises(ValueError, match=r"24×40; the model expects 32×32"):
        answers(model, pixel_values, interpolate_pos_encoding=False)
