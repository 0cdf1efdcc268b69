"""Runs take turns, and what they take is counted."""

from __future__ import annotations

import torch

from vwt_hf import timing
from vwt_hf.timing import count_flops, time_in_turn

CPU = torch.device("cpu")


def test_operations_of_a_product_are_two_for_each_pair_of_factors():
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    assert count_flops(lambda: left @ right) == 2 * 3 * 4 * 5


def test_a_stopwatch_gives_what_was_made_and_its_seconds(monkeypatch):
    clock = iter([5.0, 7.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.stopwatch(lambda: "made", CPU) == ("made", 2.5)


def test_every_turn_runs_every_model_and_only_turns_after_the_warm_up_count():
    order = []
    runs = [lambda: order.append("plain"), lambda: order.append("short")]
    seconds = time_in_turn(runs, CPU, 3, warm_up=2)
    assert [len(own) for own in seconds] == [3, 3]
    assert order == ["plain", "short"] * (2 + 3)
    out_of_time = time_in_turn(runs, CPU, 50, seconds=0)
    assert [len(own) for own in out_of_time] == [timing.FEWEST_TURNS] * 2
