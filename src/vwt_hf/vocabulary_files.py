"""A vocabulary on disk and on the Hub: which files, how they are written whole, and what is refused on reading.

`vocabulary.safetensors` holds `words` (size, channels, p, p) float32 in raw RGB [0, 1] and, where known, `frequencies`
(size,) int64. `vocabulary.json` names that file, its shape and how the words came about. Nothing read is ever executed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

WORDS_FILE = "vocabulary.safetensors"
INFO_FILE = "vocabulary.json"
LEGACY_FILE = "vocab.pt"
LEGACY_SHAPE = (3, 16, 16)


@dataclasses.dataclass(frozen=True)
class VocabularyInfo:
    """How a vocabulary came about; `None` where it is not known."""

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
    """Images that could not be."""
    inertia: float | None = None
    """Mean squared Euclidean distance of a patch, in raw RGB, to its nearest word, on patches not yet learned from."""
    seed: int | None = None
    library_version: str | None = None
    """Version of vwt_hf that learned the words."""

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, (list, tuple)) or not all(isinstance(v, (int, float)) for v in value):
                    raise ValueError(f"{name} is {value!r}; expected one number for each channel, or None.")
                object.__setattr__(self, name, tuple(map(float, value)))


class Located(NamedTuple):
    """Where a vocabulary's files are."""

    source: str
    """As the user wrote it: a folder or a Hub id."""
    commit: str | None
    """Commit on the Hub that was resolved to."""
    file: Path
    """`vocabulary.json`, or the legacy `vocab.pt`."""
    download: dict[str, Any] | None
    """Arguments by which further files of the repository are had; `None` for a folder."""


def locate(source: str | os.PathLike[str], *, revision: str | None, subfolder: str | None, **hub: Any) -> Located:
    """Finds a vocabulary in a folder or on the Hub, downloading no more than its first file.

    Raises:
        FileNotFoundError: it holds none.
        huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or may not be read.
    """
    source = str(source)
    where = f"{source}/{subfolder}" if subfolder else source
    missing = f"{where} holds neither {INFO_FILE} nor {LEGACY_FILE}; expected a folder that save_pretrained wrote, or "
    if os.path.isdir(source):
        folder = Path(source) / (subfolder or "")
        for name in (INFO_FILE, LEGACY_FILE):
            if (folder / name).is_file():
                return Located(source, None, folder / name, None)
        raise FileNotFoundError(f"{missing}a repository on the Hub.")
    # A Hub id has one slash at most, and hf_hub_download's message for a path is of no help.
    if source.count("/") > 1 or source.startswith((".", "~", os.sep)):
        raise FileNotFoundError(f"{source} is no folder; expected one that save_pretrained wrote, or a Hub id.")
    download = {"repo_id": source, "revision": revision, "subfolder": subfolder, **hub}
    failure: Exception | None = None
    for name in (INFO_FILE, LEGACY_FILE):
        try:
            path = hf_hub_download(filename=name, **download)
        except EntryNotFoundError as error:
            failure = failure or error
            continue
        found = re.search(r"snapshots/([^/]+)/", Path(path).as_posix())
        commit = found.group(1) if found else None
        return Located(source, commit, Path(path), {**download, "revision": commit or revision})
    revision_named = f" at revision {revision}" if revision else ""
    raise FileNotFoundError(f"{missing}a repository on the Hub{revision_named}. ({failure})") from failure


def read_vocabulary(located: Located) -> tuple[torch.Tensor, torch.Tensor | None, VocabularyInfo]:
    """Words (size, channels, p, p) in raw RGB, frequencies (size,) if known, and information.

    Raises:
        ValueError: a file is damaged, or holds something else; the message names the source and the file.
    """
    if located.file.name == LEGACY_FILE:
        return _read_legacy(located)
    fields = _read_json(located)
    name = fields.pop("file", WORDS_FILE)
    # A file name alone: whoever wrote the JSON must not reach other files of this machine.
    if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
        _refuse(located, INFO_FILE, f"file is {name!r}; expected a file name without a folder")
    if located.download is not None:
        path = Path(hf_hub_download(filename=name, **located.download))
    else:
        path = located.file.parent / name
    if not path.is_file():
        _refuse(located, name, f"it is missing, and {INFO_FILE} names it; save or download the vocabulary again")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        _refuse(located, name, f"it is truncated or no safetensors file ({error}); save or download it again")
    words = tensors.get("words")
    if words is None:
        _refuse(located, name, f"it has no tensor 'words', only {', '.join(tensors) or 'none'}")
    said = tuple(fields.pop(key, None) for key in ("size", "channels", "patch_size"))
    expected = (*said, said[-1])
    if tuple(words.shape) != expected:
        _refuse(located, name, f"words have shape {tuple(words.shape)}, but {INFO_FILE} says {expected}")
    known = {field.name for field in dataclasses.fields(VocabularyInfo)}
    try:
        info = VocabularyInfo(**{key: value for key, value in fields.items() if key in known})
    except ValueError as error:
        _refuse(located, INFO_FILE, str(error))
    return words, tensors.get("frequencies"), info


