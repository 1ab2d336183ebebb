"""The learning curves of runs and evaluations, as their files tell them: the data of ``areal-agents plot``.

RUN/metrics.jsonl     kinds train, sft, dpo: a value a step; kind eval/LABEL: held-out values, pass@1 with its
                      interval; kind holdout: the held-out loss of a fine-tuning
RUN/trajectories      the interval of a step's mean reward, over its different tasks
FOLDER/report.json    of an evaluation: one value, at no step
"""

from __future__ import annotations

import difflib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError
from areal_agents.evaluation.copies import by_content
from areal_agents.evaluation.statistics import mean_interval
from areal_agents.tracking.console import STEPS
from areal_agents.tracking.one_episode import read_summaries
from areal_agents.tracking.plot import Curve, Panel, Point
from areal_agents.tracking.tracker import RESERVED, read_metrics
from areal_agents.tracking.trajectories import shard_path
from areal_agents.utils.tolerance import all_same

_PASS = "pass_at_1"
_INTERVALS = {_PASS: "ci95", "pass_at_k": "pass_at_k_ci95", "pass_hat_k": "pass_hat_k_ci95"}
"""Of the held-out metrics that have an interval, its name."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What one run's or evaluation's files say in numbers."""

    out: Path
    name: str
    training: tuple[Mapping[str, Any], ...] = ()
    held_out: tuple[Mapping[str, Any], ...] = ()
    report: Mapping[str, Any] | None = None

    def metrics(self) -> set[str]:
        """Return the names of all that can be drawn."""
        rows = [*self.training, *self.held_out, *([self.report] if self.report else [])]
        return {name for row in rows for name, value in row.items() if name not in RESERVED and _number(value)}


def read_numbers(folders: Sequence[Path]) -> list[Numbers]:
    """Read the numbers of runs and evaluations.

    Raises ArealError for a folder that has none.
    """
    different = {folder.resolve(): folder for folder in folders}
    names = [path.name for path in different]
    return [
        _read(folder, path.name if names.count(path.name) == 1 else str(folder)) for path, folder in different.items()
    ]


def _read(out: Path, name: str) -> Numbers:
    try:
        if (out / "metrics.jsonl").is_file():
            rows = read_metrics(out)
            training = tuple(row for row in rows if row["kind"] in STEPS)
            # Of several environments the means are drawn, not each environment's own (``before.LABEL``).
            whole = [row for row in rows if "." not in row["kind"]]
            held_out = tuple(row for row in whole if row["kind"].startswith("eval/") or row["kind"] == "holdout")
            if training or held_out:
                return Numbers(out, name, training, held_out)
            raise ArealError(f"{out} has no step and no held-out evaluation yet: there is nothing to draw")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return Numbers(out, name, report={**report, "kind": "eval"})
    except FileNotFoundError as error:
        raise ArealError(
            f"{out} has neither metrics.jsonl nor report.json: name the folder of a run or of a finished evaluation"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArealError(f"{out}: its numbers cannot be read: {error!r}") from error


def first_panel(runs: Sequence[Numbers]) -> Panel:
    """Return the mean reward in training and pass@1 on held-out tasks; the losses where all are fine-tunings."""
    known = set().union(*(run.metrics() for run in runs))
    if not known & {"reward", _PASS} and "loss" in known:
        return panel(runs, "loss")[0]
    return Panel("reward", "pass@1", tuple(_curve(run, "reward", _PASS) for run in runs))


def panel(runs: Sequence[Numbers], metric: str) -> tuple[Panel, list[str]]:
    """Return a metric in training and on held-out tasks, and the names of the runs that lack it.

    Raises ArealError, with near names, where no run has it.
    """
    known = sorted(set().union(*(run.metrics() for run in runs)))
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise ArealError(f"--metric {metric}: no run has it; {hint}")
    curves = {run.name: _curve(run, metric, metric) for run in runs}
    there = {name: c for name, c in curves.items() if c.training or c.held_out or c.level}
    trained, held = any(c.training for c in there.values()), any(c.held_out or c.level for c in there.values())
    drawn = Panel(metric if trained else "", metric if held else "", tuple(curves.values()))
    return drawn, [name for name in curves if name not in there]


def _curve(run: Numbers, metric: str, held_out: str) -> Curve:
    training = tuple(_trained(run, metric))
    points = tuple(_point(row, held_out) for row in run.held_out if _number(row.get(held_out)))
    level = None
    if run.report is not None and _number(run.report.get(held_out)):
        name = _INTERVALS.get(held_out, "")
        low, high = run.report.get(name) or (None, None)
        level = _point({**run.report, "step": 0, f"{name}_low": low, f"{name}_high": high}, held_out)
    return Curve(run.name, training, points, level)


def _trained(run: Numbers, metric: str) -> Iterator[Point]:
    rows = [row for row in run.training if metric in row]
    for row in rows:
        value = row[metric] if _number(row[metric]) else math.nan
        low, high = _reward_interval(run.out, row["step"]) if metric == "reward" else (math.nan, math.nan)
        yield Point(row["step"], value, low, high)


def _reward_interval(out: Path, step: int) -> tuple[float, float]:
    """Return Student's t 95 % interval of a step's mean reward over its different tasks, of which groups play copies.

    NaN where there are fewer than two, or their episodes were not saved.
    """
    path = shard_path(out, "train", step)
    if not path.exists():
        return math.nan, math.nan
    rewards: dict[str, list[float]] = defaultdict(list)
    task_of: dict[str, str] = {}
    for summary in read_summaries(path):
        rewards[summary.group].append(summary.reward)
        task_of[summary.group] = summary.content_hash
    sums, copies = by_content([task_of[g] for g in rewards], [math.fsum(r) / len(r) for r in rewards.values()])
    means = [total / count for total, count in zip(sums, copies, strict=True)]
    if len(means) > 1 and all_same(means):
        return means[0], means[0]
    return mean_interval(means, copies) or (math.nan, math.nan)


def _point(row: Mapping[str, Any], metric: str) -> Point:
    ends = [row.get(f"{_INTERVALS[metric]}_{end}") for end in ("low", "high")] if metric in _INTERVALS else []
    low, high = (float(end) for end in ends) if ends and None not in ends else (math.nan, math.nan)  # type: ignore[arg-type]
    return Point(row["step"], float(row[metric]), low, high)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
