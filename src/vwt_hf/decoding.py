"""One image, decoded: in RGB of eight bits and upright, from whatever holds it, or an error that says why not."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from .printable import printable

FORMATS = (
    "JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF", "JPEG2000", "MPO", "PPM", "ICO", "QOI", "PCX", "SGI", "TGA",
)  # fmt: skip
"""What Pillow decodes by itself; others (EPS, WMF, ...) run programs, or hold no photographs."""
WHITE = {"I;16": (65535,), "I": (255, 65535, 2**31 - 1), "F": (1, 255, 65535)}
"""What may be white in grey images of more than eight bits, by Pillow's mode."""

REMOTE = ("hf", "https")
"""Kinds of addresses at which a data set may name an image, beside files."""
ARCHIVES = ("zip", "gzip", "bz2", "lz4", "xz", "zstd")
"""What an image may lie in there, as streamed data sets name it."""
LARGEST = 2**30
"""The most bytes of an image that are fetched from an address."""
MOST_SCANS = 100
"""The most scans of a JPEG. Each may take as long as the whole image; progressive JPEGs have some ten."""
MOST_VALUES = 2**18
"""The most values in a tag of a TIFF, such as where its strips are: each takes Pillow microseconds and up to 330
bytes."""
MOST_IN_PYTHON = 2**24
"""The most pixels of an image that Pillow decodes in Python, which takes a second and a half for each million."""

