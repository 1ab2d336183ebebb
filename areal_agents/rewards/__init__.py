"""Rewards that verify: what they return is a ``Verdict``, as ``areal_agents.reward`` has it."""

from __future__ import annotations

from areal_agents.rewards.code.reward import code
from areal_agents.rewards.mathematics.reward import boxed_math, math
from areal_agents.rewards.plain_function import reward_function

__all__ = ["boxed_math", "code", "math", "reward_function"]
