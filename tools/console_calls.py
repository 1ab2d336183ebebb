"""What the tools ``bash`` and ``python_repl`` share: a console of the session, and what its calls look like."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

from areal_agents.errors import SandboxError
from areal_agents.sandbox import CallResult, Console, ConsoleKind, Sandbox, open_console
from areal_agents.tool import ToolResult
from areal_agents.tool_resources import Resources

MAX_CODE_BYTES: Final = 64 << 10
MAX_OUTPUT_BYTES: Final = 128 << 10
START_S: Final = 90.0
"""Seconds that a call may take beyond its code's own: opening a sandbox on a busy machine must not cost reward."""


async def call_console(
    kind: ConsoleKind, code: str, *, sandbox: Sandbox, resources: Resources, seconds: float, background: bool = False
) -> ToolResult:
    """Run code in the session's console, which its first call opens.

    Args:
        kind: which console.
        code: what the model wrote.
        sandbox: the session. A fresh one has a fresh console.
        resources: keeps the console until the episode ends.
        seconds: until the code is interrupted.
        background: what a shell's call left running goes on.
    """
    # Half a surrogate pair is legal JSON and no UTF-8: as an escape it stays what it is inside a Python literal.
    code = code.encode(errors="backslashreplace").decode()
    if len(code.encode()) > MAX_CODE_BYTES:
        return ToolResult(f"error: the code has more than {MAX_CODE_BYTES} bytes", "error")
    if "\0" in code:
        return ToolResult("error: the code has a NUL character", "error")

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[Console]:
        console = await open_console(sandbox, kind, background=background)
        try:
            yield console
        finally:
            with contextlib.suppress(SandboxError):  # the sandbox is gone, and the console with it
                await console.close()

    console = await resources.get((kind, background, sandbox), opened)
    done = await console.call(code, timeout=seconds, max_output=MAX_OUTPUT_BYTES)
    if done.state == "lost":
        # An interpreter that is gone may have ended by its own code. With its whole sandbox it did not: this raises.
        await sandbox.exec(("/bin/true",), timeout=START_S / 2)
    return describe_call(kind, done, seconds, background)


def describe_call(kind: ConsoleKind, done: CallResult, seconds: float, background: bool) -> ToolResult:
    """Describe a finished call for the model: what it printed, what went wrong, and what is left of its state."""
    printed = done.output.decode(errors="replace").strip("\n")
    lines = [printed] if printed else []
    if done.status == "timeout":
        lines.append(f"error: stopped after {seconds:g} s")
    elif done.status == "output_limit":
        lines.append(f"error: stopped after {MAX_OUTPUT_BYTES} bytes of output")
    elif done.status == "interrupted":
        lines.append("error: interrupted")
    elif done.status == "ended":
        how = f" by signal {-done.exit_code}" if done.exit_code is not None and done.exit_code < 0 else ""
        lines.append(f"the {'interpreter' if kind == 'python' else 'shell'} ended{how}")
    elif kind == "shell" and done.exit_code:
        lines.append(f"(exit code {done.exit_code})")
    if done.state == "lost":
        lines.append("(it starts anew with the next call: nothing but files is left)")
    elif done.state == "restored":
        lines.append("(what was before this call is there again)")
    if done.left:
        names = ", ".join(name[:80] for name in done.left[:10])
        lines.append(f"({'still running' if background else 'ended'}: {names})")
    text = "\n".join(lines) or ("(no output)" if done.status == "ok" else "error")
    if done.status == "ok":
        return ToolResult(text)
    return ToolResult(text, "timeout" if done.status == "timeout" else "error", done.status == "output_limit")
