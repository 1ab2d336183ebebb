"""Many episodes at once: tasks in, whole groups out, failures counted.

    Source ─▶ admit (buffer.py) ─▶ G × play (player.py) ─▶ finish_group ─▶ complete ─▶ next_batch ─▶ learner
                 ▲                        │ InfraError: retried; too few left: discarded, task queued once more
                 │                        │ TaskError: the task is left out (task_faults.py)
                 └────────────────────────┘ no signal, and refills are left (``has_signal``): another task

Waits for / unblocked by: the producer waits for ``Buffer.can_admit`` and is unblocked by completions, discards,
batches and acknowledgements; ``next_batch`` waits for ``Buffer.take`` and is unblocked by completions. Neither holds
anything while it waits.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from areal_agents.errors import ArealError, TaskError
from areal_agents.rollout.buffer import Buffer, BufferState, Ticket
from areal_agents.rollout.player import EventSink, no_events
from areal_agents.rollout.retries import EpisodeRunner
from areal_agents.rollout.sources import Drawn, Source
from areal_agents.rollout.tasks import StreamState, TaskStream
from areal_agents.types import Group, Task, Trajectory
from areal_agents.utils.short_text import text_of

GREEDY = -1
"""The index of a group's greedy episode among its episodes."""


def group_seed(seed: int, order: int) -> int:
    """Return the seed with which all episodes of the ``order``-th group reset their environment.

    ``seed`` is the run's.
    """
    return random.Random(f"{seed}/{order}").getrandbits(31)


@dataclass(slots=True)
class OpenGroup:
    """A running group and its episodes by index, as far as they have finished.

    An episode that failed for good is None.
    """

    ticket: Ticket
    task: Task
    finished: dict[int, Trajectory | None] = field(default_factory=dict)
    env: str = ""
    level: float | None = None

    @property
    def drawn(self) -> Drawn:
        """The task and where it is from."""
        return Drawn(self.task, self.env, self.level)


@dataclass(frozen=True, slots=True)
class RolloutState:
    """All of ``Rollouts`` between two batches.

    A checkpoint keeps it so that no task is lost or trained twice.
    """

    buffer: BufferState
    open: tuple[OpenGroup, ...]
    tasks: StreamState
    tasks_lost: tuple[str, ...]


