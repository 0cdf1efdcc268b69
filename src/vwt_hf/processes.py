"""Processes that do one job together, over accelerate: what is asked of all, and how an error in one ends all."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from .printable import difference

Made = TypeVar("Made")

RAISED_AGAIN = (FileExistsError, FileNotFoundError, OSError, TypeError, ValueError, ImportError)
"""What an error in another process is raised as; `RuntimeError` where it is of none of these kinds."""

PATIENCE = datetime.timedelta(days=30)
"""How long processes wait for the one that has most to do; one that dies ends the others by its launcher."""


KNOWN = "_vwt_hf_known"
"""Attribute of errors that all processes know of."""


class ProcessLost(ConnectionError):
    """Another process of the job has ended, or cannot be reached any more."""


def together() -> bool:
    """Whether this process is one of several that are joined, by accelerate or by torch."""
    return place()[1] > 1


def place() -> tuple[int, int]:
    """Number of this process, counted from 0, which is the main one, and how many there are together."""
    if not _are_joined():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _are_joined() -> bool:
    # Without asking `PartialState`, which decides on a device for the whole program.
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def join(device: torch.device | str | None) -> Any:
    """Joins the processes that a launcher has started, if there are several, so that accelerate knows of all.

    Each waits for the others for up to 30 days (`PATIENCE`), unless the program had joined them before.

    Args:
        device: what they are to work on, by default CUDA where there is one.

    Returns:
        accelerate's `PartialState`; `None` where there is one process.

    Raises:
        RuntimeError: accelerate was asked before there were several, and takes each for the only one.
    """
    number = place()[1] if _are_joined() else int(os.environ.get("WORLD_SIZE", 1))
    if number < 2:
        return None
    from accelerate import PartialState

    cpu = not torch.cuda.is_available() or str(device).startswith("cpu")
    if _are_joined():
        cpu = cpu and torch.distributed.get_backend() != "nccl"  # which moves nothing that is on a CPU
        _tell_environment(cpu)
    # Without `cpu` each process on a machine without GPUs takes itself for the only one.
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    if state.num_processes != number:
        raise RuntimeError(
            f"there are {number} processes, and accelerate's PartialState, made before, knows of "
            f"{state.num_processes}; join them before anything asks accelerate, and on CPUs by Accelerator(cpu=True)."
        )
    return state


def _tell_environment(cpu: bool) -> None:
    """Sets what accelerate takes from the environment and a launcher puts there, where there was none."""
    index, number = place()
    local = index if cpu else torch.cuda.current_device()  # so that accelerate leaves the device as it is
    for name, value in {"RANK": index, "WORLD_SIZE": number, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": number}.items():
        os.environ.setdefault(name, str(value))


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[None]:
    """For a command: as `join`, and an error that all know of is told by the main process alone.

    An error that no other process knows of is raised where it arose.

    Args:
        device: as for `join`.
    """
    state = join(device)
    if state is None:
        yield
        return
    try:
        yield
    except Exception as error:
        if place()[0] > 0 and _is_known(error):
            raise SystemExit(2) from None
        raise
    finally:
        state.destroy_process_group()


def everywhere(work: Callable[[], Made], tell: Callable[[Made], Any] = lambda made: None) -> tuple[Made, list[Any]]:
    """Runs `work` in each process; where it fails in one, all raise an error that says so.

    Every process has to call it, as often as the others.

    Args:
        work: what each does, without asking the others for anything.
        tell: what of it the others are told; it is pickled.

    Returns:
        What `work` gave in this process, and what all told, in the order of their numbers.
    """
    if not together():
        made = work()
        return made, [tell(made)]
    from accelerate.utils import gather_object

    own: list[Made] = []

    def told() -> Any:
        own.append(work())
        return tell(own[0])

    others = _exchanged(told, gather_object)
    return own[0], others


def _exchanged(work: Callable[[], Any], exchange: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """What `work` gave in the processes, as `exchange` hands it on; where it failed in one, all raise an error.

    An error of this process's own is not lost with another process.
    """
    told, failed = None, None
    try:
        told = work()
    except Exception as error:
        failed = error
    try:
        with _talking():
            outcomes = exchange([(told, failed and _described(failed))])
    except ProcessLost:
        if failed is None:
            raise
    else:
        _mark_known(failed)
    if failed is not None:
        raise failed
    for other, (_, description) in enumerate(outcomes):
        if description is not None:
            raise _again(other, *description)
    return [told for told, _ in outcomes]


def gathered(work: Callable[[], Made]) -> list[Made]:
    """What `work` gives in each process, in the order of their numbers; where it fails in one, all raise an error.

    Every process has to call it, as often as the others.

    Args:
        work: what each does, without asking the others for anything; what it gives is pickled.
    """
    return everywhere(work, lambda made: made)[1]


def in_main(work: Callable[[], Made]) -> Made:
    """What `work` gives in the main process, in all of them; where it fails, all raise an error that says so.

    Every process has to call it, as often as the others.

    Args:
        work: run by the main process alone; what it gives is pickled.
    """
    if not together():
        return work()
    from accelerate.utils import broadcast_object_list

    return _exchanged(work if place()[0] == 0 else lambda: None, broadcast_object_list)[0]


def require_same(settings: Sequence[dict[str, Any]]) -> None:
    """Raises `ValueError` where processes have different settings.

    Args:
        settings: those of each, in the order of their numbers.
    """
    first, *others = settings
    for number, own in enumerate(others, start=1):
        if own != first:
            raise ValueError(
                f"process {number} has other settings than process 0 ({difference(own, first)}); give all the same."
            )


def summed(values: Made) -> Made:
    """The sum over all processes of each of some tensors, on the device that it came from.

    Every process has to call it, as often as the others, and gets the same sums.

    Args:
        values: a tensor, or tuples, lists or dicts of tensors; of the same shapes in all processes.
    """
    if not together():
        return values
    from accelerate import PartialState
    from accelerate.utils import find_device, reduce, send_to_device

    device = find_device(values)
    with _talking():
        found = reduce(send_to_device(values, PartialState().device), reduction="sum")
    return send_to_device(found, device)


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Says what a failure means of torch's to reach the others."""
    try:
        yield
    except RuntimeError as error:
        index, number = place()
        raise ProcessLost(
            f"process {index} of {number} has lost another one, which ended or cannot be reached "
            f"({str(error).partition('. ')[0]})"
        ) from error


def _described(error: Exception) -> tuple[type[Exception], str]:
    """Kind and message: an error itself cannot always be pickled."""
    kind = next((kind for kind in RAISED_AGAIN if isinstance(error, kind)), None)
    return kind or RuntimeError, str(error) if kind and str(error) else f"{type(error).__name__}: {error}"


def _again(index: int, kind: type[Exception], message: str) -> Exception:
    """The error of process `index`, for another."""
    error = kind(f"process {index} of {place()[1]}: {message}")
    _mark_known(error)
    return error


def _mark_known(error: Exception | None) -> None:
    if error is not None:
        setattr(error, KNOWN, True)


def _is_known(error: BaseException | None) -> bool:
    """Whether all know of an error, or of what it was made from."""
    return error is not None and (hasattr(error, KNOWN) or _is_known(error.__cause__))
