"""Many episodes at once: tasks in, whole groups out, failures counted.

    TaskStream ─▶ admit (rollout/buffer.py) ─▶ G × play (rollout/player.py) ─▶ complete ─▶ next_batch ─▶ learner
                     ▲                        │ InfraError: retried; too few left: discarded, task queued once more
                     └────────────────────────┘

Waits for / unblocked by: the producer waits for ``Buffer.can_admit`` and is unblocked by completions, discards,
batches and acknowledgements; ``next_batch`` waits for ``Buffer.take`` and is unblocked by completions. Neither holds
anything while it waits.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from areal_agents.errors import ArealError, ConfigError, FailureBudgetError, InfraError, RewardError, WorkerLost
from areal_agents.rollout.buffer import Buffer, BufferState, Ticket
from areal_agents.rollout.player import EpisodePlayer, EventSink, no_events
from areal_agents.types import Group, Task, Trajectory


def group_seed(seed: int, order: int) -> int:
    """The seed that all episodes of the ``order``-th group of a run with ``seed`` reset their environment with."""
    return random.Random(f"{seed}/{order}").getrandbits(31)


@dataclass(frozen=True, slots=True)
class StreamState:
    """A task stream's place. ``size`` and ``recent`` guard against another task set."""

    size: int
    drawn: int
    again: tuple[Task, ...]
    requeued: tuple[str, ...]
    recent: tuple[str, ...]
    """Content hashes of the tasks drawn last."""


class TaskStream:
    """Tasks in a seeded random order, every task once an epoch, discarded tasks once more."""

    def __init__(self, tasks: Sequence[Task], *, seed: int) -> None:
        if not tasks:
            raise ConfigError("the training split has no tasks")
        self._tasks = tasks
        self._rng = random.Random(seed)
        self._drawn = 0
        self._recent: deque[int] = deque(maxlen=16)
        self._order: list[int] = []
        self._again: deque[Task] = deque()
        self._requeued: set[str] = set()

    def next(self) -> Task:
        return self._again.popleft() if self._again else self._tasks[self._draw()]

    def _draw(self) -> int:
        if not self._order:
            self._order = list(range(len(self._tasks)))
            self._rng.shuffle(self._order)
        self._drawn += 1
        self._recent.append(self._order.pop())
        return self._recent[-1]

    def requeue(self, task: Task) -> bool:
        """Queue a discarded task again, once. False where it has had its second chance."""
        if task.id in self._requeued:
            return False
        self._requeued.add(task.id)
        self._again.append(task)
        return True

    def state(self) -> StreamState:
        recent = tuple(self._tasks[i].content_hash for i in self._recent)
        return StreamState(len(self._tasks), self._drawn, tuple(self._again), tuple(sorted(self._requeued)), recent)

    def restore(self, state: StreamState) -> None:
        """Go on from ``state``, in a new stream of the same tasks and seed. Raises ConfigError for other tasks."""
        if state.size != len(self._tasks):
            raise ConfigError(
                f"the training split has {len(self._tasks)} tasks, the checkpoint was made with {state.size}: "
                "resume with the same tasks, or start a new run"
            )
        for _ in range(state.drawn):
            self._draw()
        if tuple(self._tasks[i].content_hash for i in self._recent) != state.recent:
            raise ConfigError(
                "the training split's tasks are not those that the checkpoint was made with: resume with the same "
                "tasks, or start a new run"
            )
        self._again, self._requeued = deque(state.again), set(state.requeued)


class FailureBudget:
    """Failed attempts among the last ``window``; over ``share`` of the window the run stops."""

    def __init__(self, *, window: int, share: float) -> None:
        self._outcomes: deque[bool] = deque(maxlen=window)
        self._limit = share * window
        self._first: BaseException | None = None
        self.kinds: Counter[str] = Counter()

    def success(self) -> None:
        self._outcomes.append(False)

    def failure(self, error: ArealError) -> None:
        """Count a failed attempt. Raises FailureBudgetError, caused by the first failure, when the budget is spent.

        An episode whose worker was lost is counted in ``kinds`` alone: one loss fails every episode that the worker
        played, and how often workers are lost has a limit of its own.
        """
        self.kinds[type(error).__name__] += 1
        if isinstance(error, WorkerLost):
            return
        self._outcomes.append(True)
        self._first = self._first or error
        failed = sum(self._outcomes)
        if failed > self._limit:
            raise FailureBudgetError(
                f"{failed} of the last {len(self._outcomes)} episode attempts failed, the budget is "
                f"{self._limit:g} (rollout.failure_budget × rollout.failure_window). First failure: {self._first}"
            ) from self._first


class EpisodeRunner:
    """Runs episodes on a player; retries infrastructure failures and counts them against the budget."""

    def __init__(
        self, player: EpisodePlayer, budget: FailureBudget, *, max_retries: int, event: EventSink = no_events
    ) -> None:
        self.player = player
        self.budget = budget
        self._max_retries = max_retries
        self._event = event

    async def run(self, task: Task, *, id: str, group: str, seed: int) -> Trajectory | None:
        """One trajectory, or None after ``max_retries`` retries or a final failure. Raises FailureBudgetError."""
        attempt = 0
        while True:
            attempt_id = id if attempt == 0 else f"{id}~{attempt}"
            try:
                trajectory = await self.player.play(task, id=attempt_id, group=group, seed=seed)
            except (InfraError, RewardError) as error:
                attempt += 1
                retry = isinstance(error, InfraError) and not error.final and attempt <= self._max_retries
                self._event(
                    "episode_failed", episode=id, task=task.id, error=type(error).__name__, detail=str(error),
                    attempt=attempt, retried=retry, **_where(error),
                )  # fmt: skip
                self.budget.failure(error)
                if not retry:
                    return None
            else:
                self.budget.success()
                return trajectory

    async def close(self) -> None:
        """Close the player."""
        await self.player.close()