class Rollouts:
    """The producer, which keeps as many groups running as the buffer admits."""

    def __init__(
        self,
        buffer: Buffer,
        tasks: TaskStream | Source,
        runner: EpisodeRunner | Mapping[str, EpisodeRunner],
        *,
        seed: int,
        event: EventSink = no_events,
        has_signal: Callable[[Group], bool] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Take over the buffer and the tasks, and start nothing yet.

        Args:
            buffer: says which groups may start, and holds those that have finished.
            tasks: gives each new group its task. A stream is of one environment.
            runner: plays one episode, retries included; closed by ``close``. Where it has a greedy player, each group
                has one more episode of it, and counts one more in the buffer's ``group_size``. Of several environments
                each has its own, by its label.
            seed: the run's; each group's seed follows from it (``group_seed``).
            event: told of each group that is discarded or refilled.
            has_signal: says of a finished group whether it would train anything. One that would not is refilled, as far
                as the buffer's ``max_refills`` allows. None: every group is kept.
            say: shows a line to people, where refills are spent for the first time.
        """
        self.buffer = buffer
        self.tasks = Source.of(tasks) if isinstance(tasks, TaskStream) else tasks
        self._runners = runner if isinstance(runner, Mapping) else {"": runner}
        self.tasks_lost: list[str] = []
        self._seed = seed
        self._event = event
        self._has_signal, self._say = has_signal, say
        self._spent = False
        self._changed = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._open: dict[int, OpenGroup] = {}
        self._closed = False
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _notify(self) -> None:
        """Wake all who wait for a change."""
        self._changed.set()
        # A new one for whoever waits from now on.
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Admit whatever may start now."""
        while not self._closed and not self._failed.done() and self.buffer.can_admit():
            try:
                drawn = self.tasks.draw(self.buffer.admitted)
            except ArealError as error:  # none is left, say; ``start`` is called from where nobody would hear of it
                self._failed.set_exception(error)
                return self._notify()
            self._launch(OpenGroup(self.buffer.admit(), drawn.task, env=drawn.env, level=drawn.level))
        return None

    def state(self) -> RolloutState:
        """Return what ``restore`` needs.

        Episodes that finish later are not in it.
        """
        groups = tuple(replace(g, finished=dict(g.finished)) for g in self._open.values())
        return RolloutState(self.buffer.state(), groups, self.tasks.state(), tuple(self.tasks_lost))

    def restore(self, state: RolloutState) -> None:
        """Go on from ``state``, before ``start``.

        Unfinished episodes of its open groups are played again.
        """
        self.buffer.restore(state.buffer)
        self.tasks.restore(state.tasks)
        self.tasks_lost = list(state.tasks_lost)
        for group in state.open:
            for _ in group.finished:
                self.buffer.episode_ended(group.ticket)
            self._launch(replace(group, finished=dict(group.finished)))

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
        """Wait for the next B groups, and return them.

        Raises what stopped the producer: FailureBudgetError, TaskError where too many tasks cannot be played, or a
        defect.
        """
        while True:
            if self._failed.done():
                self._failed.result()
            dropped = len(self.buffer.dropped)
            batch = self.buffer.take()
            for group in self.buffer.take_dropped():  # what was slow is often what failed: it counts too
                self.tasks.give_up(group)
            # Groups that were taken, or dropped as too old, make room for new ones.
            if batch is not None or len(self.buffer.dropped) > dropped:
                self.start()
            if batch is not None:
                return batch
            if len(self.buffer.dropped) == dropped:
                await self._changed.wait()

    async def idle(self) -> None:
        """Wait until no group runs, so that everything that the bound admits is finished.

        Unblocked by: completions.
        """
        while self.buffer.running:
            await self._changed.wait()

    def consumed(self, groups: Sequence[Group]) -> None:
        """Let curricula learn of a batch, before the version that it made is acknowledged."""
        self.tasks.consume(groups)

    def acknowledge(self, version: int) -> None:
        """Note that every engine serves ``version``, and start the groups that may start now."""
        self.buffer.acknowledge(version)
        self.start()

    def set_concurrency(self, episodes: int) -> None:
        """Set the most episodes at once from now on.

        More may start at once. Raises ConfigError for less than one group.
        """
        self.buffer.set_concurrency(episodes)
        self.start()

    async def _group(self, open: OpenGroup) -> None:
        ticket, task, runner = open.ticket, open.task, self._runners[open.env]
        greedy = runner.has_greedy
        size = self.buffer.group_size - greedy
        group = f"g{ticket.order}"
        seed = group_seed(self._seed, ticket.order)

        async def play(index: int) -> None:
            id, alone = (f"{group}/greedy", True) if index == GREEDY else (f"{group}/{index}", False)
            open.finished[index] = await runner.run(task, id=id, group=group, seed=seed, greedy=alone)
            self.buffer.episode_ended(ticket)
            self.start()

        try:
            async with asyncio.TaskGroup() as tasks:
                for index in (*range(size), *([GREEDY] if greedy else [])):
                    if index not in open.finished:
                        tasks.create_task(play(index))
        except ExceptionGroup as errors:  # the rest were cancelled
            for error in errors.exceptions:
                if not isinstance(error, TaskError):
                    raise error from error.__cause__
        played = tuple(t for i, t in sorted(open.finished.items()) if t is not None and i != GREEDY)
        compared = open.finished.get(GREEDY)
        reason, finished = runner.settle(task, group=group, played=bool(played)), len(played)
        # Two at least, because advantages compare the episodes of a group.
        enough = finished >= max(2, math.ceil(size / 2)) and (compared is not None or not greedy)
        done: tuple[Trajectory, ...] | None = None
        if reason is None and enough:  # until it is judged the group runs, as the bound's proof counts it
            try:
                done = await runner.finish_group(task, played, group=group, seeds=[seed] * finished)
            except TaskError as error:
                reason = text_of(error)
        del self._open[ticket.order]
        if reason is not None:
            self.buffer.discard(ticket)
            self.tasks.leave_out(open.drawn, reason)
            return
        if done is not None:
            found = Group(group, task, done, ticket.version, ticket.order, compared, open.env, open.level)
            self._finish(ticket, found)
            return
        self.buffer.discard(ticket)
        again = self.tasks.requeue(open.drawn)
        if not again:
            self.tasks_lost.append(task.id)
        self._event("group_discarded", group=group, task=task.id, finished=finished, of=size, requeued=again)

    def _finish(self, ticket: Ticket, group: Group) -> None:
        """Queue a finished group for its batch, or give it up where it has no signal and may be refilled."""
        if self._has_signal is None or self._has_signal(group):
            self.buffer.complete(group)
            return
        facts = {"group": group.id, "task": group.task.id, "rewards": [t.reward for t in group.trajectories]}
        if self.buffer.can_refill():
            self.buffer.refill(ticket)
            self.tasks.give_up(group)
            self._event("group_refilled", **facts)
        else:
            self.buffer.complete(group)
            most = self.buffer.max_refills
            self._event("refills_spent", **facts, max_refills=most)
            if not self._spent:
                self._say(
                    f"a batch has spent its {most} refills (rollout.max_refills) and takes groups without signal: the "
                    "tasks are too hard or too easy (metric groups_without_signal)"
                )
            self._spent = True

    async def close(self) -> None:
        """Cancel what still runs and wait for its end."""
        self._closed = True
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._failed.done() and not self._failed.cancelled():
            self._failed.exception()  # retrieved: a failure seen by nobody must not warn at garbage collection
        for runner in self._runners.values():
            await runner.close()
