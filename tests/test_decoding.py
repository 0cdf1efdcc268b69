"""An image is read in RGB of eight bits and upright, from whatever holds it, or named with why it cannot be."""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import tracemalloc
import zipfile
import zlib
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngInfo

from vwt_hf import decoding
from vwt_hf.decoding import UnreadableImage, read_image
from vwt_hf.image_source import open_images

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


def tiff(bits: int, data: bytes, photometric: int, sample_format: int) -> dict[str, Any]:
    """A TIFF of grey, as large as `RAMP`, that Pillow writes none of."""
    height, width = RAMP.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 10 * 12 + 4, 277: 1, 278: height}
    entries = tags | {279: len(data), 339: sample_format}
    written = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return {"bytes": struct.pack("<4sIH", b"II*\0", 8, len(entries)) + written + bytes(4) + data, "path": None}


def in_twelve_bits(values: np.ndarray) -> bytes:
    pairs = values.astype(int).reshape(-1, 2)
    return b"".join(int(first << 12 | second).to_bytes(3, "big") for first, second in pairs)


@pytest.mark.parametrize(
    ("item", "is_inverted"),
    [
        (tiff(12, in_twelve_bits(RAMP * 4095), 1, 1), False),
        (tiff(32, (RAMP * (2.0**32 - 1)).astype("<u4").tobytes(), 1, 1), False),
        (tiff(32, (RAMP * 65535).astype("<u4").tobytes(), 1, 1), False),
        (tiff(16, (RAMP * 65535).astype("<u2").tobytes(), 0, 1), True),
        (tiff(32, RAMP.astype("<f4").tobytes(), 0, 3), True),
        (tiff(8, (RAMP * 255).astype(np.uint8).tobytes(), 0, 1), True),
    ],
    ids=[
        "12 bits",
        "32 bits without a sign",
        "of 16",
        "16 bits, white is 0",
        "floats, white is 0",
        "8 bits, white is 0",
    ],
)
def test_grey_tiffs_are_read_by_their_tags(item, is_inverted):
    expected = grey(1 - RAMP if is_inverted else RAMP)
    with PIL.Image.open(io.BytesIO(item["bytes"])) as opened:
        for found in (read_image(item), read_image(opened)):
            assert np.abs(np.asarray(found).astype(int) - expected).max() <= 1


def test_a_dark_scan_of_16_bits_stays_dark(tmp_path):
    for name, kind in (("a.png", np.uint16), ("a.pgm", np.int32)):
        PIL.Image.fromarray(np.full((8, 8), 200, kind)).save(tmp_path / name)
        assert np.asarray(read_image(tmp_path / name)).max() == 1


def test_a_value_a_little_above_white_is_white(tmp_path):
    bright = PIL.Image.fromarray(np.array([[0, 0.5, 1.09]], np.float32))
    assert np.asarray(read_image(bright))[0, :, 0].tolist() == [0, 128, 255]


def test_numbers_with_a_sign_are_no_large_ones(tmp_path):
    PIL.Image.fromarray(np.array([[-5, 0, 255]], np.int32)).save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 0, 255]


def test_a_row_may_be_longer_than_what_is_scaled_at_once():
    assert read_image(PIL.Image.new("I;16", (2**20 + 1, 1), 65535)).getextrema() == ((255, 255),) * 3


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


def strips(count: int, order: str = "<", big: bool = False, of: tuple[int, int] = (273, 279), more: int = 0) -> bytes:
    """A TIFF one pixel wide, of one byte in each of its strips.

    Args:
        of: the tags that say where the strips are, and how long.
        more: further tags.
    """
    number, place, kind, at = ("Q", "Q", 16, 16) if big else ("H", "I", 4, 8)
    one = struct.Struct(order + "HH" + 2 * place)
    tags = ((256, 1), (257, count), (258, 8), (259, 1), (262, 1), (of[0], None), (277, 1), (278, 1), (of[1], None))
    size = struct.calcsize("=" + place)
    numbers = at + struct.calcsize("=" + number) + (len(tags) + more) * one.size + size
    lies = {of[0]: numbers, of[1]: numbers + count * size}
    directory = struct.pack(order + number, len(tags) + more)
    for tag, value in tags:
        directory += one.pack(tag, kind, *((count, lies[tag]) if value is None else (1, value)))
    directory += one.pack(60000, kind, 1, 0) * more
    start = b"II" if order == "<" else b"MM"
    version = struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at)
    pixel = numbers + 2 * count * size
    both = struct.pack(order + place, pixel) * count + struct.pack(order + place, 1) * count
    return start + version + directory + bytes(size) + both + b"\x80"


