"""Loading settings: TOML, then dotted overrides, then one pydantic ``model_validate`` of ``TrainConfig``.

    demo.toml ──┐
                ├─▶ one nested dict ─▶ unknown keys named, nearest ones offered ─▶ model_validate ─▶ TrainConfig
    --a.b 3  ───┘

Every problem is reported at once, each with the key, the file or flag it came from, its value and what was expected.
TOML has no null: the word ``"none"`` stands for None in each setting that accepts it, and inside ``env.kwargs``.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from areal_agents.algorithms.registry import REGISTRIES
from areal_agents.errors import ConfigError
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.describe import (
    Setting,
    either,
    help_text,
    members,
    nearest,
    parameters,
    sections,
    settings,
)

__all__ = ["dump", "find", "help_text", "load", "shipped", "split_overrides"]

Origins = dict[str, str]
"""Dotted key to where it was set: a file's path or a flag."""


# --- reading -----------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    root = importlib.resources.files("areal_agents.configs")
    return {f.name.removesuffix(".toml"): Path(str(f)) for f in root.iterdir() if f.name.endswith(".toml")}


def find(path: Path | str) -> Path:
    """The file behind ``path``: a file, or the bare name of a shipped configuration. Raises ConfigError."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    known = shipped()
    bare = len(path.parts) == 1
    if bare and path.name.removesuffix(".toml") in known:
        return known[path.name.removesuffix(".toml")]
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a TOML file")
    siblings = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*siblings, *known], n=3)
    hint = f"Did you mean {either(near)}?" if near else f"Shipped configurations: {', '.join(sorted(known)) or 'none'}."
    raise ConfigError(f"no such configuration: {path}. {hint}")


def load(
    path: Path | str | None, overrides: Sequence[str] = (), *, short: Mapping[str, str] = MappingProxyType({})
) -> TrainConfig:
    """The settings of ``path`` (None: all defaults) under ``overrides``: ``--learner.lr 2e-6``, ``--learner.lr=2e-6``.

    ``short``: other names of settings in overrides. Raises ConfigError, which lists every problem of the file and the
    overrides together.
    """
    tree: dict[str, Any] = {}
    origins: Origins = {}
    problems: list[str] = []
    if path is not None:
        file = find(path)
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        _merge(tree, origins, problems, table, "", str(file))
    said: dict[str, tuple[str, str | None]] = {}
    for key, raw, flag in _pairs(overrides, problems, short):
        other, value = said.setdefault(key, (flag, raw)) if key in short.values() else (flag, raw)
        if other != flag and value != raw:
            problems.append(f"{other} {value} and {flag} {raw} are one setting, {key}: give one of them")
        _override(tree, origins, problems, key, raw, flag)
    problems += _booleans(tree, origins)
    for key in REGISTRIES:
        problems += _choose(tree, origins, key)
    try:
        config = TrainConfig.model_validate(tree)
    except ValidationError as error:
        problems += [_sentence(e, origins) for e in error.errors()]
        raise failure(problems) from None
    if problems:
        raise failure(problems)
    return config


def failure(problems: Sequence[str]) -> ConfigError:
    """Return one error that says all ``problems``."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"{len(problems)} problems in the settings:\n" + "\n".join(f"  - {p}" for p in problems))


def _merge(
    tree: dict[str, Any], origins: Origins, problems: list[str], table: Mapping[str, Any], prefix: str, origin: str
) -> None:
    for name, value in table.items():
        key = prefix + name
        if key in REGISTRIES:
            tree[name] = dict(value) if isinstance(value, dict) else {"kind": value}
            origins |= {f"{key}.{n}": origin for n in tree[name]}
        elif key in settings():
            tree[name] = _none_of(value, settings()[key])
            origins[key] = origin
        elif key in sections():
            if isinstance(value, dict):
                _merge(tree.setdefault(name, {}), origins, problems, value, key + ".", origin)
            else:
                problems.append(
                    f"{key} = {_show(value)} ({origin}): {key} is a section; write [{key}] and its settings"
                )
        elif isinstance(value, dict) and value:
            problems += [_unknown(leaf, origin) for leaf in _leaves(value, key)]
        else:
            problems.append(_unknown(key, origin))


def _choose(tree: dict[str, Any], origins: Origins, key: str) -> list[str]:
    """Make the Choice of the setting ``key`` from its table in ``tree``. Returns what is wrong with it.

    Which parameters there are depends on ``kind``, which a file and an override may both have set: so only now are
    overrides read and names looked up.
    """
    section, _, name = key.rpartition(".")
    table = tree.get(section, {}).pop(name, None)
    if table is None:
        return []
    registry, kind = REGISTRIES[key], table.pop("kind", settings()[key].default.kind)
    if not isinstance(kind, str):
        return [_mismatch(settings()[key], kind, {key: origins[f"{key}.kind"]})]
    try:
        registry.require(kind)
        known = parameters(key, kind) if table else {}
    except ConfigError as error:
        return [f"{error} ({origins.get(f'{key}.kind', 'the default')})"]
    options: dict[str, Any] = {}
    problems: list[str] = []
    for parameter, value in table.items():
        if parameter not in known:
            problems.append(f"{registry.unknown(kind, parameter)} ({origins[f'{key}.{parameter}']})")
        else:
            options |= _parameter(known[parameter], value, origins, problems)
    try:
        tree.setdefault(section, {})[name] = registry.choose(kind, options)
    except ValidationError as error:
        problems += [_parameter_sentence(e, known, options, origins, key) for e in error.errors()]
    return problems


