"""The family table: what differs between architectures, as data.

A new family is a row here and tiny models in tests/tiny.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from . import attention
from .checks import sides
from .plans import Grouped, Kept
from .words import gather_patches, with_prefix

HEADS = ("Model", "ForImageClassification")
"""How the names of model classes end that the general rule takes: they return hidden states, or classify by CLS or a
mean of the tokens."""


def reduce_first(output: Any, plan: Kept | Grouped) -> Any:
    """Shortens the output of embeddings: tokens, or a tuple whose first they are."""
    return (plan.reduce(output[0]), *output[1:]) if isinstance(output, tuple) else plan.reduce(output)


def reduce_masked_autoencoder(output: Any, plan: Kept | Grouped) -> Any:
    """Shortens the output of ViT-MAE's embeddings: tokens, mask (1: dropped) and the place of each patch among the
    tokens, both (batch, patches).

    These embeddings shuffle the patches. Here tokens are put in the order of the image again, and patches that the plan
    leaves out are marked as masked ones are.
    """
    tokens, mask, restore = output
    patches = mask.shape[1]
    prefix = tokens.shape[1] - patches
    ordered = gather_patches(tokens, with_prefix(restore, prefix))
    mask = torch.zeros_like(mask)
    if isinstance(plan, Kept):
        mask = torch.ones_like(mask).scatter_(1, plan.kept.expand(mask.shape[0], -1), 0.0)
    dropped = mask.long()
    # The kept ones first, in their order, then the others. By counting, as ONNX has no stable sort.
    behind = (1 - dropped).sum(dim=1, keepdim=True) + dropped.cumsum(dim=1)
    restore = torch.where(mask > 0, behind, (1 - dropped).cumsum(dim=1)) - 1
    return plan.reduce(ordered), mask, restore


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs between this family and a plain vision transformer, and what the README says of it."""

    name: str
    """Name in messages and tables."""
    model_types: tuple[str, ...]
    """`model_type` of the configs that `AutoConfig` maps to this family's vision models."""
    embeddings: str
    """Class name of the module that turns `pixel_values` into the first layer's `hidden_states`: prefix tokens, then a
    row for each patch."""
    pools: str
    """What its heads read."""
    prefix: str = "CLS"
    """The tokens that come before the patches."""
    positions: str = "absolute"
    """How the model tells where patches lie."""
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
    """Functions that replace the `forward` of its attention modules, by the modules' class name, where these do not use
    transformers' `AttentionInterface`."""
    masks: str | None = None
    """Field of its config that says which share of the patches its embeddings drop at random, for training."""
    padded: str | None = None
    """In families whose image processor cuts images of many sizes into patches and pads these: class name of the head
    that is told which patches are padding."""
    tried: bool = False
    """Whether the general rule made this row for a model type that the table lacks. Such a model is tried when it is
    compressed (`vouch.py`)."""
    reduces: Callable[[Any, Kept | Grouped], Any] = reduce_first
    """Shortens the output of its embeddings by a plan."""


class Unfit(NamedTuple):
    """A family that users ask for and that cannot be compressed; `reason` ends the sentence "it …" of the message."""

    name: str
    model_types: tuple[str, ...]
    reason: str


def _like_vit(name: str, model_type: str, class_name: str, pools: str = "CLS", **fields: Any) -> Family:
    return Family(name, (model_type,), f"{class_name}Embeddings", pools, **fields)


def _like_clip(name: str, model_type: str, class_name: str, pools: str = "CLS", **fields: Any) -> Family:
    model_types = (model_type, f"{model_type.replace('-', '_')}_vision_model")
    return Family(name, model_types, f"{class_name}VisionEmbeddings", pools, **fields)


