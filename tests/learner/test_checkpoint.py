"""Folders appear complete or not at all."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from areal_agents.learner.checkpoint import atomic_folder, write_state
from tests.conftest import missing


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


@pytest.mark.parametrize("room", [0, 1 << 12, 1 << 16, 3 << 16])
def test_a_full_disk_is_named_wherever_it_fills_up(tmp_path: Path, room: int) -> None:
    if os.geteuid() != 0:
        missing("root, to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    large = torch.zeros(300_000)
    state = {"a": large, "b": [torch.zeros(1000) for _ in range(50)]}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        (disk / "ballast").write_bytes(bytes((1 << 20) - room))
        with pytest.raises(OSError, match="No space left on device"):
            write_state(disk / "state.pt", state)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    write_state(tmp_path / "state.pt", state)
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    assert torch.equal(read["a"], large)
    assert len(read["b"]) == 50
