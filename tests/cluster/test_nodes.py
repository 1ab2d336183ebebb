"""Runs on a cluster of two hosts that share nothing but the disk, joined with ``cluster.address = "auto"``."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.settings.config import TrainConfig
from tests.cluster.hosts import Hosts, two_hosts
from tests.cluster.test_train import KINDS, Driver, actors, count, events, stopped
from tests.processes import wait_gone
from tests.trainer.test_resume import config, train_rows

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """The first has 2 CPUs, the second 1."""
    with two_hosts(f"hosts-{uuid.uuid4().hex}", cpus=(2, 1)) as it:
        yield it


def on_two_hosts(folder: Path, *, each: int, transport: str = "auto", **cluster: Any) -> TrainConfig:
    """A run without end: ``each`` engines and rollout workers, and the learner."""
    engine = {"precision": "fp32", "max_batch": 8, "replicas": each, "hang_timeout": 15.0, "transport": transport}
    cluster = {"backend": "ray", "address": "auto", "rollout_workers": each} | cluster
    return config(folder, 500, engine=engine, cluster=cluster, eval={"n": 1, "baseline": False})


def driver_of(hosts: Hosts, c: TrainConfig, folder: Path) -> Driver:
    path = folder / "config.toml"
    path.write_text(settings.dump(c))
    assert not wait_gone([pid for kind in KINDS for pid in actors(hosts.mark, kind)], 60)  # of the run before
    return Driver(path, hosts.mark, prefix=hosts.prefixes[0], environment=hosts.environment)


@pytest.mark.parametrize(("transport", "workers"), [("auto", 0), ("gloo", 1)])
def test_engines_and_environments_on_another_host_than_the_learner(
    hosts: Hosts, tmp_path: Path, transport: str, workers: int
) -> None:
    where: dict[str, Any] = {"engine_resources": {"host1": 1.0}, "worker_resources": {f"host{workers}": 1.0}}
    cpus: dict[str, Any] = dict.fromkeys(("engine_cpus", "worker_cpus"), 1 / (1 + workers))  # none is left there
    c = on_two_hosts(tmp_path, each=1, transport=transport, **where, **cpus)
    driver = driver_of(hosts, c, tmp_path)
    driver.wait_for(lambda: train_rows(c.out) >= 4, "four steps")
    found = {kind: [hosts.network(pid) for pid in actors(hosts.mark, kind)] for kind in KINDS}
    assert found == dict(zip(KINDS, ([0], [0], [1], [workers]), strict=True))  # the pool: with the driver
    assert (c.out / "weights").is_dir() == (transport == "auto")  # files: the hosts share the disk alone
    assert stopped(driver, c) >= 4
    (joined,) = [e for e in events(c) if e["kind"] == "cluster_joined"]
    assert (joined["address"], joined["private"]) == (hosts.address, False)
    assert "worker died" not in driver.log.read_text()  # nothing that looks like a crash


def test_a_run_outlives_the_loss_of_a_whole_host(hosts: Hosts, tmp_path: Path) -> None:
    """The last that uses the hosts."""
    cpus: dict[str, Any] = dict.fromkeys(
        ("engine_cpus", "worker_cpus", "learner_cpus"), 0.4
    )  # the first host has room for all five
    c = on_two_hosts(tmp_path, each=2, address=hosts.address, **cpus)
    driver = driver_of(hosts, c, tmp_path)
    driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps")
    told = {
        "EngineActor": "engine_restarted",
        "RolloutWorker": "worker_restarted",
        "LearnerActor": "learner_replaced",
    }
    far = [kind for kind in told for pid in actors(hosts.mark, kind) if hosts.network(pid) == 1]
    assert far
    hosts.kill(1)
    driver.wait_for(lambda: all(count(c, told[kind]) for kind in far), f"{far} again")
    base = train_rows(c.out)
    driver.wait_for(lambda: train_rows(c.out) >= base + 2, "two more steps")
    assert stopped(driver, c) >= base + 2
