"""Calls that act on the episode, and a sandbox that is lost under them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_agents.errors import SandboxError
from areal_agents.sandbox import Sandbox, SandboxSpec
from areal_agents.tool import ToolResult, tool
from areal_agents.tool_dispatch import Dispatcher
from areal_agents.types import ToolCall
from tests.fake_sandbox import ScriptedBackend


class Forge:
    def __init__(self) -> None:
        self.state: list[str] = []

    @tool()
    async def forge(self, code: str, *, sandbox: Sandbox) -> str:
        self.state.append(f"begin {code}")
        first = await sandbox.exec((), stdin=f"{code}1".encode(), timeout=5)
        second = await sandbox.exec((), stdin=f"{code}2".encode(), timeout=5)
        self.state.append(f"end {code}")
        return (first.stdout + second.stdout).decode()


@tool()
async def run(code: str, *, sandbox: Sandbox) -> str:
    return (await sandbox.exec((), stdin=code.encode(), timeout=5)).stdout.decode()


def forged(failing: set[tuple[int, str]], *calls: tuple[str, str]) -> tuple[Forge, list[ToolResult], list[Any], int]:
    backend = ScriptedBackend(lambda session, code: None if (session, code) in failing else f"{code}@{session} ")
    forge = Forge()

    async def main() -> tuple[list[ToolResult], int]:
        d = Dispatcher((Forge.forge, run), sandbox=backend, sandbox_spec=SandboxSpec(), env=forge)
        try:
            done = await d.run([ToolCall("c", name, {"code": code}, "") for name, code in calls])
            return done, d.replays
        finally:
            await d.aclose()

    done, replays = asyncio.run(main())
    return forge, done, backend.ran, replays


def test_a_lost_sandbox_does_not_act_twice() -> None:
    forge, done, ran, replays = forged({(1, "b2")}, ("forge", "a"), ("run", "r"), ("forge", "b"), ("run", "s"))
    assert forge.state == ["begin a", "end a", "begin b", "end b"]
    assert [r.text for r in done] == ["a1@1 a2@1 ", "r@1 ", "b1@1 b2@2 ", "s@2 "]
    again = [code for session, code in ran if session == 2]
    assert again == ["/bin/true", "a1", "a2", "r", "b1", "b2", "s"]
    assert replays == 1
    # Lost under a plain call: what was forged is not forged again, and its files are there.
    forge, done, ran, _ = forged({(1, "r")}, ("forge", "a"), ("run", "r"))
    assert forge.state == ["begin a", "end a"]
    assert [code for session, code in ran if session == 2] == ["/bin/true", "a1", "a2", "r"]


def test_a_call_that_breaks_every_sandbox_is_the_models() -> None:
    forge, done, _, replays = forged({(1, "a2"), (2, "a2")}, ("forge", "a"), ("run", "r"))
    assert done[0] == ToolResult("error: this call made the sandbox fail twice; do something else", "sandbox_failed")
    assert (forge.state, done[1].text, replays) == (["begin a"], "r@3 ", 0)


def test_a_sandbox_that_is_gone_is_infrastructure() -> None:
    with pytest.raises(SandboxError) as failed:
        forged({(1, "a2"), (2, "/bin/true")}, ("forge", "a"))
    assert failed.value.tool == "forge"
