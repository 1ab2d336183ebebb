"""The folder of a private Ray's files, without Ray."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from areal_agents.cluster.ray_session import _private_folder


def test_folders_that_nobody_holds_are_swept_and_one_is_removed_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver in another container has no process id here, but it has the lock."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("areal_agents.cluster.ray_session._SOCKET_PATH", 4096)
    held, left, old = (tmp_path / f"areal-ray-{10**9 + n}-x" for n in range(3))
    for folder in (held, left):
        folder.mkdir()
        (folder / "areal.lock").touch()
    old.mkdir()
    with (held / "areal.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _private_folder() as mine:
            assert sorted(tmp_path.iterdir()) == sorted([held, mine])
        assert list(tmp_path.iterdir()) == [held]