_NETWORK = ("aiohttp", "fsspec", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")
"""Packages whose errors are those of a connection."""
_OUT_OF_REACH = (MemoryError, ConnectionError, TimeoutError, FileNotFoundError)
"""Errors that say that bytes could not be had or held."""

_TOO_LARGE = (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)
"""The second is an error where a program asks for that, as `scripts/serve.py` does."""
_AS_BYTES = (1, 2, 7)
"""Types of values of a TIFF that Pillow keeps as bytes, without making a list."""
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
"""Tags of TIFF."""
_WHITE_IS_ZERO = 0
_ORIENTATION = 0x0112
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by its orientation in EXIF."""


class UnreadableImage(ValueError):
    """An image cannot be read; the message names it and says why."""

    @property
    def is_out_of_reach(self) -> bool:
        """Whether its bytes could not be had or held, as from a drive that is gone: later they may be."""
        error = self.__cause__
        # Decoders' own `OSError`s have no number.
        by_system = isinstance(error, OSError) and error.errno is not None
        by_network = type(error).__module__.split(".")[0] in _NETWORK
        return by_system or by_network or isinstance(error, _OUT_OF_REACH)


def read_image(item: Any, name: str | None = None, formats: Sequence[str] = FORMATS) -> Any:
    """An RGB PIL image, upright, from a PIL image, a path, or a data set's undecoded `{"bytes", "path"}`.

    Transparency is left out, as transformers does. Grey of 16 or 32 bits is scaled to 8. White of 32 bits is the
    smallest of 255 (1 in floating point), 65535 and 2**31 - 1 that no value exceeds by more than a tenth.

    Args:
        name: what an error calls it; by default its path.
        formats: what it may be, of `FORMATS`.

    Raises:
        UnreadableImage: it is no image of these formats, is damaged, or so large that it may be an attack.
    """
    try:
        return _upright(item, formats)
    # Decoders raise nearly anything for a broken file.
    except Exception as error:
        where = item.get("path") if isinstance(item, Mapping) else item
        name = name or (os.fspath(where) if isinstance(where, (str, os.PathLike)) else "an image")
        reason: object = error
        if isinstance(error, PIL.UnidentifiedImageError):  # whose message gives an address in memory
            reason = "no image of a known format"
        elif isinstance(error, _TOO_LARGE):  # whose message may give twice the limit
            reason = f"it has more pixels than PIL.Image.MAX_IMAGE_PIXELS, {PIL.Image.MAX_IMAGE_PIXELS:,}, allows"
        raise UnreadableImage(
            f"{printable(name)} cannot be read ({type(error).__name__}: {printable(reason)})"
        ) from error


def _upright(item: Any, formats: Sequence[str]) -> Any:
    if isinstance(item, PIL.Image.Image):
        return _in_eight_bits(item)
    if hasattr(item, "__array__") and not isinstance(item, (str, bytes)):  # numpy's or torch's, and no text of numpy's
        raise TypeError(
            f"it is a {type(item).__name__}; expected a PIL image, as PIL.Image.fromarray makes of an array"
        )
    if not (item is None or isinstance(item, (str, bytes, os.PathLike, Mapping)) or hasattr(item, "read")):
        raise TypeError(f"it is a {type(item).__name__}; expected a PIL image or a path, without a label beside it")
    PIL.Image.init()
    known = [kind for kind in formats if kind in PIL.Image.OPEN]  # some Pillows lack some
    with _opened(item) as file:
        _require_few_values(file)
        with PIL.Image.open(file, formats=known) as image:
            _require_little_work(image)
            return _in_eight_bits(image)


def _require_little_work(image: Any) -> None:
    """Refuses an image that takes minutes to decode: with very many scans, or large and decoded in Python."""
    pixels = image.width * image.height
    if pixels > MOST_IN_PYTHON and any(tile[0] in PIL.Image.DECODERS for tile in image.tile):
        raise ValueError(
            f"it has {pixels:,} pixels in a form of {image.format} that Pillow decodes slowly; expected at most "
            f"{MOST_IN_PYTHON:,}. Save it as PNG"
        )
    if image.format in ("JPEG", "MPO"):
        image.fp.seek(0)  # it is read from where its pixels begin, wherever one was
        if _count_scans(image.fp.read(), MOST_SCANS) > MOST_SCANS:
            raise ValueError(f"it has more than {MOST_SCANS} scans; expected some ten. Save it anew")


def _require_few_values(file: Any) -> None:
    """Refuses a TIFF with very many tags, or values in a tag, before Pillow makes lists of them.

    Args:
        file: at its start; it is left there.
    """
    most = 0
    if file.read(2) in (b"II", b"MM"):
        with contextlib.suppress(struct.error, OverflowError):  # damaged: Pillow says how
            most = _count_values(file)
    file.seek(0)
    if most > MOST_VALUES:
        raise ValueError(
            f"it is a TIFF of {most:,} tags, or values of one; expected at most {MOST_VALUES:,}. Save it anew"
        )


def _count_values(tiff: Any) -> int:
    """The number of values in the longest tag of a TIFF's first image, or the number of its tags, if that is larger."""
    tiff.seek(0)
    head = tiff.read(16)
    order = "<" if head[:2] == b"II" else ">"
    # A BigTIFF has longer numbers. Pillow goes by the third byte alone.
    at, place, number, entry = (8, "Q", "Q", "HHQ8x") if head[2] == 43 else (4, "I", "H", "HHI4x")
    tiff.seek(*struct.unpack_from(order + place, head, at))
    (tags,) = struct.unpack(order + number, tiff.read(struct.calcsize(order + number)))
    size = struct.calcsize(order + entry)
    entries = tiff.read(size * min(tags, MOST_VALUES))
    found = struct.iter_unpack(order + entry, entries[: len(entries) // size * size])
    return max([tags, *(count for _, kind, count in found if kind not in _AS_BYTES)])


_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL)
"""A marker of JPEG outside of scans. After it two bytes say how long its segment is."""


def _count_scans(jpeg: bytes, most: int) -> int:
    """How many times a JPEG goes over its image, up to `most` + 1. Files after its end do not count."""
    scans, at = 0, 2
    while scans <= most and (marker := _MARKER.search(jpeg, at)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        at = marker.end()
        if marker[1] != b"\x01":  # which stands alone
            at += int.from_bytes(jpeg[at : at + 2], "big")
    return scans


def _turned(image: Any) -> Any:
    """`image` turned upright by its EXIF, if that can be read."""
    image.load()
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # EXIF may be damaged in any way; the pixels are not
        turn = None
    # Pillow's own `exif_transpose` writes the rest of the EXIF anew, which fails if some of it is odd.
    return image if turn is None else image.transpose(turn)


def _in_eight_bits(image: Any) -> Any:
    """`image` upright, in RGB and without EXIF. Grey of more than eight bits is scaled; Pillow would make all above 255
    white."""
    turned, mode = _turned(image), image.mode[:4]  # I;16B is I;16 of another byte order
    if mode in WHITE:
        return _scaled(turned, mode, image.format, getattr(image, "tag_v2", {})).convert("RGB")
    # Palettes that are partly transparent, and colours multiplied by their opacity, have no direct way to RGB.
    through = {"P": "RGBA", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}.get(turned.mode)
    rgb = (turned if through is None else turned.convert(through)).convert("RGB")
    rgb.info = {}  # by which it would be turned once more
    return rgb


def _scaled(image: Any, mode: str, kind: str | None, tags: Mapping[int, Any]) -> Any:
    """Grey of more than eight bits in eight: white is the least of the values in `WHITE` that fits all pixels.

    Args:
        kind: the file's format.
        tags: of a TIFF. They may say that 12 bits of 16 are used, or that the largest value is black.
    """
    whites = (65535,) if mode == "I" and kind in ("PNG", "PPM") else WHITE[mode]  # these have no more than 16 bits
    bits, sample_format = (np.ravel(tags.get(tag, default))[0] for tag, default in ((_BITS, 0), (_SAMPLE_FORMAT, 1)))
    unsigned = mode == "I" and bits == 32 and sample_format == 1  # which Pillow takes for numbers with a sign
    if unsigned:
        whites = (*whites, 2**32 - 1)
    if mode == "I;16" and 8 < bits < 16:
        whites = (2 ** int(bits) - 1,)
    rows = max(1, 2**20 // max(1, image.width))  # at a time, as numbers take four times as much as pixels

    def strips() -> Any:
        for first in range(0, image.height, rows):
            strip = image.crop((0, first, image.width, min(first + rows, image.height)))
            values = np.asarray(strip)
            yield first, (values.view(np.uint32) if unsigned else values).astype(np.float32)

    top = max((values.max(initial=0, where=np.isfinite(values)) for _, values in strips()), default=0)
    white = next((white for white in whites if top <= 1.1 * white), top)
    grey = PIL.Image.new("L", image.size)
    for first, values in strips():
        scaled = np.nan_to_num(values.clip(0, white, out=values), copy=False)
        scaled *= 255 / white
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            np.subtract(255, scaled, out=scaled)
        grey.paste(PIL.Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8)), (0, first))
    return grey


@contextlib.contextmanager
def _opened(item: Any) -> Iterator[Any]:
    """The open file that holds an image, at its start; a pipe is read whole."""
    file = _file(item)
    with open(file, "rb") if isinstance(file, (str, bytes, os.PathLike)) else contextlib.nullcontext(file) as opened:
        if not (hasattr(opened, "seekable") and opened.seekable()):
            opened = io.BytesIO(opened.read())
        opened.seek(0)
        yield opened


def _file(item: Any) -> Any:
    """The path of an image, or a file in memory."""
    if item is None or (isinstance(item, Mapping) and item["bytes"] is None and item["path"] is None):
        raise ValueError("it holds no image")
    if not isinstance(item, Mapping):
        return item
    if item["bytes"] is not None:
        return io.BytesIO(item["bytes"])
    path = os.fspath(item["path"])  # as whoever made the data set wrote it
    return _fetched(path) if "://" in path else _existing(path)


def _fetched(address: str) -> io.BytesIO:
    """What lies at an address of fsspec, such as `zip://cat.jpg::https://...`, which a stranger may have written."""
    *archives, place = address.split("::")
    kind, there, local = place.partition("://")
    if not there:
        kind, local = "file", place
    for each, allowed in ((kind, (*REMOTE, "file")), *((link.partition("://")[0], ARCHIVES) for link in archives)):
        if each not in allowed:
            raise ValueError(f"a data set names it at {each}://; expected a file, or an address on the Hub or of https")
    if kind not in REMOTE:
        _existing(local)
    import fsspec  # of datasets, whose streams name files on the Hub

    encoded = bytearray()
    with fsspec.open(address, "rb") as file:  # `read` gives what has come, if a server does not say how much there is
        while len(encoded) <= LARGEST and (piece := file.read(LARGEST + 1 - len(encoded))):
            encoded += piece
    if len(encoded) > LARGEST:
        raise ValueError(
            f"it has more than {LARGEST:,} bytes; expected no more. Make the image smaller, or leave the row out"
        )
    return io.BytesIO(encoded)


def _existing(path: str) -> str:
    if not os.path.isfile(path):  # reading a device or a pipe need not end
        raise FileNotFoundError(
            f"a data set names it as {path}, which is no file here. Put it there, or run in the folder that relative "
            "paths start from"
        )
    return path
