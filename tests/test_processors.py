"""What a checkpoint says about how its model gets images, wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from PIL import Image
from transformers import AutoModel, GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from settings import ViTImageProcessor, inter
from tiny import tiny_model
from vwt_hf import VisualVocabulary, compress, embed, evaluate_model
from vwt_hf.hub_names import NotReached
from vwt_hf.processors import (
    config_beside,
    load_processor,
    patch_size_of,
    processor_of,
    require_vocabulary,
    stated_channels,
    stated_patch_size,
    white_of,
)
from vwt_hf.weights import copy_sharing_weights


@pytest.fixture
def in_subfolder(tmp_path: Path) -> Path:
    """A checkpoint whose pixels are divided by 0.25 below another whose pixels are divided by 0.5."""
    tiny_model("vit").save_pretrained(tmp_path / "sub")
    tiny_model("vit").save_pretrained(tmp_path)
    for folder, std in ((tmp_path, 0.5), (tmp_path / "sub", 0.25)):
        ViTImageProcessor(image_std=[std] * 3).save_pretrained(folder)
    return tmp_path


@pytest.mark.parametrize("vwt", [False, {"method": "coarse"}], ids=["plain", "coarse"])
def test_the_image_processor_of_a_model_is_that_beside_its_weights(vwt, in_subfolder):
    model = AutoModel.from_pretrained(in_subfolder, subfolder="sub", vwt=vwt)
    assert tuple(processor_of(model).image_std) == (0.25,) * 3
    assert compress(model, {"method": "local"}).config.vwt["image_std"] == [0.25] * 3
    assert tuple(processor_of(AutoModel.from_pretrained(in_subfolder)).image_std) == (0.5,) * 3


def test_a_model_is_measured_with_the_image_processor_beside_its_weights(in_subfolder, tmp_path):
    model = AutoModel.from_pretrained(in_subfolder, subfolder="sub")
    assert compress(copy_sharing_weights(model), True).config.vwt["image_std"] == [0.25] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_processor_type", 5),
        ("id2label", []),
        ("dtype", "\x1b[31mred"),
        ("dtype", [1]),
        ("hidden_size", "\x1b[2J"),
    ],
)
def test_a_strangers_file_that_transformers_cannot_take_is_named(name, value, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    named = "preprocessor_config.json" if name == "image_processor_type" else "config.json"
    file = tmp_path / named
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"^{named} of {tmp_path} holds what transformers cannot take") as raised:
        (load_processor if name == "image_processor_type" else config_beside)(tmp_path)
    assert str(raised.value).isprintable()


def test_a_config_that_is_no_json_is_damaged_and_not_missing(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^config\.json of {tmp_path} holds what transformers cannot take"):
        config_beside(tmp_path)


@pytest.mark.parametrize("vwt", [True, {"method": "coarse"}, {"method": "inter", "threshold": 0.5}])
def test_statistics_that_could_not_be_asked_for_are_not_assumed(vwt, hub, tmp_path):
    tiny_model("vit", patch_size=16, image_size=64).save_pretrained(tmp_path)
    ViTImageProcessor(image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    hub.put("me/tiny", {file.name: file.read_bytes() for file in tmp_path.iterdir()})
    hub.fail(next=None, path="preprocessor_config.json", status=500)
    with pytest.raises(NotReached, match=r"^preprocessor_config\.json of me/tiny cannot be had.* or give VWTConfig\("):
        AutoModel.from_pretrained("me/tiny", vwt=vwt)
    hub.heal()
    assert AutoModel.from_pretrained("me/tiny", vwt=vwt).config.vwt["image_std"] == [0.2, 0.3, 0.4]


def test_statistics_that_the_hub_says_are_not_there_are_assumed(hub, tmp_path, monkeypatch):
    """Also where huggingface_hub's cache cannot keep that answer, offline once it has, and of what is no repository."""
    tiny_model("vit").save_pretrained(tmp_path)
    for name in ("me/tiny", "me/other"):
        hub.put(name, {file.name: file.read_bytes() for file in tmp_path.iterdir()})
    mkdir = Path.mkdir

    def refuse(path, *args, **kwargs):
        if ".no_exist" in str(path):
            raise OSError(30, "Read-only file system", str(path))
        return mkdir(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        assert AutoModel.from_pretrained("me/tiny", vwt=True).config.vwt["image_std"] == [0.5] * 3
    loaded = AutoModel.from_pretrained("me/other", vwt=True)
    hub.repos.pop("me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert AutoModel.from_pretrained("me/other", vwt=True).config.vwt == loaded.config.vwt
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    model = tiny_model("vit")
    model.config.name_or_path = model.name_or_path = "me/tiny"
    assert compress(model, True).config.vwt["image_std"] == [0.5] * 3


@pytest.mark.parametrize("given", ["me/model", Path("model"), 7])
def test_what_is_no_image_processor_is_refused_before_an_image_is_read(given):
    with pytest.raises(TypeError, match=rf"image_processor is a {type(given).__name__}; expected a transformers"):
        processor_of(tiny_model("vit"), given)


@pytest.mark.parametrize("fields", [{"model_type": "my-vit"}, {"model_type": "my", "auto_map": {"AutoConfig": "m.C"}}])
@pytest.mark.parametrize("around", [lambda own: own, lambda own: {"vision_config": own}], ids=["model", "tower"])
def test_words_beside_a_model_of_unknown_code_are_found_and_not_the_package_s(fields, around, tmp_path):
    words = VisualVocabulary(torch.rand(20, 3, 16, 16))
    ViTImageProcessor().save_pretrained(tmp_path)
    tiny_model("vit", patch_size=16).save_pretrained(tmp_path)
    model = compress(AutoModel.from_pretrained(tmp_path), {"method": "inter", "vocabulary": words})
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    odd = {
        "num_labels": None,
        "id2label": {"cat": 1},
        "rope_scaling": {"type": "own"},
        "dtype": "auto",
        "layer_types": [7],
    }
    file.write_text(json.dumps(around(saved | odd) | fields))
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt={"method": "inter"})
    assert len(processor.tokenizer_of_patches.setting.words.vocabulary) == 20
    assert processor.tokenizer_of_patches.patch_size == (16, 16)


@pytest.fixture
def on_hub(hub, tmp_path) -> str:
    """A repository of a model with words of its own, and of its image processor."""
    model = tiny_model("vit", patch_size=16, image_size=32)
    words = VisualVocabulary(torch.rand(20, 3, 16, 16))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "own")
    compress(AutoModel.from_pretrained(tmp_path / "own"), {"method": "inter", "vocabulary": words}).push_to_hub(
        "me/own"
    )
    processor.push_to_hub("me/own")
    return "me/own"


