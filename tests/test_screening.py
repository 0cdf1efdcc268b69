"""Words that are ruled out unseen: what is found is what a look at all words finds, worked out in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vwt_hf.screening
import vwt_hf.words
from vwt_hf.screening import FEWEST, _orthonormal, make_screen, screened_cosines
from vwt_hf.words import index_words, nearest_words

SAME = 1e-5


@pytest.fixture
def screened(monkeypatch) -> list:
    """For each part of patches whether a screen ruled words out, or left it to look at all."""
    took = []

    def watch(*given):
        found = screened_cosines(*given)
        took.append(found is not None)
        return found

    monkeypatch.setattr(vwt_hf.words, "screened_cosines", watch)
    return took


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(number: int, values: int, noise: float, seed: int) -> torch.Tensor:
    """(number, values): sums of a few slow waves, and noise."""
    waves = torch.cos(torch.arange(12)[:, None] * torch.linspace(0, torch.pi, values))
    return drawn(number, 12, seed=seed) @ waves + noise * drawn(number, values, seed=seed + 100)


def expected_words(patches: torch.Tensor, words: torch.Tensor, threshold: float) -> torch.Tensor:
    unit, size = torch.nn.functional.normalize(words.double(), dim=1), len(words)
    cosines = torch.nn.functional.normalize(patches.double(), dim=2) @ unit.T
    most = cosines.amax(dim=2, keepdim=True)
    first = (cosines >= most - SAME).int().argmax(dim=2)
    return torch.where(most[..., 0] >= 1 - threshold - SAME, first, size + torch.arange(patches.shape[1]))


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5, 1.5])
@pytest.mark.parametrize(("size", "values"), [(256, 256), (1000, 588), (300, 3072)])
def test_no_word_that_is_the_nearest_is_ruled_out(size, values, threshold, screened):
    """2,600 patches, more than are looked at at once, of which some are words, some are like none."""
    words = smooth(size, values, 0.05, 0)
    patches = smooth(2600, values, 0.3, 1)
    patches[::3] = words[torch.arange(867) % size] * torch.linspace(0.01, 300, 867)[:, None]
    patches[1::50] = drawn(52, values, seed=2)
    index = index_words(words)
    found = nearest_words(patches.view(2, 1300, values), index, threshold)
    assert torch.equal(found, expected_words(patches.view(2, 1300, values), words, threshold))
    assert len(screened) == 3 and (all(screened) or threshold > 1)


def test_of_noise_all_words_are_looked_at_unless_none_is_near(screened):
    words, patches = drawn(500, 400, seed=0), smooth(200, 400, 0.02, 1)[None]
    assert torch.equal(nearest_words(patches, index_words(words), 2), expected_words(patches, words, 2))
    assert torch.equal(nearest_words(patches, index_words(words), 0.1), torch.arange(500, 700)[None])
    assert screened == [False, True]


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e6, 1e15])
def test_brightness_changes_no_word(scale, screened):
    words, patches = smooth(500, 400, 0.02, 0), smooth(200, 400, 0.02, 1)[None]
    # Squares of the smallest values are zero in float32: such patches are as dark as those of zeros.
    expected = torch.arange(500, 700)[None] if scale < 1e-20 else expected_words(patches, words, 0.3)
    assert torch.equal(nearest_words(patches * scale, index_words(words), 0.3), expected) and all(screened)


@pytest.mark.parametrize("values", [588, 3072])
def test_a_nearly_flat_patch_is_left_what_little_it_has_beside_its_mean(values, screened, monkeypatch):
    """A word with a texture that no direction has, beside as flat ones without it: nearest by some ten-thousandths."""
    monkeypatch.setattr(vwt_hf.screening, "LIKELY", 1000)
    flat, texture = torch.ones(values) / values**0.5, drawn(values, seed=0)
    texture = (texture - texture.mean()) / (texture - texture.mean()).norm()
    common = torch.linalg.qr(drawn(values, 55, seed=1)).Q.T  # more than there are directions
    words = torch.nn.functional.normalize(flat + 0.05 * drawn(400, 55, seed=2) @ common, dim=1)
    words[77] = torch.nn.functional.normalize(flat + 0.3 * texture, dim=0)
    share = torch.linspace(0, 0.1, 1000)[:, None]
    patches = (torch.linspace(0.1, 4, 1000)[:, None] * (flat + share * texture))[None]
    index = index_words(words)
    assert index.screen is not None and index.screen.words[77, -1] > 0.1  # what is left of it is much
    found = nearest_words(patches, index, 0.5)
    cosines = torch.nn.functional.normalize(patches[0].double(), dim=1) @ index.words.double().T
    chosen = cosines.gather(1, found[0, :, None])[:, 0]
    assert (chosen >= cosines.amax(dim=1) - 1.1e-5).all() and (found == 77).any() and all(screened)


@pytest.mark.parametrize("likely", [6, 1000])
def test_words_that_differ_beyond_the_directions_are_told_apart(likely, screened, monkeypatch):
    """A common shape, and of each word a value of its own, which is more than there are directions for."""
    monkeypatch.setattr(vwt_hf.screening, "LIKELY", likely)
    words = torch.ones(300, 600)
    words[torch.arange(300), torch.arange(300)] += 30
    patches = words.repeat_interleave(2, dim=0)[None] + drawn(1, 600, 600, seed=0)
    assert torch.equal(nearest_words(patches, index_words(words), 0.5), torch.arange(300).repeat_interleave(2)[None])
    assert screened == [likely == 1000]


@pytest.mark.parametrize("values", [588, 3072])
def test_of_words_that_are_the_same_but_for_rounding_the_first_is_taken_in_a_batch_as_alone(values, screened):
    words = smooth(400, values, 0.02, 0)
    words[200:] = words[:200] * torch.linspace(0.1, 9, 200)[:, None]
    words[[17, 117, 250, 390]] = torch.tensor([0.01, 5, 1, 0.3])[:, None]  # flat, of four greys
    words[217] = words[317] = words[150]
    patches = torch.cat(
        (words, words + 0.01 * drawn(400, values, seed=1), torch.linspace(0.01, 5, 400)[:, None] + 0 * words)
    )
    index = index_words(words)
    found = nearest_words(patches.view(3, 400, values), index, 0.3)
    assert (found[2] == 17).all()
    pairs = [place for place in range(200) if place not in (17, 50, 117, 150, 190)]
    for image in found[:2]:
        assert image[pairs].tolist() == pairs and image[[place + 200 for place in pairs]].tolist() == pairs
    assert torch.equal(found[2:], nearest_words(patches[800:].view(1, 400, values), index, 0.3))
    assert all(screened) and len(screened) == 3


@pytest.mark.parametrize(("threshold", "of_zeros"), [(0.3, 301), (1.0, 0), (1.5, 0)])
def test_zeros_and_values_that_are_no_numbers(threshold, of_zeros, screened):
    words = smooth(300, 300, 0.02, 0)
    words[5] = 0
    index, patches = index_words(words), smooth(200, 300, 0.02, 1)[None]
    patches[0, 1] = 0
    patches[0, 2, 7] = torch.nan
    patches[0, 3, 7] = torch.inf
    found = nearest_words(patches, index, threshold)[0]
    assert found[[1, 2, 3]].tolist() == [of_zeros, 302, 303] and all(screened)
    whole = [0, *range(4, 200)]
    assert torch.equal(found[whole], expected_words(patches, words, threshold)[0, whole])
    assert torch.equal(nearest_words(patches, index._replace(screen=None), threshold)[0, :4], found[:4])


def test_what_follows_torchs_operations_and_products_of_fewer_bits_have_no_screen(screened):
    words, patches = smooth(300, 300, 0.02, 0), smooth(200, 300, 0.02, 1)[None]
    index, expected = index_words(words), expected_words(patches, words, 0.3)
    torch.set_float32_matmul_precision("high")
    try:
        assert torch.equal(nearest_words(patches, index, 0.3), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        assert torch.equal(nearest_words(patches, index, 0.3), expected)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(torch.vmap(lambda image: nearest_words(image, index, 0.3))(patches[None])[0], expected)
    assert not screened
    assert torch.equal(nearest_words(patches, index, 0.3), expected) and screened == [True]


def test_words_are_found_where_gpus_alone_round_to_fewer_bits(screened):
    """As transformers' Trainer has them by `tf32=True`: torch's older question about it raises then."""
    words, patches = smooth(300, 300, 0.02, 0), smooth(200, 300, 0.02, 1)[None]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = nearest_words(patches, index_words(words), 0.3)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert torch.equal(found, expected_words(patches, words, 0.3)) and screened == [True]


def test_few_words_or_values_have_no_screen():
    for size, values in ((FEWEST - 1, 600), (600, FEWEST - 1), (0, 600)):
        assert make_screen(np.ones((size, values), np.float32)) is None
    same = make_screen(np.full((5000, 300), 300**-0.5, np.float32))
    assert same is not None and torch.isfinite(same.words).all() and len(same.words) == 5000
    along = same.directions.T @ same.directions  # one direction says all; the others are 0, or at right angles
    assert torch.allclose(along, along.diagonal().diag(), atol=1e-5)
    assert torch.allclose(along.diagonal(), along.diagonal().round(), atol=1e-5) and along[0, 0] > 0.99


def test_patches_that_many_words_may_be_nearest_to_get_the_same_in_a_batch_as_alone(screened):
    """Flat ones, of 283 flat words that differ by rounding, among others: the first of the flat words."""
    words = smooth(400, 588, 0.02, 0)
    words[17:300] = torch.linspace(0.01, 5, 283)[:, None]
    patches = smooth(1000, 588, 0.02, 1)
    patches[::7] = torch.linspace(0.001, 4, 143)[:, None]
    index = index_words(words)
    found = nearest_words(patches[None], index, 0.1)[0]
    assert (found[::7] == 17).all() and screened == [True]
    parts = [nearest_words(part[None], index, 0.1)[0] for part in patches.split(10)]
    # Beyond the words is the number of the patch in its image.
    assert torch.equal(torch.cat(parts).clamp(max=400), found.clamp(max=400))


def test_directions_are_at_right_angles_and_span_what_they_are_made_of():
    """Also of columns a million times as short as others, and where some are in the span of others, or 0."""
    values = np.random.default_rng(0)
    columns = (values.standard_normal((300, 20)) * 10.0 ** -np.linspace(0, 6, 20)).astype(np.float32)
    columns[:, 9], columns[:, 14] = columns[:, 3], 0
    found = _orthonormal(columns)
    assert found.dtype == np.float32 and not found[:, [9, 14]].any()
    kept = np.delete(found, [9, 14], axis=1)
    np.testing.assert_allclose(kept.T @ kept, np.eye(18), atol=1e-6)
    lengths = np.linalg.norm(columns, axis=0, keepdims=True).clip(min=1e-30)
    np.testing.assert_allclose(found @ (found.T @ (columns / lengths)), columns / lengths, atol=1e-5)