# Of tags a TIFF may have as many as 65,535, a BigTIFF any number.
@pytest.mark.parametrize(
    ("order", "big", "of", "more"),
    [
        *((order, False, of, 0) for order in "<>" for of in ((273, 279), (324, 325), (338, 339))),
        *(("<", True, (273, 279), more) for more in (0, 2**18)),
    ],
)
def test_a_tiff_of_very_many_values_is_refused_before_lists_are_made_of_them(order, big, of, more, tmp_path):
    assert read_image({"bytes": strips(300, order, big), "path": None}).getcolors() == [(300, (128, 128, 128))]
    many = strips(1 if more else 2**18 + 1, order, big, of, more)
    (tmp_path / "many.tif").write_bytes(many)
    read = io.BytesIO(many)
    read.seek(0, io.SEEK_END)
    tracemalloc.start()
    for item in ({"bytes": many, "path": None}, tmp_path / "many.tif", read):
        with pytest.raises(UnreadableImage, match=r"it is a TIFF of 262,1\d\d tags, or values of one; expected"):
            read_image(item)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_tiff_that_says_it_has_more_tags_than_memory_holds_is_refused():
    content = b"II" + struct.pack("<HHHQQ", 43, 8, 0, 16, 2**62)
    with pytest.raises(UnreadableImage, match=rf"a TIFF of {2**62:,} tags"):
        read_image({"bytes": content, "path": None})


def test_bytes_in_a_tag_of_a_tiff_may_be_many(tmp_path):
    PIL.Image.new("RGB", (4, 3)).save(tmp_path / "a.tif", tiffinfo={37510: b"x" * 2**19})
    assert read_image(tmp_path / "a.tif").size == (4, 3)


@pytest.mark.parametrize("end", [*range(2, 40, 3), None])
def test_a_tiff_that_is_cut_off_is_unreadable_by_the_words_of_pillow(end):
    content = strips(3)[:end] if end else b"II+\0\x08\0\0\0" + b"\xff" * 16
    with pytest.raises(UnreadableImage) as raised:
        read_image({"bytes": content, "path": None})
    assert not isinstance(raised.value.__cause__, (struct.error, OverflowError))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_and_a_path_of_bytes_are_read(tmp_path):
    file, pipe = tmp_path / "a.png", tmp_path / "pipe"
    PIL.Image.new("RGB", (4, 3), "red").save(file)
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(file.read_bytes(),))
    writer.start()
    with file.open("rb") as opened:
        opened.seek(7)
        for item in (pipe, os.fsencode(file), opened):
            assert read_image(item).getcolors() == [(12, (255, 0, 0))]
    writer.join()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (bomb, rf"DecompressionBombError.*MAX_IMAGE_PIXELS, {PIL.Image.MAX_IMAGE_PIXELS:,}, allows"),
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
    monkeypatch.setattr(decoding, "LARGEST", image.stat().st_size)
    assert read_image({"bytes": None, "path": f"file://{image}"}).size == (3, 2)
    monkeypatch.setattr(decoding, "LARGEST", image.stat().st_size - 1)
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


def test_no_program_is_run_for_a_file_that_asks_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was run"))
    (tmp_path / "a.png").write_bytes(EPS)
    (tmp_path / "b.eps").write_bytes(EPS)
    for item in (tmp_path / "a.png", tmp_path / "b.eps", {"bytes": EPS, "path": "a.png"}):
        with pytest.raises(UnreadableImage):
            read_image(item)


def test_a_row_without_an_image_says_so():
    for item in (None, {"bytes": None, "path": None}):
        with pytest.raises(UnreadableImage, match=r"row 3 cannot be read \(ValueError: it holds no image\)"):
            read_image(item, "row 3")


def test_a_damaged_exif_is_no_reason_to_leave_an_image_out_and_none_is_left_in_it():
    image = PIL.Image.new("RGB", (16, 32), "red")
    image.paste("green", (0, 0, 16, 16))
    entries = struct.pack(">HHIHxx", 0x0112, 3, 1, 6) + struct.pack(">HHI4s", 0x0100, 2, 4, b"odd\0")
    for exif in (b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4), b"Exif\0\0garbage"):
        file = io.BytesIO()
        image.save(file, "JPEG", exif=exif)
        read = read_image({"bytes": file.getvalue(), "path": None})
        assert is_upright(read) if b"odd" in exif else read.size == (16, 32)
        assert read.info == {}  # by which another library would turn it once more
    odd = PngInfo()
    odd.add_text("Raw profile type exif", "\nexif\n4\nno hex")
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=odd)
    assert read_image({"bytes": file.getvalue(), "path": None}).size == (16, 32)


