"""Tiny random models of every family, and where the shared data is."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

SHARED = Path(os.environ.get("VWT_SHARED", Path(__file__).parents[2] / "shared"))

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 99}


def clip_config() -> transformers.CLIPConfig:
    return transformers.CLIPConfig(vision_config=TINY, text_config=TEXT, projection_dim=16)


MODELS = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**TINY)),
    "vit-classifier": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)),
    "deit": lambda: transformers.DeiTModel(transformers.DeiTConfig(**TINY)),
    "deit-classifier": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**TINY)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TINY)),
    "dinov2-classifier": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**TINY)),
    "registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**TINY, num_register_tokens=3)
    ),
    "registers-classifier": lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(**TINY, num_register_tokens=3)
    ),
    "clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)),
    "clip-projection": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**TINY)),
    "clip-classifier": lambda: transformers.CLIPForImageClassification(clip_config()),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    # Some families start their prefix tokens, positions or heads at zero, which would hide an error in them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def shared() -> Path:
    if not (SHARED / "models").is_dir():
        pytest.skip(f"needs the trained classifiers and photographs in {SHARED}")
    return SHARED
