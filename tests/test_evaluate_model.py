"""`evaluate_model` and `vwt-hf evaluate`: figures of every task, on whatever holds the images, by several processes."""

from __future__ import annotations

import datetime
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from tokenizers import pre_tokenizers
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import vwt_hf
from test_generation import blip, built, llava
from test_pipeline import tokenizer_with
from tiny import tiny_model
from vwt_hf import VisualVocabulary, compress, count_tokens, evaluate_model, evaluation_tasks
from vwt_hf.batch_log import Batch, BatchLog
from vwt_hf.cli import evaluate, main, model_card
from vwt_hf.compress import setting_of
from vwt_hf.evaluate_model import _tokenizer_of, name_of
from vwt_hf.evaluation_tasks import ZeroShot
from vwt_hf.figures import agreement, divergence, ranks, share_interval, token_f1
from vwt_hf.image_processing import HostTokenizer
from vwt_hf.image_source import find_images
from vwt_hf.labelled_images import LabelledImages, groups_of, open_labelled
from vwt_hf.processed_images import pixel_batches
from vwt_hf.processors import load_processor
from vwt_hf.token_count import TokenCount

AUTO = transformers.AutoModelForImageClassification
HALF = {"keep_ratio": 0.5}
evaluate_module = sys.modules["vwt_hf.evaluate_model"]  # in `vwt_hf` the name is its function's
SIZE = {"height": 32, "width": 32}
LABELS = ("cat", "dogs", "tea")
WORDS = ("this", "is", "a", "photo", "of", "cat", "dogs")
FIGURES = ("accuracy", "worst_group", "agreement", "kl", "max_difference")


@pytest.fixture
def photographs(tmp_path) -> Path:
    """17 images of noise in two folders, 9 cats and 8 dogs."""
    values = np.random.default_rng(0)
    for index in range(17):
        path = tmp_path / "images" / LABELS[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


@pytest.fixture
def dataset(photographs) -> datasets.Dataset:
    """The same images as a data set, in the order of their files, with captions."""
    files = sorted(photographs.rglob("*.png"))
    rows = {
        "id": list(range(len(files))),
        "image": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "label": [LABELS.index(file.parent.name) for file in files],
        "caption": [[f"{file.parent.name} of tea", f"photo of {WORDS[index % 7]}"] for index, file in enumerate(files)],
    }
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(LABELS)),
            "caption": datasets.Sequence(datasets.Value("string")),
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def classifier(folder: Path, id2label: dict, label2id: dict | None = None) -> Path:
    """A classifier that answers the first of its labels, whatever it sees."""
    model = tiny_model("vit-classifier")
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([1.0, 0.0, 0.5][: len(id2label)])
    model.classifier.weight.data = model.classifier.weight.data[:1].expand(len(id2label), -1).clone()
    model.config.id2label, model.config.label2id = id2label, label2id or {v: k for k, v in id2label.items()}
    return saved(model, folder / "model")


def saved(model: transformers.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size=SIZE).save_pretrained(folder)
    return folder


def random_classifier(folder: Path) -> Path:
    """A classifier of the tests' labels, whose answers depend on the image."""
    model = tiny_model("vit-classifier", num_labels=3, id2label=dict(enumerate(LABELS)))
    model.classifier.weight.data *= 40
    noise = np.random.default_rng(1).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    given = transformers.ViTImageProcessorPil(size=SIZE)(list(noise), return_tensors="pt")
    with torch.no_grad():
        model.classifier.bias -= model(**given).logits.mean(0)  # else it would answer noise as any other
    return saved(model, folder / "model")


def two_towers(name: str, folder: Path, logit_scale: float = 3.0) -> Path:
    model = tiny_model(name)
    model.logit_scale.data.fill_(logit_scale)
    tokenizer_with({"<pad>": 1, "<s>": 97, "</s>": 98}).save_pretrained(folder / name)
    return saved(model, folder / name)


def loaded(folder: Path, auto=transformers.AutoModel) -> transformers.PreTrainedModel:
    return auto.from_pretrained(folder).eval()


def run(model: Path, images: Path, *more: str) -> list[dict]:
    """The rows that the command writes; the uncompressed model's first."""
    output = images.parent / "rows.json"
    assert main(["evaluate", str(model), "--dataset", str(images), "--json", str(output), *more]) == 0
    return json.loads(output.read_text())["rows"]


def values(row) -> dict[str, float]:
    figures = row["figures"] if isinstance(row, dict) else row.figures
    return {name: figure["value"] if isinstance(figure, dict) else figure.value for name, figure in figures.items()}


def pixels_of(images: Path, model: Path) -> torch.Tensor:
    (made,) = pixel_batches(find_images([images]), load_processor(str(model)), 100)
    return made["pixel_values"]


def test_a_row_a_setting_tells_what_the_models_themselves_answer(tmp_path, photographs, capsys):
    folder = random_classifier(tmp_path)
    rows = run(folder, photographs, "--vwt", json.dumps(HALF), "--vwt", "true", "--batch-size", "4")
    assert [row["setting"] for row in rows] == ["uncompressed", "keep ratio 0.5", "gradual"]
    model, pixels = loaded(folder, transformers.AutoModelForImageClassification), pixels_of(photographs, folder)
    truth = torch.tensor([0] * 9 + [1] * 8)
    with torch.no_grad():
        plain = model(pixels).logits
        for row, setting in zip(rows, (None, HALF, True), strict=True):
            with count_tokens(compress(model, setting) if setting else model) as count:
                found = model(pixels).logits
            right = (found.argmax(-1) == truth).double()
            assert row["tokens"] == count.mean and row["vwt"] == setting
            to_plain = {
                "agreement": agreement(found, plain),
                "kl": divergence(found, plain),
                "max_difference": (found - plain).abs().max().item(),
            }
            assert values(row) == pytest.approx(
                {
                    "accuracy": right.mean().item(),
                    "worst_group": min(right[:9].mean().item(), right[9:].mean().item()),
                }
                | (to_plain if setting else {}),
                abs=1e-5,
            )
    assert values(rows[1])["kl"] > 0 and values(rows[1])["agreement"] < 1  # else nothing would be compared
    printed = capsys.readouterr().out
    assert "classification, 17 images of images" in printed and "| keep ratio 0.5 | 33 |" in printed.replace(
        "33.0", "33"
    )
    (line,) = (line for line in printed.splitlines() if "| uncompressed |" in line)
    assert line.count("| n/a ") == 3  # the plain model agrees with itself


def test_every_figure_has_an_interval_that_holds_it_and_that_the_seed_decides(tmp_path, photographs):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    of = {"vwt": [HALF, {"keep_ratio": 1.0}], "progress": False}
    first, again, other = (evaluate_model(model, photographs, **of, seed=seed) for seed in (0, 0, 1))
    figures = first.rows[1].figures
    assert tuple(figures) == FIGURES and figures["max_difference"].interval is None
    for name in FIGURES[:-1]:
        low, high = figures[name].interval
        assert low <= figures[name].value <= high and low < high
        assert figures[name] == again.rows[1].figures[name]
    assert figures["kl"].interval != other.rows[1].figures["kl"].interval
    for name in ("accuracy", "agreement"):
        assert figures[name].interval == share_interval(figures[name].value, 17)
    everything = first.rows[2].figures["agreement"]
    assert everything.value == everything.interval[1] == 1 and everything.interval[0] == pytest.approx(0.816, abs=1e-3)
    assert model.config.vwt is None  # the user's model is as it was


def test_folder_data_set_and_stream_of_the_same_images_give_the_same_figures(tmp_path, photographs, dataset):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset.select([0]), "validation": dataset}).save_to_disk(tmp_path / "splits")
    forms = (photographs, dataset, dataset.to_iterable_dataset(num_shards=3))
    expected, *found = (evaluate_model(model, images, vwt=[HALF], batch_size=5, progress=False) for images in forms)
    assert expected.images == 17 and "accuracy" in expected.rows[1].figures
    for one in found:
        assert [row.figures for row in one.rows] == [row.figures for row in expected.rows]
    for name, more in (
        ("saved", []),
        ("saved", ["--streaming"]),
        ("splits", []),
        ("splits", ["--split", "validation"]),
    ):
        rows = run(tmp_path / "model", tmp_path / name, "--vwt", json.dumps(HALF), "--batch-size", "5", *more)
        assert [values(row) for row in rows] == [values(row) for row in expected.rows]


def test_a_limit_takes_images_spread_over_a_folder_and_a_data_set_and_the_first_of_a_stream(photographs, dataset):
    def taken(images):
        batches = open_labelled(images, limit=limit).batches(0, 1, 3)
        return [sample.name for _, batch in batches for sample in batch]

    limit = 4

    assert [Path(name).stem for name in taken(photographs)] == ["00", "08", "16", "07"]
    numbered = dataset.cast_column("label", datasets.Value("int64")).map(lambda row: {"label": row["id"]})
    spread = open_labelled(numbered, limit=4)
    assert [row["label"] for row in spread.data] == [0, 4, 8, 12]
    assert taken(dataset.to_iterable_dataset()) == ["row 0", "row 1", "row 2", "row 3"]
    assert taken(dataset) == ["row 0", "row 4", "row 8", "row 12"]
    # Also of more than half, in which the last folder would have no image else.
    assert [row["label"] for row in open_labelled(numbered, limit=9).data] == [0, 1, 3, 5, 7, 9, 11, 13, 15]
    limit = 9
    assert [Path(name).stem for name in taken(photographs)] == ["00", "02", "06", "10", "14", "01", "05", "09", "13"]


def test_the_labels_are_those_of_all_images_whatever_the_limit(tmp_path, photographs, dataset):
    texts = dataset.map(lambda row: {"kind": LABELS[row["label"]]}).remove_columns("label")
    texts = texts.rename_column("kind", "label")
    for images in (photographs, texts):
        opened = open_labelled(images, limit=1)
        assert opened.label_names == ("cat", "dogs") and opened.total == 1
    model = loaded(two_towers("clip", tmp_path))
    of = {"vwt": [HALF], "task": "zero-shot", "progress": False}
    of["tokenizer"] = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")
    assert values(evaluate_model(model, photographs, limit=1, **of).rows[1])["kl"] > 0  # of one label it would be 0
    with pytest.raises(ValueError, match=r"the images have one label alone \('cat'\), which any model would find"):
        evaluate_model(model, photographs / "cat", **of)
    same = texts.map(lambda row: {"label": "sea_cat" if row["id"] % 2 else "sea cat"})
    with pytest.raises(
        ValueError, match=r"one label alone \('sea cat', 'sea_cat'\), .* differ by more than _ and a space"
    ):
        evaluate_model(model, same, **of)
    for images in (photographs / "cat", same.remove_columns("caption")):
        assert evaluate_model(model, images, **of | {"task": None}).task == "features"


@pytest.mark.parametrize(("start", "given"), [("cat", "."), ("cat", ".."), ("cat/more", ".."), ("", "cat/more/..")])
def test_a_label_is_the_name_of_a_folder_however_that_is_given(photographs, monkeypatch, start, given):
    (photographs / "cat" / "more").mkdir()
    (photographs / "bird.png").write_bytes((photographs / "cat" / "00.png").read_bytes())
    monkeypatch.chdir(photographs / start)
    labels = {path.name: path.resolve().parent.name for path in Path(given).rglob("*.png")}
    opened = open_labelled(given)
    samples = [sample for _, batch in opened.batches(0, 1, 4) for sample in batch]
    assert {sample.item.name: sample.label for sample in samples} == labels and "cat" in labels.values()
    assert opened.label_names == tuple(sorted(set(labels.values())))
    assert [sample.group for sample in samples] == [sample.label for sample in samples]
    assert groups_of([sample.item for sample in samples], Path(given), None) == [sample.label for sample in samples]


