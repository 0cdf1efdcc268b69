"""The conformance matrix: every family, its heads, both methods, both layouts, both dtypes, on tiny random models."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import cpu_offload

from names import COMMON
from settings import WORDS, coarse, fixed, gradual, inter, local
from tiny import (
    MODELS,
    TINY,
    answers,
    forward,
    inputs,
    padded_patches,
    sample_pixel_values,
    tiny_model,
    traces,
    watch_embeddings,
)
from vwt_hf import VisualVocabulary, VWTConfig, compress, restore
from vwt_hf.families import UNFIT, family_of, find_layers, find_tower, is_of, require_supported
from vwt_hf.plans import Kept
from vwt_hf.words import centre, gather_patches, highest, patchify

EVERY = list(MODELS)
CONTRASTIVE = ["clip", "metaclip-2", "chinese-clip", "altclip", "clipseg", "siglip", "siglip2", "aimv2"]
BACKBONES = [name for name in EVERY if not name.endswith(("classifier", "projection")) and name not in CONTRASTIVE]
"""Those whose first output is hidden states."""
NEAR = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """In half precision a token may be just alike enough to be joined in one batch, and not in another: a few values of
    an image may differ then, by little of the whole."""
    near, allowed = NEAR[found.dtype], 0 if found.dtype == torch.float32 else 0.03
    differs = ~torch.isclose(found, expected, atol=near, rtol=near)
    assert differs.float().mean() <= allowed, (found - expected).abs().max()
    for one, other in zip(found.float(), expected.float(), strict=True):
        assert (one - other).norm() <= 0.05 * other.norm()


SETTINGS = {
    "discard": VWTConfig(keep_ratio=0.5),
    "merge": VWTConfig(keep_ratio=0.5, dropped="merge"),
    "packed": inter(layout="packed"),
    "padded": inter(layout="padded"),
    "gradual": gradual(),
    "fixed": fixed(),
    "coarse": coarse(),
}
# No version differs in how tokens are laid out: on the oldest, packed ones stand for padded ones, fixed for gradual.
setting = pytest.mark.parametrize(
    "setting",
    [
        pytest.param(setting, id=name, marks=[pytest.mark.newest] * (name in ("padded", "gradual")))
        for name, setting in SETTINGS.items()
    ],
)
dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
every = pytest.mark.parametrize("name", EVERY)


@pytest.fixture
def images() -> torch.Tensor:
    return sample_images()


def sample_images() -> torch.Tensor:
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
    assert found.shape != plain.shape or (found - plain).abs().max() > 1e-4


@setting
@every
def test_a_saved_model_is_the_same_when_loaded(name, setting, images, tmp_path):
    model = compress(tiny_model(name), setting)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    torch.testing.assert_close(answers(loaded, images), answers(model, images))


@pytest.mark.parametrize("kind", ["discard", "packed"])  # without and with words beside the weights
@every
def test_a_saved_model_is_plain_where_it_is_asked_to_be(name, kind, images, tmp_path):
    model = tiny_model(name)
    expected = answers(model, images)
    compress(model, SETTINGS[kind]).save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, vwt=False)
    torch.testing.assert_close(answers(plain, images), expected)


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


@pytest.mark.parametrize("kind", ["merge", "packed", "padded"])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_patch_has_the_hidden_state_of_its_token_where_none_is_lost(name, kind, images):
    model = tiny_model(name)
    usual = answers(model, images)
    last = find_layers(find_tower(model, family_of(model)).module)[-1]
    by_earlier_hook = outputs_of(last)
    compress(model, SETTINGS[kind])
    tokens = outputs_of(last, prepend=True)  # before compression gives every patch its own
    patches, taken = outputs_of(last), watch_embeddings(model)
    full = answers(model, images)
    layout = taken[0][1].layout
    rows = layout.rows
    assert layout.tokens < rows.numel()
    assert torch.equal(patches[0], tokens[0].flatten(0, 1)[rows])
    assert torch.equal(by_earlier_hook[0], patches[0])
    # And so in the end, where each token has a state of its own.
    assert full.shape == usual.shape
    for image in range(len(images) if family_of(model).padded is None else 0):
        assert_as_equal(full[image], rows[image])


def outputs_of(module, prepend: bool = False) -> list[torch.Tensor]:
    """Gets what `module` gives out at each call from now on, as its hooks leave it that are registered so far; or with
    `prepend`, before any hook."""
    taken: list[torch.Tensor] = []
    module.register_forward_hook(
        lambda module, args, output: taken.append(output[0] if isinstance(output, tuple) else output), prepend=prepend
    )
    return taken


def assert_as_equal(states: torch.Tensor, tokens: torch.Tensor) -> None:
    """Asserts that hidden states, (patches, hidden), are equal where their tokens, (patches,), are, and there alone."""
    which = states.unique(dim=0, return_inverse=True)[1]
    assert torch.equal(which.unsqueeze(0) == which.unsqueeze(1), tokens.unsqueeze(0) == tokens.unsqueeze(1))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_tokens_that_are_given_out_are_those_that_patches_have_the_hidden_states_of(name, images):
    model = compress(tiny_model(name), VWTConfig(dropped="merge", output="compressed"))
    taken = watch_embeddings(model)
    tokens = model(**inputs(model, images))[0]
    full = compress(model, SETTINGS["merge"])(**inputs(model, images))[0]
    assert tokens.shape[1] == full.shape[1] - 32
    assert torch.equal(full, tokens.flatten(0, 1)[taken[0][1].layout.rows])


def test_rotary_tokens_are_rotated_as_their_patches_are(images):
    """DINOv3's layers by hand, on the tokens and rotations of the patches that stay."""
    model = tiny_model("dinov3")
    kept = highest(centre(patchify(images, (4, 4))).variance, 32)
    with torch.no_grad():
        whole = model.embeddings(images)
        hidden = torch.cat((whole[:, :4], gather_patches(whole[:, 4:], kept)), 1)
        rotations = tuple(values[kept].unsqueeze(1) for values in model.rope_embeddings(images))
        expected = model.norm(model.model(hidden, position_embeddings=rotations).last_hidden_state)
    found = answers(compress(model, SETTINGS["discard"]), images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    alike = answers(compress(model, VWTConfig(dropped="merge", proportional_attention=False)), images)
    torch.testing.assert_close(alike[:, :4], expected[:, :4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["beit", "beit-pretrained", "data2vec"])
@setting
def test_attention_is_biased_by_where_the_patches_of_tokens_lie(name, setting, images):
    """Against the plain model's layers on one image's tokens, with the mean bias of their patches."""
    if setting.method == "gradual":  # here of one plan for all layers
        setting = local()
    model, plain = compress(tiny_model(name), setting), tiny_model(name)
    taken = watch_embeddings(model)
    biases = [module for module in plain.modules() if is_of(module, family_of(model).relative)]
    with torch.no_grad():
        whole = [module((8, 8))[0] for module in biases]
        for image in images[1:]:
            found = model(pixel_values=image[None]).last_hidden_state
            tokens, plan = taken[-1]
            if isinstance(plan, Kept) or plan.sources is not None:
                kept = plan.kept if isinstance(plan, Kept) else plan.places_in_image()[:, 1:] - 1
                shares = torch.eye(65)[torch.cat((torch.zeros(1, dtype=torch.int64), kept[0] + 1))]
            else:
                shares = torch.nn.functional.one_hot(plan.layout.rows[0], tokens.shape[1]).float().T
                shares = shares / shares.sum(1, keepdim=True).clamp(min=1)
            by_key = torch.zeros(()) if isinstance(plan, Kept) else plan.layout.sizes[0].log() * plan.exponent
            for index, (module, bias) in enumerate(zip(biases, whole, strict=True)):
                # Where layers share a bias it is the first module's, and stands beside their own, if they have one.
                once = by_key if name == "beit" or index == 0 else 0
                replace(module, (shares @ bias @ shares.T + once)[None])
            replace(plain.embeddings, (tokens, (8, 8)) if name == "data2vec" else tokens)
            expected = plain(pixel_values=image[None]).last_hidden_state
            if setting.restores:
                expected = expected[:, plan.layout.rows[0]]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def replace(module, output) -> None:
    """Has `module` give `output`, whatever it is given."""
    module.forward = lambda *args, **kwargs: output


@pytest.mark.parametrize("name", [name for name in MODELS if name not in (*COMMON, *CONTRASTIVE)])
def test_a_token_is_the_mean_of_the_embeddings_of_its_patches(name, images):
    """The first layer's input, against the plain model's."""
    plain, model = tiny_model(name), compress(tiny_model(name), SETTINGS["packed"])
    taken = [watch_embeddings(plain), watch_embeddings(model)]
    answers(plain, images)
    answers(model, images)
    ((whole, _),), ((tokens, plan),) = taken
    layout, tokens = plan.layout, tokens.flatten(0, 1)
    assert len(tokens) < whole.shape[0] * whole.shape[1]
    mine = layout.rows
    if layout.real is not None:
        assert not layout.real.all()
        mine = torch.where(layout.real, mine, -1)
    for row in range(len(tokens)):
        torch.testing.assert_close(tokens[row], whole[mine == row].mean(0), atol=1e-5, rtol=1e-4)


def test_a_masked_autoencoder_gives_features_of_whole_images_alone(images):
    masking = transformers.ViTMAEModel(transformers.ViTMAEConfig(**TINY)).eval()
    with pytest.raises(ValueError, match=r"ViT-MAE drops 75% of the patches at random.*mask_ratio=0\.0"):
        compress(masking)
    with pytest.raises(ValueError, match="masked in the whole image"):
        compress(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**TINY, mask_ratio=0.0)))


