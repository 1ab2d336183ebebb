"""The real ``Rollouts`` and its asyncio tasks on a virtual clock: what ``Simulation`` leaves out, to compare with.

An event loop whose clock jumps to the next timer whenever it has nothing to do: no time passes, and the code under
test awaits as ever. Slower than ``Simulation`` (an asyncio task an episode), so it runs small cases only.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Sequence
from typing import Any, cast

from simulate_engines import Episode, Fleet
from simulate_model import Calibration, Case, Workload, learner_capacity
from simulate_run import TASK, Record

from areal_agents.engines.pool.router import Router
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.producer import Rollouts
from areal_agents.rollout.retries import EpisodeRunner
from areal_agents.rollout.tasks import TaskStream
from areal_agents.types import Task, Trajectory


class _NoWaiting(selectors.SelectSelector):
    """Instead of waiting, move the clock. Nothing outside the process is listened to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise AssertionError(f"deadlock at {self.now:.3f} s: no timer is set and nothing can run")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time; ``asyncio.sleep`` costs nothing."""

    def __init__(self) -> None:
        self._clock = _NoWaiting()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


class _Engines:
    """Turns as futures that the fleet's next end resolves."""

    def __init__(self, case: Case, calibration: Calibration) -> None:
        rates = [0.0, *[calibration.rate(n) / n for n in range(1, case.slots + 1)]]
        self.fleet = Fleet(case.engines, rates, case.slots)
        self.router = Router(range(case.engines))
        self._loop = asyncio.get_running_loop()
        self._ends: dict[str, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._paused, self._pause_began = 0.0, math.nan

    def _now(self) -> float:
        at = self._loop.time() if math.isnan(self._pause_began) else self._pause_began
        return at - self._paused

    async def turn(self, episode: Episode) -> None:
        episode.engine = self.router.assign(episode.session)
        self.router.begin(episode.engine)
        self._ends[episode.session] = ended = self._loop.create_future()
        self.fleet.submit(self._now(), episode)
        self._wake()
        try:
            await ended
        finally:
            self.router.end(episode.engine)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        end = self.fleet.next_end()
        if end < math.inf and math.isnan(self._pause_began):
            self._timer = self._loop.call_at(end + self._paused, self._fire)

    def _fire(self) -> None:
        self._ends.pop(self.fleet.end().session).set_result(None)
        self._wake()

    async def update(self, seconds: float) -> None:
        """Generation stands still, then all engines serve the next version."""
        self._pause_began = self._loop.time()
        self._wake()
        await asyncio.sleep(seconds)
        self.fleet.begin_version(self._now())
        self._paused += self._loop.time() - self._pause_began
        self._pause_began = math.nan
        self._wake()


class _Runner:
    """An ``EpisodeRunner`` whose episodes are simulated turns and tools."""

    has_greedy = False

    def __init__(self, engines: _Engines, case: Case, calibration: Calibration) -> None:
        self._engines, self._turn_tokens = engines, calibration.turn_tokens
        self._workload = Workload(case, calibration)

    async def run(self, task: Task, *, id: str, group: str, seed: int, greedy: bool = False) -> Trajectory | None:
        order, index = int(group[1:]), int(id.partition("/")[2])
        episode = Episode(None, index, id, self._workload.lengths(order)[index])
        try:
            while True:
                episode.take = min(episode.left, self._turn_tokens)
                await self._engines.turn(episode)
                if not episode.left:
                    return cast(Trajectory, Record(episode.spans))
                await asyncio.sleep(self._workload.tool(order, index, episode.turn))
                episode.turn += 1
        finally:
            self._engines.router.release(id)

    async def finish_group(
        self, task: Task, trajectories: Sequence[Trajectory], *, group: str, seeds: Sequence[int]
    ) -> tuple[Trajectory, ...]:
        """Leave the rewards as they are."""
        return tuple(trajectories)

    def settle(self, task: Task, *, group: str, played: bool = False) -> str | None:
        """Leave no task out."""
        return None

    async def close(self) -> None:
        """Nothing is shared."""


async def _learn(case: Case, calibration: Calibration) -> list[tuple[float, tuple[int, ...]]]:
    loop = asyncio.get_running_loop()
    engines = _Engines(case, calibration)
    buffer = Buffer(
        groups=case.groups, group_size=case.group_size, max_staleness=case.eta, concurrency=case.concurrency,
        on_exceed=case.on_exceed, order=case.order,
    )  # fmt: skip
    runner = cast(EpisodeRunner, _Runner(engines, case, calibration))
    rollouts = Rollouts(buffer, TaskStream([TASK], seed=0), runner, seed=case.seed)
    batches: list[tuple[float, tuple[int, ...]]] = []
    try:
        rollouts.start()
        for _ in range(case.updates):
            batch = await rollouts.next_batch()
            batches.append((loop.time(), tuple(group.order for group in batch)))
            tokens = sum(cast(Any, t).tokens for group in batch for t in group.trajectories)
            await asyncio.sleep(tokens / learner_capacity(case, calibration))
            await engines.update(calibration.update_seconds)
            rollouts.acknowledge(buffer.version)
    finally:
        await rollouts.close()
    return batches


def rollouts_batches(case: Case, calibration: Calibration) -> list[tuple[float, tuple[int, ...]]]:
    """Start and group orders of every step, by the real ``Rollouts``."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_learn(case, calibration))
