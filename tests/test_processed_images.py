"""Images are made one by one into what a batch of them is, and those that would take all memory are refused."""

from __future__ import annotations

import contextlib
import os
import threading
import types

import PIL.Image
import pytest
import torch
import transformers

from vwt_hf import processed_images, processes
from vwt_hf.decoding import UnreadableImage, read_image
from vwt_hf.processed_images import image_patches, patch_batches, pixel_batches, processed, require_room


def test_torch_makes_its_threads_before_others_read_images(monkeypatch):
    """In a forked process those that read would make them, several at once, and torch raise an error in one."""
    events = []
    monkeypatch.setattr(torch, "set_num_threads", lambda number: events.append((threading.current_thread(), number)))
    monkeypatch.setattr(processed_images, "image_patches", lambda *of: events.append("read") or torch.zeros(1, 12))
    number = torch.get_num_threads()
    assert len(list(patch_batches(iter([("a", None), ("b", None)]), None, 2, 1))) == 2
    assert events == [(threading.current_thread(), number), "read", "read"]


def test_images_are_read_by_no_more_threads_than_cores_that_may_be_used(monkeypatch):
    threads, pool = [], processed_images.ThreadPoolExecutor
    monkeypatch.setattr(processed_images, "ThreadPoolExecutor", lambda n, **how: threads.append(n) or pool(n, **how))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {5}, raising=False)  # as by taskset
    assert not list(patch_batches(iter(()), None, 2, 1)) and threads == [1]


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4), ("max 100000", 4), (None, 4)],
)
def test_cores_are_as_many_as_a_container_leaves_time_on(quota, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 5, 7}, raising=False)
    monkeypatch.setattr(processes, "_CGROUP", tmp_path)
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert processes.usable_cores() == expected


@pytest.mark.parametrize(("quota", "expected"), [(250000, 2), (50000, 1), (-1, 4)])
def test_cores_of_a_container_by_the_first_version_of_control_groups(quota, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 5, 7}, raising=False)
    monkeypatch.setattr(processes, "_CGROUP", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert processes.usable_cores() == expected


def test_an_image_that_a_processor_would_make_enormous_is_refused_and_a_panorama_is_not(tmp_path):
    keeps = transformers.CLIPImageProcessorPil()  # proportions, until it crops
    pads = transformers.Owlv2ImageProcessorPil(size={"height": 32, "width": 32})  # to a square, before it resizes
    stretches = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    PIL.Image.new("1", (4, 40_000)).save(tmp_path / "narrow.png")
    narrow = tmp_path / "narrow.png"
    for processor, pixels in ((keeps, "501,760,000"), (pads, "1,600,000,000")):
        with pytest.raises(UnreadableImage, match=rf"narrow\.png \(4×40000\) is refused by .* have {pixels} pixels"):
            processed(narrow, processor)
        (read,) = patch_batches(iter([("narrow.png", narrow)]), processor, 16, 1)
        assert read.lengths == [0] and f"have {pixels} pixels" in read.unreadable[0]
        assert read.unreadable[0].startswith("narrow.png")
    assert processed(narrow, stretches)["pixel_values"].shape == (1, 3, 32, 32)
    for processor in (keeps, stretches, pads):
        assert len(processed(PIL.Image.new("RGB", (1000, 50)), processor)["pixel_values"]) == 1


@pytest.mark.parametrize(
    ("sizes", "pixels"),
    [
        ({"size": {"height": 600, "width": 600}}, "360,000"),
        ({"size": {"shortest_edge": 600}}, "360,000"),
        ({"size": {"shortest_edge": 500, "longest_edge": 600}}, "250,000"),
        ({"size": {"shortest_edge": 600, "longest_edge": 500}}, "250,000"),
        ({"size": {"height": 600.0, "width": 600.0}}, "360,000"),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 600, "width": 600}}, "360,000"),
        ({"do_pad": True, "pad_size": {"height": 600, "width": 600}}, "360,000"),
        ({"size": {"height": 600, "width": 600}, "do_resize": False, "do_center_crop": False}, None),
    ],
)
def test_an_image_processor_that_makes_all_images_enormous_is_refused(sizes, pixels, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)
    processor = transformers.CLIPImageProcessorPil(**sizes)
    image = PIL.Image.new("RGB", (8, 8))
    if pixels is None:
        assert processed(image, processor)["pixel_values"].shape == (1, 3, 8, 8)
        return
    with pytest.raises(UnreadableImage, match=f"would have {pixels} pixels .*give another processor"):
        processed(image, processor)


def test_an_image_processor_that_cuts_enormous_images_into_tiles_is_refused(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)
    processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64], [512, 512]]
    )
    with pytest.raises(UnreadableImage, match="would have 262,144 pixels"):
        processed(PIL.Image.new("RGB", (8, 8)), processor)


