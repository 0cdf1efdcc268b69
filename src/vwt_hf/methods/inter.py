"""`method="inter"`: patches near one word of a vocabulary become one token (paper, inter-image approach)."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, ClassVar

import torch

from ..checks import is_number
from ..config import ModelFacts, is_vocabulary
from ..hub_names import NotReached
from ..packaged_words import is_packaged, packaged_words
from ..patches import Patches
from ..plans import Grouped
from ..printable import shown
from ..processors import config_beside, model_statistics, saved_setting
from ..saved_words import FOLDER, SAVED_AS, in_memory, name_in_memory, read_words
from ..vocabulary import VisualVocabulary, load_vocabulary
from ..words import WordIndex, index_words, nearest_words
from .ragged import RaggedConfig


class ReadyWords:
    """A vocabulary mapped to the pixel values of a model, ready for `nearest_words` on any device.

    Args:
        vocabulary: the words, in raw RGB.
        image_mean, image_std: how the model's images are normalised, one number for each channel.
    """

    def __init__(
        self, vocabulary: VisualVocabulary, image_mean: tuple[float, ...], image_std: tuple[float, ...]
    ) -> None:
        self.vocabulary = vocabulary
        self.image_mean, self.image_std = image_mean, image_std
        self._on: dict[torch.device, WordIndex] = {}
        self.on(torch.device("cpu"))  # what cannot be searched is refused where it is loaded

    def on(self, device: torch.device) -> WordIndex:
        """The words in the model's pixel space, for `nearest_words` on `device`."""
        index = self._on.get(device)
        if index is None:
            cpu = torch.device("cpu")
            # Outside inference mode, so that a later training step may use what is kept.
            with torch.inference_mode(False), cpu:
                if device == cpu:
                    index = index_words(self.vocabulary.normalized(self.image_mean, self.image_std))
                else:
                    index = WordIndex(self.on(cpu).words.to(device))  # without the screen, which is for CPUs
            # Tracing (torch.export) sees tensors without values, which must not be kept.
            if type(index.words) is torch.Tensor:
                self._on[device] = index
        return index

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_on": {}}


