"""Vocabularies: learned from images, kept on disk and the Hub, and refused where they are not what they say."""

from __future__ import annotations

import ast
import hashlib
import importlib
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import PIL.Image
import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import vwt_hf
from vwt_hf import cli, decoding, hub_names, image_source, processed_images
from vwt_hf.cli import vocab
from vwt_hf.vocabulary import VisualVocabulary, card, files, learning
from vwt_hf.vocabulary.files import VocabularyInfo
from vwt_hf.words import patchify

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROCESSOR = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.CLIPImageProcessorPil(**PROCESSOR)


def photographs(number: int, seed: int = 0) -> list[PIL.Image.Image]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(number, 3, 6, 8, generator=generator)
    pixels = (torch.nn.functional.interpolate(small, (36, 48), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, image in enumerate(photographs(24)):
        path = tmp_path / "photographs" / f"class{index % 3}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return tmp_path / "photographs"


def make(images: Any, processor: Any, **changes: Any) -> VisualVocabulary:
    settings = {"size": 12, "patch_size": 8, "batch_size": 4, "progress": False, "device": "cpu", **changes}
    return VisualVocabulary.learn(images, processor, **settings)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    words = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    info = VocabularyInfo(image_mean=CLIP_MEAN, image_std=CLIP_STD, dataset="me/mine", images=3, patches=9, seed=0)
    VisualVocabulary(words, torch.arange(6).flip(0), info).save_pretrained(tmp_path / "words")
    return tmp_path / "words"


def test_learning_sees_what_the_model_sees_in_raw_rgb(processor: Any) -> None:
    images = photographs(5)
    words = make(images, processor, size=80).words
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    patches = patchify(pixels * std + mean, (8, 8)).flatten(0, 1)
    # As many words as patches: each patch is a word.
    distances = torch.cdist(patches, words.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min(dim=1).values.max() < 1e-4


def test_words_are_learned_by_an_image_processor_that_has_words_itself(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    transformers.CLIPVisionConfig(patch_size=8, image_size=32).save_pretrained(tmp_path)
    expected = make(photographs(9), processor)
    for vwt in (True, {"method": "inter", "vocabulary": VisualVocabulary(torch.rand(6, 3, 8, 8))}, {"keep_ratio": 0.5}):
        tokenizing = AutoImageProcessor.from_pretrained(tmp_path, vwt=vwt)
        assert torch.equal(make(photographs(9), tokenizing).words, expected.words)
        assert tokenizing.vwt is not None


def test_learning_records_how_the_words_came_about(folder: Path, processor: Any) -> None:
    learned = make(folder, processor, seed=3, base_model="openai/clip-vit-base-patch16")
    assert (len(learned), learned.patch_size, learned.channels) == (12, 8, 3)
    assert learned.info.image_mean == pytest.approx(CLIP_MEAN)
    assert (learned.info.images, learned.info.unreadable, learned.info.patches) == (24, 0, 24 * 16)
    assert (learned.info.seed, learned.info.dataset) == (3, "photographs")
    assert learned.info.library_version == vwt_hf.__version__
    assert learned.frequencies is not None and learned.frequencies.sum() == 24 * 16
    assert learned.info.inertia is not None and 0 < learned.info.inertia < 50


def test_the_same_seed_gives_the_same_words(folder: Path, processor: Any) -> None:
    assert torch.equal(make(folder, processor).words, make(folder, processor).words)
    assert not torch.equal(make(folder, processor).words, make(folder, processor, seed=1).words)


def stored(folder: Path) -> datasets.Dataset:
    paths = sorted(map(str, folder.rglob("*.png")))
    features = datasets.Features({"label": datasets.Value("int64"), "photograph": datasets.Image()})
    return datasets.Dataset.from_dict({"label": [0] * len(paths), "photograph": paths}, features=features)


def test_a_folder_and_a_data_set_of_its_files_give_the_same_words(folder: Path, processor: Any) -> None:
    assert torch.equal(make(folder, processor).words, make(stored(folder), processor).words)


def test_a_streaming_data_set_is_learned_from_and_ends_at_max_images(folder: Path, processor: Any) -> None:
    streaming = stored(folder).to_iterable_dataset()
    assert make(streaming, processor, max_images=10).info.images == 10
    assert make(streaming, processor).info.images == 24
    unnamed = datasets.IterableDataset.from_generator(lambda: ({"x": 1, "y": image} for image in photographs(6)))
    assert make(unnamed, processor).info.images == 6


def test_a_generator_of_images_is_learned_from(processor: Any) -> None:
    assert make((image for image in photographs(6)), processor, max_images=5).info.images == 5


def test_unreadable_images_are_named_and_left_out(folder: Path, processor: Any) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "cut.png").write_bytes((folder / "class0" / "0.png").read_bytes()[:200])
    for images in (folder, stored(folder), stored(folder).to_iterable_dataset()):
        with pytest.warns(UserWarning, match=r"2 of 26 images could not be read.*Error"):
            learned = make(images, processor)
        assert (learned.info.images, learned.info.unreadable) == (24, 2)


@pytest.mark.parametrize("lacking", [None, {"bytes": None, "path": None}], ids=str)
def test_rows_without_an_image_at_either_end_are_left_out(lacking: Any, folder: Path, processor: Any) -> None:
    paths = sorted(map(str, folder.rglob("*.png")))
    rows = [lacking, *({"bytes": None, "path": path} for path in paths), lacking]
    stands = datasets.Features({"photograph": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}})
    images = datasets.Dataset.from_dict({"photograph": rows}, features=stands)
    images = images.cast_column("photograph", datasets.Image())
    with pytest.warns(UserWarning, match=r"2 of 26 images could not be read"):
        assert make(images, processor).info.images == 24


def test_images_none_of_which_can_be_read_are_refused(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 1 images could be read.*broken\.png"):
        make(tmp_path, processor)


def test_what_cannot_be_learned_from_is_refused(folder: Path, tmp_path: Path, processor: Any) -> None:
    (tmp_path / "empty").mkdir()
    refusals: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (folder, {"size": 1000}, ValueError, "1000 words were asked for, but there are only 384 patches"),
        (folder, {"size": 0}, ValueError, "size is 0"),
        (folder, {"resume": True}, ValueError, "needs checkpoint"),
        (folder, {"max_images": 0}, ValueError, "max_images is 0; expected a whole number of at least 1"),
        (folder, {"max_images": 100.0}, ValueError, r"max_images is 100\.0; expected a whole number"),
        (folder, {"column": "photo"}, ValueError, "column is 'photo', which is for data sets"),
        (folder, {"dataset": folder}, ValueError, "dataset is .*; expected a string"),
        (folder, {"base_model": 7}, ValueError, "base_model is 7; expected a string"),
        (folder, {"seed": 2**64}, ValueError, r"seed is 18446744073709551616; expected a whole number in"),
        (folder, {"seed": 0.5}, ValueError, r"seed is 0\.5; expected a whole number in"),
        (folder, {"size": 10**8}, ValueError, r"size is 100,000,000 and patch_size 8, so words would take 76,800,000,"),
        (folder, {"device": "cuda:99"}, ValueError, r"device is 'cuda:99', which torch \S+ cannot use here; expected"),
        (folder, {"patch_size": 64}, ValueError, "none of the 24 images.*smaller than one 64×64 patch"),
        (tmp_path / "empty", {}, ValueError, "holds no image files"),
        (tmp_path / "nowhere", {}, ValueError, "no folder"),
        ([], {}, ValueError, "holds no images"),
        (stored(folder).select([]), {}, ValueError, "holds no images"),
        (7, {}, TypeError, "images is a int"),
        (datasets.DatasetDict(train=stored(folder)), {}, ValueError, "splits train"),
        (stored(folder), {"column": "label"}, ValueError, "'label'; its columns are label, photograph"),
        (stored(folder).remove_columns("photograph"), {}, ValueError, "no column of images; its columns are label"),
    ]
    for images, changes, kind, message in refusals:
        with pytest.raises(kind, match=message):
            make(images, processor, **changes)
    with pytest.raises(TypeError, match="expected a transformers image processor"):
        make(folder, "openai/clip-vit-base-patch16")


def test_a_device_without_float64_is_refused(folder: Path, processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "usable_device", torch.device)  # as on a Mac
    with pytest.raises(ValueError, match=r"device is 'mps', where torch has no float64, .* expected cpu or cuda"):
        make(folder, processor, device="mps")


def test_what_could_not_be_recorded_at_the_end_is_refused_before_images_are_read(processor: Any) -> None:
    images = (pytest.fail("read") for _ in range(3))
    for wrong in ({"dataset": 7}, {"base_model": 7}):
        with pytest.raises(ValueError, match=r"is 7; expected a string"):
            make(images, processor, **wrong)


def test_fewer_distinct_patches_than_words_give_a_smaller_vocabulary(processor: Any) -> None:
    white = [PIL.Image.new("RGB", (40, 40), colour) for colour in ("white", "black") * 3]
    with pytest.warns(UserWarning, match="only 2 patches that differ"):
        assert len(make(white, processor)) == 2


@pytest.mark.parametrize("buffered", [16, 10_000])
@pytest.mark.parametrize("kind", ["folder", "data set", "stream", "iterable"])
def test_a_killed_run_resumes_to_the_same_words(
    folder: Path, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch, kind: str, buffered: int
) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    monkeypatch.setattr("vwt_hf.vocabulary.kmeans.BUFFERED_AT_LEAST", buffered)
    monkeypatch.setattr("vwt_hf.vocabulary.kmeans.BUFFERED", 1)
    monkeypatch.setattr(learning, "CHECKPOINT_EVERY", 2)
    images = {
        "folder": folder,
        "data set": stored(folder),
        "stream": stored(folder).to_iterable_dataset(),
        "iterable": [*photographs(13), "broken.png", *photographs(11, seed=1)],
    }[kind]
    read = processed_images.patch_batches

    def killed(*args: Any) -> Iterator[Any]:
        for number, batch in enumerate(read(*args)):
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = make(images, processor)
        monkeypatch.setattr(learning, "patch_batches", killed)
        with pytest.raises(KeyboardInterrupt):
            make(images, processor, checkpoint=tmp_path / "progress")
        monkeypatch.setattr(learning, "patch_batches", read)
        resumed = make(images, processor, checkpoint=tmp_path / "progress", resume=True)
    assert torch.equal(resumed.words, whole.words)
    assert torch.equal(resumed.frequencies, whole.frequencies)
    assert resumed.info == whole.info
    assert resumed.info.unreadable == 1


@pytest.mark.parametrize("buffered", [16, 10_000])
@pytest.mark.parametrize("kind", ["folder", "data set", "stream", "iterable"])
def test_a_finished_run_goes_on_with_more_images_as_if_it_had_them_from_the_start(
    folder: Path, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch, kind: str, buffered: int
) -> None:
    """Whether the first run ends amid a batch (10, 3, 21 images of 4 a batch) or with one (12), and with fewer, too."""
    for name in ("a", "k", "z"):
        (folder / f"{name}.png").write_bytes(b"no image")
    monkeypatch.setattr("vwt_hf.vocabulary.kmeans.BUFFERED_AT_LEAST", buffered)
    monkeypatch.setattr("vwt_hf.vocabulary.kmeans.BUFFERED", 1)
    images = {
        "folder": folder,
        "data set": stored(folder),
        "stream": stored(folder).to_iterable_dataset(),
        "iterable": [*photographs(9), "broken.png", *photographs(14, seed=1)],
    }[kind]
    progress = tmp_path / "progress"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in (3, 10, 12, 22, 21, None):
            whole = make(images, processor, max_images=number)
            grown = make(images, processor, max_images=number, checkpoint=progress, resume=True)
            assert torch.equal(grown.words, whole.words) and torch.equal(grown.frequencies, whole.frequencies)
            assert grown.info == whole.info


def test_an_iterable_may_have_more_images_at_its_end(tmp_path: Path, processor: Any) -> None:
    images = photographs(19)
    make(images[:10], processor, checkpoint=tmp_path)
    with safe_open(tmp_path / learning.CHECKPOINT, "pt") as opened:
        assert json.loads(opened.metadata()["state"])["done"]["read"] == [8]  # the two whole batches
    grown, whole = make(iter(images), processor, checkpoint=tmp_path, resume=True), make(images, processor)
    assert torch.equal(grown.words, whole.words) and grown.info == whole.info


@pytest.mark.parametrize("nothing", [{"do_normalize": False}, {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}])
def test_words_are_learned_by_a_processor_that_does_not_say_what_white_is(
    folder: Path, processor: Any, nothing: dict[str, Any]
) -> None:
    """They are in raw RGB whatever it says, which is recorded where it is known."""
    silent = transformers.CLIPImageProcessorPil(**PROCESSOR | {"do_rescale": False} | nothing)
    words = make(folder, silent)
    assert torch.equal(words.words, make(folder, processor).words)
    assert words.info.image_mean is words.info.image_std is None


def test_a_checkpoint_over_other_images_is_refused(folder: Path, tmp_path: Path, processor: Any) -> None:
    kinds = {"folder": folder, "data set": stored(folder), "iterable": photographs(24), "stream": None}
    kinds["stream"] = stored(folder).to_iterable_dataset()
    for kind, images in kinds.items():
        make(images, processor, checkpoint=tmp_path / kind, max_images=20)
    photographs(1, seed=3)[0].save(max(folder.rglob("*.png")))
    refusals = [
        ("folder", folder, {}, r"learned from a folder of 24 image files \(.*images is a folder of 24 image files \("),
        ("folder", photographs(24), {}, "images is images in their own order"),
        ("data set", kinds["data set"].select(range(22)), {}, r"data set of 24 rows \(.*, and images is .* of 22 rows"),
        ("iterable", photographs(19), {}, "images holds 19 images, fewer than the 20 that were learned from"),
        ("stream", kinds["stream"].take(19), {}, "images holds 19 images, fewer than the 20"),
        ("iterable", kinds["iterable"], {"max_images": 19}, "learned from 20 images, and max_images is 19"),
    ]
    others = stored(folder)  # as many, and others by now
    streamed = [others.select(range(1, 24)).to_iterable_dataset(), others.to_iterable_dataset()]
    streamed[1].info.dataset_name = "me/others"
    refusals += [
        ("data set", others, {}, "first and last: .*, and images is .*first and last: "),
        ("stream", streamed[0], {}, r"streaming data set \(.*first: .*and images is .*first: "),
        ("stream", streamed[1], {}, r"streaming data set \(.*and images is .* streaming data set \(me/others, "),
    ]
    for kind, images, changes, message in refusals:
        with pytest.raises(ValueError, match=message):
            make(images, processor, checkpoint=tmp_path / kind, resume=True, **changes)


def test_a_checkpoint_of_another_format_is_refused(
    folder: Path, tmp_path: Path, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "CHECKPOINT_FORMAT", 1)
    make(folder, processor, checkpoint=tmp_path / "progress")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"another version of vwt-hf \(format 1; this one reads 4\).*delete the file"):
        make(folder, processor, checkpoint=tmp_path / "progress", resume=True)


@pytest.mark.parametrize("state", ["[]", "{}", '{"format": 4}', '{"format": 4, "settings": []}'])
def test_a_checkpoint_that_is_none_is_refused(folder: Path, tmp_path: Path, processor: Any, state: str) -> None:
    save_file({"words": torch.zeros(1)}, tmp_path / learning.CHECKPOINT, {"state": state})
    with pytest.raises(ValueError, match=rf"{tmp_path}.*(cannot be read|another version).*delete"):
        make(folder, processor, checkpoint=tmp_path, resume=True)


def test_a_checkpoint_that_cannot_be_written_is_told_before_images_are_read(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "file").write_text("no folder")
    images = (pytest.fail("an image was read") for _ in range(1))
    for checkpoint in ("file", "file/below"):
        with pytest.raises(NotADirectoryError, match=r"file is no folder; expected one to write into"):
            make(images, processor, checkpoint=tmp_path / checkpoint)


def test_a_checkpoint_of_another_run_is_refused(folder: Path, tmp_path: Path, processor: Any) -> None:
    progress = tmp_path / "progress"
    make(folder, processor, checkpoint=progress)
    with pytest.raises(FileExistsError, match="resume=True"):
        make(folder, processor, checkpoint=progress)
    with pytest.raises(ValueError, match="a run with size=12, this one has size=13"):
        make(folder, processor, checkpoint=progress, resume=True, size=13)
    other = type("Other", (transformers.CLIPImageProcessorPil,), {})(**PROCESSOR)
    with pytest.raises(
        ValueError, match=r"image_processor=.CLIPImageProcessorPil, .*this one has image_processor=.Other, "
    ):
        make(folder, other, checkpoint=progress, resume=True)
    larger = transformers.CLIPImageProcessorPil(**{**PROCESSOR, "size": {"shortest_edge": 40}})
    with pytest.raises(ValueError, match=r"edge': 32.*, this one has image_processor=.*edge': 40"):
        make(folder, larger, checkpoint=progress, resume=True)
    file = progress / learning.CHECKPOINT
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        make(folder, processor, checkpoint=progress, resume=True)


def test_learns_from_photographs_by_a_trained_models_processor(shared: Path) -> None:
    # By its own class: AutoImageProcessor of transformers 5.17 insists on torchvision.
    trained = transformers.CLIPImageProcessorPil.from_pretrained(shared / "models" / "vit-small-caltech101")
    learned = VisualVocabulary.learn(
        shared / "data" / "imagenet-sample" / "train", trained, size=50, patch_size=14, max_images=64, progress=False
    )
    assert (len(learned), learned.info.patches) == (50, 64 * 256)


def test_words_are_mapped_exactly_to_any_models_pixel_space() -> None:
    patches = torch.rand(40, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clip_mean, clip_std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    in_clip_space = ((patches - clip_mean) / clip_std).mean(dim=0, keepdim=True)
    words = VisualVocabulary(in_clip_space * clip_std + clip_mean)
    half = ((patches - 0.5) / 0.5).mean(dim=0, keepdim=True).flatten(1)
    found = words.normalized(0.5, (0.5, 0.5, 0.5))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), half, rtol=0, atol=2e-7)
    torch.testing.assert_close(
        words.normalized(CLIP_MEAN, CLIP_STD).double(), in_clip_space.flatten(1), rtol=0, atol=5e-7
    )


