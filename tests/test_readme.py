"""The README says what the code does, and what it prints to be copied runs."""

from __future__ import annotations

import argparse
import ast
import asyncio
import dataclasses
import importlib
import os
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import vwt_hf
from loopback_hub import LoopbackHub
from tiny import TEXT, TINY, sample_pixel_values, tiny_model
from vwt_hf.cli import main
from vwt_hf.families import FAMILIES, HOLDERS, UNFIT
from vwt_hf.methods import METHODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands(start: str) -> list[str]:
    """The commands in the README that start so, each on one line and without comments."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0] for line in lines if line.startswith(start)]


@pytest.fixture
def tiny_hub(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A Hub with tiny models under the names that the README uses, and the photographs that it names where one is."""
    vit = TINY | {"num_hidden_layers": 1, "image_size": 224, "patch_size": 16}
    text = TEXT | {"eos_token_id": 98, "bos_token_id": 97}
    processor = transformers.ViTImageProcessorPil(size={"height": 224, "width": 224})
    models = {
        "google/vit-base-patch16-224": transformers.ViTForImageClassification(transformers.ViTConfig(**vit)),
        "facebook/dinov2-base": transformers.Dinov2Model(transformers.Dinov2Config(**vit | {"patch_size": 14})),
        "openai/clip-vit-base-patch16": transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vit | {"projection_dim": 16}, text_config=text, projection_dim=16)
        ),
    }
    for name, model in models.items():
        assert name in README
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        hub.put(name, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    where = tmp_path / "where a reader is"
    (where / "photographs").mkdir(parents=True)
    monkeypatch.chdir(where)
    values = np.random.default_rng(0)
    for name in ("cat.jpg", *(f"photographs/{index}.png" for index in range(50))):
        Image.fromarray(values.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(name)
    return hub


def test_every_supported_family_and_every_field_of_every_method_is_in_a_table():
    rows = [line for line in README.splitlines() if line.startswith("|")]
    for family in vwt_hf.supported():
        assert any(re.search(rf"\b{re.escape(family)}\b", row.split("|")[1]) for row in rows), family
    for method in METHODS.values():
        for field in dataclasses.fields(method):
            if field.compare:  # else it is no field of a user's
                assert any(f"`{field.name}`" in row.split("|")[1] for row in rows), field.name


def test_a_default_in_a_table_is_the_codes():
    tables = re.findall(r"^\| field of .*\n\|---.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    titles = re.findall(r"^\| field of (.*?) \|", README, re.MULTILINE)
    found = 0
    for title, table in zip(titles, tables, strict=True):
        named = re.search(r'method="(\w+)"', title)
        setting = vwt_hf.VWTConfig(named.group(1) if named else "intra")
        for name, said in re.findall(r"^\| `([a-z_]+)` \| (`[^`]+`|[\d.]+) \|", table, re.MULTILINE):
            assert repr(getattr(setting, name)).replace("'", '"') == said.strip("`"), (title, name)
            found += 1
    assert found > 12


def family_table() -> str:
    """The families as a Markdown table."""
    lines = ["| family | positions | prefix tokens | its heads read |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.positions} | {row.prefix} | {row.pools} |" for row in FAMILIES]
    for name in HOLDERS.values():
        lines.append(f"| {name} | its CLIP or SigLIP tower's | the tower's | a language model: every patch |")
    lines += [f"| {unfit.name} | cannot be compressed: it {unfit.reason} | | |" for unfit in UNFIT]
    return "\n".join(lines)


def test_the_table_of_families_is_the_packages():
    shown = re.search(r"<!-- families -->\n(.*?)\n<!-- /families -->", README, re.DOTALL)
    assert shown and shown.group(1) == family_table()


def test_each_command_is_one_line_whose_scripts_can_be_run():
    for name in ("demo", "tests"):
        command = re.search(rf"<!-- {name} -->\n```bash\n(.*)\n```", README)
        assert command, f"no one-line command below <!-- {name} -->"
        assert os.access(ROOT / command.group(1).split()[0], os.X_OK)


def test_pictures_links_and_files_lead_somewhere():
    for document in DOCUMENTS:
        written = (ROOT / document).read_text(encoding="utf-8")
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings(written)}
        assert document != "README.md" or ".png)" in written
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", written):
            assert target.startswith("https://") or (ROOT / target).exists(), (document, target)
            assert target or anchor in anchors, (document, anchor)
        for target in re.findall(r"`((?:src|tests|scripts|model_cards)/[\w/.]+)`", written):
            assert (ROOT / target).exists(), (document, target)


def headings(written: str) -> list[str]:
    return re.findall(r"^#+ (.*)", written, re.MULTILINE)


def test_the_python_in_it_runs(tiny_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch):
    # From the top, transformers 5.17 offers it only with torchvision, as the README says. The module is looked up,
    # as transformers puts another in its own place when its image processors are imported.
    monkeypatch.setattr(sys.modules["transformers"], "AutoImageProcessor", AutoImageProcessor)
    first, using, calibrating, learning, tokenising, batching, embedding, _ = blocks("python")
    shown: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), shown)
    assert shown["classify"].model.config.vwt["method"] == "gradual"
    loading, in_memory = using.split("# A model in memory")
    use: dict[str, Any] = {}
    exec(compile(loading, "README.md", "exec"), use)
    assert use["model"].config.vwt["num_patches"] == 98
    exec(compile(f"# {in_memory}", "README.md", "exec"), use)
    assert use["model"].config.vwt is None and use["count"].mean == 197
    for how, keeps in (({}, 0.5), ({"vwt": False}, None)):
        setting = transformers.AutoModel.from_pretrained("short", **how).config.vwt
        assert (setting and setting["keep_ratio"]) == keeps
    short: dict[str, Any] = {}
    exec(compile(calibrating, "README.md", "exec"), short)
    assert short["setting"].evidence["value"] >= 0.98 and short["model"].config.vwt == short["setting"].to_dict()
    assert b"unlabelled images | `50`" in tiny_hub.files("me/short")["README.md"]
    words: dict[str, Any] = {}
    exec(compile(learning, "README.md", "exec"), words)
    assert {"vocabulary.safetensors", "vocabulary.json"} <= tiny_hub.files("me/my-words").keys()
    assert len(words["words"]) == 1000 and words["words"].patch_size == 16
    setting = words["model"].config.vwt
    assert setting["vocabulary"] == "me/my-words" and setting["threshold"] == 0.05
    tokens: dict[str, Any] = {"images": [Image.effect_noise((300, 240), 90).convert("RGB")] * 2}
    exec(compile(tokenising, "README.md", "exec"), tokens)
    assert tokens["inputs"]["patch_words"].shape == (2, 196) and tokens["logits"].shape[0] == 2
    assert [picture.size for picture in tokens["pictures"]] == [(224, 224)] * 2
    images = datasets.Dataset.from_dict({"image": tokens["images"]}).cast_column("image", datasets.Image())
    loading = tokens | {"dataset": images, "vwt_hf": vwt_hf}
    exec(compile(batching, "README.md", "exec"), loading)
    (batch,) = loading["loader"]
    assert batch["patch_words"].shape == (2, 196)
    assert loading["lengths"] == [len(image.unique()) for image in batch["patch_words"]]
    (command,) = (command for command in commands("vwt-hf ") if " embed " in command)
    assert main(shlex.split(command)[1:]) == 0
    collection: dict[str, Any] = {}
    exec(compile(embedding, "README.md", "exec"), collection)
    assert collection["nearest"][0] == "0.png" and len(set(collection["nearest"])) == 5


