"""Compressed models over the Hub: the real client and transformers against `loopback_hub`."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
import transformers
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoBackbone, AutoModel

import vwt_hf
from loopback_hub import LoopbackHub, loopback_only
from tiny import TINY, answers, tiny_model
from vwt_hf import VWTConfig

QUARTER = VWTConfig(keep_ratio=0.25).to_dict()
HALF = VWTConfig(keep_ratio=0.5, criterion="grid").to_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("saved")
    vwt_hf.compress(tiny_model("vit"), QUARTER).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pushed(hub: LoopbackHub, saved: dict[str, bytes]) -> transformers.PreTrainedModel:
    """A compressed model, as it is on the Hub at me/tiny."""
    hub.put("me/tiny", saved)
    return vwt_hf.compress(tiny_model("vit"), QUARTER)


def cached_files() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file() and ".locks" not in path.parts]


def weights_in_cache() -> list[Path]:
    """What in the cache is the weights or a part of them: nothing else there is as large."""
    return [
        path for path in cached_files() if path.stat().st_size > 2000 or path.suffix in (".incomplete", ".safetensors")
    ]


@pytest.mark.parametrize("name", ["vit", "deit-classifier", "registers", "clip-projection", "clip"])
def test_a_pushed_model_comes_back_with_its_setting_and_answers(hub, name, pixel_values):
    model = vwt_hf.compress(tiny_model(name), QUARTER)
    model.push_to_hub("me/tiny")
    assert json.loads(hub.files("me/tiny")["config.json"])["vwt"] == QUARTER
    loaded = type(model).from_pretrained("me/tiny")
    assert loaded.config.vwt == QUARTER
    assert torch.equal(answers(loaded, pixel_values), answers(model, pixel_values))


def test_auto_model_follows_the_repository_and_what_it_is_asked_for(pushed, pixel_values):
    assert torch.equal(answers(AutoModel.from_pretrained("me/tiny"), pixel_values), answers(pushed, pixel_values))
    other = AutoModel.from_pretrained("me/tiny", vwt=HALF)
    assert other.config.vwt == HALF
    assert answers(other, pixel_values).shape[1] == 1 + 32
    plain = AutoModel.from_pretrained("me/tiny", vwt=False)
    assert getattr(plain.config, "vwt", None) is None
    assert torch.equal(answers(plain, pixel_values), answers(tiny_model("vit"), pixel_values))


def test_a_process_started_with_hf_endpoint_gets_the_same(hub, pushed, tmp_path):
    script = "import huggingface_hub; print(huggingface_hub.hf_hub_download('me/tiny', 'model.safetensors'))"
    env = {**os.environ, **hub.environment(tmp_path / "another_home")}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "another_home")
    assert Path(done.stdout.strip()).read_bytes() == hub.files("me/tiny")["model.safetensors"]


def test_an_older_revision_has_the_older_setting(hub, pushed, pixel_values):
    older = hub.head("me/tiny")
    old_answers = answers(pushed, pixel_values)
    HfApi().create_tag("me/tiny", tag="v1")
    vwt_hf.compress(pushed, HALF).push_to_hub("me/tiny")
    assert hub.head("me/tiny") != older
    assert AutoModel.from_pretrained("me/tiny").config.vwt == HALF
    for revision in (older, "v1"):
        loaded = AutoModel.from_pretrained("me/tiny", revision=revision)
        assert loaded.config.vwt == QUARTER
        assert torch.equal(answers(loaded, pixel_values), old_answers)


def test_pushing_to_a_branch_leaves_main_alone(hub, pushed):
    head = hub.head("me/tiny")
    vwt_hf.compress(pushed, HALF).push_to_hub("me/tiny", revision="half")
    assert hub.head("me/tiny") == head
    assert AutoModel.from_pretrained("me/tiny", revision="half").config.vwt == HALF


def test_a_stranger_proposes_a_setting_as_a_pull_request(hub, pushed):
    head = hub.head("me/tiny")
    vwt_hf.compress(pushed, HALF).push_to_hub("me/tiny", create_pr=True, token=hub.stranger_token)
    assert hub.head("me/tiny") == head
    assert AutoModel.from_pretrained("me/tiny", revision="refs/pr/1").config.vwt == HALF


@pytest.mark.parametrize("stored", [False, True], ids=["asked-for", "stored"])
def test_auto_backbone_over_the_hub(hub, pixel_values, stored):
    """AutoBackbone alone asks the Hub whether the repository exists."""
    config = transformers.Dinov2Config(**TINY, out_features=["stage2"], reshape_hidden_states=False)
    torch.manual_seed(0)
    model = transformers.Dinov2Backbone(config).eval()
    if stored:
        vwt_hf.compress(model, QUARTER)
    model.push_to_hub("me/dinov2-tiny")
    asked = {} if stored else {"vwt": QUARTER}
    features = ["stage1", "stage2"]
    loaded = AutoBackbone.from_pretrained("me/dinov2-tiny", reshape_hidden_states=False, out_features=features, **asked)
    assert loaded.config.vwt == QUARTER
    vwt_hf.compress(model, QUARTER)
    with torch.no_grad():
        maps = loaded(pixel_values).feature_maps
        expected = model(pixel_values).feature_maps
    assert [tuple(each.shape) for each in maps] == [(3, 1 + 16, 32)] * 2  # CLS and a quarter of 8 × 8 patches
    torch.testing.assert_close(maps[-1], expected[-1])


def test_after_a_first_download_no_network_is_needed(hub, pushed, pixel_values, monkeypatch):
    AutoModel.from_pretrained("me/tiny")
    hub.offline()
    loaded = AutoModel.from_pretrained("me/tiny")
    assert loaded.config.vwt == QUARTER
    assert torch.equal(answers(loaded, pixel_values), answers(pushed, pixel_values))
    hub.online()
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert AutoModel.from_pretrained("me/tiny").config.vwt == QUARTER
    assert hub.requests == []


def test_without_network_or_cache_the_error_says_so(hub, pushed):
    hub.offline()
    with pytest.raises(OSError, match=f"couldn't connect to '{hub.url}'"):
        AutoModel.from_pretrained("me/tiny")


# AutoBackbone is not asked as the others: it takes a repository that it may not see for the name of a timm model.
@pytest.mark.parametrize(
    ("load", "who"),
    [(load, who) for load in (AutoModel, transformers.ViTModel) for who in ("revoked", "stranger", "nobody")]
    + [(AutoBackbone, "revoked")],
)
def test_whoever_may_not_read_a_private_repository_is_told_its_name(hub, pushed, monkeypatch, load, who):
    HfApi().update_repo_settings("me/tiny", private=True)
    if who == "revoked":
        hub.revoke(hub.token)
    elif who == "stranger":
        monkeypatch.setenv("HF_TOKEN", hub.stranger_token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(OSError, match="me/tiny"):
        load.from_pretrained("me/tiny")
    assert cached_files() == []


def test_a_gated_model_is_refused_by_name(hub, pushed):
    HfApi().update_repo_settings("me/tiny", gated="auto")
    with pytest.raises(OSError, match=r"(?s)gated repo.*me/tiny"):
        AutoModel.from_pretrained("me/tiny", token=hub.stranger_token)
    assert AutoModel.from_pretrained("me/tiny").config.vwt == QUARTER


def test_a_read_token_reads_private_models_and_pushes_none(hub, pushed, monkeypatch):
    HfApi().update_repo_settings("me/tiny", private=True)
    monkeypatch.setenv("HF_TOKEN", hub.read_token)
    assert AutoModel.from_pretrained("me/tiny").config.vwt == QUARTER
    head = hub.head("me/tiny")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        vwt_hf.compress(pushed, HALF).push_to_hub("me/tiny")
    assert hub.head("me/tiny") == head


def test_an_interrupted_download_leaves_nothing_and_a_second_try_works(hub, pushed, pixel_values):
    hub.truncate("model.safetensors", after_bytes=5000)
    with pytest.raises(OSError, match="me/tiny"):
        AutoModel.from_pretrained("me/tiny")
    assert weights_in_cache() == []
    hub.heal()
    assert torch.equal(answers(AutoModel.from_pretrained("me/tiny"), pixel_values), answers(pushed, pixel_values))


def test_a_download_that_breaks_once_goes_on_where_it_broke(hub, pushed, pixel_values, monkeypatch):
    # The client goes on after the last whole chunk, of 10 MB.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.truncate("model.safetensors", after_bytes=5000, next=1)
    assert torch.equal(answers(AutoModel.from_pretrained("me/tiny"), pixel_values), answers(pushed, pixel_values))
    assert [request.range for request in hub.requests if "/cdn/" in request.path] == [None, "bytes=5000-"]


@pytest.mark.parametrize("length", [0, 5, 1000, -1])
def test_truncated_weights_on_the_hub_are_refused(hub, pushed, length):
    hub.put("me/tiny", {"model.safetensors": hub.files("me/tiny")["model.safetensors"][:length]})
    with pytest.raises(safetensors.SafetensorError):
        AutoModel.from_pretrained("me/tiny")


def test_a_file_of_another_size_than_announced_is_refused_and_not_kept(hub, pushed):
    hub.forge("model.safetensors", hub.files("me/tiny")["model.safetensors"][:5000])
    with pytest.raises(OSError, match=r"(?s)should be of size.*model\.safetensors"):
        AutoModel.from_pretrained("me/tiny")
    assert weights_in_cache() == []


def test_a_setting_that_is_not_valid_is_refused_unless_overridden(hub, pushed):
    config = json.loads(hub.files("me/tiny")["config.json"])
    config["vwt"]["keep_ratio"] = 7
    hub.put("me/tiny", {"config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match="keep_ratio is 7"):
        AutoModel.from_pretrained("me/tiny")
    assert weights_in_cache() == []
    assert AutoModel.from_pretrained("me/tiny", vwt=HALF).config.vwt == HALF


STEPS = ["/validate-yaml", "/preupload/", "/objects/batch", "/lfs/me/tiny/", "/commit/"]


@pytest.mark.parametrize("path", STEPS)
@pytest.mark.parametrize("fault", ["answers 503", "breaks"])
def test_a_push_that_fails_leaves_the_hub_as_it_was(hub, pushed, path, fault):
    head, files = hub.head("me/tiny"), hub.files("me/tiny")
    with torch.no_grad():
        pushed.embeddings.cls_token.add_(1)
    vwt_hf.compress(pushed, HALF)
    if fault == "breaks":
        hub.truncate(path, after_bytes=10)
    else:
        hub.fail(None, path, status=503)
    # What huggingface_hub raises is of no common class: HfHubHTTPError, RuntimeError, or httpx's own.
    with pytest.raises(Exception, match=r"503 Service Unavailable|disconnected|uploading 'model.safetensors'"):
        pushed.push_to_hub("me/tiny")
    assert (hub.head("me/tiny"), hub.files("me/tiny")) == (head, files)
    hub.heal()
    pushed.push_to_hub("me/tiny")
    assert AutoModel.from_pretrained("me/tiny").config.vwt == HALF


def test_a_push_gets_over_a_hiccup(hub, pushed):
    hub.fail(next=2, path="/preupload/", status=503)
    vwt_hf.compress(pushed, HALF).push_to_hub("me/tiny")
    assert AutoModel.from_pretrained("me/tiny").config.vwt == HALF


def test_the_hub_applies_a_commit_as_a_whole_or_not_at_all(hub):
    hub.put("me/words", {"a.json": b"1"})
    operations = [CommitOperationAdd("b.json", b"2"), CommitOperationDelete("no-such.json")]
    with pytest.raises(EntryNotFoundError):
        HfApi().create_commit("me/words", operations, commit_message="both")
    assert hub.files("me/words") == {"a.json": b"1"}


def test_the_hub_lists_what_it_serves(hub):
    api = HfApi()
    api.create_repo("me/words", repo_type="dataset")
    sha = api.upload_file(
        path_or_fileobj=b"words", path_in_repo="deep/words.npz", repo_id="me/words", repo_type="dataset"
    ).oid
    assert hub.files("datasets/me/words") == {"deep/words.npz": b"words"}
    assert api.list_repo_files("me/words", repo_type="dataset") == ["deep/words.npz"]
    assert [entry.path for entry in api.list_repo_tree("me/words", repo_type="dataset")] == ["deep"]
    assert (
        api.repo_info("me/words", repo_type="dataset").sha
        == sha
        == api.list_repo_commits("me/words", repo_type="dataset")[0].commit_id
    )
    assert api.whoami()["name"] == "me"
    api.delete_repo("me/words", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("me/words", repo_type="dataset")


def test_large_files_come_from_another_host_which_sees_no_token(hub):
    hub.put("me/words", {"words.safetensors": b"x" * 100, "words.json": b"{}"})
    assert Path(hf_hub_download("me/words", "words.safetensors")).read_bytes() == b"x" * 100
    assert Path(hf_hub_download("me/words", "words.json")).read_bytes() == b"{}"
    assert {request.token for request in hub.requests if "/cdn/" in request.path} == {None}
    assert {request.token for request in hub.requests if "/cdn/" not in request.path} == {hub.token}


def test_leaving_the_loopback_fails_a_test_even_if_the_error_is_caught():
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(AssertionError, match=r"example\.org"),
        loopback_only(patch),
        contextlib.suppress(AssertionError),
    ):
        socket.create_connection(("example.org", 443))
