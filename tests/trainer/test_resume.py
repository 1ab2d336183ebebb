"""A run that is killed, stopped or out of disk goes on from its last commit, and nothing is lost or trained twice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents import settings
from areal_agents.cli.demo import claim
from areal_agents.errors import ArealError, ConfigError, Interrupted, LearnerLost
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking import trajectories
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.trainer.run import Run
from areal_agents.trainer.run import open_run as usually_opened
from areal_agents.trainer.run_folder import RunFolder
from areal_agents.types import Task
from tests.letters_env import Letters
from tests.processes import MARKER, descendants, marked, wait_gone
from tests.small_disk import small_disk
from tests.tiny_models import tiny_chat_model

ROOT = Path(__file__).resolve().parents[2]
GROUPS, SIZE = 2, 2


class ManyLetters(Letters):
    """As many training tasks as a run consumes (in thousands: ``difficulty``): each must come up exactly once."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        count = round(1000 * (difficulty or 0.008)) if split == "train" else 4
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"{split} {i}"}) for i in range(count)]


def config(folder: Path, steps: int, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "steps": steps,
        "out": folder / "run",
        "model": {"path": str(folder / "model"), "max_context": 128},
        "env": {"id": "tests.trainer.test_resume:ManyLetters", "difficulty": steps * GROUPS / 1000},
        "engine": {"precision": "fp32", "max_batch": 8},
        "rollout": {"groups": GROUPS, "group_size": SIZE, "concurrency": 8, "max_turn_tokens": 4, "max_staleness": 2},
        "learner": {"lr": 1e-3, "precision": "fp32"},
        "eval": {"n": 4, "temperature": 1.0},
        "checkpoint": {"every": 1, "keep": 2},
    }
    for name, value in changes.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, Mapping) else value
    if not (folder / "model").exists():
        tiny_chat_model(folder / "model")
    return TrainConfig.model_validate(tree)


