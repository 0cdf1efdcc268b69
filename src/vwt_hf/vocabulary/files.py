"""A vocabulary on disk and on the Hub: which files, how they are written whole, and what is refused on reading.

`vocabulary.safetensors` holds `words` (size, channels, p, p) float32 in raw RGB [0, 1] and, if known, `frequencies`
(size,) int64. `vocabulary.json` names that file, its SHA-256 and shape, and tells of the words. Nothing is executed.

Replacing `vocabulary.json` is what makes a save count: until then the folder holds the old vocabulary, and from then on
the new one. So the new words are first written under another name, which the new `vocabulary.json` gives; after that
they are renamed to `vocabulary.safetensors`. What a killed save leaves is removed by the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors.torch
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..checks import checked_statistics, is_number
from ..hub_names import NotReached, check_revision, check_subfolder, download_if_there, kept_answer
from ..printable import printable, shown
from ..whole_saves import Save, remove, saving
from .word_files import MOST_BYTES, read_bare_tensor, read_safetensors

WORDS_FILE = "vocabulary.safetensors"
INFO_FILE = "vocabulary.json"
LEGACY_FILE = "vocab.pt"
LEGACY_SHAPE = (3, 16, 16)
LARGEST_VALUE = 16.0
"""Largest absolute value of a word that is read. Raw RGB is in [0, 1]; eight bits reach up to 255."""
LONGEST_TEXT = 1000
"""Characters of a name that `vocabulary.json` records."""
_MOST_INFO_BYTES = 2**16
_ATTEMPTS = 100
"""To read a folder that is being saved into."""
_UNSETTLED = re.compile(r"vocabulary-[0-9a-f]{16}\.safetensors")
"""The name of words until they are renamed to `WORDS_FILE`."""


@dataclasses.dataclass(frozen=True)
class VocabularyInfo:
    """How a vocabulary came about; `None` for what is not known."""

    image_mean: tuple[float, ...] | None = None
    """Mean of the image processor that the images went through. The words are raw RGB all the same."""
    image_std: tuple[float, ...] | None = None
    """Its standard deviation."""
    dataset: str | None = None
    """Name of the data set, its Hub id if it has one."""
    base_model: str | None = None
    """Hub id of the model whose image processor was used."""
    patches: int | None = None
    """Patches learned from."""
    images: int | None = None
    """Images read."""
    unreadable: int | None = None
    """Images that could not be read."""
    inertia: float | None = None
    """Mean squared Euclidean distance of a patch, in raw RGB, to its nearest word when it came (`MiniBatchKMeans`)."""
    seed: int | None = None
    library_version: str | None = None
    """Version of vwt_hf that learned the words."""

    def __post_init__(self) -> None:
        for name, positive in (("image_mean", False), ("image_std", True)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checked_statistics(name, getattr(self, name), positive=positive))
        for name in ("dataset", "base_model", "library_version"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and len(text) <= LONGEST_TEXT):
                raise ValueError(f"{name} is {shown(text)}; expected a string of {LONGEST_TEXT} characters at most.")
        for name, low in (("patches", 0), ("images", 0), ("unreadable", 0), ("seed", -(2**63))):
            count = getattr(self, name)
            if count is not None and not (type(count) is int and low <= count < 2**64):
                raise ValueError(f"{name} is {shown(count)}; expected an integer in [{low}, 2**64).")
        if self.inertia is not None and not is_number(self.inertia, 0, 1e300):
            raise ValueError(f"inertia is {shown(self.inertia)}; expected a number in [0, 1e300].")


class Located(NamedTuple):
    """Where a vocabulary's files are."""

    source: str
    """A folder or a Hub id, as the user wrote it."""
    commit: str | None
    """The commit on the Hub, if known."""
    file: Path
    """`vocabulary.json`, or the legacy `vocab.pt`."""
    download: dict[str, Any] | None
    """Arguments of `hf_hub_download` for further files of the repository; `None` for a folder."""


