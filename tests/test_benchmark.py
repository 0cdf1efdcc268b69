"""The benchmark measures what it says, and a run that was cut off goes on. No test reads a time."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tiny import sample_pixel_values, tiny_model

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import benchmark
from vwt_hf import VisualVocabulary, VWTConfig, compress
from vwt_hf.image_source import find_images
from vwt_hf.timing import time_in_turn
from vwt_hf.weights import copy_sharing_weights

pytestmark = pytest.mark.newest

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    model = tiny_model("vit-classifier")
    model.config.id2label, model.config.label2id = {0: "cat", 1: "dog"}, {"cat": 0, "dog": 1}
    model.save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photographs(tmp_path) -> Path:
    values = np.random.default_rng(0)
    for index in range(5):
        path = tmp_path / "images" / ("cat" if index % 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def words(tmp_path) -> Path:
    words = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    VisualVocabulary(words).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_a_model_is_compiled_whole_or_by_its_layers_where_images_differ_in_their_tokens(words, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append("whole") or model)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, **_: compiled.append("layer"))
    vocabulary = {"method": "inter", "vocabulary": str(words), "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for setting, expected in (
        (None, ["whole"]),
        ({"keep_ratio": 0.5}, ["whole"]),
        ({"keep_ratio": 0.5, "dropped": "merge"}, ["whole"]),
        ({"method": "local", "num_patches": 30, "image_std": [0.5] * 3}, ["whole"]),
        ({"method": "local", "tolerance": 0.2, "image_std": [0.5] * 3}, ["layer", "layer"]),
        (vocabulary, ["layer", "layer"]),
    ):
        model = compress(tiny_model("vit-classifier"), setting)
        benchmark.forward_of(model, "default")(pixel_values=sample_pixel_values())
        assert compiled == expected, setting
        compiled.clear()


def test_a_whole_run_gives_all_that_it_promises_and_a_second_one_measures_nothing_again(
    checkpoint, photographs, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(benchmark, "find_meter", lambda device: SimpleNamespace(measure=lambda run: (run(), 3.0)[1]))
    monkeypatch.setattr(benchmark, "ENERGY_SECONDS", 0.0)  # one call each
    files = {name: tmp_path / f"results.{name}" for name in ("json", "md", "png")}
    arguments = f"--model {checkpoint} --images {photographs} --vocabulary {words} --batch-sizes 1 8 --peers all "
    arguments += f"--tome-r 2 8 --tps-keep 0.7 --turns 1 --json {files['json']} "
    arguments += f"--markdown {files['md']} --plot {files['png']} --groups {tmp_path / 'groups.json'}"
    groups = {path.relative_to(photographs).as_posix(): "all" for path in find_images([photographs])}
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    arguments = [*arguments.split(), "--vwt", '{"keep_ratio": 0.5}']
    benchmark.main(arguments)

    settings = ["keep ratio 0.5", f"inter, {words}, threshold 0.1"]
    merging = [f"{name}, r {r}" for name in ("ToMe", "ToMe decreasing", "PiToMe") for r in (2, 8)]
    merging += ["TPS, keep 0.7", "ToMe alike, r 2", "ToMe alike, r 8", "PPT, r 2", "PPT, r 8"]
    methods = ["uncompressed", *settings, "random, keep ratio 0.5", *merging, "int8", "bf16"]
    methods += [f"bf16 + {setting}" for setting in settings]
    found = json.loads(files["json"].read_text())
    assert [(row["batch"], row["method"]) for row in found["timing"]] == [(b, m) for b in (1, 8) for m in methods]
    assert [row["method"] for row in found["quality"]] == methods
    assert "a folder of 5 image files" in found["judged"]["images"] and found["machine"]["torch"] == torch.__version__
    for row in found["timing"]:
        assert len(row["seconds"]) == 1 and row["weight_bytes"] and row["activation_bytes"] and row["joules_per_image"]
        assert (row["flops_ratio"] is None) == (row["quotient"] is None) == (row["method"] == "int8")
        assert row["embedding_share"] > 0 and row["plain_embedding_share"] > 0
    rows = {(row["batch"], row["method"]): row for row in found["timing"]}
    assert [rows[8, name]["tokens"] for name in methods[:2] + methods[3:8]] == [65, 33, 33, 64, 61, 63, 57]
    assert rows[8, "PiToMe, r 8"]["tokens"] == 61 and rows[8, "TPS, keep 0.7"]["tokens"] == (65 + 46) / 2
    assert rows[8, "bf16"]["weight_bytes"] == rows[8, "bf16 + keep ratio 0.5"]["weight_bytes"]
    assert all(rows[batch, "uncompressed"][name] == 1 for batch in (1, 8) for name in ("speed_ratio", "memory_ratio"))
    assert rows[8, settings[0]]["flops_ratio"] > 2 and rows[8, settings[0]]["memory_ratio"] > 1.2
    plain = found["quality"][0]
    assert (plain["agreement"], plain["kl"]) == (1, 0) and 0 <= plain["top1"] == plain["worst_group"] <= 1

    lines = files["md"].read_text().splitlines()
    assert len(lines) == 2 + (2 + 2 * len(methods)) + 1 + (2 + len(methods)) and lines[2] in capsys.readouterr().out
    columns = "batch|dtype|method|tokens|ms|ms p95|speed ratio|FLOPs ratio|quotient|embedding %|memory MiB|"
    columns += "memory ratio|J/image|agree %|KL|top-1 %|worst group %"
    assert [name.strip() for name in lines[2].strip("|").split("|")] == columns.split("|")
    assert Image.open(files["png"]).size[0] > 400

    monkeypatch.setattr(benchmark, "measure", pytest.fail)
    monkeypatch.setattr(benchmark, "judge", pytest.fail)
    files["md"].unlink()
    benchmark.main(arguments)
    assert json.loads(files["json"].read_text()) == found
    assert files["md"].read_text().splitlines() == lines

    def train() -> None:
        model = transformers.AutoModelForImageClassification.from_pretrained(checkpoint)
        torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(checkpoint)

    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}, image_std=[0.25] * 3)
    changes = {
        "groups '": lambda: (tmp_path / "groups.json").write_text(json.dumps(dict.fromkeys(groups, "other"))),
        "words {": lambda: VisualVocabulary(torch.rand(4, 3, 4, 4)).save_pretrained(words),
        "image_processor {": lambda: processor.save_pretrained(checkpoint),
        "weights 'ViTForImageClassification": train,
    }
    for said, change in changes.items():
        before = shutil.copytree(tmp_path, tmp_path.with_name(f"before-{len(said)}"))
        change()
        with pytest.raises(SystemExit, match=f"another run \\({said}"):
            benchmark.main(arguments)
        shutil.copytree(before, tmp_path, dirs_exist_ok=True)


def test_a_run_that_was_cut_off_measures_what_is_missing(checkpoint, photographs, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    arguments = f"--model {checkpoint} --images {photographs} --batch-sizes 1 2 --turns 1 --json {path}".split()

    measured, measure = [], benchmark.measure

    def cut_off(methods, batches, *rest):
        if not measured:
            measured.append(len(batches[0]))
            return measure(methods, batches, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "measure", cut_off)
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(arguments)
    before = json.loads(path.read_text())
    assert measured == [1] and {row["batch"] for row in before["timing"]} == {1}
    found = [row["method"] for row in before["quality"]]  # answers come first: they tell what timing would be lost by
    assert found == ["uncompressed", "gradual", "local", *(f"variance, keep ratio {r}" for r in (0.75, 0.5, 0.25))]

    def go_on(methods, batches, *rest):
        measured.append(len(batches[0]))
        return measure(methods, batches, *rest)

    monkeypatch.setattr(benchmark, "measure", go_on)
    monkeypatch.setattr(benchmark, "judge", lambda *_: pytest.fail("it was judged"))
    benchmark.main(arguments)
    assert measured == [1, 2] and json.loads(path.read_text())["quality"] == before["quality"]


def test_a_model_that_answers_nan_or_has_a_random_pooler_is_not_measured_by_it(photographs, tmp_path, monkeypatch):
    model = tiny_model("vit-classifier")
    model.save_pretrained(tmp_path / "backbone")
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(config | {"architectures": ["ViTModel"]}))
    assert benchmark.load(str(tmp_path / "backbone")).pooler is None
    model.classifier.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    transformers.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "broken")
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(ValueError, match=r"the uncompressed model, in float32, answers .*\.png by NaN or infinity"):
        benchmark.main(f"--model {tmp_path / 'broken'} --images {photographs} --batch-sizes 1".split())


def test_results_of_other_options_or_versions_are_never_mixed(tmp_path):
    path = tmp_path / "results.json"
    header = {"options": {"turns": 5}, "judged": {"weights": "0a"}, "machine": {"torch": "2.6"}}
    benchmark.Results(path, header).add("timing", [{"batch": 1}])
    assert benchmark.Results(path, header).rows("timing", batch=1) == [{"batch": 1}]
    with pytest.raises(SystemExit, match=r"another run \(turns 5 there, 6 here\); delete it or name another file"):
        benchmark.Results(path, header | {"options": {"turns": 6}})
    with pytest.raises(SystemExit, match=r"torch '2.6' there, '2.13' here"):
        benchmark.Results(path, header | {"machine": {"torch": "2.13"}})
    with pytest.raises(SystemExit, match="weights '0a' there, '0b' here"):
        benchmark.Results(path, header | {"judged": {"weights": "0b"}})
    path.write_text("[")
    with pytest.raises(SystemExit, match="is no file of this benchmark"):
        benchmark.Results(path, header)


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_run_cut_off_while_it_writes_leaves_the_file_of_before(step, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    results = benchmark.Results(path, {"options": {}, "judged": {}, "machine": {}})
    results.add("timing", [{"batch": 1}])
    before = path.read_text()

    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    # "write": what was written has not reached the disk; "replace": it has, and the old file is still in its place.
    monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[step], cut_off)
    with pytest.raises(KeyboardInterrupt):
        results.add("timing", [{"batch": 2}])
    assert path.read_text() == before and [own.name for own in tmp_path.iterdir()] == [path.name]


def test_a_machine_without_an_energy_counter_says_why_and_has_no_column(capsys, monkeypatch):
    def none(device: torch.device) -> None:
        raise benchmark.NoMeter("no counter in /sys")

    monkeypatch.setattr(benchmark, "find_meter", none)
    assert benchmark.energy_meter(CPU) is None
    assert capsys.readouterr().out == "Energy cannot be measured here: no counter in /sys.\n"


def test_the_peak_is_what_a_function_holds_at_once():
    held = torch.ones(10_000)

    def run() -> torch.Tensor:
        first, second = torch.empty(1000), torch.empty(2000)
        del first
        third = torch.empty(500)
        return second[:500] + third + held[:500]

    # 3,000 floats before `first` goes; then 2,500, and two sums of 500.
    assert benchmark.peak_bytes(run, CPU) == 4 * 3500
    assert benchmark.peak_bytes(lambda: None, CPU) == 0


def test_the_time_of_a_method_is_the_mean_over_batches_of_the_median_of_their_turns():
    assert benchmark.typical([1.0, 5.0, 9.0, 6.0, 2.0, 100.0, 3.0], 2) == (2.5 + 6.0) / 2
    assert benchmark.typical([4.0], 3) == 4.0  # one turn, of the first batch


def test_ratios_are_of_the_uncompressed_model_over_the_method():
    plain = {"ms": 20.0, "flops": 300, "embedding_seconds": 1e-3, "weight_bytes": 60, "activation_bytes": 40}
    row = {"ms": 10.0, "flops": 100, "embedding_seconds": 2e-3, "weight_bytes": 60, "activation_bytes": 20}
    benchmark.compare_rows(row, plain, False)
    assert row["speed_ratio"] == 2 and row["flops_ratio"] == 3 and row["quotient"] == pytest.approx(2 / 3)
    assert row["memory_ratio"] == 1.25
    assert row["embedding_share"] == pytest.approx(0.1) and row["plain_embedding_share"] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["vit", "clip-projection", "dinov2"])
def test_a_model_without_a_classifier_is_judged_by_the_cosine_of_its_pooled_output(name, photographs):
    model = tiny_model(name)
    methods = [
        benchmark.Method("uncompressed", "uncompressed", model),
        benchmark.Method("short", "short", compress(copy_sharing_weights(model), {"keep_ratio": 0.1})),
    ]
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    plain, short = benchmark.judge(methods, model, find_images([photographs], 3), ["all"] * 3, processor)
    assert plain["cosine"] == pytest.approx(1, abs=1e-6) and short["cosine"] < 0.9999
    assert (plain["images"], plain["tokens"], short["tokens"]) == (3, 65, 7)


def test_images_in_the_current_folder_have_its_name_for_their_label(checkpoint, photographs, monkeypatch):
    model = transformers.AutoModelForImageClassification.from_pretrained(checkpoint).eval()
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 1.0])  # "dog", whatever it sees
    methods = [benchmark.Method("uncompressed", "uncompressed", model)]
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    monkeypatch.chdir(photographs / "dog")
    (row,) = benchmark.judge(methods, model, find_images([Path(".")]), ["all"] * 3, processor)
    assert row["top1"] == 1


def test_settings_in_bf16_stand_beside_the_model_in_single_precision():
    settings = [{"keep_ratio": 0.5}, {"criterion": "grid", "keep_ratio": 0.25}]
    options = SimpleNamespace(peers=["bf16+settings"], settings=settings)
    methods = benchmark.methods_of(options, tiny_model("vit"))
    assert [(method.name, method.line) for method in methods[3:]] == [
        ("bf16 + keep ratio 0.5", "bf16 + keep_ratio"),
        ("bf16 + grid, keep ratio 0.25", "bf16 + grid"),
    ]
    assert [method.model.dtype for method in methods] == [torch.float32] * 3 + [torch.bfloat16] * 2
    assert [method.model.config.vwt["keep_ratio"] for method in methods[3:]] == [0.5, 0.25]
    already = benchmark.methods_of(options, tiny_model("vit").to(torch.bfloat16))
    assert [method.name for method in already] == ["uncompressed", "keep ratio 0.5", "grid, keep ratio 0.25"]


def test_accuracy_is_told_of_all_images_and_of_the_worst_group():
    logits = torch.eye(2)[[0] * 6 + [1] * 2 + [0] * 3]
    found = benchmark.judged(logits, logits, [{0}] * 6 + [{1}] * 5, ["cat"] * 6 + ["dog"] * 5)
    assert (found["top1"], found["worst_group"]) == (8 / 11, 2 / 5)
    shown = benchmark.answers_of(found)
    assert (shown["top-1 %"], shown["worst group %"]) == ("72.73", "40.00")


@pytest.mark.parametrize(
    ("images", "size", "expected"),
    [
        (3, 1, [[0], [1], [2]]),
        (5, 2, [[0, 2], [1, 3]]),
        (6, 3, [[0, 2, 4], [1, 3, 5]]),
        (64, 32, [[*range(0, 64, 2)], [*range(1, 64, 2)]]),
        (3, 5, [[0, 1, 2, 0, 1]]),
    ],
)
def test_batches_are_spread_evenly_over_the_images(images, size, expected):
    assert [batch.tolist() for batch in benchmark.batches_of(torch.arange(images), size)] == expected


def test_methods_are_timed_on_the_same_batches_in_turn():
    seen = []
    runs = [
        benchmark.run_on_each(lambda pixel_values, name=name: seen.append((name, int(pixel_values))), torch.arange(3))
        for name in "ab"
    ]
    time_in_turn(runs, CPU, 4, warm_up=1)
    assert seen == [(name, turn % 3) for turn in range(5) for name in "ab"]


def test_counting_is_of_all_batches():
    model = compress(tiny_model("vit"), VWTConfig(method="local", tolerance=0.2, image_std=(1.0, 1.0, 1.0)))
    noise = sample_pixel_values()
    rows = [
        benchmark.count(benchmark.Method("", "", model), given) for given in ([noise], [0 * noise], [noise, 0 * noise])
    ]
    for name in ("tokens", "flops"):
        assert rows[1][name] < rows[0][name] and rows[2][name] == pytest.approx(
            (rows[0][name] + rows[1][name]) / 2, abs=0.06
        )


def test_counting_leaves_no_hook_in_a_model_that_is_timed():
    model = tiny_model("vit")
    counted = benchmark.count(benchmark.Method("plain", "plain", model), [sample_pixel_values()])
    assert counted["tokens"] == 65 and counted["flops"] > 0
    assert not any(module._forward_hooks for module in model.modules())


def test_random_patches_are_measured_once_at_each_keep_ratio_of_the_settings():
    settings = [{"keep_ratio": 0.6}, {"criterion": "grid", "keep_ratio": 0.6}, {"num_patches": 9}]
    options = SimpleNamespace(peers=["random"], settings=settings)
    assert benchmark.all_settings(options) == [*settings, {"criterion": "random", "keep_ratio": 0.6}]
    options.settings = [{"criterion": "random", "keep_ratio": 0.6}, True, {"method": "local"}]
    assert benchmark.all_settings(options) == options.settings
    options.settings = [False]
    assert benchmark.all_settings(options) == [
        False,
        *({"criterion": "random", "keep_ratio": k} for k in benchmark.RATIOS),
    ]


def test_a_method_that_is_asked_for_twice_is_refused():
    options = SimpleNamespace(peers=[], settings=[{"keep_ratio": 0.5}, {"keep_ratio": 0.5}])
    with pytest.raises(SystemExit, match=r"'keep ratio 0.5' is asked for 2 times"):
        benchmark.methods_of(options, tiny_model("vit"))


def test_a_peer_that_cannot_be_had_is_left_out_and_the_rest_is_measured(capsys):
    options = SimpleNamespace(peers=["int8", "bf16", "tome"], tome_r=[4], settings=[])
    methods = benchmark.methods_of(options, tiny_model("vit").to(torch.float16))
    assert [method.name for method in methods] == ["uncompressed", "ToMe, r 4", "bf16"]
    assert "Left out: dynamic int8 runs float32 models on a CPU" in capsys.readouterr().out


def test_names_in_the_plot_are_text_whatever_matplotlib_makes_of_them(tmp_path):
    row = {"dtype": "float32", "batch": 1, "ms": 3.0, "agreement": 0.5}
    lines = ("uncompressed", "_a$$b", "caf\udce9\n")
    header = {"options": {"dtype": ["float32"], "model": "x/Ba$$in"}, "machine": {"device": "cpu"}}
    results = benchmark.Results(None, header)
    for line in lines:
        results.add("timing", [row | {"method": line, "line": line}])
        results.add("quality", [row | {"method": line, "line": line}])
    drawn = []
    figure_class = benchmark.require_matplotlib()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure_class, "savefig", lambda figure, *_, **__: drawn.append(figure))
        benchmark.plot(results, 1, tmp_path / "a.png")
    (axes,) = drawn[0].axes
    texts = [axes.title, *axes.get_legend().get_texts()]
    assert [text.get_text() for text in texts] == ["Ba$$in, cpu", "uncompressed", "_a$$b", r"caf\udce9\n"]
    assert not any(text.get_parse_math() for text in texts)
    benchmark.plot(results, 1, tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_seconds_that_are_no_number_are_refused(photographs, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(f"--model nowhere --images {photographs} --seconds nan".split())
    assert "--seconds is nan; expected a number of at least 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--plot a.exe", r"--plot is a\.exe; expected"),
        ("--plot {photographs}/cat/a.png", "a.png would be a picture among the images of .*; name a file elsewhere"),
        ("--json .", "is a folder"),
        ("--vwt false", "vwt holds False, which leaves the model plain"),
        ('--vwt "gradual"', "vwt is 'gradual', which as text would name a vocabulary"),
        (f"--groups {__file__}", r"test_benchmark\.py, which cannot be read as JSON"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(photographs, monkeypatch, options, reason):
    monkeypatch.setattr(benchmark, "load", pytest.fail)
    with pytest.raises((OSError, TypeError, ValueError), match=reason):
        options = options.replace("{photographs}", str(photographs))
        benchmark.main(f"--model nowhere --images {photographs} {options}".split())
