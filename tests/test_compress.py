"""What `compress` and `restore` promise, on every family."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import gc
import inspect
import os
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
import transformers
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch.utils.hooks import RemovableHandle

import vwt_hf
from settings import SETTINGS, coarse, fixed, local
from tiny import (
    TINY,
    answers,
    forward,
    inputs,
    require_restored,
    sample_pixel_values,
    tiny_model,
    traces,
    watch_embeddings,
)
from vwt_hf import (
    VWTConfig,
    attention,
    calibrate,
    compress,
    count_tokens,
    embed,
    evaluate_model,
    hooks,
    register,
    restore,
    unregister,
)
from vwt_hf.words import centre, gather_patches, grid_patches, highest, patchify

BY_PLACE = [
    VWTConfig(criterion="random", seed=3),
    VWTConfig(criterion="grid"),
    VWTConfig(criterion="grid", dropped="merge"),
]


def test_keeping_everything_equals_the_plain_model(model, pixel_values):
    plain = answers(model, pixel_values)
    assert torch.equal(answers(compress(model, {"keep_ratio": 1.0}), pixel_values), plain)


def embedded(model, pixel_values, setting, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the layers of a model before and after it is compressed."""
    plain = watch_embeddings(model)
    answers(model, pixel_values, **kwargs)
    compressed = watch_embeddings(compress(model, setting))  # hooks run in the order that they were registered in
    answers(model, pixel_values, **kwargs)
    return plain[0][0], compressed[0][0]


def test_restoring_a_model_leaves_another_that_shares_the_config_of_its_layers(pixel_values):
    """As VisionEncoderDecoderModel does, which gives its encoder a config of its own, and not the layers in it."""
    other, encoder = tiny_model("vit"), tiny_model("vit")
    for module in encoder.modules():
        if hasattr(module, "config"):
            module.config = other.config
    encoder.config = copy.deepcopy(other.config)
    expected = answers(compress(tiny_model("vit"), local()), pixel_values)
    compress(encoder, local())
    restore(other)
    torch.testing.assert_close(answers(encoder, pixel_values), expected)


def test_methods_of_a_model_that_no_variable_holds_can_be_called(pixel_values):
    made = compress(tiny_model("clip"), {"keep_ratio": 0.5}).get_image_features(pixel_values)
    forward = pickle.loads(pickle.dumps(compress(tiny_model("vit"), local()).forward))
    assert made.pooler_output.shape[0] == len(pixel_values) == len(forward(pixel_values)[0])


FORKED_AFTER = """
import os, signal, sys, torch, transformers, vwt_hf

torch.set_num_threads(2)
sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128, image_size=224)
kind = sys.argv[1]
config = getattr(transformers, f"{kind}Config")(**sizes, patch_size=16)
model = getattr(transformers, f"{kind}Model")(config).eval()
vwt_hf.compress(model, {"method": "inter", "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
assert torch.get_num_threads() == 2
if os.fork() == 0:
    signal.alarm(100)  # kills a process that hangs
    with torch.no_grad():
        model(torch.zeros(8, 3, 224, 224))
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.newest
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.parametrize("kind", ["ViT", "Pixio"])
def test_a_process_that_is_forked_from_one_that_compressed_runs_the_model(kind):
    """Pixio is tried by forwards, as it has no row in the table of families."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED_AFTER, kind], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_layers_may_lie_in_a_sequence(pixel_values):
    model = tiny_model("vit")
    expected = answers(compress(tiny_model("vit"), local()), pixel_values)
    (holder,) = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for parent in model.modules():
        for name, child in list(parent.named_children()):
            if child is holder:
                setattr(parent, name, torch.nn.Sequential(*holder))
    assert torch.equal(answers(compress(model, local()), pixel_values), expected)


