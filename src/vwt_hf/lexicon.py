"""The words that a model tokenises by: a vocabulary, mapped to the way the model's images are normalised."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .beside import read_words
from .config import VWTConfig
from .processors import processor_statistics
from .vocabulary import VisualVocabulary, load_vocabulary
from .words import WordIndex, index_words


class Lexicon:
    """A vocabulary in a model's pixel space, on whatever device asks for it.

    Args:
        vocabulary: the words, in raw RGB.
        setting: with the model's `image_mean` and `image_std`.
    """

    def __init__(self, vocabulary: VisualVocabulary, setting: VWTConfig) -> None:
        self.vocabulary = vocabulary
        self.setting = setting
        if setting.image_mean is None or setting.image_std is None:
            raise ValueError(f"{setting} does not say how images are normalised; give image_mean and image_std.")
        self.image_mean, self.image_std = setting.image_mean, setting.image_std
        self._on: dict[torch.device, WordIndex] = {}

    def on(self, device: torch.device) -> WordIndex:
        """The words in the model's pixel space, ready for `nearest_words` on `device`."""
        index = self._on.get(device)
        if index is None:
            # Outside inference mode, so that a later training step may use what is kept.
            with torch.inference_mode(False):
                mapped = self.vocabulary.normalized(self.image_mean, self.image_std)
                index = index_words(mapped).to(device)
            # Tracing (torch.export) sees tensors without values, which must not be kept.
            if type(index.words) is torch.Tensor:
                self._on[device] = index
        return index

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_on": {}}

    @property
    def on_hub(self) -> bool:
        """Whether the words lie on the Hub by themselves; else a model that is saved takes them along."""
        return isinstance(self.setting.vocabulary, str)

    @classmethod
    def resolve(
        cls,
        setting: VWTConfig,
        source: str,
        present: Lexicon | None = None,
        *,
        trusted: bool = True,
        **hub_kwargs: Any,
    ) -> Lexicon:
        """Finds the vocabulary that `setting` names, and how the images of the model are normalised.

        Args:
            setting: with `method="inter"`.
            source: Hub id or folder that the model was loaded from; empty if from nowhere.
            present: the lexicon that the model has already; used where `setting` names no vocabulary.
            trusted: whether a user wrote `setting`; else what it names is looked for on the Hub alone.
            hub_kwargs: for the Hub: `token`, `cache_dir`, `local_files_only`; `revision` and `subfolder` of the model.

        Raises:
            ValueError: no vocabulary is named and the model has none, or nothing tells how its images are normalised.
            OSError: the vocabulary cannot be read.
        """
        own = dict(hub_kwargs)
        elsewhere = {name: value for name, value in own.items() if name not in ("revision", "subfolder")}
        vocabulary: Any = setting.vocabulary
        if isinstance(vocabulary, (str, os.PathLike)):
            vocabulary = load_vocabulary(vocabulary, trusted=trusted, revision=setting.revision, **elsewhere)
        elif vocabulary is None and present is not None:
            vocabulary = present.vocabulary
            setting = dataclasses.replace(
                setting,
                image_mean=setting.image_mean or present.image_mean,
                image_std=setting.image_std or present.image_std,
            )
        elif vocabulary is None:
            if not source:
                raise ValueError(
                    "VWTConfig.vocabulary is None and the model was loaded from nowhere that may hold one; give a Hub "
                    "id, a folder or a VisualVocabulary."
                )
            vocabulary = read_words(source, setting.saved_as, own)
        return cls(vocabulary, _with_statistics(setting, vocabulary, source, hub_kwargs))


def _with_statistics(
    setting: VWTConfig, vocabulary: VisualVocabulary, source: str, hub_kwargs: dict[str, Any]
) -> VWTConfig:
    """`setting` with where the vocabulary came from, and with the statistics of the model's image processor."""
    # A setting has no field for a subfolder: words from one are saved beside the weights.
    on_hub = vocabulary.revision is not None and not vocabulary.subfolder
    setting = dataclasses.replace(
        setting,
        vocabulary=vocabulary.source if on_hub else vocabulary,
        revision=vocabulary.revision if on_hub else None,
    )
    if setting.image_mean is None or setting.image_std is None:
        try:
            # Never by code of the repository: a model's config asks for this, not a user.
            processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False, **hub_kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise ValueError(
                f"Visual words must be normalised as the model's images are, and {source or 'the model'} has no image "
                f"processor that tells how ({error}). Give VWTConfig(image_mean=..., image_std=...)."
            ) from error
        mean, std = processor_statistics(processor, vocabulary.channels)
        setting = dataclasses.replace(
            setting, image_mean=setting.image_mean or mean, image_std=setting.image_std or std
        )
    return setting
