"""Image processors that make `patch_words` beside `pixel_values`.

An image processor without `vwt` is transformers' own. With a setting it becomes an instance of a subclass of its class,
of the same name. That finds on the host what becomes of each patch, as the model would.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor

from .config import ModelFacts, VWTConfig, naming_file
from .data_loading import as_tensor, listed
from .hub_names import NotReached
from .model_configs import PLAIN, plain_class
from .own_thread import in_own_thread
from .patches import Patches
from .pictures import seen_pictures
from .pixel_tables import are_levels, ends_with_values, look_up
from .plans import DROPPED, PATCH_WORDS, Grouped, Kept
from .printable import printable, shown
from .processors import (
    config_beside,
    height_and_width,
    processor_statistics,
    saved_setting,
    stated_channels,
    stated_patch_size,
)
from .saved_words import FOLDER, PROCESSOR_FOLDER
from .shared_changes import SharedChange, holding

logger = logging.getLogger(__name__)
AT_ONCE = 8
"""Images whose words are found together: few enough to stay in a core's cache."""


@dataclasses.dataclass(frozen=True)
class HostTokenizer:
    """How an image processor makes `patch_words`: a setting, and the size of the model's patches."""

    setting: VWTConfig
    """With the words and statistics that it needs (`VWTConfig.prepared`)."""
    patch_size: tuple[int, int]
    """Height and width of the model's patches, in pixels."""
    saved_as: str | None = None
    """Names the folder of its words, below that of its image processor (`VWTConfig.saved_as`)."""
    normalised_by: tuple[Any, Any] | None = None
    """Mean and deviation of the image processor, if the setting holds these too: its words fit no other images. `None`:
    the setting has none, or others that a user chose."""
    channels: int = 3
    """Of the model's images."""

    def __deepcopy__(self, memo: dict[int, Any]) -> HostTokenizer:
        return self  # nothing in it changes

    def to_dict(self) -> dict[str, Any]:
        """The field `vwt` of preprocessor_config.json."""
        fields = self.setting.to_dict() | {"patch_size": list(self.patch_size)}
        return fields if self.saved_as is None else fields | {"saved_as": self.saved_as}

    def words(self, made: Mapping[str, Any], tiles: list[int] | None = None) -> Any:
        """The words of the patches of images, in the form of `pixel_values`: a tensor, an array or a list of arrays.

        Args:
            made: what an image processor made. `pixel_values` are whole images (batch, channels, height, width);
                images in tiles (batch, tiles, channels, height, width); or padded patches, beside their
                `spatial_shapes` and `pixel_attention_mask`.
            tiles: of each image; others are padding, without words. `None`: tiles of zeros at the end are padding.

        Returns:
            int64 (batch, patches) or (batch, tiles, patches).
        """
        if not isinstance(made, Mapping) or "pixel_values" not in made:
            known = f"{', '.join(map(str, made))}, and no" if isinstance(made, Mapping) else "no dict of"
            raise ValueError(
                f"The image processor makes {known} pixel_values, of which patches could be cut. Load it without `vwt`."
            )
        values = made["pixel_values"]
        made = {name: made[name] for name in made if name in _READ}
        with contextlib.nullcontext() if os.getpid() == _PROCESS else _one_thread():
            if isinstance(values, (list, tuple)):
                each = [{name: as_tensor(own[i])[None] for name, own in made.items()} for i in range(len(values))]
                counts = [None] * len(each) if tiles is None else [[count] for count in tiles]
                return [self._words_of_batch(*one)[0].cpu().numpy() for one in zip(each, counts, strict=True)]
            found = self._words_of_batch({name: as_tensor(own) for name, own in made.items()}, tiles)
            return found if isinstance(values, torch.Tensor) else found.numpy()

    def _words_of_batch(self, made: dict[str, torch.Tensor], counts: list[int] | None) -> torch.Tensor:
        values = made["pixel_values"]
        if not len(values):
            return torch.empty(0, dtype=torch.int64, device=values.device)
        tiles = values.flatten(0, 1) if values.dim() == 5 else values
        words = self._words_of_patches(self.patches(made | {"pixel_values": tiles}))
        if values.dim() == 5:
            padding = _is_padding(values, counts)
            words = words.unflatten(0, padding.shape).masked_fill(padding[..., None], DROPPED)
        return words

    def _words_of_patches(self, patches: Patches) -> torch.Tensor:
        images = len(patches.pixel_values)
        if patches.device.type == "cpu" and patches.real is None and images > AT_ONCE:
            parts = (dataclasses.replace(patches, pixel_values=part) for part in patches.pixel_values.split(AT_ONCE))
            return torch.cat([self._words_of_patches(part) for part in parts])
        words = self.setting.patch_words(patches) if self.setting.shortens else None
        if words is None:  # each patch stays as it is
            words = patches.without_padding(torch.arange(patches.count, device=patches.device).repeat(images, 1))
        return words

    def patches(self, made: Mapping[str, torch.Tensor]) -> Patches:
        """The patches of a batch of whole images, or of padded patches; anything else is refused."""
        values = made["pixel_values"].float()
        if values.dim() == 3 and "spatial_shapes" in made:
            height, width = self.patch_size
            if values.shape[2] != self.channels * height * width:
                raise ValueError(
                    f"pixel_values {tuple(values.shape)} have {values.shape[2]} values for each patch; expected "
                    f"{self.channels * height * width}, of {self.channels} channels and {height} × {width} pixels. "
                    "Give images with as many channels, and no other patch_size than the model's."
                )
            return Patches.of_padded(values, self.patch_size, made["spatial_shapes"], made.get("pixel_attention_mask"))
        if values.dim() != 4 or values.shape[1] not in (1, 3, 4, self.channels):
            raise ValueError(
                f"pixel_values are {tuple(values.shape)}; expected (batch, channels, height, width), of which patches "
                "can be cut. Leave data_format out, if it was given; an image processor that makes something else by "
                "itself finds no words: load it without `vwt`."
            )
        if values.shape[1] != self.channels and any(getattr(self.setting, name, None) for name in _STATISTICS):
            raise ValueError(
                f"pixel_values {tuple(values.shape)} have {values.shape[1]} channels; expected {self.channels}, as "
                "`vwt` was made ready for. Convert the images, as by image.convert('RGB'), or load the image processor "
                "of a model of such images."
            )
        return Patches.of_images(values, self.patch_size)

    def plan(self, patches: Patches, patch_words: torch.Tensor) -> Kept | Grouped:
        """The plan by `patch_words`: which token each patch becomes part of. Words that do not fit are refused."""
        words = patches.of_words(patch_words)
        if not self.setting.shortens:
            return patches.grouped_by(words, packed=False, exponent=0)
        return self.setting.plan_of(patches, words)


