"""Attention back-ends: each computes what masked attention over the same tokens does.

The flash kernels run on CUDA alone. Here loops stand in for them, which take what they take and give what they give, so
what is tested is how they are called.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types

import pytest
import torch

from settings import gradual, inter, local
from tiny import answers, sample_pixel_values, tiny_model
from vwt_hf import VWTConfig, attention, compress
from vwt_hf.attention import fold_bias
from vwt_hf.forward import Forward
from vwt_hf.layout import group
from vwt_hf.plans import Grouped

WORDS = torch.tensor([[4, 2, 4, 7, 2, 2], [9, 8, 7, 6, 5, 4], [3, 3, 3, 3, 3, 3], [1, 1, 1, 1, 1, 0]])


def forward_of(implementation: str | None) -> Forward:
    """A forward of a tower that attends by that implementation."""
    tower = types.SimpleNamespace(config=types.SimpleNamespace(_attn_implementation=implementation))
    return Forward(tower, relative=False)


def varlen_reference(query, key, value, starts, key_starts, longest, longest_key, *, scale):
    """Variable-length attention by a loop over (tokens, heads, head size), with the checks of torch's kernel."""
    assert starts.dtype == torch.int32 and torch.equal(starts, key_starts) and starts[-1] == len(query) == len(key)
    assert longest == longest_key == int(starts.diff().max())
    assert query.shape == key.shape == value.shape and query.shape[-1] % 8 == 0
    output = torch.empty_like(query)
    for start, end in itertools.pairwise(starts):
        q, k, v = (tensor[start:end].transpose(0, 1).float() for tensor in (query, key, value))
        output[start:end] = ((q @ k.transpose(1, 2) * scale).softmax(-1) @ v).transpose(0, 1)
    return output


def test_the_stand_in_takes_the_arguments_of_the_kernel():
    taken = list(inspect.signature(varlen_reference).parameters)
    real = list(inspect.signature(attention.varlen_attn).parameters)
    # The kernel's names, of which the first seven may come without a name.
    assert real[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert len(taken) == 8 and "scale" in real


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_knows_boundaries_computes_what_masked_attention_does(proportional, dtype):
    layout = group(WORDS, 1)
    plan = Grouped(layout, proportional, None)
    query, key, value = torch.randn(3, 1, 2, layout.tokens, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = attention._by_boundaries(varlen_reference, (query, key, value), plan, 0.3)
    image = torch.bucketize(torch.arange(layout.tokens), layout.boundaries[1:], right=True)
    mask = torch.where(image[:, None] == image, 0.0, -torch.inf)
    if proportional:
        mask = mask + layout.sizes.log()
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=mask, scale=0.3
    )
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.transpose(1, 2), atol=near, rtol=near)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folded_bias_keeps_more_digits_than_its_dtype(dtype):
    bias = torch.arange(1, 257).log().unsqueeze(0)
    query, key, value = (torch.zeros(1, 1, 256, 64, dtype=dtype) for _ in range(3))
    query, key, value = fold_bias((query, key, value), bias, {}, 64**-0.5)
    logits = (query.float() @ key.float().transpose(2, 3))[0, 0, 0] * 64**-0.5
    assert (logits - bias).abs().max() < 1e-3 < (bias.to(dtype).float() - bias).abs().max()
    assert not value.any() and value.shape[-1] == 72


@pytest.fixture
def setting() -> VWTConfig:
    return inter()


@pytest.fixture
def images() -> torch.Tensor:
    pixel_values = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    pixel_values[0] = 1.3
    pixel_values[2] = pixel_values[2] * 0.1 + 1
    return pixel_values


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_flash_attention_2_gets_half_precision_under_autocast_and_is_deterministic_where_that_is_asked_for(
    monkeypatch, wanted, images
):
    """DINOv3's rotations leave queries and keys in float32 there; the kernel takes one half dtype alone."""
    seen = []

    def flash(*packed, dropout_p, softmax_scale, causal, deterministic):
        seen.append(({tensor.dtype for tensor in packed[:3]}, deterministic))
        return varlen_reference(*packed, scale=softmax_scale)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash))
    monkeypatch.setattr(attention, "is_slow_for_new_lengths", lambda *_: False)  # as on a GPU
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", wanted)
    model = tiny_model("dinov3")
    model.config._attn_implementation = "flash_attention_2"
    with torch.autocast("cpu", torch.bfloat16):
        answers(compress(model, local(layout="packed")), images)
    assert seen and all(one == ({torch.bfloat16}, wanted == "1") for one in seen)


