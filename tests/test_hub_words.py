"""Vocabularies, and models that use them, over the Hub: the real client against `loopback_hub`."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModel

from tiny import answers, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, compress

STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.fixture
def vocabulary() -> VisualVocabulary:
    return VisualVocabulary(torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12))


@pytest.fixture
def files(vocabulary, tmp_path) -> dict[str, bytes]:
    vocabulary.save_pretrained(tmp_path / "words")
    return {path.name: path.read_bytes() for path in (tmp_path / "words").iterdir()}


def cached(name: str) -> list[Path]:
    return list(Path(constants.HF_HUB_CACHE).rglob(name))


def test_a_pushed_vocabulary_comes_back_with_its_card(hub, vocabulary):
    commit = vocabulary.push_to_hub("me/words", private=True)
    assert hub.repos["me/words"].private
    assert sum("/commit/" in request.path for request in hub.requests) == 1
    names = {"README.md", "vocabulary.json", "vocabulary.safetensors", "words.png"}
    assert names <= set(hub.files("me/words"))
    loaded = VisualVocabulary.from_pretrained("me/words")
    assert torch.equal(loaded.words, vocabulary.words) and torch.equal(loaded.frequencies, vocabulary.frequencies)
    assert (loaded.source, loaded.revision) == ("me/words", commit.oid) == (vocabulary.source, vocabulary.revision)
    card = ModelCard(hub.files("me/words")["README.md"].decode())
    assert card.data.library_name == "vwt-hf" and 'from_pretrained("me/words")' in card.text.replace("'", '"')
    assert hub.files("me/words")["words.png"].startswith(b"\x89PNG")


def test_a_branch_a_commit_and_a_subfolder_are_found(hub, vocabulary):
    first = vocabulary.push_to_hub("me/words").oid
    other = VisualVocabulary(vocabulary.words.flip(0))
    other.push_to_hub("me/words", revision="flipped")
    other.push_to_hub("me/words", subfolder="p4")
    assert torch.equal(VisualVocabulary.from_pretrained("me/words", revision=first).words, vocabulary.words)
    assert torch.equal(VisualVocabulary.from_pretrained("me/words", revision="flipped").words, other.words)
    assert torch.equal(VisualVocabulary.from_pretrained("me/words", subfolder="p4").words, other.words)
    assert torch.equal(VisualVocabulary.from_pretrained("me/words").words, vocabulary.words)


def test_after_a_first_download_no_network_is_needed(hub, files, vocabulary):
    hub.put("me/words", files)
    VisualVocabulary.from_pretrained("me/words")
    hub.offline()
    assert torch.equal(VisualVocabulary.from_pretrained("me/words").words, vocabulary.words)
    before = len(hub.requests)
    VisualVocabulary.from_pretrained("me/words", local_files_only=True)
    assert len(hub.requests) == before


def test_a_revoked_token_is_told_with_the_repository(hub, files):
    hub.put("me/words", files)
    hub.repos["me/words"].private = True
    hub.revoke(hub.token)
    with pytest.raises(HfHubHTTPError, match="me/words"):
        VisualVocabulary.from_pretrained("me/words")
    with pytest.raises(HfHubHTTPError):
        VisualVocabulary(torch.rand(2, 3, 4, 4)).push_to_hub("me/words")


@pytest.mark.parametrize("step", ["/preupload/", "/objects/batch", "/lfs/me/words/", "/commit/"])
def test_an_interrupted_upload_leaves_the_old_words_whole_and_can_be_repeated(hub, vocabulary, step):
    vocabulary.push_to_hub("me/words")
    before = hub.files("me/words")
    other = VisualVocabulary(vocabulary.words.flip(0))
    hub.truncate(step, after_bytes=0, next=None)
    with pytest.raises(Exception):  # noqa: B017  the client raises whatever its transport does
        other.push_to_hub("me/words")
    assert hub.files("me/words") == before
    hub.heal()
    other.push_to_hub("me/words")
    assert torch.equal(VisualVocabulary.from_pretrained("me/words").words, other.words)


def test_an_interrupted_download_leaves_nothing_half_and_can_be_repeated(hub, files, vocabulary):
    hub.put("me/words", files)
    hub.truncate("vocabulary.safetensors", after_bytes=100, next=None)
    with pytest.raises(Exception):  # noqa: B017
        VisualVocabulary.from_pretrained("me/words")
    assert not cached("vocabulary.safetensors")
    hub.heal()
    assert torch.equal(VisualVocabulary.from_pretrained("me/words").words, vocabulary.words)


def changed(files: dict[str, bytes], **fields) -> dict[str, bytes]:
    return files | {"vocabulary.json": json.dumps(json.loads(files["vocabulary.json"]) | fields).encode()}


class Runs:
    """A pickle that would leave a mark if it were loaded."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def torch_file(value) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


