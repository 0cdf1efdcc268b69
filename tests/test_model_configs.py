"""Configs with a setting: of a subclass that writes it, as long as they have one."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import vwt_hf
from settings import SETTINGS
from tiny import TINY, answers, tiny_model
from vwt_hf import VWTConfig

HALF = {"method": "intra", "keep_ratio": 0.5}


def test_a_setting_in_a_config_survives_its_own_round_trip(tmp_path):
    config = AutoConfig.for_model("clip")
    config.vwt = VWTConfig(keep_ratio=0.25)
    config.save_pretrained(tmp_path)
    assert VWTConfig.parse(AutoConfig.from_pretrained(tmp_path).vwt) == VWTConfig(keep_ratio=0.25)


def test_a_config_with_a_setting_is_of_a_subclass_and_one_without_of_the_plain_class():
    config = AutoConfig.for_model("vit", **TINY)
    plain = config.to_dict()
    assert type(config) is transformers.ViTConfig and config.vwt is None and "vwt" not in plain
    for made in (AutoConfig.for_model("vit", vwt=HALF, **TINY), transformers.ViTConfig(vwt=HALF, **TINY)):
        assert type(made) is not transformers.ViTConfig and isinstance(made, transformers.ViTConfig)
        assert made.vwt == HALF and made.to_dict()["vwt"] == HALF
        for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert type(copied) is type(made) and copied.to_dict() == made.to_dict()
        made.vwt = None
        assert type(made) is transformers.ViTConfig and made.to_dict() == plain


class Mine(type(AutoConfig.for_model("vit", vwt=HALF))):  # type: ignore[misc]
    """Of a user, derived from what the class of a config with a setting happens to be."""

    mine = True


def test_a_class_that_a_user_derives_from_that_of_a_config_with_a_setting_is_one_of_its_own():
    made = Mine(**TINY)
    assert type(made) is Mine and made.vwt is None and "vwt" not in made.to_dict()
    assert Mine != transformers.ViTConfig and type(pickle.loads(pickle.dumps(made))) is Mine
    made.vwt = HALF
    assert isinstance(made, Mine) and made.mine and made.to_dict()["vwt"] == HALF
    assert isinstance(pickle.loads(pickle.dumps(made)), Mine)
    made.vwt = None
    assert type(made) is Mine


def test_restore_leaves_the_config_as_it_was_before(model):
    before, kind = model.config.to_json_string(), type(model.config)
    vwt_hf.restore(vwt_hf.compress(vwt_hf.compress(model, HALF), {"dropped": "merge"}))
    assert model.config.to_json_string() == before and type(model.config) is kind


def test_a_plain_model_is_read_where_the_plugin_is_absent(tmp_path):
    """Pickled whole: nothing in it is of vwt_hf, whether it was loaded plain or restored."""
    tiny_model("vit").save_pretrained(tmp_path)
    torch.save(AutoModel.from_pretrained(tmp_path), tmp_path / "plain.pt")
    torch.save(vwt_hf.restore(AutoModel.from_pretrained(tmp_path, vwt=True)), tmp_path / "restored.pt")
    script = f"""
import sys, torch
sys.modules["vwt_hf"] = None
for name in ("plain", "restored"):
    torch.load({str(tmp_path)!r} + f"/{{name}}.pt", weights_only=False)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_auto_classes_find_the_model_of_a_config_with_a_setting_where_that_of_a_plain_one_is():
    config = AutoConfig.for_model("vit", vwt=HALF, **TINY)
    assert type(config) == transformers.ViTConfig and type(config) in {transformers.ViTConfig}  # noqa: E721
    assert type(config) != transformers.DeiTConfig  # noqa: E721
    assert type(AutoModel.from_config(config)) is transformers.ViTModel
    assert CONFIG_MAPPING["vit"] is transformers.ViTConfig


def test_nothing_of_a_forward_is_left_in_a_config(pixel_values):
    """Layers are told to attend by the plan while they run, and what is written never says so."""
    model = tiny_model("vit")
    plain = model.config._attn_implementation
    seen = []
    model.layers[0].register_forward_pre_hook(lambda *args: seen.append(model.config._attn_implementation))
    for setting in (SETTINGS["merge"], SETTINGS["inter"]):
        vwt_hf.compress(model, setting)
        answers(model, pixel_values)
        assert seen.pop() == f"vwt_{plain}" and model.config._attn_implementation == plain
        assert "vwt_" not in str(vars(model.config)) + model.config.to_json_string()
    vwt_hf.restore(model)
    answers(model, pixel_values)
    assert seen.pop() == plain


def test_configs_are_equal_as_those_of_plain_models_are_and_by_their_settings(tmp_path):
    model = vwt_hf.compress(tiny_model("vit"), HALF)
    model.save_pretrained(tmp_path)
    ours, read, other, plain = model.config, *(AutoConfig.from_pretrained(tmp_path) for _ in range(3))
    other.vwt, plain.vwt = {"method": "local"}, None
    assert ours == read and read == ours
    for one in (other, plain, copy.deepcopy(read), 7):
        assert (ours == one) is (one == ours) is (isinstance(one, type(read)) and one.vwt == ours.vwt)
    read.hidden_size += 1
    assert ours != read


@pytest.mark.parametrize("library", ["cloudpickle", "dill"])
def test_what_ships_models_to_other_processes_writes_no_class_of_theirs(library, tmp_path, pixel_values):
    """Ray, Spark and datasets do so by these; a class that came along would be none that pickle finds."""
    ships = pytest.importorskip(library)
    model = vwt_hf.compress(tiny_model("vit-classifier"), HALF)
    (tmp_path / "model").write_bytes(ships.dumps(model))
    torch.save((pixel_values, answers(model, pixel_values)), tmp_path / "expected")
    script = f"""
import pickle, torch, {library}
with open({str(tmp_path / "model")!r}, "rb") as file:
    model = {library}.load(file)
pixel_values, expected = torch.load({str(tmp_path / "expected")!r})
for one in (model, pickle.loads(pickle.dumps(model))):
    assert one.config.vwt["keep_ratio"] == 0.5
    with torch.no_grad():
        torch.testing.assert_close(one(pixel_values=pixel_values).logits, expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
