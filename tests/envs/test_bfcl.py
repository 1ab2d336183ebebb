"""The leaderboard's multi-turn tasks: requests, functions that are held back, limits, hostile calls, and splits."""

from __future__ import annotations

import copy
import decimal
import importlib
import json
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.envs import bfcl_apis, bfcl_data, task_packages
from areal_agents.envs.bfcl import Bfcl
from areal_agents.envs.bfcl_data import CATEGORIES, SPLITS, gold_call, split_of
from areal_agents.errors import ConfigError, EnvError
from areal_agents.tool import call_text
from areal_agents.types import Task
from areal_agents.utils.sync import run_sync
from tests.conftest import require
from tests.envs.test_bfcl_golds import score, task, tasks_of, texts_of
from tests.envs.test_games import played


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("module:bfcl_eval")


# ── requests, held-back functions and limits ─────────────────────────────────────────────────────────────────────────


def test_a_request_is_graded_when_the_agent_is_done_with_it() -> None:
    t = task("multi_turn_base_1")
    first = call_text("ls", a=True)
    _, said, info = played(Bfcl(), t, [first, "Done.", "no", "no", "no"])
    assert (said, info["components"]) == ("", {"correct": 0.0, "requests": 0.25})
    env = Bfcl()
    env.reset(seed=0, options={"task": t})
    assert env.step(call_text("pwd"))[0][0].text == '{"current_working_directory": "/alex"}'
    assert env.step(first)[0][0].text == '{"current_directory_content": ["workspace"]}'
    assert env.step("Done.")[0][0].text == t.payload["requests"][1]
    assert env.state.graded == [""]  # a look more than the gold's does no harm
    env.step("Done.")
    assert env.state.graded == ["", "nothing was called"]
    env.step("\n".join(call_text(name, **arguments) for name, arguments in t.payload["gold"][1][:1]))
    env.step("Done.")
    assert env.state.graded == ["", "nothing was called", "the state is another"]
    env.close()


def test_a_result_that_is_missing_is_seen_where_the_state_is_the_same() -> None:
    t = task("multi_turn_base_1")
    env = Bfcl()
    env.reset(seed=0, options={"task": t})
    env.step(call_text("ls"))
    env.step("Done.")
    assert env.state.graded == [""]  # nothing is hidden there, so both say the same
    env.step("\n".join(call_text(name, **arguments) for name, arguments in t.payload["gold"][1]))
    env.step("Done.")
    env.step(call_text("cd", folder="archive") + call_text("tail", file_name="log.txt", lines=1))
    env.step("Done.")
    assert env.state.graded == ["", "", "a result is missing"]
    env.close()


def test_a_function_that_is_held_back_comes_with_its_request() -> None:
    t = next(t for t in tasks_of("miss_func") if len(t.payload["held_back"]) == 1)
    [(turn, names)] = t.payload["held_back"].items()
    env = Bfcl(category="miss_func")
    env.reset(seed=0, options={"task": t})
    arguments = next(a for request in t.payload["gold"] for name, a in request if name == names[0])
    assert not {spec.name for spec in env.tools} & set(names)
    assert f"no tool {names[0]!r}" in env.step(call_text(names[0], **arguments))[0][0].text
    texts = [env.step("I cannot.")[0][0].text for _ in range(int(turn))]
    said, listed = texts[-1].split("\n")
    assert said == "From now on you can call these functions too. Please try again."
    assert [f["name"] for f in json.loads(listed)] == names
    assert {spec.name for spec in env.tools} >= set(names)
    assert "no tool" not in env.step(call_text(names[0], **arguments))[0][0].text
    env.reset(seed=0, options={"task": t})
    assert not {spec.name for spec in env.tools} & set(names)
    env.close()


