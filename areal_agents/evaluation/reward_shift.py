"""The changes that a new reward brings to the mean, to ranks and passes, and to the signs of the advantages.

These are the numbers of ``areal-agents rescore``. Ranks and signs matter more than values, because a shifted or scaled
reward with the same order trains much the same policy. Every share counts an episode once. Episodes that the new reward
failed on are in no number but ``failed``, and their groups in no advantage.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, per_turn, refuse_biased
from areal_agents.algorithms.refinement import refined
from areal_agents.errors import ArealError, ConfigError
from areal_agents.evaluation.rescore import Outcome, Rescored
from areal_agents.evaluation.saved_run import columns
from areal_agents.evaluation.statistics import spearman
from areal_agents.group_reward import GroupRewardLike, declaration
from areal_agents.reward import name_of
from areal_agents.settings.config import AlgorithmConfig
from areal_agents.tracking.console import plain
from areal_agents.utils.short_text import text_of
from areal_agents.utils.tolerance import all_same, rounding_of

WORST = 10
"""Flipped tasks that the table lists. The JSON holds all."""
SHOWN_TRACE_LINES = 30


@dataclass(frozen=True, slots=True)
class TaskFlip:
    """A task that passes under one reward and not under the other.

    A task passes where at least half of its episodes do.
    """

    task: str
    old_pass: float
    new_pass: float
    """Share of its episodes that pass."""
    episodes: tuple[str, ...]
    """The ones whose own pass flips."""


@dataclass(frozen=True, slots=True)
class SignChanges:
    """The numbers of sampled tokens, out of ``total``, whose advantage has another sign than before."""

    total: int = 0
    flipped: int = 0
    """From positive to negative or back. What was reinforced would be discouraged."""
    to_zero: int = 0
    from_zero: int = 0


@dataclass(frozen=True, slots=True)
class AdvantageShift:
    """The change of the advantages from the old rewards to the new ones.

    Both are computed again with the run's own estimator, step by step: of the same groups, those that are not skipped.
    """

    estimator: str
    groups: int
    skipped: int
    """Groups left out: too few episodes, or the new reward failed on one of them."""
    signal_old: int
    signal_new: int
    """Groups with an advantage that is not zero."""
    signal_lost: int
    signal_gained: int
    tokens: SignChanges
    """Tokens, since they are what the loss sums over: a long turn weighs more than a short one."""


@dataclass(frozen=True, slots=True)
class RewardShift:
    """The whole comparison of the new rewards with the old ones."""

    reward: str
    scored: int
    failed: int
    skipped: int
    tasks: int
    groups: int
    statuses: dict[str, int]
    """Verdicts by status."""
    mean_old: float
    mean_new: float
    changed: float
    """Share of episodes whose reward is another number, up to rounding."""
    spearman: float | None
    pass_at: float
    pass_old: float
    pass_new: float
    """Share of episodes whose reward reaches ``pass_at``."""
    episodes_flipped: int
    tasks_flipped: float
    """Share of tasks."""
    flips: tuple[TaskFlip, ...]
    """Worst first, which is the largest change of the pass rate."""
    advantages: AdvantageShift | None
    """None where the run did not train on these episodes, or where they cannot be computed again."""
    refused: str = ""
    """Why a training of these settings refuses the new reward, where it does."""
    no_advantages: str = ""
    """Why the advantages of a training cannot be computed again, where they cannot."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Return the comparison as text for people, safe for a terminal."""
        parts = [self._head(), self._passes()]
        if self.advantages is not None:
            parts.append(_advantage_table(self.advantages))
        if self.no_advantages:
            parts.append(f"advantages cannot be compared: {self.no_advantages}")
        if self.refused:
            parts.append(f"a training refuses it: {self.refused}")
        return plain("\n\n".join(parts))

    def _head(self) -> str:
        odd = {s: n for s, n in self.statuses.items() if s != "ok"}
        notes = [f"{n} {s}" for s, n in odd.items()] + ([f"{self.skipped} without a turn"] if self.skipped else [])
        return (
            f"{self.reward}: {self.scored} episodes, {self.tasks} tasks, {self.groups} groups; {self.failed} failed"
            + (f" ({', '.join(notes)})" if notes else "")
            + f"\nmean reward {self.mean_old:.4g} before, {self.mean_new:.4g} now; changed on {self.changed:.1%} of "
            f"the episodes; Spearman ρ {'–' if self.spearman is None else f'{self.spearman:.3f}'}"
        )

    def _passes(self) -> str:
        lines = [
            f"pass (reward ≥ {self.pass_at:g}): {self.pass_old:.3f} of the episodes before, {self.pass_new:.3f} now; "
            f"{self.episodes_flipped} episodes and {self.tasks_flipped:.1%} of the tasks flip"
        ]
        if self.flips:
            rows = [["task", "pass, old", "pass, new", "for example"]]
            rows += [[f.task, f"{f.old_pass:.2f}", f"{f.new_pass:.2f}", f.episodes[0]] for f in self.flips[:WORST]]
            lines.append(columns(rows))
        if len(self.flips) > WORST:
            lines.append(f"… and {len(self.flips) - WORST} more (--json lists them)")
        return "\n".join(lines)


