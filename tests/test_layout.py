"""Ragged batches: grouping, pooling and the way back, against loops that say what is meant."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from vwt_hf.layout import attention_bias, group, medoids, pool, pool_pairs, regroup, represent
from vwt_hf.plans import Grouped
from vwt_hf.words import (
    centre,
    gather_patches,
    grid_patches,
    highest,
    index_words,
    nearest_kept,
    nearest_words,
    patch_places,
    patchify,
)

WORDS = torch.tensor([[4, 2, 4, 7, 2, 2], [9, 8, 7, 6, 5, 4], [3, 3, 3, 3, 3, 3]])
TOKENS = [[0, 1, 0, 2, 1, 1], [0, 1, 2, 3, 4, 5], [0] * 6]
"""The token of each patch."""


def by_image(values: torch.Tensor, layout) -> list[torch.Tensor]:
    """The tokens of each image of WORDS, prefix tokens included and padding left out."""
    rows = values.flatten(0, 1)
    starts = [int(image.min()) for image in layout.rows]
    return [rows[start : start + layout.prefix + n] for start, n in zip(starts, (3, 6, 1), strict=True)]


@pytest.fixture(params=["packed", "rounded", "padded"])
def lay(request, monkeypatch):
    """`group`, of a packed batch, of one whose rows are made a multiple of seven, or of a padded one."""
    monkeypatch.setattr("vwt_hf.layout._rounded", lambda rows: -(-rows // 7) * 7)
    return functools.partial(group, packed=request.param != "padded", rounds=request.param == "rounded")


def test_patches_that_share_a_word_share_a_token_in_the_order_of_their_first_patches(lay):
    layout = lay(WORDS, 2)
    for image, (rows, tokens) in enumerate(zip(layout.rows.tolist(), TOKENS, strict=True)):
        assert rows == [rows[0], rows[0] + 1, *(rows[0] + 2 + token for token in tokens)]
        sizes = layout.sizes.flatten()[layout.rows[image]].tolist()
        assert sizes == [1, 1, *(tokens.count(token) for token in tokens)]
    assert layout.runs == ((3, 1), (5, 1), (8, 1)) and layout.tokens == 16 and layout.longest == 8


def test_a_packed_batch_has_no_padding_and_images_of_one_length_side_by_side():
    words = torch.cat((WORDS, WORDS[:1]))
    layout = group(words, 1)
    assert layout.sizes.shape == (1, 2 + 4 + 4 + 7) and (layout.sizes > 0).all()
    assert layout.rows[:, 0].tolist() == [2, 10, 0, 6] and layout.runs == ((2, 1), (4, 2), (7, 1))
    assert layout.boundaries.tolist() == [0, 2, 6, 10, 17] and layout.boundaries.dtype == torch.int32


def test_a_rounded_batch_ends_with_padding_that_makes_its_rows_one_of_few_numbers():
    """16 numbers from one power of two to the next."""
    words = torch.arange(300).repeat(2, 1)
    lengths = {group(words[:, :count], 0, rounds=True).sizes.shape[1] for count in range(1, 257)}
    assert {length for length in lengths if length <= 64} == {*range(2, 32, 2), *range(32, 66, 2)}
    assert sorted(length for length in lengths if length > 256) == list(range(272, 513, 16))
    layout = group(words[:, :130], 1, rounds=True)
    assert layout.sizes.shape == (1, 272) and layout.tokens == 262 and not layout.dense and layout.even
    assert (layout.sizes[0, :262] == 1).all() and not layout.sizes[0, 262:].any()
    assert layout.rows.tolist() == [list(range(131)), list(range(131, 262))]
    assert attention_bias(layout, exponent=0) is None


def test_a_rounded_batch_has_no_padding_where_that_would_give_it_the_shape_of_another():
    words = torch.arange(300).repeat(2, 1)
    assert group(words[:, :130], 1, rounds=True, not_as=[(1, 272)]).sizes.shape == (1, 262)
    words = torch.arange(288).clamp(min=8).unsqueeze(0)
    assert group(words, 0, rounds=True).sizes.shape == (1, 280)  # and not the 288 patches that it is expanded to


def test_a_padded_batch_has_a_sequence_for_each_image_and_sizes_of_zero_where_it_is_padded():
    layout = group(WORDS[[0, 2]], 0, packed=False)
    assert layout.sizes.tolist() == [[2, 3, 1], [6, 0, 0]]


def test_a_padded_batch_is_never_as_long_as_what_it_is_expanded_to():
    """Else a shape could not tell a tower's tokens from hidden states that have been expanded."""
    assert group(WORDS, 1, packed=False).sizes.shape == (3, 8)


