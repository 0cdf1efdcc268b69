"""Files that are written whole or not at all, and places that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vwt_hf.whole_saves import require_folder, require_writable, write_file


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


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, b"rows")
    assert os.read(reader, 10) == b"rows" and pipe.is_fifo()
    os.close(reader)


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
