"""Learning curves as pictures: of one run, as the demo leaves it, and of several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.tracking.tracker import read_metrics
from areal_agents.utils.files import atomic_file, unwritten

_MARKED = 60
"""A line of at most so many points has a mark on each."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One held-out evaluation: ``value`` in [0, 1] with its 95 % interval, placed at training step ``step``."""

    label: str
    step: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Point:
    """One value at a training step; NaN where there is none, as an end of its 95 % interval too."""

    step: float
    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, slots=True)
class Curve:
    """One run's share of a panel."""

    name: str
    training: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()
    level: Point | None = None
    """Of an evaluation without a training: a value that no step belongs to."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes: a metric in training, and one on held-out tasks, of several runs."""

    training: str
    held_out: str
    curves: tuple[Curve, ...]


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
    rows = [r for r in read_metrics(out, kind="train") if r.get("reward") is not None]
    figure = _figure(4.2)
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
    return _save(figure, path or out / "learning_curve.png")


def plot_runs(panels: Sequence[Panel], path: Path) -> Path:
    """Draw runs in colours of their own, a panel a metric, and write the picture as PNG or SVG by its name.

    A line is a metric in training with the band of its interval, a diamond a held-out evaluation with its interval, a
    dashed line an evaluation that belongs to no step. Raises ArealError where the file cannot be written, and
    ConfigError without matplotlib.
    """
    figure = _figure(1.2 + 3.2 * len(panels))
    legend: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, i + 1)
        for n, curve in enumerate(panel.curves):
            _draw(axes, panel, curve, f"C{n % 10}", legend)
        axes.set(ylabel=_plain(", ".join(dict.fromkeys(filter(None, (panel.training, panel.held_out))))))
        axes.grid(alpha=0.3)
        _limit(axes, panel)
    axes.set(xlabel="learner step")
    wide = max(map(len, legend), default=0) > 60
    labels, artists = [*legend], [*legend.values()]
    figure.legend(artists, labels, loc="outside lower center", ncols=1 if wide else 2, fontsize=8, frameon=False)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    """Write the picture whole, or raise ArealError and leave what was there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            figure.savefig(file, format=path.suffix.removeprefix(".") or "png")
    except OSError as error:
        raise unwritten(path, error) from error
    return path


def _draw(axes: Any, panel: Panel, curve: Curve, colour: str, legend: dict[str, Any]) -> None:
    """Draw one run, and note its artists in the legend."""
    name = _plain(curve.name)
    if curve.training:
        steps, values = [p.step for p in curve.training], [p.value for p in curve.training]
        (drawn,) = axes.plot(
            steps, values, color=colour, marker="o" if len(steps) <= _MARKED else None, markersize=3, linewidth=1.4
        )
        band = any(math.isfinite(p.low) for p in curve.training)
        if band:
            low, high = [p.low for p in curve.training], [p.high for p in curve.training]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        legend[f"training {_plain(panel.training)}{' (95 % band)' if band else ''}, {name}"] = drawn
    if curve.held_out:
        label = f"held-out {_plain(panel.held_out)}{_interval(curve.held_out)}, {name}"
        legend[label] = axes.errorbar(
            [p.step for p in curve.held_out], [p.value for p in curve.held_out], yerr=_bars(curve.held_out),
            fmt="D", linestyle=":", color=colour, markersize=5, capsize=4, zorder=3,
        )  # fmt: skip
    if curve.level is not None:
        legend[f"evaluation: {_plain(panel.held_out)}{_interval([curve.level])}, {name}"] = axes.axhline(
            curve.level.value, color=colour, linestyle="--", linewidth=1.4
        )
        if math.isfinite(curve.level.low):
            axes.axhspan(curve.level.low, curve.level.high, color=colour, alpha=0.1, linewidth=0)


def _bars(points: Sequence[Point]) -> list[list[float]]:
    """Return how far the intervals reach below and above the values; 0 where there is none."""
    ends = [(p.value - p.low, p.high - p.value) for p in points]
    return [[max(0.0, end[side]) if math.isfinite(end[side]) else 0.0 for end in ends] for side in (0, 1)]


def _interval(points: Sequence[Point]) -> str:
    return " (95 % CI)" if any(math.isfinite(p.low) for p in points) else ""


def _limit(axes: Any, panel: Panel) -> None:
    """Let values and held-out intervals fill the axes: the band of a step with two groups may be wider than all."""
    shown = [p.value for c in panel.curves for p in c.training]
    shown += [
        v for c in panel.curves for p in (*c.held_out, *filter(None, [c.level])) for v in (p.value, p.low, p.high)
    ]
    shown = [v for v in shown if math.isfinite(v)]
    if shown and min(shown) < max(shown):
        margin = 0.06 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _figure(height: float) -> Any:
    # Imported here: a second, and only pictures need it. The Agg canvas needs no display and touches no global state.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"pictures need matplotlib ({error}): pip install matplotlib") from error

    figure = Figure(figsize=(7.5, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """Keep a ``$`` from beginning a formula."""
    return text.replace("$", r"\$")
