"""A run on a cluster of two hosts that share nothing but the disk, joined with ``cluster.address = "auto"``."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.settings.config import TrainConfig
from tests.cluster.hosts import two_hosts
from tests.cluster.test_train import Driver, actors, count, events, stopped
from tests.trainer.test_resume import config, train_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def on_two_hosts(folder: Path, *, each: int, transport: str = "auto", **cluster: Any) -> TrainConfig:
    """A run without end: ``each`` engines and rollout workers, and the learner, of one CPU each."""
    engine = {"precision": "fp32", "max_batch": 8, "replicas": each, "hang_timeout": 15.0, "transport": transport}
    cluster = {"backend": "ray", "address": "auto", "rollout_workers": each} | cluster
    return config(folder, 500, engine=engine, cluster=cluster, eval={"n": 1, "baseline": False})


@pytest.mark.parametrize(("transport", "workers"), [("auto", 0), ("gloo", 1)])
def test_engines_and_environments_on_another_host_than_the_learner(
    tmp_path: Path, transport: str, workers: int
) -> None:
    mark = f"hosts-{uuid.uuid4().hex}"
    where = {"engine_resources": {"host1": 1.0}, "worker_resources": {f"host{workers}": 1.0}}
    c = on_two_hosts(tmp_path, each=1, transport=transport, **where)
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    with two_hosts(mark, cpus=(2 - workers, 1 + workers)) as hosts:  # one CPU is left, for the learner
        driver = Driver(path, mark, prefix=hosts.prefixes[0], environment=hosts.environment)
        driver.wait_for(lambda: train_rows(c.out) >= 4, "four steps", 180)
        kinds = ("LearnerActor", "PoolActor", "EngineActor", "RolloutWorker")
        found = {kind: [hosts.network(pid) for pid in actors(mark, kind)] for kind in kinds}
        assert found == dict(zip(kinds, ([0], [0], [1], [workers]), strict=True))  # the pool: with the driver
        assert (c.out / "weights").is_dir() == (transport == "auto")  # files: the hosts share the disk alone
        assert stopped(driver, c) >= 4
        (joined,) = [e for e in events(c) if e["kind"] == "cluster_joined"]
        assert (joined["address"], joined["private"]) == (hosts.address, False)
        assert "worker died" not in driver.log.read_text()  # nothing that looks like a crash


def test_a_run_outlives_the_loss_of_a_whole_host(tmp_path: Path) -> None:
    mark = f"hosts-{uuid.uuid4().hex}"
    path = tmp_path / "config.toml"
    with two_hosts(mark, cpus=(5, 1)) as hosts:  # the first one has room for everything
        c = on_two_hosts(tmp_path, each=2, address=hosts.address)
        path.write_text(settings.dump(c))
        driver = Driver(path, mark, prefix=hosts.prefixes[0], environment=hosts.environment)
        driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps", 180)
        told = {
            "EngineActor": "engine_restarted",
            "RolloutWorker": "worker_restarted",
            "LearnerActor": "learner_replaced",
        }
        far = [kind for kind in told for pid in actors(mark, kind) if hosts.network(pid) == 1]
        assert far
        hosts.kill(1)
        driver.wait_for(lambda: all(count(c, told[kind]) for kind in far), f"{far} again", 120)
        base = train_rows(c.out)
        driver.wait_for(lambda: train_rows(c.out) >= base + 2, "two more steps")
        assert stopped(driver, c) >= base + 2
