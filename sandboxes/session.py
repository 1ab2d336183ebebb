"""A session in a sandbox that somebody holds for it: a private /work, opened at first use."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from areal_agents.errors import SandboxError
from areal_agents.sandbox import ExecResult, ExecStatus, Process, SandboxSpec, check_call
from areal_agents.sandboxes import launch
from areal_agents.sandboxes.sandbox_process import Finished
from areal_agents.sandboxes.work_files import BAD_ARCHIVE

FILE_TIMEOUT: Final = 30.0
MAX_PATH: Final = 4096


def inside_work(path: str) -> str:
    """Return ``path`` relative to /work.

    Raises ValueError for ``..``, an absolute path elsewhere, or no file name.
    """
    path.encode()  # UnicodeEncodeError is a ValueError
    parts = path.split("/")
    if path.startswith("/"):
        if parts[1] != "work":
            raise ValueError(f"{path!r} is outside /work; use a relative path or one below /work.")
        parts = parts[2:]
    if ".." in parts or "\0" in path or len(path) > MAX_PATH:
        raise ValueError(f"{path[:200]!r} is not allowed: no '..', no NUL, at most {MAX_PATH} characters.")
    relative = "/".join(part for part in parts if part not in ("", "."))
    if not relative:
        raise ValueError(f"{path!r} names /work itself, not a file in it.")
    return relative


class Held(Protocol):
    """A started sandbox: bubblewrap's ``Holder``, docker's ``Container``."""

    limits: Mapping[str, int]

    async def run(
        self, request: dict[str, Any], *, stdin: bytes | None, timeout: float, max_output: int, seekable: bool = False
    ) -> Finished: ...
    async def spawn(self, request: dict[str, Any]) -> Process: ...
    async def close(self) -> None: ...


HeldT = TypeVar("HeldT", bound=Held)


class HeldSession(Generic[HeldT]):
    """A session whose calls run one after the other.

    Implements ``areal_agents.sandbox.Sandbox``.

    A session whose sandbox died (code filled its memory until the kernel took pid 1) has lost its files. The call under
    way reports ``oom``, later ones raise SandboxError.
    """

    def __init__(self, spec: SandboxSpec, acquire: Callable[[SandboxSpec], Awaitable[HeldT]]) -> None:
        self._spec = spec
        self._acquire = acquire
        self._opening = asyncio.Lock()
        self._holder: HeldT | None = None
        self._closed = False

    @classmethod
    def of(cls, held: HeldT, spec: SandboxSpec) -> HeldSession[HeldT]:
        """Make a session of a sandbox that has been started."""

        async def acquire(spec: SandboxSpec) -> HeldT:
            return held

        return cls(spec, acquire)

    async def _open(self) -> HeldT:
        async with self._opening:
            if self._closed:
                raise SandboxError("the session is closed. Open a new one.")
            if self._holder is None:
                self._holder = await self._acquire(self._spec)
            return self._holder

    async def exec(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float, max_output: int = 1 << 20
    ) -> ExecResult:
        """Run a program in /work until it and all its descendants are gone.

        Args:
            argv: the program and its arguments.
            stdin: the bytes that the program reads.
            timeout: seconds until everything is killed.
            max_output: bytes of stdout and stderr together, beyond which everything is killed.

        Returns:
            How it ended. Status ``timeout`` also stands for the CPU limit, and ``oom`` for any process of the session
            that the kernel killed for memory meanwhile. A program that cannot be started is an ``error`` with exit code
            126 or 127, as in a shell.

        Raises:
            SandboxError: when the sandbox failed.
            ConfigError: for a timeout or a limit that is none.
        """
        check_call(timeout, max_output)
        holder = await self._open()
        request = self._request(holder, argv)
        finished = await holder.run(request, stdin=stdin, timeout=timeout, max_output=max_output)
        return ExecResult(
            status=_status(finished),
            exit_code=finished.code,
            stdout=finished.stdout,
            stderr=finished.stderr,
            seconds=finished.seconds,
        )

    async def spawn(self, argv: Sequence[str]) -> Process:
        """Start a process that lives across ``exec`` calls, until it is killed or the session closes."""
        holder = await self._open()
        return await holder.spawn(self._request(holder, argv))

    def _request(self, holder: HeldT, argv: Sequence[str]) -> dict[str, Any]:
        if not argv or isinstance(argv, str):
            raise ValueError(f"argv must be a non-empty sequence of strings, got {argv!r}.")
        return {"op": "exec", "argv": list(argv), "env": launch.ENVIRONMENT, "limits": dict(holder.limits)}

    async def write_file(self, path: str, data: bytes) -> None:
        """Write ``data`` to ``path`` below /work, making folders.

        Raises ValueError for a path outside /work, OSError for what its file system says (ENOSPC, ELOOP for a symlink).
        """
        await self._files({"op": "write", "path": inside_work(path)}, path, stdin=data)

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Return the content of a regular file below /work.

        Raises ValueError for a path outside /work, FileNotFoundError where there is none, and OSError otherwise: EFBIG
        above ``max_bytes``, ELOOP or ENOTDIR for a symlink on the way, EINVAL for a pipe.
        """
        request = {"op": "read", "path": inside_work(path), "max_bytes": max_bytes}
        return await self._files(request, path, max_output=max_bytes)

    async def snapshot(self) -> bytes:
        """Return a tar of the regular files and folders below /work.

        Links, pipes and sockets are left out.
        """
        return await self._files({"op": "pack"}, "/work", max_output=self._archive_limit)

    async def restore(self, data: bytes) -> None:
        """Replace /work by a ``snapshot``, and empty /tmp and /dev/shm.

        Raises ValueError for links, devices, ``..`` or no tar, and OSError where /work is full.
        """
        if len(data) > self._archive_limit:
            raise ValueError(f"a snapshot of {len(data)} bytes is over the limit of {self._archive_limit}.")
        await self._files({"op": "unpack"}, "/work", stdin=data, seekable=True)

    @property
    def _archive_limit(self) -> int:
        return 2 * self._spec.disk + (1 << 20)

    async def _files(
        self,
        request: dict[str, Any],
        path: str,
        *,
        stdin: bytes = b"",
        max_output: int = 1 << 16,
        seekable: bool = False,
    ) -> bytes:
        holder = await self._open()
        slack = 1 << 12  # for the message of a refused archive
        finished = await holder.run(
            request, stdin=stdin, timeout=FILE_TIMEOUT, max_output=max_output + slack, seekable=seekable
        )
        if finished.cause == "output_limit":
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        if finished.cause != "exit" or finished.code is None:
            raise SandboxError(f"{request['op']} of {path!r} failed: {finished.cause}. Open a new session.")
        if finished.code == BAD_ARCHIVE:
            raise ValueError(f"not a valid snapshot: {finished.stderr.decode('utf-8', 'replace')}")
        if finished.code:
            code = finished.code if finished.code > 0 else errno.ENOMEM
            raise OSError(code, os.strerror(code), path)
        if len(finished.stdout) > max_output:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
        return finished.stdout

    async def close(self) -> None:
        """End everything inside and forget /work.

        May be called twice.
        """
        async with self._opening:
            self._closed = True
            holder, self._holder = self._holder, None
        if holder is not None:
            await holder.close()


class Closable(Protocol):
    async def close(self) -> None: ...


SessionT = TypeVar("SessionT", bound=Closable)


class OpenSessions:
    """The sessions of a backend that nobody has closed yet."""

    def __init__(self) -> None:
        self._open: set[Closable] = set()

    @contextlib.asynccontextmanager
    async def opened(self, session: SessionT) -> AsyncIterator[SessionT]:
        """Yield a session, and close it at the end."""
        self._open.add(session)
        try:
            yield session
        finally:
            self._open.discard(session)
            await session.close()

    async def aclose(self) -> None:
        """Close all that are open. Their own ends may follow."""
        await asyncio.gather(*(session.close() for session in tuple(self._open)))


def _status(finished: Finished) -> ExecStatus:
    if finished.cause in ("timeout", "output_limit"):
        return "timeout" if finished.cause == "timeout" else "output_limit"
    if finished.oom:
        return "oom"
    if finished.cause == "lost":
        raise SandboxError("the sandbox died during the call; its files are gone. Open a new session.")
    if finished.code == -signal.SIGXCPU:
        return "timeout"
    return "ok" if finished.code == 0 else "error"
