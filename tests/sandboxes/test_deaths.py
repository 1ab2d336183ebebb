"""Sandboxes that die under many episodes at once: none is scored wrongly, and none is lost."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import areal_agents
from areal_agents import evaluate, sandboxes
from areal_agents.evaluation.players import Server
from areal_agents.sandbox import ExecResult, ProbeReport, Sandbox, SandboxSpec
from areal_agents.settings.config import EnvConfig
from areal_agents.tracking.trajectories import read_records
from tests.chat_server import Json, Step, call, chat_server, completion
from tests.conftest import require

N = 200


class Mortal:
    """bubblewrap, of which every twentieth program meets a sandbox that is being killed."""

    name: ClassVar[str] = "mortal"
    codes: ClassVar[set[bytes]] = set()
    deaths: ClassVar[int] = 0

    def __init__(self) -> None:
        self._inner = sandboxes.get("bubblewrap")

    async def probe(self) -> ProbeReport:
        return await self._inner.probe()

    async def aclose(self) -> None:
        await self._inner.aclose()

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        return self._session(spec)

    @asynccontextmanager
    async def _session(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        async with self._inner.session(spec) as sandbox:
            yield _Mortal(sandbox)


class _Mortal:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def exec(self, *args: Any, **options: Any) -> ExecResult:
        program = options.get("stdin", b"")  # none: a look whether the sandbox lives
        first = bool(program) and program not in Mortal.codes
        Mortal.codes |= {program} if first else set()
        if first and len(Mortal.codes) % 20 == 0:  # a call whose sandbox dies twice would be the model's error
            await self._inner.exec(["/bin/true"], timeout=60)  # it is open after its first call
            Mortal.deaths += 1
            os.kill(self._inner._holder._process.pid, signal.SIGKILL)
        done: ExecResult = await self._inner.exec(*args, **options)
        return done


def test_two_hundred_episodes_at_once_with_five_percent_of_deaths(tmp_path: Path) -> None:
    require("bwrap")
    tasks = areal_agents.spec("areal/Arithmetic-v0").tasks("test")
    expressions = {str(task.payload["question"]): str(task.payload["expression"]) for task in tasks}
    wrong = {str(task.payload["question"]) for i, task in enumerate(tasks) if i % 3 == 0}

    def model(body: Json) -> Step:
        messages = body["messages"]
        if messages[-1]["role"] == "tool":
            return completion(rf"\boxed{{{messages[-1]['content'].strip()}}}", tokens=8)
        question = messages[-1]["content"]
        code = f"print({expressions[question]}{'+1' if question in wrong else ''})"
        arguments = json.dumps({"code": code})
        return completion(None, finish="tool_calls", tool_calls=[call("python", arguments)], tokens=8)

    Mortal.codes, Mortal.deaths = set(), 0
    with chat_server(model) as server:
        report = asyncio.run(
            evaluate(
                EnvConfig(id="areal/Arithmetic-v0", sandbox=f"{__name__}:Mortal"),
                model="openai:m", n=N, task_seed=None, out=tmp_path / "run", server=Server(server.url, concurrency=N),
            )
        )  # fmt: skip
    assert Mortal.deaths == N // 20
    rewards = {record.trajectory.task.id: record.trajectory.reward for record in read_records(tmp_path / "run")}
    assert rewards == {task.id: float(str(task.payload["question"]) not in wrong) for task in tasks[:N]}
    assert (report.n, report.sandbox_replays) == (N, Mortal.deaths)
    assert report.infra_rate == 0.0
