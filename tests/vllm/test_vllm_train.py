"""Whole runs with vLLM: the loop, the learner's weights and the engine together, on this machine and on Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.config import TrainConfig
from areal_agents.track import read_metrics
from areal_agents.train import train
from areal_agents.trajectories import read_records
from tests.conftest import require
from tests.processes import marked, wait_gone
from tests.ray.conftest import command_line
from tests.ray.test_ray_resize import resize
from tests.ray.test_ray_train import Driver, actors, count, events, stopped
from tests.test_resume import check_lineage, config, train_rows
from tests.vllm.test_vllm_serve import served_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


def with_vllm(folder: Path, steps: int, **changes: Any) -> TrainConfig:
    """The tests' tiny run with a model that vLLM can serve; weights are proved in fp32 at every update."""
    served_model(folder / "model")
    engine = {"kind": "vllm", "precision": "fp32", "max_batch": 8, "kv_tokens": 2048, "hang_timeout": 30.0}
    return config(folder, steps, engine=engine, **changes)


def check_tokens(c: TrainConfig, *, after: int = 0) -> None:
    """What vLLM said of its tokens ``after`` a step is what the learner computes for them, by versions that do move."""
    rows = [r for r in read_metrics(c.out, kind="train") if r["step"] > after]
    # A batch whose advantages are all zero is not computed.
    fresh = [r["off_policy/abs_dlogp"] for r in rows if r["age_max"] == 0 and "off_policy/abs_dlogp" in r]
    assert fresh
    assert max(fresh) <= 1e-3
    seen = {
        v for r in read_records(c.out, kind="train") for turn in r.trajectory.turns for v in turn.completion.versions
    }
    assert len(seen) > 1


def test_on_this_machine(tmp_path: Path) -> None:
    c = with_vllm(tmp_path, 4)
    asyncio.run(train(c, console=False))
    check_lineage(c, all_tasks=False)
    check_tokens(c)


def below(mark: str) -> list[int]:
    """The processes of vLLM and of our worker around it."""
    return [p for p in marked(mark) if b"VLLM::" in (line := command_line(p)) or b"engines.vllm_worker" in line]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_on_ray_with_an_engine_that_is_killed_and_another_that_joins(tmp_path: Path) -> None:
    require("module:ray", "module:vllm")
    mark = f"ray-vllm-{uuid.uuid4().hex}"
    each = {"engine_cpus": 0.5, "worker_cpus": 0.5, "learner_cpus": 0.5}  # a private Ray has the CPUs to grow
    cluster = {"backend": "ray", "object_store_gib": 0.1} | each
    c = with_vllm(tmp_path, 500, cluster=cluster, rollout={"max_staleness": 0})  # every batch is compared
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    driver = Driver(path, mark)

    def steps(n: int) -> None:
        base = train_rows(c.out)
        driver.wait_for(lambda: train_rows(c.out) >= base + n, f"{n} more steps", 200)

    try:
        driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps", 200)
        (engine,), ends = actors(mark, "EngineActor"), below(mark)
        assert len(ends) >= 3
        os.kill(engine, signal.SIGKILL)
        assert not wait_gone([engine, *ends], 20)  # with all that computes for it
        driver.wait_for(lambda: count(c, "engine_restarted") == 1, "another engine", 200)
        steps(2)
        # Growth: the second engine samples with the current weights, or its tokens would not be the learner's.
        (first,) = actors(mark, "EngineActor")
        alone = below(mark)
        done = resize(c, seconds=200, replicas=2)
        assert done.returncode == 0, done.stderr
        assert "engines: 1 before, 2 now\n" in done.stdout
        grown = train_rows(c.out)
        (second,) = set(actors(mark, "EngineActor")) - {first}
        joined = set(below(mark)) - set(alone)
        assert len(joined) >= 3
        steps(4)
        shrunk = train_rows(c.out)
        assert resize(c, seconds=200, replicas=1).returncode == 0
        assert not wait_gone([second, *joined], 30)
        assert actors(mark, "EngineActor") == [first]
        steps(2)
        assert stopped(driver, c) >= shrunk + 2
        check_tokens(c)
        check_tokens(c, after=grown)
        added = [e for e in events(c) if e["kind"] == "replica_added"]
        assert [e["replica"] for e in added] == [0, 1]
        assert added[1]["version"] > 0
        assert count(c, "episode_failed") == 0  # what the killed one was sampling was asked of its successor
    finally:
        driver.process.kill()
        assert not wait_gone(marked(mark), 30)