FAMILIES: tuple[Family, ...] = (
    _like_vit("ViT", "vit", "ViT", predicts_masked=("ViTForMaskedImageModeling",)),
    _like_vit(
        "DeiT", "deit", "DeiT", "CLS, and the distillation token", prefix="CLS, distillation",
        predicts_masked=("DeiTForMaskedImageModeling",),
    ),
    _like_vit("ViT-MSN", "vit_msn", "ViTMSN"),
    _like_vit(
        "ViT-MAE", "vit_mae", "ViTMAE", "none: hidden states are given out", masks="mask_ratio",
        predicts_masked=("ViTMAEForPreTraining",), reduces=reduce_masked_autoencoder,
    ),
    _like_vit("I-JEPA", "ijepa", "IJepa", "mean of all tokens", prefix="none"),
    _like_vit(
        "BEiT", "beit", "Beit", "mean of the patches, or CLS", positions="relative to each other",
        relative="BeitRelativePositionBias", predicts_masked=("BeitForMaskedImageModeling",),
        needs_every_patch=("BeitForSemanticSegmentation",),
    ),
    _like_vit(
        "Data2Vec-vision", "data2vec-vision", "Data2VecVision", "mean of the patches, or CLS",
        positions="relative to each other", relative="Data2VecVisionRelativePositionBias",
        attentions=dict.fromkeys(
            ("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention"), attention.separate
        ),
        needs_every_patch=("Data2VecVisionForSemanticSegmentation",),
    ),
    _like_vit("DINOv2", "dinov2", "Dinov2", "CLS and mean of the patches", positions="interpolated"),
    _like_vit(
        "DINOv2 with registers", "dinov2_with_registers", "Dinov2WithRegisters", "CLS and mean of the patches",
        prefix="CLS, registers", positions="interpolated",
    ),
    _like_vit(
        "DINOv3", "dinov3_vit", "DINOv3ViT", prefix="CLS, registers", positions="rotary",
        rotary="DINOv3ViTRopePositionEmbedding",
    ),
    _like_clip("CLIP", "clip", "CLIP", "CLS; the classifier: mean of the patches"),
    _like_clip("MetaCLIP 2", "metaclip_2", "MetaClip2", "CLS; the classifier: mean of the patches"),
    _like_clip("Chinese-CLIP", "chinese_clip", "ChineseCLIP"),
    _like_clip("AltCLIP", "altclip", "AltCLIP"),
    _like_clip("CLIPSeg", "clipseg", "CLIPSeg", needs_every_patch=("CLIPSegForImageSegmentation",)),
    _like_clip("OWL-ViT", "owlvit", "OwlViT", needs_every_patch=("OwlViTForObjectDetection",)),
    _like_clip("OWLv2", "owlv2", "Owlv2", needs_every_patch=("Owlv2ForObjectDetection",)),
    _like_clip("SigLIP", "siglip", "Siglip", "attention over all tokens; the classifier: their mean", prefix="none"),
    _like_clip(
        "SigLIP 2 NaFlex", "siglip2", "Siglip2", "attention over all tokens; the classifier: their mean",
        prefix="none", positions="interpolated", needs_every_patch=("Siglip2ForImageClassification",),
        padded="Siglip2MultiheadAttentionPoolingHead",
    ),
    _like_clip("AIMv2", "aimv2", "Aimv2", "attention over all tokens", prefix="none"),
    _like_clip(
        "BLIP", "blip", "Blip", "CLS; the decoder attends to all tokens",
        attentions={"BlipAttention": attention.fused},
    ),
    _like_clip("BLIP-2", "blip-2", "Blip2", "CLS; the Q-Former attends to all tokens"),
)  # fmt: skip
HOLDERS = {
    "llava": "LLaVA",
    "vipllava": "VipLLaVA",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "paligemma": "PaliGemma",
}
"""Models that hold a vision tower of one of the families and give a language model a token for every patch: their names
by the `model_type` of their configs."""
UNFIT: tuple[Unfit, ...] = (
    Unfit("Swin", ("swin", "swinv2"), "attends within windows of the whole grid and merges neighbours between stages"),
    Unfit("SegFormer", ("segformer",), "shortens keys by convolutions over the whole grid"),
    Unfit("PVT", ("pvt", "pvt_v2"), "shortens keys by convolutions over the whole grid"),
    Unfit("SAM", ("sam", "sam_vision_model"), "attends within windows of the whole grid and gives out feature maps"),
    Unfit("X-CLIP", ("xclip", "xclip_vision_model"), "lets the frames of a video attend to each other in each layer"),
    Unfit("ConvNeXt", ("convnext", "convnextv2"), "is made of convolutions, which have no tokens to leave out"),
)


