"""Tasks for training: a seeded random order that a resumed run continues."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from areal_agents.errors import ArealError, ConfigError, TaskError
from areal_agents.rollout.task_faults import reasons
from areal_agents.types import Task
from areal_agents.utils.short_text import described, short, text_of

FEWEST_BAD = 8
"""Fewer tasks that cannot be played never stop a run, as long as others can."""


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
    left_out: tuple[tuple[str, str], ...] = ()
    """Ids of tasks that cannot be played, each with the reason."""
    known: int = 0
    """How many of these, the first ones, were known before the stream began."""
    parts: tuple[tuple[str, StreamState], ...] = ()
    """Of several streams (``sources.py``): the state of each by its environment's label, or by its level."""
    curriculum: Mapping[str, Any] | None = None
    """What a curriculum knows, as JSON has it."""
    chosen: str = ""
    """As the stream was given it."""

    @property
    def bad(self) -> int:
        """Tasks that are left out, those of all parts together."""
        return len(self.left_out) + sum(part.bad for _, part in self.parts)


def task_at(tasks: Sequence[Task], index: int) -> Task | str:
    """Return the task at ``index``, or why the environment cannot make it (a lazy sequence makes it only now)."""
    try:
        found: object = tasks[index]
    except ArealError as error:  # a lazy sequence says which task, and what the author's code raised
        return text_of(error)
    except Exception as error:  # noqa: BLE001  the author's own code
        return f"making it raised {described(error)}"
    return found if isinstance(found, Task) else f"it is {short(found)}, which is not a Task"


def tasks_at(tasks: Sequence[Task], indices: Iterable[int], tell: Callable[[str, str], None]) -> list[Task]:
    """Return those of the tasks at ``indices`` that can be made.

    ``tell`` is given name and reason of the others.
    """
    found = {i: task_at(tasks, i) for i in indices}
    for i, task in found.items():
        if isinstance(task, str):
            tell(task_name(i), task)
    return [task for task in found.values() if isinstance(task, Task)]


def task_name(index: int) -> str:
    """Return what a task that cannot be made is called."""
    return f"task {index} of the split"


def require_few_bad(bad: Mapping[str, str], *, tried: int, share: float) -> None:
    """Raise TaskError where too many of the tasks tried so far are bad.

    Too many are more than ``share`` of them, and at least ``FEWEST_BAD``. ``bad`` has their ids, each with the reason.
    """
    seen = max(tried, len(bad))
    if len(bad) >= FEWEST_BAD and len(bad) > share * seen:
        raise TaskError(
            f"{len(bad)} of the {seen} tasks tried so far cannot be played or scored, more than rollout.max_bad_tasks "
            f"= {share:g} allows:{reasons(bad)}"
        )


