"""Environments that are answered by looking things up: their golds against slow ones, what each call may do."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from contextlib import closing
from typing import Any

import pytest

from areal_agents.envs import assistant, booking, facts, shop_database
from areal_agents.errors import ConfigError, TaskError
from areal_agents.reward import Episode
from areal_agents.rewards.boxed_text import boxed_text, plain_words
from areal_agents.tool import call_text
from areal_agents.types import AssistantMessage, Task, Text
from tests.envs.test_games import played, task_of


def rows(database: str) -> dict[str, list[dict[str, Any]]]:
    """Read a whole database."""
    with closing(sqlite3.connect(shop_database.databases() / f"{database}.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        tables = ("customers", "products", "orders", "items")
        return {t: [dict(r) for r in connection.execute(f"SELECT * FROM {t}")] for t in tables}


def spent(data: dict[str, list[dict[str, Any]]], keep: Any) -> int:
    """Add up what was spent, item by item, where ``keep(customer, product, order)``."""
    customers, products, orders = ({r["id"]: r for r in data[t]} for t in ("customers", "products", "orders"))
    total = 0
    for item in data["items"]:
        order, product = orders[item["order_id"]], products[item["product_id"]]
        if keep(customers[order["customer_id"]], product, order):
            total += item["count"] * product["cents"]
    return total


def slowly(question: str, data: dict[str, list[dict[str, Any]]]) -> int:
    """Answer a question of the shop's in Python."""
    patterns = (
        (r"How many cents does the (\w+) cost", lambda p: sum(r["cents"] for r in data["products"] if r["name"] == p)),
        (r"What do all (\w+) products", lambda c: sum(r["cents"] for r in data["products"] if r["category"] == c)),
        (r"most expensive (\w+) product", lambda c: max(r["cents"] for r in data["products"] if r["category"] == c)),
        (r"did (\w+ \w+) spend in all", lambda n: spent(data, lambda c, p, o: c["name"] == n)),
        (r"spent in month (\d+)", lambda m: spent(data, lambda c, p, o: o["month"] == int(m))),
        (r"customers from (\w+) spend in all", lambda x: spent(data, lambda c, p, o: c["city"] == x)),
        (
            r"customers from (\w+) spend on (\w+) products up to month (\d+)",
            lambda x, k, m: spent(
                data, lambda c, p, o: c["city"] == x and p["category"] == k and o["month"] <= int(m)
            ),
        ),
        (
            r"customer from (\w+) spend who spent the most",
            lambda x: max(
                spent(data, lambda c, p, o, own=own: c["id"] == own)
                for own in [r["id"] for r in data["customers"] if r["city"] == x]
            ),
        ),
        (
            r"customers from (\w+) and of all from (\w+) differ",
            lambda a, b: abs(spent(data, lambda c, p, o: c["city"] == a) - spent(data, lambda c, p, o: c["city"] == b)),
        ),
    )  # fmt: skip
    for pattern, answer in patterns:
        if found := re.search(pattern, question):
            return answer(*found.groups())
    raise AssertionError(question)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_the_answers_of_the_shop_are_what_adding_up_its_rows_gives(level: float) -> None:
    kinds = set()
    for split in ("train", "test"):
        for task in shop_database.ShopDatabase.tasks(split, difficulty=level)[:8]:
            p = task.payload
            assert p["database"].startswith(split)
            assert int(p["answer"]) == slowly(p["question"], rows(p["database"])), p["question"]
            kinds.add(re.sub(r"[A-Z]\w+|\d+", "", p["question"]))
    assert len(kinds) > 1


def test_a_chain_of_facts_is_in_its_documents() -> None:
    documents = {}
    for line in (facts.corpus() / "corpus.jsonl").read_text().splitlines():
        document = json.loads(line)
        documents[document["title"]] = document["text"]
        assert re.fullmatch(r"d\d+", document["id"])  # else it could be read without a search
    assert len(documents) == 600 + 200 + 120 + 24
    for level, hops in ((0.0, 1), (0.5, 2), (1.0, 4)):
        for task in facts.Facts.tasks("test", difficulty=level)[:20]:
            path, question = task.payload["path"], task.payload["question"]
            assert len(path) == hops + 1 == len(set(path))
            assert (path[0] in question, path[-1] == task.payload["answer"]) == (True, True)
            assert all(other in documents[name] for name, other in itertools.pairwise(path))
            assert question.count(" of ") == hops


def test_a_document_is_read_by_the_id_that_a_search_shows() -> None:
    task = next(t for t in facts.Facts.tasks("test", difficulty=0.0) if t.payload["answer"].isalpha())
    name, answer = task.payload["path"]
    env = facts.Facts(sandbox=None)
    env.reset(seed=0, options={"task": task})
    observation, *_ = env.step(call_text("read_document", id=name))
    assert answer not in observation[-1].text
    observation, *_ = env.step(call_text("search", query=name))
    (shown,) = re.findall(rf"\[(d\d+)\] {name}$", observation[-1].text, re.MULTILINE)
    observation, *_ = env.step(call_text("read_document", id=shown))
    assert answer in observation[-1].text
    env.close()