def test_words_are_flattened_as_patches_are() -> None:
    words = torch.rand(1, 3, 4, 4)
    assert torch.equal(VisualVocabulary(words).normalized(0.0, 1.0), patchify(words, (4, 4))[0])


def test_statistics_of_another_number_of_channels_are_refused() -> None:
    words = VisualVocabulary(torch.rand(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected a number, or one for each of 3 channels"):
        words.normalized((0.5, 0.5), 0.5)
    with pytest.raises(ValueError, match="expected positive numbers"):
        words.normalized(0.5, 0.0)
    for wrong in ("half", 10**400, [10**5000] * 3, float("nan"), None):
        with pytest.raises(ValueError, match=r"image_mean is .* expected a number"):
            words.normalized(wrong, 0.5)  # type: ignore[arg-type]


def test_a_model_of_other_patches_is_refused_by_both_numbers() -> None:
    words = VisualVocabulary(torch.rand(2, 3, 16, 16))
    words.require(16, 3)
    words.require((16, 16), 3)
    with pytest.raises(ValueError, match=r"16×16 pixels, the model's patches 14×14"):
        words.require(14, 3)
    with pytest.raises(ValueError, match="3 channels, the model's patches 1"):
        words.require(16, 1)


def test_a_saved_vocabulary_loads_as_it_was(folder: Path, tmp_path: Path, processor: Any) -> None:
    learned = make(folder, processor)
    learned.save_pretrained(tmp_path / "a" / "words")
    for loaded in (
        VisualVocabulary.from_pretrained(tmp_path / "a" / "words"),
        VisualVocabulary.from_pretrained(str(tmp_path / "a"), subfolder="words"),
    ):
        assert torch.equal(loaded.words, learned.words)
        assert torch.equal(loaded.frequencies, learned.frequencies)
        assert loaded.info == learned.info
        assert loaded.revision is None
    assert sorted(path.name for path in (tmp_path / "a" / "words").iterdir()) == [
        "README.md",
        "vocabulary.json",
        "vocabulary.safetensors",
        "words.png",
    ]


def test_a_model_folder_keeps_its_own_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("the model's")
    VisualVocabulary(torch.rand(2, 3, 4, 4)).save_pretrained(tmp_path, card=False)
    assert (tmp_path / "README.md").read_text() == "the model's"
    assert len(VisualVocabulary.from_pretrained(tmp_path)) == 2


@pytest.mark.parametrize("broken", ["write", "rename"])
def test_a_failed_save_leaves_the_old_folder_whole(saved: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    if broken == "write":
        calls = iter((lambda _: None, lambda _: None, full))
        monkeypatch.setattr(files.os, "fsync", lambda file: next(calls)(file))
    else:
        monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        VisualVocabulary(torch.rand(9, 3, 8, 8)).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_the_card_has_valid_metadata_the_numbers_and_a_snippet_that_runs(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = huggingface_hub.ModelCard((saved / "README.md").read_text())
    assert card.data.library_name == "vwt-hf"
    assert card.data.datasets == ["me/mine"]
    assert "visual-words" in card.data.tags
    assert "| patches | 9 |" in card.content
    assert "![" in card.content and "(words.png)" in card.content
    monkeypatch.setattr(vwt_hf, "VisualVocabulary", VisualVocabulary, raising=False)
    snippet = re.search(r"```python\n(.*?)```", card.content, re.DOTALL)
    assert snippet is not None
    exec(snippet.group(1), {})
    assert "[6, 3, 4, 4]" in capsys.readouterr().out


def test_the_picture_shows_the_most_frequent_word_first() -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[:, :, None, None].expand(2, 3, 16, 16)
    sheet = PIL.Image.open(io.BytesIO(card.render_words(colours, torch.tensor([1, 5]))))
    assert sheet.convert("RGB").getpixel((10, 10)) == (0, 0, 255)
    for channels, number in ((1, 1), (4, 500)):
        card.render_words(torch.rand(number, channels, 14, 14), None)


def test_the_modules_that_programs_import_by_former_names_are_the_same_objects() -> None:
    for former, module in {"vocabulary_files": files, "image_source": image_source}.items():
        assert importlib.import_module(f"vwt_hf.{former}") is module
        assert getattr(vwt_hf, former) is module
    assert image_source.read_image is decoding.read_image
    assert image_source.UnreadableImage is decoding.UnreadableImage


def edit(saved: Path, **changes: Any) -> None:
    fields = json.loads((saved / "vocabulary.json").read_text())
    (saved / "vocabulary.json").write_text(json.dumps({**fields, **changes}))


def rewrite(saved: Path, words: torch.Tensor, **others: torch.Tensor) -> None:
    write_words(saved, safetensors.torch.save({"words": words, **others}))
    edit(saved, size=words.shape[0], channels=words.shape[1], patch_size=words.shape[2])


def write_words(saved: Path, content: bytes) -> None:
    (saved / "vocabulary.safetensors").write_bytes(content)
    edit(saved, sha256=hashlib.sha256(content).hexdigest())


def header_of(content: bytes) -> dict[str, Any]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def with_header(saved: Path, change: Any) -> None:
    """Changes the header of the words file in place, its bytes after it as they are."""
    content = (saved / "vocabulary.safetensors").read_bytes()
    header = header_of(content)
    values = content[8 + int.from_bytes(content[:8], "little") :]
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    write_words(saved, len(text).to_bytes(8, "little") + text + values)


def raw(saved: Path, content: bytes) -> None:
    (saved / "vocabulary.json").write_bytes(content)


def linked_outside(saved: Path, name: str) -> None:
    (saved / name).rename(saved.parent / name)
    (saved / name).symlink_to(saved.parent / name)


def cut(saved: Path) -> None:
    file = saved / "vocabulary.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


REFUSALS: dict[str, tuple[Any, str]] = {
    "truncated": (cut, r"vocabulary\.safetensors: it is truncated"),
    "empty file": (lambda at: (at / "vocabulary.safetensors").write_bytes(b""), "truncated or no safetensors"),
    "missing": (lambda at: (at / "vocabulary.safetensors").unlink(), r"vocabulary\.safetensors: it is missing"),
    "other shape": (lambda at: edit(at, size=7), r"\(6, 3, 4, 4\), but vocabulary\.json says \(7, 3, 4, 4\)"),
    "no shape": (lambda at: edit(at, patch_size=None), r"says \(6, 3, None, None\)"),
    "no JSON": (lambda at: (at / "vocabulary.json").write_text("{"), r"vocabulary\.json: it is no JSON"),
    "a list": (lambda at: (at / "vocabulary.json").write_text("[]"), "holds a list; expected an object"),
    "climbs": (lambda at: edit(at, file="../secret.safetensors"), "expected a file name without a folder"),
    "climbs on Windows": (lambda at: edit(at, file="..\\secret"), "expected a file name without a folder"),
    "absolute": (lambda at: edit(at, file="/etc/passwd"), "expected a file name without a folder"),
    "integers": (lambda at: rewrite(at, torch.ones(6, 3, 4, 4, dtype=torch.int64)), "words are 'I64'"),
    "booleans": (lambda at: rewrite(at, torch.ones(6, 3, 4, 4, dtype=torch.bool)), "words are 'BOOL'"),
    "complex": (lambda at: rewrite(at, torch.ones(6, 3, 4, 4, dtype=torch.complex64)), "words are 'C64'"),
    "float8": (lambda at: rewrite(at, torch.ones(6, 3, 4, 4).to(torch.float8_e4m3fn)), "words are 'F8_E4M3'"),
    "overflowing": (
        lambda at: rewrite(at, torch.full((6, 3, 4, 4), 3e38)),
        "from 3e[+]38 to 3e[+]38; expected raw RGB",
    ),
    "half infinite": (lambda at: rewrite(at, torch.full((6, 3, 4, 4), torch.inf)), "6 of 6 words .* not finite"),
    "other tensors": (
        lambda at: rewrite(at, torch.rand(6, 3, 4, 4), more=torch.ones(1)),
        "has the tensors more, words",
    ),
    "negative counts": (
        lambda at: rewrite(at, torch.rand(6, 3, 4, 4), frequencies=-torch.ones(6, dtype=torch.int64)),
        "frequencies are -1 and more",
    ),
    "counts of floats": (lambda at: rewrite(at, torch.rand(6, 3, 4, 4), frequencies=torch.ones(6)), "expected I64"),
    "other content": (
        lambda at: save_file({"words": torch.rand(6, 3, 4, 4)}, at / "vocabulary.safetensors"),
        "it is not the file that vocabulary.json was written for",
    ),
    "a long header": (
        lambda at: write_words(at, (2**40).to_bytes(8, "little") + b"{}"),
        "its header claims 1,099,511,627,776 bytes; expected 65,536 at most",
    ),
    "header of a list": (lambda at: with_header(at, lambda _: b"[]"), "its header is a list"),
    "header of nonsense": (lambda at: with_header(at, lambda _: b'{"words": 3}'), "no safetensors file"),
    "deep header": (lambda at: with_header(at, lambda _: b"[" * 30_000), "no safetensors file"),
    "offsets that overlap": (
        lambda at: with_header(at, lambda old: {**old, "frequencies": {**old["frequencies"], "data_offsets": [8, 56]}}),
        "are not the bytes",
    ),
    "a shape beyond the bytes": (
        lambda at: with_header(at, lambda old: {**old, "words": {**old["words"], "shape": [6, 3, 4, 5000]}}),
        "are not the bytes",
    ),
    "a shape that is no list": (
        lambda at: with_header(at, lambda old: {**old, "words": {**old["words"], "shape": 6}}),
        "no lists of integers",
    ),
    "an unknown dtype": (
        lambda at: with_header(at, lambda old: {**old, "words": {**old["words"], "dtype": "F31"}}),
        "the dtype of 'words' is 'F31'",
    ),
    "more bytes than told": (
        lambda at: write_words(at, (at / "vocabulary.safetensors").read_bytes() + b"more"),
        "its header tells of",
    ),
    "deep JSON": (lambda at: raw(at, b'{"a":' + b"[" * 60_000 + b"]}"), r"vocabulary\.json: it is (no JSON|larger)"),
    "deep and short JSON": (lambda at: raw(at, b'{"a":' + b"[" * 20_000), r"vocabulary\.json: it is no JSON"),
    "long JSON": (lambda at: edit(at, x="x" * 70_000), "larger than 65,536 bytes"),
    "long integer": (lambda at: edit(at, image_mean=[10**400] * 3), "an integer of 401 digits"),
    "integer beyond Python": (lambda at: raw(at, b'{"seed": ' + b"1" * 5000 + b"}"), "an integer of 5000 digits"),
    "not a number": (lambda at: edit(at, inertia=float("nan")), "NaN is no number"),
    "infinite by its exponent": (lambda at: raw(at, b'{"inertia": 1e999}'), "inertia is inf"),
    "a field twice": (lambda at: raw(at, b'{"size": 6, "size": 7}'), "'size' stands in it twice"),
    "UTF-16": (lambda at: raw(at, "{}".encode("utf-16")), "it is no JSON"),
    "byte order mark": (lambda at: raw(at, b"\xef\xbb\xbf{}"), "it is no JSON"),
    "not UTF-8": (lambda at: raw(at, b'{"dataset": "\xff"}'), "it is no JSON"),
    "empty JSON": (lambda at: raw(at, b""), "it is no JSON"),
    "patches a list": (lambda at: edit(at, patches=[1]), r"patches is \[1\]; expected an integer"),
    "patches a string": (lambda at: edit(at, patches="many"), "patches is 'many'; expected an integer"),
    "images negative": (lambda at: edit(at, images=-1), "images is -1; expected an integer"),
    "seed true": (lambda at: edit(at, seed=True), "seed is True; expected an integer"),
    "inertia a string": (lambda at: edit(at, inertia="x"), "inertia is 'x'; expected a number"),
    "data set a list": (lambda at: edit(at, dataset=["me/mine"]), "dataset is .*; expected a string"),
    "data set of a book": (lambda at: edit(at, dataset="x" * 2000), "dataset is 'x.*…; expected a string of 1000"),
    "deviation of nothing": (lambda at: edit(at, image_std=[1e-300] * 3), "image_std is .*; expected one number in"),
    "deviation without end": (lambda at: edit(at, image_std=[1e300] * 3), "image_std is .*; expected one number in"),
    "mean without end": (lambda at: edit(at, image_mean=[1e300] * 3), "image_mean is .*; expected one number in"),
    "mean of booleans": (lambda at: edit(at, image_mean=[True] * 3), "image_mean is .*; expected one number in"),
    "hash of a word": (lambda at: edit(at, sha256="words"), "sha256 is 'words'; expected 64"),
    "file a list": (lambda at: edit(at, file=["vocabulary.safetensors"]), "file is .*; expected a file name"),
    "other files": (lambda at: edit(at, file="model.safetensors"), "file is 'model.safetensors'; expected a file name"),
    "size a string": (lambda at: edit(at, size="6"), r"says \('6', 3, 4, 4\)"),
    "words linked outside": (lambda at: linked_outside(at, "vocabulary.safetensors"), "a link that leads out"),
    "facts linked outside": (lambda at: linked_outside(at, "vocabulary.json"), "a link that leads out"),
    "not finite": (lambda at: rewrite(at, torch.full((6, 3, 4, 4), torch.nan)), "6 of 6 words .* not finite"),
    "no words": (lambda at: rewrite(at, torch.ones(0, 3, 4, 4)), "the vocabulary is empty"),
    "no such tensor": (
        lambda at: save_file({"other": torch.ones(1)}, at / "vocabulary.safetensors"),
        "no tensor 'words', only other",
    ),
    "statistics": (lambda at: edit(at, image_mean=[0.5]), "image_mean has 1 values; expected one for each of 3"),
    "no statistics": (lambda at: edit(at, image_mean="half"), "image_mean is 'half'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_folder_that_is_not_what_it_says_is_refused_by_name(saved: Path, name: str) -> None:
    damage, message = REFUSALS[name]
    damage(saved)
    with pytest.raises(ValueError, match=message) as refusal:
        VisualVocabulary.from_pretrained(saved)
    assert str(saved) in str(refusal.value)
    file = "safetensors" if "not finite" in message else "(json|safetensors)"
    assert re.search(rf"vocabulary\.{file}", str(refusal.value))
    assert len(str(refusal.value).replace(str(saved), "")) < 500


@pytest.mark.parametrize("name", REFUSALS)
def test_the_command_refuses_such_a_folder_in_one_line(
    saved: Path, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    REFUSALS[name][0](saved)
    assert cli.main(["vocab", str(saved), "--output", str(tmp_path / "words.png")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"vwt-hf vocab: {saved}: vocabulary")


def test_a_link_within_the_folder_is_followed(saved: Path) -> None:
    (saved / "vocabulary.safetensors").rename(saved / "words")
    (saved / "vocabulary.safetensors").symlink_to("words")
    assert len(VisualVocabulary.from_pretrained(saved)) == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_words_of_other_precision_are_read_in_float32(saved: Path, dtype: torch.dtype) -> None:
    words = torch.rand(6, 3, 4, 4).to(dtype)
    rewrite(saved, words)
    loaded = VisualVocabulary.from_pretrained(saved).words
    assert loaded.dtype == torch.float32 and torch.equal(loaded, words.float())


NASTY = "\x1b]0;owned\x07\x1b[31m\u202eevil\n| <img src=x onerror=alert(1)> `x` ![](http://example.org/x.png) |\ud800"


def test_names_that_strangers_wrote_do_nothing_to_a_terminal(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(saved, dataset=NASTY, base_model=NASTY, library_version=NASTY)
    assert cli.main(["vocab", str(saved), "--output", str(saved.parent / "x.png")]) == 0
    shown = capsys.readouterr().out
    assert "evil" in shown and all(letter.isprintable() for letter in shown.replace("\n", ""))
    assert len(shown.splitlines()) == len(vocab.facts(VisualVocabulary.from_pretrained(saved))) + 2


def test_errors_show_what_strangers_wrote_harmlessly(saved: Path) -> None:
    for field in ("file", "sha256", "patches", "image_mean"):
        edit(saved, **{field: NASTY})
        with pytest.raises(ValueError, match=field) as refusal:
            VisualVocabulary.from_pretrained(saved)
        assert str(refusal.value).isprintable()
        edit(saved, file="vocabulary.safetensors", sha256=None, patches=None, image_mean=None)


def test_names_that_strangers_wrote_are_text_in_a_card(saved: Path) -> None:
    edit(saved, dataset=NASTY, base_model=f"{NASTY}/x", library_version=NASTY)
    VisualVocabulary.from_pretrained(saved).save_pretrained(saved)
    card = huggingface_hub.ModelCard((saved / "README.md").read_text(encoding="utf-8"))
    assert card.data.datasets is None and card.data.base_model is None
    rows = [line for line in card.content.splitlines() if "evil" in line]
    assert len(rows) == 3
    for row in rows:
        # One code span that fills the second of two cells.
        assert re.fullmatch(r"\| [a-z -]+ \| `[^`|]*` \|", row) and row.isprintable()


def test_a_card_names_its_folder_as_python_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" folder'
    VisualVocabulary(torch.rand(2, 3, 4, 4)).save_pretrained(folder)
    call = re.search(r"from_pretrained\((.*)\)", (folder / "README.md").read_text())
    assert call is not None and ast.literal_eval(call.group(1)) == str(folder)


def test_a_vocabulary_without_a_deviation_has_a_card(tmp_path: Path) -> None:
    VisualVocabulary(torch.rand(2, 3, 4, 4), info=VocabularyInfo(image_mean=(0.5,) * 3)).save_pretrained(tmp_path)
    assert "# 2 visual words" in (tmp_path / "README.md").read_text()


def test_words_that_are_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(size, channels, p, p\)"):
        VisualVocabulary(torch.rand(4, 3, 4, 5))
    with pytest.raises(ValueError, match="words are list"):
        VisualVocabulary([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected int64 \(4,\)"):
        VisualVocabulary(torch.rand(4, 3, 4, 4), torch.ones(3))
    with pytest.raises(ValueError, match="words are on the meta device"):
        VisualVocabulary(torch.rand(4, 3, 4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"words are torch\.sparse_coo"):
        VisualVocabulary(torch.rand(4, 3, 4, 4).to_sparse())
    with pytest.warns(UserWarning, match=r"hold values from .* to 25\d.*; expected raw RGB, .* by 255"):
        VisualVocabulary(torch.rand(40, 3, 4, 4) * 255).require(4, channels=3)
    with pytest.raises(ValueError, match=r"4 of 4 words .* not finite"):
        VisualVocabulary(torch.full((4, 3, 4, 4), 1e300, dtype=torch.float64))


def test_words_of_any_length_have_a_direction() -> None:
    words = torch.rand(3, 3, 4, 4)
    expected = torch.nn.functional.normalize(VisualVocabulary(words).normalized(0.0, 0.5), dim=1)
    long = VisualVocabulary(words * 3e38).normalized(0.0, 0.5)
    torch.testing.assert_close(torch.nn.functional.normalize(long, dim=1), expected)
    sharp = VisualVocabulary(words).normalized(0.0, 1e-300)
    torch.testing.assert_close(torch.nn.functional.normalize(sharp, dim=1), expected)


def test_a_place_without_a_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds neither vocabulary\.json nor vocab\.pt"):
        VisualVocabulary.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        VisualVocabulary.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="me/words"):
        VisualVocabulary.from_pretrained("me/words", cache_dir=tmp_path, local_files_only=True)


def test_a_bare_vocab_pt_is_imported_as_clips_with_a_warning(tmp_path: Path) -> None:
    raw = torch.rand(5, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    torch.save(((raw - mean) / std).flatten(1).float(), tmp_path / "vocab.pt")
    with pytest.warns(UserWarning, match=r"vocab\.pt .*CLIP"):
        imported = VisualVocabulary.from_pretrained(tmp_path)
    torch.testing.assert_close(imported.words.double(), raw, rtol=0, atol=2e-7)
    assert imported.info.image_mean == pytest.approx(CLIP_MEAN)


class Malicious:
    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.at),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_without_being_run(tmp_path: Path, writer: str) -> None:
    (tmp_path / "words").mkdir()
    with open(tmp_path / "words" / "vocab.pt", "wb") as file:
        (torch.save if writer == "torch" else pickle.dump)(Malicious(tmp_path / "run"), file)
    with pytest.raises(ValueError, match=r"words: vocab\.pt: it cannot be read as tensors alone"):
        VisualVocabulary.from_pretrained(tmp_path / "words")
    assert not (tmp_path / "run").exists()


OTHERS: dict[str, Any] = {
    "another width": torch.rand(5, 100),
    "integers": torch.ones(5, 768, dtype=torch.int64),
    "a dict": {"words": torch.rand(5, 768)},
    "a list": [1],
    "one value for all": torch.zeros(1).expand(300_000, 768),
    "a view of more": torch.rand(50, 768)[:5],
    "columns": torch.rand(768, 5).T,
    "no values": torch.zeros(5, 768, device="meta"),
    "sparse": torch.eye(768)[:4].to_sparse(),
    "nested": torch.nested.nested_tensor([torch.zeros(4, 768)], layout=torch.strided),
    "float8": torch.rand(4, 768).to(torch.float8_e4m3fn),
    "beyond all pixels": torch.full((4, 768), 1e30),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_any_other_vocab_pt_is_refused(tmp_path: Path, name: str) -> None:
    torch.save(OTHERS[name], tmp_path / "vocab.pt")
    with pytest.raises(ValueError, match=r"vocab\.pt: .*expected (one float tensor \(size, 768\)|raw RGB)") as refusal:
        VisualVocabulary.from_pretrained(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path))


def packed(tmp_path: Path, change: Any) -> Path:
    """A good `vocab.pt` whose records are put together anew, as `change(name, content)` says."""
    plain = io.BytesIO()
    torch.save(torch.rand(40, 768), plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(tmp_path / "vocab.pt", "w") as new:
        for record in old.infolist():
            change(new, record.filename, old.read(record))
    return tmp_path


def without_description(new: zipfile.ZipFile, name: str, content: bytes) -> None:
    if not name.endswith("data.pkl"):
        new.writestr(name, content)


NESTED = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"ccollections\nOrderedDict\nh\x00h\x00\x86\x85\x85R."
ZIPS: dict[str, Any] = {
    "deflated": lambda new, name, content: new.writestr(name, content, zipfile.ZIP_DEFLATED),
    "too short": lambda new, name, content: new.writestr(name, content[:-8] if name.endswith("data/0") else content),
    "too long": lambda new, name, content: new.writestr(name, content + bytes(8) * name.endswith("data/0")),
    "big-endian": lambda new, name, content: new.writestr(name, b"big" if name.endswith("byteorder") else content),
    "without a description": without_description,
    "many records": lambda new, name, content: [new.writestr(f"{name}{i or ''}", content) for i in range(12)],
    "more records than a list holds": lambda new, name, content: [
        new.writestr(f"{name}{i or ''}", b"") for i in range(300)
    ],
    # Every level of nested tuples doubles what it takes to hash them, in one call that no Ctrl-C ends.
    "hooks of tuples": lambda new, name, content: new.writestr(name, NESTED if name.endswith("data.pkl") else content),
    "a memo that fills memory": lambda new, name, content: new.writestr(
        name, content[:-1] + b"r\xff\xff\xff\x7f." if name.endswith("data.pkl") else content
    ),
    "a long description": lambda new, name, content: new.writestr(
        name, content[:-1] + b"q\x00" * 3000 + b"." if name.endswith("data.pkl") else content
    ),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_vocab_pt_that_torch_would_not_write_is_refused(tmp_path: Path, name: str) -> None:
    packed(tmp_path, lambda new, at, content: new.writestr(at, content))
    with pytest.warns(UserWarning, match=r"vocab\.pt"):
        assert len(VisualVocabulary.from_pretrained(tmp_path)) == 40
    with pytest.raises(ValueError, match=r"vocab\.pt: .*expected one float tensor"):
        VisualVocabulary.from_pretrained(packed(tmp_path, ZIPS[name]))


def test_words_of_more_bytes_than_are_taken_are_refused(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(torch.rand(5, 768), tmp_path / "vocab.pt")
    monkeypatch.setattr("vwt_hf.vocabulary.word_files.MOST_BYTES", 1000)
    for folder, takes in ((saved, "1,152"), (tmp_path, "15,360")):
        with pytest.raises(ValueError, match=rf"its words take {takes} bytes in float32; expected 1,000 at most"):
            VisualVocabulary.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("more records than a list holds", r"its list of records takes \d+,\d+ bytes"),
        ("deflated", "is compressed, which torch.save does not do"),
        ("a long description", "it holds a description that is longer than one tensor's"),
    ],
)
def test_a_vocab_pt_is_refused_before_its_records_are_read(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"vocab\.pt: .*{said}"):
        VisualVocabulary.from_pretrained(packed(tmp_path, ZIPS[name]))


def test_a_vocab_pt_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    torch.save(torch.rand(5, 768), tmp_path / "elsewhere.pt")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.pt").symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(ValueError, match=r"vocab\.pt: it is a link that leads out of the folder"):
        VisualVocabulary.from_pretrained(tmp_path / "words")


def with_longer_record(content: bytes) -> bytes:
    """A zip in whose list of records the longest has a gigabyte."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size = max(record.file_size for record in archive.infolist()).to_bytes(4, "little")
    head, listed = content[: content.index(b"PK\1\2")], content[content.index(b"PK\1\2") :]
    return head + listed.replace(size + size, (2**30).to_bytes(4, "little") * 2)


def with_large_numbers(content: bytes, record: bytes = b"", place: int = 0) -> bytes:
    """A zip that says that a `record` of larger numbers (zip64) lies at a `place`."""
    return content[:-22] + record + b"PK\6\7" + struct.pack("<IQI", 0, place, 1) + content[-22:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: with_large_numbers(content, place=len(content) - 78), "does not end as a file that torch.s"),
        (lambda content: with_large_numbers(content, b"PK\6\6" + bytes(52)), "does not end as a file that torch.save"),
        (lambda content: content[:-30], "does not end as a file that torch.save wrote"),
        (lambda content: content + b"more", "does not end as a file that torch.save wrote"),
        (with_longer_record, "data/0' claims more bytes than the file has"),
    ],
)
def test_a_vocab_pt_whose_list_of_records_is_damaged_says_how(tmp_path: Path, change: Any, said: str) -> None:
    file = packed(tmp_path, lambda new, at, content: new.writestr(at, content)) / "vocab.pt"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"vocab\.pt: .*{said}.*; expected one float tensor"):
        VisualVocabulary.from_pretrained(tmp_path)


PEAK = """
import re, sys, warnings, torch
from vwt_hf import VisualVocabulary
warnings.simplefilter("ignore")
def status(name): return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
VisualVocabulary.from_pretrained(sys.argv[1])
for folder in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    vocabulary = VisualVocabulary.from_pretrained(folder)
    print((status("VmHWM") - before) / (4 * vocabulary.words.numel()))
    del vocabulary
"""


@pytest.mark.newest
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux, to measure peak memory")
def test_loading_takes_little_more_memory_than_the_words(tmp_path: Path, saved: Path) -> None:
    words = torch.rand(30_000, 3, 16, 16)
    VisualVocabulary(words, torch.ones(30_000, dtype=torch.int64)).save_pretrained(tmp_path / "new", card=False)
    (tmp_path / "old").mkdir()
    torch.save(words.flatten(1), tmp_path / "old" / "vocab.pt")
    command = [sys.executable, "-c", PEAK, str(saved), str(tmp_path / "new"), str(tmp_path / "old")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 2 and all(0.5 < ratio < 2 for ratio in ratios), ratios


def cached(saved: Path, cache: Path, commit: str = "a" * 40) -> None:
    """Lays `saved` out as huggingface_hub keeps a downloaded repository."""
    repository = cache / "models--me--words"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(saved)


def test_a_downloaded_vocabulary_loads_offline_and_tells_its_commit(saved: Path, tmp_path: Path) -> None:
    cached(saved, tmp_path / "cache")
    loaded = VisualVocabulary.from_pretrained("me/words", cache_dir=tmp_path / "cache", local_files_only=True)
    assert (loaded.source, loaded.revision) == ("me/words", "a" * 40)
    assert torch.equal(loaded.words, load_file(saved / "vocabulary.safetensors")["words"])


def test_both_files_are_asked_for_at_one_commit_with_what_the_user_passed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where a cache and a folder of the repository have the name by which huggingface_hub's have commits."""
    snapshot = tmp_path / "snapshots" / "hf" / "snapshots" / "c0ffee"
    words = snapshot / "snapshots" / "p16"
    words.parent.mkdir(parents=True)
    words.symlink_to(saved)
    asked = []

    def download(**kwargs: Any) -> str:
        asked.append(kwargs)
        return str(words / kwargs["filename"])

    for module in (files, hub_names):
        monkeypatch.setattr(module, "hf_hub_download", download)
    own = {"token": "t", "subfolder": "snapshots/p16", "cache_dir": "c"}
    VisualVocabulary.from_pretrained("me/words", revision="main", **own)
    assert [call["revision"] for call in asked] == ["main", "c0ffee"]
    assert all(call.items() >= own.items() for call in asked)


UNREADABLE: dict[str, Any] = {
    "fewer than frequencies": (
        lambda words: words[:5],
        r"frequencies are torch\.int64 of shape \(9,\); expected int64",
    ),
    "8-bit": (lambda words: words * 255, "expected raw RGB, which is in"),
    "no numbers": (lambda words: words * torch.nan, "9 of 9 words hold values that are not finite"),
    "bytes": (lambda words: (words * 255).byte(), r"words are torch\.uint8; expected a floating-point tensor"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_words_that_would_not_be_read_again_are_not_written_over_good_ones(tmp_path: Path, hub: Any, name: str) -> None:
    change, message = UNREADABLE[name]
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4), torch.arange(9))
    saved = tmp_path / "words"
    vocabulary.save_pretrained(saved)
    vocabulary.push_to_hub("me/words")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    good, head = vocabulary.words, hub.head("me/words")
    vocabulary.words = change(vocabulary.words)
    for write in (lambda: vocabulary.save_pretrained(saved), lambda: vocabulary.push_to_hub("me/words")):
        with pytest.raises(ValueError, match=message):
            write()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before and hub.head("me/words") == head
    assert torch.equal(VisualVocabulary.from_pretrained(saved).words, good)


def test_facts_that_would_not_be_read_again_are_not_written(tmp_path: Path) -> None:
    many = VisualVocabulary(torch.rand(1, 5000, 1, 1), info=VocabularyInfo(image_mean=(1 / 3,) * 5000))
    with pytest.raises(ValueError, match=r"vocabulary\.json would have .* bytes; expected 65,536 at most"):
        many.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "own",
    [
        b"---\nlicense: mit\n---\nMy model, unlike\n- visual-words\n",
        b"---\nlibrary_name: vwt-hf\nmodel-index: []\n---\n# Figures\n",  # as `vwt-hf evaluate --card` makes one
        b"---\nlibrary_name: transformers\ntags:\n- visual-words\n- token-reduction\n---\n# My model\n",
        b"---\nlibrary_name: vwt-hf\ntags:\n- visual-words\nmodel-index: []\n---\n# My model\n",
    ],
)
def test_a_readme_of_something_else_stays(tmp_path: Path, hub: Any, own: bytes) -> None:
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4))
    saved = tmp_path / "words"
    saved.mkdir()
    (saved / "README.md").write_bytes(own)
    hub.put("me/model", {"README.md": own, "config.json": b"{}"})
    with pytest.warns(
        UserWarning, match="has a README.md that is no card of visual words, or was edited, .*, which stays"
    ):
        vocabulary.save_pretrained(saved)
    with pytest.warns(UserWarning, match=r"me/model has a README\.md that is no card of visual words"):
        vocabulary.push_to_hub("me/model")
    for files_of in ({path.name: path.read_bytes() for path in saved.iterdir()}, hub.files("me/model")):
        assert files_of["README.md"] == own and "words.png" not in files_of
    for source in (saved, "me/model"):
        assert torch.equal(VisualVocabulary.from_pretrained(source).words, vocabulary.words)


def test_facts_and_names_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"info is a dict; expected a vwt_hf\.vocabulary\.files\.VocabularyInfo"):
        VisualVocabulary(torch.rand(2, 3, 4, 4), info={"seed": 1})  # type: ignore[arg-type]
    for name in (None, 5, ""):
        with pytest.raises(ValueError, match="; expected a Hub id or a folder"):
            VisualVocabulary.from_pretrained(name)  # type: ignore[arg-type]


def test_frequencies_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frequencies are a list; expected a tensor, int64 \(3,\)"):
        VisualVocabulary(torch.rand(3, 3, 4, 4), [1, 2, 3])


def test_a_card_that_somebody_edited_stays(tmp_path: Path, hub: Any) -> None:
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4))
    vocabulary.save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_bytes()
    picture = (tmp_path / "words.png").read_bytes()
    for edited in (written.replace(b"---\n", b"---\nlicense: mit\n", 1), written + b"\n## Ours\n"):
        (tmp_path / "README.md").write_bytes(edited)
        hub.put("me/words", {"README.md": edited})
        with pytest.warns(UserWarning, match="or was edited, or is of an earlier version, which stays"):
            VisualVocabulary(torch.rand(7, 3, 4, 4)).save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="or was edited, or is of an earlier version, which stays"):
            vocabulary.push_to_hub("me/words")
        assert (tmp_path / "README.md").read_bytes() == hub.files("me/words")["README.md"] == edited
        assert (tmp_path / "words.png").read_bytes() == picture
    (tmp_path / "README.md").write_bytes(written.replace(b"\n", b"\r\n"))  # as git on Windows checks it out
    VisualVocabulary(torch.rand(7, 3, 4, 4)).save_pretrained(tmp_path)
    assert b"# 7 visual words" in (tmp_path / "README.md").read_bytes()


def test_a_picture_that_is_no_vocabularys_stays(tmp_path: Path) -> None:
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4))
    (tmp_path / "words.png").write_bytes(b"a photograph of words")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"has a words\.png beside no card of words, which stays\."):
            vocabulary.save_pretrained(tmp_path)
        assert (tmp_path / "words.png").read_bytes() == b"a photograph of words"
    assert not (tmp_path / "README.md").exists()
    assert torch.equal(VisualVocabulary.from_pretrained(tmp_path).words, vocabulary.words)


def test_the_card_of_words_that_lay_there_before_is_replaced(tmp_path: Path, hub: Any) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "README.md").write_text("\n")
    for size in (9, 7):
        vocabulary = VisualVocabulary(torch.rand(size, 3, 4, 4))
        vocabulary.words = vocabulary.words.bfloat16().requires_grad_()
        vocabulary.save_pretrained(tmp_path / "words")
        vocabulary.push_to_hub("me/words")
        for readme in ((tmp_path / "words" / "README.md").read_bytes(), hub.files("me/words")["README.md"]):
            assert f"({size}, 3, 4, 4), raw RGB".encode() in readme


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"revision": "bränch"}, "revision is 'bränch'"),
        ({"revision": "-x"}, "revision is '-x'"),
        ({"subfolder": "words/"}, "subfolder is 'words/'"),
        ({"subfolder": "a//b"}, "subfolder is 'a//b'"),
    ],
)
def test_words_are_not_pushed_to_where_none_are_loaded_from(hub: Any, where: dict[str, str], message: str) -> None:
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4))
    with pytest.raises(ValueError, match=message):
        vocabulary.push_to_hub("me/words", **where)
    assert not hub.requests


