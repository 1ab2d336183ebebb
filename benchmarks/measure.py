"""Samples in turns, their summary, and progress with the time that is left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of ``values``, and the spread (largest − smallest) / median."""
    middle = statistics.median(values)
    return {
        "n": len(values),
        "median": round(middle, 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "spread": round((max(values) - min(values)) / middle, 4) if middle else 0.0,
    }


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of samples taken in the same turn: what slows a whole turn down cancels."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} and {len(theirs)} samples cannot be paired")
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def covered(intervals: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Length of [start, end] that lies in at least one interval."""
    total, reached = 0.0, start
    for low, high in sorted(intervals):
        low, high = max(low, reached), min(high, end)
        if high > low:
            total += high - low
            reached = high
    return total


def histogram(values: Sequence[int]) -> dict[str, int]:
    """How often each value occurs, smallest first; keys are text, as JSON has them."""
    return {str(v): sum(x == v for x in values) for v in sorted(set(values))}


class Progress:
    """One line a finished piece of work: what it gave, the share done, the time left."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()

    def __call__(self, text: str) -> None:
        self._done += 1
        spent = time.monotonic() - self._start
        left = spent / self._done * (self._total - self._done)
        print(f"[{self._done}/{self._total}, {spent:.0f} s, about {left:.0f} s left] {text}", flush=True)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with equal keys as aligned columns."""
    if not rows:
        return ""
    names = list(rows[0])
    cells = [names, *[[str(row[name]) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)
