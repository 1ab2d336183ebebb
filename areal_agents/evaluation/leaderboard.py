"""The leaderboard of a suite: what each model scored at each entry, and how the models differ from the first.

    cells ─▶ Score: one entry, one model, its seeds' attempts together ─▶ Mean: over the entries
                └─▶ Difference to the first model, paired by task; Holm's correction over models × entries

Tables of it for people are in ``evaluation/leaderboard_tables.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from areal_agents.evaluation.compare import Evaluation, TaskKey, compare
from areal_agents.evaluation.copies import by_content, effective
from areal_agents.evaluation.paired import LEVEL
from areal_agents.evaluation.report import EvalReport, without_score
from areal_agents.evaluation.statistics import (
    clustered_interval,
    holm,
    mean_of_intervals,
    pass_at_k,
    pass_hat_k,
    sign_flip_test,
    wilson_interval,
)
from areal_agents.evaluation.suite import MEAN, Suite, SuiteEntry
from areal_agents.evaluation.suite_cells import Cell
from areal_agents.evaluation.unfinished import KIND, STEP
from areal_agents.tracking.trajectories import shard_path
from areal_agents.utils.tolerance import reaches

Interval = tuple[float, float]
Rewards = Mapping[TaskKey, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Score:
    """What one model scored at one entry, or at the mean over the entries. Rates are in [0, 1]."""

    model: str
    entry: str
    n: int = 0
    """Different tasks, by their content, with a scored attempt."""
    attempts: int = 0
    k: int = 1
    pass_at_1: float | None = None
    """None where there is nothing to score, and in the mean where an entry lacks something."""
    ci95: Interval | None = None
    """Clustered by task."""
    pass_at_k: float | None = None
    pass_at_k_ci95: Interval | None = None
    pass_hat_k: float | None = None
    pass_hat_k_ci95: Interval | None = None
    """By the unbiased estimators over the tasks with k attempts or more. The intervals are Wilson's over them."""
    reward: float | None = None
    truncation_rate: float | None = None
    infra_rate: float | None = None
    left_out: int = 0
    """Tasks that could not be played or scored, and count nowhere."""
    complete: bool = False
    error: str = ""
    """Why it could not be played."""
    folders: tuple[str, ...] = ()
    """Where its evaluations are, one a seed."""
    copies: int = 0
    """Tasks with a scored attempt besides, whose content is that of another one. They are in all rates."""
    unscored: int = 0
    """Attempts that were made and have no score, in no rate: infrastructure failed them, or they are ``failed``."""
    failed: int = 0
    """Attempts that the reward or the environment failed by itself."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of a model's pass@1 from the first model's, paired by task."""

    model: str
    entry: str
    n: int
    """Different tasks that both scored."""
    difference: float
    ci95: Interval | None
    p_value: float
    """Two-sided, of the sign-flip test by task."""
    p_holm: float = 1.0
    """With Holm's correction: over models × entries, and for the means over the models."""

    @property
    def shown(self) -> bool:
        """Say whether a difference may be claimed: corrected test and interval both show it."""
        return self.p_holm < LEVEL and self.ci95 is not None and not self.ci95[0] <= 0.0 <= self.ci95[1]


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """The scores of several models at a suite."""

    suite: Suite
    models: tuple[str, ...]
    """The first is the one that the others are compared with."""
    scores: tuple[Score, ...]
    means: tuple[Score, ...]
    differences: tuple[Difference, ...]
    mean_differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def complete(self) -> bool:
        return all(score.complete for score in self.scores)

    def score(self, entry: str, model: str) -> Score:
        """Return the score of ``model`` at ``entry``, which may be ``mean``."""
        return next(s for s in (*self.scores, *self.means) if (s.entry, s.model) == (entry, model))

    def to_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite.model_dump(mode="json"),
            "models": list(self.models),
            "complete": self.complete,
            "scores": [asdict(s) for s in self.scores],
            "means": [asdict(s) for s in self.means],
            "differences": [asdict(d) | {"shown": d.shown} for d in self.differences],
            "mean_differences": [asdict(d) | {"shown": d.shown} for d in self.mean_differences],
            "notes": list(self.notes),
        }

    def below(self, limits: Mapping[str, float]) -> list[str]:
        """Say which scores are below their limit, are missing, or would be below if attempts without a score failed.

        Args:
            limits: the least pass@1 by entry. ``mean`` is the mean over the entries, an empty name each entry.

        Raises:
            ConfigError: the suite has no such entry.
        """
        found = []
        for name, limit in limits.items():
            wanted = [e.name for e in self.suite.entries] if not name else [name]
            if name not in ("", MEAN):
                self.suite.entry(name)
            for entry in wanted:
                for score in (self.score(entry, model) for model in self.models):
                    if score.pass_at_1 is None or not score.complete:
                        found.append(f"{entry}, {score.model}: not complete, so not known to reach {limit:g}")
                    elif not reaches(score.pass_at_1, limit):
                        found.append(f"{entry}, {score.model}: pass@1 {score.pass_at_1:.3f} is below {limit:g}")
                    else:
                        found += self._not_known(score, limit)
        return list(dict.fromkeys(found))

    def _not_known(self, score: Score, limit: float) -> list[str]:
        """Say which entries of a score have too many attempts without one."""
        if score.entry != MEAN:
            said = without_score(score.pass_at_1 or 0.0, score.attempts, score.unscored, limit)
            return [f"{score.entry}, {score.model}: {said}"] if said else []
        own = [s for s in self.scores if s.model == score.model and s.attempts]
        least = math.fsum((s.pass_at_1 or 0.0) * s.attempts / (s.attempts + s.unscored) for s in own) / len(own)
        if reaches(least, limit):
            return []
        lost = sum(s.unscored for s in own)
        return [f"{MEAN}, {score.model}: {lost} attempts have no score, so it is not known to reach {limit:g}"]


