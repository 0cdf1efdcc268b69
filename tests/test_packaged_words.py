"""The words that come with the package: which models go by them, and that they are what their card says."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from settings import STATISTICS, WORDS
from test_pipeline import PHOTOGRAPHS, image_processor_class
from tiny import answers, sample_pixel_values, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, compress
from vwt_hf.packaged_words import FOLDER, PATCH_SIZES, packaged_words

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import learn_packaged_words

CARD = Path(__file__).parents[1] / "model_cards/packaged-words.md"
sizes = pytest.mark.parametrize("patch_size", PATCH_SIZES)


def model(patch_size: int) -> transformers.PreTrainedModel:
    return tiny_model("vit", patch_size=patch_size, image_size=4 * patch_size)


def images(patch_size: int) -> torch.Tensor:
    """Noise, with a part as flat as many words are."""
    pixel_values = sample_pixel_values(2, 4 * patch_size, 4 * patch_size)
    pixel_values[:, :, : 2 * patch_size] = 0.7
    return pixel_values


@sizes
def test_a_model_without_words_goes_by_those_of_the_package(patch_size):
    named = compress(
        model(patch_size), VWTConfig(method="inter", vocabulary=packaged_words((patch_size,) * 2, 3), **STATISTICS)
    )
    found = compress(model(patch_size), {"method": "inter", **STATISTICS})
    pixel_values = images(patch_size)
    assert torch.equal(answers(found, pixel_values), answers(named, pixel_values))
    assert not torch.equal(answers(found, pixel_values), answers(model(patch_size), pixel_values))


def test_they_are_saved_with_the_model_and_the_image_processor_and_stay_what_they_were(tmp_path, monkeypatch):
    setting = {"method": "inter", **STATISTICS}
    first = compress(model(16), setting)
    first.save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    image_processor_class("vit")(size=size).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=setting)
    processor.save_pretrained(tmp_path)
    made = processor(PHOTOGRAPHS, return_tensors="pt")

    def refuse(*_):
        raise AssertionError("it took the words of the package")

    monkeypatch.setattr(sys.modules["vwt_hf.methods.inter"], "packaged_words", refuse)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert loaded.config.vwt["saved_as"]
    assert torch.equal(answers(loaded, images(16)), answers(first, images(16)))
    again = AutoImageProcessor.from_pretrained(tmp_path)(PHOTOGRAPHS, return_tensors="pt")
    assert all(torch.equal(again[name], made[name]) for name in made)


def test_a_config_that_was_saved_with_words_never_gets_those_of_the_package_in_their_place(tmp_path):
    model(16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vwt": {"method": "inter", **STATISTICS}}))
    with pytest.raises(FileNotFoundError, match=r"holds no vocabulary\.json"):
        transformers.AutoModel.from_pretrained(tmp_path)
    named = {"method": "inter", "vocabulary": "me/words", **STATISTICS}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vwt": named}))
    with pytest.raises(ValueError, match=r"vocabulary is None, and the model was saved with 'me/words'; give that"):
        transformers.AutoModel.from_pretrained(tmp_path, vwt={"method": "inter", "threshold": 0.2})
    given = transformers.AutoModel.from_pretrained(
        tmp_path, vwt=VWTConfig(method="inter", vocabulary=VisualVocabulary(torch.rand(5, 3, 16, 16)), **STATISTICS)
    )
    assert given.config.vwt["method"] == "inter"


@pytest.mark.parametrize("fields", [{}, {"num_channels": 1}])
def test_patches_that_there_are_no_words_for_are_refused(fields):
    said = rf"cuts 4×4 patches of {fields.get('num_channels', 3)} channels.* of 14, 16, 32 pixels.*`vwt-hf learn`"
    with pytest.raises(ValueError, match=said):
        compress(tiny_model("vit", **fields), {"method": "inter", **STATISTICS})


def test_words_of_the_model_come_before_those_of_the_package():
    large = VisualVocabulary(WORDS.words.repeat(1, 1, 4, 4))
    first = compress(model(16), VWTConfig(method="inter", vocabulary=large, threshold=0.3, **STATISTICS))
    again = compress(first, {"method": "inter", "threshold": 0.1})
    assert torch.equal(sys.modules["vwt_hf.compress"].lexicon_of(again).vocabulary.words, large.words)


@sizes
def test_they_are_what_their_card_says(patch_size):
    (row,) = re.findall(rf"^\| {patch_size} \| (.*) \|$", CARD.read_text(), re.MULTILINE)
    count, patches, inertia, length, digest = (cell.strip("`").replace(",", "") for cell in row.split(" | "))
    content = (FOLDER / f"patch{patch_size}/vocabulary.safetensors").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (int(length), digest)
    words = packaged_words((patch_size, patch_size), 3)
    assert (len(words), words.patch_size, words.info.patches) == (int(count), patch_size, int(patches))
    assert f"{words.info.inertia:.4g}" == inertia
    low, high = (float(value) for value in words.words.aminmax())
    assert low >= 0 and high <= 1 and words.words.std() > 0.1
    assert int(words.frequencies.min()) >= learn_packaged_words.FEWEST_PATCHES


def test_all_files_of_the_package_together_stay_small():
    package = Path(sys.modules["vwt_hf"].__file__).parent
    assert sum(path.stat().st_size for path in package.rglob("*") if "__pycache__" not in path.parts) < 10e6


@pytest.mark.newest
@pytest.mark.skipif(is_torchvision_available(), reason="they were learned of images that Pillow resized")
def test_the_command_of_their_card_makes_them(shared, tmp_path, capsys):
    """Of the largest patches, which are fewest. By another processor's rounding some words become others, as good."""
    given = [str(shared / "data/imagenet-sample/train"), "--output", str(tmp_path), "--patch-sizes", "32"]
    learn_packaged_words.main([*given, "--image-processor", str(shared / "models/dinov2-small-caltech101")])
    assert "| 32 |" in capsys.readouterr().out
    made = VisualVocabulary.from_pretrained(tmp_path / "patch32")
    kept = packaged_words((32, 32), 3)
    assert made.info.inertia == pytest.approx(kept.info.inertia, rel=1e-3) and made.info.patches == kept.info.patches
    assert len(made) == pytest.approx(len(kept), rel=0.03)
    rows, others = (words.words.flatten(1) for words in (made, kept))
    apart = torch.cdist(others, others).fill_diagonal_(torch.inf).amin(dim=1)
    assert (torch.cdist(others, rows).amin(dim=1) < apart / 4).float().mean() > 0.8