def test_zero_shot_takes_each_of_the_labels_that_read_the_same(tmp_path, photographs):
    opened = open_labelled(photographs)
    opened.label_names = ("sea_cat", "dog", "sea cat")
    given = {"prompt": "a {}", "max_new_tokens": 1, "seed": 0}
    folder = two_towers("clip", tmp_path)
    task = ZeroShot(loaded(folder), opened, transformers.AutoTokenizer.from_pretrained(folder), given)
    found = task.truth(["sea_cat", "sea cat", "dog", "bird", None])
    said = ["2 images have none of these labels, and are left out of the accuracy."]
    assert found == ([{0, 2}, {0, 2}, {1}, set(), set()], said)


def test_zero_shot_names_a_label_that_is_no_text(tmp_path, photographs):
    try:
        os.rename(photographs / "cat", os.fsencode(photographs) + b"/caf\xe9")
    except OSError:
        pytest.skip("this file system has no such names")
    model = loaded(two_towers("clip", tmp_path))
    with pytest.raises(ValueError, match=r"would read 'a photo of a caf\\udce9\.', which is no valid text; expected"):
        evaluate_model(model, photographs, task="zero-shot", progress=False)


def test_a_model_without_a_tokenizer_beside_it_asks_for_one(tmp_path, photographs):
    model = loaded(two_towers("clip", tmp_path))
    processor = load_processor(model.name_or_path)
    model.name_or_path = ""
    with pytest.raises(ValueError, match=r"no text tokenizer .*loaded from nowhere.* give one as tokenizer="):
        evaluate_model(model, photographs, image_processor=processor, progress=False)


@pytest.mark.parametrize("task", ["zero-shot", "retrieval", "captions"])
def test_a_tokenizer_without_its_files_is_refused(task, tmp_path, dataset):
    """transformers makes one of special tokens alone for a config without files."""
    own = built(blip) if task == "captions" else tiny_model("clip")
    model = loaded(saved(own, tmp_path / "model"), type(own))
    of = {"task": task, "vwt": [HALF], "progress": False}
    with pytest.raises(ValueError, match=r"no text tokenizer .* \(the \w+ knows no tokens but \d special .* give"):
        evaluate_model(model, dataset, **of)
    empty = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^the \w+ knows no tokens but \d special ones, .* expected one that"):
        evaluate_model(model, dataset, tokenizer=empty, **of)


@pytest.mark.parametrize("task", ["zero-shot", "retrieval"])
def test_texts_that_a_tokenizer_does_not_tell_apart_are_refused(task, tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(evaluation_tasks, "TEXTS", 2)
    model = loaded(two_towers("clip", tmp_path))
    own = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")

    def differing(*words: str):
        """A tokenizer that reads these words alone."""
        return lambda texts, **how: own([" ".join(filter(words.__contains__, text.split())) for text in texts], **how)

    of = {"task": task, "vwt": [HALF], "progress": False}
    with pytest.raises(ValueError, match=r"the function gives all \d+ texts, .* the same token ids; expected"):
        evaluate_model(model, dataset, tokenizer=differing(), **of)
    assert evaluate_model(model, dataset, tokenizer=differing("tea.", "tea"), **of).images == 17  # the last text alone


@pytest.mark.parametrize("name", ["evaluate.py", "evaluate/__init__.py", "datasets.py"])
def test_a_users_file_that_hides_a_package_is_named_before_anything_is_measured(
    tmp_path, photographs, monkeypatch, name
):
    model = loaded(random_classifier(tmp_path), AUTO)
    own = tmp_path / "program" / name
    own.parent.mkdir(parents=True)
    own.write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path / "program")
    monkeypatch.delitem(sys.modules, name.replace(".", "/").split("/")[0], raising=False)
    monkeypatch.setattr(evaluate_module, "_answers", lambda *_: pytest.fail("an image was measured"))
    with pytest.raises(ImportError, match=rf"{re.escape(str(own))} hides the package '\w+', .* Rename it"):
        evaluate_model(model, photographs, vwt=[HALF], progress=False)


