"""Plain subprocesses in a temporary folder, for code you wrote yourself. NO ISOLATION.

There are rlimits for each process, a scrubbed environment, a deadline, bounded output, and a folder of its own that is
removed at the end.

What it does not do:

* It does not hide the host's files, processes, network or kernel.
* It does not bound the memory or the disk of a session.
* It does not stop a process that left its process group (a daemon outlives the call).

The code runs with the rights of the caller. No backend falls back to this one: it must be named.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandbox import (
    ExecResult,
    ExecStatus,
    Probe,
    ProbeReport,
    Process,
    Sandbox,
    SandboxSpec,
    check_call,
)
from areal_agents.sandboxes import interpreter, launch, pipes, probes, work_files
from areal_agents.sandboxes.interactive_process import LiveProcess
from areal_agents.sandboxes.session import OpenSessions, inside_work

_PRLIMIT: Final = "/usr/bin/prlimit"
STACK: Final = 9 << 20
"""Address space that a thread's stack and guard page reserve, with room for what libraries add."""


class UnsafeLocalBackend:
    """A backend without isolation, as the module's docstring says.

    Its name says so too, and it is used only when it is named.
    """

    name = "unsafe_local"

    def __init__(self, *, python: str = interpreter.SYSTEM) -> None:
        """Take what ``python3`` is for the code: an environment's folder, or an interpreter."""
        self._python = python
        self._sessions = OpenSessions()

    async def probe(self) -> ProbeReport:
        """Check that the limits can be set and that the Python starts.

        Proves nothing about isolation, of which there is none.
        """
        if not os.access(_PRLIMIT, os.X_OK):
            raise SandboxUnavailable(self.name, f"{_PRLIMIT} was not found", "Install it: apt-get install util-linux.")
        python = interpreter.find(self._python, self.name, mounted=False)
        async with self.session(SandboxSpec()) as session:
            started = await probes.python_starts(self.name, session, python)
        limits = Probe("limits", True, _PRLIMIT)
        return ProbeReport(self.name, (limits, started), "rlimits", ("No isolation of any kind.",))

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """Open a session with a temporary folder, made at its first call and removed at its end.

        Raises ConfigError for a spec that names an image.
        """
        spec.refuse_image(self.name)
        search_path = interpreter.find(self._python, self.name, mounted=False).search_path
        return self._sessions.opened(UnsafeLocalSession(spec, search_path))

    async def aclose(self) -> None:
        """End open sessions."""
        await self._sessions.aclose()


