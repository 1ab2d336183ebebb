"""Which environment of a mixture each group plays: shares by weights that hold at any moment, not in the mean alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction


class Shares:
    """The sequence of environments, which follows from their weights and a seed alone.

    Tijdeman's rule for k environments with shares p_i = w_i / Σ w. Let x_i of the first n − 1 groups play environment
    i. Group n, from 1, plays the one of

        n·p_i − x_i ≥ 1 / (2k − 2)      for which      (1 − 1/(2k − 2) − (n·p_i − x_i)) / p_i      is least.

    Then |x_i(n) − n·p_i| ≤ 1 − 1/(2k − 2) < 1 for every i and n: the first n groups have each environment's share to
    within one group. So any n groups in a row have it to within two, and with two environments to within one. Where two
    are equal, the seed decides.

    It is computed in whole numbers, so that it is the same on every machine.

    Paper: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980) 323-330.
    """

    def __init__(self, weights: Sequence[float], *, seed: int) -> None:
        """Take positive weights.

        Raises ValueError for others, and for none.
        """
        if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"weights {list(weights)} must be positive numbers")
        exact = [Fraction(w) for w in weights]
        scale = math.lcm(*(w.denominator for w in exact))
        self._weights = [int(w * scale) for w in exact]
        self._total = sum(self._weights)
        self._ranks = list(range(len(weights)))
        random.Random(f"shares/{seed}").shuffle(self._ranks)
        self._counts = [0] * len(weights)
        self._sequence: list[int] = []

    def at(self, order: int) -> int:
        """Return the place, among the weights, of the environment that group ``order`` plays, from 0."""
        while len(self._sequence) <= order:
            self._grow()
        return self._sequence[order]

    def counts(self, n: int) -> list[int]:
        """Return how many of the first ``n`` groups each environment has."""
        if n:
            self.at(n - 1)
        if n == len(self._sequence):
            return list(self._counts)
        return [self._sequence[:n].count(i) for i in range(len(self._weights))]

    def _grow(self) -> None:
        k, n, total = len(self._weights), len(self._sequence) + 1, self._total
        parts = max(2 * k - 2, 1)
        lacks = [n * w - x * total for w, x in zip(self._weights, self._counts, strict=True)]
        due = [i for i in range(k) if lacks[i] * parts >= total]
        chosen = min(
            due, key=lambda i: (Fraction((parts - 1) * total - parts * lacks[i], self._weights[i]), self._ranks[i])
        )
        self._counts[chosen] += 1
        self._sequence.append(chosen)