LIES = {
    "truncated": lambda files: files | {"vocabulary.safetensors": files["vocabulary.safetensors"][:-100]},
    "empty": lambda files: files | {"vocabulary.safetensors": b""},
    "another size": lambda files: changed(files, size=13),
    "another patch size": lambda files: changed(files, patch_size=16),
    "a path that climbs": lambda files: changed(files, file="../../../etc/passwd"),
    "an absolute path": lambda files: changed(files, file="/etc/passwd"),
    "no JSON": lambda files: files | {"vocabulary.json": b"{"},
    "a pickle as safetensors": lambda files: files | {"vocabulary.safetensors": pickle.dumps(Runs())},
    "a pickle as JSON": lambda files: files | {"vocabulary.json": pickle.dumps(Runs())},
    "a pickle as vocab.pt": lambda files: {"vocab.pt": torch_file(Runs())},
    "not finite": lambda files: (
        files | {"vocabulary.safetensors": safetensors.torch.save({"words": torch.full((12, 3, 4, 4), float("nan"))})}
    ),
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_repository_that_lies_is_refused_by_its_name_and_the_files(hub, files, lie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.put("me/words", LIES[lie](files))
    with pytest.raises(ValueError, match=r"me/words.*vocab"):
        VisualVocabulary.from_pretrained("me/words")
    with pytest.raises(ValueError, match=r"me/words.*vocab"):
        compress(tiny_model("vit"), VWTConfig(method="inter", vocabulary="me/words", **STATISTICS))
    assert not (tmp_path / "executed").exists()


def test_the_authors_bare_tensor_is_imported_and_said(hub):
    words = torch.randn(5, 3 * 16 * 16)
    hub.put("authors/vwt", {"vocab.pt": torch_file(words)})
    with pytest.warns(UserWarning, match="vocab.pt"):
        loaded = VisualVocabulary.from_pretrained("authors/vwt")
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    torch.testing.assert_close(loaded.normalized(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD), words, atol=1e-5, rtol=1e-5)


@pytest.fixture
def checkpoint(hub, files, tmp_path) -> str:
    """A plain model with an image processor at me/tiny, and words at me/words."""
    tiny_model("vit").save_pretrained(tmp_path / "tiny")
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil
    processor(size={"height": 32, "width": 32}, **STATISTICS).save_pretrained(tmp_path / "tiny")
    hub.put("me/tiny", {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()})
    return hub.put("me/words", files)


def test_a_model_holds_the_commit_of_its_words_and_keeps_to_it(hub, checkpoint, vocabulary, pixel_values, tmp_path):
    model = AutoModel.from_pretrained("me/tiny", vwt="me/words")
    setting = {"method": "inter", "vocabulary": "me/words", "threshold": 0.1, **STATISTICS}
    expected = compress(tiny_model("vit"), setting | {"vocabulary": vocabulary})
    assert torch.equal(answers(model, pixel_values), answers(expected, pixel_values))
    assert model.config.vwt["vocabulary"] == "me/words" and model.config.vwt["revision"] == checkpoint

    model.push_to_hub("me/short")
    assert not any(name.startswith("visual_words") for name in hub.files("me/short"))
    VisualVocabulary(1 - vocabulary.words).push_to_hub("me/words")
    again = AutoModel.from_pretrained("me/short")
    assert again.config.vwt == model.config.vwt
    torch.testing.assert_close(answers(again, pixel_values), answers(model, pixel_values))


def test_a_model_with_words_of_its_own_is_pushed_with_them(hub, checkpoint, vocabulary, pixel_values):
    model = AutoModel.from_pretrained("me/tiny", vwt=VWTConfig(method="inter", vocabulary=vocabulary, threshold=0.3))
    model.push_to_hub("me/short")
    saved = f"visual_words-{model.config.vwt['saved_as']}"
    assert {f"{saved}/vocabulary.json", f"{saved}/sealed.json"} < set(hub.files("me/short"))
    for auto in (AutoModel, transformers.ViTModel):
        again = auto.from_pretrained("me/short")
        assert again.config.vwt == model.config.vwt and again.config.vwt["vocabulary"] is None
        torch.testing.assert_close(answers(again, pixel_values), answers(model, pixel_values))
    hub.offline()
    torch.testing.assert_close(
        answers(AutoModel.from_pretrained("me/short"), pixel_values), answers(model, pixel_values)
    )


def test_words_from_a_subfolder_are_saved_with_the_model(hub, checkpoint, vocabulary, pixel_values, tmp_path):
    other = VisualVocabulary(vocabulary.words.flip(1))
    other.push_to_hub("me/words", subfolder="p4")
    words = VisualVocabulary.from_pretrained("me/words", subfolder="p4")
    model = AutoModel.from_pretrained("me/tiny", vwt=VWTConfig(method="inter", vocabulary=words, threshold=0.3))
    model.save_pretrained(tmp_path / "short")
    again = AutoModel.from_pretrained(tmp_path / "short")
    torch.testing.assert_close(answers(again, pixel_values), answers(model, pixel_values))


def test_saving_with_push_to_hub_uploads_the_words_too(hub, checkpoint, vocabulary, pixel_values, tmp_path):
    model = AutoModel.from_pretrained("me/tiny", vwt=VWTConfig(method="inter", vocabulary=vocabulary, threshold=0.3))
    model.save_pretrained(tmp_path / "short", push_to_hub=True, repo_id="me/short", private=True)
    assert hub.repos["me/short"].private
    again = AutoModel.from_pretrained("me/short")
    torch.testing.assert_close(answers(again, pixel_values), answers(model, pixel_values))


def test_a_private_vocabulary_takes_the_models_token(hub, checkpoint, monkeypatch):
    hub.repos["me/words"].private = hub.repos["me/tiny"].private = True
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises((OSError, HfHubHTTPError), match=r"me/tiny|me/words"):
        AutoModel.from_pretrained("me/tiny", vwt="me/words", token=hub.stranger_token)
    assert AutoModel.from_pretrained("me/tiny", vwt="me/words", token=hub.read_token).config.vwt["method"] == "inter"


def test_a_vocabulary_that_does_not_exist_is_named(hub, checkpoint):
    with pytest.raises((OSError, HfHubHTTPError), match="me/nothing"):
        AutoModel.from_pretrained("me/tiny", vwt="me/nothing")
