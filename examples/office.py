"""An office in one file: a database, a handbook to search, files, and a tool that hands one of them in.

    cd examples
    areal-agents check office:Office
    areal-agents train --env.id office:Office --warm_start.demonstrations 64 --eval.n 32 --steps 20 --out runs/office

Orders are in the database, and discounts are in the handbook, a page a city. A task asks what one customer owes.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path

from areal_agents import Episode, Message, Sandbox, Task, ToolEnv, ToolError, tool
from areal_agents.models import cache_dir
from areal_agents.tools.files import read_file, write_file
from areal_agents.tools.search import search_tools
from areal_agents.tools.sql import sql_tool

DISCOUNTS = {"Bergen": 15, "Cork": 20, "Dover": 5, "Essen": 30, "Faro": 10, "Gent": 25}
"""City → percent."""
NUMBERS = {"train": range(160), "test": range(160, 200)}


def customer(number: int) -> tuple[str, str, list[int]]:
    """Draw a customer: name, city, and the cents of each order."""
    rng = random.Random(number)
    return (
        f"Customer {number}",
        rng.choice([*DISCOUNTS]),
        [rng.randrange(1, 100) * 100 for _ in range(rng.randint(2, 5))],
    )


def office() -> Path:
    """Return the folder of the database and the handbook, which are made once."""
    folder = cache_dir() / "examples" / "office-1"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new = Path(temporary, "new")
            (new / "handbook").mkdir(parents=True)
            for city, percent in DISCOUNTS.items():
                text = f"# {city}\n\nWhoever lives in {city} gets a discount of {percent} percent on all orders."
                (new / "handbook" / f"{city}.md").write_text(text)
            with sqlite3.connect(new / "orders.sqlite") as database:
                database.execute("CREATE TABLE orders (customer TEXT, city TEXT, cents INTEGER)")
                for name, city, orders in map(customer, range(200)):
                    database.executemany("INSERT INTO orders VALUES (?, ?, ?)", [(name, city, c) for c in orders])
            database.close()
            if not folder.exists():
                os.rename(new, folder)
    return folder


@tool
async def hand_in(path: str, *, sandbox: Sandbox, env: Office) -> None:
    """Hand in a file of yours. This ends the task."""
    try:
        env.end_episode((await sandbox.read_file(path, 1000)).decode(errors="replace"))
    except (OSError, ValueError) as error:
        raise ToolError(f"error: {error}") from error


def right(episode: Episode) -> float:
    """Return 1 where the file has the sum in cents, and nothing else."""
    return float(episode.answer is not None and episode.answer.strip() == str(episode.task.payload["owes"]))


class Office(ToolEnv):
    """Work out what a customer owes, write it to a file and hand it in."""

    system_prompt = "Orders are in the database, discounts are in the handbook. Write the number alone to a file."
    tools = (sql_tool(office() / "orders.sqlite"), *search_tools(office() / "handbook"), read_file, write_file, hand_in)
    rubric = right

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        tasks = []
        for number in NUMBERS[split]:
            name, city, orders = customer(number)
            payload = {"customer": name, "city": city, "owes": sum(orders) * (100 - DISCOUNTS[city]) // 100}
            tasks.append(Task.make(f"{split}-{number}", split=split, seed=number, payload=payload))
        return tasks

    def prompt(self, task: Task) -> str:
        return f"How many cents does {task.payload['customer']} owe, after the discount of the city?"

    @classmethod
    def expert(cls, task: Task) -> Generator[str, tuple[Message, ...], None]:
        name, city, owes = (task.payload[key] for key in ("customer", "city", "owes"))
        yield call("sql", query=f"SELECT city, sum(cents) FROM orders WHERE customer = '{name}'")
        yield call("search", query=f"discount {city}")
        yield call("read_document", id=f"{city}.md")
        yield call("write_file", path="owes.txt", content=str(owes))
        yield call("read_file", path="owes.txt")
        yield call("hand_in", path="owes.txt")


def call(name: str, **arguments: str) -> str:
    """Return the text of a tool call."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
