"""Random cases for test_fuzz.py: any family, images of any size and kind, and any setting that fits them.

A `Case` is plain data, so that what hypothesis prints of a failing one is all that it takes to repeat it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from hypothesis import strategies as st

import tiny
from settings import STATISTICS
from vwt_hf import VisualVocabulary, VWTConfig, restore
from vwt_hf.compress import lexicon_of
from vwt_hf.families import family_of
from vwt_hf.patches import Patches
from vwt_hf.words import _SAME as SAME
from vwt_hf.words import patch_grid, patchify

LARGEST = 7
"""Rows and columns of patches, at most."""
HALVES = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}


def _tiles(noise: torch.Tensor) -> torch.Tensor:
    height, width = noise.shape[1:]
    return noise[:, :4, :4].repeat(1, -(-height // 4), -(-width // 4))[:, :height, :width]


def _eight_bits(noise: torch.Tensor) -> torch.Tensor:
    return (noise.mul(64).add(128).clamp(0, 255).round() / 255 - 0.5) / 0.5


def _with_flat_rows(image: torch.Tensor, rows: slice, value: float) -> torch.Tensor:
    image = image.clone()
    image[:, rows] = value
    return image


def _letterbox(noise: torch.Tensor) -> torch.Tensor:
    band = max(1, noise.shape[1] // 4)
    return _with_flat_rows(_with_flat_rows(_eight_bits(noise), slice(band), -1.0), slice(-band, None), -1.0)


def _checker(noise: torch.Tensor) -> torch.Tensor:
    rows, columns = (torch.arange(size) for size in noise.shape[1:])
    return ((rows.unsqueeze(1) + columns) % 2 * 2.0 - 1).expand_as(noise).clone()


IMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "noise": lambda noise: noise,
    "zeros": torch.zeros_like,
    "white": torch.ones_like,
    "one colour": lambda noise: noise[:, :1, :1].expand_as(noise).clone(),
    "faint": lambda noise: 1 + 0.01 * noise,
    "half flat": lambda noise: _with_flat_rows(noise, slice(noise.shape[1] // 2), 0.7),
    "gradient": lambda noise: torch.linspace(-1, 1, noise.shape[2]).expand_as(noise).clone(),
    "checker": _checker,
    "tiles": _tiles,
    "8 bits": _eight_bits,
    "letterbox": _letterbox,
}
"""Kinds of images, (3, height, width), of noise of that shape."""


def sample_image(kind: str, seed: int, height: int, width: int) -> torch.Tensor:
    return IMAGES[kind](torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed)))


@dataclasses.dataclass(frozen=True)
class Words:
    """Which words a vocabulary has: those cut from the case's images, zeros, random ones, and some of these again."""

    cut: tuple[tuple[int, int], ...] = ()
    """(image, patch), each modulo how many there are."""
    zeros: int = 0
    random: int = 0
    seed: int = 0
    repeated: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, a batch of images and a setting."""

    name: str
    image_size: int | tuple[int, int]
    """That the model is made for."""
    patch_size: int
    attention: str
    size: tuple[int, int]
    """Height and width of the images; of the largest, where images are padded."""
    images: tuple[tuple[str, int], ...]
    """Kind and seed of each."""
    setting: Fields
    """Fields of a `VWTConfig`, but for the vocabulary."""
    words: Words | None = None
    interpolate: bool = False
    shapes: tuple[tuple[int, int], ...] = ()
    """Rows and columns of patches of each image, where images are padded."""
    hidden_states: bool = False
    earlier: Fields = dataclasses.field(default_factory=dict)
    """Fields of a setting that the model has before."""

    @property
    def patches(self) -> int:
        """Of an image, padding included."""
        return (self.size[0] // self.patch_size) * (self.size[1] // self.patch_size)


def every_model() -> list[str]:
    """The names of all tiny models, of every family."""
    return [*tiny.MODELS]


def new_model(case: Case) -> transformers.PreTrainedModel:
    """The case's model, which was never called."""
    model = tiny.tiny_model(case.name, image_size=case.image_size, patch_size=case.patch_size)
    if case.attention != model.config._attn_implementation:
        model.set_attn_implementation(case.attention)
    return model


_in_use: dict[Any, transformers.PreTrainedModel] = {}


@contextlib.contextmanager
def plain_model(case: Case) -> Iterator[transformers.PreTrainedModel]:
    """The case's model, which earlier cases compressed and restored; it is restored at the end."""
    key = (case.name, case.image_size, case.patch_size, case.attention)
    model = _in_use.pop(key, None) or new_model(case)
    yield model
    _in_use[key] = restore(model)  # a case that failed leaves nothing to those that follow


