"""Whole runs on Ray: nothing but the backend differs, and a run survives the loss of each of its parts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.engines.local import supervision
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.backend import receivers
from tests.cluster.conftest import RaySession, assert_parts, command_line, ray_folders
from tests.conftest import require
from tests.processes import MARKER, marked, wait_gone
from tests.trainer.test_resume import ROOT, check_lineage, config, train_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SECONDS = 400.0
"""Deadline of what a driver is waited for: only one that hangs meets it."""
KINDS = ("LearnerActor", "PoolActor", "EngineActor", "RolloutWorker")
CLUSTER = {"backend": "ray", "object_store_gib": 0.1}


def on_ray(folder: Path, steps: int, *, each: int = 2, **cluster: Any) -> TrainConfig:
    """A tiny run with ``each`` engines and rollout workers; a silent process is noticed within seconds."""
    engine = {"precision": "fp32", "max_batch": 8, "replicas": each, "hang_timeout": 15.0}
    return config(folder, steps, engine=engine, cluster=CLUSTER | {"rollout_workers": each} | cluster)


def test_what_is_reserved_and_supervised_follows_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from areal_agents.cluster.backend import _declared, _episodes, _reserved

    c = on_ray(tmp_path / "run", 1, engine_cpus=100.25, worker_cpus=0.25)
    assert _declared(c) == {}
    named = {"engine_resources": {"disk": 0.5}, "worker_resources": {"disk": 1.0, "docker": 2.0}}
    assert _declared(c.model_copy(update={"cluster": c.cluster.model_copy(update=named)})) == {
        "disk": 3.0, "docker": 4.0,  # two engines, two workers
    }  # fmt: skip
    assert _reserved(c) == 202.0  # 2 × 100.25 + 1 + 2 × 0.25: Ray takes whole CPUs
    assert _episodes(c) == max(c.rollout.concurrency, 16)
    assert receivers(c, 1) == 1  # one of two is left
    for kind, seconds in (("vllm", 900), ("transformers", 300)):
        numbers = supervision(c.engine.model_copy(update={"kind": kind}))
        assert (numbers["start_seconds"], numbers["update_seconds"]) == (seconds, seconds + 300)


class Driver:
    """``areal-agents train CONFIG --resume`` in a process of its own; its output goes to a file."""

    def __init__(
        self, path: Path, mark: str, *, prefix: Sequence[str] = (), environment: Mapping[str, str] = os.environ
    ) -> None:
        """prefix: a command that runs its arguments, on another host for example."""
        self.log, self.mark = path.with_suffix(".log"), mark
        environment = {**environment, MARKER: mark, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "areal_agents", "train", str(path), "--resume"],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
        """Until ``condition()``; fails when the driver ends or ``seconds`` pass first."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the driver ended before: {what}\n{self.text()}"
            assert time.monotonic() < end, f"never came: {what}\n{self.text()}"
            time.sleep(0.02)

    def ends(self, seconds: float = SECONDS) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the driver does not end\n{self.text()}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def stopped(driver: Driver, c: TrainConfig) -> int:
    """End the run by one signal; returns its steps, which are saved, each once."""
    os.kill(driver.process.pid, signal.SIGINT)
    assert driver.ends() == 130, driver.text()
    done: int = json.loads((c.out / "commit.json").read_text())["step"]
    assert [r["step"] for r in read_metrics(c.out, kind="train")] == list(range(1, done + 1))
    return done


@pytest.fixture
def mark() -> Iterator[str]:
    """Everything a test starts carries it; nothing may be left."""
    require("module:ray")
    value = f"ray-train-{uuid.uuid4().hex}"
    yield value
    left = remaining(value)
    for pid in marked(value):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left


def remaining(mark: str) -> list[bytes]:
    """Command lines of what does not end."""
    return [command_line(pid)[:200] for pid in wait_gone(marked(mark), 60)]


def actors(mark: str, kind: str) -> list[int]:
    """Processes of live actors of a class."""
    return [pid for pid in marked(mark) if command_line(pid).startswith(f"ray::{kind}".encode())]


