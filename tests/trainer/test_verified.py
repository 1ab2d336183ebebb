"""Runs with a verifier in the loop: mathematics from JSONL files, and what becomes of the verifier's processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.rewards.mathematics.pool import shared_pool
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from tests.conftest import require
from tests.processes import MARKER, marked, until, wait_gone
from tests.tiny_models import tiny_chat_model
from tests.trainer.verified_envs import Watched, verifiers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    value = f"verified-{os.getpid()}-{tmp_path.name}"
    monkeypatch.setenv(MARKER, value)
    return value


@pytest.fixture
def watched() -> Iterator[type[Watched]]:
    yield Watched
    Watched.answers, Watched.kill_at, Watched.killed = 0, frozenset(), []


def config(tmp_path: Path, model: Path, env: str, kwargs: dict[str, Any], **sections: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "steps": STEPS,
        "out": tmp_path / "run",
        "model": {"path": str(model), "max_context": 512},
        "env": {"id": env, "kwargs": kwargs},
        "engine": {"precision": "fp32", "max_batch": 16, "kv_tokens": 8192},
        "rollout": {"groups": 4, "group_size": 4, "concurrency": 16, "max_turn_tokens": 24},
        "learner": {"precision": "fp32", "lr": 1e-3},
        "eval": {"n": 4},
        "track": {"tensorboard": False},
    }
    return TrainConfig.model_validate(base | sections)


def algebra(tmp_path: Path, count: int = 40) -> Path:
    written = subprocess.run(
        [sys.executable, ROOT / "examples" / "algebra_jsonl.py", str(count)], capture_output=True, check=True
    )
    path = tmp_path / "algebra.jsonl"
    path.write_bytes(written.stdout)
    return path


def test_a_verifier_killed_in_the_middle_costs_no_episode(tmp_path: Path, model: Path, watched: type[Watched]) -> None:
    """Generated algebra, learned by heart in the warm start. Measured: rewards of 0.06 to 0.4 in four steps."""
    watched.kill_at = frozenset({45, 60, 75})  # behind the 32 demonstrations and the 4 answers of the first evaluation
    c = config(
        tmp_path, model, "tests.trainer.verified_envs:Watched", {"path": str(algebra(tmp_path))},
        warm_start={"demonstrations": 32, "epochs": 60, "lr": 3e-3},
    )  # fmt: skip
    before = shared_pool().replaced
    asyncio.run(asyncio.wait_for(train(c, console=False), 300))
    metrics = read_metrics(c.out, kind="train")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert sum(row["reward"] for row in metrics) > 0
    assert all(row["failed_attempts"] == 0 for row in metrics)
    assert watched.killed
    assert shared_pool().replaced > before
    kinds = [json.loads(line)["kind"] for line in (c.out / "events.jsonl").read_text().splitlines()]
    assert not {"episode_failed", "group_discarded", "task_left_out"} & set(kinds)
    records = list(read_records(c.out, kind="train"))
    assert len(records) == STEPS * 16
    for record in records:  # each reward is what the verifier says
        turn = record.trajectory.turns[-1]
        assert turn.reward == turn.components["math(boxed)"] in (0.0, 1.0)
    assert len({r.trajectory.turns[-1].reward for r in records}) == 2


def test_gsm8k_trains_from_its_files(tmp_path: Path, model: Path, shared_data: Path, watched: type[Watched]) -> None:
    """The questions that fit the tiny model's context."""
    gsm8k = shared_data / "gsm8k"
    kwargs = {"path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
    for split in ("train", "test"):
        lines = (gsm8k / f"{split}.jsonl").read_text().splitlines()
        short = [line for line in lines if len(json.loads(line)["question"]) < 150]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(short))
    c = config(
        tmp_path, model, "tests.trainer.verified_envs:Watched", kwargs, steps=2, eval={"n": 1},
        warm_start={"demonstrations": 16, "epochs": 20, "lr": 3e-3},
    )  # fmt: skip
    asyncio.run(asyncio.wait_for(train(c, console=False), 300))
    assert [row["step"] for row in read_metrics(c.out, kind="train")] == [1, 2]
    assert watched.answers > 16 + 2 * 16 // 2  # the demonstrations, and more than half of the episodes, were verified
    kinds = [json.loads(line)["kind"] for line in (c.out / "events.jsonl").read_text().splitlines()]
    assert not {"episode_failed", "task_left_out"} & set(kinds)


def test_programs_are_judged_in_the_loop(tmp_path: Path, model: Path) -> None:
    """One of the three tests cannot be passed, so a right program earns 2/3, and a tenth because it compiles."""
    require("bwrap")
    c = config(
        tmp_path, model, "tests.trainer.verified_envs:Programs", {}, steps=2, eval={"n": 2},
        warm_start={"demonstrations": 8, "epochs": 60, "lr": 3e-3},
    )  # fmt: skip
    asyncio.run(asyncio.wait_for(train(c, console=False), 300))
    metrics = read_metrics(c.out, kind="train")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["failed_attempts"] == 0 for row in metrics)
    turns = [record.trajectory.turns[-1] for record in read_records(c.out, kind="train")]
    assert {round(turn.reward, 3) for turn in turns} <= {0.0, 0.1, 0.767}
    assert any(turn.components["correct.passed"] == pytest.approx(2 / 3) for turn in turns)
    assert all(turn.components["compiles"] == turn.components["correct.compiles"] for turn in turns)


def command(tmp_path: Path, model: Path, steps: int) -> list[str]:
    small = (
        "--model.max_context", "256", "--rollout.groups", "2", "--rollout.group_size", "2",
        "--rollout.concurrency", "4", "--rollout.max_turn_tokens", "24", "--engine.max_batch", "4",
        "--engine.precision", "fp32", "--learner.precision", "fp32", "--eval.n", "2",
        "--warm_start.demonstrations", "4",
    )  # fmt: skip
    settings = ("--out", str(tmp_path / "run"), "--model.path", str(model), "--steps", str(steps))
    env = ("--env.id", "tests.trainer.verified_envs:Watched", "--env.kwargs.path", str(algebra(tmp_path)))
    return [sys.executable, "-m", "areal_agents", "train", *settings, *env, *small]


def test_the_verifier_ends_with_the_run(tmp_path: Path, model: Path, mark: str) -> None:
    done = subprocess.run(
        command(tmp_path, model, 1), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert wait_gone(marked(mark), 60) == []


def test_the_verifier_ends_with_a_killed_trainer(tmp_path: Path, model: Path, mark: str) -> None:
    with subprocess.Popen(
        command(tmp_path, model, 10_000), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as trainer:
        events = tmp_path / "run" / "metrics.jsonl"
        asyncio.run(until(lambda: events.exists() and '"kind": "train"' in events.read_text(), 300))
        workers = verifiers(trainer.pid)
        assert workers
        os.kill(trainer.pid, signal.SIGKILL)
    assert wait_gone(workers, 60) == []
    assert wait_gone(marked(mark), 60) == []
