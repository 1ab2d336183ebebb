"""One live sandbox seen from the host: bwrap, its control socket, the requests under way.

Nothing that comes out is trusted: replies are frames of a fixed size, streams are bounded, deadlines are kept here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from areal_agents.errors import SandboxError
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import launch, process_gate, seccomp, supervisor, uids
from areal_agents.sandboxes.interactive_process import LiveProcess
from areal_agents.sandboxes.memory import MemoryBound, Meter, NoMeter
from areal_agents.sandboxes.pipes import Fds, Pump

START_TIMEOUT: Final = 20.0
PRELOAD_TIMEOUT: Final = 180.0
"""Seconds to start where pid 1 imports modules first."""
GRACE: Final = 5.0
"""Seconds for the sandbox to confirm a kill; then the whole sandbox is killed from outside."""

_CREDENTIALS: Final = struct.Struct("=iII")
"""Pid, uid and gid, as the kernel adds them to a message."""

names = itertools.count()
"""Numbers for what has no slot of its own."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request."""

    cause: Literal["exit", "timeout", "output_limit", "lost"]
    code: int | None
    """Exit code, or minus a signal number; None when the request was killed from here."""
    stdout: bytes
    stderr: bytes
    oom: bool
    """Whether the kernel killed a process of the session for memory meanwhile."""
    seconds: float


