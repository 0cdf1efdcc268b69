"""Image processors of checkpoints, and what they and configs say of images: statistics, channels and patch size."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

# Not from the top: there transformers 5.17 offers it only with torchvision, which reading photographs does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, logging

from .checks import is_int, sides
from .hub_names import NotReached, kept_answer, may_be_on_hub
from .printable import printable, shown
from .shared_changes import SharedChange
from .weights import loaded_by, source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import ModelFacts


def require_checkpoint(checkpoint: str | os.PathLike[str]) -> None:
    """Raises `OSError` for the path of nothing, or of a file, which would be taken for a Hub id or read as JSON."""
    checkpoint = os.fspath(checkpoint)
    is_path = Path(checkpoint).is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") > 1
    if is_path and not Path(checkpoint).exists():
        raise FileNotFoundError(f"{checkpoint} does not exist; expected the folder of a model, or its Hub id.")
    if Path(checkpoint).is_file() and not checkpoint.endswith(".json"):  # transformers reads a preprocessor_config.json
        raise NotADirectoryError(f"{checkpoint} is a file; expected the folder of a model, or its Hub id.")


def load_processor(checkpoint: str | os.PathLike[str], **hub_kwargs: Any) -> Any:
    """The image processor of a Hub id or folder, read by `revision`, `subfolder`, `token` and so on.

    Raises:
        OSError: there is no such checkpoint, or it has no image processor.
        ValueError: its image processor is of a kind that transformers does not know, or its files are damaged.
    """
    require_checkpoint(checkpoint)
    try:
        with quiet_transformers():
            return AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False, vwt=False, **hub_kwargs)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # of what a stranger wrote, transformers may raise anything
        raise _unreadable("preprocessor_config.json", checkpoint, error) from error


def processor_of(model: PreTrainedModel, image_processor: Any = None) -> Any:
    """The image processor that a caller gave, or the one within the processor given; by default the checkpoint's.

    Raises:
        TypeError: what was given is none.
        ValueError: none was given, and `model` was not loaded from a place that has one.
    """
    if image_processor is not None:
        return inner_processor(image_processor)
    return load_beside(model, load_processor, "image processor", "image_processor=AutoImageProcessor")


def inner_processor(processor: Any) -> Any:
    """The image processor within a processor of texts and images; any other processor as it is.

    Raises:
        TypeError: it is none, such as the class of one, which would lose `vwt` for all.
    """
    inner = getattr(processor, "image_processor", processor)
    if not callable(inner) or isinstance(inner, type):
        raise _no_processor(inner)
    return inner


_SPACE = "▁"
"""The token of a space, with which transformers makes a T5 or MBart tokenizer without files."""


def load_tokenizer(checkpoint: str | os.PathLike[str], **hub_kwargs: Any) -> Any:
    """The text tokenizer of a Hub id or folder.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it has no tokenizer, or only a part of its files.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **hub_kwargs)
    require_vocabulary(tokenizer)
    return tokenizer


def require_vocabulary(tokenizer: Any) -> None:
    """Refuses a text tokenizer that knows special tokens alone, as transformers makes one of a config without files.

    A processor is judged by its own. What takes texts in any other way passes if it has no `get_vocab`.
    """
    own = getattr(tokenizer, "tokenizer", tokenizer)
    if hasattr(own, "get_vocab") and set(own.get_vocab()) - set(own.all_special_tokens) <= {_SPACE}:
        raise ValueError(
            f"the {type(own).__name__} knows no tokens but {len(own.get_vocab())} special ones, as where its files are "
            "missing; expected one that was loaded from a folder or Hub id with its tokenizer.json or vocabulary."
        )


def load_beside(model: PreTrainedModel, load: Callable[..., Any], what: str, instead: str) -> Any:
    """What `load` finds beside the weights of a model. An error calls it `what`, and tells what to give `instead`.

    Raises:
        ValueError: `model` was not loaded from a place that has it.
    """
    try:
        source = source_of(model)
        if not source:
            raise ValueError("it was loaded from nowhere")
        return load(source, **loaded_by(model))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).removesuffix(".")
        raise ValueError(
            f"the {type(model).__name__} has no {what} that can be loaded ({reason}); give one as "
            f"{instead}.from_pretrained(...)."
        ) from error


def without_words(image_processor: Any) -> Any:
    """An image processor that finds no words: as it is, or a copy if it does find some."""
    if getattr(image_processor, "vwt", None) is None:
        return image_processor
    copied = copy.deepcopy(image_processor)
    copied.vwt = None
    return copied


def patch_size_of(checkpoint: str) -> int:
    """Side of the square patches that the model of a Hub id or folder cuts, in pixels.

    Raises:
        ValueError: no config says it, as beside an image processor that was saved alone, or they are not square.
    """
    size = stated_patch_size(config_beside(checkpoint))
    if size is None or size[0] != size[1]:
        raise ValueError(
            f"{checkpoint} has no model config that says the side of its square patches; name a vision transformer, or "
            "give --patch-size where a command has it."
        )
    return size[0]


