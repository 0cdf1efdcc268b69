"""Clustering of patches: as good as scikit-learn's, reproducible, resumable, and at ease with odd data."""

from __future__ import annotations

import pytest
import torch

from vwt_hf.vocabulary.kmeans import BUFFERED_AT_LEAST, MiniBatchKMeans, closest_words, statistics

pytestmark = pytest.mark.newest


def clustered(patches: int, values: int = 12, clusters: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(clusters, values, generator=generator)
    which = torch.randint(clusters, (patches,), generator=generator)
    return centres[which] + torch.randn(patches, values, generator=generator) * 0.2


def learned(patches: torch.Tensor, size: int, batch: int = 2000, seed: int = 0) -> MiniBatchKMeans:
    kmeans = MiniBatchKMeans(size, patches.shape[1], seed=seed)
    for part in patches.split(batch):
        kmeans.update(part)
    return kmeans


def inertia(patches: torch.Tensor, words: torch.Tensor) -> float:
    return float(statistics(patches, words).inertia)


def test_inertia_is_within_two_percent_of_scikit_learns() -> None:
    cluster = pytest.importorskip("sklearn.cluster", reason="needs scikit-learn to compare with")
    patches = clustered(40_000)
    theirs = cluster.MiniBatchKMeans(100, random_state=0).fit(patches.numpy())
    ours, _ = learned(patches, 100).finish()
    assert inertia(patches, ours) <= 1.02 * inertia(patches, torch.from_numpy(theirs.cluster_centers_))


def test_inertia_is_within_two_percent_of_full_lloyd() -> None:
    patches = clustered(40_000)
    words = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(1))[:100]]
    for _ in range(25):
        sums, counts, _ = statistics(patches, words)
        words = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), words)
    ours, _ = learned(patches, 100).finish()
    assert inertia(patches, ours) <= 1.02 * inertia(patches, words)


