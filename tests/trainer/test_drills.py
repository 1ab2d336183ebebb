"""Failure drills on whole runs: what breaks is retried or reported, nothing is lost, trained twice or left behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.errors import EnvError, FailureBudgetError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import TrainConfig
from areal_agents.tools.python import MAX_OUTPUT_BYTES
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.types import Trajectory
from tests.conftest import require
from tests.drill_envs import BlocksTheLoop, NeverReturns, Tripwires
from tests.processes import MARKER, descendants, marked, shared_memory_left, wait_gone
from tests.tiny_models import tiny_chat_model

pytestmark = pytest.mark.slow

STEPS, GROUPS, SIZE = 4, 2, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A marker that everything this test starts carries; nothing may be left, no shared memory either."""
    value = f"drill-{os.getpid()}-{tmp_path.name}"
    monkeypatch.setenv(MARKER, value)
    before = set(os.listdir("/dev/shm"))
    yield value
    assert wait_gone(marked(value), 60) == []
    assert not shared_memory_left(before, 60)
    gc.collect()
    assert [fd for fd in _descriptors() if "areal-weights" in fd] == []
    assert "memfd:areal-weights" not in Path("/proc/self/maps").read_text()


def _descriptors() -> list[str]:
    out = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            out.append(os.readlink(fd))
        except OSError:  # the listing's own descriptor
            continue
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with positions for long conversations."""
    folder = tiny_chat_model(tmp_path_factory.mktemp("wide") / "m")
    sizes = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 16_384}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def config(tmp_path: Path, model: Path, env: str, /, **sections: Any) -> TrainConfig:
    """Four steps of two groups of two episodes of two turns, in fp32, every step committed."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "max_context": 256},
        "env": {"id": f"tests.drill_envs:{env}"},
        "engine": {"precision": "fp32", "max_batch": 8, "kv_tokens": 4096},
        "rollout": {
            "groups": GROUPS, "group_size": SIZE, "concurrency": 8, "max_turn_tokens": 24, "max_episode_tokens": 64,
        },
        "learner": {"precision": "fp32", "lr": 1e-3},
        "eval": {"n": 1},
        "checkpoint": {"every": 1},
        "track": {"tensorboard": False},
    }  # fmt: skip
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return TrainConfig.model_validate({"steps": STEPS, "out": tmp_path / "run"} | merged)


def run(config: TrainConfig, **options: Any) -> None:
    asyncio.run(asyncio.wait_for(train(config, console=False, **options), 200))


