"""The words that come with the package, for models that were saved with none: `method="inter"` works without the Hub.

What they were learned from, and how, is in model_cards/packaged-words.md.
"""

from __future__ import annotations

from pathlib import Path

from .vocabulary import VisualVocabulary, load_vocabulary

FOLDER = Path(__file__).parent / "words_by_patch_size"
PATCH_SIZES = (14, 16, 32)
"""In pixels, of square patches of RGB."""


def packaged_words(patch_size: tuple[int, int], channels: int) -> VisualVocabulary:
    """The words for patches of that height and width, in pixels.

    A model that goes by them saves them beside its weights, so a later version of the package changes no answer.

    Raises:
        ValueError: there are none for such patches.
    """
    height, width = patch_size
    if height != width or height not in PATCH_SIZES or channels != 3:
        raise ValueError(
            f"VWTConfig.vocabulary is None, and the model cuts {height}×{width} patches of {channels} channels; the "
            f"words that come with the package are for square RGB patches of {', '.join(map(str, PATCH_SIZES))} "
            "pixels. Give a Hub id, a folder or a VisualVocabulary; `vwt-hf learn` makes one."
        )
    return load_vocabulary(FOLDER / f"patch{height}", trusted=True, pickles=False)


def is_packaged(vocabulary: VisualVocabulary) -> bool:
    """Whether a vocabulary was loaded by `packaged_words`."""
    return vocabulary.source is not None and Path(vocabulary.source).parent == FOLDER
