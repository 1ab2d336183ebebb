"""The multi-turn tasks of the Berkeley Function Calling Leaderboard: rows, gold calls, splits and what is left out."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from areal_agents.envs.bfcl_apis import APIS, PACKAGE, Function, functions_of
from areal_agents.errors import ConfigError, EnvError
from areal_agents.types import Task

CATEGORIES: Final = ("base", "miss_func", "miss_param", "long_context")
SPLITS: Final = ("train", "validation", "test")
EXCLUDED: Final[Mapping[str, str]] = MappingProxyType({
    "multi_turn_miss_func_49": "its gold calls tail in request 2, and tail is held back until request 4",
})  # fmt: skip
"""Rows that nobody can solve, each with the reason."""
_BUCKETS: Final = 8
Call = tuple[str, dict[str, Any]]


def split_of(number: int) -> str:
    """Return the split of a row. The data has none.

    It goes by the row's number alone: the rows of that number in the four categories are variations of one scenario.
    One bucket of eight is for the test, one for validation.
    """
    digest = hashlib.sha256(f"bfcl multi_turn {number}".encode()).digest()
    return {0: "test", 1: "validation"}.get(digest[0] % _BUCKETS, "train")


@functools.cache
def category_tasks(category: str, split: str, *, all_for_test: bool) -> tuple[Task, ...]:
    """Return the tasks of a category, which ``require_category`` has let pass, that belong to a split.

    Raises ConfigError where there is no such split.
    """
    if split not in SPLITS:
        raise ConfigError(f"areal/Bfcl-v0 has no split {split!r}: its splits are {', '.join(SPLITS)}")
    return tuple(
        Task.make(id, split=split, seed=number, payload=payload)
        for number, (id, payload) in _rows(category).items()
        if ("test" if all_for_test else split_of(number)) == split and id not in EXCLUDED
    )


def require_category(category: str) -> None:
    """Raise ConfigError where there is no such category, and where the package is missing."""
    if category not in CATEGORIES:
        raise ConfigError(
            f"areal/Bfcl-v0 has no category {category!r}: there are {', '.join(CATEGORIES)}, the multi-turn ones"
        )
    _rows(category)


@functools.cache
def _rows(category: str) -> Mapping[int, tuple[str, dict[str, Any]]]:
    """Read a category: id and payload by number."""
    PACKAGE.require("areal/Bfcl-v0")
    golds = {row["id"]: row["ground_truth"] for row in _lines(f"possible_answer/BFCL_v4_multi_turn_{category}.json")}
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for row in _lines(f"BFCL_v4_multi_turn_{category}.json"):
        id = row["id"]
        found[int(id.rpartition("_")[2])] = id, _payload(category, row, golds[id])
    return found


def _payload(category: str, row: Mapping[str, Any], gold: Sequence[Sequence[str]]) -> dict[str, Any]:
    if unknown := set(row["involved_classes"]) - set(APIS):
        raise EnvError(f"{row['id']}: the package has no class {min(unknown)!r} that this adapter knows")
    declared = {f.name: f for api in row["involved_classes"] for f in functions_of(api)}
    requests = ["\n".join(message["content"] for message in turn) for turn in row["question"]]
    if len(requests) != len(gold):
        raise EnvError(f"{row['id']}: {len(requests)} requests and {len(gold)} gold trajectories")
    return {
        "category": category,
        "apis": list(row["involved_classes"]),
        "scenario": row["initial_config"],
        "requests": requests,
        "held_back": {str(turn): list(names) for turn, names in row.get("missed_function", {}).items()},
        "gold": [[list(gold_call(text, declared)) for text in calls] for calls in gold],
    }


def gold_call(text: str, declared: Mapping[str, Function]) -> Call:
    """Read a gold call, which is written as Python: a function of the documents and literals. Nothing is evaluated.

    Raises EnvError for anything else.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            raise ValueError("it is no call of a function")
        names = list(declared[node.func.id].parameters["properties"])
        arguments = {name: ast.literal_eval(value) for name, value in zip(names, node.args, strict=False)}
        for keyword in node.keywords:
            if keyword.arg not in names:
                raise ValueError(f"{keyword.arg!r} is not declared")
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        if len(arguments) != len(node.args) + len(node.keywords):
            raise ValueError("an argument is given twice, or there are too many")
    except (SyntaxError, ValueError, KeyError) as error:
        raise EnvError(f"the gold call {text!r} cannot be read: {error}") from error
    return node.func.id, arguments


def _lines(name: str) -> Iterator[dict[str, Any]]:
    text = (importlib.resources.files("bfcl_eval") / "data" / name).read_text("utf-8")
    return (json.loads(line) for line in text.splitlines() if line.strip())
