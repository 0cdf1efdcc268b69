"""Temporary changes: of what all threads of a process share, such as how much a library logs, or of a context
variable."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

Value = TypeVar("Value")


@contextlib.contextmanager
def holding(variable: contextvars.ContextVar[Value], value: Value) -> Iterator[None]:
    """Has a context variable hold `value` meanwhile."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


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
