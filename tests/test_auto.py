"""Loading with `vwt=...`: through the Auto classes, by class name, from folders that carry a setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    ViTConfig,
    ViTModel,
)

import vwt_hf
from names import COMMON
from settings import inter
from test_generation import llava
from tiny import MODELS, TEXT, TINY, answers, tiny_model
from vwt_hf import VWTConfig, compress

HALF = {"method": "intra", "keep_ratio": 0.5}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 99, "add_cross_attention": True, "is_decoder": True}


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def load(model: transformers.PreTrainedModel, folder: Path, **kwargs):
    """`folder` through the Auto class that knows the class of `model`, or by that class where none does."""
    auto = next((auto for auto in AUTO if type(model) in auto_values(auto, type(model.config))), type(model))
    return auto.from_pretrained(folder, **kwargs)


AUTO = (AutoModelForImageClassification, transformers.AutoModelForZeroShotImageClassification, AutoModel)


def auto_values(auto, config_class) -> tuple:
    found = auto._model_mapping.get(config_class, ())
    return found if isinstance(found, (tuple, list)) else (found,)


def test_the_ordinary_class_loads_whole_and_compressed(model, folder, pixel_values):
    loaded, info = load(model, folder, vwt=HALF, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    expected = answers(vwt_hf.compress(model, HALF), pixel_values)
    torch.testing.assert_close(answers(loaded, pixel_values), expected, atol=1e-6, rtol=1e-5)
    assert loaded.config.vwt == VWTConfig(**HALF).to_dict()


@pytest.fixture(scope="module")
def plain_process(tmp_path_factory) -> Path:
    """Every tiny model saved plain and compressed, then loaded and saved again where vwt_hf is not imported."""
    folder = tmp_path_factory.mktemp("plain-process")
    for name in MODELS:
        model = tiny_model(name)
        model.save_pretrained(folder / "plain" / name)
        vwt_hf.compress(model, HALF).save_pretrained(folder / "short" / name)
    script = f"import plain_process; plain_process.reload({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, env=dict(os.environ), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", list(MODELS))
def test_without_vwt_a_checkpoint_loads_as_if_the_plugin_were_absent(name, pixel_values, plain_process, tmp_path):
    """Class, state dict, answers and the saved config are those of a process that never imports vwt_hf."""
    source, by_plain = plain_process / "plain" / name, plain_process / "plain-again" / name
    loaded = load(tiny_model(name), source)
    facts = json.loads((by_plain / "facts.json").read_text())
    assert f"{type(loaded).__module__}.{type(loaded).__qualname__}" == facts["class"]
    assert list(loaded.state_dict()) == facts["keys"]
    assert torch.equal(answers(loaded, pixel_values), torch.load(by_plain / "answers.pt"))
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((by_plain / "config.json").read_text())


@pytest.mark.parametrize("name", list(MODELS))
def test_a_saved_model_loads_plain_where_the_plugin_is_absent(name, pixel_values, plain_process):
    plain = answers(tiny_model(name), pixel_values)
    by_plain = torch.load(plain_process / "short-again" / name / "answers.pt")
    torch.testing.assert_close(by_plain, plain, atol=1e-6, rtol=1e-5)
    setting = json.loads((plain_process / "short" / name / "config.json").read_text())["vwt"]
    assert setting == VWTConfig(**HALF).to_dict()


def test_a_model_whose_config_was_changed_is_saved_with_the_setting_that_it_runs_by(tmp_path, pixel_values):
    model = compress(tiny_model("vit"), {"keep_ratio": 0.5})
    expected = answers(model, pixel_values)
    model.config.vwt["keep_ratio"] = 0.9
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.vwt["keep_ratio"] == 0.5 and torch.equal(answers(again, pixel_values), expected)


def test_a_saved_model_comes_back_with_its_setting_and_without_when_told(model, pixel_values, tmp_path):
    plain = answers(model, pixel_values)
    vwt_hf.compress(model, {"keep_ratio": 0.4, "criterion": "random", "seed": 3})
    short = answers(model, pixel_values)
    model.save_pretrained(tmp_path)
    again = load(model, tmp_path)
    torch.testing.assert_close(answers(again, pixel_values), short, atol=1e-6, rtol=1e-5)
    assert again.config.vwt == model.config.vwt

    by_name = type(model).from_pretrained(tmp_path)
    assert by_name.config.vwt == model.config.vwt
    torch.testing.assert_close(answers(by_name, pixel_values), short, atol=1e-6, rtol=1e-5)

    off = load(model, tmp_path, vwt=False)
    torch.testing.assert_close(answers(off, pixel_values), plain, atol=1e-6, rtol=1e-5)
    assert off.config.vwt is None
    other = load(model, tmp_path, vwt={"keep_ratio": 0.9})
    assert other.config.vwt["keep_ratio"] == 0.9


@pytest.mark.parametrize("name", COMMON)
def test_checkpoints_written_by_the_other_end_of_the_range_load_whole(name, pixel_values, other_end):
    """`other_end`: checkpoints written by another transformers than the one that runs the tests."""
    model = tiny_model(name)
    loaded, info = load(model, other_end / name, vwt={"keep_ratio": 1.0}, output_loading_info=True)
    assert not any(info.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    expected = torch.load(other_end / name / "answers.pt")
    torch.testing.assert_close(answers(loaded, pixel_values), expected, atol=1e-5, rtol=1e-5)
    short = load(model, other_end / name, vwt=HALF)
    torch.testing.assert_close(
        answers(short, pixel_values), answers(vwt_hf.compress(loaded, HALF), pixel_values), atol=1e-6, rtol=1e-5
    )


def test_from_config_takes_vwt_and_leaves_the_callers_config_alone():
    config = AutoConfig.for_model("vit", **TINY)
    assert AutoModel.from_config(config, vwt=HALF).config.vwt["keep_ratio"] == 0.5
    assert config.vwt is None and AutoModel.from_config(config).config.vwt is None
    config.vwt = VWTConfig(keep_ratio=0.3)
    assert AutoModel.from_config(config).config.vwt["keep_ratio"] == 0.3


@pytest.mark.parametrize("name", ["dinov2", "registers"])
def test_a_backbone_gives_sequences_of_the_kept_patches(name, pixel_values):
    model_type = tiny_model(name).config.model_type
    config = AutoConfig.for_model(model_type, **TINY, out_features=["stage1", "stage2"], reshape_hidden_states=False)
    prefix = 1 + getattr(config, "num_register_tokens", 0)
    maps = AutoBackbone.from_config(config, vwt=HALF).eval()(pixel_values).feature_maps
    assert [tuple(m.shape) for m in maps] == [(3, prefix + 32, 32)] * 2
    config.reshape_hidden_states = True
    with pytest.raises(ValueError, match=r"Backbone with reshape_hidden_states=True lays all patches out.*'merge'"):
        AutoBackbone.from_config(config, vwt=HALF)


@pytest.mark.parametrize("name", ["dinov2", "registers", "dinov3", "beit"])
def test_feature_maps_of_a_backbone_have_every_patch(name, pixel_values):
    stages = {"out_features": ["stage1", "stage2"], "out_indices": None}
    config = AutoConfig.for_model(tiny_model(name).config.model_type, **TINY, **stages, reshape_hidden_states=True)
    model = AutoBackbone.from_config(config).eval()
    plain = model(pixel_values).feature_maps
    for setting in (HALF | {"dropped": "merge"}, {"method": "local", "tolerance": 0.2, "image_std": [0.5] * 3}):
        maps = vwt_hf.compress(model, setting)(pixel_values).feature_maps
        model.config.reshape_hidden_states = False
        rows = [one[:, one.shape[1] - 64 :] for one in model(pixel_values).feature_maps]
        model.config.reshape_hidden_states = True
        for found, expected, whole in zip(maps, rows, plain, strict=True):
            assert found.shape == whole.shape == (3, 32, 8, 8) and not torch.equal(found, whole)
            torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)
    for number in range(2, 9):  # and the prefix: as many rows as maps are high
        maps = vwt_hf.compress(model, {"dropped": "merge", "num_patches": number})(pixel_values).feature_maps
        assert [one.shape for one in maps] == [(3, 32, 8, 8)] * 2
    with pytest.raises(ValueError, match=r"Backbone with reshape_hidden_states=True"):
        vwt_hf.compress(model, HALF)


def test_what_reads_every_patch_does_so_within_a_class_of_ones_own():
    class Detector(transformers.Dinov2PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.backbone = transformers.Dinov2Backbone(config)
            self.post_init()

        def forward(self, pixel_values, **kwargs):
            return self.backbone(pixel_values).feature_maps[-1]

    class Segmenter(transformers.CLIPSegForImageSegmentation):
        pass

    class Masked(transformers.ViTForMaskedImageModeling):
        pass

    clipseg = {"vision_config": TINY, "text_config": TINY | {"vocab_size": 99}, "extract_layers": [0, 1]}
    for model, reason in (
        (Detector(transformers.Dinov2Config(**TINY)), "Dinov2Backbone with reshape_hidden_states=True"),
        (Segmenter(transformers.CLIPSegConfig(**clipseg)), "Segmenter reads a value for every patch"),
        (Masked(transformers.ViTConfig(**TINY)), "Masked predicts patches that are masked"),
    ):
        with pytest.raises(ValueError, match=reason):
            vwt_hf.compress(model, HALF)


def test_a_clip_vision_tower_loads_from_a_whole_clip_checkpoint(pixel_values, tmp_path):
    clip = tiny_model("clip")
    clip.save_pretrained(tmp_path)
    tower = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path, vwt=HALF)
    vwt_hf.compress(clip, HALF)
    with torch.no_grad():
        features = clip.get_image_features(pixel_values)
        features = getattr(features, "pooler_output", features)
        torch.testing.assert_close(tower(pixel_values).image_embeds, features)


def test_both_candidate_classes_of_deit_are_told_apart_by_the_checkpoint(tmp_path):
    model = transformers.DeiTForImageClassification(tiny_model("deit").config)
    model.save_pretrained(tmp_path)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path, vwt=True)) is type(model)


def test_an_unsupported_family_is_refused_with_the_supported_ones(tmp_path):
    transformers.BertModel(
        transformers.BertConfig(num_hidden_layers=1, hidden_size=12, num_attention_heads=2, vocab_size=9)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertModel.*supported families: ViT, DeiT, .*DINOv2, .*CLIP"):
        AutoModel.from_pretrained(tmp_path, vwt=True)
    assert AutoModel.from_pretrained(tmp_path, vwt=False).config.model_type == "bert"


def test_a_task_that_needs_every_patch_is_refused_before_its_weights_are_read(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a value for every patch.*cannot be compressed"):
        transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path, vwt=True)


def test_a_bad_setting_is_refused_before_any_weight_is_read(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"keep_ratio is 1\.3"):
        AutoModel.from_pretrained(tmp_path, vwt={"keep_ratio": 1.3})


@pytest.mark.parametrize("auto", [AutoModel, transformers.ViTModel])
@pytest.mark.parametrize("vwt", [{"keep_ratio": 7}, {"method": "intra", "of_the_future": 1}, [0.5]])
def test_a_bad_setting_in_a_folder_is_refused_by_folder_and_file_and_can_be_turned_off(auto, vwt, tmp_path):
    tiny_model("vit").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vwt": vwt}))
    with pytest.raises(ValueError, match=rf"config\.json of {tmp_path}: .*`vwt=False`"):
        auto.from_pretrained(tmp_path)
    assert auto.from_pretrained(tmp_path, vwt=False).config.vwt is None


def test_registering_twice_changes_nothing():
    before = transformers.PreTrainedModel.from_pretrained.__func__
    vwt_hf.register()
    assert transformers.PreTrainedModel.from_pretrained.__func__ is before


def test_unregistered_transformers_is_as_if_the_plugin_had_never_been_imported(tmp_path):
    """In a process of its own: what stood in the classes and registries before the import stands there again."""
    tiny_model("vit").save_pretrained(tmp_path)
    script = f"""
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
def state():
    classes = transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.PreTrainedTokenizerBase
    held = [dict(vars(one)) for one in (*classes, transformers.VisionEncoderDecoderModel)]
    return held, dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping), dict(
        CONFIG_MAPPING._extra_content)
