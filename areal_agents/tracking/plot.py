"""The learning curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_agents.tracking.tracker import read_metrics


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out evaluation: ``value`` in [0, 1] with its 95 % interval, placed at training step ``step``."""

    label: str
    step: float
    value: float
    low: float
    high: float


def plot(out: Path, held_out: Sequence[HeldOut] = (), *, path: Path | None = None, title: str = "") -> Path:
    """Draw the training reward of each step, and held-out points with their intervals.

    Reads the rows of kind ``train`` that have a ``reward`` from ``OUT/metrics.jsonl``.

    Args:
        out: the run's folder.
        held_out: the points.
        path: where to write the picture; None takes ``OUT/learning_curve.png``.
        title: text above the picture; empty for none.

    Returns:
        The picture's path.
    """
    # Imported here: a second, and only pictures need it. The Agg canvas needs no display and touches no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [r for r in read_metrics(out, kind="train") if r.get("reward") is not None]
    figure = Figure(figsize=(7.5, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if rows:
        steps, rewards = [r["step"] for r in rows], [r["reward"] for r in rows]
        axes.plot(
            steps,
            rewards,
            color="#1f77b4",
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            label="training reward (sampled)",
        )
    last = max([r["step"] for r in rows] + [point.step for point in held_out], default=0)
    for i, point in enumerate(held_out):
        below, above = max(0.0, point.value - point.low), max(0.0, point.high - point.value)
        label = "held-out pass@1 (95 % CI)" if i == 0 else None
        axes.errorbar(
            point.step, point.value, yerr=[[below], [above]], fmt="D", color="#d62728", capsize=4, label=label, zorder=3
        )
        axes.annotate(
            f"{point.label}\n{point.value:.2f}",
            (point.step, point.value),
            xytext=(8 if point.step < last or not last else -8, 8 if point.value < 0.8 else -24),
            textcoords="offset points",
            ha="left" if point.step < last or not last else "right",
            fontsize=8,
        )
    axes.set(xlabel="learner step", ylabel="reward, pass@1", title=title or None)
    if all(0.0 <= r["reward"] <= 1.0 for r in rows):
        axes.set_ylim(-0.03, 1.05)
    if rows or held_out:
        axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    path = path or out / "learning_curve.png"
    figure.savefig(path)
    return path
