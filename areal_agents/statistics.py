"""The statistics that evaluation reports: pass@k, pass^k and an interval that knows attempts share a task."""

from __future__ import annotations

import math
from collections.abc import Sequence

_Z95 = 1.959963984540054


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that one of ``k`` attempts drawn from ``n`` with ``c`` successes succeeds (2107.03374, eq. 1)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n = {n} attempts")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Probability that all of ``k`` attempts drawn from ``n`` with ``c`` successes succeed (pass^k; 2406.12045)."""
    if not 1 <= k <= n:
        raise ValueError(f"pass^{k} needs 1 <= k <= n = {n} attempts")
    return math.comb(c, k) / math.comb(n, k)


def clustered_interval(successes: Sequence[int], attempts: Sequence[int]) -> tuple[float, float]:
    """95 % interval of a success rate whose attempts are clustered by task.

    Wilson's score interval at the effective sample size N / deff, where deff = Var_cluster / Var_binomial is the
    design effect of the ratio estimator Σs/Σa (Kish 1965; Dean and Pagano 2015). Never narrower than N independent
    attempts would give, never wider than one attempt a task. With one attempt a task it is Wilson's own interval.

    Args: ``successes[i]`` of ``attempts[i]`` attempts at task i. Raises ValueError where nothing was attempted.
    """
    pairs = [(s, a) for s, a in zip(successes, attempts, strict=True) if a > 0]
    if not pairs:
        raise ValueError("no attempt was scored: there is no rate to give an interval for")
    m, total = len(pairs), sum(a for _, a in pairs)
    rate = sum(s for s, _ in pairs) / total
    effective = float(m)
    if m > 1 and 0.0 < rate < 1.0:
        cluster = m / (m - 1) * sum((s - rate * a) ** 2 for s, a in pairs) / total**2
        binomial = rate * (1 - rate) / total
        effective = min(max(total * binomial / cluster, m), total) if cluster > 0 else float(total)
    z2 = _Z95 * _Z95
    centre = (rate + z2 / (2 * effective)) / (1 + z2 / effective)
    half = _Z95 / (1 + z2 / effective) * math.sqrt(rate * (1 - rate) / effective + z2 / (4 * effective**2))
    low = 0.0 if rate == 0.0 else max(0.0, centre - half)
    high = 1.0 if rate == 1.0 else min(1.0, centre + half)
    return low, high
