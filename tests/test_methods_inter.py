"""Inter-image words on every family: patches near one word of a vocabulary become one token."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath

from names import COMMON
from settings import STATISTICS, WORDS, inter
from tiny import TINY, answers, forward, require_restored, sample_pixel_values, tiny_model, watch_embeddings
from vwt_hf import VisualVocabulary, VWTConfig, compress, restore
from vwt_hf.compress import lexicon_of
from vwt_hf.families import find_layers
from vwt_hf.forward import current_forward
from vwt_hf.layout import group
from vwt_hf.processors import processor_statistics
from vwt_hf.words import index_words, nearest_words, patchify


@pytest.fixture(scope="module")
def vocabulary() -> VisualVocabulary:
    return WORDS


@pytest.fixture
def images() -> torch.Tensor:
    """White, noise, nearly flat and half flat: batches of very different lengths."""
    pixel_values = sample_pixel_values(5)
    pixel_values[0] = 1.3
    pixel_values[2] = pixel_values[2] * 0.1 + 1
    pixel_values[3, :, :16] = 0.7
    pixel_values[4, :, 8:] = 0
    return pixel_values


@pytest.fixture(params=["packed", "padded"])
def layout(request) -> str:
    return request.param


def tokens_of(pixel_values, vocabulary, threshold=0.3) -> torch.Tensor:
    """The token of each patch, (batch, patches)."""
    words = index_words(vocabulary.normalized(STATISTICS["image_mean"], STATISTICS["image_std"]))
    rows = group(nearest_words(patchify(pixel_values, (4, 4)), words, threshold)).rows
    return rows - rows.amin(dim=1, keepdim=True)


def embedded(model, images):
    """What enters the layers of a compressed model, and the plan by which it came about."""
    taken = watch_embeddings(model)
    answers(model, images)
    return taken[-1]


def test_the_images_of_these_tests_have_very_different_lengths(images, vocabulary):
    lengths = (tokens_of(images, vocabulary).amax(dim=1) + 1).tolist()
    assert min(lengths) == 1 and max(lengths) == 64 and len(set(lengths)) >= 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("proportional", [True, False])
def test_a_batch_answers_as_its_images_do_alone_in_either_layout(model, images, vocabulary, proportional, attention):
    model.set_attn_implementation(attention)
    compress(model, inter(vocabulary, proportional_attention=proportional))
    alone = torch.cat([answers(model, image[None]) for image in images])
    for layout in ("packed", "padded"):
        compress(model, inter(vocabulary, proportional_attention=proportional, layout=layout))
        torch.testing.assert_close(answers(model, images), alone, atol=1e-4, rtol=1e-4)


def test_what_has_no_padding_runs_packed_on_a_cpu(images, vocabulary):
    """By the number of rows that reach the layers."""
    rows = {}
    for layout in ("auto", "packed", "padded"):
        model = compress(tiny_model("vit"), inter(vocabulary, layout=layout))
        find_layers(model)[0].register_forward_pre_hook(
            lambda module, args, layout=layout: rows.update({layout: tuple(args[0].shape[:2])})
        )
        answers(model, images)
    tokens = int((tokens_of(images, vocabulary).amax(dim=1) + 2).sum())
    assert rows == {"auto": (1, tokens), "packed": (1, tokens), "padded": (5, 66)}


def test_the_order_of_images_and_of_words_does_not_matter(model, images, vocabulary):
    expected = answers(compress(model, inter(vocabulary)), images)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(answers(model, images[order]), expected[order], atol=1e-5, rtol=1e-5)
    shuffled = VisualVocabulary(vocabulary.words[torch.randperm(20)])
    torch.testing.assert_close(answers(compress(model, inter(shuffled)), images), expected, atol=1e-6, rtol=1e-5)


def test_tokens_are_the_means_of_the_embeddings_of_the_patches_that_share_a_word(model, images, vocabulary, layout):
    """The first layer's input, against a loop over the plain model's own embeddings."""
    taken = watch_embeddings(model)
    answers(model, images)
    short, plan = embedded(compress(model, inter(vocabulary, layout=layout)), images)
    whole, _ = taken[0]
    prefix = whole.shape[1] - 64
    assert plan.layout.prefix == prefix and short.is_contiguous()
    for image, tokens in enumerate(tokens_of(images, vocabulary)):
        start = int(plan.layout.rows[image, 0])
        found = short.flatten(0, 1)[start : start + prefix + int(tokens.max()) + 1]
        torch.testing.assert_close(found[:prefix], whole[image, :prefix])
        for token, value in enumerate(found[prefix:]):
            mean = whole[image, prefix:][tokens == token].mean(0)
            torch.testing.assert_close(value, mean, atol=1e-5, rtol=1e-4)


def test_threshold_zero_equals_the_plain_model(model, images, vocabulary):
    plain = answers(model, images)
    assert torch.equal(answers(compress(model, inter(vocabulary, threshold=0)), images), plain)


def test_one_word_takes_all_patches_at_threshold_two(model, images, vocabulary):
    compress(model, inter(VisualVocabulary(vocabulary.words[:1]), threshold=2))
    short, plan = embedded(model, images)
    assert short.shape[:2] == (1, 5 * (plan.layout.prefix + 1))
    assert answers(model, images).isfinite().all()


@pytest.mark.parametrize("name", [name for name in COMMON if not name.endswith(("classifier", "projection", "clip"))])
def test_every_patch_gets_the_hidden_state_of_its_token(name, images, vocabulary, layout):
    model = compress(tiny_model(name), inter(vocabulary, layout=layout))
    entered = []
    for layer in find_layers(model):
        layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    taken = watch_embeddings(model)
    output = model(images, output_hidden_states=True)
    rows = taken[0][1].layout.rows
    tokens = tokens_of(images, vocabulary)
    assert torch.equal(rows[:, -64:] - rows[:, -64:].amin(dim=1, keepdim=True), tokens)
    assert len(output.hidden_states) == 3
    for hidden, tokens in zip(output.hidden_states, entered, strict=False):
        assert torch.equal(hidden, tokens.flatten(0, 1)[rows])
    for hidden in (output.last_hidden_state, output.hidden_states[-1]):
        for states, mine in zip(hidden, rows, strict=True):
            which = states.unique(dim=0, return_inverse=True)[1]
            assert torch.equal(which.unsqueeze(0) == which.unsqueeze(1), mine.unsqueeze(0) == mine.unsqueeze(1))
    assert not any(torch.equal(output.last_hidden_state, hidden) for hidden in output.hidden_states[:2])
    assert current_forward() is None


def test_without_words_in_reach_a_model_answers_as_the_plain_one(model, images, vocabulary, layout):
    """No patch takes a word, so only the layout's machinery is left: grouping, biased attention, the way back."""
    plain = answers(model, images)
    far = VisualVocabulary(-vocabulary.words - 5)
    compress(model, inter(far, threshold=1e-9, layout=layout))
    torch.testing.assert_close(answers(model, images), plain, atol=1e-5, rtol=1e-5)


