"""One live container seen from the host: its stream, the requests under way, and the watchdog that ends it.

Nothing that comes out is trusted: what it may print is allowed in steps, and deadlines are kept here too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal

from areal_agents.errors import SandboxError
from areal_agents.sandboxes import container_init as wire
from areal_agents.sandboxes.docker_stream import Stream
from areal_agents.sandboxes.interactive_process import SEND_TIMEOUT
from areal_agents.sandboxes.sandbox_process import Finished

START_TIMEOUT: Final = 60.0
GRACE: Final = 5.0
"""Seconds that pid 1 gets beyond a deadline of its own; then the whole container is killed from outside."""
LOOK_TIMEOUT: Final = 60.0
"""Seconds in which pid 1 says whether a process still runs. What its container runs may keep it waiting."""
WINDOW: Final = 1 << 18
"""Bytes of stdin, and of a live process's output, that may be under way."""


class Call:
    """A request under way: what came of it so far."""

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self.exit: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()
        """How it ended; None where the container was lost."""
        self.stdout, self.stderr = bytearray(), bytearray()
        self.under_way = 0
        self.kills: int | None = None
        """Processes of the container that had been killed for memory when it began; None before that is told."""
        self.looks: deque[asyncio.Future[bool]] = deque()
        """Those who wait to hear whether it still runs, in order."""
        self.changed = asyncio.Event()

    def end(self, told: dict[str, Any] | None) -> None:
        if not self.exit.done():
            self.exit.set_result(told)
        self.changed.set()


