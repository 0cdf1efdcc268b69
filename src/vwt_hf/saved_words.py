"""Words that are saved beside a model's weights, and the seal that says which weights they belong to.

`save_pretrained` writes a model in several files, one after the other. Each save puts its words into a new folder,
which config.json names; the old words stay until everything is written and sealed. So a folder holds one whole save, or
loading it says that it does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
import secrets
import shutil
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from .hub_names import download_if_there
from .vocabulary import VisualVocabulary, load_vocabulary
from .vocabulary.files import INFO_FILE, identity_of, present_info
from .whole_saves import write_files

FOLDER = "visual_words"
"""Beginning of the name of a folder of words, below a model's folder. It is only one level deep: `push_to_hub` of
transformers uploads no deeper files."""
PROCESSOR_FOLDER = "processor_words"
"""The same for an image processor's words, which are saved apart from the model's."""
SEAL = "sealed.json"
"""The file in a folder of words that names the weights of the same save, each with a hash."""
WEIGHTS = re.compile(r"(model|pytorch_model)[\w.-]*\.(safetensors|bin)")
"""Files of weights, as transformers names them."""
MOST_SEAL_BYTES = 1 << 20
LOOKED_AT = 1 << 20
"""Bytes of a file of weights that are hashed, in `BLOCKS` pieces spread over the file."""
BLOCKS = 64
SAVED_AS = re.compile("[0-9a-f]{16}")
"""The form of `VWTConfig.saved_as`: random for each save, and the end of its folder's name. Of words that are in no
folder it is the beginning of their hash."""


_named: dict[str, weakref.WeakKeyDictionary[VisualVocabulary, str]] = {}
"""Words in memory by their `VWTConfig.saved_as`, each with a hash of what they were then."""


def name_in_memory(vocabulary: VisualVocabulary, saved_as: str | None = None) -> str:
    """Has `in_memory` find words by a `VWTConfig.saved_as`, by default one made of the words; returns that."""
    content = vocabulary.fingerprint()
    name = saved_as or content[:16]
    _named.setdefault(name, weakref.WeakKeyDictionary())[vocabulary] = content
    return name


def in_memory(saved_as: str | None) -> VisualVocabulary | None:
    """A copy of the words that this process knows by that name, if they are still there and the same."""
    known = _named.get(saved_as or "", weakref.WeakKeyDictionary())
    for words in (reference() for reference in known.keyrefs()):  # a list that no thread changes
        if words is not None and words.fingerprint() == known.get(words):
            return words.copy()
    return None


def words_folder(saved_as: str | None, named: str = FOLDER) -> str:
    """The name of the folder, below its model's, that holds the words of one save (`VWTConfig.saved_as`)."""
    return named if saved_as is None else f"{named}-{saved_as}"


def write_words(folder: Path, vocabulary: VisualVocabulary, named: str = FOLDER) -> str:
    """Writes words below a model's folder, unsealed, and returns their `VWTConfig.saved_as`."""
    saved_as = secrets.token_hex(8)
    vocabulary.save_pretrained(folder / words_folder(saved_as, named), card=False)
    return name_in_memory(vocabulary, saved_as)


def require_same_words(folder: Path, saved_as: list[str], variant: str | None) -> None:
    """Refuses a save if weights of another variant stay in the folder that were saved with other words.

    config.json can name the words of one save only.

    Args:
        folder: a model's, into which the words of a save were written.
        saved_as: of that save.
        variant: of its weights, as `save_pretrained(variant=...)` takes it.

    Raises:
        ValueError: the message names the weights. The words that were written are removed.
    """
    new_words = {present_info(folder / words_folder(each)).get("sha256") for each in saved_as}
    stay = [path for path in folder.iterdir() if WEIGHTS.fullmatch(path.name) and _variant_of(path.name) != variant]
    sealed = []
    for seal in folder.glob(f"{FOLDER}-*/{SEAL}") if stay else ():
        with contextlib.suppress(OSError, ValueError):  # one that is damaged tells nothing
            sealed.append((_prints_in(seal), present_info(seal.parent).get("sha256")))
    for path in stay:
        fingerprint = _fingerprint_of(path)
        its_words = {words for prints, words in sealed if prints.get(path.name) == fingerprint}
        if its_words and not its_words & new_words:
            for each in saved_as:
                shutil.rmtree(folder / words_folder(each), ignore_errors=True)
            raise ValueError(
                f"{folder} holds {path.name}, which was saved with other words, and its config.json can name one "
                "model's alone. Save into another folder, or remove that file first."
            )


def _variant_of(name: str) -> str | None:
    """The variant of a file of weights: `fp16` of model.fp16-00001-of-00002.safetensors."""
    return re.sub(r"(-\d+-of-\d+)?\.[a-z]+$", "", name).partition(".")[2] or None


