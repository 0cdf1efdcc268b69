"""Tiny random models of every family, the images they see, and their answers."""

from __future__ import annotations

import copy
import io
import pickle

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


def clip_config(**sizes) -> transformers.CLIPConfig:
    text = TEXT | {"eos_token_id": 98, "bos_token_id": 97}
    return transformers.CLIPConfig(vision_config=sizes | {"projection_dim": 16}, text_config=text, projection_dim=16)


def registers_config(**sizes) -> transformers.Dinov2WithRegistersConfig:
    return transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)


def contrastive_config(config_class: type, **text):
    """What makes a config of a model with a text tower beside its vision tower."""

    def config(**sizes):
        return config_class(vision_config=sizes | {"projection_dim": 16}, text_config=TEXT | text, projection_dim=16)

    return config


def dinov3_config(**sizes) -> transformers.DINOv3ViTConfig:
    return transformers.DINOv3ViTConfig(**sizes, num_register_tokens=3)


# Without stochastic depth, which is tested apart, and with layers that weigh as much as their input.
BEIT = {"drop_path_rate": 0.0, "layer_scale_init_value": 1.0}


def beit_config(**sizes) -> transformers.BeitConfig:
    """As the fine-tuned checkpoints: a relative position bias in each layer, and the mean of the patches."""
    return transformers.BeitConfig(**sizes, **BEIT, use_relative_position_bias=True)


def pretrained_beit_config(**sizes) -> transformers.BeitConfig:
    """As the pretrained checkpoints: one bias for all layers, and positions are added, too; CLS is read."""
    own = {"use_absolute_position_embeddings": True, "use_mean_pooling": False}
    return transformers.BeitConfig(**sizes, **BEIT, **own, use_shared_relative_position_bias=True)


def data2vec_config(**sizes) -> transformers.Data2VecVisionConfig:
    both = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
    return transformers.Data2VecVisionConfig(**sizes, **BEIT, **both)


def masked_autoencoder_config(**sizes) -> transformers.ViTMAEConfig:
    return transformers.ViTMAEConfig(**sizes, mask_ratio=0.0)


def siglip_2_config(**sizes) -> transformers.Siglip2Config:
    sizes = {name: size for name, size in sizes.items() if name != "image_size"} | {"num_patches": 64}
    return transformers.Siglip2Config(vision_config=sizes, text_config=TEXT | {"projection_size": 32})


def siglip_2_vision_config(**sizes) -> transformers.Siglip2VisionConfig:
    return siglip_2_config(**sizes).vision_config


def native_aimv2_config(**sizes) -> transformers.Aimv2VisionConfig:
    return transformers.Aimv2VisionConfig(**sizes, is_native=True, use_head=False)


