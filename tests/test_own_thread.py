"""Work in a thread of its own: as if it was done here, but for torch's threads (`test_compress.py` forks)."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch

from vwt_hf.own_thread import in_own_thread


def test_it_sees_the_context_and_returns():
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable")
    variable.set(3)
    value, thread = in_own_thread(lambda factor: (variable.get() * factor, threading.current_thread()), 5)
    assert value == 15 and thread is not threading.current_thread()
    thread.join()
    assert thread not in threading.enumerate()


def test_it_runs_on_the_same_gpu(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert in_own_thread(chosen.copy) == [3]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_it_raises(kind):
    def fail() -> None:
        raise kind("so")

    with pytest.raises(kind, match="so"):
        in_own_thread(fail)