def test_a_masked_autoencoder_says_which_patches_were_dropped(images):
    kept = highest(centre(patchify(images, (4, 4))).variance, 32)
    output = compress(tiny_model("vit-mae"), SETTINGS["discard"])(pixel_values=images)
    assert output.mask.shape == (4, 64) and output.mask.sum() == 4 * 32
    assert not output.mask.gather(1, kept).any()
    # As for patches that it masks itself: the tokens, and then what is masked, in the order of the image.
    both = torch.cat((output.last_hidden_state[:, 1:], torch.full((4, 32, 32), torch.nan)), dim=1)
    ordered = gather_patches(both, output.ids_restore)
    assert torch.equal(gather_patches(ordered, kept), output.last_hidden_state[:, 1:])
    merged = compress(tiny_model("vit-mae"), SETTINGS["merge"])(pixel_values=images)
    assert not merged.mask.any() and torch.equal(merged.ids_restore, torch.arange(64).expand(4, -1))


@pytest.mark.parametrize("name", ["vit", "beit", "clip-vision"])
def test_a_mask_of_some_patches_is_refused_where_patches_are_left_out(name, images):
    model, mask = compress(tiny_model(name), SETTINGS["discard"]), torch.ones(4, 65, dtype=torch.bool)
    if name == "vit":  # whose forward knows that such a mask hides nothing
        assert torch.equal(model(pixel_values=images, attention_mask=mask)[0], model(pixel_values=images)[0])
    mask[1, 3] = False
    with pytest.raises(ValueError, match=r"attention_mask \(4, 65\) masks patches of the whole image"):
        model(pixel_values=images, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask \(1, 1, 65, 65\) masks patches"):
        model(pixel_values=images, attention_mask=torch.full((1, 1, 65, 65), -1.0))
    if name == "vit":
        assert restore(model)(pixel_values=images, attention_mask=mask)[0].shape[1] == 65


@pytest.mark.parametrize("name", ["beit", "beit-pretrained", "data2vec"])
@pytest.mark.parametrize("setting", [SETTINGS["merge"], local(), coarse()], ids=["merge", "local", "coarse"])
def test_a_mask_is_refused_where_attention_is_given_a_bias(name, setting, images):
    model = compress(tiny_model(name), setting)
    of_first = torch.zeros(4, 1, 65, 65)
    of_first[0, ..., 1:30] = -torch.inf
    for mask in (of_first, of_first == 0, of_first[:, 0, 0] == 0):
        with pytest.raises(ValueError, match=r"attention_mask \(4, .*65\) masks patches of the whole image"):
            model(pixel_values=images, attention_mask=mask)


@pytest.mark.parametrize("setting", [SETTINGS["merge"], local(), coarse()], ids=["merge", "local", "coarse"])
def test_a_mask_is_refused_where_a_forward_takes_it_by_its_place(setting, images):
    mask = torch.arange(65).expand(4, 65) > 30
    with pytest.raises(ValueError, match=r"attention_mask \(4, 65\) masks patches of the whole image"):
        compress(tiny_model("beit"), setting)(images, None, False, mask)


@pytest.mark.parametrize(
    ("name", "dropout"), [("blip-vision", "attention_dropout"), ("data2vec", "attention_probs_dropout_prob")]
)
def test_attention_without_an_interface_drops_weights_in_training_alone(name, dropout, images):
    model = compress(tiny_model(name, **{dropout: 0.5}), SETTINGS["merge"])
    expected = model(pixel_values=images)[0]
    assert torch.equal(model(pixel_values=images)[0], expected)
    assert (model.train()(pixel_values=images)[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "setting", [SETTINGS["discard"], SETTINGS["merge"], local()], ids=["discard", "merge", "local"]
)
@pytest.mark.parametrize("name", ["vit", "beit"])
def test_a_mask_that_hides_nothing_is_as_none(name, setting, images):
    model = compress(tiny_model(name), setting)
    expected = model(pixel_values=images)[0]
    masks = [torch.ones(4, 65, dtype=torch.bool)]
    if name == "beit" or setting is SETTINGS["discard"]:  # others refuse any that is of pairs of patches
        masks += [torch.zeros(4, 1, 65, 65), torch.ones(4, 1, 65, 65, dtype=torch.bool)]
    for mask in masks:
        assert torch.equal(model(pixel_values=images, attention_mask=mask)[0], expected)


# What has SigLIP's head cannot be offloaded, compressed or not: torch's own attention reads weights that are elsewhere.
# So do the embeddings of SigLIP 2.
@setting
@pytest.mark.parametrize(
    "name", [name for name in EVERY if name not in ("siglip", "siglip2", "siglip-classifier", "siglip2-vision")]
)
def test_offloaded_weights_are_fetched(name, setting, images):
    model = tiny_model(name, **({"vision_use_head": False} if name == "siglip-vision" else {}))
    expected = answers(compress(model, setting), images)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(answers(model, images), expected)


@pytest.mark.parametrize("unfit", UNFIT, ids=lambda unfit: unfit.name)
def test_what_cannot_be_compressed_says_why(unfit):
    for model_type in unfit.model_types:
        config_class = transformers.CONFIG_MAPPING[model_type]
        named = config_class.__name__.removesuffix("Config") + "Model"
        with pytest.raises(ValueError, match=rf"{named} .*cannot be compressed: it {unfit.reason}; supported"):
            require_supported(getattr(transformers, named), restores=True)


def test_models_that_predict_masked_patches_are_refused():
    for fields in SETTINGS.values():
        with pytest.raises(ValueError, match="masked in the whole image"):
            compress(transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**TINY)), fields)


