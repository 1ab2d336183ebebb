"""The number of tasks that shows a given difference between two models.

    n = (z(1 - α/2) + z(power))² · Var(d) / δ²        with α = 0.05 and power = 0.8: 7.8489 · Var(d) / δ²

d is a task's difference of the two models' mean pass over k attempts, and δ the mean difference to be seen, paired by
task (the normal approximation of the paired test). Tasks are different tasks: copies are attempts at one of them
(``copies.py``). Its variance has two parts,

    Var(d) = ω² + σ²A / kA + σ²B / kB

of which ω² is that of the difference of the tasks' own pass rates, and σ² is the mean variance of one attempt around
its task's rate, p(1 - p). More attempts lower the second part alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.evaluation.compare import FEW_TASKS, Evaluation, TaskKey, compare, load
from areal_agents.evaluation.copies import by_content
from areal_agents.utils.tolerance import reaches

LEVEL, POWER = 0.05, 0.8
SHARE = 1.0 / 3.0
"""Of the variance p(1 - p) of an attempt, the share that lies between tasks where nothing is known: the tasks' rates
then follow Beta(2p, 2 - 2p), which at p = 0.5 is uniform on [0, 1]."""


@dataclass(frozen=True, slots=True)
class TasksNeeded:
    """How many tasks show a difference, and why."""

    difference: float
    k: int
    tasks: int
    """Different ones, by their content: copies of a task count as one."""
    variance: float
    """Var(d) at ``k`` attempts."""
    source: str
    """Where the variance is from."""
    by_k: tuple[tuple[int, int], ...]
    """k and the tasks that it needs, for other numbers of attempts; empty where they cannot be told."""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"level": LEVEL, "power": POWER}

    def __str__(self) -> str:
        attempts = "1 attempt" if self.k == 1 else f"{self.k} attempts"
        lines = [
            f"{self.tasks} different tasks with {attempts} each show a difference of {100 * self.difference:g} points "
            f"in pass@1 between two models on the same tasks (80 % power, p < 0.05 in two-sided paired tests)",
            f"variance of a task's difference: {self.variance:.4f}, {self.source}",
        ]
        if self.by_k:
            lines.append("attempts a task → different tasks: " + ", ".join(f"{k} → {n}" for k, n in self.by_k))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def tasks_for(difference: float, variance: float) -> int:
    """Return the least number of tasks, at least 2, that shows ``difference`` where a task's own has ``variance``."""
    z = NormalDist().inv_cdf(1.0 - LEVEL / 2.0) + NormalDist().inv_cdf(POWER)
    return max(2, math.ceil(z * z * variance / difference**2 - 1e-9))


@dataclass(frozen=True, slots=True)
class _Parts:
    """The two parts of the variance."""

    between: float
    """ω²."""
    within: float | None
    """σ²A + σ²B. None where one attempt a task does not tell it."""
    total: float | None
    """As it was measured, with ``k`` attempts on either side at every task. None where copies had more."""
    k: tuple[int, int]

    def at(self, k: int) -> float | None:
        """Return the variance with ``k`` attempts on both sides, or None where it cannot be told."""
        if self.k == (k, k) and self.total is not None:
            return self.total
        return None if self.within is None else self.between + self.within / k


def tasks_needed(
    difference: float, *, k: int | None, rate: float = 0.5, earlier: Sequence[str] = (), common: bool = False
) -> TasksNeeded:
    """Return how many tasks show ``difference`` between two models.

    Args:
        difference: of pass@1, in (0, 1).
        k: attempts a task of both models; as in ``earlier``, or 1, where none is given.
        rate: the pass@1 to expect, where there is no earlier evaluation.
        earlier: one evaluation, whose variance two independent models are taken to have, or two, whose differences are
            used. Folders or RUN:LABEL.
        common: of two evaluations, leave out the tasks that are not in both.

    Raises:
        ConfigError: an evaluation that is not there, that has too few tasks, or whose variance does not tell that of
            ``k`` attempts.
    """
    notes: list[str] = []
    if not earlier:
        parts = _guessed(rate)
        source = f"guessed from a pass@1 of {rate:g} and two models that do not agree on which tasks are hard"
        notes.append("models that agree need fewer: --compare A B takes the variance of two evaluations")
    elif len(earlier) == 1:
        one = load(earlier[0])
        parts, keys = _of_one(one), list(one.rewards)
        source = f"from {_counted(keys)} of {one.name}, for a model that does not agree on which are hard"
        notes += [*([one.partial] if one.partial else []), *_of_copies(keys)]
    else:
        a, b = load(earlier[0]), load(earlier[1])
        compare(a, b, common=common)  # refuses what cannot be compared
        keys = [key for key in a.rewards if key in b.rewards]
        parts = _of_two(a, b, keys)
        source = f"from the differences of {b.name} and {a.name} at {_counted(keys)}"
        notes += [*dict.fromkeys(e.partial for e in (a, b) if e.partial), *_of_copies(keys)]
    asked = k or (max(parts.k) if earlier else 1)
    variance = parts.at(asked)
    if variance is None:
        raise ConfigError(
            f"{' and '.join(earlier)}: with {parts.k[0]} and {parts.k[1]} attempts a task, the variance with {asked} "
            "cannot be told: evaluate with --k 2 or more and --temperature 1, or leave out --k"
        )
    if variance <= 0.0:
        raise ConfigError(
            f"{' and '.join(earlier)}: every task has the same result, which tells nothing of the variance: evaluate "
            "more tasks, or leave them out"
        )
    others = [(o, v) for o in sorted({1, 2, 4, 8, 16, asked}) if (v := parts.at(o)) is not None and v > 0.0]
    tasks = tasks_for(difference, variance)
    if tasks < FEW_TASKS:
        notes.append(f"fewer than {FEW_TASKS} tasks are few for any interval: play {FEW_TASKS} different ones")
    return TasksNeeded(
        difference, asked, tasks, variance, source,
        tuple((o, tasks_for(difference, v)) for o, v in others) if len(others) > 1 else (), tuple(notes),
    )  # fmt: skip