def locate(
    source: str | os.PathLike[str],
    *,
    revision: str | None,
    subfolder: str | None,
    folders: bool = True,
    pickles: bool = True,
    **hub: Any,
) -> Located:
    """Finds a vocabulary in a folder or on the Hub, downloading no more than its first file.

    Args:
        folders: whether `source` may be a folder of this machine.
        pickles: whether a `vocab.pt` is taken if there is no `vocabulary.json`.

    Raises:
        FileNotFoundError: it holds none.
        ValueError: the revision or subfolder is not possible.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or may not be read.
    """
    source, revision, subfolder = str(source), check_revision(revision), check_subfolder(subfolder)
    where = f"{source}/{subfolder}" if subfolder else source
    names = (INFO_FILE, LEGACY_FILE) if pickles else (INFO_FILE,)
    holds_none = f"holds neither {INFO_FILE} nor {LEGACY_FILE}" if pickles else f"holds no {INFO_FILE}"
    missing = f"{where} {holds_none}; expected a folder that save_pretrained wrote, or a repository on the Hub"
    if folders and os.path.isdir(source):
        folder = Path(source) / (subfolder or "")
        for name in names:
            if (folder / name).is_file():
                return Located(source, None, folder / name, None)
        raise FileNotFoundError(f"{missing}.")
    # A Hub id has one slash at most, and hf_hub_download's message for a path is of no help.
    if source.count("/") > 1 or source.startswith((".", "~", os.sep)):
        raise FileNotFoundError(f"{source} is no folder; expected one that save_pretrained wrote, or a Hub id.")
    try:
        return _locate_on_hub(names, where, {"repo_id": source, "revision": revision, "subfolder": subfolder, **hub})
    except EntryNotFoundError as failure:
        revision_named = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(f"{missing}{revision_named}. ({failure})") from failure


def _locate_on_hub(names: Sequence[str], where: str, download: dict[str, Any]) -> Located:
    """The first file of these names that a repository has, by arguments of `hf_hub_download`.

    Raises:
        EntryNotFoundError: it has none of them.
        FileNotFoundError: nothing says whether it has them.
    """
    failures = []
    for name in names:
        try:
            file = Path(hf_hub_download(filename=name, **download))
        except EntryNotFoundError as error:
            failures.append(error)
            if not isinstance(error, LocalEntryNotFoundError):
                continue
            was_asked = not (constants.HF_HUB_OFFLINE or download.get("local_files_only"))
            left_open = was_asked and kept_answer(name=name, **download) is None
            if name == names[-1] or left_open:
                raise (NotReached if left_open else FileNotFoundError)(
                    f"{where} cannot be had: load it once where the Hub can be reached, or give a folder that it was "
                    f"downloaded to. ({error})"
                ) from error
        else:
            top = file.parents[len(Path(download["subfolder"] or "").parts)]
            commit = top.name if top.parent.name == "snapshots" else None
            return Located(download["repo_id"], commit, file, download | {"revision": commit or download["revision"]})
    raise failures[0]


def read_vocabulary(located: Located) -> tuple[torch.Tensor, torch.Tensor | None, VocabularyInfo]:
    """Words (size, channels, p, p) in raw RGB, frequencies (size,) if known, and how the words came about.

    This takes little more memory than the words, and no more than the files are long.

    Raises:
        ValueError: a file is damaged, or holds something else; the message names the source and the file.
    """
    if located.file.name == LEGACY_FILE:
        return _read_legacy(located)
    for _ in range(_ATTEMPTS):
        before = identity_of(located.file)
        try:
            return _read_words(located, _read_fields(located))
        except (ValueError, FileNotFoundError):
            # If a save ended meanwhile, the words may be its own, and the facts those of the save before.
            if located.download is not None or identity_of(located.file) == before:
                raise
    _refuse(located, INFO_FILE, "it is being replaced all the time; load it once nobody saves into the folder")


