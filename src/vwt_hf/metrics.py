"""Metrics of the library `evaluate` that compare a compressed model with the plain one. None needs the network.

    >>> import evaluate
    >>> metrics = evaluate.combine([Accuracy(), Agreement(), WorstGroup()])
    >>> for groups in (["a"] * 5, ["b"] * 5):
    ...     metrics.add_batch(
    ...         predictions=[0, 1, 1, 1, 1], references=[1] * 5, plain_predictions=[1] * 5, groups=groups
    ...     )
    >>> metrics.compute()
    {'accuracy': 0.8, 'agreement': 0.8, 'worst_group': 0.8}

Metrics of the Hub, such as `evaluate.load("f1")`, combine with them: `predictions` and `references` are the numbers of
labels, as there. Columns that one metric does not take are left to the others. Several processes share a metric by
`num_process` and `process_id`, but not what `combine` made: its `compute` fails in all processes but the first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import torch

from .figures import accuracy, are_alike, divergences, share_alike, token_f1, worst_group

LABEL, TEXT = datasets.Value("int64"), datasets.Value("string")
GROUP = datasets.Value("large_string")  # `evaluate` takes no column of `string` that begins with `None`
LOGITS = datasets.Sequence(datasets.Value("float32"))
AT_ONCE = 1024
"""Images whose logits are made a tensor together."""


class _OfImages(evaluate.Metric):
    """A metric that takes its description from its class's docstring and attribute `columns`."""

    columns: ClassVar[dict[str, Any]]

    def _info(self) -> evaluate.MetricInfo:
        about = (type(self).__doc__ or "").strip()
        return evaluate.MetricInfo(
            description=about, citation="", inputs_description=about, features=datasets.Features(self.columns)
        )


class Accuracy(_OfImages):
    """Share of the images that are answered right, in [0, 1]. `evaluate.load("accuracy")`, which the Hub has, is equal.

    Args:
        predictions: the label that each image got.
        references: its right one.
    """

    columns: ClassVar[dict[str, Any]] = {"predictions": LABEL, "references": LABEL}

    def _compute(self, predictions: Sequence[int], references: Sequence[int], **_: Any) -> dict[str, float | None]:
        return {"accuracy": accuracy(are_alike(predictions, references))}


class Agreement(_OfImages):
    """Share of the images that get the plain model's answer, in [0, 1].

    Args:
        predictions: the label that each image got.
        plain_predictions: the label that it gets from the plain model.
    """

    columns: ClassVar[dict[str, Any]] = {"predictions": LABEL, "plain_predictions": LABEL}

    def _compute(self, predictions: Sequence[int], plain_predictions: Sequence[int], **_: Any) -> dict[str, float]:
        return {"agreement": share_alike(predictions, plain_predictions)}


class Divergence(_OfImages):
    """Mean KL divergence of the answers from the plain model's, in nats.

    Args:
        logits: of each image, one for each label.
        plain_logits: the plain model's.
    """

    columns: ClassVar[dict[str, Any]] = {"logits": LOGITS, "plain_logits": LOGITS}

    def _compute(self, logits: Sequence[Any], plain_logits: Sequence[Any], **_: Any) -> dict[str, float]:
        parts = []
        for start in range(0, len(logits), AT_ONCE):
            some = (one[start : start + AT_ONCE] for one in (logits, plain_logits))
            given, expected = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in some)
            parts.append(divergences(given, expected))
        return {"divergence": torch.cat(parts).mean().item()}


class WorstGroup(_OfImages):
    """The accuracy within the group that has the lowest, in [0, 1]; `None` if no group is large enough.

    Groups of fewer than 5 images are left out: one image more or less that is right would decide.

    Args:
        predictions: the label that each image got.
        references: its right one.
        groups: the name of its group; an image with `None` is left out.
    """

    columns: ClassVar[dict[str, Any]] = {"predictions": LABEL, "references": LABEL, "groups": GROUP}

    def _compute(
        self, predictions: Sequence[int], references: Sequence[int], groups: Sequence[str | None], **_: Any
    ) -> dict[str, float | None]:
        return {"worst_group": worst_group(are_alike(predictions, references), groups)}


class TokenF1(_OfImages):
    """How much the words of a text are those of the nearest of its references, in [0, 1]; the mean over all texts.

    SQuAD's F1: case, punctuation, English articles and the order of words do not count.

    Args:
        predictions: a text for each image.
        references: for each image a list of texts.
    """

    columns: ClassVar[dict[str, Any]] = {"predictions": TEXT, "references": datasets.Sequence(TEXT)}

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]], **_: Any) -> dict[str, float]:
        if without := [number for number, others in enumerate(references) if not others]:
            raise ValueError(f"text {without[0]} has no references; expected one at least for each. Leave it out.")
        scores = [token_f1(text, others) for text, others in zip(predictions, references, strict=True)]
        return {"token_f1": torch.tensor(scores, dtype=torch.float64, device="cpu").mean().item()}


def compute(metrics: Sequence[type[evaluate.Metric]], **columns: Sequence[Any]) -> dict[str, Any]:
    """The figures of metrics of this module for images whose columns are in memory. Nothing is left on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        combined = evaluate.combine([metric(keep_in_memory=True, cache_dir=folder) for metric in metrics])
        combined.add_batch(**columns)
        return combined.compute()