def leaderboard_of(
    suite: Suite, models: Sequence[str], cells: Mapping[str, Sequence[Cell]], failed: Mapping[Path, str]
) -> Leaderboard:
    """Read the cells and compare the models.

    Args:
        suite: what was played.
        models: their names, the first of which the others are compared with.
        cells: of each model.
        failed: why a cell could not be played, by its folder.

    Raises:
        ArealError: a cell's files cannot be read.
    """
    scores: list[Score] = []
    rewards: dict[tuple[str, str], Rewards] = {}
    notes: list[str] = []
    for entry in suite.entries:
        for model in models:
            own = [cell for cell in cells[model] if cell.entry.name == entry.name]
            pooled = _pooled(own)
            score = _score(entry, model, own, pooled, failed)
            scores.append(score)
            notes += _notes(score)
            if score.complete:
                rewards[entry.name, model] = pooled
    means = [_mean(model, [s for s in scores if s.model == model]) for model in models]
    differences, overall = [], []
    for model in models[1:]:
        pairs = {
            e.name: (rewards[e.name, models[0]], rewards[e.name, model])
            for e in suite.entries
            if (e.name, models[0]) in rewards and (e.name, model) in rewards
        }
        own_differences = [_difference(model, name, *pair) for name, pair in pairs.items()]
        differences += own_differences
        if len(pairs) == len(suite.entries) > 1:
            overall.append(_mean_difference(model, own_differences, [*pairs.values()]))
    return Leaderboard(
        suite, tuple(models), tuple(scores), tuple(means), _corrected(differences), _corrected(overall), tuple(notes)
    )


def _pooled(cells: Sequence[Cell]) -> dict[TaskKey, list[float]]:
    """Return the rewards of each task's attempts, of all seeds."""
    pooled: dict[TaskKey, list[float]] = {}
    for cell in cells:
        shard = shard_path(cell.out, KIND, STEP)
        lines = shard.with_suffix(".jsonl")
        if shard.exists() or (lines.exists() and lines.stat().st_size):
            for key, values in cell.rewards().items():
                pooled.setdefault(key, []).extend(values)
    return pooled


def _score(entry: SuiteEntry, model: str, cells: Sequence[Cell], rewards: Rewards, failed: Mapping[Path, str]) -> Score:
    reports = [cell.report() for cell in cells]
    error = next((failed[cell.out] for cell in cells if cell.out in failed), "")
    complete = not error and all(r is not None and not r.unplayed for r in reports)
    there = [r for r in reports if r is not None]
    empty = Score(model, entry.name, k=entry.k, complete=complete and bool(rewards), error=error,
                  folders=tuple(str(cell.out) for cell in cells))  # fmt: skip
    if not rewards:
        return empty
    wins = [sum(map(reaches, values)) for values in rewards.values()]
    counts = [len(values) for values in rewards.values()]
    contents = [key[2] for key in rewards]
    full = [(c, w, content) for c, w, content in zip(counts, wins, contents, strict=True) if c >= entry.k]
    of_k: dict[str, Any] = {}
    if entry.k > 1 and full:
        for name, rate in (("pass_at_k", pass_at_k), ("pass_hat_k", pass_hat_k)):
            mean = float(sum((rate(c, w, entry.k) for c, w, _ in full), Fraction(0)) / len(full))
            tasks = effective(list(Counter(content for *_, content in full).values()))
            of_k |= {name: mean, f"{name}_ci95": wilson_interval(mean, tasks)}
    return replace(
        empty,
        n=len(set(contents)),
        copies=len(contents) - len(set(contents)),
        attempts=sum(counts),
        pass_at_1=sum(wins) / sum(counts),
        ci95=clustered_interval(by_content(contents, wins)[0], by_content(contents, counts)[0]),
        reward=math.fsum(r for values in rewards.values() for r in values) / sum(counts),
        truncation_rate=_weighted(there, "truncation_rate"),
        infra_rate=_weighted(there, "infra_rate"),
        left_out=len({id for r in there for id in r.left_out}),
        unscored=sum(r.unscored for r in there),
        failed=sum(r.failed for r in there),
        **of_k,
    )


