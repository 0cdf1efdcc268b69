"""Several processes that do one job together, by accelerate: they share results, and all raise the errors of one.

Every process has to call `everywhere`, `gathered`, `in_main` and `summed` as often as the others. The `work` that these
do may not communicate with other processes, and what it hands on is pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from .printable import difference

Made = TypeVar("Made")

RAISED_AGAIN = (FileExistsError, FileNotFoundError, OSError, TypeError, ValueError, ImportError)
"""Kinds of errors that the other processes raise, too; they raise any other error as `RuntimeError`."""

PATIENCE = datetime.timedelta(days=30)
"""How long processes wait for each other. If one dies, its launcher ends the others."""

_CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says how many microseconds of the cores' time the processes of a container may use of a period: in
`cpu.max`, or, where the first version of control groups is used, in two files of `cpu`."""

KNOWN = "_vwt_hf_known"
"""Attribute of errors that all processes have raised."""


class ProcessLost(ConnectionError):
    """Another process of the job has ended or cannot be reached."""


def together() -> bool:
    """Whether this process is one of several that accelerate or torch has joined."""
    return place()[1] > 1


def place() -> tuple[int, int]:
    """Number of this process, 0 for the main one, and the number of all processes."""
    if not _are_joined():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _are_joined() -> bool:
    # Without asking `PartialState`, which decides on a device for the whole program.
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def join(device: torch.device | str | None) -> Any:
    """Joins the processes that a launcher has started, if there are several, so that accelerate knows of all.

    Each then waits for the others for up to 30 days (`PATIENCE`), unless the program had joined them before.

    Args:
        device: what they are to work on; by default CUDA, if there is one.

    Returns:
        accelerate's `PartialState`, or `None` for a single process.

    Raises:
        RuntimeError: accelerate was used before there were several, and takes each process for the only one.
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
    """Sets the environment variables from which accelerate reads what a launcher would set."""
    index, number = place()
    local = index if cpu else torch.cuda.current_device()  # so that accelerate leaves the device as it is
    for name, value in {"RANK": index, "WORLD_SIZE": number, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": number}.items():
        os.environ.setdefault(name, str(value))


def usable_device(name: torch.device | str | None) -> torch.device:
    """The device called `name`; by default CUDA if there is one, else the CPU.

    Raises:
        ValueError: this torch cannot use it.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"device is {name!r}, which torch {torch.__version__} cannot use here; expected cpu, cuda, cuda:1, ... "
            f"({str(error).splitlines()[0]})"
        ) from error
    return device


def usable_cores() -> int:
    """How many cores this process may use: a container, a job of a cluster or taskset may leave it a few of all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # the container's time on all of them, as by Kubernetes or `docker --cpus`
        if (_CGROUP / "cpu.max").exists():
            told = (_CGROUP / "cpu.max").read_text().split()
        else:
            told = [(_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
        quota, period = map(int, told)
    except (OSError, ValueError):  # there are no such limits, or none is set ("max")
        return cores
    return min(cores, max(1, quota // period)) if quota > 0 and period > 0 else cores  # -1: none is set


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[None]:
    """As `join`, for a command: the main process alone prints an error that all processes have.

    An error that the others do not have is raised where it arose.
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
    """Runs `work` in each process. If it fails in one, all raise an error that says so.

    Returns:
        The result of `work` in this process; and what `tell` makes of the result in each process, in their order.
    """
    if not together():
        made = work()
        return made, [tell(made)]
    from accelerate.utils import gather_object

    results: list[Made] = []

    def told() -> Any:
        results.append(work())
        return tell(results[0])

    others = _exchanged(told, gather_object)
    return results[0], others


def _exchanged(work: Callable[[], Any], exchange: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """The results of `work`, handed on by `exchange`. If it failed in one process, all raise an error.

    If another process is lost, an error of this process's own is raised all the same.
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
        if failed is not None:
            setattr(failed, KNOWN, True)
    if failed is not None:
        raise failed
    for index, (_, description) in enumerate(outcomes):
        if description is not None:
            kind, message = description
            theirs = kind(f"process {index} of {place()[1]}: {message}")
            setattr(theirs, KNOWN, True)
            raise theirs
    return [told for told, _ in outcomes]


def gathered(work: Callable[[], Made]) -> list[Made]:
    """The results of `work` in all processes, in their order. If it fails in one, all raise an error that says so."""
    return everywhere(work, lambda made: made)[1]


def in_main(work: Callable[[], Made]) -> Made:
    """Runs `work` in the main process and gives its result to all. If it fails, all raise an error that says so."""
    if not together():
        return work()
    from accelerate.utils import broadcast_object_list

    return _exchanged(work if place()[0] == 0 else lambda: None, broadcast_object_list)[0]


def require_same(settings: Sequence[dict[str, Any]]) -> None:
    """Raises `ValueError` if processes have different settings, given in the order of their numbers."""
    first, *others = settings
    for number, own in enumerate(others, start=1):
        if own != first:
            raise ValueError(
                f"process {number} has other settings than process 0 ({difference(own, first)}); give all the same."
            )


def summed(values: Made) -> Made:
    """The sums over all processes of a tensor, or a tuple, list or dict of some, of equal shapes, on their device."""
    if not together():
        return values
    from accelerate import PartialState
    from accelerate.utils import find_device, reduce, send_to_device

    device = find_device(values)
    with _talking():
        total = reduce(send_to_device(values, PartialState().device), reduction="sum")
    return send_to_device(total, device)


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Raises `ProcessLost` if torch cannot reach the other processes."""
    try:
        yield
    except RuntimeError as error:
        index, number = place()
        raise ProcessLost(
            f"process {index} of {number} has lost another one, which ended or cannot be reached "
            f"({str(error).partition('. ')[0]})"
        ) from error


def _described(error: Exception) -> tuple[type[Exception], str]:
    """Kind and message of an error, which itself cannot always be pickled."""
    kind = next((kind for kind in RAISED_AGAIN if isinstance(error, kind)), None)
    return kind or RuntimeError, str(error) if kind and str(error) else f"{type(error).__name__}: {error}"


def _is_known(error: BaseException | None) -> bool:
    """Whether all processes raise this error, or the one that caused it."""
    return error is not None and (hasattr(error, KNOWN) or _is_known(error.__cause__))
