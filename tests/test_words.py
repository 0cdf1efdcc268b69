"""The pure functions: which patches there are, how they score, which stay."""

from __future__ import annotations

import collections
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vwt_hf import VWTConfig, words
from vwt_hf.words import (
    centre,
    dithered,
    gather_pairs,
    gather_patches,
    grid_patches,
    highest,
    patchify,
    random_patches,
    random_ranks,
    with_prefix,
)

CPU = torch.device("cpu")


def test_patches_are_in_row_major_order_and_flattened_as_channel_row_column():
    pixel_values = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(pixel_values, (2, 3))
    assert patches.shape == (2, 4, 18)
    assert torch.equal(patches[1, 2], pixel_values[1, :, 2:4, 0:3].flatten())


def test_rows_and_columns_beyond_the_last_whole_patch_are_left_out():
    pixel_values = torch.randn(1, 3, 9, 14)
    assert torch.equal(patchify(pixel_values, (4, 4)), patchify(pixel_values[..., :8, :12], (4, 4)))


def test_an_image_smaller_than_a_patch_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"3×20, smaller than one 4×4 patch"):
        patchify(torch.zeros(1, 3, 3, 20), (4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_the_unbiased_variance_in_float32_whatever_the_dtype(dtype):
    patches = (torch.randn(2, 5, 588, dtype=torch.float64) * torch.rand(2, 5, 1) + 2).to(dtype)
    scores = centre(patches).variance
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, patches.double().var(dim=-1).float(), rtol=1e-5, atol=1e-7)


def test_flat_patches_score_nothing_however_bright():
    assert (centre(torch.full((1, 2, 588), 2.6)).variance < 1e-12).all()


def test_of_equal_scores_the_earlier_patch_wins_and_order_is_kept():
    scores = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert highest(scores, 2).tolist() == [[1, 3], [0, 1]]


def test_half_of_a_grid_is_a_checkerboard_and_a_quarter_every_other_row_and_column():
    half = torch.zeros(64, dtype=torch.bool)
    half[grid_patches(8, 8, 32, CPU)[0]] = True
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(half.view(8, 8), (rows + columns) % 2 == 0)
    quarter = grid_patches(8, 8, 16, CPU)[0]
    assert torch.equal(quarter, (8 * rows[::2, ::2] + columns[::2, ::2]).flatten())


@pytest.mark.parametrize("keep", [1, 5, 34])
def test_a_larger_cover_contains_the_smaller_ones(keep):
    assert set(grid_patches(5, 7, keep, CPU)[0].tolist()) <= set(grid_patches(5, 7, keep + 1, CPU)[0].tolist())


def test_a_random_subset_follows_its_seed_alone():
    first = random_patches(256, 64, 7, CPU)
    torch.manual_seed(99)
    assert torch.equal(first, random_patches.__wrapped__(256, 64, 7, CPU)) and not torch.equal(
        first, random_patches(256, 64, 8, CPU)
    )
    assert first.shape == (1, 64) and (first[0, 1:] > first[0, :-1]).all()


@pytest.mark.parametrize("patches", [1, 2, 64, 197, 4096])
@pytest.mark.parametrize("seed", [0, 7, 2**32 + 3, -5])
def test_a_random_subset_is_the_one_that_torch_draws(patches, seed):
    expected = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    keep = (patches + 1) // 2
    assert torch.equal(random_patches(patches, keep, seed, CPU), expected[:keep].sort().values.unsqueeze(0))


@pytest.mark.parametrize("patches", [1, 2, 64, 255])
def test_ranks_of_fewer_patches_are_in_the_order_of_those_of_more(patches):
    ranks, some = random_ranks(256, 7, CPU), random_ranks(patches, 7, CPU)
    assert torch.equal(ranks[:patches].argsort(), some.argsort()) and some.sort().values.tolist() == list(
        range(patches)
    )
    assert not torch.equal(ranks, random_ranks(256, 8, CPU))


def bayer(size: int) -> torch.Tensor:
    """The matrix of ordered dithering, made of smaller ones."""
    if size == 1:
        return torch.zeros(1, 1, dtype=torch.int64)
    quarter = 4 * bayer(size // 2)
    return torch.cat((torch.cat((quarter, quarter + 2), 1), torch.cat((quarter + 3, quarter + 1), 1)))


def test_places_are_ordered_by_the_matrix_of_ordered_dithering():
    for size in (1, 2, 5, 8, 33, 100):
        matrix = bayer(2 ** (size - 1).bit_length())[:size, :size]
        row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        assert torch.equal(dithered(row, column, size), matrix)
        for columns in {1, size // 2 + 1, size}:
            order = matrix[:, :columns].flatten().argsort()
            for keep in {1, len(order) // 3 + 1, len(order)}:
                assert torch.equal(grid_patches(size, columns, keep, CPU)[0], order[:keep].sort().values)


def test_the_order_of_a_strip_of_patches_takes_memory_by_its_length():
    """A square of its length would take 512 GB."""
    row, column = torch.zeros(2**18, dtype=torch.int64), torch.arange(2**18)
    assert dithered(row, column, 2**18).argsort()[:4].tolist() == [0, 2**17, 2**16, 2**17 + 2**16]
    assert grid_patches(1, 2**18, 2, CPU).tolist() == [[0, 2**17]]


def test_a_constant_that_a_cuda_graph_reads_is_kept_for_good(monkeypatch):
    """Graphs know where it lies and do not hold it; a stand-in says that one is being captured."""
    monkeypatch.setattr(words, "_cache", collections.OrderedDict())
    monkeypatch.setattr(words, "_held", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_gpu = types.SimpleNamespace(is_cuda=True, data_ptr=lambda: 7)
    words._hold(on_gpu)
    words._hold(torch.ones(1))
    assert words._held == {7: on_gpu}


@pytest.mark.parametrize("ratio", [0.29, 1 / 3, 0.1, 0.7, 1.0, 5e-5])
def test_a_share_of_patches_is_the_same_of_a_number_and_of_a_tensor(ratio):
    numbers = torch.arange(1, 70_000)
    expected = (numbers.double() * ratio + 1e-9).long()
    assert torch.equal(words.whole_share(numbers, ratio), expected)
    assert [words.whole_share(int(one), ratio) for one in numbers[::997]] == expected[::997].tolist()


def test_choices_that_are_kept_stay_within_their_bytes_whatever_sizes_come():
    for columns in range(512, 524):  # 2 MiB each
        last = grid_patches(512, columns, 2**18, CPU)
        assert sum(kept.nbytes for kept in words._cache.values()) <= 2**24
    assert grid_patches(512, columns, 2**18, CPU) is last
    grid_patches(1500, 1500, 2**21 + 1, CPU)  # larger than all that may be kept
    assert max(kept.nbytes for kept in words._cache.values()) == last.nbytes
    for keep in range(1, 200):
        grid_patches(20, 20, keep, CPU)
    assert len(words._cache) <= 64


def test_many_threads_are_given_the_same_choices():
    def choose(number: int) -> torch.Tensor:
        return grid_patches(9, 9, number % 80 + 1, CPU)

    with ThreadPoolExecutor(8) as pool:
        for number, found in enumerate(pool.map(choose, range(2000))):
            assert found.shape == (1, number % 80 + 1)


@pytest.mark.parametrize("values", [12, 27, 588])
def test_scores_of_a_batch_are_those_of_its_images_alone(values):
    patches = torch.randn(5, 99, values, generator=torch.Generator().manual_seed(0))
    patches[1:3] = patches[0, :1]
    assert torch.equal(centre(patches).variance, torch.cat([centre(image[None]).variance for image in patches]))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("choices", [1, 3])
def test_kept_patches_are_gathered_for_one_choice_or_one_an_image(images, choices):
    patches, kept = torch.randn(images, 6, 4), torch.tensor([[0, 2], [1, 5], [3, 4]])[:choices]
    expected = [patches[i % images][kept[i % choices]] for i in range(max(images, choices))]
    assert torch.equal(gather_patches(patches, kept), torch.stack(expected))


@pytest.mark.parametrize("choices", [1, 3])
def test_pairs_of_kept_patches_and_prefix_tokens_are_gathered(choices):
    values = torch.arange(2 * 36).view(1, 2, 6, 6)
    kept = torch.tensor([[0, 3], [1, 2], [2, 3]])[:choices]
    found = gather_pairs(values, with_prefix(kept, 2))
    assert found.shape == (choices, 2, 4, 4)
    for pairs, patches in zip(found, kept.tolist(), strict=True):
        index = [0, 1, *(2 + patch for patch in patches)]
        assert torch.equal(pairs, values[0][:, index][:, :, index])


@pytest.mark.parametrize(("ratio", "patches", "kept"), [(0.29, 100, 29), (0.5, 257, 128), (1.0, 5, 5), (0.999, 5, 4)])
def test_a_keep_ratio_keeps_the_whole_part_of_its_share(ratio, patches, kept):
    assert VWTConfig(keep_ratio=ratio).patches_kept(patches) == kept


def test_a_number_of_patches_overrides_the_ratio_and_never_exceeds_the_image():
    assert VWTConfig(num_patches=9).patches_kept(16) == 9
    assert VWTConfig(num_patches=9).patches_kept(4) == 4


def test_a_ratio_that_keeps_nothing_is_refused_with_one_that_keeps_something():
    with pytest.raises(ValueError, match=r"keeps none of an image's 64 patches; use a keep_ratio of at least 0\.016"):
        VWTConfig(keep_ratio=0.01).patches_kept(64)
    assert VWTConfig(keep_ratio=0.016).patches_kept(64) == 1


@pytest.mark.parametrize("value", [3, "", [0.5]])
def test_a_vwt_of_another_type_is_refused(value):
    with pytest.raises(TypeError, match=r"expected True, False, None, a VWTConfig, a dict .*or a vocabulary"):
        VWTConfig.parse(value)
