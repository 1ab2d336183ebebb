"""Tasks for training: a seeded random order that a resumed run continues."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from areal_agents.errors import ConfigError
from areal_agents.types import Task


@dataclass(frozen=True, slots=True)
class StreamState:
    """The place of a task stream.

    ``size`` and ``recent`` guard against another task set.
    """

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
        """Return the next task: one that was queued again, else the next of the random order."""
        return self._again.popleft() if self._again else self._tasks[self._draw()]

    def _draw(self) -> int:
        if not self._order:
            self._order = list(range(len(self._tasks)))
            self._rng.shuffle(self._order)
        self._drawn += 1
        self._recent.append(self._order.pop())
        return self._recent[-1]

    def requeue(self, task: Task) -> bool:
        """Queue a discarded task again, once.

        Returns False where it has had its second chance.
        """
        if task.id in self._requeued:
            return False
        self._requeued.add(task.id)
        self._again.append(task)
        return True

    def state(self) -> StreamState:
        recent = tuple(self._tasks[i].content_hash for i in self._recent)
        return StreamState(len(self._tasks), self._drawn, tuple(self._again), tuple(sorted(self._requeued)), recent)

    def restore(self, state: StreamState) -> None:
        """Go on from ``state``, in a new stream of the same tasks and seed.

        Raises ConfigError for other tasks.
        """
        if state.size != len(self._tasks):
            raise ConfigError(
                f"the training split has {len(self._tasks)} tasks, the checkpoint was made with {state.size}: "
                "resume with the same tasks, or start a new run"
            )
        # Drawing again brings the generator and the order of this epoch to where they were.
        for _ in range(state.drawn):
            self._draw()
        if tuple(self._tasks[i].content_hash for i in self._recent) != state.recent:
            raise ConfigError(
                "the training split's tasks are not those that the checkpoint was made with: resume with the same "
                "tasks, or start a new run"
            )
        self._again, self._requeued = deque(state.again), set(state.requeued)
