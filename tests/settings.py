"""A setting of each kind for the tiny models."""

from __future__ import annotations

import torch

from vwt_hf import VisualVocabulary, VWTConfig

WORDS = VisualVocabulary(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
STATISTICS = {"image_mean": [0.2, 0.0, -0.1], "image_std": [0.5, 1.0, 2.0]}


def inter(vocabulary: VisualVocabulary = WORDS, **fields) -> VWTConfig:
    """Words at a threshold that some patches of the tests' images pass."""
    return VWTConfig(**{"method": "inter", "vocabulary": vocabulary, "threshold": 0.3, **STATISTICS, **fields})


SETTINGS = {
    "discard": VWTConfig(keep_ratio=0.5),
    "merge": VWTConfig(keep_ratio=0.5, dropped="merge"),
    "inter": inter(),
}
