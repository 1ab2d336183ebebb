"""The report of an evaluation: what its numbers are, how they are counted, and the table for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_agents.errors import ArealError, ConfigError, InfraError
from areal_agents.evaluation.attempts import same_attempts
from areal_agents.evaluation.copies import by_content
from areal_agents.evaluation.endings import count_endings, count_finishes, count_oddities, noted
from areal_agents.evaluation.held_out import Sample
from areal_agents.evaluation.statistics import clustered_interval
from areal_agents.rollout.task_faults import footer, reasons
from areal_agents.types import Task, Trajectory
from areal_agents.utils.short_text import cut, text_of
from areal_agents.utils.tolerance import reaches

_INTERVALS = ("ci95", "pass_at_k_ci95", "pass_hat_k_ci95")


@dataclass(frozen=True, slots=True)
class Lost:
    """What an evaluation has no score of, and why."""

    first: BaseException | None = None
    """Why the first attempt was given up, of those that were."""
    own: Sequence[tuple[str, ArealError]] = ()
    """Task and error of the attempts given up because reward or environment failed by themselves."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tasks that cannot be played or scored, each with the reason. Their attempts count nowhere."""

    @property
    def failures(self) -> list[ArealError]:
        """The errors in ``own``, but for those of tasks that are left out."""
        return [error for task, error in self.own if task not in self.left_out]

    def all_of(self, env: str, attempts: int) -> InfraError:
        """Make the error of an evaluation on ``env`` that has no score of any of its attempts."""
        itself, infra = "its own reward or environment failed every attempt", "infrastructure failed every attempt"
        what = itself if len(self.failures) >= attempts else infra
        said = f" First failure: {text_of(self.first)}" if self.first is not None else ""
        return InfraError(
            f"evaluation of {env}: {what}, so that there is nothing to score.{said}{reasons(self.left_out)}"
        )


NOTHING_LOST = Lost()


