"""vLLM's engines below Ray: killed, replaced with the current weights, and one more of them, under load."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from areal_agents.engines.spec import EngineSpec
from tests.cluster.conftest import RaySession
from tests.cluster.test_engine_actors import Rig, settings
from tests.conftest import require
from tests.processes import wait_gone
from tests.tiny_models import save_tiny, vllm_model

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(400)]
OPTIONS = {
    "precision": "fp32",
    "max_batch": 4,
    "kv_tokens": 3600,
    "max_context": 1024,
    "block_size": 32,
}


def test_a_vllm_engine_is_killed_replaced_and_joined_by_another(session: RaySession, tmp_path: Path) -> None:
    require("module:vllm")
    folder = save_tiny(tmp_path / "model", vllm_model())
    supervised = {"hang_seconds": 60.0, "health_interval": 0.5, "start_seconds": 200.0, "update_seconds": 200.0}
    given = settings(folder, spec=EngineSpec("vllm", str(folder), OPTIONS), replicas=1, supervised=supervised)
    rig = Rig(session, given, vllm_model)

    async def work() -> None:
        await rig.update()
        await rig.check(*[rig.ask(i) for i in range(3)])
        # Killed while it samples: its turns are sampled again, by an engine that has the updated weights.
        (dead,) = rig.actors()
        below = session.processes("VLLM::") + session.processes("areal_agents.engines.vllm.worker")
        pending = [rig.ask(i, 600, deadline=200) for i in range(3)]  # seconds of sampling, on any machine
        await rig.running(3)
        os.kill(dead, signal.SIGKILL)
        await rig.check(*pending)
        assert below
        assert not wait_gone([dead, *below], 20)
        assert [fields["version"] for fields in rig.named("engine_restarted")] == [1]
        assert len(rig.named("request_retried")) == 3
        # Growth: the second engine samples with the weights of the last update before it takes a request.
        grown = asyncio.create_task(rig.pool.resize(2))
        while not grown.done():
            await rig.check(*[rig.ask(i) for i in range(2)])
        await grown
        assert [fields["version"] for fields in rig.named("replica_added")] == [0, 1]
        await rig.check(*[rig.ask(i) for i in range(4)])
        lines = (await rig.pool.health()).detail.splitlines()
        assert [line.split(",")[:2] for line in lines] == [[f"replica {i}: serving", " v1"] for i in range(2)]
        await rig.update()
        await rig.check(*[rig.ask(i) for i in range(4)])
        await rig.pool.resize(1)
        assert len(rig.actors()) == 1

    try:
        session.run(work(), 380)
    finally:
        rig.close()
