"""``areal/Warehouse-v0``: bring a web service over a database to a wanted state, graded by that state.

    sandbox (the model's programs) ── HTTP ──▶ the service's container ── SQLite
    environment ── signed requests, by a program in the sandbox ──▶ the same service: the first state, the last one

The service (``warehouse_inside.py``) runs beside the sandbox, so only a backend with services can play it: docker. What
the model left in its sandbox cannot say what the state is: the service signs it with a key that the sandbox never has.
"""

from __future__ import annotations

import copy
import hmac
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final
from urllib.parse import quote

from areal_agents.env import Expert
from areal_agents.envs import warehouse_inside
from areal_agents.envs.procedural import drawn_tasks
from areal_agents.errors import SandboxError
from areal_agents.reward import Episode, Verdict
from areal_agents.sandbox import Sandbox, SandboxSpec, Service
from areal_agents.sandboxes.docker_image import IMAGE
from areal_agents.tool import call_text
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.bash import bash
from areal_agents.tools.python import python
from areal_agents.types import Info, Observation, Task

DEFAULT_DIFFICULTY = 0.5
SIZES: Final = {"train": 2048, "test": 256}
PORT: Final = 8000
URL: Final = f"http://warehouse:{PORT}"
KEY: Final = secrets.token_hex(32)
"""Of this process, whose environments ask and whose services answer."""
_ASK_SECONDS: Final = 30.0
_CUSTOMERS: Final = ("Abel", "Berg", "Cole", "Dorn", "Engel", "Frey")
_SHELVES: Final = ("A1", "A2", "B1", "B2", "C1", "C2")
_MATERIALS: Final = ("oak", "pine", "steel", "glass", "linen", "stone", "cork", "brass")
_THINGS: Final = ("chair", "lamp", "bowl", "shelf", "frame", "tray", "clock", "box", "stool", "mirror")
_SIGNED: Final = """
import json, sys, urllib.request
asked = json.load(sys.stdin)
request = urllib.request.Request(asked["url"], asked["body"].encode(), asked["headers"])
with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
    print(json.dumps([answer.read(1 << 20).decode(), answer.headers["X-Sign"]]))
"""
"""Passes one of the environment's own requests on. It can neither read nor make a signature."""
HELPERS: Final = f"""import json, urllib.error, urllib.request
def ask(method, path, **body):
    request = urllib.request.Request("{URL}" + path, json.dumps(body).encode(), method=method)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
def every(kind, query=""):
    found, page, pages = [], 1, 1
    while page <= pages:
        got = ask("GET", f"/{{kind}}?page={{page}}{{query}}")
        found, page, pages = found + got[kind], page + 1, got["pages"]
    return found
"""
"""What the expert's programs begin with."""


class State:
    """Items and orders, as the requests of a task change them: the rules of the service once more."""

    def __init__(self, items: dict[str, dict[str, Any]], orders: dict[int, dict[str, Any]]) -> None:
        self.items, self.orders = items, orders

    def open(self) -> list[dict[str, Any]]:
        return [order for _, order in sorted(self.orders.items()) if order["status"] == "open"]

    def ship(self, order: dict[str, Any]) -> None:
        """Ship an order, where the stock suffices."""
        item = self.items[order["item"]]
        if item["stock"] >= order["count"]:
            item["stock"] -= order["count"]
            order["status"] = "shipped"

    def rows(self) -> dict[str, list[list[Any]]]:
        """Return it as the service says it."""
        items = [[name, *(item[key] for key in ("price", "shelf", "stock"))] for name, item in self.items.items()]
        keys = ("customer", "item", "count", "status")
        return {"items": items, "orders": [[n, *(order[key] for key in keys)] for n, order in self.orders.items()]}


Step = tuple[str, str]
"""What is asked, and the end of the program that does it."""
Kind = Callable[[Random, State], Step]


def _patched(query: str, change: str, condition: str = "") -> str:
    suffix = f" if {condition}" if condition else ""
    return (
        f'for i in [i for i in every("items", "{query}"){suffix}]:\n'
        f'    ask("PATCH", f"/items/{{i[\'id\']}}", version=i["version"], {change})'
    )


def _priced(rng: Random, state: State) -> Step:
    name, price = rng.choice([*state.items]), rng.randint(100, 9999)
    state.items[name]["price"] = price
    return f"Set the price of the {name} to {price} cents.", _patched(f"&name={quote(name)}", f"price={price}")


def _moved(rng: Random, state: State) -> Step:
    name, shelf = rng.choice([*state.items]), rng.choice(_SHELVES)
    state.items[name]["shelf"] = shelf
    return f"Move the {name} to shelf {shelf}.", _patched(f"&name={quote(name)}", f'shelf="{shelf}"')


def _cancelled(rng: Random, state: State) -> Step:
    number = rng.choice([*state.orders])
    if state.orders[number]["status"] == "open":
        state.orders[number]["status"] = "cancelled"
    return f"Cancel order {number}.", f'ask("POST", "/orders/{number}/cancel")'