def test_texts_are_compared_as_readers_do() -> None:
    score = boxed_text()

    def of(answer: str, gold: Any) -> float:
        task = task_of({"answer": gold})
        verdict = score(Episode(task, (), answer, (), "answer"))
        assert isinstance(verdict, float)
        return verdict

    assert of(r"It is \boxed{the  TOWN of Bar-Harbor.}", "town of Bar Harbor") == 1.0
    assert of(r"\boxed{Ａna}", ["Eva", "ana"]) == 1.0
    assert of(r"\boxed{A}", "a") == 1.0  # an article alone is a word
    for wrong in ("Ana", r"\boxed{Ana} or \boxed{Eva}", r"\boxed{Ana Eva}", r"\boxed{An}", r"\boxed{}"):
        assert of(wrong, "Ana") == 0.0
    assert plain_words("“Ça—va”, C++?") == "ça va c"
    for said, gold in (
        (r"\text{Bar} \textbf{Harbor}", "Bar Harbor"), (r"\mathrm{ H_2O }", "h 2o"), ("\u22125 °C", "-5 °c"),
        ("$-5", "-$5"), ("1990-95", "1990\u201395"), ("20 m²", "20 m2"), ("2½", "2 1/2"), ("10²", "10^2"),
        ("a - 5", "a 5"), ("1990-95", "1990 95"), ("- 5", "-5"), ("1990 \u20131995", "1990\u20131995"),
    ):  # fmt: skip
        assert of(rf"\boxed{{{said}}}", gold) == of(rf"\boxed{{{gold}}}", said) == 1.0, said
    for said, gold in (
        ("5", "-5"), ("5 °C", "\u22125 °C"), ("10²", "102"), ("2½", "21/2"), ("text", r"\text{a b}"), ("- 5", "5"),
        ("- $5", "$5"), (r"-\frac{1}{2}", r"\frac{1}{2}"), ("at -5", "at 5"),
    ):  # fmt: skip
        assert of(rf"\boxed{{{said}}}", gold) == of(rf"\boxed{{{gold}}}", said) == 0.0, said
    for bad in ([], "", "?!", 7, ["ok", ""], None):
        with pytest.raises(TaskError, match="is no text, nor a list of them"):
            of(r"\boxed{x}", bad)


EVENTS = {
    "e1": {"title": "budget", "day": "Monday", "hour": 9, "guests": []},
    "e2": {"title": "sales", "day": "Monday", "hour": 10, "guests": ["Ana"]},
}


def errands(*calls: tuple[str, dict[str, Any]]) -> Task:
    contacts = {"Ana": "1-1", "Ben": "2-2"}
    return task_of({"errands": ["…"], "events": EVENTS, "contacts": contacts, "calls": [list(c) for c in calls]})


MOVE = ("move_event", {"id": "e1", "day": "Friday", "hour": 9})
SEND = ("send_message", {"number": "2-2", "text": "I am late."})


def done(task: Task, *calls: tuple[str, dict[str, Any]]) -> tuple[float, dict[str, float]]:
    texts = [call_text(name, **arguments) for name, arguments in calls]
    rewards, _, info = played(assistant.Assistant(sandbox=None), task, [*texts, "It is done."])
    return sum(rewards), {k: info["components"][k] for k in ("changes", "others")}


def test_errands_are_graded_by_what_they_leave_whatever_the_way() -> None:
    task = errands(MOVE, SEND)
    assert done(task, MOVE, SEND) == (1.0, {"changes": 1.0, "others": 0.0})
    assert done(task, SEND, ("move_event", MOVE[1] | {"day": "Tuesday"}), MOVE)[0] == 1.0
    # the moved event is one change away and one there: two of three changes with the message missing
    assert done(task, MOVE) == (0.0, {"changes": pytest.approx(2 / 3), "others": 0.0})
    assert done(task) == (0.0, {"changes": 0.0, "others": 0.0})
    assert done(task, MOVE, SEND, SEND) == (0.0, {"changes": 1.0, "others": 1.0})  # twice is not once
    assert done(task, MOVE, SEND, ("cancel_event", {"id": "e2"}))[1]["others"] == 1.0
    again = ("create_event", {"title": "Budget", "day": "Friday", "hour": 9, "guests": []})
    assert done(task, ("cancel_event", {"id": "e1"}), again, SEND)[0] == 1.0  # another id, the same calendar
    rewards, _, info = played(
        assistant.Assistant(sandbox=None, max_turns=2),
        task,
        [call_text(MOVE[0], **MOVE[1]), call_text(SEND[0], **SEND[1])],
    )
    assert (sum(rewards), info["components"]["changes"]) == (0.0, 1.0)  # it never said that it is done


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (("move_event", {"id": "e9", "day": "Monday", "hour": 9}), "no event with the id 'e9'"),
        (("move_event", {"id": "e1", "day": "Monday", "hour": 10}), "Monday 10 is taken by sales"),
        (("move_event", {"id": "e1", "day": "Monday", "hour": 8}), "greater than or equal to 9"),
        (("invite", {"id": "e1", "name": "Zoe"}), "no contact 'Zoe'"),
        (("create_event", {"title": "SALES", "day": "Friday", "hour": 9, "guests": []}), "already"),
        (("create_event", {"title": "x", "day": "Friday", "hour": 9, "guests": ["Zoe"]}), "no contact 'Zoe'"),
        (("send_message", {"number": "3", "text": "x"}), "no contact has the number '3'"),
        (("find_event", {"title": "party"}), "no event 'party'"),
        (("find_contact", {"name": "Zoe"}), "no contact 'Zoe'"),
    ],
)
def test_calls_that_cannot_be_done_change_nothing(call: tuple[str, dict[str, Any]], why: str) -> None:
    env = assistant.Assistant(sandbox=None)
    env.reset(seed=0, options={"task": errands(MOVE)})
    before = json.dumps([env.state.events, env.state.sent])
    observation, *_ = env.step(call_text(call[0], **call[1]))
    assert why in observation[-1].text
    assert json.dumps([env.state.events, env.state.sent]) == before
    env.close()


