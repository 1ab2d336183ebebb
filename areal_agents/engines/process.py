"""The client of an engine that runs in a process of its own.

Client and worker exchange frames over two pipes, whatever the engine.

    call ──frame──▶ worker process (and its children: one session, one process group) ──frame──▶ reader task ─▶ future

Waits for: the worker's replies. Unblocked by: a reply, the worker's end, or the call's own deadline. At the worker's
end every pending call raises EngineError with the exit code and the end of its stderr.

Linux only, because weights travel by memfd and /proc.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections import deque
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, cast

import areal_agents
from areal_agents.engine import Health, KVPolicy, Sampling, UpdateMode, UpdateReport, WeightsRef
from areal_agents.engines import protocol as p
from areal_agents.engines.process_group_reaper import members
from areal_agents.errors import ConfigError, EngineError, ModelError
from areal_agents.types import Completion, Prompt
from areal_agents.utils.closing import AsyncClosing
from areal_agents.utils.outcomes import unheard

T = TypeVar("T")

CLOSE_SECONDS = 5.0
"""How long a worker may take to end by itself."""
_HEALTH_SECONDS = 10.0
_GROUP_SECONDS = 8.0
"""Longer than the worker's guard needs, which spares what frees shared memory."""
_STDERR_LINES = 30