@pytest.mark.parametrize("task", ["zero-shot", "retrieval"])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("change", ["padding", "ids"])
def test_a_tokenizer_that_does_not_fit_is_refused_before_images_are_measured(
    task, streams, change, tmp_path, dataset, monkeypatch
):
    model = loaded(two_towers("clip", tmp_path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")
    if change == "padding":
        tokenizer.pad_token = None
    else:
        model.text_model.embeddings.token_embedding.weight.data = torch.ones(3, 32)  # of fewer tokens
    images = dataset.to_iterable_dataset() if streams else dataset
    monkeypatch.setattr(evaluate_module, "_answers", lambda *_: pytest.fail("an image was measured"))
    with pytest.raises((ValueError, IndexError), match=r"padding token|out of range"):
        evaluate_model(model, images, tokenizer=tokenizer, task=task, vwt=[HALF], progress=False)


def test_an_image_that_the_processor_refuses_is_called_by_its_name(tmp_path, dataset):
    class Refuses(transformers.ViTImageProcessorPil):
        def __call__(self, images, **options):
            if images[0].getpixel((0, 0)) == first:
                raise ValueError("I do not like it")
            return super().__call__(images, **options)

    first = dataset["image"][3].getpixel((0, 0))
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    result = evaluate_model(model, dataset, vwt=[HALF], image_processor=Refuses(size=SIZE), progress=False)
    assert result.images == 16
    assert result.unreadable == ["row 3 (50×40) is refused by Refuses: I do not like it"]


def test_a_model_can_be_trained_afterwards(dataset):
    """BEiT keeps the index of its relative positions, which no tensor of inference mode may be then."""
    model = tiny_model("beit-classifier")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    evaluate_model(model, dataset, vwt=[HALF], image_processor=processor, task="classification", progress=False)
    model(pixel_values=torch.rand(2, 3, 32, 32)).logits.sum().backward()


def test_words_of_the_image_processor_are_not_looked_for(tmp_path, dataset, monkeypatch):
    """Each setting finds its own."""
    folder = random_classifier(tmp_path)
    model = loaded(folder, transformers.AutoModelForImageClassification)
    given = {"vwt": [HALF], "progress": False}
    plain = evaluate_model(model, dataset, image_processor=load_processor(str(folder)), **given)
    tokenizing = AutoImageProcessor.from_pretrained(folder, vwt={"keep_ratio": 0.25})
    monkeypatch.setattr(HostTokenizer, "words", None)
    found = evaluate_model(model, dataset, image_processor=tokenizing, **given)
    assert [row.figures for row in found.rows] == [row.figures for row in plain.rows]
    assert tokenizing.vwt == {"keep_ratio": 0.25} | tokenizing.vwt  # the caller's own is as it was


def test_a_data_set_on_the_hub_is_read_by_its_name_and_its_validation_split(tmp_path, dataset, monkeypatch, capsys):
    """The client for data sets is stood in for: what it is asked for, and what comes of its answers."""
    asked = []

    def load_dataset(name, config, **options):
        asked.append((name, config, options))
        if name == "me/gone":
            raise FileNotFoundError("there is no me/gone")
        return dataset.to_iterable_dataset() if options["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "test", "validation"])
    folder = random_classifier(tmp_path)
    card = tmp_path / "README.md"
    streamed = ["--split", "train", "--streaming", "--config", "small", "--card", str(card)]
    # A stream that ends before its limit has as many images the second time.
    for more in ([], streamed, [*streamed, "--limit", "2000"]):
        assert main(["evaluate", str(folder), "--dataset", "me/photos", *more]) == 0
    assert asked == [
        ("me/photos", None, {"split": "validation", "streaming": False}),
        *[("me/photos", "small", {"split": "train", "streaming": True})] * 2,
    ]
    assert capsys.readouterr().out.count("17 images of me/photos") == 3
    written = huggingface_hub.ModelCard.load(card).data.eval_results
    assert {(own.dataset_type, own.dataset_config, own.dataset_split) for own in written} == {
        ("me/photos", "small", "train")
    }
    for name in ("me/gone", "me/photos/of/cats"):
        assert main(["evaluate", str(folder), "--dataset", name]) == 2
    refused = capsys.readouterr().err
    assert "me/gone is no folder here, and cannot be had as a data set: there is no me/gone" in refused
    assert "me/photos/of/cats does not exist" in refused


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_take_every_image_once(photographs, dataset, processes, shards):
    for images in (photographs, dataset, dataset.to_iterable_dataset(num_shards=shards)):
        own = [list(open_labelled(images).batches(process, processes, 4)) for process in range(processes)]
        seen = [Image_bytes(sample.item) for batches in own for _, batch in batches for sample in batch]
        assert len(seen) == len(set(seen)) == 17
        numbers = [number for batches in own for number, _ in batches]
        assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_processes_take_the_first_images_of_a_stream_as_one_does(dataset, shards):
    def seen(processes: int) -> list[bytes]:
        opened = open_labelled(dataset.to_iterable_dataset(num_shards=shards), limit=6)
        own = [opened.batches(process, processes, 2) for process in range(processes)]
        return sorted(Image_bytes(sample.item) for batches in own for _, batch in batches for sample in batch)

    first = sorted(
        Image_bytes(row["image"]) for row in dataset.cast_column("image", datasets.Image(decode=False)).take(6)
    )
    assert seen(1) == seen(2) == seen(3) == first


def Image_bytes(item) -> bytes:
    return item["bytes"] if isinstance(item, dict) else item.read_bytes()


@pytest.mark.parametrize(
    ("id2label", "label2id", "right", "said"),
    [
        ({0: "cat", 1: "dogs"}, {"cat": "0", "dogs": "1"}, 9 / 17, ""),
        ({0: "cat", 1: "dogs", 2: "cat"}, {"cat": 2, "dogs": 1}, 9 / 17, "Labels 0, 2 are all called 'cat'"),
        ({0: "dogs", 1: "cat"}, {"cat": 0, "dogs": 1}, 8 / 17, "'cat' is label 0 by label2id; id2label"),
        ({0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}, None, "No label of the images (such as 'cat')"),
        ({0: "cat", 1: "bird"}, {"cat": 0, "bird": 1}, 1, "8 of 17 images have a label that is none of the model's"),
    ],
)
def test_any_table_of_labels_gives_the_right_accuracy_and_says_what_is_unclear(
    tmp_path, photographs, capsys, id2label, label2id, right, said
):
    plain, _ = run(classifier(tmp_path, id2label, label2id), photographs, "--vwt", json.dumps(HALF))
    assert values(plain).get("accuracy") == (None if right is None else pytest.approx(right))
    _header, *rest = capsys.readouterr().out.splitlines()
    assert rest[0].startswith(said or "")
    assert bool(rest[0]) == bool(said)


def test_a_classifier_without_names_for_its_labels_has_no_accuracy_by_names(tmp_path, photographs):
    model = loaded(random_classifier(tmp_path), AUTO)
    expected = evaluate_model(model, photographs, vwt=[HALF], progress=False)
    model.config.id2label, model.config.label2id = {}, {}
    with pytest.warns(UserWarning, match="No label of the images"):
        found = evaluate_model(model, photographs, vwt=[HALF], progress=False)
    said = "No label of the images (such as 'cat') is one of the model's (its config names none): they are compared by "
    assert found.said[0].startswith(f"{said}name, and there is no accuracy. If the model was trained on these labels, ")
    assert len(found.said) == 1 and values(found.rows[0]) == {}
    assert values(found.rows[1])["agreement"] == values(expected.rows[1])["agreement"]


@pytest.mark.parametrize("named", [False, True])
def test_labels_without_names_are_told_of_before_images_are_measured(tmp_path, dataset, monkeypatch, named):
    names = LABELS if named else ("LABEL_0", "LABEL_1", "LABEL_2")
    model = loaded(classifier(tmp_path, dict(enumerate(names))), AUTO)
    told = r"such as 'LABEL_0', which .* have no names\).* set id2label"
    with warnings.catch_warnings(record=True) as warned, monkeypatch.context() as patched:
        warnings.simplefilter("always")
        patched.setattr(evaluate_module, "_answers", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate_model(model, dataset, vwt=[], progress=False)
    assert [bool(re.search(told, str(each.message))) for each in warned] == [True] * (not named)
    said = evaluate_model(model, dataset, vwt=[], progress=False).said
    assert said == [str(each.message) for each in warned]


def test_of_labels_that_are_called_the_same_each_is_right(tmp_path, photographs):
    folder = classifier(tmp_path, {0: "cat", 1: "dogs", 2: "cat"})
    model = loaded(folder, transformers.AutoModelForImageClassification)
    model.classifier.bias.data = torch.tensor([0.0, 0.0, 1.0])
    found = values(evaluate_model(model, photographs, vwt=[], progress=False).rows[0])
    assert found["accuracy"] == pytest.approx(9 / 17) and found["worst_group"] == 0


def test_labels_of_a_data_set_go_by_name_and_by_number_only_where_they_have_none(tmp_path, dataset):
    model = loaded(classifier(tmp_path, {0: "tea", 1: "dogs", 2: "cat"}), transformers.AutoModelForImageClassification)

    def accuracy(images, **columns):
        result = evaluate_model(model, images, vwt=[], progress=False, **columns)
        return values(result.rows[0]).get("accuracy"), result.said

    assert accuracy(dataset) == (0, [])  # it always answers tea, which is number 0 here and 2 in the data set
    texts = dataset.map(lambda row: {"kind": LABELS[row["label"]]})
    said = "No column is known to hold labels, so there is no accuracy: name one by label_column (--label-column). The "
    assert accuracy(texts.remove_columns("label")) == (None, [f"{said}columns are id, image, caption, kind."])
    assert accuracy(texts, label_column="kind") == (0, [])
    numbers = dataset.cast_column("label", datasets.Value("int64"))
    share, said = accuracy(numbers)
    assert share == pytest.approx(9 / 17) and "by their numbers" in said[0]
    unknown = dataset.map(lambda row: {"label": -1 if row["id"] < 9 else 2})
    share, said = accuracy(unknown)
    assert said == ["9 of 17 images have no label: top-1 is of the others."] and share == 1
    gaps = texts.map(lambda row: {"kind": None if row["id"] < 3 else "fish" if row["id"] < 5 else "tea"})
    share, said = accuracy(gaps, label_column="kind")
    others = "2 of 17 images have a label that is none of the model's: top-1 is of the others."
    assert share == 1 and said == ["3 of 17 images have no label: top-1 is of the others.", others]
    gaps = numbers.map(lambda row: {"label": None if row["id"] < 3 else 9 if row["id"] < 5 else row["label"]})
    share, said = accuracy(gaps)
    others = "2 of 17 images have a label that is none from 0 to 2: top-1 is of the others."
    assert share == 4 / 12 and said[1:] == ["3 of 17 images have no label: top-1 is of the others.", others]
    share, said = accuracy(numbers.map(lambda row: {"label": 9}))
    assert share is None and said[1:] == ["None of them is from 0 to 2: there is no accuracy."]
    share, said = accuracy(dataset.map(lambda row: {"label": -1}))
    assert share is None and len(said) == 1 and "No image has a label that is known" in said[0]


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        (None, "uncompressed"),
        (True, "gradual"),
        ({"method": "local", "tolerance": 0.048}, "local, tolerance 0.048"),
        ({"criterion": "grid", "keep_ratio": 0.5}, "grid, keep ratio 0.5"),
        ({"method": "inter", "vocabulary": "me/words", "threshold": 0.1}, "inter, me/words, threshold 0.1"),
        ("me/words", "me/words"),
        (vwt_hf.VWTConfig(method="local", tolerance=0.048), "local, tolerance 0.048"),
        (vwt_hf.VWTConfig(method="gradual", layers=(3, 5), image_std=(0.2, 0.2, 0.3)), "gradual, layers 3 5"),
        (
            {"tolerance": 0.1, "image_std": [0.2, 0.2, 0.3], "method": "local"},
            "local, tolerance 0.1, image std 0.2 0.2 0.3",
        ),
    ],
)
def test_a_setting_is_named_by_its_words_and_by_its_numbers_with_their_fields(setting, name):
    assert name_of(setting) == name


def test_a_checkpoint_with_a_setting_is_measured_under_it_beside_the_plain_model(tmp_path, photographs):
    folder = random_classifier(tmp_path)
    model = loaded(folder, transformers.AutoModelForImageClassification)
    plain, default = run(folder, photographs)
    assert (plain["tokens"], default["setting"]) == (65, "gradual")
    compress(model, HALF).save_pretrained(folder)
    plain, own = run(folder, photographs)
    assert (plain["tokens"], plain["vwt"], own["tokens"]) == (65, None, 33) and own["setting"].startswith("intra")
    assert evaluate_model(model, photographs, progress=False).rows[1].tokens == 33 and model.config.vwt is not None


def test_the_worst_group_is_of_the_labels_or_of_those_that_a_file_or_a_column_names(tmp_path, photographs, dataset):
    folder = classifier(tmp_path, {0: "cat", 1: "dogs"})
    plain, half = run(folder, photographs, "--vwt", json.dumps(HALF))
    assert values(plain)["worst_group"] == values(half)["worst_group"] == 0
    table = tmp_path / "groups.json"
    names = [path.relative_to(photographs).as_posix() for path in sorted(photographs.rglob("*.png"))]
    table.write_text(json.dumps(dict.fromkeys(names[-4:], "few") | dict.fromkeys(names[:-4], "many")))
    plain, _ = run(folder, photographs, "--groups", str(table), "--vwt", json.dumps(HALF))
    assert values(plain)["worst_group"] == pytest.approx(9 / 13)  # of the 4 others, all wrong, nothing is said
    grouped = dataset.map(lambda row: {"where": "few" if row["id"] >= 13 else "many"})
    model = loaded(folder, transformers.AutoModelForImageClassification)
    found = evaluate_model(model, grouped, vwt=[HALF], group_column="where", progress=False)
    assert values(found.rows[0])["worst_group"] == pytest.approx(9 / 13)
    assert plain["figures"]["worst_group"]["count"] == found.rows[0].figures["worst_group"].count == 13


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # the last two by Notepad and PowerShell
def test_a_file_of_groups_may_be_in_the_encodings_of_windows(encoding, tmp_path):
    (tmp_path / "groups.json").write_text(json.dumps({"é.png": "größe"}, ensure_ascii=False), encoding=encoding)
    assert groups_of([tmp_path / "é.png"], tmp_path, tmp_path / "groups.json") == ["größe"]


@pytest.mark.parametrize("missing", [None, -1])
def test_images_without_a_group_are_left_out_of_the_worst_group_and_said_to_be(missing, tmp_path, dataset):
    """To datasets, -1 is none of the classes of a column."""
    model = loaded(classifier(tmp_path, {0: "cat", 1: "dogs"}), AUTO)  # it answers cat: the last 8 of 17 are wrong
    of = datasets.Value("string") if missing is None else datasets.ClassLabel(names=["many", "few"])
    first = "many" if missing is None else 0
    grouped = dataset.add_column("where", [first] * 12 + [missing] * 5, feature=of)
    last_first = grouped.select([*range(12, 17), *range(12)])
    for given in (grouped, grouped.to_iterable_dataset(), last_first):
        found = evaluate_model(model, given, vwt=[HALF], group_column="where", progress=False)
        figure = found.rows[0].figures["worst_group"]
        assert (figure.value, figure.count) == (9 / 12, 12) and figure.interval[0] > 0.4
        assert values(found.rows[0])["accuracy"] == 9 / 17
        assert found.said == ["5 images without a group are left out of the worst group."]
    of_none = dataset.add_column("where", [None] * 17, feature=datasets.Value("string"))
    found = evaluate_model(model, of_none, vwt=[HALF], group_column="where", progress=False)
    assert "worst_group" not in found.rows[0].figures
    assert found.said == ["17 images without a group are left out of the worst group."]


@pytest.mark.parametrize("name", ["clip", "siglip", "altclip", "chinese-clip", "metaclip-2", "aimv2"])
def test_zero_shot_is_what_the_model_itself_says_of_the_labels(tmp_path, photographs, dataset, name):
    # AIMv2 scales by at most 100, whose logarithm is 4.6.
    folder = two_towers(name, tmp_path, logit_scale=5.5 if name == "aimv2" else 3.0)
    model, tokenizer = loaded(folder), transformers.AutoTokenizer.from_pretrained(folder)
    rows = run(folder, photographs, "--vwt", json.dumps(HALF), "--prompt", "a {} of tea.", "--batch-size", "6")
    padding = "max_length" if name == "siglip" else True
    texts = tokenizer(
        [f"a {label} of tea." for label in LABELS[:2]], padding=padding, max_length=64, return_tensors="pt"
    )
    given = texts | {"pixel_values": pixels_of(photographs, folder)}
    truth = torch.tensor([0] * 9 + [1] * 8)
    with torch.no_grad():
        plain = model(**given).logits_per_image
        found = compress(model, HALF)(**given).logits_per_image
    for row, logits in zip(rows, (plain, found), strict=True):
        assert values(row)["accuracy"] == pytest.approx((logits.argmax(-1) == truth).double().mean().item())
    assert values(rows[1])["kl"] == pytest.approx(divergence(found, plain), abs=1e-6)
    assert values(rows[1])["max_difference"] == pytest.approx((found - plain).abs().max().item(), abs=1e-5)
    assert values(rows[1])["max_difference"] > 1e-4
    stream = dataset.cast_column("label", datasets.Value("int64"))
    with pytest.raises(ValueError, match="no labels with names"):
        evaluate_model(loaded(folder), stream, task="zero-shot", progress=False)


def test_captions_are_texts_and_nothing_that_only_stands_beside_them(tmp_path, dataset):
    model = loaded(two_towers("clip", tmp_path))
    rows = range(len(dataset))
    bare = dataset.remove_columns(["label", "caption"])
    of_structs = bare.add_column("sentences", [{"raw": f"cup {row}", "imgid": row} for row in rows])
    result = evaluate_model(model, of_structs, batch_size=5, progress=False)
    assert result.task == "features"  # by default such a column is none of captions
    with pytest.raises(ValueError, match=r"column 'sentences' holds \{.*expected a text or a list of texts"):
        evaluate_model(model, of_structs, task="retrieval", caption_column="sentences", progress=False)
    lists = bare.add_column("texts", [[{"raw": f"cup {row}"}] for row in rows])
    with pytest.raises(ValueError, match=r"column 'texts' holds \[.*expected a text or a list of texts"):
        evaluate_model(model, lists, task="retrieval", caption_column="texts", progress=False)
    gaps = bare.add_column("caption", [[f"{WORDS[row % 7]} cup", None, ""] for row in rows])
    expected = bare.add_column("caption", [[f"{WORDS[row % 7]} cup"] for row in rows])
    found, wanted = (evaluate_model(model, given, progress=False, seed=0) for given in (gaps, expected))
    assert found.task == wanted.task == "retrieval"
    assert [row.figures for row in found.rows] == [row.figures for row in wanted.rows]


def test_retrieval_recalls_what_the_similarities_say(tmp_path, dataset):
    folder = two_towers("clip", tmp_path)
    model, tokenizer = loaded(folder), transformers.AutoTokenizer.from_pretrained(folder)
    dataset = dataset.remove_columns("label")  # a model of images and texts is for retrieval where there are captions
    result = evaluate_model(model, dataset, vwt=[HALF], batch_size=5, progress=False)
    assert result.task == "retrieval"
    captions = dataset["caption"][:]
    texts = sorted({text for own in captions for text in own})
    processor = load_processor(str(folder))
    pixels = processor(images=list(dataset["image"]), return_tensors="pt")["pixel_values"]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = model(**encoded, pixel_values=pixels).logits_per_image
        short = compress(model, HALF)(**encoded, pixel_values=pixels).logits_per_image
    for row, similarity in zip(result.rows, (plain, short), strict=True):
        for count in (1, 5, 10):
            nearest = similarity.topk(min(count, len(texts))).indices.tolist()
            by_image = [any(texts[at] in own for at in some) for some, own in zip(nearest, captions, strict=True)]
            nearest = similarity.T.topk(count).indices.tolist()
            by_text = [any(text in captions[at] for at in some) for some, text in zip(nearest, texts, strict=True)]
            assert values(row)[f"image_to_text_recall@{count}"] == pytest.approx(np.mean(by_image))
            assert values(row)[f"text_to_image_recall@{count}"] == pytest.approx(np.mean(by_text))
    assert "cosine" not in values(result.rows[0]) and values(result.rows[1])["cosine"] < 0.9999
    assert 0 < values(result.rows[0])["text_to_image_recall@5"] < 1  # else any model would pass
    with pytest.raises(ValueError, match="have no captions"):
        evaluate_model(model, dataset.remove_columns("caption"), task="retrieval", progress=False)
    bare = dataset.map(lambda row: {"caption": []})
    with pytest.raises(ValueError, match="none of 17 images has a caption, which retrieval is about; expected"):
        evaluate_model(model, bare, task="retrieval", progress=False)


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_an_image_with_a_row_for_each_caption_is_one_image(tmp_path, dataset, name):
    folder = two_towers(name, tmp_path)
    if name == "siglip2":
        transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=64).save_pretrained(folder)
    dataset = dataset.remove_columns("label")
    rows = [(row["id"], text) for row in dataset for text in row["caption"]]
    order = np.random.default_rng(0).permutation(len(rows))
    one_each = dataset.select([rows[at][0] for at in order]).remove_columns("caption")
    one_each = one_each.add_column("caption", [rows[at][1] for at in order])
    of = {"vwt": [HALF], "task": "retrieval", "progress": False}
    expected = evaluate_model(loaded(folder), dataset, **of)
    found = evaluate_model(loaded(folder), one_each, batch_size=7, **of)
    assert 0 < values(expected.rows[0])["text_to_image_recall@5"] < 1  # else any model would pass
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert values(one) == pytest.approx(values(other), abs=1e-6)
        assert {figure.count for figure in one.figures.values()} == {17}
        for figure, wanted in zip(one.figures.values(), other.figures.values(), strict=True):
            assert figure.interval == pytest.approx(wanted.interval, abs=1e-6)
    assert (expected.said, found.images) == ([], 34)
    assert found.said == ["34 rows show 17 images: one in several rows has the captions of all."]


def test_captions_of_one_image_say_no_more_than_one():
    found = evaluation_tasks.Task.share(None, [True, True, True, False, True, False], 3)
    assert found == evaluation_tasks.Figure(4 / 6, share_interval(4 / 6, 3), 3)
    assert evaluation_tasks.Task.share(None, [True, False], 3).interval == share_interval(1 / 2, 2)


def test_a_card_says_of_how_many_images_a_figure_is_that_is_not_of_all(tmp_path, photographs, dataset):
    labelled = evaluate_model(loaded(classifier(tmp_path, {0: "cat"}), AUTO), photographs, vwt=[HALF], progress=False)
    dataset = dataset.map(lambda row: {"caption": [] if row["id"] < 5 else row["caption"]})
    folder = two_towers("clip", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    captioned = evaluate_model(
        loaded(folder), dataset, vwt=[HALF], task="retrieval", tokenizer=tokenizer, progress=False
    )
    for result, some, of in ((labelled, {"accuracy", "worst_group"}, 9), (captioned, set(), 12)):
        for figure in result.eval_results():
            is_of_some = figure.metric_type in some or "recall" in figure.metric_type
            assert figure.metric_args["images"] == 17 and figure.metric_args.get("of") == (of if is_of_some else None)
            assert is_of_some or figure.metric_type in (*FIGURES, "cosine")


def test_a_card_of_a_calibrated_setting_is_read_without_code(tmp_path, photographs):
    """torch's version is a text of a class of its own, which YAML would name."""
    calibrated = vwt_hf.VWTConfig(keep_ratio=0.5, evidence={"torch": torch.__version__, "of": [torch.__version__]})
    assert type(calibrated.evidence["torch"]) is type(calibrated.evidence["of"][0]) is str
    model = loaded(random_classifier(tmp_path), AUTO)
    result = evaluate_model(model, photographs, vwt=[calibrated], progress=False)
    data = huggingface_hub.ModelCardData(model_name="mine", eval_results=result.eval_results())
    card = huggingface_hub.ModelCard(f"---\n{data.to_yaml()}\n---\n")  # it reads no object
    (kept,) = [own for own in card.data.eval_results if own.metric_type == "kl"]
    assert kept.metric_args["vwt"]["evidence"]["torch"] == torch.__version__


def test_settings_that_words_alone_tell_apart_are_told_by_them_and_the_same_ones_are_refused(tmp_path, photographs):
    model = loaded(random_classifier(tmp_path), AUTO)
    first, second = ({"method": "inter", "vocabulary": vwt_hf.VisualVocabulary(torch.rand(9, 3, 4, 4))} for _ in "ab")
    result = evaluate_model(model, photographs, vwt=[first, HALF, second], progress=False)
    names = [row.setting for row in result.rows]
    assert len(set(names)) == 4 and names[2] == "keep ratio 0.5"
    assert all(re.fullmatch(r"inter, .*, words [0-9a-f]{16}", name) for name in names[1::2])
    assert len({own.metric_name for own in result.eval_results() if own.metric_type == "kl"}) == 3
    for twice in ([HALF, dict(HALF)], [first, HALF, dict(first)]):
        with pytest.raises(ValueError, match=r"vwt holds '(keep ratio 0\.5|inter, .*)' twice; leave one out"):
            evaluate_model(model, photographs, vwt=twice, progress=False)


def test_retrieval_holds_what_is_right_for_some_queries_at_a_time(tmp_path, dataset, monkeypatch):
    dataset = dataset.map(lambda row: {"caption": [] if row["id"] in (0, 5) else row["caption"]})
    model = loaded(two_towers("clip", tmp_path))
    of = {"vwt": [HALF], "task": "retrieval", "progress": False}
    of["tokenizer"] = transformers.AutoTokenizer.from_pretrained(tmp_path / "clip")
    expected, seen = evaluate_model(model, dataset, **of), []
    assert expected.said == ["2 images without a caption are left out."]

    def watched(similarity, right):
        seen.append(len(right))
        return ranks(similarity, right)

    monkeypatch.setattr(evaluation_tasks, "QUERIES", 4)
    monkeypatch.setattr(evaluation_tasks, "ranks", watched)
    found = evaluate_model(model, dataset, **of)
    assert [row.figures for row in found.rows] == [row.figures for row in expected.rows]
    assert max(seen) == 4 and sum(seen) == 2 * (15 + len({text for own in dataset["caption"] for text in own}))


def test_captions_are_compared_with_the_plain_models_and_with_the_references(tmp_path, dataset):
    tokenizer = tokenizer_with({"<pad>": 0, "<s>": 1, "</s>": 97})
    model = built(blip)
    model.text_decoder.cls.predictions.bias.data[:12] += 3  # words of the tests' texts
    folder = saved(model, tmp_path / "captioner")
    tokenizer.save_pretrained(folder)
    dataset.remove_columns("label").save_to_disk(tmp_path / "saved")
    rows = run(folder, tmp_path / "saved", "--vwt", json.dumps({"keep_ratio": 0.1}), "--max-new-tokens", "4")
    processor, captions = load_processor(str(folder)), dataset["caption"][:]
    pixels = processor(images=list(dataset["image"]), return_tensors="pt")["pixel_values"]
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": 1}
    with torch.no_grad():
        plain, short = (
            [text.strip() for text in tokenizer.batch_decode(each.generate(pixels, **how), skip_special_tokens=True)]
            for each in (model, compress(built_like(model), {"keep_ratio": 0.1}))
        )
    assert any(plain)
    to_plain = {
        "same_caption": np.mean([a == b for a, b in zip(short, plain, strict=True)]),
        "plain_f1": np.mean([token_f1(a, [b]) for a, b in zip(short, plain, strict=True)]),
    }
    for row, texts, more in zip(rows, (plain, short), ({}, to_plain), strict=True):
        f1 = np.mean([token_f1(a, b) for a, b in zip(texts, captions, strict=True)])
        assert values(row) == pytest.approx({"token_f1": f1} | more)
    some = dataset.map(lambda row: {"caption": row["caption"] if row["id"] < 2 else []})
    of = {"task": "captions", "vwt": [], "max_new_tokens": 4, "progress": False, "tokenizer": tokenizer}
    assert evaluate_model(model, some, image_processor=processor, **of).said == [
        "15 images without a caption are left out of token_f1."
    ]


@pytest.mark.parametrize(
    ("make", "task", "reason"),
    [
        (lambda: built(llava), "captions", "writes about images within a prompt alone"),
        (lambda: tiny_model("vit"), "captions", "the ViTModel writes no captions"),
        (lambda: tiny_model("vit"), "retrieval", "the ViTModel has no tower for texts"),
        (lambda: tiny_model("vit"), "zero-shot", "the ViTModel has no tower for texts"),
        (lambda: tiny_model("vit"), "classification", "the ViTModel gives no labels but a pooler_output; expected"),
        (lambda: tiny_model("clip"), "classification", "the CLIPModel gives no labels"),
        (lambda: tiny_model("clip-classifier"), "features", r"answers with labels; .* such as its model\.vision_model"),
        (lambda: built(blip), "features", "writes texts and gives no features of images; expected its vision tower"),
        (lambda: tiny_model("vit"), "segmentation", "expected one of 'classification', 'zero-shot'"),
    ],
)
def test_a_task_that_a_model_is_not_for_is_refused(dataset, make, task, reason):
    given = {"image_processor": transformers.ViTImageProcessorPil(size=SIZE), "tokenizer": object()}
    with pytest.raises(ValueError, match=reason):
        evaluate_model(make(), dataset, vwt=[{"keep_ratio": 0.5, "dropped": "merge"}], task=task, **given)


def spoilt(model: transformers.PreTrainedModel, name: str) -> transformers.PreTrainedModel:
    """`model` with NaN in one of its parameters."""
    model.get_parameter(name).data[:1] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "parameter", "of"),
    [
        (lambda: tiny_model("vit-classifier", num_labels=3), "classifier.bias", r"\w+\.png"),
        (lambda: tiny_model("dinov2"), "layernorm.bias", r"\w+\.png"),
        (lambda: built(blip), "text_decoder.cls.predictions.decoder.bias", r"\w+\.png"),
        (lambda: tiny_model("clip"), "visual_projection.weight", r"\w+\.png"),
        (lambda: tiny_model("clip"), "text_projection.weight", "'a photo of a cat.'"),
    ],
)
def test_a_model_that_answers_nan_is_refused_with_what_it_answers_so(photographs, model, parameter, of):
    names = {"<pad>": 0, "<s>": 97, "</s>": 98}
    given = {"image_processor": transformers.ViTImageProcessorPil(size=SIZE), "tokenizer": tokenizer_with(names)}
    with pytest.raises(ValueError, match=f"the plain model, in float32, answers .*{of} by NaN or infinity; expected"):
        evaluate_model(spoilt(model(), parameter), photographs, vwt=[HALF], max_new_tokens=2, progress=False, **given)


