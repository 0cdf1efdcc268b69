"""Rescales and normalises images of eight bits by a table of 256 values for each channel, with the same result.

An image processor by Pillow computes the value of every pixel, in several passes over each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend

LEVELS = 256
STEPS = ("_preprocess", "rescale", "normalize")


def ends_with_values(processor_class: type, steps: dict[str, Any]) -> bool:
    """Whether images of a class of image processors are rescaled and normalised pixel by pixel, after all other steps.

    Args:
        processor_class: of transformers, or a user's.
        steps: what is to be done with images, as its `_preprocess` gets it.
    """
    if any(getattr(processor_class, name, None) is not getattr(PilBackend, name) for name in STEPS):
        return False
    return bool(steps.get("do_rescale") and steps.get("do_normalize") and not steps.get("do_pad"))


def are_levels(images: Sequence[Any]) -> bool:
    """Whether images are arrays (channels, height, width) of uint8."""
    return all(isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 for image in images)


def look_up(processor: Any, images: Sequence[np.ndarray], steps: dict[str, Any]) -> Sequence[np.ndarray]:
    """What an image processor makes of images by rescaling and normalising them, to the bit.

    Args:
        processor: an image processor by Pillow.
        images: (channels, height, width) each, uint8.
        steps: as for `ends_with_values`.

    Returns:
        The array of each image, float32. Where they become one tensor, and are of one size, one array of them all.
    """
    tables = {channels: _values(processor, channels, steps) for channels in {len(image) for image in images}}
    shapes = [image.shape for image in images]
    if steps.get("return_tensors") is not None and len(set(shapes)) == 1:
        result: Any = np.empty((len(shapes), *shapes[0]), np.float32)
    else:
        result = [np.empty(shape, np.float32) for shape in shapes]
    for image, values in zip(images, result, strict=True):
        for plane, table, made in zip(image, tables[len(image)], values, strict=True):
            np.take(table, plane, out=made, mode="clip")
    return result


def _values(processor: Any, channels: int, steps: dict[str, Any]) -> np.ndarray:
    """The value of each level, (channels, 256) float32."""
    levels = np.arange(LEVELS, dtype=np.uint8).reshape(1, 1, LEVELS).repeat(channels, axis=0)
    rescaled = processor.rescale(levels, steps["rescale_factor"])
    return processor.normalize(rescaled, steps["image_mean"], steps["image_std"]).reshape(channels, LEVELS)
