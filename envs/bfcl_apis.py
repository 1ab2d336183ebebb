"""The executable interfaces of the Berkeley Function Calling Leaderboard, called by declared schemas alone.

The classes come from the ``bfcl-eval`` package that the user has installed. They are trusted, and what a model calls
them with is not. So a call names a function that a task's documents declare, its arguments arrive as JSON values, and
nothing is ever written as Python. Those that could take for ever are bounded.

Checked against bfcl-eval 2026.3.23 (Apache-2.0), ``eval_checker/multi_turn_eval``: which classes there are, how a
result is written, and what of two states is compared. Nothing is copied.
"""

from __future__ import annotations

import copy
import decimal
import functools
import importlib
import importlib.resources
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from areal_agents.envs.task_packages import TaskPackage
from areal_agents.tool import ToolError

PACKAGE: Final = TaskPackage("bfcl-eval", "2026.3.23", "bfcl_eval")
_SOURCE: Final = "bfcl_eval.eval_checker.multi_turn_eval.func_source_code"
APIS: Final[Mapping[str, tuple[str, str]]] = {
    "GorillaFileSystem": ("gorilla_file_system", "gorilla_file_system"),
    "MathAPI": ("math_api", "math_api"),
    "MessageAPI": ("message_api", "message_api"),
    "TwitterAPI": ("posting_api", "posting_api"),
    "TicketAPI": ("ticket_api", "ticket_api"),
    "TradingBot": ("trading_bot", "trading_bot"),
    "TravelAPI": ("travel_booking", "travel_booking"),
    "VehicleControlAPI": ("vehicle_control", "vehicle_control"),
}
"""Class → its module, and the file of its documents."""
MOST_NODES: Final = 20_000
"""Files and folders of a file system, each counted as often as a walk meets it."""
MOST_DIGITS: Final = 1000
"""Digits of precision, or decimal places, of the mathematical functions."""
MOST_BITS: Final = 4096
"""Bits of a power of whole numbers."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function as its document declares it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """A JSON schema."""
    api: str
    """The class whose method it is."""


class TooLarge(ToolError):
    """A file system has become too large to walk through, so nothing may be done with it any more."""


@functools.cache
def functions_of(api: str) -> tuple[Function, ...]:
    """Return the functions that a class's documents declare, in their order. What they do not declare is no function.

    Raises ConfigError where the package is missing.
    """
    PACKAGE.require("areal/Bfcl-v0")
    documents = importlib.resources.files("bfcl_eval") / "data" / "multi_turn_func_doc" / f"{APIS[api][1]}.json"
    rows = [json.loads(line) for line in documents.read_text("utf-8").splitlines() if line.strip()]
    return tuple(Function(row["name"], row["description"], schema_of(row["parameters"]), api) for row in rows)


def schema_of(declared: Mapping[str, Any]) -> dict[str, Any]:
    """Return a declaration as JSON Schema: ``dict`` and ``float`` are no types there, and "None" is no default."""
    types = {"dict": "object", "float": "number"}
    schema: dict[str, Any] = {}
    for key, value in declared.items():
        if key == "type":
            schema[key] = types.get(value, value)
        elif key == "properties":
            schema[key] = {name: schema_of(inner) for name, inner in value.items()}
        elif key == "items":
            schema[key] = schema_of(value)
        elif key != "default" or value != "None":
            schema[key] = value
    return schema


def opened(apis: Sequence[str], scenario: Mapping[str, Any], *, long_context: bool) -> dict[str, Any]:
    """Make new instances of the classes in the state of a scenario. They share nothing with it, nor with others."""
    made: dict[str, Any] = {}
    for api in apis:
        made[api] = getattr(importlib.import_module(f"{_SOURCE}.{APIS[api][0]}"), api)()
        if hasattr(made[api], "_load_scenario"):  # the mathematical functions have no state
            made[api]._load_scenario(copy.deepcopy(scenario.get(api, {})), long_context=long_context)
            # Once more: cards and bookings of long_context are the package's own objects, which calls would change.
            made[api] = copy.deepcopy(made[api])
    return made


def called(instances: Mapping[str, Any], function: Function, arguments: Mapping[str, Any]) -> str:
    """Call a function and write its result as the leaderboard writes it, an exception too.

    Raises ToolError where the call would take for ever, and TooLarge where the next one would.
    """
    if function.api == "MathAPI":
        _require_bounded(function.name, arguments)
        with _own_precision():
            return _run(instances, function, arguments)
    text = _run(instances, function, arguments)
    if function.api == "GorillaFileSystem" and too_large(instances[function.api]):
        raise TooLarge("error: the file system has become too large")
    return text


def _run(instances: Mapping[str, Any], function: Function, arguments: Mapping[str, Any]) -> str:
    try:
        # A copy: lists among the arguments become a part of the state.
        return _written(getattr(instances[function.api], function.name)(**copy.deepcopy(dict(arguments))))
    except Exception as error:  # noqa: BLE001  the leaderboard's rule: what a function raises is its result
        return f"Error during execution: {error}"


@contextmanager
def _own_precision() -> Iterator[None]:
    """Restore the precisions that some functions set. mpmath's is the whole process's, so one runs at a time."""
    import mpmath

    with _precision, decimal.localcontext(), mpmath.workdps(mpmath.mp.dps):
        yield


_precision: Final = threading.Lock()


def _written(result: object) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, dict):
        try:
            return json.dumps(result)
        except (TypeError, ValueError):  # a number of mpmath or decimal
            return str(result)
    return str(result)


def _require_bounded(name: str, arguments: Mapping[str, Any]) -> None:
    """Raise ToolError where a mathematical function would not return soon."""
    for key in ("precision", "decimal_places"):
        digits = arguments.get(key, 0)
        # No text either: mpmath reads "1_000_000_000".
        if not isinstance(digits, int | float) or not abs(digits) <= MOST_DIGITS:
            raise ToolError(f"error: {key} must be a number of at most {MOST_DIGITS}")
    base, exponent = arguments.get("base"), arguments.get("exponent")
    if name != "power" or not isinstance(base, int) or not isinstance(exponent, int):
        return
    if base.bit_length() * abs(exponent) > MOST_BITS:
        raise ToolError("error: the result is too large")


def too_large(files: Any) -> bool:
    """Say whether a walk through a file system meets more than ``MOST_NODES``: folders can be made to hold themselves.

    Their own functions, and a comparison, would walk for ever. They begin at the root or at the folder that one is in,
    which need not be in the root's any more: ``cd ..`` leads back into one that was removed.
    """
    return any(_has_too_many(folder) for folder in (files.root, files._current_dir))


def _has_too_many(folder: Any) -> bool:
    left, waiting = MOST_NODES, [folder]
    while waiting:
        contents = getattr(waiting.pop(), "contents", {})
        left -= 1 + len(contents)
        if left < 0:
            return True
        waiting += contents.values()
    return False


def same_state(instances: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Say whether instances are in the wanted states. Attributes that begin with ``_`` do not count."""
    for api, other in wanted.items():
        found, aim = vars(instances[api]), vars(other)
        try:
            if any(key not in found or found[key] != value for key, value in aim.items() if not key.startswith("_")):
                return False
        except RecursionError:  # what a model nested deeper than any task
            return False
    return True
