"""The proof that an engine computes what the learner says its weights compute.

Both score one prompt. The learner does it in fp32, with its weights rounded as they are published.

* In fp32 the same weights differ by rounding alone, by 1e-5 to 1e-4 as measured. One wrong tensor shifts some token by
  far more than 1e-3.
* A bf16 product rounds to 8 bits, so equal weights differ by some hundredths of a nat in the mean. How many depends on
  the model. The first load measures it, and the later ones are held to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from areal_agents.engine import WeightsRef
from areal_agents.errors import EngineError

PROBE_TOKENS = 1024
"""Longest part of a probe prompt that is scored: an engine keeps KV free for it."""
FP32_MAX = 1e-3
"""Bound on every |Δ log p| where the engine computes in fp32, in nats."""
FIRST_MEAN = 0.2
"""Bound on the mean |Δ log p| of the first load where it computes in bf16; 0.036 measured on SmolLM2."""
_FACTOR, _MARGIN = 3.0, 0.02


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The size of |Δ log p| between two scorings of one prompt, in nats."""

    mean: float
    max: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Mismatch:
        """Compare two scorings, token by token.

        Raises EngineError where they are not equally many, or not finite.
        """
        if len(ours) != len(theirs) or not ours:
            raise EngineError(f"the probe has {len(theirs)} log-probabilities, the engine computed {len(ours)}")
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        if not all(math.isfinite(gap) for gap in gaps):
            raise EngineError("the probe's log-probabilities are not finite")
        return cls(sum(gaps) / len(gaps), max(gaps))


class Prover:
    """The judge of one engine process's probes, who remembers the first one."""

    def __init__(self, precision: str) -> None:
        self._fp32 = precision == "fp32"
        self._first: float | None = None

    def check(self, ref: WeightsRef, logprobs: Sequence[float]) -> Mismatch:
        """Compare the engine's ``logprobs`` of ``ref.probe.ids[1:]``, or of the first of them.

        Raises EngineError where they are too far off.
        """
        if ref.probe is None:
            raise ValueError(f"weights v{ref.version} have no probe")
        found = Mismatch.of(logprobs, ref.probe.logprobs[: len(logprobs)])
        if self._fp32:
            bad, what, bound = found.max > FP32_MAX, f"max |Δ log p| {found.max:.2g}", FP32_MAX
        else:
            bound = FIRST_MEAN if self._first is None else _FACTOR * self._first + _MARGIN
            bad, what = found.mean > bound, f"mean |Δ log p| {found.mean:.2g}"
            if not bad and self._first is None:
                self._first = found.mean
        if bad:
            raise EngineError(
                f"the engine does not serve weights v{ref.version}: on the probe prompt its {what} from the learner's "
                f"is above {bound:.2g}"
            )
        return found
