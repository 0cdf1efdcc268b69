"""Checks of repository ids, revisions and subfolders, so that none leads to another place; what the cache knows."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .printable import shown

_ID = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@+-]*(/[A-Za-z0-9_][A-Za-z0-9._@+-]*)*")
_LONGEST_REVISION = 200


class NotReached(FileNotFoundError):
    """The Hub was asked for a file and did not answer, or may not be asked, so that the file may be there."""


def kept_answer(
    repo_id: str, name: str, *, revision: str | None = None, subfolder: Any = None, cache_dir: Any = None, **_: Any
) -> Any:
    """What huggingface_hub's cache holds of a file: its path, `_CACHED_NO_EXIST` if the repository was asked and does
    not have it, and `None` if it does not say.

    Args:
        revision, subfolder, cache_dir: as `hf_hub_download` takes them, whose other arguments are ignored.
    """
    path = "/".join(filter(None, (os.fspath(subfolder or ""), name)))
    # A branch by its name would be looked up anew.
    return try_to_load_from_cache(repo_id, path, cache_dir, getattr(revision, "resolved", revision))


def download_if_there(**of: Any) -> Path | None:
    """A file on the Hub, by arguments of `hf_hub_download`; `None` if the repository was asked and does not have it."""
    try:
        return Path(hf_hub_download(**of))
    except LocalEntryNotFoundError:  # which leaves open whether it is there
        raise
    except EntryNotFoundError:
        return None


def may_be_on_hub(source: str, name: str, hub_kwargs: Mapping[str, Any]) -> bool:
    """Whether a file of a model that could not be loaded may be on the Hub: nobody can say that it is not.

    Args:
        source: Hub id or folder of the model.
        hub_kwargs: arguments of `hf_hub_download`.
    """
    if os.path.exists(source):
        return False
    try:
        if kept_answer(source, name, **hub_kwargs) is not None:  # it is not there, or is and cannot be read
            return False
        return download_if_there(repo_id=source, filename=name, **hub_kwargs) is not None
    except GatedRepoError:
        return True
    except (HFValidationError, RepositoryNotFoundError):  # it is no Hub id, or a folder's name that looks like one
        return False
    except (OSError, HfHubHTTPError):
        return True


def require_private(api: HfApi, repo_id: str) -> None:
    """Raises `ValueError` if a repository is public."""
    if not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id} is public; expected a private repository. Make it private in its settings, name another, or "
            "leave out that it is to be private."
        )


def check_hub_id(name: object) -> str:
    """A repository's id on the Hub. Only the name is looked at, neither disk nor network.

    Raises:
        ValueError: `name` is something else, such as a path or an address.
    """
    try:
        # huggingface_hub allows letters of every alphabet, the Hub does not.
        if isinstance(name, str) and _ID.fullmatch(name):
            validate_repo_id(name)
            return name
    except HFValidationError:
        pass
    raise ValueError(
        f"{shown(name)} is no Hub id; expected 'name' or 'owner/name' of the letters a to z, digits, '-', '_' and '.', "
        "of at most 96 characters, beginning and ending with a letter or digit, without '--', '..' or a final '.git'."
    )


def check_revision(revision: object) -> str | None:
    """A branch, tag or commit, or `None` for the main branch.

    huggingface_hub makes paths of it, so it may have plain letters alone.

    Raises:
        ValueError: git could not have it, or it has other characters.
    """
    if revision is None:
        return None
    if (
        not isinstance(revision, str)
        or len(revision) > _LONGEST_REVISION
        or not _REVISION.fullmatch(revision)
        or ".." in revision
        or revision.endswith((".", ".lock"))
    ):
        raise ValueError(
            f"revision is {shown(revision)}; expected None, or a branch, tag or commit of at most {_LONGEST_REVISION} "
            "letters a to z, digits and ._/@+- that has no '..' and begins no part with '.' or '-'."
        )
    return revision


def check_subfolder(subfolder: object) -> str | None:
    """A folder within a repository or folder, or `None` for its top.

    Raises:
        ValueError: it is absolute, or leads out of it.
    """
    if subfolder is None or subfolder == "":
        return None
    parts = subfolder.split("/") if isinstance(subfolder, str) else [""]
    if any(part in ("", ".", "..") or not part.isprintable() or set(part) & set('\\:*?"<>|') for part in parts):
        raise ValueError(
            f"subfolder is {shown(subfolder)}; expected None, or names of folders with '/' between them, without '..', "
            "'\\' or ':'."
        )
    return "/".join(parts)
