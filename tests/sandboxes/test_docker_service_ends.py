"""Services that end while their session lives: whose failure it is, what is told, and that the episode goes on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from areal_agents import Task
from areal_agents.chat.toolcalls import parse_text
from areal_agents.errors import SandboxError
from areal_agents.reward import boxed_number
from areal_agents.sandbox import SandboxSpec, open_console
from areal_agents.sandboxes import container_init as wire
from areal_agents.sandboxes.docker_backend import DockerBackend
from areal_agents.sandboxes.docker_stream import Stream
from areal_agents.sandboxes.subject import run
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.bash import bash
from tests.sandboxes.engines import containers, networks, play
from tests.sandboxes.test_docker_services import web

MEETS = """
import socket, sys, time, urllib.request
words = b"import os, sys, threading; print('last words', file=sys.__stdout__, flush=True)"
urllib.request.urlopen("http://web:8000", data=words + b"; threading.Timer(0.3, os._exit, [3]).start()", timeout=600)
while True:  # until it is gone, which is seen here before the host hears of it
    try:
        socket.create_connection(("web", 8000), 5).close()
    except OSError:
        sys.exit(1)
    time.sleep(0.01)
"""
"""Has the service end itself a little later, and ends as soon as it is gone."""
WHEN = r"its service 'web' ended at \d\d:\d\d:\d\d UTC with exit code 3 \(it printed: about to serve\nlast words\)"


async def _gone(sandbox: Any) -> None:
    """Have the service end between two calls."""
    await sandbox.spawn(["python3", "-c", MEETS])
    while sandbox._holder.alive:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.docker
def test_a_service_that_dies_on_a_timer_is_no_calls_failure(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        spec = SandboxSpec(services=(web(),))
        async with backend.session(spec) as sandbox:  # which ends by itself with exit code 1
            with pytest.raises(SandboxError, match=f"ended during the call, because {WHEN}"):
                await run(sandbox, MEETS, timeout=600)
        async with backend.session(spec) as sandbox:  # between calls
            await _gone(sandbox)
            for call in (run(sandbox, "print(1)"), sandbox.write_file("a", b""), sandbox.spawn(["true"])):
                with pytest.raises(SandboxError, match=rf"has ended \d+\.\d s before this call, because {WHEN}"):
                    await call
        async with backend.session(spec) as sandbox:  # after the last call: what was done has been done
            await _gone(sandbox)
        async with backend.session(spec) as sandbox:
            console = await open_console(sandbox, "python")
            with pytest.raises(SandboxError, match=WHEN):
                await console.call(MEETS, timeout=600)
            await console.close()

    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])


@pytest.mark.docker
def test_a_service_whose_end_is_heard_of_late_is_asked_for(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of the service says that it has ended only when it is asked, as where an engine is slow."""
    streams: list[Stream] = []
    frames = Stream.frames

    async def late(self: Stream, take: Any) -> None:
        streams.append(self)
        held: list[tuple[int, int, bytes]] = []

        def some(kind: int, ident: int, payload: bytes) -> None:
            if kind == wire.EXIT and self is streams[0]:
                held.append((kind, ident, payload))
                return
            while kind == wire.ALIVE and held:
                take(*held.pop(0))
            take(kind, ident, payload)

        await frames(self, some)

    async def calls(backend: DockerBackend) -> None:
        await backend.probe()
        monkeypatch.setattr(Stream, "frames", late)
        async with backend.session(SandboxSpec(services=(web(),))) as sandbox:
            assert (await run(sandbox, "print(1)")).status == "ok"
            with pytest.raises(SandboxError, match=f"ended during the call, because {WHEN}"):
                await run(sandbox, MEETS, timeout=600)
        assert len(streams) == 2

    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])


class Asks(ToolEnv):
    tools = (bash,)
    rubric = boxed_number()
    sandbox_spec = SandboxSpec(services=(web(),))

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> list[Task]:
        return [Task.make("1", split=split, seed=0, payload={"answer": "1"})]

    def prompt(self, task: Task) -> str:
        return "?"


@pytest.mark.docker
def test_an_episode_goes_on_where_a_service_died(engine: Any) -> None:
    async def say(env: Asks, command: str) -> str:
        arguments = json.dumps({"name": "bash", "arguments": {"command": command}})
        observation, *_ = await env.astep(parse_text(f"<tool_call>{arguments}</tool_call>"))
        return str(observation[-1])

    async def calls(backend: DockerBackend) -> None:
        env = Asks(sandbox=backend)
        try:
            await env.areset(options={"task": Asks.tasks("train")[0]})
            assert "first" in await say(env, "echo first > f; cat f")
            next(made for made in containers(engine) if made.attrs["Config"]["Hostname"] == "web").kill()
            connect = 'import socket; socket.create_connection(("web", 8000))'
            told = await say(env, f"cat f; python3 -c '{connect}'; echo $?")
            assert "first" in told
            assert "refused" not in told
            assert env._dispatcher.replays == 1
        finally:
            await env.aclose()

    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])
