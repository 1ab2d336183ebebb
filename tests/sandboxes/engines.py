"""What the tests of the docker backend share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from areal_agents.sandboxes import docker_engine
from areal_agents.sandboxes.docker_backend import DockerBackend


def containers(engine: Any) -> list[Any]:
    """Return the backend's containers on an engine, also those that do not run."""
    found: list[Any] = engine.containers.list(all=True, filters={"label": docker_engine.LABEL}, ignore_removed=True)
    return found


def networks(engine: Any) -> list[Any]:
    found: list[Any] = engine.networks.list(filters={"label": docker_engine.LABEL})
    return found


def play(calls: Callable[[DockerBackend], Awaitable[None]], **options: Any) -> None:
    """Run a test's calls on a new backend, without a pool where it does not ask for one."""

    async def whole() -> None:
        async with opened(**options) as backend:
            await calls(backend)

    asyncio.run(whole())


@contextlib.asynccontextmanager
async def opened(**options: Any) -> AsyncIterator[DockerBackend]:
    backend = DockerBackend(**{"pool": 0, **options})
    try:
        yield backend
    finally:
        await backend.aclose()
