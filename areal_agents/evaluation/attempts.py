"""The attempts of an evaluation: n tasks × k attempts, played side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from areal_agents.errors import TaskError
from areal_agents.rollout.retries import EpisodeRunner
from areal_agents.rollout.tasks import require_few_bad
from areal_agents.types import Task, Trajectory
from areal_agents.utils.signals import Stop

Place = tuple[int, int]
"""Index of the task among those that are played, and of the attempt at it, from 0."""
FINISH_SECONDS = 60.0
"""Time that running episodes have after the first Ctrl-C."""


async def run_attempts(
    runner: EpisodeRunner,
    tasks: Sequence[Task],
    *,
    k: int,
    concurrency: int,
    seed: int,
    label: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    saved: Mapping[Place, Trajectory] = MappingProxyType({}),
    scored: Callable[[Trajectory], None] = lambda trajectory: None,
    max_bad: float = 1.0,
    stop: Stop | None = None,
) -> list[tuple[Task, list[Trajectory | None]]]:
    """Play every task ``k`` times and return each task with its attempts.

    An attempt without a score is None. The attempts at a task differ in their seed. After a stop nothing
    begins, and what runs has ``FINISH_SECONDS``: attempts that were not played, or not to their end, are left out.

    Args:
        runner: plays an episode, and counts and retries what fails.
        tasks: what to play.
        k: attempts a task.
        concurrency: most episodes at once.
        seed: see ``attempt_seed``.
        label: first part of the episodes' ids.
        progress: is called with the number of episodes that are done, and of all.
        saved: attempts that were played earlier, which are not played again.
        scored: is called with each episode as it ends.
        max_bad: most tasks that may be left out, as a share of those that were begun.
        stop: the request to stop, which signals make.

    Raises:
        TaskError: more tasks are left out than ``max_bad`` allows, and at least ``FEWEST_BAD``.
        ArealError: what ``runner`` raises first. The other attempts are then cancelled.
    """
    attempts = _Attempts(runner, tasks, k, asyncio.Semaphore(concurrency), seed, label, progress, saved, scored,
                         max_bad, stop)  # fmt: skip
    places = [(i, j) for i in range(len(tasks)) for j in range(k) if (i, j) not in saved]
    running: dict[Place, asyncio.Task[Trajectory | None]] = {}
    with contextlib.ExitStack() as stack:
        if stop is not None:
            stack.enter_context(stop.cancelling(running, seconds=FINISH_SECONDS))
        try:
            async with asyncio.TaskGroup() as group:
                running |= {place: group.create_task(attempts.play(place)) for place in places}
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
    unplayed = attempts.unplayed | {place for place, task in running.items() if task.cancelled()}
    played = {place: task.result() for place, task in running.items() if place not in unplayed}
    return saved_rows(tasks, played | dict(saved), k=k)


@dataclass(slots=True)
class _Attempts:
    """The attempts that are played, as ``run_attempts`` was told."""

    runner: EpisodeRunner
    tasks: Sequence[Task]
    k: int
    slots: asyncio.Semaphore
    seed: int
    label: str
    progress: Callable[[int, int], None]
    saved: Mapping[Place, Trajectory]
    scored: Callable[[Trajectory], None]
    max_bad: float
    stop: Stop | None
    unplayed: set[Place] = field(default_factory=set)
    """Those that a stop left out."""
    _done: int = field(init=False)
    _begun: set[int] = field(init=False)
    """Tasks, by their index."""
    _open: list[int] = field(init=False)
    """Attempts that are not over, of each task."""
    _known: frozenset[str] = field(init=False)
    """Tasks that were left out before, and are not among these."""

    def __post_init__(self) -> None:
        self._done = len(self.saved)
        self._begun = {index for index, _ in self.saved}
        self._open = [sum((index, i) not in self.saved for i in range(self.k)) for index in range(len(self.tasks))]
        self._known = frozenset(self.runner.left_out)

    async def play(self, place: Place) -> Trajectory | None:
        """Play one attempt, and note its end."""
        index, i = place
        async with self.slots:
            if self.stop is not None and self.stop.requested:
                self.unplayed.add(place)
                return None
            self._begun.add(index)
            task, name, result = self.tasks[index], self._name(index), None
            with contextlib.suppress(TaskError):  # ``settle`` says so, once for all attempts at the task
                result = await self.runner.run(task, id=f"{name}/{i}", group=name, seed=attempt_seed(self.seed, i))
        if result is not None:
            self.scored(result)
        self._open[index] -= 1
        if not self._open[index]:
            self._settle(index)
        self._done += 1
        self.progress(self._done, len(self.tasks) * self.k)
        return result

    def _settle(self, index: int) -> None:
        played = any((index, j) in self.saved for j in range(self.k))
        if self.runner.settle(self.tasks[index], group=self._name(index), played=played) is None:
            return
        left_out = self.runner.left_out
        found = {id: why for id, why in left_out.items() if id not in self._known}
        require_few_bad(found, tried=len(self._begun), share=self.max_bad)
        require_few_bad(left_out, tried=len(self.tasks) + len(self._known), share=self.max_bad)

    def _name(self, index: int) -> str:
        return f"{self.label}/{index}"


def saved_rows(
    tasks: Sequence[Task], played: Mapping[Place, Trajectory | None], *, k: int
) -> list[tuple[Task, list[Trajectory | None]]]:
    """Return each task that was played with its attempts, in their order."""
    rows = [(task, [played[i, j] for j in range(k) if (i, j) in played]) for i, task in enumerate(tasks)]
    return [row for row in rows if row[1]]


def attempt_seed(seed: int, attempt: int) -> int:
    """Return the seed that attempt ``attempt`` at any task resets its environment with."""
    return seed + attempt


def same_attempts(k: int) -> str:
    """Say what ``k`` attempts at temperature 0 are worth."""
    return (
        f"all {k} attempts at a task are the same at temperature 0, but for what its environment draws from its seed: "
        f"pass@{k} and pass^{k} say nothing more than pass@1 (--temperature 1, or --k 1)"
    )
