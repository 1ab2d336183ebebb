"""The comparison of two finished evaluations, task by task.

    RUN:LABEL or FOLDER ─▶ load ─▶ Evaluation ─┐
                                               ├─▶ compare ─▶ Comparison
    RUN:LABEL or FOLDER ─▶ load ─▶ Evaluation ─┘

Both played the same tasks, so each task is its own control. Its attempts are averaged on each side. The statistics are
about the paired difference B - A of those means, and say what it can and cannot show. Tasks are the same where id and
content hash agree.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.evaluation.copies import by_content
from areal_agents.evaluation.held_out import Sample
from areal_agents.evaluation.paired import FEW_FLIPS, LEVEL, Paired, mean, paired, pass_interval
from areal_agents.evaluation.statistics import mean_interval, pass_at_k, pass_hat_k
from areal_agents.evaluation.unfinished import partial_note
from areal_agents.tracking.trajectories import read_records, shards
from areal_agents.utils.tolerance import reaches

FEW_TASKS = 30
"""With fewer, the mean of the differences may be far from normal, which the t interval takes it for."""
SHOWN = 20
"""Task ids a list of the table."""

TaskKey = tuple[str, str, str]
"""Split, id and content hash."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The part of one evaluation that a comparison needs."""

    name: str
    rewards: Mapping[TaskKey, Sequence[float]]
    """Per task the rewards of its attempts."""
    env: str | None = None
    """The environment's id, where a file next to the trajectories says it."""
    partial: str | None = None
    """What it lacks, where it was interrupted."""
    sample: Sample | None = None
    """Which tasks of the split, where a report next to the trajectories says it."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of B with A over ``n`` shared tasks.

    Rates are in [0, 1]. They are means over all tasks as they were drawn, copies included; intervals and tests are over
    the different ones.
    """

    a: str
    b: str
    n: int
    """Different tasks, by their content."""
    attempts: tuple[int, int]
    """Most attempts a task, on each side."""
    pass_at_1: Paired
    """The mean over tasks of the share of attempts that passed. The interval is Student's t over the n differences."""
    reward: Paired
    k: int
    """The fewer of the two sides' attempts a task, which pass@k and pass^k are of."""
    pass_at_k: Paired | None
    pass_hat_k: Paired | None
    """Over the tasks with at least k scored attempts on both sides, by the unbiased estimators where there are more.
    None with k = 1, and without such tasks."""
    gained: tuple[str, ...]
    """Ids of the tasks that B passes more often: its wins."""
    lost: tuple[str, ...]
    """Ids of the tasks that A passes more often."""
    ties: int
    p_value: float
    """Of pass@1, as in ``pass_at_1``."""
    left_out: tuple[int, int]
    """Tasks of A and of B that the other one lacks."""
    notes: tuple[str, ...] = ()
    """What makes the numbers less certain than they look."""
    copies: int = 0
    """Shared tasks besides, whose content is that of another one."""

    def within(self, margin: float) -> bool:
        """Say whether the 95 % interval of pass@1's difference lies inside ±``margin``.

        A and B are then as good as equal.
        """
        interval = self.pass_at_1.ci95
        return interval is not None and -margin < interval[0] and interval[1] < margin

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def verdict(self) -> str:
        """Say in one sentence what pass@1 shows.

        A difference is claimed only where interval and test both show it.
        """
        if self.pass_at_1.ci95 is None:
            return "nothing can be said about the difference"
        low, high = self.pass_at_1.ci95
        if self.p_value < LEVEL and low > 0.0:
            return f"B passes more often: between {100 * low:.1f} and {100 * high:.1f} points more"
        if self.p_value < LEVEL and high < 0.0:
            return f"B passes less often: between {-100 * high:.1f} and {-100 * low:.1f} points less"
        return f"no difference shown: anything from {100 * low:+.1f} to {100 * high:+.1f} points fits these tasks"

    def table(self) -> str:
        """Return the comparison as text for people."""
        head = ("", "A", "B", "B - A", "95 % CI")
        of_k = ((f"pass@{self.k}", self.pass_at_k), (f"pass^{self.k}", self.pass_hat_k))
        named = (("pass@1", self.pass_at_1), *of_k, ("reward", self.reward))
        rows = [head, *(_row(name, pair) for name, pair in named if pair is not None)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        exact = self.attempts == (1, 1) and not self.copies
        test = "exact McNemar test" if exact else "sign-flip permutation test by task"
        tasks = f"{self.n} different tasks ({self.n + self.copies} with copies)" if self.copies else f"{self.n} tasks"
        out = [
            f"A: {self.a}    B: {self.b}",
            f"{tasks}, {self.attempts[0]} and {self.attempts[1]} attempts a task, paired by task",
            "",
            lines[0],
            "─" * max(map(len, lines)),
            *lines[1:],
            "",
            f"tasks: {len(self.gained)} gained, {len(self.lost)} lost, {self.ties} the same    "
            f"p = {self.p_value:.3g} ({test})",
        ]
        out += [f"{what}: {_few(ids)}" for what, ids in (("gained", self.gained), ("lost", self.lost)) if ids]
        out.append(self.verdict())
        if any(self.left_out):
            out.append(f"left out, not in both: {self.left_out[0]} tasks of A, {self.left_out[1]} of B")
        return "\n".join([*out, *(f"note: {note}" for note in self.notes)])


def compare(a: str | Path | Evaluation, b: str | Path | Evaluation, *, common: bool = False) -> Comparison:
    """Compare evaluation B with evaluation A.

    Args:
        a: a folder that ``areal-agents eval`` wrote, ``RUN:LABEL``, or an Evaluation already read.
        b: the other one, in the same ways.
        common: compare the tasks that are in both and leave the others out. Without it, different tasks are refused.

    Raises:
        ConfigError: the tasks differ without ``common``, the splits differ, or no task is shared.
        ArealError: a file cannot be read.
    """
    one, two = (e if isinstance(e, Evaluation) else load(e) for e in (a, b))
    shared = _shared(one, two, common=common)
    contents = [key[2] for key in shared]
    passed = [(_passed(one.rewards[key]), _passed(two.rewards[key])) for key in shared]
    means = [(mean(one.rewards[key]), mean(two.rewards[key])) for key in shared]
    sums, copies = by_content(contents, [y - x for x, y in passed])
    differences = [float(d / c) for d, c in zip(sums, copies, strict=True)]
    on_pass, attempts = paired(passed, contents, pass_interval), (_most(one, shared), _most(two, shared))
    k = min(attempts)
    full = [key for key in shared if k > 1 and all(len(e.rewards[key]) >= k for e in (one, two))]
    first = {key[2]: key[1] for key in reversed(shared)}
    ids = [first[content] for content in dict.fromkeys(contents)]
    gained = tuple(id for id, d in zip(ids, differences, strict=True) if d > 0)
    lost = tuple(id for id, d in zip(ids, differences, strict=True) if d < 0)
    n = len(differences)
    return Comparison(
        one.name, two.name, n, attempts,
        pass_at_1=on_pass,
        reward=paired(means, contents, mean_interval),
        k=k,
        pass_at_k=_of_k(pass_at_k, one, two, full, k),
        pass_hat_k=_of_k(pass_hat_k, one, two, full, k),
        gained=gained,
        lost=lost,
        ties=n - len(gained) - len(lost),
        p_value=on_pass.p_value,
        left_out=(len(one.rewards) - len(shared), len(two.rewards) - len(shared)),
        notes=_notes(one, two, differences, copies, on_pass.p_value, shared, len(full) if k > 1 else len(shared), k),
        copies=len(shared) - n,
    )  # fmt: skip


def load(source: str | Path) -> Evaluation:
    """Read ``FOLDER`` (of ``areal-agents eval``) or ``RUN:LABEL`` (of a training run).

    Raises:
        ConfigError: ``source`` is neither. The message names the run's evaluations.
        ArealError: a shard cannot be read.
    """
    text = str(source)
    folder, label = Path(text).expanduser(), ""
    if not folder.is_dir():
        before, colon, label = text.rpartition(":")
        folder = Path(before).expanduser()
        if not colon or not before or not folder.is_dir():
            raise ConfigError(f"no such evaluation: {text}. Name a folder that `areal-agents eval` wrote, or RUN:LABEL")
    kind = f"eval-{label}" if label else "eval"
    rewards: dict[TaskKey, list[float]] = {}
    for record in read_records(folder, kind=kind):
        task = record.trajectory.task
        rewards.setdefault((task.split, task.id, task.content_hash), []).append(record.trajectory.reward)
    if not rewards:
        raise ConfigError(_nothing_there(folder, label))
    return Evaluation(text, rewards, _environment(folder, label), partial_note(folder, label), _sample(folder, label))


def _nothing_there(folder: Path, label: str) -> str:
    labels = sorted({p.parent.name.removeprefix("eval-") for p in shards(folder) if p.parent.name.startswith("eval-")})
    known = ", ".join(f"{folder}:{name}" for name in labels)
    if label:
        return f"{folder} has no evaluation {label!r}; it has {known or 'none'}"
    if labels:
        return f"{folder} is a training run: name one of its evaluations, {known}"
    if (note := partial_note(folder)) is not None:
        return f"nothing to compare yet: {note}"
    return f"{folder} holds no evaluation: name a folder that `areal-agents eval` wrote, or RUN:LABEL"


def _environment(folder: Path, label: str) -> str | None:
    """Return the environment's id, where report.json (of an evaluation) or reports.json (of a run) says it."""
    try:
        if label and (folder / "reports.json").is_file():
            reports = json.loads((folder / "reports.json").read_text(encoding="utf-8"))
            if label in reports:
                return str(reports[label]["env"])
        if (folder / "report.json").is_file():
            return str(json.loads((folder / "report.json").read_text(encoding="utf-8"))["env"])
        return str(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["env"]["id"])
    except (OSError, ValueError, KeyError, TypeError):  # the trajectories alone are enough to compare
        return None


def _sample(folder: Path, label: str) -> Sample | None:
    """Return which tasks of the split were played, where report.json, or reports.json of a run, says it."""
    try:
        row = json.loads((folder / ("reports.json" if label else "report.json")).read_text(encoding="utf-8"))
        return Sample.of_report(row[label] if label else row)
    except (OSError, ValueError, KeyError, TypeError):  # the trajectories alone are enough to compare
        return None


def _other_samples(one: Evaluation, two: Evaluation) -> str:
    """Say how the tasks of the two were chosen, where that was in different ways."""
    a, b = one.sample, two.sample
    if a is None or b is None or (a.n, a.seed) == (b.n, b.seed):
        return ""
    return f"{one.name} has {a}; {two.name} has {b}"


def _shared(one: Evaluation, two: Evaluation, *, common: bool) -> list[TaskKey]:
    """Return the tasks to compare, in A's order.

    Raises ConfigError where the tasks differ and ``common`` does not allow it, where the splits differ, and where no
    task is shared.
    """
    splits = [sorted({key[0] for key in e.rewards}) for e in (one, two)]
    if splits[0] != splits[1]:
        raise ConfigError(
            f"{one.name} is on split {', '.join(splits[0])}, {two.name} on {', '.join(splits[1])}: evaluate both on one"
        )
    shared = [key for key in one.rewards if key in two.rewards]
    only_a, only_b = len(one.rewards) - len(shared), len(two.rewards) - len(shared)
    if shared and (common or not (only_a or only_b)):
        return shared
    ids = {key[1] for key in one.rewards} & {key[1] for key in two.rewards}
    changed = len(ids - {key[1] for key in shared})
    detail = f"; {changed} have one id but different content (another difficulty or version?)" if changed else ""
    found = (
        f"{one.name} has {len(one.rewards)} tasks, {two.name} has {len(two.rewards)}, and {len(shared)} are in "
        f"both{detail}"
    )
    action = "--common compares those" if shared else "evaluate both on the same tasks"
    more = [*dict.fromkeys(e.partial for e in (one, two) if e.partial), *filter(None, [_other_samples(one, two)])]
    raise ConfigError(f"{found}: {action}" + "".join(f"\n{line}" for line in more))


def _of_k(
    rate: Callable[[int, int, int], Fraction], one: Evaluation, two: Evaluation, full: Sequence[TaskKey], k: int
) -> Paired | None:
    """Compare pass@k or pass^k, which ``rate`` estimates for one task, over the tasks with k attempts or more."""
    if not full:
        return None
    a, b = ([rate(len(e.rewards[key]), sum(map(reaches, e.rewards[key])), k) for key in full] for e in (one, two))
    return paired(list(zip(a, b, strict=True)), [key[2] for key in full], pass_interval)


def _notes(
    one: Evaluation, two: Evaluation, differences: Sequence[float], copies: Sequence[int], p: float,
    shared: Sequence[TaskKey], full: int, k: int,
) -> tuple[str, ...]:  # fmt: skip
    n, flips = len(differences), sum(d != 0 for d in differences)
    notes: list[str] = []
    if len(shared) > n:
        notes.append(f"{len(shared)} tasks have {n} different contents: copies count as one in interval and test")
    if n < FEW_TASKS:
        notes.append(f"{n} tasks are few: the interval assumes {FEW_TASKS} or more; evaluate more with --n")
    if len(set(differences)) == 1:
        notes.append("every task has the same difference: the interval of pass@1 is an exact binomial bound")
    elif flips < FEW_FLIPS <= n:
        notes.append(f"only {flips} tasks differ: the interval has the bounds of what none showed; the test is exact")
    low, high = pass_interval(differences, copies)
    apart = low > 0.0 or high < 0.0
    if apart and p >= LEVEL:
        notes.append(f"the t interval alone leaves out 0, the test does not (p = {p:.3g}): it is widened to 0")
    elif p < LEVEL and not apart:
        notes.append(f"the test rejects 0 (p = {p:.3g}), the interval does not: no difference is claimed")
    uneven = sum(len(e.rewards[key]) < _most(e, shared) for e in (one, two) for key in shared)
    if uneven:
        notes.append(f"{uneven} times a task lacks attempts, which infrastructure failed: its mean is over the others")
    if full < len(shared):
        those = f"over the {full} tasks" if full else "not known: there is no task"
        notes.append(f"pass@{k} and pass^{k} are {those} with {k} attempts on both sides")
    notes += dict.fromkeys(e.partial for e in (one, two) if e.partial)
    left_out = any(len(e.rewards) > len(shared) for e in (one, two))
    if left_out and (samples := _other_samples(one, two)):
        notes.append(f"the tasks were chosen differently: {samples}")
    if one.env and two.env and one.env != two.env:
        notes.append(f"the environments differ: {one.env} and {two.env}")
    return tuple(notes)


def _most(evaluation: Evaluation, shared: Sequence[TaskKey]) -> int:
    return max(len(evaluation.rewards[key]) for key in shared)


def _passed(rewards: Sequence[float]) -> Fraction:
    """Return the share of attempts that passed.

    It is exact, so that equal differences are equal numbers.
    """
    return Fraction(sum(reaches(r) for r in rewards), len(rewards))


def _row(name: str, pair: Paired) -> tuple[str, ...]:
    interval = "–" if pair.ci95 is None else f"{pair.ci95[0]:+.3f} to {pair.ci95[1]:+.3f}"
    return name, f"{pair.a:.3f}", f"{pair.b:.3f}", f"{pair.difference:+.3f}", interval


def _few(ids: Sequence[str]) -> str:
    more = len(ids) - SHOWN
    return ", ".join(ids[:SHOWN]) + (f" and {more} more (--json lists all)" if more > 0 else "")