class TaskStream:
    """Tasks in a seeded random order, every task once an epoch, discarded tasks once more.

    A task that is left out does not come again.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        seed: int,
        max_bad: float = 1.0,
        left_out: Mapping[str, str] = MappingProxyType({}),
        tell: Callable[[str, str], None] = lambda name, reason: None,
        chosen: str = "",
    ) -> None:
        """Take the tasks.

        Args:
            tasks: of one split.
            seed: of their order.
            max_bad: most tasks that may be left out, as a share of those drawn so far.
            left_out: tasks that are known to be bad, each with the reason. They do not count against ``max_bad``,
                because those beside which they were found are not drawn here.
            tell: is given name and reason of a task that cannot even be made.
            chosen: stands for the choice of these tasks among those of the split. Empty: they are all.

        Raises:
            ConfigError: there are none.
        """
        self.left_out = dict(left_out)
        """Ids of tasks that cannot be played, each with the reason."""
        self._max_bad, self._known, self._tell, self._chosen = max_bad, len(left_out), tell, chosen
        if not tasks:
            raise ConfigError("the training split has no tasks")
        self._tasks = tasks
        self.place: int | None = None
        """Where in the split the task is that ``next`` returned. None for one that was queued again."""
        self._rng = random.Random(seed)
        self._drawn = 0
        self._recent: deque[int] = deque(maxlen=16)
        self._order: list[int] = []
        self._again: deque[Task] = deque()
        self._requeued: set[str] = set()

    def next(self) -> Task:
        """Return the next task: one that was queued again, else the next of the random order.

        Raises TaskError where all are left out.
        """
        self.place = None
        if (waiting := self.again()) is not None:
            return waiting
        for _ in range(2 * len(self._tasks)):  # the rest of this epoch, and the next one
            self.place = self._draw()
            task = self._made(self.place)
            if task is not None and task.id not in self.left_out:
                return task
        raise TaskError(
            f"none of the split's {len(self._tasks)} tasks can be played or scored:{reasons(self.left_out)}"
        )

    def again(self) -> Task | None:
        """Return a task that was queued again and not left out since, or None where none waits."""
        while self._again:
            if (task := self._again.popleft()).id not in self.left_out:
                return task
        return None

    def at(self, place: int, *, by: str) -> Task | None:
        """Return the task at a place of the split, or None where it is left out.

        Raises ConfigError for a place that the split does not have. ``by`` says who chose it.
        """
        if not 0 <= place < len(self._tasks):
            raise ConfigError(f"{by} chose the task at place {place} of a split with {len(self._tasks)} tasks")
        task = self._made(place)
        return None if task is None or task.id in self.left_out else task

    @property
    def seen(self) -> int:
        """Tasks that were drawn at least once."""
        return min(self._drawn, len(self._tasks))

    def leave_out(self, id: str, reason: str) -> None:
        """Let the task not come again.

        Raises TaskError where more than ``max_bad`` of the tasks drawn so far are left out, and at least
        ``FEWEST_BAD``.
        """
        self.left_out[id] = reason
        found = dict(list(self.left_out.items())[self._known :])
        require_few_bad(found, tried=self.seen, share=self._max_bad)

    def _made(self, index: int) -> Task | None:
        """Return the task at ``index``, or None where the environment cannot make it, which leaves it out."""
        found = task_at(self._tasks, index)
        if isinstance(found, Task):
            return found
        name = task_name(index)
        if name not in self.left_out:
            self._tell(name, found)
            self.leave_out(name, found)
        return None

    def _draw(self) -> int:
        if not self._order:
            self._order = list(range(len(self._tasks)))
            self._rng.shuffle(self._order)
        self._drawn += 1
        self._recent.append(self._order.pop())
        return self._recent[-1]

    def _content(self, index: int) -> str:
        found = task_at(self._tasks, index)
        return found.content_hash if isinstance(found, Task) else ""

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
        recent = tuple(map(self._content, self._recent))
        return StreamState(
            len(self._tasks), self._drawn, tuple(self._again), tuple(sorted(self._requeued)), recent,
            tuple(self.left_out.items()), self._known, chosen=self._chosen,
        )  # fmt: skip

    def restore(self, state: StreamState) -> None:
        """Go on from ``state``, in a new stream of the same tasks and seed.

        Raises ConfigError for other tasks.
        """
        if state.size != len(self._tasks):
            raise ConfigError(
                f"the training split has {len(self._tasks)} tasks, the checkpoint was made with {state.size}: "
                "resume with the same tasks, or start a new run"
            )
        if state.chosen and state.chosen != self._chosen:  # not there before it was kept
            raise ConfigError(
                "curriculum.pass_rates leaves other tasks than those that the checkpoint was made with: resume with "
                "the file as it was, or start a new run"
            )
        # Drawing again brings the generator and the order of this epoch to where they were.
        for _ in range(state.drawn):
            self._draw()
        if tuple(map(self._content, self._recent)) != state.recent:
            raise ConfigError(
                "the training split's tasks are not those that the checkpoint was made with: resume with the same "
                "tasks, or start a new run"
            )
        self._again, self._requeued = deque(state.again), set(state.requeued)
        self.left_out, self._known = dict(state.left_out), state.known
