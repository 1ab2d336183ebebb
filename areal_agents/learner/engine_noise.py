"""The distance between an engine's log-probabilities and the learner's for one and the same policy.

Rounding alone makes it. It is measured once, in a run's first step with tokens of the learner's own version, before the
policy moves, for masks that read ``noise_T``. Nothing is measured for others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from areal_agents.algorithms.batch import Row
from areal_agents.learner.passes import Passes


class EngineNoise:
    """The measured mean of |log π − log μ|."""

    def __init__(self, needed: bool, passes: Passes) -> None:
        """Take whether a mask needs it, and the way through the policy."""
        self._needed, self._passes = needed, passes
        self.value = 0.0
        """0 until it is measured."""
        self._measured = False

    def measure(self, rows: Sequence[Row], temperature: float, version: int) -> int:
        """Measure it if it is needed and was not yet, and return the tokens that went through the model.

        Args:
            rows: of a batch whose step has not begun.
            temperature: that they were sampled at.
            version: the learner's. Only tokens of this version count.
        """
        own = [row for row in rows if (row.versions[row.mask] == version).any()]
        if not self._needed or self._measured or not own:
            return 0
        found, forwarded = self._passes.logprobs(own, temperature)
        apart = [
            np.abs(logprobs - row.logprobs)[row.mask & (row.versions == version)]
            for row, logprobs in zip(own, found, strict=True)
        ]
        self.value, self._measured = float(np.concatenate(apart).mean(dtype=np.float64)), True
        return forwarded

    def metrics(self) -> dict[str, float]:
        """Return the metric, once it is measured."""
        return {"engine_noise": self.value} if self._measured else {}

    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds."""
        return self.metrics()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. One that holds nothing leaves it to be measured."""
        self._measured = "engine_noise" in state
        self.value = float(state.get("engine_noise", 0.0))
