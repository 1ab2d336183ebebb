"""The settings of the critic, which estimates what is still to come at each point of an episode."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from areal_agents.algorithms.registry import READ_VALUES, needs_critic
from areal_agents.settings.section import Positive, Section


class CriticConfig(Section):
    kind: Literal["none", "trunk", "own"] = "none"
    """The model of V that ``gae`` and its kin read: a linear head on the policy's layers, or a second model."""
    lr: float | None = Field(default=None, gt=0.0)
    """Learning rate, the same at every step; none: 1e-4 for ``trunk`` (a head alone), 1e-5 for ``own``."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps at the start in which only the critic learns; they count, and the policy stays as it is."""
    value_clip: float | None = Field(default=None, gt=0.0)
    """PPO's value clip: V is pulled no further than this from where it was when the batch was made; none: off."""
    coefficient: float = Field(default=0.0, ge=0.0)
    """``trunk``: weight of the value loss in the gradient of the policy's layers; 0: it stops at the head."""
    grad_clip: Positive = 1.0
    """Largest norm of the critic's own gradient."""

    @model_validator(mode="after")
    def _check(self) -> CriticConfig:
        for name, info in type(self).model_fields.items():
            if self.kind == "none" and getattr(self, name) != info.default:
                raise ValueError(
                    f"algorithm.critic.{name} = {getattr(self, name)!r} without a critic: set algorithm.critic.kind = "
                    "'trunk' or 'own', or leave it out"
                )
        if self.kind == "own" and self.coefficient:
            raise ValueError(
                f"algorithm.critic.coefficient = {self.coefficient:g} weighs a loss in the policy's layers, but kind = "
                "'own' has layers of its own: leave it out, or set kind = 'trunk'"
            )
        return self

    def require_reader(self, advantage: str) -> None:
        """Raise ValueError unless there is a critic exactly where ``advantage`` reads one."""
        chosen, reads = f"algorithm.advantage.kind = {advantage!r}", needs_critic(advantage)
        if reads and self.kind == "none":
            raise ValueError(
                f"{chosen} reads a critic's values: set algorithm.critic.kind = 'trunk' (a head on the policy's own "
                "layers) or 'own' (a second model), or choose an advantage that compares episodes, as 'turn_return'"
            )
        if self.kind != "none" and not reads:
            readers = ", ".join(map(repr, READ_VALUES))
            raise ValueError(
                f"algorithm.critic.kind = {self.kind!r} trains a critic that {chosen} never asks: set "
                f"algorithm.advantage.kind to one of {readers}, or algorithm.critic.kind = 'none'"
            )

    def require_steps(self, steps: int) -> None:
        """Raise ValueError where none of a run's ``steps`` would be the policy's."""
        if self.warmup_steps >= steps:
            raise ValueError(
                f"algorithm.critic.warmup_steps = {self.warmup_steps} of steps = {steps}: the policy would never move"
            )

    def require_learner(self, *, minibatches: int, warmup_steps: int) -> None:
        """Raise ValueError for what could not act beside the learner's ``minibatches`` and ``warmup_steps``."""
        if self.value_clip is not None and minibatches == 1:
            raise ValueError(
                f"algorithm.critic.value_clip = {self.value_clip:g} never acts with learner.minibatches = 1, for V has "
                "not moved yet when a batch's only step is taken: leave it out, or set learner.minibatches to 2 or more"
            )
        if 0 < warmup_steps <= self.warmup_steps:
            raise ValueError(
                f"learner.warmup_steps = {warmup_steps} would be over before the policy moves, since "
                f"algorithm.critic.warmup_steps = {self.warmup_steps} and both count from the first step: set "
                f"learner.warmup_steps over {self.warmup_steps}, or leave it out"
            )

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return self.lr or (1e-4 if self.kind == "trunk" else 1e-5)
