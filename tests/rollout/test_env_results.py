"""What an environment returns is refused where it breaks the contract, and copied where it keeps it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from areal_agents.errors import EnvError, RewardError
from areal_agents.rollout.env_results import Call, Returned, read
from areal_agents.types import Image, Message, ToolOutcome, user

SEEN = (user("next"), Message("user", (Image("a.png"),)))


def stepped(info: Any, reward: Any = 0.5, *, terminated: Any = False) -> Any:
    return read("astep", (SEEN, reward, terminated, np.bool_(False), info), "astep of t", 2)


def test_what_keeps_the_contract_is_copied() -> None:
    info: dict[str, Any] = {
        "stop_reason": "answer", "components": {"right": np.float32(0.25)}, "turn_rewards": np.array([1.0, 2.0]),
        "state_key": "k", "tool_results": [{"status": "ok"}, {"status": "error", "truncated": True}],
    }  # fmt: skip
    got = stepped(info, Fraction(1, 4), terminated=True)
    info["components"]["right"] = 9.0
    info["tool_results"].clear()
    assert (got.observation, got.reward, got.terminated, got.truncated) == (SEEN, 0.25, True, False)
    assert (got.stop_reason, got.components, got.turn_rewards, got.state_key) == (
        "answer",
        {"right": 0.25},
        (1, 2),
        "k",
    )
    assert got.tool_results == (ToolOutcome("ok"), ToolOutcome("error", truncated=True))
    assert read("areset", (SEEN, {}), "", 0).observation == SEEN
    assert read("afinish", (True, {}), "", 1).reward == 1.0
    assert read("aclose", None, "", 1) == Returned()


def test_the_reason_of_an_end_is_the_environments_or_follows_from_the_flags() -> None:
    assert stepped({"stop_reason": "time_budget"}, terminated=True).ending == "time_budget"
    assert [stepped({}, terminated=t).ending for t in (True, False)] == ["answer", "max_turns"]


def test_tool_records_of_another_shape_are_the_environments_own() -> None:
    for records in (None, [{"status": "ok"}, "junk"], {"status": "ok"}):
        assert stepped({"tool_results": records}).tool_results == ()


@pytest.mark.parametrize(
    ("call", "result", "message"),
    [
        ("areset", SEEN[0], r"call returned Message\(.*, not \(observation, info\)"),
        ("areset", ([*SEEN], {}), r"call returned the observation \[.*: it must be a tuple of Message"),
        ("areset", (("text",), {}), "it must be a tuple of Message"),
        ("areset", ((), None), "call returned info None, which is not a dict with text keys"),
        ("areset", ((), {1: 2}), "which is not a dict with text keys"),
        ("astep", ((), 0.0, True, {}), r"not \(observation, reward, terminated, truncated, info\)"),
        ("astep", ((), 0.0, 1, False, {}), "returned terminated 1 and truncated False: both must be bool"),
        ("astep", ((), 0.0, True, False, {"stop_reason": "won"}), r"info\['stop_reason'\] is 'won': use answer, max_"),
        ("astep", ((), 0.0, True, False, {"stop_reason": None}), r"info\['stop_reason'\] is None"),
        ("astep", ((), 0.0, True, False, {"state_key": 3}), r"info\['state_key'\] is 3, which is not a text"),
        ("astep", ((), 0.0, True, False, {"components": [1.0]}), "is not a dict of numbers"),
        (
            "astep",
            ((), 0.0, True, False, {"turn_rewards": 1.0}),
            "is 1.0: give a list, a tuple or a 1-d array",
        ),
        ("afinish", 0.5, r"call returned 0.5, not \(reward, info\)"),
    ],
)
def test_what_breaks_the_contract_is_named(call: Call, result: Any, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        read(call, result, "call", 1)


@pytest.mark.parametrize("value", ["1.0", None, [1.0], 1 + 0j, 10**400, np.ones(2), float("nan"), -np.inf])
def test_a_number_is_a_finite_number_and_no_text(value: Any) -> None:
    broken: dict[str, Any] = {"the reward": ({}, value), "the component 'c'": ({"components": {"c": value}}, 0.0),
                              "the turn reward": ({"turn_rewards": [value]}, 0.0)}  # fmt: skip
    for name, (info, reward) in broken.items():
        with pytest.raises(RewardError, match=f"astep of t returned {name} .*, which is not (a number|finite)"):
            stepped(info, reward)
