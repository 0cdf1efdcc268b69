"""The family table: what differs between architectures, as data. Adding a family is a row and a conformance test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from . import attention


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
    """The patch projection, a convolution whose stride is its kernel; where images come as patches, linear."""
    positions: str | Callable[[Any, tuple[int, int]], torch.Tensor] | None
    """The position table: a parameter (1, prefix + patches, hidden), which may be `None` in some models of the family,
    or an `nn.Embedding` of prefix + patches; or what gives it for an embeddings module and the rows and columns of
    patches. `None` if positions are not added to the tokens."""
    pools: str
    """What its heads read."""
    prefix: tuple[str, ...] = ("cls_token",)
    """Prefix tokens that have a position, in order."""
    registers: str | None = None
    """Prefix tokens without a position, which follow those that have one."""
    always_interpolates: bool = False
    """Whether positions are interpolated to any image size without being asked to."""
    predicts_masked: tuple[str, ...] = ()
    """Model classes of the family that predict patches masked in the whole image: these cannot be compressed."""
    needs_every_patch: tuple[str, ...] = ()
    """Model classes of the family that read a hidden state for every patch."""
    rotary: str | None = None
    """Class name of the module of the tower that gives the rotations, cosine and sine (patches, head size), by which
    attention tells where patches lie."""
    relative: str | None = None
    """Class name of the modules that give attention a bias by where patches lie to each other, (1, heads, prefix +
    patches, prefix + patches)."""
    attentions: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)
    """What stands in for the forwards of its attention, by class name, where that does not go through transformers'
    `AttentionInterface`."""
    norm: str | None = None
    """A norm between the projection of patches and their positions."""
    masks: str | None = None
    """Field of its config that says which share of the patches its embeddings drop at random, for training."""
    padded: str | None = None
    """Class name of the head that is told which patches are padding, in families whose `pixel_values` are patches of
    images of many sizes, as their image processor cuts and pads them."""
    outputs: Callable[..., Any] | None = None
    """What its embeddings return, of the tokens, which patches they are (batch or 1, tokens; `None` if every patch is
    part of one), the batch and the grid of patches; `None` if they return the tokens alone."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Models that hold a vision tower of one of the families and give a language model a token for every patch."""

    name: str
    """Name in messages and tables."""
    model_types: tuple[str, ...]
    """`model_type` of their configs."""


@dataclasses.dataclass(frozen=True)
class Unfit:
    """A family that is asked for and cannot be compressed."""

    name: str
    """Name in messages and tables."""
    model_types: tuple[str, ...]
    """`model_type` of their configs."""
    reason: str
    """Why, after "it"."""


