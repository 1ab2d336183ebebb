"""vLLM's engines below Ray: killed, replaced with the current weights, and one more of them, under load."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_agents import settings
from areal_agents.engines.spec import EngineSpec
from tests.conftest import require
from tests.engine_suite import turns_equal_a_forward_pass
from tests.engines.vllm.serving import BLOCK
from tests.processes import marked, wait_gone
from tests.tiny_models import save_tiny, vllm_model

pytest.importorskip("ray")
from tests.cluster.conftest import RaySession
from tests.cluster.remote_pool import Rig, pool_settings
from tests.cluster.test_train import KINDS, Driver, actors, count
from tests.engines.vllm.test_train import check_engine, with_vllm
from tests.trainer.test_resume import train_rows

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture
def rig(session: RaySession, tmp_path: Path) -> Iterator[Rig]:
    require("module:vllm")
    folder = save_tiny(tmp_path / "model", vllm_model())
    options = {"precision": "fp32", "max_batch": 4, "kv_tokens": 3600, "max_context": 1024, "block_size": BLOCK}
    supervised = {"hang_seconds": 120.0, "health_interval": 0.5, "start_seconds": 600.0, "update_seconds": 600.0}
    given = pool_settings(EngineSpec("vllm", str(folder), options), replicas=1, supervised=supervised)
    it = Rig(session, given, vllm_model, block=BLOCK)
    yield it
    it.close()


def test_a_vllm_engine_is_killed_replaced_and_joined_by_another(rig: Rig) -> None:
    async def work() -> None:
        await turns_equal_a_forward_pass(rig.it)
        await rig.update()
        await rig.check(*[rig.ask(i) for i in range(3)])
        await killed_while_it_samples(rig)
        # Growth: the second engine samples with the weights of the last update before it takes a request.
        grown = asyncio.create_task(rig.pool.resize(2))
        while not grown.done():
            await rig.check(*[rig.ask(i) for i in range(2)])
        await grown
        assert [fields["version"] for fields in rig.named("replica_added")] == [0, 1]
        await rig.check(*[rig.ask(i) for i in range(4)])
        lines = [line.split(",")[:2] for line in (await rig.pool.health()).detail.splitlines()]
        assert lines == [[f"replica {i}: serving", " v1"] for i in range(2)]
        await rig.update()
        await rig.check(*[rig.ask(i) for i in range(4)])
        await rig.pool.resize(1)
        assert len(rig.actors()) == 1

    rig.session.run(work())


async def killed_while_it_samples(rig: Rig) -> None:
    """Its turns are sampled again, by an engine that has the updated weights."""
    (dead,) = rig.actors()
    below = rig.session.processes("VLLM::") + rig.session.processes("areal_agents.engines.vllm.worker")
    assert below
    pending = [rig.ask(i, 800) for i in range(4)]
    await rig.it.until(lambda health: health.running == 4)
    for pid in rig.session.processes("VLLM::EngineCore"):
        os.kill(pid, signal.SIGSTOP)  # none of them ends now
    os.kill(dead, signal.SIGKILL)
    await rig.check(*pending)
    assert not wait_gone([dead, *below], 60)
    assert [fields["version"] for fields in rig.named("engine_restarted")] == [1]
    retried = {fields["session"] for fields in rig.named("request_retried")}
    assert retried == {"s0", "s1", "s2", "s3"}


def test_a_run_goes_on_after_the_loss_of_its_engine(session: RaySession, tmp_path: Path) -> None:
    require("module:vllm")
    c = with_vllm(tmp_path, 12, cluster={"backend": "ray", "address": session.cluster.address})
    path = tmp_path / "config.toml"
    path.write_text(settings.dump(c))
    driver = Driver(path, f"ray-vllm-{uuid.uuid4().hex}")
    try:
        driver.wait_for(lambda: train_rows(c.out) >= 2, "two steps")
        os.kill(actors(session.mark, "EngineActor")[0], signal.SIGKILL)
        killed = train_rows(c.out)
        assert driver.ends() == 0, driver.text()
        assert count(c, "engine_restarted") == 1
        check_engine(c, after=killed + 1)  # one batch may have been sampled before
    finally:
        driver.process.kill()
        left = [pid for kind in (*map("ray::{}".format, KINDS), "VLLM::") for pid in session.processes(kind)]
        assert not wait_gone([*marked(driver.mark), *left], 60)