INTER = {"method": "inter", "patch_size": 16}  # for these patches the package has words, too


def loaded_words(**kwargs) -> int:
    return len(
        AutoImageProcessor.from_pretrained("me/own", vwt=INTER, **kwargs).tokenizer_of_patches.setting.words.vocabulary
    )


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_config_that_the_hub_does_not_answer_for_is_not_taken_for_missing(status, hub, on_hub):
    hub.fail(next=None, path="/config.json", status=status)
    for vwt in (INTER, {"method": "inter"}, {"method": "local", "patch_size": 16}):
        with pytest.raises(NotReached, match=r"^config\.json of me/own cannot be had.*load it once where the Hub can"):
            AutoImageProcessor.from_pretrained(on_hub, vwt=vwt)
    with pytest.raises(NotReached, match=r"^config\.json of me/own cannot be had"):
        patch_size_of(on_hub)
    assert AutoImageProcessor.from_pretrained(on_hub).vwt is None
    hub.heal()
    assert loaded_words() == 20


def test_a_config_that_is_not_in_the_cache_is_not_taken_for_missing_where_no_network_is_asked_for(hub, on_hub):
    assert AutoImageProcessor.from_pretrained(on_hub).vwt is None  # of which alone there is a copy
    with pytest.raises(NotReached, match=r"^config\.json of me/own cannot be had"):
        loaded_words(local_files_only=True)
    hub.offline()
    with pytest.raises(NotReached, match=r"^config\.json of me/own cannot be had"):
        loaded_words()
    hub.online()
    assert loaded_words() == 20
    asked = len(hub.requests)
    assert loaded_words(local_files_only=True) == 20 and len(hub.requests) == asked


def test_an_image_processor_without_a_model_beside_it_is_loaded_again_without_a_network(hub, on_hub):
    """The cache keeps that a repository does not have a file."""
    files = hub.files("me/own")
    hub.put("me/own", {"preprocessor_config.json": files["preprocessor_config.json"]}, keep=False)
    assert config_beside("me/own") is None and loaded_words() > 20
    asked = len(hub.requests)
    assert config_beside("me/own", local_files_only=True) is None and len(hub.requests) == asked
    hub.offline()
    assert config_beside("me/own") is None


def test_an_image_processor_that_names_all_it_needs_is_loaded_where_the_config_is_not_reached(hub, on_hub):
    AutoImageProcessor.from_pretrained(on_hub, vwt=INTER).push_to_hub("me/own")
    hub.fail(next=None, path="/config.json", status=503)
    processor = AutoImageProcessor.from_pretrained(on_hub)
    assert len(processor.tokenizer_of_patches.setting.words.vocabulary) == 20


STD = {"image_std": [0.125] * 3}


def test_a_setting_is_measured_with_the_image_processor_that_is_given(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / name / "noise.png")
    processor = ViTImageProcessor(**STD, size={"height": 32, "width": 32})
    model = tiny_model("vit-classifier")
    model.config.label2id = {"one": 0, "two": 1}
    settings = [{"method": "local", "tolerance": 0.2} | std for std in ({}, STD, {"image_std": [0.5] * 3})]
    rows = evaluate_model(model, tmp_path, image_processor=processor, vwt=settings, progress=False).rows
    assert rows[1].tokens == rows[2].tokens != rows[3].tokens


