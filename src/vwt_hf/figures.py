"""The definition of each figure that compares answers with the plain model's, or with the truth."""

from __future__ import annotations

import collections
import math
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

CONFIDENT = 1.959964
"""95 % of a normal distribution lie within so many standard deviations."""
RESAMPLES = 2000
"""Of a bootstrap."""
DRAWN_AT_ONCE = 2**22
"""Images of resamples that are in memory at once."""
FEWEST_OF_GROUP = 5
"""The fewest images of a group whose accuracy counts."""


def _of_answers(logits: torch.Tensor) -> torch.Tensor:
    """Logits, one for each answer, (images, answers). A single logit is that of yes, and the logit of no is 0."""
    return nn.functional.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def first_answers(logits: torch.Tensor) -> torch.Tensor:
    """The number of each image's label, from logits (images, labels). If there is one label: 1 for yes, 0 for no."""
    return _of_answers(logits).argmax(-1)


def agreement(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of the images with the same first answer as `expected`, in [0, 1]; both (images, labels)."""
    return share_alike(first_answers(logits).tolist(), first_answers(expected).tolist())


def share_alike(answers: Sequence[Any], expected: Sequence[Any]) -> float:
    """Share of the images whose answer is the one expected, in [0, 1]."""
    return torch.tensor(are_alike(answers, expected), dtype=torch.float64, device="cpu").mean().item()


def are_alike(answers: Sequence[Any], expected: Sequence[Any]) -> list[bool]:
    """Whether each image has the answer expected."""
    return [answer == other for answer, other in zip(answers, expected, strict=True)]


def divergence(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean KL divergence from `expected`, in nats; both (images, labels)."""
    return divergences(logits, expected).mean().item()


def divergences(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """KL divergence of each image's answer from the one expected, in nats, (images,); both (images, labels)."""
    wanted, given = (_of_answers(own).double().log_softmax(-1) for own in (expected, logits))
    return (wanted.exp() * (wanted - given)).sum(-1)


def cosines(features: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Cosine of each image's features with those expected, (images,); both (images, values)."""
    return torch.cosine_similarity(features.float(), expected.float(), dim=-1)


def are_right(answers: Sequence[int], truth: Sequence[Collection[int]]) -> list[bool | None]:
    """Whether each image's answer, a label's number, is among the right ones; `None` if these are not known."""
    return [answer in right if right else None for answer, right in zip(answers, truth, strict=True)]


def accuracy(correct: Sequence[bool | None]) -> float | None:
    """Share of right answers (`are_right`) among images of known label, in [0, 1]; `None` without such images."""
    known = [one for one in correct if one is not None]
    return sum(known) / len(known) if known else None


def worst_group(correct: Sequence[bool | None], groups: Sequence[str | None]) -> float | None:
    """The accuracy within the group that has the lowest, in [0, 1]; `None` if no group is large enough.

    A group with fewer than `FEWEST_OF_GROUP` images of known label is left out: a single image would decide.

    Args:
        correct: for each image, as `are_right` gives it.
        groups: the name of each image's group; `None` for an image in none, which is left out.
    """
    return min((sum(members) / len(members) for members in judged_groups(correct, groups)), default=None)


def judged_groups(correct: Sequence[bool | None], groups: Sequence[str | None]) -> list[list[bool]]:
    """Whether the images of known label are right, for each group that is large enough, in the order of their names."""
    members: dict[str, list[bool]] = {}
    for right, group in zip(correct, groups, strict=True):
        if right is not None and group is not None:
            members.setdefault(group, []).append(right)
    return [right for _, right in sorted(members.items()) if len(right) >= FEWEST_OF_GROUP]


def token_f1(text: str, references: Sequence[str]) -> float:
    """SQuAD's F1 between the words of a text and those of the nearest reference, in [0, 1].

    Case, punctuation, English articles and order do not count. Two texts without words are equal.
    """
    return max(_f1(_words(text), _words(reference)) for reference in references)


def _words(text: str) -> collections.Counter[str]:
    plain = "".join(filter(_counts, text.lower()))
    return collections.Counter(word for word in plain.split() if word not in ("a", "an", "the"))


def _counts(character: str) -> bool:
    """Whether a character is part of a word: no punctuation, symbol or format character. Vowel signs and marks are."""
    category = unicodedata.category(character)
    return category[0] not in "PS" and category != "Cf"


def _f1(words: collections.Counter[str], expected: collections.Counter[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    return 2 * (words & expected).total() / (words.total() + expected.total())


def ranks(similarity: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How many wrong candidates stand before the best right one of each query, (queries,) int64.

    A wrong candidate as similar as the right one counts as before it: a model to which all is alike finds nothing.

    Args:
        similarity: (queries, candidates).
        right: of the same shape, whether a candidate is right. Each query has at least one.
    """
    best = similarity.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best) & ~right).sum(dim=1)


def share_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval (Wilson's score interval) of a share in [0, 1] that was found among `count` images."""
    spread = CONFIDENT**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = CONFIDENT * math.sqrt((share * (1 - share) + spread / 4) / count) / (1 + spread)
    # Rounding may leave the share outside, or an end beyond 0 or 1.
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def mean_interval(values: torch.Tensor, seed: int) -> tuple[float, float]:
    """The 95 % interval (percentiles of a bootstrap) of the mean of values, (images,)."""
    values, count = values.double(), len(values)
    generator = torch.Generator().manual_seed(seed)
    # Some resamples at a time: those of many images would not fit into memory.
    at_once = max(1, DRAWN_AT_ONCE // count)
    means = []
    for start in range(0, RESAMPLES, at_once):
        some = min(at_once, RESAMPLES - start)
        drawn = torch.randint(count, (some, count), generator=generator, device="cpu")
        means.append(values[drawn].mean(dim=1))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device=values.device)
    low, high = torch.cat(means).quantile(ends).tolist()
    return low, high


def worst_group_interval(correct: Sequence[bool | None], groups: Sequence[str | None]) -> tuple[float, float]:
    """The 95 % interval of the lowest accuracy of any group, which `worst_group` estimates.

    Of many groups one does badly by chance, so the interval of that group alone, or a bootstrap's, would be too low.
    Both ends are the lowest among the ends of the groups' own intervals (Clopper and Pearson's), whose upper ends hold
    for all groups at once (Bonferroni).

    Raises:
        ValueError: no group is large enough.
    """
    members = judged_groups(correct, groups)
    if not members:
        raise ValueError(f"no group has {FEWEST_OF_GROUP} images of known label; expected one that has.")
    counts = {(sum(group), len(group)) for group in members}
    low = min(1 - _highest_share(size - right, size, 0.025) for right, size in counts)
    return low, min(_highest_share(right, size, 0.025 / len(members)) for right, size in counts)


def _highest_share(right: int, count: int, chance: float) -> float:
    """The upper end of Clopper and Pearson's interval: the largest true share of right answers in [0, 1] with which
    `right` of `count` images, or fewer, would still come out right with the given chance."""
    if right == count:
        return 1.0
    fewer = np.arange(right + 1)
    ways = np.array([math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) for k in fewer])
    low, high = right / count, 1.0
    for _ in range(50):  # halvings: to the last digits of a float
        middle = (low + high) / 2
        probability = np.exp(ways + fewer * math.log(middle) + (count - fewer) * math.log1p(-middle)).sum()
        low, high = (middle, high) if probability > chance else (low, middle)
    return high
