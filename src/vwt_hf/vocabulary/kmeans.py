"""Mini-batch k-means over a stream of patches, in memory that does not grow with the stream. Tensors alone.

The first patches, kept in a buffer, seed the words: random ones of them, after a few rounds of Lloyd's algorithm. Then
each batch moves every word towards the mean of the batch's patches nearest to it (Sculley, WWW 2010). A patch weighs in
proportion to how many came before it (polynomial-decay averaging, Shamir & Zhang, ICML 2013), so what words learned
while they were still poor fades away. Words that hardly any patch is nearest to start again from a patch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..words import HELD, without_autocast

ROUNDS = 10
"""Rounds of Lloyd's algorithm over the buffer."""
BUFFERED = 16
"""Patches in the buffer for each word; never fewer than `BUFFERED_AT_LEAST` in all."""
BUFFERED_AT_LEAST = 16_384
RARE = 0.1
"""A word starts again when it has less than this share of the median word's patches. (Not of the mean: if most patches
are flat white, one word holds most of them.)"""
SAME = (0.1 / 255) ** 2
"""Mean square difference, a tenth of an 8-bit step, below which patches count as the same."""


class Statistics(NamedTuple):
    """What words learn from a batch of patches. The sums over the parts of a batch are those of the whole."""

    sums: torch.Tensor
    """(size, values) float: sum of the patches nearest to each word."""
    counts: torch.Tensor
    """(size,) int64: number of the patches nearest to each word."""
    inertia: torch.Tensor
    """() float64: sum of squared distances of patches to their nearest words."""