@dataclasses.dataclass(frozen=True, repr=False)
class InterConfig(RaggedConfig):
    """Replace patches that are near one word of a vocabulary by one token, the average of their embeddings.

    Args:
        vocabulary (`str` or `VisualVocabulary`, *optional*):
            A Hub id, a folder, or the vocabulary itself. `None`: the one that was saved with the model; where there is
            none, the one that comes with the package for its patches (`vwt_hf.packaged_words`), which is saved with the
            model then.
        revision (`str`, *optional*):
            Branch, tag or commit of a vocabulary on the Hub. The setting of a loaded model holds the commit.
        threshold (`float`, default 0.1):
            Largest cosine distance from a word, in [0, 2], at which a patch takes it. 0 is the plain model.
        layout (`str`, default `"auto"`):
            As `RaggedConfig` says.
        image_mean, image_std (sequence of `float`, *optional*):
            How the model's images are normalised, for each channel; by default as its image processor says.
        saved_as (`str`, *optional*):
            Written by `save_pretrained`: 16 hexadecimal digits. The model's own words lie in the folder
            `visual_words-<saved_as>` beside its weights. In `config.vwt` it also names words in memory, for image
            processors and other models of the same process.
    """

    beside_choice: ClassVar[frozenset[str]] = RaggedConfig.beside_choice | {"saved_as"}
    statistics: ClassVar[dict[str, bool]] = {"image_mean": False, "image_std": True}

    method: str = "inter"
    vocabulary: Any = None
    revision: str | None = None
    threshold: float = 0.1
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    saved_as: str | None = None
    words: ReadyWords | None = dataclasses.field(default=None, compare=False)
    """Set by `prepared`: the vocabulary, mapped to the pixel values of the model. Never saved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.threshold, 0, 2):
            raise ValueError(f"VWTConfig.threshold is {shown(self.threshold)}; expected a cosine distance in [0, 2].")
        if not (self.vocabulary is None or is_vocabulary(self.vocabulary)):
            raise ValueError(
                f"VWTConfig.vocabulary is a {type(self.vocabulary).__name__}; expected a Hub id, a folder or a "
                "VisualVocabulary."
            )
        if self.revision is not None and not isinstance(self.revision, str):
            raise ValueError(
                f"VWTConfig.revision is {shown(self.revision)}; expected None, a branch, a tag or a commit."
            )
        if self.saved_as is not None and not (isinstance(self.saved_as, str) and SAVED_AS.fullmatch(self.saved_as)):
            raise ValueError(f"VWTConfig.saved_as is {shown(self.saved_as)}; expected None or 16 digits from 0 to f.")

    @property
    def shortens(self) -> bool:
        return self.threshold > 0

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        if not isinstance(self.vocabulary, VisualVocabulary):
            return fields if self.vocabulary is None else fields | {"vocabulary": os.fspath(self.vocabulary)}
        fields["vocabulary"] = None
        if self.saved_as is None and not is_packaged(self.vocabulary):
            fields["saved_as"] = name_in_memory(self.vocabulary)
        return fields

    def words_to_save(self) -> VisualVocabulary | None:
        return None if self.words is None or isinstance(self.vocabulary, str) else self.words.vocabulary

    def with_saved(self, saved: dict[str, Any]) -> InterConfig:
        if self.vocabulary is not None or self.saved_as is not None:
            return self
        if saved.get("vocabulary") is not None:
            raise ValueError(
                f"VWTConfig.vocabulary is None, and the model was saved with {shown(saved['vocabulary'])}; give that "
                "or another."
            )
        known: dict[str, Any] = {name: saved.get(name) for name in ("saved_as", "image_mean", "image_std")}
        setting = dataclasses.replace(self, **{k: v for k, v in known.items() if getattr(self, k) is None})
        setting.require_sane()
        return setting

    def prepared(self, model: ModelFacts) -> InterConfig:
        setting, vocabulary = self._with_vocabulary(model)
        vocabulary.require(model.patch_size, model.channels)
        named = isinstance(self.vocabulary, (str, os.PathLike))
        if self.revision is not None and not (named and vocabulary.revision is not None):
            raise ValueError(
                f"VWTConfig.revision is {shown(self.revision)}, and vocabulary is {shown(self.vocabulary)}; expected a "
                "Hub id, which alone has revisions, or no revision."
            )
        mean, std = setting.image_mean, setting.image_std
        if mean is None or std is None:
            wanted = 'VWTConfig(method="inter", image_mean=..., image_std=...)'
            usual_mean, usual_std = model_statistics(model, vocabulary.channels, wanted)
            mean, std = mean or usual_mean, std or usual_std
        on_hub = vocabulary.is_on_hub  # other words are saved beside the weights
        setting = dataclasses.replace(
            setting,
            vocabulary=vocabulary.source if on_hub else vocabulary,
            revision=vocabulary.revision if on_hub else None,
            saved_as=setting.saved_as if self.vocabulary is None else None,  # of other words
            image_mean=mean,
            image_std=std,
        )
        return dataclasses.replace(setting, words=ReadyWords(vocabulary, mean, std))

    def _with_vocabulary(self, model: ModelFacts) -> tuple[InterConfig, VisualVocabulary]:
        """The vocabulary to go by, and the setting with what was saved beside it."""
        if isinstance(self.vocabulary, (str, os.PathLike)):
            hub_kwargs = model.hub_kwargs.items()
            elsewhere = {name: value for name, value in hub_kwargs if name not in ("revision", "subfolder")}
            return self, load_vocabulary(self.vocabulary, trusted=model.trusted, revision=self.revision, **elsewhere)
        if self.vocabulary is not None:
            own = self.vocabulary.copy()  # the model is saved with the words that it runs by
            name_in_memory(self.vocabulary)  # a restored model lets go of its own
            return self, own
        if isinstance(model.present, InterConfig) and model.present.words is not None:
            words, named = model.present.words, model.present.to_dict()["saved_as"]
            if self.saved_as in (None, named) or words.vocabulary.fingerprint().startswith(self.saved_as):
                mean, std = self.image_mean or words.image_mean, self.image_std or words.image_std
                return dataclasses.replace(self, saved_as=named, image_mean=mean, image_std=std), words.vocabulary
        setting = self._as_saved(model)
        return setting, setting._saved_or_packaged(model)

    def _as_saved(self, model: ModelFacts) -> InterConfig:
        """The setting with what the config.json of the model's checkpoint says of words that lie beside it, which an
        image processor's has already."""
        if self.saved_as is not None or not (model.trusted and model.source) or model.words_folder is not None:
            return self
        saved = saved_setting(config_beside(model.source, **model.hub_kwargs))
        return self if saved is None else self.with_saved(saved)

    def _saved_or_packaged(self, model: ModelFacts) -> VisualVocabulary:
        """The words that the setting names in memory, or that lie beside the model's weights or, if a user's setting
        finds none there, the package's."""
        words = in_memory(self.saved_as)
        # A folder's name for words says nothing of them, and a stranger's config.json may hold any.
        is_own_name = words is not None and words.fingerprint().startswith(self.saved_as or "")
        if words is not None and (is_own_name or (model.trusted and not model.source)):
            return words
        if not model.source and (self.saved_as is not None or not model.trusted):
            raise ValueError(
                "VWTConfig.vocabulary is None, as of a model whose words are in memory or saved beside its weights. "
                "Here they are not in memory, and this model was loaded from nowhere. Give vwt={'method': 'inter', "
                "'vocabulary': ...}, or vwt=False."
            )
        try:
            if model.source:
                return read_words(model.source, self.saved_as, model.hub_kwargs, model.words_folder or FOLDER)
        except FileNotFoundError as error:
            if words is not None and model.trusted:
                return words
            # Words that the model was saved with may be there; others in their place would change the answers.
            is_gone = os.path.isabs(model.source) and not os.path.isdir(model.source)
            if self.saved_as is not None or not model.trusted or isinstance(error, NotReached) or is_gone:
                raise
        return packaged_words(model.patch_size, model.channels)

    def plan(self, patches: Patches) -> Grouped | None:
        if not self.shortens:
            return None
        packed = self.packs(patches)  # before the search: it refuses what cannot be grouped
        return patches.group(self._nearest(patches), packed, self.size_exponent)

    def patch_words(self, patches: Patches) -> torch.Tensor | None:
        return patches.without_padding(self._nearest(patches)) if self.shortens else None

    def _nearest(self, patches: Patches) -> torch.Tensor:
        pixels = patches.pixels_as_words().float()
        return nearest_words(pixels, self.ready("words").on(pixels.device), self.threshold)

    def plan_of(self, patches: Patches, words: torch.Tensor) -> Grouped:
        return patches.grouped_by(words, self.packs(patches), self.size_exponent)