def config_beside(checkpoint: Any, **hub_kwargs: Any) -> Any:
    """The config of the model of a Hub id or folder, or `None`. Code in its repository is never run.

    The config of a model that only such code knows has the fields of its file.

    Raises:
        NotReached: it is on the Hub, and nothing says whether it is there.
        ValueError: its file is damaged.
    """
    try:
        with quiet_transformers():
            return _read_config(checkpoint, hub_kwargs)
    except OSError as error:
        require_checkpoint(checkpoint)
        if os.path.exists(checkpoint):
            raise _unreadable("config.json", checkpoint, error) from error
        with contextlib.suppress(ValueError):  # what is no Hub id
            if kept_answer(checkpoint, "config.json", **hub_kwargs) is _CACHED_NO_EXIST:
                return None
        reason = " ".join(str(error).split())
        raise NotReached(
            f"config.json of {printable(checkpoint)} cannot be had, which says what patches and words its model has: "
            f"load it once where the Hub can be reached, or give a folder that it was downloaded to. ({reason})"
        ) from error
    except Exception as error:  # of what a stranger wrote, transformers may raise anything
        raise _unreadable("config.json", checkpoint, error) from error


def _read_config(checkpoint: Any, hub_kwargs: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, **hub_kwargs)
    except ValueError:  # it is of a model that transformers does not know, or there is none
        fields = PreTrainedConfig.get_config_dict(checkpoint, **hub_kwargs)[0]
        return _as_written(fields) if fields else None


def _as_written(fields: dict[str, Any]) -> PreTrainedConfig:
    """A config with the fields of a config.json, unchecked; the objects within it become configs, too."""
    config = PreTrainedConfig()
    for name, value in fields.items():
        vars(config)[name] = _as_written(value) if isinstance(value, dict) and name != "vwt" else value
    return config


def _unreadable(name: str, checkpoint: Any, error: Exception) -> ValueError:
    """What to raise where transformers cannot take a file of a checkpoint and fails with `error`, which names none."""
    return ValueError(
        f"{name} of {printable(checkpoint)} holds what transformers cannot take ({type(error).__name__}: "
        f"{shown(str(error))}); expected the file as transformers writes it. Mend it, or save it again."
    )