@contextlib.contextmanager
def zygote(mark: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.zygote"],
        cwd=ROOT, env={**os.environ, MARKER: mark, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert answer(process) == "ready"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def launch(process: subprocess.Popen[str], path: Path) -> int:
    assert process.stdin is not None
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    return int(answer(process))


def train_rows(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_bytes().count(b'"kind": "train"')
    except FileNotFoundError:
        return 0


def wait_for(condition: Callable[[], bool], pid: int, seconds: float = 120.0) -> None:
    """Until ``condition()``, or the end of process ``pid``."""
    end = time.monotonic() + seconds
    while not condition() and Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the run got nowhere"
        time.sleep(0.005)


def no_orphans(process: subprocess.Popen[str], folder: Path) -> None:
    assert not wait_gone([p for p in marked(str(folder)) if p != process.pid], 20.0)


def check_lineage(config: TrainConfig, *, all_tasks: bool = True) -> None:
    """Every step once, no task twice, ages within the bound, and as many optimizer steps as metrics say.

    all_tasks: the run consumes as many tasks as there are, so each must have come up.
    """
    out, steps = config.out, config.steps
    rows = read_metrics(out, kind="train")
    assert [r["step"] for r in rows] == list(range(1, steps + 1))
    records = list(read_records(out, kind="train"))
    groups = {(r.step, r.trajectory.group, r.trajectory.task.id) for r in records}
    assert Counter(step for step, _, _ in groups) == dict.fromkeys(range(1, steps + 1), GROUPS)
    tasks = [task for _, _, task in groups]
    assert len(set(tasks)) == len(tasks) == steps * GROUPS
    assert not all_tasks or set(tasks) == {f"train-{i}" for i in range(steps * GROUPS)}
    assert len({r.trajectory.id for r in records}) == len(records) == steps * GROUPS * SIZE
    for r in records:
        versions = [v for turn in r.trajectory.turns for v in turn.completion.versions]
        assert r.step - 1 - config.rollout.staleness <= min(versions) <= max(versions) <= r.step - 1
    for label in ("before", "after_rl"):
        assert len(read_metrics(out, kind=f"eval/{label}")) == 1
        assert len(list(read_records(out, kind=f"eval-{label}"))) == config.eval.n
    commit = json.loads((out / "commit.json").read_text())
    assert (commit["step"], commit["complete"]) == (steps, True)
    state = torch.load(out / "checkpoints" / commit["checkpoint"] / "learner" / "learner.pt", weights_only=True)
    taken = {int(s["step"]) for s in state["optimizer"]["state"].values()}
    assert taken == {steps - sum(int(r["minibatches_empty"] + r["skipped"]) for r in rows)}


def test_a_learner_that_is_lost_before_the_run_has_written_anything_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_run(config: TrainConfig, *args: Any, **options: Any) -> Any:
        opened.append(config.steps)
        if len(opened) == 1:
            raise LearnerLost("it died while it loaded the model")
        return usually_opened(config, *args, **options)

    monkeypatch.setattr("areal_agents.trainer.loop.open_run", open_run)
    c = config(tmp_path, 1)
    asyncio.run(train(c, console=False))
    assert opened == [1, 1]
    check_lineage(c)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_lose_nothing_and_train_nothing_twice(tmp_path: Path) -> None:
    c = config(tmp_path, steps=80)
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    rng = random.Random(7)
    steps_at: list[int] = []
    start = 4.0  # seconds from a launch until its run goes on, as the last one needed them
    with zygote(str(tmp_path)) as process:
        for kill in range(20):
            before, started = train_rows(c.out), time.monotonic()
            pid = launch(process, path)
            if kill % 5 == 0:  # while it starts: imports are done, so this is the model, the engine, the resuming
                delay = rng.uniform(0.0, start)
                wait_for(lambda: time.monotonic() - started > delay, pid)  # noqa: B023
            else:
                goal = rng.randint(2, 5)
                resumed = c.out / "events.jsonl"
                seen = resumed.read_bytes().count(b'"resumed"') if resumed.exists() else 0
                wait_for(lambda: not before or resumed.read_bytes().count(b'"resumed"') > seen, pid)  # noqa: B023
                start = time.monotonic() - started if before else start
                base = train_rows(c.out)
                wait_for(lambda: train_rows(c.out) >= base + goal, pid)  # noqa: B023
                time.sleep(rng.uniform(0.0, 0.15))  # any moment will do: between, in and after the writes of a step
            os.kill(pid, signal.SIGKILL)
            assert answer(process) == f"ended {pid} -9", (tmp_path / "config.log").read_text()[-3000:]
            no_orphans(process, tmp_path)
            steps_at.append(train_rows(c.out))
        assert steps_at[-1] >= 16, steps_at  # the kills struck a run that went on
        pid = launch(process, path)
        assert answer(process) == f"ended {pid} 0", (tmp_path / "config.log").read_text()[-3000:]
        no_orphans(process, tmp_path)
    check_lineage(c)
    assert len(list((c.out / "checkpoints").iterdir())) == c.checkpoint.keep
    assert not list(c.out.rglob(".*tmp*"))


def log(folder: Path) -> str:
    return (folder / "config.log").read_text()


@pytest.mark.slow
def test_one_signal_finishes_the_step_and_saves_and_two_stop_at_once(tmp_path: Path) -> None:
    c = config(tmp_path, steps=24, checkpoint={"every": 0}, eval={"every": 8})
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    with zygote(str(tmp_path)) as process:
        pid = launch(process, path)
        wait_for(lambda: train_rows(c.out) >= 3, pid)
        os.kill(pid, signal.SIGINT)
        assert answer(process) == f"ended {pid} 130", log(tmp_path)
        done = train_rows(c.out)
        assert json.loads((c.out / "commit.json").read_text())["step"] == done >= 3
        assert f"stopped by SIGINT; step {done} of 24 is saved. Go on with:\n" in log(tmp_path)

        pid = launch(process, path)
        wait_for(lambda: train_rows(c.out) >= done + 3, pid)
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)  # whether the step ended in between or not: all that counts is committed
        assert answer(process) == f"ended {pid} 130", log(tmp_path)
        no_orphans(process, tmp_path)
        assert json.loads((c.out / "commit.json").read_text())["step"] >= done

        pid = launch(process, path)
        assert answer(process) == f"ended {pid} 0", log(tmp_path)
    check_lineage(c)
    assert [len(read_metrics(c.out, kind=f"eval/step_{s}")) for s in (8, 16)] == [1, 1]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


@pytest.mark.slow
def test_one_signal_ends_a_start_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    c = config(tmp_path, steps=4)
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    with zygote(str(tmp_path)) as process:
        pid = launch(process, path)
        # It runs its own program by now: stopped between fork and exec, it would hold up the trainer's very Popen.
        wait_for(lambda: any(b"engines.cpu.worker" in command_line(p) for p in descendants(pid)), pid)
        for engine in descendants(pid):  # it would never have started
            os.kill(engine, signal.SIGSTOP)
        os.kill(pid, signal.SIGINT)
        assert answer(process) == f"ended {pid} 130", log(tmp_path)
        no_orphans(process, tmp_path)
    assert "SIGINT: stopping\n" in log(tmp_path)
    assert log(tmp_path).endswith("stopped by SIGINT before anything was begun\n")
    assert not c.out.exists()


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_once_there_is_room(tmp_path: Path) -> None:
    c = config(tmp_path, steps=16, out=tmp_path / "disk" / "run", checkpoint={"every": 1, "keep": 1})
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    with small_disk(tmp_path / "disk", "24m"):
        with zygote(str(tmp_path)) as process:
            pid = launch(process, path)
            wait_for(lambda: train_rows(c.out) >= 4, pid)
            ballast = tmp_path / "disk" / "ballast"
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            assert answer(process) == f"ended {pid} 1", log(tmp_path)
            assert "cannot be written" in log(tmp_path)
            assert "No space left on device" in log(tmp_path)
            no_orphans(process, tmp_path)
            ballast.unlink()
            pid = launch(process, path)
            assert answer(process) == f"ended {pid} 0", log(tmp_path)
        check_lineage(c)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path), pytest.raises(ConfigError, match=f"is in use by process {os.getpid()}"):  # noqa: SIM117
        with RunFolder(tmp_path):
            pass
    with RunFolder(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match=r"has no locks \(.*Function not implemented\): choose another"):
        RunFolder(tmp_path).__enter__()


@pytest.mark.slow
def test_a_signal_during_an_evaluation_or_the_last_one_saves_all_steps(tmp_path: Path, monkeypatch: Any) -> None:
    """The stop comes in at the worst place: steps are done, no checkpoint was due."""
    c = config(tmp_path, steps=4, checkpoint={"every": 0}, eval={"every": 2})
    usual = Run.evaluate
    stop_at = ["step_2", "after_rl"]

    async def interrupted(self: Run, label: str, *, step: int = 0) -> None:
        if stop_at and label == stop_at[0]:
            stop_at.pop(0)
            self.stop.request(signal.SIGINT)
            await asyncio.Event().wait()
        await usual(self, label, step=step)

    monkeypatch.setattr(Run, "evaluate", interrupted)
    for step in (2, 4):
        with pytest.raises(Interrupted, match=f"step {step} of 4 is saved"):
            asyncio.run(train(c, resume=True, console=False))
    asyncio.run(train(c, resume=True, console=False))
    check_lineage(c)
    assert len(read_metrics(c.out, kind="eval/step_2")) == 1


@pytest.mark.slow
def test_a_last_evaluation_that_could_not_be_written_does_not_complete_the_run(
    tmp_path: Path, monkeypatch: Any
) -> None:
    c = config(tmp_path, steps=2)
    usual, broken = trajectories.write_shard, [True]

    def failing(path: Path, records: Sequence[trajectories.Record]) -> None:
        if broken and "eval-after_rl" in str(path):
            broken.clear()
            raise ArealError("the disk is full")
        usual(path, records)

    monkeypatch.setattr("areal_agents.tracking.tracker.write_shard", failing)
    with pytest.raises(ArealError, match="the disk is full"):
        asyncio.run(train(c, console=False))
    assert json.loads((c.out / "commit.json").read_text())["complete"] is False
    asyncio.run(train(c, resume=True, console=False))
    check_lineage(c)


def test_a_demo_takes_only_its_own_folder(tmp_path: Path) -> None:
    claim(tmp_path / "demo", resume=False)
    (tmp_path / "demo" / "x").mkdir()
    claim(tmp_path / "demo", resume=True)
    assert (tmp_path / "demo" / "x").exists()
    with RunFolder(tmp_path / "demo"), pytest.raises(ConfigError, match="in use"):
        claim(tmp_path / "demo", resume=False)
    assert (tmp_path / "demo" / "x").exists()
    claim(tmp_path / "demo", resume=False)
    assert not (tmp_path / "demo" / "x").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").touch()
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is no demo's folder and not empty"):
            claim(tmp_path / "mine", resume=resume)
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["config.toml"]