def progressive(scans: int) -> bytes:
    """A JPEG whose last scan comes so many times."""
    file = io.BytesIO()
    PIL.Image.new("L", (64, 64), 90).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + (b"\xff\x01" + last) * (scans - content.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_very_many_scans_is_refused_and_what_follows_its_end_does_not_count(tmp_path):
    whole = progressive(decoding.MOST_SCANS)
    video = whole + bytes(2) + b"\xff\xda\0\2" * decoding.MOST_SCANS  # as phones append one
    for content in (whole, video):
        assert read_image({"bytes": content, "path": None}).getpixel((5, 5)) == (90, 90, 90)
    file = tmp_path / "a.jpg"
    file.write_bytes(progressive(decoding.MOST_SCANS + 1))
    two = io.BytesIO()
    grey = PIL.Image.new("L", (64, 64), 90)
    grey.save(two, "MPO", save_all=True, append_images=[grey], progressive=True)
    first, end, more = two.getvalue().partition(b"\xff\xd9")
    assert read_image(two).getpixel((5, 5)) == (90, 90, 90)
    many = first + first[first.rindex(b"\xff\xda") :] * decoding.MOST_SCANS + end + more
    for item in (file, {"bytes": file.read_bytes(), "path": None}, io.BytesIO(many)):
        with pytest.raises(UnreadableImage, match="more than 100 scans; expected some ten"):
            read_image(item)


def test_bytes_of_a_scan_that_look_like_markers_are_none():
    """Within one a zero byte follows each that is all ones, which is no marker whose length to skip."""
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "JPEG", progressive=True, quality=95)
    assert file.getvalue().count(b"\xff\x00") > 100
    assert decoding._count_scans(file.getvalue(), 100) == file.getvalue().count(b"\xff\xda") == 10


@pytest.mark.parametrize("end", [b"", b"\x00", b"\xd9"])
def test_bytes_of_erased_memory_in_a_jpeg_take_no_time(end):
    """Looking for a marker anew from each of them would take hours."""
    whole = progressive(3)
    assert decoding._count_scans(whole[:-2] + b"\xff" * 2**20 + end, 100) == decoding._count_scans(whole, 100)


def test_what_pillow_decodes_in_python_is_refused_where_it_is_large(monkeypatch):
    def qoi(pixels: int) -> dict[str, object]:
        head = b"qoif" + struct.pack(">II", pixels, 1) + b"\x03\x00"
        return {"bytes": head + b"\xfe\x10\x20\x30" + b"\xc0" * (pixels - 1) + bytes(7) + b"\x01", "path": None}

    monkeypatch.setattr(decoding, "MOST_IN_PYTHON", 100)
    assert read_image(qoi(100)).getpixel((99, 0)) == (16, 32, 48)
    with pytest.raises(UnreadableImage, match=r"101 pixels in a form of QOI that Pillow .* Save it as PNG"):
        read_image(qoi(101))
    with pytest.raises(UnreadableImage, match="no image of a known format"):
        read_image(qoi(100), formats=("JPEG", "PNG"))


@pytest.mark.parametrize("mode", ["F", "I;16"])
def test_grey_of_more_than_eight_bits_takes_little_more_memory_than_its_pixels(mode):
    image = PIL.Image.fromarray(np.full((3000, 1000), 7, {"F": np.float32, "I;16": np.uint16}[mode]))
    tracemalloc.start()  # which sees arrays of numpy; Pillow holds five bytes a pixel besides
    try:
        read_image(image)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * image.width * image.height


def test_what_a_data_set_says_is_printed_without_control_characters():
    for item in ({"bytes": None, "path": "/no\x1b[2J\nwhere"}, {"bytes": None, "path": "a\x1b[2J://b"}):
        with pytest.raises(UnreadableImage) as raised:
            read_image(item, "row 1")
        assert str(raised.value).isprintable()
    stored = {"\x1b[2J\n": [1]}
    with pytest.raises(ValueError, match="no column of images") as refused:
        open_images(datasets.Dataset.from_dict(stored))
    assert str(refused.value).isprintable()


def test_a_path_may_be_a_text_of_numpys(tmp_path):
    PIL.Image.new("RGB", (4, 4), (200, 30, 90)).save(tmp_path / "a.png")
    assert read_image(np.array([str(tmp_path / "a.png")])[0]).getcolors() == [(16, (200, 30, 90))]


@pytest.mark.parametrize("item", [(PIL.Image.new("RGB", (4, 4)), 0), [PIL.Image.new("RGB", (4, 4))], 7])
def test_what_is_no_image_is_named_such_as_one_with_its_label(item):
    expected = f"image 0 cannot be read (TypeError: it is a {type(item).__name__}; expected a PIL image or a path,"
    with pytest.raises(UnreadableImage, match=re.escape(expected)):
        read_image(item, "image 0")


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3), np.uint8), torch.zeros(3, 4, 4)], ids=["numpy", "torch"])
def test_an_array_is_no_image_and_the_error_says_how_to_make_one(array):
    with pytest.raises(UnreadableImage, match=r"it is a (ndarray|Tensor); expected a PIL image, as"):
        read_image(array, "image 0")
