"""The statistics that reports use.

pass_at_k, pass_hat_k, clustered_interval      of attempts that share tasks
wilson_interval                                of one success or failure a task
mean_interval, sign_flip_test                  of differences, paired by task
holm                                           p values of several tests at once
mean_of_intervals                              of the mean over entries of a suite
spearman                                       rank correlation
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from areal_agents.utils.tolerance import TOLERANCE, all_same, rounding_of

Floats: TypeAlias = NDArray[np.float64]
_Z95 = 1.959963984540054
_FLIPS = 100_000
"""Random signs, where there are too many sums for all of them: p = 0.05 is then known to ±0.0014."""
_MOST_SUMS = 500_000_000
"""Most tasks times sums."""
_MOST_SIGNS = 18
"""Up to so many differences, all 2^n signs are tried."""
_DENOMINATOR = 10_000
"""Largest one that a float's share of the largest difference is taken to have."""
FEW_MIXED = 10
"""With fewer tasks that passed, or fewer that failed, their variance says little of what none showed."""


def pass_at_k(n: int, c: int, k: int) -> Fraction:
    """Return the probability that at least one of ``k`` attempts succeeds (pass@k, 2107.03374, eq. 1).

    The attempts are drawn from ``n`` with ``c`` successes. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n = {n} attempts")
    return 1 - Fraction(math.comb(n - c, k), math.comb(n, k))


def pass_hat_k(n: int, c: int, k: int) -> Fraction:
    """Return the probability that all of ``k`` attempts succeed (pass^k, 2406.12045).

    The attempts are drawn from ``n`` with ``c`` successes. Raises ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass^{k} needs 1 <= k <= n = {n} attempts")
    return Fraction(math.comb(c, k), math.comb(n, k))


