"""Evidence for a setting is saved with it, and told by the card of a model that is pushed."""

from __future__ import annotations

import pytest
import transformers

import vwt_hf
from settings import ViTImageProcessor
from tiny import tiny_model
from vwt_hf import VWTConfig, compress
from vwt_hf.evidence import write_section

EVIDENCE = {"images": 200, "measure": "agreement", "value": 0.985, "interval": [0.957, 0.995], "torch": "2.13.0+cpu"}


@pytest.mark.parametrize("method", ["intra", "gradual"])
def test_evidence_is_part_of_a_setting_and_saved_with_the_model(tmp_path, method):
    setting = VWTConfig(method=method, evidence=EVIDENCE | {"interval": (0.957, 0.995)})
    assert setting.evidence == EVIDENCE and setting == VWTConfig.parse(setting.to_dict())
    assert setting != VWTConfig(method=method) and isinstance(hash(setting), int)
    assert "evidence" not in VWTConfig(method=method).to_dict()
    compress(tiny_model("vit"), setting).save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert loaded.config.vwt["evidence"] == EVIDENCE
    assert not (tmp_path / "README.md").exists()


def test_evidence_of_a_setting_that_was_changed_is_left_out(caplog, monkeypatch):
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    measured = EVIDENCE | {"method": "gradual", "tolerance": 0.02, "similarity": 0.7}
    found = VWTConfig("gradual", tolerance=0.02, similarity=0.7, image_std=[0.5] * 3, evidence=measured)
    model = compress(tiny_model("vit"), found)
    compress(model, model.config.vwt)
    compress(tiny_model("vit"), VWTConfig(evidence={"method": "by hand", "value": 0.9}))
    assert model.config.vwt["evidence"] == measured and not caplog.text
    for changed in ({"tolerance": 0.3}, {"similarity": 0.1}, {"layers": [1]}, {"proportional_attention": False}):
        compress(model, found)
        compress(model, {**model.config.vwt, **changed})
        assert "evidence" not in model.config.vwt and "changed since its evidence was measured" in caplog.text


def test_a_save_has_the_evidence_in_a_card_follow_the_model(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Mine\n")
    model = compress(tiny_model("vit"), VWTConfig(evidence=EVIDENCE))
    model.save_pretrained(tmp_path)
    assert card.read_text() == "# Mine\n"
    write_section(tmp_path, [EVIDENCE])  # as a push made it, and a clone of the repository brought it
    compress(model, VWTConfig(evidence=EVIDENCE | {"value": 0.5})).save_pretrained(tmp_path)
    assert "0.985" not in card.read_text() and "`0.5`" in card.read_text()
    vwt_hf.restore(model).save_pretrained(tmp_path)
    assert card.read_text() == "# Mine\n"
    write_section(tmp_path, [EVIDENCE])
    card.rename(tmp_path / "elsewhere.md")
    card.symlink_to("elsewhere.md")
    model.save_pretrained(tmp_path)
    assert card.is_symlink() and card.read_text() == "# Mine\n"


@pytest.mark.parametrize(
    "evidence",
    [
        [],
        "all",
        {1: 2},
        {"Value": 1},
        {"value": {}},
        {"value": float("nan")},
        {"value": 10**400},
        {"value": [[1]]},
        {"value": [0] * 33},
        {"value": "a" * 201},
        {"value": "<script>"},
        {"value": "a`|b"},
        {"value": "a\nb"},
        {f"n{index}": 0 for index in range(33)},
    ],
)
def test_evidence_that_a_card_could_not_tell_is_refused(evidence):
    with pytest.raises(ValueError, match=r"evidence is .*expected None, or at most 32 names"):
        VWTConfig.parse({"evidence": evidence})


def test_a_card_keeps_its_line_ends_and_what_is_no_utf_8(tmp_path):
    card = tmp_path / "README.md"
    card.write_bytes(b"# Caf\xe9\r\n\r\nText\r\n")
    write_section(tmp_path, [EVIDENCE])
    told = card.read_bytes()
    assert told.startswith(b"# Caf\xe9\r\n\r\nText\r\n\r\n<!-- vwt-hf -->") and b"0.985" in told
    assert told.count(b"\n") == told.count(b"\r\n")
    write_section(tmp_path, [EVIDENCE])
    assert card.read_bytes() == told
    write_section(tmp_path, [])
    assert card.read_bytes() == b"# Caf\xe9\r\n\r\nText\r\n"


def test_what_is_taken_out_of_a_card_is_whole_sections_and_the_empty_lines_around_them(tmp_path):
    card = tmp_path / "README.md"
    begin, end = "<!-- vwt-hf -->", "<!-- /vwt-hf -->"
    card.write_text(
        f"{end} a\n\n{begin}{begin} old {end}\n\n{begin}older{end}\nb{begin}oldest{end}c\n\n{begin} d\n\n\n"
    )
    write_section(tmp_path, [])
    assert card.read_text() == f"{end} a\n\nb\nc\n\n{begin} d\n\n\n"


def test_the_card_of_a_pushed_model_tells_the_evidence_of_its_setting_alone(hub, tmp_path):
    def card() -> str:
        return hub.files("me/tiny")["README.md"].decode()

    model = compress(tiny_model("vit"), VWTConfig(evidence=EVIDENCE))
    model.push_to_hub("me/tiny")
    first = card()
    assert "| its 95 % interval | `0.957, 0.995` |" in first and "| torch | `2.13.0+cpu` |" in first
    assert first.startswith("---") and "library_name: transformers" in first
    compress(model, VWTConfig(evidence=EVIDENCE | {"value": 0.5}))
    model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/tiny")
    assert card() == first.replace("0.985", "0.5")
    pipeline = transformers.pipeline("image-feature-extraction", model=model, image_processor=ViTImageProcessor())
    compress(model, VWTConfig(evidence=EVIDENCE))
    pipeline.push_to_hub("me/tiny")
    assert card() == first
    compress(model, True)
    pipeline.push_to_hub("me/tiny")
    assert "vwt-hf" not in card() and "library_name: transformers" in card()
    vwt_hf.restore(model).push_to_hub("me/tiny")
    assert "vwt-hf" not in card()


def test_the_card_of_an_adapter_tells_nothing_of_a_setting_that_it_lacks(hub):
    peft = pytest.importorskip("peft")
    model = compress(tiny_model("vit"), VWTConfig(evidence=EVIDENCE))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    transformers.pipeline("image-feature-extraction", model=model, image_processor=ViTImageProcessor()).push_to_hub(
        "me/adapter"
    )
    files = hub.files("me/adapter")
    assert "adapter_config.json" in files and b"vwt-hf" not in files["README.md"]


def test_the_card_of_a_part_that_is_pushed_alone_tells_the_evidence_of_the_setting_in_its_config(hub):
    model = compress(tiny_model("clip"), VWTConfig(evidence=EVIDENCE))
    for part, has_setting in ((model.vision_model, True), (model.text_model, False)):
        part.push_to_hub("me/part")
        files = hub.files("me/part")
        assert (b'"evidence"' in files["config.json"]) == (b"<!-- vwt-hf -->" in files["README.md"]) == has_setting
