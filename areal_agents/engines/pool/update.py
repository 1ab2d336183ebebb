"""``PoolUpdate``: one weight update of several replicas, and who acknowledged it, refused it or is late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from areal_agents.engine import KVPolicy, UpdateMode, UpdateReport, WeightsRef
from areal_agents.engines.pool.replica import Replica
from areal_agents.errors import EngineError


class PoolUpdate:
    """One weight update of several replicas.

    Call ``begin``, then ``acknowledged``, then read the results. A replica's earlier update is superseded.
    """

    def __init__(self, ref: WeightsRef, mode: UpdateMode, kv: KVPolicy) -> None:
        self.ref, self._mode, self._kv = ref, mode, kv
        self._tasks: dict[Replica, asyncio.Task[UpdateReport | EngineError]] = {}

    def begin(self, replicas: Iterable[Replica]) -> None:
        """Send the weights to every one of ``replicas``."""
        for replica in replicas:
            self._send(replica, afresh=False)

    def again(self, replica: Replica) -> None:
        """Send the weights once more to a replica that refused them, in a new process."""
        self._send(replica, afresh=True)

    def _send(self, replica: Replica, *, afresh: bool) -> None:
        replica.supersede()
        load = replica.load(self.ref, mode=self._mode, kv=self._kv, afresh=afresh)
        self._tasks[replica] = replica.update = asyncio.create_task(load, name=f"update-of-{replica.index}")

    async def acknowledged(self, changed: Callable[[], asyncio.Event]) -> None:
        """Wait until every replica that is up has answered, and one has acknowledged or all have refused.

        ``changed`` returns the event that is set when a replica is lost. It is asked for a new one each time.
        """
        try:
            while late := self.late:
                if self.reports and not any(replica.up for replica in late):
                    return
                # A lost replica goes on with its update, so no task of it ends: its loss has to wake this loop.
                lost = asyncio.create_task(changed().wait())
                try:
                    waited = [lost, *(self._tasks[replica] for replica in late)]
                    await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    lost.cancel()
        except BaseException:  # given up: no replica may load what its pool calls failed
            for replica in self._tasks:
                replica.supersede()
            raise

    async def result(self, replica: Replica) -> UpdateReport | EngineError | None:
        """Return how a late replica's update ends, or None where a newer one superseded it."""
        task = self._tasks[replica]
        await asyncio.wait({task})  # which, unlike awaiting the task, does not raise where it was cancelled
        return None if task.cancelled() else task.result()

    @property
    def late(self) -> list[Replica]:
        """The replicas that have not answered yet."""
        return [replica for replica, task in self._tasks.items() if not task.done()]

    @property
    def reports(self) -> dict[Replica, UpdateReport]:
        """The reports of the replicas that acknowledged."""
        return {replica: answer for replica, answer in self._answers() if isinstance(answer, UpdateReport)}

    @property
    def refusals(self) -> dict[Replica, EngineError]:
        """The errors of the replicas that refused."""
        return {replica: answer for replica, answer in self._answers() if isinstance(answer, EngineError)}

    def _answers(self) -> list[tuple[Replica, UpdateReport | EngineError]]:
        ended = [(replica, task) for replica, task in self._tasks.items() if task.done() and not task.cancelled()]
        return [(replica, task.result()) for replica, task in ended]  # cancelled: the replica was removed meanwhile


def summed(version: int, reports: Iterable[UpdateReport]) -> UpdateReport:
    """Return the reports of several replicas as one.

    It has the longest time without tokens, and the sums of requests and tokens. ``reports`` must not be empty.
    """
    reports = list(reports)
    return UpdateReport(
        version=version,
        seconds=max(r.seconds for r in reports),
        requests_in_flight=sum(r.requests_in_flight for r in reports),
        tokens_recomputed=sum(r.tokens_recomputed for r in reports),
    )
