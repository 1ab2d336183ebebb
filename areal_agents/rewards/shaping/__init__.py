"""Shaping rewards: small, cheap numbers about how an answer was given. A ``Gate`` pays them where the answer is right.

format · length · tool_cost · repetition · script: what they score is in each formula
wrappers: Clip and Normalize, round any reward
"""

from __future__ import annotations

from areal_agents.rewards.shaping.format import one_box, sections, tags, valid_calls
from areal_agents.rewards.shaping.length import kimi_length, overlong
from areal_agents.rewards.shaping.repetition import repetition
from areal_agents.rewards.shaping.script import script
from areal_agents.rewards.shaping.tool_cost import tool_cost
from areal_agents.rewards.shaping.wrappers import Clip, Normalize

__all__ = [
    "Clip",
    "Normalize",
    "kimi_length",
    "one_box",
    "overlong",
    "repetition",
    "script",
    "sections",
    "tags",
    "tool_cost",
    "valid_calls",
]
