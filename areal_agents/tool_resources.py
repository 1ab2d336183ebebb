"""What the tools of an episode keep open from one call to the next, and what is closed when it ends.

get(key, open) ─▶ open already ─▶ the same object
               └▶ ``async with open() as it`` ─▶ closed by ``aclose``, the newest first
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Hashable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any, TypeVar

T = TypeVar("T")


class Resources:
    """The open resources of one episode.

    Entering and leaving may happen in different tasks, so a resource that minds needs a task of its own.
    """

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._open: dict[Hashable, Any] = {}
        self._opening: defaultdict[Hashable, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def get(self, key: Hashable, open: Callable[[], AbstractAsyncContextManager[T]]) -> T:
        """Return the resource of ``key``, which is opened at its first use.

        What ``open`` raises passes through, and the next use tries again.
        """
        async with self._opening[key]:
            if key not in self._open:
                self._open[key] = await self._stack.enter_async_context(open())
            resource: T = self._open[key]
            return resource

    async def aclose(self) -> None:
        """Close all resources, the newest first. May be called twice."""
        self._open.clear()
        self._opening.clear()
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()