def supported() -> list[str]:
    """Names of the families that can be compressed."""
    return [*(row.name for row in FAMILIES), *HOLDERS.values()]


def require_supported(model_class: type[PreTrainedModel], restores: bool) -> None:
    """Refuses a model class that cannot be compressed.

    Args:
        restores: whether its tower will return a hidden state for every patch.

    Raises:
        ValueError: its family is not supported, it predicts masked patches, or it needs a hidden state for every patch
            and would not get one.
    """
    name = model_class.__name__
    row, model_type = _row_of(model_class), _model_type(model_class)
    if row is None and model_type not in HOLDERS:
        unfit = next((unfit for unfit in UNFIT if model_type in unfit.model_types), None)
        if unfit is None and _may_hold(model_class):
            return
        why = " by vwt_hf" if unfit is None else f": it {unfit.reason}"
        raise ValueError(
            f"{name} (model type {model_type!r}) cannot be compressed{why}; supported families: "
            f"{', '.join(supported())}. Load it without `vwt`; a vision tower within it can be compressed alone, by "
            "vwt_hf.compress(model.its_tower), if it is of one of these or the general rule in the README holds for it."
        )
    refuse_masked(model_class)
    if not restores and reads_every_patch(model_class):
        refuse_to_drop(f"{name} reads a value for every patch")


def refuse_masked(model_class: type[PreTrainedModel]) -> None:
    """Raises `ValueError` for a class that predicts masked patches."""
    if any(_is_one_of(model_class, row.predicts_masked) for row in FAMILIES):
        raise ValueError(
            f"{model_class.__name__} predicts patches that are masked in the whole image, a value for every patch: it "
            "cannot be compressed. Load it without `vwt`."
        )


def refuse_to_drop(reason: str) -> NoReturn:
    """Raises `ValueError` where no patch may be left out, and says why."""
    raise ValueError(
        f"{reason}, so none may be dropped: it cannot be compressed like this. Use vwt=True, another method than "
        "'intra', or dropped='merge', which give every patch the hidden state of its token, or load it without `vwt`."
    )


def reads_every_patch(model_class: type[PreTrainedModel]) -> bool:
    """Whether a model class needs a hidden state for every patch of its tower."""
    row = _row_of(model_class)
    return _model_type(model_class) in HOLDERS or (row is not None and _is_one_of(model_class, row.needs_every_patch))


def models_around(model: PreTrainedModel, tower: Tower) -> list[PreTrainedModel]:
    """`model` and the models within it that are or hold its vision tower."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [holder for holder in models if tower.module in holder.modules()]


def why_every_patch(model: PreTrainedModel, tower: Tower) -> str | None:
    """Why `model`, or a part of it, needs a hidden state for every patch of its tower; `None` if none does."""
    for part in models_around(model, tower):
        if reads_every_patch(type(part)):
            return f"{type(part).__name__} reads a value for every patch"
        if isinstance(part, BackboneMixin) and getattr(part.config, "reshape_hidden_states", False):
            return (
                f"{type(part).__name__} with reshape_hidden_states=True lays all patches out as feature maps (with "
                "False it returns sequences of the kept ones, for heads that do not lay them out either)"
            )
    return None


def _is_one_of(model_class: type, names: Collection[str]) -> bool:
    """Whether a class or a parent of it has one of these names: a user's own class may have another."""
    return any(kind.__name__ in names for kind in model_class.__mro__)


def family_of(model: PreTrainedModel) -> Family:
    """The row of the table for the vision tower of `model`, or one that the general rule makes.

    Raises:
        ValueError: it has none, and the general rule does not hold.
    """
    require_supported(type(model), restores=True)
    row = _row_of(type(model))
    if row is None and _model_type(type(model)) in HOLDERS:
        of_embeddings = ((module, family) for module in model.modules() for family in FAMILIES)
        row = next((family for module, family in of_embeddings if is_of(module, family.embeddings)), None)
    return _general_family(model) if row is None else row