def test_a_large_model_that_was_dropped_is_freed_when_another_is_compressed(pixel_values, monkeypatch):
    module = sys.modules["vwt_hf.compress"]
    monkeypatch.setattr(module, "_large", weakref.WeakSet())
    thresholds = gc.get_threshold()
    gc.set_threshold(0)  # on, but never by itself
    try:
        gone = []
        for least in (0, 0, 2**20):
            monkeypatch.setattr(module, "_LARGE", least)
            model = compress(tiny_model("vit"), local())
            answers(model, pixel_values)
            gone.append(weakref.ref(model))
            del model
        assert [ref() is None for ref in gone] == [True, False, False]  # the last is small, and waits for no other
    finally:
        gc.set_threshold(*thresholds)
    kept = compress(tiny_model("vit"), local())
    monkeypatch.setattr(module, "_LARGE", 0)
    expected = answers(kept, pixel_values)
    compress(tiny_model("vit"), local())
    assert torch.equal(answers(kept, pixel_values), expected)


def test_methods_that_take_images_and_no_model_stay_as_they_are(pixel_values):
    class Normalizes(transformers.ViTModel):
        @staticmethod
        def normalized(pixel_values: torch.Tensor, by: float = 2.0) -> torch.Tensor:
            return pixel_values / by

        def forward(self, pixel_values: torch.Tensor, patch_words: torch.Tensor | None = None, **kwargs):
            return super().forward(pixel_values, **kwargs)

    model = compress(Normalizes(tiny_model("vit").config).eval(), {"keep_ratio": 0.5})
    assert torch.equal(model.normalized(pixel_values), pixel_values / 2)
    assert list(inspect.signature(model.forward).parameters) == ["pixel_values", "patch_words", "kwargs"]
    assert model(pixel_values)[0].shape[1] == 33


@pytest.mark.parametrize("setting", [None, {"keep_ratio": 0.5}])
def test_what_wraps_a_forward_outlives_the_setting(pixel_values, setting):
    model = compress(tiny_model("vit"), local())
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    model = restore(model) if setting is None else compress(model, setting)
    expected = tiny_model("vit") if setting is None else compress(tiny_model("vit"), setting)
    assert torch.equal(model(pixel_values)[0], expected(pixel_values)[0])


def test_compressed_tokens_are_those_of_the_kept_patches_alone(model, pixel_values):
    """The embeddings of a compressed model are a selection of the plain model's own, in order."""
    whole, short = embedded(model, pixel_values, {"keep_ratio": 0.5})
    prefix = short.shape[1] - 32
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
    require_restored(model, pixel_values, {"keep_ratio": 0.3}, {"keep_ratio": 0.6})


def interrupt(*given: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [None, SETTINGS["merge"]], ids=["plain", "merge"])
def test_an_interrupted_compress_leaves_the_plain_model(before, pixel_values, monkeypatch):
    model = tiny_model("vit")
    expected, plain = answers(model, pixel_values), traces(model)
    compress(model, before)
    monkeypatch.setattr(hooks, "Join", interrupt)  # which comes after the hooks of the embeddings
    with pytest.raises(KeyboardInterrupt):
        compress(model, {"method": "gradual", "image_std": [0.5] * 3})
    assert model.config.vwt is None and traces(model) == plain
    assert torch.equal(answers(model, pixel_values), expected)


@pytest.mark.parametrize("name", ["vit", "clip", "dinov3"])
def test_a_restore_goes_on_after_an_interrupt_of_any_part(name, monkeypatch):
    model = tiny_model(name)
    plain = traces(model)
    for done in range(len(list(model.modules()))):
        compress(model, local(tolerance=0.2))
        calls = [None] * done + [KeyboardInterrupt]
        monkeypatch.setattr(attention, "give_back_checkpoint", Mock(side_effect=calls))
        with pytest.raises(KeyboardInterrupt):
            restore(model)
        monkeypatch.undo()
        assert traces(restore(model)) == plain


