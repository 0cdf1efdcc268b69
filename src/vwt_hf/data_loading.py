"""Batches of images with different numbers of patches or tokens: a collator, and lengths to group them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

# transformers' top level hides it from type checkers.
from transformers.data.data_collator import default_data_collator

from .plans import DROPPED, PATCH_WORDS

_FILLS = {"pixel_values": 0, "pixel_attention_mask": 0, PATCH_WORDS: DROPPED}
"""The values that pad images with fewer patches or tiles."""


def collate_images(features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Makes a batch of images that were processed one by one, with different numbers of patches or of tiles.

    A `data_collator` of `Trainer`, or a `collate_fn` of a `DataLoader`. Images of one size do not need it:
    transformers' default collator does the same.

    Args:
        features: for each image what its image processor made, without the batch dimension: padded patches,
            `pixel_values` (patches, values) with `pixel_attention_mask` (patches,) and `spatial_shapes` (2,); tiles,
            (tiles, channels, height, width); or a whole image, (channels, height, width). `patch_words`, (patches,) or
            (tiles, patches), labels and everything else go along.

    Returns:
        What transformers' `default_data_collator` gives of images padded to the most patches or tiles: with zeros in
        `pixel_values` and `pixel_attention_mask`, and −1 in `patch_words`.

    Raises:
        TypeError: `features` is what an image processor made of several images together, or holds images.
        ValueError: there are no images; or whole images or tiles have different sizes, which no model takes in a batch.

    Example:
        >>> words = torch.arange(64).repeat(5, 1)
        >>> tiles = [{"pixel_values": torch.rand(n, 3, 32, 32), "patch_words": words[:n]} for n in (3, 5)]
        >>> {name: tuple(value.shape) for name, value in collate_images(tiles).items()}
        {'pixel_values': (2, 5, 3, 32, 32), 'patch_words': (2, 5, 64)}
    """
    if isinstance(features, Mapping):
        raise TypeError(
            f"features is a {type(features).__name__}; expected a list, which holds what an image processor made of "
            "each image by itself."
        )
    rows = list(features)
    if not rows:
        raise ValueError("features is empty; expected what an image processor made of at least one image.")
    for row in rows:
        if not isinstance(row, Mapping):
            raise TypeError(
                f"features holds a {type(row).__name__}; expected dicts, as processor(image) makes of an image."
            )
    padded = [dict(row) for row in rows]
    for row in padded:
        if PATCH_WORDS in row:  # in fewer bits there may be no −1
            row[PATCH_WORDS] = as_tensor(row[PATCH_WORDS]).long()
    for name in _FILLS.keys() & padded[0].keys():
        values = _of_one_length(name, [as_tensor(feature[name]) for feature in padded])
        for feature, value in zip(padded, values, strict=True):
            feature[name] = value
    return default_data_collator(padded)


def as_tensor(values: Any) -> torch.Tensor:
    """A tensor as it is; an array or a list of numbers as a tensor on the CPU, whatever torch's default device is.

    Python's floats become float32: a data set gives stored float32 values back as such.
    """
    if isinstance(values, torch.Tensor):
        return values
    if (rows := listed(values)) is not values:  # of arrays, or of numbers where pandas had others beside them
        values = [as_tensor(one) if np.ndim(one) else one for one in rows]
    inner = values
    while isinstance(inner, (list, tuple)) and inner:
        if isinstance(inner[0], torch.Tensor):
            return torch.stack([as_tensor(one) for one in values])
        inner = inner[0]
    made = torch.from_numpy(np.ascontiguousarray(values))
    return made.float() if made.dtype == torch.float64 and isinstance(inner, float) else made


def listed(values: Any) -> Any:
    """The rows of a table of pandas, a column of `datasets` or an array of objects as a list; all else as it is."""
    if hasattr(values, "to_pylist"):  # it is in the format of Arrow
        return values.to_pylist()
    if getattr(values, "ndim", None) == 2 and hasattr(values, "to_numpy"):  # over which one iterates by columns
        return list(np.array(values))
    is_column = isinstance(values, Sequence) and not isinstance(values, (list, tuple, str, bytes))
    return list(values) if is_column or getattr(getattr(values, "dtype", None), "kind", None) == "O" else values


def _of_one_length(name: str, values: list[torch.Tensor]) -> list[torch.Tensor]:
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) == 1:
        return values
    if values[0].dim() == 3 or len({shape[1:] for shape in shapes}) > 1:
        raise ValueError(
            f"{name} of one batch are {' and '.join(map(str, shapes))}; expected images or tiles of one size. Have the "
            "image processor resize them to one, or use a model that takes padded patches, as SigLIP 2 NaFlex."
        )
    return list(torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=_FILLS[name]))


def token_lengths(patch_words: Any) -> list[int]:
    """How many tokens the patches of each image become, without prefix tokens.

    Batches of images with about as many tokens each have little padding. transformers' `LengthGroupedSampler` makes
    them from these lengths. `Trainer` reads them from a data set's column `length` with
    `train_sampling_strategy="group_by_length"` and `remove_unused_columns=False`, without which it drops that column;
    its `predict` then gives rows in the order of their lengths.

    Args:
        patch_words: (batch, patches) or (batch, tiles, patches) integers, as an image processor loaded with `vwt` makes
            them. In a list, images may have different numbers of patches or tiles.

    Raises:
        TypeError: they are not integers.
        ValueError: they are of one image, without the batch dimension.

    Example:
        >>> token_lengths([[5, 5, 5, 9], [0, -1, 2, -1]])
        [2, 2]
    """
    if isinstance(patch_words, Mapping) or not hasattr(patch_words, "__len__"):
        raise TypeError(
            f"patch_words is a {type(patch_words).__name__}; expected integers (batch, patches), as an image processor "
            'loaded with vwt makes them: processor(images)["patch_words"].'
        )
    patch_words = listed(patch_words)
    if getattr(patch_words, "ndim", 2) < 2 or (len(patch_words) and np.ndim(patch_words[0]) == 0):
        raise ValueError(
            "patch_words are of one image alone; expected (batch, patches). Give those of several images, as "
            "map(..., batched=True) does, or [patch_words] of one."
        )
    if isinstance(patch_words, (list, tuple)):
        return [length for words in patch_words for length in token_lengths(as_tensor(words)[None])]
    words = as_tensor(patch_words)
    if words.numel() and words.is_floating_point():  # torch takes an empty list for floats
        raise TypeError(f"patch_words are {words.dtype}; expected integers (batch, patches).")
    words = words.long().sort(dim=-1).values
    real = words != DROPPED
    real[..., 1:] &= words[..., 1:] != words[..., :-1]
    return real.flatten(1).sum(dim=1).tolist()
