"""One container seen from the host, whose pid 1 and engine say what a test has them say, and in which order.

With a real engine, whose order nobody chooses: test_docker.py and test_docker_services.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from areal_agents.errors import SandboxError
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import container as module
from areal_agents.sandboxes import container_init as wire
from areal_agents.sandboxes import docker_containers
from areal_agents.sandboxes.console import LiveConsole
from areal_agents.sandboxes.container import Container
from areal_agents.sandboxes.docker_containers import Containers
from areal_agents.sandboxes.session import HeldSession

READY = json.dumps({"mounts": [["/work", "tmpfs", True]], "folders": {"/work": "/work"}, "hard": {}}).encode()


class Pid1:
    """The stream of a container. ``obey`` is told of each frame that the host sends."""

    errors = b""

    def __init__(self) -> None:
        self._said: asyncio.Queue[tuple[int, int, bytes] | None] = asyncio.Queue()
        self.heard: list[tuple[int, int]] = []
        self.obey: Callable[[int, int], None] = lambda kind, ident: None
        self.say(wire.READY, 0, READY)

    def say(self, kind: int, ident: int, payload: bytes = b"") -> None:
        self._said.put_nowait((kind, ident, payload))

    def exit(self, ident: int, code: int = 0, **more: Any) -> None:
        self.say(wire.EXIT, ident, json.dumps({"cause": "exit", "code": code, "oom": False, **more}).encode())

    def send(self, data: bytes) -> None:
        kind, ident, _ = wire.FRAME.unpack_from(data)
        self.heard.append((kind, ident))
        self.obey(kind, ident)

    async def frames(self, take: Callable[[int, int, bytes], None]) -> None:
        while (frame := await self._said.get()) is not None:
            take(*frame)

    def close(self) -> None:
        self._said.put_nowait(None)


class Held:
    """A container with what a test needs to see of it."""

    def __init__(self, oom: Callable[[Held], Awaitable[bool]]) -> None:
        self.pid1 = Pid1()
        self.removed = 0
        self.asked = 0
        self._oom = oom
        self.container = Container(self.pid1, {}, self._remove, self._ask, {}, 1000)  # type: ignore[arg-type]
        self.session = HeldSession.of(self.container, SandboxSpec())

    async def _remove(self) -> None:
        self.removed += 1

    async def _ask(self) -> bool:
        self.asked += 1
        return await self._oom(self)

    def begin(self, kills: int | None, then: Callable[[int], None]) -> None:
        """Have each program begin, after so many were killed for memory, and then do something."""

        def obey(kind: int, ident: int) -> None:
            if kind == wire.START:
                if kills is not None:
                    self.pid1.say(wire.BEGAN, ident, kills.to_bytes(8, "big"))
                then(ident)

        self.pid1.obey = obey


def play(calls: Callable[[Held], Awaitable[None]], oom: Callable[[Held], Awaitable[bool]] | None = None) -> None:
    async def no(held: Held) -> bool:
        return False

    async def whole() -> None:
        held = Held(oom or no)
        await held.container.ready()
        await calls(held)
        await held.container.close()
        assert held.removed == 1

    asyncio.run(whole())


async def marked(held: Held) -> bool:
    """An engine that removes in the meantime what it is told to remove, and knows nothing of it then."""
    for _ in range(20):
        await asyncio.sleep(0)
    return not held.removed


def test_the_engine_is_asked_for_the_reason_before_it_removes_the_container() -> None:
    async def calls(held: Held) -> None:
        held.begin(0, lambda ident: held.pid1.close())
        done = await held.session.exec(["x"], timeout=60)
        assert (done.status, done.exit_code) == ("oom", None)
        assert held.asked == 1
        with pytest.raises(SandboxError, match="Open a new session"):
            await held.session.exec(["x"], timeout=60)

    play(calls, marked)


@pytest.mark.parametrize("kills", [1, 7, None])
def test_what_was_killed_before_the_call_is_not_the_reason_of_its_end(kills: int | None) -> None:
    """The engine's mark stays: an engine that restarts later must not look like memory. None: it never began."""

    async def calls(held: Held) -> None:
        held.begin(kills, lambda ident: held.pid1.close())
        with pytest.raises(SandboxError, match="died during the call"):
            await held.session.exec(["x"], timeout=60)

    play(calls, marked)


def test_each_calls_own_count_is_what_counts() -> None:
    async def calls(held: Held) -> None:
        held.begin(0, held.pid1.exit)
        assert (await held.session.exec(["x"], timeout=60)).status == "ok"
        held.begin(0, lambda ident: held.pid1.exit(ident, -9, oom=True))
        assert (await held.session.exec(["x"], timeout=60)).status == "oom"
        held.begin(1, lambda ident: held.pid1.close())
        with pytest.raises(SandboxError):
            await held.session.exec(["x"], timeout=60)

    play(calls, marked)


def test_a_call_that_pid_1_could_not_start_says_what_pid_1_says() -> None:
    async def calls(held: Held) -> None:
        held.begin(0, lambda ident: held.pid1.exit(ident, cause="lost"))
        with pytest.raises(SandboxError, match="died during the call"):
            await held.session.exec(["x"], timeout=60)
        assert held.asked == 0  # it lives: there is nothing for the engine to say

    play(calls, marked)


