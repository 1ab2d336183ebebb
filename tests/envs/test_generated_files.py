"""Folders that are made once: by one process or several, and where they cannot be written."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest

from areal_agents.envs.generated_files import generated_folder
from areal_agents.errors import ConfigError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AREAL_AGENTS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_two_that_begin_at_once_leave_one_whole_folder(cache: Path) -> None:
    together, made = threading.Barrier(2), list[int]()

    def make(folder: Path) -> None:
        together.wait(30)
        (folder / "a").write_text("whole")
        made.append(1)

    threads = [threading.Thread(target=generated_folder, args=("x-1", make)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(made) == 2
    assert [p.name for p in (cache / "envs").iterdir()] == ["x-1"]
    assert (generated_folder("x-1", make) / "a").read_text() == "whole"


def test_what_was_not_finished_is_not_taken(cache: Path) -> None:
    def stopped(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generated_folder("x-1", stopped)
    assert not list((cache / "envs").iterdir())
    assert (generated_folder("x-1", lambda folder: (folder / "a").touch()) / "a").exists()


@pytest.mark.parametrize("error", [OSError(28, os.strerror(28)), sqlite3.OperationalError("database or disk is full")])
def test_a_cache_that_cannot_be_written_is_named_with_what_to_do(cache: Path, error: Exception) -> None:
    def full(folder: Path) -> None:
        raise error

    with pytest.raises(ConfigError, match=r"x-1 cannot be made: .*full|No space.*AREAL_AGENTS_CACHE"):
        generated_folder("x-1", full)
    assert not list((cache / "envs").iterdir())
    (cache / "envs").rmdir()
    (cache / "envs").touch()
    with pytest.raises(ConfigError, match="Set AREAL_AGENTS_CACHE to a folder"):
        generated_folder("x-1", lambda folder: None)
