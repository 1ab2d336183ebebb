"""A Python REPL or a shell that lives across turns, over a process of any backend.

The interpreter inside is hostile, and its keeper (``console_driver``) is not trusted either: frames are bounded, and
each wait has an end here. What does not keep to that is killed, and the call says that its state is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from functools import cache
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import SandboxError
from areal_agents.sandbox import CallResult, CallStatus, ConsoleKind, Process, Sandbox, check_call
from areal_agents.sandboxes import console_driver
from areal_agents.sandboxes.console_driver import CALL, CHUNK, DONE, FRAME, INTERRUPT, KILL, OUTPUT, READY

START_TIMEOUT: Final = 60.0
INTERRUPT_GRACE: Final = 2.0
"""Seconds that an interrupted call has before it is killed."""
KILL_GRACE: Final = 5.0
"""Seconds for the keeper to confirm a kill; then everything is killed from outside."""
MAX_CODE: Final = 4 << 20
_MAX_DONE: Final = 1 << 16


async def start(sandbox: Sandbox, kind: ConsoleKind, *, background: bool = False) -> LiveConsole:
    """Start a console, as ``areal_agents.sandbox.open_console`` says.

    Raises ValueError for an unknown kind, and SandboxError where it does not start.
    """
    if kind not in ("python", "shell"):
        raise ValueError(f"no console {kind!r}. Known: python, shell.")
    console = LiveConsole(sandbox, kind, background)
    await console.open()
    return console


@cache
def _source(name: str) -> str:
    return Path(__file__).with_name(f"{name}.py").read_text()


class _Gone(Exception):
    """The process has ended, or is no longer what was started."""


class LiveConsole:
    """A console over ``Sandbox.spawn``.

    Implements ``areal_agents.sandbox.Console``. A call that is cancelled loses the interpreter, and the next one has a
    fresh one.
    """

    def __init__(self, sandbox: Sandbox, kind: ConsoleKind, background: bool) -> None:
        self._sandbox, self._kind, self._background = sandbox, kind, background
        self._process: Process | None = None
        self._buffer = bytearray()
        self._calls = 0
        self._lock = asyncio.Lock()
        self._stop: asyncio.Event | None = None
        self._closed = False

    async def open(self) -> None:
        """Start the interpreter, unless it runs. Raises SandboxError."""
        if self._closed:
            raise SandboxError("the console is closed. Open a new one.")
        if self._process is not None:
            return
        driver, repl = _source("console_driver"), _source("console_python")
        mode = "background" if self._background else "ended"
        self._buffer.clear()
        keeper = ["python3", "-I", "-S", "-X", "utf8", "-c", driver, self._kind, mode, repl]
        self._process = await self._sandbox.spawn(keeper)
        try:
            frame = await self._frame(time.monotonic() + START_TIMEOUT)
        except _Gone:
            frame = None
        except BaseException:
            await self._drop()
            raise
        if frame is None or frame[0] != READY:
            text = bytes(self._buffer[:400]).decode("utf-8", "replace").strip()
            await self._drop()
            raise SandboxError(f"no {self._kind} console starts in the sandbox: {text or 'no answer'}")

    async def call(self, code: str, *, timeout: float, max_output: int = 1 << 20) -> CallResult:
        """Run code to its end, whatever that is.

        Args:
            code: Python, whose last expression is echoed, or shell commands.
            timeout: seconds until it is interrupted, and killed where it goes on.
            max_output: bytes of output, beyond which it is interrupted too.

        Returns:
            How it ended, what it printed, and what the next call finds.

        Raises:
            SandboxError: when the sandbox itself failed, or the console is closed.
            ValueError: for a NUL in shell commands, text that is no UTF-8, or more than ``MAX_CODE`` bytes of it.
            ConfigError: for a timeout or a limit that is none.
        """
        check_call(timeout, max_output)
        data = code.encode()  # UnicodeEncodeError is a ValueError
        if len(data) > MAX_CODE or (self._kind == "shell" and b"\0" in data):
            raise ValueError(f"a call has at most {MAX_CODE} bytes, and no NUL in a shell.")
        async with self._lock:
            await self.open()
            self._calls += 1
            begin = time.monotonic()
            run = _Run(self._calls, begin + timeout, max_output)
            self._stop = run.stop
            try:
                done = await self._follow(run, data)
            except BaseException:
                await self._drop()
                raise
            finally:
                self._stop = None
            return _result(run, done, time.monotonic() - begin)

    async def interrupt(self) -> None:
        """Interrupt the call under way. Does nothing where there is none."""
        if self._stop is not None:
            self._stop.set()

    async def close(self) -> None:
        """End the interpreter and all that it left. May be called twice."""
        self._closed = True
        await self._drop()

    async def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            await process.kill()

    async def _follow(self, run: _Run, code: bytes) -> dict[str, Any] | None:
        """Send a call and take what it says, until it is done (then what was reported) or lost (None)."""
        assert self._process is not None
        process = self._process
        # It may print before it has read all of its code.
        sending = asyncio.ensure_future(process.send(FRAME.pack(CALL, run.ident, len(code)) + code))
        stopping = asyncio.ensure_future(run.stop.wait())
        reading: asyncio.Future[Any] | None = None
        try:
            while True:
                reading = reading or asyncio.ensure_future(self._frame(None))
                wait = max(0.0, run.until - time.monotonic())
                watched = {reading} if run.phase else {reading, stopping}
                ready, _ = await asyncio.wait(watched, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                if reading in ready:
                    kind, ident, payload = reading.result()
                    reading = None
                    if ident != run.ident:
                        raise _Gone
                    if kind == DONE:
                        return _report(payload)
                    if kind != OUTPUT:
                        raise _Gone
                    over = run.take(payload)
                    if not over or run.phase:
                        continue
                    run.status = "output_limit"
                elif stopping in ready and not run.phase:
                    run.status = "interrupted"
                elif not run.phase:
                    run.status = "timeout"
                if run.phase == 2:
                    raise _Gone
                run.phase += 1
                run.until = time.monotonic() + (INTERRUPT_GRACE, KILL_GRACE)[run.phase - 1]
                # One frame is written at a time: a call that is still being written cannot be interrupted.
                if sending.done():
                    frame = FRAME.pack((INTERRUPT, KILL)[run.phase - 1], run.ident, 0)
                    sending = asyncio.ensure_future(process.send(frame))
        except (_Gone, BrokenPipeError):
            await self._drop()
            return None
        finally:
            for task in (sending, stopping, reading):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*filter(None, (sending, stopping, reading)), return_exceptions=True)

    async def _frame(self, until: float | None) -> tuple[int, int, bytes]:
        """Read one frame. Raises _Gone where the process has ended, is late or says something else."""
        while True:
            if len(self._buffer) >= FRAME.size:
                kind, ident, size = FRAME.unpack_from(self._buffer)
                if kind not in (READY, OUTPUT, DONE) or size > max(CHUNK, _MAX_DONE):
                    raise _Gone
                if len(self._buffer) >= FRAME.size + size:
                    payload = bytes(self._buffer[FRAME.size : FRAME.size + size])
                    del self._buffer[: FRAME.size + size]
                    return kind, ident, payload
            if self._process is None:
                raise _Gone
            begin, wait = time.monotonic(), 3600.0 if until is None else max(0.0, until - time.monotonic())
            data = await self._process.recv(CHUNK, timeout=wait)
            if not data and (until is not None or time.monotonic() - begin < wait):
                raise _Gone
            self._buffer += data


class _Run:
    """One call under way."""

    def __init__(self, ident: int, until: float, max_output: int) -> None:
        self.ident, self.until, self.max_output = ident, until, max_output
        self.stop = asyncio.Event()
        self.status: CallStatus | None = None
        """Why it was stopped from here."""
        self.phase = 0
        """0: it runs. 1: it was interrupted. 2: it was killed."""
        self.output = bytearray()

    def take(self, data: bytes) -> bool:
        """Keep output up to the limit, and say whether there is more."""
        left = self.max_output - len(self.output)
        self.output += data[:left]
        return len(data) > left


def _report(payload: bytes) -> dict[str, Any]:
    """Check what a keeper says of a call's end. Raises _Gone."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(payload)
        code, state, left, ended = found["code"], found["state"], found["left"], found["ended"]
        known = state in ("kept", "restored", "lost") and all(isinstance(text, str) for text in left)
        if known and type(code) is int and type(ended) is bool and len(left) <= console_driver.MAX_LEFT:
            return {"code": code, "state": state, "left": left, "ended": ended}
    raise _Gone


def _result(run: _Run, done: dict[str, Any] | None, seconds: float) -> CallResult:
    output = bytes(run.output)
    if done is None:
        return CallResult(run.status or "ended", None, output, "lost", (), seconds)
    code: int = done["code"]
    natural: CallStatus = "ended" if done["ended"] else "ok" if code == 0 else "error"
    # An interrupt may come when the call has ended well already.
    status = natural if run.status in (None, "interrupted") and natural == "ok" else run.status or natural
    return CallResult(status, None if run.phase == 2 else code, output, done["state"], tuple(done["left"]), seconds)