def configs_within(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A config and those within it, and the dotted names by which they are reached."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from configs_within(value, f"{path}.{name}" if path else name)


def saved_setting(config: PreTrainedConfig | None) -> dict[str, Any] | None:
    """The setting in a config, or in the one part of it that has a setting, such as a compressed vision tower.

    `None` if there is none, or if several parts have one.
    """
    if config is None:
        return None
    saved = {path: part.vwt for path, part in configs_within(config) if isinstance(part.vwt, dict)}
    if "" in saved:
        return saved[""]
    return next(iter(saved.values())) if len(saved) == 1 else None


def stated_patch_size(config: Any) -> tuple[int, int] | None:
    """Height and width of patches, in pixels, if a model's config or an image processor states them."""
    return height_and_width(getattr(_of_images(config), "patch_size", None))


def height_and_width(size: Any) -> tuple[int, int] | None:
    """Height and width of patches as JSON states them, by one number or two; `None` if these are not possible."""
    size = sides(size)
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return None
    return (size[0], size[1]) if all(is_int(side) and 0 < side < 2**16 for side in size) else None


def stated_channels(config: Any) -> int | None:
    """The channels of images, if a model's config states a possible number."""
    channels: Any = getattr(_of_images(config), "num_channels", None)
    return channels if is_int(channels) and 0 < channels <= MOST_CHANNELS else None


def _of_images(config: Any) -> Any:
    """The part of a config that is about images."""
    # CLIP and its like, models of an image encoder and a text decoder, and those of maps around a backbone.
    for inner in ("vision_config", "encoder", "backbone_config"):
        part = getattr(config, inner, None)
        if part and (inner != "backbone_config" or hasattr(part, "patch_size")):
            config = part
    return config


MOST_CHANNELS = 1024
"""A config.json may be a stranger's, and memory is taken for each channel."""
_LARGEST_OF_UNIT = 2.0
"""A larger mean or standard deviation is of pixels up to 255, any other of pixels up to 1."""


def whole_images(made: Any) -> torch.Tensor:
    """The images, (batch, channels, height, width), of what an image processor made.

    Raises:
        ValueError: it cuts images into patches by itself, as SigLIP 2's for images of many sizes does.
    """
    pixel_values = made["pixel_values"]
    if pixel_values.dim() != 4:
        raise ValueError(
            f"The image processor gives pixel_values of shape {tuple(pixel_values.shape)}; expected whole images "
            "(batch, channels, height, width). Learn words with the image processor of a model that takes such images, "
            "with patches of the same size. What a model sees of padded patches (SigLIP 2 NaFlex) is drawn by the "
            "`decode` of its image processor, loaded with `vwt`."
        )
    return pixel_values


def processor_statistics(image_processor: Any, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, for each channel, by which a processor maps raw RGB in [0, 1] to the model's pixels.

    Raises:
        TypeError: it is no image processor.
        ValueError: it has statistics for another number of channels, or does not say what white is.
    """
    if not callable(image_processor) or not hasattr(image_processor, "do_normalize"):
        raise _no_processor(image_processor)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if not image_processor.do_normalize or mean is None or std is None:
        mean, std = 0.0, 1.0
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not isinstance(values, (int, float)) and len(values) != channels:
            grey = " Of grey images no words are learned or drawn, but of RGB." if len(values) == 1 else ""
            raise ValueError(
                f"the {type(image_processor).__name__}'s {name} has {len(values)} numbers; expected {channels}, one "
                f"for each channel of the images. Give the image processor that makes this model's images.{grey}"
            )
    # (255 · factor · x − mean) / std, with x in [0, 1], as (x − mean') / std'.
    white = white_of(image_processor)
    if white is None:
        raise ValueError(
            f"the {type(image_processor).__name__} neither rescales nor normalises images, so that nothing says which "
            "value white has. Give the image processor that makes this model's images."
        )
    return _each_channel(mean, white, channels), _each_channel(std, white, channels)


def _no_processor(given: Any) -> TypeError:
    kind = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
    return TypeError(
        f"image_processor is {kind}; expected a transformers image processor, as "
        "AutoImageProcessor.from_pretrained returns."
    )


def white_of(image_processor: Any) -> float | None:
    """The value of white pixels before a processor subtracts its mean; `None` if nothing says.

    A processor that does not rescale gets scaled images. Only its mean and standard deviation hint at their scale.
    """
    if getattr(image_processor, "do_rescale", True):
        return 255 * (getattr(image_processor, "rescale_factor", None) or 1 / 255)
    mean, std = getattr(image_processor, "image_mean", None), getattr(image_processor, "image_std", None)
    if not getattr(image_processor, "do_normalize", True) or mean is None or std is None:
        return None
    if not np.any(mean) and np.all(np.equal(std, 1)):
        return None
    return 255.0 if max(np.max(np.abs(mean)), np.max(np.abs(std))) > _LARGEST_OF_UNIT else 1.0


def model_statistics(model: ModelFacts, channels: int, wanted: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """As `processor_statistics`, for a model's image processor. Code in its repository is never run.

    Raises:
        NotReached: it is on the Hub, and nothing says whether it is there.
        OSError: it has a deviation that is not positive.
        ValueError: there is none, or it does not say; the caller may give what is `wanted`.
    """
    try:
        processor = model.image_processor
        if processor is None:
            if not model.source:
                raise ValueError("it was loaded from nowhere")
            processor = load_processor(model.source, **model.hub_kwargs)
        mean, std = processor_statistics(processor, channels)
    except (OSError, ValueError, ImportError, TypeError, OverflowError) as error:
        names = (IMAGE_PROCESSOR_NAME, PROCESSOR_NAME) if isinstance(error, OSError) else ()
        name = next((name for name in names if may_be_on_hub(model.source, name, model.hub_kwargs)), None)
        if name is not None:
            reason = " ".join(str(error).split())
            raise NotReached(
                f"{name} of {printable(model.source)} cannot be had, which says how the model's images are normalised: "
                f"load it once where the Hub can be reached, or give {wanted}. ({reason})"
            ) from error
        raise ValueError(
            f"Words and tolerances are in raw RGB, and {model.source or 'the model'} has no image processor that tells "
            f"how its images are normalised ({str(error).removesuffix('.')}). Give {wanted}."
        ) from error
    if not all(value > 0 for value in std):  # as of a damaged file, and not of a model without one
        raise OSError(
            f"{model.source or 'the model'}: image_std of its {type(processor).__name__} ({IMAGE_PROCESSOR_NAME}) is "
            f"{shown(processor.image_std)}; expected positive numbers. Correct it, or give {wanted}."
        )
    return mean, std


def _each_channel(values: Any, white: float, channels: int) -> tuple[float, ...]:
    listed = [values] * channels if isinstance(values, (int, float)) else list(values)
    return tuple(round(float(value) / white, 12) for value in listed)


def _quieten() -> Callable[[], None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def undo() -> None:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

    return undo


quiet_transformers = SharedChange(_quieten)
"""`with quiet_transformers():` hides transformers' progress bars and load reports; errors show."""


def described_processor(image_processor: Any) -> dict[str, Any]:
    """The class and the fields of an image processor.

    The class says whether it works by Pillow or torchvision, which resize to different pixels.
    """
    return {"class": type(image_processor).__name__, **image_processor.to_dict()}
