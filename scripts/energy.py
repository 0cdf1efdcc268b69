"""Energy that a device has used, from its own counter: NVML on NVIDIA GPUs, RAPL on Intel and AMD CPUs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

POWERCAP = Path("/sys/class/powercap")


class NoMeter(Exception):
    """Energy cannot be measured here; the message says why."""


class Meter(Protocol):
    def measure(self, run: Callable[[], object]) -> float:
        """Joules that the device uses while `run` runs; what else runs on it counts, and so does its idling."""


class NvidiaMeter:
    """One GPU's energy counter, in mJ since its driver was loaded (`nvmlDeviceGetTotalEnergyConsumption`)."""

    def __init__(self, uuid: str) -> None:
        """`uuid` names the card whatever CUDA_VISIBLE_DEVICES calls it, with or without `GPU-` before it.

        Raises:
            NoMeter: there is no nvidia-ml-py, no driver, or the card has no counter.
        """
        try:
            import pynvml
        except ImportError as error:
            raise NoMeter("nvidia-ml-py is not installed; pip install nvidia-ml-py") from error
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            self._millijoules()
        except pynvml.NVMLError as error:
            raise NoMeter(f"NVML gives no energy counter for GPU {uuid}: {error}") from error

    def _millijoules(self) -> int:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)

    def measure(self, run: Callable[[], object]) -> float:
        start = self._millijoules()
        run()
        return (self._millijoules() - start) / 1e3


class RaplMeter:
    """The energy counters of all CPU packages, in µJ (Linux powercap; AMD's are there under Intel's name)."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        """Raises `NoMeter` if no package has a counter that may be read."""
        # The zones of a package's parts, of the whole platform and of its other interface (-mmio) count the same again.
        zones = sorted(folder.glob("intel-rapl:*"))
        self._zones = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        if not self._zones:
            raise NoMeter(f"no CPU package has an energy counter in {folder}")
        try:
            self._range = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
            self._microjoules()
        except OSError as error:
            raise NoMeter(f"{error.filename} is not readable; it needs root or chmod a+r") from error

    def _microjoules(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]

    def measure(self, run: Callable[[], object]) -> float:
        start = self._microjoules()
        run()
        used = 0
        for before, after, limit in zip(start, self._microjoules(), self._range, strict=True):
            used += after - before if after >= before else after + limit - before  # it starts again at its limit
        return used / 1e6


def find_meter(device: torch.device) -> Meter:
    """What measures the energy of `device`; raises `NoMeter` if nothing does."""
    if device.type == "cpu":
        return RaplMeter()
    if device.type == "cuda" and torch.version.hip is None:
        return NvidiaMeter(str(torch.cuda.get_device_properties(device).uuid))
    raise NoMeter(f"no energy counter is known for {device.type} devices; NVIDIA GPUs and Intel and AMD CPUs have one")