def test_a_segmentation_head_reads_every_patch_or_is_refused(images):
    _, config = MODELS["clipseg"]
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
    compress(model, {"method": "given"})
    words = torch.arange(64).repeat(4, 1)
    same = model(pixel_values=images, input_ids=texts, patch_words=words).logits
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    words[:, ::2] = -1
    with pytest.raises(ValueError, match=r"the word -1; expected the number of a word"):
        model(pixel_values=images, input_ids=texts, patch_words=words)


@pytest.mark.parametrize("criterion", ["variance", "random", "grid"])
@pytest.mark.parametrize("dropped", ["discard", "merge"])
def test_padding_is_as_if_it_were_not_there(dropped, criterion, images):
    """An image of 6 × 5 patches among 64 answers as it does without padding, with half of its own patches."""
    model = compress(tiny_model("siglip2-vision"), VWTConfig(dropped=dropped, criterion=criterion))
    padded = padded_patches(images, 4)
    assert padded["spatial_shapes"].tolist() == [[6, 5], [8, 8], [6, 5], [8, 8]]
    alone = {name: values[2:3, :30] for name, values in padded.items()}
    with torch.no_grad():
        torch.testing.assert_close(
            model(**alone).pooler_output, model(**padded).pooler_output[2:3], atol=1e-5, rtol=1e-5
        )
    taken = watch_embeddings(model)
    model(**padded)
    sizes = taken[-1][1].layout.sizes
    assert (sizes > 0).sum(1).tolist() == [15, 32, 15, 32]
    assert sizes.sum(1).tolist() == ([30, 64, 30, 64] if dropped == "merge" else [15, 32, 15, 32])