def pixel_values(case: Case) -> torch.Tensor:
    """The case's images, (batch, 3, height, width)."""
    images = [sample_image(kind, seed, *case.size) for kind, seed in case.images]
    return torch.stack(images) if images else torch.zeros(0, 3, *case.size)


def inputs(case: Case, model: transformers.PreTrainedModel) -> dict[str, Any]:
    """What the model is called with."""
    images = pixel_values(case)
    given: dict[str, Any] = _padded(case, images) if facts_of(case.name).padded else {"pixel_values": images}
    if facts_of(case.name).masks:  # it shuffles patches: by this, into the order they have
        given["noise"] = torch.arange(case.patches, dtype=torch.float32).expand(len(images), -1)
    if hasattr(model, "text_model"):
        given["input_ids"] = torch.tensor([[97, 5, 98], [97, 7, 98]])
    return given | _asked(case.interpolate)


def _asked(interpolate: bool) -> dict[str, bool]:
    return {"interpolate_pos_encoding": True} if interpolate else {}


def _padded(case: Case, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The upper left of each image, of as many patches as `shapes` says, as SigLIP 2 takes them."""
    size = case.patch_size
    patches = torch.zeros(len(images), case.patches, 3 * size**2)
    for row, image, (high, wide) in zip(patches, images, case.shapes, strict=True):
        cut = patchify(image[None, :, : high * size, : wide * size], (size, size))[0]
        row[: high * wide] = cut.unflatten(1, (3, size**2)).transpose(1, 2).flatten(1)
    shapes = torch.tensor(case.shapes, dtype=torch.int64).view(-1, 2)
    mask = torch.arange(case.patches) < shapes.prod(1, keepdim=True)
    return {"pixel_values": patches, "pixel_attention_mask": mask.int(), "spatial_shapes": shapes}


def alone(given: dict[str, Any], image: int) -> dict[str, Any]:
    """What the model is called with for one image of a batch."""
    shared = ("input_ids", "interpolate_pos_encoding")
    return {name: value if name in shared else value[image : image + 1] for name, value in given.items()}


def setting_of(case: Case, **fields: Any) -> VWTConfig:
    """The case's setting, with `fields` instead of its own."""
    found = case.setting | fields
    if case.words is not None:
        found["vocabulary"] = _vocabulary(case, case.words)
    return VWTConfig(**found)


def _vocabulary(case: Case, words: Words) -> VisualVocabulary:
    size = case.patch_size
    mean, std = (torch.tensor(case.setting[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
    images = pixel_values(case)
    found = []
    for image, patch in words.cut if len(images) else ():
        patches = patchify(images[image % len(images)][None], (size, size))[0]
        found.append(patches[patch % len(patches)].view(1, 3, size, size) * std + mean)
    found += [mean.expand(1, 3, size, size)] * words.zeros
    generator = torch.Generator().manual_seed(words.seed)
    found.append(torch.rand(words.random + (not found and not words.random), 3, size, size, generator=generator))
    made = torch.cat(found)
    return VisualVocabulary(torch.cat((made, made[: words.repeated])))


def tossed_up(case: Case, model: transformers.PreTrainedModel, given: dict[str, Any]) -> bool:
    """Whether rounding decides about a word: two are, or one and the threshold, as far apart as is taken for equal.

    Float32 cannot tell such words apart in every shape of a matrix product.
    """
    lexicon = lexicon_of(model)
    if lexicon is None:
        return False
    size = (case.patch_size, case.patch_size)
    values = given["pixel_values"]
    grid = None if values.dim() == 3 else patch_grid(values, size)
    pixels = Patches(values, size, 0, grid).pixels_as_words().double()
    cosines = torch.nn.functional.normalize(pixels, dim=-1) @ lexicon.on(torch.device("cpu")).words.double().T
    best = cosines.amax(dim=-1, keepdim=True)
    at_the_edge = (best - cosines - SAME).abs() < 0.7 * SAME
    return bool(at_the_edge.any() or ((best - 1 + case.setting["threshold"] + SAME).abs() < 0.7 * SAME).any())


def outputs(model: transformers.PreTrainedModel, given: dict[str, Any], case: Case) -> dict[str, torch.Tensor]:
    """Every floating-point tensor that the model gives out, by its path."""
    asked = {"output_hidden_states": True} if case.hidden_states else {}
    with torch.no_grad():
        return dict(_named(model(**given, **asked)))


def _named(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, (dict, tuple, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in items:
            yield from _named(part, f"{path}.{name}" if path else str(name))


def of_image(found: dict[str, torch.Tensor], image: int) -> dict[str, torch.Tensor]:
    """What a batch's outputs say about one image; what they say about texts alone is left out."""
    by_image = {name: value.T if name == "logits_per_text" else value for name, value in of_images(found).items()}
    return {name: value[image : image + 1] for name, value in by_image.items()}


def of_images(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs but for those of texts alone."""
    return {name: value for name, value in found.items() if not name.startswith("text_") and name != "logit_scale"}


def real_alone(found: dict[str, torch.Tensor], given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The outputs with zeros for the patches that are padding, for which a plain model's mean nothing."""
    mask = given.get("pixel_attention_mask")
    if mask is None:
        return found
    return {
        name: value * mask.unsqueeze(-1) if value.dim() == 3 and value.shape[:2] == mask.shape else value
        for name, value in found.items()
    }


def require_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], near: float = 1e-4) -> None:
    """Asserts that outputs have the same names and shapes, and differ by no more than `near` of the largest value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        one = found[name]
        assert one.shape == value.shape, f"{name}: {tuple(one.shape)}, not {tuple(value.shape)}"
        assert torch.equal(one.isnan(), value.isnan()), f"{name}: NaN elsewhere"
        if value.numel():
            worst = (one - value).abs().nan_to_num(0.0).max().item()
            assert worst <= near * max(1.0, value.nan_to_num(0.0).abs().max().item()), f"{name}: off by {worst:.3g}"


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts that outputs are the same, bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0)), f"{name}: not the same bits"


Fields = dict[str, Any]
Drawing = Callable[[st.DrawFn, int], Fields]
"""Draws the fields of a setting for images of so many patches."""


@st.composite
def cases(draw: st.DrawFn, name: str, drawing: Drawing) -> Case:
    """Cases of the model of that name, with settings as `drawing` draws them."""
    facts = facts_of(name)
    patch_size = draw(st.sampled_from([4, 3, 14]))

    def side() -> int:
        return draw(st.integers(1, LARGEST)) * patch_size + draw(st.integers(0, patch_size - 1))

    def two() -> tuple[int, int]:
        return side(), side()

    interpolate = facts.interpolates_if_asked and draw(st.booleans())
    # What takes images of other sizes is made for few, and so the same model for many cases.
    image_size: int | tuple[int, int] = draw(st.sampled_from([2, 5])) * patch_size
    size = (image_size, image_size)
    if facts.interpolates or interpolate:
        size = two()
    elif facts.oblong and draw(st.booleans()):
        image_size = size = two()
    else:
        image_size = side()
        size = (image_size, image_size)
    rows, columns = size[0] // patch_size, size[1] // patch_size
    image = st.tuples(st.sampled_from([*IMAGES]), st.integers(0, 9))
    attention = draw(st.sampled_from(facts.attentions))
    number = draw(st.sampled_from([1, 2, 3, 4] + [0] * takes_none(name, attention)))
    images = draw(st.lists(image, min_size=number, max_size=number))
    shapes: list[tuple[int, int]] = []
    if facts.padded:
        shapes = [(draw(st.integers(1, rows)), draw(st.integers(1, columns))) for _ in images]
    setting = drawing(draw, rows * columns)
    return Case(
        name=name,
        image_size=image_size,
        patch_size=patch_size,
        attention=attention,
        size=size,
        images=tuple(images),
        setting=setting,
        words=draw_words(draw) if setting.get("method") == "inter" else None,
        interpolate=interpolate,
        shapes=tuple(shapes),
        hidden_states=draw(st.booleans()),
        earlier=draw_intra(draw, rows * columns),
    )


class Facts(NamedTuple):
    """What images a model takes, and how it can attend."""

    interpolates: bool
    """Whether it takes images of any size."""
    interpolates_if_asked: bool
    padded: bool
    """Whether it takes the padded patches of images of many sizes."""
    oblong: bool
    """Whether it can be made for images that are not square."""
    masks: bool
    """Whether it shuffles patches by random numbers, which it takes."""
    attentions: list[str]


@functools.cache
def facts_of(name: str) -> Facts:
    """What the model of that name takes."""
    model = tiny.tiny_model(name)
    family = family_of(model)
    padded = family.padded is not None
    always = padded or _takes(name)
    return Facts(
        interpolates=always,
        interpolates_if_asked=not always and _takes(name, interpolate=True),
        padded=padded,
        oblong=not padded and _takes(name, (16, 24), [(16, 24)]),
        masks=family.masks is not None,
        attentions=["sdpa", "eager"] if model._supports_sdpa else ["eager"],
    )


def _takes(
    name: str, image_size: Any = 24, sizes: Iterable[tuple[int, int]] = ((16, 20), (28, 36)), interpolate: bool = False
) -> bool:
    """Whether the plain model, made for images of one size, answers about images of others, small and large."""
    try:
        model = tiny.tiny_model(name, image_size=image_size)
        return all(tiny.answers(model, torch.zeros(1, 3, *size), **_asked(interpolate)).numel() for size in sizes)
    except (RuntimeError, TypeError, ValueError):
        return False


@functools.cache
def takes_none(name: str, attention: str) -> bool:
    """Whether the plain model takes an empty batch."""
    case = Case(name, 32, 4, attention, (32, 32), images=(), setting={})
    model = new_model(case)
    try:
        outputs(model, inputs(case, model), case)
    except RuntimeError:
        return False
    return True


def draw_words(draw: st.DrawFn) -> Words:
    return Words(
        cut=tuple(draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, LARGEST**2 - 1)), max_size=4))),
        zeros=draw(st.integers(0, 2)),
        # From 256 words on, of patches of as many values, most are never looked at.
        random=draw(st.one_of(st.integers(0, 30), st.just(520))),
        seed=draw(st.integers(0, 9)),
        repeated=draw(st.integers(0, 3)),
    )


def draw_inter(draw: st.DrawFn, patches: int) -> Fields:
    """A setting by words."""
    some = st.sampled_from([0.3, 0, 1e-3, 0.1, 0.7, 1, 1.5, 2])
    return _words_at(draw, draw(st.one_of(some, st.floats(0, 2))))


def _words_at(draw: st.DrawFn, threshold: float) -> Fields:
    return {
        "method": "inter",
        "threshold": threshold,
        "layout": draw(st.sampled_from(["auto", "packed", "padded"])),
        "proportional_attention": draw(st.booleans()),
        **draw(st.sampled_from([HALVES, STATISTICS])),
    }


def draw_intra(draw: st.DrawFn, patches: int) -> Fields:
    """A setting by an image's own patches, of which any share stays."""
    kind = draw(st.sampled_from(["share", "ratio", "number"]))
    if kind == "share":
        return _patches_kept(draw, {"keep_ratio": draw(st.integers(1, patches)) / patches})
    if kind == "ratio":
        return _patches_kept(draw, {"keep_ratio": draw(st.floats(1 / patches, 1))})
    return _patches_kept(draw, {"num_patches": draw(st.integers(1, patches + 2))})


def _patches_kept(draw: st.DrawFn, share: Fields) -> Fields:
    dropped = draw(st.sampled_from(["discard", "merge"]))
    return {
        **share,
        "criterion": draw(st.sampled_from(["variance", "random", "grid"])),
        "seed": draw(st.one_of(st.integers(0, 3), st.integers(0, 2**63 - 1))),
        "dropped": dropped,
        "output": draw(st.sampled_from([None, "compressed", "full"][: 2 + (dropped == "merge")])),
        "proportional_attention": draw(st.booleans()),
    }


def draw_local(draw: st.DrawFn, patches: int) -> Fields:
    """A setting by neighbours, with or without later layers."""
    how_many = {
        "tolerance": st.one_of(st.sampled_from([0, 1]), st.floats(0, 0.6)),
        "keep_ratio": st.floats(0.01, 1),
        "num_patches": st.integers(1, patches + 2),
    }
    field = draw(st.sampled_from([*how_many]))
    found = {
        "method": draw(st.sampled_from(["local", "gradual", "coarse"])),
        field: draw(how_many[field]),
        "image_std": draw(st.sampled_from([[0.5] * 3, [0.2, 0.5, 1.0]])),
        "layout": draw(st.sampled_from(["auto", "packed", "padded"])),
        "proportional_attention": draw(st.booleans()),
    }
    if found["method"] == "gradual" or (found["method"] == "coarse" and draw(st.booleans())):
        joined = {"similarity": st.floats(-1, 1), "join_ratio": st.floats(0, 0.5)}
        name = draw(st.sampled_from([*joined]))
        found[name] = draw(joined[name])
    return found


def draw_ragged(draw: st.DrawFn, patches: int) -> Fields:
    """A setting of a method by which images may have different numbers of tokens."""
    return draw(st.sampled_from([draw_inter, draw_local]))(draw, patches)


def draw_any(draw: st.DrawFn, patches: int) -> Fields:
    """A setting of any method that finds out by itself what becomes of patches."""
    return draw(st.sampled_from([draw_inter, draw_intra, draw_local]))(draw, patches)


def draw_plain(draw: st.DrawFn, patches: int) -> Fields:
    """A setting that leaves every patch as it is."""
    kind = draw(st.sampled_from(["ratio", "number", "threshold"]))
    if kind == "ratio":
        return _patches_kept(draw, {"keep_ratio": 1.0})
    if kind == "number":
        return _patches_kept(draw, {"num_patches": patches + draw(st.integers(0, 3))})
    return _words_at(draw, draw(st.sampled_from([0, 0.0])))