def test_the_turn_limit_is_of_one_request() -> None:
    t = task("multi_turn_base_1")
    env = Bfcl(max_turns=3)
    assert Bfcl().max_turns == 21
    env.reset(seed=0, options={"task": t})
    ends = [env.step(text)[2:4] for text in [call_text("pwd"), call_text("pwd"), "Done."]]
    ends += [env.step(text)[2:4] for text in [call_text("pwd"), call_text("pwd"), call_text("pwd")]]
    assert ends == [(False, False)] * 5 + [(False, True)]
    env.reset(seed=0, options={"task": t})
    assert [env.step(call_text("pwd"))[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]
    env.close()


def test_an_episode_that_stops_early_earns_nothing() -> None:
    t = task("multi_turn_base_1")
    env = Bfcl()
    env.reset(seed=0, options={"task": t})
    for text in list(texts_of(t.payload["gold"]))[:-1]:
        env.step(text)
    reward, info = run_sync(env.afinish("tokens"))
    assert (reward, info["components"]) == (0.0, {"correct": 0.0, "requests": 0.75})


# ── hostile calls ────────────────────────────────────────────────────────────────────────────────────────────────────


def first_task(api: str) -> Task:
    return next(t for t in tasks_of("base") if api in t.payload["apis"])


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("power", {"base": 9, "exponent": 10**9}, "the result is too large"),
        ("power", {"base": 2, "exponent": 10}, '{"result": 1024}'),
        ("power", {"base": 9.5, "exponent": 1e9}, "Error during execution: .*out of range"),
        ("logarithm", {"value": 2, "base": 3, "precision": 10**9}, "precision must be a number of at most 1000"),
        ("square_root", {"number": 2, "precision": 10**9}, "precision must be a number of at most 1000"),
        ("square_root", {"number": 2, "precision": "NaN"}, "precision must be a number of at most 1000"),
        ("logarithm", {"value": 2, "base": 3, "precision": "1_000_000_000"}, "precision must be a number"),
        ("round_number", {"number": 5, "decimal_places": -(10**9)}, "decimal_places must be a number of at most 1000"),
        ("mean", {"numbers": "().__class__"}, "'numbers': .* is no array"),
        ("add", {"a": "__import__('os').getpid()", "b": "x"}, r'{"result": "__import__\(\'os\'\).getpid\(\)x"}'),
        ("__init__", {}, "no tool '__init__'"),
        ("_load_scenario", {"scenario": {}}, "no tool '_load_scenario'"),
        ("__class__", {}, "no tool '__class__'"),
        ("add", {"a": 1, "b": 2, "self": 3}, "'self' is not a parameter"),
    ],
)
def test_what_a_model_writes_is_never_evaluated(name: str, arguments: dict[str, Any], says: str) -> None:
    t = first_task("MathAPI")
    _, said, _ = played(Bfcl(), t, [call_text(name, **arguments)])
    assert re.search(says, said), said


def test_a_file_system_that_holds_itself_ends_what_can_be_done() -> None:
    t = first_task("GorillaFileSystem")
    # A folder copied into itself holds itself, without end.
    calls = [("mkdir", {"dir_name": "a"}), ("cp", {"source": "a", "destination": "a"}), ("find", {"path": "."})]
    env = Bfcl()
    env.reset(seed=0, options={"task": t})
    shown = env.step("\n".join(call_text(name, **arguments) for name, arguments in calls))[0]
    assert [m.text for m in shown][1:] == ["error: the file system has become too large"] * 2
    env.step("Done.")
    assert env.state.graded == ["the file system has become too large"]
    env.close()


def test_a_removed_folder_that_one_is_still_in_is_bounded_too() -> None:
    t = first_task("GorillaFileSystem")
    # b/c is the same folder as a/c, so ".." leads from there into a, which no folder holds any more.
    calls: list[tuple[str, dict[str, Any]]] = [
        ("mkdir", {"dir_name": "a"}), ("cd", {"folder": "a"}), ("mkdir", {"dir_name": "c"}), ("cd", {"folder": ".."}),
        ("cp", {"source": "a", "destination": "b"}), ("rm", {"file_name": "a"}), ("cd", {"folder": "b"}),
        ("cd", {"folder": "c"}), ("cd", {"folder": ".."}), ("mkdir", {"dir_name": "x0"}),
    ]  # fmt: skip
    for i in range(16):  # each folder holds the one before it twice: 2 ** 16 in all
        x, y = f"x{i}", f"x{i + 1}"
        calls += [("mkdir", {"dir_name": y})]
        for name in ("left", "right"):
            calls += [
                ("cp", {"source": x, "destination": name}),
                ("mv", {"source": name, "destination": y}),
            ]
        calls += [("rm", {"file_name": x})]
    env = Bfcl(max_turns=99)
    env.reset(seed=0, options={"task": t})
    shown: list[str] = []
    for first in range(0, len(calls), 60):
        message = "\n".join(call_text(name, **arguments) for name, arguments in calls[first : first + 60])
        shown += [m.text for m in env.step(message)[0]]
    assert "error: the file system has become too large" not in shown[: 10 + 6 * 11]
    assert shown[-1] == "error: the file system has become too large"
    env.close()


