"""Words that come with the call of a model: `patch_words` in place of a search."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from settings import SETTINGS, inter
from test_families import sample_images
from test_generation import IMAGE_TOKEN, IMAGE_TOKENS, blip, blip_2, built, llava, paligemma
from tiny import MODELS, TINY, answers, forward, inputs, sample_pixel_values, tiny_model
from vwt_hf import VWTConfig, compress, register, restore, unregister
from vwt_hf.families import family_of
from vwt_hf.forward import GivenWords, call_with, current_forward
from vwt_hf.plans import Grouped, Kept

EVERY = list(MODELS)
KINDS = {
    **SETTINGS,
    "random": VWTConfig(criterion="random"),
    "grid": VWTConfig(criterion="grid", keep_ratio=0.3),
    "grid-merge": VWTConfig(criterion="grid", keep_ratio=0.3, dropped="merge"),
    "padded": inter(layout="padded"),
}
GIVEN = {"method": "given"}
# What a version differs in is how models take words: on the oldest, a plan of each of both kinds.
kind = pytest.mark.parametrize(
    "setting",
    [
        pytest.param(setting, id=name, marks=[pytest.mark.newest] * (name not in ("discard", "inter")))
        for name, setting in KINDS.items()
    ],
)


@pytest.fixture
def images() -> torch.Tensor:
    return sample_images()


def words_of(plans: list) -> torch.Tensor:
    plan, patches, _ = plans[-1]
    return plan.patch_words(len(patches.pixel_values), patches.count)


def answered(model: transformers.PreTrainedModel, images: torch.Tensor, **kwargs) -> torch.Tensor:
    """What `answers` gives; where images are padded and patches left out, rows are of no patch: what the head gives."""
    if type(model).__name__ != "Siglip2VisionModel":
        return answers(model, images, **kwargs)
    with torch.no_grad():
        return model(**inputs(model, images), **kwargs).pooler_output


def assert_same(plan: Kept | Grouped, other: Kept | Grouped) -> None:
    assert type(plan) is type(other)
    if isinstance(plan, Kept):
        assert torch.equal(plan.kept.expand_as(other.kept), other.kept) and plan.prefix == other.prefix
        return
    assert torch.equal(plan.layout.rows, other.layout.rows) and torch.equal(plan.layout.sizes, other.layout.sizes)
    assert plan.layout.runs == other.layout.runs and plan.layout.packed == other.layout.packed
    if plan.sources is not None:
        assert torch.equal(plan.sources, other.sources)


@kind
@pytest.mark.parametrize("name", EVERY)
def test_a_model_given_its_words_answers_as_if_it_had_searched(name, setting, images, plans, monkeypatch):
    model = compress(tiny_model(name), setting)
    found = answered(model, images)
    plan = plans[-1][0]
    words = words_of(plans)

    def refuse(*_):
        raise AssertionError("it searched")

    for search in ("plan", "_choose"):
        monkeypatch.setattr(type(setting), search, refuse, raising=False)
    given = answered(model, images, patch_words=words)
    assert plans[-1][2] is not None and current_forward() is None
    torch.testing.assert_close(given, found, atol=1e-5, rtol=1e-5)
    if family_of(model).padded is None:
        assert_same(plan, plans[-1][0])
    with pytest.raises(AssertionError, match="it searched"):
        answers(model, images)


# Blocks at half the size are shown by models with that setting alone.
@pytest.mark.parametrize("setting", [pytest.param(SETTINGS[kind], id=kind) for kind in SETTINGS if kind != "coarse"])
@pytest.mark.parametrize("name", EVERY)
def test_a_model_that_only_goes_by_words_answers_as_the_one_that_found_them(name, setting, images, plans):
    found = answered(compress(tiny_model(name), setting), images)
    words = words_of(plans)
    representatives = setting.method == "local" or getattr(setting, "dropped", None) == "merge"
    by_words = GIVEN | {"tokens": "representatives" if representatives else "means"}
    model = compress(tiny_model(name), by_words)
    if family_of(model).padded is not None and getattr(setting, "dropped", None) == "discard":
        with pytest.raises(ValueError, match=r"leave patches out, and the images come as padded patches"):
            answers(model, images, patch_words=words)
        return
    torch.testing.assert_close(answered(model, images, patch_words=words), found, atol=1e-5, rtol=1e-5)


def test_the_words_count_and_not_the_pixels(images):
    """Words that no search would find: the left half of each image is one token."""
    model = compress(tiny_model("vit"), SETTINGS["inter"])
    words = torch.arange(64).view(8, 8).repeat(4, 1, 1)
    words[:, :, :4] = 1000
    hidden = answers(model, images, patch_words=words.flatten(1))[:, 1:].unflatten(1, (8, 8))
    assert torch.equal(hidden[:, :, :4], hidden[:, :1, :1].expand(-1, 8, 4, -1))
    assert len(hidden[1].flatten(0, 1).unique(dim=0)) == 33


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (torch.zeros(4, 49), r"patch_words is a torch.float32; expected a tensor of integers"),
        ([[0] * 64] * 4, r"patch_words is a list"),
        (torch.ones(4, 64, dtype=torch.bool), r"patch_words is a torch.bool; expected a tensor of integers"),
        (torch.zeros(4, 49, dtype=torch.int64), r"\(4, 49\).*4 images into 64 \(8 × 8\) patches.*\(4, 64\)"),
        (torch.zeros(3, 64, dtype=torch.int64), r"\(3, 64\), of 3 images, .* given 4 images"),
        (torch.zeros(8, 64, dtype=torch.int64), r"\(8, 64\), of 8 images, .* given 4 images"),
        (torch.zeros(64, dtype=torch.int64), r"patch_words are \(64,\)"),
    ],
)
@pytest.mark.parametrize("setting", [*SETTINGS.values(), GIVEN], ids=[*SETTINGS, "given"])
def test_words_of_other_images_are_refused_with_both_shapes(setting, words, said, images):
    model = compress(tiny_model("vit"), setting)
    with pytest.raises((TypeError, ValueError), match=said):
        answers(model, images, patch_words=words)
    assert current_forward() is None


def test_words_of_another_kind_of_setting_are_refused(images, plans):
    words = {}
    for name, setting in SETTINGS.items():
        answers(compress(tiny_model("vit"), setting), images)
        words[name] = words_of(plans)

    def said(setting: str, given: str) -> str:
        with pytest.raises(ValueError, match="made for another kind of setting") as error:
            answers(compress(tiny_model("vit"), SETTINGS[setting]), images, patch_words=words[given])
        return str(error.value)

    assert "its own index, or −1" in said("discard", "merge")
    assert "the word -1; expected the index of one that has its own" in said("merge", "discard")
    assert "the word -1; expected the number of a word" in said("inter", "discard")
    uneven = words["discard"].clone()
    uneven[0, uneven[0].argmax()] = -1
    with pytest.raises(ValueError, match="keep 31 to 32 patches of an image; expected the same number"):
        answers(compress(tiny_model("vit"), SETTINGS["discard"]), images, patch_words=uneven)


@pytest.mark.parametrize("kind", ["discard", "merge", "inter"])
@pytest.mark.parametrize("name", ["vit", "vit-classifier", "clip"])
def test_a_forward_that_is_called_by_itself_goes_by_words(name, kind, images, plans):
    model = compress(tiny_model(name), SETTINGS[kind])
    given = inputs(model, images)
    answers(model, images)
    words = words_of(plans)
    with torch.no_grad():
        found, again = model(**given, patch_words=words.flip(0)), model.forward(**given, patch_words=words.flip(0))
    assert plans[-1][2] is not None and current_forward() is None
    assert torch.equal(again[0], found[0])
    assert not torch.equal(again[0], model.forward(**given, patch_words=None)[0])


def test_a_model_that_keeps_everything_takes_no_words_that_group(images):
    model = compress(tiny_model("vit"), {"keep_ratio": 1.0})
    own = torch.arange(64).expand(4, -1)
    assert torch.equal(answers(model, images, patch_words=own), answers(model, images))
    with pytest.raises(ValueError, match=r"leave 1 tokens of 64 patches, and the setting of the model keeps all"):
        answers(model, images, patch_words=torch.zeros_like(own))
    with pytest.raises(ValueError, match="leave 63 tokens of 64 patches"):
        answers(model, images, patch_words=own.masked_fill(own == 5, -1))


def test_a_model_that_reads_every_patch_takes_no_words_that_leave_some_out(images):
    model = transformers.AutoBackbone.from_config(transformers.Dinov2Config(**TINY, reshape_hidden_states=True)).eval()
    compress(model, GIVEN)
    own = torch.arange(64).expand(4, -1)
    assert model(images, patch_words=own).feature_maps[-1].shape[2:] == (8, 8)
    with pytest.raises(ValueError, match="give patch 5 of image 0 the word -1; expected the number of a word"):
        model(images, patch_words=own.masked_fill(own == 5, -1))


def test_padded_patches_that_are_all_kept_take_no_words_that_group():
    model, given = tiny_model("siglip2-vision"), inputs(tiny_model("siglip2-vision"), sample_images())
    compress(model, {"keep_ratio": 1.0})
    real = given["pixel_attention_mask"].bool()
    own = torch.arange(real.shape[1]).expand(real.shape).masked_fill(~real, -1)
    assert torch.equal(model(**given, patch_words=own)[0], model(**given)[0])
    with pytest.raises(ValueError, match=r"leave 1 tokens of \d+ patches, and the setting of the model keeps all"):
        model(**given, patch_words=own.clamp(max=0))


def test_words_that_leave_out_padded_patches_are_refused_with_what_to_do():
    model, given = tiny_model("siglip2-vision"), inputs(tiny_model("siglip2-vision"), sample_images())
    real = given["pixel_attention_mask"].bool()
    own = torch.arange(real.shape[1]).expand(real.shape).masked_fill(~real, -1)
    compress(model, {"method": "given"})
    model(**given, patch_words=own)
    own[:, 1] = -1
    with pytest.raises(ValueError, match=r"leave patches out, and the images come as padded patches .*Load the model"):
        model(**given, patch_words=own)


@pytest.mark.parametrize("name", ["vit", "clip", "blip-vision"])
def test_a_plain_model_refuses_words_and_says_what_to_do(name, images):
    model = tiny_model(name)
    for _ in range(2):
        with pytest.raises(ValueError, match=r'not compressed.*compress\(model, \{"method": "given"\}\)'):
            answers(model, images, patch_words=torch.zeros(4, 64, dtype=torch.int64))
        restore(compress(model))


def test_unregistering_takes_the_refusal_back():
    call, generate = transformers.PreTrainedModel.__call__, transformers.GenerationMixin.generate
    unregister()
    try:
        assert "__call__" not in vars(transformers.PreTrainedModel)
        assert transformers.GenerationMixin.generate is not generate
    finally:
        register()
    assert transformers.PreTrainedModel.__call__ is not call


def test_without_the_registered_attention_a_model_says_what_is_missing(images):
    model = compress(tiny_model("vit"), SETTINGS["merge"])
    expected = answers(model, images)
    unregister()
    try:
        for call in (lambda: answers(model, images), lambda: compress(tiny_model("vit"), SETTINGS["merge"])):
            with pytest.raises(RuntimeError, match=r"'vwt_sdpa'.*Call vwt_hf\.register\(\)"):
                call()
    finally:
        register()
    assert torch.equal(answers(model, images), expected)


def test_a_model_that_needs_words_says_so(images):
    with pytest.raises(ValueError, match=r"was given none with 4 images; call it with patch_words="):
        answers(compress(tiny_model("vit"), GIVEN), images)


def test_words_for_generation_are_of_one_batch_of_images(images, plans):
    """Which may be embedded at each step; frames of a video are another batch."""
    model = compress(tiny_model("vit"), SETTINGS["inter"])
    answers(model, images)
    words = words_of(plans)
    for other in (images.flip(0), images[:2]):
        refused = pytest.raises(ValueError, match="two batches of images, as of images and of a video")
        with refused, call_with(model, GivenWords(words, generates=True)):
            model(pixel_values=images)
            model(pixel_values=images.clone())
            model(pixel_values=other)


def test_words_that_no_images_were_given_with_are_refused():
    model = compress(tiny_model("clip"), SETTINGS["inter"])
    text = {"input_ids": torch.tensor([[97, 5, 98]])}
    with pytest.raises(ValueError, match="given to a CLIPTextModel that is not compressed"):
        model.get_text_features(**text, patch_words=torch.zeros(1, 64, dtype=torch.int64))
    lava = compress(built(llava), SETTINGS["inter"])
    with pytest.raises(ValueError, match="given to a call that embeds no images by them"):
        lava(**text, patch_words=torch.zeros(1, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="given to a call that embeds no images by them"):
        lava.generate(**text, patch_words=torch.zeros(1, 64, dtype=torch.int64), max_new_tokens=2)
    assert current_forward() is None


@pytest.mark.parametrize("setting", [SETTINGS["discard"], SETTINGS["merge"], SETTINGS["local"]])
@pytest.mark.parametrize("wait", ["embeddings", "layer"])
def test_a_model_that_a_hook_runs_within_a_call_with_words_goes_by_its_own(setting, wait, images, plans):
    model, teacher = compress(tiny_model("vit"), setting), compress(tiny_model("dinov3"), setting)
    expected = answers(model, images)
    words, taught, found = words_of(plans), answers(teacher, images), []
    part = model.embeddings if wait == "embeddings" else model.layers[1]
    part.register_forward_pre_hook(lambda *_: found.append(answers(teacher, images)))
    torch.testing.assert_close(answers(model, images, patch_words=words), expected)
    with call_with(model, GivenWords(words, generates=True)):
        model(pixel_values=images)
    assert len(found) == 2 and all(torch.equal(one, taught) for one in found)
    assert current_forward() is None


@pytest.mark.parametrize("setting", [SETTINGS["discard"], SETTINGS["local"], GIVEN])
def test_a_shallow_copy_goes_by_words_as_what_it_was_copied_from(setting, images):
    words = torch.arange(64).div(2, rounding_mode="floor").mul(2).repeat(4, 1)
    if setting is SETTINGS["discard"]:
        words = torch.where(torch.arange(64) < 32, torch.arange(64), -1).repeat(4, 1)
    model = compress(tiny_model("vit"), setting)
    expected = answers(model, images, patch_words=words)
    assert torch.equal(answers(copy.copy(model), images, patch_words=words), expected)


@pytest.mark.parametrize("make", [blip, blip_2])
def test_words_do_not_reach_a_part_by_a_generate_that_hands_none_on_and_that_is_said(make, images):
    model = built(make)
    words = torch.zeros(4, 64, dtype=torch.int64)
    given = {"pixel_values": images, "patch_words": words, "max_new_tokens": 2}
    for setting, said in ((SETTINGS["merge"], "compress that model itself"), (GIVEN, "compress the whole model")):
        compress(model.vision_model, setting)
        with pytest.raises(ValueError, match=said):
            model.generate(**given)


@pytest.mark.parametrize("name", [name for name in EVERY if hasattr(MODELS[name][0], "get_image_features")])
@pytest.mark.parametrize("setting", list(SETTINGS.values()), ids=list(SETTINGS))
def test_image_features_go_by_words(name, setting, images, plans):
    model = compress(tiny_model(name), setting)
    given = {key: value for key, value in inputs(model, images).items() if key != "input_ids"}
    with torch.no_grad():
        found = model.get_image_features(**given)
        words = words_of(plans)
        again = model.get_image_features(**given, patch_words=words)
    assert plans[-1][2] is not None
    torch.testing.assert_close(again.pooler_output, found.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", list(IMAGE_TOKENS), ids=lambda make: make.__name__)
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_goes_by_words(make, beams, plans):
    model = compress(built(make), SETTINGS["inter"])
    tiled = IMAGE_TOKENS[make] == 200
    pixel_values = sample_pixel_values(6, 32, 32).unflatten(0, (2, 3)) if tiled else sample_pixel_values(2)
    prompt = torch.tensor([[1, *[IMAGE_TOKEN] * IMAGE_TOKENS[make], 5]]).repeat(2, 1)
    given = {"pixel_values": pixel_values, "input_ids": prompt, "max_new_tokens": 3, "num_beams": beams}
    given |= {"image_sizes": torch.tensor([[32, 64]] * 2)} if tiled else {}
    found = model.generate(**given, output_scores=True, return_dict_in_generate=True)
    plan, patches, _ = plans[-1]
    words = plan.patch_words(len(patches.pixel_values), patches.count)
    if beams > 1 and len(words) > pixel_values.shape[0] * (3 if tiled else 1):
        words = words[::beams] if not tiled else words.unflatten(0, (2, beams, 3))[:, 0].flatten(0, 1)
    if tiled:
        words = words.unflatten(0, (2, 3))
        words = torch.cat((words, torch.full_like(words[:, :1], -1)), dim=1)  # tiles that are none
    again = model.generate(**given, patch_words=words, output_scores=True, return_dict_in_generate=True)
    assert plans[-1][2] is not None
    for one, other in zip(found.scores, again.scores, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def generated(model: transformers.PreTrainedModel, *args, **kwargs) -> torch.Tensor:
    """What PaliGemma writes about two images, to which it repeats them for beams."""
    prompt = torch.tensor([[1, *[IMAGE_TOKEN] * IMAGE_TOKENS[paligemma], 5]]).repeat(2, 1)
    return model.generate(prompt, *args, pixel_values=sample_pixel_values(2), max_new_tokens=3, **kwargs)


def test_words_hold_for_each_step_of_a_generation_without_a_cache(plans):
    model = compress(built(paligemma), SETTINGS["inter"])
    expected = generated(model, use_cache=False)
    steps = len(plans)
    words = words_of(plans)
    plans.clear()
    assert torch.equal(generated(model, use_cache=False, patch_words=words), expected)
    assert len(plans) == steps and all(given is not None for _, _, given in plans)
    compress(model, GIVEN)
    assert torch.equal(generated(model, use_cache=False, patch_words=words), expected)


def test_words_are_repeated_as_often_as_the_images_and_no_oftener(plans):
    model = compress(built(paligemma), SETTINGS["inter"])
    beams = transformers.GenerationConfig(num_beams=2, do_sample=False)
    expected = generated(model, beams)
    words = words_of(plans)
    words = words[::2] if len(words) == 4 else words
    assert torch.equal(generated(model, beams, patch_words=words), expected)
    assert torch.equal(generated(model, generation_config=beams, patch_words=words), expected)
    model.generation_config.num_beams = 2  # which a config without a number of its own leaves as it is
    short = transformers.GenerationConfig(do_sample=False)
    assert torch.equal(generated(model, generation_config=short, patch_words=words), expected)
    model.generation_config.num_beams = 1
    with pytest.raises(ValueError, match=r"\(1, 64\), of 1 images, and the model is given 2 images"):
        generated(model, patch_words=words[:1])


def test_an_encoder_that_is_compressed_alone_generates_by_words(plans):
    text = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 97}
    decoder = transformers.GPT2LMHeadModel(transformers.GPT2Config(**text, add_cross_attention=True))
    model = transformers.VisionEncoderDecoderModel(encoder=tiny_model("vit"), decoder=decoder).eval()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 1
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    compress(model.encoder, SETTINGS["inter"])
    pixel_values = sample_pixel_values(2)
    asked = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    found = model.generate(pixel_values, **asked)
    words = words_of(plans)
    assert torch.equal(model.generate(pixel_values, patch_words=words, **asked), found) and plans[-1][2] is not None
    logits = model(pixel_values=pixel_values, decoder_input_ids=found, patch_words=words).logits
    torch.testing.assert_close(logits, model(pixel_values=pixel_values, decoder_input_ids=found).logits)


def test_the_signature_of_generate_stays_and_that_of_forward_has_the_words():
    plain = built(blip)
    model = compress(built(blip), SETTINGS["merge"])
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)
    names, own = (list(inspect.signature(each.forward).parameters) for each in (model, plain))
    assert names == [*own[:-1], "patch_words", own[-1]] and own[-1] == "kwargs"
    assert inspect.signature(restore(model).forward) == inspect.signature(plain.forward)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Of mixed precision, which accelerate else keeps for the whole process."""
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(True)


