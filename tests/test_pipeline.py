"""Pipelines with `model_kwargs={"vwt": ...}` on folders as on the Hub: config, weights, processor, tokenizer."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import Pipeline, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from settings import SETTINGS
from test_generation import IMAGE_TOKEN, IMAGE_TOKENS, blip_2, built
from tiny import MODELS, TINY, contrastive_config
from vwt_hf import VWTConfig, compress, supported
from vwt_hf.families import FAMILIES, HOLDERS

TASKS = {
    "image-classification": MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-feature-extraction": MODEL_MAPPING_NAMES,
    "zero-shot-image-classification": MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-text-to-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
COMPUTED = {
    "image-classification": "logits",
    "image-feature-extraction": "last_hidden_state",
    "zero-shot-image-classification": "logits_per_image",
}
"""The output of the model that a task's answer is made from."""
PATCHES = 64
LLAVA = {
    "patch_size": TINY["patch_size"],
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
PROCESSOR_FIELDS = {
    "blip-2": {"num_query_tokens": IMAGE_TOKENS[blip_2]},
    "llava": LLAVA,
    "vipllava": LLAVA,
    "llava_next": LLAVA,
    "llava_onevision": {"num_image_tokens": PATCHES, "vision_feature_select_strategy": "full"},
}
MODEL_TYPES = {row.name: row.model_types for row in FAMILIES} | {name: (own,) for own, name in HOLDERS.items()}
"""Of every supported family, by its name."""


def photograph(number: int) -> Image.Image:
    """Noise beside a bright sky, whose patches are near words, and which is wider from one photograph to the next."""
    pixels = np.random.default_rng(number).integers(0, 255, (50, 50, 3), dtype=np.uint8)
    sky = pixels[:, : 10 + 8 * number]
    sky[:] = 120 + sky // 2
    return Image.fromarray(pixels)


PHOTOGRAPHS = [photograph(number) for number in range(5)]


def retrieval_config(**_) -> transformers.Blip2Config:
    config = blip_2().config
    config.image_text_hidden_size = 16
    config.qformer_config.use_qformer_text_input = True
    return config


TINY_MODELS = {
    **MODELS,
    **{make.__name__: (type(make()), lambda make=make, **_: make().config) for make in IMAGE_TOKENS},
    "blip-2-retrieval": (transformers.Blip2ForImageTextRetrieval, retrieval_config),
    "owlvit": (transformers.OwlViTModel, contrastive_config(transformers.OwlViTConfig)),
    "owlv2": (transformers.Owlv2Model, contrastive_config(transformers.Owlv2Config)),
}
"""As those of tests/tiny.py: class and what makes its config from TINY, by name."""


def model_type_of(model_class: type) -> str:
    return model_class.config_class.model_type


def names_of(model_class: type) -> list[str]:
    """The tiny models of that class, or else one whose config serves it."""
    alike = {
        name: known for name, (known, _) in TINY_MODELS.items() if model_type_of(known) == model_type_of(model_class)
    }
    return [name for name, known in alike.items() if known is model_class] or list(alike)[:1]


def classes(names: str | tuple[str, ...]) -> list[type]:
    return [getattr(transformers, name) for name in ([names] if isinstance(names, str) else names)]


BY_MAPPING = [
    (task, model_class)
    for task, mapping in TASKS.items()
    for model_types in MODEL_TYPES.values()
    for model_type in model_types
    for model_class in classes(mapping.get(model_type, ()))
]
"""Every task of every supported family."""
REASONS = {
    (task, model_class): "reads a text, too, and this pipeline gives it none"
    for task, model_class in BY_MAPPING
    if task == "image-feature-extraction" and "text_config" in model_class.config_class.sub_configs
}
"""Those of them that the plain models cannot do either."""
if not is_torchvision_available():
    REASONS["image-text-to-text", transformers.LlavaOnevisionForConditionalGeneration] = (
        "its processor needs torchvision"
    )
WITH_NAMES = [(*case, name) for case in BY_MAPPING for name in names_of(case[1])]
CASES = [case for case in WITH_NAMES if case[:2] not in REASONS]
ONE_OF_EACH_TASK = [case for case in CASES if case[2] in ("vit-classifier", "dinov2", "clip", "llava")]


def on(cases):
    """A test of these cases."""
    ids = [f"{task}-{model_class.__name__}-{name}" for task, model_class, name in cases]
    return pytest.mark.parametrize(("task", "model_class", "name"), cases, ids=ids)


@pytest.fixture
def folder(task, model_class, name, tmp_path) -> str:
    """A model of the class, with the config of that tiny model, and what a pipeline for the task needs beside it."""
    _, config = TINY_MODELS[name]
    model = built(lambda: model_class(config(**TINY)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # Weights as small as those let little of an image through a Q-Former.
                parameter.mul_(3)
    model.save_pretrained(tmp_path)

    model_type = model_type_of(model_class)
    if task == "image-text-to-text" and model_type == "llava_onevision" and not is_torchvision_available():
        pytest.skip("its processor takes videos, too, which needs torchvision")
    size = {"height": TINY["image_size"], "width": TINY["image_size"]}
    fields = {"patch_size": TINY["patch_size"], "max_num_patches": PATCHES, "image_seq_length": PATCHES}
    fields["image_grid_pinpoints"] = [[TINY["image_size"], 2 * TINY["image_size"]]]
    image_processor = image_processor_class(model_type)(size=size, crop_size=size, **fields)
    if task == "image-text-to-text":
        tokenizer = tokenizer_with({"<pad>": 0, "<s>": 1, "</s>": 97, "<image>": IMAGE_TOKEN})
        processor_class = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
        parts = [image_processor, tokenizer]
        if "video_processor" in inspect.signature(processor_class).parameters:
            parts.append(transformers.LlavaOnevisionVideoProcessor(size=size))
        processor_class(*parts, **PROCESSOR_FIELDS.get(model_type, {})).save_pretrained(tmp_path)
    else:
        image_processor.save_pretrained(tmp_path)
    if task == "zero-shot-image-classification":
        tokenizer_with({"<pad>": 1, "<s>": 97, "</s>": 98}).save_pretrained(tmp_path)
    return str(tmp_path)


def image_processor_class(model_type: str) -> type:
    """The family's own, where it has one that needs no torchvision."""
    alike = next(own for own in MODEL_TYPES.values() if model_type in own)
    known = [IMAGE_PROCESSOR_MAPPING_NAMES.get(each) or {} for each in (model_type, *alike)]
    return getattr(transformers, next((names["pil"] for names in known if "pil" in names), "ViTImageProcessorPil"))


def tokenizer_with(special: dict[str, int]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with a token for each word of the tests, and special tokens where the tiny models expect them."""
    texts = iter(["<unk>", "this", "is", "a", "photo", "of", "cat", "dogs", "tea", "."])
    special_of = {index: token for token, index in special.items()}
    vocabulary = {special_of.get(index) or next(texts, f"unused{index}"): index for index in range(99)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, special[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[token for token in special if token == "<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )


def ask(pipe: Pipeline, batch_size: int = 1) -> tuple[list, torch.Tensor]:
    """The answers to the photographs, and for each of them what the model computed.

    Tiny models of random weights may well write the same text, or rank labels alike, whatever they see.
    """
    torch.manual_seed(0)  # ViT-MAE shuffles its patches.
    computed = []
    if pipe.task == "image-text-to-text":

        def record(_, scores: torch.Tensor) -> torch.Tensor:
            # The end of the text is ruled out by -inf, whose differences are no numbers.
            computed.append(scores.clamp(min=-1e4))
            return scores

        text = "<image>" * (pipe.model.config.model_type in HOLDERS) + " a photo of"
        how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        how["logits_processor"] = transformers.LogitsProcessorList([record])
        # The pipeline takes a list of dicts for a chat.
        prompts = ({"images": image, "text": text} for image in PHOTOGRAPHS)
        answers = list(pipe(prompts, batch_size=batch_size, generate_kwargs=how))
    else:
        hook = pipe.model.register_forward_hook(lambda *call: computed.append(call[-1][COMPUTED[pipe.task]]))
        labels = {"candidate_labels": ["a cat", "dogs", "tea"]} if pipe.task.startswith("zero-shot") else {}
        answers = pipe(PHOTOGRAPHS, batch_size=batch_size, **labels)
        hook.remove()
    assert len(answers) == len(PHOTOGRAPHS)
    assert {len(batch) for batch in computed} == {batch_size}
    # From (steps of batch after batch, batch, ...) to (photographs, steps, ...); only text takes several steps.
    by_batch = torch.stack(computed).unflatten(0, (len(PHOTOGRAPHS) // batch_size, -1))
    return answers, by_batch.transpose(1, 2).flatten(0, 1)


def same(found, expected) -> None:
    """Nested lists and dicts of numbers, labels and texts, equal up to rounding."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(found, list):
        assert len(found) == len(expected)
        if found and isinstance(found[0], dict) and "label" in found[0]:  # in the order of scores, which may be equal
            found, expected = (sorted(answers, key=lambda answer: answer["label"]) for answers in (found, expected))
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert found == expected


def allowed(model_class: type) -> dict[str, VWTConfig]:
    needs_every_patch = {name for family in FAMILIES for name in family.needs_every_patch}
    every_patch = model_type_of(model_class) in HOLDERS or model_class.__name__ in needs_every_patch
    return {name: setting for name, setting in SETTINGS.items() if setting.restores or not every_patch}


def test_every_task_of_every_supported_family_has_a_case():
    model_types = {model_type_of(model_class) for _, model_class in BY_MAPPING}
    assert [name for name, own in MODEL_TYPES.items() if model_types & {*own}] == supported()
    assert {case[:2] for case in WITH_NAMES} == {*BY_MAPPING}, "add what is missing to tests/tiny.py"
    assert [case[0] for case in ONE_OF_EACH_TASK] == list(TASKS)


@on(CASES)
def test_a_pipeline_answers_as_the_compressed_model_in_memory_alone_and_in_a_batch(task, model_class, folder):
    plain = pipeline(task, model=folder)
    assert plain.model.config.vwt is None and type(plain.model) is model_class
    _, before = ask(plain)
    every = any((task, model_class) == case[:2] for case in ONE_OF_EACH_TASK)
    for name, setting in allowed(model_class).items():
        if not every and name not in ("merge", "inter"):
            continue  # what else settings differ in is the same for all families
        compressed = pipeline(task, model=folder, model_kwargs={"vwt": setting})
        assert compressed.model.config.vwt == setting.to_dict() and type(compressed.model) is model_class
        answers, found = ask(compressed)
        if task == "image-feature-extraction":
            shorter = PATCHES // 2 if name == "discard" else 0
            assert {len(answer[0]) for answer in answers} == {before.shape[2] - shorter}
        if found.shape == before.shape:
            assert ((found - before).abs().flatten(1).amax(1) > 1e-4).all()

        answers_together, found_together = ask(compressed, batch_size=5)
        same(answers_together, answers)
        torch.testing.assert_close(found_together, found, atol=1e-5, rtol=1e-5)

        compress(plain.model, setting)
        answers_in_memory, found_in_memory = ask(plain)
        same(answers, answers_in_memory)
        assert torch.equal(found, found_in_memory)


@on([case for case in WITH_NAMES if case[:2] in REASONS])
def test_the_plain_pipeline_fails_where_a_family_has_no_case(task, model_class, folder):
    plain = pipeline(task, model=folder)
    assert type(plain.model) is model_class
    with pytest.raises((AttributeError, TypeError, ValueError), match=r"input_ids|NoneType"):
        plain(PHOTOGRAPHS[0])


@on(ONE_OF_EACH_TASK)
def test_a_pipeline_follows_the_setting_of_a_saved_model(task, model_class, folder):
    setting = VWTConfig(keep_ratio=0.3, dropped="merge")
    compress(model_class.from_pretrained(folder), setting).save_pretrained(folder)
    saved = pipeline(task, model=folder)
    assert saved.model.config.vwt == setting.to_dict()
    off = pipeline(task, model=folder, model_kwargs={"vwt": False})
    assert off.model.config.vwt is None
    found, plain = ask(saved)[1], ask(off)[1]
    assert ((found - plain).abs().flatten(1).amax(1) > 1e-4).all()
    compress(off.model, setting)
    assert torch.equal(found, ask(off)[1])


@on(ONE_OF_EACH_TASK)
def test_a_bad_setting_never_falls_back_to_the_plain_model(task, model_class, folder):
    with pytest.raises(ValueError, match=r"keep_ratio is 1\.3; expected a number in \(0, 1\]"):
        pipeline(task, model=folder, model_kwargs={"vwt": {"keep_ratio": 1.3}})


@on([case for case in CASES if len(allowed(case[1])) < len(SETTINGS)])
def test_a_setting_that_a_model_cannot_have_never_falls_back_to_the_plain_model(task, model_class, folder):
    with pytest.raises(ValueError, match=r"reads a value for every patch.*Use vwt=True.*dropped='merge'"):
        pipeline(task, model=folder, model_kwargs={"vwt": {"keep_ratio": 0.5}})


@on([case for case in CASES if len(allowed(case[1])) < len(SETTINGS)])
def test_a_setting_by_which_all_patches_stay_is_the_plain_model(task, model_class, folder):
    _, expected = ask(pipeline(task, model=folder))
    assert torch.equal(ask(pipeline(task, model=folder, model_kwargs={"vwt": {"keep_ratio": 1.0}}))[1], expected)


@on(ONE_OF_EACH_TASK)
def test_a_pipeline_in_half_precision_answers_as_the_compressed_model_in_memory(task, model_class, folder):
    setting = {"keep_ratio": 0.5, "dropped": "merge"}
    compressed = pipeline(task, model=folder, dtype=torch.bfloat16, model_kwargs={"vwt": setting})
    _, found = ask(compressed)
    assert compressed.model.dtype == torch.bfloat16 and found.isfinite().all()
    plain = pipeline(task, model=folder, dtype=torch.bfloat16)
    assert not torch.equal(found, ask(plain)[1])
    compress(plain.model, setting)
    # Patches are chosen in single precision, by the image processor, and not as the model rounds them.
    plain.image_processor, plain.processor = compressed.image_processor, compressed.processor
    assert torch.equal(found, ask(plain)[1])


@on([case for case in ONE_OF_EACH_TASK if case[2] in ("clip", "llava")])
def test_a_saved_pipeline_keeps_the_setting_with_its_model_and_its_image_processor(task, model_class, folder, tmp_path):
    compressed = pipeline(task, model=folder, model_kwargs={"vwt": VWTConfig(dropped="merge")})
    compressed.save_pretrained(tmp_path / "saved")
    saying = [file.name for file in (tmp_path / "saved").iterdir() if '"vwt"' in file.read_text(errors="ignore")]
    assert sorted(saying) == ["config.json", "preprocessor_config.json"]
