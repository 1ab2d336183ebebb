"""``PoolUpdate``: one weight update of several replicas, and who acknowledged it, refused it or is late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from areal_agents.engine import KVPolicy, UpdateMode, UpdateReport, WeightsRef
from areal_agents.engines.pool.replica import Replica
from areal_agents.errors import EngineError


class PoolUpdate:
    """``begin``, then ``acknowledged``, then the results. A replica's earlier update is superseded."""

    def __init__(self, ref: WeightsRef, mode: UpdateMode, kv: KVPolicy) -> None:
        self.ref, self._mode, self._kv = ref, mode, kv
        self._tasks: dict[Replica, asyncio.Task[UpdateReport | EngineError]] = {}

    def begin(self, replicas: Iterable[Replica]) -> None:
        """Send the weights to every one of ``replicas``."""
        for replica in replicas:
            self._send(replica, afresh=False)

    def again(self, replica: Replica) -> None:
        """Once more for a replica that refused, in a new process."""
        self._send(replica, afresh=True)

    def _send(self, replica: Replica, *, afresh: bool) -> None:
        replica.supersede()
        load = replica.load(self.ref, mode=self._mode, kv=self._kv, afresh=afresh)
        self._tasks[replica] = replica.update = asyncio.create_task(load, name=f"update-of-{replica.index}")

    async def acknowledged(self, changed: Callable[[], asyncio.Event]) -> None:
        """Wait until every replica that is up has answered, and one has acknowledged or all have refused.

        changed: the event that is set when a replica was lost; it is asked for anew each time.
        """
        try:
            while late := self.late:
                if self.reports and not any(replica.up for replica in late):
                    return
                lost = asyncio.create_task(changed().wait())
                try:
                    waited = [lost, *(self._tasks[replica] for replica in late)]
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    lost.cancel()
        except BaseException:
            for replica in self._tasks:
                replica.supersede()
            raise

    async def result(self, replica: Replica) -> UpdateReport | EngineError | None:
        """How a late replica's update ends; None where a newer one superseded it."""
        task = self._tasks[replica]
        await asyncio.wait({task})
        return None if task.cancelled() else task.result()

    @property
    def late(self) -> list[Replica]:
        """Replicas without an answer."""
        return [replica for replica, task in self._tasks.items() if not task.done()]

    @property
    def reports(self) -> dict[Replica, UpdateReport]:
        """What those reported that acknowledged."""
        return {replica: answer for replica, answer in self._answers() if isinstance(answer, UpdateReport)}

    @property
    def refusals(self) -> dict[Replica, EngineError]:
        """Why the others did not."""
        return {replica: answer for replica, answer in self._answers() if isinstance(answer, EngineError)}

    def _answers(self) -> list[tuple[Replica, UpdateReport | EngineError]]:
        ended = [(replica, task) for replica, task in self._tasks.items() if task.done() and not task.cancelled()]
        return [(replica, task.result()) for replica, task in ended]  # cancelled: the replica was removed meanwhile


def summed(version: int, reports: Iterable[UpdateReport]) -> UpdateReport:
    """The longest time without tokens; requests and tokens added up. ``reports`` is not empty."""
    reports = list(reports)
    return UpdateReport(
        version=version,
        seconds=max(r.seconds for r in reports),
        requests_in_flight=sum(r.requests_in_flight for r in reports),
        tokens_recomputed=sum(r.tokens_recomputed for r in reports),
    )
