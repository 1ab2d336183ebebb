"""The ``python`` tool, whose code runs as a process of its own inside the episode's sandbox."""

from __future__ import annotations

import re
import signal

from areal_agents.sandbox import ExecResult, Sandbox
from areal_agents.tool import ToolResult, tool

CODE_TIMEOUT_S = 5.0
MAX_CODE_BYTES = 64 << 10
MAX_OUTPUT_BYTES = 128 << 10
"""Room for the traceback of an endless recursion, which has a thousand frames, after what was printed."""
_RUN = ("/bin/sh", "-c", "exec python3 -I -u -X utf8 - 2>&1")
"""``python3``: the sandbox's own, found by PATH. ``-I``: no user site, no PYTHON* variables, /work not on the path.
``-u``: what was printed is seen also when the process is killed. ``-X utf8``: also where the locale is not known.
``-``: the code comes through stdin. ``2>&1``: warnings, logs and errors stand where they were printed."""
_FRAMES = 2
"""Frames of a traceback that are shown: the last ones of the code itself, and the last ones."""
_EXCEPTION = re.compile(r'(Traceback \(most recent call last\):|^  File "<stdin>", line \d+)$', re.MULTILINE)
_PACKAGES = re.compile(r'^([ |]*  File ")/[^"]*/lib/python3(?:\.\d+t?)?/(?:(?:site|dist)-packages/)?', re.MULTILINE)
"""The folder of a frame's file, up to where a package's own begin. A bar leads the lines of an exception group."""


# The tool's own limit is wider than the code's: opening a sandbox on a busy machine must not cost the model reward.
@tool(timeout=60, max_output_chars=2000)
async def python(code: str, *, sandbox: Sandbox) -> ToolResult:
    """Run Python code and see what it prints."""
    # Half a surrogate pair is legal JSON and no UTF-8: as an escape it stays what it is inside a literal.
    source = code.encode(errors="backslashreplace")
    if len(source) > MAX_CODE_BYTES:
        return ToolResult(f"error: the code has {len(source)} bytes, more than {MAX_CODE_BYTES}", "error")
    if b"\0" in source:
        return ToolResult("error: the code has a NUL character, which Python does not read", "error")
    done = await sandbox.exec(_RUN, stdin=source, timeout=CODE_TIMEOUT_S, max_output=MAX_OUTPUT_BYTES)
    return describe(done)


def describe(done: ExecResult) -> ToolResult:
    """Describe a finished run for the model: what it printed, and what went wrong."""
    streams = (stream.decode(errors="replace").strip("\n") for stream in (done.stdout, done.stderr))
    printed = "\n".join(stream for stream in streams if stream)
    printed = shorten_tracebacks(printed)
    if done.status == "ok":
        return ToolResult(printed or "(no output; use print)")
    text = "\n".join(part for part in (printed, _reason(done, printed)) if part)
    return ToolResult(text, "timeout" if done.status == "timeout" else "error", done.status == "output_limit")


def _reason(done: ExecResult, printed: str) -> str:
    """Say why a run did not end well, where what it printed does not."""
    if done.status == "timeout":
        # Killed from outside, it has no exit code; the kernel's limit of its CPU time ends it by a signal.
        on_cpu = done.exit_code is not None
        return "error: stopped at the limit of CPU time" if on_cpu else f"error: stopped after {CODE_TIMEOUT_S:g} s"
    if done.status == "oom":
        return "error: out of memory"
    if done.status == "output_limit":
        return f"error: stopped after {MAX_OUTPUT_BYTES} bytes of output"
    code = done.exit_code
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"error: killed by {name}"
    # What Python prints of an exception that nobody caught says enough.
    return "" if code == 1 and _EXCEPTION.search(printed) else f"error: exit code {code}"


def shorten_tracebacks(text: str) -> str:
    """Leave out the middle of long tracebacks, and the folders that packages are installed in.

    The last frames of the code itself stay, and the last frames.
    """
    kept: list[str] = []
    frames: list[list[str]] = []
    inside = False
    for line in _PACKAGES.sub(r"\1", text).split("\n"):
        if inside and line.startswith("  "):
            if not line.strip(" ~^"):
                continue  # it underlines the line before
            if line.startswith('  File "') or not frames:
                frames.append([])
            frames[-1].append(line)
            continue
        kept += _some(frames)
        frames, inside = [], line.endswith("Traceback (most recent call last):")
        kept.append(line)
    return "\n".join(kept + _some(frames))


def _some(frames: list[list[str]]) -> list[str]:
    own = [number for number, frame in enumerate(frames) if frame[0].startswith('  File "<stdin>"')]
    shown = sorted({*own[-_FRAMES:], *range(len(frames))[-_FRAMES:]})
    lines: list[str] = []
    for before, number in zip((-1, *shown), shown, strict=False):
        lines += (["  ..."] if number > before + 1 else []) + frames[number]
    return lines
