"""What an environment returns is refused where it breaks the contract, and copied where it keeps it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from areal_agents.env import AgentEnv
from areal_agents.errors import EnvError, RewardError
from areal_agents.rollout.env_results import Call, Returned, read, read_tools
from areal_agents.types import AssistantMessage, Image, Message, Text, ToolOutcome, user


class Hostile:
    """Whatever is done with it raises."""

    def __float__(self) -> float:
        raise KeyError("hostile")

    def __repr__(self) -> str:
        raise KeyError("hostile")

    def __eq__(self, other: object) -> bool:
        raise KeyError("hostile")

    __hash__ = None  # type: ignore[assignment]


class HostileDict(dict[str, Any]):
    def items(self) -> Any:
        raise KeyError("hostile")

    def get(self, key: str, default: Any = None) -> Any:
        raise KeyError("hostile")


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
        ("areset", (None, {}), "the observation None: it must be a tuple of Message"),
        ("areset", ("hello", {}), "the observation 'hello': it must be a tuple of Message"),
        ("areset", ({"role": "user", "content": "hi"}, {}), "it must be a tuple of Message"),
        ("areset", ((SEEN,), {}), "it must be a tuple of Message"),
        ("areset", ((AssistantMessage((Text("hi"),)),), {}), "it must be a tuple of Message"),
        ("areset", ((user(None),), {}), "None in it is not a text"),  # type: ignore[arg-type]
        ("areset", ((user(["a", "b"]),), {}), r"\['a', 'b'\] in it is not a text"),  # type: ignore[arg-type]
        ("areset", ((user("hi"), user(b"hi")), {}), "b'hi' in it is not a text"),  # type: ignore[arg-type]
        ("areset", ((Message("user", "hi"),), {}), "its parts must be a tuple of Text and Image"),  # type: ignore[arg-type]
        ("areset", ((Message("user", ("hi",)),), {}), "its parts must be a tuple"),  # type: ignore[arg-type]
        ("areset", ((Message("user", [Text("hi")]),), {}), "its parts must be a tuple"),  # type: ignore[arg-type]
        ("areset", ((Message("human", (Text("hi"),)),), {}), "its role must be one of system, user"),  # type: ignore[arg-type]
        ("areset", ((Message("user", (Image(None),)),), {}), "None in it is not a text"),  # type: ignore[arg-type]
        ("astep", ((Message("tool", (Text("4"),), 7),), 0.0, False, False, {}), "its tool_call_id must be a text"),  # type: ignore[arg-type]
        ("astep", (None, 0.0, True, False, {}), "the observation None"),
        ("astep", ((), 0.0, True, False, None), "info None, which is not a dict"),
        ("astep", ((), 0.0, None, False, {}), "terminated None and truncated False: both must be bool"),
        ("astep", None, r"call returned None, not \(observation, reward"),
        ("afinish", None, r"call returned None, not \(reward, info\)"),
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
        ("astep", ((), 0.0, True, False, {"turn_rewards": {1.0}}), "is {1.0}: give a list"),
        ("astep", ((), 0.0, True, False, {"turn_rewards": b"1"}), "is b'1': give a list"),
        ("astep", ((), 0.0, True, False, {"turn_rewards": {0: 1.0}}), "is {0: 1.0}: give a list"),
        ("astep", ((), 0.0, True, False, {"turn_rewards": iter([1.0])}), "give a list"),
        ("astep", ((), 0.0, True, False, {"turn_rewards": np.ones((1, 1))}), "give a list"),
        ("astep", ((), 0.0, True, False, {"components": {1: 1.0}}), "is not a dict of numbers by name"),
        ("astep", ((), 0.0, True, False, {"stop_reason": np.ones(2)}), r"info\['stop_reason'\] is array"),
        ("astep", ((), 0.0, True, np.ones(2), {}), "terminated True and truncated array"),
        ("areset", ((), {}), "call: the first observation is empty: the model would have nothing to answer"),
        ("afinish", 0.5, r"call returned 0.5, not \(reward, info\)"),
    ],
)
def test_what_breaks_the_contract_is_named(call: Call, result: Any, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        read(call, result, "call", 1)


@pytest.mark.parametrize(
    "value",
    [
        "1.0", b"1", None, [1.0], 1 + 0j, np.complex128(1), np.array(1 + 0j), torch.tensor(1 + 0j), np.str_("1.0"),
        np.array("1.0"), 10**400, np.ones(2), np.array([0.5]), float("nan"), -np.inf, Hostile(),
    ],
)  # fmt: skip
def test_a_number_is_a_finite_number_and_no_text(value: Any) -> None:
    broken: dict[str, Any] = {"the reward": ({}, value), "the component 'c'": ({"components": {"c": value}}, 0.0),
                              "the turn reward": ({"turn_rewards": [value]}, 0.0)}  # fmt: skip
    for name, (info, reward) in broken.items():
        with pytest.raises(RewardError, match=f"astep of t returned {name} .*, which is not (a number|finite)"):
            stepped(info, reward)


@pytest.mark.parametrize("value", [1, True, np.float32(1), np.array(1.0), np.bool_(True), torch.tensor(1.0)])
def test_every_kind_of_scalar_is_a_number(value: Any) -> None:
    assert stepped({}, value).reward == 1.0


def test_huge_whole_numbers_are_not_finite() -> None:
    with pytest.raises(RewardError, match="the reward a whole number of about 5000 digits, which is not finite"):
        stepped({}, 10**5000)


def test_what_raises_while_it_is_read_is_named() -> None:
    for info in ({"components": HostileDict(a=1.0)}, HostileDict(a=1.0), {"tool_results": [{"status": Hostile()}]}):
        with pytest.raises(EnvError, match="astep of t: reading what it returned raised KeyError: 'hostile'"):
            stepped(info)
    for wrong in ({"state_key": Hostile()}, {"stop_reason": Hostile()}):
        with pytest.raises(EnvError, match="is a Hostile"):
            stepped(wrong)


def test_turn_rewards_are_counted_before_they_are_read_at_the_end_of_an_episode() -> None:
    class Long(list[float]):
        def __iter__(self) -> Any:
            raise AssertionError("it was read")

    with pytest.raises(RewardError, match="turn_rewards has 3 entries for 2 turns"):
        stepped({"turn_rewards": Long([1.0] * 3)}, terminated=True)
    assert stepped({"turn_rewards": [1.0] * 3}).turn_rewards == (1.0, 1.0, 1.0)  # it goes on: nobody uses them


def test_no_message_is_long() -> None:
    long = "x" * 10_000_000
    for info in ({"state_key": [long]}, {"components": {long: None}}, {long: 1, 2: 2}, {"stop_reason": long}):
        with pytest.raises((EnvError, RewardError)) as caught:
            stepped(info)
        assert len(str(caught.value)) < 500
    with pytest.raises(EnvError) as flag:
        stepped({}, terminated=long)
    assert len(str(flag.value)) < 500


def test_tools_are_a_sequence_of_tools() -> None:
    class Env(AgentEnv):
        pass

    env = Env()
    assert read_tools(env, "areset") == ()
    for wrong in (None, ("python",), {"python": 1}, iter(())):
        env.tools = wrong  # type: ignore[assignment]
        with pytest.raises(EnvError, match=r"areset: tools is .*, which is not a sequence of tools"):
            read_tools(env, "areset")


@pytest.mark.parametrize(
    ("status", "replays", "metrics"),
    [
        ("unverifiable", np.int64(2), {"unverifiable": 1.0, "sandbox_replays": 2.0}),
        ("timeout", 0, {"verdict_timeout": 1.0}),
        ("ok", None, {}),
        (None, 1.0, {"sandbox_replays": 1.0}),
    ],
)
def test_odd_verdicts_and_replays_are_counted(status: Any, replays: Any, metrics: dict[str, float]) -> None:
    assert stepped({"verdict_status": status, "sandbox_replays": replays}).metrics == metrics


@pytest.mark.parametrize(
    "info",
    [
        {"verdict_status": "Unverifiable"}, {"verdict_status": "verdict_timeout"}, {"verdict_status": 1},
        {"sandbox_replays": "2"}, {"sandbox_replays": -1}, {"sandbox_replays": 0.5}, {"sandbox_replays": float("nan")},
    ],
)  # fmt: skip
def test_a_verdict_or_a_count_that_would_count_nowhere_is_refused(info: dict[str, Any]) -> None:
    with pytest.raises(EnvError, match=r"astep of t: info\['(verdict_status|sandbox_replays)'\] is"):
        stepped(info)


def test_an_outcome_is_read_at_the_end_and_copied_as_json() -> None:
    given: dict[Any, Any] = {"files": [("a", np.int64(3))], 1: None}
    at_end = read("astep", ((), 1.0, True, False, {"outcome": given}), "here", 1)
    assert at_end.outcome == {"files": [["a", 3]], "1": None}
    given["files"].clear()
    assert at_end.outcome["files"] == [["a", 3]]
    assert read("afinish", (0.0, {"outcome": "x"}), "here", 1).outcome == "x"
    assert read("astep", ((user("?"),), 0.0, False, False, {"outcome": {1, 2}}), "here", 1).outcome is None
    for wrong in ({1, 2}, float("inf"), np.zeros(2), [[b"x"]], "x" * (1 << 20)):
        with pytest.raises(
            EnvError, match=r"here: info\['outcome'\] is .*, which (is not JSON|has 1048578 characters)"
        ):
            read("afinish", (0.0, {"outcome": wrong}), "here", 1)
