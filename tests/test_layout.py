"""Ragged batches: grouping, pooling and the way back, against loops that say what is meant."""

from __future__ import annotations

import math

import pytest
import torch

from vwt_hf.layout import attention_bias, expand, group, pool
from vwt_hf.words import index_words, nearest_words

WORDS = torch.tensor([[4, 2, 4, 7, 2, 2], [9, 8, 7, 6, 5, 4], [3, 3, 3, 3, 3, 3]])


def test_patches_that_share_a_word_share_a_token_in_the_order_of_their_first_patches():
    layout = group(WORDS)
    assert layout.token_of_patch.tolist() == [[0, 1, 0, 2, 1, 1], [0, 1, 2, 3, 4, 5], [0] * 6]
    assert layout.sizes.tolist() == [[2, 3, 1, 0, 0, 0], [1] * 6, [6, 0, 0, 0, 0, 0]]
    assert layout.lengths.tolist() == [3, 6, 1]


def test_the_numbers_of_the_words_do_not_matter():
    renamed = torch.randperm(10, generator=torch.Generator().manual_seed(0))[WORDS]
    one, other = group(WORDS), group(renamed)
    assert torch.equal(one.token_of_patch, other.token_of_patch) and torch.equal(one.sizes, other.sizes)


def test_an_empty_batch_has_an_empty_layout():
    assert group(WORDS[:0]).sizes.shape == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_the_mean_of_its_patches_and_padding_is_zero(dtype):
    values, layout = torch.randn(3, 6, 5).to(dtype), group(WORDS)
    pooled = pool(values, layout)
    assert pooled.dtype == dtype
    for image in range(3):
        for token in range(6):
            mine = values[image][layout.token_of_patch[image] == token].float()
            expected = mine.mean(0) if len(mine) else torch.zeros(5)
            torch.testing.assert_close(pooled[image, token], expected.to(dtype))


def test_expanding_gives_each_patch_its_token_and_leaves_prefix_tokens():
    layout, hidden_states = group(WORDS), torch.randn(3, 2 + 6, 4)
    full = expand(hidden_states, layout, 2)
    assert torch.equal(full[:, :2], hidden_states[:, :2])
    for image in range(3):
        for patch in range(6):
            assert torch.equal(full[image, 2 + patch], hidden_states[image, 2 + layout.token_of_patch[image, patch]])


def test_a_token_of_s_patches_gets_log_s_and_padding_nothing():
    layout = group(WORDS)
    assert attention_bias(layout, 1, proportional=True)[0, 0, 0].tolist() == pytest.approx(
        [0, math.log(2), math.log(3), 0, -math.inf, -math.inf, -math.inf]
    )
    assert attention_bias(layout, 1, proportional=False)[2, 0, 0].tolist() == [0, 0] + [-math.inf] * 5


def test_a_patch_takes_the_word_of_smallest_cosine_distance_within_the_threshold():
    generator = torch.Generator().manual_seed(0)
    patches, words = torch.randn(2, 50, 12, generator=generator), torch.randn(7, 12, generator=generator)
    distance = 1 - torch.nn.functional.cosine_similarity(patches.unsqueeze(2), words, dim=3)
    for threshold in (0.1, 0.5, 2):
        found = nearest_words(patches, index_words(words), threshold)
        expected = torch.where(distance.amin(2) <= threshold, distance.argmin(2), torch.arange(50) + 7)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("axes", [1, 15, 27])
def test_skipping_by_sketches_changes_nothing(axes, monkeypatch):
    """Smooth patches near smooth words, and noise that no word is near: what is skipped has no word in reach."""
    monkeypatch.setattr("vwt_hf.words.SKETCHED", 1)
    generator = torch.Generator().manual_seed(0)
    words = torch.rand(30, 1, generator=generator) + 0.1 * torch.rand(30, 27, generator=generator)
    near = words[torch.randint(30, (200,), generator=generator)] + 0.1 * torch.randn(200, 27, generator=generator)
    patches = torch.cat((near, torch.randn(200, 27, generator=generator))).unsqueeze(0)
    distance = 1 - torch.nn.functional.cosine_similarity(patches.unsqueeze(2), words, dim=3)
    for threshold in (0.01, 0.1, 0.7):
        found = nearest_words(patches, index_words(words, axes), threshold)
        taken = distance.amin(2) <= threshold
        assert taken.sum() > 0 and torch.equal(found < 30, taken)
        assert torch.equal(found[taken], distance.argmin(2)[taken])


def test_brightness_does_not_matter_to_the_cosine_and_halves_are_scored_in_float32():
    patches, words = torch.rand(1, 40, 27), torch.rand(5, 27)
    expected = nearest_words(patches, index_words(words), 0.1)
    assert torch.equal(nearest_words(patches * 7, index_words(words * 3), 0.1), expected)
    half = patches.to(torch.bfloat16)
    assert torch.equal(
        nearest_words(half, index_words(words), 0.1), nearest_words(half.float(), index_words(words), 0.1)
    )


def test_of_words_equally_near_the_first_wins():
    word = torch.rand(12)
    assert nearest_words(word.view(1, 1, 12), index_words(torch.stack((-word, word, word))), 0.1).tolist() == [[1]]


def test_a_patch_of_zeros_is_at_distance_one_of_every_word():
    patches, words = torch.zeros(1, 3, 12), index_words(torch.rand(4, 12))
    assert nearest_words(patches, words, 0.99).tolist() == [[4, 5, 6]]
    assert nearest_words(patches, words, 1.0).tolist() == [[0, 0, 0]]


def test_a_word_of_zeros_is_at_distance_one_of_every_patch():
    assert nearest_words(torch.rand(1, 1, 12), index_words(torch.zeros(1, 12)), 0.5).tolist() == [[1]]
