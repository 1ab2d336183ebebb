"""The ``python`` tool, whose code runs as a process of its own inside the episode's sandbox."""

from __future__ import annotations

from areal_agents.sandbox import ExecResult, Sandbox
from areal_agents.tool import ToolResult, tool

CODE_TIMEOUT_S = 5.0
MAX_CODE_BYTES = 64 << 10
MAX_OUTPUT_BYTES = 64 << 10
_INTERPRETER = ("/usr/bin/python3", "-I", "-")
"""``-I``: no user site, no PYTHON* variables, /work not on the path. ``-``: the code comes through stdin."""
_TRACEBACK_LINES = 3


# The tool's own limit is wider than the code's: opening a sandbox on a busy machine must not cost the model reward.
@tool(timeout=60, max_output_chars=2000)
async def python(code: str, *, sandbox: Sandbox) -> ToolResult:
    """Run Python code and see what it prints."""
    source = code.encode(errors="replace")
    if len(source) > MAX_CODE_BYTES:
        return ToolResult(f"error: the code has {len(source)} bytes, more than {MAX_CODE_BYTES}", "error")
    done = await sandbox.exec(_INTERPRETER, stdin=source, timeout=CODE_TIMEOUT_S, max_output=MAX_OUTPUT_BYTES)
    return describe(done)


def describe(done: ExecResult) -> ToolResult:
    """Describe a finished run for the model: what it printed, and what went wrong."""
    stdout = done.stdout.decode(errors="replace").strip("\n")
    if done.status == "ok":
        return ToolResult(stdout or "(no output; use print)")
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    reason = {
        "timeout": f"error: stopped after {CODE_TIMEOUT_S:g} s",
        "oom": "error: out of memory",
        "output_limit": f"error: stopped after {MAX_OUTPUT_BYTES} bytes of output",
        "error": "" if lines else f"error: exit code {done.exit_code}",
    }[done.status]
    tail = "\n".join(lines[-_TRACEBACK_LINES:])
    text = "\n".join(part for part in (stdout, tail, reason) if part)
    return ToolResult(text, "timeout" if done.status == "timeout" else "error", done.status == "output_limit")
