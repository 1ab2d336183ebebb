"""The backend that a check is about, and what checks and attacks share: how they run code inside, and how they fail."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final

from areal_agents.errors import SandboxError
from areal_agents.sandbox import ExecResult, Sandbox, SandboxBackend, SandboxSpec

SPEC: Final = SandboxSpec(memory=512 << 20, disk=16 << 20)
"""What sessions get where a check does not say otherwise."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A backend under test, with the way to make another one like it."""

    backend: SandboxBackend
    make: Callable[[], SandboxBackend]
    memory_bound: str = ""
    """How its own probe says that memory is bounded."""

    def session(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        return self.backend.session(spec)


Check = Callable[[Subject], Coroutine[Any, Any, None]]


class NotTried(Exception):
    """The control of an attack failed: it did not do what it is for, so nothing is known."""


class NotContained(Exception):
    """An attack did what it must not do."""


def tried(control: object, seen: object) -> None:
    """Raise NotTried unless the control holds."""
    if not control:
        raise NotTried(f"the attack did not run: {_shown(seen)}")


def held(contained: object, seen: object) -> None:
    """Raise NotContained unless it was held back."""
    if not contained:
        raise NotContained(_shown(seen))


def _shown(seen: object) -> str:
    """Write what was seen without its control characters: it may come from inside."""
    return repr(seen)[1:-1][:600] if isinstance(seen, str) else repr(seen)[:600]


async def run(sandbox: Sandbox, code: str, *args: str, stdin: bytes = b"", timeout: float = 30) -> ExecResult:
    """Run Python inside."""
    return await sandbox.exec(["python3", "-I", "-c", code, *args], stdin=stdin, timeout=timeout)


async def value(sandbox: Sandbox, code: str, *args: str) -> Any:
    """Return what Python inside printed as JSON. Raises AssertionError where it did not end well."""
    result = await run(sandbox, code, *args)
    if result.status != "ok":
        raise AssertionError(result)
    return json.loads(result.stdout)


async def raised(awaitable: Awaitable[object]) -> BaseException:
    """Return the error of a call that must fail. Raises AssertionError where it does not."""
    try:
        await awaitable
    except (OSError, ValueError, SandboxError) as error:
        return error
    raise AssertionError("nothing was raised")
