"""The README says what the code does."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import vwt_hf
from vwt_hf.families import family_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_supported_family_and_every_field_of_a_setting_is_in_a_table():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    for family in vwt_hf.supported():
        assert any(re.search(rf"\b{re.escape(family)}\b", row.split("|")[1]) for row in rows), family
    for field in dataclasses.fields(vwt_hf.VWTConfig):
        assert any(f"`{field.name}`" in row.split("|")[1] for row in rows), field.name


def test_the_table_of_families_is_the_packages():
    shown = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", README, re.DOTALL)
    assert shown and shown.group(1) == family_table()


def test_each_command_is_one_line_whose_scripts_can_be_run():
    for name in ("demo", "tests"):
        command = re.search(rf"<!-- {name} -->\n```bash\n(.*)\n```", README)
        assert command, f"no one-line command below <!-- {name} -->"
        assert os.access(ROOT / command.group(1).split()[0], os.X_OK)


def test_pictures_and_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_python_in_it_compiles():
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        compile(block, "README.md", "exec")
