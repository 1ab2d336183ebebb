"""What judges are shown of an episode, where functions of the author choose it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_agents.errors import RewardError
from areal_agents.reward import judge
from areal_agents.rewards import Panel, pointwise
from tests.rewards.judges.scripted import Scripted, episode, gives


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        ({"answer": lambda e: 3}, "task 't': answer returned 3, which is no text nor None"),
        ({"question": lambda e: None}, "returned None, which is no text for judges"),
        ({"reference": lambda e: ["a"]}, "which is no text for judges"),
    ],
)
def test_a_function_that_returns_no_text_is_told(shown: dict[str, Any], told: str) -> None:
    panel = Panel({"a": Scripted(gives(5))})
    with pytest.raises(RewardError, match=told):
        asyncio.run(judge(pointwise(panel, "Is it right?", **shown), episode("12")))
    assert panel.spent.calls == 0
