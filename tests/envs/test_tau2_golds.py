"""Every gold trajectory of tau2-bench's domains, broken ones, and both beside the package's own evaluators."""

from __future__ import annotations

import asyncio
import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from areal_agents.envs.tau2 import Tau2, Tau2Airline, Tau2Retail, Tau2Telecom, Tau2TelecomSolo
from areal_agents.envs.tau2_data import gold_actions
from areal_agents.envs.tau2_world import base_of, declared_of
from areal_agents.types import AssistantMessage, Task
from tests.conftest import require
from tests.envs.golds import play, play_again

DOMAINS: dict[type[Tau2], dict[str, int]] = {
    Tau2Airline: {"train": 30, "test": 20},
    Tau2Retail: {"train": 74, "test": 40},
    Tau2Telecom: {"train": 74, "small": 20, "test": 40},
    Tau2TelecomSolo: {"train": 74, "small": 20, "test": 40},
}
Action = dict[str, Any]
Break = Callable[[type[Tau2], list[Action]], list[Action] | None]


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("module:tau2")


def tasks_of(cls: type[Tau2]) -> list[Task]:
    return [t for split in cls.splits for t in cls.tasks(split)]


def texts_of(cls: type[Tau2], task: Task, actions: list[Action], told: list[str] | None = None) -> list[str]:
    """The expert's texts, with other actions."""
    other = copy.deepcopy(task.payload)
    other["row"]["evaluation_criteria"]["actions"] = actions
    if told is not None:
        other["row"]["evaluation_criteria"]["communicate_info"] = told
    return list(cls.expert(Task.make(task.id, split=task.split, seed=task.seed, payload=other)))


@pytest.mark.parametrize("cls", DOMAINS)
def test_every_gold_trajectory_earns_1_and_leaves_nothing_behind(cls: type[Tau2]) -> None:
    base = base_of(cls.domain)
    before = (base.get_db_hash(), base.get_user_db_hash())
    assert {split: len(cls.tasks(split)) for split in cls.splits} == DOMAINS[cls]
    first, second = asyncio.run(play_again(cls(), tasks_of(cls), cls.expert))
    assert {reward for reward, _ in first} == {1.0}
    assert first[::4] == second
    assert (base.get_db_hash(), base.get_user_db_hash()) == before


# ── broken trajectories ──────────────────────────────────────────────────────────────────────────────────────────────


def writes(cls: type[Tau2], actions: list[Action]) -> list[int]:
    """Places of the actions that change a database."""
    writing = {t.name for side in ("assistant", "user") for t in declared_of(cls.domain, side) if t.writes}
    return [i for i, action in enumerate(actions) if action["name"] in writing]


def one_less(cls: type[Tau2], actions: list[Action]) -> list[Action] | None:
    places = writes(cls, actions)
    return [a for i, a in enumerate(actions) if i != places[-1]] if places else None


def other_argument(cls: type[Tau2], actions: list[Action]) -> list[Action] | None:
    found = copy.deepcopy(actions)
    for place in reversed(writes(cls, found)):
        for key, value in reversed(found[place]["arguments"].items()):
            if isinstance(value, int) and not isinstance(value, bool):
                found[place]["arguments"][key] = value + 1
                return found
            if isinstance(value, str):
                found[place]["arguments"][key] = f"{value}x"
                return found
    return None


def one_more(cls: type[Tau2], actions: list[Action]) -> list[Action]:
    extra: dict[str, Action] = {
        "airline": {"name": "send_certificate", "arguments": {"user_id": "emma_kim_9957", "amount": 1}},
        "retail": {
            "name": "modify_user_address",
            "arguments": {
                "user_id": "yusuf_rossi_9620", "address1": "1", "address2": "", "city": "X", "state": "NY",
                "country": "USA", "zip": "1",
            },
        },
        "telecom": {"requestor": "user", "name": "toggle_airplane_mode", "arguments": {}},
    }  # fmt: skip
    return [*actions, extra[cls.domain]]


def other_order(cls: type[Tau2], actions: list[Action]) -> list[Action] | None:
    found = list(reversed(actions))
    return found if len(writes(cls, actions)) > 1 else None


BREAKS: dict[str, Break] = {
    "a call is missing": one_less,
    "another argument": other_argument,
    "a call too many": one_more,
    "another order": other_order,
}
HARMLESS: dict[tuple[type[Tau2], str], tuple[int, int]] = {
    (Tau2Airline, "a call is missing"): (30, 0),
    (Tau2Airline, "another argument"): (30, 0),
    (Tau2Airline, "a call too many"): (50, 0),
    (Tau2Airline, "another order"): (14, 10),
    (Tau2Retail, "a call is missing"): (105, 2),
    (Tau2Retail, "another argument"): (105, 2),
    (Tau2Retail, "a call too many"): (114, 0),
    (Tau2Retail, "another order"): (45, 44),
    (Tau2Telecom, "a call is missing"): (112, 0),
    (Tau2Telecom, "another argument"): (94, 0),
    (Tau2Telecom, "a call too many"): (134, 22),
    (Tau2Telecom, "another order"): (99, 67),
}
"""How many trajectories there are, and how many of them are right all the same.

The last write of two rows fails in the gold too; many writes do not depend on each other; where the phone cannot be
helped, another of its switches changes nothing.
"""


