"""Patches left to their neighbours, against loops that say what is meant."""

from __future__ import annotations

import collections
import math

import pytest
import torch

from vwt_hf.neighbours import (
    FAR,
    FINE,
    OFFSETS,
    cover,
    cover_by,
    describe,
    find_leaders,
    find_neighbours,
    find_padded_neighbours,
    leaders,
)

GRIDS = [(8, 8), (5, 7), (1, 6), (3, 1)]
CLASSES = ((1, 1), (0, 1), (1, 0))
"""Row and column, modulo two, of the patches that may go, class after class."""


def looks_of(rows: int, columns: int, images: int = 3) -> torch.Tensor:
    """Some neighbours are alike, some are not, and there are ties."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 4, (images, rows * columns, 2), generator=generator).float() / 4


def difference(looks: torch.Tensor, one: tuple[int, int], other: tuple[int, int], columns: int) -> float:
    return (looks[one[0] * columns + one[1]] - looks[other[0] * columns + other[1]]).norm().item()


def cover_by_loops(looks: torch.Tensor, rows: int, columns: int, tolerance: float) -> set[tuple[int, int]]:
    places = [(row, column) for row in range(rows) for column in range(columns)]
    stays = set(places)
    for spacing, within in ((1, 1), (2, FAR)):
        for class_row, class_column in CLASSES:
            going = set()
            for row, column in places:
                if (row % (2 * spacing), column % (2 * spacing)) != (class_row * spacing, class_column * spacing):
                    continue
                for down, right in OFFSETS:
                    there = (row + spacing * down, column + spacing * right)
                    if there in stays and difference(looks, (row, column), there, columns) < within * tolerance:
                        going.add((row, column))
            stays -= going
    return stays


def leader_by_loops(looks, place, columns: int, stays: set) -> tuple[int, int]:
    if place in stays:
        return place
    row, column = place
    spacing = 2 if row % 2 == column % 2 == 0 else 1
    there = [(row + spacing * down, column + spacing * right) for down, right in OFFSETS]
    allowed = stays if spacing == 2 else stays | {(r, c) for r in range(0, 99, 2) for c in range(0, 99, 2)}
    inside = [(r, c) for r, c in there if 0 <= c < columns and 0 <= r < len(looks) // columns and (r, c) in allowed]
    nearest = min(inside, key=lambda other: difference(looks, place, other, columns))
    return leader_by_loops(looks, nearest, columns, stays)


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
@pytest.mark.parametrize("tolerance", [0.0, 0.3, 0.6, 1.1, 9.0])
def test_a_patch_goes_where_a_neighbour_that_stays_is_alike(rows, columns, tolerance):
    looks = looks_of(rows, columns)
    neighbours = find_neighbours(looks, (rows, columns))
    stays = cover(neighbours, tolerance)
    leads = leaders(neighbours, stays)
    for image in range(len(looks)):
        expected = cover_by_loops(looks[image], rows, columns, tolerance)
        assert {divmod(index, columns) for index in stays[image].nonzero().flatten().tolist()} == expected
        for index in range(rows * columns):
            lead = leader_by_loops(looks[image], divmod(index, columns), columns, expected)
            assert leads[image, index] == lead[0] * columns + lead[1]


def test_images_with_nothing_alike_keep_all_and_flat_ones_a_sixteenth():
    flat = find_neighbours(torch.zeros(1, 64, 2), (8, 8))
    stays = cover(flat, 1e-6)
    assert stays.nonzero()[:, 1].tolist() == [0, 4, 32, 36]
    assert leaders(flat, stays).unique().tolist() == [0, 4, 32, 36]
    assert cover(flat, 0.0).all()


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_padded_images_are_covered_as_they_are_alone(rows, columns):
    looks = looks_of(rows, columns, 1)
    below = torch.arange(5) % columns + (rows - 1) * columns  # what lies above is what padding looks like
    padded = torch.cat((looks, looks[:, below]), dim=1)
    index = torch.arange(rows * columns + 5)
    places = torch.stack((index // columns, index % columns), dim=-1).float().unsqueeze(0)
    real = (index < rows * columns).unsqueeze(0)
    alone = find_neighbours(looks, (rows, columns))
    found = find_padded_neighbours(padded, places, real)
    stays, expected = cover(found, 0.6), cover(alone, 0.6)
    assert torch.equal(stays[real], expected[0]) and stays[~real].all()
    assert torch.equal(leaders(found, stays)[real], leaders(alone, expected)[0])


@pytest.mark.parametrize("tolerance", [0.3, 0.6, 9.0])
@pytest.mark.parametrize("kind", ["last", "column", "some", "most"])
def test_patches_that_a_caller_masks_are_nobodys_neighbour(kind, tolerance):
    """Of 7 × 6 patches and padding: a row that ends early, a column, and patches anywhere."""
    looks, index = looks_of(10, 5), torch.arange(50)
    places, generator = torch.stack((index // 6, index % 6), dim=-1).float(), torch.Generator().manual_seed(0)
    masked = {
        "last": index >= 40,
        "column": index % 6 == 5,
        "some": torch.rand(50, generator=generator) < 0.2,
        "most": torch.rand(50, generator=generator) < 0.7,
    }
    real = ((index < 42) & ~masked[kind]).expand(3, -1)
    neighbours = find_padded_neighbours(looks, places.expand(3, -1, -1), real)
    exists, apart = ~neighbours.distance.isinf(), (places[:, None] - places[neighbours.index]).abs().amax(dim=-1)
    assert exists.any() and not exists[~real].any()
    assert real.gather(1, neighbours.index.expand(3, -1, -1).flatten(1)).view_as(exists)[exists].all()
    assert (apart[exists] == torch.where((places % 2).any(dim=1), 1, 2)[:, None].expand_as(exists)[exists]).all()
    leads = leaders(neighbours, cover(neighbours, tolerance))
    assert torch.equal(leads.gather(1, leads), leads) and real.gather(1, leads)[real].all()
    assert (leads[~real] == index.expand(3, -1)[~real]).all()
    # No further than over one that was left to another itself.
    assert ((places - places[leads]).abs().amax(dim=-1) <= 3).all()


def test_a_number_of_patches_is_what_the_tolerance_that_leaves_so_many_leaves():
    looks = torch.randn(5, 64, 3, generator=torch.Generator().manual_seed(0))
    neighbours = find_neighbours(looks, (8, 8))
    for tolerance in (1.5, 2.0):
        stays = cover(neighbours, tolerance)
        scores = cover_by(neighbours, stays.sum(dim=1))
        for image in range(len(looks)):
            best = scores[image].argsort(descending=True, stable=True)[: stays[image].sum()]
            assert torch.equal(best.sort().values, stays[image].nonzero().flatten())
    for keep in (4, 20, 63):
        scores = cover_by(neighbours, keep)
        assert (scores.isinf().sum(dim=1) <= keep).all()


@pytest.mark.parametrize("size", [(4, 4), (14, 14), (8, 4), (1, 1)])
def test_looks_measure_raw_colours_their_slopes_and_texture(size):
    """Against sums that say what is meant."""
    height, width = size
    std = (0.5, 0.25, 2.0)
    patches = torch.randn(1, 2, 3, height, width, generator=torch.Generator().manual_seed(0))
    raw = patches[0] * torch.tensor(std).view(3, 1, 1)
    expected = []
    for patch in raw.double():
        values, rest = [], patch.square().sum()
        for channel in patch:
            for column in (0, 1):
                for row in (0, 1):
                    wave = torch.outer(
                        torch.tensor([math.cos(math.pi * row * (y + 0.5) / height) for y in range(height)]),
                        torch.tensor([math.cos(math.pi * column * (x + 0.5) / width) for x in range(width)]),
                    ).double()
                    part = (channel * wave).sum() / max(wave.norm(), 1e-6)
                    values.append(part)
                    rest = rest - part**2
        values.append(FINE * rest.clamp(min=0).sqrt())
        expected.append(torch.stack(values) / math.sqrt(3 * height * width))
    found = describe(patches.flatten(2), size, std)[0]
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_looks_are_the_same_under_another_default_dtype_and_after_it(monkeypatch):
    monkeypatch.setattr("vwt_hf.words._cache", collections.OrderedDict())
    patches, std = torch.randn(1, 2, 48, generator=torch.Generator().manual_seed(0)), (0.229, 0.224, 0.225)
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = describe(patches, (4, 4), std)
    finally:
        torch.set_default_dtype(torch.float32)
    after = describe(patches, (4, 4), std)
    monkeypatch.setattr("vwt_hf.words._cache", collections.OrderedDict())
    expected = describe(patches, (4, 4), std)
    assert torch.equal(other, expected) and torch.equal(after, expected)


def test_patches_of_one_colour_differ_by_the_distance_of_their_colours():
    patches = torch.zeros(1, 2, 3, 16)
    patches[0, 1] = 0.3
    looks = describe(patches.flatten(2), (4, 4), (0.5,) * 3)
    assert (looks[0, 0] - looks[0, 1]).norm().item() == pytest.approx(0.15, abs=1e-6)


def test_statistics_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 4, 16, 16\) have 4 channels.*\(0.5, 0.5, 0.5\) numbers for 3.*again"):
        find_leaders(torch.zeros(1, 4, 16, 16), (8, 8), (2, 2), (0.5, 0.5, 0.5), 0.1)
