"""The evidence that a setting is right for a model: its checks, and its section in a model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME

from .checks import is_number
from .printable import shown
from .whole_saves import write_files

MOST = 32
"""Entries of an evidence, and values of a list in it."""
_NAME = re.compile("[a-z][a-z0-9_]{0,39}")
# Without what would end a cell of a table, code in it, or a comment.
_TEXT = re.compile("(?:(?![<>`|])[ -~]){0,200}")
_BEGIN, _END = "<!-- vwt-hf -->", "<!-- /vwt-hf -->"
_LABELS = {
    "images": "unlabelled images",
    "measure": "measured as",
    "value": "measured",
    "interval": "its 95 % interval",
    "tokens": "tokens of an image, mean over images and layers",
    "of_tokens": "the same of the plain model",
    "speed": "times as fast as the plain model",
    "by": "speed is of",
    "target": "asked for",
}


def checked_evidence(value: Any) -> dict[str, Any]:
    """A setting's evidence, copied to plain types.

    Raises:
        ValueError: it is no dict of at most 32 short texts, numbers, booleans or lists of them.
    """
    if not isinstance(value, dict) or len(value) > MOST or not all(map(_is_entry, value.items())):
        raise ValueError(
            f"VWTConfig.evidence is {shown(value)}; expected None, or at most {MOST} names with short texts, numbers, "
            "True, False, None or lists of them, as vwt_hf.calibrate gives."
        )
    return {
        str(name): [_plain(one) for one in entry] if isinstance(entry, (list, tuple)) else _plain(entry)
        for name, entry in value.items()
    }


def is_evidence_of(evidence: dict[str, Any], setting: dict[str, Any]) -> bool:
    """Whether an evidence that `calibrate` measured is of a setting; of any other evidence only its user knows."""
    chosen_by, left_open = ("method", "tolerance", "similarity"), ("layers", "join_ratio", "keep_ratio", "num_patches")
    if not all(name in evidence for name in chosen_by):
        return True
    is_usual = setting["proportional_attention"] and all(setting.get(name) is None for name in left_open)
    return is_usual and all(setting.get(name) == evidence[name] for name in chosen_by)


def _plain(value: Any) -> Any:
    """A value; a text of a class of its own, such as torch's version, as a `str`: YAML would name the class."""
    return str(value) if isinstance(value, str) else value


def _is_entry(named: tuple[Any, Any]) -> bool:
    name, value = named
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(
        isinstance(name, str) and _NAME.fullmatch(name) and len(values) <= MOST and all(map(_is_scalar, values))
    )


def _is_scalar(value: Any) -> bool:
    is_text = isinstance(value, str) and _TEXT.fullmatch(value) is not None
    return value is None or isinstance(value, bool) or is_number(value) or is_text


def write_section(folder: Path, evidence: list[dict[str, Any]], adds: bool = True) -> None:
    """Puts the evidence of a model's settings into the model card in `folder`, if there is one, in place of older.

    Args:
        adds: whether a card that has no evidence gets it.
    """
    file = (folder / REPOCARD_NAME).resolve()  # a link stays one
    if not file.is_file():
        return
    before = file.read_bytes()
    end = "\r\n" if b"\r\n" in before else "\n"
    # What is not ours stays as it is, whatever encoding it is in.
    text = before.decode("utf-8", "surrogateescape")
    card = _without_section(text, end)
    if evidence and (adds or card != text):
        card = f"{card.rstrip()}{end}{end}{_section(evidence).replace(chr(10), end)}"
    after = card.encode("utf-8", "surrogateescape")
    if after != before:
        write_files(file.parent, {file.name: after})


def _without_section(card: str, end: str) -> str:
    """A card without what `_section` made. One line end takes the place of each section and the line ends around it."""
    parts, at = [], 0  # no pattern: a stranger's card of many beginnings without an end would take one minutes
    while (begin := card.find(_BEGIN, at)) >= 0 and (stop := card.find(_END, begin)) >= 0:
        parts.append(card[at:begin].rstrip("\r\n"))
        at = stop + len(_END)
        while card[at : at + 1] in ("\r", "\n"):
            at += 1
    return end.join([*parts, card[at:]])


def _section(evidence: list[dict[str, Any]]) -> str:
    tables = "\n".join(map(_table, evidence))
    return f"""{_BEGIN}
## Shorter patch sequences

With the Python package `vwt-hf` this model runs on fewer tokens than its images have patches; without it, it is the
plain model. How far was chosen without labels, by comparing its answers with the plain model's. The figures are of the
images that it was chosen on, so it may do a little worse on others like them, and of the weights of then: after
training it has to be chosen anew.

{tables}
{_END}
"""


def _table(evidence: dict[str, Any]) -> str:
    rows = (f"| {_LABELS.get(name, name.replace('_', ' '))} | {_cell(value)} |\n" for name, value in evidence.items())
    return "| | |\n|---|---|\n" + "".join(rows)


def _cell(value: Any) -> str:
    """A value as code, in which no text is Markdown or HTML."""
    values = value if isinstance(value, list) else [value]
    return f"`{', '.join(f'{one:.6g}' if isinstance(one, float) else str(one) for one in values)}`"