@pytest.mark.parametrize(("cls", "how"), HARMLESS, ids=str)
def test_a_broken_trajectory_earns_nothing(cls: type[Tau2], how: str) -> None:
    async def main() -> list[tuple[str, float]]:
        env, found = cls(), []
        for t in tasks_of(cls):
            actions = BREAKS[how](cls, [dict(a) for a in gold_actions(t.payload["row"])])
            if actions is not None:
                found.append((t.id, (await play(env, t, texts_of(cls, t, actions)))[0]))
        return found

    found = asyncio.run(main())
    right = [id for id, reward in found if reward == 1.0]
    assert (len(found), len(right)) == HARMLESS[cls, how], right


@pytest.mark.parametrize("cls", [Tau2Airline, Tau2Retail])
def test_what_the_user_is_not_told_earns_nothing(cls: type[Tau2]) -> None:
    async def main() -> list[float]:
        env, found = cls(), []
        for t in tasks_of(cls):
            if t.payload["row"]["evaluation_criteria"].get("communicate_info"):
                texts = texts_of(cls, t, [dict(a) for a in gold_actions(t.payload["row"])], told=[])
                found.append((await play(env, t, texts))[0])
        return found

    found = asyncio.run(main())
    assert (len(found), sum(found)) == {Tau2Airline: (6, 0.0), Tau2Retail: (38, 0.0)}[cls]


@pytest.mark.parametrize("cls", DOMAINS)
def test_where_nothing_done_is_right_the_environment_says_so(cls: type[Tau2]) -> None:
    async def main() -> dict[str, float]:
        env = cls()
        refusing = ["I cannot help with that."] * 9
        return {split: sum([(await play(env, t, refusing))[0] for t in cls.tasks(split)]) for split in cls.splits}

    found = asyncio.run(main())
    assert found == {"airline": {"train": 13, "test": 6}, "retail": {"train": 5, "test": 2}}.get(
        cls.domain, {"train": 0, "small": 0, "test": 0}
    )
    assert cls.chance == max(found[split] / DOMAINS[cls][split] for split in cls.splits)


# ── beside the package's own evaluators ──────────────────────────────────────────────────────────────────────────────


def theirs(cls: type[Tau2], task: Task, env: Tau2) -> float:
    """The package's verdict on the episode that was just played, by its evaluators that need no judge."""
    messages: Any = importlib.import_module("tau2.data_model.message")
    made = importlib.import_module("tau2.data_model.tasks").Task.model_validate(task.payload["row"])
    environment = importlib.import_module(f"tau2.domains.{cls.domain}.environment")
    base, trajectory, number = base_of(cls.domain), list[Any](), 0
    for message in env._messages:
        calls = getattr(message, "tool_calls", ())
        if calls:
            asked = [
                messages.ToolCall(id=str(number + i), name=c.name, arguments=dict(c.arguments))
                for i, c in enumerate(calls)
            ]
            trajectory.append(messages.AssistantMessage(role="assistant", tool_calls=asked))
        elif isinstance(message, AssistantMessage):
            trajectory.append(messages.AssistantMessage(role="assistant", content=message.text))
        elif message.role == "tool":
            trajectory.append(messages.ToolMessage(id=str(number), role="tool", content=message.text))
            number += 1

    saved = [pickle.dumps(kit and kit.db) for kit in (base.tools, base.user_tools)]

    def new(solo_mode: bool = False) -> Any:
        copies = {"db": pickle.loads(saved[0])}
        if base.user_tools is not None:
            copies["user_db"] = pickle.loads(saved[1])
        return environment.get_environment(**copies, solo_mode=solo_mode)

    basis = {b.value for b in made.evaluation_criteria.reward_basis}
    package = "tau2.evaluator.evaluator"
    env_reward = importlib.import_module(f"{package}_env").EnvironmentEvaluator.calculate_reward(
        environment_constructor=new, task=made, full_trajectory=trajectory, solo_mode=cls.solo
    )
    reward = float(env_reward.reward)
    if "ACTION" in basis:
        evaluator = importlib.import_module(f"{package}_action").ActionEvaluator
        reward *= evaluator.calculate_reward(task=made, full_trajectory=trajectory).reward
    if "COMMUNICATE" in basis:
        evaluator = importlib.import_module(f"{package}_communicate").CommunicateEvaluator
        reward *= evaluator.calculate_reward(task=made, full_trajectory=trajectory).reward
    return reward


@pytest.mark.parametrize(("cls", "step"), [(Tau2Airline, 20), (Tau2Retail, 50), (Tau2TelecomSolo, 16)])
def test_the_packages_own_evaluators_agree(cls: type[Tau2], step: int) -> None:
    async def main() -> list[tuple[str, float, float]]:
        env, found = cls(), []
        golds = [(t, [dict(a) for a in gold_actions(t.payload["row"])]) for t in tasks_of(cls)]
        for t, gold in [(t, gold) for t, gold in golds if writes(cls, gold)][::step]:
            for actions in (gold, one_less(cls, gold)):
                if actions is not None:
                    earned, _ = await play(env, t, texts_of(cls, t, actions))
                    found.append((t.id, earned, theirs(cls, t, env)))
        return found

    found = asyncio.run(main())
    assert [row for row in found if row[1] != row[2]] == []
    assert {earned for _, earned, _ in found} == {0.0, 1.0}