before = state()
import vwt_hf
assert state() != before
vwt_hf.unregister()
assert state() == before
vwt_hf.unregister()
assert not hasattr(AutoConfig.from_pretrained({str(tmp_path)!r}), "vwt")
vwt_hf.register()
assert AutoModel.from_pretrained({str(tmp_path)!r}, vwt=True).config.vwt["method"] == "gradual"
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_another_library_wrapped_is_not_unregistered(monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda self: None)
    with pytest.raises(RuntimeError, match=r"PreTrainedModel\.save_pretrained was replaced after vwt_hf"):
        vwt_hf.unregister()
    assert AutoConfig.for_model("vit").vwt is None


REGISTERING = """
import itertools, os, sys
from transformers import AutoConfig, AutoModelForImageClassification as Auto, ViTConfig, ViTForImageClassification

def loads_mine(own_config, imported):
    if imported == "before":
        import vwt_hf
    class Mine(ViTForImageClassification): pass
    if own_config:
        class MyConfig(ViTConfig): pass
        AutoConfig.register("vit", MyConfig, exist_ok=True)
        Mine.config_class = MyConfig
    else:
        MyConfig = ViTConfig
    Auto.register(MyConfig, Mine, exist_ok=True)
    import vwt_hf
    for name, vwt in (("plain", {}), ("plain", {"vwt": True}), ("short", {}), ("short", {"vwt": False})):
        model = Auto.from_pretrained(os.path.join(sys.argv[1], name), **vwt)
        # transformers 5.17 takes no class for a config of its own, with the plugin or without.
        expected = Auto._model_mapping[MyConfig]
        assert type(model) is expected and isinstance(model.config, MyConfig), (own_config, imported, name, vwt)
        assert expected is Mine or MyConfig is ViTConfig
        is_plain = name == "plain" and not vwt or "vwt" in vwt and not vwt["vwt"]
        assert (model.config.vwt is None) == is_plain, (own_config, imported, name, vwt)

# Each in a process of its own, as nothing is taken back; forked, as transformers takes long to import.
assert "vwt_hf" not in sys.modules
for case in itertools.product((False, True), ("before", "after")):
    child = os.fork()
    if not child:
        loads_mine(*case)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0, case
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_class_that_a_user_registers_before_or_after_the_import_is_the_one_that_loads(tmp_path):
    model = tiny_model("vit-classifier")
    model.save_pretrained(tmp_path / "plain")
    vwt_hf.compress(model, HALF).save_pretrained(tmp_path / "short")
    run = [sys.executable, "-W", "ignore", "-c", REGISTERING, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_built_from_the_config_of_a_compressed_one_is_plain_and_is_saved_so(pixel_values, tmp_path):
    student = vwt_hf.compress(tiny_model("vit"), HALF)
    teacher = type(student)(student.config).eval()
    teacher.load_state_dict(student.state_dict())
    assert torch.equal(answers(teacher, pixel_values), answers(tiny_model("vit"), pixel_values))
    teacher.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.vwt is None
    assert student.config.vwt["keep_ratio"] == 0.5


MERGE = VWTConfig(dropped="merge").to_dict()


@pytest.mark.parametrize(
    ("kind", "text", "load", "part"),
    [
        (transformers.VisionEncoderDecoderModel, "GPT2LMHead", "from_encoder_decoder_pretrained", "encoder"),
        (transformers.VisionTextDualEncoderModel, "Bert", "from_vision_text_pretrained", "vision"),
    ],
)
def test_a_whole_made_of_two_checkpoints_takes_a_setting_for_its_tower_by_name(
    kind, text, load, part, pixel_values, tmp_path
):
    tiny_model("vit").save_pretrained(tmp_path / "vit")
    config = {"GPT2LMHead": transformers.GPT2Config(**GPT), "Bert": transformers.BertConfig(**TEXT)}[text]
    getattr(transformers, f"{text}Model")(config).save_pretrained(tmp_path / "text")
    for folder in (tmp_path / "vit", tmp_path / "nowhere"):  # it is refused before anything is loaded
        with pytest.raises(TypeError, match=rf"vwt={{'keep_ratio': 0.5}} was given for a {kind.__name__}.*{part}_vwt="):
            getattr(kind, load)(folder, tmp_path / "text", vwt={"keep_ratio": 0.5})
    whole = getattr(kind, load)(tmp_path / "vit", tmp_path / "text", **{f"{part}_vwt": HALF})
    tower = whole.get_submodule("encoder" if part == "encoder" else "vision_model").eval()
    expected = answers(vwt_hf.compress(tiny_model("vit"), HALF), pixel_values)
    torch.testing.assert_close(answers(tower, pixel_values), expected, atol=1e-6, rtol=1e-5)


def captioner() -> transformers.PreTrainedModel:
    gpt, vit = transformers.GPT2Config(**GPT), transformers.ViTConfig(**TINY)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, gpt)
    return transformers.VisionEncoderDecoderModel(config).eval()


PARTS = {captioner: "encoder", llava: "model.vision_tower"}


@pytest.fixture(params=list(PARTS), ids=lambda make: make.__name__)
def whole(request):
    """A model that holds a vision tower, which is a model itself, and the name of the tower."""
    torch.manual_seed(0)
    return request.param().eval(), PARTS[request.param]


@pytest.mark.parametrize("setting", [VWTConfig(dropped="merge"), inter()], ids=["merge", "inter"])
def test_a_part_compressed_alone_is_saved_and_loaded_with_the_whole(whole, setting, pixel_values, tmp_path):
    model, name = whole
    plain = answers(model.get_submodule(name), pixel_values)
    short = answers(vwt_hf.compress(model.get_submodule(name), setting), pixel_values)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder)
        assert model.config.vwt is None
        torch.testing.assert_close(answers(model.get_submodule(name), pixel_values), short)
        off = type(model).from_pretrained(folder, vwt=False)
        torch.testing.assert_close(answers(off.get_submodule(name), pixel_values), plain)
        off.save_pretrained(tmp_path / "plain")
        assert "vwt" not in (tmp_path / "plain/config.json").read_text()
    vwt_hf.restore(model.get_submodule(name))
    model.save_pretrained(tmp_path / "restored")
    assert "vwt" not in (tmp_path / "restored/config.json").read_text()


@pytest.mark.parametrize("setting", [VWTConfig(dropped="merge"), inter()], ids=["merge", "inter"])
def test_a_save_of_a_whole_leaves_its_configs_in_memory_as_they_were(whole, setting, monkeypatch, tmp_path):
    model, name = whole
    vwt_hf.compress(model.get_submodule(name), setting)
    held = [(module, module.config) for module in model.modules() if "config" in vars(module)]
    told = [config.to_dict() for _, config in held]

    def saved(folder):
        model.save_pretrained(tmp_path / folder)
        fields = json.loads((tmp_path / folder / "config.json").read_text())
        (part,) = (part for part in fields.values() if isinstance(part, dict) and "vwt" in part)
        assert (part["vwt"].pop("saved_as", None) is None) == (setting.method == "intra")
        return fields

    def fail(*args):
        raise OSError("no space")

    first = saved("first")
    assert saved("second") == first
    monkeypatch.setattr("vwt_hf.model_saving.require_same_words", fail)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "third")
    assert all(module.config is config for module, config in held)
    assert [config.to_dict() for _, config in held] == told
    assert type(model)(model.config).get_submodule(name).config.vwt is None  # as a teacher that goes by one config


def test_the_setting_of_one_model_is_not_saved_with_another_that_shares_its_config(tmp_path):
    config = llava().config
    short, plain = (transformers.LlavaForConditionalGeneration(config) for _ in range(2))
    vwt_hf.compress(short.model.vision_tower, MERGE)
    short.save_pretrained(tmp_path / "short")
    plain.save_pretrained(tmp_path / "plain")
    assert "vwt" not in (tmp_path / "plain/config.json").read_text()


def test_a_part_whose_config_the_whole_copies_for_its_decoder_is_loaded_with_it(pixel_values, tmp_path):
    """As CLIPSeg does for layers of its decoder: the copies have the setting of the tower, and are of no model."""
    vision, text = TINY | {"num_hidden_layers": 3}, TEXT | {"eos_token_id": 98}
    fields = {"extract_layers": [0, 1, 2], "reduce_dim": 16, "decoder_num_attention_heads": 2, "projection_dim": 16}
    model = CLIPSegForImageSegmentation(CLIPSegConfig(vision_config=vision, text_config=text, **fields)).eval()
    compress(model.clip.vision_model, {"keep_ratio": 0.5, "dropped": "merge"})
    model.save_pretrained(tmp_path)
    loaded = CLIPSegForImageSegmentation.from_pretrained(tmp_path)
    given = {"input_ids": torch.tensor([[1, 5, 98]] * len(pixel_values)), "pixel_values": pixel_values}
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert loaded.clip.vision_model.config.vwt == model.clip.vision_model.config.vwt
    assert "vwt" not in loaded.decoder.layers[0].self_attn.config.to_dict()
    for vwt in (VWTConfig(dropped="merge"), inter(), True):
        config = CLIPSegConfig(vision_config=vision, text_config=text, **fields)
        config.vision_config.vwt = vwt
        made = CLIPSegForImageSegmentation._from_config(config)
        assert made.clip.vision_model.config.vwt is not None and made.decoder.layers[0].self_attn.config.vwt is None


def test_a_model_that_is_loaded_from_nowhere_asks_the_hub_for_nothing(hub):
    config = ViTConfig(**TINY)
    config.vwt = {"method": "inter"}
    weights = ViTModel(ViTConfig(**TINY)).state_dict()
    with pytest.raises(ValueError, match="this model was loaded from nowhere"):
        ViTModel.from_pretrained(None, config=config, state_dict=weights)
    made = ViTModel.from_pretrained(None, config=config, state_dict=weights, vwt={"keep_ratio": 0.5})
    assert made.config.vwt["keep_ratio"] == 0.5 and made.name_or_path == made.config.name_or_path == ""
    assert hub.requests == []


def test_a_part_that_no_config_can_be_told_to_be_of_is_not_saved(tmp_path):
    model = captioner()
    vwt_hf.compress(model.encoder, HALF)
    model.config.encoder.hidden_size += 1
    config = model.config
    with pytest.raises(ValueError, match=r"ViTModel that was compressed alone, and no config .* alone: 0 are like it"):
        model.save_pretrained(tmp_path)
    assert model.config is config


def test_towers_of_equal_configs_that_have_one_setting_are_saved(tmp_path):
    """As DepthPro has three, which can only be compressed one by one."""
    vision = {"model_type": "dinov2"} | TINY | {"image_size": 16}
    config = transformers.DepthProConfig(
        **{f"{name}_model_config": dict(vision) for name in ("image", "patch", "fov")},
        **dict(patch_size=16, intermediate_hook_ids=[1, 0], intermediate_feature_dims=[8, 8], fusion_hidden_size=8),
        **dict(scaled_images_ratios=[0.5, 1], scaled_images_overlap_ratios=[0.0, 0.25]),
        **dict(scaled_images_feature_dims=[8, 8], use_fov_model=True),
    )
    model = transformers.DepthProForDepthEstimation(config).eval()
    encoder = model.depth_pro.encoder
    towers = [encoder.patch_encoder.model, encoder.image_encoder.model, model.fov_model.fov_encoder.model]
    for tower in towers[:-1]:
        vwt_hf.compress(tower, MERGE)
    with pytest.raises(ValueError, match=r"that was compressed alone, and no config .* that of other parts, too"):
        model.save_pretrained(tmp_path)
    vwt_hf.compress(towers[-1], {"keep_ratio": 0.3, "dropped": "merge"})
    with pytest.raises(ValueError, match=r"that was compressed alone, and no config .* that of other parts, too"):
        model.save_pretrained(tmp_path)
    vwt_hf.compress(towers[-1], MERGE)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = transformers.DepthProForDepthEstimation.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images).predicted_depth, model(images).predicted_depth)
    assert loaded.fov_model.fov_encoder.model.config.vwt["dropped"] == "merge"
    for tower, size in zip(towers, (3, 4, 5), strict=True):  # their settings are equal but for these
        vwt_hf.compress(tower, inter(vwt_hf.VisualVocabulary(torch.rand(size, 3, 4, 4))))
    with pytest.raises(ValueError, match=r"that was compressed alone, and no config .*: 3 are like it"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("setting", [MERGE, {"method": "inter"}, {"keep_ratio": 7}], ids=["merge", "no words", "bad"])
def test_turned_off_is_turned_off_in_towers_too(setting, tmp_path):
    model = llava()
    model.config.vision_config.vwt = setting
    model.config.save_pretrained(tmp_path)
    transformers.LlavaForConditionalGeneration(llava().config).save_pretrained(tmp_path / "weights")
    (tmp_path / "weights/model.safetensors").rename(tmp_path / "model.safetensors")
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, vwt=False)
    assert loaded.model.vision_tower.config.vwt is None and loaded.config.vision_config.vwt is None
    if setting is not MERGE:
        with pytest.raises((OSError, ValueError), match=rf"config\.json of {tmp_path}: .*`vwt=False`"):
            transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_setting_of_the_whole_takes_the_place_of_one_of_its_tower(tmp_path):
    model = llava()
    vwt_hf.compress(model.model.vision_tower, MERGE)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, vwt={**MERGE, "keep_ratio": 0.25})
    assert loaded.config.vwt["keep_ratio"] == 0.25 and loaded.config.vision_config.vwt is None
    config = AutoConfig.from_pretrained(tmp_path, vwt=False)
    assert config.vwt is None and config.vision_config.vwt is None
