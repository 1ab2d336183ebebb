"""A look at a split's tasks before the first episode: which of them no answer could score.

environment.task_checks() ─▶ each task, in a seeded order, until all or ``MOST`` are seen or the time is over
                                 ├─ TaskError ─▶ the task is left out; too many ─▶ the run is refused
                                 └─ never returns ─▶ the run is refused, and told which task and which check

Tasks are made and checked on a thread with an event loop of its own: code of their author that blocks can be told of,
though not ended. It must not hold Python's lock, as a catastrophic regular expression does.

Waits for / unblocked by: ``look_at`` waits for that thread, and is unblocked by its end or by the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from areal_agents.errors import InfraError, TaskError
from areal_agents.reward import TaskCheck
from areal_agents.rollout.task_faults import reasons
from areal_agents.rollout.tasks import FEWEST_BAD, task_at, task_name
from areal_agents.types import Task
from areal_agents.utils.exits import guard_tasks, no_exit
from areal_agents.utils.short_text import described, text_of

MOST = 2000
"""Tasks of one split that are looked at. Of more, a random sample is."""
SECONDS = 30.0
_AT_ONCE = 32
_QUIET_SECONDS = 3.0
_TOLD_EVERY = 5.0


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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def look_at(
    tasks: Sequence[Task],
    checks: Sequence[TaskCheck],
    *,
    where: str,
    seed: int,
    most: int = MOST,
    seconds: float = SECONDS,
    tell: Callable[[str], None] = _say,
) -> Look:
    """Look at the tasks of a split, as far as number and time allow.

    Args:
        tasks: of one split.
        checks: ``AgentEnv.task_checks``. Where there are none, no task is looked at.
        where: names environment and split, for messages.
        seed: of the order in which they are looked at.
        most: tasks.
        seconds: wall clock of all of it. A check that is waiting then is given up.
        tell: is given a line of progress every few seconds.

    Raises:
        InfraError: a verifier cannot be asked.
        TaskError: a check, or the making of a task, blocks for longer than ``seconds``.
    """
    if not checks:
        return Look(len(tasks))
    order = random.Random(seed).sample(range(len(tasks)), min(most, len(tasks)))
    looking = _Looking(tasks, checks, order, where, seconds)
    await looking.done(tell)
    named = [row for _, row in sorted(looking.found.items()) if row is not None]
    bad = dict(named)
    return Look(len(tasks), len(looking.found), bad, len(named) - len(bad))


class _Looking:
    """One look, on a thread of its own."""

    def __init__(
        self, tasks: Sequence[Task], checks: Sequence[TaskCheck], order: Sequence[int], where: str, seconds: float
    ) -> None:
        self.found: dict[int, tuple[str, str] | None] = {}
        """By index: name of the task and what is wrong with it, or None."""
        self._tasks, self._checks, self._order, self._where, self._seconds = tasks, checks, order, where, seconds
        self._start = self._moved = time.monotonic()
        self._doing: dict[asyncio.Task[None] | None, str] = {}
        """What each of those that look at once does, in words."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._over = False

    async def done(self, tell: Callable[[str], None]) -> None:
        """Look, and wait for the end of it."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        run = contextvars.copy_context().run
        threading.Thread(target=run, args=(self._run, loop, ended), name="areal-task-looks", daemon=True).start()
        told = self._start + _QUIET_SECONDS - _TOLD_EVERY
        try:
            while True:
                await asyncio.wait((ended,), timeout=min(1.0, self._seconds / 4))
                if ended.done():
                    return ended.result()
                self._require_moving()
                if time.monotonic() - told >= _TOLD_EVERY:
                    told = time.monotonic()
                    bad = sum(row is not None for row in [*self.found.values()])
                    some = f", {bad} cannot be scored" if bad else ""
                    tell(f"looking at the tasks of {self._where}: {len(self.found)} of {len(self._order)}{some}")
        finally:
            if not ended.done() and self._loop is not None and self._main is not None:
                self._over = True
                with contextlib.suppress(RuntimeError):  # it has just ended
                    self._loop.call_soon_threadsafe(self._main.cancel)

    def _require_moving(self) -> None:
        """Raise TaskError where something holds the thread's loop, or does not let itself be given up."""
        now = time.monotonic()
        if now - self._moved > self._seconds or now - self._start > 2 * self._seconds:
            blocked = asyncio.current_task(self._loop) if self._loop is not None else None
            doing = self._doing.get(blocked) or next(iter([*self._doing.values()]), "their check")
            raise TaskError(
                f"{self._where}: {doing} has not returned within {self._seconds:g} s, so no run can begin: give what "
                "it waits for a deadline"
            )
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._move)

    def _move(self) -> None:
        self._moved = time.monotonic()

    def _run(self, outer: asyncio.AbstractEventLoop, ended: asyncio.Future[None]) -> None:
        raised: BaseException | None = None
        try:
            asyncio.run(self._look())
        except BaseException as error:  # noqa: BLE001  raised where it is waited for
            raised = error
        with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop is closed
            outer.call_soon_threadsafe(_settle, ended, raised)

    async def _look(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        guard_tasks(self._loop)
        try:
            async with asyncio.timeout(self._seconds), asyncio.TaskGroup() as group:
                places = iter(self._order)
                for _ in range(min(_AT_ONCE, len(self._order))):
                    group.create_task(self._look_on(places))
        except TimeoutError:
            pass  # what was seen is told with its number
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors.exceptions[0].__cause__

    def _is_over(self) -> bool:
        return self._over or time.monotonic() > self._start + self._seconds

    async def _look_on(self, places: Iterator[int]) -> None:
        me = asyncio.current_task()
        for i in places:
            if self._is_over():  # a check that never waits cannot be given up
                return
            self._move()
            self._doing[me] = f"the making of {task_name(i)}"
            task = task_at(self._tasks, i)
            if isinstance(task, str):
                self.found[i] = task_name(i), task
                continue
            problem = ""
            for check in self._checks:
                name = getattr(check, "__qualname__", None) or f"{type(check).__qualname__}.__call__"
                self._doing[me] = f"{name}, the check of task {task.id!r},"
                try:
                    problem = problem or await _problem(task, check, name, self._is_over)
                except InfraError:  # the others are cancelled
                    self._over = True
                    raise
            self.found[i] = (task.id, problem) if problem else None
        self._doing.pop(me, None)


async def _problem(task: Task, check: TaskCheck, name: str, over: Callable[[], bool]) -> str:
    """Return why the task cannot be scored, or an empty text. ``over`` says whether the look is ended."""
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
            if over():
                raise
            looker.uncancel()  # the check has cancelled the task that it runs in
        return f"{name} raised {described(error)}"
    return ""


def _settle(ended: asyncio.Future[None], raised: BaseException | None) -> None:
    if ended.done():  # its waiter was cancelled
        return
    if raised is None:
        ended.set_result(None)
    else:
        ended.set_exception(raised)
