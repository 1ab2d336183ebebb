"""The settings of what is logged, and of what is told of it."""

from __future__ import annotations

from pydantic import Field

from areal_agents.settings.section import Fraction, Section


class TrackConfig(Section):
    tensorboard: bool = True
    """Write the metrics for TensorBoard."""
    wandb: str = ""
    """Weights & Biases project to log to as well (needs the ``wandb`` extra); empty: none."""
    watch: bool = True
    """Tell of signs that a reward is earned without the task (event ``reward_hack_suspected``)."""
    watch_correct: str = ""
    """The reward's component that says whether an answer is right; empty: what its ``Gate`` is on, else ``correct``."""
    watch_window: int = Field(default=20, ge=4, multiple_of=2)
    """Steps over which a component may rise while correctness falls, before it is told."""
    watch_same_answers: Fraction = 0.8
    """More than this share of a batch's tasks answered with the very same text is told; 1: never."""
