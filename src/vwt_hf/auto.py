"""Registration with transformers: `register`, which `import vwt_hf` calls, makes `from_pretrained(..., vwt=...)` work.

Models stay transformers' own, and so do configs without a setting (`model_configs.py`). Every loading path of
transformers goes through `from_pretrained` or `_from_config` of `PreTrainedModel`, so `vwt` is handled there
(`model_loading.py`), also for classes that no Auto class reaches, such as `CLIPVisionModelWithProjection`. So a folder
that was saved with a setting never loads as a plain model that claims to have one.
"""

from __future__ import annotations

import functools
import itertools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderModel,
)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.pipelines.base import Pipeline

from . import attention, image_processing
from .compress import setting_of, takes_words
from .forward import GivenWords, call_with, words_to_generate_by
from .model_configs import SETTING
from .model_loading import (
    NOT_GIVEN,
    building_models,
    loading_models,
    loading_processors,
    loading_tokenizers,
    reading_configs,
)
from .model_saving import saving_models, saving_processors, uploading_models
from .printable import shown
from .stand_ins import StandIn

_replaced: dict[tuple[type, str], tuple[Any, Any]] = {}
"""For each method of transformers that was replaced: the original (`NOT_GIVEN` if it was inherited), and the
replacement, by which `unregister` sees whether another library has wrapped it."""


def register() -> None:
    """Makes transformers' loading, saving and configs take `vwt`. A second call changes nothing."""
    if _replaced:
        return
    PreTrainedConfig.vwt = SETTING  # type: ignore[attr-defined]
    ImageProcessingMixin.vwt = image_processing.SETTING  # type: ignore[attr-defined]
    attention.register()
    for (owner, name), wrap in _WRAPS.items():
        present = vars(owner).get(name, NOT_GIVEN)
        bound = isinstance(present, classmethod)
        wrapped = wrap(present.__func__ if bound else getattr(owner, name))
        setattr(owner, name, classmethod(wrapped) if bound else wrapped)
        _replaced[owner, name] = present, vars(owner)[name]


def unregister() -> None:
    """Undoes `register`: transformers is as if vwt_hf had not been imported.

    Restore compressed models first (`restore`): their layers need the attention that is taken away.

    Raises:
        RuntimeError: another library has wrapped one of the methods since, and would lose what it calls.
    """
    for (owner, name), (_, ours) in _replaced.items():
        if vars(owner)[name] is not ours:
            raise RuntimeError(
                f"{owner.__name__}.{name} was replaced after vwt_hf registered, by "
                f"{getattr(vars(owner)[name], '__module__', 'something else')}; take that out before."
            )
    for (owner, name), (original, _) in _replaced.items():
        if original is NOT_GIVEN:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    if _replaced:
        del PreTrainedConfig.vwt  # type: ignore[attr-defined]
        del ImageProcessingMixin.vwt  # type: ignore[attr-defined]
        attention.unregister()
    _replaced.clear()


class _Calling:
    """Stands for the call of models, so that a plain model refuses `patch_words`.

    The forward of every supported family ignores keywords that it does not know. So a plain model would see all
    patches, and a user who gave `vwt` to the image processor alone would never learn why nothing is faster. Calls
    without `patch_words` go on to `torch.nn.Module`, also if another library has replaced its call since, as `torch.fx`
    does while it traces.

    Each class of models has a function of its own, as it has a forward: torch.compile limits how many graphs it makes
    of one function, and all models would share that number. So has each compressed model, whose graphs fit no other.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.functions: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self.numbers = itertools.count()

    def __get__(self, model: Any, model_class: type) -> Any:
        owner = model if model is not None and isinstance(vars(model).get("forward"), StandIn) else model_class
        function = self.functions.get(owner)
        if function is None:
            function = _calling(self.original)
            # Torch tells functions, and the shapes that it has met in them, apart by their code and its name.
            name = f"{model_class.__qualname__} {next(self.numbers)}"
            function.__code__ = function.__code__.replace(co_name=name)
            function = self.functions.setdefault(owner, function)
        return function if model is None else types.MethodType(function, model)


def _calling(original: Any) -> Any:
    """A function for `_Calling`."""

    @functools.wraps(original)
    def __call__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("patch_words") is not None and not takes_words(self):
            if setting_of(self) is not None:
                return _with_words_for_a_part(self, args, kwargs)
            raise ValueError(
                f"patch_words were given to a {type(self).__name__} that is not compressed. Load it with the `vwt` of "
                'the image processor that made them, or call vwt_hf.compress(model, {"method": "given"}); where '
                "the whole cannot be compressed, call it for the vision tower."
            )
        return super(PreTrainedModel, self).__call__(*args, **kwargs)

    return __call__


@torch.compiler.disable
def _with_words_for_a_part(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls a model with a compressed part, to which the model's forward may not hand the words on."""
    with call_with(model, GivenWords(kwargs.pop("patch_words"))):
        return model(*args, **kwargs)