def test_accelerate_unwraps_a_model_that_got_another_setting_since(accelerator, images):
    plain = answers(tiny_model("vit"), images)
    model = compress(tiny_model("vit"), SETTINGS["inter"])
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    compress(model, SETTINGS["merge"])
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(answers(unwrapped, images), answers(compress(tiny_model("vit"), SETTINGS["merge"]), images))
    assert torch.equal(answers(restore(unwrapped), images), plain)


def test_accelerate_unwraps_the_forward_of_mixed_precision(accelerator, images):
    model = compress(tiny_model("vit"), SETTINGS["merge"])
    found = answers(model, images)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert not torch.equal(answers(prepared, images), found)
    assert torch.equal(answers(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False), images), found)


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_the_signature_keeps_the_words_in_mixed_precision_and_after(name, accelerator, images):
    """`Trainer` drops the columns that it does not name."""
    plain = inspect.signature(tiny_model(name).forward)
    model = compress(tiny_model(name), SETTINGS["inter"])
    signature = inspect.signature(model.forward)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    assert inspect.signature(prepared.forward) == signature and "patch_words" in signature.parameters
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    expected = answers(model, images)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(answers(pickle.loads(pickle.dumps(model)), images), expected)
    torch.testing.assert_close(answers(compiled, images), expected)
    torch._dynamo.reset()
    for again in (model, copy.deepcopy(model)):
        assert inspect.signature(again.forward) == signature
        assert torch.equal(answers(again, images), expected)
    assert inspect.signature(compress(model, SETTINGS["merge"]).forward) == signature
    assert inspect.signature(restore(model).forward) == plain and "forward" not in vars(model)