@pytest.mark.parametrize(
    ("kind", "fields", "pixels"),
    [
        ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.05}, "512,000"),
        ("PoolFormer", {"size": {"shortest_edge": 32}, "crop_pct": 0.05}, "512,000"),
        ("Siglip2", {"max_num_patches": 1000}, "256,000"),
        ("Perceiver", {"size": {"height": 100, "width": 100}, "crop_size": {"height": 2, "width": 2}}, "160,000"),
        ("DPT", {"size": {"height": 32, "width": 32}, "do_pad": True, "size_divisor": 500}, "250,000"),
        ("DPT", {"size": {"height": 32, "width": 32}, "ensure_multiple_of": 500}, "250,000"),
        pytest.param(  # transformers 5.17 has it with torchvision alone
            "Idefics3",
            {"max_image_size": {"longest_edge": 600}, "size": {"longest_edge": 300}},
            "360,000",
            marks=pytest.mark.newest,
        ),
        ("Swin2SR", {"size_divisor": 500}, "250,000"),
        ("Flava", {"codebook_size": {"height": 3000, "width": 3000}}, "9,000,000"),
        ("Detr", {"size": {"max_height": 600, "max_width": 600}}, "360,000"),
        ("Qwen2VL", {"size": {"shortest_edge": 3136, "longest_edge": 250_000}}, "250,000"),
    ],
)
def test_what_other_image_processors_state_in_ways_of_their_own_counts_too(kind, fields, pixels, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**fields)
    with pytest.raises(UnreadableImage, match=f"would have {pixels} pixels"):
        processed(PIL.Image.new("RGB", (10, 8)), processor)


@pytest.mark.parametrize("name", ["max_slice_nums", "max_soft_tokens", "max_tiles"])
def test_numbers_of_parts_count_as_so_many_images(name, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    setattr(processor, name, 1000)
    with pytest.raises(UnreadableImage, match="would have 1,024,000 pixels"):
        processed(PIL.Image.new("RGB", (10, 8)), processor)


def test_an_image_processor_as_transformers_makes_it_is_refused_for_no_size():
    made = []
    for name in sorted(name for name in dir(transformers) if name.endswith("ImageProcessorPil")):
        with contextlib.suppress(ImportError, TypeError, ValueError):  # what it lacks here, or must be told
            made.append(getattr(transformers, name)())
    for processor in made:
        for size in ((9000, 9000), (640, 480)):
            require_room(types.SimpleNamespace(size=size, width=size[0], height=size[1]), processor)
    assert len(made) > 40


def test_a_batch_is_what_the_processor_makes_of_all_of_its_images(noise_images):
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    whole = processor([read_image(path) for path in noise_images], return_tensors="pt")["pixel_values"]
    batches = [made["pixel_values"] for made in pixel_batches(noise_images, processor, 2)]
    assert [len(batch) for batch in batches] == [2, 2, 1] and torch.equal(torch.cat(batches), whole)


@pytest.mark.parametrize(("mean", "channels"), [([0.5], 1), ((0.5,), 1), ([0.5] * 3, 3), (0.5, 3)])
def test_an_image_is_grey_where_the_processor_is_of_one_channel(mean, channels, noise_images):
    size = {"height": 32, "width": 32}
    in_colour = transformers.ViTImageProcessorPil(size=size, image_mean=mean, do_normalize=False, do_convert_rgb=True)
    assert processed(noise_images[0], in_colour)["pixel_values"].std(dim=1).mean() > 0.1
    processor = transformers.ViTImageProcessorPil(size=size, image_mean=mean, image_std=mean)
    made = processed(noise_images[0], processor)["pixel_values"]
    grey = PIL.Image.open(noise_images[0]).convert("L")
    expected = grey if channels == 1 else PIL.Image.open(noise_images[0])
    assert made.shape == (1, channels, 32, 32)
    torch.testing.assert_close(made, processor(expected, return_tensors="pt")["pixel_values"], rtol=0, atol=0)


def test_patches_are_of_raw_colours_or_refused():
    def makes(values):
        return lambda **options: {"pixel_values": torch.tensor(values).expand(1, 3, 16, 16)}

    image = PIL.Image.new("RGB", (16, 16))
    for value, raw in ((-0.05, 0.0), (0.5, 0.5), (1.05, 1.0)):
        (patch,) = image_patches(image, makes(value), "a.png", 16)
        assert patch.unique().tolist() == [raw]
    for value in (-2.0, 2.0):
        with pytest.raises(ValueError, match=r"expected raw RGB in \[0, 1\]"):
            image_patches(image, makes(value), "a.png", 16)


def test_one_image_is_decoded_at_a_time(noise_images, monkeypatch):
    """Photographs of many megapixels would fill memory else."""
    alive = peak = 0

    class Counted(PIL.Image.Image):
        def __init__(self) -> None:
            nonlocal alive, peak
            super().__init__()
            alive += 1
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def read(item: object, name: str | None, formats: object) -> PIL.Image.Image:
        image, counted = PIL.Image.open(item), Counted()
        counted.im, counted._mode, counted._size = image.convert("RGB").im, "RGB", image.size
        return counted

    monkeypatch.setattr("vwt_hf.processed_images.read_image", read)
    for made in pixel_batches(noise_images, transformers.ViTImageProcessorPil(), 5):
        assert len(made["pixel_values"]) == 5
    assert peak == 1


def test_an_image_that_the_processor_refuses_is_named_and_so_are_sizes_that_differ(noise_images, tmp_path):
    PIL.Image.new("RGB", (50, 20)).save(tmp_path / "flat.png")
    uncropped = transformers.ViTImageProcessorPil(do_resize=False)
    with pytest.raises(ValueError, match=r"shapes \(3, 20, 50\) and \(3, 40, 50\)"):
        list(pixel_batches([*noise_images, tmp_path / "flat.png"], uncropped, 6))

    def refuses(**_: object) -> None:
        raise RuntimeError("too flat")

    with pytest.raises(UnreadableImage, match=r"flat\.png \(50×20\) is refused by function: too flat"):
        list(pixel_batches([tmp_path / "flat.png"], refuses, 1))