def _refuse(located: Located, file: str, reason: str) -> NoReturn:
    raise ValueError(f"{located.source}: {file}: {reason}.")


def _read_json(located: Located) -> dict[str, Any]:
    try:
        fields = json.loads(located.file.read_text(encoding="utf-8"))
    except ValueError as error:
        _refuse(located, INFO_FILE, f"it is no JSON ({error})")
    if not isinstance(fields, dict):
        _refuse(located, INFO_FILE, f"it holds a {type(fields).__name__}; expected an object")
    return fields


def _read_legacy(located: Located) -> tuple[torch.Tensor, torch.Tensor | None, VocabularyInfo]:
    """The format that the paper's authors published: a bare tensor (size, 3 · 16 · 16) in CLIP's pixel space."""
    values = LEGACY_SHAPE[0] * LEGACY_SHAPE[1] * LEGACY_SHAPE[2]
    expected = f"expected one float tensor (size, {values}), 16×16 RGB patches normalised as CLIP's"
    try:
        # weights_only: tensors are read, and nothing that a pickle asks to run is run.
        tensor = torch.load(located.file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        _refuse(located, LEGACY_FILE, f"it cannot be read as tensors alone, and nothing else is ({reason}); {expected}")
    if not isinstance(tensor, torch.Tensor):
        _refuse(located, LEGACY_FILE, f"it holds a {type(tensor).__name__}; {expected}")
    if tensor.ndim != 2 or tensor.shape[1] != values or not tensor.is_floating_point():
        _refuse(located, LEGACY_FILE, f"it holds a {tensor.dtype} tensor {tuple(tensor.shape)}; {expected}")
    warnings.warn(
        f"{located.source}: {LEGACY_FILE} says nothing about its words: they are taken for 16×16 patches normalised "
        "by CLIP's mean and standard deviation, and mapped to raw RGB. save_pretrained writes them as safetensors.",
        stacklevel=4,
    )
    mean = torch.tensor(OPENAI_CLIP_MEAN, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, dtype=torch.float64).view(-1, 1, 1)
    words = (tensor.double().unflatten(1, LEGACY_SHAPE) * std + mean).float()
    return words, None, VocabularyInfo(image_mean=tuple(OPENAI_CLIP_MEAN), image_std=tuple(OPENAI_CLIP_STD))


def tensor_bytes(tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> bytes:
    """A safetensors file."""
    return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, header)


def vocabulary_files(words: torch.Tensor, frequencies: torch.Tensor | None, info: VocabularyInfo) -> dict[str, bytes]:
    """The contents of `vocabulary.safetensors` and `vocabulary.json`."""
    tensors = {"words": words} if frequencies is None else {"words": words, "frequencies": frequencies}
    size, channels, patch_size, _ = words.shape
    fields = {
        "file": WORDS_FILE,
        "size": size,
        "channels": channels,
        "patch_size": patch_size,
        **dataclasses.asdict(info),
    }
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    return {WORDS_FILE: tensor_bytes(tensors, {"format": "pt"}), INFO_FILE: text.encode()}


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes files into `folder`, made if need be; one that cannot be written leaves all old ones as they were."""
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the files that they replace, since a rename is atomic within one file system alone.
    with tempfile.TemporaryDirectory(prefix=".vwt-", dir=folder) as new:
        for name, content in contents.items():
            with open(Path(new) / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in contents:
            os.replace(Path(new) / name, folder / name)
