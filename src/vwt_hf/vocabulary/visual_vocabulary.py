"""`VisualVocabulary`: the words that patches are grouped by, learned once and kept on the Hub."""

from __future__ import annotations

import copy
import hashlib
import os
import posixpath
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import RevisionNotFoundError

from ..checks import sides
from ..hub_names import check_hub_id, check_revision, check_subfolder, download_if_there, require_private
from ..printable import shown
from ..whole_saves import require_place
from .card import PICTURE_FILE, is_card_of_words, render_card, render_words
from .files import (
    LEGACY_FILE,
    VocabularyInfo,
    locate,
    read_vocabulary,
    require_finite,
    require_raw,
    vocabulary_files,
    write_vocabulary,
)
from .learning import learn

LARGEST_MAPPED = 1e15
"""Largest absolute value of a word in a model's pixel space: squares of larger ones could overflow float32."""
_PIECE = 2**20
"""Values that are mapped at once."""


class VisualVocabulary:
    """Words: patches that stand for all patches like them. In raw RGB, so they fit any model with their patch size.

    Args:
        words: (size, channels, p, p), floating point, raw RGB in [0, 1]. Kept in float32 on the CPU.
        frequencies: (size,) int64, patches assigned to each word while learning.
        info: how the words came about.

    Raises:
        ValueError: there are no words, or they are not finite, not floating point, or not square patches.
        TypeError: `info` is something else, such as a dict.

    Example:
        >>> vocabulary = VisualVocabulary(torch.rand(100, 3, 16, 16))
        >>> len(vocabulary), vocabulary.patch_size, vocabulary.channels
        (100, 16, 3)
        >>> vocabulary.normalized(image_mean=0.5, image_std=0.5).shape
        torch.Size([100, 768])
    """

    def __init__(
        self, words: torch.Tensor, frequencies: torch.Tensor | None = None, info: VocabularyInfo | None = None
    ) -> None:
        self.words = _valid_words(words)
        self.frequencies = _valid_frequencies(frequencies, len(self.words))
        self.info = VocabularyInfo() if info is None else info
        if not isinstance(self.info, VocabularyInfo):
            raise TypeError(f"info is a {type(info).__name__}; expected a vwt_hf.vocabulary.files.VocabularyInfo.")
        for name, values in (("image_mean", self.info.image_mean), ("image_std", self.info.image_std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values; expected one for each of {self.channels} channels.")
        self.source: str | None = None
        """Hub id or folder that it was loaded from or pushed to."""
        self.revision: str | None = None
        """Commit on the Hub that it was loaded from or pushed as."""
        self.subfolder: str | None = None
        """Folder within `source` that holds it; `None` for the top."""
        self._named: str | None = None
        """A hash of the words that lie at `source` and `revision`; `None` if a config.json may not name these."""

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        where = f", source={self.source!r}" if self.source else ""
        return f"VisualVocabulary(size={len(self)}, channels={self.channels}, patch_size={self.patch_size}{where})"

    @property
    def is_on_hub(self) -> bool:
        """Whether `source` and `revision` are enough to find these words: not if they were changed since."""
        return self._named is not None and self._named == self.fingerprint()

    def _note_place(self, source: str, revision: str | None, subfolder: str | None, imported: bool = False) -> None:
        """Notes where the words are. A config.json may not name words that were `imported` from a `vocab.pt`."""
        self.source, self.revision, self.subfolder = source, revision, subfolder
        is_named = revision is not None and not subfolder and not imported  # a setting has no field for a subfolder
        self._named = self.fingerprint() if is_named else None

    def copy(self) -> VisualVocabulary:
        """A vocabulary of copies of the words.

        Raises:
            ValueError: `words` or `frequencies` were set to what the class would not take.
        """
        copied = copy.copy(self)
        copied.words = _valid_words(self.words).clone()
        frequencies = _valid_frequencies(self.frequencies, len(copied))
        copied.frequencies = None if frequencies is None else frequencies.clone()
        return copied

    def fingerprint(self) -> str:
        """A hash of the words, in hexadecimal digits; not of their frequencies, nor of where they lie."""
        words = self.words.detach().cpu().contiguous()
        content = hashlib.sha256(f"{words.dtype} {tuple(words.shape)}".encode())
        content.update(words.flatten().view(torch.uint8).numpy().data)
        return content.hexdigest()

    @property
    def channels(self) -> int:
        """Channels of a word: 3 for RGB."""
        return self.words.shape[1]

    @property
    def patch_size(self) -> int:
        """Height and width of a word, in pixels."""
        return self.words.shape[-1]

    def require(self, patch_size: int | tuple[int, int], channels: int) -> None:
        """Raises `ValueError` for a model that cuts patches of another size or number of channels."""
        try:
            require_raw(self.words)
        except ValueError as error:  # their directions can still be used
            warnings.warn(str(error), stacklevel=2)
        height, width = sides(patch_size)
        named = f"{self.source}: " if self.source else ""
        if (height, width) != (self.patch_size, self.patch_size):
            raise ValueError(
                f"{named}the vocabulary's words are {self.patch_size}×{self.patch_size} pixels, the model's patches "
                f"{height}×{width}; use a vocabulary learned with patch_size={height}."
            )
        if channels != self.channels:
            raise ValueError(
                f"{named}the vocabulary's words have {self.channels} channels, the model's patches {channels}; use a "
                f"vocabulary of {channels} channels."
            )

    def normalized(self, image_mean: float | Sequence[float], image_std: float | Sequence[float]) -> torch.Tensor:
        """The words as a model with these statistics sees them. That is exact: a word is a mean and the map is affine.

        Args:
            image_mean: of the model's image processor, one number or one for each channel.
            image_std: likewise.

        Returns:
            (size, channels · p · p) float32, flattened as (channel, row, column). A word beyond `LARGEST_MAPPED` is
            scaled down, since its cosine distances would overflow. They depend on its direction alone, which stays.

        Raises:
            ValueError: the number of statistics is another, or a standard deviation is not positive.
        """
        mean, std = self._statistics("image_mean", image_mean), self._statistics("image_std", image_std)
        if not (std > 0).all():
            raise ValueError(f"image_std is {shown(image_std)}; expected positive numbers.")
        # In pieces, as float64 takes twice the memory.
        rows = max(1, _PIECE // self.words[0].numel())
        return torch.cat([_mapped(words.double(), mean, std) for words in self.words.split(rows)])

    def _statistics(self, name: str, value: float | Sequence[float]) -> torch.Tensor:
        try:
            values = torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            values = torch.empty(0, device="cpu")
        if len(values) not in (1, self.channels) or not values.isfinite().all():
            raise ValueError(
                f"{name} is {shown(value)}; expected a number, or one for each of {self.channels} channels."
            )
        return values.expand(self.channels).view(-1, 1, 1)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> VisualVocabulary:
        """Loads a vocabulary; nothing in it is executed.

        Its `source` and `revision` say where it is from, the latter as a commit. A bare `vocab.pt`, as the paper's
        authors published, is imported with a warning.

        Args:
            pretrained_model_name_or_path: a Hub id, or a folder that `save_pretrained` wrote.
            revision: branch, tag or commit on the Hub.
            subfolder: of the repository or folder.
            token, cache_dir, local_files_only, force_download: as for `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: there is no vocabulary.
            ValueError: a file is damaged or holds something else; the message names repository or folder, and file. Or
                `revision` or `subfolder` is not possible, or a folder is to have a revision.
            huggingface_hub.errors.HfHubHTTPError: the repository or revision does not exist, or may not be read.
        """
        name = pretrained_model_name_or_path
        if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
            raise ValueError(f"pretrained_model_name_or_path is {shown(name)}; expected a Hub id or a folder.")
        if revision is not None and os.path.isdir(name):
            raise ValueError(
                f"revision is {shown(revision)}, and {os.fspath(name)} is a folder; expected a Hub id, which alone has "
                "revisions, or no revision."
            )
        return load_vocabulary(
            name,
            trusted=True,
            revision=revision,
            subfolder=subfolder,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, card: bool = True, repo_id: str | None = None
    ) -> None:
        """Writes `vocabulary.safetensors` and `vocabulary.json`, and a card with a picture of the words.

        An error leaves the old vocabulary as it was, and a process that is killed leaves the old one or the new one,
        whole, also if several processes save into one folder at once. The card is written last.

        Args:
            card: whether to write `README.md` and `words.png`; if not, those in the folder stay. A `README.md` that is
                not a vocabulary's card or was edited, and a `words.png` without a card, stay in any case, and a warning
                says so.
            repo_id: what the card's usage snippet loads; by default the folder.

        Raises:
            NotADirectoryError: `save_directory` is empty, or a file.
            ValueError: `words` or `frequencies` were set to what could not be read again.
        """
        require_place(save_directory)
        folder, contents = Path(save_directory), self._files()
        # Looked for before the card, which is written first: another save may write both meanwhile.
        has_picture, present = (folder / PICTURE_FILE).exists(), folder / REPOCARD_NAME
        if card and _may_write_card(present.read_bytes() if present.is_file() else b"", str(folder), has_picture):
            contents |= self._card(repo_id or str(save_directory))
        write_vocabulary(folder, contents)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Add visual vocabulary",
        create_pr: bool = False,
    ) -> CommitInfo:
        """Uploads the vocabulary and its card in one commit, making the repository if need be.

        Afterwards `source` and `revision` say where it is, the latter as the commit (unless it is a pull request). A
        `README.md` that is not a vocabulary's card, such as a model's, or was edited stays, and a warning says so.

        Args:
            revision: branch to push to; made if need be.
            private: whether a new repository is private; by default as the organisation's settings say.

        Raises:
            ValueError: `private`, and the repository exists and is public; `from_pretrained` would not take `revision`
                or `subfolder`; or `words` or `frequencies` were set to what could not be read again.
        """
        revision, subfolder, contents = check_revision(revision), check_subfolder(subfolder), self._files()
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private:
            require_private(api, repo_id)
        if revision is not None and not create_pr and not revision.startswith("refs/pr/"):  # a pull request's
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if _may_write_card(_card_on_hub(repo_id, subfolder, revision, token), repo_id):
            contents |= self._card(repo_id, revision=revision, subfolder=subfolder)
        # All files in one commit: `upload_folder` may make several, and an interruption would leave some.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(posixpath.join(subfolder or "", name), own) for name, own in contents.items()],
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
        if not create_pr:
            self._note_place(repo_id, commit.oid, subfolder)
        return commit

    def _files(self) -> dict[str, bytes]:
        """The files of the words, by name; raises `ValueError` if they could not be read again."""
        valid = VisualVocabulary(self.words, self.frequencies, self.info)
        return vocabulary_files(valid.words, valid.frequencies, valid.info)

    def _card(self, repo_id: str, **of: str | None) -> dict[str, bytes]:
        """The files of the card, by name."""
        card = render_card(repo_id, tuple(self.words.shape), self.info, **of)
        return {REPOCARD_NAME: card, PICTURE_FILE: render_words(self.words.detach().float(), self.frequencies)}

    learn = classmethod(learn)


def _card_on_hub(repo_id: str, subfolder: str | None, revision: str | None, token: str | bool | None) -> bytes:
    """The README.md where words are to be pushed; empty if there is none."""
    # Not from the cache, which may hold an old one, and may not be writable.
    with tempfile.TemporaryDirectory() as folder:
        of = {"subfolder": subfolder, "revision": revision, "token": token, "local_dir": folder}
        try:
            file = download_if_there(repo_id=repo_id, filename=REPOCARD_NAME, **of)
        except RevisionNotFoundError:
            return b""
        return b"" if file is None else file.read_bytes()


def _may_write_card(readme: bytes, place: str, has_picture: bool = False) -> bool:
    """Whether a card and its picture may be written over what lies there; warns if that may be somebody's own."""
    if readme.strip():
        if is_card_of_words(readme):
            return True
        has = f"{REPOCARD_NAME} that is no card of visual words, or was edited, or is of an earlier version"
    elif has_picture:
        has = f"{PICTURE_FILE} beside no card of words"
    else:
        return True
    warnings.warn(f"{place} has a {has}, which stays. Remove it to have a card of these words written.", stacklevel=3)
    return False


def load_vocabulary(
    name: str | os.PathLike[str],
    *,
    trusted: bool,
    pickles: bool = True,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> VisualVocabulary:
    """Loads a vocabulary named by the user, or by a file that a stranger may have written.

    Args:
        name: a folder or a Hub id.
        trusted: whether the user gave `name`. If not, it must be a Hub id, is never looked for on this machine, and no
            `vocab.pt` is read.
        pickles: whether a `vocab.pt` is read, if `trusted`.
        revision, subfolder, hub: as for `VisualVocabulary.from_pretrained`, which also lists the errors.

    Raises:
        ValueError: also if a name that is not trusted is no Hub id.
    """
    if not trusted:
        try:
            name = check_hub_id(name)
        except ValueError as error:
            raise ValueError(
                f"A model's config may name a vocabulary on the Hub alone, and {error} To use a folder, pass it "
                "yourself: vwt=FOLDER."
            ) from None
    located = locate(name, revision=revision, subfolder=subfolder, folders=trusted, pickles=trusted and pickles, **hub)
    words, frequencies, info = read_vocabulary(located)
    try:
        vocabulary = VisualVocabulary(words, frequencies, info)
    except ValueError as error:
        raise ValueError(f"{located.source}: {located.file.name}: {error}") from error
    vocabulary._note_place(located.source, located.commit, subfolder, imported=located.file.name == LEGACY_FILE)
    return vocabulary


def _mapped(words: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(words − mean) / std in float32, flat; rows that are too large for it are scaled down."""
    mapped = ((words - mean) / std).flatten(1)
    # By the ratios of the deviations alone, which overflow for no word.
    direction = ((words - mean) / (std / std.min())).flatten(1)
    longest = direction.abs().amax(dim=1, keepdim=True)
    return torch.where(longest / std.min() > LARGEST_MAPPED, direction / longest, mapped).float()


def _valid_words(words: torch.Tensor) -> torch.Tensor:
    if not isinstance(words, torch.Tensor) or not words.is_floating_point():
        kind = str(words.dtype) if isinstance(words, torch.Tensor) else type(words).__name__
        raise ValueError(f"words are {kind}; expected a floating-point tensor, raw RGB in [0, 1].")
    if words.is_nested or words.layout != torch.strided or words.is_meta:
        kind = "nested" if words.is_nested else "on the meta device" if words.is_meta else str(words.layout)
        raise ValueError(f"words are {kind}; expected a dense tensor (size, channels, p, p) with values.")
    if words.ndim != 4 or words.shape[2] != words.shape[3]:
        raise ValueError(f"words have shape {tuple(words.shape)}; expected (size, channels, p, p).")
    if not words.numel():
        raise ValueError(f"the vocabulary is empty, of shape {tuple(words.shape)}; expected at least one word.")
    words = words.detach().to("cpu", torch.float32).contiguous()
    require_finite(words)
    return words


def _valid_frequencies(frequencies: torch.Tensor | None, size: int) -> torch.Tensor | None:
    if frequencies is None:
        return None
    if not isinstance(frequencies, torch.Tensor):
        raise ValueError(f"frequencies are a {type(frequencies).__name__}; expected a tensor, int64 ({size},).")
    if tuple(frequencies.shape) != (size,) or frequencies.dtype != torch.int64:
        raise ValueError(
            f"frequencies are {frequencies.dtype} of shape {tuple(frequencies.shape)}; expected int64 ({size},)."
        )
    if int(frequencies.min()) < 0:
        raise ValueError(f"frequencies are {int(frequencies.min())} and more; expected counts, of at least 0.")
    return frequencies.detach().cpu()