class EngineProcess(AsyncClosing):
    """The base of every engine that has a worker process.

    It is an async context manager that closes itself, and belongs to the event loop that started it. The worker leads a
    session of its own. ``close`` and ``kill`` end the whole process group, whatever state it is in.
    """

    name: ClassVar[str]
    """For people: "the transformers engine"."""
    module: ClassVar[str]
    """What ``python -m`` runs; it gets this process's id and reads its settings as the first frame."""
    start_seconds: ClassVar[float] = 300.0
    update_seconds: ClassVar[float] = 300.0

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Take over ``process``. Callers use the engine's ``start`` instead."""
        self._process = process
        self._pending: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count(1)
        self._ready: asyncio.Future[p.Ready] = asyncio.get_running_loop().create_future()
        self._stderr: deque[str] = deque(maxlen=_STDERR_LINES)
        self._version = 0
        self._failure: str | None = None
        self._lost = ""
        self._closing = False
        self._ending: asyncio.Task[None] | None = None
        self._max_context = 0
        self._tasks = [
            asyncio.create_task(self._read_stderr(), name="engine-stderr"),
            asyncio.create_task(self._read_replies(), name="engine-replies"),
        ]

    @classmethod
    async def launch(cls, settings: p.AnySettings, env: dict[str, str]) -> Self:
        """Start the worker with ``env`` and wait until it is ready.

        Raises:
            ModelError: the worker cannot serve the model.
            EngineError: the worker does not start.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", cls.module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        engine = cls(process)
        try:
            await engine._write(settings)
            async with asyncio.timeout(cls.start_seconds):
                ready = await engine._ready
        except BaseException as error:  # a caller that is cancelled leaves no worker behind either
            await engine.kill()
            if isinstance(error, TimeoutError):
                raise EngineError(f"the engine worker did not start within {cls.start_seconds:.0f} s") from error
            raise
        engine._max_context = ready.max_context
        return engine

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_context(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return self._max_context

    @property
    def pid(self) -> int:
        """Process id of the worker, and of its process group."""
        return self._process.pid

    @property
    def failure(self) -> str | None:
        """The reason why the worker is gone, with the end of its stderr. None while it lives."""
        return self._failure

    @property
    def stderr(self) -> str:
        """The last lines of the worker's stderr."""
        return "\n".join(self._stderr)

    # --- the contract ----------------------------------------------------------------------------------------------

    async def generate(self, prompt: Prompt, sampling: Sampling, *, session: str, deadline: float) -> Completion:
        """Sample one turn like ``Engine.generate``.

        A session has one request at a time.

        Args:
            prompt: token ids. Images are refused.
            sampling: how to sample, and what ends the turn.
            session: the conversation whose KV the turn may reuse.
            deadline: seconds from now.

        Raises:
            EngineError: past the deadline, for a refused request, and where the worker is gone.
        """
        if prompt.media:
            raise EngineError(f"{self.name} reads token ids only, but the prompt has images")
        id = next(self._ids)
        try:
            return await self._ask(id, p.Generate(id, session, prompt.ids, sampling), Completion, deadline)
        except TimeoutError as error:
            self._send(p.Cancel(id))
            raise EngineError(
                f"no completion of session {session!r} within {deadline:g} s ({len(prompt.ids)} prompt tokens, "
                f"max_tokens {sampling.max_tokens}): raise the deadline or lower the load"
            ) from error
        except asyncio.CancelledError:
            self._send(p.Cancel(id))
            raise

    async def release(self, session: str) -> None:
        """Drop the session's KV.

        Unknown sessions and a dead worker are ignored.
        """
        self._send(p.Release(session))

    async def update_weights(
        self, ref: WeightsRef, *, mode: UpdateMode = "inflight", kv: KVPolicy = "recompute"
    ) -> UpdateReport:
        """Serve ``ref`` from now on.

        Args:
            ref: where the weights lie.
            mode: ``inflight`` goes on with the KV it has. ``interrupt`` recomputes running requests' KV first.
                ``drain`` finishes them and admits no others meanwhile.
            kv: ``recompute`` drops every KV of older versions at the next turn. ``keep`` reuses it.

        Raises:
            EngineError: the weights are gone, damaged or of another model, and the old ones stay in use. Or the worker
                is gone, or did not acknowledge them within ``update_seconds``.
            ConfigError: ``mode`` or ``kv`` is unknown.
        """
        if mode not in ("inflight", "interrupt", "drain") or kv not in ("recompute", "keep"):
            raise ConfigError(f"unknown update mode {mode!r} or kv {kv!r}")
        id = next(self._ids)
        try:
            report = await self._ask(id, p.Update(id, ref, mode, kv), UpdateReport, self.update_seconds)
        except TimeoutError as error:
            raise EngineError(f"weights v{ref.version} not acknowledged within {self.update_seconds:.0f} s") from error
        return report

    async def health(self) -> Health:
        """Return the worker's state.

        Where it is dead or does not answer, ``ok`` is False and ``detail`` has the reason.
        """
        id = next(self._ids)
        try:
            return await self._ask(id, p.AskHealth(id), Health, _HEALTH_SECONDS)
        except TimeoutError:
            detail = f"the worker did not answer within {_HEALTH_SECONDS:.0f} s"
        except EngineError as error:
            detail = str(error)
        return Health(False, self._version, 0, 0, 0, 0, detail)

    async def close(self) -> None:
        """End the worker within seconds.

        Pending calls raise EngineError. May be called twice.
        """
        self._closing = True
        self._fail_all("the engine was closed")
        self._send(p.Close())
        stdin = self._process.stdin
        if stdin is not None:
            stdin.close()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._process.wait()
        finally:
            await self._end()

    async def kill(self) -> None:
        """End a worker that may be stopped or stuck, by SIGKILL to its process group.

        Pending calls raise EngineError.
        """
        self._closing = True
        self._fail_all("the engine was killed")
        await self._end()

    # --- plumbing --------------------------------------------------------------------------------------------------

    async def _end(self) -> None:
        """Kill the worker and what is left of its process group, and stop reading from it."""
        try:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            await asyncio.shield(self._group_ended())
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _group_ended(self) -> asyncio.Task[None]:
        """Return the one task that ends the process group. It starts as soon as the worker's end is seen.

        Once a group has no members its number may be given to another one, so nobody else may send a signal to it.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_group(), name="engine-end")
        return self._ending

    async def _end_group(self) -> None:
        if not await self._group_gone():  # a worker with children has a guard, which ends them; be sure
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._group_gone()

    async def _group_gone(self) -> bool:
        """Say whether the process group has no members within seconds.

        A group keeps its number for as long as it has a member, so a signal to that number reaches no other group.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GROUP_SECONDS):
                while members(self._process.pid):  # noqa: ASYNC110  the kernel sends no event
                    await asyncio.sleep(0.01)
                return True
        return False

    async def _ask(self, id: int, command: p.WorkerCommand, kind: type[T], seconds: float) -> T:
        """Send ``command`` and wait for its reply.

        Raises TimeoutError past ``seconds``, EngineError where the command failed or the worker is gone.
        """
        if self._failure is not None:
            raise EngineError(self._failure)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[id] = future
        try:
            async with asyncio.timeout(seconds):
                await self._write(command)
                return cast(T, await future)
        finally:
            self._pending.pop(id, None)
            unheard(future)  # the worker may have ended while the command was still being written

    def _send(self, command: p.WorkerCommand) -> None:
        """Queue a command that has no reply.

        Nothing happens where the worker is gone.
        """
        stdin = self._process.stdin
        if stdin is not None and not stdin.is_closing():
            stdin.write(p.encode(command))

    async def _write(self, message: p.AnySettings | p.WorkerCommand) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(p.encode(message))
            await stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            # The worker is gone; the reader task finds out why and fails every pending call.
            await asyncio.wait({self._tasks[1]})  # which, unlike gather, does not cancel it with its caller

    async def _read_stderr(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        while line := await _read_line(stream):
            self._stderr.append(line.decode(errors="replace").rstrip())

    async def _read_replies(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                (size,) = p.HEADER.unpack(await stream.readexactly(p.HEADER.size))
                self._on_reply(p.decode(await stream.readexactly(size)))
        code = await self._process.wait()
        self._group_ended()
        # Its stderr says why it ended. The wait is short, as a child of its may hold that pipe open, and shielded, as
        # the timeout would else cancel the task that reads it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2.0):
                await asyncio.shield(self._tasks[0])
        if not self._closing:
            self._fail_all(f"{self._lost or 'the engine worker ended with ' + _describe(code)}; {self._tail()}")

    def _on_reply(self, reply: p.Reply) -> None:
        match reply:
            case p.Ready():
                self._ready.set_result(reply)
            case p.Fatal(message=message) if not self._ready.done():
                self._ready.set_exception(ModelError(message))
            case p.Fatal(message=message):
                self._fail_all(message)
            case p.Lost(message=message):
                self._lost = message  # its end follows at once, and with it the rest of its stderr
            case p.Updated(id=id, report=report):
                self._version = report.version
                self._resolve(id, report)
            case p.Done(id=id, completion=completion):
                self._resolve(id, completion)
            case p.HealthReport(id=id, health=health):
                self._resolve(id, health)
            case p.Failed(id=id, message=message):
                future = self._pending.get(id)
                if future is not None and not future.done():
                    future.set_exception(EngineError(message))

    def _resolve(self, id: int, value: object) -> None:
        future = self._pending.get(id)
        if future is not None and not future.done():
            future.set_result(value)

    def _fail_all(self, message: str) -> None:
        self._failure = self._failure or message
        for future in [*self._pending.values(), self._ready]:
            if not future.done():
                future.set_exception(EngineError(self._failure))
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()  # marks it as seen: nobody may be waiting for it

    def _tail(self) -> str:
        return "end of its stderr:\n" + (self.stderr or "(empty)")


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    """Read one line, or return a note in place of one that is longer than the buffer."""
    try:
        return await stream.readline()
    except ValueError:
        return b"(a line too long to keep)\n"


def require_positive(**numbers: int) -> None:
    """Raise ConfigError for a setting below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"engine {name} must be at least 1, got {value}")


def _describe(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"exit code {code} ({signal.Signals(-code).name})"
    return f"exit code {code}"


def environment(**extra: str) -> dict[str, str]:
    """Return the parent's environment, with this package importable and ``extra`` added."""
    root = str(Path(areal_agents.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"} | extra