def test_the_numbers_of_the_words_do_not_matter(lay):
    renamed = torch.randperm(10, generator=torch.Generator().manual_seed(0))[WORDS]
    one, other = lay(WORDS, 1), lay(renamed, 1)
    assert torch.equal(one.rows, other.rows) and torch.equal(one.sizes, other.sizes)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("padding", [False, True], ids=["whole", "with-padding"])
def test_tokens_that_become_one_lie_as_if_their_patches_had_shared_a_word_from_the_start(lay, padding, prefix):
    generator = torch.Generator().manual_seed(prefix)
    for _ in range(20):
        real = (torch.arange(12) < torch.randint(3, 13, (4, 1), generator=generator)) if padding else None
        words = torch.randint(0, 12, (4, 12), generator=generator)
        layout = lay(words, prefix, real=real)
        into = torch.arange(layout.sizes.numel())
        joined = words.clone()
        for image, row in enumerate(layout.rows[:, prefix:]):
            # A patch that counts joins another of its image, before or behind it, and so do all of its token.
            one, other = torch.randint(0, 3, (2,), generator=generator).tolist()
            into[row[one]] = row[other]
            joined[image, words[image] == words[image, one]] = words[image, other]
        expected = lay(joined, prefix, real=real, not_as=[layout.sizes.shape])
        found, _ = regroup(layout, into, not_as=[layout.sizes.shape])
        if expected.tokens == layout.tokens:
            assert found is layout
            continue
        assert found.runs == expected.runs and found.packed == expected.packed
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.sizes, expected.sizes)
        for at in (0, 1):
            assert torch.equal(found.bounds[at], expected.bounds[at])
        assert torch.equal(found.bounds[0], found.rows.amin(dim=1))
        assert torch.equal(found.bounds[1], found.rows.amax(dim=1) + 1)


def test_an_empty_batch_has_an_empty_layout(lay):
    layout = lay(WORDS[:0], 1)
    assert layout.sizes.numel() == 0 and layout.tokens == layout.longest == 0 and not layout.packed
    assert Grouped(layout, 1, None).expand(torch.zeros(*layout.sizes.shape, 4)).shape == (0, 7, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 3])
def test_a_token_is_the_mean_of_its_patches_and_prefix_tokens_and_padding_are_zero(dtype, images, lay):
    """Also of values that lie in memory once for all images."""
    values, layout = torch.randn(images, 6, 5).to(dtype).expand(3, -1, -1), lay(WORDS, 2)
    pooled = pool(values, layout)
    assert pooled.dtype == dtype and pooled.shape[:2] == layout.sizes.shape
    for image, tokens in enumerate(by_image(pooled, layout)):
        assert not tokens[:2].any()
        for token, found in enumerate(tokens[2:]):
            mine = values[image][torch.tensor(TOKENS[image]) == token].float()
            torch.testing.assert_close(found, mine.mean(0).to(dtype))
    assert not pooled[layout.sizes == 0].any()


def test_gradients_of_pooling_are_shared_by_the_patches_of_a_token(lay):
    values = torch.randn(3, 6, 5, requires_grad=True)
    pool(values, lay(WORDS, 1)).sum().backward()
    sizes = torch.tensor([[tokens.count(token) for token in tokens] for tokens in TOKENS])
    torch.testing.assert_close(values.grad, (1 / sizes).unsqueeze(-1).expand(-1, -1, 5))


def test_expanding_gives_each_patch_its_token_and_leaves_prefix_tokens(lay):
    layout = lay(WORDS, 2)
    hidden_states = torch.randn(*layout.sizes.shape, 4)
    full = Grouped(layout, 1, None).expand(hidden_states)
    for image, tokens in enumerate(by_image(hidden_states, layout)):
        assert torch.equal(full[image], tokens[[0, 1, *(2 + token for token in TOKENS[image])]])