def test_arguments_nested_deeper_than_any_task_are_an_error_of_the_call() -> None:
    t = first_task("TicketAPI")
    deep: Any = "x"
    for _ in range(400):
        deep = {"k": deep}
    env = Bfcl()
    env.reset(seed=0, options={"task": t})
    # As a text: a call that is nested so deep is not read at all.
    assert "no tool" not in env.step(call_text("edit_ticket", ticket_id=1, updates=json.dumps(deep)))[0][0].text
    assert env.step("Done.")[2:4] == (False, False)
    env.close()


def test_precisions_that_functions_set_are_no_one_elses() -> None:
    mpmath: Any = importlib.import_module("mpmath")
    before = (mpmath.mp.dps, decimal.getcontext().prec)
    calls = [call_text("logarithm", value=2, base=3, precision=50), call_text("square_root", number=2, precision=40)]
    _, said, _ = played(Bfcl(), first_task("MathAPI"), ["\n".join(calls)])
    assert said == (
        "{'result': mpf('0.63092975357145743709952711434276085429958564013187944')}\n"
        "{'result': Decimal('1.414213562373095048801688724209698078570')}"
    )
    assert (mpmath.mp.dps, decimal.getcontext().prec) == before


def test_what_a_call_is_given_does_not_become_the_state() -> None:
    t = next(t for t in tasks_of("base") if any(name == "mention" for r in t.payload["gold"] for name, _ in r))
    before = copy.deepcopy(t.payload)
    assert score(t, t.payload["gold"]) == 1.0
    assert t.payload == before


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ({"balance": 3}, {"balance": 3.0}, True),  # as Python compares them, and not as they are written
        ({"orders": {"a": 1, "b": 2}}, {"orders": {"b": 2, "a": 1}}, True),
        ({"ids": {1, 2}}, {"ids": {2, 1}}, True),
        ({"balance": "3"}, {"balance": 3}, False),
        ({"balance": float("nan")}, {"balance": float("nan")}, False),
        ({"list": [1, 2]}, {"list": [2, 1]}, False),
        ({}, {"list": []}, False),
        ({"more": 1, "_own": 1}, {"_own": 2}, True),
    ],
)
def test_states_are_compared_by_value(found: dict[str, Any], wanted: dict[str, Any], same: bool) -> None:
    assert bfcl_apis.same_state({"x": SimpleNamespace(**found)}, {"x": SimpleNamespace(**wanted)}) is same


def parts(value: Any, found: dict[int, Any]) -> dict[int, Any]:
    """Everything that can change in a value, by its identity."""
    if id(value) not in found and (isinstance(value, dict | list | set) or hasattr(value, "__dict__")):
        found[id(value)] = value
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | set) else ()
        for each in [*inner, *vars(value).values()] if hasattr(value, "__dict__") else inner:
            parts(each, found)
    return found


@pytest.mark.parametrize("category", ["base", "long_context"])
@pytest.mark.parametrize("api", bfcl_apis.APIS)
def test_the_interfaces_of_two_episodes_share_nothing(api: str, category: str) -> None:
    t = next(t for t in tasks_of(category) if api in t.payload["apis"])
    one, two = (
        bfcl_apis.opened([api], t.payload["scenario"], long_context=category == "long_context") for _ in range(2)
    )
    assert parts(one, {}).keys() & parts(two, {}).keys() == set()
    assert parts(one, {}).keys() & parts(t.payload, {}).keys() == set()


