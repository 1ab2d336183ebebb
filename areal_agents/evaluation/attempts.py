"""The attempts of an evaluation: n tasks × k attempts, played side by side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from areal_agents.errors import TaskError
from areal_agents.rollout.retries import EpisodeRunner
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
    stop: Stop | None = None,
) -> list[tuple[Task, list[Trajectory | None]]]:
    """Play every task ``k`` times and return each task with its attempts.

    An attempt without a score is None. The attempts at a task differ in their seed. Tasks that the runner has left out
    already are not played. After a stop nothing begins, and what runs has ``FINISH_SECONDS``: attempts that were not
    played, or not to their end, are left out.

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
        stop: the request to stop, which signals make.

    Raises:
        ArealError: what ``runner`` raises first. The other attempts are then cancelled.
    """
    slots = asyncio.Semaphore(concurrency)
    done = len(saved)
    left_out: set[Place] = set()
    open_attempts = [sum((index, i) not in saved for i in range(k)) for index in range(len(tasks))]

    async def attempt(index: int, i: int) -> Trajectory | None:
        nonlocal done
        async with slots:
            if stop is not None and stop.requested:
                left_out.add((index, i))
                return None
            task, name, result = tasks[index], f"{label}/{index}", None
            with contextlib.suppress(TaskError):  # ``settle`` says so, once for all attempts at the task
                result = await runner.run(task, id=f"{name}/{i}", group=name, seed=attempt_seed(seed, i))
        if result is not None:
            scored(result)
        open_attempts[index] -= 1
        if not open_attempts[index]:
            runner.settle(task, group=name, played=any((index, j) in saved for j in range(k)))
        done += 1
        progress(done, len(places))
        return result

    known_bad = set(runner.left_out)
    places = [(i, j) for i, task in enumerate(tasks) if task.id not in known_bad for j in range(k)]
    running: dict[Place, asyncio.Task[Trajectory | None]] = {}
    with contextlib.ExitStack() as stack:
        if stop is not None:
            stack.enter_context(stop.cancelling(running, seconds=FINISH_SECONDS))
        try:
            async with asyncio.TaskGroup() as group:
                running |= {place: group.create_task(attempt(*place)) for place in places if place not in saved}
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__
    left_out |= {place for place, task in running.items() if task.cancelled()}
    played = {place: task.result() for place, task in running.items() if place not in left_out}
    return saved_rows(tasks, played | dict(saved), k=k)


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
