"""Files that are written whole or not at all, whenever the process that writes them ends.

Every file is written and flushed beside its place and then renamed into it. Saves into one folder share a lock for as
long as they run, which ends with their process: what an earlier save left behind is removed by a later one only while
no other runs. No save waits for another to end, but those that transformers writes file by file, which take turns as
long as that does not take too long. Where a file system has no such locks (Windows, some that are shared over a
network) files are as whole, but two saves at once into one folder may remove each other's files.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

with contextlib.suppress(ImportError):  # Windows has none, and opens no folder to lock
    import fcntl

_PREFIX = ".vwt-save-"
_LEFT_OVER = re.compile(re.escape(_PREFIX) + "[a-z0-9_]{8}")
"""The folder of one save, as `tempfile` names it."""
_MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux lists what is mounted: also single files, as containers have them."""
_PATIENCE = 2.0
"""Seconds for which a save asks for its share of the lock, which another has for the milliseconds of tidying up."""


class Save:
    """A save that is going on. Made by `saving`."""

    def __init__(self, folder: Path, new: Path, lock: int | None, is_alone: Callable[[], bool]) -> None:
        self.folder, self.new = folder, new
        self._lock = lock
        self.is_alone = is_alone
        """Whether no other save into the folder runs, nor begins before this one ends."""

    def write(self, contents: dict[str, bytes]) -> None:
        """Writes files where nobody looks for them yet, down to the disk."""
        for name, content in contents.items():
            with _naming(self.folder / name), open(self.new / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def place(self, name: str) -> None:
        """Puts a file that `write` wrote into the folder, in place of an older one, whose permissions it gets."""
        new, old = self.new / name, self.folder / name
        with contextlib.suppress(OSError):  # there is none, or the file system has no permissions
            os.chmod(new, os.stat(old).st_mode & 0o777)
        with _naming(old):
            os.replace(new, old)
        self._flush()

    def place_new(self, name: str) -> bool:
        """Puts a file that `write` wrote into the folder if there is none of its name; returns whether it did.

        Of two saves that do so at once one does.
        """
        try:
            os.link(self.new / name, self.folder / name)
            self._flush()
        except FileExistsError:
            return False
        except OSError:  # some file systems have no links
            if (self.folder / name).exists():
                return False
            self.place(name)
        return True

    def _flush(self) -> None:
        # A rename must not reach the disk before one that came earlier. Not every file system can tell.
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._lock)

    def left_overs(self) -> list[Path]:
        """Folders that other saves write in. If `is_alone` is true afterwards, all of them are of killed saves."""
        found = [path for path in self.folder.iterdir() if _LEFT_OVER.fullmatch(path.name)]
        return [path for path in found if path != self.new and path.is_dir() and not path.is_symlink()]


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Has errors of the system name this file, where they name none or one that nobody knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}, while it was written", os.fspath(file)) from error


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[Save]:
    """Begins a save into `folder`, made if need be; what was written and not placed is removed at the end."""
    # The lock comes before there is anything that another save could remove; what is written lies beside the files that
    # it replaces, since a rename is atomic within one file system alone.
    with (
        sharing(folder) as (lock, is_alone),
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder, ignore_cleanup_errors=True) as new,
    ):
        yield Save(folder, Path(new), lock, is_alone)


@contextlib.contextmanager
def sharing(folder: Path, turn: float = 0) -> Iterator[tuple[int | None, Callable[[], bool]]]:
    """Shares the lock on `folder`, which is made if need be, with other saves.

    It gives the lock's descriptor, `None` on Windows, and a function that tells whether no other save runs. Once it has
    said so, no other begins before the end. Where there are no locks, that function always says so.

    Args:
        turn: seconds to wait until no other save runs, so that two of many steps come one after the other.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock: int | None = None
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        lock = os.open(folder, os.O_RDONLY)
    has_turn = turn > 0 and lock is not None and _locked_soon(lock, alone=True, patience=turn)
    try:
        shares = lock is None or has_turn or _locked_soon(lock)
        yield lock, lambda: shares and (lock is None or _locked(lock, alone=True))
    finally:
        if lock is not None:
            # A process forked meanwhile has the descriptor too, with which closing alone would leave it locked.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes files into `folder`, made if need be; one that cannot be written leaves all old ones as they were.

    Each file is whole at any time. Files that belong together are the old ones or the new ones only if they are one.
    """
    with saving(folder) as save:
        save.write(contents)
        for name in contents:
            save.place(name)
        left = save.left_overs()
        if left and save.is_alone():
            remove(left)


