"""Settings that are tables with any names, whole and entry by entry: ``--env.kwargs '{…}' --env.kwargs.a 3``.

All that is said counts, in any order. Two words about one entry that differ are refused, since one of them would be
lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from areal_agents.settings.describe import Setting, settings
from areal_agents.settings.values import value_of

Pair = tuple[str, str | None, str]
"""Of an override: its dotted key, its value as typed, and its flag as typed."""
_MISSING = object()
_IDENTIFIERS = ("env.kwargs", "model.template_variables")
"""Tables whose entries are called as Python's variables are."""


def setting_of(key: str) -> Setting | None:
    """Return the setting that a dotted key names, or an entry of. None where there is none."""
    known = settings()
    for candidate in (key, key.replace("-", "_")):
        if candidate in known:
            return known[candidate]
    normal = key.replace("-", "_")
    return next(
        (s for s in known.values() if s.free and normal.startswith(s.key + ".") and not key.endswith(".")), None
    )


def inner_path(key: str) -> list[str]:
    """Return the names below a table that ``key`` has: ``["deep", "a"]`` of ``env.kwargs.deep.a``.

    Arguments and variables are spelt as settings are, ``test_path`` for ``test-path``; Ray's resources are not.
    """
    setting = setting_of(key)
    if setting is None or not setting.free or len(key) <= len(setting.key):
        return []
    first, *deeper = key[len(setting.key) + 1 :].split(".")
    return [first.replace("-", "_") if setting.key in _IDENTIFIERS else first, *deeper]


def contradictions(pairs: Sequence[Pair]) -> list[str]:
    """Say which overrides give one entry of a table two values.

    The same flag twice is none: there the later word counts, as for every setting.
    """
    said = [(setting, pair) for pair in pairs if (setting := setting_of(pair[0])) is not None and setting.free]
    problems: list[str] = []
    for (one, a), (other, b) in combinations(said, 2):
        if one.key != other.key or a[1] is None or b[1] is None:
            continue
        outer, inner = (a, b) if len(inner_path(a[0])) <= len(inner_path(b[0])) else (b, a)
        path, below = inner_path(outer[0]), inner_path(inner[0])
        if below[: len(path)] != path:
            continue
        whole, entry = value_of(outer[1] or "", one), value_of(inner[1] or "", one)
        if not path and not isinstance(whole, dict):
            continue  # which is refused by itself
        if path == below:
            lost = a[2] == b[2] and not path and whole != entry
        else:
            found = _entry(whole, below[len(path) :])
            lost = found is not _MISSING and found != entry
        if lost:
            what = ".".join([one.key, *below])
            problems.append(f"{a[2]} {a[1]} and {b[2]} {b[1]} say two things of {what}: give one")
    return problems


def _entry(value: Any, path: Sequence[str]) -> Any:
    """Return what a table says of the entry at ``path``. What is no table says that there is none."""
    for name in path:
        if not isinstance(value, dict):
            return None
        if name not in value:
            return _MISSING
        value = value[name]
    return value