def events(c: TrainConfig) -> list[dict[str, Any]]:
    try:
        text = (c.out / "events.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def count(c: TrainConfig, kind: str) -> int:
    return sum(e["kind"] == kind for e in events(c))


def test_a_run_outlives_every_part_of_it(tmp_path: Path, mark: str) -> None:
    c = on_ray(tmp_path, steps=500)  # more than it will take: a restart may last dozens of steps
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    driver = Driver(path, mark)

    def steps(n: int) -> None:
        base = train_rows(c.out)
        driver.wait_for(lambda: train_rows(c.out) >= base + n, f"{n} more steps")

    def strike(kind: str, number: signal.Signals, seen: str) -> None:
        before = count(c, seen)
        os.kill(actors(mark, kind)[0], number)
        driver.wait_for(lambda: count(c, seen) > before, f"{seen} after {number.name} of a {kind}")

    driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps")
    strike("EngineActor", signal.SIGKILL, "engine_restarted")
    steps(2)
    strike("RolloutWorker", signal.SIGKILL, "worker_restarted")
    steps(2)
    strike("EngineActor", signal.SIGSTOP, "engine_restarted")
    steps(2)
    strike("RolloutWorker", signal.SIGSTOP, "worker_restarted")
    steps(2)
    strike("LearnerActor", signal.SIGKILL, "learner_replaced")
    steps(2)
    os.kill(actors(mark, "PoolActor")[0], signal.SIGKILL)  # it ends the run, which says how to go on
    assert driver.ends() == 1, driver.text()
    assert f"go on with: areal-agents train {c.out / 'config.toml'} --resume" in driver.text()
    assert not remaining(mark)
    path.write_text(settings.dump(on_ray(tmp_path, steps=500, each=1)))  # what was to be lost, was
    driver = Driver(path, mark)
    driver.wait_for(lambda: count(c, "resumed") == 2, "the run again")
    steps(2)
    assert_parts(mark)
    assert ray_folders(driver.process.pid)
    os.kill(driver.process.pid, signal.SIGKILL)
    driver.ends()
    assert not remaining(mark)
    assert not ray_folders(driver.process.pid)

    done: int = json.loads((c.out / "commit.json").read_text())["step"]
    c = on_ray(tmp_path, steps=500, each=1).model_copy(update={"steps": done + 5})
    path.write_text(settings.dump(c))
    driver = Driver(path, mark)
    assert driver.ends() == 0, driver.text()
    check_lineage(c, all_tasks=False)
    told = Counter(e["kind"] for e in events(c))
    assert min(told["engine_lost"], told["engine_restarted"], told["worker_lost"], told["worker_restarted"]) >= 2
    assert told["learner_lost"] >= told["learner_replaced"] >= 1
    assert told["resumed"] == 3  # after the learner, the pool and the driver
    reasons = [e["reason"] for e in events(c) if e["kind"] in ("engine_lost", "worker_lost", "learner_replaced")]
    assert all(reasons)


def test_without_failures_nothing_is_reported_and_one_signal_saves(
    session: RaySession, tmp_path: Path, mark: str
) -> None:
    """On a Ray that was there before, which keeps nothing of the run."""
    c = on_ray(tmp_path, steps=20, address=session.cluster.address)
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    driver = Driver(path, mark)
    driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps")
    os.kill(driver.process.pid, signal.SIGINT)
    assert driver.ends() == 130, driver.text()
    assert not remaining(mark)
    assert not wait_gone([pid for kind in KINDS for pid in session.processes(f"ray::{kind}")], 60)
    assert json.loads((c.out / "commit.json").read_text())["step"] >= 2

    driver = Driver(path, mark)
    assert driver.ends() == 0, driver.text()
    assert not wait_gone([pid for kind in KINDS for pid in session.processes(f"ray::{kind}")], 60)
    check_lineage(c)
    usual = {
        "cluster_joined", "replica_added", "checkpoint", "resumed", "rollouts_restored", "cut_back", "starting",
        "correctness_unknown", "held_out",
    }  # fmt: skip
    assert {e["kind"] for e in events(c)} <= usual
    assert all(r["update_seconds"] < 60 for r in read_metrics(c.out, kind="train"))