def _guessed(rate: float) -> _Parts:
    """Return the variance of two independent models that both pass with ``rate``."""
    attempt = rate * (1.0 - rate)
    between, within = 2.0 * attempt * SHARE, 2.0 * attempt * (1.0 - SHARE)
    return _Parts(between, within, between + within, (1, 1))


def _counted(keys: Sequence[TaskKey]) -> str:
    return f"{len({content for _, _, content in keys})} different tasks"


def _of_copies(keys: Sequence[TaskKey]) -> list[str]:
    """Say, where there are copies, that the answer does not count them."""
    n = len({content for _, _, content in keys})
    if n == len(keys):
        return []
    return [
        f"the {len(keys)} tasks that were played have {n} different contents: copies are attempts at one task, and the "
        "number of tasks is of different ones. A split that has fewer shows no such difference, however many are drawn"
    ]


def _of_one(one: Evaluation) -> _Parts:
    found = _rates_of(one, list(one.rewards))
    total = 2.0 * _variance(found.shares, one.name)
    within = None if found.within is None else 2.0 * found.within
    noise = None if within is None else within * found.per_attempt
    return _parts(total, within, noise, (found.k, found.k), even=found.even)


def _of_two(a: Evaluation, b: Evaluation, shared: Sequence[TaskKey]) -> _Parts:
    one, two = _rates_of(a, shared), _rates_of(b, shared)
    total = _variance([y - x for x, y in zip(one.shares, two.shares, strict=True)], f"{a.name} and {b.name}")
    k, even = (one.k, two.k), one.even and two.even
    if one.within is None or two.within is None:
        return _parts(total, None, None, k, even=even)
    noise = one.within * one.per_attempt + two.within * two.per_attempt
    return _parts(total, one.within + two.within, noise, k, even=even)


def _parts(total: float, within: float | None, noise: float | None, k: tuple[int, int], *, even: bool) -> _Parts:
    """Part ``total`` into ω² and the rest, ``noise``, where that is known."""
    return _Parts(max(0.0, total - (noise or 0.0)), within, total if even or within is None else None, k)


@dataclass(frozen=True, slots=True)
class _Rates:
    """What an evaluation says of its different tasks."""

    shares: tuple[float, ...]
    """Of the attempts at each, at its copies too, that passed."""
    within: float | None
    """σ². None where no task had two attempts."""
    per_attempt: float
    """The mean of 1 / attempts: that times σ² is in the variance of the shares."""
    even: bool
    """Whether each had ``k`` attempts."""
    k: int
    """Most attempts at one task as it was drawn."""


def _rates_of(one: Evaluation, keys: Sequence[TaskKey]) -> _Rates:
    """Return the pass rates of the different tasks among ``keys``.

    σ² is unbiased: p(1 - p) of a attempts is a / (a - 1) times too small. It is over all tasks with two attempts, each
    counting by a - 1.
    """
    contents = [key[2] for key in keys]
    wins, _ = by_content(contents, [float(sum(map(reaches, one.rewards[key]))) for key in keys])
    counts, _ = by_content(contents, [float(len(one.rewards[key])) for key in keys])
    shares = tuple(w / c for w, c in zip(wins, counts, strict=True))
    known = math.fsum(c - 1 for c in counts)
    within = math.fsum(p * (1 - p) * c for p, c in zip(shares, counts, strict=True)) / known if known else None
    k = max(len(one.rewards[key]) for key in keys)
    return _Rates(shares, within, math.fsum(1 / c for c in counts) / len(counts), all(c == k for c in counts), k)


def _variance(values: Sequence[float], name: str) -> float:
    if len(values) < 2:
        raise ConfigError(f"{name}: {len(values)} tasks tell no variance: evaluate more")
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
