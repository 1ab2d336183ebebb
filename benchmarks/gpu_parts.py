"""Parts of a benchmark that may fail: each in a process of its own, with a time limit, its rows kept as they come.

    found = run(Part("attention", "gpu_attention.py", 120), options, seconds=120)     # in the parent: never raises
    main(rows)                                                                        # in the part's script

A part writes one JSON object a line to its standard output; what it prints besides goes to standard error. A part that
raises, dies, or is killed at its limit leaves the rows that it had, and the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from measured_process import TAIL, tree

HERE = Path(__file__).resolve().parent
Row = dict[str, Any]
ROOM = 16 << 30
"""Bytes for the folders of all models of a part."""


@dataclass(frozen=True)
class Settings:
    """What every part is told."""

    device: str
    """``cuda`` or ``cpu``."""
    tiny: bool
    """Models of some 0.1M parameters and short packs: shows that the part runs, and measures nothing."""
    quick: bool
    """Fewer models and sizes."""


@dataclass(frozen=True)
class Part:
    """A script of this folder, and the most seconds that it may take."""

    name: str
    script: str
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a part gave."""

    name: str
    status: str
    """``done``, ``failed`` or ``timed out``."""
    reason: str
    """Empty where it is done."""
    seconds: float
    rows: list[Row]


def run(part: Part, settings: Settings, *, seconds: float) -> Outcome:
    """Run ``part`` for at most ``seconds``, print its rows as they come, and leave no process behind."""
    command = [sys.executable, str(HERE / part.script), "--device", settings.device]
    command += ["--tiny"] * settings.tiny + ["--quick"] * settings.quick
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    start, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryFile("w+", errors="replace") as stderr, _scratch() as scratch:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
            env=os.environ | {"PYTHONPATH": path, "TMPDIR": scratch},
        )  # fmt: skip
        assert process.stdout is not None
        reader = threading.Thread(target=_read, args=(part.name, process.stdout, rows), daemon=True)
        reader.start()
        try:
            process.wait(seconds)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
        reader.join()
        process.stdout.close()
        stderr.seek(0)
        tail = "".join(stderr.readlines()[-TAIL:]).strip()
    found = [row for row in rows if not row.keys() & {"end", "error"}]
    reason = next((str(row["error"]) for row in rows if "error" in row), "")
    if late:
        status, reason = "timed out", f"it did not end within {seconds:.0f} s"
    elif reason or process.returncode or {"end": True} not in rows:
        status = "failed"
        reason = reason or f"it ended with {ending(process.returncode)}"
        reason += f"\n{tail}" if tail else ""
    else:
        status = "done"
    return Outcome(part.name, status, reason, round(time.monotonic() - start, 1), found)


def main(measure: Callable[[Settings], Iterator[Row]]) -> None:
    """Be a part: write what ``measure`` yields, then that it came to its end, or why it did not."""
    parser = argparse.ArgumentParser(description="A part of gpu.py, which starts it.")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--quick", action="store_true")
    settings = Settings(**vars(parser.parse_args()))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(row: Row) -> None:
        out.write(json.dumps(row) + "\n")
        out.flush()

    try:
        for row in measure(settings):
            write(row)
    except Exception as error:  # noqa: BLE001  boundary: the parent records it and goes on
        import traceback

        traceback.print_exc()
        write({"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from None
    write({"end": True})


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for a part's files, in memory where that has room: it goes with a part that is killed, too."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > ROOM
    return tempfile.TemporaryDirectory(prefix="areal-gpu-", dir=memory if roomy else None)


def _read(name: str, lines: IO[str], rows: list[Row]) -> None:
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was killed
            rows.append(json.loads(line))
            if not rows[-1].keys() & {"end", "error"}:
                print(f"{name}: {json.dumps(rows[-1])}", flush=True)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill ``process`` and all that it started."""
    for member in tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def is_attention(kernel: str) -> bool:
    """Whether a kernel or operation of this name computes attention, or the softmax of one that stores its scores."""
    return any(mark in kernel.lower() for mark in ("flash", "fmha", "attention", "softmax", "cudnn"))


def ending(code: int | None) -> str:
    """Return in words how a process ended."""
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"code {code}"
