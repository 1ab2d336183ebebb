"""The settings of the KL term, and of its kin that keeps the policy near the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from areal_agents.settings.section import Count, Positive, Section


class KlConfig(Section):
    coef: float = Field(default=0.0, ge=0.0)
    """Weight of the KL divergence to a reference policy, a token; 0: none, and no reference is held in memory."""
    place: Literal["loss", "reward"] = "loss"
    """``loss``: a term beside the policy loss. ``reward``: each turn's reward pays coef times the estimates of its
    tokens, before the advantages, as in PPO on language models."""
    estimator: Literal["k1", "k2", "k3", "k3_unbiased"] = "k3_unbiased"
    """``k3_unbiased`` has the divergence's own gradient, off policy too. ``k3`` is GRPO's. ``k2``: right on policy. The
    default with ``place = "reward"`` is ``k1``, log μ − log ref, whose gradient as a reward is the divergence's."""
    target: Positive | None = None
    """Divergence to keep to, nats a token: ``coef`` is then adapted after every step. none: it stays."""
    horizon: Count = 10_000
    """Episodes over which an adapted ``coef`` may change by a fifth."""
    refresh: int = Field(default=0, ge=0)
    """Take the policy as the new reference after every so many steps; 0: the policy that training began with."""
    sampler: float = Field(default=0.0, ge=0.0)
    """Weight of (log π/μ)² of each token, which keeps the policy near the one that sampled; 0: none, 0.001 is usual."""

    @model_validator(mode="before")
    @classmethod
    def _default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("place") == "reward" and "estimator" not in data:
            return {**data, "estimator": "k1"}
        return data

    @property
    def in_reward(self) -> bool:
        """Whether rewards pay for the divergence."""
        return bool(self.coef) and self.place == "reward"

    @model_validator(mode="after")
    def _check(self) -> KlConfig:
        if self.place == "reward":
            if not self.coef:
                raise ValueError(
                    "algorithm.kl.place = 'reward' does nothing while algorithm.kl.coef is 0: set coef, such as 0.001"
                )
            if self.estimator == "k3_unbiased":
                raise ValueError(
                    "algorithm.kl.estimator = 'k3_unbiased' corrects the gradient of a term in the loss, and with "
                    "algorithm.kl.place = 'reward' there is none: use 'k1', whose mean is the divergence, 'k2' or 'k3'"
                )
        elif self.coef and self.estimator == "k1":
            raise ValueError(
                "algorithm.kl.estimator = 'k1' in the loss has a gradient of 0 on average, so it keeps nothing near "
                "the reference: use 'k3_unbiased', 'k3' or 'k2', or set algorithm.kl.place = 'reward'"
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
