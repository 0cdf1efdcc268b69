"""The family table: what differs between architectures, as data. Adding a family is a row and a conformance test."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from torch import nn
from transformers import PreTrainedModel


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
    """The position table: (1, prefix + patches, hidden) or (prefix + patches, hidden)."""
    prefix: tuple[str, ...] = ("cls_token",)
    """Prefix tokens that have a position, in order."""
    registers: str | None = None
    """Prefix tokens without a position, which follow those that have one."""
    always_interpolates: bool = False
    """Whether positions are interpolated to any image size without being asked to."""
    needs_every_patch: tuple[str, ...] = ()
    """Model classes of the family whose output has a value for every patch: these cannot be compressed."""


FAMILIES: tuple[Family, ...] = (
    Family(
        name="ViT",
        model_types=("vit",),
        embeddings="ViTEmbeddings",
        projection="patch_embeddings.projection",
        positions="position_embeddings",
        needs_every_patch=("ViTForMaskedImageModeling",),
    ),
    Family(
        name="DeiT",
        model_types=("deit",),
        embeddings="DeiTEmbeddings",
        projection="patch_embeddings.projection",
        positions="position_embeddings",
        prefix=("cls_token", "distillation_token"),
        needs_every_patch=("DeiTForMaskedImageModeling",),
    ),
    Family(
        name="DINOv2",
        model_types=("dinov2",),
        embeddings="Dinov2Embeddings",
        projection="patch_embeddings.projection",
        positions="position_embeddings",
        always_interpolates=True,
    ),
    Family(
        name="DINOv2 with registers",
        model_types=("dinov2_with_registers",),
        embeddings="Dinov2WithRegistersEmbeddings",
        projection="patch_embeddings.projection",
        positions="position_embeddings",
        registers="register_tokens",
        always_interpolates=True,
    ),
    Family(
        name="CLIP",
        model_types=("clip", "clip_vision_model"),
        embeddings="CLIPVisionEmbeddings",
        projection="patch_embedding",
        positions="position_embedding.weight",
        prefix=("class_embedding",),
    ),
)


def supported() -> list[str]:
    """Names of the families that can be compressed."""
    return [family.name for family in FAMILIES]


def unsupported_message(what: str) -> str:
    """The error for a model outside the table: what was given, what is supported, what to do."""
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    near = difflib.get_close_matches(what, types, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{what} cannot be compressed by vwt_hf; supported families: {', '.join(supported())}. "
        f"Load it without `vwt`.{hint}"
    )


def find_embeddings(model: nn.Module) -> tuple[Family, nn.Module] | None:
    """The first module of `model` that a family's row names as its embeddings, with the row."""
    rows = {family.embeddings: family for family in FAMILIES}
    for module in model.modules():
        # The class must be transformers' own: another library's class of the same name may compute something else.
        if type(module).__name__ in rows and type(module).__module__.startswith("transformers."):
            return rows[type(module).__name__], module
    return None


def require_compressible(family: Family, model_class: type, config: object) -> None:
    """Refuses a task whose output has a value for every patch.

    Raises:
        ValueError: `model_class` is such a task; the message says which tasks work.
    """
    name = model_class.__name__
    if name in family.needs_every_patch:
        raise ValueError(
            f"{name} predicts a value for every patch, so none may be dropped: it cannot be compressed. Supported are "
            f"feature extraction, classification and contrastive models of {', '.join(supported())}. "
            "Load it without `vwt`."
        )
    if name.endswith("Backbone") and getattr(config, "reshape_hidden_states", False):
        raise ValueError(
            f"{name} with reshape_hidden_states=True returns feature maps (batch, hidden, rows, columns), which need "
            "every patch. Pass reshape_hidden_states=False to get sequences of the kept patches, or load it without "
            "`vwt`."
        )


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