class UnsafeLocalSession:
    """A session of plain subprocesses in a folder of its own.

    Implements ``areal_agents.sandbox.Sandbox``. ``/work`` in the path of a file call means its folder.
    """

    def __init__(self, spec: SandboxSpec, search_path: str) -> None:
        self._spec, self._search_path = spec, search_path
        self._lock = asyncio.Lock()
        self._folder: Path | None = None
        self._live: set[LiveProcess] = set()
        self._closed = False

    def _work(self) -> Path:
        if self._closed:
            raise SandboxError("the session is closed. Open a new one.")
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="areal-agents-unsafe-"))
        return self._folder

    def _start(self, argv: Sequence[str], stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
        folder, spec = str(self._work()), self._spec
        limits = [
            f"--cpu={spec.cpu_seconds}:{spec.cpu_seconds + 1}",
            f"--as={max(2 * spec.memory, 1 << 30) + spec.processes * STACK}",
            f"--fsize={spec.disk}",
            f"--nofile={spec.open_files}",
            "--core=0",
        ]
        return subprocess.Popen(
            [_PRLIMIT, *limits, "--", *argv],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env={**launch.ENVIRONMENT, "PATH": self._search_path, "HOME": folder},
            start_new_session=True,
        )

    async def exec(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float, max_output: int = 1 << 20
    ) -> ExecResult:
        """Run a program in the session's folder.

        Its process group is dead afterwards.

        Args:
            argv: the program and its arguments.
            stdin: the bytes that the program reads.
            timeout: seconds until the process group is killed.
            max_output: bytes of stdout and stderr together, beyond which it is killed.

        Returns:
            How it ended. Status ``timeout`` also stands for the CPU limit.

        Raises:
            SandboxError: when the host cannot start a process.
            ConfigError: for a timeout or a limit that is none.
        """
        check_call(timeout, max_output)
        _check_argv(argv)
        async with self._lock:
            start, fds = time.monotonic(), pipes.Fds()
            try:
                source, sink = fds.pipe()
                out, err = fds.pipe(), fds.pipe()
                process = self._start(argv, source, out[1], err[1])
                for descriptor in (sink, out[0], err[0]):
                    fds.take(descriptor)
            except (OSError, ValueError) as error:
                # A NUL, a lone surrogate or too long an argument is the caller's program, not the host's failure.
                if isinstance(error, ValueError) or error.errno == errno.E2BIG:
                    text = f"{argv[0][:200]}: {error}\n".encode("utf-8", "replace")
                    return ExecResult("error", 126, b"", text, time.monotonic() - start)
                raise SandboxError(f"cannot start a process: {error}") from error
            finally:
                fds.close()
            pump = pipes.Pump((sink, stdin), out[0], err[0], max_output, lambda: _kill_group(process))
            try:
                timed_out = not await _exited(process, timeout)
                _kill_group(process)
                code = process.wait()
                pump.drain()
            finally:
                _kill_group(process)
                process.wait()
                pump.close()
            status: ExecStatus = "ok" if code == 0 else "timeout" if code == -signal.SIGXCPU else "error"
            if pump.limited or timed_out:
                status = "output_limit" if pump.limited else "timeout"
            ended_here = pump.limited or timed_out
            seconds = time.monotonic() - start
            return ExecResult(status, None if ended_here else code, pump.stdout, pump.stderr, seconds)

    async def spawn(self, argv: Sequence[str]) -> Process:
        """Start a process that lives until it is killed or the session closes.

        Raises OSError and ValueError.
        """
        _check_argv(argv)
        fds = pipes.Fds()
        try:
            source, sink = fds.pipe()
            out, write = fds.pipe()
            process = self._start(argv, source, write, write)
            fds.take(sink)
            fds.take(out)
        finally:
            fds.close()

        async def end() -> None:
            _kill_group(process)
            process.wait()
            self._live.discard(live)

        live = LiveProcess(sink, out, end)
        self._live.add(live)
        return live

    async def write_file(self, path: str, data: bytes) -> None:
        """Write a file below the folder, and follow no symlink.

        Raises ValueError and OSError.
        """
        relative = inside_work(path)
        await self._files(lambda root: work_files.write_file(root, relative, io.BytesIO(data)))

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        """Read a regular file below the folder.

        Raises ValueError and OSError (EFBIG, ELOOP, ENOTDIR, EINVAL).
        """
        relative, sink = inside_work(path), io.BytesIO()
        await self._files(lambda root: work_files.read_file(root, relative, max_bytes, sink))
        return sink.getvalue()

    async def snapshot(self) -> bytes:
        """Return a tar of the regular files and folders."""
        sink = io.BytesIO()
        await self._files(lambda root: work_files.pack(root, sink))
        return sink.getvalue()

    async def restore(self, data: bytes) -> None:
        """Replace the folder's content by a ``snapshot``.

        Raises ValueError for links, devices, ``..`` or no tar.
        """
        await self._files(lambda root: work_files.unpack(root, io.BytesIO(data)))

    async def _files(self, operation: Callable[[int], Any]) -> None:
        async with self._lock:
            root = os.open(self._work(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                await asyncio.to_thread(operation, root)
            finally:
                os.close(root)

    async def close(self) -> None:
        """Kill live processes and remove the folder."""
        self._closed = True
        for live in tuple(self._live):
            await live.kill()
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
            self._folder = None


def _check_argv(argv: Sequence[str]) -> None:
    if not argv or isinstance(argv, str):
        raise ValueError(f"argv must be a non-empty sequence of strings, got {argv!r}.")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # else the number may be another's by now
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


async def _exited(process: subprocess.Popen[bytes], timeout: float) -> bool:
    descriptor = os.pidfd_open(process.pid)
    try:
        return await pipes.readable(descriptor, timeout)
    finally:
        os.close(descriptor)
