"""Curricula: how hard the next task is, or which task it is, by how often recent ones were passed.

    batch consumed ─▶ attempts, in the order of their groups ─▶ note ─▶ level, task_again of later groups

A curriculum is of one environment. All that it knows is in its state, and its chance follows from the run's seed and
the number of the group. ``rollout/sources.py`` says which batches a group may know of.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from areal_agents.rollout.own_curriculum import OwnCurriculum
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.types import Group, Task
from areal_agents.utils.tolerance import reaches

_DIGITS = 9
"""Levels are rounded to so many, so that 0.1 + 0.2 is the level 0.3."""


@dataclass(frozen=True, slots=True)
class Attempts:
    """How often the episodes of one group passed."""

    order: int
    """The group's place among those that were begun."""
    env: str
    """The label of its environment."""
    task: str
    """The content hash of its task."""
    level: float | None
    """The difficulty that a curriculum chose."""
    n: int
    passed: int

    @classmethod
    def of(cls, group: Group, *, passes: float) -> Attempts:
        """Count the group's episodes that earned at least ``passes``."""
        passed = sum(reaches(t.reward, passes) for t in group.trajectories)
        return cls(group.order, group.env, group.task.content_hash, group.level, len(group.trajectories), passed)


def moved_level(level: float, rate: float, *, low: float, high: float, step: float) -> float:
    """Return the level after a full window of episodes.

        level + step  where rate ≥ high;      level − step  where rate ≤ low;      else level,      kept in [0, 1]

    The window is emptied after it, whatever it said, so that a level is judged by its own episodes. Between ``low`` and
    ``high`` nothing moves.

    Paper: the update of a boundary in automatic domain randomisation (1910.07113, algorithm 1), with its buffer, its
    thresholds t_L and t_H and its step Δ.
    """
    if rate >= high:
        level += step
    elif rate <= low:
        level -= step
    return round(min(max(level, 0.0), 1.0), _DIGITS)


def learnability(passed: float, failed: float) -> float:
    """Return the expectation of p(1 − p) for a pass rate p that is Beta(passed, failed).

        E[p(1 − p)] = ab / ((a + b)(a + b + 1))      with a = passed, b = failed, the prior's counts among them

    It is the variance of an episode's outcome, and what a group's gradient is made of: 0 where every episode passes or
    every one fails. With the prior Beta(1, 1) it is 1/6 for what was never tried, 0.23 after 4 passes of 8, and 0.08
    after none of 8.

    Paper: p(1 − p) as the score of levels is that of "sampling for learnability" (SFL, 2408.15099), which estimates p
    by rollouts. Graves et al. (1704.03003) draw tasks by learning progress instead. The Beta prior is ours.
    """
    both = passed + failed
    return passed * failed / (both * (both + 1.0))