def _added(rng: Random, state: State) -> Step:
    name = rng.choice([n for n in (f"{m} {t}" for m in _MATERIALS for t in _THINGS) if n not in state.items])
    item = {"price": rng.randint(100, 9999), "shelf": rng.choice(_SHELVES), "stock": rng.randint(1, 40)}
    state.items[name] = item
    text = (
        f"Add a new item: the {name}, {item['price']} cents, on shelf {item['shelf']}, with a stock of {item['stock']}."
    )
    values = ", ".join(f"{key}={value!r}" for key, value in {"name": name, **item}.items())
    return text, f'ask("POST", "/items", {values})'


def _cleared(rng: Random, state: State) -> Step:
    old, new = rng.sample(_SHELVES, 2)
    for item in state.items.values():
        item["shelf"] = new if item["shelf"] == old else item["shelf"]
    return f"Move everything on shelf {old} to shelf {new}.", _patched(f"&shelf={old}", f'shelf="{new}"')


def _dearer(rng: Random, state: State) -> Step:
    shelf, more = rng.choice(_SHELVES), rng.randint(5, 95)
    for item in state.items.values():
        item["price"] += more if item["shelf"] == shelf else 0
    text = f"Raise the price of each item on shelf {shelf} by {more} cents."
    return text, _patched(f"&shelf={shelf}", f'price=i["price"] + {more}')


def _restocked(rng: Random, state: State) -> Step:
    least, more = rng.randint(3, 8), rng.randint(10, 50)
    for item in state.items.values():
        item["stock"] += more if item["stock"] < least else 0
    text = f"Add {more} to the stock of each item of which there are fewer than {least}."
    return text, _patched("", f'stock=i["stock"] + {more}', f'i["stock"] < {least}')


def _removed(rng: Random, state: State) -> Step:
    wanted = {order["item"] for order in state.open()}
    for name in [name for name, item in state.items.items() if item["stock"] == 0 and name not in wanted]:
        del state.items[name]
    program = (
        'wanted = {o["item"] for o in every("orders", "&status=open")}\n'
        'for i in every("items"):\n'
        '    if i["stock"] == 0 and i["name"] not in wanted:\n'
        '        ask("DELETE", f"/items/{i[\'id\']}")'
    )
    return "Delete each item with a stock of 0 that no open order asks for.", program


def _too_many(rng: Random, state: State) -> Step:
    for order in state.open():
        if order["count"] > state.items[order["item"]]["stock"]:
            order["status"] = "cancelled"
    program = (
        'stock = {i["name"]: i["stock"] for i in every("items")}\n'
        'for o in every("orders", "&status=open"):\n'
        '    if o["count"] > stock[o["item"]]:\n'
        '        ask("POST", f"/orders/{o[\'number\']}/cancel")'
    )
    return "Cancel each open order that asks for more than there is of its item.", program


def _shipped(rng: Random, state: State) -> Step:
    customer = rng.choice(_CUSTOMERS)
    for order in state.open():
        if order["customer"] == customer:
            state.ship(order)
    text = f"Ship the open orders of {customer}, the lowest number first, each where the stock still suffices."
    program = (
        f'for o in every("orders", "&status=open&customer={customer}"):\n'
        "    try:\n"
        '        ask("POST", f"/orders/{o[\'number\']}/ship")\n'
        "    except urllib.error.HTTPError as refused:\n"
        '        print(o["number"], refused.read().decode())'
    )
    return text, program


LEVELS: Final[tuple[tuple[Kind, ...], ...]] = (
    (_priced, _moved, _cancelled, _added),
    (_added, _cleared, _dearer, _restocked, _removed),
    (_cleared, _dearer, _restocked, _removed, _too_many, _shipped),
)


def left(episode: Episode) -> Verdict:
    """Pay 1 for exactly the wanted state, where the agent said that it is done."""
    payload, found = episode.task.payload, episode.outcome
    before, wanted, there = (_facts(rows) for rows in (payload["before"], payload["after"], found))
    asked = wanted ^ before
    done = 0.0 if found["problem"] else len(asked & (there ^ before)) / len(asked)
    right = float(there == wanted and not found["problem"] and episode.answer is not None)
    others = 0.0 if found["problem"] else float(len((there ^ before) - asked))
    return Verdict(right, {"correct": right, "changes": done, "others": others})


