"""A vocabulary's folder is the old one or the new one, whenever a save ends and whoever else saves."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vwt_hf import whole_saves
from vwt_hf.vocabulary import VisualVocabulary, files
from vwt_hf.vocabulary.files import VocabularyInfo

pytestmark = pytest.mark.newest

# Of one shape, so that words of one with the facts of another would load.
NAMES = ("old", "new", "other")
VOCABULARIES = {
    name: VisualVocabulary(torch.full((6, 3, 4, 4), 0.1 * number), info=VocabularyInfo(dataset=name))
    for number, name in enumerate(NAMES)
}
FILES = ["vocabulary.json", "vocabulary.safetensors"]
WITH_CARD = ["README.md", *FILES, "words.png"]
STEPS = ("replace", "fsync", "link", "unlink", "rmdir", "mkdir")
"""What a save asks the system for, before and after any of which it may end."""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to end a process at a given step")


def loaded(folder: Path) -> str:
    """The vocabulary that the folder holds, all of it."""
    found = VisualVocabulary.from_pretrained(folder)
    assert found.info.dataset is not None
    assert torch.equal(found.words, VOCABULARIES[found.info.dataset].words)
    return found.info.dataset


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def at_step(number: int, act: Callable[[], Any], patch: pytest.MonkeyPatch) -> list[int]:
    """Acts before the `number`-th of `STEPS`, from 0; returns a list as long as the steps that were taken."""
    taken: list[int] = []

    def counted(original: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            taken.append(len(taken))
            if len(taken) == number + 1:
                act()
            return original(*args, **kwargs)

        return step

    for name in STEPS:
        patch.setattr(os, name, counted(getattr(os, name)))
    return taken


def killed_at(number: int, folder: Path, card: bool = False) -> bool:
    """Saves `new` in another process that is killed at a step; `False` if it has fewer steps."""
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException), pytest.MonkeyPatch.context() as patch:
            at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
            VOCABULARIES["new"].save_pretrained(folder, card=card)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@needs_fork
def test_a_save_that_is_killed_at_any_step_leaves_the_old_vocabulary_or_the_new_one(tmp_path: Path) -> None:
    found = []
    for number in range(100):
        folder = tmp_path / str(number)
        VOCABULARIES["old"].save_pretrained(folder)
        if not killed_at(number, folder, card=True):
            break
        found.append(loaded(folder))
        # The next save removes what the killed one left.
        VOCABULARIES["other"].save_pretrained(folder)
        assert (loaded(folder), names(folder)) == ("other", WITH_CARD)
    assert number > 12
    first_new = found.index("new")
    assert found == ["old"] * first_new + ["new"] * (len(found) - first_new)


@needs_fork
def test_a_first_save_that_is_killed_leaves_a_vocabulary_or_none(tmp_path: Path) -> None:
    found = []
    for number in range(100):
        folder = tmp_path / str(number)
        if not killed_at(number, folder):
            break
        try:
            found.append(loaded(folder))
        except FileNotFoundError:
            found.append("none")
        VOCABULARIES["other"].save_pretrained(folder, card=False)
        assert (loaded(folder), names(folder)) == ("other", FILES)
    assert set(found) == {"none", "new"}


def test_a_save_that_fails_at_any_step_says_so_or_has_saved(tmp_path: Path) -> None:
    outcomes = set()

    def full() -> None:
        raise OSError("No space left on device")

    for number in range(100):
        folder = tmp_path / str(number)
        VOCABULARIES["old"].save_pretrained(folder, card=False)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.MonkeyPatch.context() as patch:
            taken = at_step(number, full, patch)
            try:
                VOCABULARIES["new"].save_pretrained(folder, card=False)
                said = False
            except OSError:
                said = True
        if len(taken) <= number:
            break
        outcomes.add(said)
        assert loaded(folder) == ("old" if said else "new")
        if said:
            assert {name: (folder / name).read_bytes() for name in before} == before
    assert outcomes == {True, False}


def test_a_save_within_another_at_any_step_leaves_one_of_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one within waits in vain for the one around it.
    monkeypatch.setitem(whole_saves._lock_soon.__kwdefaults__, "patience", 0.01)
    found = set()
    for number in range(100):
        folder = tmp_path / str(number)
        VOCABULARIES["old"].save_pretrained(folder, card=False)
        with pytest.MonkeyPatch.context() as patch:
            taken = at_step(number, lambda at=folder: VOCABULARIES["other"].save_pretrained(at, card=False), patch)
            VOCABULARIES["new"].save_pretrained(folder, card=False)
        found.add(loaded(folder))
        VOCABULARIES["old"].save_pretrained(folder, card=False)
        assert (loaded(folder), names(folder)) == ("old", FILES)
        if len(taken) <= number:
            break
    assert found == {"new", "other"}


@needs_fork
def test_writers_and_readers_at_once_never_meet_a_mixture(tmp_path: Path) -> None:
    VOCABULARIES["old"].save_pretrained(tmp_path, card=False)
    writers = []
    for name in NAMES:
        if (child := os.fork()) == 0:
            status = 1
            with contextlib.suppress(BaseException):
                for _ in range(20):
                    VOCABULARIES[name].save_pretrained(tmp_path, card=False)
                status = 0
            os._exit(status)
        writers.append(child)
    running, seen = set(writers), set()
    while running:
        seen.add(loaded(tmp_path))
        running -= {child for child in running if os.waitpid(child, os.WNOHANG) != (0, 0)}
    assert len(seen) > 1
    VOCABULARIES["new"].save_pretrained(tmp_path, card=False)
    assert (loaded(tmp_path), names(tmp_path)) == ("new", FILES)


def test_words_that_do_not_fit_their_facts_are_read_again_where_another_save_wrote_the_same_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VOCABULARIES["old"].save_pretrained(tmp_path, card=False)
    original, refused = files._read_words, []

    def read(*given: Any) -> Any:
        if refused:
            return original(*given)
        refused.append(given)
        VOCABULARIES["old"].save_pretrained(tmp_path, card=False)
        raise ValueError("the words are of a save between the two")

    monkeypatch.setattr(files, "_read_words", read)
    assert loaded(tmp_path) == "old" and refused


@needs_fork
def test_what_a_live_save_has_written_is_not_removed_by_another(tmp_path: Path) -> None:
    VOCABULARIES["old"].save_pretrained(tmp_path, card=False)
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException), pytest.MonkeyPatch.context() as patch:
            # Before its words get their name, and while another saves.
            at_step(4, lambda: os.kill(os.getpid(), signal.SIGSTOP), patch)
            VOCABULARIES["new"].save_pretrained(tmp_path, card=False)
            os._exit(0)
        os._exit(1)
    os.waitpid(child, os.WUNTRACED)
    try:
        started = time.monotonic()
        VOCABULARIES["other"].save_pretrained(tmp_path, card=False)
        assert time.monotonic() - started < 30  # it waits for nobody: the other would not go on
        assert loaded(tmp_path) == "other"
    finally:
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 0
    assert loaded(tmp_path) == "new"


def test_nothing_else_in_the_folder_is_touched(tmp_path: Path) -> None:
    kept = {
        "model.safetensors": b"weights",
        "vocabulary-mine.safetensors": b"words",
        "vocabulary.json.bak": b"{}",
        ".vwt-notes/text": b"notes",
        ".vwt-save-of-mine/text": b"notes",
    }
    for name, content in kept.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for name in NAMES:
        VOCABULARIES[name].save_pretrained(tmp_path, card=False)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def test_words_and_facts_of_two_saves_are_refused(tmp_path: Path) -> None:
    for name in ("old", "new"):
        VOCABULARIES[name].save_pretrained(tmp_path / name)
    (tmp_path / "old/vocabulary.safetensors").rename(tmp_path / "new/vocabulary.safetensors")
    with pytest.raises(ValueError, match=r"new: vocabulary\.safetensors: it is not the file that vocabulary\.json was"):
        VisualVocabulary.from_pretrained(tmp_path / "new")


def test_a_folder_that_names_no_hash_loads(tmp_path: Path) -> None:
    VOCABULARIES["old"].save_pretrained(tmp_path, card=False)
    fields = files.json.loads((tmp_path / "vocabulary.json").read_text())
    assert len(fields.pop("sha256")) == 64 and fields.pop("file") == "vocabulary.safetensors"
    (tmp_path / "vocabulary.json").write_text(files.json.dumps(fields))
    assert loaded(tmp_path) == "old"


def test_the_next_save_settles_what_could_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    VOCABULARIES["old"].save_pretrained(tmp_path, card=False)
    with monkeypatch.context() as patch:
        patch.setattr(files, "_settle", lambda *_: (_ for _ in ()).throw(PermissionError("open elsewhere")))
        VOCABULARIES["new"].save_pretrained(tmp_path, card=False)
    assert loaded(tmp_path) == "new"
    assert torch.equal(load_file(tmp_path / "vocabulary.safetensors")["words"], VOCABULARIES["old"].words)
    VOCABULARIES["other"].save_pretrained(tmp_path, card=False)
    assert (loaded(tmp_path), names(tmp_path)) == ("other", FILES)


def test_where_a_file_has_one_name_alone_saves_leave_nothing_behind(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no second names on exFAT")

    monkeypatch.setattr(os, "link", refuse)
    for name in ("old", "new", "other"):
        VOCABULARIES[name].save_pretrained(tmp_path, card=False)
        assert (loaded(tmp_path), names(tmp_path)) == (name, FILES)


@needs_fork
def test_a_killed_checkpoint_is_whole_and_leaves_nothing_for_long(tmp_path: Path) -> None:
    whole_saves.write_files(tmp_path, {"learning.safetensors": b"old"})
    found = []
    for number in range(20):
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException), pytest.MonkeyPatch.context() as patch:
                at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL), patch)
                whole_saves.write_files(tmp_path, {"learning.safetensors": b"new"})
                os._exit(0)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        found.append((tmp_path / "learning.safetensors").read_bytes())
        whole_saves.write_files(tmp_path, {"learning.safetensors": b"old"})
        assert names(tmp_path) == ["learning.safetensors"]
        if not os.WIFSIGNALED(status):
            break
    assert set(found) == {b"old", b"new"}


def test_facts_that_are_replaced_while_they_are_read_are_read_again(tmp_path, monkeypatch):
    """As where a save mends a file that somebody damaged."""
    words = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    VisualVocabulary(words).save_pretrained(tmp_path)
    facts = tmp_path / files.INFO_FILE
    whole, read = facts.read_bytes(), files._read_fields

    def while_it_is_mended(located: files.Located) -> dict[str, Any]:
        monkeypatch.setattr(files, "_read_fields", read)
        try:
            return read(located)
        finally:
            whole_saves.write_files(tmp_path, {files.INFO_FILE: whole})

    facts.write_bytes(b"{")
    with pytest.raises(ValueError, match="it is no JSON"):
        VisualVocabulary.from_pretrained(tmp_path)
    monkeypatch.setattr(files, "_read_fields", while_it_is_mended)
    assert torch.equal(VisualVocabulary.from_pretrained(tmp_path).words, words)
