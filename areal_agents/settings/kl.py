"""The settings of the KL term, and of its kin that keeps the policy near the sampler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from areal_agents.settings.section import Count, Positive, Section


class KlConfig(Section):
    coef: float = Field(default=0.0, ge=0.0)
    """Weight of the KL divergence to a reference policy, a token; 0: none, and no reference is held in memory."""
    estimator: Literal["k1", "k2", "k3", "k3_unbiased"] = "k3_unbiased"
    """``k3_unbiased`` has the divergence's own gradient, off policy too. ``k3`` is GRPO's. ``k2``: right on policy."""
    target: Positive | None = None
    """Divergence to keep to, nats a token: ``coef`` is then adapted after every step. none: it stays."""
    horizon: Count = 10_000
    """Episodes over which an adapted ``coef`` may change by a fifth."""
    refresh: int = Field(default=0, ge=0)
    """Take the policy as the new reference after every so many steps; 0: the policy that training began with."""
    sampler: float = Field(default=0.0, ge=0.0)
    """Weight of (log π/μ)² of each token, which keeps the policy near the one that sampled; 0: none, 0.001 is usual."""

    @model_validator(mode="after")
    def _check(self) -> KlConfig:
        if self.coef and self.estimator == "k1":
            raise ValueError(
                "algorithm.kl.estimator = 'k1' in the loss has a gradient of 0 on average, so it keeps nothing near "
                "the reference: use 'k3_unbiased', 'k3' or 'k2'"
            )
        if not self.coef and (self.target is not None or self.refresh):
            raise ValueError(
                "algorithm.kl.target and algorithm.kl.refresh do nothing while algorithm.kl.coef is 0: set coef, such "
                "as 0.001"
            )
        if self.target is None and self.horizon != type(self).model_fields["horizon"].default:
            raise ValueError(
                f"algorithm.kl.horizon = {self.horizon} does nothing without algorithm.kl.target: set a target, or "
                "leave it out"
            )
        return self

    def require_minibatches(self, minibatches: int) -> None:
        """Raise ValueError where each batch's only step would start at a reference that is the policy itself."""
        if self.coef and self.refresh == 1 and minibatches == 1:
            raise ValueError(
                "algorithm.kl.refresh = 1 with learner.minibatches = 1 makes the reference the policy itself at every "
                "step, where the divergence and its gradient are 0: set refresh to 2 or more, learner.minibatches to 2 "
                "or more, or algorithm.kl.coef = 0"
            )