def test_what_one_episode_pays_no_other_has_paid() -> None:
    """Most cards of long_context are not the scenario's own, but the package's."""
    t = next(t for t in tasks_of("long_context") if "TravelAPI" in t.payload["apis"])
    one, two = Bfcl(category="long_context"), Bfcl(category="long_context")
    for env in (one, two):
        env.reset(seed=0, options={"task": t})
    travel = one.state.instances["TravelAPI"]
    card, booking = list(travel.credit_card_list)[-1], list(travel.booking_record)[-1]
    assert card not in t.payload["scenario"]["TravelAPI"].get("credit_card_list", {})
    travel.access_token, travel.budget_limit = "x", None
    paid = call_text(
        "purchase_insurance", access_token="x", insurance_type="a", insurance_cost=7.5, booking_id=booking, card_id=card
    )
    before = [env.state.instances["TravelAPI"].credit_card_list[card]["balance"] for env in (one, two)]
    assert '"insurance_status": true' in one.step(paid)[0][0].text
    after = [env.state.instances["TravelAPI"].credit_card_list[card]["balance"] for env in (one, two)]
    assert after == [before[0] - 7.5, before[1]]
    assert not bfcl_apis.same_state(one.state.instances, one.state.wanted)  # nor have the gold calls
    one.close()
    two.close()


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_one_scenario_are_in_one_split() -> None:
    sizes = {category: [len(Bfcl.tasks(split, category=category)) for split in SPLITS] for category in CATEGORIES}
    assert sizes == {
        "base": [146, 26, 28],
        "miss_func": [146, 26, 27],
        "miss_param": [146, 26, 28],
        "long_context": [146, 26, 28],
    }
    for category in CATEGORIES:
        for t in tasks_of(category):
            assert t.split == split_of(int(t.id.rpartition("_")[2]))
    assert {len(Bfcl.tasks(split, category="base", all_for_test=True)) for split in ("train", "validation")} == {0}
    assert len(Bfcl.tasks("test", category="base", all_for_test=True)) == 200


def test_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no category 'live_simple': there are base, miss_func, miss_param, long_con"):
        Bfcl(category="live_simple")
    with pytest.raises(ConfigError, match=r"no category \['base'\]: there are base,"):
        registry.spec("areal/Bfcl-v0").with_kwargs({"category": ["base"]}).tasks("test")
    with pytest.raises(ConfigError, match="no split 'dev': its splits are train, validation, test"):
        Bfcl.tasks("dev")


@pytest.mark.parametrize(
    "text",
    ["cat(__import__('os'))", "cat(x=1)", "cat('a', 'b')", "cat('a', file_name='b')", "os.kill(1)", "cat(", "dog()"],
)
def test_a_gold_call_is_read_and_not_evaluated(text: str) -> None:
    declared = {f.name: f for f in bfcl_apis.functions_of("GorillaFileSystem")}
    assert gold_call(" sort('a.txt')", declared) == ("sort", {"file_name": "a.txt"})
    with pytest.raises(EnvError, match="cannot be read"):
        gold_call(text, declared)


def test_tools_pickle_as_processes_exchange_them() -> None:
    tools = Bfcl().tools_of(first_task("TradingBot"))
    assert [spec.name for spec in pickle.loads(pickle.dumps(tools))] == [spec.name for spec in tools]
    assert all(spec.parameters["type"] == "object" for spec in tools)


# ── a package that is missing ────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_package_is_refused_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.spec("areal/Bfcl-v0")
    assert spec.installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not spec.installed
    bfcl_data._rows.cache_clear()
    bfcl_data.category_tasks.cache_clear()
    with pytest.raises(
        ConfigError,
        match=r"needs bfcl-eval 2026\.3\.23, which is not installed: pip install --no-deps bfcl-eval==2026\.3\.23",
    ):
        Bfcl(category="base")
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2025.1.1")
    with pytest.raises(ConfigError, match=r"what is installed is 2025\.1\.1: pip install --no-deps bfcl-eval=="):
        Bfcl(category="base")


def test_what_a_package_imports_is_named_too() -> None:
    package = task_packages.TaskPackage(
        "pytest", pytest.__version__, "pytest", imports=("no_such_module",), others=("no-such",)
    )
    with pytest.raises(
        ConfigError,
        match=r"with the module 'no_such_module', .*: pip install no-such && pip install --no-deps pytest",
    ):
        package.require("x")