def _weighted(reports: Sequence[EvalReport], name: str) -> float | None:
    total = sum(r.attempts for r in reports)
    return sum(getattr(r, name) * r.attempts for r in reports) / total if total else None


def _mean(model: str, scores: Sequence[Score]) -> Score:
    """Return the mean over the entries, each of which counts the same; without numbers where an entry has none."""
    whole = all(s.complete for s in scores)
    found = Score(
        model, MEAN, sum(s.n for s in scores), sum(s.attempts for s in scores), complete=whole,
        copies=sum(s.copies for s in scores),
    )  # fmt: skip
    if not whole:
        return found
    values: dict[str, Any] = {"reward": math.fsum(s.reward or 0.0 for s in scores) / len(scores)}
    for name, interval in (("pass_at_1", "ci95"), ("pass_at_k", "pass_at_k_ci95"), ("pass_hat_k", "pass_hat_k_ci95")):
        rates, intervals = [getattr(s, name) for s in scores], [getattr(s, interval) for s in scores]
        if all(r is not None for r in rates):
            values[name], values[interval] = mean_of_intervals(rates, intervals)
    return replace(found, **values)


def _difference(model: str, entry: str, first: Rewards, other: Rewards) -> Difference:
    if not first.keys() & other.keys():  # infrastructure failed, on one side or the other, at every task
        return Difference(model, entry, 0, 0.0, None, 1.0)
    pair = compare(Evaluation("first", first), Evaluation(model, other), common=True)
    return Difference(model, entry, pair.n, pair.pass_at_1.difference, pair.pass_at_1.ci95, pair.p_value)


def _mean_difference(
    model: str, differences: Sequence[Difference], pairs: Sequence[tuple[Rewards, Rewards]]
) -> Difference:
    """Return the mean over the entries, each of which counts the same.

    Its test flips the signs of different tasks, each weighted by its share of its entry's tasks.
    """
    flips: list[Fraction] = []
    for first, other in pairs:
        shared = [key for key in first if key in other]
        changes = [(_share(other[key]) - _share(first[key])) / len(shared) for key in shared]
        flips += by_content([key[2] for key in shared], changes)[0]
    n, p = sum(d.n for d in differences), sign_flip_test(flips)
    if any(d.ci95 is None for d in differences):
        return Difference(model, MEAN, n, math.fsum(d.difference for d in differences) / len(differences), None, p)
    mean, (low, high) = mean_of_intervals([d.difference for d in differences], [d.ci95 for d in differences if d.ci95])
    if p >= LEVEL:  # as in a comparison: the interval claims no more than the test
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(model, MEAN, n, mean, (max(-1.0, low), min(1.0, high)), p)


def _share(rewards: Sequence[float]) -> Fraction:
    return Fraction(sum(map(reaches, rewards)), len(rewards))


def _corrected(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    corrected = holm([d.p_value for d in differences])
    return tuple(replace(d, p_holm=p) for d, p in zip(differences, corrected, strict=True))


def _notes(score: Score) -> list[str]:
    """Say what makes a score less than it looks."""
    where, found = f"{score.entry}, {score.model}", []
    if score.error:
        found.append(f"{where}: not played: {score.error}")
    elif not score.complete:
        tasks = score.n + score.copies
        found.append(f"{where}: partial, {score.attempts} attempts at {tasks} tasks; the same command plays the rest")
    if score.left_out:
        found.append(f"{where}: {score.left_out} tasks could not be played or scored, and count nowhere")
    if score.failed:
        found.append(
            f"{where}: reward or environment failed {score.failed} attempts by itself, and they are in no rate"
        )
    if score.infra_rate:
        found.append(f"{where}: infrastructure failed {100 * score.infra_rate:.1f} % of the attempts; the same command "
                     "plays them again")  # fmt: skip
    return found
