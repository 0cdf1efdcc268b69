"""Files that are written whole or not at all, and places that cannot be written."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tiny import tiny_model
from vwt_hf import compress, whole_saves
from vwt_hf.whole_saves import naming, require_folder, require_place, require_writable, saving, sharing, write_file


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "new" / "rows.json"
    write_file(file, "→")
    assert file.read_text(encoding="utf-8") == "→"
    (tmp_path / "link").symlink_to(file)

    def fails(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="disk full"):
            write_file(file, b"other")
    assert file.read_text(encoding="utf-8") == "→" and list(file.parent.iterdir()) == [file]
    write_file(tmp_path / "link", b"other")
    assert (tmp_path / "link").is_symlink() and file.read_bytes() == b"other"


def test_each_file_is_in_its_folder_on_the_disk_before_the_next(tmp_path, monkeypatch):
    done = []
    for name in ("link", "replace", "fsync"):
        step = getattr(os, name)

        def noted(*given, name=name, step=step):
            done.append(name if name != "fsync" or not stat.S_ISDIR(os.fstat(given[0]).st_mode) else "folder")
            return step(*given)

        monkeypatch.setattr(os, name, noted)
    with saving(tmp_path) as save:
        save.write({"rows": b"1", "manifest": b"2"})
        assert save.place_new("manifest")
        save.place("rows")
    assert done == ["fsync", "fsync", "link", "folder", "replace", "folder"]


def test_a_lock_ends_with_its_save_though_a_child_process_still_holds_its_descriptor(tmp_path):
    with sharing(tmp_path) as (lock, _):
        child = os.dup(lock)  # one open file, as what a fork inherits
    with sharing(tmp_path) as (_, is_alone):
        assert is_alone()
    os.close(child)


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, b"rows")
    assert os.read(reader, 10) == b"rows" and pipe.is_fifo()
    os.close(reader)


def test_pipes_and_devices_are_writable_wherever_they_lie(tmp_path, monkeypatch):
    def refused(folder: object) -> None:
        raise PermissionError(f"{folder} cannot be written into")

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(whole_saves, "require_folder", refused)
    require_writable(pipe, "/dev/null", "/dev/null")
    with pytest.raises(PermissionError, match="cannot be written into"):
        require_writable(tmp_path / "rows.json")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"/dev/null cannot be written to; expected a file, pipe or device"):
        require_writable("/dev/null")


def test_what_is_printed_into_a_file_stays_before_and_after_what_is_written_there(tmp_path):
    log = tmp_path / "log"
    log.write_text("earlier\n")
    program = """
