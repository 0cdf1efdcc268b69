"""What holds when a model is changed, interrupted, checkpointed, pushed or run under other defaults than usual."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import os
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from settings import ViTImageProcessor
from test_generation import llava
from test_pipeline import PHOTOGRAPHS
from test_vouch import tiny
from tiny import TINY, answers, sample_pixel_values, tiny_model
from vwt_hf import VisualVocabulary, VWTConfig, collate_images, compress, count_tokens, restore, token_lengths
from vwt_hf.compress import lexicon_of, setting_of
from vwt_hf.forward import current_forward
from vwt_hf.image_processing import HostTokenizer
from vwt_hf.pictures import fade, photographs_of
from vwt_hf.visualize import tint

MERGE = VWTConfig(dropped="merge")


def words(**fields) -> VWTConfig:
    vocabulary = VisualVocabulary(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    return VWTConfig(
        method="inter",
        vocabulary=vocabulary,
        threshold=0.75,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        **fields,
    )


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@pytest.mark.parametrize("ran_before", [True, False])
@pytest.mark.parametrize("kind", ["vit", "clip-vision", "blip-vision"])
def test_a_part_that_is_put_into_a_compressed_model_attends_as_the_one_it_replaces(kind, ran_before, pixel_values):
    model = compress(tiny_model(kind), words())
    expected = answers(model, pixel_values) if ran_before else answers(copy.deepcopy(model), pixel_values)
    layer = layers(model)[0]
    for name, child in list(layer.named_children()):  # as PEFT's modules_to_save do, each with a config of its own
        setattr(layer, name, copy.deepcopy(child))
    assert torch.equal(answers(model, pixel_values), expected)


class Stopped(BaseException):
    """As `KeyboardInterrupt`, of which hooks of torch are not told."""


def stop(*_) -> None:
    raise Stopped


def test_a_model_answers_as_before_after_an_interrupt(pixel_values):
    model = compress(tiny_model("vit"), words())
    expected = answers(model, pixel_values)
    for _ in range(2):
        handle = layers(model)[1].register_forward_pre_hook(stop)
        with pytest.raises(Stopped):
            model(pixel_values)
        handle.remove()
        assert current_forward() is None
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(answers(model, pixel_values), expected)


def test_a_model_called_within_its_own_layers_answers_as_outside(pixel_values):
    model = compress(tiny_model("vit"), words())
    expected, alone = answers(model, pixel_values), answers(model, pixel_values[:1])
    found = []

    def call_again(*_) -> None:
        handle.remove()
        found.append(answers(model, pixel_values[:1]))

    handle = layers(model)[1].register_forward_pre_hook(call_again)
    assert torch.equal(answers(model, pixel_values), expected)
    assert torch.equal(found[0], alone)


@pytest.mark.parametrize("way", list(CheckpointImpl))
@pytest.mark.parametrize("setting", [MERGE, words()], ids=["merge", "words"])
def test_layers_in_torchs_checkpoint_wrappers_have_the_gradients_of_those_without(setting, way, pixel_values):
    def gradient(model: nn.Module) -> torch.Tensor:
        images = pixel_values.clone().requires_grad_()
        model(images).last_hidden_state.square().sum().backward()
        return images.grad

    model = compress(tiny_model("vit"), setting)
    expected = gradient(model)
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=way)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, GradientCheckpointingLayer)
    )
    torch.testing.assert_close(gradient(model), expected, atol=1e-4, rtol=1e-4)
    wrappers = [module for module in model.modules() if hasattr(module, "checkpoint_fn")]
    restore(model)
    assert len(wrappers) == 2 and all(
        wrapper.checkpoint_fn.func.__module__ != "vwt_hf.attention" for wrapper in wrappers
    )


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def another_default(request: pytest.FixtureRequest):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["vit", "beit"])
@pytest.mark.parametrize("setting", [MERGE, words()], ids=["merge", "words"])
def test_answers_do_not_depend_on_torchs_default_dtype(kind, setting, another_default):
    pixel_values = sample_pixel_values().float()
    torch.set_default_dtype(torch.float32)
    model = compress(tiny_model(kind), setting)
    expected = answers(model, pixel_values)
    torch.set_default_dtype(another_default)
    assert torch.equal(answers(model, pixel_values), expected)


def test_words_are_read_exactly_whatever_torchs_defaults_are(tmp_path, another_default):
    vocabulary = VisualVocabulary(torch.rand(20, 3, 4, 4, dtype=torch.float32), torch.arange(20))
    vocabulary.save_pretrained(tmp_path)
    with torch.device("meta"):
        read = VisualVocabulary.from_pretrained(tmp_path)
    assert torch.equal(read.words, vocabulary.words) and torch.equal(read.frequencies, vocabulary.frequencies)


def test_the_host_learns_words_draws_and_collates_whatever_torchs_default_device_is():
    """ "meta" stands in for "cuda", as it is where nothing can be computed by mistake."""
    processor = ViTImageProcessor(size={"height": 16, "width": 16})

    def made():
        words = VisualVocabulary.learn(PHOTOGRAPHS, processor, size=4, patch_size=4, progress=False)
        ready = HostTokenizer(VWTConfig(criterion="grid"), (4, 4))
        inputs = dict(processor(PHOTOGRAPHS, return_tensors="np"))
        inputs["patch_words"] = ready.words(inputs)
        decoded = photographs_of(torch.zeros(1, 3, 8, 8, device="cpu"), (0.5,) * 3, (0.25,) * 3)
        kept = torch.ones(1, 2, 2, dtype=torch.bool, device="cpu")
        pictures = fade(decoded, kept, (4, 4)), tint(decoded, torch.arange(4, device="cpu").view(1, 2, 2), (4, 4))
        several = collate_images([{"patch_words": row} for row in inputs["patch_words"]])["patch_words"]
        return [words.words, *pictures, several, token_lengths(several), token_lengths(inputs["patch_words"])]

    expected = made()
    torch.set_default_device("meta")
    try:
        found = made()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_setting_is_of_its_method_alone():
    with pytest.raises(ValueError, match="method is 'inter', but the other fields are those of another"):
        dataclasses.replace(VWTConfig(), method="inter")
    with pytest.raises(ValueError, match="has no field 'cls'"):
        VWTConfig.parse({"cls": 1})


def test_a_part_compressed_after_its_whole_is_what_is_saved(tmp_path, pixel_values):
    model = compress(tiny_model("clip"), words())
    compress(model.vision_model, VWTConfig(keep_ratio=0.25))
    expected = answers(model, pixel_values)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(answers(loaded, pixel_values), expected)
    assert loaded.config.vwt is None and loaded.config.vision_config.vwt["keep_ratio"] == 0.25


def test_the_class_of_a_config_with_a_setting_is_pickled_as_itself():
    setting_too = type(compress(tiny_model("vit"), MERGE).config)
    others = type(compress(tiny_model("vit"), VWTConfig()).config)
    assert setting_too is not transformers.ViTConfig is not others
    assert pickle.loads(pickle.dumps(setting_too)) is setting_too
    assert setting_too == others == transformers.ViTConfig  # found in dicts wherever one of them is
    assert len({setting_too, others, transformers.ViTConfig}) == 1


def test_a_save_with_words_uploads_the_files_that_it_writes(hub, tmp_path: Path, pixel_values):
    model = compress(tiny_model("vit"), words())
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").write_text("mine")
    trained = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(
        tmp_path / "here",
        state_dict=trained,
        variant="fp32",
        max_shard_size="20KB",
        push_to_hub=True,
        repo_id="me/words",
    )
    there = hub.files("me/words")
    written = {
        str(path.relative_to(tmp_path / "here")): path for path in (tmp_path / "here").rglob("*") if path.is_file()
    }
    assert set(there) - {".gitattributes"} == set(written) - {"notes.txt"}
    assert sum("fp32" in name for name in there) > 2
    assert all(there[name] == path.read_bytes() for name, path in written.items() if name != "notes.txt")
    loaded = transformers.AutoModel.from_pretrained("me/words", variant="fp32")
    assert torch.equal(loaded.state_dict()["layernorm.bias"], trained["layernorm.bias"])
    model.load_state_dict(trained)
    assert torch.equal(answers(loaded, pixel_values), answers(model, pixel_values))


@pytest.mark.parametrize("setting", [MERGE, words()], ids=["merge", "words"])
def test_a_model_whose_parts_peft_copied_before_is_compressed_as_the_plain_one(setting, pixel_values):
    peft = pytest.importorskip("peft")
    model = tiny_model("vit")
    adapters = peft.LoraConfig(target_modules=["projection"], modules_to_save=["attention"])
    adapted = peft.get_peft_model(model, adapters)
    compress(model, setting)
    expected = answers(compress(tiny_model("vit"), setting), pixel_values)
    assert torch.allclose(answers(adapted.eval(), pixel_values), expected, atol=1e-6)
    restore(model)
    assert torch.equal(answers(adapted, pixel_values), answers(tiny_model("vit"), pixel_values))


def test_a_setting_for_words_that_were_saved_keeps_how_they_are_normalised(tmp_path, pixel_values):
    compress(tiny_model("vit"), words()).save_pretrained(tmp_path)  # with no image processor beside it
    near = {"method": "inter", "threshold": 0.7}
    loaded = transformers.AutoModel.from_pretrained(tmp_path, vwt=near)
    expected = compress(tiny_model("vit"), dataclasses.replace(words(), threshold=0.7))
    assert torch.equal(answers(loaded, pixel_values), answers(expected, pixel_values))


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_a_pipeline_says_where_a_setting_goes_rather_than_leave_it_out(task):
    model = tiny_model("vit-classifier" if task == "image-classification" else "vit")
    processor = transformers.ViTImageProcessorPil() if hasattr(transformers, "ViTImageProcessorPil") else None
    processor = processor or transformers.ViTImageProcessor()
    for given in ({"vwt": True}, {"vwt": False, "model_kwargs": {}}):
        with pytest.raises(TypeError, match="model_kwargs="):
            transformers.pipeline(task, model=model, image_processor=processor, **given)


def test_a_seal_that_is_no_file_is_not_waited_for(tmp_path):
    compress(tiny_model("vit"), words()).save_pretrained(tmp_path)
    (seal,) = tmp_path.glob("visual_words-*/sealed.json")
    seal.unlink()
    os.mkfifo(seal)
    with pytest.raises(ValueError, match="was not finished"):
        transformers.AutoModel.from_pretrained(tmp_path)


def test_embeddings_that_fsdp_shards_have_the_gradient_of_those_that_it_does_not(tmp_path, pixel_values):
    def gradient(model: nn.Module) -> torch.Tensor:
        images = pixel_values.clone().requires_grad_()
        model(images).last_hidden_state.square().sum().backward()
        return images.grad

    model = compress(tiny_model("vit"), words())
    expected = gradient(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model.embeddings)
        fully_shard(model)
        torch.testing.assert_close(gradient(model), expected, atol=1e-4, rtol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_what_fsdp_sharded_before_is_compressed_untried(tmp_path, pixel_values):
    """A call of the tower alone would make it the root of FSDP, and the next call of the whole an error."""
    expected = answers(compress(tiny_model("vit-classifier"), words()), pixel_values)
    model, other = tiny_model("vit-classifier"), tiny("Pixio")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for part in (model.vit.embeddings, *model.vit.layers, model):
            fully_shard(part)
        torch.testing.assert_close(answers(compress(model, words()), pixel_values), expected)
        fully_shard(other)
        with pytest.raises(ValueError, match=r"weights in parts in several processes, so it cannot be tried"):
            compress(other, words())
    finally:
        torch.distributed.destroy_process_group()


GRADUAL = VWTConfig("gradual", similarity=0.0, tolerance=0.3, image_std=[0.5] * 3)


@pytest.mark.parametrize("name", ["vit-classifier", "dinov2-classifier", "clip-projection"])
def test_a_part_with_the_config_of_its_whole_is_saved_with_the_whole(name, tmp_path, pixel_values):
    """As a classifier's backbone, also after labels have set the kind of problem in the whole's config."""
    whole = tiny_model(name)
    part = next(child for child in whole.children() if isinstance(child, transformers.PreTrainedModel))
    whole.config.problem_type = "single_label_classification"
    compress(part, GRADUAL)
    expected = answers(whole, pixel_values)
    for _ in range(2):
        whole.save_pretrained(tmp_path)
        assert torch.equal(answers(whole, pixel_values), expected)
    loaded = type(whole).from_pretrained(tmp_path)
    assert torch.equal(answers(loaded, pixel_values), expected)
    assert loaded.config.vwt == GRADUAL.to_dict() and "" not in loaded.config.to_dict()
    assert loaded.config.problem_type == "single_label_classification"
    assert torch.equal(answers(restore(whole), pixel_values), answers(tiny_model(name), pixel_values))


def test_a_save_of_a_whole_changes_nothing_in_its_compressed_part(tmp_path, pixel_values):
    whole = llava().eval()
    compress(whole.model, GRADUAL)

    def seen():
        with torch.no_grad():
            return whole.model.vision_tower(pixel_values)[0]

    expected = seen()
    whole.save_pretrained(tmp_path)
    assert torch.equal(seen(), expected)


class Two(transformers.PreTrainedModel):
    """A student and a teacher that are made by one config."""

    config_class = transformers.CLIPConfig
    _supports_sdpa = True

    def __init__(self, config: transformers.CLIPConfig) -> None:
        super().__init__(config)
        self.student = transformers.CLIPVisionModel(config.vision_config)
        self.teacher = transformers.CLIPVisionModel(config.vision_config)
        self.post_init()


def test_one_of_two_parts_that_are_made_by_one_config_is_not_saved_as_both(tmp_path):
    model = Two(tiny_model("clip").config)
    compress(model.student, {"keep_ratio": 0.5})
    with pytest.raises(ValueError, match="is that of this part alone: the one like it"):
        model.save_pretrained(tmp_path)
    restore(model.student)
    model.save_pretrained(tmp_path)


@pytest.mark.parametrize("order", [("student", "teacher"), ("teacher", "student")])
def test_a_part_that_was_restored_is_not_compressed_by_the_config_of_another(tmp_path, order):
    model = Two(tiny_model("clip").config)
    for name in order:
        compress(getattr(model, name), {"keep_ratio": 0.5})
    restore(model.teacher)
    with pytest.raises(ValueError, match=r"the one like it is that of other parts, too.*Save the part by itself"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("whole", "part", "reason"),
    [
        (lambda: transformers.ViTForMaskedImageModeling(tiny_model("vit").config), "vit", "cannot be compressed"),
        (
            lambda: transformers.BeitForSemanticSegmentation(
                transformers.BeitConfig(**TINY | {"num_hidden_layers": 4}, out_indices=[1, 2, 3, 4])
            ),
            "beit",
            "no patch may be dropped",
        ),
    ],
    ids=["masked", "segmentation"],
)
def test_a_whole_that_could_not_be_loaded_by_the_setting_of_its_part_is_not_saved(tmp_path, whole, part, reason):
    model = whole()
    compress(getattr(model, part), {"keep_ratio": 0.5})
    with pytest.raises(ValueError, match=rf"is that of the whole.* {reason}.*Save the part by itself"):
        model.save_pretrained(tmp_path)
    restore(getattr(model, part))
    model.save_pretrained(tmp_path)


def test_restore_leaves_the_config_that_other_models_are_built_from(tmp_path):
    whole = llava()
    compress(whole.model.vision_tower, {"keep_ratio": 0.5, "dropped": "merge"})
    whole.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    first, second = (type(whole)(config) for _ in range(2))
    assert restore(first).config.vision_config.vwt is None
    assert config.vision_config.vwt == second.model.vision_tower.config.vwt is not None
    assert type(whole)(config).model.vision_tower.config.vwt is not None


class Holder(transformers.PreTrainedModel):
    """A model of no family with a tower of one."""

    config_class = transformers.LlamaConfig

    def __init__(self) -> None:
        super().__init__(transformers.LlamaConfig())
        self.tower = tiny_model("vit")

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.tower(pixel_values)[0]


def test_tokens_are_counted_of_the_part_of_a_whole_that_was_compressed_alone(pixel_values):
    model = Holder().eval()
    with pytest.raises(ValueError, match="tokens of a Holder cannot be counted"), count_tokens(model):
        pass
    compress(model.tower, {"keep_ratio": 0.25})
    with count_tokens(model) as count, torch.no_grad():
        model(pixel_values)
    assert count.mean == 17


@pytest.mark.parametrize("name", ["vit", "clip-vision"])
def test_a_model_whose_setting_is_taken_from_its_config_by_hand_answers_as_before(name, pixel_values):
    model = compress(tiny_model(name), GRADUAL)
    expected = answers(model, pixel_values)
    model.config.vwt = None
    assert torch.equal(answers(model, pixel_values), expected)
    assert type(restore(model).config) is type(tiny_model(name).config)
    assert torch.equal(answers(model, pixel_values), answers(tiny_model(name), pixel_values))


def test_a_config_read_without_its_setting_has_none_in_any_part(tmp_path):
    model = tiny_model("clip")
    compress(model.vision_model, {"keep_ratio": 0.5})
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path, vwt=False)
    assert config.vision_config.vwt is None
    loaded = transformers.AutoModel.from_pretrained(tmp_path, config=config)
    assert setting_of(loaded) is None and loaded.vision_model.config.vwt is None


def test_a_config_of_a_compressed_model_is_equal_to_its_copy():
    for name in ("vit", "clip"):
        config = compress(tiny_model(name), GRADUAL).config
        assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))


def test_words_in_memory_are_those_of_the_setting_wherever_it_is_given(tmp_path):
    """Of patches that the package has words for, too, which took their place."""
    tiny_model("vit", patch_size=16, image_size=64).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}, **HALVES).save_pretrained(tmp_path)
    words, photographs = of_16(), PHOTOGRAPHS[:2]
    by_words = VWTConfig("inter", vocabulary=words, threshold=0.4)
    model = transformers.AutoModel.from_pretrained(tmp_path, vwt=by_words)
    vwt, plain = model.config.vwt, VWTConfig("inter", vocabulary=words, threshold=0.4).to_dict()
    assert vwt["saved_as"] == plain["saved_as"] is not None and vwt["vocabulary"] is None

    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=vwt)
    given = processor(photographs, return_tensors="pt")
    expected = answers(model, given["pixel_values"])
    assert torch.equal(model(**given)[0], expected)
    again = AutoImageProcessor.from_pretrained(tmp_path, vwt=processor.vwt)
    assert torch.equal(again(photographs, return_tensors="pt")["patch_words"], given["patch_words"])
    loaded = transformers.AutoModel.from_pretrained(tmp_path, vwt=vwt)
    built = transformers.AutoModel.from_config(model.config).eval()
    built.load_state_dict(model.state_dict())
    for other in (
        loaded,
        built,
        compress(tiny_model("vit", patch_size=16, image_size=64), plain | HALVES),
        compress(restore(loaded), vwt),
    ):
        assert (
            torch.equal(lexicon_of(other).vocabulary.words, words.words)
            and other.config.vwt["saved_as"] == vwt["saved_as"]
        )
        assert torch.equal(answers(other, given["pixel_values"]), expected)


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "built"])
def test_words_keep_their_name_once_they_are_saved(tmp_path, loaded):
    """A save gives them another, which the config holds from then on."""
    model, setting = tiny_model("vit", patch_size=16, image_size=64), VWTConfig("inter", vocabulary=of_16(), **HALVES)
    model.save_pretrained(tmp_path / "a")
    ViTImageProcessor(size={"height": 64, "width": 64}, **HALVES).save_pretrained(tmp_path / "a")
    model = transformers.AutoModel.from_pretrained(tmp_path / "a") if loaded else model
    before = compress(model, setting).config.vwt
    model.save_pretrained(tmp_path / "b")
    assert model.config.vwt["saved_as"] not in (None, before["saved_as"])
    again = transformers.AutoModel.from_pretrained(tmp_path / "b")
    assert again.config.vwt == model.config.vwt
    processor = AutoImageProcessor.from_pretrained(tmp_path / "a", vwt=before)
    processor.save_pretrained(tmp_path / "c")
    for vwt in (before, model.config.vwt):
        compress(model, vwt | {"threshold": 0.3})
        assert torch.equal(lexicon_of(model).vocabulary.words, of_16().words)
        found = [AutoImageProcessor.from_pretrained(tmp_path / "a", vwt=one) for one in (vwt, processor.vwt)]
        assert all(torch.equal(one.tokenizer_of_patches.setting.words.vocabulary.words, of_16().words) for one in found)


def test_an_image_processor_hashes_no_words_when_it_is_called(tmp_path, monkeypatch):
    tiny_model("vit", patch_size=16, image_size=64).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}, **HALVES).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, vwt=VWTConfig("inter", vocabulary=of_16()))
    monkeypatch.setattr(VisualVocabulary, "fingerprint", None)
    assert "patch_words" in processor(PHOTOGRAPHS[:1], return_tensors="pt")


def test_words_given_beside_the_setting_of_others_are_taken_and_named():
    model = compress(tiny_model("vit", patch_size=16, image_size=64), VWTConfig("inter", vocabulary=of_16(), **HALVES))
    vwt, others = model.config.vwt, of_16(seed=1)
    compress(model, vwt | {"vocabulary": others})
    assert (
        torch.equal(lexicon_of(model).vocabulary.words, others.words)
        and model.config.vwt["saved_as"] != vwt["saved_as"]
    )
    compress(model, model.config.vwt | {"threshold": 0.3})
    assert torch.equal(lexicon_of(model).vocabulary.words, others.words)
    first = compress(tiny_model("vit", patch_size=16, image_size=64), VWTConfig("inter", vocabulary=of_16(), **HALVES))
    compress(model, first.config.vwt)
    assert torch.equal(lexicon_of(model).vocabulary.words, of_16().words)


def test_a_dict_names_the_folder_of_words_as_its_setting_does(tmp_path):
    of_16().save_pretrained(tmp_path)
    for folder in (tmp_path, str(tmp_path)):
        vwt = VWTConfig("inter", vocabulary=folder, **HALVES).to_dict()
        assert vwt["vocabulary"] == str(tmp_path) and vwt["saved_as"] is None
    model = compress(tiny_model("vit", patch_size=16, image_size=64), vwt)
    assert model.config.vwt["vocabulary"] is None
    assert torch.equal(
        lexicon_of(compress(tiny_model("vit", patch_size=16, image_size=64), model.config.vwt)).vocabulary.words,
        of_16().words,
    )


def test_words_that_are_gone_are_not_replaced_by_others(tmp_path):
    tiny_model("vit", patch_size=16, image_size=64).save_pretrained(tmp_path)
    words = of_16(seed=2)
    model = compress(tiny_model("vit", patch_size=16, image_size=64), VWTConfig("inter", vocabulary=words, **HALVES))
    config, vwt = copy.deepcopy(model.config), model.config.vwt
    words.words[0] = 0  # they are no longer those that the setting names
    restore(model)
    gc.collect()
    for refused in (lambda: compress(model, vwt), lambda: transformers.AutoModel.from_config(config)):
        with pytest.raises(ValueError, match="Here they are not in memory, and this model was loaded from nowhere"):
            refused()
    with pytest.raises(FileNotFoundError, match=f"visual_words-{vwt['saved_as']} holds no vocabulary.json"):
        transformers.AutoModel.from_pretrained(tmp_path, vwt=vwt)
    assert model.config.vwt is None


HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def of_16(seed: int = 0) -> VisualVocabulary:
    return VisualVocabulary(torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))


def test_statistics_of_another_number_of_channels_are_no_model_s(tmp_path, caplog):
    tiny_model("vit", num_channels=4).save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, vwt={"method": "local"})
    assert "image_mean has 3 numbers; expected 4" in caplog.text and len(model.config.vwt["image_std"]) == 4
    assert answers(model, torch.rand(2, 4, 32, 32)).isfinite().all()


def test_a_deviation_that_a_program_gives_may_be_as_small_as_a_number(pixel_values):
    vocabulary = VisualVocabulary(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    setting = VWTConfig("inter", vocabulary=vocabulary, image_mean=[0.0] * 3, image_std=[1e-300] * 3)
    assert answers(compress(tiny_model("vit"), setting), pixel_values).isfinite().all()
    with pytest.raises(ValueError, match=r"image_std is .*; expected one number in"):
        VWTConfig.parse(setting.to_dict())
