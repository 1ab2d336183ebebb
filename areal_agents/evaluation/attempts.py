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

    An attempt without a score is None. The attempts at a task differ in their seed. Tasks that the runner has left out
    already are not played. After a stop nothing begins, and what runs has ``FINISH_SECONDS``: attempts that were not
    played, or not to their end, are left out. Where a group's reward judges a task's attempts, they have no score
    before that. A task that cannot be judged has attempts without a score, and one that was not judged when it stopped
    is left out.

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
    groups = _Groups(runner, tasks, k=k, seed=seed, label=label, saved=saved)
    attempts = _Attempts(runner, tasks, k, asyncio.Semaphore(concurrency), seed, label, progress, saved, scored,
                         max_bad, stop, groups)  # fmt: skip
    places = [place for place in attempts.planned if place not in saved]
    running: dict[Place, asyncio.Task[Trajectory | None]] = {}
    with contextlib.ExitStack() as stack:
        if stop is not None:
            stack.enter_context(stop.cancelling(running, seconds=FINISH_SECONDS))
        try:
            async with asyncio.TaskGroup() as group:
                for index in groups.unjudged():  # of an earlier sitting, which was stopped before it could
                    group.create_task(groups.judge(index))
                running |= {place: group.create_task(attempts.play(place)) for place in places}
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
    unplayed = attempts.unplayed | {place for place, task in running.items() if task.cancelled()}
    played = {place: task.result() for place, task in running.items() if place not in unplayed}
    return saved_rows(tasks, groups.results(played | dict(saved)), k=k)


class _Groups:
    """The attempts of an evaluation by task, as its group's reward judges them, if there is one."""

    def __init__(
        self, runner: EpisodeRunner, tasks: Sequence[Task], *, k: int, seed: int, label: str,
        saved: Mapping[Place, Trajectory],
    ) -> None:  # fmt: skip
        self._runner, self._tasks, self._k, self._seed, self._label = runner, tasks, k, seed, label
        self._played: dict[Place, Trajectory | None] = dict(saved)
        self._judged: dict[Place, Trajectory | None] = {}

    def ended(self, place: Place, result: Trajectory | None) -> None:
        """Note the end of an attempt."""
        self._played[place] = result

    def unjudged(self) -> list[int]:
        """Return the tasks whose attempts were all played before, and not judged."""
        if self._runner.group_judge is None:
            return []
        whole = [i for i in range(len(self._tasks)) if all((i, j) in self._played for j in range(self._k))]
        return [i for i in whole if not all(is_judged(self._played[i, j]) for j in range(self._k))]

    async def judge(self, index: int) -> None:
        """Let the group's reward judge the attempts at a task, once all of them are played."""
        places = [(index, j) for j in range(self._k)]
        if self._runner.group_judge is None or not all(place in self._played for place in places):
            return
        found = {place: t for place in places if (t := self._played[place]) is not None}
        judged: tuple[Trajectory, ...] | None = None
        # An attempt whose siblings were all lost has nobody to be compared with: it has no score, and is no zero.
        if len(found) >= (2 if self._runner.group_judge.named.declared.reads_others else 1):
            group, seeds = f"{self._label}/{index}", [attempt_seed(self._seed, j) for _, j in found]
            with contextlib.suppress(TaskError):  # the runner has left the task out, and said so
                task = self._tasks[index]
                judged = await self._runner.finish_group(task, [*found.values()], group=group, seeds=seeds)
        # Not before: where a stop cancels the call, the attempts are left out, and none of them has failed.
        self._judged |= {**dict.fromkeys(places), **dict(zip(found, judged or [None] * len(found), strict=True))}

    def results(self, played: Mapping[Place, Trajectory | None]) -> Mapping[Place, Trajectory | None]:
        """Return the attempts that count, of those ``played``."""
        if self._runner.group_judge is None:
            return played
        known = {place: t for place, t in played.items() if place in self._judged or is_judged(t)}
        return {place: self._judged.get(place, t) for place, t in known.items()}


def is_judged(trajectory: Trajectory | None) -> bool:
    """Say whether an episode has the reward that its group's reward gave it."""
    return trajectory is not None and any(turn.own_reward is not None for turn in trajectory.turns)


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
    groups: _Groups
    unplayed: set[Place] = field(default_factory=set)
    """Those that a stop left out."""
    _done: int = field(init=False)
    _begun: set[int] = field(init=False)
    """Tasks, by their index."""
    _open: list[int] = field(init=False)
    """Attempts that are not over, of each task."""
    _known: frozenset[str] = field(init=False)
    """Tasks that were left out before, and are not played."""
    planned: tuple[Place, ...] = field(init=False)
    """All attempts that count, saved ones among them."""

    def __post_init__(self) -> None:
        self._begun = {index for index, _ in self.saved}
        self._open = [sum((index, i) not in self.saved for i in range(self.k)) for index in range(len(self.tasks))]
        self._known = frozenset(self.runner.left_out)
        known = [task.id in self._known for task in self.tasks]
        self.planned = tuple((i, j) for i in range(len(self.tasks)) if not known[i] for j in range(self.k))
        self._done = sum(place in self.saved for place in self.planned)

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
        self.groups.ended(place, result)
        self._open[index] -= 1
        if not self._open[index]:
            self._settle(index)
            await self.groups.judge(index)
        self._done += 1
        self.progress(self._done, len(self.planned))
        return result

    def _settle(self, index: int) -> None:
        played = any((index, j) in self.saved for j in range(self.k))
        if self.runner.settle(self.tasks[index], group=self._name(index), played=played) is None:
            return
        left_out = self.runner.left_out
        found = {id: why for id, why in left_out.items() if id not in self._known}
        require_few_bad(found, tried=len(self._begun), share=self.max_bad)
        require_few_bad(left_out, tried=len(self._known.union(t.id for t in self.tasks)), share=self.max_bad)

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
