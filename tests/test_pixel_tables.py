"""Values of pixels that are looked up: those that transformers' own image processors by Pillow compute, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessorPil, ViTImageProcessorPil
from transformers.image_processing_backends import PilBackend

from vwt_hf import VWTConfig, pixel_tables
from vwt_hf.image_processing import HostTokenizer

DRAWN = np.random.RandomState(0)
IMAGES = [Image.fromarray(DRAWN.randint(0, 256, size, dtype=np.uint8)) for size in ((40, 56, 3), (90, 31, 3))]
EVERY_LEVEL = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
ODD = {"image_mean": [0.1, 0.7, 0.33], "image_std": [0.3, 1.7, 0.01]}


def pair(plain_class=ViTImageProcessorPil, **fields):
    """An image processor, and the same with a setting."""
    fields = {"size": {"height": 32, "width": 32}} | fields
    plain, tokenizing = plain_class(**fields), plain_class(**fields)
    tokenizing.vwt = HostTokenizer(VWTConfig(criterion="grid"), (1, 1))
    assert type(tokenizing) is not type(plain)
    return plain, tokenizing


@pytest.fixture
def tables(monkeypatch):
    """How many images were looked up in each call."""
    counted: list[int] = []
    look_up = pixel_tables.look_up

    def counting(processor, images, steps):
        counted.append(len(images))
        return look_up(processor, images, steps)

    monkeypatch.setattr("vwt_hf.image_processing.look_up", counting)
    return counted


def assert_same(found, expected) -> None:
    """The same values in the same kind of arrays."""
    assert type(found) is type(expected) and len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("kind", ["pt", "np", None])
@pytest.mark.parametrize("fields", [{}, ODD, {"rescale_factor": 1 / 127}], ids=str)
@pytest.mark.parametrize("images", [IMAGES, IMAGES[1], [np.asarray(IMAGES[0])] * 3], ids=["two", "one", "arrays"])
def test_values_that_are_looked_up_are_those_that_are_computed(images, fields, kind, tables):
    plain, tokenizing = pair(**fields)
    expected = plain(images, return_tensors=kind)["pixel_values"]
    assert_same(tokenizing(images, return_tensors=kind)["pixel_values"], expected)
    assert tables == [len(expected)]


def test_images_of_two_sizes_are_looked_up_each(tables):
    plain, tokenizing = pair(do_resize=False)
    assert_same(tokenizing(IMAGES)["pixel_values"], plain(IMAGES)["pixel_values"])
    assert tables == [2]


def test_every_level_has_its_value_in_every_channel(tables):
    for fields in ({}, ODD):
        plain, tokenizing = pair(do_resize=False, **fields)
        found = tokenizing(EVERY_LEVEL, return_tensors="np")["pixel_values"]
        assert np.array_equal(found, plain(EVERY_LEVEL, return_tensors="np")["pixel_values"])
        assert len(np.unique(found[0, 1])) == 256
    assert tables == [1, 1]


def test_a_call_may_ask_for_other_steps(tables):
    plain, tokenizing = pair(CLIPImageProcessorPil, size={"shortest_edge": 24}, crop_size={"height": 20, "width": 20})
    for steps in (ODD, {"do_center_crop": False, "size": {"height": 9, "width": 7}}, {"image_std": [2.0, 1.0, 3.0]}):
        asked = {"return_tensors": "pt", **steps}
        assert torch.equal(tokenizing(IMAGES, **asked)["pixel_values"], plain(IMAGES, **asked)["pixel_values"])
    assert tables == [2, 2, 2]


@pytest.mark.parametrize(
    "fields",
    [{"do_rescale": False}, {"do_normalize": False}, {"do_pad": True, "pad_size": {"height": 50, "width": 60}}],
    ids=str,
)
def test_other_steps_are_taken_as_they_were(fields, tables):
    plain, tokenizing = pair(**fields)
    expected = plain(IMAGES, return_tensors="np")["pixel_values"]
    assert_same(tokenizing(IMAGES, return_tensors="np")["pixel_values"], expected)
    assert tables == []


def test_pixels_that_have_no_levels_are_computed(tables):
    plain, tokenizing = pair(do_resize=False)
    image = DRAWN.rand(3, 8, 8).astype(np.float32) * 255
    for images in (image, [image, EVERY_LEVEL[:, :8, :8]]):
        expected = plain(images, return_tensors="np")["pixel_values"]
        assert_same(tokenizing(images, return_tensors="np")["pixel_values"], expected)
    assert tables == []


def test_no_images_and_wrong_ones_are_told_as_by_the_plain_image_processor():
    plain, tokenizing = pair(do_resize=False)
    for images in ([], np.zeros((1, 8, 8), np.uint8)):
        with pytest.raises(Exception) as expected:
            plain(images, return_tensors="np", input_data_format="channels_first")
        with pytest.raises(type(expected.value)) as found:
            tokenizing(images, return_tensors="np", input_data_format="channels_first")
        assert str(found.value) == str(expected.value)


class Brightest(ViTImageProcessorPil):
    """Divides each image by its largest value, which no table of levels can tell."""

    def rescale(self, image, scale, **kwargs):
        return super().rescale(image, 1 / image.max(), **kwargs)


class Levelled(ViTImageProcessorPil):
    """Takes the mean of its values off each image, which no table of levels can tell."""

    def normalize(self, image, mean, std, **kwargs):
        return super().normalize(image, image.mean(), std, **kwargs)


class Twice(ViTImageProcessorPil):
    """Does something after all other steps."""

    def _preprocess(self, images, **steps):
        made = super()._preprocess(images, **steps)
        made["pixel_values"] = made["pixel_values"] * 2
        return made


class Wide(ViTImageProcessorPil):
    """Has images of other than eight bits once they are resized."""

    def resize(self, image, size, **kwargs):
        return super().resize(image, size, **kwargs).astype(np.float32) + 0.25


class Single(ViTImageProcessorPil):
    """Takes images by another name, one after another."""

    def preprocess(self, images, **kwargs):
        made = [super(Single, self).preprocess([image], **kwargs)["pixel_values"] for image in images]
        found = [self._preprocess(image=values) for values in made]
        return BatchFeature({"pixel_values": np.concatenate(found)})

    def _preprocess(self, images=None, image=None, **steps):
        return image * 2 if images is None else super()._preprocess(images, **steps)


@pytest.mark.parametrize("plain_class", [Brightest, Levelled, Twice, Single])
def test_a_class_with_steps_of_its_own_takes_them(plain_class, tables):
    plain, tokenizing = pair(plain_class)
    dark = [np.asarray(IMAGES[0]) // 3]
    expected = plain(dark, return_tensors="np")["pixel_values"]
    assert_same(tokenizing(dark, return_tensors="np")["pixel_values"], expected)
    assert tables == []
    assert not np.array_equal(
        expected, ViTImageProcessorPil(size=plain.size)(dark, return_tensors="np")["pixel_values"]
    )


def test_pixels_that_lose_their_levels_on_the_way_are_computed(tables):
    plain, tokenizing = pair(Wide)
    expected = plain(IMAGES, return_tensors="np")["pixel_values"]
    assert_same(tokenizing(IMAGES, return_tensors="np")["pixel_values"], expected)
    assert tables == []


def test_images_that_stay_a_list_are_arrays_of_their_own():
    """So that one that is kept does not hold the memory of all."""
    _, tokenizing = pair()
    found = tokenizing(IMAGES)["pixel_values"]
    assert all(values.base is None for values in found)


def test_transformers_image_processors_by_pillow_have_the_steps_that_are_looked_up():
    """Else nothing would be, without a word."""
    assert all(hasattr(PilBackend, name) for name in pixel_tables.STEPS)
    steps = {"do_rescale": True, "do_normalize": True, "do_pad": None}
    assert pixel_tables.ends_with_values(ViTImageProcessorPil, steps)