def identity_of(file: Path) -> tuple[int, int, int]:
    """What differs once another file has taken the place of this one, also with the same content."""
    status = os.stat(file)
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_words(located: Located, fields: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None, VocabularyInfo]:
    name, sha256 = fields.pop("file", WORDS_FILE), fields.pop("sha256", None)
    # One of the names that are given here: whoever wrote the JSON must not reach other files of this machine.
    if not isinstance(name, str) or not (name == WORDS_FILE or _UNSETTLED.fullmatch(name)):
        expected = f"a file name without a folder: {WORDS_FILE}, or vocabulary-<16 hexadecimal digits>.safetensors"
        _refuse(located, INFO_FILE, f"file is {shown(name)}; expected {expected}")
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        _refuse(located, INFO_FILE, f"sha256 is {shown(sha256)}; expected 64 hexadecimal digits")
    known = {field.name for field in dataclasses.fields(VocabularyInfo)}
    try:
        info = VocabularyInfo(**{key: value for key, value in fields.items() if key in known})
    except ValueError as error:
        _refuse(located, INFO_FILE, str(error))
    path = located.file.parent / name
    if located.download is not None:
        path = download_if_there(filename=name, **located.download) or path
    if not path.is_file():
        _refuse(located, name, f"it is missing, and {INFO_FILE} names it; save or download the vocabulary again")
    _require_inside(located, path)
    size, channels, patch_size = (fields.get(key) for key in ("size", "channels", "patch_size"))
    try:
        words, frequencies = read_safetensors(path, (size, channels, patch_size, patch_size), sha256)
        require_raw(words)
    except ValueError as error:
        _refuse(located, name, str(error))
    return words, frequencies, info


def require_raw(words: torch.Tensor) -> None:
    """Raises `ValueError` if words cannot be raw RGB in [0, 1]: for example, values of eight bits."""
    if not words.numel():
        return
    require_finite(words)
    low, high = (float(value) for value in words.aminmax())
    if max(-low, high) > LARGEST_VALUE:
        raise ValueError(
            f"words hold values from {low:.4g} to {high:.4g}; expected raw RGB, which is in [0, 1], and nothing beyond "
            f"±{LARGEST_VALUE:g}. Divide values of eight bits by 255."
        )


def require_finite(words: torch.Tensor) -> None:
    """Raises `ValueError` if words hold NaN or infinity."""
    # The extremes first, which take no memory.
    if not torch.stack(words.aminmax()).isfinite().all():
        broken = int((~words.flatten(1).isfinite().all(dim=1)).sum())
        raise ValueError(f"{broken} of {len(words)} words hold values that are not finite; learn or save them again.")


def _require_inside(located: Located, path: Path) -> None:
    """Refuses a link that leads out of the folder that was named, or of its repository in huggingface_hub's cache."""
    allowed = [Path(located.source).resolve() if located.download is None else located.file.parent.resolve()]
    folder = Path(os.path.abspath(located.file.parent))
    # Files of a snapshot are links to models--me--words/blobs.
    allowed += [at.parent.resolve() for at in folder.parents if at.name == "snapshots" and "--" in at.parent.name]
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in allowed):
        _refuse(
            located,
            path.name,
            "it is a link that leads out of the folder, or in a folder that is one; expected a file in it",
        )


def _refuse(located: Located, file: str, reason: str) -> NoReturn:
    raise ValueError(f"{printable(located.source)}: {file}: {reason.removesuffix('.')}.")


def _read_fields(located: Located) -> dict[str, Any]:
    _require_inside(located, located.file)
    with open(located.file, "rb") as file:
        content = file.read(_MOST_INFO_BYTES + 1)
    if len(content) > _MOST_INFO_BYTES:
        _refuse(located, INFO_FILE, f"it is larger than {_MOST_INFO_BYTES:,} bytes; expected a few facts about words")
    try:
        fields = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_without_repetition,
            parse_int=_short_integer,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        _refuse(located, INFO_FILE, f"it is no JSON ({printable(str(error))[:200]})")
    if not isinstance(fields, dict):
        _refuse(located, INFO_FILE, f"it holds a {type(fields).__name__}; expected an object")
    return fields


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} stands in it twice")
    return fields