def test_a_part_goes_by_what_lies_beside_its_whole_whatever_the_config_says_of_it(tmp_path):
    """Of an encoder, config.json holds from where it once came, which may be any folder of this machine."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "captioner"
    compress(tiny_model("vit"), inter()).save_pretrained(elsewhere)
    ViTImageProcessor(image_std=[0.125] * 3).save_pretrained(elsewhere)
    gpt = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=16, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(tiny_model("vit").config, gpt)
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    ViTImageProcessor(image_std=[0.25] * 3).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["encoder"]["_name_or_path"] = str(elsewhere)
    (folder / "config.json").write_text(json.dumps(config))
    encoder = VisionEncoderDecoderModel.from_pretrained(folder).encoder
    assert compress(encoder, {"method": "local"}).config.vwt["image_std"] == [0.25] * 3
    with pytest.raises(ValueError, match="words that come with the package"):  # there are none for these patches
        compress(encoder, {"method": "inter"})


@pytest.mark.parametrize("patch_size", [16, None])
def test_a_model_around_a_backbone_has_the_patches_of_that(patch_size):
    backbone = transformers.Dinov2Config(patch_size=4, num_channels=1)
    config = transformers.DPTConfig(backbone_config=backbone, patch_size=16)
    config.patch_size = patch_size
    assert stated_patch_size(config) == (4, 4) and stated_channels(config) == 1
    assert stated_patch_size(transformers.DPTConfig(patch_size=8)) == (8, 8)  # without one


def test_a_backbone_of_convolutions_states_no_patches():
    config = transformers.DPTConfig(backbone_config=transformers.BitConfig(), patch_size=16)
    assert stated_patch_size(config) == (16, 16)


def test_a_model_without_an_image_processor_beside_it_is_told_what_is_missing(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "bare")
    model = type(tiny_model("vit")).from_pretrained(tmp_path / "bare")
    with pytest.raises(
        ValueError, match=r"preprocessor_config\.json.*; give one as image_processor=AutoImageProcessor"
    ):
        processor_of(model)


def test_a_path_object_of_a_checkpoint_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for nowhere in (tmp_path / "nothing", Path("nothing/at/all")):
        with pytest.raises(FileNotFoundError, match=rf"{nowhere} does not exist; expected the folder of a model"):
            load_processor(nowhere)
    ViTImageProcessor(image_std=[0.25] * 3).save_pretrained(tmp_path)
    assert load_processor(tmp_path / "preprocessor_config.json").image_std == (0.25,) * 3
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(NotADirectoryError, match=r"a\.png is a file; expected the folder of a model"):
        load_processor("a.png")


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "T5Tokenizer", "MBartTokenizer"])
def test_a_tokenizer_made_of_no_files_is_refused(kind):
    """Those of T5 and MBart know the token of a space, too."""
    with pytest.raises(ValueError, match=rf"the {kind} knows no tokens but \d+ special ones, as where its files are"):
        require_vocabulary(getattr(transformers, kind)())


def test_the_class_of_an_image_processor_is_refused_and_still_finds_words(tmp_path):
    """Taken for one, it found no words from then on, in the whole process."""
    tiny_model("vit").save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    image = Image.new("RGB", (40, 40))
    image.save(tmp_path / "image.png")
    model = AutoModel.from_pretrained(tmp_path)
    for work in (
        lambda: VisualVocabulary.learn(tmp_path, ViTImageProcessor, size=1, patch_size=4, progress=False),
        lambda: evaluate_model(model, tmp_path, image_processor=ViTImageProcessor, progress=False),
        lambda: embed(model, tmp_path, tmp_path / "features", image_processor=ViTImageProcessor, progress=False),
    ):
        with pytest.raises(TypeError, match=r"image_processor is the class ViTImageProcessor.*; expected a "):
            work()
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=True)
    assert "patch_words" in processor(image, return_tensors="pt")


@pytest.mark.parametrize("setting", [True, inter(image_mean=None, image_std=None)], ids=["gradual", "inter"])
@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_deviation_that_is_not_positive_is_refused_with_its_file(setting, std, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    ViTImageProcessor(image_std=[0.5, std, 0.5]).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=rf"{tmp_path}: image_std of .*preprocessor_config.json.* is \(0.5, {std}, 0.5\)"):
        AutoModel.from_pretrained(tmp_path, vwt=setting)


@pytest.mark.parametrize(
    ("mean", "std", "white"),
    [(0.0, 58.0, 255.0), (120.0, 1.0, 255.0), (0.0, 0.25, 1.0), (0.5, 0.5, 1.0), (0.0, 1.0, None)],
)
def test_statistics_of_images_that_are_not_rescaled_tell_the_value_of_white(mean, std, white):
    processor = transformers.ViTImageProcessorPil(do_rescale=False, image_mean=[mean] * 3, image_std=[std] * 3)
    assert white_of(processor) == white


def test_words_of_a_model_of_grey_images_are_refused_with_the_reason():
    processor = ViTImageProcessor(image_mean=[0.5], image_std=[0.5])
    with pytest.raises(ValueError, match=r"no words are learned or drawn, but of RGB\.$"):
        VisualVocabulary.learn([Image.new("L", (32, 32))] * 4, processor, size=2, patch_size=4)
