"""Measures calls in seconds and operations."""

from __future__ import annotations

import contextlib
import ctypes
import math
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

Made = TypeVar("Made")
FEWEST_TURNS = 5
"""The fewest turns that are timed, however long they take."""


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def return_memory() -> None:
    """Has the C library give free memory back to the system, if it can (glibc).

    Tensors of changing sizes leave gaps in its memory, so that a process with batches of many lengths would grow.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: on Windows
        ctypes.CDLL(None).malloc_trim(0)


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of one call."""
    # The counter sees the matrix products of this attention, but not those of fused kernels on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
        run()
    return operations.get_total_flops()


def stopwatch(run: Callable[[], Made], device: torch.device) -> tuple[Made, float]:
    """The result of one call, and its seconds."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return result, time.perf_counter() - start


def time_in_turn(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    turns: int,
    *,
    warm_up: int = 1,
    fewest: int = FEWEST_TURNS,
    seconds: float = math.inf,
    label: str | None = None,
) -> list[list[float]]:
    """Seconds of each call, for each run. Runs take turns, so that a machine that slows down slows them all.

    Args:
        turns: how often each is called, after `warm_up` calls that do not count.
        fewest: so many turns are made however long they take (but no more than `turns`).
        seconds: after the `fewest`, no turn starts later than this.
        label: of a progress bar; `None` for none.
    """
    taken: list[list[float]] = [[] for _ in runs]
    begun = time.perf_counter()
    with tqdm(range(-warm_up, turns), desc=label, leave=False, disable=label is None) as bar:
        for turn in bar:
            if turn == 0:
                begun = time.perf_counter()
            if turn >= fewest and time.perf_counter() - begun > seconds:
                break
            for run, own in zip(runs, taken, strict=True):
                spent = stopwatch(run, device)[1]
                if turn >= 0:
                    own.append(spent)
    return taken