def test_a_token_of_s_patches_gets_log_s_and_padding_nothing(lay):
    layout = lay(WORDS, 1)
    bias = attention_bias(layout, exponent=1)
    expected = [[0, math.log(2), math.log(3), 0], [0] * 7, [0, math.log(6)]]
    for found, wanted in zip(by_image(bias, layout), expected, strict=True):
        assert found.tolist() == pytest.approx(wanted)
    assert (bias[layout.sizes == 0] == -math.inf).all()


def test_without_proportional_attention_only_padding_is_hidden():
    assert attention_bias(group(WORDS, 1), exponent=0) is None
    bias = attention_bias(group(WORDS, 1, packed=False), exponent=0)
    assert bias[2].tolist() == [0, 0] + [-math.inf] * 6


def test_a_token_lies_where_the_patch_nearest_to_the_mean_place_of_its_patches_does(lay):
    layout = lay(WORDS, 2)
    places = torch.tensor([[row, column] for row in range(2) for column in range(3)], dtype=torch.float32)
    for image, found in enumerate(by_image(medoids(layout, (2, 3)).unsqueeze(-1), layout)):
        assert found[:2].flatten().tolist() == [6, 6]
        for token, patch in enumerate(found[2:].flatten().tolist()):
            mine = [index for index, other in enumerate(TOKENS[image]) if other == token]
            distance = (places[mine] - places[mine].mean(0)).square().sum(1)
            assert patch == mine[int(distance.argmin())]
    assert (medoids(layout, (2, 3))[layout.sizes == 0] == 6).all()


def test_what_two_tokens_have_for_each_other_is_the_mean_over_their_patches(lay):
    """Against a loop over the images in the order of their rows."""
    values = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    layout = lay(torch.cat((WORDS, WORDS[:1])), 2)
    found = pool_pairs(values, layout)
    assert [len(part) for part in found] == ([1, 2, 1] if layout.packed else [4])
    images = [image for part in found for image in part]
    for row, pairs in zip(layout.rows[layout.rows[:, 0].argsort()], images, strict=True):
        of = (row - row[0]).tolist()
        for one in range(pairs.shape[1]):
            for other in range(pairs.shape[2]):
                mine = [i for i in range(8) if of[i] == one]
                its = [i for i in range(8) if of[i] == other]
                mean = values[0][:, mine][:, :, its].mean((1, 2)) if mine and its else torch.zeros(4)
                torch.testing.assert_close(pairs[:, one, other], mean)


def test_images_of_one_length_are_laid_out_without_padding():
    layout = represent(torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]]), 2, 1)
    assert layout.sizes.tolist() == [[1, 2, 2], [1, 1, 3]] and layout.runs == ((3, 2),)
    assert layout.rows.tolist() == [[0, 1, 2, 2, 1], [3, 5, 5, 5, 4]]
    assert attention_bias(layout, exponent=0) is None
    assert attention_bias(layout, exponent=1)[1].tolist() == pytest.approx([0, 0, math.log(3)])


def test_a_dropped_patch_joins_the_kept_one_that_looks_alike_and_lies_close():
    patches = torch.randn(2, 12, 5)
    kept = torch.tensor([[0, 5, 6, 11], [1, 2, 3, 8]])
    found = nearest_kept(centre(patches), kept, patch_places((3, 4), patches.device))
    places = torch.tensor([[row, column] for row in range(3) for column in range(4)], dtype=torch.float32)
    for image in range(2):
        pixels = torch.cdist(patches[image], gather_patches(patches, kept)[image])
        steps = torch.cdist(places, places[kept[image]])
        expected = (pixels / pixels.mean() + steps / steps.mean()).argmin(1)
        expected[kept[image]] = torch.arange(4)
        assert torch.equal(found[image], expected)


