"""Several environments in one run: the tables ``[[env]]`` of a file.

    [[env]]                              [[env]]
    id = "areal/Arithmetic-v0"           id = "areal/Hanoi-v0"
    weight = 2                           difficulty = 0.3

In the settings they are ``TrainConfig.mixture``. ``[env]`` stays what a run with one environment has.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.utils.short_text import short

LABEL = re.compile(r"[A-Za-z0-9_-]+")
"""What an environment may be called: labels are parts of names of metrics, evaluations and folders."""


def label_of(id: str) -> str:
    """Return the label of an environment that is given none: ``Arithmetic`` of ``areal/Arithmetic-v0``."""
    name = re.split(r"[/:.]", id)[-1]
    return re.sub(r"-v\d+$", "", name)


def require_labels(labels: Sequence[str], taken: Sequence[str]) -> None:
    """Raise ValueError where two environments have one label, or one cannot be part of a name.

    Args:
        labels: of the environments, in order.
        taken: words that no label may be.
    """
    for i, label in enumerate(labels):
        if LABEL.fullmatch(label) is None:
            raise ValueError(f"[[env]] number {i + 1}: label = {label!r} must be letters, digits, - and _ alone")
        if label in taken:
            raise ValueError(f"[[env]] number {i + 1}: label = {label!r} is the name of a setting: choose another one")
        if (first := labels.index(label)) < i:
            raise ValueError(
                f"[[env]] number {i + 1} has the label {label!r}, as number {first + 1} has: give one of them a label "
                "of its own"
            )


def take_tables(table: dict[str, Any], origin: str, names: Sequence[str], problems: list[str]) -> list[Any] | None:
    """Take the tables ``[[env]]`` out of a file's settings, and return them. None where it has one ``[env]``, or none.

    Args:
        table: the file's settings, from which they are taken.
        origin: the file, for messages.
        names: the settings that such a table may have.
        problems: gets a sentence for each that it may not have.
    """
    if not isinstance(table.get("env"), list):
        return None
    found: list[Any] = table.pop("env")
    if not found:
        problems.append(f"env = [] ({origin}): name an environment")
    tables: list[Any] = []
    for i, one in enumerate(found):
        where = f"[[env]] number {i + 1}, {origin}"
        if not isinstance(one, Mapping):
            problems.append(f"env has {short(one)} ({where}): each environment is a table")
            continue
        for name in one:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                problems.append(f"unknown setting env.{name} ({where}): {hint}")
        for name in ("weight", "difficulty", "step_timeout"):
            if isinstance(one.get(name), bool):
                problems.append(f"env.{name} = {short(one[name])} ({where}): expected a number")
        tables.append({n: v for n, v in one.items() if n in names})
    return tables


def sentence(error: Mapping[str, Any]) -> str:
    """Say one pydantic error of ``TrainConfig.mixture`` in plain words."""
    _, place, *rest = error["loc"]
    name = ".".join(map(str, rest))
    given = error["input"] if name else None
    value = f" = {short(given)}" if not isinstance(given, Mapping) else ""
    return f"[[env]] number {int(place) + 1}: {name or 'it'}{value}: {error['msg']}"
