"""Words that are ruled out unseen: what is found is what a look at all words finds, worked out in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vwt_hf.screening import FEWEST_WORDS, make_screen, screened_products
from vwt_hf.words import index_words, nearest_words


def smooth(number: int, values: int, noise: float, seed: int) -> torch.Tensor:
    """(number, values): sums of a few slow waves, and noise."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.cos(torch.arange(12)[:, None] * torch.linspace(0, torch.pi, values))
    shapes = torch.randn(number, 12, generator=generator) @ waves
    return shapes + noise * torch.randn(number, values, generator=generator)


def expected_words(patches: torch.Tensor, words: torch.Tensor, threshold: float) -> torch.Tensor:
    unit, size = torch.nn.functional.normalize(words.double(), dim=1), len(words)
    cosines = torch.nn.functional.normalize(patches.double(), dim=2) @ unit.T
    most = cosines.amax(dim=2, keepdim=True)
    first = (cosines >= most - 1e-5).int().argmax(dim=2)
    return torch.where(most[..., 0] >= 1 - threshold - 1e-5, first, size + torch.arange(patches.shape[1]))


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5, 1.5])
@pytest.mark.parametrize(("size", "values"), [(256, 256), (1000, 588), (300, 3072)])
def test_no_word_that_is_the_nearest_is_ruled_out(size, values, threshold):
    """2,600 patches, more than are looked at at once, of which some are words, some are like none."""
    words = smooth(size, values, 0.05, 0)
    patches = smooth(2600, values, 0.3, 1)
    patches[::3] = words[torch.arange(867) % size] * torch.linspace(0.01, 300, 867)[:, None]
    patches[1::50] = torch.randn(52, values, generator=torch.Generator().manual_seed(2))
    index = index_words(words)
    assert index.screen is not None
    found = nearest_words(patches.view(2, 1300, values), index, threshold)
    assert torch.equal(found, expected_words(patches.view(2, 1300, values), words, threshold))


def products_by(index, rows, threshold):
    lengths = rows.norm(dim=1)
    slack = 1e-5 * lengths
    return screened_products(rows, lengths, (1 - threshold) * lengths - slack, slack, index.words, index.screen)


def test_of_smooth_words_few_are_looked_at_and_of_noise_all():
    words, rows = smooth(500, 400, 0.02, 0), smooth(200, 400, 0.02, 1)
    index = index_words(words)
    largest, first = products_by(index, rows, 2)
    products = rows.double() @ index.words.double().T
    assert torch.equal(first, products.argmax(dim=1))
    assert torch.allclose(largest.double(), products.amax(dim=1), rtol=1e-5)
    noise = torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    assert products_by(index_words(noise), rows, 2) is None
    near = products_by(index_words(noise), rows, 0.1)  # none is near, whatever it may be
    assert near is not None and (near[0] < 0.9 * rows.norm(dim=1)).all()


def test_words_that_differ_beyond_the_directions_are_told_apart():
    """A common shape, and of each word a value of its own, which is more than there are directions for."""
    words = torch.ones(300, 600) * 0.2
    words[torch.arange(300), torch.arange(300)] += 2
    index = index_words(words)
    assert torch.equal(nearest_words(words[None], index, 0.5), torch.arange(300)[None])
    between = words.repeat_interleave(2, dim=0)[None] + 0.01 * torch.randn(
        1, 600, 600, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(nearest_words(between, index, 0.5), torch.arange(300).repeat_interleave(2)[None])


def test_of_words_that_are_the_same_but_for_rounding_the_first_is_taken():
    words = smooth(400, 300, 0.02, 0)
    words[200:] = words[:200] * torch.linspace(0.1, 9, 200)[:, None]
    index = index_words(words)
    for patches in (words[None], words[None] + 0.01 * torch.randn(1, 400, 300)):
        found = nearest_words(patches, index, 0.3)
        assert (found < 200).all()
        assert torch.equal(found[0, :200], found[0, 200:]) or patches is not words[None]
    assert torch.equal(nearest_words(words[None], index, 0.3), torch.arange(200).repeat(2)[None])


def test_flat_words_have_one_direction_and_flat_patches_take_the_first_of_them_in_a_batch_as_alone():
    words = smooth(400, 300, 0.02, 0)
    words[17:300] = torch.linspace(0.01, 5, 283)[:, None]
    patches = torch.linspace(0.001, 4, 1400)[:, None].expand(1400, 300).view(7, 200, 300)
    index = index_words(words)
    assert (nearest_words(patches, index, 0.1) == 17).all()
    assert torch.equal(nearest_words(patches[3:4], index, 0.1), nearest_words(patches, index, 0.1)[3:4])


def test_zeros_and_values_that_are_no_numbers():
    words = smooth(300, 300, 0.02, 0)
    words[5] = 0
    index, patches = index_words(words), smooth(6, 300, 0.02, 1)[None]
    patches[0, 1] = 0
    patches[0, 2, 7] = torch.nan
    patches[0, 3, 7] = torch.inf
    for threshold, of_zeros in ((0.3, 301), (1.0, 0)):
        found = nearest_words(patches, index, threshold)[0]
        assert found[1] == of_zeros and found[2] == 302 and found[3] == 303
        assert torch.equal(found[[0, 4, 5]], expected_words(patches, words, threshold)[0, [0, 4, 5]])


def test_few_words_or_values_have_no_screen():
    for size, values in ((FEWEST_WORDS - 1, 600), (600, FEWEST_WORDS - 1), (0, 600)):
        assert make_screen(np.ones((size, values), np.float32)) is None
    same = make_screen(np.full((300, 300), 300**-0.5, np.float32))
    assert same is not None and torch.isfinite(same.words).all()
    along = same.directions.T @ same.directions
    assert torch.allclose(along, torch.eye(len(along)), atol=1e-5)
