"""Temporary changes of what all threads of a process share, such as how much a library logs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class SharedChange:
    """A change that holds while any thread is within it; the last one to leave undoes it.

    If each thread put back what it found, threads that overlap would leave the change for good.

    Args:
        change: makes the change and returns what undoes it.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._within = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._within == 0:
                self._undo = self._change()
            self._within += 1
        try:
            yield
        finally:
            with self._lock:
                self._within -= 1
                if self._within == 0:
                    self._undo()


def _use_one_thread() -> Callable[[], None]:
    import torch  # not before: `vwt-hf --help` does without

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(before)


one_thread = SharedChange(_use_one_thread)
"""Within it torch starts no threads. A forked process lacks those of its parent, and torch would wait for them forever:
in the fork itself, or in one that is made later of a process that only loaded a model."""
