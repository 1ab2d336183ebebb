"""``areal-agents resize`` on a run on Ray that trains: engines, rollout workers and episodes come and go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents import settings
from areal_agents.settings.config import TrainConfig
from tests.cluster.test_train import SECONDS, Driver, actors, count, events, mark, stopped
from tests.trainer.test_resume import ROOT, config, train_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
__all__ = ["mark"]


def resize(c: TrainConfig, **sizes: int) -> subprocess.CompletedProcess[str]:
    asked = [part for name, n in sizes.items() for part in (f"--{name.replace('_', '-')}", str(n))]
    return subprocess.run(
        [sys.executable, "-m", "areal_agents", "resize", str(c.out), *asked],
        cwd=ROOT, capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip


def test_a_run_grows_and_shrinks_while_it_trains(tmp_path: Path, mark: str) -> None:
    each = {"engine_cpus": 0.25, "worker_cpus": 0.25, "learner_cpus": 0.25}  # a private Ray has the CPUs to grow
    c = config(
        tmp_path, steps=500, engine={"precision": "fp32", "max_batch": 8},
        cluster={"backend": "ray", "object_store_gib": 0.1} | each,
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    driver = Driver(path, mark)

    def steps(n: int) -> None:
        base = train_rows(c.out)
        driver.wait_for(lambda: train_rows(c.out) >= base + n, f"{n} more steps")

    driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps")
    assert (len(actors(mark, "EngineActor")), len(actors(mark, "RolloutWorker"))) == (1, 1)
    refused = resize(c, concurrency=9)  # a worker was started with 8 places
    assert refused.returncode == 1
    assert "9 episodes at once do not fit on 1 rollout workers of 8 places each: ask for 2 workers" in refused.stderr
    done = resize(c, replicas=2, rollout_workers=2, concurrency=12)
    assert (done.returncode, done.stdout) == (
        0, "engines: 1 before, 2 now\nrollout workers: 1 before, 2 now\nepisodes at once: 8 before, 12 now\n",
    ), done.stderr  # fmt: skip
    assert (len(actors(mark, "EngineActor")), len(actors(mark, "RolloutWorker"))) == (2, 2)
    steps(3)
    # The learner is lost: the run goes on from its last commit at the size that it was given.
    os.kill(actors(mark, "LearnerActor")[0], signal.SIGKILL)
    driver.wait_for(lambda: count(c, "learner_replaced") == 1, "a new learner")
    steps(2)
    assert (len(actors(mark, "EngineActor")), len(actors(mark, "RolloutWorker"))) == (2, 2)
    done = resize(c, replicas=1, rollout_workers=1, concurrency=4)
    assert done.returncode == 0, done.stderr
    driver.wait_for(lambda: len(actors(mark, "RolloutWorker")) == 1, "the removed worker's end")
    assert len(actors(mark, "EngineActor")) == 1
    steps(3)
    assert stopped(driver, c) >= 10

    saved = settings.load(c.out / "config.toml")
    assert (saved.engine.replicas, saved.cluster.rollout_workers, saved.rollout.concurrency) == (1, 1, 4)
    sizes = [(e["replicas"], e["rollout_workers"], e["concurrency"]) for e in events(c) if e["kind"] == "resized"]
    assert sizes == [(2, 2, 12), (1, 1, 4)]
    told = {e["kind"] for e in events(c)}
    assert told >= {"replica_added", "replica_removed", "worker_added", "worker_removed", "request_failed"}
    assert not told & {"episode_failed", "group_discarded"}