def test_what_failed_meanwhile_is_the_reason() -> None:
    async def failing(held: Held) -> bool:
        held.container.fail("its service 'db' ended")
        return True

    async def calls(held: Held) -> None:
        held.begin(0, lambda ident: held.pid1.close())
        with pytest.raises(SandboxError, match="during the call, because its service 'db' ended"):
            await held.session.exec(["x"], timeout=60)
        with pytest.raises(SandboxError, match=r"has ended \d+\.\d s before this call, because its service 'db' ended"):
            await held.session.exec(["x"], timeout=60)

    play(calls, failing)


def test_a_call_that_is_cancelled_while_the_engine_is_asked_removes_the_container() -> None:
    async def calls(held: Held) -> None:
        held.begin(0, lambda ident: held.pid1.close())
        call = asyncio.ensure_future(held.session.exec(["x"], timeout=60))
        while not held.asked:  # noqa: ASYNC110
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert not held.container.alive

    async def never(held: Held) -> bool:
        await asyncio.Event().wait()
        return True

    play(calls, never)


def test_a_session_that_is_closed_under_a_call_asks_nobody() -> None:
    async def calls(held: Held) -> None:
        call = asyncio.ensure_future(held.session.exec(["x"], timeout=60))
        while not held.pid1.heard:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await held.session.close()
        with pytest.raises(SandboxError):
            await call
        assert held.asked == 0

    play(calls, marked)


@pytest.mark.parametrize("code", [0, 1])
def test_a_call_that_ends_after_what_it_needs_is_not_blamed(code: int) -> None:
    """It is over before the host hears of the service's end: the look at its end finds that."""

    async def calls(held: Held) -> None:
        dead = False

        async def witness() -> None:
            await asyncio.sleep(0)
            if dead:
                held.container.fail("its service 'db' ended at 12:00:00 UTC with exit code 3")

        held.container.witness = witness
        held.begin(0, lambda ident: held.pid1.exit(ident, code))
        assert (await held.session.exec(["x"], timeout=60)).exit_code == code
        dead = True
        with pytest.raises(SandboxError, match="during the call, because its service 'db' ended at 12:00:00 UTC with"):
            await held.session.exec(["x"], timeout=60)

    play(calls)


def test_a_console_and_a_live_process_learn_of_it_too() -> None:
    async def calls(held: Held) -> None:
        process = await held.session.spawn(["x"])
        waiting = asyncio.ensure_future(process.recv(1, timeout=60))
        await asyncio.sleep(0)
        held.container.fail("its service 'db' ended")
        with pytest.raises(SandboxError, match="because its service 'db' ended"):
            await waiting
        with pytest.raises(SandboxError, match="because its service 'db' ended"):
            await LiveConsole(held.session, "shell", False).open()

    play(calls)


def test_a_live_process_is_asked_for_in_order_and_has_an_end() -> None:
    async def calls(held: Held) -> None:
        answers = iter([b"\1", b"\0"])
        held.pid1.obey = lambda kind, ident: (
            held.pid1.say(wire.ALIVE, ident, next(answers)) if kind == wire.LOOK else None
        )
        process: Any = await held.session.spawn(["x"])
        assert [*await asyncio.gather(process.runs(), process.runs())] == [True, False]
        held.pid1.obey = lambda kind, ident: held.pid1.exit(ident) if kind == wire.LOOK else None
        assert not await process.runs()
        assert not await process.runs()  # it has ended, and nobody is asked
        assert [kind for kind, _ in held.pid1.heard].count(wire.LOOK) == 3

    play(calls)


def test_pid_1_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_TIMEOUT", 0.01)

    async def calls(held: Held) -> None:
        process: Any = await held.session.spawn(["x"])
        assert not await process.runs()

    play(calls)


def test_a_container_that_is_on_its_way_out_is_not_alive() -> None:
    async def calls(held: Held) -> None:
        assert held.container.alive
        held.container.fail("x")
        assert not held.container.alive  # at once: a pool must not hand it out

    play(calls)


RUNS, STOPPED = {"Running": True}, {"Running": False}
NOT, YES = {"OOMKilled": False}, {"OOMKilled": True}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([STOPPED | YES | {"ExitCode": 137}], True),
        ([RUNS | NOT | {"ExitCode": 0}] * 3 + [STOPPED | YES | {"ExitCode": 137}], True),  # its stream ended first
        ([STOPPED | NOT | {"ExitCode": 137}] * 3 + [STOPPED | YES | {"ExitCode": 137}], True),  # marked last
        ([RUNS | YES | {"ExitCode": 0}] * 3 + [STOPPED | YES | {"ExitCode": 0}], False),  # an older mark
        ([STOPPED | YES | {"ExitCode": 1}], False),
        ([STOPPED | NOT | {"ExitCode": 137}], False),  # killed by somebody
        ([RUNS | YES | {"ExitCode": 0}], False),  # it never ends
        ([RUNS | NOT | {"ExitCode": 0}, SandboxError("no such container")], False),
        ([SandboxError("no engine")], False),
    ],
)
def test_what_an_engine_says_of_a_containers_end(
    states: list[Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is said again and again."""
    for name, value in {"PAUSE": 0.001, "MARKED": 0.05, "ENDS": 0.2}.items():
        monkeypatch.setattr(docker_containers, name, value)
    asked: list[str] = []

    class Engine:
        async def call(self, name: str, ident: str) -> dict[str, Any]:
            asked.append(name)
            state = states[min(len(asked), len(states)) - 1]
            if isinstance(state, Exception):
                raise state
            return {"State": state}

    async def whole() -> bool:
        containers = Containers(Engine(), "own", runtime="", cpus=1.0)  # type: ignore[arg-type]
        return await containers._killed_for_memory("x")

    assert asyncio.run(whole()) is expected
    assert set(asked) == {"inspect_container"}