ROBERTA = {"pad_token_id": 1, "max_position_embeddings": 40, "project_dim": 16}
MODELS = {
    "vit": (transformers.ViTModel, transformers.ViTConfig),
    "vit-classifier": (transformers.ViTForImageClassification, transformers.ViTConfig),
    "deit": (transformers.DeiTModel, transformers.DeiTConfig),
    "deit-classifier": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig),
    "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config),
    "dinov2-classifier": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config),
    "registers": (transformers.Dinov2WithRegistersModel, registers_config),
    "registers-classifier": (transformers.Dinov2WithRegistersForImageClassification, registers_config),
    "clip": (transformers.CLIPModel, clip_config),
    "clip-vision": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig),
    "clip-projection": (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig),
    "clip-classifier": (transformers.CLIPForImageClassification, clip_config),
    "vit-msn": (transformers.ViTMSNModel, transformers.ViTMSNConfig),
    "vit-msn-classifier": (transformers.ViTMSNForImageClassification, transformers.ViTMSNConfig),
    "vit-mae": (transformers.ViTMAEModel, masked_autoencoder_config),
    "beit": (transformers.BeitModel, beit_config),
    "beit-pretrained": (transformers.BeitModel, pretrained_beit_config),
    "beit-classifier": (transformers.BeitForImageClassification, beit_config),
    "data2vec": (transformers.Data2VecVisionModel, data2vec_config),
    "data2vec-classifier": (transformers.Data2VecVisionForImageClassification, data2vec_config),
    "ijepa": (transformers.IJepaModel, transformers.IJepaConfig),
    "ijepa-classifier": (transformers.IJepaForImageClassification, transformers.IJepaConfig),
    "metaclip-2": (transformers.MetaClip2Model, contrastive_config(transformers.MetaClip2Config, eos_token_id=98)),
    "metaclip-2-vision": (transformers.MetaClip2VisionModel, transformers.MetaClip2VisionConfig),
    "metaclip-2-projection": (transformers.MetaClip2VisionModelWithProjection, transformers.MetaClip2VisionConfig),
    "metaclip-2-classifier": (
        transformers.MetaClip2ForImageClassification,
        contrastive_config(transformers.MetaClip2Config, eos_token_id=98),
    ),
    "chinese-clip": (transformers.ChineseCLIPModel, contrastive_config(transformers.ChineseCLIPConfig)),
    "chinese-clip-vision": (transformers.ChineseCLIPVisionModel, transformers.ChineseCLIPVisionConfig),
    "altclip": (transformers.AltCLIPModel, contrastive_config(transformers.AltCLIPConfig, **ROBERTA)),
    "altclip-vision": (transformers.AltCLIPVisionModel, transformers.AltCLIPVisionConfig),
    "clipseg": (transformers.CLIPSegModel, contrastive_config(transformers.CLIPSegConfig, eos_token_id=98)),
    "clipseg-vision": (transformers.CLIPSegVisionModel, transformers.CLIPSegVisionConfig),
    "owlvit-vision": (transformers.OwlViTVisionModel, transformers.OwlViTVisionConfig),
    "owlv2-vision": (transformers.Owlv2VisionModel, transformers.Owlv2VisionConfig),
    "siglip": (transformers.SiglipModel, contrastive_config(transformers.SiglipConfig)),
    "siglip-vision": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig),
    "siglip-classifier": (transformers.SiglipForImageClassification, contrastive_config(transformers.SiglipConfig)),
    "siglip2": (transformers.Siglip2Model, siglip_2_config),
    "siglip2-vision": (transformers.Siglip2VisionModel, siglip_2_vision_config),
    "aimv2": (transformers.Aimv2Model, contrastive_config(transformers.Aimv2Config, eos_token_id=98)),
    "aimv2-vision": (transformers.Aimv2VisionModel, transformers.Aimv2VisionConfig),
    "aimv2-native": (transformers.Aimv2VisionModel, native_aimv2_config),
    "dinov3": (transformers.DINOv3ViTModel, dinov3_config),
    "blip-vision": (transformers.BlipVisionModel, transformers.BlipVisionConfig),
    "blip-2-vision": (transformers.Blip2VisionModel, transformers.Blip2VisionConfig),
}
"""The models that tests go through, of every family: class and what makes its config from TINY, by name."""


def tiny_model(name: str, **sizes) -> transformers.PreTrainedModel:
    """The model of that name, the same at every call; `sizes` are fields of TINY to change."""
    # A copy takes an eighth as long as another one would. What is drawn after it is the same, too.
    key = name, repr(sorted(sizes.items()))
    if key not in _made:
        model, random = _make(name, **sizes)
        _made[key] = _Pickled(model), random
    pickled, random = _made[key]
    torch.set_rng_state(random)
    return pickled.copy()


class _Pickled:
    """A model that copies are made of, a fifth as long as `copy.deepcopy` takes: that copies every object in Python."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        file = io.BytesIO()
        _Pickler(file, self._tensors).dump(model)
        self._bytes = file.getvalue()

    def copy(self) -> transformers.PreTrainedModel:
        return _Unpickler(io.BytesIO(self._bytes), self._tensors).load()


class _Pickler(pickle.Pickler):
    """Sets tensors aside, which `pickle` takes longest for."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self._tensors[id(value)] = value
        return id(value)


class _Unpickler(pickle.Unpickler):
    """Puts copies of the tensors in, one of each."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors, self._copies = tensors, {}

    def persistent_load(self, number: int) -> torch.Tensor:
        return copy.deepcopy(self._tensors[number], self._copies)


_made: dict[tuple[str, str], tuple[_Pickled, torch.Tensor]] = {}


def _make(name: str, **sizes) -> tuple[transformers.PreTrainedModel, torch.Tensor]:
    """The model, and the state of torch's random numbers after it was made."""
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(config(**(TINY | sizes))).eval()
    # Some families start their prefix tokens, positions or heads at zero, which would hide an error in them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, torch.get_rng_state()


