"""Every gold trajectory of the leaderboard's multi-turn tasks, and broken ones beside its own checker."""

from __future__ import annotations

import asyncio
import copy
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from areal_agents.envs import bfcl_data
from areal_agents.envs.bfcl import Bfcl
from areal_agents.envs.bfcl_data import EXCLUDED, SPLITS
from areal_agents.tool import call_text
from areal_agents.types import Task
from tests.conftest import require
from tests.envs.golds import play, play_again

Calls = list[list[list[Any]]]
"""Of each request: its calls, each a name and arguments."""


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("module:bfcl_eval")


def tasks_of(category: str) -> list[Task]:
    return [t for split in SPLITS for t in Bfcl.tasks(split, category=category)]


def texts_of(calls: Calls) -> Iterator[str]:
    for request in calls:
        if request:
            yield "\n".join(call_text(name, **arguments) for name, arguments in request)
        yield "Done."


def score(task: Task, calls: Calls) -> float:
    return asyncio.run(play(Bfcl(), task, texts_of(calls)))[0]


def task(id: str) -> Task:
    return next(t for t in tasks_of(id.removeprefix("multi_turn_").rpartition("_")[0]) if t.id == id)


@pytest.mark.parametrize(
    ("category", "rows"), [("base", 200), ("miss_func", 199), ("miss_param", 200), ("long_context", 200)]
)
def test_every_gold_trajectory_earns_1_and_leaves_nothing_behind(category: str, rows: int) -> None:
    found = tasks_of(category)
    assert len(found) == rows
    first, second = asyncio.run(play_again(Bfcl(), found, lambda t: texts_of(t.payload["gold"])))
    assert [reward for reward, _ in first] == [1.0] * rows
    assert first[::4] == second


def test_what_is_left_out_is_left_out_for_a_reason_that_holds() -> None:
    assert list(EXCLUDED) == ["multi_turn_miss_func_49"]
    _, payload = bfcl_data._rows("miss_func")[49]
    assert "tail" in payload["held_back"]["3"]
    assert "tail" in [name for name, _ in payload["gold"][1]]
    made = Task.make("x", split="test", seed=0, payload=payload)
    assert score(made, payload["gold"]) == 0.0


# ── beside the leaderboard's own checker ─────────────────────────────────────────────────────────────────────────────

_runs = itertools.count()


def theirs(task: Task, calls: Calls) -> float:
    """The leaderboard's verdict on the same calls, which it evaluates as Python: they are ours."""
    package = "bfcl_eval.eval_checker.multi_turn_eval"
    checker = importlib.import_module(f"{package}.multi_turn_checker")
    utils = importlib.import_module(f"{package}.multi_turn_utils")

    def written(request: Sequence[Sequence[Any]]) -> list[str]:
        return [f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})" for name, arguments in request]

    entry = {
        "id": task.id,
        "initial_config": task.payload["scenario"],
        "involved_classes": task.payload["apis"],
    }
    before = set(vars(utils))
    verdict = checker.multi_turn_checker(
        [[written(request)] if request else [] for request in calls],
        [written(request) for request in task.payload["gold"]],
        entry,
        "",
        f"run{next(_runs)}",
    )
    for name in set(vars(utils)) - before:  # it keeps every instance for ever
        del vars(utils)[name]
    return float(verdict["valid"])


def one_less(gold: Calls) -> Calls:
    """Without the last call of all."""
    found = copy.deepcopy(gold)
    del next(request for request in reversed(found) if request)[-1]
    return found


def other_argument(gold: Calls) -> Calls | None:
    """Another value for the last argument of the last call that has one."""
    found = copy.deepcopy(gold)
    for request in reversed(found):
        for _, arguments in reversed(request):
            for key, value in reversed(arguments.items()):
                other = _other(value)
                if other is not None:
                    arguments[key] = other
                    return found
    return None


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else None


def other_order(gold: Calls) -> Calls | None:
    """The calls of each request the other way round."""
    found = [list(reversed(request)) for request in gold]
    return found if found != gold else None


EXTRA: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "GorillaFileSystem": [("mkdir", {"dir_name": "nobody_asked_for_this"})],
    "TicketAPI": [("ticket_login", {"username": "nobody", "password": "x"})],
    "MessageAPI": [("message_login", {"user_id": "USR004"}), ("add_contact", {"user_name": "Nobody"})],
    "VehicleControlAPI": [("set_navigation", {"destination": "Nowhere 1"})],
    "TradingBot": [("add_to_watchlist", {"stock": stock}) for stock in ("NVDA", "ALPH", "SYNX")],
    "TravelAPI": [(
        "authenticate_travel",
        {
            "client_id": "a", "client_secret": "b", "refresh_token": "c", "grant_type": "read_write",
            "user_first_name": "No", "user_last_name": "Body",
        },
    )],
}  # fmt: skip
"""Calls of each interface that change its state, whatever the state is."""


def one_more(task: Task) -> Calls | None:
    found: Calls = copy.deepcopy(task.payload["gold"])
    last = max(r for r, request in enumerate(found) if request)
    calls = [list(call) for api in task.payload["apis"] for call in EXTRA.get(api, ())]
    if not calls:
        return None
    found[last] += calls
    return found


BREAKS: dict[str, Callable[[Task], Calls | None]] = {
    "a call is missing": lambda t: one_less(t.payload["gold"]),
    "nothing is called": lambda t: [[] for _ in t.payload["gold"]],
    "another argument": lambda t: other_argument(t.payload["gold"]),
    "another order": lambda t: other_order(t.payload["gold"]),
    "a call too many": one_more,
}


HARMLESS: dict[tuple[str, str], tuple[int, int]] = {
    ("base", "a call is missing"): (200, 0),
    ("base", "nothing is called"): (200, 0),
    ("base", "another argument"): (200, 10),
    ("base", "another order"): (163, 53),
    ("base", "a call too many"): (200, 1),
    ("miss_func", "a call is missing"): (199, 0),
    ("miss_func", "a call too many"): (199, 1),
    ("miss_param", "a call is missing"): (200, 0),
    ("miss_param", "another order"): (162, 52),
    ("long_context", "a call is missing"): (200, 0),
}
"""How many trajectories there are, and how many of them the leaderboard itself accepts."""


@pytest.mark.parametrize(("category", "how"), HARMLESS, ids=str)
def test_a_broken_trajectory_earns_what_the_leaderboard_says(category: str, how: str) -> None:
    async def main() -> list[tuple[str, float, float]]:
        env, found = Bfcl(), []
        for t in tasks_of(category):
            broken = BREAKS[how](t)
            if broken is not None:
                earned, _ = await play(env, t, texts_of(broken))
                found.append((t.id, earned, theirs(t, broken)))
        return found

    found = asyncio.run(main())
    assert [row for row in found if row[1] != row[2]] == []
    assert (len(found), sum(earned == 1 for _, earned, _ in found)) == HARMLESS[category, how]