def test_proportional_attention_equals_attention_over_the_repeated_tokens(images, vocabulary):
    """Softmax over keys with + log s is softmax over each key s times: one layer by hand."""
    model = compress(tiny_model("vit"), inter(vocabulary))
    layer = find_layers(model)[0]
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    hidden, plan = embedded(model, images[3:4])
    sizes = plan.layout.sizes[0].long()
    assert sizes.max() > 1
    with torch.no_grad():
        expected = layer(hidden.repeat_interleave(sizes, dim=1))  # outside of a forward: plain attention
    found, expected = (value[0] if isinstance(value, tuple) else value for value in (seen[0], expected))
    first = torch.cat((torch.zeros(1, dtype=torch.long), sizes.cumsum(0)[:-1]))
    torch.testing.assert_close(found, expected[:, first], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_the_same_words(model, images, vocabulary, dtype):
    images = images.to(dtype).float()
    taken = watch_embeddings(compress(model, inter(vocabulary)))
    expected = answers(model, images)
    found = answers(model.to(dtype), images.to(dtype))
    assert torch.equal(taken[0][1].layout.rows, taken[1][1].layout.rows)
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_gradients_reach_every_parameter_that_the_plain_model_trains(model, images, vocabulary, layout):
    def trained() -> set[str]:
        model.zero_grad(set_to_none=True)
        forward(model.train(), images).float().pow(2).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain = trained()
    compress(model, inter(vocabulary, layout=layout))
    with torch.inference_mode():
        forward(model, images)
    assert trained() == plain


def test_restore_gives_the_exact_plain_model_back(model, images, vocabulary):
    require_restored(model, images, inter(vocabulary), {"keep_ratio": 0.5}, inter(vocabulary, threshold=0.2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_compressed_and_independent(model, images, vocabulary, copied):
    expected = answers(compress(model, inter(vocabulary)), images)
    twin = copied(model)
    restore(model)
    torch.testing.assert_close(answers(twin, images), expected)


def test_two_threads_share_one_model(vocabulary):
    model = compress(tiny_model("dinov2-classifier"), inter(vocabulary))
    batches = [sample_pixel_values(1 + i % 3) * (0.1 + i % 4) + 1 for i in range(40)]
    expected = [answers(model, batch) for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda batch: answers(model, batch), batches))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_switching_the_attention_implementation_keeps_the_layout(images, vocabulary):
    model = compress(tiny_model("vit"), inter(vocabulary))
    expected = answers(model, images)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(answers(model, images), expected, atol=1e-5, rtol=1e-5)
    restore(model)
    assert model.config._attn_implementation == "eager"


def test_an_attention_that_takes_no_bias_is_refused_and_the_model_stays_plain(images, vocabulary):
    model = tiny_model("vit")
    plain = answers(model, images)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match=r"'flex_attention'.* eager, sdpa, flash.*attn_implementation='sdpa'"):
        compress(model, inter(vocabulary))
    model.config._attn_implementation = "sdpa"
    assert torch.equal(answers(model, images), plain) and getattr(model.config, "vwt", None) is None


@pytest.mark.parametrize("count", [1, 5])
def test_attentions_are_refused(model, images, vocabulary, layout, count):
    model.set_attn_implementation("eager")
    compress(model, inter(vocabulary, layout=layout))
    images = images[:count]
    for setting in (model.config.vwt, {"dropped": "merge"}, {"dropped": "merge", "output": "compressed"}):
        compress(model, setting)
        with pytest.raises(ValueError, match=r"output_attentions .*restore\(model\)"):
            forward(model, images, output_attentions=True)
    assert answers(model, images).isfinite().all() and current_forward() is None


def test_a_refused_setting_leaves_the_one_that_the_model_has(images, vocabulary):
    model = compress(tiny_model("vit"), {"keep_ratio": 0.5})
    expected = answers(model, images)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="grouped patches need one of"):
        compress(model, VWTConfig(dropped="merge"))
    model.config._attn_implementation = "sdpa"
    assert torch.equal(answers(model, images), expected) and model.config.vwt["keep_ratio"] == 0.5


