"""Two processes on one evaluation, files that cannot be written, hints that help, and too many bad tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.errors import ConfigError, TaskError
from areal_agents.evaluation.unfinished import count_saved, open_journal
from areal_agents.tracking.journal import Journal
from areal_agents.types import Task
from tests.chat_envs import Sums
from tests.chat_server import chat_server
from tests.small_disk import small_disk
from tests.unfinished import (
    ENV,
    SECONDS,
    Gate,
    answers,
    command,
    numbers,
    partial_of,
    read_until,
    started,
    uninterrupted,
)

OPEN = "areal_agents.evaluation.evaluate.open_journal"


class SomeBad(Sums):
    """Of forty tasks every third has no question."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [
            Task.make(f"{split}-{i}", split=split, seed=i, payload={"a": 100 + i, "b": 7, "answer": str(107 + i)})
            for i in range(40)
        ]

    def prompt(self, task: Task) -> str:
        if int(task.payload["a"]) % 3 == 1:
            raise TaskError("no question today")
        return super().prompt(task)


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with Journal(tmp_path / "a/b/step-000000.jsonl"), pytest.raises(ConfigError, match="written by another process"):
        Journal(tmp_path / "a/b/step-000000.jsonl")
    assert not list(tmp_path.iterdir())  # an empty one goes, with the folders that were made for it


def test_a_journal_whose_last_writer_removed_the_file_meanwhile_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lock = tmp_path / "step-000000.jsonl", Journal._lock
    replaced: list[Path] = []

    def late(self: Journal) -> None:
        if not replaced:
            path.unlink()  # the first process ends between this one's open and its lock
            replaced.append(path)
        lock(self)

    monkeypatch.setattr(Journal, "_lock", late)
    with Journal(path) as journal:
        assert os.fstat(journal._file.fileno()).st_ino == path.stat().st_ino
        with pytest.raises(ConfigError, match="written by another process"):
            Journal(path)


def test_a_second_resume_is_refused_and_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a partial evaluation, of a whole one, and of one that is played for the first time."""
    with chat_server(answers) as server:
        whole, out = uninterrupted(tmp_path, server.url), tmp_path / "out"
    partial_of(whole, out, 2)
    lines = out / "trajectories/eval/step-000000.jsonl"
    gate = Gate(0)
    with chat_server(gate) as server:
        with started("eval", "--resume", str(out), "--url", server.url) as first:
            read_until(first, "2 of 8 attempts are played already")
            before = lines.read_bytes()
            for argv in (["eval", "--resume", str(out), "--url", server.url], command(tmp_path / "out", server.url)):
                capsys.readouterr()
                assert main(argv) == 1
                said = capsys.readouterr().err
                refused = "already holds an evaluation" if "--out" in argv else "is being written by another process"
                assert refused in said, said
                assert said.count("\n") == 1
            assert lines.read_bytes() == before
            gate.open.set()
            _, errors = first.communicate(timeout=SECONDS)
        assert (first.returncode, errors) == (0, "")
        assert len(server.requests) == 6  # the second one asked nothing
    assert numbers(out) == numbers(whole)


def test_an_evaluation_that_ends_while_a_second_one_starts_is_not_played_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second one knows of the folder, it read under the lock."""
    with chat_server(answers) as server:
        whole, out = uninterrupted(tmp_path, server.url), tmp_path / "out"
        partial_of(whole, out, 2)

        def late(folder: Path) -> Journal:
            monkeypatch.setattr(OPEN, open_journal)
            assert main(["eval", "--resume", str(folder), "--url", server.url]) == 0
            return open_journal(folder)

        asked = len(server.requests)
        monkeypatch.setattr(OPEN, lambda folder: _in_a_thread(late, folder))  # a process may have one loop a thread
        assert main(["eval", "--resume", str(out), "--url", server.url]) == 0
        assert len(server.requests) == asked + 6
    assert numbers(out) == numbers(whole)


def _in_a_thread(call: Callable[[Path], Journal], folder: Path) -> Journal:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, folder).result()