def test_ray_serve_would_fill_batches_by_their_tokens(tiny_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch):
    """By what stands in for Ray, which the tests do not install: it calls a batch with what its requests asked."""
    batching: dict[str, Any] = {}

    def batch(**how: Any) -> Any:
        batching.update(how)
        return lambda method: method

    serve = types.SimpleNamespace(batch=batch, deployment=FakeDeployment, run=lambda made: made)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(serve=serve))
    monkeypatch.setattr(sys.modules["transformers"], "AutoImageProcessor", AutoImageProcessor)
    use: dict[str, Any] = {}
    exec(compile(blocks("python")[-1], "README.md", "exec"), use)
    served = use["Classifier"].made[0]
    noise = Image.effect_noise((300, 240), 90).convert("RGB")
    images = [served.processor(image, return_tensors="pt") for image in (noise, Image.new("RGB", (224, 224)))]
    counts = [use["tokens"]([image]) for image in images]
    assert batching["batch_size_fn"] is use["tokens"] and use["tokens"](images) == sum(counts)
    with vwt_hf.count_tokens(served.model) as count:
        logits = asyncio.run(served.logits(images))
    assert count.tokens == sum(counts) + 2 and counts[0] > counts[1]  # two CLS tokens beside them
    for image, found in zip(images, logits, strict=True):
        torch.testing.assert_close(found, served.model(**image).logits[0], atol=1e-5, rtol=1e-5)