def test_stochastic_depth_draws_for_each_image(images, vocabulary):
    config = transformers.Dinov2Config(**TINY, drop_path_rate=0.5)
    model = compress(transformers.Dinov2Model(config).train(), inter(vocabulary))
    rows = []
    find_layers(model)[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(images)
    model.eval()(images)
    find_layers(model)[1].train()  # as where the last layers alone are trained
    model(images)
    assert rows == [5, 1, 5]
    model.eval()(images)
    assert rows[3:] == [1]
    compress(model.train(), inter(vocabulary, layout="packed"))
    model.config.drop_path_rate = 0.0  # by which the layers were not made
    with pytest.raises(ValueError, match=r"drop_path_rate.*layout='auto'"):
        model(images)


def test_stochastic_depth_that_was_put_in_after_a_forward_draws_for_each_image(images, vocabulary):
    model = compress(transformers.Dinov2Model(transformers.Dinov2Config(**TINY)).train(), inter(vocabulary))
    rows = []
    layer = find_layers(model)[0]
    layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    model(images)
    layer.drop = Dinov2DropPath(0.5).train()
    model(images)
    assert rows == [1, 5]


def test_gradient_checkpointing_gives_the_same_gradients(model, images, vocabulary, layout):
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        forward(model, images).float().square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    compress(model.train(), inter(vocabulary, layout=layout))
    expected = gradients()
    model.gradient_checkpointing_enable()
    for name, found in gradients().items():
        torch.testing.assert_close(found, expected[name], msg=name)
    restore(model)
    assert forward(model, images).isfinite().all()


def test_forward_by_itself_becomes_a_call_and_embeddings_by_themselves_are_refused(images, vocabulary):
    """sentence-transformers and PEFT run `model.forward`."""
    model = compress(tiny_model("vit"), inter(vocabulary))
    assert torch.equal(model.forward(images)[0], answers(model, images))
    with pytest.raises(RuntimeError, match=r"Call model\(\.\.\.\), and no part"):
        model.embeddings(images)


@pytest.mark.parametrize("name", ["dinov2-classifier", "clip-vision"])
def test_autocast_takes_the_same_words(name, images, vocabulary):
    model = compress(tiny_model(name), inter(vocabulary))
    with torch.autocast("cpu", torch.bfloat16):
        found = answers(model, images)
    torch.testing.assert_close(found.float(), answers(model, images), atol=0.05, rtol=0.05)
    words = index_words(vocabulary.normalized(**STATISTICS))
    expected = nearest_words(patchify(images, (4, 4)), words, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            nearest_words(patchify(images, (4, 4)), index_words(vocabulary.normalized(**STATISTICS)), 0.05), expected
        )


def test_models_that_share_a_config_do_not_share_a_setting(images, vocabulary):
    config = transformers.ViTConfig(**TINY)
    one, other = transformers.ViTModel(config).eval(), transformers.ViTModel(config).eval()
    plain = answers(other, images)
    compress(one, inter(vocabulary))
    assert torch.equal(answers(other, images), plain) and getattr(other.config, "vwt", None) is None
    twin = transformers.AutoModel.from_config(one.config, vwt=False).eval()
    assert answers(twin, images).isfinite().all() and twin.config.vwt is None and one.config.vwt is not None
    config.vwt = True
    first, second = transformers.AutoModel.from_config(config), transformers.AutoModel.from_config(config)
    restore(first)
    assert config.vwt is True and second.config.vwt["method"] == "gradual"


def test_restore_reaches_a_tower_that_was_compressed_alone(images, vocabulary):
    clip = tiny_model("clip-classifier")
    plain = answers(clip, images)
    compress(clip.vision_model, inter(vocabulary))
    restore(clip)
    assert torch.equal(answers(clip, images), plain) and clip.vision_model.config.vwt is None


def test_a_processor_that_does_not_rescale_is_taken_at_its_word(tmp_path, vocabulary):
    """127.5 on pixels up to 255 is 0.5 on pixels up to 1."""
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil
    for name, fields in (
        ("raw", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}),
        ("usual", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
    ):
        tiny_model("vit").save_pretrained(tmp_path / name)
        processor(size={"height": 32, "width": 32}, **fields).save_pretrained(tmp_path / name)
    settings = [
        transformers.AutoModel.from_pretrained(tmp_path / n, vwt=vocabulary).config.vwt for n in ("raw", "usual")
    ]
    assert settings[0]["image_mean"] == pytest.approx([0.5] * 3) and settings[0]["image_std"] == pytest.approx(
        [0.5] * 3
    )
    assert settings[1]["image_mean"] == [0.5] * 3


def test_a_processor_of_images_that_are_scaled_already_is_taken_at_its_word():
    """Usual statistics are of pixels up to 1."""
    processor = transformers.ViTImageProcessorPil(do_rescale=False, image_mean=[0.4, 0.5, 0.6], image_std=[0.2] * 3)
    assert processor_statistics(processor, 3) == ((0.4, 0.5, 0.6), (0.2,) * 3)
    for nothing in ({"do_normalize": False}, {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}):
        processor = transformers.ViTImageProcessorPil(do_rescale=False, **nothing)
        with pytest.raises(ValueError, match="neither rescales nor normalises images, so that nothing says which"):
            processor_statistics(processor, 3)


def test_what_is_no_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary is a Tensor; expected a Hub id, a folder or"):
        VWTConfig(method="inter", vocabulary=torch.rand(5, 3, 4, 4))


def test_a_wrong_patch_size_or_channel_count_is_refused_before_the_model_runs():
    model = tiny_model("vit")
    with pytest.raises(ValueError, match=r"16×16 pixels, the model's patches 4×4"):
        compress(model, inter(VisualVocabulary(torch.rand(3, 3, 16, 16))))
    grey = VisualVocabulary(torch.rand(3, 1, 4, 4))
    with pytest.raises(ValueError, match="1 channels, the model's patches 3"):
        compress(model, inter(grey, image_mean=[0.5], image_std=[0.5]))
    assert getattr(model.config, "vwt", None) is None


def test_of_a_mean_and_a_deviation_the_one_that_is_not_given_is_the_image_processors(vocabulary, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path)
    for given in ({"image_mean": [0.3] * 3}, {"image_std": [0.25] * 3}):
        model = transformers.AutoModel.from_pretrained(
            tmp_path, vwt=VWTConfig(method="inter", vocabulary=vocabulary, **given)
        )
        found = {name: model.config.vwt[name] for name in ("image_mean", "image_std")}
        assert found == {"image_mean": [0.4] * 3, "image_std": [0.2] * 3} | given


def test_a_model_that_does_not_say_how_its_images_are_normalised_is_refused(vocabulary):
    with pytest.raises(ValueError, match=r'Give VWTConfig\(method="inter", image_mean=\.\.\., image_std=\.\.\.\)'):
        compress(tiny_model("vit"), vocabulary)
    with pytest.raises(ValueError, match="vocabulary is None"):
        compress(tiny_model("vit"), {"method": "inter"})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": "inter", "threshold": 2.5}, r"threshold is 2\.5; expected a cosine distance in \[0, 2\]"),
        ({"method": "inter", "image_std": [0, 1, 1]}, "image_std is .*positive numbers"),
        ({"threshold": 0.2}, "threshold is 0.2, but method is 'intra'"),
        ({"method": "inter", "keep_ratio": 0.2}, "keep_ratio is 0.2, but method is 'inter'"),
        ({"method": "inter", "proportional_attention": 1}, "proportional_attention is 1; expected True or False"),
    ],
)
def test_a_bad_setting_is_refused_by_field_value_and_range(fields, words):
    with pytest.raises(ValueError, match=words):
        VWTConfig(**fields)


