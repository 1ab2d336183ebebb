"""Files and folders appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_agents.utils.files import atomic_folder, cut_torn_line, write_atomically
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