def closest_words(patches: torch.Tensor, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The word (size, values) nearest to each patch (patches, values) by Euclidean distance; the first of equal ones.

    Returns:
        Indices (patches,) int64, and squared distances (patches,) with the rounding error of |x|² − 2 x·w + |w|².
    """
    indices, distances = [], []
    with without_autocast(patches.device):
        half = words.square().sum(dim=1) / 2
        for part in patches.split(max(1, HELD // len(words))):
            nearest = torch.addmm(half, part, words.T, alpha=-1).min(dim=1)
            indices.append(nearest.indices)
            distances.append((torch.linalg.vector_norm(part, dim=1).square() + 2 * nearest.values).clamp_min(0))
    return torch.cat(indices), torch.cat(distances)


def statistics(patches: torch.Tensor, words: torch.Tensor) -> Statistics:
    """The statistics of `patches` (patches, values) for `words` (size, values); the same bits in each run."""
    indices, distances = closest_words(patches, words)
    counts = indices.bincount(minlength=len(words))
    # Sorted segments: faster on a CPU than index_add_, and without its atomic additions in random order on a GPU.
    order = indices.argsort(stable=True)
    sums = torch.segment_reduce(patches[order], "sum", lengths=counts)
    return Statistics(sums, counts, distances.sum(dtype=torch.float64))


def _is_first(rows: torch.Tensor) -> torch.Tensor:
    """Whether no row before it is the same, for each row."""
    _, kind = torch.unique(rows, dim=0, return_inverse=True)
    own = torch.arange(len(rows), device=rows.device)
    return own.scatter_reduce(0, kind, own, "amin", include_self=False)[kind] == own


def _without_copies(words: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Words (size, values) but for those that are the same as an earlier one, whose `counts` (size,) go to that one."""
    exact = words.double()
    limit = (SAME * words.shape[1]) ** 0.5
    parts = exact.split(max(1, HELD // len(words)))
    first = torch.cat([(torch.cdist(part, exact) <= limit).byte().argmax(dim=1) for part in parts])
    while not torch.equal(first, first[first]):
        first = first[first]
    stays = first == torch.arange(len(words), device="cpu")
    return words[stays], torch.zeros_like(counts).index_add(0, first, counts)[stays]


class MiniBatchKMeans:
    """Words learned from batches of patches.

    To learn with several processes: seed one (`update` until `words` is not `None`) and give its `state_dict` to all.
    Then sum the `statistics` of each batch over the processes, and `merge` the sum in every one. When `merge` asks for
    it, one process calls `restart_rare` with the patches of all, and gives its `state_dict` to the others.

    Args:
        size: how many words to learn.
        values: values of a patch, channels · patch height · patch width.
        seed: of the random choices; the same seed and patches give the same words, bit for bit, on one machine.
        device: where the words are, and where `update` takes patches to.

    Example:
        >>> kmeans = MiniBatchKMeans(size=2, values=1)
        >>> kmeans.update(torch.tensor([[0.0], [0.2], [0.8], [1.0]]))
        >>> words, counts = kmeans.finish()
        >>> words.sort(dim=0).values, counts
        (tensor([[0.1000],
                [0.9000]]), tensor([2, 2]))
    """

    def __init__(self, size: int, values: int, *, seed: int = 0, device: torch.device | str | None = None) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; expected at least one word.")
        self.size = size
        self.values = values
        self.device = torch.device(device or "cpu")
        self.words: torch.Tensor | None = None
        """(size, values) float32; `None` until the buffer is full."""
        self.weights = torch.zeros(size, device=self.device, dtype=torch.float32)
        """(size,): faded number of patches behind each word; `words · weights` are the faded sums."""
        self.counts = torch.zeros(size, dtype=torch.int64, device=self.device)
        """(size,): patches assigned to each word when they were seen."""
        self.seen = 0
        self.inertia = 0.0
        """Mean squared distance of a patch to its nearest word when the patch came; later batches weigh a little more.
        It is measured before the words learn from a batch, except for the patches that seed them."""
        self._buffer: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, patches: torch.Tensor) -> None:
        """Learns from `patches`, as `checked` takes them, or keeps them until there are enough to seed the words."""
        patches = self.checked(patches)
        if self.words is None:
            self._buffer.append(patches)
            if sum(map(len, self._buffer)) >= max(BUFFERED * self.size, BUFFERED_AT_LEAST):
                self._seed_words()
            return
        if self.merge(statistics(patches, self.words)):
            self.restart_rare(patches)

    def checked(self, patches: torch.Tensor) -> torch.Tensor:
        """`patches` (patches, values) in float32, on the device of the words.

        Raises:
            ValueError: the shape is another, or a value is not finite.
        """
        if patches.ndim != 2 or patches.shape[1] != self.values:
            raise ValueError(f"patches have shape {tuple(patches.shape)}; expected (patches, {self.values}).")
        patches = patches.to(self.device, torch.float32)
        if not patches.isfinite().all():
            raise ValueError("patches hold values that are not finite; leave out the images that they come from.")
        return patches

    def merge(self, batch: Statistics) -> bool:
        """Moves the words by the statistics of a batch, to which other processes may have added theirs.

        Returns:
            Whether it is time for `restart_rare`: the stream has doubled, which leaves time to learn, and to settle.
        """
        assert self.words is not None, "the words are not seeded"
        before, patches = self.seen, int(batch.counts.sum())
        if not patches:
            return False
        fade = self.seen / (self.seen + patches)
        self.weights = self.weights * fade + batch.counts
        step = batch.sums - batch.counts.unsqueeze(1) * self.words
        self.words = self.words + step / self.weights.clamp_min(1e-12).unsqueeze(1)
        self.counts = self.counts + batch.counts
        share = patches / (self.seen * fade + patches)
        self.inertia += share * (float(batch.inertia) / patches - self.inertia)
        self.seen += patches
        return before.bit_length() < self.seen.bit_length()

    def restart_rare(self, patches: torch.Tensor) -> None:
        """Replaces words that hardly any patch is nearest to by random ones of `patches` that no word stands for."""
        assert self.words is not None
        floor = RARE * float(self.weights[self.weights > 0].median())
        rare = (self.weights < floor).nonzero().squeeze(1)
        nearest, _ = closest_words(patches, self.words)
        # Exact, unlike the expansion: copies of one patch must not become two words.
        distances = (patches - self.words[nearest]).square().mean(dim=1)
        unlike = (distances > SAME).nonzero().squeeze(1)
        number = min(len(rare), len(unlike))
        if not number:
            return
        rare = rare[self.weights[rare].argsort(stable=True)[:number]]
        chosen = patches[unlike[self._choose(len(unlike), number)]]
        first = _is_first(chosen)
        rare, chosen = rare[first], chosen[first]
        self.words[rare] = chosen
        self.weights[rare] = floor
        self.counts[rare] = 1

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The words and how many patches were assigned to each, most frequent first. Learning may go on afterwards.

        Returns:
            (words, values) float32 and (words,) int64, on the CPU; fewer than `size` if fewer patches are distinct.

        Raises:
            ValueError: fewer patches were seen than words are wanted.
        """
        if self.words is None:
            self._seed_words()
        assert self.words is not None
        order = self.counts.argsort(descending=True, stable=True)[: int((self.counts > 0).sum())]
        # Several words that began as copies of one patch may have patches, as rounding decides which is nearest.
        words, counts = _without_copies(self.words[order].cpu(), self.counts[order].cpu())
        order = counts.argsort(descending=True, stable=True)
        return words[order], counts[order]

    def state_dict(self) -> dict[str, Any]:
        """The state, in tensors and plain numbers, from which `load_state_dict` goes on as if never interrupted."""
        none = torch.zeros(0, self.values, device=self.device, dtype=torch.float32)
        words = none if self.words is None else self.words
        return {
            "words": words,
            "weights": self.weights,
            "counts": self.counts,
            "buffer": torch.cat((none, *self._buffer)),
            "generator": self._generator.get_state(),
            "seen": self.seen,
            "inertia": self.inertia,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned for as many words and values; refuses any other state."""
        shape = (len(state["weights"]), state["words"].shape[1])
        if shape != (self.size, self.values):
            raise ValueError(
                f"the state is of {shape[0]} words of {shape[1]} values; expected {self.size} of {self.values}."
            )
        self.words = state["words"].to(self.device) if len(state["words"]) else None
        self.weights = state["weights"].to(self.device)
        self.counts = state["counts"].to(self.device)
        self._buffer = [state["buffer"].to(self.device)]
        self._generator.set_state(state["generator"].cpu())
        self.seen = int(state["seen"])
        self.inertia = float(state["inertia"])

    def _seed_words(self) -> None:
        """Makes words of the buffer by Lloyd's algorithm, from random patches."""
        held = sum(map(len, self._buffer))
        if held < self.size:
            raise ValueError(f"{self.size} words were asked for, but there are only {held} patches to learn from.")
        patches = torch.cat(self._buffer)
        self._buffer = []
        self.words = patches[self._choose(held, self.size)]
        for remaining in reversed(range(ROUNDS)):
            batch = statistics(patches, self.words)
            counts = batch.counts.unsqueeze(1)
            self.words = torch.where(counts > 0, batch.sums / counts, self.words)
            self.counts, self.weights = batch.counts, batch.counts.float()
            # Words that start again need some rounds to settle.
            if remaining > 2:
                self.restart_rare(patches)
        self.seen = held
        self.inertia = float(batch.inertia) / held

    def _choose(self, of: int, number: int) -> torch.Tensor:
        """`number` distinct indices below `of`, drawn on the CPU: the same on every device."""
        return torch.randperm(of, generator=self._generator, device="cpu")[:number].to(self.device)