class Warehouse(ToolEnv):
    """Bring a warehouse's web service to a wanted state: prices, shelves, stocks, orders.

    An agent must learn to read how an interface is used, to go through all pages, to do a change with the version that
    it read, and to take a refusal for an answer. The reward is 1 where the service's database holds in the end exactly
    what it should, whatever the way. The share of the changes that are there is a component. ``difficulty``: one
    request at 0, two at 0.5 (the default), four at 1, which has stocks that do not suffice. It needs docker.
    """

    system_prompt = (
        f"A warehouse has a web service at {URL}, which python and the shell reach (there is no curl). GET / says how "
        "it is used. Do what is asked and nothing else: the state of the service counts. When all is done, say so."
    )
    tools = (python, bash)
    rubric = left
    max_turns = 16
    sandbox_spec = SandboxSpec(
        services=(
            Service(
                name="warehouse",
                image=IMAGE,
                command=(
                    "python3", "-I", "-S", "-u", "-c", Path(warehouse_inside.__file__).read_text(), "0.0.0.0",
                    str(PORT),
                ),
                environment={"KEY": KEY},
                port=PORT,
                user="sandbox",
                memory=128 << 20,
                disk=8 << 20,
            ),
        )
    )  # fmt: skip

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Warehouse-v0", split, level, lambda rng: _drawn(rng, level), SIZES)

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self._doubted = False
        return await super().areset(seed=seed, options=options)

    async def prepare(self, sandbox: Sandbox) -> None:
        problem = (await asked(sandbox, "load", self.task.payload["before"]))["problem"]
        if problem:  # nothing of the model's has run yet
            raise SandboxError(f"the warehouse did not take its first state: {problem}")

    async def inspect(self, sandbox: Sandbox) -> Any:
        found = await asked(sandbox, "state")
        if found["problem"] and not self._doubted:
            # Whose failure is it? The episode's calls run again beside a fresh service: the model's happens again.
            self._doubted = True
            raise SandboxError(f"the warehouse did not say its state: {found['problem']}")
        return {"items": [], "orders": [], **found}

    def prompt(self, task: Task) -> str:
        requests = task.payload["requests"]
        if len(requests) == 1:
            return str(requests[0])
        return "\n".join(["Do this, in this order:", *(f"{i}. {text}" for i, text in enumerate(requests, 1))])

    @classmethod
    def expert(cls, task: Task) -> Expert:
        read = f'import urllib.request; print(urllib.request.urlopen("{URL}").read().decode())'
        yield call_text("bash", command=f"python3 -c '{read}'")
        for program in task.payload["programs"]:
            yield call_text("python", code=HELPERS + program)
        yield "All is done."


async def asked(sandbox: Sandbox, kind: str, body: object = "") -> dict[str, Any]:
    """Ask the service in the environment's name, and return what it says beside ``problem``, which is empty then.

    Nothing that a model left makes it raise, and no answer without the service's signature is believed. Raises
    SandboxError when the sandbox itself failed.
    """
    nonce, text = secrets.token_hex(16), json.dumps(body)
    headers = {"X-Nonce": nonce, "X-Sign": warehouse_inside.sign(KEY.encode(), kind, nonce, text)}
    request = json.dumps({"url": f"{URL}/{kind}", "body": text, "headers": headers})
    argv = ("python3", "-I", "-S", "-c", _SIGNED)
    done = await sandbox.exec(argv, stdin=request.encode(), timeout=_ASK_SECONDS, max_output=2 << 20)
    try:
        said, signature = json.loads(done.stdout)
        right = warehouse_inside.sign(KEY.encode(), "answer", nonce, said)
        if not hmac.compare_digest(str(signature).encode(), right.encode()):
            return {"problem": "the answer is not the service's"}
        return {**json.loads(said), "problem": ""}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {"problem": f"it was not answered ({done.status})"}


def _facts(rows: Mapping[str, Sequence[Sequence[Any]]]) -> set[tuple[Any, ...]]:
    return {(kind, *row) for kind in ("items", "orders") for row in rows[kind]}


def _drawn(rng: Random, level: float) -> dict[str, Any]:
    """Draw a warehouse and requests, each of which changes something, and work out by hand what they leave."""
    first = _warehouse(rng)
    while True:
        state, requests, programs = copy.deepcopy(first), list[str](), list[str]()
        for kind in rng.sample(LEVELS[min(2, int(3 * level))], round(4**level)):
            before = state.rows()
            for _ in range(20):
                text, program = kind(rng, state)
                if state.rows() != before:
                    requests.append(text)
                    programs.append(program)
                    break
        if len(requests) == round(4**level) and _facts(first.rows()) != _facts(state.rows()):
            return {"requests": requests, "before": first.rows(), "after": state.rows(), "programs": programs}


def _warehouse(rng: Random) -> State:
    names = rng.sample([f"{material} {thing}" for material in _MATERIALS for thing in _THINGS], rng.randint(12, 17))
    items = {
        name: {
            "price": rng.randint(100, 9999), "shelf": rng.choice(_SHELVES),
            "stock": 0 if i < 3 else rng.randint(1, 40),
        }
        for i, name in enumerate(names)
    }  # fmt: skip
    rng.shuffle(names)
    orders = {}
    for number in sorted(rng.sample(range(100, 1000), rng.randint(11, 16))):
        status = rng.choices(("open", "shipped", "cancelled"), weights=(4, 1, 1))[0]
        order = {"customer": rng.choice(_CUSTOMERS), "item": rng.choice(names[:6]), "count": rng.randint(1, 30)}
        orders[number] = {**order, "status": status}
    return State({name: items[name] for name in names}, orders)