def test_a_hint_says_resume_only_where_that_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "afile").write_text("x")
    with chat_server(answers) as server:
        for out in (tmp_path / "afile", tmp_path / "afile/x", tmp_path / "afile/x/y"):
            assert main(command(out, server.url)) == 1
            said = capsys.readouterr().err
            assert f"{tmp_path / 'afile'} is a file and no folder. Choose another --out\n" in said
            assert "--resume" not in said
        training = tmp_path / "training"
        training.mkdir()
        (training / "metrics.jsonl").write_text("{}\n")
        (training / "config.toml").write_text(f"[env]\nid = '{ENV}'\n[model]\npath = 'openai:m'\n")
        for argv in (command(training, server.url), [*command("", server.url)[:-2], "--resume", str(training)]):
            assert main(argv) == 1
            said = capsys.readouterr().err
            assert "another" in said
            assert "eval --resume" not in said
        assert not (training / "trajectories").exists()
        whole = uninterrupted(tmp_path, server.url)
        partial_of(whole, tmp_path / "part", 3)
        capsys.readouterr()
        assert main(["eval", "--compare", str(whole), str(tmp_path / "part")]) == 1
        note = f"{tmp_path / 'part'} is not complete: 3 of 8 attempts are saved. Go on with:\n  areal-agents eval"
        assert note in capsys.readouterr().err
        assert main(command(tmp_path / "part", server.url)) == 1
        said = capsys.readouterr().err
        assert f"The evaluation goes on with `areal-agents eval --resume {tmp_path / 'part'}`" in said
        assert main(["train", "--out", str(whole), "--env.id", ENV, "--model.path", "smollm2", "--resume"]) == 1
        assert f"{whole} holds an evaluation: choose another --out" in capsys.readouterr().err
        assert not (whole / "lock").exists()


def test_past_a_share_of_bad_tasks_it_stops_says_which_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 40 tasks every third is bad: 8 are found among the first 22, which are more than a quarter."""
    out = tmp_path / "out"
    argv = ["eval", "tests.evaluation.test_unfinished_faults:SomeBad", "--model", "openai:m", "--n", "40"]
    argv += ["--out", str(out), "--concurrency", "1", "--rollout.max_bad_tasks", "0.25"]
    with chat_server(answers) as server:
        assert main([*argv, "--url", server.url]) == 1
        said = capsys.readouterr().err
        assert "8 of the 22 tasks tried so far cannot be played or scored, more than rollout.max_bad_tasks" in said
        assert "test-21: areset (task test-21, turn 0): no question today" in said
        assert "14 of 40 attempts are saved. Once its cause is mended, go on with:" in said
        assert count_saved(out) == 14
        assert main(["eval", "--resume", str(out)]) == 1  # nothing is mended
        assert "more than rollout.max_bad_tasks = 0.25" in capsys.readouterr().err
        assert count_saved(out) == 14
        assert main(["eval", "--resume", str(out), "--rollout.max_bad_tasks", "0.5"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["attempts"], len(report["left_out"]), report["unplayed"]) == (26, 14, 0)


@pytest.mark.parametrize("inodes", range(1, 7))
def test_a_start_that_no_file_is_left_for_leaves_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], inodes: int
) -> None:
    """The disk itself is one; then come the folder, its two below, the lines, the settings and the sitting."""
    with small_disk(tmp_path / "disk", inodes=inodes) as disk, chat_server(answers) as server:
        assert main(command(disk / "out", server.url)) == 1
        said = capsys.readouterr().err
        assert said.count("cannot be written (No space left on device): remove some files on that disk") == 1, said
        assert list(disk.iterdir()) == []


def test_a_start_that_finds_no_server_key_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AREAL_NO_KEY", raising=False)
    assert main([*command(tmp_path / "out", "http://127.0.0.1:9/v1"), "--api-key-env", "AREAL_NO_KEY"]) == 1
    assert "AREAL_NO_KEY" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
