"""A setting of each kind for the tiny models."""

from __future__ import annotations

import torch

from vwt_hf import VisualVocabulary, VWTConfig

SETTINGS = {
    "discard": VWTConfig(keep_ratio=0.5),
    "merge": VWTConfig(keep_ratio=0.5, dropped="merge"),
    "inter": VWTConfig(
        method="inter",
        vocabulary=VisualVocabulary(torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))),
        threshold=0.3,
        image_mean=[0.2, 0.0, -0.1],
        image_std=[0.5, 1.0, 2.0],
    ),
}
