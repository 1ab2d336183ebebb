"""Folders appear complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_agents.checkpoint import atomic_folder


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
