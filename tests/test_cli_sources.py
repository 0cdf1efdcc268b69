"""The commands take a folder of images, a data set saved to disk or one on the Hub, by the same rules."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import pytest
import transformers
from PIL import Image

from tiny import tiny_model
from vwt_hf.answers import answer
from vwt_hf.cli import calibrate, embed, evaluate, learn, main, sources
from vwt_hf.cli.loading import load, load_model
from vwt_hf.cli.sources import open_source
from vwt_hf.processes import usable_device

SIZE = {"height": 32, "width": 32}


@pytest.fixture
def data() -> datasets.Dataset:
    images = [Image.effect_noise((32, 32), 20 + index).convert("RGB") for index in range(50)]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def test_a_data_set_saved_to_disk_is_opened_by_its_split(tmp_path, data):
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"odd": data}).save_to_disk(tmp_path / "odd")
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "neither")

    def opened(name: str, **options):
        found, split = open_source(str(tmp_path / name), **options)
        return type(found), split

    assert opened("one") == opened("one", column="image") == (datasets.Dataset, None)
    assert opened("two") == (datasets.Dataset, "train")
    assert opened("two", split="test", streaming=True) == (datasets.IterableDataset, "test")
    assert opened("two", usual=("val", "test")) == (datasets.Dataset, "test")
    assert opened("odd") == (datasets.Dataset, "odd")
    named = datasets.Dataset.from_dict({"image": [0]}, split="train")
    named.info.config_name = "small"
    named.save_to_disk(tmp_path / "named")
    assert opened("named", split="train", config="small") == (datasets.Dataset, "train")
    for of, options, own in (
        ("one", {"split": "train"}, "--split is 'train', and .* are of no split"),
        ("named", {"split": "test"}, "--split is 'test', and .* are of 'train'"),
        ("named", {"config": "large"}, "--config is 'large', and .* are of 'small'"),
    ):
        with pytest.raises(ValueError, match=f"{own}. Leave it out, or name another data set"):
            opened(of, **options)
    with pytest.raises(ValueError, match="neither has the splits a, b; name one by --split"):
        opened("neither")
    with pytest.raises(ValueError, match="neither has no split 'train'; its splits are a, b"):
        opened("neither", split="train")


def test_a_folder_of_images_is_one_whatever_lies_beside_them_unless_that_is_asked_for(tmp_path, data, monkeypatch):
    folder = tmp_path / "photographs"
    (folder / "features").mkdir(parents=True)
    data["image"][0].save(folder / "a.png")
    data.to_parquet(folder / "features" / "train.parquet")
    assert open_source(str(folder)) == (folder, None)
    with pytest.raises(ValueError, match=r"--column, --split: of data sets alone, and .*photographs is a folder"):
        open_source(str(folder), column="image", split="train")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, **options: (name, config, options))
    asked = (str(folder), "small", {"split": "train", "streaming": False})
    assert open_source(str(folder), config="small", described=True) == (asked, "train")


def test_a_data_set_that_is_empty_or_damaged_is_named(tmp_path, data, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    bare = datasets.Dataset.from_dict({"image": []}, features=data.features)
    bare.save_to_disk(tmp_path / "empty")
    datasets.DatasetDict({"train": data, "test": bare}).save_to_disk(tmp_path / "half")
    data.save_to_disk(tmp_path / "cut")
    data.save_to_disk(tmp_path / "gone")
    for name in ("table", "text"):
        (tmp_path / name).mkdir()
        data["image"][0].save(tmp_path / name / "a.png")
    (tmp_path / "table" / "a.parquet").write_bytes(b"cut off")
    (tmp_path / "text" / "metadata.csv").write_text("not_a_file_name_at_all")
    (file,) = (tmp_path / "cut").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "gone" / file.name).unlink()
    for name, kind, reason in (
        ("empty", ValueError, ", or a split of it, has no rows; expected images"),
        ("half", ValueError, ", or a split of it, has no rows; expected images"),
        ("cut", ValueError, r" cannot be read as a data set \(ArrowInvalid: .*\); expected whole files"),
        ("gone", OSError, f" cannot be read: .*{file.name}"),
        ("table", ValueError, r" cannot be read as a data set \(.*ArrowInvalid: .*\); expected whole files"),
        ("text", ValueError, r" cannot be read as a data set \(.*\); expected whole files"),
    ):
        with pytest.raises(kind, match=f"{tmp_path / name}{reason}"):
            open_source(str(tmp_path / name), described=True)


def test_a_folder_of_tables_alone_is_refused_with_how_to_make_a_data_set_of_it(tmp_path, data, checkpoint, capsys):
    (tmp_path / "tables").mkdir()
    data.to_parquet(tmp_path / "tables" / "train.parquet")
    model, tables = str(checkpoint), str(tmp_path / "tables")
    for given in (
        ["embed", tables, "--model", model, "--output", str(tmp_path / "out")],
        ["calibrate", model, tables, "--agreement", "0.9"],
    ):
        assert main(given) == 2
        assert (
            "Parquet and tar files become a data set by datasets.load_dataset(...).save_to_disk(...)."
            in capsys.readouterr().err
        )


@pytest.mark.parametrize("verb", [calibrate, embed, evaluate, learn])
def test_no_verb_names_a_split_by_itself(verb):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert parser.get_default("split") is None  # else a folder of images would be refused


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Of a classifier, which has no pooler."""
    tiny_model("vit-classifier").save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessorPil(size=SIZE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_verb_that_reads_images_takes_a_data_set_saved_to_disk(tmp_path, data, checkpoint, capsys):
    data.save_to_disk(tmp_path / "saved")
    saved, model, words = str(tmp_path / "saved"), str(checkpoint), tmp_path / "words"
    commands = {
        "learn": ["--image-processor", model, "--patch-size", "16", "--size", "4", "--output", str(words)],
        "calibrate": ["--agreement", "0.01", "--by", "flops"],
        "embed": ["--model", model, "--output", str(tmp_path / "out"), "--workers", "0"],
    }
    for verb, given in commands.items():
        before = [model, saved] if verb == "calibrate" else [saved]
        assert main([verb, *before, *given]) == 0, capsys.readouterr().err
    assert (words / "vocabulary.json").exists() and (tmp_path / "out" / "embed.json").exists()
    assert "50 images" in capsys.readouterr().out


def test_a_folder_that_embed_wrote_into_is_still_one_of_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    features = tmp_path / "features"
    features.mkdir()
    for name in ("embed.json", "train-00000-of-00001.parquet"):
        (features / name).write_text("{}")
    assert open_source(str(tmp_path), described=True) == (tmp_path, None)
    (features / "metadata.jsonl").write_text('{"file_name": "one.png", "label": "a"}')
    assert sources._is_described(tmp_path)


def test_only_files_that_datasets_reads_make_a_folder_of_images_a_data_set(tmp_path):
    images, hidden = tmp_path / "cat", tmp_path / ".cache"
    images.mkdir()
    hidden.mkdir()
    Image.new("RGB", (8, 8)).save(images / "metadata.png")
    for file in (tmp_path / "metadata.txt", images / "metadata.json", hidden / "metadata.csv", images / "._a.parquet"):
        file.write_text("file_name")
    for own in (tmp_path / "metadata.csv", images / "metadata.jsonl"):  # of a user, who does not name the images there
        own.write_text('{"id": 1}\n{"note": "a file"}')
    with pytest.warns(UserWarning, match=r"metadata\.csv names no images in a column file_name, and is left out; add"):
        assert open_source(str(tmp_path), described=True) == (tmp_path, None)
    for own in (tmp_path / "metadata.csv", images / "metadata.jsonl"):
        own.unlink()
    (images / "metadata.csv").mkdir()
    assert open_source(str(tmp_path), described=True) == (tmp_path, None)
    (images / "metadata.csv").rmdir()
    for name in ("metadata.csv", "metadata.jsonl", "a.parquet", "a.arrow", "a.tar"):
        for folder in (tmp_path, images):
            for written in ("file_name,label", '\n{"label": 1,\n "file_name": "a.png"}'):
                for encoding in ("utf-8", "utf-16"):
                    (folder / name).write_text(written, encoding=encoding)
                    assert sources._is_described(tmp_path)
            (folder / name).unlink()


def test_a_stray_archive_among_more_images_makes_them_no_data_set(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).touch()
    assert open_source(str(tmp_path), described=True) == (tmp_path, None)
    (tmp_path / "c.tar").touch()  # as many archives as images
    assert sources._is_described(tmp_path)


def test_tables_beside_more_pictures_are_a_data_set_as_a_clone_from_the_hub_is(tmp_path):
    for name in ("data/train-00000-of-00001.parquet", "assets/1.png", "assets/2.png", "assets/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert sources._is_described(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "a.parquet", "a.arrow", "a.tar"])
def test_links_to_folders_are_followed_and_links_to_nothing_describe_nothing(name, tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    images.mkdir()
    elsewhere.mkdir()
    Image.new("RGB", (8, 8)).save(images / "1.png")
    (images / name).symlink_to(elsewhere / name)
    (images / "train").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(images)
    assert open_source(str(images), described=True) == (images, None)
    (images / name).unlink()
    (elsewhere / name).write_text("file_name,label")
    assert sources._is_described(images)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_description_further_down_counts_if_it_is_above_all_images(name, tmp_path):
    folder = tmp_path / "train" / "first" / "deep"
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    (folder.parent / name).symlink_to(tmp_path / "nowhere")
    assert not sources._is_described(tmp_path)
    (folder.parent / name).unlink()
    (folder.parent / name).write_text("file_name,label")
    assert sources._is_described(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "another.png")
    assert open_source(str(tmp_path), described=True) == (tmp_path, None)


def test_a_pooler_that_the_checkpoint_does_not_hold_is_left_out(checkpoint):
    model = load(str(checkpoint), usable_device("cpu"))
    assert model.pooler is None
    pixels = transformers.ViTImageProcessorPil(size=SIZE)([Image.new("RGB", (32, 32))], return_tensors="pt")
    found = answer(model, **pixels)
    assert (found == model(**pixels).last_hidden_state[:, 0]).all()


def test_a_checkpoint_that_lacks_other_weights_is_refused_with_their_names(tmp_path):
    model = tiny_model("vit")
    lacking = {name: weight for name, weight in model.state_dict().items() if not name.startswith("layers.1")}
    model.save_pretrained(tmp_path, state_dict=lacking)
    with pytest.raises(ValueError, match=r"lacks weights of ViTModel, .*: .*layers?\.1\..* and \d+ more\. Expected a"):
        load(str(tmp_path), usable_device("cpu"))


def test_a_checkpoint_with_weights_of_another_shape_than_its_config_says_is_refused_with_both(tmp_path):
    model = tiny_model("vit-classifier", num_labels=3)
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size=SIZE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "cat", "1": "dog"}, "label2id": None}))
    with pytest.raises(
        ValueError, match=r"has weights classifier\.bias of shape \(3,\), .* with \(2,\); expected .* Corr"
    ):
        load_model(str(tmp_path), usable_device("cpu"), None)
    plain = load(str(tmp_path), usable_device("cpu"))  # without the classifier
    assert all((weight == model.state_dict()[f"vit.{name}"]).all() for name, weight in plain.state_dict().items())