import sys, types
sys.modules["vwt_hf"] = package = types.ModuleType("vwt_hf")  # without torch, which takes seconds
package.__path__ = [sys.argv[1]]
from vwt_hf.whole_saves import require_writable, write_file
require_writable(sys.argv[2])
print("before")
write_file(sys.argv[2], "written\\n")
print("after")
"""
    for number, name in enumerate(("/dev/stdout", str(log)), start=1):
        with log.open("a") as opened:
            given = [sys.executable, "-c", program, str(Path(whole_saves.__file__).parent), name]
            subprocess.run(given, stdout=opened, check=True)
        assert log.read_text() == "earlier\n" + "before\nwritten\nafter\n" * number


def test_a_file_keeps_its_permissions(tmp_path):
    file = tmp_path / "rows.json"
    file.touch(0o600)
    file.chmod(0o4600)
    write_file(file, "private")
    assert file.stat().st_mode & 0o7777 == 0o600 and file.read_text() == "private"


def test_links_are_writable_where_they_lead_and_not_where_they_lie(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="loop is a link that leads to itself; name another file"):
        require_writable(tmp_path / "loop")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "rows.json")
    asked = []
    monkeypatch.setattr(whole_saves, "require_folder", asked.append)
    require_writable(tmp_path / "link")
    assert asked == [tmp_path / "there"]


def test_a_file_of_another_user_where_users_replace_their_own_alone_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "rows.json"
    file.touch()
    owner = file.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    require_writable(file)
    tmp_path.chmod(0o1777)
    with pytest.raises(PermissionError, match=r"rows.json belongs to another user, in a folder in which none but its"):
        require_writable(file)
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    require_writable(file)


def test_a_file_that_is_mounted_by_itself_is_refused_before(tmp_path, monkeypatch):
    file = tmp_path / "a card.md"
    file.touch()
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(whole_saves, "_MOUNTS", mounts)
    require_writable(file)  # where there is no such list
    mounts.write_text(f"36 35 98:0 / {tmp_path}/a\\040card.md rw - ext4 /dev/root rw\n")
    require_writable(tmp_path / "a")
    with pytest.raises(
        OSError, match=r"card\.md is mounted by itself, so that no new file .*mount its folder, or name"
    ):
        require_writable(file)


def test_a_disk_that_is_full_is_said_with_the_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device, while it was written: .*rows\.json") as raised:
        write_file(tmp_path / "rows.json", "rows")
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named_and_one_that_can_is_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("old")
    require_writable(None, tmp_path / "file", tmp_path / "new" / "folder" / "rows.json")
    require_folder(tmp_path / "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"] and (tmp_path / "file").read_text() == "old"
    for refused, why in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "rows.json", "file is no folder"),
        (tmp_path / ("long" * 100), "too long"),
        (Path("/proc/rows.json"), "/proc cannot be written into"),
    ):
        with pytest.raises(OSError, match=why):
            require_writable(refused)
    for same in (tmp_path / "file", tmp_path / "new" / "rows.json"):
        with pytest.raises(ValueError, match=r"are one file; expected a name of its own for each output"):
            require_writable(same, None, same.parent / "." / same.name)
    (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{os.pipe()[1]}")  # as /dev/stdout is one where it is piped
    require_writable("/dev/null", "/dev/null", tmp_path / "stdout", tmp_path / "stdout")
    with pytest.raises(NotADirectoryError, match="No folder is named, but an empty text"):
        require_folder("")
    with pytest.raises(OSError, match="file is no folder"):
        require_folder(tmp_path / "file")


@pytest.mark.parametrize("refused", [errno.EBADF, errno.ENOLCK, None])
def test_without_locks_what_a_killed_save_left_stays_for_a_day(tmp_path, monkeypatch, refused):
    """NFS refuses to lock a folder alone, other file systems at all, and Windows opens none (`None`)."""
    open_file, lock = os.open, fcntl.flock

    def opened(path: object, *args: int, **kwargs: int) -> int:
        if refused is None and path == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *args, **kwargs)

    def locked(descriptor: int, how: int) -> None:
        if refused == errno.ENOLCK or how & fcntl.LOCK_EX:
            raise OSError(refused, os.strerror(refused))
        lock(descriptor, how)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(whole_saves.fcntl, "flock", locked)
    with saving(tmp_path) as save:  # as of another machine
        write_file(tmp_path / "other.json", "other")
        save.write({"rows.json": b"rows"})
        save.place("rows.json")
    assert sorted(os.listdir(tmp_path)) == ["other.json", "rows.json"]
    make_left_over(tmp_path / ".vwt-save-killed_n", 0.9)
    make_left_over(tmp_path / ".vwt-save-killed_o", 1.1)
    write_file(tmp_path / "rows.json", "more")
    assert sorted(os.listdir(tmp_path)) == [".vwt-save-killed_n", "other.json", "rows.json"]


def make_left_over(folder: Path, days: float) -> None:
    """A folder as a killed save leaves it, that long ago."""
    folder.mkdir()
    then = time.time() - days * 24 * 3600
    os.utime(folder, (then, then))


def test_what_a_save_of_another_machine_left_stays_for_a_day(tmp_path, monkeypatch):
    """Its locks may not be seen here."""
    with monkeypatch.context() as patch, saving(tmp_path) as save:
        patch.setattr(whole_saves, "_PREFIX", ".vwt-save-0123abcd-")
        with saving(tmp_path) as other:
            assert other.new.name.startswith(".vwt-save-0123abcd-")
            (own,) = other.left_overs()
            assert own == save.new and not save.left_overs()
    make_left_over(tmp_path / ".vwt-save-0123abcd-killed_n", 0.9)
    make_left_over(tmp_path / ".vwt-save-0123abcd-killed_o", 1.1)
    make_left_over(tmp_path / own.name, 0)
    write_file(tmp_path / "rows.json", "more")
    assert sorted(os.listdir(tmp_path)) == [".vwt-save-0123abcd-killed_n", "rows.json"]


def test_a_folder_that_goes_meanwhile_and_one_of_an_earlier_version_without_a_machine(tmp_path, monkeypatch):
    is_dir = Path.is_dir

    def then_removed(path: Path) -> bool:
        there = is_dir(path)
        if there and path.name.endswith("goes_now"):
            path.rmdir()
        return there

    for name in (".vwt-save-0123abcd-goes_now", ".vwt-save-killed_n"):
        make_left_over(tmp_path / name, 0)
    with saving(tmp_path) as save:
        monkeypatch.setattr(Path, "is_dir", then_removed)
        assert save.left_overs() == [tmp_path / ".vwt-save-killed_n"]


def test_a_day_is_told_by_the_clock_of_the_machine_that_has_the_files(tmp_path, monkeypatch):
    def locked(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(whole_saves.fcntl, "flock", locked)
    now = time.time
    with saving(tmp_path) as save:
        save.write({"rows.json": b"rows"})
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + 2 * 24 * 3600)
            write_file(tmp_path / "other.json", "other")
        save.place("rows.json")
    assert sorted(os.listdir(tmp_path)) == ["other.json", "rows.json"]


def test_a_file_is_written_where_the_folder_cannot_be_listed(tmp_path, monkeypatch):
    def refused(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refused)
    write_file(tmp_path / "rows.json", "rows")
    assert os.listdir(tmp_path) == ["rows.json"]


def test_an_error_that_names_a_file_or_none_of_the_disk_stays_as_it_is(tmp_path):
    for error in (PermissionError(errno.EACCES, "Permission denied", "a.json"), OSError("it has no errno")):
        with pytest.raises(OSError) as raised, naming(tmp_path):
            raise error
        assert raised.value is error
    with pytest.raises(OSError, match=f"No space left on device, while it was written: '{tmp_path}'"), naming(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_place_is_judged_by_its_name_alone_where_files_are_written_at_once(tmp_path, monkeypatch):
    """Storage from which nothing may be deleted takes a model, and no file that is written to try it."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: pytest.fail("a file was written to try the folder"))
    model = compress(tiny_model("vit"), {"keep_ratio": 0.5})
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model/config.json").is_file()
    assert require_place(tmp_path / "model/new") == tmp_path / "model"
    for name, reason in (
        ("model/config.json", "is no folder; expected one"),
        ("model/config.json/new", "is no folder"),
    ):
        with pytest.raises(NotADirectoryError, match=reason):
            model.save_pretrained(tmp_path / name)
    with pytest.raises(OSError, match="File name too long"):
        require_place(tmp_path / ("a" * 300))
