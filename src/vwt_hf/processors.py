"""What a checkpoint says about how its model gets images: its image processor and its patch size."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

# Not from the top: there transformers 5.17 offers it only with torchvision, which reading photographs does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .demo_weights import quiet_transformers


def load_processor(checkpoint: str) -> Any:
    """The image processor of a Hub id or folder.

    Raises:
        OSError: there is no such checkpoint, or it has no image processor.
        ValueError: its image processor is of a kind that transformers does not know.
    """
    with quiet_transformers():
        return AutoImageProcessor.from_pretrained(checkpoint)


def patch_size_of(checkpoint: str) -> int | None:
    """Height and width of the patches that the model of a Hub id or folder cuts, in pixels.

    `None` where no config says so, as beside an image processor that was saved alone.
    """
    try:
        with quiet_transformers():
            config: Any = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError):
        return None
    # CLIP and its like keep the vision tower's config inside their own.
    size = getattr(getattr(config, "vision_config", config), "patch_size", None)
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None
