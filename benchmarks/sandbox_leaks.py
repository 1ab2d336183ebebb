"""What many calls leave on the host: ``sandboxes.py`` counts it before and after them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from measured_process import pss_of
from sandbox_sides import SPEC, call_in

from areal_agents import sandboxes
from areal_agents.sandbox import SandboxBackend
from areal_agents.sandboxes import memory

WORKERS = 8
SUBREAPER = 36


def adopt_orphans() -> None:
    """Be the parent of processes whose own has died, so that none goes uncounted."""
    if ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def descendants() -> set[int]:
    """Return the processes below this one, without those that have ended."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit():
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in ("Z", "X"):
                    parents[int(name)] = int(fields[1])
    found, last = {os.getpid()}, set[int]()
    while found != last:
        last, found = found, found | {pid for pid, parent in parents.items() if parent in found}
    return found - {os.getpid()}


def idle_cgroups() -> set[str]:
    """Return cgroups of this process's sandboxes in which nothing runs.

    One that is being made or removed is none for long. Names with a slot's number are whoever's holds the slot: of
    those, the ones where this process makes its own.
    """
    own = re.compile(rf"areal-agents-(u{os.getpid()}-)?[0-9]+")
    bound = memory.detect()
    parent = bound.parent if isinstance(bound, memory.CgroupBound) else None
    if parent is None:
        return set()
    found: set[str] | None = None
    for _ in range(3):
        empty = set()
        for folder in parent.iterdir():
            with contextlib.suppress(OSError):
                if own.fullmatch(folder.name) and not (folder / "cgroup.procs").read_text().strip():
                    empty.add(str(folder))
        found = empty if found is None else found & empty
        time.sleep(0.1)
    return found or set()


def containers() -> int:
    """Count the containers that an engine has of this package."""
    import docker

    from areal_agents.sandboxes.docker_engine import LABEL

    client = docker.from_env()
    try:
        return len(client.containers.list(all=True, filters={"label": LABEL}, ignore_removed=True))
    finally:
        client.close()


def mounts() -> list[str]:
    """Return what is mounted where, but for what Docker engines on this machine make of their own meanwhile."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [f"{words[0]} {words[4]}" for words in lines if not re.search("docker|/overlay2/|/netns/", words[4])]


def left_behind(*, docker: bool) -> dict[str, Any]:
    """Count what a sandbox could leave on this host."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "processes": len(descendants()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mounts": mounts(),
        "cgroups": sorted(idle_cgroups()),
        "folders": len(os.listdir(tempfile.gettempdir())),
        "memory_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        **({"containers": containers()} if docker else {}),
    }


def grown(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Return how much more there is of each after than before. Names that went do not make up for others that came."""
    return {
        name: len(set(after[name]) - set(was)) if isinstance(was, list) else after[name] - was
        for name, was in before.items()
    }


def held() -> dict[str, int]:
    """Count what the processes below this one hold, as far as it may look into them: root may."""
    found = descendants()
    descriptors = memory = 0
    for pid in found:
        with contextlib.suppress(OSError):
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
            memory += pss_of(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return {"processes": len(found), "descriptors": descriptors, "memory_mib": memory >> 10}


async def steady() -> dict[str, int]:
    """Return what is held when nothing is being started or ended any more: when three looks agree."""
    looks = [held()]
    for _ in range(100):
        await asyncio.sleep(0.1)
        looks.append(held())
        if all(look["processes"] == looks[-1]["processes"] for look in looks[-3:]) and len(looks) > 2:
            break
    return looks[-1]


async def play(backend: SandboxBackend, count: int, renew: int) -> int:
    """Make calls, and return in how many sessions.

    Half of the workers keep one session for all their calls, the others open a new one for every ``renew`` calls.
    """
    left, opened = iter(range(count)), 0

    async def worker(*, keeps: bool) -> None:
        nonlocal opened
        call = next(left, None)
        while call is not None:
            opened += 1
            async with backend.session(SPEC) as sandbox:
                done = 0
                while call is not None and (keeps or done < renew):
                    await call_in(sandbox, "trivial")
                    done, call = done + 1, next(left, None)

    await asyncio.gather(*(worker(keeps=number % 2 == 1) for number in range(WORKERS)))
    return opened


async def leak_check(name: str, calls: int, renew: int) -> dict[str, Any]:
    """Make calls, and count what is left: when the backend has closed, and what it holds while it is open."""
    docker = name.partition("?")[0] == "docker"
    found: dict[str, Any] = {"calls": calls}
    with tempfile.TemporaryDirectory(prefix="areal-agents-leaks-") as folder:
        tempfile.tempdir = folder
        try:
            # The first time is to have everything loaded that is loaded once.
            for when, count in (("before", 2 * WORKERS), ("after", calls)):
                backend, start = sandboxes.get(name), time.monotonic()
                try:
                    await play(backend, 2 * WORKERS, renew)
                    found["open_before"] = await steady()
                    found["sessions"] = await play(backend, count, renew)
                    found["open_after"] = await steady()
                finally:
                    await backend.aclose()
                found["seconds"] = round(time.monotonic() - start, 1)
                found[when] = left_behind(docker=docker)
        finally:
            tempfile.tempdir = None
    return found
