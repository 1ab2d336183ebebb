"""Settings that choose an algorithm, each of which is a table.

The entry ``kind`` names the algorithm, and the other entries are its parameters. A file and an override may both have
set ``kind``, and only it says which parameters there are and how they are read. So a table is looked at last, once
everything else is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from areal_agents.algorithms.registry import REGISTRIES
from areal_agents.errors import ConfigError
from areal_agents.settings.describe import Setting, parameters, settings
from areal_agents.settings.elsewhere import meaning_of
from areal_agents.settings.values import Origins, mismatch, none_of, table_of, value_of


@dataclass(frozen=True, slots=True)
class _Raw:
    """An algorithm's parameter as it was typed.

    How it is read depends on the algorithm.
    """

    text: str | None


def override_choice(
    tree: dict[str, Any], origins: Origins, problems: list[str], key: str, given: str, raw: str | None, flag: str
) -> None:
    """Set an algorithm, or one of its parameters, as an override says.

    ``--algorithm.loss NAME`` takes the place of the whole table, as a table in TOML or JSON does.
    ``--algorithm.loss.X V`` sets one entry of it.

    Args:
        tree: the settings so far, changed in place.
        origins: where each setting was set, changed in place.
        problems: gets a sentence where a value is missing.
        key: the setting that chooses, such as ``algorithm.loss``.
        given: the override's key, which is ``key`` or an entry below it.
        raw: the value as typed. None where there is none.
        flag: the flag as typed, for messages.
    """
    section, _, name = key.rpartition(".")
    parameter = given.removeprefix(key).lstrip(".")
    if raw is None and parameter in ("", "kind"):
        problems.append(f"{flag} needs a value: {settings()[key].expects}")
        return
    if not parameter:
        table = tree.setdefault(section, {}).get(name, {})
        if lost := [o for p in table if (o := origins.get(f"{key}.{p}", "")).startswith("--")]:
            problems.append(f"{flag} takes the place of the whole table, {lost[0]} included: put {flag} before it")
        tree[section][name] = {}
        if raw is not None and raw.lstrip().startswith("{"):
            if (given_table := table_of(raw)) is None:
                problems.append(
                    f'{flag} {raw}: this is no table; write {flag} \'{{"kind": "NAME"}}\' (JSON), '
                    f"'{{kind = \"NAME\"}}' (TOML), or {flag} NAME"
                )
                return
            tree[section][name] = given_table
            origins |= {f"{key}.{entry}": flag for entry in given_table}
            return
    entry = parameter or "kind"
    table = tree.setdefault(section, {}).setdefault(name, {})
    table[entry] = value_of(raw, settings()[key]) if entry == "kind" and raw is not None else _Raw(raw)
    origins[f"{key}.{entry}"] = flag


def choose(tree: dict[str, Any], origins: Origins, key: str) -> list[str]:
    """Make the Choice of the setting ``key`` from its table in ``tree``.

    Returns what is wrong with it. Which parameters there are depends on ``kind``, which a file and an override may both
    have set. So only now are overrides read and names looked up.
    """
    section, _, name = key.rpartition(".")
    table = tree.get(section, {}).pop(name, None)
    default: str = settings()[key].default.kind
    if table is None:
        table = {}
    registry, kind = REGISTRIES[key], table.pop("kind", default)
    if not isinstance(kind, str):
        return [mismatch(settings()[key], kind, {key: origins[f"{key}.kind"]})]
    try:
        registry.require(kind)
        known = parameters(key, kind) if table else {}
    except ConfigError as error:
        return [f"{error} ({origins.get(f'{key}.kind', 'the default')})"]
    options: dict[str, Any] = {}
    problems: list[str] = []
    for parameter, value in table.items():
        if parameter not in known:
            meaning = meaning_of(parameter)
            text = registry.unknown(kind, parameter) + (f"; {meaning}" if meaning else "")
            problems.append(f"{text} ({origins[f'{key}.{parameter}']})")
        else:
            options |= _parameter(known[parameter], value, origins, problems)
    if kind == default and not table:
        return []
    try:
        tree.setdefault(section, {})[name] = registry.choose(kind, options)
    except ValidationError as error:
        problems += [_parameter_sentence(e, known, options, origins, key) for e in error.errors()]
    return problems


def _parameter(setting: Setting, value: Any, origins: Origins, problems: list[str]) -> dict[str, Any]:
    """Return the value of an algorithm's parameter, by its name.

    The result is empty where ``problems`` got a sentence about the value.
    """
    if isinstance(value, _Raw):
        if value.text is None and not setting.boolean:
            problems.append(f"{origins[setting.key]} needs a value: {setting.expects}")
            return {}
        value = value_of("true" if value.text is None else value.text, setting)
    else:
        value = none_of(value, setting)
    if isinstance(value, bool) and not setting.boolean:
        problems.append(mismatch(setting, value, origins))
        return {}
    return {setting.name: value}


def _parameter_sentence(
    error: Any, known: Mapping[str, Setting], options: Mapping[str, Any], origins: Origins, key: str
) -> str:
    """Say one pydantic error about an algorithm's parameter in plain words."""
    name = str(error["loc"][0])
    if error["type"] == "missing" and len(error["loc"]) == 1:
        return f"{key}.{name} is missing: this algorithm has no default for it"
    if error["type"] == "value_error":
        return f"{key}.{name} ({origins[f'{key}.{name}']}): {error['ctx']['error']}"
    return mismatch(known[name], options[name], origins)
