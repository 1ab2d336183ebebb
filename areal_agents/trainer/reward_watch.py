"""The watch for rewards that are earned without the task: components of rewards, and answers, from step to step.

    groups of a step ─▶ component_means, same_answers ─▶ metrics
                                                    └──▶ RewardWatch.look ─▶ Suspicion, once an onset ─▶ event

Two signs are looked for. A component of the reward rises while correctness falls. And tasks that differ are answered
with the very same text. A sign is no proof: it says which episodes to read.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

from areal_agents.tracking.tracker import Tracker
from areal_agents.types import Group, Trajectory
from areal_agents.utils.short_text import cut, short

PREFIX = "component/"
_DEVIATIONS = 3.0
"""A mean moved where it is so many standard errors away."""
_COMPONENT_SHARE = 0.05
"""A component rose by at least this share of what it was."""
_CORRECT_FALL = 0.02
"""Correctness fell by at least this much."""
_TASKS = 4
"""With fewer tasks in a batch, equal answers say nothing."""
_STEPS = 3
"""So many steps in a row must show the same answers."""


@dataclass(frozen=True, slots=True)
class SameAnswers:
    """How many tasks of a batch are answered alike."""

    share: float
    """Of the tasks, at least half of whose episodes gave ``answer``. 0 where there are not two tasks."""
    answer: str
    tasks: int
    reward: float
    """Mean of the episodes that gave it."""


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A sign that a reward is earned without the task."""

    sign: str
    """``component_rises`` or ``same_answers``."""
    facts: Mapping[str, Any]
    text: str
    """One sentence for people, with what to look at."""


def component_means(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Return the mean of each component over the episodes that have it. Over an episode's turns it is summed up."""
    values: dict[str, list[float]] = {}
    for episode in episodes:
        sums: dict[str, float] = {}
        for turn in episode.turns:
            for name, x in turn.components.items():
                sums[name] = sums.get(name, 0.0) + x
        for name, total in sums.items():
            values.setdefault(name, []).append(total)
    return {PREFIX + name: fmean(found) for name, found in sorted(values.items())}


def without_prefix(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Return the metrics whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): x for name, x in metrics.items() if name.startswith(prefix)}


def same_answers(groups: Sequence[Group]) -> SameAnswers:
    """Find the answer that most tasks share. An episode that ended without a text has none."""
    by_task: dict[str, list[Trajectory]] = {}
    for group in groups:
        by_task.setdefault(group.task.content_hash, []).extend(group.trajectories)
    tasks: Counter[str] = Counter()
    for episodes in by_task.values():
        given = Counter(a for e in episodes if (a := _answer(e)))
        tasks.update(a for a, times in given.items() if 2 * times >= len(episodes))
    if len(by_task) < 2 or not tasks:
        return SameAnswers(0.0, "", len(by_task), 0.0)
    answer, count = max(tasks.items(), key=lambda item: (item[1], item[0]))
    paid = [e.reward for found in by_task.values() for e in found if _answer(e) == answer]
    return SameAnswers(count / len(by_task), answer, len(by_task), fmean(paid))


def _answer(episode: Trajectory) -> str:
    last = episode.turns[episode.last_step].message if episode.turns else None
    return last.spoken.strip() if last is not None and not last.tool_calls else ""