class FakeDeployment:
    """What `serve.deployment` makes of a class."""

    def __init__(self, deployed: type) -> None:
        self.deployed = deployed

    def bind(self) -> FakeDeployment:
        self.made = [self.deployed()]
        return self


@pytest.mark.newest
def test_the_commands_of_vwt_hf_in_it_run(tiny_hub: LoopbackHub, capsys: pytest.CaptureFixture[str]):
    printed = commands("vwt-hf ")
    verbs = {"learn", "vocab", "show", "calibrate", "evaluate", "embed"}
    assert {shlex.split(command)[1] for command in printed} == verbs
    for command in printed:
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert "1,000 words of 16×16 pixels" in capsys.readouterr().out
    assert all(Path(name).exists() for name in ("vwt-show.png", "front.png", "short/config.json"))


def test_the_method_in_contributing_works(monkeypatch: pytest.MonkeyPatch):
    written = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    printed = re.search(r"<!-- method -->\n```python\n(.*?)^```", written, re.DOTALL | re.MULTILINE)
    assert printed
    module = types.ModuleType("vwt_hf.methods.every")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module)["__package__"] = "vwt_hf.methods"
    exec(compile(printed.group(1), "CONTRIBUTING.md", "exec"), vars(module))
    monkeypatch.setitem(METHODS, "every", module.EveryConfig)
    model = vwt_hf.compress(tiny_model("vit"), {"method": "every", "step": 3})
    assert model(sample_pixel_values())[0].shape[1] == 1 + 22  # of 64 patches
    assert vwt_hf.VWTConfig.parse(model.config.vwt) == vwt_hf.VWTConfig(method="every", step=3)
    with pytest.raises(ValueError, match="step is 0"):
        vwt_hf.VWTConfig(method="every", step=0)


def test_imports_run_downwards_in_the_list_of_files_in_contributing():
    package = ROOT / "src" / "vwt_hf"
    written = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", written.partition("Imports run downwards")[2], re.MULTILINE)[1:]
    listed = [name.removesuffix("/").removesuffix(".py") for row in rows for name in re.findall("`(.*?)`", row)]
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(listed) == sorted(there - {"__init__", "__pycache__"})
    upwards = set()
    for file in package.rglob("*.py"):
        own, *_ = parts = file.relative_to(package).with_suffix("").parts
        for node in ast.walk(without_types(ast.parse(file.read_text(encoding="utf-8")))):
            if own == "__init__" or not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            path = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
            names = [path[0]] if path[0] else [name.name for name in node.names if name.name != "__version__"]
            upwards |= {(own, name) for name in names if listed.index(name) < listed.index(own)}
    # A setting is read by the method that it names, which is imported as late as that.
    assert upwards == {("config", "methods")}


def without_types(module: ast.Module) -> ast.Module:
    """A module without what is imported for type checkers alone."""
    body = [node for node in module.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))]
    return ast.Module(body, [])


def test_the_scripts_in_it_have_the_options_that_it_gives_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    printed = commands("python scripts/")
    assert len(printed) >= 4
    for command in printed:
        script, *given = shlex.split(command)[1:]
        with pytest.raises(Parsed):
            read_options(importlib.import_module(Path(script).stem), given, monkeypatch)


class Parsed(Exception):
    """A script has taken its options; what it would do with them is not done."""


def read_options(script: Any, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(self, args, namespace)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", ["script", *given])
        script.main()


def test_what_it_says_of_a_class_built_from_a_config_and_of_a_tower_of_a_saved_whole_is_so(tmp_path: Path):
    config = transformers.ViTConfig(**TINY, vwt={"keep_ratio": 0.5})
    images = torch.zeros(1, 3, 32, 32)
    assert transformers.ViTModel(config)(images)[0].shape[1] == 65
    assert transformers.AutoModel.from_config(config)(images)[0].shape[1] == 33
    whole = transformers.CLIPModel(transformers.CLIPConfig(vision_config=TINY, text_config=TEXT, projection_dim=16))
    for compressed, tokens in ((whole, 65), (whole.vision_model, 33)):
        vwt_hf.compress(compressed, {"keep_ratio": 0.5})
        whole.save_pretrained(tmp_path / str(tokens))
        tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / str(tokens))
        assert tower(images)[0].shape[1] == tokens
        vwt_hf.restore(whole)