def sample_pixel_values(batch: int = 3, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def padded_patches(pixel_values: torch.Tensor, patch_size: int) -> dict[str, torch.Tensor]:
    """Images as SigLIP 2 takes them: the patches of images of many sizes. Those that are flat or bright are cut."""
    rows, columns = (size // patch_size for size in pixel_values.shape[2:])
    flat, bright = pixel_values.float().std((1, 2, 3)) < 0.5, pixel_values.float().mean((1, 2, 3)) > 0.5
    shapes = torch.stack((rows - 2 * flat.long(), columns - 3 * bright.long()), dim=1)
    patches = torch.zeros(len(pixel_values), rows * columns, 3 * patch_size**2)
    for image, whole, (high, wide) in zip(patches, pixel_values.float(), shapes.tolist(), strict=True):
        grid = whole[:, : high * patch_size, : wide * patch_size].unflatten(2, (wide, -1)).unflatten(1, (high, -1))
        image[: high * wide] = grid.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
    mask = torch.arange(rows * columns, device=shapes.device) < shapes.prod(1, keepdim=True)
    return {"pixel_values": patches.to(pixel_values), "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}


def inputs(model: transformers.PreTrainedModel, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `model` is called with for images, (batch, channels, height, width)."""
    given = {"pixel_values": pixel_values}
    if model.config.model_type.startswith("siglip2"):
        given = padded_patches(pixel_values, getattr(model.config, "vision_config", model.config).patch_size)
    if "mask_ratio" in model.config.to_dict():  # its embeddings shuffle patches: by this, into the order they have
        patches = pixel_values[0, 0].numel() // model.config.patch_size**2
        given["noise"] = torch.arange(patches, dtype=torch.float32).expand(len(pixel_values), -1)
    if hasattr(model, "text_model"):
        given["input_ids"] = torch.tensor([[97, 5, 98], [97, 7, 98]])
    return {name: value.to(pixel_values.device) for name, value in given.items()}


def forward(model: transformers.PreTrainedModel, pixel_values: torch.Tensor, **kwargs):
    """The model's first output: logits, similarities to two texts (CLIP and its like) or hidden states."""
    given = inputs(model, pixel_values)
    output = model(**given, **kwargs)[0]
    if "pixel_attention_mask" in given and output.shape[:2] == given["pixel_attention_mask"].shape:
        return output * given["pixel_attention_mask"].unsqueeze(-1)  # what padding gets means nothing
    return output


def answers(model: transformers.PreTrainedModel, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, pixel_values, **kwargs)


def watch_embeddings(model: transformers.PreTrainedModel) -> list[tuple[torch.Tensor, object]]:
    """Gets what enters the layers of `model`, and the plan by which it came about, at each call from now on.

    The plan is `None` for a plain model, and where nothing after the embeddings goes by it.
    """
    # Not from the top: these models are also made in processes without vwt_hf.
    from vwt_hf.families import family_of, find_tower
    from vwt_hf.forward import current_forward

    taken: list[tuple[torch.Tensor, object]] = []

    def look(module, args, output):
        forward = current_forward()
        taken.append((output[0] if isinstance(output, tuple) else output, forward and forward.plan))

    find_tower(model, family_of(model)).embeddings.register_forward_hook(look)
    return taken


def traces(model: transformers.PreTrainedModel) -> list[tuple]:
    """What compressing could leave in a model: each module's hooks, attributes, and the class of its config."""
    return [
        (
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            [*module._forward_hooks_with_kwargs, *module._forward_hooks_always_called],
            list(module._forward_pre_hooks_with_kwargs),
            sorted(vars(module)),
            module.__dict__.get("forward"),
            type(module.__dict__.get("config")).__mro__,
        )
        for module in model.modules()
    ]


def require_restored(model: transformers.PreTrainedModel, images: torch.Tensor, *settings) -> None:
    """Asserts that restore gives the exact plain model back, after `model` was compressed by these, one by one."""
    # Not from the top: these models are also made in processes without vwt_hf.
    from vwt_hf import VWTConfig, compress, restore

    plain, names, before = answers(model, images), list(model.state_dict()), traces(model)
    for setting in settings:
        compress(model, setting)
    assert model.config.vwt == VWTConfig.parse(settings[-1]).to_dict()
    assert not torch.equal(answers(model, images), plain)
    restore(model)
    assert torch.equal(answers(model, images), plain)
    assert model.config.vwt is None and list(model.state_dict()) == names
    assert traces(model) == before