def events(config: TrainConfig, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (config.out / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def check_whole(config: TrainConfig) -> dict[int, list[Trajectory]]:
    """Every step logged once, every group consumed once and whole, versions in order and young enough."""
    assert [row["step"] for row in read_metrics(config.out, kind="train")] == list(range(1, STEPS + 1))
    steps: dict[int, list[Trajectory]] = {}
    for record in read_records(config.out, kind="train"):
        steps.setdefault(record.step, []).append(record.trajectory)
    assert sorted(steps) == list(range(1, STEPS + 1))
    assert all(len(episodes) == GROUPS * SIZE for episodes in steps.values())
    groups = [{t.group for t in episodes} for episodes in steps.values()]
    assert all(len(g) == GROUPS for g in groups)
    assert len(set.union(*groups)) == STEPS * GROUPS
    ids = [t.id for episodes in steps.values() for t in episodes]
    assert len(set(ids)) == len(ids)
    for step, episodes in steps.items():
        for episode in episodes:
            versions = [v for turn in episode.turns for v in turn.completion.versions]
            assert versions == sorted(versions)
            assert step - 1 - config.rollout.staleness <= versions[0]
            assert versions[-1] <= step - 1
    return steps


# --- the engine's process --------------------------------------------------------------------------------------------


def signal_worker(mark: str, number: signal.Signals, sent: list[int]) -> Callable[[], None]:
    def send() -> None:
        (worker,) = marked(mark)
        sent.append(worker)
        os.kill(worker, number)

    return send


def test_a_killed_engine_costs_only_the_tokens_it_was_sampling(tmp_path: Path, model: Path, mark: str) -> None:
    killed: list[int] = []
    kill = signal_worker(mark, signal.SIGKILL, killed)
    Tripwires.set({1: kill, 17: kill})  # 8 steps of training are one batch, which needs the engine still
    c = config(tmp_path, model, "Tripwires", rollout={"mode": "sync"}, learner={"lr": 1e-2})
    run(c)
    assert len(set(killed)) == 2
    check_whole(c)
    assert Tripwires.steps == STEPS * GROUPS * SIZE * 2  # no episode was started again
    assert (len(events(c, "engine_lost")), len(events(c, "engine_restarted"))) == (2, 2)
    assert all("SIGKILL" in e["reason"] for e in events(c, "engine_lost"))
    assert [e["version"] for e in events(c, "engine_restarted")] == [0, 2]
    assert events(c, "request_retried")
    assert events(c, "episode_failed") == []
    for row in read_metrics(c.out, kind="train"):
        assert row["failed_attempts"] == 0
        # Sampled from the weights that train: another version's would differ by far more at this learning rate.
        assert row["off_policy/abs_dlogp"] < 1e-4


def test_a_stopped_engine_is_replaced(tmp_path: Path, model: Path, mark: str) -> None:
    stopped: list[int] = []
    Tripwires.set({12: signal_worker(mark, signal.SIGSTOP, stopped)})
    c = config(tmp_path, model, "Tripwires", engine={"hang_timeout": 2.0})
    run(c)
    check_whole(c)
    assert Tripwires.steps == STEPS * GROUPS * SIZE * 2
    assert any("no sign of health for 2 s" in e["reason"] for e in events(c, "engine_lost"))
    assert events(c, "engine_restarted")
    assert events(c, "episode_failed") == []
    assert wait_gone(stopped, 0) == []


def test_a_killed_trainer_leaves_no_process(tmp_path: Path, wide: Path, mark: str) -> None:
    """Killed while programs run in the sandbox, with children of their own: engine, sandboxes and programs end."""
    require("bwrap")
    c = config(
        tmp_path, wide, "Sleeps", model={"max_context": 4000}, warm_start={"demonstrations": 2},
        rollout={"max_turn_tokens": 200, "max_episode_tokens": 400},
    )  # fmt: skip
    (tmp_path / "train.toml").write_text(settings.dump(c))
    command = [sys.executable, "-m", "areal_agents", "train", str(tmp_path / "train.toml")]
    with (tmp_path / "log").open("wb") as log:
        trainer = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
        try:
            end = time.monotonic() + 150
            while sum(map(_is_program, descendants(trainer.pid))) < 2:
                assert trainer.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.1)  # looking all the time would take one of the cores from the trainer
            everything = descendants(trainer.pid)
        finally:
            trainer.kill()
            trainer.wait()
    assert wait_gone(everything, 10) == []
    assert marked(mark) == []


def _is_program(pid: int) -> bool:
    """Whether it is what the ``python`` tool runs inside the sandbox."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() == b"python3\0-I\0-u\0-X\0utf8\0-\0"
    except OSError:
        return False


# --- environments ----------------------------------------------------------------------------------------------------


def test_an_environment_that_never_returns_is_counted_and_retried(tmp_path: Path, model: Path, mark: str) -> None:
    NeverReturns.hangs = 2
    c = config(tmp_path, model, "NeverReturns", env={"step_timeout": 1.0})
    run(c)
    check_whole(c)
    assert NeverReturns.hangs == 0
    failed = events(c, "episode_failed")
    assert [(e["error"], e["retried"], e["attempt"]) for e in failed] == [("EnvError", True, 1)] * 2
    assert all("did not return within 1 s (env.step_timeout)" in e["detail"] for e in failed)
    assert read_metrics(c.out, kind="train")[-1]["failed_attempts"] == 2


def test_an_environment_that_blocks_its_loop_is_left_behind(
    tmp_path: Path, model: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("areal_agents.rollout.env_host._HEARTBEAT_SECONDS", 0.5)
    BlocksTheLoop.hangs = 1
    BlocksTheLoop.release.clear()
    c = config(tmp_path, model, "BlocksTheLoop", env={"step_timeout": 1.0})
    try:
        run(c)
    finally:
        BlocksTheLoop.release.set()
    check_whole(c)
    (failed,) = events(c, "episode_failed")  # the culprit alone; the others start again at no cost
    assert (failed["error"], failed["retried"]) == ("EnvError", True)
    assert "blocked its event loop for more than 1 s" in failed["detail"]
    assert len(events(c, "host_replaced")) == 1


def test_an_environment_that_always_hangs_ends_the_run_with_the_first_error(
    tmp_path: Path, model: Path, mark: str
) -> None:
    NeverReturns.hangs = 10_000
    c = config(
        tmp_path, model, "NeverReturns", env={"step_timeout": 0.3}, rollout={"failure_window": 8, "max_retries": 9}
    )
    with pytest.raises(FailureBudgetError, match=r"\d+ of the last \d+ .* First failure: astep \(task") as failure:
        run(c)
    assert isinstance(failure.value.__cause__, EnvError)
    assert len(events(c, "episode_failed")) >= 3
    assert read_metrics(c.out, kind="train") == []


# --- tools -----------------------------------------------------------------------------------------------------------


def test_tools_that_flood_are_cut_and_memory_stays_bounded(tmp_path: Path, wide: Path, mark: str) -> None:
    """The 100 MB exist once, in the tool that made them; of endless output nothing beyond the limit is read."""
    require("bwrap")
    c = config(
        tmp_path, wide, "Floods", model={"max_context": 16_384}, warm_start={"demonstrations": 2, "batch": 1},
        engine={"kv_tokens": 16_384},
        learner={"token_budget": 8192}, rollout={"max_turn_tokens": 500, "max_episode_tokens": 4000},
    )  # fmt: skip
    before = _rss_peak(reset=True)
    run(c.model_copy(update={"steps": 1}))
    grown = _rss_peak() - before
    played = [r.trajectory for r in read_records(c.out, kind="demonstration")]
    assert len(played) == 2
    for episode in played:
        assert [len(t.message.tool_calls) for t in episode.turns] == [1, 1, 1, 0]
        shown = [turn.observation[-1].text for turn in episode.turns[1:]]
        assert all(len(text) < 2200 for text in shown)
        assert shown[0].startswith("xxxx")
        assert "yyyy" in shown[1]
        assert all(f"stopped after {MAX_OUTPUT_BYTES} bytes of output" in text for text in shown[1:])
    assert grown < 450 << 20


def _rss_peak(*, reset: bool = False) -> int:
    """Largest resident size of this process in bytes, since the last ``reset``."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


# --- the learner and the clock ---------------------------------------------------------------------------------------


def test_a_learner_that_raises_ends_the_run_and_its_last_checkpoint_goes_on(
    tmp_path: Path, model: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(tmp_path, model, "Tripwires")
    Tripwires.set({})
    step = TorchLearner._step

    def broken(self: TorchLearner, batch: Any) -> Any:
        if self.version == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TorchLearner, "_step", broken)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run(c)
    assert wait_gone(marked(mark), 10) == []
    assert [row["step"] for row in read_metrics(c.out, kind="train")] == [1, 2]
    run(c, resume=True)
    check_whole(c)


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, model: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])
    Tripwires.set({6: lambda: shift.__setitem__(0, -3600.0), 20: lambda: shift.__setitem__(0, 86_400.0)})
    c = config(tmp_path, model, "Tripwires")
    run(c)
    check_whole(c)
    rows = read_metrics(c.out, kind="train")
    assert max(b["time"] - a["time"] for a, b in itertools.pairwise(rows)) > 80_000  # the clock did jump
    for row in rows:
        assert 0 <= row["wait_seconds"] <= row["step_seconds"] < 150
        assert row["tokens_per_second"] > 0
        assert 0 <= row["generate_seconds"] < 150
        assert row["failed_attempts"] == 0
    assert events(c, "episode_failed") == events(c, "engine_lost") == []
    assert 0 <= events(c, "checkpoint")[-1]["seconds"] < 150