class Holder:
    """A started sandbox, which runs one request at a time and any number of live processes."""

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes] | None, spec: SandboxSpec) -> None:
        self._loop = asyncio.get_running_loop()
        self._control = control
        self._process = process
        self._idents = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._live: set[LiveProcess] = set()
        self._lock = asyncio.Lock()
        self.spec = spec
        self.pid = 0
        """The supervisor's pid on the host."""
        self.sender = 0
        """Who said that it is ready, as the kernel tells where the control socket asks it to."""
        self.slot: uids.Slot | None = None
        self.meter: Meter | None = None
        self.limits: Mapping[str, int] = {}
        self.given: Mapping[str, Any] = {}
        self.gone = self._loop.create_future()
        """Done when the control socket has closed: nothing runs inside any more."""
        self._ready = self._loop.create_future()
        self._inner = -1
        control.setblocking(False)
        self._loop.add_reader(control, self._receive)

    @classmethod
    async def start(
        cls, tools: launch.Tools, spec: SandboxSpec, bound: MemoryBound, *, drop: bool, zygote: bool = False
    ) -> Holder:
        """Start a sandbox.

        Args:
            tools: paths of the programs.
            spec: what the session may use.
            bound: how its memory is bounded.
            drop: run as the slot's own uid, as a root host must, and not as the caller.
            zygote: it will run no program, and fork sandboxes.

        Raises:
            SandboxError: when bwrap does not come up.
            SandboxUnavailable: without seccomp.
            ConfigError: for a spec that leaves no room.
        """
        limits, program = bound.limits(spec), seccomp.program(bound.kind == "rlimits")
        launch.require_limits(limits, process_gate.hard_limits(limits))
        slot = uids.acquire() if drop else None
        meter: Meter | None = None
        holder: Holder | None = None
        fds = Fds()
        try:
            name = f"areal-agents-{slot.index if slot else f'u{os.getpid()}-{next(names)}'}"
            meter = NoMeter() if zygote else bound.meter(name, spec)
            (info_read, info_write), errors = fds.pipe(), fds.memfd("stderr")
            filter_fd = None if zygote else fds.memfd("seccomp", program)
            started = launch.popen(tools, spec, bound, slot, filter_fd, info_write, errors, zygote)
            holder = cls(*started, spec)
            holder.slot, holder.meter, holder.limits = slot, meter, limits
            holder.given = launch.given(tools, bound, spec)
            os.close(fds.take(info_write))
            await holder.wait_ready(errors, tools)
            holder.pid = launch.inner_pid(info_read)
            holder._inner = os.pidfd_open(holder.pid)
            meter.attach(holder.pid)
        except BaseException as error:
            if holder is not None:
                await holder.close()
            else:
                if meter is not None:
                    meter.close()
                if slot is not None:
                    slot.release()
            if isinstance(error, OSError):
                raise SandboxError(f"cannot start a sandbox: {error}") from error
            raise
        finally:
            fds.close()
        return holder

    async def wait_ready(self, errors: int, tools: launch.Tools) -> None:
        """Wait until pid 1 says that it is ready. Raises SandboxError with what it wrote into the file ``errors``."""
        limit = PRELOAD_TIMEOUT if tools.preload else START_TIMEOUT
        await asyncio.wait((self._ready, self.gone), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.done():
            text = os.pread(errors, 4096, 0).decode("utf-8", "replace")
            late = "" if self.gone.done() else f"no answer within {limit:.0f} s. "
            raise SandboxError(late + ": ".join(launch.explain(text)))

    @property
    def alive(self) -> bool:
        return not self.gone.done()

    def oom_kills(self) -> int:
        return self.meter.oom_kills() if self.meter else 0

    def host_uid(self) -> int:
        """Read the real uid of the supervisor, as the host sees it."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Uid:")).split()[1])

    async def run(
        self, request: dict[str, Any], *, stdin: bytes | None, timeout: float, max_output: int, seekable: bool = False
    ) -> Finished:
        """Run one request to its end.

        Every process that it left behind is dead when this returns or raises. Cause "lost": the sandbox died meanwhile.

        Args:
            request: what the supervisor is to do, as JSON.
            stdin: the bytes that the program reads.
            timeout: seconds until the request is killed.
            max_output: bytes of stdout and stderr together, beyond which it is killed.
            seekable: stdin is a file instead of a pipe.
        """
        async with self._lock:
            fds = Fds()
            ident, start, kills = next(self._idents), time.monotonic(), self.oom_kills()
            try:
                reply, pump = self._start_run(ident, request, stdin or b"", max_output, fds, seekable)
            finally:
                fds.close()
            cause: Literal["exit", "timeout"] = "exit"
            try:
                done, _ = await asyncio.wait((reply,), timeout=timeout)
                if not done:
                    cause = "timeout"
                    await self._kill(ident, reply)
                pump.drain()
                code = reply.result() if reply.done() and not reply.cancelled() else None
                lost = code is None and cause != "timeout"
                killed = cause == "timeout" or pump.limited
                ending: Any = "output_limit" if pump.limited else "lost" if lost else cause
                oom, seconds = self.oom_kills() > kills, time.monotonic() - start
                return Finished(ending, None if killed else code, pump.stdout, pump.stderr, oom, seconds)
            except asyncio.CancelledError:
                await self._kill_or_destroy(ident, reply)
                raise
            finally:
                self._waiting.pop(ident, None)
                pump.close()

    def _start_run(
        self, ident: int, request: dict[str, Any], stdin: bytes, max_output: int, fds: Fds, seekable: bool
    ) -> tuple[asyncio.Future[int], Pump]:
        out, err = fds.pipe(), fds.pipe()
        if seekable:
            feed, source = None, fds.memfd("stdin", stdin)
        else:
            source, sink = fds.pipe()
            feed = (sink, stdin)
        reply = self._send_start(ident, supervisor.RUN, request, (source, out[1], err[1]), fds)
        for descriptor in (out[0], err[0], *((feed[0],) if feed else ())):
            fds.take(descriptor)
        return reply, Pump(feed, out[0], err[0], max_output, lambda: self._send(supervisor.KILL, ident))

    def _send_start(
        self, ident: int, mode: int, request: dict[str, Any], streams: tuple[int, int, int], fds: Fds
    ) -> asyncio.Future[int]:
        """Hand a request and the child's ends of its pipes over. Raises SandboxError when the sandbox is dead."""
        if self.slot is not None:
            for descriptor in streams:
                os.fchown(descriptor, self.slot.uid, self.slot.uid)  # so that /dev/stdout and /dev/stdin can be opened
        message = fds.memfd("request", json.dumps({**request, **self.given}).encode())
        frame = supervisor.FRAME.pack(supervisor.START, ident, mode)
        if not self.alive:
            raise SandboxError("the sandbox has ended; its files are gone. Open a new session.")
        try:
            socket.send_fds(self._control, [frame], [message, *streams])
        except OSError as error:
            self.kill()
            raise SandboxError(f"the sandbox does not take requests: {error}. Open a new session.") from error
        reply: asyncio.Future[int] = self._loop.create_future()
        self._waiting[ident] = reply
        return reply

    def send_fork(self, fds: list[int]) -> None:
        """Hand the zygote what a new sandbox needs. Raises OSError."""
        socket.send_fds(self._control, [supervisor.FRAME.pack(supervisor.FORK, 0, 0)], fds)

    def _send(self, kind: int, ident: int) -> None:
        try:
            self._control.send(supervisor.FRAME.pack(kind, ident, 0))
        except OSError:
            self.kill()

    async def _kill(self, ident: int, reply: asyncio.Future[int]) -> None:
        self._send(supervisor.KILL, ident)
        if not (await asyncio.wait((reply,), timeout=GRACE))[0]:
            self.kill()
            await asyncio.wait((self.gone,), timeout=GRACE)

    async def _kill_or_destroy(self, ident: int, reply: asyncio.Future[int]) -> None:
        try:
            await self._kill(ident, reply)
        except asyncio.CancelledError:
            self.kill()

    async def spawn(self, request: dict[str, Any]) -> LiveProcess:
        """Start a live process, which survives ``run`` and dies with the holder."""
        async with self._lock:
            fds = Fds()
            try:
                ident = next(self._idents)
                source, sink = fds.pipe()
                out_read, out_write = fds.pipe()
                reply = self._send_start(ident, supervisor.SPAWN, request, (source, out_write, out_write), fds)
                fds.take(sink)
                fds.take(out_read)
            finally:
                fds.close()

        async def end() -> None:
            if not reply.done():
                await self._kill(ident, reply)
            self._waiting.pop(ident, None)
            self._live.discard(live)

        live = LiveProcess(sink, out_read, end)
        self._live.add(live)
        return live

    def _receive(self) -> None:
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                supervisor.FRAME.size + 1, socket.CMSG_SPACE(_CREDENTIALS.size)
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        if len(data) != supervisor.FRAME.size:
            if data:
                self.kill()  # pid 1 does not send such a thing: it is no longer what was started
            self._lost()
            return
        kind, ident, code = supervisor.FRAME.unpack(data)
        if kind == supervisor.READY and not self._ready.done():
            self.sender = next((_CREDENTIALS.unpack(value)[0] for _, _, value in ancillary), 0)
            self._ready.set_result(None)
        elif kind == supervisor.EXIT and (reply := self._waiting.pop(ident, None)) is not None and not reply.done():
            reply.set_result(code)

    def _lost(self) -> None:
        self._loop.remove_reader(self._control)
        if not self.gone.done():
            self.gone.set_result(None)
        for reply in self._waiting.values():
            reply.cancel()
        self._waiting.clear()

    def kill(self) -> None:
        """Kill everything inside at once, and leave it to ``close`` to collect."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def close(self) -> None:
        """End the sandbox, wait until it is gone, and free its uid and cgroup.

        Survives cancellation. May be called twice.
        """
        # A cancelled caller waits on: a sandbox that is closed by half would keep its uid and its cgroup.
        task = self._loop.create_task(self._close())
        cancelled = False
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                cancelled = True
        task.result()
        if cancelled:
            raise asyncio.CancelledError

    async def _close(self) -> None:
        for live in tuple(self._live):
            live.close()
        self._live.clear()
        if self._running():
            self._lost()
            self._control.close()  # the supervisor reads the end of it and leaves; its namespace dies with it
            if not await self._exited(GRACE):
                self.kill()
                await self._exited(GRACE)
        if self._inner >= 0:
            os.close(self._inner)
            self._inner = -1
        self._control.close()
        if self.meter is not None:
            await asyncio.to_thread(self.meter.close)
            self.meter = None
        if self.slot is not None:
            self.slot.release()

    async def _exited(self, timeout: float) -> bool:
        """Wait for pid 1, which the kernel lets end after everything else in its namespace, then for bwrap."""
        try:
            async with asyncio.timeout(timeout):
                if self._inner >= 0:
                    await self._wait_pidfd(self._inner)
                    os.close(self._inner)
                    self._inner = -1
                if self._process is not None and self._process.poll() is None:
                    descriptor = os.pidfd_open(self._process.pid)
                    try:
                        await self._wait_pidfd(descriptor)
                    finally:
                        os.close(descriptor)
        except TimeoutError:
            return False
        return self._process is None or self._process.poll() is not None

    def _running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _wait_pidfd(self, descriptor: int) -> None:
        event = asyncio.Event()
        self._loop.add_reader(descriptor, event.set)
        try:
            await event.wait()
        finally:
            self._loop.remove_reader(descriptor)