def write_file(file: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file, whole or not at all: one that was there stays as it was until then. Makes its folder.

    What is printed into the file, as into /dev/stdout, stays in it, and so does what goes into a pipe or a device.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(file)
    data = content.encode() if isinstance(content, str) else content
    if stream := _stream_into(path):
        stream.flush()
        with open(stream.fileno(), "wb", closefd=False) as opened:
            opened.write(data)
        return
    if _takes_all(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()  # a link stays one
    write_files(path.parent, {path.name: data})


def require_writable(*files: str | os.PathLike[str] | None) -> None:
    """Raises where a file could not be written, before work is spent on what goes in; makes nothing.

    Args:
        files: one whose folder is not there counts as writable if that can be made; `None` is no file.

    Raises:
        OSError: one cannot; the message names it.
        ValueError: two of them are one file.
    """
    own: dict[str, Path] = {}
    for file in (Path(file) for file in files if file is not None):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; expected the name of a file to write.")
        if _stream_into(file):
            continue
        if _takes_all(file):
            if file.is_socket() or not os.access(file, os.W_OK):
                raise PermissionError(f"{file} cannot be written to; expected a file, pipe or device that can.")
            continue
        place = Path(os.path.realpath(file))  # a link stays one
        if place.is_symlink():
            raise OSError(f"{file} is a link that leads to itself; name another file.")
        require_folder(place.parent)
        if _is_kept(place):
            raise PermissionError(
                f"{file} belongs to another user, in a folder in which none but its owner may replace it; name another "
                "file."
            )
        if _is_mounted(file):
            raise OSError(
                f"{file} is mounted by itself, so that no new file can take its place; mount its folder, or name "
                "another file."
            )
        with contextlib.suppress(FileNotFoundError):
            file.lstat()
        if file.is_file():
            file.open("ab").close()
        same = own.setdefault(os.path.realpath(file), file)
        if same is not file:
            raise ValueError(f"{file} and {same} are one file; expected a name of its own for each output.")


def _takes_all(file: Path) -> bool:
    """Whether it is a pipe or a device, which no file may take the place of."""
    return file.exists() and not file.is_file()


def _stream_into(file: Path) -> TextIO | None:
    """What prints into this very file, as where it is /dev/stdout or the log that a shell sends all output to."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, of no descriptor, or none
            if os.path.samestat(os.stat(file), os.fstat(stream.fileno())):
                return stream
    return None


def _is_kept(file: Path) -> bool:
    """Whether a file is another user's in a folder such as /tmp, in which users replace none but their own."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0 or not file.exists():
        return False
    folder = os.stat(file.parent)
    return bool(folder.st_mode & stat.S_ISVTX) and os.geteuid() not in (folder.st_uid, os.stat(file).st_uid)


def _is_mounted(file: Path) -> bool:
    """Whether a file is a mount of its own."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:  # there is no such list here
        return False
    escapes = {byte: f"\\{byte:03o}".encode() for byte in b" \t\n\\"}
    own = b"".join(escapes.get(byte, bytes([byte])) for byte in os.fsencode(os.path.realpath(file)))
    return any(line.split(b" ")[4:5] == [own] for line in lines)


def require_folder(folder: str | os.PathLike[str]) -> None:
    """As `require_writable`, for files within `folder`."""
    if not os.fspath(folder):  # which would be the folder that one is in
        raise NotADirectoryError("No folder is named, but an empty text; expected one to write into.")
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder; expected one to write into.")
    with contextlib.suppress(FileNotFoundError):
        path.lstat()  # raises for names that none can have
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{there} cannot be written into ({error.strerror}); name another folder.") from error


def remove(paths: Iterable[Path]) -> None:
    """Removes files and folders, as far as they can be: what stays is removed by a later save."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _locked_soon(descriptor: int, *, alone: bool = False, patience: float = _PATIENCE) -> bool:
    end = time.monotonic() + patience
    while not _locked(descriptor, alone=alone):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _locked(descriptor: int, *, alone: bool) -> bool:
    """Locks a folder without waiting. `True` also where its file system has no locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True