def test_the_same_seed_gives_the_same_words_and_another_gives_others() -> None:
    patches = clustered(25_000)
    first, again, other = (learned(patches, 50, seed=seed).finish()[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_resuming_equals_never_stopping(stop: int) -> None:
    parts = clustered(25_000).split(2000)
    assert stop * 2000 < BUFFERED_AT_LEAST or stop == 11  # both before and after the words are seeded
    kmeans = MiniBatchKMeans(50, 12)
    for part in parts[:stop]:
        kmeans.update(part)
    resumed = MiniBatchKMeans(50, 12, seed=99)
    resumed.load_state_dict({name: _copy(value) for name, value in kmeans.state_dict().items()})
    for part in parts[stop:]:
        kmeans.update(part)
        resumed.update(part)
    for ours, theirs in zip(kmeans.finish(), resumed.finish(), strict=True):
        assert torch.equal(ours, theirs)
    assert kmeans.inertia == resumed.inertia


def _copy(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_statistics_of_the_parts_add_up_to_those_of_the_whole() -> None:
    patches, words = clustered(3000), clustered(20, seed=1)
    whole = statistics(patches, words)
    parts = [statistics(part, words) for part in patches.split(1000)]
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    torch.testing.assert_close(sum(part.sums for part in parts), whole.sums, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sum(part.inertia for part in parts), whole.inertia)


def test_merging_summed_statistics_learns_as_one_process_does() -> None:
    patches = clustered(24_000)
    one, many = learned(patches[:20_000], 30), learned(patches[:20_000], 30)
    assert one.words is not None and many.words is not None
    one.merge(statistics(patches[20_000:], one.words))
    halves = [statistics(part, many.words) for part in patches[20_000:].split(2000)]
    many.merge(type(halves[0])(*(first + second for first, second in zip(*halves, strict=True))))
    torch.testing.assert_close(one.words, many.words)
    assert torch.equal(one.counts, many.counts)


def test_fewer_distinct_patches_than_words_give_fewer_words() -> None:
    distinct = torch.eye(5)
    words, counts = learned(distinct.repeat(100, 1), size=20).finish()
    assert len(words) == 5
    assert counts.tolist() == [100] * 5
    torch.testing.assert_close(words[words.argmax(dim=1).argsort()], distinct)


@pytest.mark.parametrize("processes", [1, 2])
def test_copies_of_one_patch_are_one_word_also_where_rounding_decides_which_is_nearest(processes: int) -> None:
    distinct = torch.rand(5, 48, generator=torch.Generator().manual_seed(0))
    patches = distinct[torch.arange(40_000) % 5]
    kmeans = learned(patches[:20_000], size=50, batch=4000)
    for batch in patches[20_000:].split(4000):
        assert kmeans.words is not None
        parts = [statistics(part, kmeans.words) for part in batch.chunk(processes)]
        if kmeans.merge(type(parts[0])(*map(sum, zip(*parts, strict=True)))):
            kmeans.restart_rare(batch)
    words, counts = kmeans.finish()
    assert counts.tolist() == [8000] * 5
    torch.testing.assert_close(words[words[:, 0].argsort()], distinct[distinct[:, 0].argsort()], rtol=0, atol=1e-4)


def test_a_page_of_white_patches_leaves_words_for_the_rest() -> None:
    rest = clustered(600, clusters=6)
    white = torch.ones(39_400, 12)
    patches = torch.cat((white, rest))[torch.randperm(40_000, generator=torch.Generator().manual_seed(0))]
    words, counts = learned(patches, size=20).finish()
    assert int(((words - 1).square().mean(dim=1) < 1e-6).sum()) == 1
    assert counts[0] >= 39_000
    assert inertia(rest, words) < 1.5 * inertia(rest, learned(rest, size=19).finish()[0])


def test_words_that_die_start_again_where_patches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(40, 12, generator=generator) * 10

    def drawn(clusters: torch.Tensor, patches: int) -> torch.Tensor:
        which = clusters[torch.randint(len(clusters), (patches,), generator=generator)]
        return which + torch.randn(patches, 12, generator=generator) * 0.1

    # A third of the clusters disappears from the stream, and others come.
    stream, later = drawn(centres[:30], 20_000), drawn(centres[10:], 200_000)

    def dead() -> int:
        words, _ = learned(torch.cat((stream, later)), size=40, batch=10_000).finish()
        return int((statistics(later, words).counts == 0).sum())

    assert dead() <= 2
    monkeypatch.setattr("vwt_hf.vocabulary.kmeans.RARE", 0)
    assert dead() >= 8


def test_words_come_most_frequent_first() -> None:
    _, counts = learned(clustered(20_000), size=30).finish()
    assert torch.equal(counts, counts.sort(descending=True).values)
    assert len(counts) == 30


def test_the_buffer_does_not_grow_with_the_stream() -> None:
    kmeans = MiniBatchKMeans(10, 12)
    held = []
    for part in clustered(60_000).split(2000):
        kmeans.update(part)
        held.append(len(kmeans.state_dict()["buffer"]))
    assert max(held) < BUFFERED_AT_LEAST
    assert held[-1] == 0


def test_a_batch_without_patches_changes_nothing() -> None:
    """As of images none of which can be read, before words are seeded and after."""
    parts, none = clustered(20_000).split(2000), torch.zeros(0, 12)
    plain, with_none = MiniBatchKMeans(30, 12), MiniBatchKMeans(30, 12)
    for part in parts:
        plain.update(part)
        with_none.update(none)
        with_none.update(part)
    assert plain.inertia == with_none.inertia
    for ours, theirs in zip(plain.finish(), with_none.finish(), strict=True):
        assert torch.equal(ours, theirs)


def test_words_and_inertia_go_half_by_old_patches_where_as_many_are_new() -> None:
    kmeans = MiniBatchKMeans(1, 1)
    kmeans.update(torch.tensor([0.0, 2.0]).repeat(BUFFERED_AT_LEAST // 2)[:, None])
    assert (kmeans.words, kmeans.inertia) == (1, 1)
    new = torch.full((BUFFERED_AT_LEAST, 1), 3.0)
    again = [kmeans.merge(statistics(new, kmeans.words))]
    assert kmeans.words.item() == pytest.approx(1 + 2 / 1.5)
    assert kmeans.inertia == pytest.approx(1 + (4 - 1) / 1.5)
    again += [kmeans.merge(statistics(new, kmeans.words)) for _ in range(3)]
    assert again == [True, False, True, False]  # rare words start again each time that patches have doubled


def test_of_rare_words_the_rarest_start_again_and_weigh_more_then() -> None:
    kmeans = MiniBatchKMeans(5, 1)
    kmeans.words, kmeans.weights = torch.arange(5.0)[:, None], torch.tensor([100.0, 100, 100, 5, 2])
    kmeans.restart_rare(torch.tensor([[1.0], [9.0]]))
    assert kmeans.words.flatten().tolist() == [0, 1, 2, 3, 9]
    assert kmeans.weights.tolist() == [100, 100, 100, 5, 10]


def test_words_that_differ_by_less_than_pixels_do_are_one_with_the_patches_of_all() -> None:
    kmeans = MiniBatchKMeans(4, 100)
    kmeans.words = (torch.tensor([[1.0], [0], [0.08], [0.16]]) / 255).expand(-1, 100)
    kmeans.counts = torch.tensor([7, 5, 3, 2])
    words, counts = kmeans.finish()
    assert counts.tolist() == [10, 7]  # the last is like the one before, which is like the first of them
    assert not words[0].any()


def test_the_nearest_word_is_found_in_full_precision_and_is_no_less_than_nothing_away() -> None:
    patches = torch.rand(500, 48, generator=torch.Generator().manual_seed(0))
    indices, distances = closest_words(patches, patches)
    assert indices.tolist() == list(range(500)) and distances.min() >= 0
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(closest_words(patches, patches), (indices, distances), strict=True):
            assert torch.equal(found, expected)


def test_equally_near_words_give_the_first() -> None:
    indices, distances = closest_words(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 1.0]]))
    assert indices.tolist() == [1]
    assert distances.tolist() == [1.0]


def test_what_cannot_be_learned_from_is_refused() -> None:
    with pytest.raises(ValueError, match="size is 0"):
        MiniBatchKMeans(0, 3)
    with pytest.raises(ValueError, match=r"\(5, 4\); expected \(patches, 3\)"):
        MiniBatchKMeans(2, 3).update(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="not finite"):
        MiniBatchKMeans(2, 3).update(torch.full((5, 3), float("nan")))
    with pytest.raises(ValueError, match="10 words were asked for, but there are only 4 patches"):
        learned(torch.rand(4, 3), size=10).finish()
    with pytest.raises(ValueError, match="2 words of 3 values; expected 4 of 3"):
        MiniBatchKMeans(4, 3).load_state_dict(MiniBatchKMeans(2, 3).state_dict())


def test_copies_of_one_patch_become_one_word_where_rare_words_are_moved() -> None:
    kmeans = MiniBatchKMeans(3, 1)
    kmeans.update(torch.zeros(BUFFERED_AT_LEAST, 1))
    kmeans.update(torch.ones(BUFFERED_AT_LEAST + 4000, 1))
    assert (kmeans.words == 1).sum() == 1
    words, _ = kmeans.finish()
    assert len(words) == len(words.unique()) == 2