def _generating(original: Any) -> Any:
    """Wraps `generate` to take `patch_words`: by itself it takes only arguments of `forward`, and repeats images."""

    @functools.wraps(original)
    def generate(self: Any, *args: Any, patch_words: Any = None, **kwargs: Any) -> Any:
        if patch_words is None:
            return original(self, *args, **kwargs)
        if setting_of(self) is None:
            raise ValueError(
                f"patch_words were given to `generate` of a {type(self).__name__}, of which no part is compressed. "
                "Compress it. Where it writes the text of a model whose vision tower alone is compressed, as in BLIP, "
                "compress that model itself or, as of InstructBLIP, leave patch_words out: the tower finds its own."
            )
        with call_with(self, words_to_generate_by(self, patch_words, args, kwargs)):
            return original(self, *args, **kwargs)

    return generate


def _explaining(original: Any) -> Any:
    """Wraps `Pipeline.__init__` to refuse `vwt` and say where it goes: some pipelines ignore unknown arguments."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, vwt: Any = NOT_GIVEN, **kwargs: Any) -> None:
        if vwt is not NOT_GIVEN:
            raise TypeError(
                f"vwt={shown(vwt)} was given to a pipeline, which hands it on to no model. Write pipeline(..., "
                'model_kwargs={"vwt": ...}), or compress the model and give that to the pipeline.'
            )
        original(self, *args, **kwargs)

    return __init__


def _refusing_for_two(part: str, original: Any) -> Any:
    """Wraps what makes a whole of two checkpoints to refuse `vwt`: it would reach the config of the whole alone.

    Args:
        part: what arguments for the vision tower begin with.
    """

    @functools.wraps(original)
    def made(cls: Any, *args: Any, vwt: Any = NOT_GIVEN, **kwargs: Any) -> Any:
        if vwt is not NOT_GIVEN:
            raise TypeError(
                f"vwt={shown(vwt)} was given for a {cls.__name__}, which hands it on to neither of its two models. "
                f"Write {part}_vwt=..., or call vwt_hf.compress for the vision tower within it."
            )
        return original(cls, *args, **kwargs)

    return made


_WRAPS: dict[tuple[type, str], Callable[[Any], Any]] = {
    (PreTrainedConfig, "from_dict"): reading_configs,
    (PreTrainedModel, "from_pretrained"): loading_models,
    (PreTrainedModel, "_from_config"): building_models,
    (PreTrainedModel, "save_pretrained"): saving_models,
    (PreTrainedModel, "_upload_modified_files"): uploading_models,
    (PreTrainedModel, "__call__"): _Calling,
    (GenerationMixin, "generate"): _generating,
    (ImageProcessingMixin, "from_pretrained"): loading_processors,
    (ImageProcessingMixin, "save_pretrained"): saving_processors,
    (ProcessorMixin, "save_pretrained"): saving_processors,
    (PreTrainedTokenizerBase, "from_pretrained"): loading_tokenizers,
    (Pipeline, "__init__"): _explaining,
    (Pipeline, "_upload_modified_files"): uploading_models,
    (VisionEncoderDecoderModel, "from_encoder_decoder_pretrained"): functools.partial(_refusing_for_two, "encoder"),
    (VisionTextDualEncoderModel, "from_vision_text_pretrained"): functools.partial(_refusing_for_two, "vision"),
}
"""The methods of transformers that `register` replaces, and what makes each replacement."""