def test_of_patches_that_are_all_alike_the_closest_is_joined_and_each_kept_one_stays_itself():
    found = nearest_kept(centre(torch.ones(1, 6, 4)), torch.tensor([[0, 5]]), patch_places((1, 6), torch.device("cpu")))
    assert found.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert nearest_kept(centre(torch.ones(1, 1, 4)), torch.tensor([[0]]), torch.zeros(1, 1, 2)).tolist() == [[0]]


def test_a_patch_takes_the_word_of_smallest_cosine_distance_within_the_threshold():
    generator = torch.Generator().manual_seed(0)
    patches, words = torch.randn(2, 50, 12, generator=generator), torch.randn(7, 12, generator=generator)
    distance = 1 - torch.nn.functional.cosine_similarity(patches.unsqueeze(2), words, dim=3)
    for threshold in (0.1, 0.5, 2):
        found = nearest_words(patches, index_words(words), threshold)
        expected = torch.where(distance.amin(2) <= threshold, distance.argmin(2), torch.arange(50) + 7)
        assert torch.equal(found, expected)


def structured(rows: int, columns: int, side: int) -> torch.Tensor:
    """Images in which patches are alike and equally near: a gradient, tiles, one half flat, a checkerboard, bars, one
    colour, zeros, noise, nearly flat noise."""
    height, width = rows * side, columns * side
    generator = torch.Generator().manual_seed(rows * columns * side)
    noise = torch.randn(3, height, width, generator=generator)
    half, bars = noise.clone(), noise.clone()
    half[:, : height // 2] = 0.7
    bars[:, : height // 3] = 1
    bars[:, -height // 3 :] = 1
    images = [
        torch.linspace(-1, 1, width).expand(3, height, width),
        noise[:, :4, :4].repeat(1, height, width)[:, :height, :width],
        half,
        ((torch.arange(height)[:, None] + torch.arange(width)) % 2 * 2 - 1).float().expand(3, height, width),
        bars,
        torch.tensor([0.3, -0.9, 0.1])[:, None, None].expand(3, height, width),
        torch.zeros(3, height, width),
        noise,
        1 + 0.01 * noise,
    ]
    return patchify(torch.stack(images), (side, side))


@pytest.mark.parametrize(("rows", "columns", "side"), [(7, 5, 4), (9, 11, 14), (4, 4, 3), (16, 16, 6), (1, 9, 5)])
def test_of_kept_patches_equally_near_the_first_is_joined_however_products_are_rounded(rows, columns, side):
    """In a batch as alone. What is expected is worked out in double precision, image by image."""
    patches, places = structured(rows, columns, side), patch_places((rows, columns), torch.device("cpu"))
    for keep in {max(1, rows * columns // share) for share in (2, 4, 9)}:
        for kept in (grid_patches(rows, columns, keep, patches.device), highest(centre(patches).variance, keep)):
            found = nearest_kept(centre(patches), kept, places)
            for number, image in enumerate(patches):
                own = kept[min(number, len(kept) - 1)]
                near = sum(
                    distance / distance.mean().clamp(min=1e-6)
                    for of in (image.double(), places[0].double())
                    for distance in [(of.unsqueeze(1) - of[own]).norm(dim=2)]
                )
                expected = (near <= near.amin(1, keepdim=True) + 1e-5).int().argmax(1)
                expected[own] = torch.arange(keep)
                assert torch.equal(found[number], expected)
                assert torch.equal(nearest_kept(centre(image[None]), own[None], places)[0], expected)


@pytest.mark.parametrize("at_once", [1, 100, 1500])
def test_many_patches_are_gone_through_in_pieces_to_the_same_end(at_once, monkeypatch):
    patches, places = structured(9, 7, 4), patch_places((9, 7), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(len(patches), 63, generator=generator) < 0.8
    kept = torch.rand(len(patches), 63, generator=generator).argsort()[:, :20].sort().values
    stays = real.gather(1, kept)
    for marks in ((None, None), (real, stays)):
        whole = nearest_kept(centre(patches), kept, places, *marks)
        assert marks == (None, None) or stays.gather(1, whole).all()  # none is left to one that does not stay
        with monkeypatch.context() as patched:
            patched.setattr("vwt_hf.words.HELD", at_once)
            assert torch.equal(nearest_kept(centre(patches), kept, places, *marks), whole)


@pytest.mark.parametrize(("rows", "columns", "side"), [(7, 5, 4), (9, 11, 14), (1, 1, 3), (16, 16, 6)])
def test_patches_of_a_batch_take_the_words_that_they_take_alone(rows, columns, side):
    """Among them flat words, which all have one direction, and words that are there twice."""
    patches = structured(rows, columns, side)
    values = patches.shape[2]
    some = patches.flatten(0, 1)[:: max(1, rows * columns // 3)]
    flat = torch.rand(5, 1, generator=torch.Generator().manual_seed(0)).expand(5, values)
    index = index_words(torch.cat((some, flat, 3 * some, torch.zeros(1, values), -flat)))
    for threshold in (0.05, 0.5, 1, 2):
        together = nearest_words(patches, index, threshold)
        assert torch.equal(together, torch.cat([nearest_words(image[None], index, threshold) for image in patches]))


@pytest.mark.parametrize("size", [2, 9, 600])
def test_of_words_that_differ_by_rounding_the_first_wins_wherever_they_are(size):
    generator = torch.Generator().manual_seed(size)
    words = torch.randn(size, 27, generator=generator)
    words[-1] = words[0] * 1.7
    index = index_words(words)
    patches = words[:1] * torch.rand(1, 50, 1, generator=generator)
    assert (nearest_words(patches, index, 0.1) == 0).all()
    further = words[:1] + 0.01 * torch.randn(1, 50, 27, generator=generator)
    assert (nearest_words(further, index, 0.1) == 0).all()


def test_a_patch_that_is_a_word_or_on_the_threshold_takes_it_but_at_threshold_0():
    patches = torch.randn(1, 40, 27, generator=torch.Generator().manual_seed(0))
    index = index_words(patches[0])
    assert torch.equal(nearest_words(patches, index, 1e-9), torch.arange(40)[None])
    assert torch.equal(nearest_words(patches, index, 0), torch.arange(40)[None] + 40)
    beside = torch.tensor([[[1.0, 3.0**0.5], [1.0, 1.0]]])  # 60° and 45° from the word
    assert nearest_words(beside, index_words(torch.tensor([[2.0, 0.0]])), 0.5).tolist() == [[0, 0]]


@pytest.mark.parametrize("scale", [3e3, 1e-3])
@pytest.mark.parametrize(("size", "values"), [(1, 588), (7, 588), (600, 12), (1030, 27), (700, 3)])
def test_a_word_is_found_among_few_and_many_of_any_size(size, values, scale):
    generator = torch.Generator().manual_seed(size)
    words = torch.randn(size, values, generator=generator) * scale
    which = torch.randint(size, (2, 1500), generator=generator)
    patches = words[which] * (0.5 + torch.rand(2, 1500, 1, generator=generator)) / scale
    distance = (
        1
        - torch.nn.functional.normalize(patches.double(), dim=2)
        @ torch.nn.functional.normalize(words.double(), dim=1).T
    )
    found = nearest_words(patches, index_words(words), 0.001)
    assert (found < size).all()
    # One that is as near as the nearest but for rounding: three values have many words about them.
    assert (distance.gather(2, found[..., None])[..., 0] <= distance.amin(2) + 1.1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_no_word(dtype):
    patches, words = torch.rand(2, 40, 27), torch.rand(600, 27)
    expected = nearest_words(patches, index_words(words), 0.1)
    torch.set_default_dtype(dtype)
    try:
        index = index_words(words)
        assert index.words.dtype == torch.float32 and torch.equal(nearest_words(patches, index, 0.1), expected)
    finally:
        torch.set_default_dtype(torch.float32)


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


def test_means_are_taken_where_the_values_lie_and_not_where_the_images_do():
    """As of embeddings that accelerate moves to a device of their own; "meta" stands for one here."""
    plan = Grouped(group(WORDS, 1, packed=True), 1, (2, 3), words=WORDS)
    tokens = torch.randn(3, 7, 4)
    found = plan.reduce(tokens.to("meta"))
    assert found.device.type == "meta" and found.shape == plan.reduce(tokens).shape
