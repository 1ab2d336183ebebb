"""The sandbox of a tool that acts on the episode.

Such a tool cannot be run again where its sandbox is lost: it would act twice. So not the call is repeated but what it
did in the sandbox.

    operation ─▶ done ─▶ kept, for the session that comes after
              └▶ SandboxError ─▶ a fresh session with what was kept ─▶ once more ─▶ done
                                                                            └▶ SandboxError ─▶ this one breaks it
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_agents.errors import SandboxError
from areal_agents.sandbox import ExecResult, Process, Sandbox
from areal_agents.tool import ToolError

BROKE = "error: this call made the sandbox fail twice; do something else"
"""What the model sees of a call that breaks its sandbox."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a method of ``Sandbox``."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    async def run(self, sandbox: Sandbox) -> Any:
        """Do it in ``sandbox``."""
        return await getattr(sandbox, self.method)(*self.args, **self.kwargs)


class RepairedSandbox:
    """A ``Sandbox`` that outlives its session, for one call of a tool."""

    def __init__(
        self, current: Callable[[], Sandbox], restore: Callable[[], Awaitable[None]], kept: Callable[[Operation], None]
    ) -> None:
        """Take what the call needs.

        ``restore`` makes a fresh session ``current``. ``kept`` is told of every operation that must be done again in
        one.
        """
        self._current, self._restore, self._kept = current, restore, kept
        self.repairs = 0
        """Sessions that were lost under the call."""
        self.broke = False
        """Whether an operation of the call breaks every sandbox."""

    async def exec(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float, max_output: int = 1 << 20
    ) -> ExecResult:
        limits = {"stdin": stdin, "timeout": timeout, "max_output": max_output}
        done: ExecResult = await self._do(Operation("exec", (tuple(argv),), limits))
        return done

    async def spawn(self, argv: Sequence[str]) -> Process:
        process: Process = await self._do(Operation("spawn", (tuple(argv),), {}))
        return process

    async def write_file(self, path: str, data: bytes) -> None:
        await self._do(Operation("write_file", (path, data), {}))

    async def read_file(self, path: str, max_bytes: int) -> bytes:
        data: bytes = await self._do(Operation("read_file", (path, max_bytes), {}), keep=False)
        return data

    async def snapshot(self) -> bytes:
        data: bytes = await self._do(Operation("snapshot", (), {}), keep=False)
        return data

    async def restore(self, data: bytes) -> None:
        await self._do(Operation("restore", (data,), {}))

    async def _do(self, operation: Operation, *, keep: bool = True) -> Any:
        try:
            result = await operation.run(self._current())
        except SandboxError:
            self.repairs += 1
            await self._restore()
            try:
                result = await operation.run(self._current())
            except SandboxError as error:
                await self._restore()  # where this succeeds, the operation is what breaks the sandbox
                self.broke = True
                raise ToolError(BROKE) from error
        if keep:
            self._kept(operation)
        return result