@pytest.mark.parametrize("masked", [slice(40, None), slice(42, None), slice(3, None, 4)], ids=["40", "42", "column"])
@setting
def test_patches_that_a_caller_masks_are_as_padding(setting, masked, images):
    """In the layers and in the head, whether the mask says more than the shapes or is not given."""
    model = compress(tiny_model("siglip2-vision"), setting)
    padded = padded_patches(images, 4)
    more = padded["pixel_attention_mask"].clone()
    more[:, masked] = 0
    with torch.no_grad():
        found = model(**padded | {"pixel_attention_mask": more})
        assert (found.pooler_output - model(**padded).pooler_output).abs().max() > 1e-3
        noise = padded["pixel_values"].clone()
        noise[:, masked] = torch.randn_like(noise[:, masked])
        other = model(**padded | {"pixel_attention_mask": more, "pixel_values": noise})
        torch.testing.assert_close(other.pooler_output, found.pooler_output, atol=1e-5, rtol=1e-5)
        none = model(**padded | {"pixel_attention_mask": None})
        torch.testing.assert_close(none.pooler_output, model(**padded).pooler_output)


def test_a_mean_of_real_patches_reads_every_patch_or_is_refused(images):
    torch.manual_seed(0)
    _, config = MODELS["siglip2"]
    model = transformers.Siglip2ForImageClassification(config(**TINY)).eval()
    with pytest.raises(ValueError, match=r"Siglip2ForImageClassification reads a value for every patch.*'merge'"):
        compress(model, SETTINGS["discard"])
    padded = padded_patches(images, 4)
    alone = {name: values[2:3] for name, values in padded.items()}
    with torch.no_grad():
        plain = model(**padded).logits
        for fields in (SETTINGS["merge"], SETTINGS["packed"]):
            found = compress(model, fields)(**padded).logits
            assert (found - plain).abs().max() > 1e-4
            torch.testing.assert_close(found[2:3], model(**alone).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Beit", "Data2VecVision"])
def test_a_pyramid_of_feature_maps_is_made_of_every_patch_or_refused(kind, images):
    torch.manual_seed(0)
    fields = TINY | {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "num_labels": 5, "drop_path_rate": 0.0}
    config = getattr(transformers, f"{kind}Config")(**fields, use_relative_position_bias=True, use_auxiliary_head=False)
    model = getattr(transformers, f"{kind}ForSemanticSegmentation")(config).eval()
    with pytest.raises(ValueError, match=rf"{kind}ForSemanticSegmentation reads a value for every patch.*'merge'"):
        compress(model, SETTINGS["discard"])
    with torch.no_grad():
        plain = model(images).logits
        for fields in (SETTINGS["merge"], SETTINGS["packed"]):
            found = compress(model, fields)(images).logits
            assert found.shape == plain.shape and not torch.equal(found, plain)
            torch.testing.assert_close(found[2:3], model(images[2:3]).logits, atol=1e-4, rtol=1e-4)


@setting
@every
def test_restore_gives_the_exact_plain_model_back(name, setting, images):
    model = tiny_model(name)
    plain, before = answers(model, images), traces(model)
    compress(model, setting)
    assert traces(model) != before
    restore(model)
    assert torch.equal(answers(model, images), plain) and traces(model) == before


@setting
@every
def test_images_of_another_size_are_taken_where_the_plain_model_takes_them(name, setting):
    """And where it does not, its own error is what is said."""
    plain, pixel_values = tiny_model(name), sample_pixel_values(2, 24, 40)

    def outcome(model, **kwargs) -> str:
        try:
            return "finite" if answers(model, pixel_values, **kwargs).isfinite().all() else "not finite"
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    compressed = compress(tiny_model(name), setting)
    for interpolate in ({}, {"interpolate_pos_encoding": True}, {"interpolate_pos_encoding": False}):
        expected = outcome(plain, **interpolate)
        assert outcome(compressed, **interpolate) == expected and expected != "not finite"
