"""What a host offers to submissions: its compilers, tried once, and turns on its cores.

A program's limit is wall clock, so more submissions at once than cores would take time from right programs.

Waits for / unblocked by: a submission waits for a place, and is unblocked by the end of another one, which waits for
nothing but its own sandbox.
"""

from __future__ import annotations

import asyncio
import os
from weakref import WeakKeyDictionary

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.rewards.code.judge import run_tests
from areal_agents.rewards.code.languages import LANGUAGES
from areal_agents.rewards.code.problem import CodeTest, Problem
from areal_agents.sandbox import SandboxBackend

_places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
_tried: WeakKeyDictionary[SandboxBackend, dict[str, asyncio.Lock | None]] = WeakKeyDictionary()


def place() -> asyncio.Semaphore:
    """Return the places of the running loop, one a core that this process may use."""
    loop = asyncio.get_running_loop()
    if loop not in _places:
        _places[loop] = asyncio.Semaphore(len(os.sched_getaffinity(0)))
    return _places[loop]


async def require_language(language: str, backend: SandboxBackend) -> None:
    """Build and run a small program, the first time that a language is asked for.

    Raises SandboxUnavailable where the sandbox does not have it, and SandboxError where that was not found out.
    """
    tried = _tried.setdefault(backend, {})
    lock = tried.setdefault(language, asyncio.Lock())
    if lock is None:
        return
    async with lock:
        if tried[language] is None:
            return
        entry = LANGUAGES[language]
        found = await run_tests(entry.sample, Problem((CodeTest("42"),), language=language, seconds=30.0), backend)
        if {"timeout", "crash"} & {found.build, *found.results}:  # of a busy host: another attempt may succeed
            raise SandboxError(f"{language} could not be tried: {found.detail.strip()[:300] or found.results}")
        if found.results != ("passed",):
            why = f"a program that prints 42 ends as {found.results}" if found.compiled else found.detail.strip()[:300]
            remedy = f"Install it below /usr, which the sandbox sees ({entry.remedy}), or ask for another language."
            raise SandboxUnavailable(backend.name, f"it cannot build and run {language}: {why}", remedy)
        tried[language] = None
