"""A process that lives across turns, over pipes that the host owns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

from areal_agents.errors import SandboxError

SEND_TIMEOUT = 30.0


class LiveProcess:
    """A process that lives across turns, as the host sees it.

    Implements ``areal_agents.sandbox.Process``. Its stderr arrives interleaved with its stdout. ``recv`` returns b""
    when nothing came within its timeout, and also when the process has ended (then ``ended`` is true).
    """

    def __init__(self, stdin: int, stdout: int, end: Callable[[], Awaitable[None]]) -> None:
        """Take over the host's ends of the pipes.

        ``end`` kills the process and waits until it is gone.
        """
        self._stdin, self._stdout = stdin, stdout
        self._end = end
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()
        self._waiting: set[asyncio.Future[None]] = set()
        self.ended = False
        for descriptor in (stdin, stdout):
            os.set_blocking(descriptor, False)

    async def send(self, data: bytes) -> None:
        """Write ``data`` to the process's stdin.

        Raises BrokenPipeError when the process has ended, and SandboxError when it does not read for SEND_TIMEOUT
        seconds.
        """
        view = memoryview(data)
        async with self._sending:
            while view:
                if self._stdin < 0:
                    raise BrokenPipeError("the process has been killed")
                try:
                    view = view[os.write(self._stdin, view) :]
                except BlockingIOError:
                    if not await self._ready(SEND_TIMEOUT, write=True):
                        raise SandboxError(
                            f"the process did not read its stdin for {SEND_TIMEOUT:.0f} s; kill it"
                        ) from None

    async def recv(self, max_bytes: int, *, timeout: float) -> bytes:
        """Return what the process printed next.

        That is 1 to ``max_bytes`` bytes, or b"" after ``timeout`` seconds of silence or after the process's end.
        """
        async with self._receiving:
            while self._stdout >= 0:
                try:
                    data = os.read(self._stdout, max_bytes)
                except BlockingIOError:
                    if not await self._ready(timeout, write=False):
                        return b""
                else:
                    self.ended = not data
                    return data
            return b""

    async def kill(self) -> None:
        """End the process and wait until it is gone.

        May be called twice.
        """
        if self._stdout >= 0:
            try:
                await self._end()
            finally:
                self.close()

    async def _ready(self, timeout: float, *, write: bool) -> bool:
        """Wait until a pipe is ready, and return False when ``timeout`` seconds have passed.

        ``close`` ends the wait too, and the pipe's descriptor is then -1.
        """
        loop = asyncio.get_running_loop()
        descriptor = self._stdin if write else self._stdout
        add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.add(future)
        add(descriptor, _finish, future)
        try:
            done, _ = await asyncio.wait((future,), timeout=timeout)
            return bool(done)
        finally:
            self._waiting.discard(future)
            if self._stdout >= 0:  # else the number may be another pipe's by now
                remove(descriptor)

    def close(self) -> None:
        """Close the pipes without waiting for the process."""
        loop = asyncio.get_running_loop()
        if self._stdout >= 0:
            loop.remove_reader(self._stdout)
            loop.remove_writer(self._stdin)
            os.close(self._stdin)
            os.close(self._stdout)
            self._stdin = self._stdout = -1
        # Whoever waits in `send` or `recv` wakes up now and finds the pipes closed.
        for future in self._waiting:
            _finish(future)
        self.ended = True


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
