"""A scripted sandbox for tests of the logic around it: it runs nothing. Real code runs only in the real backends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from areal_agents.errors import SandboxError
from areal_agents.sandbox import ExecResult, ProbeReport, Process, Sandbox, SandboxSpec

Script = Callable[[int, str], str | None]
"""(session number from 1, what to run) → what it prints, or None where the sandbox itself fails."""


class ScriptedBackend:
    name = "scripted"

    def __init__(self, script: Script = lambda session, code: code.upper()) -> None:
        self.script = script
        self.opened = 0
        self.closed = 0
        self.ran: list[tuple[int, str]] = []
        self.fails: set[tuple[int, str]] = set()
        """Session and code of what ends with an error status, as a program that cannot be started does."""

    async def probe(self) -> ProbeReport:
        return ProbeReport(self.name)

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        return self._session()

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Sandbox]:
        self.opened += 1
        try:
            yield ScriptedSandbox(self, self.opened)
        finally:
            self.closed += 1

    async def aclose(self) -> None: ...


class ScriptedSandbox:
    """``exec`` runs what comes through stdin, or else the last argument, by the backend's script."""

    def __init__(self, backend: ScriptedBackend, number: int) -> None:
        self._backend = backend
        self._number = number

    async def exec(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float, max_output: int = 1 << 20
    ) -> ExecResult:
        code = stdin.decode() or argv[-1]
        self._backend.ran.append((self._number, code))
        printed = self._backend.script(self._number, code)
        if printed is None:
            raise SandboxError(f"session {self._number} died")
        if (self._number, code) in self._backend.fails:
            return ExecResult("error", 127, b"", b"no such program", 0.0)
        return ExecResult("ok", 0, printed.encode(), b"", 0.0)

    async def spawn(self, argv: Sequence[str]) -> Process:
        raise NotImplementedError

    async def write_file(self, path: str, data: bytes) -> None:
        raise NotImplementedError

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        raise NotImplementedError

    async def snapshot(self) -> bytes:
        raise NotImplementedError

    async def restore(self, data: bytes) -> None:
        raise NotImplementedError