def _prints_in(seal: Path) -> dict[str, str]:
    """The hash of each file of weights that a seal names; raises `ValueError` if the seal is damaged."""
    try:
        with seal.open("rb") as file:
            prints = json.loads(file.read(MOST_SEAL_BYTES))["weights"]
        return {str(name): str(value) for name, value in prints.items() if WEIGHTS.fullmatch(name)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{seal} is damaged; expected the names and prints of weights.") from error


def weights_in(folder: Path) -> dict[str, tuple[int, int, int]]:
    """`identity_of` each file of weights in a folder, by its name."""
    weights = {}
    for path in folder.glob("*"):
        if WEIGHTS.fullmatch(path.name):
            with contextlib.suppress(OSError):  # a link to nothing, or a file that is being replaced
                weights[path.name] = identity_of(path)
    return weights


def left_in(folder: Path, before: dict[str, tuple[int, int, int]], variant: str | None) -> set[str]:
    """The weights of a variant that a save left as they were: an old single file, which stays beside new shards.

    Args:
        before: what `weights_in` said before the save.
    """
    now = weights_in(folder)
    return {name for name, of in before.items() if now.get(name) == of and _variant_of(name) == variant}


def seal_words(folder: Path, saved_as: list[str], named: str = FOLDER, left: Collection[str] = ()) -> None:
    """Seals the words of a save that is complete. An image processor's words go with any weights.

    Args:
        left: names of weights in the folder that are of another save.
    """
    files = sorted(folder.iterdir()) if named == FOLDER else []
    weights = [path for path in files if WEIGHTS.fullmatch(path.name) and path.is_file() and path.name not in left]
    prints = {path.name: _fingerprint_of(path) for path in weights}
    content = json.dumps({"weights": prints}, indent=1).encode()
    for each in saved_as:
        write_files(folder / words_folder(each, named), {SEAL: content})


def remove_other_words(folder: Path, saved_as: list[str], named: str = FOLDER) -> None:
    """Removes the folders of words that other saves left in a model's folder."""
    kept = {words_folder(each, named) for each in saved_as}
    of_a_save = re.compile(f"{named}-{SAVED_AS.pattern}")
    with contextlib.suppress(OSError):  # all that was saved is in its place; not every folder can be listed
        for path in folder.iterdir():
            if of_a_save.fullmatch(path.name) and path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)  # which leaves files and links


def read_words(source: str, saved_as: str | None, hub_kwargs: dict[str, Any], named: str = FOLDER) -> VisualVocabulary:
    """The words that lie beside a model's weights.

    Args:
        source: Hub id or folder of the model.
        saved_as: see `VWTConfig`; `None` if they lie in `FOLDER` itself, unsealed.
        hub_kwargs: how `source` is read, its `revision` and `subfolder` among them.
        named: `FOLDER`, or `PROCESSOR_FOLDER` for an image processor's.
    """
    where = dict(hub_kwargs)
    within = posixpath.normpath(os.fspath(where.get("subfolder") or ""))  # transformers takes "sub/" and paths, too
    where["subfolder"] = posixpath.join("" if within == "." else within, words_folder(saved_as, named))
    vocabulary = load_vocabulary(source, trusted=True, pickles=False, **where)
    if saved_as is not None:
        folder = Path(source, where["subfolder"])
        if not os.path.isdir(source):  # a repository, whose files are in huggingface_hub's cache
            seal = download_if_there(repo_id=source, filename=SEAL, **where)
            folder = Path(seal or hf_hub_download(source, INFO_FILE, **where)).parent
        require_sealed(folder)
        name_in_memory(vocabulary, saved_as)
    return vocabulary


def require_sealed(words: Path) -> None:
    """Refuses words whose save was not finished, or that lie beside other weights than they were saved with.

    Args:
        words: the folder of one save's words, in the folder of its model.
    """
    folder = words.parent
    advice = "Save the model again, or say with `vwt=...` what to compress it by."
    if not (words / SEAL).is_file():
        raise ValueError(
            f"{folder}: the save that wrote {words.name} was not finished, so config.json, words and weights "
            f"may be of two models. {advice}"
        )
    try:
        sealed = _prints_in(words / SEAL)
    except ValueError as error:
        raise ValueError(f"{error} {advice}") from error
    for variant in {_variant_of(name) for name in sealed}:
        single = ".".join(filter(None, ("model", variant, "safetensors")))  # which transformers prefers to shards
        if single not in sealed and (folder / single).is_file():
            raise ValueError(
                f"{folder}: {single} is not of the save that wrote {words.name}, and transformers would load it in "
                f"place of that save's weights. Remove it if it is an old one. {advice}"
            )
    for name, value in sealed.items():
        path = folder / name
        if path.is_file() and _fingerprint_of(path) != value:
            raise ValueError(
                f"{folder}: {name} holds other weights than those that {words.name} was saved with. {advice}"
            )


def _fingerprint_of(path: Path) -> str:
    """A hash of a file's length and of blocks spread over it, which differs for weights of another training."""
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    block = LOOKED_AT // BLOCKS
    with path.open("rb") as file:
        if length <= 2 * LOOKED_AT:
            digest.update(file.read())
        else:
            for number in range(BLOCKS):
                file.seek((length - block) * number // (BLOCKS - 1), os.SEEK_SET)
                digest.update(file.read(block))
    return digest.hexdigest()
