"""What calls take, in seconds and in operations, and the device that they run on."""

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
"""Turns that are timed however long they take."""


def usable_device(name: str | None) -> torch.device:
    """The device called `name`, by default CUDA where there is one, else the CPU.

    Raises:
        ValueError: this torch cannot use it.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device is {name!r}, which torch {torch.__version__} cannot use here; expected cpu, cuda, cuda:1, ... "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device


def synchronize(device: torch.device) -> None:
    """Waits until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def return_memory() -> None:
    """Has the C library give back to the system what it keeps free, where it can be asked to (glibc).

    Tensors of changing sizes leave gaps in its memory, by which a process would grow that runs for long on batches of
    different lengths.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: on Windows
        ctypes.CDLL(None).malloc_trim(0)


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of one call."""
    # The counter sees the matrix products of this attention, and not what fused kernels do on a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
        run()
    return operations.get_total_flops()


def stopwatch(run: Callable[[], Made], device: torch.device) -> tuple[Made, float]:
    """What one call gives, and its seconds."""
    synchronize(device)
    start = time.perf_counter()
    made = run()
    synchronize(device)
    return made, time.perf_counter() - start


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
    """Seconds of each call, by run; runs take turns, so that a machine that slows down slows them all.

    Args:
        turns: how often each is called, after `warm_up` calls that do not count.
        fewest: turns that there are however long they take, if not fewer are wanted.
        seconds: no turn starts later than this, if there were the `fewest`.
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