@pytest.mark.parametrize("change", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_by_words_by_itself(change, images, plans):
    model = compress(tiny_model("clip"), SETTINGS["inter"])
    other = change(model)
    found = other.get_image_features(pixel_values=images).pooler_output
    words = words_of(plans)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    again = other.get_image_features(pixel_values=images, patch_words=words).pooler_output
    torch.testing.assert_close(again, found)


def test_threads_have_words_of_their_own(images, plans):
    model = compress(tiny_model("vit"), GIVEN)
    every = [torch.arange(64).expand(4, -1) // group for group in (1, 2, 4, 8) * 3]
    expected = [answers(model, images, patch_words=words) for words in every]
    found: list = [None] * len(every)

    def ask(place: int) -> None:
        found[place] = answers(model, images, patch_words=every[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(every))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_layers_by_the_words(reentrant, images):
    def gradients(checkpointed: bool) -> torch.Tensor:
        model = compress(tiny_model("vit"), GIVEN).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        pixel_values = images.clone().requires_grad_()
        forward(model, pixel_values, patch_words=torch.arange(64).expand(4, -1) // 3).square().sum().backward()
        return model.encoder.layer[0].mlp.fc1.weight.grad if hasattr(model, "encoder") else pixel_values.grad

    torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("name", ["given", "merge", "discard", "whole"])
def test_a_compiled_model_goes_by_words_and_without_them_by_its_own(name, images, plans):
    places = torch.arange(64).expand(4, -1)
    words = {"discard": torch.where(places % 2 == 0, places, -1), "whole": places}.get(name, places // 2 * 2)
    model = compress(tiny_model("vit"), {"given": GIVEN, "whole": {"keep_ratio": 1.0}}.get(name) or SETTINGS[name])
    compiled = torch.compile(model, backend="eager")
    by_words = {"patch_words": words}
    for given in (by_words,) if name == "given" else ({}, by_words, {}):
        with torch.no_grad():
            found = compiled(pixel_values=images, **given).last_hidden_state
        torch.testing.assert_close(found, answers(model, images, **given))
    with pytest.raises(ValueError, match=r"patch_words are \(4, 3\)"):
        compiled(pixel_values=images, patch_words=words[:, :3])


def test_rotary_positions_of_a_compiled_model_go_by_the_words_too(images):
    places = torch.arange(64).expand(4, -1)
    model = compress(tiny_model("dinov3"), SETTINGS["discard"])
    compiled = torch.compile(model, backend="eager")
    for given in ({}, {"patch_words": torch.where(places % 2 == 0, places, -1)}, {}):
        with torch.no_grad():
            found = compiled(pixel_values=images, **given).last_hidden_state
        torch.testing.assert_close(found, answers(model, images, **given))


@pytest.mark.parametrize("setting", [GIVEN, {"method": "coarse", "image_std": [0.5] * 3}], ids=["given", "coarse"])
def test_one_batch_of_words_is_for_one_batch_of_images(setting, images):
    model = compress(tiny_model("vit"), setting)
    inner, words = model.forward, torch.arange(64).expand(4, -1)

    def twice(pixel_values, **kwargs):
        inner(pixel_values, **kwargs)
        return model.embeddings(pixel_values)

    model.forward = twice
    with pytest.raises((ValueError, RuntimeError), match=r"two batches of images|outside the call"):
        model(pixel_values=images, patch_words=words)


def test_the_setting_is_saved(tmp_path, images):
    model = compress(tiny_model("vit"), GIVEN | {"tokens": "representatives"})
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.vwt == VWTConfig(method="given", tokens="representatives").to_dict()
    words = torch.arange(64).expand(4, -1) // 2 * 2
    torch.testing.assert_close(answers(loaded, images, patch_words=words), answers(model, images, patch_words=words))


@pytest.mark.parametrize("fields", [{"tokens": "mean"}, {"layout": "wide"}, {"output": "compressed"}])
def test_fields_that_are_not_valid_are_refused(fields):
    with pytest.raises(ValueError, match=rf"VWTConfig.{next(iter(fields))} is "):
        VWTConfig(method="given", **fields)


def test_a_tracer_that_replaces_calls_of_modules_sees_models_too():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: torch.nn.Module, name: str) -> bool:
            return isinstance(module, transformers.PreTrainedModel)

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = tiny_model("vit")

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.vision(pixel_values)

    assert [node.target for node in Tracer().trace(Holder()).nodes if node.op == "call_module"] == ["vision"]


@pytest.mark.parametrize("make", [llava, paligemma, blip_2])
def test_words_reach_a_tower_that_was_compressed_alone(make, images):
    """PaliGemma and BLIP-2 hand their towers nothing but pixels."""
    whole = built(make)
    tower = whole.vision_model if make is blip_2 else whole.model.vision_tower
    compress(tower, SETTINGS["local"])
    prompt = torch.tensor([[IMAGE_TOKEN] * IMAGE_TOKENS[make] + [1, 5, 7]]).repeat(len(images), 1)
    given = {"pixel_values": images, "input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    words = torch.arange(64).expand(len(images), -1) // 2 * 2
    with torch.no_grad():
        found, searched = whole(**given, patch_words=words).logits, whole(**given).logits
        with pytest.raises(ValueError, match=r"patch_words are \(4, 3\)"):
            whole(**given, patch_words=words[:, :3])
        compress(restore(whole), GIVEN | {"tokens": "representatives"})
        torch.testing.assert_close(found, whole(**given, patch_words=words).logits)
    assert not torch.allclose(found, searched)
