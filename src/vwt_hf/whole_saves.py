"""Files that are written whole or not at all, whenever the process that writes them ends.

Every file is written and flushed beside its place and then renamed into it.

Saves into one folder share a lock on it while they run, which ends with their process. A save that finds that no other
runs removes what killed ones left behind. No save waits for others to end, except those that transformers writes file
by file, which wait for a while. Where a file system has no such locks (Windows, some that are shared over a network)
files are as whole, but two saves of the same model or words at once may remove each other's. There, and of other
machines, whose locks may not be seen here, what killed saves left stays for a day.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

with contextlib.suppress(ImportError):  # Windows has none, and opens no folder to lock
    import fcntl

_MACHINE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_PREFIX = f".vwt-save-{_MACHINE}-"
_LEFT_OVER = re.compile("[.]vwt-save-(?:([0-9a-f]{8})-)?[a-z0-9_]{8}")
"""The folder of one save, as `tempfile` names it, and the machine that made it."""
_MOUNTS = Path("/proc/self/mountinfo")
"""Where Linux lists what is mounted, which may be single files, as in containers."""
_PATIENCE = 2.0
"""For how many seconds a save tries to share the lock, which another holds alone for milliseconds, to tidy up."""
_DAY = 24 * 3600
"""After so many seconds no save is still under way, where no lock tells."""


@dataclasses.dataclass(frozen=True)
class Save:
    """A save that is under way; `saving` makes it."""

    folder: Path
    """Where the files go."""
    new: Path
    """Where they lie until then, within `folder`."""
    lock: int | None
    is_alone: Callable[[], bool]
    """Tells whether no other save into the folder runs. If so, none begins before this one ends."""

    def write(self, contents: dict[str, bytes]) -> None:
        """Writes files, down to the disk, into a folder where nobody looks for them yet."""
        for name, content in contents.items():
            with naming(self.folder / name, instead=True), open(self.new / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def place(self, name: str) -> None:
        """Moves a file that `write` wrote into the folder, in place of an older one, whose permissions it gets."""
        new, old = self.new / name, self.folder / name
        with contextlib.suppress(OSError):  # there is none, or the file system has no permissions
            os.chmod(new, os.stat(old).st_mode & 0o777)
        with naming(old, instead=True):
            os.replace(new, old)
        self._flush()

    def place_new(self, name: str) -> bool:
        """Puts a file that `write` wrote into the folder if there is none of its name, and returns whether it did.

        Of two saves that try at once only one does.
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
        # Renames must reach the disk in their order. Not every file system can flush a folder.
        if self.lock is not None:
            with contextlib.suppress(OSError):
                os.fsync(self.lock)

    def left_overs(self) -> list[Path]:
        """Folders that other saves write in. If `is_alone()` is true afterwards, all of them are of killed saves."""
        made = {path: _LEFT_OVER.fullmatch(path.name) for path in self.folder.iterdir()}
        others = {path: match[1] for path, match in made.items() if match and path != self.new}
        folders = [path for path in others if path.is_dir() and not path.is_symlink()]
        locks = bool(folders) and self.lock is not None and _try_lock(self.lock, alone=True) is not None
        return [path for path in folders if (locks and others[path] in (None, _MACHINE)) or self._age_of(path) > _DAY]

    def _age_of(self, folder: Path) -> float:
        """For how many seconds nothing in a folder was made, renamed or removed, by the clock of the machine that has
        the files; 0 if the folder is gone."""
        try:
            return self.new.stat().st_mtime - folder.stat().st_mtime
        except FileNotFoundError:
            return 0


@contextlib.contextmanager
def naming(place: str | os.PathLike[str], instead: bool = False) -> Iterator[None]:
    """Has errors name this file or folder that name none, such as that of a full disk.

    Args:
        instead: also errors that name another file, as a temporary one.
    """
    try:
        yield
    except OSError as error:
        if not instead and (error.errno is None or error.filename is not None):
            raise
        raise OSError(error.errno, f"{error.strerror or error}, while it was written", os.fspath(place)) from error
    except SafetensorError as error:
        raise OSError(f"{os.fspath(place)} cannot be written ({error}).") from error


@contextlib.contextmanager
def saving(folder: Path) -> Iterator[Save]:
    """Begins a save into `folder`, made if need be; what was written and not placed is removed at the end."""
    # The lock comes first, before there is anything that another save could remove. New files lie within the folder, as
    # a rename is atomic within one file system alone.
    with (
        sharing(folder) as (lock, is_alone),
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=folder, ignore_cleanup_errors=True) as new,
    ):
        yield Save(folder, Path(new), lock, is_alone)