WISHES = {"food": "thai", "area": "north", "day": "Monday", "people": "4"}


def table(**more: Any) -> Task:
    restaurants = [
        {"name": "Alba", "food": "thai", "area": "north", "garden": "yes"},
        {"name": "Iris", "food": "thai", "area": "south", "garden": "yes"},
    ]
    wanted = {"restaurant": "Alba", "day": "Monday", "people": 4}
    return task_of({"wishes": WISHES, "opening": ["food"], "restaurants": restaurants, "booking": wanted} | more)


def test_the_scripted_user_answers_what_was_asked_and_no_more_than_two_things() -> None:
    env = booking.Booking(sandbox=None)
    observation, _ = env.reset(seed=0, options={"task": table()})
    assert observation[-1].text == "I want to book a table. I would like thai food."
    for question, answer in (
        ("Where, and WHEN?", "In the north, please. On Monday."),
        ("Which area, day and how many people?", "In the north, please. On Monday."),
        ("For how many?", "We are 4."),
        ("By the window?", "I do not understand. What do you need to know?"),
        ("Outside?", "The garden does not matter."),
        ("How many seats?", "We are 4."),  # which is not about eating
        ("Which weekday?", "On Monday."),
        ("Shall I update it?", "I do not understand. What do you need to know?"),
        ("Thailand?", "I do not understand. What do you need to know?"),
    ):
        observation, *_ = env.step(call_text("ask_user", question=question))
        assert observation[-1].text == answer
    assert env.state.questions == 9
    env.close()


@pytest.mark.parametrize(
    ("booked", "reward", "fields"),
    [
        ({"restaurant": "Alba", "day": "Monday", "people": 4}, 1.0, 1.0),
        ({"restaurant": "Iris", "day": "Monday", "people": 4}, 0.0, 2 / 3),
        ({"restaurant": "Alba", "day": "Friday", "people": 3}, 0.0, 1 / 3),
    ],
)
def test_the_right_table_is_paid(booked: dict[str, Any], reward: float, fields: float) -> None:
    rewards, _, info = played(booking.Booking(sandbox=None), table(), [call_text("book", **booked)])
    assert (rewards, info["components"]["fields"]) == ([reward], pytest.approx(fields))
    rewards, _, info = played(
        booking.Booking(sandbox=None), table(), [call_text("book", restaurant="X", day="Monday", people=4), "bye"]
    )
    assert (sum(rewards), info["components"]["fields"]) == (0.0, 0.0)


class Guest:
    """A model that plays the user."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def chat(self, messages: Any, tools: Any, sampling: Any) -> AssistantMessage:
        self.asked.append([m.text for m in messages])
        return AssistantMessage((Text(f"answer {len(self.asked)}"),))


def test_a_model_plays_the_user_with_the_same_wishes() -> None:
    guest = Guest()
    env = booking.Booking(sandbox=None, user="model", models={"user": guest})
    env.reset(seed=0, options={"task": table()})
    for number in (1, 2):
        observation, *_ = env.step(call_text("ask_user", question=f"question {number}"))
        assert observation[-1].text == f"answer {number}"
    env.close()
    assert "food: thai; area: north; day: Monday; people: 4" in guest.asked[1][0]
    assert guest.asked[1][1:] == [
        "I want to book a table. I would like thai food.", "question 1", "answer 1", "question 2",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="user 'model' needs a model of that name"):
        booking.Booking(sandbox=None, user="model")
    with pytest.raises(ConfigError, match="user 'nobody'"):
        booking.Booking(sandbox=None, user="nobody")  # type: ignore[arg-type]


def test_one_restaurant_has_what_the_user_wants() -> None:
    for level in (0.0, 0.5, 1.0):
        for task in booking.Booking.tasks("test", difficulty=level)[:200]:
            p = task.payload
            wanted = {k: v for k, v in p["wishes"].items() if k in ("food", "area", "garden")}
            fitting = [r["name"] for r in p["restaurants"] if all(r[k] == v for k, v in wanted.items())]
            assert fitting == [p["booking"]["restaurant"]]
            assert len(p["wishes"]) - len(p["opening"]) == {0.0: 1, 0.5: 2, 1.0: 5}[level]
