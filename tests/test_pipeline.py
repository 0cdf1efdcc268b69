"""Pipelines with `model_kwargs={"vwt": ...}` on folders as on the Hub: config, weights, processor, tokenizer."""

from __future__ import annotations

import json
import string

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import pipeline

from tiny import tiny_model
from vwt_hf import VWTConfig, compress

HALF = {"keep_ratio": 0.5}
PHOTOGRAPHS = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8)) for seed in range(5)
]


@pytest.fixture
def checkpoint(request, tmp_path):
    """A folder with the tiny model that the test's parameter names, and what a pipeline needs beside it."""
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessorPil if request.param == "clip" else transformers.ViTImageProcessorPil
    size = {"height": 32, "width": 32}
    processor(size=size, crop_size=size, do_center_crop=True).save_pretrained(tmp_path)
    if request.param == "clip":
        letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
        vocabulary = {token: index for index, token in enumerate(letters)} | {
            "<|startoftext|>": 97,
            "<|endoftext|>": 98,
        }
        (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        transformers.CLIPTokenizer.from_pretrained(tmp_path, model_max_length=20).save_pretrained(tmp_path)
    return model, tmp_path


def same(found, expected) -> None:
    """Nested lists and dicts of numbers and labels, equal up to rounding."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(found, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, abs=1e-5)
    else:
        assert found == expected


CLASSIFIERS = ["vit-classifier", "deit-classifier", "dinov2-classifier", "registers-classifier", "clip-classifier"]
EXTRACTORS = ["vit", "deit", "dinov2", "registers", "clip-vision"]
TASKS = [
    *(("image-classification", name, {}) for name in CLASSIFIERS),
    *(("image-feature-extraction", name, {}) for name in EXTRACTORS),
    ("zero-shot-image-classification", "clip", {"candidate_labels": ["a cat", "dogs", "tea"]}),
]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize(
    ("task", "checkpoint", "kwargs"), TASKS, indirect=["checkpoint"], ids=[f"{task}-{name}" for task, name, _ in TASKS]
)
def test_a_pipeline_answers_as_the_compressed_model_in_memory(task, checkpoint, kwargs, batch_size):
    model, folder = checkpoint
    plain = pipeline(task, model=str(folder))
    assert plain.model.config.vwt is None and type(plain.model) is type(model)
    before = plain(PHOTOGRAPHS, batch_size=batch_size, **kwargs)
    compressed = pipeline(task, model=str(folder), model_kwargs={"vwt": HALF})
    assert compressed.model.config.vwt == VWTConfig(**HALF).to_dict() and type(compressed.model) is type(model)
    found = compressed(PHOTOGRAPHS, batch_size=batch_size, **kwargs)
    assert found != before

    compress(plain.model, HALF)
    same(found, plain(PHOTOGRAPHS, batch_size=1, **kwargs))
    if task == "image-feature-extraction":
        assert len(found[0][0]) == len(before[0][0]) - 32


@pytest.mark.parametrize("checkpoint", ["vit-classifier"], indirect=True)
def test_a_pipeline_follows_the_setting_of_a_saved_model(checkpoint):
    model, folder = checkpoint
    compress(model, {"keep_ratio": 0.3}).save_pretrained(folder)
    assert pipeline("image-classification", model=str(folder)).model.config.vwt["keep_ratio"] == 0.3
    off = pipeline("image-classification", model=str(folder), model_kwargs={"vwt": False})
    assert off.model.config.vwt is None


@pytest.mark.parametrize("checkpoint", ["vit-classifier"], indirect=True)
def test_a_bad_setting_never_falls_back_to_the_plain_model(checkpoint):
    with pytest.raises(ValueError, match=r"keep_ratio is 1\.3; expected a number in \(0, 1\]"):
        pipeline("image-classification", model=str(checkpoint[1]), model_kwargs={"vwt": {"keep_ratio": 1.3}})


@pytest.mark.parametrize("checkpoint", ["dinov2"], indirect=True)
def test_features_in_half_precision(checkpoint):
    features = pipeline(
        "image-feature-extraction", model=str(checkpoint[1]), dtype=torch.bfloat16, model_kwargs={"vwt": True}
    )
    assert np.isfinite(np.array(features(PHOTOGRAPHS[0]))).all()