def clustered_interval(successes: Sequence[int], attempts: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of a success rate whose attempts are clustered by task.

    Wilson's score interval at the effective sample size N / deff, where deff = Var_cluster / Var_binomial is the
    design effect of the ratio estimator Σs/Σa (Kish 1965; Dean and Pagano 2015), its variance made unbiased for unequal
    tasks (``_unequal``). Of few tasks that is a guess: the size shrinks by (z / t)², t having the degrees of freedom of
    as many equal tasks (Korn and Graubard 1998). Where fewer than ``FEW_MIXED`` tasks ever passed, or ever failed, the
    variance between tasks was hardly seen: the size lies between that one and the least, by the share of these seen.

    The interval is never narrower than N independent attempts would give. It is never wider than that of (Σa)² / Σa²
    tasks (Kish), whose attempts are all the same; that is the number of tasks where all have as many. With one attempt
    a task it is Wilson's own.

    Args:
        successes: how many attempts at each task succeeded. Copies of one task are one task.
        attempts: how many there were at each task.

    Raises:
        ValueError: nothing was attempted.
    """
    pairs = [(s, a) for s, a in zip(successes, attempts, strict=True) if a > 0]
    if not pairs:
        raise ValueError("no attempt was scored: there is no rate to give an interval for")
    m, total = len(pairs), sum(a for _, a in pairs)
    rate = sum(s for s, _ in pairs) / total
    least = total**2 / sum(a * a for _, a in pairs)
    effective = least
    if m > 1 and 0.0 < rate < 1.0:
        larger, freedom = _unequal([a for _, a in pairs])
        cluster = larger * sum((s - rate * a) ** 2 for s, a in pairs) / total**2
        binomial = rate * (1 - rate) / total
        independent = min(total * binomial / cluster, total) if cluster > 0 else float(total)
        if independent > least:
            size = max(independent * (_Z95 / student_t_quantile(0.975, freedom)) ** 2, least)
            mixed = min(sum(s > 0 for s, _ in pairs), sum(s < a for s, a in pairs))
            effective = least + (size - least) * min(1.0, mixed / min(FEW_MIXED, m))
    return wilson_interval(rate, effective)


def _unequal(weights: Sequence[int]) -> tuple[float, int]:
    """Return by what the weighted variance of two or more values is too small, and its degrees of freedom.

        Σh² / (Σh²·(1 + Σh²) - 2Σh³)      with h = w / Σw; m / (m - 1) of m equal weights

    Of independent values with one variance σ², that of the mean Σhv is σ²·Σh², and Σh²(v - Σhv)² expects the
    denominator times σ²: a value that is most of the mean is near it, whatever it is. The degrees of freedom are those
    of 1 / Σh² equal weights (Kish), rounded up.
    """
    total, squares, cubes = (sum(w**power for w in weights) for power in (1, 2, 3))
    of_mean = squares * total**2
    return of_mean / (of_mean + squares**2 - 2 * cubes * total), math.ceil(total**2 / squares - TOLERANCE) - 1


def wilson_interval(rate: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a ``rate`` in [0, 1] over ``n`` independent trials, at least 1.

    Of trials whose outcomes lie between 0 and 1 it is on the wide side: none vary more than those at 0 and 1.
    """
    z2 = _Z95 * _Z95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    low = 0.0 if rate == 0.0 else max(0.0, centre - half)
    high = 1.0 if rate == 1.0 else min(1.0, centre + half)
    return low, high


def mean_of_intervals(
    values: Sequence[float], intervals: Sequence[tuple[float, float]]
) -> tuple[float, tuple[float, float]]:
    """Return the mean of independent estimates and its interval, from an interval of each.

    It is the method of variance estimates recovery (Zou and Donner 2008): the distances of the lower ends from their
    estimates are added as standard errors are, and so are those of the upper ends. So intervals may be lopsided.
    """
    n, mean = len(values), math.fsum(values) / len(values)
    below = math.hypot(*(v - low for v, (low, _) in zip(values, intervals, strict=True))) / n
    above = math.hypot(*(high - v for v, (_, high) in zip(values, intervals, strict=True))) / n
    return mean, (mean - below, mean + above)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values with Holm's correction (1979), in their order.

    Of m tests the i-th smallest p is multiplied by m - i + 1, and no p is below a smaller one's. The chance that any of
    the true hypotheses is rejected is then at most the level, however the tests depend on each other.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def mean_interval(values: Sequence[float], weights: Sequence[int] | None = None) -> tuple[float, float] | None:
    """Return Student's t 95 % interval of the mean of independent ``values``.

    Args:
        values: [n].
        weights: of each, [n]: how many equal copies of it there are. The variance is that of the ratio Σwv / Σw, with n
            values and not Σw, made unbiased for unequal ones (``_unequal``). None: 1.

    Returns:
        None where there are fewer than two values, or all are equal. Equal means up to rounding: 0.2 - 0.1 and 0.3 -
        0.2 are.
    """
    n = len(values)
    if n < 2 or all_same(values):
        return None
    scale = max(map(abs, values))  # squares of large numbers overflow
    given = [1] * n if weights is None else weights
    shares, (larger, freedom) = [w / sum(given) for w in given], _unequal(given)
    parts = [v / scale for v in values]
    mean = math.fsum(w * v for w, v in zip(shares, parts, strict=True))
    variance = larger * math.fsum((w * (v - mean)) ** 2 for w, v in zip(shares, parts, strict=True))
    half = student_t_quantile(0.975, freedom) * math.sqrt(variance)
    return (mean - half) * scale, (mean + half) * scale


def student_t_quantile(p: float, df: int) -> float:
    """Return the value that Student's t stays below with probability ``p``, which is in [0.5, 1).

    ``df`` are the degrees of freedom, at least 1. Raises ValueError for other arguments.
    """
    if not 0.5 <= p < 1.0 or df < 1:
        raise ValueError(f"student_t_quantile({p}, {df}) needs 0.5 <= p < 1 and df >= 1")
    low, high = 0.0, 1.0
    while _student_t_below(high, df) < p:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):  # until no float lies between them
        low, high = (middle, high) if _student_t_below(middle, df) < p else (low, middle)
    return high


def _student_t_below(t: float, df: int) -> float:
    """Return P(T <= t) for t >= 0.

    It is the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4).
    """
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


