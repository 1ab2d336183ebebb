"""Files and folders appear complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from areal_agents.utils.files import atomic_folder, cut_torn_line, is_full, unwritable, unwritten, write_atomically
from tests.small_disk import fill, small_disk


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_folder(tmp_path / "b") as folder:  # noqa: PT012
        (folder / "x").write_text("new")
        raise OSError("the disk is full")
    assert (tmp_path / "b" / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "old").write_text("")
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "new").write_text("")
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["new"]


def test_a_file_is_replaced_as_a_whole_or_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        path = disk / "x"
        write_atomically(path, "old")
        ballast = fill(disk, room=1 << 13)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "é" * 6000)
        assert path.read_text() == "old"
        assert sorted(p.name for p in disk.iterdir()) == ["ballast", "x"]
        ballast.unlink()
        write_atomically(path, "é" * 6000)
        assert path.read_text() == "é" * 6000
        assert [p.name for p in disk.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("text", "left"), [(b"", b""), (b"a\n", b"a\n"), (b"a", b""), (b"a\nb", b"a\n"), (b"a\n" + b"b" * 200_000, b"a\n")]
)
def test_torn_lines(tmp_path: Path, text: bytes, left: bytes) -> None:
    (tmp_path / "x").write_bytes(text)
    cut_torn_line(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == left


def test_what_a_full_disk_needs_is_said(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, room=300_000)
        for error in (full, RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")):
            assert is_full(error)
            said = str(unwritable(disk / "new" / "x", error, need=2_500_000_000))
            assert said.endswith(
                "x cannot be written (No space left on device): free about 2.5 GB on that disk (0.3 MB are free), "
                "then go on with --resume"
            ), said
        assert "free some space on that disk, or write to another disk" in str(unwritten(disk / "x", full))
    with small_disk(tmp_path / "files", inodes=2) as disk:
        (disk / "one").touch()
        with pytest.raises(OSError, match="No space left") as caught:
            (disk / "two").touch()
        said = str(unwritable(disk / "two", caught.value))
        assert "remove some files on that disk (it has room for 1.0 MB, but for no more files), then go on" in said
    denied = OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert not is_full(denied)
    assert "(Permission denied): make it writable, then go on" in str(unwritable(tmp_path / "x", denied))
