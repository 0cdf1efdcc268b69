"""Images are found in one way, read upright in eight bits, and named where they cannot be read."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from vwt_hf import image_source
from vwt_hf.image_source import (
    UnreadableImage,
    find_images,
    image_rows,
    open_images,
    patch_batches,
    pixel_batches,
    processed,
    read_image,
    spread,
)
from vwt_hf.labelled_images import open_labelled

RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


def grey(values: np.ndarray) -> np.ndarray:
    """What 8-bit RGB of a grey image in [0, 1] should be."""
    return np.repeat(np.rint(255 * values)[..., None], 3, axis=2)


@pytest.mark.filterwarnings("error")  # numbers that no byte holds
@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((RAMP * 65535).astype(np.uint16), "a.png"),
        ((RAMP * 65535).astype(np.uint16), "a.tif"),
        ((RAMP * 65535).astype(">u2"), "a.tif"),
        ((RAMP * 65535).astype(np.int32), "a.pgm"),
        ((RAMP * 65535).astype(np.int32), "a.tif"),
        ((RAMP * 255).round().astype(np.int32), "a.tif"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "a.tif"),
        (RAMP.astype(np.float32), "a.tif"),
        ((RAMP * 255).astype(np.float32), "a.tif"),
        ((RAMP * 65535).astype(np.float32), "a.tif"),
        (np.where(RAMP == 1, np.nan, np.where(RAMP > 0.9, np.inf, RAMP)).astype(np.float32), "a.tif"),
    ],
)
def test_grey_of_more_than_eight_bits_keeps_its_shades(tmp_path, values, name):
    PIL.Image.fromarray(values).save(tmp_path / name)
    expected = grey(np.where(RAMP == 1, 0, np.where(RAMP > 0.9, 1, RAMP)) if np.isnan(values).any() else RAMP)
    for item in (tmp_path / name, {"bytes": (tmp_path / name).read_bytes(), "path": None}):
        found = read_image(item)
        assert found.mode == "RGB" and np.abs(np.asarray(found) - expected).max() <= 1


def test_a_dark_scan_of_16_bits_stays_dark(tmp_path):
    for name, kind in (("a.png", np.uint16), ("a.pgm", np.int32)):
        PIL.Image.fromarray(np.full((8, 8), 200, kind)).save(tmp_path / name)
        assert np.asarray(read_image(tmp_path / name)).max() == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa"])
def test_colours_of_every_mode_are_those_that_they_look_like(mode):
    colours = PIL.Image.new("RGB", (8, 4), "white")
    colours.paste((0, 0, 0), (4, 0, 8, 4))
    through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    image = (colours.convert(through) if through else colours).convert(mode)
    assert np.abs(np.asarray(read_image(image), dtype=int) - np.asarray(colours)).max() <= 1


def test_transparency_is_left_out_and_the_colours_stay(tmp_path):
    palette = PIL.Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 30, 90])
    palette.save(tmp_path / "a.png", transparency=bytes([255, 0]))
    PIL.Image.new("RGBA", (4, 4), (200, 30, 90, 0)).save(tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert read_image(tmp_path / name).getcolors() == [(16, (200, 30, 90))]


def rotated(kind: str) -> bytes:
    """A red left and a green right half, as a camera held sideways stores them."""
    image = PIL.Image.new("RGB", (16, 32), "red")
    image.paste("green", (0, 0, 16, 16))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file.getvalue()


def is_upright(image: PIL.Image.Image) -> bool:
    left, right = image.getpixel((4, 8)), image.getpixel((28, 8))
    return image.size == (32, 16) and left[0] > 200 > left[1] and right[1] > 100 > right[0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_rotated_photographs_are_read_upright_from_files_data_sets_and_memory(tmp_path, kind):
    (tmp_path / f"a.{kind.lower()}").write_bytes(rotated(kind))
    stored = [{"bytes": rotated(kind), "path": None}]
    data = datasets.Dataset.from_dict({"image": stored}, features=datasets.Features({"image": datasets.Image()}))
    sources = [tmp_path, data, data.to_iterable_dataset(), [PIL.Image.open(io.BytesIO(rotated(kind)))]]
    for source in sources:
        ((_, item),) = open_images(source).part().items
        assert is_upright(read_image(item))


def bomb() -> bytes:
    """A file of a hundred bytes that says that it has 400 million pixels."""
    file = io.BytesIO()
    PIL.Image.new("L", (1, 1)).save(file, "PNG")
    start, header, end = file.getvalue()[:12], file.getvalue()[12:29], file.getvalue()[33:]
    header = header[:4] + struct.pack(">II", 20000, 20000) + header[12:]
    return start + header + struct.pack(">I", zlib.crc32(header)) + end


def truncated() -> bytes:
    file = io.BytesIO()
    PIL.Image.effect_noise((300, 300), 80).save(file, "JPEG")
    return file.getvalue()[:5000]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (bomb, "DecompressionBombError"),
        (truncated, "truncated"),
        (lambda: EPS, "no image of a known format"),
        (bytes, "Unidenti"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_the_reason(tmp_path, content, why):
    file = tmp_path / "b\x1bad.png"
    file.write_bytes(content())
    for item in (file, str(file), {"bytes": content(), "path": str(file)}, {"bytes": None, "path": str(file)}):
        with pytest.raises(UnreadableImage, match=rf"b\\x1bad\.png cannot be read .*{why}"):
            read_image(item)
    with pytest.raises(UnreadableImage, match=rf"row 7 cannot be read .*{why}"):
        read_image({"bytes": content(), "path": None}, "row 7")


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


def test_a_data_set_names_no_device_and_no_address_but_those_of_data_sets(tmp_path):
    image, odd = tmp_path / "a.png", tmp_path / "a b::c.png"
    for file in (image, odd):
        PIL.Image.new("RGB", (3, 2)).save(file)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(image, "a.png")
    for path in (str(odd), f"file://{image}", f"zip://a.png::{tmp_path}/all.zip"):
        assert read_image({"bytes": None, "path": path}).size == (3, 2)
    # Of devices one that ends: were it opened, this would fail, and not take all memory.
    names_no_file = (
        "/dev/null",
        "file:///dev/null",
        "zip://a.png::/dev/null",
        str(tmp_path),
        f"file://{tmp_path}/b.png",
    )
    for path in names_no_file:
        with pytest.raises(UnreadableImage, match="which is no file"):
            read_image({"bytes": None, "path": path}, "row 7")
    for kind in ("http", "ftp", "ssh", "local", "github"):
        with pytest.raises(UnreadableImage, match=rf"names it at {kind}://; expected a file"):
            read_image({"bytes": None, "path": f"{kind}://169.254.169.254/latest"}, "row 7")
        with pytest.raises(UnreadableImage, match=rf"names it at {kind}://; expected a file"):
            read_image({"bytes": None, "path": f"{kind}://169.254.169.254/latest::file://{image}"}, "row 7")


def test_an_image_that_a_data_set_names_elsewhere_is_read_up_to_a_limit(tmp_path, monkeypatch):
    image = tmp_path / "a.png"
    PIL.Image.new("RGB", (3, 2)).save(image)
    monkeypatch.setattr(image_source, "LARGEST", image.stat().st_size)
    assert read_image({"bytes": None, "path": f"file://{image}"}).size == (3, 2)
    monkeypatch.setattr(image_source, "LARGEST", image.stat().st_size - 1)
    with pytest.raises(UnreadableImage, match=r"it has more than \d+ bytes"):
        read_image({"bytes": None, "path": f"file://{image}"})


def test_an_address_is_read_to_its_end_where_a_server_gives_it_in_pieces(tmp_path, monkeypatch):
    image = tmp_path / "a.png"
    PIL.Image.new("RGB", (3, 2)).save(image)

    class Pieces(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            return super().read(min(size, 10))

    monkeypatch.setattr("fsspec.open", lambda path, mode: Pieces(image.read_bytes()))
    assert read_image({"bytes": None, "path": "https://example.org/a.png"}).size == (3, 2)


def test_a_link_is_the_same_image_while_the_drive_that_it_leads_to_is_gone(tmp_path):
    drive, photographs = tmp_path / "drive", tmp_path / "photographs"
    for folder in (drive, photographs):
        folder.mkdir()
    PIL.Image.new("RGB", (3, 2)).save(drive / "a.png")
    (photographs / "a.png").symlink_to(drive / "a.png")
    before = image_rows(photographs).order
    drive.rename(tmp_path / "gone")
    assert image_rows(photographs).order == before
    (photographs / "a.png").unlink()
    (photographs / "a.png").symlink_to(drive / "b.png")
    assert image_rows(photographs).order != before


def test_no_program_is_run_for_a_file_that_asks_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    (tmp_path / "a.png").write_bytes(EPS)
    (tmp_path / "b.eps").write_bytes(EPS)
    for item in (tmp_path / "a.png", tmp_path / "b.eps", {"bytes": EPS, "path": "a.png"}):
        with pytest.raises(UnreadableImage):
            read_image(item)


def test_folders_are_searched_through_all_levels_for_what_pillow_decodes_itself(tmp_path):
    for name in ("b/2.JPG", "b/1.png", "a.webp", "c.tif", "notes.txt", "page.pdf", "drawing.eps", "d.png/inner.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path])]
    assert found == ["a.webp", "b/1.png", "b/2.JPG", "c.tif", "d.png/inner.gif"]
    assert find_images([tmp_path], 2) == [tmp_path / "a.webp", tmp_path / "b/2.JPG"]
    three = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path], 3)]
    assert three == ["a.webp", "b/1.png", "c.tif"]  # of five, and not the first three
    assert find_images([tmp_path / "c.tif", str(tmp_path / "b")], 9) == [
        tmp_path / name for name in ("c.tif", "b/1.png", "b/2.JPG")
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        find_images([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png does not exist"):
        find_images([tmp_path / "nowhere.png"])


def test_links_are_followed_to_each_folder_once_and_one_to_nothing_is_an_unreadable_image(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for name in ("in/b/1.png", "in/d.png", "out/1.png", "out/deep/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(tmp_path / name)
    links = {"a": "b", "c": "../out", "c2": "../out", "e.png": "nowhere", "f.png": "f.png", "g.png": "d.png", "h": "."}
    for name, target in links.items():
        (inside / name).symlink_to(target)
    (outside / "back").symlink_to(inside)
    os.mkfifo(tmp_path / "pipe")
    (inside / "i.png").symlink_to(tmp_path / "pipe")  # which would be waited for
    expected = ["b/1.png", "c/1.png", "c/deep/2.png", "d.png", "e.png", "f.png", "g.png"]
    assert [path.relative_to(inside).as_posix() for path in find_images([inside])] == expected
    rows = image_rows(inside)
    assert [rows[index][0] for index in range(len(rows))] == expected and len(open_labelled(inside).data) == 7
    for index, name in enumerate(expected):
        if name in ("e.png", "f.png"):
            with pytest.raises(UnreadableImage, match=rf"{name} cannot be read"):
                read_image(rows[index][1], name)
        else:
            assert read_image(rows[index][1]).size == (4, 4)
    assert open_images(inside).part().total == 7


def test_where_a_limit_divides_every_nth_is_taken_and_else_they_are_as_even_as_can_be():
    for count in range(40):
        assert spread(count, None) == list(range(count))
        for limit in range(1, 45):
            taken = spread(count, limit)
            gaps = np.diff([*taken, count])
            assert len(taken) == min(count, limit) and taken[:1] == [0][:count]
            assert count == 0 or gaps.max() - gaps.min() <= 1
            if count and count % limit == 0:
                assert taken == list(range(0, count, count // limit))


@pytest.mark.parametrize("opened", [open_images, image_rows, open_labelled])
def test_what_holds_no_images_is_refused_in_the_same_words(opened, tmp_path):
    with pytest.raises(ValueError, match=r"nothing', which is no folder; expected a folder of image files"):
        opened(tmp_path / "nothing")
    data = datasets.Dataset.from_dict({"text": ["a"]})
    splits = datasets.DatasetDict({"test": data, "dev": data})
    with pytest.raises(ValueError, match=r"has the splits test, dev; pass one of them, as images\['test'\]"):
        opened(splits)
    with pytest.raises(ValueError, match="has no column of images; its columns are text, those with images: none"):
        opened(data)


@pytest.mark.parametrize("opened", [open_images, open_labelled])
def test_a_stream_that_says_nothing_is_asked_for_its_first_row(opened, photographs):
    def rows():
        for number, path in enumerate(photographs):
            yield {"id": number, "photo": PIL.Image.open(path)}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.features is None
    found = opened(stream)
    if opened is open_images:
        items = [item for _, item in found.part().items]
    else:
        items = [sample.item for _, batch in found.batches(0, 1, 2) for sample in batch]
    assert len(items) == 5 and {read_image(item).size for item in items} == {(50, 40)}
    with pytest.raises(ValueError, match="no column of images 'id'; its columns are id, photo, those with images: pho"):
        opened(stream, **{"column" if opened is open_images else "image_column": "id"})
    with pytest.raises(ValueError, match="the data set has no column of images"):
        opened(datasets.IterableDataset.from_generator(lambda: iter(())))


def test_torchs_defaults_change_neither_the_order_nor_the_patches(photographs, tmp_path):
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})

    def found() -> tuple[list[str], torch.Tensor, list[dict[str, torch.Tensor]]]:
        items = list(open_images(tmp_path).part().items)
        (batch,) = patch_batches(iter(items), processor, 16, 5)
        return [name for name, _ in items], batch.patches, list(pixel_batches(photographs, processor, 5))

    names, patches, made = found()
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        again = found()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert again[0] == names and torch.equal(again[1], patches)
    assert torch.equal(again[2][0]["pixel_values"], made[0]["pixel_values"])


@pytest.fixture
def photographs(tmp_path) -> list[Path]:
    values = np.random.default_rng(0).integers(0, 255, (5, 40, 50, 3), dtype=np.uint8)
    paths = [tmp_path / f"{index}.png" for index in range(5)]
    for path, pixels in zip(paths, values, strict=True):
        PIL.Image.fromarray(pixels).save(path)
    return paths


def test_a_batch_is_what_the_processor_makes_of_all_of_its_images(photographs):
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    whole = processor([read_image(path) for path in photographs], return_tensors="pt")["pixel_values"]
    batches = [made["pixel_values"] for made in pixel_batches(photographs, processor, 2)]
    assert [len(batch) for batch in batches] == [2, 2, 1] and torch.equal(torch.cat(batches), whole)


def test_one_image_is_decoded_at_a_time(photographs, monkeypatch):
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

    def read(item: object, name: str | None) -> PIL.Image.Image:
        image, counted = PIL.Image.open(item), Counted()
        counted.im, counted._mode, counted._size = image.convert("RGB").im, "RGB", image.size
        return counted

    monkeypatch.setattr("vwt_hf.image_source.read_image", read)
    for made in pixel_batches(photographs, transformers.ViTImageProcessorPil(), 5):
        assert len(made["pixel_values"]) == 5
    assert peak == 1


def test_an_image_that_the_processor_refuses_is_named_and_so_are_sizes_that_differ(photographs, tmp_path):
    PIL.Image.new("RGB", (50, 20)).save(tmp_path / "flat.png")
    uncropped = transformers.ViTImageProcessorPil(do_resize=False)
    with pytest.raises(ValueError, match=r"shapes \(3, 20, 50\) and \(3, 40, 50\)"):
        list(pixel_batches([*photographs, tmp_path / "flat.png"], uncropped, 6))

    def refuses(**_: object) -> None:
        raise RuntimeError("too flat")

    with pytest.raises(UnreadableImage, match=r"flat\.png \(50×20\) is refused by function: too flat"):
        list(pixel_batches([tmp_path / "flat.png"], refuses, 1))


def test_a_row_without_an_image_says_so():
    with pytest.raises(UnreadableImage, match=r"row 3 cannot be read \(ValueError: it holds no image\)"):
        read_image(None, "row 3")
