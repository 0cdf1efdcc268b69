"""Tiny random models of every family, the images they see, and their answers."""

from __future__ import annotations

import torch
import transformers

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
    return transformers.CLIPConfig(
        vision_config=TINY | {"projection_dim": 16},
        text_config=TEXT | {"eos_token_id": 98, "bos_token_id": 97},
        projection_dim=16,
    )


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
    "clip": lambda: transformers.CLIPModel(clip_config()),
    "clip-vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)),
    "clip-projection": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**TINY)),
    "clip-classifier": lambda: transformers.CLIPForImageClassification(clip_config()),
}


def tiny_model(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    # Some families start their prefix tokens, positions or heads at zero, which would hide an error in them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def sample_pixel_values(batch: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def forward(model: transformers.PreTrainedModel, pixel_values: torch.Tensor, **kwargs):
    """The model's first output: logits, similarities to two texts (CLIP) or hidden states."""
    if isinstance(model, transformers.CLIPModel):
        kwargs["input_ids"] = torch.tensor([[97, 5, 98], [97, 7, 98]], device=pixel_values.device)
    return model(pixel_values=pixel_values, **kwargs)[0]


def answers(model: transformers.PreTrainedModel, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, pixel_values, **kwargs)