class NotVouched(ValueError):
    """The general rule does not hold for a model. `not_vouched` adds the subject that its message lacks."""


def not_vouched(model: PreTrainedModel, reason: object) -> NotVouched:
    """`reason` as a whole sentence that names `model` and says what to do."""
    return NotVouched(
        f"{type(model).__name__} (model type {_model_type(type(model))!r}) cannot be compressed: it {reason}. Load it "
        "without `vwt`."
    )


def _may_hold(model_class: type[PreTrainedModel]) -> bool:
    """Whether the general rule could hold for a class: it takes nothing but images, and returns hidden states or
    logits."""
    config_class = getattr(model_class, "config_class", None)
    names = [parent.__name__ for parent in model_class.__mro__]  # a user's class has a name of its own
    return (
        model_class.main_input_name == "pixel_values"
        and any(name.endswith(HEADS) and not name.endswith("PreTrainedModel") for name in names)
        and not getattr(config_class, "sub_configs", None)
        and hasattr(config_class, "patch_size")
    )


def _general_family(model: PreTrainedModel) -> Family:
    """A row for a model whose type has none, made by what its modules look like; `vouch` tries whether it holds.

    Its `prefix` says no more than whether there is a CLS token, which `answers.named_answer` asks.
    """
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("Embeddings") and _is_transformers(module) and _cuts_patches(module):
            cls = {"cls_token", "class_embedding"} & dict(module.named_parameters(recurse=False)).keys()
            return Family(_model_type(type(model)), (), name, "", prefix="CLS" if cls else "none", tried=True)
    raise not_vouched(model, "has no embeddings whose only convolution makes a row of each patch")


def _cuts_patches(module: nn.Module) -> bool:
    """Whether the only convolution within a module cuts images into patches that do not overlap."""
    # LoRA's modules and the like hold the one that they wrap as `base_layer`, beside layers that they add.
    wrappers = [part for part in module.modules() if hasattr(part, "base_layer")]
    added = {part for wrapper in wrappers for part in wrapper.modules()} - {one.base_layer for one in wrappers}
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d) and part not in added]
    return len(convolutions) == 1 and convolutions[0].kernel_size == convolutions[0].stride


def _row_of(model_class: type[PreTrainedModel]) -> Family | None:
    model_type = _model_type(model_class)
    return next((row for row in FAMILIES if model_type in row.model_types), None)


def _model_type(model_class: type[PreTrainedModel]) -> str:
    return getattr(getattr(model_class, "config_class", None), "model_type", "")


