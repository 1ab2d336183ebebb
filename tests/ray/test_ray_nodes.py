"""A run on a cluster of two hosts that share nothing but the disk, joined with ``cluster.address = "auto"``."""

from __future__ import annotations

import json
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.config import TrainConfig
from tests.ray.hosts import two_hosts
from tests.ray.test_ray_train import Driver, actors, count, events
from tests.test_resume import check_lineage, config, train_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def on_two_hosts(
    folder: Path, steps: int, *, transport: str = "auto", address: str = "auto", **cluster: Any
) -> TrainConfig:
    """Two engines, two rollout workers and the learner, each of which reserves one CPU."""
    engine = {"precision": "fp32", "max_batch": 8, "replicas": 2, "hang_timeout": 15.0, "transport": transport}
    return config(
        folder, steps, engine=engine, cluster={"backend": "ray", "address": address, "rollout_workers": 2} | cluster
    )


def finish(c: TrainConfig, path: Path) -> TrainConfig:
    """Two more steps than are committed."""
    done: int = json.loads((c.out / "commit.json").read_text())["step"]
    c = c.model_copy(update={"steps": done + 2})
    path.write_text(settings.dump(c))
    return c


@pytest.mark.parametrize(("transport", "workers"), [("auto", 0), ("gloo", 1)])
def test_engines_and_environments_on_another_host_than_the_learner(
    tmp_path: Path, transport: str, workers: int
) -> None:
    mark = f"hosts-{uuid.uuid4().hex}"
    where: dict[str, Any] = {"engine_resources": {"host1": 1.0}, "worker_resources": {f"host{workers}": 1.0}}
    c = on_two_hosts(tmp_path, 500, transport=transport, **where)
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    with two_hosts(mark, cpus=(3 - 2 * workers, 2 + 2 * workers)) as hosts:  # one CPU is left, for the learner
        driver = Driver(path, mark, prefix=hosts.prefixes[0], environment=hosts.environment)
        driver.wait_for(lambda: train_rows(c.out) >= 3, "three steps", 180)
        kinds = ("LearnerActor", "PoolActor", "EngineActor", "RolloutWorker")
        found = {kind: [hosts.network(pid) for pid in actors(mark, kind)] for kind in kinds}
        assert found == dict(zip(kinds, ([0], [0], [1, 1], [workers] * 2), strict=True))  # the pool: with the driver
        os.kill(driver.process.pid, signal.SIGINT)
        assert driver.ends() == 130, driver.text()
        assert (c.out / "weights").is_dir() == (transport == "auto")  # files: the hosts share the disk alone

        c = finish(c, path)
        driver = Driver(path, mark, prefix=hosts.prefixes[0], environment=hosts.environment)
        assert driver.ends() == 0, driver.text()
        check_lineage(c, all_tasks=False)
        joined = [e for e in events(c) if e["kind"] == "cluster_joined"]
        assert [(e["address"], e["private"]) for e in joined] == [(hosts.address, False)] * 2
        assert "worker died" not in driver.log.read_text()  # nothing that looks like a crash


def test_a_run_outlives_the_loss_of_a_whole_host(tmp_path: Path) -> None:
    mark = f"hosts-{uuid.uuid4().hex}"
    path = tmp_path / "config.toml"
    with two_hosts(mark, cpus=(5, 1)) as hosts:  # the first one has room for everything
        c = on_two_hosts(tmp_path, 500, address=hosts.address)
        path.write_text(settings.dump(c))
        driver = Driver(path, mark, prefix=hosts.prefixes[0], environment=hosts.environment)
        driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps", 180)
        far = [kind for kind in ("EngineActor", "RolloutWorker", "LearnerActor") for pid in actors(mark, kind)
               if hosts.network(pid) == 1]  # fmt: skip
        assert far
        told = {
            "EngineActor": "engine_restarted",
            "RolloutWorker": "worker_restarted",
            "LearnerActor": "learner_replaced",
        }
        hosts.kill(1)
        driver.wait_for(lambda: all(count(c, told[kind]) for kind in far), f"{far} again", 120)
        base = train_rows(c.out)
        driver.wait_for(lambda: train_rows(c.out) >= base + 2, "two more steps")
        os.kill(driver.process.pid, signal.SIGINT)
        assert driver.ends() == 130, driver.text()
        c = finish(c, path)
        driver = Driver(path, mark, prefix=hosts.prefixes[0], environment=hosts.environment)
        assert driver.ends() == 0, driver.text()
        assert c.steps >= base + 2
        check_lineage(c, all_tasks=False)
