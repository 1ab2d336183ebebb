"""``areal/ShopDatabase-v0``: questions on the database of a shop, answered by SQL queries."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any, Final

from areal_agents.env import Expert
from areal_agents.envs.generated_files import generated_folder
from areal_agents.envs.procedural import drawn_tasks
from areal_agents.reward import boxed_number
from areal_agents.tool import call_text
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.sql import sql_tool
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
SIZES: Final = {"train": 2048, "test": 512}
DATABASES: Final = {"train": 16, "test": 16}
SCHEMA: Final = (
    "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT)",
    "CREATE TABLE products (id INTEGER PRIMARY KEY, name TEXT, category TEXT, cents INTEGER)",
    "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER, month INTEGER)",
    "CREATE TABLE items (order_id INTEGER, product_id INTEGER, count INTEGER)",
)
_FIRST = ("Ada", "Bo", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida", "Jo", "Kit", "Lea", "Max", "Nel", "Ole", "Pia")
_LAST = ("Abel", "Berg", "Cole", "Dorn", "Engel", "Frey", "Gray", "Holm")
_CITIES = ("Bergen", "Cork", "Dover", "Essen", "Faro", "Gent", "Halle", "Izmir")
_PRODUCTS = {
    "kitchen": ("kettle", "pan", "knife", "bowl", "grater", "whisk"),
    "garden": ("spade", "hose", "rake", "pot", "shears", "trowel"),
    "office": ("stapler", "lamp", "ruler", "folder", "chair", "clock"),
    "sports": ("racket", "ball", "helmet", "rope", "bottle", "net"),
}
_CENTS = "sum(i.count * p.cents)"
_ITEMS = "FROM items i JOIN orders o ON o.id = i.order_id JOIN products p ON p.id = i.product_id"
_BOUGHT = f"{_ITEMS} JOIN customers c ON c.id = o.customer_id"
Question = tuple[str, str]
"""The question, and a query whose one number answers it."""


def _price(rng: Random) -> Question:
    name = rng.choice([p for some in _PRODUCTS.values() for p in some])
    return f"How many cents does the {name} cost?", f"SELECT cents FROM products WHERE name = '{name}'"


def _category(rng: Random) -> Question:
    name = rng.choice([*_PRODUCTS])
    return (
        f"What do all {name} products cost together, one of each, in cents?",
        f"SELECT sum(cents) FROM products WHERE category = '{name}'",
    )


def _dearest(rng: Random) -> Question:
    name = rng.choice([*_PRODUCTS])
    return (
        f"How many cents does the most expensive {name} product cost?",
        f"SELECT max(cents) FROM products WHERE category = '{name}'",
    )


def _spent(rng: Random) -> Question:
    name = _name(rng)
    return f"How many cents did {name} spend in all?", f"SELECT {_CENTS} {_BOUGHT} WHERE c.name = '{name}'"


def _month(rng: Random) -> Question:
    month = rng.randint(1, 12)
    return f"How many cents were spent in month {month}?", f"SELECT {_CENTS} {_ITEMS} WHERE o.month = {month}"


def _city(rng: Random) -> Question:
    city = rng.choice(_CITIES)
    return (
        f"How many cents did customers from {city} spend in all?",
        f"SELECT {_CENTS} {_BOUGHT} WHERE c.city = '{city}'",
    )


def _city_category(rng: Random) -> Question:
    city, category, month = rng.choice(_CITIES), rng.choice([*_PRODUCTS]), rng.randint(2, 11)
    return (
        f"How many cents did customers from {city} spend on {category} products up to month {month}?",
        f"SELECT {_CENTS} {_BOUGHT} WHERE c.city = '{city}' AND p.category = '{category}' AND o.month <= {month}",
    )


def _best(rng: Random) -> Question:
    city = rng.choice(_CITIES)
    return (
        f"How many cents did the customer from {city} spend who spent the most?",
        f"SELECT max(t) FROM (SELECT c.id, {_CENTS} AS t {_BOUGHT} WHERE c.city = '{city}' GROUP BY c.id)",
    )


def _difference(rng: Random) -> Question:
    a, b = rng.sample(_CITIES, 2)
    sums = [f"(SELECT {_CENTS} {_BOUGHT} WHERE c.city = '{city}')" for city in (a, b)]
    question = f"By how many cents do the purchases of all customers from {a} and of all from {b} differ?"
    return question, f"SELECT abs({' - '.join(sums)})"


LEVELS: Final[tuple[tuple[Callable[[Random], Question], ...], ...]] = (
    (_price, _category, _dearest),
    (_spent, _month, _city),
    (_city_category, _best, _difference),
)


def _name(rng: Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


def databases() -> Path:
    """Return the folder of the databases, ``train-0.sqlite`` and so on."""
    return generated_folder("shop-2", _write)


def _write(folder: Path) -> None:
    for split, count in DATABASES.items():
        for number in range(count):
            _write_one(folder / f"{split}-{number}.sqlite", Random(f"{split} {number}"))


def _write_one(path: Path, rng: Random) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in SCHEMA:
            database.execute(statement)
        people = [(f"{a} {b}", rng.choice(_CITIES)) for a in _FIRST for b in _LAST]
        rng.shuffle(people)
        products = [(name, category, rng.randint(100, 20_000)) for category, some in _PRODUCTS.items() for name in some]
        rng.shuffle(products)
        database.executemany("INSERT INTO customers (name, city) VALUES (?, ?)", people)
        database.executemany("INSERT INTO products (name, category, cents) VALUES (?, ?, ?)", products)
        for order in range(1, 513):
            customer = order if order <= len(people) else rng.randint(1, len(people))  # everybody buys something
            database.execute("INSERT INTO orders VALUES (?, ?, ?)", (order, customer, rng.randint(1, 12)))
            for product in rng.sample(range(1, len(products) + 1), rng.randint(1, 4)):
                database.execute("INSERT INTO items VALUES (?, ?, ?)", (order, product, rng.randint(1, 9)))


class ShopDatabase(ToolEnv):
    r"""Answer a question on a shop's database with SQL; the answer is a number in ``\boxed{}``.

    An agent must learn to read the schema, to join tables, and to check what a query returned. The databases of the two
    splits are others, with the same tables. ``difficulty``: one table below 1/3, joins below 2/3 (0.5 is the default),
    joins with several conditions, groups or differences above.
    """

    system_prompt = r"Query the database with sql, then answer \boxed{number}. Tables: " + "; ".join(SCHEMA)
    tools = (sql_tool(databases() / "{database}.sqlite"),)
    rubric = boxed_number()
    max_turns = 6

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        asked = LEVELS[min(2, int(3 * level))]
        return drawn_tasks(
            "areal/ShopDatabase-v0", split, level, lambda rng: _task(rng, split, asked), SIZES, apart=True
        )

    def prompt(self, task: Task) -> str:
        return str(task.payload["question"])

    @classmethod
    def gold(cls, task: Task) -> str:
        return rf"\boxed{{{task.payload['answer']}}}"

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield call_text("sql", query=task.payload["query"])
        yield cls.gold(task)


@functools.lru_cache(4096)
def answer_of(database: str, query: str) -> int | None:
    """Ask a database; None where nothing matches."""
    with closing(sqlite3.connect(f"file:{databases() / database}.sqlite?mode=ro", uri=True)) as connection:
        (value,) = connection.execute(query).fetchone()
    return value if value is None else int(value)


def _task(rng: Random, split: str, asked: Sequence[Callable[[Random], Question]]) -> dict[str, Any]:
    while True:
        database = f"{split}-{rng.randrange(DATABASES[split])}"
        question, query = rng.choice(asked)(rng)
        if (answer := answer_of(database, query)) is not None:
            return {"question": question, "query": query, "database": database, "answer": str(answer)}
