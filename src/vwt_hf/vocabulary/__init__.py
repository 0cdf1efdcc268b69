"""Visual words: `VisualVocabulary`, its files and model card, and how it is learned from images."""

from __future__ import annotations

from .visual_vocabulary import VisualVocabulary, load_vocabulary

__all__ = ["VisualVocabulary", "load_vocabulary"]
