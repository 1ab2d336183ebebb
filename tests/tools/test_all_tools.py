"""Every tool of the room in one environment, with whatever a model may write as its arguments."""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import areal_agents.tools
from areal_agents import Task, ToolEnv
from areal_agents.reward import Episode
from areal_agents.tool import ToolSpec, ToolStatus
from areal_agents.tools.ask_user import ask_user
from areal_agents.tools.bash import bash_tool
from areal_agents.tools.calculator import calculator
from areal_agents.tools.fetch import fetch_tool
from areal_agents.tools.files import FILE_TOOLS
from areal_agents.tools.mcp import mcp_tools
from areal_agents.tools.python import python
from areal_agents.tools.python_repl import python_repl_tool
from areal_agents.tools.read_output import read_output
from areal_agents.tools.search import search_tools
from areal_agents.tools.sql import sql_tool
from areal_agents.tools.submit import submit
from areal_agents.tools.think import think
from areal_agents.types import AssistantMessage
from tests.conftest import require
from tests.tools.sessions import call

HELPERS = {
    "console_calls", "files_inside", "mcp_connection", "page_packing", "page_text", "search_index", "sql_inside",
    "tree", "tree_inside",
}  # fmt: skip
"""Modules of the room that offer no tool."""


def made(folder: Path) -> dict[str, Sequence[ToolSpec]]:
    """Make the tools of each module."""
    with sqlite3.connect(folder / "d.sqlite") as connection:
        connection.execute("CREATE TABLE t (a)")
        connection.execute("INSERT INTO t VALUES (7)")
    connection.close()
    (folder / "corpus.jsonl").write_text(json.dumps({"id": "par", "text": "The Seine flows through Paris."}))
    server = [sys.executable, str(Path(__file__).with_name("mcp_drill_server.py"))]
    return {
        "ask_user": [ask_user],
        "bash": [bash_tool(seconds=2.0)],
        "calculator": [calculator],
        "fetch": [fetch_tool(["*.nothing.invalid"])],
        "files": FILE_TOOLS,
        "mcp": mcp_tools(command=server, only=["add", "echo"]),
        "python": [python],
        "python_repl": [python_repl_tool(seconds=2.0, name="repl")],
        "read_output": [read_output],
        "search": search_tools(folder / "corpus.jsonl"),
        "sql": [sql_tool(folder / "d.sqlite"), sql_tool(folder / "d.sqlite", writable=True, name="own_sql")],
        "submit": [submit],
        "think": [think],
    }


def test_each_module_of_the_room_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AREAL_AGENTS_CACHE", str(tmp_path))
    require("module:mcp")
    room = {module.name for module in pkgutil.iter_modules(areal_agents.tools.__path__)}
    assert room == HELPERS | set(made(tmp_path))
    for name in HELPERS:
        module = importlib.import_module(f"areal_agents.tools.{name}")
        assert not [value for value in vars(module).values() if isinstance(value, ToolSpec)], name


def nothing(episode: Episode) -> float:
    return 0.0


class Everything(ToolEnv):
    rubric = nothing
    max_turns = 10_000

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make("t", split=split, seed=0, payload={})]

    def prompt(self, task: Task) -> str:
        return "?"

    async def answer_user(self, question: str) -> str:
        return question


ODD = [
    "", " ", ".", "..", "../../etc/shadow", "/etc/shadow", "~", "a\nb", "a\0b", "\ud800", "\u202e\x1b[2J", "x" * 70_000,
    "-rf", "$(id)", "';--", "%s{0}{x}", "1/0", "9**9**9", "exit", "exit()", "import os; os._exit(1)", "NEAR(", '"', "*",
    "((((", "[a-", "SELECT 1; SELECT 2", "ATTACH 'x' AS y", "PRAGMA database_list", "http://127.0.0.1/",
    "http://x.nothing.invalid/",
    "http://[::ffff:127.0.0.1]/", "kill -9 $$", "def f(:", "raise BaseException", "a" * 300 + "/b",
]  # fmt: skip
NUMBERS = st.sampled_from([0, 1, -1, 2**31, -(2**63), 10**30])
ANY = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "string": st.sampled_from(ODD) | st.text(max_size=30), "integer": NUMBERS, "boolean": st.booleans(),
    "number": NUMBERS | st.floats(), "array": st.lists(ANY, max_size=3),
}  # fmt: skip


def kind_of(schema: dict[str, Any]) -> str:
    """The type of a parameter, also where it may be null."""
    return str(schema.get("type") or next(one["type"] for one in schema["anyOf"] if one["type"] != "null"))


