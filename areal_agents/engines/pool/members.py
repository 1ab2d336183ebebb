"""``Replicas``: the members of an engine pool, with who is routed to, who comes and who goes.

joining ──current weights──▶ serving ──lost, or its update refused──▶ away ──back with current weights──▶ serving
                                │                                       └─▶ failed for good: replica_lost, dropped
                                └──removed──▶ draining ──its requests ended──▶ replica_removed
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from areal_agents.engines.pool.replica import Replica, SupervisedSettings
from areal_agents.engines.pool.router import Router
from areal_agents.engines.pool.supervision import Restartable
from areal_agents.errors import EngineError
from areal_agents.utils.outcomes import unheard


class Replicas:
    """The replicas of one pool.

    Args:
        start: ``start(index)`` starts a process of replica ``index``.
        load: ``load(replica)`` says whether a fresh replica now serves the current weights. It may raise EngineError.
        event: ``event(kind, **fields)`` is told what happens to the replicas.
        settings: of each replica's ``SupervisedEngine``.
    """

    def __init__(
        self,
        start: Callable[[int], Awaitable[Restartable]],
        load: Callable[[Replica], Awaitable[bool]],
        event: Callable[..., None],
        settings: SupervisedSettings,
    ) -> None:
        self._start, self._load, self._event, self._settings = start, load, event, settings
        self.router = Router()
        self.failed = "the engine pool was not started: enter it with `async with`"
        """The reason why no request will ever be served (again). Empty while one may be."""
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, whenever a replica comes, is lost or goes."""
        self._all: dict[int, Replica] = {}
        self._gone: list[Replica] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Replica]:
        return iter(list(self._all.values()))

    def __len__(self) -> int:
        """Return the number of replicas that serve, start or restart."""
        return sum(r.state != "draining" for r in self._all.values())

    def of(self, session: str) -> Replica:
        """Return where ``session`` is, or is now assigned.

        Raises EngineError where no replica serves.
        """
        return self._all[self.router.assign(session)]

    def release(self, session: str) -> Replica | None:
        """Forget ``session`` and return where it was."""
        index = self.router.replica(session)
        self.router.release(session)
        return None if index is None else self._all[index]

    # --- who is routed to ------------------------------------------------------------------------------------------

    def serve(self, replica: Replica) -> None:
        """Route requests to ``replica``, which serves the current weights."""
        if replica.engine.engine is None:  # lost again meanwhile
            self.background(self._return(replica))
        elif replica.state in ("joining", "away"):
            if replica.state == "joining":
                self._event("replica_added", replica=replica.index, version=replica.engine.version)
            replica.state = "serving"
            self.router.add(replica.index)
            self._notify()

    def withdraw(self, replica: Replica) -> None:
        """Route no more requests to ``replica``, and move those that run there."""
        if replica.state == "serving":
            replica.state = "away"
        self.router.remove(replica.index)  # first: requests that move ask the router for another place
        replica.move()
        self._notify()

    def drop(self, replica: Replica) -> None:
        """Remove ``replica``, which has failed for good.

        With the last replica the pool has failed too.
        """
        if self.failed or replica.state == "draining" or self._all.get(replica.index) is not replica:
            return  # it goes, or is gone
        del self._all[replica.index]
        self.withdraw(replica)
        reason = replica.engine.failed
        self._event("replica_lost", replica=replica.index, reason=reason, left=len(self))
        if not len(self):
            self.fail(f"every replica of the engine pool is lost; the last one: {reason}")
        self._gone.append(replica)  # `close` ends it too, where it cuts the background short
        self.background(replica.engine.close())

    def fail(self, reason: str) -> None:
        """Let every request raise from now on.

        The first reason stays.
        """
        self.failed = self.failed or reason
        for index in self._all:
            self.router.remove(index)
        self._notify()

    def _told(self, replica: Replica, kind: str, fields: dict[str, Any]) -> None:
        self._event(kind, replica=replica.index, **fields)
        if kind == "engine_lost":
            if replica.state == "serving":  # one that joins or is away has a task already
                self.background(self._return(replica))
            self.withdraw(replica)

    async def _return(self, replica: Replica) -> None:
        """Route to ``replica`` again after its restart, or drop it."""
        try:
            await replica.engine.ready()
        except EngineError:
            self.drop(replica)
        else:
            self.serve(replica)

    # --- who comes and goes ----------------------------------------------------------------------------------------

    async def grow(self, by: int) -> None:
        """Start ``by`` more replicas at the lowest free numbers.

        It waits until all have settled, and then raises the first error.
        """
        free = (i for i in itertools.count() if i not in self._all)
        fresh = [Replica(i, self._start, self._told, self._settings) for i in itertools.islice(free, by)]
        self._all |= {r.index: r for r in fresh}
        results = await asyncio.gather(*(self._spawn(self._join(r)) for r in fresh), return_exceptions=True)
        self._raise_first(results)

    def _raise_first(self, results: list[BaseException | None]) -> None:
        for error in results:
            if isinstance(error, asyncio.CancelledError) and self.failed:  # `close` did that, not the caller
                raise EngineError(self.failed)
            if error is not None:
                raise error

    async def _join(self, replica: Replica) -> None:
        try:
            await replica.engine.__aenter__()
            if await self._load(replica):
                self.serve(replica)
        except BaseException:
            self._all.pop(replica.index, None)
            served, replica.state = replica.state == "serving", "draining"  # an update may have come before `_load`
            self.withdraw(replica)
            replica.supersede()
            if served and not self.failed:
                self._event("replica_removed", replica=replica.index, left=len(self))
            await replica.engine.close()
            raise

    async def shrink(self, by: int, *, seconds: float) -> None:
        """End ``by`` replicas, first those that do not serve, then those with the fewest sessions.

        Each ends after its requests. What still runs after ``seconds`` moves. The shrinkage goes on where the caller is
        cancelled.
        """
        loads = self.router.loads()
        stay = [r for r in self._all.values() if r.state != "draining"]
        stay.sort(key=lambda r: (r.state == "serving", loads.get(r.index, 0), -r.index))
        retired = asyncio.gather(*(self._spawn(self._retire(r, seconds)) for r in stay[:by]), return_exceptions=True)
        self._raise_first(await asyncio.shield(retired))

    async def _retire(self, replica: Replica, seconds: float) -> None:
        replica.state = "draining"
        self.router.remove(replica.index)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await replica.idle()
        replica.move()
        await replica.idle()
        replica.supersede()  # an update that waits for its answer goes on without it
        await replica.engine.close()
        self._all.pop(replica.index, None)
        self._event("replica_removed", replica=replica.index, left=len(self))

    async def close(self) -> None:
        """End every replica, also in the middle of anything.

        May be called twice.
        """
        self.fail("the engine pool was closed")
        for replica in self:
            replica.supersede()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Only now: a task that was cancelled in the middle of a start has ended what it started.
        await asyncio.gather(*(r.engine.close() for r in [*self, *self._gone]))
        self._all.clear()
        self._gone.clear()

    # --- tasks -----------------------------------------------------------------------------------------------------

    def background(self, work: Awaitable[None]) -> None:
        """Do ``work`` without anybody who awaits it.

        Where it raises, the pool has failed.
        """

        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001  boundary: every later request raises it
                self.fail(f"the engine pool failed: {type(error).__name__}: {error}")

        self._spawn(guarded())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # `close` cancels it; besides, asyncio itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        unheard(task)  # whoever awaits it may be cancelled
        return task

    def _notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()