def _masked_autoencoder_outputs(
    tokens: torch.Tensor, kept: torch.Tensor | None, batch: int, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, mask (1: dropped) and where patches went, both (batch, patches), as if what was dropped were masked."""
    mask = torch.zeros(batch, grid[0] * grid[1], device=tokens.device)
    if kept is not None:
        mask = torch.ones_like(mask).scatter_(1, kept.expand(batch, -1), 0.0)
    dropped = mask.long()
    # The kept ones first, in their order, and then the others; counted, for ONNX has no stable sort.
    behind = (1 - dropped).sum(dim=1, keepdim=True) + dropped.cumsum(dim=1)
    return tokens, mask, torch.where(mask > 0, behind, (1 - dropped).cumsum(dim=1)) - 1


def _with_grid(
    tokens: torch.Tensor, kept: torch.Tensor | None, batch: int, grid: tuple[int, int]
) -> tuple[torch.Tensor, tuple[int, int]]:
    return tokens, grid


def _aimv2_positions(module: Any, grid: tuple[int, int]) -> torch.Tensor:
    """The position table of AIMv2: sines of rows and columns in native models, else learned for one size."""
    if not module.config.is_native:
        return module.position_embedding(module.position_ids)
    from transformers.models.aimv2.modeling_aimv2 import build_2d_sinusoidal_position_embedding as sines

    rows_first = sines(
        *grid, module.config.hidden_size, device=module.position_ids.device, dtype=module.patch_embed.weight.dtype
    )
    return rows_first.roll(rows_first.shape[-1] // 2, dims=-1).unsqueeze(0)


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
    usual = {
        "model_types": (model_type, f"{model_type}_vision_model"),
        "pools": "CLS",
        "prefix": ("class_embedding",),
        "projection": "patch_embedding",
        "positions": "position_embedding",
    }
    return Family(name=name, embeddings=f"{class_name}VisionEmbeddings", **(usual | fields))


FAMILIES: tuple[Family, ...] = (
    _like_vit("ViT", "vit", "ViT", predicts_masked=("ViTForMaskedImageModeling",)),
    _like_vit(
        "DeiT",
        "deit",
        "DeiT",
        pools="CLS, and the distillation token",
        prefix=("cls_token", "distillation_token"),
        predicts_masked=("DeiTForMaskedImageModeling",),
    ),
    _like_vit("ViT-MSN", "vit_msn", "ViTMSN"),
    _like_vit(
        "ViT-MAE",
        "vit_mae",
        "ViTMAE",
        pools="none: hidden states are given out",
        predicts_masked=("ViTMAEForPreTraining",),
        masks="mask_ratio",
        outputs=_masked_autoencoder_outputs,
    ),
    _like_vit("I-JEPA", "ijepa", "IJepa", pools="mean of all tokens", prefix=()),
    _like_vit(
        "BEiT",
        "beit",
        "Beit",
        pools="mean of the patches, or CLS",
        always_interpolates=True,
        relative="BeitRelativePositionBias",
        predicts_masked=("BeitForMaskedImageModeling",),
        needs_every_patch=("BeitForSemanticSegmentation",),
    ),
    _like_vit(
        "Data2Vec-vision",
        "data2vec-vision",
        "Data2VecVision",
        pools="mean of the patches, or CLS",
        always_interpolates=True,
        relative="Data2VecVisionRelativePositionBias",
        attentions={
            "Data2VecVisionSelfAttention": attention.separate,
            "Data2VecVisionSdpaSelfAttention": attention.separate,
        },
        needs_every_patch=("Data2VecVisionForSemanticSegmentation",),
        outputs=_with_grid,
    ),
    _like_vit("DINOv2", "dinov2", "Dinov2", pools="CLS and mean of the patches", always_interpolates=True),
    _like_vit(
        "DINOv2 with registers",
        "dinov2_with_registers",
        "Dinov2WithRegisters",
        pools="CLS and mean of the patches",
        registers="register_tokens",
        always_interpolates=True,
    ),
    Family(
        name="DINOv3",
        model_types=("dinov3_vit",),
        embeddings="DINOv3ViTEmbeddings",
        projection="patch_embeddings",
        positions=None,
        pools="CLS",
        registers="register_tokens",
        always_interpolates=True,
        rotary="DINOv3ViTRopePositionEmbedding",
    ),
    _like_clip("CLIP", "clip", "CLIP", pools="CLS; the classifier: mean of the patches"),
    _like_clip("MetaCLIP 2", "metaclip_2", "MetaClip2", pools="CLS; the classifier: mean of the patches"),
    _like_clip("Chinese-CLIP", "chinese_clip", "ChineseCLIP"),
    _like_clip("AltCLIP", "altclip", "AltCLIP"),
    _like_clip("CLIPSeg", "clipseg", "CLIPSeg", needs_every_patch=("CLIPSegForImageSegmentation",)),
    _like_clip("OWL-ViT", "owlvit", "OwlViT", needs_every_patch=("OwlViTForObjectDetection",)),
    _like_clip("OWLv2", "owlv2", "Owlv2", needs_every_patch=("Owlv2ForObjectDetection",)),
    _like_clip("SigLIP", "siglip", "Siglip", pools="attention over all tokens; the classifier: their mean", prefix=()),
    _like_clip(
        "SigLIP 2 NaFlex",
        "siglip2",
        "Siglip2",
        pools="attention over all tokens; the classifier: their mean",
        prefix=(),
        always_interpolates=True,
        needs_every_patch=("Siglip2ForImageClassification",),
        padded="Siglip2MultiheadAttentionPoolingHead",
    ),
    _like_clip(
        "AIMv2",
        "aimv2",
        "Aimv2",
        pools="attention over all tokens",
        prefix=(),
        projection="patch_embed",
        norm="rms_norm",
        positions=_aimv2_positions,
    ),
    _like_clip(
        "BLIP",
        "blip",
        "Blip",
        pools="CLS; the decoder attends to all tokens",
        attentions={"BlipAttention": attention.fused},
    ),
    _like_clip(
        "BLIP-2",
        "blip_2",
        "Blip2",
        pools="CLS; the Q-Former attends to all tokens",
        model_types=("blip-2", "blip_2_vision_model"),
    ),
)
HOLDERS: tuple[Holder, ...] = (
    Holder("LLaVA", ("llava",)),
    Holder("VipLLaVA", ("vipllava",)),
    Holder("LLaVA-NeXT", ("llava_next",)),
    Holder("LLaVA-OneVision", ("llava_onevision",)),
    Holder("PaliGemma", ("paligemma",)),
)
ROWS: tuple[Family | Holder, ...] = (*FAMILIES, *HOLDERS)
UNFIT: tuple[Unfit, ...] = (
    Unfit("Swin", ("swin", "swinv2"), "attends within windows of the whole grid and merges neighbours between stages"),
    Unfit("SegFormer", ("segformer",), "shortens keys by convolutions over the whole grid"),
    Unfit("PVT", ("pvt", "pvt_v2"), "shortens keys by convolutions over the whole grid"),
    Unfit("SAM", ("sam", "sam_vision_model"), "attends within windows of the whole grid and gives out feature maps"),
    Unfit("ConvNeXt", ("convnext", "convnextv2"), "is made of convolutions, which have no tokens to leave out"),
)


def supported() -> list[str]:
    """Names of the families that can be compressed."""
    return [row.name for row in ROWS]


def family_table() -> str:
    """The families as a Markdown table; the README shows it."""
    lines = ["| family | positions | prefix tokens | its heads read |", "|---|---|---|---|"]
    names = {"cls_token": "CLS", "class_embedding": "CLS", "distillation_token": "distillation"}
    for family in FAMILIES:
        positions = "interpolated" if family.always_interpolates else "absolute"
        positions = "rotary" if family.rotary else "relative to each other" if family.relative else positions
        prefix = [names[name] for name in family.prefix] + ["registers"] * (family.registers is not None)
        lines.append(f"| {family.name} | {positions} | {', '.join(prefix) or 'none'} | {family.pools} |")
    for holder in HOLDERS:
        lines.append(f"| {holder.name} | its CLIP or SigLIP tower's | the tower's | a language model: every patch |")
    lines += [f"| {unfit.name} | cannot be compressed: it {unfit.reason} | | |" for unfit in UNFIT]
    return "\n".join(lines)


def require_supported(model_class: type[PreTrainedModel], restores: bool) -> None:
    """Refuses a model class that cannot be compressed.

    Args:
        restores: whether its tower gives out a hidden state for every patch (`VWTConfig.restores`).

    Raises:
        ValueError: its family has no row, or it reads a hidden state for every patch and would not get one; the message
            says what is supported.
    """
    name = model_class.__name__
    row = _row_of(model_class)
    if row is None:
        model_type = _model_type(model_class)
        reason = next((f": it {unfit.reason}" for unfit in UNFIT if model_type in unfit.model_types), " by vwt_hf")
        raise ValueError(
            f"{name} (model type {model_type!r}) cannot be compressed{reason}; supported families: "
            f"{', '.join(supported())}. Load it without `vwt`."
        )
    if isinstance(row, Family) and name in row.predicts_masked:
        raise ValueError(
            f"{name} predicts patches that are masked in the whole image, a value for every patch: it cannot be "
            "compressed. Load it without `vwt`."
        )
    if not restores and (isinstance(row, Holder) or name in row.needs_every_patch):
        raise ValueError(
            f"{name} reads a value for every patch, so none may be dropped: it cannot be compressed like this. Use "
            "dropped='merge' or method='inter', which give every patch the hidden state of its token, or load it "
            "without `vwt`."
        )


def family_of(model: PreTrainedModel) -> Family:
    """The row of the table that the vision tower of `model` belongs to.

    Raises:
        ValueError: there is none.
    """
    require_supported(type(model), restores=True)
    row = _row_of(type(model))
    if isinstance(row, Family):
        return row
    for module in model.modules():
        for family in FAMILIES:
            if _is_embeddings(module, family):
                return family
    raise ValueError(
        f"{type(model).__name__} holds no vision tower of {', '.join(family.name for family in FAMILIES)}, so it "
        "cannot be compressed. Load it without `vwt`."
    )


def _row_of(model_class: type[PreTrainedModel]) -> Family | Holder | None:
    model_type = _model_type(model_class)
    return next((row for row in ROWS if model_type in row.model_types), None)


def _model_type(model_class: type[PreTrainedModel]) -> str:
    return getattr(getattr(model_class, "config_class", None), "model_type", "")


def _is_embeddings(module: nn.Module, family: Family) -> bool:
    # The class must be transformers' own: another library's class of the same name may compute something else.
    return type(module).__name__ == family.embeddings and type(module).__module__.startswith("transformers.")


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
        if _is_embeddings(module, family):
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


def find_stack(tower: nn.Module, layer: nn.Module) -> nn.Module:
    """The module of a vision tower that runs its layers, of which `layer` is one; it may be the tower itself."""
    return next(module for module in tower.modules() for child in module.children() if layer in child.children())


def patch_shape(module: nn.Module, family: Family) -> tuple[int, tuple[int, int]]:
    """Channels of the patches that an embeddings module takes, and their height and width."""
    # By the weight, which LoRA's wrappers have, too.
    _, *inputs = weight_of(attribute(module, family.projection)).shape
    if family.padded is None:
        return inputs[0], (inputs[1], inputs[2])
    size = attribute(module, "patch_size")
    return inputs[0] // size**2, (size, size)


def weight_of(projection: Any) -> torch.Tensor:
    """The weight of a patch projection, which quantized ones give when called for."""
    weight = projection.weight
    return weight() if callable(weight) else weight


def position_table(module: nn.Module, family: Family, grid: tuple[int, int]) -> torch.Tensor | None:
    """The positions of an embeddings module, (1, prefix + patches, hidden); `None` if it adds none.

    Args:
        grid: rows and columns of patches, for families that compute positions.
    """
    if family.positions is None:
        return None
    if callable(family.positions):
        return family.positions(module, grid)
    positions = attribute(module, family.positions)
    if isinstance(positions, nn.Embedding):
        # Called, not read: the weights of an offloaded module are there only while it runs.
        return positions(attribute(module, "position_ids"))
    return positions


def attribute(module: Any, path: str) -> Any:
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