def _is_padding(values: torch.Tensor, counts: list[int] | None) -> torch.Tensor:
    """Which tiles come after those of an image, bool (batch, tiles).

    Without `counts` of each image's tiles, these are all after the last that is not of zeros.
    """
    places = torch.arange(values.shape[1], device=values.device)
    if counts is None:
        tiles = (values.flatten(2).any(dim=2) * (places + 1)).amax(dim=1)
    else:
        tiles = torch.tensor(counts, device=values.device)
    return places >= tiles[:, None]


def _is_child() -> bool:
    """Whether `multiprocessing`, or the `multiprocess` of `datasets`, started this process, which may be by a fork."""
    libraries = map(sys.modules.get, ("multiprocessing.process", "multiprocess.process"))
    return any(library.parent_process() is not None for library in libraries if library is not None)


_PROCESS = None if _is_child() else os.getpid()
"""The process that imported this module; `None` if that may be a fork itself. In a fork, as by
`datasets.map(..., num_proc=...)`, torch would wait for threads that only the parent has."""


def _use_one_thread() -> Callable[[], None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(before)


_one_thread = SharedChange(_use_one_thread)
"""`with _one_thread():` has torch use one thread, as in a forked process."""


_READ = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
_STATISTICS = ("image_mean", "image_std")
_NORMALISING = (*_STATISTICS, "do_normalize", "do_rescale")


def _read_setting(processor: Any) -> Any:
    held = processor.__dict__.get("vwt")
    return held.to_dict() if isinstance(held, HostTokenizer) else held


def _write_setting(processor: Any, vwt: Any) -> None:
    processor.__dict__.pop("vwt", None)
    plain = plain_class(type(processor))
    if _reads_videos(plain):  # a model finds the words of videos itself
        return
    if vwt is None or vwt is False:
        processor.__class__ = plain
    else:
        processor.__dict__["vwt"] = vwt
        processor.__class__ = processor_subclass(plain)


SETTING = property(_read_setting, _write_setting, doc="The setting by which it makes `patch_words`, or `None`.")
"""The field `vwt` of transformers' image processors."""


def _reads_videos(processor_class: type) -> bool:
    return any(kind.__name__ == "BaseVideoProcessor" for kind in processor_class.__mro__)


_preprocessed: contextvars.ContextVar[Any] = contextvars.ContextVar("vwt_hf preprocessed", default=None)
"""Within a call of an image processor: `_form` of the pixels that `preprocess` made words of, and their tiles."""
_tiles: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("vwt_hf tiles", default=None)
"""Within `preprocess`: how many tiles each image had before images were padded to as many."""


def _form(values: Any) -> Any:
    """The type and shapes of pixels."""
    parts = values if isinstance(values, (list, tuple)) else [values]
    return type(values), [np.shape(part) for part in parts]


class Tokenizing:
    """What an image processor with a setting can do beyond its class: make `patch_words`, and draw them."""

    vwt = SETTING

    @property
    def tokenizer_of_patches(self) -> HostTokenizer:
        """What makes its `patch_words`; an error if its setting came from a dict or was assigned, and not loaded."""
        held = self.__dict__.get("vwt")
        if not isinstance(held, HostTokenizer):
            raise ValueError(
                f"This {type(self).__name__} has the setting {shown(held)} and was not made ready for it. Load it "
                "with from_pretrained(..., vwt=...)."
            )
        return held

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As `preprocess`. If the class's own `__call__` changes pixels after it, the words are of the changed ones."""
        call: Any = super().__call__  # type: ignore[misc]
        if call.__module__.startswith("transformers."):  # which calls `preprocess` and no more
            return call(*args, **kwargs)
        with holding(_preprocessed, None):
            made = call(*args, **kwargs)
            # Pixels of another form than `preprocess` gave, or of another name, are for another use.
            form, tiles = _preprocessed.get() or (None, None)
            if PATCH_WORDS in made and _form(made.get("pixel_values")) == form:
                made[PATCH_WORDS] = self.tokenizer_of_patches.words(made, tiles)
        return made

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """As without `vwt`, with `patch_words` beside `pixel_values`."""
        self.require_ready(**{name: kwargs[name] for name in _NORMALISING if kwargs.get(name) is not None})
        with holding(_tiles, None):
            made = super().preprocess(images, *args, **kwargs)  # type: ignore[misc]
            tiles = _tiles.get()
        if self.__dict__.get("vwt") is None:  # made by its class, which gives it no setting
            return made
        if tiles is None and hasattr(plain_class(type(self)), "_pad_for_batching"):  # it was told not to pad
            tiles = [len(one) for one in made["pixel_values"]]
        made[PATCH_WORDS] = self.tokenizer_of_patches.words(made, tiles)
        _preprocessed.set((_form(made["pixel_values"]), tiles))
        return made

    def _pad_for_batching(self, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
        """As without `vwt`, for image processors that have it: pads images to the same number of tiles."""
        _tiles.set([len(tiles) for tiles in pixel_values])
        return super()._pad_for_batching(pixel_values, *args, **kwargs)  # type: ignore[misc]

    def require_ready(self, **given: Any) -> None:
        """Raises `ValueError` for a setting that was assigned and not loaded, or loaded for another mean or deviation.

        `given` is what a call gives of `_NORMALISING` in place of the image processor's own.
        """
        held = None if self.__dict__.get("vwt") is None else self.tokenizer_of_patches
        if held is None or held.normalised_by is None:
            return
        now = _normalises_by(self, **given)
        if now is None or all(map(_are_same, now, held.normalised_by)):
            return
        raise ValueError(
            f"The {type(self).__name__} has image_mean and image_std {shown(now)}, and its `vwt` was made ready for "
            f"{shown(held.normalised_by)}; without do_normalize they are 0 and 1. Load it with them: "
            "from_pretrained(..., image_mean=..., image_std=..., vwt=...), or with do_normalize=False."
        )

    def _preprocess(self, *args: Any, **steps: Any) -> Any:
        """As without `vwt`, but the values of pixels are looked up if that gives the same."""
        preprocess = super()._preprocess  # type: ignore[misc]
        if len(args) == 1 and ends_with_values(plain_class(type(self)), steps) and are_levels(args[0]):
            of_levels = {"do_rescale": False, "do_normalize": False, "return_tensors": None}
            made = preprocess(*args, **steps | of_levels)
            if are_levels(made["pixel_values"]):
                made["pixel_values"] = look_up(self, made["pixel_values"], steps)
                return made.convert_to_tensors(steps.get("return_tensors"))
        return preprocess(*args, **steps)

    def decode(self, patch_words: Any, images: Any) -> list[Any]:
        """Pictures of what the model still sees: each patch as its token shows it, pale if it has none.

        Args:
            patch_words: as this image processor made them, of all images or of one.
            images: the images; or what this image processor made of them, or its `pixel_values` if these are no padded
                patches, for a batch, one image or a list. Floating-point arrays or tensors with channels first are
                taken for `pixel_values`: if they are images, give what this image processor made of them.

        Returns:
            For each image a `PIL.Image.Image`, of the size that the model gets.

        Raises:
            ValueError: the words are of another number of images or patches, or of another kind of setting.
        """
        from PIL import Image

        images = images if isinstance(images, Mapping) else listed(images)
        if _are_values(images):
            images = {"pixel_values": images}
        elif not isinstance(images, Mapping):
            preprocess = super().preprocess  # type: ignore[misc]
            try:  # some make tensors alone, or pad images to one size for these alone
                images = preprocess(images, return_tensors="pt")
            except (RuntimeError, ValueError):  # they are of several sizes, and torch or transformers stacks them
                images = preprocess(images)
        if images.get("pixel_values") is None:
            raise ValueError(
                f"images are a dict without pixel_values (its fields: {', '.join(map(shown, images)) or 'none'}); "
                "expected images, or what this image processor made of them."
            )
        patch_words, values = listed(patch_words), images["pixel_values"]
        if not len(values):
            return []
        if (rows := listed(values)) is not values:  # as `datasets` has images of several sizes
            values = list(map(as_tensor, rows))
        if isinstance(values, (list, tuple)) and len({np.shape(one) for one in values}) > 1:  # of several sizes
            if len(patch_words) != len(values):
                raise ValueError(f"patch_words are of {len(patch_words)} images, and there are {len(values)}.")
            own = {name: list(listed(images[name])) for name in images if name in _READ}
            return [
                picture
                for index, words in enumerate(patch_words)
                for picture in self.decode(
                    as_tensor(words)[None], {name: as_tensor(each[index])[None] for name, each in own.items()}
                )
            ]
        tokenizer = self.tokenizer_of_patches
        made, words = _as_batch(images, patch_words)
        patches = tokenizer.patches(made)
        plan = tokenizer.plan(patches, words)
        mean, std = processor_statistics(self, patches.channels)
        setting = tokenizer.setting
        seen = setting.seen(patches, plan) if setting.shortens else patches.seen(plan)
        pictures = [(one * 255).round().to(torch.uint8) for one in seen_pictures(patches, plan, seen, mean, std)]
        return [Image.fromarray(picture.squeeze(-1).numpy()) for picture in pictures]

    def to_dict(self) -> dict[str, Any]:
        """As without `vwt`, with the setting."""
        fields = super().to_dict()  # type: ignore[misc]
        return fields if self.vwt is None else fields | {"vwt": self.vwt}

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (plain_class(type(self)),), self.__dict__


def _as_batch(images: Mapping[str, Any], patch_words: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch of whole images or padded patches, and its words, (batch, patches): of a batch, one image, or tiles."""
    made = {name: as_tensor(images[name]) for name in images if name in _READ}
    if made["pixel_values"].dim() == (2 if "spatial_shapes" in made else 3):  # one image
        made = {name: value[None] for name, value in made.items()}
    words = as_tensor(np.asarray(patch_words) if isinstance(patch_words, list) else patch_words)
    words = words[None] if words.dim() == 1 else words.flatten(0, -2)
    values = made["pixel_values"]
    words = words.to(values.device)
    tiles = values.flatten(0, 1) if values.dim() == 5 else values
    if tiles.dim() == 4 and len(tiles) == len(words):  # without tiles of padding, which have no words
        real = (words != DROPPED).any(dim=1)
        if values.dim() == 4:  # tiles of one image, with padding after them; or images, each of which has words
            real |= tiles.flatten(1).any(dim=1)
            real = ~_is_padding(real[None, :, None], None)[0]
            real[0] = True
        tiles, words = tiles[real], words[real]
    made["pixel_values"] = tiles
    return made, words


@functools.cache
def processor_subclass(plain: Any) -> Any:
    """The class, or its subclass of the same name, that makes `patch_words` and saves its setting."""
    if issubclass(plain, Tokenizing):
        return plain
    body = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "model_input_names": [*plain.model_input_names, PATCH_WORDS],
        PLAIN: plain,
    }
    return type(plain.__name__, (Tokenizing, plain), body)


def _empty(plain: Any) -> BaseImageProcessor:
    """An image processor without fields, which `pickle` and `copy` fill."""
    processor_class = processor_subclass(plain)
    return processor_class.__new__(processor_class)


def follow(processor: Any, source: Any, hub_kwargs: dict[str, Any], given: Collection[str] = ()) -> None:
    """Prepares an image processor for the setting in its own file, which a stranger may have written.

    Args:
        given: the fields that it was given where it was loaded, in place of those in its file.
    """
    vwt = processor.vwt
    if vwt is None:
        processor.vwt = None  # its class may be that of one with a setting
        return
    with naming_file(f"of the image processor of {source}", "image processor"):
        saved, patch_size = parse_vwt(vwt)
        assert saved is not None  # else there would be no `vwt`
        try:
            beside = config_beside(source, **hub_kwargs)
        except NotReached:
            if patch_size is None:
                raise
            beside = None  # a file that says the size of patches does without it
        setting = saved
        if isinstance(vwt, dict) and not set(given).isdisjoint((*_NORMALISING, "rescale_factor")):
            setting = parse_vwt(_with_own_statistics(vwt, processor, beside))[0] or saved
        _prepare(processor, setting, patch_size, beside, source, hub_kwargs, PROCESSOR_FOLDER, trusted=False)
        _warn_of_another(saved, saved_setting(beside), source)


def _warn_of_another(setting: VWTConfig, of_model: dict[str, Any] | None, source: Any) -> None:
    """Warns if an image processor and the model beside it were saved with settings that make different words."""
    with contextlib.suppress(TypeError, ValueError):  # loading the model says what is wrong
        model_setting = VWTConfig.parse(of_model)
        if model_setting is None or not model_setting.searches:
            return
        own, other = setting.choice, model_setting.choice
        if any(own.get(name) != other.get(name) for name in own.keys() | other.keys()):
            logger.warning(
                f"The image processor of {source} was saved with vwt={own}, and the model with {other}: what is given "
                "both goes by the words of the image processor. Load and save it with the `vwt` of the model."
            )


def apply(processor: Any, vwt: Any, source: Any, hub_kwargs: dict[str, Any]) -> None:
    """Gives a new image processor the setting that a user asks for, whatever its own file says."""
    saved = processor.vwt
    processor.vwt = None
    setting, patch_size = parse_vwt(vwt)
    if setting is None or _reads_videos(type(processor)):
        return
    model_config = config_beside(source, **hub_kwargs)
    known, folder = saved_setting(model_config), FOLDER
    if known is None and isinstance(saved, dict):
        known, folder = saved, PROCESSOR_FOLDER
        patch_size = patch_size or stated_patch_size(model_config) or height_and_width(saved.get("patch_size"))
    if known is not None:
        setting = setting.with_saved(_with_own_statistics(known, processor, model_config))
    _prepare(processor, setting, patch_size, model_config, source, hub_kwargs, folder, trusted=True)


def parse_vwt(vwt: Any) -> tuple[VWTConfig | None, tuple[int, int] | None]:
    """A setting, and the patch size, if its dict has one."""
    if not isinstance(vwt, dict) or "patch_size" not in vwt:
        return VWTConfig.parse(vwt), None
    fields = dict(vwt)
    size = fields.pop("patch_size")
    patch_size = height_and_width(size)
    if patch_size is None:
        raise ValueError(f"vwt['patch_size'] is {shown(size)}; expected height and width of a patch, in pixels.")
    return VWTConfig.parse(fields), patch_size


def _prepare(
    processor: Any,
    setting: VWTConfig,
    patch_size: tuple[int, int] | None,
    model_config: Any,
    source: Any,
    hub_kwargs: dict[str, Any],
    folder: str,
    *,
    trusted: bool,
) -> None:
    """Gives an image processor a setting, with all that it needs to find words.

    `folder` and `trusted` are `words_folder` and `trusted` of `ModelFacts`.
    """
    _require_finding(processor, setting, source)
    patch_size = patch_size or stated_patch_size(model_config) or stated_patch_size(processor)
    if patch_size is None:
        raise ValueError(
            f"{source} has no model config that says the size of its patches, by which the image processor is to "
            "cut. Give it beside the setting: vwt={'patch_size': 16, ...}."
        )
    channels = _channels(processor, vars(setting), model_config)
    hub_kwargs = {name: value for name, value in hub_kwargs.items() if value is not None}
    if os.path.isdir(str(source)):
        hub_kwargs.pop("revision", None)
    facts = ModelFacts(
        str(source), patch_size, channels, None, trusted, hub_kwargs, words_folder=folder, image_processor=processor
    )
    saved_as = getattr(setting, "saved_as", None) if folder == PROCESSOR_FOLDER else None
    ready = in_own_thread(setting.prepared, facts)
    normalised_by = _normalises_by(processor) if _has_statistics(ready, processor) else None
    processor.vwt = HostTokenizer(ready, patch_size, saved_as, copy.deepcopy(normalised_by), channels)


def _require_finding(processor: Any, setting: VWTConfig, source: Any) -> None:
    """Refuses a setting that finds no words, and an image processor whose images have no patches to find them of."""
    if not setting.searches:
        raise ValueError(
            f"method={setting.method!r} goes by patch_words that something else makes, and an image processor is to "
            "make them. Load it with the setting to find them by, as method='intra' or 'inter'."
        )
    names = processor.model_input_names
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"model_input_names of the image processor of {printable(source)} is {shown(names)}; expected a list of "
            "names, as ['pixel_values']. Mend its preprocessor_config.json, or load it without `vwt`."
        )
    if "pixel_values" not in names or "image_grid_thw" in names:
        raise ValueError(
            f"the {plain_class(type(processor)).__name__} makes {shown(names)}; expected pixel_values of whole "
            "images, of which patches can be cut. Load it without `vwt`."
        )


def _channels(processor: Any, fields: Mapping[str, Any], model_config: Any) -> int:
    """Channels of the images: as many as the model's config says, or else as an image processor, or the fields of a
    setting, have numbers for."""
    stated = stated_channels(model_config)
    if stated is not None:  # VitMatte's image processor adds a channel, for which it has no mean
        return stated
    values = [getattr(processor, name, None) for name in _STATISTICS] + [fields.get(name) for name in _STATISTICS]
    return next((len(numbers) for numbers in values if isinstance(numbers, (list, tuple))), 3)


def _normalises_by(processor: Any, **given: Any) -> tuple[Any, Any] | None:
    """Mean and deviation by which an image processor normalises; `None` if it takes pixels as they are.

    Arguments that a call has `given` (`_NORMALISING`) take the place of its own.
    """
    stated = {name: given.get(name, getattr(processor, name, None)) for name in _NORMALISING}
    if stated["do_normalize"] is False:
        return None if stated["do_rescale"] is False else (0.0, 1.0)
    return stated["image_mean"], stated["image_std"]


def _are_same(values: Any, others: Any) -> bool:
    """Whether means or deviations are equal; a single number stands for each channel."""
    if values is None or others is None:
        return values is others
    shapes = {np.shape(values), np.shape(others)} - {()}
    return len(shapes) < 2 and bool(np.allclose(values, others))


def _has_statistics(setting: VWTConfig, processor: Any) -> bool:
    """Whether the mean and deviation that a setting has are those of an image processor."""
    known = {name: values for name in _STATISTICS if (values := getattr(setting, name, None)) is not None}
    if not known or any(getattr(processor, name, None) is None for name in _STATISTICS):
        return False
    stated = _statistics_of(processor, len(next(iter(known.values()))))
    return bool(stated) and all(np.allclose(values, stated[name]) for name, values in known.items())


def _with_own_statistics(saved: dict[str, Any], processor: Any, model_config: Any) -> dict[str, Any]:
    """A setting that was saved, with the mean and deviation of this image processor in place of those that it holds."""
    stated = _statistics_of(processor, _channels(processor, saved, model_config))
    return saved | {name: values for name, values in stated.items() if name in saved}


def _statistics_of(processor: Any, channels: int) -> dict[str, list[float]]:
    """`processor_statistics` by the names of a setting's fields; none if the image processor does not tell them."""
    try:
        return dict(zip(_STATISTICS, map(list, processor_statistics(processor, channels)), strict=True))
    except (TypeError, ValueError, OverflowError):
        return {}


def _are_values(images: Any) -> bool:
    """Whether `images` are `pixel_values`, in any form that an image processor gives: floats with channels first.

    An empty list counts, too.
    """
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    if not all(isinstance(one, (torch.Tensor, np.ndarray)) for one in listed):
        return False
    tensors = map(as_tensor, listed)
    return all(one.is_floating_point() and one.dim() > 2 and one.shape[-3] in (1, 3, 4) for one in tensors)
