"""A setting of each kind for the tiny models."""

from __future__ import annotations

import torch
import transformers
from transformers.utils import is_torchvision_available

from vwt_hf import VisualVocabulary, VWTConfig

ViTImageProcessor = getattr(transformers, f"ViTImageProcessor{'' if is_torchvision_available() else 'Pil'}")
"""What `AutoImageProcessor` loads for a ViT: that of torchvision resizes to other pixels than that of Pillow."""
_HAS_BFLOAT16 = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
FAST = torch.bfloat16 if any(getattr(torch.cpu, has, bool)() for has in _HAS_BFLOAT16) else torch.float32
"""The dtype in which trained models run faster on this machine."""
WORDS = VisualVocabulary(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
STATISTICS = {"image_mean": [0.2, 0.0, -0.1], "image_std": [0.5, 1.0, 2.0]}


def inter(vocabulary: VisualVocabulary = WORDS, **fields) -> VWTConfig:
    """Words at a threshold that some patches of the tests' images pass."""
    return VWTConfig(**{"method": "inter", "vocabulary": vocabulary, "threshold": 0.3, **STATISTICS, **fields})


def local(**fields) -> VWTConfig:
    """Neighbours at a tolerance that some patches of the tests' images pass."""
    fields = {"image_std": (0.5, 0.5, 0.5)} | ({} if "num_patches" in fields else {"tolerance": 0.2}) | fields
    return VWTConfig(**{"method": "local", **fields})


def gradual(**fields) -> VWTConfig:
    """As `local`, and tokens that are joined after the first layer of a model of two."""
    how = {} if "join_ratio" in fields else {"similarity": 0.2}
    return local(**{"method": "gradual", **how, **fields})


def fixed(**fields) -> VWTConfig:
    """Half of every image's patches, and a quarter of these are joined after the first layer of a model of two."""
    deviation = (0.5, 0.5, 0.5)
    return VWTConfig(**{"method": "gradual", "keep_ratio": 0.5, "join_ratio": 0.25, "image_std": deviation, **fields})


def coarse(**fields) -> VWTConfig:
    """Blocks at a tolerance that some of the tests' images pass."""
    return local(**{"method": "coarse", **fields})


SETTINGS = {
    "discard": VWTConfig(keep_ratio=0.5),
    "merge": VWTConfig(keep_ratio=0.5, dropped="merge"),
    "inter": inter(),
    "local": local(),
    "coarse": coarse(),
}
