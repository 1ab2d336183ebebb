"""Statistics of paired differences: Student's t interval of a mean, and the exact sign test."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's t 95 % interval of the mean of independent ``values``; None where fewer than two or all are equal.

    Equal means up to rounding: 0.2 - 0.1 and 0.3 - 0.2 are.
    """
    n = len(values)
    if n < 2 or max(values) - min(values) <= 1e-9 * max(1.0, *(abs(v) for v in values)):
        return None
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    half = student_t_quantile(0.975, n - 1) * math.sqrt(variance / n)
    return mean - half, mean + half


def student_t_quantile(p: float, df: int) -> float:
    """The value that Student's t with ``df`` degrees of freedom stays below with probability ``p`` in [0.5, 1)."""
    if not 0.5 <= p < 1.0 or df < 1:
        raise ValueError(f"student_t_quantile({p}, {df}) needs 0.5 <= p < 1 and df >= 1")
    low, high = 0.0, 1.0
    while _student_t_below(high, df) < p:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):  # until no float lies between them
        low, high = (middle, high) if _student_t_below(middle, df) < p else (low, middle)
    return high


def _student_t_below(t: float, df: int) -> float:
    """P(T <= t) for t >= 0: the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    even = df % 2 == 0
    term = 1.0 if even else cosine
    total = term if df > 1 else 0.0
    for i in range(2 if even else 3, df - 1, 2):
        term *= (i - 1) / i * cosine * cosine
        total += term
    between = sine * total if even else 2 / math.pi * (theta + sine * total)
    return 0.5 + between / 2


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of the exact sign test: wins and losses are equally likely, ties say nothing.

    With one pass-or-fail attempt a task on each side it is the exact McNemar test (McNemar 1947).
    """
    n, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / (1 << n))