def test_a_setting_under_which_a_model_answers_infinity_is_refused_and_named(tmp_path, photographs):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)

    def overflow(module, args, output):
        output.logits[4:] /= setting_of(module) is None

    model.register_forward_hook(overflow)
    with pytest.raises(
        ValueError, match=r"model shortened by VWTConfig\(.*, in float32, answers .*08.png by NaN or inf"
    ):
        evaluate_model(model, photographs, vwt=[HALF], progress=False)
    assert evaluate_model(model, photographs, vwt=[], progress=False).images == 17


def one_logit(folder: Path) -> transformers.PreTrainedModel:
    """A classifier of one label, cats, which about half of the tests' images get."""
    model = loaded(random_classifier(folder), transformers.AutoModelForImageClassification)
    model.classifier.weight.data = model.classifier.weight.data[:1]
    model.classifier.bias.data = model.classifier.bias.data[:1]
    model.config.id2label, model.config.label2id = {0: "cat"}, {"cat": 0}
    return model


def test_one_logit_is_answered_by_its_sign(tmp_path, photographs, dataset):
    model, pixels = one_logit(tmp_path), pixels_of(photographs, tmp_path / "model")
    result = evaluate_model(model, photographs, vwt=[HALF], progress=False)
    with torch.no_grad():
        plain = model(pixels).logits[:, 0].double()
        short = compress(model, HALF)(pixels).logits[:, 0].double()
    yes, found = plain > 0, values(result.rows[1])
    assert 0 < yes.sum() < 17 and found["agreement"] == pytest.approx(((short > 0) == yes).double().mean().item())
    kl = sum((sign * plain).sigmoid() * ((sign * plain).sigmoid() / (sign * short).sigmoid()).log() for sign in (-1, 1))
    assert found["kl"] == pytest.approx(kl.mean().item()) and found["kl"] > 0
    assert values(result.rows[0])["accuracy"] == pytest.approx(yes[:9].double().mean().item())  # those of cats
    numbers = dataset.map(lambda row: {"label": 1 - row["label"]}).cast_column("label", datasets.Value("int64"))
    is_cat = torch.tensor([True] * 9 + [False] * 8)
    found = evaluate_model(model, numbers, vwt=[], progress=False)
    assert values(found.rows[0])["accuracy"] == pytest.approx((yes == is_cat).double().mean().item())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"id2label": {1: "cat", 2: "dogs", 3: "tea"}}, "label 0 of the ViTForImageClassification has no name"),
        ({"problem_type": "regression"}, "has problem_type 'regression': it gives quantities"),
        ({"problem_type": "multi_label_classification"}, "it gives each image any number of labels"),
    ],
)
def test_a_classifier_without_labels_is_refused_before_images_are_seen(
    tmp_path, photographs, monkeypatch, config, reason
):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    vars(model.config).update(config)
    shown = cut_off(monkeypatch, 0)
    with pytest.raises(ValueError, match=reason):
        evaluate_model(model, photographs, progress=False)
    assert not shown