def arguments_of(spec: ToolSpec) -> st.SearchStrategy[dict[str, Any]]:
    """Arguments that a tool takes more often than not, so that they reach it, and others."""
    properties: dict[str, Any] = spec.parameters["properties"]
    required = set(spec.parameters.get("required", ()))
    fitting = {name: FITTING[kind_of(schema)] for name, schema in properties.items()}
    return st.one_of(
        st.fixed_dictionaries(
            {name: value for name, value in fitting.items() if name in required},
            optional={name: value for name, value in fitting.items() if name not in required},
        ),
        st.fixed_dictionaries(fitting),
        st.dictionaries(st.sampled_from([*properties, "self", "env", ""]), ANY | st.sampled_from(ODD), max_size=4),
    )


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ToolSpec, ...]]:
    require("bwrap")
    require("module:mcp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AREAL_AGENTS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tuple(spec for specs in made(tmp_path_factory.mktemp("all")).values() for spec in specs)


RIGHT: dict[str, tuple[dict[str, Any], str]] = {
    "ask_user": ({"question": "who"}, "who"), "bash": ({"command": "echo $((40+2))"}, "42"),
    "calculator": ({"expression": "6*7"}, "42"), "fetch": ({"url": "http://example.org/"}, "is not allowed"),
    "write_file": ({"path": "new.txt", "content": "one\n"}, "new.txt"), "read_file": ({"path": "new.txt"}, "1\tone"),
    "edit_file": ({"path": "new.txt", "old": "one", "new": "two"}, "new.txt"), "list_files": ({}, "new.txt"),
    "search_files": ({"text": "two"}, "new.txt"), "add": ({"a": 40, "b": 2}, "42"), "echo": ({"text": "said"}, "said"),
    "python": ({"code": "print(6*7)"}, "42"), "repl": ({"code": "6*7"}, "42"),
    "read_output": ({"output": 10**6}, "error: "), "search": ({"query": "seine"}, "[par]"),
    "read_document": ({"id": "par"}, "Paris"), "sql": ({"query": "SELECT a FROM t"}, "7"),
    "own_sql": ({"query": "SELECT 1 AS one"}, "one"), "think": ({"thought": "so"}, ""),
    "submit": ({"answer": "42"}, ""),
}  # fmt: skip
"""A right call of each tool, and what is in its answer."""


def test_any_arguments_of_any_tool_are_answered(tools: tuple[ToolSpec, ...]) -> None:
    """In one episode until it is submitted. Afterwards each tool still does what it is for."""

    env: Everything = type("Env", (Everything,), {"tools": tools})()
    task = Everything.tasks("test")[0]
    seen: dict[str, set[str]] = {spec.name: set() for spec in tools}

    async def turn(calls: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
        if not env._running:
            await env.areset(options={"task": task})
        message = AssistantMessage((), tool_calls=tuple(call(name, **arguments) for name, arguments in calls))
        observation, _, terminated, _, info = await env.astep(message)
        assert terminated == ("answer" in info.get("stop_reason", ""))
        texts = [text.text for text in observation[: len(calls)]]
        return list(zip([found["status"] for found in info["tool_results"]], texts, strict=True))

    order = [spec for spec in tools if spec.name != "submit"]

    with asyncio.Runner() as runner:
        try:

            @settings(
                max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True,
                phases=[Phase.explicit, Phase.generate],  # smaller ones would take minutes to find
            )  # fmt: skip
            @given(st.tuples(*map(arguments_of, order)), arguments_of(submit))
            def any_arguments(arguments: tuple[dict[str, Any], ...], last: dict[str, Any]) -> None:
                answers = runner.run(turn([(s.name, given) for s, given in zip(order, arguments, strict=True)]))
                for spec, (status, text) in zip(order, answers, strict=True):
                    seen[spec.name].add(status)
                    assert status in get_args(ToolStatus)
                    assert len(text) <= spec.max_output_chars + 200
                    assert status in ("ok", "error") or text.startswith("error: ") or "error" in text, (spec.name, text)
                ((status, _),) = runner.run(turn([("submit", last)]))
                seen["submit"].add(status)

            any_arguments()
            for name, (right, within) in RIGHT.items():
                ((_, text),) = runner.run(turn([(name, right)]))
                assert within in text, (name, text)
            assert set(RIGHT) == set(seen)
        finally:
            runner.run(env.aclose())
    assert all(statuses - {"invalid_arguments"} for statuses in seen.values()), seen  # all were reached
    assert sum("invalid_arguments" in statuses for statuses in seen.values()) > len(seen) / 2, seen
