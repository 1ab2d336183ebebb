"""What every benchmark records: the commit, the machine, all raw samples, and each goal with whether it holds."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Check:
    """One goal. ``reason`` says why, where it does not hold."""

    name: str
    value: Any
    goal: str
    holds: bool
    reason: str = ""


def commit() -> str:
    """Return the checked-out commit, marked where the tree differs from it, or why it is not known.

    Records are no part of what is measured: one that was written just now makes no difference.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        head, dirty = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError) as error:  # a copy of the tree on a lent machine
        return f"unknown: {error}"
    return head + ("+changes" if dirty else "")


def save(path: Path, row: Any, *, indent: int | None = None) -> None:
    """Write JSON, whole or not at all: whoever is killed while it writes leaves what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(row, indent=indent) + "\n")
    part.replace(path)


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
    }


class Kept:
    """The finished parts of a long benchmark, beside the record that ``path`` will be: one that is cut goes on.

    settings: what the parts depend on besides commit and machine; parts of others are not taken.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self._path = None if path is None else path.with_suffix(".partial.json")
        self._of = json.loads(json.dumps({"commit": commit(), "machine": machine(), **settings}))
        self._parts: dict[str, Any] = {}
        if self._path is not None and self._path.exists():
            saved = json.loads(self._path.read_text())
            if saved["of"] == self._of:
                self._parts = saved["parts"]
                print(f"going on with {', '.join(self._parts)} of {self._path}")

    def has(self, name: str) -> bool:
        """Whether a part is there already."""
        return name in self._parts

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """What ``work()`` returned, now or before this run was cut."""
        if name not in self._parts:
            self._parts[name] = work()
            if self._path is not None:
                save(self._path, {"of": self._of, "parts": self._parts})
        return self._parts[name]

    def end(self) -> None:
        """The record is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def write(path: Path | None, name: str, samples: list[Any], checks: list[Check], **more: Any) -> None:
    """Print the checks; write the record where ``path`` is given. ``more``: further JSON-able parts of the record."""
    for check in checks:
        print(
            f"{'holds' if check.holds else 'MISSED'}  {check.name}: {check.value}  (goal: {check.goal}) {check.reason}"
        )
    if path is not None:
        row = {
            "benchmark": name, "commit": commit(), "machine": machine(), "samples": samples,
            "checks": [asdict(c) for c in checks], **more,
        }  # fmt: skip
        save(path, row, indent=2)
        print(f"written: {path}")