@pytest.mark.parametrize("name", ["dinov3", "beit"])
def test_a_model_whose_images_have_no_more_patches_than_are_kept_answers_as_the_plain_one(name, pixel_values):
    """Its rotations, or its bias between patches, stay, too."""
    expected = answers(tiny_model(name), pixel_values)
    model = compress(tiny_model(name), {"dropped": "merge", "num_patches": 64})
    assert torch.equal(answers(model, pixel_values), expected)


@pytest.mark.parametrize("undo", [restore, lambda model: compress(model, False)], ids=["restore", "compress"])
def test_a_plain_model_made_by_the_config_of_a_compressed_one_is_restored_alone(pixel_values, undo):
    model = compress(tiny_model("vit"), local(tolerance=0.2))
    expected, setting = answers(model, pixel_values), model.config.vwt
    plain = type(model)(model.config).eval()
    assert undo(plain).config.vwt is None
    assert model.config.vwt == setting and torch.equal(answers(model, pixel_values), expected)
    alone = torch.cat([answers(model, image[None]) for image in pixel_values])
    torch.testing.assert_close(expected, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_compressed_and_independent(model, pixel_values, copied):
    compress(model, {"keep_ratio": 0.5})
    expected = answers(model, pixel_values)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(answers(twin, pixel_values), expected)


def _halved(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output / 2


def test_hooks_of_a_model_from_another_process_stay_where_others_are_registered(pixel_values, monkeypatch):
    """Torch numbers hooks anew in each process, and a number that is taken names one hook no more."""
    monkeypatch.setattr(RemovableHandle, "next_id", 0)
    model = compress(tiny_model("vit"), SETTINGS["local"])
    copy.deepcopy(model)  # which goes by the same methods as pickle
    model.layers[0].register_forward_hook(_halved)
    expected, data = answers(model, pixel_values), pickle.dumps(model)
    RemovableHandle.next_id = 0
    twin = pickle.loads(data)
    for module in twin.modules():
        for _ in range(3):
            module.register_forward_hook(lambda *_: None)
            module.register_forward_pre_hook(lambda *_: None)
    assert torch.equal(answers(twin, pixel_values), expected)


@pytest.mark.parametrize("kind", ["discard", "local", "inter"])
def test_a_compressed_model_pickles_to_the_same_bytes_whatever_hooks_come_and_go(kind):
    """`datasets.map` finds what it has mapped before by a hash of them."""
    model = compress(tiny_model("vit"), SETTINGS[kind])
    before = pickle.dumps(model)
    tiny_model("vit").register_forward_hook(_halved)
    with count_tokens(model):
        pass
    assert pickle.dumps(model) == before


def test_gradients_reach_every_parameter_that_the_plain_model_trains(model, pixel_values):
    def trained() -> set[str]:
        model.zero_grad(set_to_none=True)
        forward(model.train(), pixel_values).float().pow(2).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain = trained()
    for criterion in ("variance", "random", "grid"):
        compress(model, {"criterion": criterion})
        with torch.inference_mode():
            forward(model, pixel_values)
        assert trained() == plain


def test_masked_image_modelling_is_refused():
    model = transformers.ViTForMaskedImageModeling(transformers.ViTConfig(hidden_size=12, num_attention_heads=1))
    with pytest.raises(ValueError, match="a value for every patch"):
        compress(model)


def test_an_unsupported_family_is_refused_by_name():
    with pytest.raises(ValueError, match=r"BertModel .*cannot be compressed.*ViT, DeiT, .*DINOv2"):
        compress(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=12)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keep_ratio": 1.3}, "keep_ratio is 1.3.*\\(0, 1\\]"),
        ({"method": "intre"}, "method is 'intre'.*'intra'.*Did you mean"),
        ({"keep": 0.3}, "no field 'keep'.*keep_ratio"),
        ({"num_patches": 0}, "num_patches is 0.*at least 1"),
        ({"seed": -1}, "seed is -1"),
        ("gradual", r"vwt is 'gradual', which as text would name a vocabulary; give \{'method': 'gradual'\}"),
        ("True", "vwt is 'True', which as text would name a vocabulary; give True"),
        ({"criterion": 3}, "criterion is 3.*variance"),
        ({"output": "full"}, "output is 'full', but dropped is 'discard'.*use dropped='merge'"),
        (
            {"method": "local", "image_std": functools.reduce(lambda inner, _: [inner], range(2000), 1)},
            "holds lists within 9 lists",
        ),
    ],
)
def test_a_bad_setting_is_refused_by_field_value_and_range(fields, words):
    with pytest.raises(ValueError, match=words):
        VWTConfig.parse(fields)