@dataclass(frozen=True, slots=True)
class EvalReport:
    """The report of one evaluation.

    Rates are over scored attempts, but ``infra_rate`` is over all attempts at tasks that can be played.
    """

    env: str
    split: str
    model: str
    version: int
    """The policy version that every attempt was sampled from."""
    temperature: float
    seed: int
    n: int
    """Different tasks, by their content, with at least one scored attempt."""
    k: int
    attempts: int
    pass_at_1: float
    ci95: tuple[float, float]
    """Clustered by task, copies of which are one."""
    pass_at_k: float | None
    """Share of tasks that pass at least once, of those whose k attempts were all scored; None where there are none."""
    pass_hat_k: float | None
    """Share of the same tasks that pass every time."""
    reward: float
    valid_call_rate: float
    """Attempts with at least one tool call, all of whose calls were valid."""
    accuracy_given_valid: float | None
    """pass@1 among those; None where there are none."""
    malformed_call_rate: float
    """Share of all tool calls that were not valid."""
    truncation_rate: float
    infra_rate: float
    turns: float
    tokens: float
    """Sampled tokens an attempt."""
    seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tasks that cannot be played or scored, each with the reason. Their attempts are in no rate."""
    served: str = ""
    """Of a model behind a chat server: the name that the server gives itself for it, and the server's URL."""
    unplayed: int = 0
    """Attempts that were asked for and not played, because the evaluation was interrupted."""
    endings: dict[str, int] = field(default_factory=dict)
    finishes: dict[str, int] = field(default_factory=dict)
    """Attempts by stop reason, and turns by how they ended: ``stop``, or early (``cut_turns``)."""
    cut_turns: int = 0
    unverifiable: int = 0
    verdict_timeouts: int = 0
    """Attempts with such a verdict. They count with its score."""
    sandbox_replays: int = 0
    withheld: int = 0
    """Lost sandboxes whose calls were run again; attempts with a reward that a cut message earned and did not get."""
    rewritten: int = 0
    """Attempts whose history was folded or summed up (``context.py``)."""
    pass_at_k_ci95: tuple[float, float] | None = None
    pass_hat_k_ci95: tuple[float, float] | None = None
    """Wilson's intervals over those tasks, each of which counts once. None where there is no rate, and in reports from
    before they had one."""
    sample: Sample | None = None
    """Which tasks of the split. None where nothing said it."""
    failed: int = 0
    first_failed: str = ""
    """Attempts given up because their reward or environment itself failed, and why the first was. They are in no rate,
    nor infrastructure's."""
    copies: int = 0
    """Tasks with a scored attempt besides, whose content is that of another one. They are in all rates."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> EvalReport:
        """Read what ``to_json`` wrote, also in an earlier version.

        Raises TypeError or KeyError for anything else.
        """
        pairs = {name: tuple(row[name]) for name in _INTERVALS if row.get(name) is not None}
        return cls(**{**row, **pairs, "sample": Sample.of_report(row)})

    @property
    def unscored(self) -> int:
        """Attempts that were made and have no score, since infrastructure, the reward or the environment failed."""
        return round(self.attempts / (1.0 - self.infra_rate)) - self.attempts + self.failed

    def below(self, limit: float) -> str:
        """Say that pass@1 is below ``limit``, or may be if its attempts without a score failed; nothing if not."""
        if not reaches(self.pass_at_1, limit):
            return f"pass@1 {self.pass_at_1:.3f} is below {limit:g}"
        return without_score(self.pass_at_1, self.attempts, self.unscored, limit)

    def line(self, label: str) -> str:
        """Return the report as one line for a log."""
        low, high = self.ci95
        out = f" (left out: {len(self.left_out)})" if self.left_out else ""
        return (
            f"held-out, {label}: pass@1 {self.pass_at_1:.3f} ({low:.3f}–{high:.3f}), valid calls "
            f"{self.valid_call_rate:.2f}, n = {_tasks(self)}{out}, {self.seconds:.0f} s"
        )

    def table(self) -> str:
        """Return the report as text for people."""
        return compare_table({f"{self.env}:{self.split}": self})

    def notes(self) -> list[str]:
        """Say what makes the numbers less than they look."""
        notes = []
        if self.unplayed:
            made = self.attempts + self.unscored
            notes.append(
                f"partial: {made} of {made + self.unplayed} attempts were played, at {self.n + self.copies} tasks with "
                "a score"
            )
        if self.failed:
            tried = self.attempts + self.unscored
            notes.append(f"{self.failed} of {tried} attempts failed, in no rate: {cut(self.first_failed, 300)}")
        if self.k > 1 and self.temperature == 0.0:
            notes.append(same_attempts(self.k))
        if self.copies:
            all_tasks = self.n + self.copies
            notes.append(f"{all_tasks} tasks have {self.n} different contents: copies count as one in intervals")
        return notes


def without_score(pass_at_1: float, attempts: int, unscored: int, limit: float) -> str:
    """Say that a pass@1 of so many attempts is below ``limit`` if the ones without a score failed; nothing if not."""
    total = attempts + unscored
    if not unscored or reaches(pass_at_1 * attempts / total, limit):
        return ""
    return (
        f"pass@1 {pass_at_1:.3f} is of {attempts} of {total} attempts, and with {unscored} that have no score it is "
        f"not known to reach {limit:g}"
    )


def calls_of(trajectory: Trajectory) -> tuple[int, int]:
    """Count the tool calls that an episode made, and those of them that were valid."""
    calls = [call for turn in trajectory.turns for call in turn.message.tool_calls]
    return len(calls), sum(call.status == "ok" for call in calls)


def summarize(
    results: Sequence[tuple[Task, Sequence[Trajectory | None]]],
    *,
    env: str,
    split: str,
    model: str,
    version: int,
    temperature: float,
    seed: int,
    seconds: float,
    k: int | None = None,
    planned: int | None = None,
    lost: Lost = NOTHING_LOST,
    sample: Sample | None = None,
) -> EvalReport:
    """Report what ``results`` show.

    Args:
        results: each task with its attempts, which are None where infrastructure failed them.
        env: the environment's id.
        split: of the tasks.
        model: the model's name.
        version: of the weights that every attempt was sampled from.
        temperature: of sampling.
        seed: of environments and sampling.
        seconds: that the evaluation took.
        k: attempts a task that were asked for; None means the most that there are.
        planned: attempts that were asked for; None means those that there are.
        lost: what has no score.
        sample: which tasks of the split these are.

    Raises:
        ConfigError: every task is left out.
        InfraError: no attempt was scored.
    """
    results = [(task, tries) for task, tries in results if task.id not in lost.left_out]
    if not results:
        raise ConfigError(f"evaluation of {env}: no task can be played or scored:{reasons(lost.left_out)}")
    scored = [(task, kept) for task, tries in results if (kept := [t for t in tries if t is not None])]
    played = sum(len(tries) for _, tries in results)
    if not scored:
        raise lost.all_of(env, played) from lost.first
    k = k or max(len(tries) for _, tries in results)
    everything, own = [t for _, tries in scored for t in tries], lost.failures
    different = len({task.content_hash for task, _ in scored})
    return EvalReport(
        env, split, model, version, temperature, seed, different, k, len(everything),
        infra_rate=1.0 - len(everything) / (played - len(own)), seconds=seconds, left_out=dict(lost.left_out),
        unplayed=0 if planned is None else planned - played,
        failed=len(own),
        first_failed=f"{type(own[0]).__name__}: {text_of(own[0])}" if own else "",
        endings=count_endings(everything), finishes=count_finishes(everything),
        sample=sample, copies=len(scored) - different,
        **_passes(scored, k),
        **_means(everything),
        **dict[str, Any](count_oddities(everything)),
    )  # fmt: skip


def _passes(scored: Sequence[tuple[Task, Sequence[Trajectory]]], k: int) -> dict[str, Any]:
    """Return the rates of passing, with their interval, of the scored attempts of each task."""
    wins = [sum(reaches(t.reward) for t in tries) for _, tries in scored]
    counts = [len(tries) for _, tries in scored]
    contents = [task.content_hash for task, _ in scored]
    interval = clustered_interval(by_content(contents, wins)[0], by_content(contents, counts)[0])
    found: dict[str, Any] = {"pass_at_1": sum(wins) / sum(counts), "ci95": interval}
    full = [(content, w) for content, c, w in zip(contents, counts, wins, strict=True) if c == k]
    # Of k attempts, the unbiased estimators of pass@k and pass^k are 0 or 1 a task.
    for name, passed in (("pass_at_k", [int(w > 0) for _, w in full]), ("pass_hat_k", [int(w == k) for _, w in full])):
        found[name] = sum(passed) / len(full) if full else None
        found[f"{name}_ci95"] = clustered_interval(*by_content([c for c, _ in full], passed)) if full else None
    return found


def _means(attempts: Sequence[Trajectory]) -> dict[str, Any]:
    """Return the means over all scored attempts, and over their calls."""
    total = len(attempts)
    calls = [calls_of(t) for t in attempts]
    valid = [t for t, (made, ok) in zip(attempts, calls, strict=True) if made and made == ok]
    made = sum(m for m, _ in calls)
    return {
        "reward": sum(t.reward for t in attempts) / total,
        "valid_call_rate": len(valid) / total,
        "accuracy_given_valid": sum(reaches(t.reward) for t in valid) / len(valid) if valid else None,
        "malformed_call_rate": sum(m - ok for m, ok in calls) / made if made else 0.0,
        "truncation_rate": sum(t.truncated for t in attempts) / total,
        "turns": sum(len(t.turns) for t in attempts) / total,
        "tokens": sum(t.sampled_tokens for t in attempts) / total,
    }


def compare_table(reports: dict[str, EvalReport]) -> str:
    """Lay out named reports side by side, for people."""
    ks = {r.k for r in reports.values()}
    k = str(max(ks)) if len(ks) == 1 else "k"
    several = (f"pass@{k}", "95 % CI", f"pass^{k}", "95 % CI") if max(ks, default=1) > 1 else ()
    head = ("", "pass@1", "95 % CI", *several, "n", "valid calls", "pass | valid", "truncated", "infra")
    rows = [head]
    for name, r in reports.items():
        of_k = (_rate(r.pass_at_k), _range(r.pass_at_k_ci95), _rate(r.pass_hat_k), _range(r.pass_hat_k_ci95))
        rows.append((
            name, f"{r.pass_at_1:.3f}", _range(r.ci95), *(of_k if several else ()), _tasks(r),
            f"{r.valid_call_rate:.3f}", _rate(r.accuracy_given_valid), f"{r.truncation_rate:.3f}",
            f"{r.infra_rate:.3f}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    notes = dict.fromkeys(note for r in reports.values() for note in r.notes())
    noticed = {name: noted(r.endings, r.finishes, r.to_json()) for name, r in reports.items()}
    below = [f"{name}: {said}" for name, said in noticed.items() if said]
    named = {id: why for r in reports.values() for id, why in r.left_out.items()}
    under = [*_samples(reports), *below, *(f"note: {note}" for note in notes)]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:], *under]) + footer(named)


def _samples(reports: Mapping[str, EvalReport]) -> list[str]:
    """Say which tasks were played, once where all reports are of the same ones."""
    said = {name: f"tasks: {r.sample}" for name, r in reports.items() if r.sample is not None}
    if len(said) == len(reports) and len(set(said.values())) == 1:
        return [*said.values()][:1]
    return [f"{name}: {text}" for name, text in said.items()]


def _tasks(report: EvalReport) -> str:
    return f"{report.n} in {report.n + report.copies}" if report.copies else str(report.n)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _range(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f}–{interval[1]:.3f}"
