"""Energy comes from the device's own counter, or there is a reason why not."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pynvml
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from energy import NoMeter, NvidiaMeter, RaplMeter, find_meter

pytestmark = pytest.mark.newest


def zone(folder: Path, name: str, domain: str, microjoules: int) -> Path:
    path = folder / name
    path.mkdir()
    (path / "name").write_text(f"{domain}\n")
    (path / "max_energy_range_uj").write_text("1000000\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_all_packages_count_once_and_their_parts_do_not(tmp_path):
    zones = [
        zone(tmp_path, "intel-rapl:0", "package-0", 100),
        zone(tmp_path, "intel-rapl:0:0", "core", 100),
        zone(tmp_path, "intel-rapl:1", "package-1", 200),
        zone(tmp_path, "intel-rapl:2", "psys", 300),
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 100),
    ]

    def run() -> None:
        for path, now in zip(zones, (400_100, 300_100, 250_200, 900_300, 400_100), strict=True):
            (path / "energy_uj").write_text(str(now))

    assert RaplMeter(tmp_path).measure(run) == pytest.approx(0.65)


def test_a_counter_that_starts_again_at_its_limit_loses_nothing(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    used = RaplMeter(tmp_path).measure(lambda: (package / "energy_uj").write_text("150000"))
    assert used == pytest.approx(0.25)


def test_a_machine_without_counters_says_where_they_were_looked_for(tmp_path):
    with pytest.raises(NoMeter, match=f"no CPU package .*{tmp_path}"):
        RaplMeter(tmp_path)


def test_a_counter_that_may_not_be_read_is_named(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    (package / "energy_uj").unlink()
    with pytest.raises(NoMeter, match=r"intel-rapl:0/energy_uj is not readable"):
        RaplMeter(tmp_path)


class Driver(types.ModuleType):
    """What NVML's bindings offer, over one card whose counter stands at 5 J, then at 12.5 J."""

    NVMLError = pynvml.NVMLError

    def __init__(self, fails: bool = False) -> None:
        super().__init__("pynvml")
        self.asked, self.fails = [], fails
        self.counter = iter((5_000, 5_000, 12_500))

    def nvmlInit(self) -> None:
        if self.fails:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return "card"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "card"
        return next(self.counter)


@pytest.mark.parametrize("uuid", ["1a2b-3c", "GPU-1a2b-3c"])
def test_a_card_is_found_by_its_uuid_and_its_millijoules_become_joules(monkeypatch, uuid):
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert NvidiaMeter(uuid).measure(lambda: None) == 7.5
    assert driver.asked == ["GPU-1a2b-3c"]


def test_a_machine_without_a_driver_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Driver(fails=True))
    with pytest.raises(NoMeter, match="no energy counter for GPU 1a2b: NVML Shared Library Not Found"):
        NvidiaMeter("1a2b")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NoMeter, match="pip install nvidia-ml-py"):
        NvidiaMeter("1a2b")


def test_the_functions_used_are_those_of_the_package():
    for name in vars(Driver):
        assert not name.startswith("nvml") or callable(getattr(pynvml, name))


def test_a_device_of_another_kind_has_no_meter():
    with pytest.raises(NoMeter, match="no energy counter is known for meta devices"):
        find_meter(torch.device("meta"))