@contextlib.contextmanager
def sharing(folder: Path, turn: float = 0) -> Iterator[tuple[int | None, Callable[[], bool]]]:
    """Shares the lock on `folder`, which is made if need be, with other saves.

    It yields the lock's descriptor, `None` on Windows, and a function that tells whether no other save runs. Once that
    has returned true, no other save begins before the end. Where there are no locks, it always returns true.

    Args:
        turn: for how many seconds to wait until no other save runs, so that saves of many steps take turns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock: int | None = None
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        lock = os.open(folder, os.O_RDONLY)
    has_turn = turn > 0 and lock is not None and _lock_soon(lock, alone=True, patience=turn)
    try:
        shares = lock is None or has_turn or _lock_soon(lock)
        yield lock, lambda: shares and (lock is None or _try_lock(lock, alone=True) is not False)
    finally:
        if lock is not None:
            # A process forked meanwhile has the descriptor too, with which closing alone would leave it locked.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes files into `folder`, made if need be. If one cannot be written, all old ones stay as they were.

    Each file is whole at any time. A process that is killed may leave some new files beside old ones.
    """
    with saving(folder) as save:
        save.write(contents)
        for name in contents:
            save.place(name)
        with contextlib.suppress(OSError):  # all files are in their place; not every folder can be listed
            left = save.left_overs()
            if left and save.is_alone():
                remove(left)


def write_file(file: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file, whole or not at all; one that is there stays as it is until then. Makes its folder.

    A pipe, a device, and a file that this process prints into (/dev/stdout) are written into and not replaced.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(file)
    data = content.encode() if isinstance(content, str) else content
    if stream := stream_into(path):
        stream.flush()
        with open(stream.fileno(), "wb", closefd=False) as opened:
            opened.write(data)
        return
    if _is_pipe_or_device(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path = path.resolve()  # a link stays one
    write_files(path.parent, {path.name: data})


def require_writable(*files: str | os.PathLike[str] | None) -> None:
    """Raises where a file could not be written, before work is spent on what goes in; makes nothing.

    Args:
        files: if the folder of one does not exist, it is enough that it can be made. `None` is skipped.

    Raises:
        OSError: one cannot; the message names it.
        ValueError: two of them are one file.
    """
    own: dict[Path, Path] = {}
    for file in (Path(file) for file in files if file is not None):
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; expected the name of a file to write.")
        if stream_into(file):
            continue
        if _is_pipe_or_device(file):
            if file.is_socket() or not os.access(file, os.W_OK):
                raise PermissionError(f"{file} cannot be written to; expected a file, pipe or device that can.")
            continue
        place = Path(os.path.realpath(file))  # a link stays one
        if place.is_symlink():
            raise OSError(f"{file} is a link that leads to itself; name another file.")
        require_folder(place.parent)
        if _is_anothers(place):
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
        same = own.setdefault(place, file)
        if same is not file:
            raise ValueError(f"{file} and {same} are one file; expected a name of its own for each output.")


def _is_pipe_or_device(file: Path) -> bool:
    """Whether it is one, or another thing that is written into and not replaced."""
    return file.exists() and not file.is_file()


def stream_into(file: Path) -> TextIO | None:
    """The stream that prints into this very file: it is /dev/stdout, or the log that a shell sends all output to."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # it is closed, has no descriptor, or is None
            if os.path.samestat(os.stat(file), os.fstat(stream.fileno())):
                return stream
    return None


def _is_anothers(file: Path) -> bool:
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
    mount = b"".join(escapes.get(byte, bytes([byte])) for byte in os.fsencode(os.path.realpath(file)))
    return any(line.split(b" ")[4:5] == [mount] for line in lines)


def require_place(folder: str | os.PathLike[str]) -> Path:
    """Refuses a name that no folder can have, as where a file is; returns the folder, or the nearest one around it."""
    if not os.fspath(folder):  # which `Path` takes for the folder that one is in
        raise NotADirectoryError("No folder is named, but an empty text; expected one to write into.")
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is no folder; expected one to write into.")
    with contextlib.suppress(FileNotFoundError):
        path.lstat()  # raises for names that none can have
    return there


def require_folder(folder: str | os.PathLike[str]) -> None:
    """As `require_writable`, for files within `folder`."""
    there = require_place(folder)
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{there} cannot be written into ({error.strerror}); name another folder.") from error


def remove(paths: Iterable[Path]) -> None:
    """Removes files and folders. What cannot be removed stays for a later save to remove."""
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _lock_soon(descriptor: int, *, alone: bool = False, patience: float = _PATIENCE) -> bool:
    """Tries `_try_lock` until it succeeds, for at most `patience` seconds."""
    end = time.monotonic() + patience
    while _try_lock(descriptor, alone=alone) is False:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def _try_lock(descriptor: int, *, alone: bool) -> bool | None:
    """Locks a folder without waiting, `alone` or shared, and returns whether it did; `None` if it has no such locks."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # over a network (NFS) some folders have shared locks alone
        return None
    return True