def test_a_class_of_ones_own_is_for_what_the_class_it_is_made_from_is(tmp_path, photographs):
    class Mine(transformers.ViTForImageClassification):
        pass

    result = evaluate_model(loaded(random_classifier(tmp_path), Mine), photographs, vwt=[], progress=False)
    assert result.task == "classification" and "accuracy" in result.rows[0].figures


def test_torchs_defaults_change_no_figure(tmp_path, photographs):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)

    def figures():
        return [row.figures for row in evaluate_model(model, photographs, vwt=[HALF], progress=False).rows]

    expected = figures()
    with torch.device("meta"):
        assert figures() == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert figures() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_was_measured_is_json_ready_also_of_words_in_memory(photographs):
    words = VisualVocabulary(torch.rand(4, 3, 4, 4))
    setting = {"method": "inter", "vocabulary": words, "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    given = {"image_processor": transformers.ViTImageProcessorPil(size=SIZE), "progress": False}
    result = evaluate_model(tiny_model("vit"), photographs, vwt=[setting], **given)
    written = json.loads(json.dumps(result.to_dict()))["rows"][1]["vwt"]
    assert written == setting | {"vocabulary": str(words), "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def test_captions_may_lie_in_a_file_beside_the_images(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = sorted(photographs.rglob("*.png"))[:6]
    lines = [
        json.dumps({"file_name": file.relative_to(photographs).as_posix(), "caption": f"a {word}"})
        for file, word in zip(files, WORDS, strict=False)
    ]
    (photographs / "metadata.jsonl").write_text("\n".join(lines))
    folder = two_towers("clip", tmp_path)
    plain, _ = run(folder, photographs, "--task", "retrieval", "--vwt", json.dumps(HALF))
    assert values(plain)["text_to_image_recall@10"] == 1 and len(values(plain)) == 6


def built_like(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    copy = built(blip)
    copy.load_state_dict(model.state_dict())
    return copy


def test_a_model_without_a_head_is_measured_by_its_features(tmp_path, photographs):
    folder = saved(tiny_model("dinov2"), tmp_path / "model")
    plain, half = run(folder, photographs, "--vwt", json.dumps(HALF))
    model, pixels = loaded(folder), pixels_of(photographs, folder)
    with torch.no_grad():
        expected, found = model(pixels)[1], compress(model, HALF)(pixels)[1]
    cosine = torch.cosine_similarity(found, expected).mean().item()
    assert values(plain) == {} and values(half) == {"cosine": pytest.approx(cosine, abs=1e-6)} and cosine < 0.9999


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "vit-msn", "beit", "ijepa"])
def test_a_classifiers_features_are_those_of_the_model_below_its_head(tmp_path, photographs, name):
    model = tiny_model(f"{name}-classifier")
    folder = saved(model, tmp_path / "model")
    _, expected = run(folder, photographs, "--task", "features", "--vwt", json.dumps(HALF))
    _, found = evaluate_model(loaded(folder, type(model)), photographs, vwt=HALF, task="features", progress=False).rows
    assert values(found) == values(expected) and found.tokens == expected["tokens"] < 40


def test_images_that_cannot_be_read_are_named_and_left_out(tmp_path, photographs, dataset, capsys):
    folder = random_classifier(tmp_path)
    expected = run(folder, photographs, "--vwt", json.dumps(HALF))
    whole = (photographs / "cat" / "00.png").read_bytes()
    (photographs / "cat" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (photographs / "dogs" / "text.jpg").write_text("no image")
    capsys.readouterr()
    assert [values(row) for row in run(folder, photographs, "--vwt", json.dumps(HALF))] == [
        pytest.approx(values(row), abs=1e-6) for row in expected
    ]
    printed = capsys.readouterr().out
    assert "2 images could not be read and are left out:\n" in printed and "17 images of" in printed
    assert "broken.png cannot be read (OSError" in printed and "text.jpg cannot be read (Unidentified" in printed
    rows = dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[3]["image"]["bytes"] = b"no image"
    damaged = datasets.Dataset.from_list(rows, features=dataset.features)
    model = loaded(folder, transformers.AutoModelForImageClassification)
    result = evaluate_model(model, damaged, vwt=[HALF], progress=False)
    assert result.images == 16 and result.unreadable[0].startswith("row 3 cannot be read")
    with pytest.raises(ValueError, match=r"no image can be read of 1: row 0 cannot"):
        evaluate_model(model, damaged.select([3]), vwt=[HALF], progress=False)
    file = str(photographs / "dogs" / "text.jpg")
    named = datasets.Dataset.from_dict({"image": [file]}, features=datasets.Features({"image": datasets.Image()}))
    for images in (named, named.to_iterable_dataset()):
        with pytest.raises(ValueError, match=rf"of 1: row 0 \({re.escape(file)}\) cannot be read"):
            evaluate_model(model, images, vwt=[HALF], progress=False)


def test_photographs_that_lie_on_their_side_are_seen_upright(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    upright = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("upright", "sideways"):
        (tmp_path / name).mkdir()
    upright.save(tmp_path / "upright" / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways" / "a.png", exif=exif)
    folder = random_classifier(tmp_path)
    straight, turned = (
        values(run(folder, tmp_path / name, "--vwt", json.dumps(HALF))[1])["max_difference"]
        for name in ("upright", "sideways")
    )
    assert straight == turned > 0


def test_figures_go_into_the_model_index_of_a_card_and_come_back_from_it(tmp_path, photographs, capsys):
    folder, card = random_classifier(tmp_path), tmp_path / "README.md"
    card.write_text(
        "---\nlicense: mit\nmodel-index:\n- name: mine\n  results:\n  - task: {type: image-classification}\n"
        "    dataset: {name: other, type: other}\n    metrics: [{type: accuracy, value: 0.5}]\n---\n\n# Mine\n\nText.\n"
    )
    for seed in ("0", "1"):  # the second time in place of the first
        run(folder, photographs, "--vwt", json.dumps(HALF), "--card", str(card), "--seed", seed)
        assert "a model-index of 'mine', and what is measured is 'model': its" in capsys.readouterr().err
    found = huggingface_hub.ModelCard(card.read_text())
    assert found.text.strip() == "# Mine\n\nText." and found.data.license == "mit" and found.data.model_name == "mine"
    results = found.data.eval_results
    own = [result for result in results if result.dataset_type == "images"]
    assert len(own) == 2 + len(FIGURES) == len(results) - 1  # of the plain model none that compare with it
    name, back = model_index_to_eval_results(eval_results_to_model_index("mine", results))
    assert name == "mine" and back == results
    model = loaded(folder, transformers.AutoModelForImageClassification)
    expected = evaluate_model(model, photographs, vwt=[HALF], seed=1, progress=False)
    assert own == expected.eval_results()
    assert own[2].metric_args["vwt"] == HALF and own[2].metric_name == "accuracy (keep ratio 0.5)"
    run(folder, photographs, "--vwt", json.dumps(HALF), "--card", str(tmp_path / "new" / "README.md"))
    assert huggingface_hub.ModelCard.load(tmp_path / "new" / "README.md").data.eval_results[0].metric_type == "accuracy"


def test_figures_of_other_images_in_a_card_are_not_replaced(tmp_path, photographs, capsys, monkeypatch):
    folder, card = random_classifier(tmp_path), tmp_path / "README.md"
    run(folder, photographs, "--vwt", json.dumps(HALF), "--card", str(card))
    before = card.read_text()
    some = ["--vwt", json.dumps(HALF), "--card", str(card), "--limit", "9"]
    with monkeypatch.context() as patch:
        shown = cut_off(patch, 0)
        assert main(["evaluate", str(folder), "--dataset", str(photographs), *some]) == 2
    assert not shown and card.read_text() == before
    assert "the card has figures of 17 images of 'images', and there are 9 now" in capsys.readouterr().err
    run(folder, photographs, *some, "--dataset-name", "a part")
    results = huggingface_hub.ModelCard(card.read_text()).data.eval_results
    assert {(own.dataset_name, own.metric_args["images"]) for own in results} == {("images", 17), ("a part", 9)}


def test_a_saved_data_set_is_called_by_its_folder(tmp_path, photographs, dataset):
    folder, card = random_classifier(tmp_path), tmp_path / "README.md"
    for name in ("a", "b"):
        dataset.save_to_disk(tmp_path / name)
        run(folder, tmp_path / name, "--vwt", json.dumps(HALF), "--card", str(card))
    results = huggingface_hub.ModelCard.load(card).data.eval_results
    assert {own.dataset_name for own in results} == {"a", "b"} and len(results) == 2 * (2 + len(FIGURES))


IMAGES_OF_ANOTHER_NAME = """---
model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {type: images, name: Images}
    metrics: [{type: accuracy, value: 0.5}]
---
"""
TWO_SOURCES = """---
model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {type: other, name: other}
    metrics: [{type: accuracy, value: 0.5}]
    source: {name: a, url: "https://a"}
  - task: {type: image-classification}
    dataset: {type: other, name: other}
    metrics: [{type: accuracy, value: 0.6}]
---
"""


@pytest.mark.parametrize("card", [IMAGES_OF_ANOTHER_NAME, TWO_SOURCES])
def test_figures_under_anothers_name_or_source_stay_as_they_are(tmp_path, photographs, card):
    file = tmp_path / "README.md"
    file.write_text(card)
    before = yaml.safe_load(card.strip("-\n"))["model-index"][0]["results"]
    run(random_classifier(tmp_path), photographs, "--vwt", json.dumps(HALF), "--card", str(file))
    (mine,) = yaml.safe_load(file.read_text().strip("-\n"))["model-index"]
    *theirs, own = mine["results"]
    assert theirs == before and own["dataset"]["name"] == "images" and len(own["metrics"]) == 2 + len(FIGURES)


def test_a_card_keeps_its_line_ends_and_its_metadata_after_a_byte_order_mark(tmp_path, photographs):
    card = tmp_path / "README.md"
    card.write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n\r\n# Mine\r\n")
    run(random_classifier(tmp_path), photographs, "--vwt", json.dumps(HALF), "--card", str(card))
    written = card.read_bytes()
    assert written.count(b"---\r\n") == 2 and written.count(b"\n") == written.count(b"\r\n")
    found = huggingface_hub.ModelCard.load(card)
    assert found.data.license == "mit" and found.text.strip() == "# Mine" and found.data.eval_results


@pytest.mark.parametrize(("limit", "rows"), [(9, 0), (20, 11)])
def test_figures_of_more_images_of_a_stream_are_not_replaced(limit, rows, tmp_path, dataset, capsys, monkeypatch):
    """Those of 17; where 20 may be 17, once the images are counted: what was measured is printed before."""
    streamed = dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed.to_iterable_dataset())
    folder, card = random_classifier(tmp_path), tmp_path / "README.md"
    given = ["evaluate", str(folder), "--dataset", "me/photos", "--split", "train", "--streaming", "--card", str(card)]
    given += ["--vwt", json.dumps(HALF)]
    assert main(given) == 0
    before, _ = card.read_text(), capsys.readouterr()
    streamed = dataset.select(range(11))
    assert main([*given, "--limit", str(limit)]) == 2
    said = capsys.readouterr()
    assert f"figures of 17 images of 'me/photos', and there are {rows or limit} now" in said.err
    assert card.read_text() == before and ("11 images of me/photos" in said.out) == bool(rows)


def test_a_card_that_cannot_be_written_costs_nothing_that_was_measured(tmp_path, photographs, capsys, monkeypatch):
    folder, card, measured = random_classifier(tmp_path), tmp_path / "README.md", tmp_path / "rows.json"
    evaluate = sys.modules["vwt_hf.evaluate_model"].evaluate_model

    def meanwhile(*args, **options):
        card.write_text("---\n[a: b\n---\n")  # by somebody else, while it is measured
        return evaluate(*args, **options)

    monkeypatch.setattr(sys.modules["vwt_hf.evaluate_model"], "evaluate_model", meanwhile)
    given = ["--vwt", json.dumps(HALF), "--json", str(measured), "--card", str(card)]
    assert main(["evaluate", str(folder), "--dataset", str(photographs), *given]) == 2
    printed = capsys.readouterr()
    assert "| keep ratio 0.5 |" in printed.out and len(json.loads(measured.read_text())["rows"]) == 2
    assert "README.md is no model card (" in printed.err and card.read_text() == "---\n[a: b\n---\n"


def test_a_report_that_cannot_be_written_costs_neither_the_table_nor_the_card(
    tmp_path, photographs, capsys, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "rows.json")

    folder, card = random_classifier(tmp_path), tmp_path / "README.md"
    monkeypatch.setattr(evaluate, "write_file", full)
    given = ["--vwt", json.dumps(HALF), "--json", str(tmp_path / "rows.json"), "--card", str(card)]
    assert main(["evaluate", str(folder), "--dataset", str(photographs), *given]) == 2
    printed = capsys.readouterr()
    assert "| keep ratio 0.5 |" in printed.out and "No space left on device: 'rows.json'" in printed.err
    assert huggingface_hub.ModelCard.load(card).data.eval_results


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_run_with_a_batch_of_which_no_image_could_be_read_is_gone_on_with(tmp_path, photographs, batch_size):
    model = tiny_model("vit-classifier")
    for path in sorted(photographs.rglob("*.png"))[-4:]:
        path.write_bytes(b"broken")
    of = {"vwt": [HALF], "batch_size": batch_size, "progress": False, "resume": tmp_path / "measured"}
    of["image_processor"] = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    first, second = (evaluate_model(model, photographs, **of) for _ in range(2))
    assert len(first.unreadable) == 4 and first.images == 13
    assert [row.figures for row in first.rows] == [row.figures for row in second.rows]


def test_of_two_outputs_that_cannot_be_written_both_are_named(tmp_path, photographs, capsys, monkeypatch):
    def full(file: object, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", os.fspath(file))

    for module in (evaluate, model_card):
        monkeypatch.setattr(module, "write_file", full)
    given = ["--vwt", json.dumps(HALF), "--json", str(tmp_path / "rows.json"), "--card", str(tmp_path / "README.md")]
    assert main(["evaluate", str(random_classifier(tmp_path)), "--dataset", str(photographs), *given]) == 2
    printed = capsys.readouterr()
    assert "| keep ratio 0.5 |" in printed.out
    assert "warning: [Errno 28] No space left on device" in printed.err and "README.md" in printed.err
    assert printed.err.splitlines()[-1].endswith("rows.json'")


def test_a_log_that_the_disk_has_no_room_for_is_named(tmp_path, photographs, capsys, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no device that is always full")
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **how: opened(Path("/dev/full") if mode == "ab" else path, mode, **how)
    )
    given = ["--vwt", json.dumps(HALF), "--resume", str(tmp_path / "log")]
    assert main(["evaluate", str(random_classifier(tmp_path)), "--dataset", str(photographs), *given]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"No space left on device, while it was written: '{tmp_path / 'log' / 'evaluate-0.jsonl'}'")


def test_images_that_are_opened_already_are_taken_as_they_are(tmp_path, photographs, monkeypatch):
    folder = random_classifier(tmp_path)
    model = loaded(folder, transformers.AutoModelForImageClassification)
    of = {"vwt": [HALF], "progress": False}
    expected = evaluate_model(model, photographs, limit=5, **of)
    opened = open_labelled(photographs, limit=5)
    with pytest.raises(ValueError, match="limit is 3, and images is opened; give it to open_labelled"):
        evaluate_model(model, opened, limit=3, **of)
    monkeypatch.setattr(sys.modules["vwt_hf.evaluate_model"], "open_labelled", pytest.fail)
    found = evaluate_model(model, opened, **of)
    assert found.images == 5 and [row.figures for row in found.rows] == [row.figures for row in expected.rows]
    rows = run(folder, photographs, "--vwt", json.dumps(HALF), "--limit", "5")  # the command opens them once
    assert [values(row) for row in rows] == [values(row) for row in expected.rows]


@pytest.mark.parametrize("setting", [False, None])
def test_a_setting_that_leaves_the_model_plain_is_refused(photographs, setting):
    with pytest.raises(ValueError, match=f"vwt holds {setting}, which leaves the model plain; leave it out"):
        evaluate_model(tiny_model("vit-classifier"), photographs, vwt=[HALF, setting])


def test_what_was_measured_is_written_also_where_nobody_reads_what_is_printed(tmp_path, photographs, monkeypatch):
    def gone(result):
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, "report", gone)
    file, card = tmp_path / "rows.json", tmp_path / "README.md"
    given = ["evaluate", str(random_classifier(tmp_path)), "--dataset", str(photographs), "--json", str(file)]
    given += ["--card", str(card)]
    with monkeypatch.context() as patch:
        patch.setattr("os.dup2", lambda *of: None)  # of the tests' own output
        assert main(given) == 141
    assert len(json.loads(file.read_text())["rows"]) == 2 and huggingface_hub.ModelCard.load(card).data.eval_results


def test_the_script_compare_writes_the_figures_as_bare_numbers(tmp_path, photographs, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import compare

    folder, file = random_classifier(tmp_path), tmp_path / "compared.json"
    given = ["--model", str(folder), "--images", str(photographs), "--vwt", json.dumps(HALF), "--json", str(file)]
    compare.main(given)
    plain, half = json.loads(file.read_text())["rows"]
    expected = run(folder, photographs, "--vwt", json.dumps(HALF), "--task", "classification")
    assert plain["setting"] == "uncompressed" and half["vwt"] == HALF and half["tokens"] == expected[1]["tokens"]
    for row, own in ((plain, expected[0]), (half, expected[1])):
        found = values(own)
        assert row["top-1 %"] == round(100 * found["accuracy"], 2)
        assert row.get("agree %") == (round(100 * found["agreement"], 2) if own is expected[1] else None)
    with pytest.raises(SystemExit) as end:
        compare.main(["--model", str(folder), "--images", str(tmp_path / "nowhere"), "--vwt", "true"])
    assert end.value.code == 2


PROGRAM = """
import json, sys
import datasets, transformers
from accelerate import PartialState
from vwt_hf import cli, evaluate_model

classifier, towers, images, saved, output = sys.argv[1:]
half = {"keep_ratio": 0.5}
given = ["evaluate", classifier, "--dataset", images, "--vwt", json.dumps(half), "--batch-size", "4"]
given += ["--resume", output.replace("out", "measured")]
destroy, PartialState.destroy_process_group = PartialState.destroy_process_group, lambda state: None
assert cli.main([*given, "--json", f"{output}.command"]) == 0  # the processes are joined by it

dataset = datasets.load_from_disk(saved)
auto = transformers.AutoModelForImageClassification
found = [
    evaluate_model(model.eval(), images, vwt=[half], batch_size=4, progress=False)
    for model, images in (
        (auto.from_pretrained(classifier), dataset.to_iterable_dataset(num_shards=2)),
        (transformers.AutoModel.from_pretrained(towers), dataset.remove_columns("label")),
    )
]
rows = [[row.figures | {"tokens": row.tokens} for row in one.rows] for one in found]
json.dump(rows, open(f"{output}.{PartialState().process_index}", "w"), default=vars)
destroy(PartialState())
"""


@pytest.mark.newest
def test_two_processes_give_the_figures_of_one(tmp_path, photographs, dataset, monkeypatch):
    """17 images and one that cannot be read, in batches of 4: five batches of which one process gets three."""
    folder, towers = random_classifier(tmp_path), two_towers("clip", tmp_path)
    (photographs / "dogs" / "broken.png").write_bytes(b"no image")
    dataset.save_to_disk(tmp_path / "saved")
    (tmp_path / "program.py").write_text(PROGRAM)
    given = [folder, towers, photographs, tmp_path / "saved", tmp_path / "out"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, tmp_path / "program.py", *given],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| uncompressed |") == 1 and "1 images could not be read" in done.stdout
    auto = transformers.AutoModelForImageClassification
    expected = [
        evaluate_model(model, images, vwt=[HALF], batch_size=4, progress=False)
        for model, images in (
            (loaded(folder, auto), dataset.to_iterable_dataset(num_shards=2)),
            (loaded(towers), dataset.remove_columns("label")),
        )
    ]
    first, second = (json.loads((tmp_path / f"out.{rank}").read_text()) for rank in range(2))
    assert first == second
    for one, of in zip(first, expected, strict=True):
        for row, wanted in zip(one, of.rows, strict=True):
            assert row.pop("tokens") == wanted.tokens
            assert values({"figures": row}) == pytest.approx(values(wanted), abs=1e-5)
    command = json.loads((tmp_path / "out.command").read_text())
    assert command["machine"]["processes"] == 2 and command["images"] == 17 and len(command["unreadable"]) == 1
    alone = run(folder, photographs, "--vwt", json.dumps(HALF), "--batch-size", "4")
    assert [row["figures"] for row in command["rows"]] == [row["figures"] for row in alone]
    # What two have measured one goes on from: nothing is missing but the batch with the image that cannot be read.
    assert len(list((tmp_path / "measured").iterdir())) == 2
    shown, resume = cut_off(monkeypatch, -1), ["--resume", str(tmp_path / "measured")]
    alone = run(folder, photographs, "--vwt", json.dumps(HALF), "--batch-size", "4", *resume)
    assert [row["figures"] for row in command["rows"]] == [row["figures"] for row in alone] and shown == [1]


def cut_off(monkeypatch, after: int) -> list[int]:
    """Stops the next evaluation after so many batches; gives the images of each batch that is shown to models."""
    shown, show = [], evaluate_module._answers

    def watched(task, models, made, names):
        if len(shown) == after:
            raise KeyboardInterrupt
        shown.append(len(names))
        return show(task, models, made, names)

    monkeypatch.setattr(evaluate_module, "_answers", watched)
    return shown


@pytest.mark.parametrize("form", ["folder", "data set", "stream"])
def test_a_run_that_was_cut_off_goes_on_and_ends_with_the_figures_of_one(
    tmp_path, photographs, dataset, form, monkeypatch
):
    """17 images, in a folder also one that cannot be read, in batches of 4; the first run is stopped in the third."""
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    if form == "folder":
        mended = (photographs / "cat" / "02.png").read_bytes()
        (photographs / "cat" / "03.png").write_bytes(bytes(len(mended)))
    images = {"folder": photographs, "data set": dataset, "stream": dataset.to_iterable_dataset(num_shards=3)}[form]
    of = {"vwt": [HALF, True], "batch_size": 4, "progress": False}
    expected = evaluate_model(model, images, **of)
    shown, resume = cut_off(monkeypatch, 2), tmp_path / "measured"
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(model, images, **of, resume=resume)
    (file,) = resume.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])  # as a kill leaves it
    monkeypatch.undo()
    shown = cut_off(monkeypatch, -1)
    found = evaluate_model(model, images, **of, resume=resume)
    # The second batch again, whose line was cut short; in the folder the first, too, with the image that is none.
    again = [3] if form == "folder" else []
    assert shown == [*again, 4, 4, 4, 2 if again else 1]
    assert [row.figures for row in found.rows] == [row.figures for row in expected.rows]
    assert [row.tokens for row in found.rows] == [row.tokens for row in expected.rows]
    assert (found.images, found.unreadable, found.said) == (expected.images, expected.unreadable, expected.said)
    assert all(row.seconds > 0 for row in found.rows)
    shown.clear()
    assert [row.figures for row in evaluate_model(model, images, **of, resume=resume).rows] == [
        row.figures for row in expected.rows
    ]
    assert shown == again
    if form == "folder":
        (photographs / "cat" / "03.png").write_bytes(mended)
        shown.clear()
        found = evaluate_model(model, images, **of, resume=resume)
        assert (shown, found.images, found.unreadable) == ([4], 18, [])
        shown.clear()
        assert evaluate_model(model, images, **of, resume=resume).rows[1].figures == found.rows[1].figures
        assert not shown


def test_a_log_of_which_a_kill_left_no_whole_line_is_gone_on_with(tmp_path, photographs):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    of = {"vwt": [HALF], "batch_size": 8, "progress": False, "resume": tmp_path / "measured"}
    expected = evaluate_model(model, photographs, **of)
    (file,) = (tmp_path / "measured").iterdir()
    file.write_bytes(file.read_bytes()[:30])
    for _ in range(2):  # what is measured now follows the line that was cut short, and is read the second time
        found = evaluate_model(model, photographs, **of)
        assert [row.figures for row in found.rows] == [row.figures for row in expected.rows]


def test_a_log_is_in_its_file_before_it_is_closed(tmp_path):
    """A kill closes nothing."""
    log = BatchLog(tmp_path, 0, {"batch_size": 8})
    log.add(Batch(0, [], ["one.png: no image"], [], [TokenCount([])], [0.0]))
    of, batch = map(json.loads, (tmp_path / "evaluate-0.jsonl").read_text().splitlines())
    assert of == {"of": {"batch_size": 8}} and batch["unreadable"] == ["one.png: no image"]


@pytest.mark.parametrize("task", ["retrieval", "captions"])
def test_texts_and_features_are_gone_on_from_as_they_were(tmp_path, dataset, task, monkeypatch):
    if task == "retrieval":
        model = loaded(two_towers("clip", tmp_path))
    else:
        folder = saved(built(blip), tmp_path / "captioner")
        tokenizer_with({"<pad>": 0, "<s>": 1, "</s>": 97}).save_pretrained(folder)
        model = loaded(folder, transformers.AutoModelForImageTextToText)
    of = {"vwt": [HALF], "task": task, "batch_size": 6, "max_new_tokens": 4, "progress": False}
    expected = evaluate_model(model, dataset, **of)
    cut_off(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(model, dataset, **of, resume=tmp_path / "measured")
    monkeypatch.undo()
    found = evaluate_model(model, dataset, **of, resume=tmp_path / "measured")
    assert [row.figures for row in found.rows] == [row.figures for row in expected.rows]


def test_a_stream_that_has_grown_or_shrunk_is_gone_on_with_as_it_is_now(tmp_path, dataset, monkeypatch):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    of = {"vwt": HALF, "batch_size": 4, "progress": False}
    shown = cut_off(monkeypatch, -1)
    for rows, again in ((6, [4, 2]), (17, [4, 4, 4, 1]), (5, [1]), (17, [4])):
        stream = dataset.select(range(rows)).to_iterable_dataset()
        expected = evaluate_model(model, stream, **of)
        shown.clear()
        found = evaluate_model(model, stream, **of, resume=tmp_path / "measured")
        assert found.images == rows and [row.figures for row in found.rows] == [row.figures for row in expected.rows]
        assert shown == again


def test_rows_of_a_stream_that_moved_are_measured_again(tmp_path, dataset, monkeypatch):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    bare = dataset.select_columns("image")  # of which nothing but the images tells rows apart
    of = {"vwt": HALF, "batch_size": 4, "progress": False}
    shown = cut_off(monkeypatch, -1)
    for rows, again in (((0, 1, 2, 3, 8, 9, 10, 11), [4, 4]), ((0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), [4, 4])):
        stream = bare.select(rows).to_iterable_dataset()
        expected = evaluate_model(model, stream, **of)
        shown.clear()
        found = evaluate_model(model, stream, **of, resume=tmp_path / "measured")
        assert [row.figures for row in found.rows] == [row.figures for row in expected.rows] and shown == again


@pytest.mark.parametrize("order", [range(17), range(16, -1, -1)], ids=["as stored", "reversed"])
def test_rows_whose_files_were_replaced_are_measured_again(tmp_path, photographs, dataset, monkeypatch, order):
    """Batches of 4. Every fourth row holds its image, the others name files."""
    model = loaded(random_classifier(tmp_path), AUTO)
    files = sorted(photographs.rglob("*.png"))
    stored = [
        str(file) if index % 4 else {"path": None, "bytes": file.read_bytes()} for index, file in enumerate(files)
    ]
    images = datasets.Dataset.from_dict({"image": stored}, features=dataset.select_columns("image").features)
    images = images.select(order)
    of = {"vwt": HALF, "batch_size": 4, "progress": False}
    measured = cut_off(monkeypatch, -1)

    def again() -> list[int]:
        measured.clear()
        figures[:] = [row.figures for row in evaluate_model(model, images, **of, resume=tmp_path / "measured").rows]
        return list(measured)

    figures: list[dict] = []
    away = files[1].rename(tmp_path / "away.png")
    assert sorted(again()) == [1, 3, 4, 4, 4]
    away.rename(files[1])  # it is in reach
    assert again() == [4] and again() == []
    for index in (8, 9):  # the row of one holds a copy
        Image.open(files[index]).rotate(90).resize((90, 70)).save(files[index])
    assert again() == [4]
    assert figures == [row.figures for row in evaluate_model(model, images, **of).rows]
    files[9].unlink()  # on a drive that is gone now
    assert again() == []


class PlantNet(transformers.ViTPreTrainedModel):
    """A classifier of a user's own, whose class does not say that it is one."""

    def __init__(self, config):
        super().__init__(config)
        self.vit = transformers.ViTModel(config, add_pooling_layer=False)
        self.head = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        return SimpleNamespace(logits=self.head(self.vit(pixel_values, **kwargs)[0][:, 0]))


def test_a_classifier_of_a_user_s_own_is_evaluated_where_the_task_is_named(tmp_path, photographs):
    folder = random_classifier(tmp_path)
    usual = loaded(folder, transformers.AutoModelForImageClassification)
    own = PlantNet(usual.config).eval()
    own.vit, own.head = usual.vit, usual.classifier
    of = {
        "vwt": HALF,
        "task": "classification",
        "progress": False,
        "image_processor": transformers.ViTImageProcessorPil(size=SIZE),
    }
    found, expected = (evaluate_model(model, photographs, **of) for model in (own, usual))
    assert [row.figures for row in found.rows] == [row.figures for row in expected.rows]


@pytest.mark.parametrize("vwt", [HALF, True, vwt_hf.VWTConfig("gradual", tolerance=0.1)], ids=type)
def test_a_setting_by_itself_is_a_list_of_one(tmp_path, photographs, vwt):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    alone, listed = (evaluate_model(model, photographs, vwt=of, progress=False) for of in (vwt, [vwt]))
    assert [(row.setting, row.figures) for row in alone.rows] == [(row.setting, row.figures) for row in listed.rows]
    with pytest.raises(TypeError, match="vwt is 7; expected a setting or a list of settings"):
        evaluate_model(model, photographs, vwt=7, progress=False)


def test_files_that_are_missing_or_something_else_are_named_before_the_work(tmp_path, photographs, monkeypatch):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(evaluate_module, "_copies", pytest.fail)
    for options, reason in (
        ({"groups": tmp_path / "no.json"}, "no.json, which cannot be read as JSON .*No such file"),
        ({"resume": tmp_path / "file"}, "file is no folder; expected one to write into"),
        ({"resume": ""}, "No folder is named"),
        ({"groups": {"cat/00.png": "one"}}, "groups is a dict; expected the name of a JSON file"),
    ):
        with pytest.raises((TypeError, ValueError, NotADirectoryError), match=reason):
            evaluate_model(model, photographs, progress=False, **options)
    assert (tmp_path / "file").read_text() == "old"


def test_what_was_measured_of_something_else_is_refused_and_says_what_differs(tmp_path, photographs, dataset):
    model = loaded(random_classifier(tmp_path), transformers.AutoModelForImageClassification)
    resume = tmp_path / "measured"
    of = {"batch_size": 8, "progress": False, "resume": resume}
    evaluate_model(model, photographs, vwt=[HALF], **of)
    other = loaded(tmp_path / "model", transformers.AutoModelForImageClassification)
    other.classifier.weight.data += 1
    larger = transformers.ViTImageProcessorPil(size={"height": 36, "width": 36})
    for one, images, more, reason in (
        (model, photographs, {"vwt": [True]}, "settings: .*gradual"),
        (model, photographs, {"vwt": [HALF], "batch_size": 4}, "batch_size 8 there, 4 here"),
        (model, photographs, {"vwt": [HALF], "limit": 9}, "images 'a folder of 17 .* there, 'a folder of 9 .* here"),
        (model, dataset, {"vwt": [HALF]}, "images 'a folder of .* here"),
        (other, photographs, {"vwt": [HALF]}, "model 'ViTForImageClassification .* here"),
        (model, photographs, {"vwt": [HALF], "image_processor": larger}, "image_processor: size: height 32 there"),
    ):
        with pytest.raises(
            ValueError, match=f"evaluate-0.jsonl holds no batches of this evaluation .*{reason}.*name another folder"
        ):
            evaluate_model(one, images, **of | more)
    whole = (resume / "evaluate-0.jsonl").read_text()
    for field, value in (
        ("answers", []), ("answers", [{}]), ("counts", []), ("seconds", []), ("seconds", ["x", "y"]),
        ("unreadable", None), ("samples", []), ("number", "0"),
    ):  # fmt: skip
        lines = [json.loads(line) for line in whole.splitlines()]
        for line in lines:
            line |= {field: value} if field in line else {}
        (resume / "evaluate-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError, match=r"holds no batches of this evaluation \((?!it is of another)"):
            evaluate_model(model, photographs, vwt=[HALF], **of)
    (resume / "evaluate-0.jsonl").write_text(whole.partition("\n")[2])
    with pytest.raises(ValueError, match="it does not say what its batches are of"):
        evaluate_model(model, photographs, vwt=[HALF], **of)
    (resume / "evaluate-0.jsonl").write_text(whole)
    with (photographs / "cat" / "00.png").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"images 'a folder of 17 .* there, 'a folder of 17 .* here"):
        evaluate_model(model, photographs, vwt=[HALF], **of)
    for content in ('{"number": 0}', '{"of": 1}', "[1]", '{"of": {}, "number": 0}', "[" * 100_000):
        (resume / "evaluate-0.jsonl").write_text(content + "\n")
        with pytest.raises(ValueError, match="holds no batches of this evaluation"):
            evaluate_model(model, photographs, vwt=[HALF], **of)


def test_what_was_measured_of_another_stream_is_refused(tmp_path, dataset, capsys):
    model = random_classifier(tmp_path)
    for name in ("one", "two"):
        dataset.save_to_disk(tmp_path / name)
    given = ["--streaming", "--batch-size", "8", "--resume", str(tmp_path / "measured")]
    assert run(model, tmp_path / "one", *given) == run(model, tmp_path / "one", *given)
    assert main(["evaluate", str(model), "--dataset", str(tmp_path / "two"), *given]) == 2
    assert "images of a stream" in capsys.readouterr().err
    streams = [dataset.to_iterable_dataset() for _ in range(2)]
    for stream, split in zip(streams, ("train", "test"), strict=True):
        stream.info.splits = None
        stream._split = datasets.NamedSplit(split)
    assert open_labelled(streams[0]).order(1) != open_labelled(streams[1]).order(1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--resume", "{model}/list.json"], "list.json is no folder; expected one to write into"),
        (["--json", "{images}"], "images is a folder; expected the name of a file to write"),
        (["--card", "{images}"], "images is a folder; expected the name of a file to write"),
        (["--card", "{model}/broken.md"], "broken.md is no model card (while parsing"),
        (
            ["--card", "{model}/list.md"],
            "list.md is no model card (its metadata is a list; expected names",
        ),
        (["--seed", "-1"], "seed is -1; expected a whole number in [0, 2**63)"),
        (["--groups", "{model}/deep.json"], "deep.json, which cannot be read as JSON (maximum recursion depth"),
        (
            ["--groups", ""],
            "groups is ., which cannot be read as JSON ([Errno 21] Is a directory: '.'); expected",
        ),
        (["--dataset", ""], "no images are named, but an empty text; expected a folder of images"),
        (["--vwt", "false"], "vwt holds False, which leaves the model plain; leave it out"),
        (["--vwt", '{{"keep_ratio": 2}}'], "keep_ratio is 2; expected a number in (0, 1]"),
        (["--device", "abacus"], "device is 'abacus'"),
        (["--groups", "{model}/config.json"], "names no group of 17 of 17 images, such as 'cat/00.png'; expected"),
        (["--groups", "{model}/null.json"], "names no group of 17 of 17 images, such as 'cat/00.png'; expected"),
        (["--groups", "{model}/list.json"], "list.json, which holds a list; expected an object"),
        (["--dataset", "{images}/nothing"], "nothing does not exist; expected a folder of images, a data set saved"),
        (["--dataset", "{model}/list.json"], "list.json is a file; expected a folder of images, a data set saved"),
        (["--split", "test"], "--split: of data sets alone, and"),
        (["--label-column", "kind"], "a column for label is for data sets"),
        (["--dataset", "{saved}", "--label-column", "kind"], "no column 'kind' for label; its columns are id, image"),
        (["--dataset", "{saved}", "--image-column", "id"], "no column of images 'id'"),
        (["--dataset", "{saved}", "--split", "test"], "has no split 'test'; its splits are one, two"),
        (["--dataset", "{model}/../nothing"], "nothing holds no image files"),
        (["--dataset-name", ""], "--dataset-name is an empty text; expected a name"),
        (
            ["--task", "captions"],
            "is a model of type vit, and the task captions needs one that AutoModelForImageTextToText",
        ),
        (["--limit", "0"], "limit is 0; expected a whole number of at least 1"),
        (["--batch-size", "0"], "batch_size is 0; expected a whole number of at least 1"),
        (["--prompt", "a photo"], "prompt is 'a photo'; expected a text with one"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, photographs, dataset, capsys, monkeypatch, options, reason):
    folder = classifier(tmp_path, {0: "cat", 1: "dogs"})
    (folder / "list.json").write_text("[1]")
    (folder / "null.json").write_text(json.dumps({f"{LABELS[i % 2]}/{i:02}.png": None for i in range(17)}))
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "broken.md").write_text("---\n[a: b\n---\n")
    (folder / "list.md").write_text("---\n- a\n---\n")
    (tmp_path / "nothing").mkdir()
    saved_as = tmp_path / "empty" / "saved"
    splits = datasets.DatasetDict({"one": dataset, "two": dataset}) if "--split" in options else dataset
    splits.save_to_disk(saved_as)
    names = {"images": photographs, "model": folder, "saved": saved_as}
    monkeypatch.setattr("vwt_hf.cli.evaluate.load", pytest.fail)  # before a model is loaded
    capsys.readouterr()
    given = [option.format(**names) for option in options]
    assert main(["evaluate", str(folder), "--dataset", str(photographs), *given]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("vwt-hf evaluate: ") and reason in said[-1]


@pytest.mark.parametrize("column", ["label", "labels"])
def test_masks_that_are_called_labels_are_none_and_are_not_read(column):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    features = datasets.Features({"image": datasets.Image(), column: datasets.Image()})
    rows = {"image": images, column: [{"bytes": b"no image", "path": None}] * 2}
    data = datasets.Dataset.from_dict(rows, features=features)
    opened = open_labelled(data)
    assert "label" not in opened.columns and opened.label_names is None
    assert [sample.label for _, batch in opened.batches(0, 1, 2) for sample in batch] == [None] * 2
    with pytest.raises(ValueError, match=f"column '{column}' holds images; name another for label"):
        open_labelled(data, label_column=column)


def test_numbers_with_an_empty_cell_among_them_are_labels_by_number(tmp_path, photographs, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = classifier(tmp_path, {0: "tea", 1: "dogs", 2: "cat"})  # which answers 0
    files = [file.relative_to(photographs).as_posix() for file in sorted(photographs.rglob("*.png"))]
    lines = [
        f"{file},{'' if index == 4 else index % 2},{index % 2 if index else ''}" for index, file in enumerate(files)
    ]
    (photographs / "metadata.csv").write_text("\n".join(["file_name,label,team", *lines]))
    plain, _ = run(folder, photographs, "--vwt", json.dumps(HALF), "--group-column", "team")
    assert values(plain)["accuracy"] == 8 / 16 and values(plain)["worst_group"] == 0
    printed = capsys.readouterr().out
    assert "by their numbers.\n1 of 17 images have no label" in printed and "1 images without a group" in printed
    opened = open_labelled(datasets.load_dataset(str(photographs), split="train"), group_column="team")
    samples = [sample for _, batch in opened.batches(0, 1, 17) for sample in batch]
    assert [sample.label for sample in samples[2:6]] == [0, 1, None, 1]
    assert [sample.group for sample in samples[:3]] == [None, "1", "0"]
    streamed, _ = run(folder, photographs, "--vwt", json.dumps(HALF), "--group-column", "team", "--streaming")
    assert streamed["figures"] == plain["figures"]


def test_numbers_that_are_not_whole_are_no_labels_by_number(tmp_path):
    images = [Image.new("RGB", (8, 8))] * 3
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float64")})
    data = datasets.Dataset.from_dict({"image": images, "label": [0.0, 0.5, 1.0]}, features=features)
    samples = [sample for _, batch in open_labelled(data).batches(0, 1, 3) for sample in batch]
    assert [sample.label for sample in samples] == ["0.0", "0.5", "1.0"]
    model = loaded(classifier(tmp_path, dict(enumerate(LABELS))), AUTO)
    processor = transformers.ViTImageProcessorPil(size=SIZE)
    for form in (data, data.to_iterable_dataset()):
        result = evaluate_model(model, form, vwt=HALF, image_processor=processor, progress=False)
        assert "accuracy" not in result.rows[0].figures and any("'0.0'" in remark for remark in result.said)


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, np.int64, np.uint8])
def test_numbers_of_numpy_in_a_stream_are_labels_by_number(number):
    rows = [{"image": Image.new("RGB", (8, 8)), "label": number(label)} for label in (1, 0)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value(np.dtype(number).name)})
    for known in (None, features):
        stream = datasets.IterableDataset.from_generator(lambda: iter(rows), features=known)
        samples = [
            sample
            for _, batch in open_labelled(stream, image_column="image", label_column="label").batches(0, 1, 2)
            for sample in batch
        ]
        assert [sample.label for sample in samples] == [1, 0]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_folders_are_labels_however_their_accents_are_written(form, tmp_path, photographs):
    """A Mac's zip holds names in NFD."""
    cats = photographs / unicodedata.normalize(form, "k\u00e4tzchen")
    (photographs / "cat").rename(cats)
    model = loaded(classifier(tmp_path, {0: "k\u00e4tzchen", 1: "dogs"}), AUTO)
    processor = transformers.ViTImageProcessorPil(size=SIZE)
    groups = {
        f"{unicodedata.normalize('NFC', file.parent.name)}/{file.name}": "all" for file in photographs.rglob("*.png")
    }
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    more = {"image_processor": processor, "progress": False, "groups": tmp_path / "groups.json"}
    figures = evaluate_model(model, photographs, vwt=HALF, **more).rows[0].figures
    assert (figures["accuracy"].value, figures["accuracy"].count) == (9 / 17, 17)


def test_splits_that_are_measured_together_are_told(photographs, recwarn):
    for split in ("test", "train"):
        shutil.copytree(photographs, photographs.parent / "both" / split)
    with pytest.warns(UserWarning, match=r"both holds test, train, which are taken together.*name one: .*both.test$"):
        assert open_labelled(photographs.parent / "both").total == 34
    recwarn.clear()
    assert open_labelled(photographs).total == open_labelled(photographs.parent / "both" / "train").total == 17
    assert not recwarn.list


def test_a_stream_whose_files_lie_elsewhere_now_is_the_same(photographs, tmp_path):
    def opened(folder: Path) -> LabelledImages:
        files = [str(path) for path in sorted(folder.rglob("*.png"))[:4]]
        data = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
        return open_labelled(data.to_iterable_dataset())

    known = {
        number: [sample._replace(item=None) for sample in batch]
        for number, batch in opened(photographs).batches(0, 1, 2, known={})
    }
    photographs.rename(tmp_path / "elsewhere")
    assert list(opened(tmp_path / "elsewhere").batches(0, 1, 2, known=known)) == [(0, None), (1, None)]


def test_a_label_of_another_kind_is_a_text():
    images = [Image.new("RGB", (8, 8))] * 2
    dates = [datetime.date(2020, 1, day) for day in (1, 2)]
    opened = open_labelled(datasets.Dataset.from_dict({"image": images, "label": dates}))
    labels = [sample.label for _, batch in opened.batches(0, 1, 2) for sample in batch]
    assert labels == ["2020-01-01", "2020-01-02"] and json.dumps(labels)


def test_a_setting_without_fields_has_a_name():
    assert name_of({}) == name_of({"method": "intra"}) == "intra"


def test_text_tokenizers_are_told_apart_by_what_they_go_by_and_not_by_their_last_call():
    """A folder that a tokenizer is put into anew has the name that it had."""
    special = {"<s>": 1, "</s>": 2, "<pad>": 0}
    names = [tokenizer_with(special), tokenizer_with(special), tokenizer_with(special), tokenizer_with(special)]
    names[1](["a photo", "a"], padding=True, truncation=True, max_length=4)
    names[2].backend_tokenizer.normalizer = None
    names[3].add_tokens(["teapot"])
    same, called, cased, more = (_tokenizer_of(SimpleNamespace(tokenizer=tokenizer)) for tokenizer in names)
    assert same == called and len({same, cased, more}) == 3
    assert _tokenizer_of(SimpleNamespace(tokenizer=None)) is None
    held = SimpleNamespace(tokenizer=names[0])  # by a processor
    assert _tokenizer_of(SimpleNamespace(tokenizer=held)) == same
    of_a_user = SimpleNamespace(tokenizer=lambda texts, **options: names[0](texts, **options))
    assert _tokenizer_of(of_a_user).startswith("function ")
    names[0].backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(SimpleNamespace())
    assert _tokenizer_of(SimpleNamespace(tokenizer=names[0])) not in (same, cased, more)
