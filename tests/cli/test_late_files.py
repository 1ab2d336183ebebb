"""Files that a command writes at its end are looked at when it begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from areal_agents.cli.common import require_writable, write_json
from areal_agents.cli.main import main
from areal_agents.errors import ArealError
from areal_agents.tracking.plot import Panel, plot_runs
from tests.cli.recorder import Recorder
from tests.small_disk import fill, small_disk


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


def test_a_file_is_whole_or_what_it_was_and_a_device_stays_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        write_json({"a": 1}, disk / "x.json")
        ballast = fill(disk, room=1 << 13)
        with pytest.raises(ArealError, match=r"cannot write .*x\.json: No space left on device: free some space"):
            write_json(["long"] * 9000, disk / "x.json")
        assert (disk / "x.json").read_text() == '{\n  "a": 1\n}\n'
        with pytest.raises(ArealError, match=r"cannot write .*curves\.png: No space left on device: free some space"):
            plot_runs([Panel("reward", "", ())], disk / "curves.png")
        assert sorted(f.name for f in disk.iterdir()) == ["ballast", "x.json"]
        ballast.unlink()
    (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
    write_json(1, tmp_path / "link.json")
    assert (tmp_path / "there.json").read_text() == "1\n"
    assert (tmp_path / "link.json").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(2, tmp_path / "pipe")
    assert os.read(reader, 9) == b"2\n"
    os.close(reader)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(28, "No space left on device", "/nowhere/x"),
            "cannot write /nowhere/x: No space left on device: free",
        ),
        (OSError(28, "No space left on device"), "free some space on the disks of --out and of the temporary files"),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "set TMPDIR to a folder with room",
        ),
    ],
)
def test_a_full_disk_that_nothing_else_told_of_is_one_sentence(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*given: object) -> int:
        raise error

    monkeypatch.setattr("areal_agents.cli.commands.Envs.run", run)
    assert main(["envs"]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    with pytest.raises(OSError, match=str(error.strerror)[:12]):
        main(["envs", "--debug"])