def compare(
    outcome: Outcome, *, reward: str, algorithm: AlgorithmConfig | None = None, pass_at: float = 1.0,
    group: GroupRewardLike | None = None,
) -> RewardShift:  # fmt: skip
    """Compare an outcome's new rewards with its old ones.

    Args:
        outcome: of one rescoring.
        reward: the new reward's name, for the report.
        algorithm: whose advantages to compute again. None leaves them out.
        pass_at: the reward from which on an episode passes.
        group: the group reward among the new ones, if any.

    Raises:
        ValueError: no episode has a new reward.
    """
    scored = [e for e in outcome.episodes if e.new_K is not None]
    if not scored:
        raise ValueError(f"{reward} failed on every episode: there is nothing to compare")
    old, new = np.array([e.old for e in scored]), np.array([e.new for e in scored])
    limit = pass_at - rounding_of(pass_at)
    flips = _flips(scored, limit)
    advantages, why = (None, "") if algorithm is None else _advantages(outcome.episodes, algorithm)
    return RewardShift(
        reward,
        scored=len(scored),
        failed=len(outcome.failures),
        skipped=outcome.skipped,
        tasks=len({e.task for e in scored}),
        groups=len({(e.kind, e.group) for e in scored}),
        statuses=dict(Counter(e.status for e in scored)),
        mean_old=float(old.mean()),
        mean_new=float(new.mean()),
        changed=sum(not all_same((e.old, e.new)) for e in scored) / len(scored),
        spearman=spearman(old.tolist(), new.tolist()),
        pass_at=pass_at,
        pass_old=float((old >= limit).mean()),
        pass_new=float((new >= limit).mean()),
        episodes_flipped=int(((old >= limit) != (new >= limit)).sum()),
        tasks_flipped=len(flips) / len({e.task for e in scored}),
        flips=tuple(flips),
        advantages=advantages,
        refused="" if algorithm is None or group is None else refusal(group, algorithm),
        no_advantages=why,
    )


def refusal(group: GroupRewardLike, algorithm: AlgorithmConfig) -> str:
    """Return why a training with ``algorithm`` refuses the group reward, or an empty text."""
    try:
        refuse_biased(algorithm.advantage, declaration(group, "the group reward"), name_of(group))
    except ConfigError as error:
        return text_of(error)
    return ""


def _advantages(episodes: Sequence[Rescored], algorithm: AlgorithmConfig) -> tuple[AdvantageShift | None, str]:
    try:
        return advantage_shift(episodes, algorithm), ""
    except (ArealError, ValueError) as error:  # a reward that the estimator refuses, for one
        return None, text_of(error)


def advantage_shift(episodes: Sequence[Rescored], algorithm: AlgorithmConfig) -> AdvantageShift:
    """Compare the signs of the advantages before and after, group by group.

    Raises ArealError where they depend on what no reward says: a critic's values, greedy episodes, which the new reward
    did not judge, a teacher, or a reference policy that the rewards pay for leaving.
    """
    estimator = Estimator(algorithm.advantage)
    if estimator.reads_values or estimator.baseline == "greedy":
        what = "a critic's values" if estimator.reads_values else "greedy episodes, which are not rescored"
        raise ArealError(f"{algorithm.advantage.kind!r} compares with {what}")
    if estimator.reads_ratios:
        raise ArealError(f"{algorithm.advantage.kind!r} reads the log-probabilities of its step")
    if algorithm.unsaved:
        raise ArealError(f"advantages depend on {algorithm.unsaved}, too")
    groups: dict[tuple[str, str], list[Rescored]] = defaultdict(list)
    for e in episodes:
        groups[e.kind, e.group].append(e)
    usable = [g for g in groups.values() if len(g) > 1 and all(e.new_K is not None for e in g)]
    steps: dict[tuple[str, int], list[list[Rescored]]] = defaultdict(list)
    for group in usable:
        steps[group[0].kind, group[0].step].append(group)
    tokens: Counter[str] = Counter()
    signal = Counter(skipped=len(groups) - len(usable))
    for step in steps.values():
        found = (_signs(step, estimator, algorithm, new=new) for new in (False, True))
        for group, before, after in zip(step, *found, strict=True):
            had, has = any(s.any() for s in before), any(s.any() for s in after)
            for name, yes in {"old": had, "new": has, "lost": had and not has, "gained": has and not had}.items():
                signal[name] += int(yes)
            for e, old_K, new_K in zip(group, before, after, strict=True):
                tokens.update(_changed_tokens(np.array(e.tokens_K), old_K, new_K))
    return AdvantageShift(
        algorithm.advantage.kind,
        len(groups),
        signal["skipped"],
        signal["old"],
        signal["new"],
        signal["lost"],
        signal["gained"],
        SignChanges(**tokens),
    )


