"""Work in a thread of its own, with which the threads end that torch starts for it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_own_thread(function: Callable[..., Result], *args: object) -> Result:
    """Calls `function(*args)` in a thread of its own; returns what it returns, or raises what it raises.

    Torch starts threads for each thread that computes. A process that is forked from such a thread lacks them, and
    waits for them forever in its first forward. So a program that loads a model and then forks its workers, as gunicorn
    does with `--preload`, must not have computed by itself until then.
    """
    context, done = contextvars.copy_context(), Future[Result]()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # of this thread alone

    def run() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            done.set_result(context.run(function, *args))
        except BaseException as error:
            done.set_exception(error)

    # A daemon, so that Ctrl-C need not wait for it.
    threading.Thread(target=run, name="vwt_hf", daemon=True).start()
    return done.result()