class Curriculum(Protocol):
    """What chooses the tasks of one environment. By itself it chooses none: each is the split's next one.

    A task that is queued again, because its group was discarded, comes before what is chosen, at its own level.
    """

    name: str = "a curriculum"
    """What messages call it."""
    levels: Sequence[float] | None = None
    """All difficulties that it may choose, from 0 to 1. None: it leaves the difficulty as the settings have it."""

    def level(self, order: int) -> float | None:
        """Return the difficulty of group ``order``. None is the one of the settings."""
        return None

    def task_again(self, order: int) -> int | None:
        """Return the place in the split of a task that group ``order`` plays again. None is the split's next one.

        Of a curriculum with levels it is the split of that level, which is chosen first. Where the task is left out,
        because it cannot be played, the split's next one takes its place.
        """
        return None

    def drawn(self, task: Task, place: int) -> None:
        """Learn the place of a task that a group plays."""
        return

    def note(self, batch: Sequence[Attempts]) -> None:
        """Learn how the groups of one batch ended, in the order in which they were begun."""
        return

    def state(self) -> dict[str, Any]:
        """Return all that it knows, as JSON has it."""
        raise NotImplementedError

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what ``state`` returned, and nothing else."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """Return what it knows, for people."""
        return {}


class LevelCurriculum(Curriculum):
    """One difficulty, which follows the recent pass rate (``moved_level``)."""

    def __init__(self, settings: CurriculumConfig, *, start: float) -> None:
        self._settings = settings
        self._level = round(start, _DIGITS)
        self._n = self._passed = 0

    def level(self, order: int) -> float | None:
        return self._level

    def note(self, batch: Sequence[Attempts]) -> None:
        c = self._settings
        for seen in batch:
            if seen.level != self._level:  # begun before the level moved: it says nothing of this one
                continue
            self._n, self._passed = self._n + seen.n, self._passed + seen.passed
            if self._n >= c.window:
                self._level = moved_level(
                    self._level, self._passed / self._n, low=c.low, high=c.high, step=c.level_step
                )
                self._n = self._passed = 0

    def state(self) -> dict[str, Any]:
        return {"level": self._level, "n": self._n, "passed": self._passed}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._level, self._n, self._passed = float(state["level"]), int(state["n"]), int(state["passed"])

    def metrics(self) -> dict[str, float]:
        return {"level": self._level, "level_episodes": float(self._n)}


@dataclass(slots=True)
class _Counts:
    """Passes and failures, which count half after a half-life."""

    passed: float = 0.0
    failed: float = 0.0
    at: int = 0
    """The batch that they are as of."""
    place: int = -1
    """Of a task: where it is in the split."""

    def aged(self, now: int, half_life: float) -> tuple[float, float]:
        weight = 0.5 ** ((now - self.at) / half_life)
        return weight * self.passed, weight * self.failed

    def add(self, seen: Attempts, now: int, half_life: float) -> None:
        passed, failed = self.aged(now, half_life)
        self.passed, self.failed, self.at = passed + seen.passed, failed + seen.n - seen.passed, now


class _Learnable(Curriculum):
    """Passes and failures by a key, and a draw among the keys by their learnability."""

    def __init__(self, settings: CurriculumConfig, *, seed: str) -> None:
        self._settings, self._seed = settings, seed
        self._batches = 0
        self._counts: dict[str, _Counts] = {}

    def _explores(self, order: int) -> tuple[bool, random.Random]:
        rng = random.Random(f"curriculum/{self._seed}/{order}")
        return rng.random() < self._settings.explore, rng

    def _weight(self, counts: _Counts) -> float:
        (a, b), (passed, failed) = self._settings.prior, counts.aged(self._batches, self._settings.half_life)
        return learnability(a + passed, b + failed)

    def _rate(self, counts: _Counts) -> float:
        (a, b), (passed, failed) = self._settings.prior, counts.aged(self._batches, self._settings.half_life)
        return (a + passed) / (a + b + passed + failed)

    def _note(self, batch: Sequence[tuple[str, Attempts]]) -> None:
        self._batches += 1
        for key, seen in batch:
            if key in self._counts:
                self._counts[key].add(seen, self._batches, self._settings.half_life)

    def state(self) -> dict[str, Any]:
        rows = {key: [c.passed, c.failed, c.at, c.place] for key, c in self._counts.items()}
        return {"batches": self._batches, "counts": rows}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batches = int(state["batches"])
        self._counts = {key: _Counts(*row) for key, row in state["counts"].items()}


class TaskLearnability(_Learnable):
    """Tasks that were played are played again by their learnability; the others are the split's next ones.

    A share ``explore`` of the groups, and all before the first batch, play the split's next task.
    """

    def task_again(self, order: int) -> int | None:
        explores, rng = self._explores(order)
        known = [c for c in self._counts.values() if c.passed + c.failed > 0]
        if explores or not known:
            return None
        return rng.choices([c.place for c in known], [self._weight(c) for c in known])[0]

    def drawn(self, task: Task, place: int) -> None:
        self._counts.setdefault(task.content_hash, _Counts(place=place))

    def note(self, batch: Sequence[Attempts]) -> None:
        self._note([(seen.task, seen) for seen in batch])

    def metrics(self) -> dict[str, float]:
        known = [self._weight(c) for c in self._counts.values() if c.passed + c.failed > 0]
        mean = sum(known) / len(known) if known else 0.0
        return {"tasks_known": float(len(known)), "learnability": mean}


class LevelLearnability(_Learnable):
    """Levels are drawn by their learnability, a share ``explore`` of them evenly."""

    def __init__(self, settings: CurriculumConfig, *, seed: str) -> None:
        super().__init__(settings, seed=seed)
        self._levels = {f"{level:g}": level for level in grid(settings.level_step)}
        self._counts = {key: _Counts() for key in self._levels}

    def level(self, order: int) -> float | None:
        explores, rng = self._explores(order)
        keys = list(self._levels)
        weights = [1.0 if explores else self._weight(self._counts[key]) for key in keys]
        return self._levels[rng.choices(keys, weights)[0]]

    def note(self, batch: Sequence[Attempts]) -> None:
        self._note([(f"{seen.level:g}", seen) for seen in batch if seen.level is not None])

    def metrics(self) -> dict[str, float]:
        return {f"level_{key}/pass_rate": self._rate(counts) for key, counts in self._counts.items()}


_OURS: Mapping[str, Callable[[CurriculumConfig, float, str], Curriculum]] = {
    "level": lambda settings, start, seed: LevelCurriculum(settings, start=start),
    "learnability of a task": lambda settings, start, seed: TaskLearnability(settings, seed=seed),
    "learnability of a level": lambda settings, start, seed: LevelLearnability(settings, seed=seed),
}
"""By ``curriculum.kind``, and ``curriculum.by``: makes it of the settings, the level to begin with and a seed."""


def grid(step: float) -> list[float]:
    """Return the levels 0, step, 2·step, … and 1."""
    found = [0.0]
    while found[-1] < 1.0:
        found.append(moved_level(found[-1], 1.0, low=0.0, high=1.0, step=step))
    return found


def levels_of(settings: CurriculumConfig, difficulty: float | None, *, seed: int, label: str) -> list[float | None]:
    """Return all difficulties that a run may play, from the lowest. Without levels it is that of the environment.

    The arguments are those of ``curriculum_of``: levels of somebody's own may follow from the seed.
    """
    if settings.own:
        levels = _own(settings, difficulty=difficulty, seed=f"{seed}/{label}").levels
        return [difficulty] if levels is None else [*levels]
    if not settings.leveled:
        return [difficulty]
    if settings.kind == "learnability":
        return list(grid(settings.level_step))
    found, new = set[float](), {round(start_of(settings, difficulty), _DIGITS)}
    while new:
        found |= new
        new = {
            moved_level(level, rate, low=0.0, high=1.0, step=settings.level_step)
            for level in new
            for rate in (0.0, 1.0)
        } - found
    return [*sorted(found)]


def curriculum_of(settings: CurriculumConfig, *, difficulty: float | None, seed: int, label: str) -> Curriculum | None:
    """Return the curriculum of one environment, or None where the settings want none.

    Args:
        settings: of all environments of the run.
        difficulty: of the environment, by its own settings.
        seed: the run's.
        label: the environment's in a mixture.
    """
    if settings.kind == "none":
        return None
    if settings.own:
        return _own(settings, difficulty=difficulty, seed=f"{seed}/{label}")
    name = settings.kind if settings.kind == "level" else f"{settings.kind} of a {settings.by}"
    return _OURS[name](settings, start_of(settings, difficulty), f"{seed}/{label}")


def _own(settings: CurriculumConfig, *, difficulty: float | None, seed: str) -> OwnCurriculum:
    return OwnCurriculum(settings.kind, difficulty=difficulty, seed=seed, digits=_DIGITS)


def start_of(settings: CurriculumConfig, difficulty: float | None) -> float:
    """Return the level that ``kind = "level"`` begins with."""
    return settings.start if settings.start is not None else difficulty or 0.0
