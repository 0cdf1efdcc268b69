"""The README says what the code does."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import transformers
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import vwt_hf
from tiny import tiny_model
from vwt_hf.families import family_table
from vwt_hf.methods import METHODS

ROOT = Path(__file__).parents[1]
WRITTEN = {"words", "saved_as"}
"""Fields that are not a user's to give."""
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_supported_family_and_every_field_of_a_setting_is_in_a_table():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    for family in vwt_hf.supported():
        assert any(re.search(rf"\b{re.escape(family)}\b", row.split("|")[1]) for row in rows), family
    fields = {field.name for method in METHODS.values() for field in dataclasses.fields(method)}
    for name in fields - WRITTEN:
        assert any(f"`{name}`" in row.split("|")[1] for row in rows), name


def test_the_table_of_families_is_the_packages():
    shown = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", README, re.DOTALL)
    assert shown and shown.group(1) == family_table()


def test_each_command_is_one_line_whose_scripts_can_be_run():
    for name in ("demo", "tests"):
        command = re.search(rf"<!-- {name} -->\n```bash\n(.*)\n```", README)
        assert command, f"no one-line command below <!-- {name} -->"
        assert os.access(ROOT / command.group(1).split()[0], os.X_OK)


def test_pictures_and_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert any(target.endswith(".png") for target in targets)
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in README.splitlines()}
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        assert anchor in headings, anchor


def test_the_python_in_it_does_what_its_comments_say(hub, tmp_path, monkeypatch):
    """On tiny models of the names that it loads, from a Hub of this machine."""
    processor = ViTImageProcessorPil(size={"height": 224, "width": 224})
    for name, of_name in (
        ("google/vit-base-patch16-224", "vit-classifier"),
        ("facebook/dinov2-base", "dinov2"),
        ("openai/clip-vit-base-patch16", "clip"),
    ):
        tiny_model(of_name, image_size=224, patch_size=16).save_pretrained(tmp_path / of_name)
        processor.save_pretrained(tmp_path / of_name)
        hub.put(name, {path.name: path.read_bytes() for path in (tmp_path / of_name).iterdir()})
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, 224, 224, 3), dtype=np.uint8)
    known = {"images": [Image.fromarray(values) for values in noise], "image_processor": processor}
    memory, words = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    loading, rest = memory.split("# A model in memory")
    exec(loading, known)
    assert known["model"].config.vwt["num_patches"] == 98 and known["classify"].model.config.vwt["keep_ratio"] == 0.5
    exec("# A model in memory" + rest, known)
    assert known["model"].config.vwt is None
    for how, keeps in (({}, 0.5), ({"vwt": False}, None)):
        loaded = transformers.AutoModel.from_pretrained("short", **how).config.vwt
        assert (loaded and loaded["keep_ratio"]) == keeps
    exec(words, known)
    assert known["model"].config.vwt["vocabulary"] == "me/my-words" and known["model"].config.vwt["threshold"] == 0.05
    assert len(known["words"].words) == 1000 and known["words"].patch_size == 16
