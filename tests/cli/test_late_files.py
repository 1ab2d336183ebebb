"""Files that a command writes at its end are looked at when it begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from areal_agents.cli.common import require_writable
from areal_agents.cli.main import main
from areal_agents.errors import ArealError
from tests.cli.recorder import Recorder


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_played(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path, said in {tmp_path / "file" / "x.json": "is no folder", tmp_path: "it is a folder"}.items():
        assert main(["eval", "areal/Arithmetic-v0", "--model", "m", "--json", str(path)]) == 1
        assert f"error: cannot write {path}: " in (told := capsys.readouterr().err)
        assert said in told
    assert recorder.calls == []


def test_what_can_be_written_is_taken(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder" / "x.json")
    (tmp_path / "there.json").touch()
    require_writable(tmp_path / "there.json")


def test_what_this_user_may_not_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ArealError, match="may not be written by this user"):
        require_writable(tmp_path / "x.json")