@pytest.fixture
def folder(tmp_path, vocabulary):
    tiny_model("vit").save_pretrained(tmp_path / "model")
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil
    processor(size={"height": 32, "width": 32}, **STATISTICS).save_pretrained(tmp_path / "model")
    vocabulary.save_pretrained(tmp_path / "words")
    return tmp_path


@pytest.mark.parametrize("auto", [transformers.AutoModel, transformers.ViTModel])
def test_a_folder_of_words_serves_a_checkpoint_by_its_own_statistics(folder, images, vocabulary, auto):
    expected = answers(compress(tiny_model("vit"), inter(vocabulary, threshold=0.1)), images)
    model = auto.from_pretrained(folder / "model", vwt=str(folder / "words"))
    torch.testing.assert_close(answers(model, images), expected, atol=1e-6, rtol=1e-5)
    assert model.config.vwt["image_std"] == STATISTICS["image_std"] and model.config.vwt["vocabulary"] is None


def test_a_saved_model_carries_its_words_and_loads_from_wherever_it_lies(folder, images, vocabulary):
    model = transformers.AutoModel.from_pretrained(folder / "model", vwt=inter(folder / "words"))
    expected = answers(model, images)
    model.save_pretrained(folder / "short")
    (folder / "words/vocabulary.safetensors").unlink()
    (folder / "short").rename(folder / "moved")
    for auto in (transformers.AutoModel, transformers.ViTModel):
        torch.testing.assert_close(answers(auto.from_pretrained(folder / "moved"), images), expected)
    off = transformers.AutoModel.from_pretrained(folder / "moved", vwt=False)
    torch.testing.assert_close(answers(off, images), answers(tiny_model("vit"), images))
    saved = json.loads((folder / "moved/config.json").read_text())
    assert "vwt_sdpa" not in json.dumps(saved) and saved["vwt"]["vocabulary"] is None


