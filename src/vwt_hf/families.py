"""The family table: what differs between architectures, as data. Adding a family is a row and a conformance test."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a family keeps what tokenising needs. Paths are dotted names below the embeddings module."""

    name: str
    """Name in messages and tables."""
    model_types: tuple[str, ...]
    """`model_type` of the configs that `AutoConfig` maps to this family's vision models."""
    embeddings: str
    """Class name of the module that turns `pixel_values` into the first layer's `hidden_states`."""
    projection: str
    """The patch projection, a convolution whose stride is its kernel."""
    positions: str
    """The position table: a parameter (1, prefix + patches, hidden) or an `nn.Embedding` of prefix + patches."""
    pools: str
    """What its heads read."""
    prefix: tuple[str, ...] = ("cls_token",)
    """Prefix tokens that have a position, in order."""
    registers: str | None = None
    """Prefix tokens without a position, which follow those that have one."""
    always_interpolates: bool = False
    """Whether positions are interpolated to any image size without being asked to."""
    needs_every_patch: tuple[str, ...] = ()
    """Model classes of the family whose output has a value for every patch: these cannot be compressed."""


def _like_vit(name: str, model_type: str, class_name: str, **fields: Any) -> Family:
    return Family(
        name=name,
        model_types=(model_type,),
        embeddings=f"{class_name}Embeddings",
        projection="patch_embeddings.projection",
        positions="position_embeddings",
        **({"pools": "CLS"} | fields),
    )


def _like_clip(name: str, model_type: str, class_name: str, **fields: Any) -> Family:
    return Family(
        name=name,
        model_types=(model_type, f"{model_type}_vision_model"),
        embeddings=f"{class_name}VisionEmbeddings",
        projection="patch_embedding",
        positions="position_embedding",
        **({"pools": "CLS", "prefix": ("class_embedding",)} | fields),
    )


FAMILIES: tuple[Family, ...] = (
    _like_vit("ViT", "vit", "ViT", needs_every_patch=("ViTForMaskedImageModeling",)),
    _like_vit(
        "DeiT",
        "deit",
        "DeiT",
        pools="CLS, and the distillation token",
        prefix=("cls_token", "distillation_token"),
        needs_every_patch=("DeiTForMaskedImageModeling",),
    ),
    _like_vit("ViT-MSN", "vit_msn", "ViTMSN"),
    _like_vit("I-JEPA", "ijepa", "IJepa", pools="mean of all tokens", prefix=()),
    _like_vit("DINOv2", "dinov2", "Dinov2", pools="CLS and mean of the patches", always_interpolates=True),
    _like_vit(
        "DINOv2 with registers",
        "dinov2_with_registers",
        "Dinov2WithRegisters",
        pools="CLS and mean of the patches",
        registers="register_tokens",
        always_interpolates=True,
    ),
    _like_clip("CLIP", "clip", "CLIP", pools="CLS; the classifier: mean of the patches"),
    _like_clip("MetaCLIP 2", "metaclip_2", "MetaClip2", pools="CLS; the classifier: mean of the patches"),
    _like_clip("Chinese-CLIP", "chinese_clip", "ChineseCLIP"),
    _like_clip("AltCLIP", "altclip", "AltCLIP"),
    _like_clip("CLIPSeg", "clipseg", "CLIPSeg", needs_every_patch=("CLIPSegForImageSegmentation",)),
    _like_clip("SigLIP", "siglip", "Siglip", pools="attention over all tokens; the classifier: their mean", prefix=()),
)


def supported() -> list[str]:
    """Names of the families that can be compressed."""
    return [family.name for family in FAMILIES]


def family_of(model_class: type[PreTrainedModel]) -> Family:
    """The row of the table that `model_class` belongs to.

    Raises:
        ValueError: its family has no row, or its output has a value for every patch; the message lists what is
            supported.
    """
    config_class = getattr(model_class, "config_class", None)
    model_type = getattr(config_class, "model_type", "")
    family = next((family for family in FAMILIES if model_type in family.model_types), None)
    name = model_class.__name__
    if family is None:
        raise ValueError(
            f"{name} (model type {model_type!r}) cannot be compressed by vwt_hf; supported families: "
            f"{', '.join(supported())}. Load it without `vwt`."
        )
    if name in family.needs_every_patch:
        raise ValueError(
            f"{name} predicts a value for every patch, so none may be dropped: it cannot be compressed. Supported are "
            f"feature extraction, classification and contrastive models of {', '.join(supported())}. "
            "Load it without `vwt`."
        )
    return family


def find_embeddings(model: PreTrainedModel, family: Family) -> nn.Module:
    """The module of `model` that turns `pixel_values` into the first layer's `hidden_states`.

    Raises:
        ValueError: there is none of the class that transformers gives this family, or the model is a backbone that lays
            its tokens out as feature maps.
    """
    if getattr(model.config, "reshape_hidden_states", False) and type(model).__name__.endswith("Backbone"):
        raise ValueError(
            f"{type(model).__name__} with reshape_hidden_states=True returns feature maps (batch, hidden, rows, "
            "columns), which need every patch. Pass reshape_hidden_states=False to get sequences of the kept patches, "
            "or load it without `vwt`."
        )
    for module in model.modules():
        # The class must be transformers' own: another library's class of the same name may compute something else.
        if type(module).__name__ == family.embeddings and type(module).__module__.startswith("transformers."):
            return module
    raise ValueError(
        f"{type(model).__name__} has no {family.embeddings} of transformers, where {family.name} models turn pixel "
        "values into tokens, so it cannot be compressed. Load it without `vwt`."
    )


def find_tower(model: PreTrainedModel, embeddings: nn.Module) -> nn.Module:
    """The vision tower of `model`: the module that `embeddings` belong to."""
    return next(module for module in model.modules() if embeddings in module.children())


def find_layers(tower: nn.Module) -> list[nn.Module]:
    """The transformer layers of a vision tower, in order."""
    return [module for module in tower.modules() if isinstance(module, GradientCheckpointingLayer)]


def position_table(module: nn.Module, family: Family) -> torch.Tensor:
    """The positions of an embeddings module, (1, prefix + patches, hidden)."""
    positions = attribute(module, family.positions)
    if isinstance(positions, nn.Embedding):
        # Called, not read: the weights of an offloaded module are there only while it runs.
        return positions(attribute(module, "position_ids"))
    return positions


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute of `module` at a dotted `path`."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def model_of(model: object) -> PreTrainedModel:
    """`model`, if it is a transformers model.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; expected a transformers.PreTrainedModel.")
    return model