class Container:
    """A started container, which runs one request at a time and any number of live processes."""

    def __init__(
        self,
        stream: Stream,
        limits: Mapping[str, int],
        end: Callable[[], Awaitable[None]],
        oom: Callable[[], Awaitable[bool]],
        variables: Mapping[str, str],
        uid: int,
    ) -> None:
        """Take over a container whose pid 1 has been sent.

        Args:
            stream: its frames.
            limits: rlimits of each program.
            end: removes the container, whatever state it is in.
            oom: asks the engine whether pid 1, whose stream has ended, was killed and something killed for memory.
            variables: of the environment of its programs, over those that the session gives.
            uid: whom the container runs as.
        """
        self.uid, self._variables = uid, variables
        self.limits = limits
        self._stream, self._remove, self._oom = stream, end, oom
        self._idents = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._lock = asyncio.Lock()
        self._ready = Call(0)
        self._reading = asyncio.ensure_future(self._read())
        self._removing: asyncio.Task[None] | None = None
        self._reason, self._failed = "", 0.0
        self.mounts: list[tuple[str, str, bool]] = []
        """What is mounted inside, before anybody's code has run: where, which kind, and whether it can be written."""
        self.folders: dict[str, str] = {}
        """What /work, /tmp and /dev/shm are: themselves, unless the image has links there."""
        self.hard: dict[str, int] = {}
        """Hard limits, above which none of ``limits`` can be set."""
        self.witness: Callable[[], Awaitable[None]] | None = None
        """Looks whether all that belongs to the container still runs, and calls ``fail`` where it does not."""

    async def ready(self) -> None:
        """Wait until pid 1 serves. Raises SandboxError."""
        await asyncio.wait((self._ready.exit,), timeout=START_TIMEOUT)
        if not self._ready.exit.done() or self._ready.exit.result() is None:
            said = self._stream.errors.decode("utf-8", "replace").strip()[-600:]
            raise SandboxError(f"a container did not start: {said or 'pid 1 does not answer'}")

    @property
    def alive(self) -> bool:
        return not self._reading.done() and self._removing is None

    async def _read(self) -> None:
        try:
            await self._stream.frames(self._take)
        finally:
            for call in (self._ready, *self._calls.values()):
                call.end(None)

    def _take(self, kind: int, ident: int, payload: bytes) -> None:
        if kind == wire.READY:
            found = json.loads(payload)
            self.mounts = [tuple(mount) for mount in found["mounts"]]
            self.folders, self.hard = found["folders"], found["hard"]
            self._ready.end({})
        elif (call := self._calls.get(ident)) is None:
            return
        elif kind in (wire.OUT, wire.ERR):
            (call.stdout if kind == wire.OUT else call.stderr).extend(payload)
            call.changed.set()
        elif kind == wire.TOOK:
            call.under_way -= int.from_bytes(payload, "big")
            call.changed.set()
        elif kind == wire.BEGAN:
            call.kills = int.from_bytes(payload, "big")
        elif kind == wire.ALIVE and call.looks:
            look = call.looks.popleft()
            if not look.done():
                look.set_result(payload == b"\1")
        elif kind == wire.EXIT:
            call.end(json.loads(payload))

    def _send(self, kind: int, ident: int, data: bytes = b"") -> None:
        self._stream.send(wire.FRAME.pack(kind, ident, len(data)) + data)

    def _begin(self, request: dict[str, Any], *, spawn: bool, timeout: float, credit: int) -> Call:
        if not self.alive:
            ago = f" {time.monotonic() - self._failed:.1f} s before this call" if self._reason else ""
            raise SandboxError(f"the sandbox has ended{ago}{self._reason}; its files are gone. Open a new session.")
        call = Call(next(self._idents))
        self._calls[call.ident] = call
        if "env" in request and "own" not in request:
            request = {**request, "env": {**request["env"], **self._variables}}
        asked = {"request": request, "spawn": spawn, "timeout": timeout, "credit": credit}
        self._send(wire.START, call.ident, json.dumps(asked).encode())
        return call

    async def feed(self, call: Call, data: bytes, *, patience: float | None = None) -> bool:
        """Send stdin as fast as it is taken. Returns False where it is not taken for ``patience`` seconds."""
        view = memoryview(data)
        while view and not call.exit.done():
            call.changed.clear()
            if call.under_way + wire.CHUNK > WINDOW:
                try:
                    async with asyncio.timeout(patience):
                        await call.changed.wait()
                except TimeoutError:
                    return False
                continue
            chunk, view = view[: wire.CHUNK], view[wire.CHUNK :]
            call.under_way += len(chunk)
            self._send(wire.DATA, call.ident, bytes(chunk))
        return True

    async def run(
        self, request: dict[str, Any], *, stdin: bytes | None, timeout: float, max_output: int, seekable: bool = False
    ) -> Finished:
        """Run one request to its end, as ``sandbox_process.Holder.run`` does.

        An archive, which would need a file to seek in, is sent twice: to be checked, and to be unpacked.
        """
        if request["op"] == "unpack":
            found = await self._run({**request, "op": "inspect"}, stdin or b"", timeout, max_output)
            if found.cause != "exit" or found.code != 0:
                return found
            request = {**request, "op": "extract"}
        return await self._run(request, stdin or b"", timeout, max_output)

    async def _run(self, request: dict[str, Any], stdin: bytes, timeout: float, max_output: int) -> Finished:
        async with self._lock:
            start = time.monotonic()
            call = self._begin(request, spawn=False, timeout=timeout, credit=max_output + 1)
            feeding = asyncio.ensure_future(self._feed_all(call, stdin))
            try:
                await asyncio.wait((call.exit,), timeout=timeout + GRACE)
                if not call.exit.done():
                    self.kill()
                    call.exit.set_result({"cause": "timeout", "code": None, "oom": False})
            except asyncio.CancelledError:
                await self._stop(call)
                raise
            finally:
                feeding.cancel()
                self._calls.pop(call.ident, None)
            told = call.exit.result()
            if told is None or told.get("cause") not in ("exit", "timeout", "output_limit"):
                told = {"cause": "lost", "code": None, "oom": await self._lost(call)}
            await self.require_all()
            cause: Literal["exit", "timeout", "output_limit", "lost"] = told["cause"]
            code = told["code"] if cause == "exit" else None
            seconds = time.monotonic() - start
            return Finished(cause, code, bytes(call.stdout), bytes(call.stderr), bool(told["oom"]), seconds)

    async def _lost(self, call: Call) -> bool:
        """Remove a container that ended during a call, and say whether it was killed for its memory.

        The engine is asked first: of what it has removed it says nothing. And it does not say when it was that
        something was killed for memory, so that it is believed only where nothing had been before the call.
        """
        self._stream.close()
        told = call.exit.result() or {}
        try:
            if self._removing is None and not told:
                return call.kills == 0 and await self._oom()
            return bool(told.get("oom"))
        finally:
            self.kill()

    async def require_all(self) -> None:
        """Raise SandboxError where what belongs to the container has ended, by the end of a call that met it."""
        if self.witness is not None and self._removing is None:
            await self.witness()
        if self._reason:
            raise SandboxError(f"the sandbox ended during the call{self._reason}. Open a new session.")

    async def runs(self, call: Call) -> bool:
        """Ask pid 1 whether a live process still runs, which it does not either where there is no answer."""
        if call.exit.done() or not self.alive:
            return False
        look: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        call.looks.append(look)
        self._send(wire.LOOK, call.ident)
        await asyncio.wait((look, call.exit), timeout=LOOK_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        return look.done() and look.result()

    async def _feed_all(self, call: Call, data: bytes) -> None:
        await self.feed(call, data)
        self._send(wire.END, call.ident)

    async def _stop(self, call: Call) -> None:
        """Kill a request, or the container where it does not say that this is done."""
        self._send(wire.KILL, call.ident)
        try:
            await asyncio.wait((call.exit,), timeout=GRACE)
        finally:
            if not call.exit.done():
                self.kill()

    async def spawn(self, request: dict[str, Any], *, stdin: bool = True) -> ContainerProcess:
        """Start a live process, which survives ``run`` and dies with the container.

        Without ``stdin`` it reads the end of its input at once.
        """
        async with self._lock:
            call = self._begin(request, spawn=True, timeout=0.0, credit=WINDOW)
            if not stdin:
                self._send(wire.END, call.ident)
        return ContainerProcess(self, call)

    async def stop(self, call: Call) -> None:
        """End a live process and wait until it is gone."""
        if not call.exit.done():
            await self._stop(call)
        self._calls.pop(call.ident, None)

    def allow(self, call: Call, size: int) -> None:
        """Let a live process print ``size`` bytes more."""
        self._send(wire.MORE, call.ident, size.to_bytes(4, "big"))

    def kill(self) -> None:
        """Kill everything inside at once, and leave it to ``close`` to wait for it."""
        self._stream.close()
        if self._removing is None:
            self._removing = asyncio.ensure_future(self._remove())

    def fail(self, reason: str) -> None:
        """Kill everything inside because of what happened outside of it, which the errors of its calls then say."""
        if self._removing is None:
            self._reason, self._failed = f", because {reason}", time.monotonic()
            self.kill()

    async def close(self) -> None:
        """End the container and wait until the engine has removed it.

        Survives cancellation. May be called twice.
        """
        self.kill()
        assert self._removing is not None
        cancelled = False
        while not (self._removing.done() and self._reading.done()):
            try:
                await asyncio.wait((self._removing, self._reading))
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            raise asyncio.CancelledError
        self._removing.result()


class ContainerProcess:
    """A process that lives across turns. Implements ``areal_agents.sandbox.Process`` as ``LiveProcess`` does."""

    def __init__(self, container: Container, call: Call) -> None:
        self._container, self._call = container, call
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()
        self._killed = False
        self.ended = False

    @property
    def exit_code(self) -> int | None:
        """How it ended; None where it has not, or where its container was lost."""
        told = self._call.exit.result() if self._call.exit.done() else None
        return told["code"] if told else None

    @property
    def out_of_memory(self) -> bool:
        """Whether it was killed, and the kernel has killed for the memory of its container meanwhile."""
        told = self._call.exit.result() if self._call.exit.done() else None
        return bool(told and told["oom"] and told["code"] in (-9, 128 + 9))

    async def runs(self) -> bool:
        """Say whether it still runs, now that it is asked."""
        return await self._container.runs(self._call)

    async def send(self, data: bytes) -> None:
        """Write ``data`` to the process's stdin.

        Raises BrokenPipeError when the process has ended, and SandboxError when it does not read for SEND_TIMEOUT
        seconds.
        """
        async with self._sending:
            if not await self._container.feed(self._call, data, patience=SEND_TIMEOUT):
                raise SandboxError(f"the process did not read its stdin for {SEND_TIMEOUT:.0f} s; kill it")
            if self._killed or self._call.exit.done():
                raise BrokenPipeError("the process has ended")

    async def recv(self, max_bytes: int, *, timeout: float) -> bytes:
        """Return what the process printed next, or b"" after ``timeout`` seconds of silence or after its end.

        Raises SandboxError where its container has ended because of what belongs to it.
        """
        call = self._call
        async with self._receiving:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    while not call.stdout and not call.exit.done() and not self._killed:
                        call.changed.clear()
                        await call.changed.wait()
            if self._killed:
                return b""
            await self._container.require_all()
            data = bytes(call.stdout[:max_bytes])
            del call.stdout[:max_bytes]
            if data:
                self._container.allow(call, len(data))
            self.ended = not data and call.exit.done()
            return data

    async def kill(self) -> None:
        """End the process and wait until it is gone. May be called twice."""
        if not self._killed:
            try:
                await self._container.stop(self._call)
            finally:
                self._killed = self.ended = True
                self._call.changed.set()