def _where(error: ArealError) -> dict[str, object]:
    """Where in its episode an infrastructure failure struck."""
    return {"tool": error.tool, "turns": error.turns, "tokens": error.tokens} if isinstance(error, InfraError) else {}


@dataclass(slots=True)
class OpenGroup:
    """A running group: its episodes by index, as far as they have finished; None for one that failed for good."""

    ticket: Ticket
    task: Task
    finished: dict[int, Trajectory | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RolloutState:
    """All of ``Rollouts`` between two batches: what a checkpoint keeps so that no task is lost or trained twice."""

    buffer: BufferState
    open: tuple[OpenGroup, ...]
    tasks: StreamState
    tasks_lost: tuple[str, ...]


class Rollouts:
    """The producer: keeps as many groups running as the buffer admits."""

    def __init__(
        self,
        buffer: Buffer,
        tasks: TaskStream,
        runner: EpisodeRunner,
        *,
        seed: int,
        event: EventSink = no_events,
    ) -> None:
        self.buffer = buffer
        self.tasks = tasks
        self.runner = runner
        self.tasks_lost: list[str] = []
        self._seed = seed
        self._event = event
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._open: dict[int, OpenGroup] = {}
        self._closed = False
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Admit whatever may start now."""
        while not self._closed and self.buffer.can_admit():
            self._launch(OpenGroup(self.buffer.admit(), self.tasks.next()))

    def state(self) -> RolloutState:
        """What ``restore`` needs. Episodes that finish later are not in it."""
        groups = tuple(OpenGroup(g.ticket, g.task, dict(g.finished)) for g in self._open.values())
        return RolloutState(self.buffer.state(), groups, self.tasks.state(), tuple(self.tasks_lost))

    def restore(self, state: RolloutState) -> None:
        """Go on from ``state``, before ``start``: unfinished episodes of its open groups are played again."""
        self.buffer.restore(state.buffer)
        self.tasks.restore(state.tasks)
        self.tasks_lost = list(state.tasks_lost)
        for group in state.open:
            for _ in group.finished:
                self.buffer.episode_ended(group.ticket)
            self._launch(OpenGroup(group.ticket, group.task, dict(group.finished)))

    def _launch(self, group: OpenGroup) -> None:
        self._open[group.ticket.order] = group
        task = asyncio.create_task(self._group(group), name=f"group-{group.ticket.order}")
        self._running.add(task)
        task.add_done_callback(self._group_ended)

    def _group_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not self._failed.done():
            self._failed.set_exception(error)
        elif error is None:
            self.start()
        self._notify()

    async def next_batch(self) -> list[Group]:
        """The next B groups. Raises what stopped the producer (FailureBudgetError, or a defect)."""
        while True:
            if self._failed.done():
                self._failed.result()
            dropped = len(self.buffer.dropped)
            batch = self.buffer.take()
            if batch is not None or len(self.buffer.dropped) > dropped:
                self.start()
            if batch is not None:
                return batch
            if len(self.buffer.dropped) == dropped:
                await self._changed.wait()

    async def idle(self) -> None:
        """Wait until no group runs: everything that the bound admits is finished. Unblocked by: completions."""
        while self.buffer.running:
            await self._changed.wait()

    def acknowledge(self, version: int) -> None:
        """Every engine serves ``version``: more groups may start."""
        self.buffer.acknowledge(version)
        self.start()

    def set_concurrency(self, episodes: int) -> None:
        """Most episodes at once from now on; more may start at once. Raises ConfigError for less than one group."""
        self.buffer.set_concurrency(episodes)
        self.start()

    async def _group(self, open: OpenGroup) -> None:
        ticket, task, size = open.ticket, open.task, self.buffer.group_size
        group = f"g{ticket.order}"
        seed = group_seed(self._seed, ticket.order)

        async def play(index: int) -> None:
            open.finished[index] = await self.runner.run(task, id=f"{group}/{index}", group=group, seed=seed)
            self.buffer.episode_ended(ticket)
            self.start()

        try:
            async with asyncio.TaskGroup() as tasks:
                for index in range(size):
                    if index not in open.finished:
                        tasks.create_task(play(index))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__  # the first one; the rest were cancelled
        del self._open[ticket.order]
        done = tuple(t for _, t in sorted(open.finished.items()) if t is not None)
        if len(done) >= max(2, math.ceil(size / 2)):
            self.buffer.complete(Group(group, task, done, ticket.version, ticket.order))
            return
        self.buffer.discard(ticket)
        again = self.tasks.requeue(task)
        if not again:
            self.tasks_lost.append(task.id)
        self._event("group_discarded", group=group, task=task.id, finished=len(done), of=size, requeued=again)

    async def close(self) -> None:
        """Cancel what still runs and wait for its end."""
        self._closed = True
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._failed.done() and not self._failed.cancelled():
            self._failed.exception()  # retrieved: a failure seen by nobody must not warn at garbage collection
        await self.runner.close()
