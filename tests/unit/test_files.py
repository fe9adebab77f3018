"""A file that is replaced: what is on the disk, and in which order."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from syncline.files import replacing, sync_directory


def write(path: Path, text: str) -> None:
    with replacing(path, "new") as fresh:
        fresh.write_text(text)


def test_the_file_and_then_its_name_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the directory's own fsync a power failure brings the file from before back."""
    said: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def told(fd: int) -> None:
        said.append("directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", told)

    def replaced(self: Path, target: Path) -> Path:
        said.append("replace")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replaced)
    write(tmp_path / "a", "text")
    assert said == ["file", "replace", "directory"] and (tmp_path / "a").read_text() == "text"


def test_what_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write(tmp_path / "a", "old")

    def fails() -> None:
        with replacing(tmp_path / "a", "new") as fresh:
            fresh.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fails()
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


def test_what_an_interrupted_write_has_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("half")
    write(tmp_path / "a", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_a_directory_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: bool
) -> None:
    def fails(fd: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fails)
    if raised:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync_directory(tmp_path)
    else:
        sync_directory(tmp_path)