def _parameter(setting: Setting, value: Any, origins: Origins, problems: list[str]) -> dict[str, Any]:
    """The value of an algorithm's parameter by its name; nothing where ``problems`` got a sentence about it."""
    if isinstance(value, _Raw):
        if value.text is None and not setting.boolean:
            problems.append(f"{origins[setting.key]} needs a value: {setting.expects}")
            return {}
        value = _value("true" if value.text is None else value.text, setting)
    else:
        value = _none_of(value, setting)
    if isinstance(value, bool) and not setting.boolean:
        problems.append(_mismatch(setting, value, origins))
        return {}
    return {setting.name: value}


def _parameter_sentence(
    error: Any, known: Mapping[str, Setting], options: Mapping[str, Any], origins: Origins, key: str
) -> str:
    """One pydantic error about an algorithm's parameter in plain words."""
    name = str(error["loc"][0])
    if error["type"] == "missing":
        return f"{key}.{name} is missing: this algorithm has no default for it"
    if error["type"] == "value_error":
        return f"{key}.{name} ({origins[f'{key}.{name}']}): {error['ctx']['error']}"
    return _mismatch(known[name], options[name], origins)


def _booleans(tree: dict[str, Any], origins: Origins) -> list[str]:
    """Problems of true or false given for a number, which pydantic would read as 1 or 0; removed from ``tree``."""
    problems: list[str] = []
    for setting in settings().values():
        node: Any = tree
        for part in setting.section.split(".") if setting.section else ():
            node = node.get(part, {})
        if isinstance(node.get(setting.name), bool) and not setting.boolean and not setting.free:
            problems.append(_mismatch(setting, node.pop(setting.name), origins))
    return problems


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


def _none_of(value: Any, setting: Setting) -> Any:
    if setting.free:
        return _none_inside(value)
    return None if setting.optional and _is_none(value) else value