def is_of(module: nn.Module, name: str | None) -> bool:
    """Whether `module` is of transformers' class of that name, or of a subclass, as some wrappers make.

    Another library's class of the same name may compute something else.
    """
    return name is not None and any(
        kind.__name__ == name and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


@dataclasses.dataclass(frozen=True)
class Tower:
    """A vision tower within a model."""

    module: Any
    """The module that runs the embeddings and the layers; it has a `config`."""
    embeddings: nn.Module
    """The child of it that turns `pixel_values` into `hidden_states`: transformers' own, or a wrapper around that."""
    patch_size: tuple[int, int]
    """Height and width of a patch, in pixels."""
    channels: int
    """Colour channels of its images: 3 for RGB."""


def find_tower(model: PreTrainedModel, family: Family) -> Tower:
    """The vision tower of `model`.

    Raises:
        ValueError: there is none with the embeddings that transformers gives this family, or more than one.
    """
    above: dict[nn.Module, nn.Module] = {}
    towers: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        above.update((child, module) for child in module.children() if child not in above)
        if is_of(module, family.embeddings):
            embeddings, tower = module, above[module]
            # These may lie within a wrapper (PEFT's of modules to save, FSDP's), which is not transformers', or within
            # other embeddings. The tower calls the outermost, and is the first of transformers' that has a config.
            while not (_is_transformers(tower) and hasattr(tower, "config")):
                embeddings, tower = tower, above[tower]
            towers.setdefault(tower, embeddings)
    if not towers:
        raise ValueError(
            f"{type(model).__name__} has no {family.embeddings} of transformers, where {family.name} models turn pixel "
            "values into tokens, so it cannot be compressed. Load it without `vwt`."
        )
    if len(towers) > 1:
        names = [name for name, module in model.named_modules() if module in towers]
        raise ValueError(
            f"{type(model).__name__} has {len(towers)} vision towers ({', '.join(names)}), of which a setting shortens "
            f"one. Compress each by itself, as by vwt_hf.compress(model.{names[0]})."
        )
    ((tower, embeddings),) = towers.items()
    config: Any = tower.config
    height, width = sides(config.patch_size)
    return Tower(tower, embeddings, (height, width), getattr(config, "num_channels", 3))


def _is_transformers(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)


def find_layers(tower: nn.Module) -> list[nn.Module]:
    """The transformer layers of a vision tower, in order; of a layer that PEFT copied, the first copy."""
    return [copies[0] for copies in find_places(tower)]


def find_places(tower: nn.Module) -> list[list[nn.Module]]:
    """The transformer layers of a vision tower, in order, each as a list of its copies.

    There is more than one copy where a layer, or what holds it, is among PEFT's modules to save: of these one runs.
    """
    within = [places for child in tower.children() if (places := _places(child))]
    stated = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
    if len(within) > 1 and len(within[0]) == stated:
        return within[0]  # what else has layers was put beside the tower's own, as a momentum encoder
    return list({place[0]: place for places in within for place in places}.values())  # each once


def _places(module: nn.Module) -> list[list[nn.Module]]:
    if isinstance(module, GradientCheckpointingLayer):
        return [[module]]
    copied = [_places(copy) for copy in _copies(module)]
    if copied and len({len(places) for places in copied}) == 1:
        return [[*itertools.chain(*place)] for place in zip(*copied, strict=True)]
    return [place for child in module.children() for place in _places(child)]


def _copies(module: nn.Module) -> list[nn.Module]:
    """The modules of which a wrapper of PEFT's runs one: the one that it wraps, and the copies that are trained."""
    original, trained = getattr(module, "original_module", None), getattr(module, "modules_to_save", None)
    if not isinstance(original, nn.Module) or not isinstance(trained, nn.ModuleDict):
        return []
    return [original, *trained.values()]


def find_stacks(tower: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The module of a vision tower that runs its layers, which may be the tower itself, and all that it runs, in order:
    transformers' layers, and others that a user put among them.

    There are several such pairs where PEFT copied the module, of which one runs.
    """
    places = find_places(tower)
    parents = {child: module for module in tower.modules() for child in module.children()}
    stacks: dict[nn.Module, list[nn.Module]] = {}
    for layer in places[-1] if places else []:
        listed = parents.get(layer)
        while listed is not None and not isinstance(listed, (nn.ModuleList, nn.Sequential)):
            listed = parents.get(listed)  # a wrapper of the layer, such as torch.compile's
        if listed is not None:  # else layers are attributes of the tower
            stacks[parents[listed]] = list(listed._modules.values())  # type: ignore[arg-type]
    return list(stacks.items()) or [(tower, [copies[0] for copies in places])]


def model_of(model: object) -> PreTrainedModel:
    """`model`, if it is a transformers model.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        given = f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
        raise TypeError(f"model is {given}; expected a transformers.PreTrainedModel{_where_within(model)}.")
    return model


def _where_within(model: object) -> str:
    """Ends a sentence by how to get the transformers model out of a wrapper; empty if that is not known."""
    if hasattr(model, "get_base_model"):  # PEFT's
        return "; give its get_base_model()"
    inner, path = model, "model"
    while isinstance(inner, nn.Module) and not isinstance(inner, PreTrainedModel):
        # Of torch.compile, and of DataParallel and its kin. Looked up as modules: torch.compile's has all attributes of
        # the one within.
        name = next((name for name in ("_orig_mod", "module") if name in inner._modules), "")
        inner, path = inner._modules.get(name), f"{path}.{name}"
    return f"; give the model that it wraps, {path}" if isinstance(inner, PreTrainedModel) else ""
