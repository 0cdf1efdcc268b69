"""Vocabularies, and models that use them, over the Hub: the real client against `loopback_hub`."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModel

import vwt_hf
from tiny import answers, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, compress
from vwt_hf.compress import lexicon_of
from vwt_hf.vocabulary import load_vocabulary
from vwt_hf.vocabulary.files import download_if_there

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


def test_the_card_tells_from_where_its_own_words_are_loaded(hub, vocabulary):
    other = VisualVocabulary(vocabulary.words.flip(0))
    vocabulary.push_to_hub("me/words")
    other.push_to_hub("me/words", revision="flipped", subfolder="p4")
    card = ModelCard(hub.files("me/words", "flipped")["p4/README.md"].decode())
    (line,) = [line for line in card.text.splitlines() if "from_pretrained" in line]
    found: dict = {}
    exec(f"from vwt_hf import VisualVocabulary\n{line}", found)
    assert torch.equal(found["vocabulary"].words, other.words)


def test_words_that_are_to_be_private_go_into_no_public_repository(hub, vocabulary):
    vocabulary.push_to_hub("me/words")
    with pytest.raises(ValueError, match="me/words is public; expected a private repository"):
        VisualVocabulary(vocabulary.words.flip(0)).push_to_hub("me/words", private=True)
    assert torch.equal(VisualVocabulary.from_pretrained("me/words").words, vocabulary.words)


def test_words_are_pushed_into_a_pull_request_that_is_open(hub, vocabulary, monkeypatch):
    """The Hub takes no branch of such a name, and its client refuses one."""
    vocabulary.push_to_hub("me/words")
    asked = []
    monkeypatch.setattr(HfApi, "create_branch", lambda api, *args, **of: pytest.fail("no pull request is a branch"))
    monkeypatch.setattr(HfApi, "create_commit", lambda api, *args, **of: asked.append(of) or SimpleNamespace(oid="1"))
    vocabulary.push_to_hub("me/words", revision="refs/pr/1")
    assert asked[0]["revision"] == "refs/pr/1"


def test_words_that_cannot_be_asked_for_are_not_taken_for_missing_ones(hub, files, monkeypatch):
    hub.put("me/words", {"vocab.pt": b"no words"})
    hf_hub_download("me/words", "vocab.pt")  # of which alone there is a copy, and none of what else is there
    hub.put("me/words", files)

    def drop_the_first(*args, filename, **of):
        if filename == "vocabulary.json":
            raise LocalEntryNotFoundError("the connection was lost")
        return hf_hub_download(*args, filename=filename, **of)

    monkeypatch.setattr(vwt_hf.vocabulary.files, "hf_hub_download", drop_the_first)
    with pytest.raises(FileNotFoundError, match=r"me/words cannot be had.*\(the connection was lost\)"):
        VisualVocabulary.from_pretrained("me/words")


def test_a_vocab_pt_that_was_downloaded_is_imported_where_no_network_is_asked_for(hub):
    torch.save(torch.rand(5, 3 * 16 * 16), made := io.BytesIO())
    hub.put("me/words", {"vocab.pt": made.getvalue()})
    hf_hub_download("me/words", "vocab.pt")
    with pytest.warns(UserWarning, match=r"vocab\.pt"):
        found = VisualVocabulary.from_pretrained("me/words", local_files_only=True)
    assert len(found) == 5


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


def test_words_that_their_facts_do_not_name_are_refused_by_the_repositorys_name(hub, files):
    hub.put("me/words", changed(files, file="vocabulary-0123456789abcdef.safetensors"))
    with pytest.raises(ValueError, match=r"me/words: vocabulary-0123456789abcdef\.safetensors: it is missing"):
        VisualVocabulary.from_pretrained("me/words")


def test_files_of_two_commits_are_refused(hub, files, vocabulary):
    words = safetensors.torch.save({"words": vocabulary.words.flip(0)})
    hub.put("me/words", files | {"vocabulary.safetensors": words})
    with pytest.raises(ValueError, match=r"me/words: vocabulary\.safetensors: it is not the file that"):
        VisualVocabulary.from_pretrained("me/words")


def test_a_folder_uploaded_before_its_words_were_settled_loads(hub, files, vocabulary):
    name = "vocabulary-0123456789abcdef.safetensors"
    moved = {"vocabulary.json": changed(files, file=name)["vocabulary.json"], name: files["vocabulary.safetensors"]}
    hub.put("me/words", moved)
    assert torch.equal(VisualVocabulary.from_pretrained("me/words").words, vocabulary.words)


NO_HUB_IDS = [
    "/etc", "./words", "../words", "~/words", "words/", "a/b/c", "", ".", "..", "C:\\words", "\\\\evil.example\\share",
    "//evil.example/share", "evil.example\\share/words", "a--b/c", "a..b", "me/words.git", "-me/words", "me/.words",
    "https://evil.example/words", "me/words\n", "me/wörds", "me/words\0", "me/" + "x" * 100,
    "datasets/me/words", None, 3,
]  # fmt: skip


@pytest.mark.parametrize("name", NO_HUB_IDS)
def test_a_name_that_is_not_trusted_is_a_hub_id_before_anything_is_asked_of_the_disk(hub, name, monkeypatch):
    asked = []
    for function in ("isdir", "isfile", "exists", "realpath", "abspath"):
        monkeypatch.setattr(os.path, function, lambda *at, **_: asked.append(at))
    for function in ("stat", "lstat", "open", "scandir"):
        monkeypatch.setattr(os, function, lambda *at, **_: asked.append(at))
    with pytest.raises(ValueError, match=r"is no Hub id; expected 'name' or 'owner/name'.*pass it yourself") as refusal:
        load_vocabulary(name, trusted=False)
    monkeypatch.undo()
    assert not asked and not hub.requests and str(refusal.value).isprintable()


def test_a_file_that_the_hub_could_not_be_asked_for_is_not_taken_for_missing(hub):
    hub.put("me/words", {"README.md": b"words"})
    with pytest.raises(LocalEntryNotFoundError):
        download_if_there(repo_id="me/words", filename="README.md", local_files_only=True)
    assert download_if_there(repo_id="me/words", filename="README.md").read_bytes() == b"words"
    assert download_if_there(repo_id="me/words", filename="sealed.json") is None


def test_a_name_that_is_not_trusted_is_never_a_folder(hub, files, vocabulary, tmp_path, monkeypatch):
    hub.put("me/words", files)
    VisualVocabulary(vocabulary.words.flip(0)).save_pretrained(tmp_path / "me" / "words")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_vocabulary("me/words", trusted=False).words, vocabulary.words)
    assert torch.equal(VisualVocabulary.from_pretrained("me/words").words, vocabulary.words.flip(0))
    with pytest.raises((OSError, HfHubHTTPError)):
        load_vocabulary("me/nothing", trusted=False)


def test_a_pickle_is_read_where_the_user_named_it_alone(hub):
    hub.put("authors/vwt", {"vocab.pt": torch_file(torch.randn(5, 3 * 16 * 16))})
    with pytest.warns(UserWarning, match="vocab.pt"):
        assert len(load_vocabulary("authors/vwt", trusted=True)) == 5
    asked = len(hub.requests)
    for arguments in ({"trusted": False}, {"trusted": True, "pickles": False}):
        with pytest.raises(FileNotFoundError, match=r"authors/vwt holds no vocabulary\.json"):
            load_vocabulary("authors/vwt", **arguments)
    assert not any("vocab.pt" in request.path for request in hub.requests[asked:])


NO_REVISIONS = [
    "../../ESCAPED", "a/../b", "/main", "-x", ".hidden", "a/.hidden", "a\\b", "a\nb", "a b", "a~1", "a^", "a:b", "a?",
    "a*", "a[0]", "a@{1}", "a//b", "a/", "a.", "a.lock", "%2e%2e", "x" * 300, "", "a\0", 3,
]  # fmt: skip


@pytest.mark.parametrize("revision", NO_REVISIONS)
def test_a_revision_that_git_has_not_is_refused_and_nothing_is_asked_of_the_hub(hub, files, revision):
    hub.put("me/words", files)
    for load in (VisualVocabulary.from_pretrained, lambda name, **at: load_vocabulary(name, trusted=False, **at)):
        with pytest.raises(ValueError, match=r"revision is .*expected None, or a branch, tag or commit"):
            load("me/words", revision=revision)
    assert not hub.requests


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "feature/words_2+x", "a@b"])
def test_every_branch_of_plain_letters_is_a_revision(hub, files, vocabulary, revision):
    hub.put("me/words", files, revision)
    assert torch.equal(load_vocabulary("me/words", trusted=False, revision=revision).words, vocabulary.words)


@pytest.mark.parametrize("subfolder", ["..", "a/../..", "/etc", "a//b", "a\\..\\b", "C:", "a\n", 3])
def test_a_subfolder_that_leads_out_is_refused(hub, files, subfolder):
    with pytest.raises(ValueError, match=r"subfolder is .*expected None, or names of folders"):
        VisualVocabulary.from_pretrained("me/words", subfolder=subfolder)
    assert not hub.requests


def test_a_cached_file_that_leads_out_of_its_repository_is_refused(hub, files, tmp_path):
    hub.put("me/words", files)
    VisualVocabulary.from_pretrained("me/words")
    (words,) = cached("vocabulary.safetensors")
    (tmp_path / "elsewhere").write_bytes(words.read_bytes())
    words.unlink()
    words.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"me/words: vocabulary\.safetensors: it is a link that leads out"):
        VisualVocabulary.from_pretrained("me/words", local_files_only=True)


def test_a_snapshot_of_the_cache_is_a_folder_too(hub, files, vocabulary):
    hub.put("me/words", files)
    VisualVocabulary.from_pretrained("me/words")
    (words,) = cached("vocabulary.safetensors")
    assert words.is_symlink()
    assert torch.equal(VisualVocabulary.from_pretrained(words.parent).words, vocabulary.words)


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


@pytest.mark.parametrize("pushed", [False, True], ids=["loaded", "pushed"])
@pytest.mark.parametrize("change", ["in place", "fewer"])
def test_words_that_were_changed_since_are_saved_with_the_model(
    hub, checkpoint, vocabulary, pixel_values, tmp_path, pushed, change
):
    if pushed:
        vocabulary.push_to_hub("me/words")
    else:
        vocabulary = VisualVocabulary.from_pretrained("me/words")
    if change == "in place":
        vocabulary.words.clamp_(0.3, 0.6)
    else:
        vocabulary.words, vocabulary.frequencies = vocabulary.words[3:7], vocabulary.frequencies[3:7]
    setting = VWTConfig(method="inter", vocabulary=vocabulary, threshold=0.9, **STATISTICS)
    model = compress(AutoModel.from_pretrained("me/tiny"), setting)
    model.save_pretrained(tmp_path / "short")
    loaded = AutoModel.from_pretrained(tmp_path / "short")
    assert model.config.vwt["vocabulary"] is model.config.vwt["revision"] is None
    assert torch.equal(lexicon_of(loaded).vocabulary.words, vocabulary.words)
    torch.testing.assert_close(answers(loaded, pixel_values), answers(model, pixel_values))


def test_words_in_another_precision_are_not_those_of_the_hub(hub, checkpoint):
    vocabulary = VisualVocabulary.from_pretrained("me/words")
    assert vocabulary.is_on_hub
    vocabulary.words = vocabulary.words.bfloat16().requires_grad_()
    assert not vocabulary.is_on_hub


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


@pytest.mark.parametrize("asked", [{}, {"revision": "main"}], ids=["", "main"])
@pytest.mark.parametrize("auto", [AutoModel, transformers.ViTModel])
def test_what_is_read_after_another_push_is_of_the_commit_of_the_weights(auto, asked, hub, checkpoint, vocabulary):
    others = VisualVocabulary(1 - vocabulary.words)
    for words in (vocabulary, others):
        setting = VWTConfig(method="inter", vocabulary=VisualVocabulary(words.words), **STATISTICS)
        compress(tiny_model("vit"), setting).push_to_hub("me/own")
        if words is vocabulary:
            loaded = auto.from_pretrained("me/own", vwt=False, **asked)
            plain = auto.from_pretrained("me/tiny", **asked)
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil
    processor(size={"height": 32, "width": 32}, image_std=[0.1] * 3).push_to_hub("me/tiny")
    compress(loaded, {"method": "inter"})
    assert torch.equal(lexicon_of(loaded).vocabulary.words, vocabulary.words)
    assert compress(plain, {"method": "local"}).config.vwt["image_std"] == [0.5] * 3
    newest = compress(auto.from_pretrained("me/own", vwt=False, **asked), {"method": "inter"})
    assert torch.equal(lexicon_of(newest).vocabulary.words, others.words)


def test_the_packages_words_do_not_take_the_place_of_a_models_that_could_not_be_asked_for(hub, files, tmp_path):
    tiny_model("vit", patch_size=16, image_size=64).save_pretrained(tmp_path / "tiny")
    own = VisualVocabulary(torch.rand(12, 3, 16, 16))
    own.save_pretrained(tmp_path / "tiny" / "visual_words", card=False)
    found = [path for path in (tmp_path / "tiny").rglob("*") if path.is_file()]
    hub.put("me/own", {path.relative_to(tmp_path / "tiny").as_posix(): path.read_bytes() for path in found})
    setting = {"method": "inter", **STATISTICS}
    hub.fail(next=None, path="visual_words", status=503)
    with pytest.raises(FileNotFoundError, match="me/own/visual_words cannot be had"):
        AutoModel.from_pretrained("me/own", vwt=setting)
    hub.heal()
    plain = AutoModel.from_pretrained("me/own", vwt=False)
    hub.put("me/own", {name: made for name, made in hub.files("me/own").items() if "words" not in name}, keep=False)
    assert len(lexicon_of(AutoModel.from_pretrained("me/own", vwt=setting)).vocabulary) > 12  # the package's
    hub.fail(next=None, path="visual_words", status=503)
    with pytest.raises(FileNotFoundError, match="me/own/visual_words cannot be had"):
        compress(plain, setting)  # that a newer commit has none says nothing of this one
    hub.heal()
    assert torch.equal(lexicon_of(compress(plain, setting)).vocabulary.words, own.words)


def test_a_save_that_was_cut_off_is_told_from_the_hub_too(hub, checkpoint, vocabulary, tmp_path):
    setting = VWTConfig(method="inter", vocabulary=VisualVocabulary(vocabulary.words), **STATISTICS)
    compress(AutoModel.from_pretrained("me/tiny"), setting).save_pretrained(tmp_path)
    next(tmp_path.glob("visual_words-*/sealed.json")).unlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    hub.put("me/cut", {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in files})
    with pytest.raises(ValueError, match=r"was not finished.*`vwt=False`"):
        AutoModel.from_pretrained("me/cut")
    assert AutoModel.from_pretrained("me/cut", vwt=False).config.vwt is None


def test_a_private_vocabulary_takes_the_models_token(hub, checkpoint, monkeypatch):
    hub.repos["me/words"].private = hub.repos["me/tiny"].private = True
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises((OSError, HfHubHTTPError), match=r"me/tiny|me/words"):
        AutoModel.from_pretrained("me/tiny", vwt="me/words", token=hub.stranger_token)
    assert AutoModel.from_pretrained("me/tiny", vwt="me/words", token=hub.read_token).config.vwt["method"] == "inter"


def test_a_vocabulary_that_does_not_exist_is_named(hub, checkpoint):
    with pytest.raises((OSError, HfHubHTTPError), match="me/nothing"):
        AutoModel.from_pretrained("me/tiny", vwt="me/nothing")


def test_the_authors_words_are_saved_with_the_models_that_took_them(hub, tmp_path):
    """As a config.json may name no `vocab.pt`."""
    hub.put("authors/vwt", {"vocab.pt": torch_file(torch.randn(5, 3 * 16 * 16))})
    model = tiny_model("vit", patch_size=16, image_size=64)
    with pytest.warns(UserWarning, match="vocab.pt"):
        compress(model, VWTConfig(method="inter", vocabulary="authors/vwt", threshold=0.9, **STATISTICS))
    model.save_pretrained(tmp_path)
    assert model.config.vwt["vocabulary"] is model.config.vwt["revision"] is None
    pixel_values = torch.rand(2, 3, 64, 64)
    loaded = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(answers(loaded, pixel_values), answers(model, pixel_values))