def sign_flip_test(differences: Sequence[float | Fraction]) -> float:
    """Return the two-sided p of the sign-flip permutation test of ``differences``, paired by task.

    Under its hypothesis each difference is as likely as its negative: the two sides could be exchanged in any task
    (Fisher 1935). p is the share of the 2^n signs whose sum is at least as far from 0 as the sum seen. It is exact for
    few differences, and for more while their sums have few values, as those of shares of few attempts have. Else it is
    estimated from ``_FLIPS`` random signs.
    Where all differences are -1, 0 or 1 it is the exact sign test, and with one attempt a task McNemar's (1947).
    """
    kept = [d for d in differences if abs(float(d)) > TOLERANCE]
    if not kept:
        return 1.0
    largest = max(abs(Fraction(d)) for d in kept)  # the test knows no scale, and its rounding must not know one either
    shares: Floats = np.asarray([float(Fraction(d) / largest) for d in kept])
    if len(kept) <= _MOST_SIGNS:
        return _over_all_signs(shares)
    sizes = _as_integers(kept, shares)
    if sizes is None or (most := sum(map(abs, sizes))) * len(sizes) > _MOST_SUMS:
        return _estimated(shares)
    seen = abs(sum(sizes))
    chances: Floats = np.ones(1)  # of the sum of those with a plus, from 0 on
    for size in map(abs, sizes):
        wider = np.zeros(len(chances) + size)
        wider[: len(chances)] += chances / 2
        wider[size:] += chances / 2
        chances = wider
    tail = chances[(most + seen) // 2 :].sum()  # by symmetry the other tail weighs the same
    return min(1.0, 2.0 * float(tail))


def _over_all_signs(shares: Floats) -> float:
    """Return the p of ``sign_flip_test`` by trying all 2^n signs."""
    sums: Floats = np.zeros(1)
    for share in shares:
        sums = np.concatenate([sums + share, sums - share])
    seen = abs(shares.sum())
    return int(np.count_nonzero(np.abs(sums) >= seen - rounding_of(seen))) / len(sums)


def _estimated(shares: Floats) -> float:
    """Estimate the p of ``sign_flip_test``.

    The signs as they are count among the random ones, so that p is never 0.
    """
    rng, seen, far = np.random.default_rng(0), abs(shares.sum()), 0
    for _ in range(_FLIPS // 1000):
        signs = rng.integers(0, 2, size=(1000, len(shares))) * 2.0 - 1.0
        far += int(np.count_nonzero(np.abs(signs @ shares) >= seen - rounding_of(seen)))
    return (1 + far) / (1 + _FLIPS)


def _as_integers(values: Sequence[float | Fraction], shares: Floats) -> list[int] | None:
    """Return whole numbers in the proportions of ``values``, as small as they can be; None where there are none.

    A Fraction is taken as it is. A float is taken by its share of the largest value, which must be a fraction of a
    small denominator up to rounding.
    """
    if all(isinstance(v, int | Fraction) for v in values):
        fractions = [Fraction(v) for v in values]
    else:
        fractions = [Fraction(s).limit_denominator(_DENOMINATOR) for s in shares.tolist()]
        if any(abs(float(f) - s) > TOLERANCE for f, s in zip(fractions, shares, strict=True)):
            return None
    scale = math.lcm(1, *(f.denominator for f in fractions))
    whole = [int(f * scale) for f in fractions]
    divisor = math.gcd(0, *whole) or 1
    return [w // divisor for w in whole]


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's ρ of the pairs ``x`` and ``y``, [n], in O(n log n).

    It is Pearson's correlation of mid-ranks, so ties share their mean rank. It is None where it is undefined, which is
    for fewer than two pairs, or where all of one side are equal. Raises ValueError for unequal lengths or a number that
    is not finite.
    """
    if len(x) != len(y):
        raise ValueError(f"a rank correlation needs pairs: {len(x)} and {len(y)} numbers are not equally many")
    if not np.isfinite([*x, *y]).all():
        raise ValueError("a rank correlation needs finite numbers: leave out NaN and infinities")
    a, b = _ranks(x), _ranks(y)
    if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def _ranks(values: Sequence[float]) -> Floats:
    """Return the ranks from 1, [n].

    Equal values share the mean of theirs.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks
