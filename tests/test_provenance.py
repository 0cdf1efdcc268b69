"""What tells the machine that a figure was measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from vwt_hf import provenance

INTEL = "processor : 0\nmodel name\t: Intel Xeon @ 2.1GHz\n\nprocessor : 1\nmodel name\t: Intel Xeon @ 2.1GHz\n"
CORE = "processor\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x{}\nCPU part\t: {}\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "system", "brand", "expected"),
    [
        (INTEL, "Linux", "", "Intel Xeon @ 2.1GHz"),
        (CORE.format(0, 3, "0xd0c") * 2, "Linux", "", "ARM 0x41 part 0xd0c variant 0x3"),
        (
            CORE.format(0, 0, "0xd4f") + CORE.format(1, 1, "0xd0c") + CORE.format(2, 0, "0xd4f"),
            "Linux",
            "",
            "ARM 0x41 part 0xd4f variant 0x0, ARM 0x41 part 0xd0c variant 0x1",
        ),
        (None, "Darwin", "Apple M3 Pro\n", "Apple M3 Pro"),
        (None, "Darwin", None, "arm64 of mine"),
        (None, "Windows", "", "Intel64 Family 6"),
        ("cpu : POWER9\n", "Linux", "", "arm64 of mine"),
    ],
)
def test_a_cpu_is_told_from_others_of_its_architecture(cpuinfo, system, brand, expected, tmp_path, monkeypatch):
    def run(command, **options):
        if brand is None:
            raise FileNotFoundError(command[0])
        assert command[1:] == ["-n", "machdep.cpu.brand_string"]
        return SimpleNamespace(stdout=brand)

    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(provenance, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(subprocess, "run", run)
    for name, value in {"system": system, "processor": "Intel64 Family 6", "machine": "arm64", "node": "mine"}.items():
        monkeypatch.setattr(platform, name, lambda value=value: value)
    assert provenance.cpu_name() == expected