def test_a_card_on_the_hub_is_looked_at_as_it_is_and_not_as_it_was(hub: Any, tmp_path: Path) -> None:
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4))
    vocabulary.push_to_hub("me/words")
    huggingface_hub.hf_hub_download("me/words", "README.md")  # now in the cache
    hub.put("me/words", {"README.md": b"# Mine\n"})
    head = hub.head("me/words")
    hub.fail(next=None, path="README.md", status=503)
    with pytest.raises((OSError, huggingface_hub.errors.HfHubHTTPError)):
        vocabulary.push_to_hub("me/words")
    assert hub.head("me/words") == head and hub.files("me/words")["README.md"] == b"# Mine\n"


def test_words_are_pushed_where_no_cache_can_be_written(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/proc/no-folder-can-be-made-here")
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4))
    for _ in range(2):
        vocabulary.push_to_hub("me/words")
    assert "README.md" in hub.files("me/words")


class Halved(VisualVocabulary):
    """As a user may have one whose words mean something else."""

    def normalized(self, image_mean: Any, image_std: Any) -> torch.Tensor:
        return super().normalized(image_mean, image_std) / 2


def test_a_copy_is_of_the_same_words_and_keeps_them() -> None:
    assert type(Halved(torch.rand(9, 3, 4, 4)).copy()) is Halved
    vocabulary = VisualVocabulary(torch.rand(9, 3, 4, 4), torch.arange(9), VocabularyInfo(dataset="mine"))
    words, frequencies = vocabulary.words.clone(), torch.arange(9)
    copied = vocabulary.copy()
    vocabulary.words.zero_()
    vocabulary.frequencies.zero_()
    assert torch.equal(copied.words, words) and torch.equal(copied.frequencies, frequencies)
    assert copied.info == vocabulary.info


def test_words_are_the_same_under_autocast(folder: Path, processor: Any) -> None:
    plain = make(folder, processor)
    with torch.autocast("cpu", torch.bfloat16):
        found = make(folder, processor)
    assert torch.equal(found.words, plain.words) and found.info == plain.info
