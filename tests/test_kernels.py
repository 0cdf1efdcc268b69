"""Kernels for NVIDIA GPUs give what torch's operations give.

Where there is no GPU, Triton interprets them, if TRITON_INTERPRET=1 was set before it was first imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch

from vwt_hf import alike, layout, neighbours
from vwt_hf.layout import Layout, attention_bias, group, join, regroup

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
RUN = INTERPRETED or (torch.cuda.is_available() and torch.version.hip is None)
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not RUN, reason="needs an NVIDIA GPU, or Triton and TRITON_INTERPRET=1")
kernels = importlib.import_module("vwt_hf.kernels") if RUN else None


@pytest.fixture
def both(monkeypatch):
    """Calls a function by torch's operations and by the kernels, and gives both results."""

    def call(function):
        results = []
        for found in (None, kernels):
            for module in (alike, layout, neighbours):
                monkeypatch.setattr(module, "kernels_for", lambda *_, found=found: found)
            results.append(function())
        return results

    return call


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def words(batch: int, patches: int, most: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(most, (batch, patches), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def same(one: Layout, other: Layout) -> bool:
    tensors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("rows", "sizes"))
    return tensors and (one.runs, one.packed, one.prefix) == (other.runs, other.packed, other.prefix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "patch", "channels"),
    [((56, 56), (14, 14), 3), ((72, 40), (8, 8), 1), ((33, 90), (11, 10), 4), ((32, 320), (16, 16), 3)],
    ids=str,
)
def test_the_same_patches_are_left_to_the_same_ones(both, size, patch, channels, dtype):
    # Smooth fields with a little noise: neighbours are alike here and there.
    smooth = torch.nn.functional.interpolate(
        random(2, channels, *(max(side // 20, 2) for side in size)), size, mode="bilinear"
    )
    pixels = (smooth + 0.05 * random(2, channels, *size, seed=1)).to(dtype)
    grid, std = (size[0] // patch[0], size[1] // patch[1]), (0.2, 0.3, 0.25, 0.5)[:channels]
    strided = pixels.transpose(2, 3).contiguous().transpose(2, 3)  # as images whose channels come last may be
    left = set()
    for tolerance, images in ((0.1, pixels), (0.3, strided)):
        expected, found = both(lambda args=(images, patch, grid, std, tolerance): neighbours.find_leaders(*args))
        assert torch.equal(found, expected)
        left.add(len(expected.unique()))
    assert len(left) == 2


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("batch", "patches"), [(1, 7), (4, 64), (3, 65), (2, 300), (5, 1), (0, 4)])
def test_the_same_tokens_lie_in_the_same_rows(both, batch, patches, prefix, packed):
    given = words(batch, patches, max(patches // 3, 1))
    assert same(*both(lambda: group(given, prefix, packed)))
    real = torch.arange(patches, device=DEVICE) < max(patches - 2, 1)
    assert same(*both(lambda: group(given, prefix, packed, real.expand(batch, -1))))


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_same_patches_stand_for_others_in_the_same_rows(both, prefix, packed):
    leaders = words(4, 100, 100) // 3 * 3
    leaders[:, ::3] = torch.arange(0, 100, 3)  # those that stand for others stand for themselves
    (expected, expected_sources), (found, sources) = both(lambda: layout.lead(leaders, prefix, packed))
    assert same(found, expected) and torch.equal(sources, expected_sources)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("images", "patches", "hidden"), [(4, 64, 384), (4, 150, 72), (4, 9, 8), (2, 700, 40)])
def test_the_same_tokens_are_joined(both, images, patches, hidden, packed):
    plan = group(words(images, patches, patches // 2), 1, packed)  # some 300 tokens of 700 patches: several blocks
    # Of six kinds, with noise.
    kinds = random(6, hidden)[words(*plan.sizes.shape, 6)]
    states = (kinds + 0.3 * random(*kinds.shape, seed=1)).bfloat16()
    sources = torch.arange(plan.sizes.numel(), device=DEVICE).flip(0).view_as(plan.sizes)
    for least in (0.8, 2.0):
        into = torch.stack(both(lambda least=least: alike.join_alike(states, plan, least)))
        assert torch.equal(*into)
        (after, numbers), (found, found_numbers) = both(lambda into=into[0]: regroup(plan, into, sources=sources))
        assert same(found, after) and torch.equal(found_numbers, numbers)
        assert (found is plan) == (least == 2.0)
        values = random(*plan.sizes.shape, 40)
        for dtype, exact in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            given = values.to(dtype)
            expected, found = both(lambda given=given, after=after: join(given, plan, after))
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, atol=exact, rtol=exact)


def test_of_equally_alike_tokens_the_first_is_taken(both):
    """Also among more than are compared at once."""
    plan = group(torch.arange(150, device=DEVICE).expand(2, -1), 1)
    states = torch.zeros(1, plan.sizes.shape[1], 16, device=DEVICE)
    states[..., 0] = 1
    expected, found = both(lambda: alike.join_alike(states, plan, 0.5))
    assert torch.equal(found, expected)
    assert len(found.unique()) == len(found[0]) - 150  # every second one of both images is gone
    # And of those that are but for rounding.
    states = states + 1 + 1e-4 * random(*states.shape)
    expected, found = both(lambda: alike.join_alike(states, plan, 0.5))
    assert torch.equal(found, expected) and len(found.unique()) == len(found[0]) - 150


@pytest.mark.parametrize("dtype", [torch.float16, *[torch.bfloat16] * (not INTERPRETED)], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(("patches", "heads", "size"), [(64, 6, 64), (150, 2, 72), (5, 1, 16), (200, 2, 128)])
def test_attention_by_sizes_is_that_of_each_image(patches, heads, size, packed, dtype):
    plan = group(words(4, patches, max(patches // 2, 1)), 1, packed)
    parts = [random(*plan.sizes.shape, heads, size, seed=seed).to(dtype) for seed in range(3)]
    bias = attention_bias(plan, 0.8)
    if patches > 100:  # more keys than are read at once are hidden before the first that is not
        bias[:, :40] = -torch.inf
    found = kernels.attend(*(part.transpose(1, 2) for part in parts), bias, plan, 0.1)
    assert found.shape == parts[0].shape and found.dtype == dtype
    for begin, end in zip(*(bound.tolist() for bound in plan.bounds), strict=True):
        query, key, value = (part.flatten(0, 1)[begin:end].float().transpose(0, 1) for part in parts)
        logits = 0.1 * query @ key.transpose(1, 2) + bias.flatten()[begin:end]
        expected = (logits.softmax(dim=-1) @ value).transpose(0, 1)
        exact = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 3e-3, "rtol": 3e-3}
        torch.testing.assert_close(found.flatten(0, 1)[begin:end].float(), expected, **exact)


def test_an_image_whose_keys_are_all_hidden_answers_by_finite_numbers():
    """As one of padding alone, among images that are padded."""
    plan = group(words(2, 9, 9), 1, packed=False)
    bias = torch.full(plan.sizes.shape, -torch.inf, device=DEVICE)
    parts = (random(2, 2, plan.sizes.shape[1], 16).half() for _ in range(3))
    assert not kernels.attend(*parts, bias, plan, 0.1).any()


def test_what_the_kernels_are_tried_out_by_runs():
    kernels.try_out(torch.device(DEVICE))