def _changed_tokens(tokens_K: NDArray[np.int64], old_K: NDArray[np.int8], new_K: NDArray[np.int8]) -> dict[str, int]:
    """Return the fields of ``SignChanges`` for one episode of K turns."""
    return {
        "total": int(tokens_K.sum()),
        "flipped": int(tokens_K[old_K * new_K < 0].sum()),
        "to_zero": int(tokens_K[(old_K != 0) & (new_K == 0)].sum()),
        "from_zero": int(tokens_K[(old_K == 0) & (new_K != 0)].sum()),
    }


def _signs(
    step: Sequence[Sequence[Rescored]], estimator: Estimator, algorithm: AlgorithmConfig, *, new: bool
) -> list[list[NDArray[np.int8]]]:
    """Return the signs of the advantages that training would compute of one step's groups: −1, 0 or 1 a turn."""
    views = [
        [
            EpisodeView((new and e.new_K) or e.old_K, e.tokens_K, e.state_keys_K, e.terminated, e.stop_reason)
            for e in group
        ]
        for group in step
    ]
    found = refined(estimator.of_batch(views), views, overlong=algorithm.overlong, normalize=algorithm.normalize)
    return [[np.sign(per_turn(a)).astype(np.int8) for a in group] for group in found]


def _flips(scored: Sequence[Rescored], limit: float) -> list[TaskFlip]:
    tasks: dict[str, list[Rescored]] = defaultdict(list)
    for e in scored:
        tasks[e.task].append(e)
    flips = []
    for task, tries in tasks.items():
        old = sum(e.old >= limit for e in tries) / len(tries)
        new = sum(e.new >= limit for e in tries) / len(tries)
        if (old >= 0.5) != (new >= 0.5):
            flipped = tuple(e.id for e in tries if (e.old >= limit) != (e.new >= limit))
            flips.append(TaskFlip(task, old, new, flipped))
    return sorted(flips, key=lambda f: (-abs(f.new_pass - f.old_pass), f.task))


def _advantage_table(shift: AdvantageShift) -> str:
    c = shift.tokens
    flipped, to_zero, from_zero = (f"{n / max(c.total, 1):.1%}" for n in (c.flipped, c.to_zero, c.from_zero))
    return (
        f"advantages ({shift.estimator}) over {shift.groups - shift.skipped} groups"
        + (f", {shift.skipped} left out" if shift.skipped else "")
        + f": {shift.signal_old} groups had a signal, {shift.signal_new} have one now; "
        f"{shift.signal_lost} lose it, {shift.signal_gained} gain it\n"
        f"of {c.total} sampled tokens, the advantage of {flipped} changes sign, of {to_zero} becomes zero, of "
        f"{from_zero} is no longer zero"
    )


def failure_text(outcome: Outcome) -> str:
    """Say how often the reward failed, by error, and show the first traceback.

    The text is safe for a terminal.
    """
    total = len(outcome.episodes)
    kinds = Counter(f.error.partition(":")[0] for f in outcome.failures)
    first = outcome.failures[0]
    trace = first.trace.rstrip().splitlines()[-SHOWN_TRACE_LINES:]
    head = f"the reward failed on {len(outcome.failures)} of {total} episodes: " + ", ".join(
        f"{n} × {kind}" for kind, n in kinds.most_common()
    )
    return plain("\n".join([head, f"first, on episode {first.episode}:", *(line[:300] for line in trace)]))
