"""Rewards that verify: what they return is a ``Verdict``, as ``areal_agents.reward`` has it."""

from __future__ import annotations

from areal_agents.rewards.boxed_text import boxed_text
from areal_agents.rewards.code.reward import code
from areal_agents.rewards.consistency.agreement import agreement, majority
from areal_agents.rewards.consistency.claims import consistent_claims
from areal_agents.rewards.judges.pairwise import pairwise, ranked
from areal_agents.rewards.judges.panel import Panel
from areal_agents.rewards.judges.pointwise import pointwise
from areal_agents.rewards.judges.spending import Budget
from areal_agents.rewards.learned.reward import reward_model
from areal_agents.rewards.mathematics.reward import boxed_math, math
from areal_agents.rewards.plain_function import reward_function

__all__ = [
    "Budget",
    "Panel",
    "agreement",
    "boxed_math",
    "boxed_text",
    "code",
    "consistent_claims",
    "majority",
    "math",
    "pairwise",
    "pointwise",
    "ranked",
    "reward_function",
    "reward_model",
]