def _none_inside(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _none_inside(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_none_inside(v) for v in value]
    return None if _is_none(value) else value


def _is_none(value: Any) -> bool:
    return isinstance(value, str) and value.lower() == "none"


# --- overrides ---------------------------------------------------------------------------------------------------


def split_overrides(args: Sequence[str], keep: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """``args`` parted into (everything else, overrides with their values); flags in ``keep`` are not overrides."""
    rest: list[str] = []
    overrides: list[str] = []
    i = 0
    while i < len(args):
        token = args[i]
        if not token.startswith("--") or token in keep:
            rest.append(token)
        else:
            overrides.append(token)
            if "=" not in token and i + 1 < len(args) and not args[i + 1].startswith("--"):
                i += 1
                overrides.append(args[i])
        i += 1
    return rest, overrides


def override_keys(overrides: Sequence[str], *, short: Mapping[str, str]) -> list[tuple[str, str]]:
    """(dotted key, the flag as typed) of each override; what is none is left to ``load`` to complain of."""
    return [(normal_key(key), flag) for key, _, flag in _pairs(overrides, [], short)]


def normal_key(key: str) -> str:
    """``key`` as settings spell it: ``max-turns`` is ``max_turns``."""
    return key.replace("-", "_")


def _pairs(
    overrides: Sequence[str], problems: list[str], short: Mapping[str, str]
) -> Iterator[tuple[str, str | None, str]]:
    """(dotted key, raw value or None, the flag as typed) of each override."""
    i = 0
    while i < len(overrides):
        token = overrides[i]
        i += 1
        if not token.startswith("--") or token == "--":
            problems.append(f"unexpected argument {token!r}: overrides look like --learner.lr 2e-6")
            continue
        flag, equals, raw = token.partition("=")
        key = flag[2:]
        value: str | None = raw if equals else None
        if not equals and i < len(overrides) and not overrides[i].startswith("--"):
            value = overrides[i]
            i += 1
        yield short.get(normal_key(key), key), value, flag


def _override(
    tree: dict[str, Any], origins: Origins, problems: list[str], key: str, raw: str | None, flag: str
) -> None:
    normal = key.replace("-", "_")
    if (chosen := next((k for k in REGISTRIES if f"{normal}.".startswith(f"{k}.")), None)) is not None:
        _override_choice(tree, origins, problems, chosen, normal, raw, flag)
        return
    setting = _setting_of(key)
    if setting is None:
        if normal in sections() and normal:
            names = ", ".join(sections()[normal])
            problems.append(f"{flag} is a section, not a setting: use --{normal}.NAME with one of {names}")
        else:
            problems.append(_unknown(key, flag))
        return
    if raw is None:
        if not setting.boolean:
            problems.append(f"{flag} needs a value: {setting.expects}")
            return
        raw = "true"
    path = setting.key.split(".")
    inner = key[len(setting.key) + 1 :].split(".") if setting.free and len(key) > len(setting.key) else []
    node = tree
    for name in (path + inner)[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}  # a value in the way (env.kwargs.a = 1, then env.kwargs.a.b) gives way to the later word
        node = node[name]
    node[(path + inner)[-1]] = _value(raw, setting)
    origins[setting.key] = flag


@dataclass(frozen=True, slots=True)
class _Raw:
    """An algorithm's parameter as it was typed: how it is read depends on the algorithm."""

    text: str | None


def _override_choice(
    tree: dict[str, Any], origins: Origins, problems: list[str], key: str, given: str, raw: str | None, flag: str
) -> None:
    """``--algorithm.loss NAME`` takes the place of the whole table; ``--algorithm.loss.X V`` sets one entry of it."""
    section, _, name = key.rpartition(".")
    parameter = given.removeprefix(key).lstrip(".")
    if raw is None and parameter in ("", "kind"):
        problems.append(f"{flag} needs a value: {settings()[key].expects}")
        return
    if not parameter:
        tree.setdefault(section, {})[name] = {}
    entry = parameter or "kind"
    table = tree.setdefault(section, {}).setdefault(name, {})
    table[entry] = _value(raw, settings()[key]) if entry == "kind" and raw is not None else _Raw(raw)
    origins[f"{key}.{entry}"] = flag


def _setting_of(key: str) -> Setting | None:
    known = settings()
    for candidate in (key, key.replace("-", "_")):
        if candidate in known:
            return known[candidate]
    return next((s for s in known.values() if s.free and key.startswith(s.key + ".") and not key.endswith(".")), None)


def _value(raw: str, setting: Setting) -> Any:
    if setting.optional and _is_none(raw):
        return None
    quoted = len(raw) > 1 and raw[0] == raw[-1] and raw[0] in "\"'"
    if setting.textual and not quoted:
        return raw
    text = raw.lower() if raw in ("True", "False") else raw
    try:
        # Only one value may stand here: a newline would let a second assignment in.
        value = tomllib.loads(f"value = {text}")["value"] if "\n" not in text else raw
    except tomllib.TOMLDecodeError:
        value = raw
    return _none_of(value, setting)


# --- messages ----------------------------------------------------------------------------------------------------


def _unknown(key: str, origin: str) -> str:
    near = nearest(key.replace("-", "_"))
    section = key.rpartition(".")[0]
    if near:
        hint = f"did you mean {either(near)}?"
    elif section in sections() and section:
        hint = f"settings of {section}: {', '.join(sections()[section])}"
    else:
        hint = f"sections: {', '.join(s for s in sections() if s)}; top level: {', '.join(sections()[''])}"
    return f"unknown setting {key} ({origin}): {hint}"


def _sentence(error: Any, origins: Origins) -> str:
    """One pydantic error in plain words."""
    key = ".".join(str(part) for part in error["loc"])
    while key and key not in settings() and key not in sections():
        key = key.rpartition(".")[0]  # an element of a list, or a branch of a union
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    setting = settings().get(key)
    if setting is None:
        return f"{key or 'settings'}: {error['msg']}"
    return _mismatch(setting, error["input"], origins)


def _mismatch(setting: Setting, value: Any, origins: Origins) -> str:
    hint = ""
    choices = [c for m in members(setting.info.annotation) if get_origin(m) is Literal for c in get_args(m)]
    if isinstance(value, str) and (near := difflib.get_close_matches(value, choices, n=1)):
        hint = f"; did you mean {near[0]!r}?"
    place = f" ({origins[setting.key]})" if setting.key in origins else ""
    return f"{setting.key} = {_show(value)}{place}: expected {setting.expects}{hint}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- writing -----------------------------------------------------------------------------------------------------


def dump(config: TrainConfig, *, leave_out: Callable[[str], object] = lambda key: None) -> str:
    """``config`` as TOML that ``load`` reads back to an equal one. None is left out where it is the default.

    ``leave_out``: of each key, whether it is not written.
    """
    tree = config.model_dump(mode="python")
    lines: list[str] = []
    for section, names in sections().items():
        names = tuple(n for n in names if not leave_out(f"{section}.{n}" if section else n))
        if section and names:
            lines += ["", f"[{section}]"]
        table: Any = tree
        for part in section.split(".") if section else ():
            table = table[part]
        tables: list[str] = []
        for name in names:
            setting = settings()[f"{section}.{name}" if section else name]
            if setting.registry is not None:
                tables += ["", f"[{setting.key}]", *(f"{k} = {_toml(v)}" for k, v in table[name].items())]
            elif table[name] is not None or setting.default is not None:
                lines.append(f"{name} = {_toml(table[name])}")
        lines += tables
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    match value:
        case None:
            return '"none"'
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str() | Path():
            return _quoted(str(value))
        case list() | tuple():
            return "[" + ", ".join(_toml(v) for v in value) + "]"
        case dict():
            return "{" + ", ".join(f"{_quoted(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise ConfigError(f"{value!r} of type {type(value).__name__} cannot be written as TOML")


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's escapes are TOML's, but TOML wants the delete character escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
