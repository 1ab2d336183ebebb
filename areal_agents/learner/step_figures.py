"""The figures of one learner step, gathered minibatch by minibatch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from areal_agents.algorithms.offpolicy_stats import OffPolicyStats
from areal_agents.algorithms.regularizers import RegularizerStats


@dataclass
class StepFigures:
    """What a step has done so far."""

    minibatches: int
    """Of the whole step."""
    forwarded: int = 0
    """Tokens that went through a model, shared prefixes once."""
    loss: float = 0.0
    empty: int = 0
    """Minibatches without a gradient."""
    skipped: int = 0
    """Optimizer steps left out for a gradient that is not finite."""
    norms: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    """What each minibatch's learning rate was multiplied by."""
    off_policy: OffPolicyStats = field(default_factory=OffPolicyStats)
    terms: RegularizerStats = field(default_factory=RegularizerStats)

    def add(self, loss: float, norm: float | None, *, scale: float, forwarded: int) -> None:
        """Count a minibatch that went through the policy.

        Args:
            loss: its value.
            norm: of its gradient, before clipping. None where it is not finite.
            scale: of its learning rate.
            forwarded: tokens that went through the model.
        """
        self.loss += loss / self.minibatches
        self.forwarded += forwarded
        self.scales.append(scale)
        self.skipped += norm is None
        self.empty += norm == 0.0
        self.norms += [] if norm is None else [norm]

    def metrics(self, lr: float, seconds: float) -> dict[str, float]:
        """Return the figures by the names that ``TorchLearner.step`` says, for the peak rate of the step."""
        return {
            "loss": self.loss,
            "grad_norm": float(np.mean(self.norms)) if self.norms else 0.0,
            "lr": lr * float(np.mean(self.scales or [1.0])),
            "skipped": float(self.skipped),
            "minibatches": float(self.minibatches),
            "minibatches_empty": float(self.empty),
            "tokens_forward": float(self.forwarded),
            "seconds": seconds,
            "tokens_per_second": self.forwarded / seconds,
            **{f"off_policy/{name}": value for name, value in self.off_policy.result().items()},
        }
