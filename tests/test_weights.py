"""Weights are told apart and found wherever they are and of however many bits."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

from tiny import sample_pixel_values, tiny_model
from vwt_hf import compress
from vwt_hf.answers import answer, on_device
from vwt_hf.embedding import require_features
from vwt_hf.weights import copy_sharing_weights, device_of, fingerprint_of, parameter_of, require_unsharded

CPU = torch.device("cpu")


class Packed(torch.Tensor):
    """A tensor of 8 bits that knows no operation, as torchao's know few."""

    def __new__(cls, values: torch.Tensor) -> Packed:
        made = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)
        made.values_of_8_bits = values
        return made

    def __tensor_flatten__(self):
        return ["values_of_8_bits"], None

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten.detach.default:
            return cls(args[0].values_of_8_bits)
        raise NotImplementedError(str(operation))


def of_8_bits(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """As `quantize_dynamic` of torch makes it."""
    from torch.ao.nn.quantized.dynamic import Linear

    linear = Linear(*reversed(model.pooler.dense.weight.shape), dtype=torch.qint8)
    weight = torch.quantize_per_tensor(model.pooler.dense.weight.data, 0.01, 0, torch.qint8)
    linear.set_weight_bias(weight, model.pooler.dense.bias.data)
    model.pooler.dense = linear
    return model


def of_packed_tensors(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    weight = (model.pooler.dense.weight.data * 100).to(torch.int8)
    model.pooler.dense.weight = torch.nn.Parameter(Packed(weight), requires_grad=False)
    return model


@pytest.mark.parametrize("kind", [lambda model: model, of_8_bits, of_packed_tensors])
def test_a_fingerprint_tells_weights_apart_in_8_bits_too(kind):
    other = tiny_model("vit")
    other.pooler.dense.weight.data += 0.1
    prints = [fingerprint_of(kind(model)) for model in (tiny_model("vit"), tiny_model("vit"), other)]
    assert prints[0] == prints[1] != prints[2] and prints[0].startswith("ViTModel ")


@pytest.mark.parametrize("column", [0, 1, 17, -1])
def test_a_fingerprint_tells_one_changed_number_whatever_its_place(column):
    other = tiny_model("vit")
    with torch.no_grad():
        other.pooler.dense.weight[-2, column] += 1e-3
    assert fingerprint_of(other) != fingerprint_of(tiny_model("vit"))


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(10.0)[::2],
        torch.ones(1).expand(5),
        torch.ones(3, 2)[:, :1],
        torch.ones(2, dtype=torch.complex64).conj(),
        torch._neg_view(torch.ones(2)),
        torch.tensor(3),
        torch.ones(0),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.bool),
        torch.ones(2).to(torch.float8_e4m3fn),
    ],
)
def test_values_of_every_kind_are_told_from_others_and_from_other_shapes(value):
    prints = []
    for one in (value, value.clone(), value[None], value.to(torch.int8), torch.zeros_like(value)):
        model = tiny_model("vit")
        model.register_buffer("extra", one)
        prints.append(fingerprint_of(model))
    assert prints[0] == prints[1] and len({prints[0], *prints[2:4]}) == 3
    assert (prints[0] == prints[4]) == (value.numel() == 0)


def test_a_fingerprint_tells_which_adapters_are_on():
    peft = pytest.importorskip("peft")

    model = tiny_model("vit")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config, "first")
    adapted.add_adapter("second", config)
    prints = []
    for name in ("first", "second", "first"):
        adapted.set_adapter(name)
        prints.append(fingerprint_of(model))
    with adapted.disable_adapter():
        prints.append(fingerprint_of(model))
    assert prints[0] == prints[2] and len(set(prints)) == 3


def test_a_model_of_which_each_process_holds_a_part_is_refused(tmp_path):
    model = tiny_model("dinov2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model)
        for refuses in (copy_sharing_weights, require_features):
            with pytest.raises(
                ValueError, match=r"cls_token of the FSDPDinov2Model lies in parts in several processes"
            ):
                refuses(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_that_cannot_be_copied_is_refused_in_words():
    model = tiny_model("dinov2")
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Dinov2Model cannot be .*\(cannot pickle '_thread.lock' object\)\. Take"):
        copy_sharing_weights(model)
    del model.lock
    model.kept = model.embeddings.cls_token * 2
    with pytest.raises(ValueError, match=r"Dinov2Model cannot be copied.*Only Tensors created explicitly"):
        copy_sharing_weights(model)


@pytest.mark.parametrize("mark", ["ds_id", "_is_flat_param", "_fsdp_flattened"])
def test_so_is_one_of_deepspeed_or_of_the_first_fsdp(mark):
    model = tiny_model("dinov2")
    copy_sharing_weights(model)
    setattr(model.layernorm.weight, mark, 0)
    with pytest.raises(ValueError, match="weight of the Dinov2Model lies in parts in several processes"):
        copy_sharing_weights(model)


def test_one_that_each_process_holds_whole_is_none_of_these(tmp_path):
    model = tiny_model("dinov2")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        distribute_module(model, init_device_mesh("cpu", (1,)))
        require_unsharded(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_fingerprint_tells_apart_what_computes_otherwise_by_the_same_weights(tmp_path):
    model = tiny_model("clip")
    expected = fingerprint_of(model)
    model.save_pretrained(tmp_path)
    shortened = transformers.CLIPModel.from_pretrained(tmp_path, vwt={"keep_ratio": 0.5})
    assert fingerprint_of(shortened) == fingerprint_of(compress(model, {"keep_ratio": 0.5})) == expected
    model.config.vision_config.hidden_act = "gelu_new"
    assert fingerprint_of(model) != expected


def test_weights_that_accelerate_keeps_elsewhere_are_known_and_their_model_is_given_images():
    model, pixels = tiny_model("clip"), sample_pixel_values()
    expected, scale = fingerprint_of(model), model.logit_scale.item()
    with torch.no_grad():
        features = answer(model, pixel_values=pixels)
    cpu_offload(model, execution_device=CPU)
    assert model.device.type == "meta" and fingerprint_of(model) == expected
    assert parameter_of(model, "logit_scale").item() == scale and device_of(model) == CPU
    with torch.no_grad():
        assert torch.equal(answer(model, **on_device({"pixel_values": pixels}, model)), features)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = transformers.ViTModel(tiny_model("vit").config)
    for look in (fingerprint_of, device_of):
        with pytest.raises(
            ValueError, match=r"embeddings.cls_token of the ViTModel is on the device meta, where it has"
        ):
            look(model)


def test_a_copy_shares_the_weights_and_takes_its_own_hooks():
    model = tiny_model("vit")
    copied = copy_sharing_weights(model)
    for own, of_copy in zip(model.parameters(), copied.parameters(), strict=True):
        assert own is of_copy
    compress(copied, {"keep_ratio": 0.5})
    assert model(pixel_values=sample_pixel_values()).last_hidden_state.shape[1] == 65
    assert copied(pixel_values=sample_pixel_values()).last_hidden_state.shape[1] == 33