def _short_integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"an integer of {len(digits)} digits; expected 20 at most")
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _read_legacy(located: Located) -> tuple[torch.Tensor, torch.Tensor | None, VocabularyInfo]:
    """The format that the paper's authors published: a bare tensor (size, 3 · 16 · 16) in CLIP's pixel space."""
    _require_inside(located, located.file)
    mean = torch.tensor(OPENAI_CLIP_MEAN, dtype=torch.float64, device="cpu").view(-1, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, dtype=torch.float64, device="cpu").view(-1, 1, 1)
    try:
        words = read_bare_tensor(located.file, LEGACY_SHAPE, scale=std, shift=mean)
        require_raw(words)
    except ValueError as error:
        _refuse(located, LEGACY_FILE, str(error))
    warnings.warn(
        f"{located.source}: {LEGACY_FILE} says nothing about its words: they are taken for 16×16 patches normalised "
        "by CLIP's mean and standard deviation, and mapped to raw RGB. save_pretrained writes them as safetensors.",
        stacklevel=5,
    )
    return words, None, VocabularyInfo(image_mean=tuple(OPENAI_CLIP_MEAN), image_std=tuple(OPENAI_CLIP_STD))


def tensor_bytes(tensors: dict[str, torch.Tensor], header: dict[str, str]) -> bytes:
    """A safetensors file."""
    return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, header)


def vocabulary_files(words: torch.Tensor, frequencies: torch.Tensor | None, info: VocabularyInfo) -> dict[str, bytes]:
    """The contents of `vocabulary.safetensors` and `vocabulary.json`, of what `VisualVocabulary` takes.

    Raises:
        ValueError: they would not be read again: the words are too many, or their values too large.
    """
    if 4 * words.numel() > MOST_BYTES:
        raise ValueError(f"{len(words):,} words take {4 * words.numel():,} bytes; expected {MOST_BYTES:,} at most.")
    require_raw(words)
    tensors = {"words": words} if frequencies is None else {"words": words, "frequencies": frequencies}
    content = tensor_bytes(tensors, {"format": "pt"})
    size, channels, patch_size, _ = words.shape
    fields = {
        "file": WORDS_FILE,
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": size,
        "channels": channels,
        "patch_size": patch_size,
        **dataclasses.asdict(info),
    }
    facts = _json(fields)
    if len(facts) > _MOST_INFO_BYTES:
        raise ValueError(
            f"{INFO_FILE} would have {len(facts):,} bytes; expected {_MOST_INFO_BYTES:,} at most. Leave out what info "
            "need not record."
        )
    return {WORDS_FILE: content, INFO_FILE: facts}


def _json(fields: dict[str, Any]) -> bytes:
    # A folder's name may hold bytes that are no letters, which UTF-8 cannot write.
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def write_vocabulary(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes what `vocabulary_files` makes, and other files beside it, into `folder`, which is made if need be.

    However this ends, the folder holds the old vocabulary or the new one. The other files are written last.
    """
    unsettled = f"vocabulary-{secrets.token_hex(8)}.safetensors"
    beside = {name: content for name, content in contents.items() if name not in (WORDS_FILE, INFO_FILE)}
    info = _json(json.loads(contents[INFO_FILE]) | {"file": unsettled})
    with saving(folder) as save:
        save.write({unsettled: contents[WORDS_FILE], INFO_FILE: info, **beside})
        try:
            save.place(unsettled)
            save.place(INFO_FILE)
        finally:
            if present_info(folder).get("file") != unsettled:
                remove([folder / unsettled])
        for name in beside:
            save.place(name)
        # The save counts already. If a program holds the old words open, the next save gives the words their name.
        with contextlib.suppress(OSError):
            _settle(folder, save)


def _settle(folder: Path, save: Save) -> None:
    """Renames a vocabulary's words to `WORDS_FILE`, and removes what killed saves left, unless another save runs."""
    left = [path for path in folder.iterdir() if _UNSETTLED.fullmatch(path.name)] + save.left_overs()
    if not save.is_alone():
        return
    info = present_info(folder)
    if _UNSETTLED.fullmatch(str(info.get("file"))):
        # A second name first, so that the folder is whole at every step.
        try:
            os.link(folder / info["file"], save.new / WORDS_FILE)
        except OSError:  # some file systems, as exFAT, have no second names
            save.write({WORDS_FILE: (folder / info["file"]).read_bytes()})
        save.write({INFO_FILE: _json(info | {"file": WORDS_FILE})})
        save.place(WORDS_FILE)
        save.place(INFO_FILE)
    remove(left)


def present_info(folder: Path) -> dict[str, Any]:
    """The contents of a folder's `vocabulary.json`; an empty dict if it cannot be read."""
    try:
        info = json.loads((folder / INFO_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return info if isinstance(info, dict) else {}