@pytest.mark.parametrize("fields", [{"keep_ratio": 0.25}, {"method": "intra"}, {"local_file_only": True}])
def test_a_keyword_that_is_none_of_the_hubs_is_refused(fields):
    model = tiny_model("vit")
    with pytest.raises(TypeError, match=rf"compress\(\) got {next(iter(fields))}; .*local_files_only.*VWTConfig"):
        compress(model, {"criterion": "grid"}, **fields)
    assert model.config.vwt is None


class Pair(transformers.ViTPreTrainedModel):
    """Two models that see, as people write them: each of its own weights, or both of the same."""

    def __init__(self, config, right=None):
        super().__init__(config)
        self.left = transformers.ViTModel(config, add_pooling_layer=False)
        self.right = right or self.left
        self.post_init()

    def forward(self, pixel_values):
        return self.left(pixel_values)[0] + self.right(pixel_values)[0]


def test_of_two_towers_each_is_compressed_by_itself(pixel_values):
    one = tiny_model("vit")
    pair = Pair(one.config, one).eval()
    with pytest.raises(ValueError, match=r"Pair has 2 vision towers \(left, right\).*compress\(model\.left\)"):
        compress(pair)
    assert pair.config.vwt is None and compress(pair.left, {"keep_ratio": 0.5}) is pair.left
    compress(pair.right, {"keep_ratio": 0.5})
    assert pair(pixel_values).shape[1] == 1 + 32


def test_a_tower_that_is_held_twice_is_one(pixel_values):
    pair = compress(Pair(tiny_model("vit").config).eval(), {"keep_ratio": 0.5})
    assert pair(pixel_values=pixel_values).shape[1] == 1 + 32


def test_supported_lists_the_families():
    assert {"ViT", "DeiT", "DINOv2", "DINOv2 with registers", "CLIP", "LLaVA"} < set(vwt_hf.supported())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_same_patches_and_answers_nearly_the_same(model, pixel_values, dtype):
    pixel_values = pixel_values.to(dtype).float()
    whole, short = embedded(model.to(dtype), pixel_values.to(dtype), {"keep_ratio": 0.5})
    found = answers(model, pixel_values.to(dtype))
    assert found.dtype == dtype
    kept = highest(centre(patchify(pixel_values, (4, 4))).variance, 32)
    prefix = whole.shape[1] - 64
    assert torch.equal(short, torch.cat((whole[:, :prefix], gather_patches(whole[:, prefix:], kept)), dim=1))
    expected = answers(model.float(), pixel_values)
    torch.testing.assert_close(found.float(), expected, atol=0.08, rtol=0.08)