def test_another_threshold_keeps_the_words_that_the_model_has(folder, images, vocabulary):
    model = compress(transformers.AutoModel.from_pretrained(folder / "model"), vocabulary)
    before = answers(model, images)
    compress(model, {**model.config.vwt, "threshold": 0.4})
    assert model.config.vwt["threshold"] == 0.4 and torch.equal(lexicon_of(model).vocabulary.words, vocabulary.words)
    found = answers(model, images)
    torch.testing.assert_close(found, answers(compress(tiny_model("vit"), inter(vocabulary, threshold=0.4)), images))
    assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("change", ["fewer", "in place"])
def test_a_model_is_saved_with_the_words_that_it_runs_by(change, images, vocabulary, tmp_path):
    words = vocabulary.copy()
    model = compress(tiny_model("vit"), inter(words, threshold=0.4))
    expected = answers(model, images)
    if change == "fewer":
        words.words, words.frequencies = words.words[:2], None
    else:
        words.words.fill_(0.5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(answers(transformers.AutoModel.from_pretrained(tmp_path), images), expected)
    torch.testing.assert_close(answers(copy.deepcopy(model), images), expected)
    changed = answers(compress(tiny_model("vit"), inter(words, threshold=0.4)), images)
    assert changed.shape != expected.shape or (changed - expected).abs().max() > 1e-3


def test_a_folder_without_the_words_that_its_config_speaks_of_is_refused(folder, vocabulary):
    model = transformers.AutoModel.from_pretrained(folder / "model", vwt=str(folder / "words"))
    model.save_pretrained(folder / "short")
    for words in (folder / "short").glob("visual_words-*/*.safetensors"):
        words.unlink()
    with pytest.raises((OSError, ValueError), match=r"short.*vocabulary.*\.safetensors"):
        transformers.AutoModel.from_pretrained(folder / "short")


def test_a_pipeline_takes_a_vocabulary(folder, vocabulary):
    extract = transformers.pipeline(
        "image-feature-extraction", model=str(folder / "model"), model_kwargs={"vwt": str(folder / "words")}
    )
    assert extract.model.config.vwt["method"] == "inter"


@pytest.mark.parametrize(
    ("backbone", "config", "prefix"),
    [
        (transformers.Dinov2Backbone, transformers.Dinov2Config, 1),
        (transformers.DINOv3ViTBackbone, transformers.DINOv3ViTConfig, 0),
    ],
)
def test_a_backbone_gives_a_hidden_state_to_every_patch(backbone, config, prefix, images, vocabulary, layout):
    """Of its stages, and of images as alone; DINOv3's leaves its prefix tokens out."""
    stages = {"out_features": ["stem", "stage1", "stage2"], "reshape_hidden_states": False}
    model = backbone(config(**TINY, **stages)).eval()
    for setting in (inter(vocabulary, layout=layout), VWTConfig(dropped="merge")):
        compress(model, setting)
        maps = model(images).feature_maps
        assert [values.shape for values in maps] == [(5, prefix + 64, 32)] * 3
        for one, image in enumerate(images):
            for values, alone in zip(maps, model(image[None]).feature_maps, strict=True):
                torch.testing.assert_close(values[one], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("number", [58, 59, 60])
def test_maps_of_a_backbone_are_its_hidden_states_whatever_the_number_of_tokens(number, images):
    """DINOv3's leave five prefix tokens out: of 64 patches, maps are as long as a plan of 59 and the prefix."""
    stages = {"out_features": ["stage1", "stage2"], "reshape_hidden_states": False, "num_register_tokens": 4}
    model = transformers.DINOv3ViTBackbone(transformers.DINOv3ViTConfig(**TINY, **stages)).eval()
    compress(model, VWTConfig(dropped="merge", num_patches=number))
    found = model(images, output_hidden_states=True)
    first, last = found.hidden_states[1:]
    torch.testing.assert_close(found.feature_maps, (model.norm(first)[:, 5:], model.norm(last)[:, 5:]))


def test_a_revision_is_that_of_a_repository_alone(folder, vocabulary):
    named = {"method": "inter", "revision": "v2", **STATISTICS}
    for words in ({}, {"vocabulary": str(folder / "words")}, {"vocabulary": vocabulary}):
        with pytest.raises(ValueError, match=r"VWTConfig\.revision is 'v2', and vocabulary is .*expected a Hub id"):
            compress(tiny_model("vit", **({} if words else {"patch_size": 16})), named | words)


@pytest.mark.parametrize("how", [{}, {"return_dict": False}])
def test_a_backbone_gives_no_attention_between_groups(how, images):
    stages = {"out_features": ["stage1"], "attn_implementation": "eager"}
    model = transformers.Dinov2Backbone(transformers.Dinov2Config(**TINY, **stages)).eval()
    compress(model, VWTConfig(dropped="merge", num_patches=20))
    with pytest.raises(ValueError, match="output_attentions gives the attention between patches"):
        model(images, output_attentions=True, **how)