def test_a_bias_that_hides_a_key_stays_a_number_when_it_is_folded():
    query, key, value = torch.randn(3, 1, 2, 5, 8, dtype=torch.float64).to(torch.bfloat16).float().bfloat16().unbind(0)
    key_bias = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -torch.inf]])
    folded = fold_bias((query, key, value), key_bias, {}, 8**-0.5)
    found = torch.nn.functional.scaled_dot_product_attention(*(one.float() for one in folded), scale=8**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), key_bias[:, None, None]
    )
    torch.testing.assert_close(found[..., :8], expected, atol=1e-3, rtol=1e-3)


def test_a_model_on_flash_attention_2_answers_as_on_sdpa(monkeypatch, setting, images):
    model = compress(tiny_model("vit"), setting)
    expected = answers(model, images)

    def flash(*packed, dropout_p, softmax_scale, causal, deterministic):
        assert dropout_p == 0 and causal is deterministic is False
        return varlen_reference(*packed, scale=softmax_scale)

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash))
    model = tiny_model("vit")
    model.config._attn_implementation = "flash_attention_2"
    compress(model, setting)
    torch.testing.assert_close(answers(model, images), expected, atol=1e-5, rtol=1e-5)

    merged = VWTConfig(dropped="merge")
    expected = answers(compress(tiny_model("vit"), merged), images)
    torch.testing.assert_close(answers(compress(model, merged), images), expected, atol=1e-5, rtol=1e-5)

    joined = gradual(num_patches=40)
    expected = answers(compress(tiny_model("vit"), joined), images)
    torch.testing.assert_close(answers(compress(model, joined), images), expected, atol=1e-5, rtol=1e-5)

    of_patches = tiny_model("siglip2-vision")
    of_patches.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"padded patches.*'flash_attention_2'.*attn_implementation='sdpa'"):
        compress(of_patches, VWTConfig())

    compress(model, VWTConfig.parse({**setting.to_dict(), "vocabulary": setting.vocabulary, "layout": "padded"}))
    with pytest.raises(ValueError, match=r"padded \(by layout='padded', .*'flash_attention_2'.* use layout='auto'"):
        answers(model, images)


def test_a_model_on_torchs_flash_kernel_answers_as_without_it(monkeypatch, setting, images):
    model = compress(tiny_model("vit"), setting)
    expected = answers(model, images)
    calls = []
    monkeypatch.setattr(attention, "_has_flash", lambda device, dtype: True)
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: calls.append(1) or varlen_reference(*a, **k))
    torch.testing.assert_close(answers(model, images), expected, atol=1e-5, rtol=1e-5)
    assert len(calls) == len(model.layers if hasattr(model, "layers") else model.encoder.layer)


def test_auto_packs_where_attention_takes_packed_tokens_as_they_are():
    cpu, cuda, mps = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
    sdpa, eager, flash = map(forward_of, ("sdpa", "eager", "flash_attention_2"))
    assert attention.packs(sdpa, True, cpu, torch.float32) and attention.packs(eager, True, cpu, torch.bfloat16)
    assert attention.packs(flash, True, cuda, torch.bfloat16)
    assert not attention.packs(sdpa, True, cuda, torch.float32) and not attention.packs(sdpa, True, mps, torch.float16)


def test_a_mask_over_patches_is_refused(setting, images):
    model = compress(tiny_model("vit"), setting)
    with pytest.raises(ValueError, match=r"attention_mask .*restore\(model\)"):
        model(images, attention_mask=torch.ones(4, 1, 65, 65))


@pytest.mark.parametrize(
    "setting",
    [VWTConfig(), VWTConfig(dropped="merge"), *(inter(layout=name) for name in ("packed", "padded", "auto"))],
    ids=str,
)
def test_a_batch_without_images_is_answered_where_the_plain_model_answers_it(setting):
    """BLIP's own attention takes one; transformers' does not, of which most families' is."""
    model, nothing = tiny_model("blip-vision"), sample_pixel_values()[:0]
    plain = answers(model, nothing)
    found = answers(compress(model, setting), nothing)
    tokens = plain.shape[1] if setting.restores else 32 + 1
    assert found.shape == (0, tokens, plain.shape[2]) and found.dtype == plain.dtype
