"""The package's metrics are metrics of `evaluate`: they combine, take batches and need no network."""

from __future__ import annotations

import math
import threading

import evaluate
import numpy as np
import pytest
import torch

from vwt_hf import figures
from vwt_hf.metrics import Accuracy, Agreement, Divergence, TokenF1, WorstGroup, compute

pytestmark = pytest.mark.newest

GENERATOR = torch.Generator().manual_seed(0)
LOGITS, PLAIN = (torch.randn(40, 4, generator=GENERATOR) for _ in range(2))
COLUMNS = {
    "predictions": LOGITS.argmax(-1),
    "references": torch.randint(4, (40,), generator=GENERATOR),
    "plain_predictions": PLAIN.argmax(-1),
    "logits": LOGITS,
    "plain_logits": PLAIN,
    "groups": [("a", "b", "c")[index % 3] for index in range(40)],
}
ALL = [Accuracy, Agreement, Divergence, WorstGroup]


def test_combined_and_fed_by_batches_they_give_the_packages_figures(tmp_path):
    metrics = evaluate.combine([metric(cache_dir=tmp_path) for metric in ALL])
    for start in (0, 16, 32):
        metrics.add_batch(**{name: column[start : start + 16] for name, column in COLUMNS.items()})
    correct = (COLUMNS["predictions"] == COLUMNS["references"]).tolist()
    assert metrics.compute() == pytest.approx(
        {
            "accuracy": sum(correct) / 40,
            "agreement": figures.agreement(LOGITS, PLAIN),
            "divergence": figures.divergence(LOGITS, PLAIN),
            "worst_group": min(sum(correct[at::3]) / len(correct[at::3]) for at in range(3)),
        }
    )


def test_combined_they_take_all_columns_in_one_call():
    columns = {"predictions": [1, 2], "references": [1, 1], "plain_predictions": [1, 1]}
    assert evaluate.combine([Accuracy(), Agreement()]).compute(**columns) == {"accuracy": 0.5, "agreement": 0.5}


def test_images_without_a_group_are_in_no_group_that_is_judged(tmp_path):
    given = {"predictions": [1] * 10, "references": [1] * 5 + [0] * 5, "groups": ["a"] * 5 + [None] * 5}
    for each in (given, {name: column[::-1] for name, column in given.items()}):
        assert compute([WorstGroup], **each) == {"worst_group": 1.0}
        assert WorstGroup(cache_dir=str(tmp_path)).compute(**each) == {"worst_group": 1.0}
    assert compute([WorstGroup], **given | {"groups": [None] * 10}) == {"worst_group": None}


def test_accuracy_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn to compare with")
    given = {name: COLUMNS[name] for name in ("predictions", "references")}
    assert compute([Accuracy], **given)["accuracy"] == metrics.accuracy_score(given["references"], given["predictions"])


def test_two_processes_share_a_metric(tmp_path):
    """By threads, of which each has the metric of one process."""
    found = {}

    def take(process: int) -> None:
        metric = Agreement(cache_dir=tmp_path, num_process=2, process_id=process, experiment_id="shared", timeout=30)
        names = ("predictions", "plain_predictions")
        metric.add_batch(**{name: COLUMNS[name][process * 25 : process * 25 + 25] for name in names})
        found[process] = metric.compute()

    threads = [threading.Thread(target=take, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: {"agreement": pytest.approx(figures.agreement(LOGITS, PLAIN))}, 1: None}


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/proc/no-folder-can-be-made-here")
    assert compute([Accuracy], predictions=[1, 2], references=[1, 1]) == {"accuracy": 0.5}
    assert not list(tmp_path.iterdir())


def test_the_f1_of_texts_is_that_worked_out_by_hand():
    texts = ["A dog, running!", "two cats", "", "red red car"]
    references = [["the running dog"], ["a cat", "three big cats"], [""], ["red car"]]
    # Of two and three words one is the same: 2/5. Of three and two words two are: 4/5.
    assert compute([TokenF1], predictions=texts, references=references)["token_f1"] == pytest.approx(
        np.mean([1, 2 / 5, 1, 4 / 5])
    )
    # Boy and girl differ in a vowel sign, which Unicode does not call a letter; its full stop is punctuation.
    assert (figures.token_f1("लड़का।", ["लड़की"]), figures.token_f1("लड़का।", ["लड़का"])) == (0, 1)
    for same, as_that in (("5€ 30°", "5 30"), ("cat 🐱", "cat"), ("\u200fשלום", "שלום"), ("soft\u00adly", "softly")):
        assert figures.token_f1(same, [as_that]) == 1
    assert figures.token_f1("dog", [""]) == 0 and not math.isnan(figures.token_f1("", ["dog"]))


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="text 1 has no references"):
        compute([TokenF1], predictions=["a", "b"], references=[["a"], []])
    with pytest.raises(ValueError, match="Mismatch in the number of"):
        compute([Accuracy], predictions=[1, 2], references=[1])
    with pytest.raises(KeyError, match="groups"):
        compute([WorstGroup], predictions=[1], references=[1])
