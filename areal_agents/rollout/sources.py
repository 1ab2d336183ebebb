"""Where the tasks of a run come from: one environment or several, with or without a curriculum.

    group order ─▶ shares (``shares.py``) ─▶ environment ─▶ curriculum: level, task again ─▶ its stream of tasks
                                                                ▲
    batch consumed, groups given up ─▶ attempts ─▶ waiting ─────┘ once the group may know of them

**What a group may know.** Group n, from 0, of batches of B groups, with a staleness bound of η, is drawn as if the
batches up to max(0, ⌊n/B⌋ − η) were over and no later one. It cannot be begun before they are (``buffer.py``). So
which task a group plays follows from what was learned, and never from how fast it was learned: a run that is stopped
and goes on draws as one that was not. Groups that were discarded or replaced count in n; where they make it run ahead,
what is over counts.

**Second chances.** A task that was queued again comes before all that a curriculum chooses, at its own difficulty: the
curriculum may have left that one for good.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from areal_agents.rollout.curriculum import Attempts, Curriculum
from areal_agents.rollout.shares import Shares
from areal_agents.rollout.tasks import StreamState, TaskStream
from areal_agents.types import Group, Task

StreamOf = Callable[[float | None], TaskStream]
"""Makes the stream of an environment's tasks of one difficulty. None is the difficulty of the settings."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The task of one group, and where it is from."""

    task: Task
    env: str = ""
    level: float | None = None


def stream_seed(seed: int, label: str, level: float | None) -> int:
    """Return the seed of the order of tasks. With one environment and no levels it is the run's own."""
    if not label and level is None:
        return seed
    return random.Random(f"tasks/{seed}/{label}/{level}").getrandbits(31)


class EnvTasks:
    """The tasks of one environment: a stream for each difficulty, and perhaps a curriculum."""

    def __init__(self, stream_of: StreamOf, *, label: str = "", curriculum: Curriculum | None = None) -> None:
        self.label, self.curriculum = label, curriculum
        self._stream_of = stream_of
        self._streams: dict[float | None, TaskStream] = {}
        if curriculum is None:
            self._stream(None)  # no tasks: that is said before the first group

    def _stream(self, level: float | None) -> TaskStream:
        if level not in self._streams:
            self._streams[level] = self._stream_of(level)
        return self._streams[level]

    def draw(self, order: int) -> Drawn:
        """Return the task of group ``order``. Raises TaskError where all are left out."""
        for was, waiting in self._streams.items():
            if (again := waiting.again()) is not None:
                return Drawn(again, self.label, was)
        c = self.curriculum
        level = None if c is None else c.level(order)
        stream, task = self._stream(level), None
        if c is not None and (place := c.task_again(order)) is not None:
            task = stream.at(place, by=c.name)
            if task is not None:
                c.drawn(task, place)
        if task is None:
            task = stream.next()
            if c is not None and stream.place is not None:
                c.drawn(task, stream.place)
        return Drawn(task, self.label, level)

    def requeue(self, drawn: Drawn) -> bool:
        """Queue a discarded task again, once. Returns False where it has had its second chance."""
        return self._stream(drawn.level).requeue(drawn.task)

    def leave_out(self, drawn: Drawn, reason: str) -> None:
        """Let the task not come again. Raises TaskError where too many are left out."""
        self._stream(drawn.level).leave_out(drawn.task.id, reason)

    @property
    def left_out(self) -> int:
        """Tasks that are left out."""
        return len({id for stream in self._streams.values() for id in stream.left_out})

    def state(self) -> StreamState:
        if self.curriculum is None:
            return self._stream(None).state()
        known = self.curriculum.state()
        if list(self._streams) == [None]:
            return replace(self._stream(None).state(), curriculum=known)
        parts = tuple((repr(level), stream.state()) for level, stream in self._streams.items())
        return StreamState(0, 0, (), (), (), parts=parts, curriculum=known)

    def restore(self, state: StreamState) -> None:
        """Go on from ``state``. Raises ConfigError for other tasks."""
        if self.curriculum is not None:
            self.curriculum.restore(state.curriculum or {})
        for level, part in state.parts:
            self._stream(float(level)).restore(part)
        if not state.parts and (state.size or self.curriculum is None):
            self._stream(None).restore(state)