@pytest.mark.parametrize("size", [(48, 48), (32, 20), (23, 50)])
def test_images_of_another_size_are_interpolated_as_the_plain_model_does(model, size):
    pixel_values = sample_pixel_values(2, *size)
    kwargs = {} if "inov2" in type(model).__name__ else {"interpolate_pos_encoding": True}
    plain = answers(model, pixel_values, **kwargs)
    whole = (size[0] // 4) * (size[1] // 4)
    torch.testing.assert_close(answers(compress(model, {"keep_ratio": 1.0}), pixel_values, **kwargs), plain)

    restore(model)
    everything, short = embedded(model, pixel_values, {"criterion": "grid", "num_patches": whole // 2}, **kwargs)
    kept = grid_patches(size[0] // 4, size[1] // 4, whole // 2, pixel_values.device)[0]
    prefix = everything.shape[1] - whole
    torch.testing.assert_close(short, torch.cat((everything[:, :prefix], everything[:, prefix:][:, kept]), 1))
    assert answers(model, pixel_values, **kwargs).isfinite().all()


def test_another_size_without_interpolation_is_refused_with_both_sizes(model):
    if "inov2" in type(model).__name__:
        pytest.skip("DINOv2 always interpolates its positions")
    compress(model)
    with pytest.raises(ValueError, match=r"48\*32\) doesn't match model \(32\*32\)"):  # the plain model's own words
        answers(model, sample_pixel_values(1, 48, 32))


def test_images_with_a_wrong_number_of_channels_are_refused_with_both_numbers(model):
    compress(model)
    with pytest.raises((ValueError, RuntimeError), match=r"3 but got 4|3 channels, but got 4"):
        answers(model, torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize(
    "setting", [SETTINGS["inter"], local(), local(keep_ratio=0.5, tolerance=None), fixed(), coarse()], ids=str
)
def test_channels_that_a_user_changed_in_the_embeddings_alone_are_refused_with_both_numbers(setting):
    model = compress(tiny_model("vit"), setting)
    patches = model.embeddings.patch_embeddings
    patches.projection, patches.num_channels = torch.nn.Conv2d(1, model.config.hidden_size, 4, 4), 1
    with pytest.raises(ValueError, match=r"\(2, 1, 32, 32\) have 1 channels; expected 3, .*again"):
        answers(model, torch.zeros(2, 1, 32, 32))
    model.config.num_channels = 1
    assert answers(compress(model, {"method": "local", "image_std": [0.5]}), torch.zeros(2, 1, 32, 32)).isfinite().all()


def test_one_image_and_none(model, pixel_values):
    compress(model)
    assert len(answers(model, pixel_values[:1]).flatten()) and answers(model, pixel_values[:1]).isfinite().all()
    taken = watch_embeddings(model)
    with contextlib.suppress(RuntimeError):  # layers of plain models may not take none
        answers(model, pixel_values[:0])
    assert taken[0][0].shape[0] == 0


def test_two_threads_share_one_model(model):
    """Two streams of images of different sizes through one model answer as they do one after the other."""
    compress(model, {"keep_ratio": 0.5})
    kwargs = {} if "inov2" in type(model).__name__ else {"interpolate_pos_encoding": True}
    batches = [sample_pixel_values(1 + i % 3, 32, 32 + 4 * (i % 5)) for i in range(40)]
    expected = [answers(model, batch, **kwargs) for batch in batches]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda batch: answers(model, batch, **kwargs), batches))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("criterion", ["variance", "random", "grid"])
def test_moving_the_model_moves_all_that_compression_uses(model, pixel_values, criterion):
    """The meta device refuses to mix with the CPU, so any tensor left behind would raise."""
    compress(model, {"criterion": criterion})
    shape = answers(model, pixel_values).shape
    assert answers(model.to("meta"), pixel_values.to("meta")).shape == shape


@pytest.mark.parametrize("setting", [SETTINGS["merge"], fixed(), local(num_patches=30), coarse(num_patches=30)])
def test_shapes_are_told_on_the_meta_device_where_they_do_not_depend_on_pixels(pixel_values, setting):
    model = compress(tiny_model("vit"), setting)
    shape = answers(model, pixel_values).shape
    assert answers(model.to("meta"), pixel_values.to("meta")).shape == shape
    compress(model, SETTINGS["local"])
    with pytest.raises(ValueError, match="which nobody knows of images on the meta device"):
        answers(model, pixel_values.to("meta"))


@pytest.mark.parametrize("criterion", ["random", "grid"])
def test_tracing_leaves_no_tensors_without_values_behind(criterion):
    model, pixel_values = tiny_model("vit"), sample_pixel_values(2)
    compress(model, {"criterion": criterion, "num_patches": 11, **({"seed": 77} if criterion == "random" else {})})
    torch.export.export(model, (pixel_values,), strict=False)
    assert type(answers(model, pixel_values)) is torch.Tensor


def test_offloaded_weights_are_fetched(model, pixel_values):
    expected = answers(compress(model, {"keep_ratio": 0.5}), pixel_values)
    cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(answers(model, pixel_values), expected)


def test_a_forward_that_something_else_replaced_is_left_alone(pixel_values):
    model = tiny_model("blip-vision")
    attention = model.encoder.layers[0].self_attn
    attention.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="Something else replaced the forward of BlipAttention"):
        compress(model, {"dropped": "merge"})
    assert compress(model, {"keep_ratio": 0.5}).config.vwt["keep_ratio"] == 0.5  # where nothing has to stand in for it


def test_hooks_of_accelerate_and_compression_live_together(model, pixel_values):
    """`device_map` wraps each module's forward: compression goes below the wrap, and comes out from there."""
    plain = answers(model, pixel_values)
    short = answers(compress(model, {"keep_ratio": 0.5}), pixel_values)
    for module in restore(model).modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    assert torch.equal(answers(compress(model, {"keep_ratio": 0.5}), pixel_values), short)
    compress(model, {"keep_ratio": 0.9})
    assert torch.equal(answers(restore(model), pixel_values), plain)
    compress(model, {"keep_ratio": 0.5})
    remove_hook_from_submodules(model)
    assert torch.equal(answers(model, pixel_values), short)
    assert torch.equal(answers(restore(model), pixel_values), plain)
    assert torch.equal(answers(compress(model, {"keep_ratio": 0.5}), pixel_values), short)
    assert "patch_words" in inspect.signature(model.forward).parameters
    assert torch.equal(answers(restore(model), pixel_values), plain)


def test_what_is_left_of_hooks_of_accelerate_is_no_replaced_forward(pixel_values):
    expected = answers(compress(tiny_model("blip-vision"), {"dropped": "merge"}), pixel_values)
    model = tiny_model("blip-vision")
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    remove_hook_from_submodules(model)
    assert torch.equal(answers(compress(model, {"dropped": "merge"}), pixel_values), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states_and_attentions_are_those_of_the_kept_tokens(model, pixel_values, attention):
    if isinstance(model, transformers.CLIPModel):
        pytest.skip("CLIPModel returns its towers' outputs, not hidden states of its own")
    model.set_attn_implementation(attention)
    plain = model(pixel_values=pixel_values, output_hidden_states=True).hidden_states[0].shape[1]
    compress(model, {"keep_ratio": 0.5})
    output = model(pixel_values=pixel_values, output_hidden_states=True, output_attentions=attention == "eager")
    tokens = plain - 32
    assert {tuple(hidden.shape[:2]) for hidden in output.hidden_states} == {(3, tokens)}
    if attention == "eager":
        assert {tuple(weights.shape) for weights in output.attentions} == {(3, 4, tokens, tokens)}


def test_masked_patches_are_refused(pixel_values):
    model = compress(transformers.ViTModel(transformers.ViTConfig(**TINY), use_mask_token=True))
    with pytest.raises(ValueError, match=r"bool_masked_pos.*restore\(model\)"):
        model(pixel_values, bool_masked_pos=torch.zeros(3, 64, dtype=torch.bool))


@pytest.mark.parametrize(
    "call",
    [
        *(compress, restore, lambda model: count_tokens(model).__enter__()),
        lambda model: calibrate(model, [], tokens=9),
        *(lambda model: evaluate_model(model, []), lambda model: embed(model, [], "")),
    ],
)
def test_what_is_no_model_is_refused_and_of_what_wraps_one_is_said_where_it_is(call):
    model = transformers.ViTModel(transformers.ViTConfig(**TINY))
    of_devices, compiled = torch.nn.DataParallel(model), torch.compile(model, backend="eager")
    for given, said in (
        (torch.nn.Linear(1, 1), r"a Linear; expected a transformers\.PreTrainedModel\.$"),
        (torch.nn.DataParallel(torch.nn.Linear(1, 1)), r"a DataParallel; expected a transformers\.PreTrainedModel\.$"),
        (compiled, r"an OptimizedModule; .*; give the model that it wraps, model\._orig_mod\.$"),
        (of_devices, r"a DataParallel; .*; give the model that it wraps, model\.module\.$"),
        (torch.compile(of_devices, backend="eager"), r"an OptimizedModule; .* wraps, model\._orig_mod\.module\.$"),
    ):
        with pytest.raises(TypeError, match=f"^model is {said}"):
            call(given)


def test_a_model_that_holds_a_supported_tower_is_not_taken_for_one():
    """What reads the tokens of a tower must be known: that for video pools them by place."""
    vision = transformers.CLIPVisionConfig(**TINY)
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    holder = transformers.LlavaNextVideoForConditionalGeneration(
        transformers.LlavaNextVideoConfig(vision_config=vision, text_config=text, image_token_index=5)
    )
    with pytest.raises(ValueError, match=r"LlavaNextVideo.* \(model type 'llava_next_video'\) cannot be compressed"):
        compress(holder)


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit", "siglip2-vision", "blip-vision"])
@pytest.mark.parametrize("fields", [*SETTINGS.values(), *BY_PLACE], ids=[*SETTINGS, "random", "grid", "merged grid"])
def test_defaults_of_torch_change_no_answer(name, fields, pixel_values, monkeypatch):
    """Another default dtype, and another default device, on which nothing has values."""
    pixel_values[0] = 1.3
    model = compress(tiny_model(name), fields)
    given = inputs(model, pixel_values)
    with torch.no_grad():
        expected = model(**given)[0]
        for change in (default_dtype(torch.float64), default_dtype(torch.bfloat16), torch.device("meta")):
            monkeypatch.setattr("vwt_hf.words._cache", collections.OrderedDict())
            again = compress(tiny_model(name), fields)
            with change:
                torch.testing.assert_close(again(**given)[0], expected)
                torch.testing.assert_close(compress(again, fields)(**given)[0], expected)
            torch.testing.assert_close(again(**given)[0], expected)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "setting",
    [
        {"keep_ratio": 0.5, "dropped": "merge"},
        {"method": "local", "num_patches": 40},
        {"method": "coarse", "keep_ratio": 0.5},
        {"method": "gradual", "tolerance": 0.1, "join_ratio": 0.3, "layers": [1]},
        SETTINGS["inter"],
    ],
    ids=["merge", "local", "coarse", "gradual", "inter"],
)
def test_a_model_in_float64_computes_in_it(setting):
    model = compress(tiny_model("vit-classifier").double(), setting)
    pixel_values = sample_pixel_values().double()
    weight = model.vit.embeddings.patch_embeddings.projection.weight
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    answers(model, pixel_values)

    def loss() -> torch.Tensor:
        return model(pixel_values).logits.square().sum()

    loss().backward()
    expected = (weight.grad * direction).sum()
    ends = []
    for step in (1e-7, -1e-7):  # of float32 nothing would be left
        with torch.no_grad():
            weight += step * direction
            ends.append(loss())
            weight -= step * direction
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-7, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vit", "clip", "blip-vision"])
@pytest.mark.parametrize("setting", [SETTINGS["discard"], SETTINGS["merge"]], ids=["discard", "merge"])
def test_what_was_unregistered_can_be_restored(name, setting, pixel_values):
    model = tiny_model(name)
    plain, told = answers(model, pixel_values), model.config.to_json_string()
    compress(model, setting)
    unregister()
    try:
        restore(model)
        assert torch.equal(answers(model, pixel_values), plain)
        assert model.config.to_json_string() == told
        assert vars(type(model.config)).get("_vwt_plain_class") is None
    finally:
        register()
    assert model.config.vwt is None
