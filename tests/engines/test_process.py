"""The worker process: its parent's end, and models it refuses."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.errors import ConfigError, ModelError
from tests.tiny_models import save_tiny, tiny_model

_PARENT = """
import asyncio, os, sys, time
from areal_agents.engine import Sampling
from areal_agents.engines.cpu.engine import TransformersEngine
from areal_agents.types import Prompt

async def main():
    engine = await TransformersEngine.start(sys.argv[1], precision="fp32", max_batch=2, max_context=512)
    task = asyncio.create_task(
        engine.generate(Prompt((1, 2, 3)), Sampling(500), session="busy", deadline=600)
    )
    while (await engine.health()).running == 0:
        pass
    fork = os.fork() if sys.argv[2] == "forks" else None  # as multiprocessing does: it inherits the worker's pipe
    if fork == 0:
        time.sleep(600)
    print(engine.pid, fork or 0, flush=True)
    await task
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("forks", ["forks", "does not fork"])
def test_the_worker_ends_when_its_parent_is_killed(tmp_path: Path, forks: str) -> None:
    folder = save_tiny(tmp_path, tiny_model())
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(folder), forks],
        stdout=subprocess.PIPE,
        cwd=root,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert parent.stdout is not None
    with parent, contextlib.ExitStack() as stack:
        stack.callback(parent.kill)
        pid, fork = map(int, parent.stdout.readline().split())
        if fork:
            stack.callback(os.kill, fork, signal.SIGKILL)
        worker = os.pidfd_open(pid)
        stack.callback(os.close, worker)
        parent.kill()
        ended, _, _ = select.select([worker], [], [], 120)
        assert ended == [worker]


def test_a_lost_workers_group_gets_no_signal_at_a_late_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another group's by then."""
    sent: list[tuple[int, int]] = []

    async def work() -> None:
        engine = await TransformersEngine.start(save_tiny(tmp_path, tiny_model()), max_batch=1, max_context=64)
        os.kill(engine.pid, signal.SIGKILL)
        while engine.failure is None:
            assert not (await engine.health()).ok
        await asyncio.wait_for(engine._group_ended(), 60)
        monkeypatch.setattr("areal_agents.engines.process.members", lambda group: [group])  # the number's next owner
        monkeypatch.setattr(os, "killpg", lambda *signal: sent.append(signal))
        monkeypatch.setattr(os, "kill", lambda *signal: sent.append(signal))
        await engine.close()
        await engine.kill()
        await engine.close()

    asyncio.run(work())
    assert sent == []


def test_models_that_cannot_be_served(tmp_path: Path) -> None:
    import transformers

    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)

    async def work() -> None:
        with pytest.raises(ModelError, match="not 'gpt2'"):
            await TransformersEngine.start(tmp_path)
        with pytest.raises(ConfigError, match="max_batch must be at least 1"):
            await TransformersEngine.start(tmp_path, max_batch=0)

    asyncio.run(work())
