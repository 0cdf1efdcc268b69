"""A vocabulary's model card, made of the template `card.md`, and a picture of its words."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import math
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from huggingface_hub import ModelCard, ModelCardData

from ..hub_names import check_hub_id
from ..printable import printable
from .files import VocabularyInfo

PICTURE_FILE = "words.png"
LIBRARY = "vwt-hf"
SHOWN = 144
"""Words in the picture."""
SHOWN_TEXT = 300
"""Characters of a name in the card."""


def render_card(
    repo_id: str,
    shape: tuple[int, ...],
    info: VocabularyInfo,
    revision: str | None = None,
    subfolder: str | None = None,
) -> bytes:
    """README.md of a vocabulary.

    Args:
        repo_id: what the usage snippet loads: a Hub id or a folder.
        shape: (size, channels, p, p) of the words.
        revision, subfolder: where in the repository they are.
    """
    where = {"revision": revision, "subfolder": subfolder}
    named = [f"{name}={_quoted(value)}" for name, value in where.items() if value is not None]
    data = ModelCardData(
        library_name=LIBRARY,
        tags=["visual-words", "vision-transformer", "token-reduction", f"patch{shape[-1]}", "arxiv:2411.15397"],
        datasets=[info.dataset] if info.dataset and _is_hub_id(info.dataset) else None,
        base_model=info.base_model if info.base_model and _is_hub_id(info.base_model) else None,
    )
    template = importlib.resources.files(__package__) / "card.md"
    card = ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        source=", ".join([_quoted(repo_id), *named]),
        size=shape[0],
        channels=shape[1],
        patch_size=shape[-1],
        info=info,
        code=_code,
        picture=PICTURE_FILE,
    )
    text = str(card).rstrip().encode()
    return text + b"\n\n" + _seal_of(text) + b"\n"


def is_card_of_words(readme: bytes) -> bool:
    """Whether a README.md is a vocabulary's card, as `render_card` wrote it and without a change since."""
    *lines, last = readme.strip().splitlines() or [b""]
    return last == _seal_of(b"\n".join(lines).rstrip())


def _seal_of(card: bytes) -> bytes:
    """A line that is not shown and tells a card from one that somebody has edited since."""
    return f"<!-- {LIBRARY} wrote this card, sha256 {hashlib.sha256(card).hexdigest()} -->".encode()


def _quoted(text: str) -> str:
    return json.dumps(printable(text), ensure_ascii=False)


def _code(text: str) -> str:
    """A name as code in a table, in which it is neither Markdown nor HTML."""
    # Every | ends a cell of a table, in code too.
    return "`" + printable(text[:SHOWN_TEXT]).replace("`", "'").replace("|", "/") + "`"


def _is_hub_id(name: str) -> bool:
    """Whether a name is one that the Hub may link to from a card's metadata."""
    try:
        check_hub_id(name)
    except ValueError:
        return False
    # Looked for on the disk only now: a stranger's name might be a path to anywhere.
    return "/" in name and not Path(name).exists()


def render_words(words: torch.Tensor, frequencies: torch.Tensor | None) -> bytes:
    """A PNG of the most frequent words, row by row; of the first words if frequencies are not known.

    Args:
        words: (size, channels, p, p) raw RGB. Words of one channel, or of more than three, are shown grey.
        frequencies: (size,) or `None`.
    """
    if frequencies is not None:
        words = words[frequencies.argsort(descending=True, stable=True)]
    words = words[:SHOWN]
    if words.shape[1] != 3:
        words = words.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    columns = math.ceil(math.sqrt(len(words)))
    rows = math.ceil(len(words) / columns)
    scale = max(1, 32 // words.shape[-1])
    cell = words.shape[-1] * scale
    gap = 4
    sheet: Any = PIL.Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), (200, 200, 200))
    pixels = (words.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    for index, word in enumerate(pixels):
        tile = PIL.Image.fromarray(word.contiguous().numpy()).resize((cell, cell), PIL.Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        sheet.paste(tile, (gap + column * (cell + gap), gap + row * (cell + gap)))
    file = io.BytesIO()
    sheet.save(file, format="PNG", optimize=True)
    return file.getvalue()
