"""A look at a split's tasks before the first episode: which of them no answer could score.

environment.task_checks() ─▶ each task, in a seeded order, until all or ``MOST`` are seen or the time is over
                                 └─ TaskError ─▶ the task is left out; too many ─▶ the run is refused
"""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from areal_agents.errors import InfraError, TaskError
from areal_agents.reward import TaskCheck
from areal_agents.rollout.task_faults import reasons
from areal_agents.rollout.tasks import FEWEST_BAD, task_at, task_name
from areal_agents.types import Task
from areal_agents.utils.exits import guarded_tasks, no_exit
from areal_agents.utils.short_text import described, text_of

MOST = 2000
"""Tasks of one split that are looked at. Of more, a random sample is."""
SECONDS = 30.0
_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at the tasks of a split found."""

    total: int
    seen: int = 0
    bad: Mapping[str, str] = field(default_factory=dict)
    """Ids of tasks that no answer could score, each with the reason."""
    namesakes: int = 0
    """How many more such tasks there are under the same ids."""

    def __str__(self) -> str:
        return f"{self.seen} of {self.total}" if self.seen < self.total else f"{self.total}"

    def require_enough(self, split: str, *, max_bad: float) -> None:
        """Raise TaskError where more than ``max_bad`` of the tasks seen are bad and at least 8, or all are."""
        bad = len(self.bad) + self.namesakes
        if bad and (bad == self.seen or (bad >= FEWEST_BAD and bad > max_bad * self.seen)):
            raise TaskError(
                f"{bad} of the {self.seen} tasks of {split} that were looked at cannot be scored, more than "
                f"rollout.max_bad_tasks = {max_bad:g} allows:{reasons(self.bad, rest='')}"
            )


async def look_at(
    tasks: Sequence[Task], checks: Sequence[TaskCheck], *, seed: int, most: int = MOST, seconds: float = SECONDS
) -> Look:
    """Look at the tasks of a split, as far as number and time allow.

    Args:
        tasks: of one split.
        checks: ``AgentEnv.task_checks``. Where there are none, no task is looked at.
        seed: of the order in which they are looked at.
        most: tasks.
        seconds: wall clock of all of it. A check that is running then is given up.

    Raises:
        InfraError: a verifier cannot be asked.
    """
    if not checks:
        return Look(len(tasks))
    order = random.Random(seed).sample(range(len(tasks)), min(most, len(tasks)))
    found: dict[int, tuple[str, str] | None] = {}
    end = time.monotonic() + seconds
    try:
        with guarded_tasks():
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                places = iter(order)
                for _ in range(min(_AT_ONCE, len(order))):
                    group.create_task(_look_on(places, tasks, checks, found, end))
    except TimeoutError:
        pass  # what was seen is told with its number
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors.exceptions[0].__cause__
    named = [row for _, row in sorted(found.items()) if row is not None]
    bad = dict(named)
    return Look(len(tasks), len(found), bad, len(named) - len(bad))


async def _look_on(
    places: Iterator[int],
    tasks: Sequence[Task],
    checks: Sequence[TaskCheck],
    found: dict[int, tuple[str, str] | None],
    end: float,
) -> None:
    for i in places:
        if time.monotonic() > end:  # a check that never waits cannot be given up
            return
        task = task_at(tasks, i)
        if isinstance(task, str):
            found[i] = task_name(i), task
        else:
            problem = await _problem(task, checks)
            found[i] = None if problem is None else (task.id, problem)


async def _problem(task: Task, checks: Sequence[TaskCheck]) -> str | None:
    """Return why the task cannot be scored, or None where it can."""
    for check in checks:
        name = getattr(check, "__qualname__", "a check of its tasks")
        try:
            with no_exit():
                waiting = check(task)
                if inspect.isawaitable(waiting):
                    await waiting
        except InfraError:
            raise
        except TaskError as error:
            return text_of(error) or f"{name} raised TaskError without a reason"
        except (Exception, asyncio.CancelledError) as error:  # the author's own code, which may cancel itself
            looker = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and looker is not None and looker.cancelling():
                raise  # ours: the time is over
            return f"{name} raised {described(error)}"
    return None
