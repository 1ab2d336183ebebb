"""Processes that carry a marker in their environment: what a program started, its grandchildren included."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

MARKER = "AREAL_TEST_MARKER"
"""Set this variable to a value of the test's own before starting a program; every descendant inherits it."""


def marked(value: str) -> list[int]:
    """Process ids, ours excluded, whose environment at their start holds ``value`` as any variable's value.

    Zombies are gone already: they hold nothing. A process that clears its environment (what runs inside a sandbox)
    escapes; look at its parents, which do not.
    """
    wanted = f"={value}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it ended meanwhile, or belongs to another user
            continue
        if state not in "ZX" and any(variable.endswith(wanted) for variable in environment.split(b"\0")):
            found.append(int(entry.name))
    return sorted(found)


def wait_marked(value: str, known: set[int], seconds: float = 30.0) -> list[int]:
    """Wait until ``marked(value)`` has processes besides ``known``; returns them, none after ``seconds``."""
    end = time.monotonic() + seconds
    while not (new := sorted(set(marked(value)) - known)) and time.monotonic() < end:
        time.sleep(0.01)
    return new


def descendants(pid: int) -> list[int]:
    """Every process below ``pid`` now, whatever its environment."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return sorted(found)


def alive(pid: int) -> bool:
    """Whether ``pid`` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float) -> list[int]:
    """Wait until none of ``pids`` runs; returns those that still do after ``seconds``."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def shared_memory_left(before: set[str], seconds: float) -> set[str]:
    """Wait until every file in /dev/shm that is not in ``before`` has a live user; return those that have none.

    A file that another test's process maps meanwhile is that test's; one that nobody maps was left behind, unless a
    resource tracker is about to remove it.
    """
    end = time.monotonic() + seconds
    while (left := set(os.listdir("/dev/shm")) - before - _mapped()) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _mapped() -> set[str]:
    """Names in /dev/shm that a live process maps."""
    found: set[str] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                lines = (entry / "maps").read_text(errors="replace").splitlines()
            except OSError:  # it ended meanwhile
                continue
            found |= {
                line.rpartition("/dev/shm/")[2].removesuffix(" (deleted)") for line in lines if "/dev/shm/" in line
            }
    return found


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look until ``condition()``, which something outside this loop makes true. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  no event of this loop tells
            await asyncio.sleep(0.01)
