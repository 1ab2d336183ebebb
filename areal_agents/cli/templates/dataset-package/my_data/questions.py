"""The tasks, which are the lines of a file a split.

{"id": "t01", "question": "How many pecks are 7 bushels?", "unit": "bushel", "answer": "28"}
"""

from __future__ import annotations

import importlib.resources
import json
from functools import cache

from areal_agents import Task
from areal_agents.errors import ConfigError

FIELDS = ("id", "question", "unit", "answer")


@cache
def tasks_of(split: str) -> tuple[Task, ...]:
    """Read the tasks of ``split``.

    The whole payload is hashed, so the same question in two splits is noticed. Raises ConfigError, with the line, for
    one that lacks something.
    """
    source = importlib.resources.files("my_data.data") / f"{split}.jsonl"
    found = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            payload = {name: str(row[name]) for name in FIELDS[1:]}
            found.append(Task.make(f"{split}-{row['id']}", split=split, seed=number, payload=payload))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{split}.jsonl, line {number}: {error!r}; it needs {', '.join(FIELDS)}") from error
    return tuple(found)
