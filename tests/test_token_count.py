"""Tokens are counted of plain and compressed models, without padding."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import transformers
from accelerate.utils import compile_regions
from torch.utils.hooks import RemovableHandle

import vwt_hf
from settings import SETTINGS, gradual, inter
from test_families import sample_images
from tiny import MODELS, TEXT, TINY, answers, padded_patches, sample_pixel_values, tiny_model
from vwt_hf import compress
from vwt_hf.compress import reduce_hook_of

PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "registers": 4, "clip": 1, "beit": 1, "ijepa": 0, "siglip": 0, "dinov3": 4}


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


class ByName(transformers.ViTModel):
    """Hands its layers the tokens by keyword."""

    def forward(self, pixel_values: torch.Tensor, **_) -> torch.Tensor:
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states=hidden_states)
        return self.layernorm(hidden_states)


def test_layers_that_are_called_by_keyword_are_counted():
    given, by_name = tiny_model("vit"), ByName(tiny_model("vit").config).eval()
    by_name.load_state_dict(given.state_dict(), strict=False)
    counts = []
    for model in (given, by_name):
        compress(model, gradual(layout="padded"))
        with vwt_hf.count_tokens(model) as count, torch.no_grad():
            model(sample_pixel_values())
        counts.append(count.by_layer)
    assert counts[0] == counts[1] and counts[0][1] < counts[0][0]


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


@pytest.mark.parametrize("change", [lambda model: compress(model, {"keep_ratio": 0.25}), vwt_hf.restore])
@pytest.mark.parametrize("before", [None, {"keep_ratio": 0.5}, SETTINGS["merge"]], ids=["plain", "discard", "merge"])
def test_a_setting_that_changes_while_tokens_are_counted_is_an_error(before, change):
    model = tiny_model("vit")
    if before is not None:
        compress(model, before)
    with vwt_hf.count_tokens(model) as count:
        answers(model, sample_pixel_values())
        copied = copy.deepcopy(model)
        assert count.tokens == 3 * (65 if before is None else 33)
        present = reduce_hook_of(model.embeddings)
        change(model)
        counted = count.tokens
        if reduce_hook_of(model.embeddings) is not present:
            with pytest.raises(ValueError, match=r"called within count_tokens.*anew after each change"):
                answers(model, sample_pixel_values())
        assert count.tokens == counted
        answers(copied, sample_pixel_values())
    with vwt_hf.count_tokens(model) as count:
        answers(model, sample_pixel_values())
    assert count.mean == (65 if change is vwt_hf.restore else 17)


def test_a_forward_that_another_thread_began_before_the_block_does_not_count():
    model = compress(tiny_model("vit"), gradual(join_ratio=0.4))
    with vwt_hf.count_tokens(model) as alone:
        answers(model, sample_pixel_values())
    inside, go = threading.Event(), threading.Event()

    def wait(*_) -> None:
        if threading.current_thread() is other:
            inside.set()
            go.wait(60)

    hook = model.layers[0].register_forward_pre_hook(wait)
    other = threading.Thread(target=lambda: answers(model, sample_pixel_values(batch=5)))
    other.start()
    assert inside.wait(60)
    with hook, vwt_hf.count_tokens(model) as count:
        go.set()
        other.join()
        answers(model, sample_pixel_values())
    assert count == alone


def test_a_count_that_ends_within_the_forward_of_another_thread_does_not_disturb_it():
    model = compress(tiny_model("vit"), gradual())
    images, found = sample_pixel_values(), []
    expected = answers(model, images)
    counting = contextlib.ExitStack()
    counting.enter_context(vwt_hf.count_tokens(model))
    for module in model.modules():  # as torch is between the two tables in which it keeps a hook
        for number in set(module._forward_hooks_with_kwargs) & set(module._forward_hooks):
            if "count_tokens" in repr(getattr(module._forward_hooks[number], "_add", None)):
                del module._forward_hooks_with_kwargs[number]
                found.append(number)
    torch.testing.assert_close(answers(model, images), expected, rtol=0, atol=0)
    counting.close()
    assert found


def test_a_copy_that_is_made_within_the_block_counts_nothing_and_outlives_it(tmp_path):
    model = compress(tiny_model("vit"), gradual())
    expected = answers(model, sample_pixel_values())
    with vwt_hf.count_tokens(model) as count:
        copied, pickled = copy.deepcopy(model), pickle.dumps(model)
        answers(copied, sample_pixel_values())
        assert count.images == 0
    layer = weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert layer() is None
    for other in (copied, pickle.loads(pickled), pickle.loads(pickle.dumps(copied))):
        torch.testing.assert_close(answers(other, sample_pixel_values()), expected, rtol=0, atol=0)


def test_a_plain_model_that_is_pickled_within_the_block_takes_hooks_in_another_process(monkeypatch):
    model = tiny_model("vit")
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a process that is new
    with vwt_hf.count_tokens(model):
        pickled = pickle.dumps(model)
    RemovableHandle.next_id = 0
    loaded, seen = pickle.loads(pickled), []
    loaded.embeddings.register_forward_hook(lambda *given: seen.append(len(given)))
    answers(loaded, sample_pixel_values())
    assert seen == [3]


def test_a_mean_of_nothing_is_an_error_and_an_unsupported_model_is_refused():
    with vwt_hf.count_tokens(tiny_model("vit")) as count:
        pass
    with pytest.raises(ValueError, match="no tokens were counted"):
        _ = count.mean
    swin = transformers.SwinModel(transformers.SwinConfig(depths=[1], num_heads=[1], embed_dim=8))
    with pytest.raises(ValueError, match=r"tokens of a SwinModel cannot be counted"), vwt_hf.count_tokens(swin):
        pass


def test_parts_that_were_compressed_alone_are_counted_one_by_one():
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    vision = transformers.CLIPVisionConfig(**TINY)
    config = transformers.VideoLlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    model = transformers.VideoLlavaForConditionalGeneration(config).eval()
    for tower in (model.model.image_tower, model.model.video_tower):
        compress(tower, SETTINGS["merge"])
    expected = r"2 parts .*\(model\.(video|image)_tower, .*count_tokens\(model\.model\.(video|image)_tower\)"
    with pytest.raises(ValueError, match=expected), vwt_hf.count_tokens(model):
        pass
    with vwt_hf.count_tokens(model.model.video_tower) as count:
        answers(model.model.image_tower, sample_pixel_values())
        answers(model.model.video_tower, sample_pixel_values(batch=2))
    assert (count.images, count.tokens) == (2, 2 * (1 + 32))
