"""The host's ends of a child's pipes, driven by the event loop: bounded reads, patient writes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

_CHUNK: Final = 1 << 16


@dataclass(slots=True)
class Fds:
    """A set of descriptors that are closed unless somebody takes them over."""

    open: set[int] = field(default_factory=set)

    def pipe(self) -> tuple[int, int]:
        pair = os.pipe2(os.O_CLOEXEC)
        self.open.update(pair)
        return pair

    def memfd(self, name: str, data: bytes = b"") -> int:
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        self.open.add(descriptor)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def take(self, descriptor: int) -> int:
        self.open.discard(descriptor)
        return descriptor

    def close(self) -> None:
        while self.open:
            os.close(self.open.pop())


class Pump:
    """The host's side of one program's pipes: it collects stdout and stderr, and feeds stdin.

    It keeps the first ``max_output`` bytes and calls ``on_limit`` once when there are more. It owns the three
    descriptors (host ends). ``close`` may be called twice.
    """

    def __init__(
        self, stdin: tuple[int, bytes] | None, stdout: int, stderr: int, max_output: int, on_limit: Callable[[], None]
    ) -> None:
        """Start to pump on the running event loop.

        Args:
            stdin: a descriptor and the bytes to write to it; None feeds nothing.
            stdout: descriptor to read.
            stderr: descriptor to read.
            max_output: bytes to keep of stdout and stderr together.
            on_limit: called when they hold more.
        """
        self._loop = asyncio.get_running_loop()
        self._kept = {stdout: bytearray(), stderr: bytearray()}
        self._stdout, self._stderr = stdout, stderr
        self._left = max_output
        self._on_limit = on_limit
        self._readers = {stdout, stderr}
        self._stdin = -1
        self.limited = False
        for descriptor in self._readers:
            os.set_blocking(descriptor, False)
            self._loop.add_reader(descriptor, self._read, descriptor)
        if stdin is not None:
            self._stdin, data = stdin
            self._pending = memoryview(data)
            os.set_blocking(self._stdin, False)
            self._write()

    @property
    def stdout(self) -> bytes:
        return bytes(self._kept[self._stdout])

    @property
    def stderr(self) -> bytes:
        return bytes(self._kept[self._stderr])

    def drain(self) -> None:
        """Read what the pipes hold now, without waiting."""
        for descriptor in tuple(self._readers):
            while descriptor in self._readers and self._read(descriptor):
                pass

    def close(self) -> None:
        for descriptor in tuple(self._readers):
            self._end(descriptor)
        self._end_stdin()

    def _read(self, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end(descriptor)
            return False
        self._kept[descriptor] += data[: self._left]
        if len(data) > self._left:
            self.limited = True
            for reader in tuple(self._readers):
                self._end(reader)
            self._on_limit()
            return False
        self._left -= len(data)
        return True

    def _end(self, descriptor: int) -> None:
        if descriptor in self._readers:
            self._readers.discard(descriptor)
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

    def _write(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._stdin, self._pending[:_CHUNK]) :]
        except BlockingIOError:
            self._loop.add_writer(self._stdin, self._write)
            return
        except OSError:
            pass  # The reader has gone: what a process does not read is its own business.
        self._end_stdin()

    def _end_stdin(self) -> None:
        if self._stdin >= 0:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1


async def readable(descriptor: int, timeout: float) -> bool:
    """Wait until a descriptor can be read, and return False when ``timeout`` seconds have passed.

    The descriptor must stay open meanwhile.
    """
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(descriptor, event.set)
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return False
    else:
        return True
    finally:
        loop.remove_reader(descriptor)