@dataclass
class RewardWatch:
    """The state of the watch, which a resumed run fills again from its rows of metrics."""

    correct: str
    """The component that says whether an answer is right. Empty: unknown, and no component is compared with it."""
    window: int
    """Steps, an even number. The mean of its second half is compared with that of the first."""
    same_answers: float
    """The share of tasks above which equal answers are a sign. 1 never is."""
    _rows: deque[dict[str, float]] = field(default_factory=deque)
    _alike: int = 0
    _asked: bool = False
    _quiet: dict[str, int] = field(default_factory=dict)
    """By sign that was told: for how many steps it has not been seen since."""

    def look(self, step: int, metrics: Mapping[str, float], alike: SameAnswers | None = None) -> list[Suspicion]:
        """Take a step's metrics in, and return the signs that begin with it.

        A sign that was told is told again once it was away for half a window.

        Args:
            step: the learner's.
            metrics: with the ``component/NAME`` of the step.
            alike: of the step's groups. None where they are not known, as for the rows of a resumed run.
        """
        self._rows.append({k: x for k, x in metrics.items() if k.startswith(PREFIX) and math.isfinite(x)})
        while len(self._rows) > self.window:
            self._rows.popleft()
        found = {PREFIX + s.facts["component"]: s for s in self._rising(step)}
        if alike is None:  # rows of earlier versions do not say how many tasks there were
            tasks = int(metrics.get("same_answer_tasks", _TASKS))
            alike = SameAnswers(metrics.get("same_answer_share", 0.0), "", tasks, 0.0)
        self._alike = self._alike + 1 if alike.tasks >= _TASKS and alike.share > self.same_answers else 0
        if self._alike >= _STEPS:
            found["same answers"] = _told_alike(step, alike)
        return self._onsets(found)

    def knows_correct(self, metrics: Mapping[str, float]) -> bool:
        """Say whether a step's metrics have the component that says which answers are right, or this was asked."""
        asked, self._asked = self._asked, True
        return asked or PREFIX + self.correct in metrics

    def _onsets(self, found: Mapping[str, Suspicion]) -> list[Suspicion]:
        new = [suspicion for sign, suspicion in found.items() if sign not in self._quiet]
        quiet = {sign: 0 if sign in found else steps + 1 for sign, steps in self._quiet.items()}
        self._quiet = {sign: steps for sign, steps in quiet.items() if steps < self.window // 2}
        self._quiet |= dict.fromkeys(found, 0)
        return new

    def _rising(self, step: int) -> list[Suspicion]:
        """Return a suspicion for each component that rose in the window in which correctness fell."""
        correct = PREFIX + self.correct
        if not self.correct or len(self._rows) < self.window:
            return []
        names = set.intersection(*(set(row) for row in self._rows))  # seen at every step
        if correct not in names:
            return []
        fell = _moved([row[correct] for row in self._rows])
        if fell is None or fell[1] > fell[0] - _CORRECT_FALL:
            return []
        told = []
        for name in sorted(names - {correct}):
            rose = _moved([row[name] for row in self._rows])
            if rose is not None and rose[1] > rose[0] + _COMPONENT_SHARE * abs(rose[0]):
                told.append(self._told_rising(step, name.removeprefix(PREFIX), rose, fell))
        return told

    def _told_rising(self, step: int, name: str, rose: tuple[float, float], fell: tuple[float, float]) -> Suspicion:
        first = step - self.window + 1
        facts = {
            "component": name, "before": rose[0], "after": rose[1], "correct": self.correct, "correct_before": fell[0],
            "correct_after": fell[1], "first_step": first, "last_step": step,
        }  # fmt: skip
        return Suspicion(
            "component_rises",
            facts,
            f"the reward's component {short(name)} rose from {rose[0]:.3g} to {rose[1]:.3g} while "
            f"{short(self.correct)} fell from {fell[0]:.3g} to {fell[1]:.3g} (steps {first} to {step}): read the "
            f"episodes of step {step} with the highest reward; where it is paid for wrong answers, gate it",
        )


def tell_signs(
    watch: RewardWatch,
    step: int,
    metrics: Mapping[str, float],
    groups: Sequence[Group],
    tracker: Tracker,
    *,
    env: str = "",
) -> None:
    """Tell of the signs that begin with a step, and once where nothing says which answers are right.

    Args:
        watch: takes the step in.
        step: the learner's.
        metrics: of the step's groups.
        groups: those of one environment.
        tracker: gets events, and lines for people.
        env: the environment's label, where the run has several.
    """
    where, said = ({"env": env}, f"env {env!r}: ") if env else ({}, "")
    if not watch.knows_correct(metrics):
        others = sorted(name.removeprefix(PREFIX) for name in metrics if name.startswith(PREFIX))
        tracker.event("correctness_unknown", step=step, looked_for=watch.correct, components=others, **where)
        if len(others) > 1:  # one alone has nothing to be compared with
            tracker.message(
                f"{said}the reward has no component {watch.correct!r}, so the watch cannot tell whether another rises "
                f"while right answers fall: set track.watch_correct to one of {', '.join(others)}"
            )
    for found in watch.look(step, metrics, same_answers(groups)):
        tracker.event("reward_hack_suspected", step=step, sign=found.sign, **found.facts, look_at=found.text, **where)
        tracker.message(f"warning: {said}{found.text}")


def _told_alike(step: int, alike: SameAnswers) -> Suspicion:
    answer = cut(alike.answer, 200)
    facts = {"answer": answer, "share": alike.share, "tasks": alike.tasks, "reward": alike.reward}
    return Suspicion(
        "same_answers",
        facts,
        f"{alike.share:.0%} of the {alike.tasks} tasks of step {step} are answered with the very same {short(answer)}, "
        f"which earns {alike.reward:.3g} on average: read these episodes; where tasks have few answers, raise "
        "track.watch_same_answers",
    )


def _moved(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the means of both halves where they differ by more than noise, else None."""
    half = len(values) // 2
    first, second = values[:half], values[-half:]
    before, after = fmean(first), fmean(second)
    noise = math.sqrt((variance(first) + variance(second)) / half)
    return (before, after) if abs(after - before) > _DEVIATIONS * noise else None