class Source:
    """The tasks of a whole run."""

    def __init__(
        self, envs: Sequence[EnvTasks], shares: Shares, *, groups: int = 1, staleness: int = 0, passes: float = 1.0
    ) -> None:
        """Take the environments, with labels of their own.

        Args:
            envs: the environments.
            shares: which of them each group plays.
            groups: B, groups a batch.
            staleness: η, in batches.
            passes: the reward from which on an episode has passed.
        """
        self._envs = {env.label: env for env in envs}
        self._labels, self._shares = [env.label for env in envs], shares
        self._groups, self._staleness, self._passes = groups, staleness, passes
        self._learns = any(env.curriculum is not None for env in envs)
        self._batches = 0
        self._given_up: list[Attempts] = []
        """Of groups that were replaced since the last batch."""
        self._waiting: list[tuple[int, list[Attempts]]] = []
        """By the number of their batch, from 1: what no group may know of yet."""

    @classmethod
    def of(cls, stream: TaskStream) -> Source:
        """Return the source of one environment without a curriculum."""
        return cls([EnvTasks(lambda level: stream)], Shares([1.0], seed=0))

    def draw(self, order: int) -> Drawn:
        """Return the task of group ``order``, which must be more than in every earlier call.

        Raises TaskError where all tasks of its environment are left out.
        """
        known = max(0, order // self._groups - self._staleness)
        while self._waiting and self._waiting[0][0] <= known:
            _, batch = self._waiting.pop(0)
            for env in self._envs.values():
                if env.curriculum is not None:
                    env.curriculum.note([seen for seen in batch if seen.env == env.label])
        return self._envs[self._labels[self._shares.at(order)]].draw(order)

    def requeue(self, drawn: Drawn) -> bool:
        """Queue a discarded task again, once. Returns False where it has had its second chance."""
        return self._envs[drawn.env].requeue(drawn)

    def leave_out(self, drawn: Drawn, reason: str) -> None:
        """Let the task not come again. Raises TaskError where too many are left out."""
        self._envs[drawn.env].leave_out(drawn, reason)

    def give_up(self, group: Group) -> None:
        """Note a finished group that no batch gets. It counts in the batch that is consumed next."""
        if self._learns:
            self._given_up.append(Attempts.of(group, passes=self._passes))

    def consume(self, groups: Sequence[Group]) -> None:
        """Note the groups of a batch that the learner has consumed, before its version is acknowledged."""
        if not self._learns:
            return
        self._batches += 1
        found = [*self._given_up, *(Attempts.of(group, passes=self._passes) for group in groups)]
        self._waiting.append((self._batches, sorted(found, key=lambda seen: seen.order)))
        self._given_up = []

    def begun(self, groups: int) -> dict[str, int]:
        """Return how many of the first ``groups`` groups that were begun are of each environment."""
        return dict(zip(self._labels, self._shares.counts(groups), strict=True))

    @property
    def left_out(self) -> int:
        """Tasks that are left out."""
        return sum(env.left_out for env in self._envs.values())

    def metrics(self) -> dict[str, dict[str, float]]:
        """Return what the curricula know, by the labels of their environments."""
        return {e.label: e.curriculum.metrics() for e in self._envs.values() if e.curriculum is not None}

    def state(self) -> StreamState:
        """Return what ``restore`` needs."""
        if self._labels == [""] and not self._learns:
            return self._envs[""].state()
        parts = tuple((label, env.state()) for label, env in self._envs.items())
        if not self._learns:
            return StreamState(0, 0, (), (), (), parts=parts)
        waits = [[number, [asdict(seen) for seen in batch]] for number, batch in self._waiting]
        known = {"batches": self._batches, "given_up": [asdict(seen) for seen in self._given_up], "waiting": waits}
        return StreamState(0, 0, (), (), (), parts=parts, curriculum=known)

    def restore(self, state: StreamState) -> None:
        """Go on from ``state``, of a source of the same environments. Raises ConfigError for other tasks."""
        if self._labels == [""] and not self._learns:
            return self._envs[""].restore(state)
        for label, part in state.parts:
            self._envs[label].restore(part)
        if (known := state.curriculum) is not None:
            self._batches = known["batches"]
            self._given_up = [Attempts(**row) for row in known["given_up"]]
            self._waiting = [(number, [Attempts(**row) for row in batch]) for number, batch in known["waiting"]]
        return None
