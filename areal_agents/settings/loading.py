"""The loading of settings from a TOML file and then from dotted overrides.

    demo.toml ──┐
                ├─▶ one nested dict ─▶ unknown keys named, nearest ones offered ─▶ model_validate ─▶ TrainConfig
    --a.b 3  ───┘

Every problem is reported at once, each with the key, the file or flag it came from, its value and what was expected.
TOML has no null. The word ``"none"`` stands for None in each setting that accepts it, and inside ``env.kwargs``.
"""

from __future__ import annotations

import difflib
import importlib.resources
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from areal_agents.algorithms.registry import REGISTRIES
from areal_agents.errors import ConfigError
from areal_agents.settings.choices import choose, override_choice
from areal_agents.settings.config import MixedEnv, TrainConfig
from areal_agents.settings.describe import either, nearest, sections, settings
from areal_agents.settings.elsewhere import meaning_of
from areal_agents.settings.mixture import sentence, take_tables
from areal_agents.settings.presets import PRESETS, derived, preset, take_preset
from areal_agents.settings.tables import contradictions, inner_path, setting_of
from areal_agents.settings.values import Origins, how_to_write, mismatch, none_of, show, value_of

# --- reading -----------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    root = importlib.resources.files("areal_agents.configs")
    return {f.name.removesuffix(".toml"): Path(str(f)) for f in root.iterdir() if f.name.endswith(".toml")}


def find(path: Path | str) -> Path:
    """Find the file behind ``path``, which is a file or the bare name of a shipped configuration.

    Raises ConfigError where there is none.
    """
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


_PRESET = ("algorithm", "algorithm.preset")
"""The keys that a preset is named by."""
Without = Callable[[str], str | None]
"""Says of a key, or of a section, why who reads the settings has no use for it. None where there is use."""


def _all(key: str) -> None:
    return None


def load(
    path: Path | str | None,
    overrides: Sequence[str] = (),
    *,
    short: Mapping[str, str] = MappingProxyType({}),
    without: Without = _all,
    left_out: list[str] | None = None,
) -> TrainConfig:
    """Read the settings of a file, with ``overrides`` in place of what it says.

    Args:
        path: a TOML file or the name of a shipped configuration. None means all defaults.
        overrides: such as ``--learner.lr 2e-6`` or ``--learner.lr=2e-6``.
        short: keys of settings by their other names, which overrides may use.
        without: says why a setting means nothing here. The file's are left out, and no override is answered with one.
        left_out: gets the keys of those that the file has.

    Raises:
        ConfigError: lists every problem of the file and the overrides together.
    """
    tree: dict[str, Any] = {}
    origins: Origins = {}
    problems: list[str] = []
    table: dict[str, Any] = {}
    origin = ""
    mixture: list[Any] | None = None
    if path is not None:
        file = find(path)
        origin = str(file)
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
        mixture = take_tables(table, origin, tuple(MixedEnv.model_fields), problems)
        table, unused = _split(table, without)
        if mixture is not None and without("mixture") is not None:
            unused, mixture = [*unused, "env"], None
        if left_out is not None:
            left_out += sorted(unused)
    said: dict[str, tuple[str, str | None]] = {}
    pairs = list(_pairs(overrides, problems, short))
    named = [pair for pair in pairs if normal_key(pair[0]) in _PRESET]
    pairs = [pair for pair in pairs if pair not in named]
    try:
        name = _start(tree, origins, problems, table, origin, named)
    except ConfigError as error:
        raise failure([*problems, str(error)]) from error
    problems += contradictions(pairs)
    # Of a table, what says all of it comes first, so that no word is lost by the order.
    for key, raw, flag in sorted(pairs, key=lambda pair: len(inner_path(pair[0]))):
        # A setting with a short name may come under both names. With two values, which one is meant is anybody's guess.
        other, value = said.setdefault(key, (flag, raw)) if key in short.values() else (flag, raw)
        if other != flag and value != raw:
            problems.append(f"{other} {value} and {flag} {raw} are one setting, {key}: give one of them")
        _override(tree, origins, problems, key, raw, flag, without)
    problems += _booleans(tree, origins)
    if mixture is not None:
        if "env" in tree:
            flags = ", ".join(o for key, o in origins.items() if key.startswith("env.")) or "env"
            problems.append(f"{flags}: {origin} has several environments ([[env]]), of which this names none: edit it")
            del tree["env"]
        tree["mixture"] = [_none_in(one) for one in mixture]
    for key in REGISTRIES:
        problems += choose(tree, origins, key)
    try:
        config = TrainConfig.model_validate(tree if name is None else derived(name, tree))
    except ValidationError as error:
        problems += [_sentence(e, origins) for e in error.errors()]
        raise failure(problems) from None
    if problems:
        raise failure(problems)
    return config


def _start(
    tree: dict[str, Any],
    origins: Origins,
    problems: list[str],
    table: dict[str, Any],
    origin: str,
    named: Sequence[tuple[str, str | None, str]],
) -> str | None:
    """Put a file's settings and those of a preset into ``tree``, and return the preset's name.

    A file's own settings come on top of the preset that it names. A preset that an override names takes the place of
    the file's whole ``[algorithm]``, and of what else it sets. Raises ConfigError for an unknown preset.
    """
    name = take_preset(table)
    if not named:
        if name is not None:
            _merge(tree, origins, problems, preset(name).settings, "", f"algorithm = {name!r}, {origin}")
        _merge(tree, origins, problems, table, "", origin)
        return name
    _, name, flag = named[-1]
    if name is None:
        raise ConfigError(f"{flag} needs a value: one of {', '.join(PRESETS)}")
    table.pop("algorithm", None)
    _merge(tree, origins, problems, table, "", origin)
    _merge(tree, origins, problems, preset(name).settings, "", f"{flag} {name}")
    return name


def failure(problems: Sequence[str]) -> ConfigError:
    """Return one error that says all ``problems``."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    return ConfigError(f"{len(problems)} problems in the settings:\n" + "\n".join(f"  - {p}" for p in problems))


def _split(table: Mapping[str, Any], without: Without, prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Part what a file says into what is of use, and the keys of the rest."""
    kept: dict[str, Any] = {}
    unused: list[str] = []
    for name, value in table.items():
        key = prefix + name
        if isinstance(value, dict) and key in sections():
            kept[name], more = _split(value, without, key + ".")
            unused += more
        elif without(key) is not None:
            unused.append(key)
        else:
            kept[name] = value
    return kept, unused


def _merge(
    tree: dict[str, Any], origins: Origins, problems: list[str], table: Mapping[str, Any], prefix: str, origin: str
) -> None:
    for name, value in table.items():
        key = prefix + name
        if key in REGISTRIES:
            entries = dict(value) if isinstance(value, Mapping) else {"kind": value}
            # Parameters alone are those of the kind that a preset chose, if there is one.
            tree[name] = entries if "kind" in entries else {**tree.get(name, {}), **entries}
            origins |= {f"{key}.{n}": origin for n in entries}
        elif key in settings():
            tree[name] = none_of(value, settings()[key])
            origins[key] = origin
        elif key in sections():
            if isinstance(value, Mapping):
                _merge(tree.setdefault(name, {}), origins, problems, value, key + ".", origin)
            else:
                problems.append(f"{key} = {show(value)} ({origin}): {key} is a section; write [{key}] and its settings")
        elif isinstance(value, dict) and value:
            problems += [_unknown(leaf, origin) for leaf in _leaves(value, key)]
        else:
            problems.append(_unknown(key, origin))


def _none_in(table: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the word ``none`` in a table ``[[env]]`` as in ``[env]``."""
    known = settings()
    return {n: none_of(v, known[f"env.{n}"]) if f"env.{n}" in known else v for n, v in table.items()}


def _booleans(tree: dict[str, Any], origins: Origins) -> list[str]:
    """Remove every true or false that is given for a number from ``tree``, and return the problems.

    pydantic would read them as 1 or 0.
    """
    problems: list[str] = []
    for setting in settings().values():
        node: Any = tree
        for part in setting.section.split(".") if setting.section else ():
            node = node.get(part, {})
        if isinstance(node.get(setting.name), bool) and not setting.boolean and not setting.free:
            problems.append(mismatch(setting, node.pop(setting.name), origins))
    return problems


def _leaves(table: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


# --- overrides ---------------------------------------------------------------------------------------------------


def split_overrides(args: Sequence[str], keep: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Part ``args`` into everything else, and overrides with their values.

    Flags in ``keep`` are not overrides.
    """
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
    """Return the dotted key of each override, and its flag as typed.

    What is no override is left to ``load`` to complain of.
    """
    return [(normal_key(key), flag) for key, _, flag in _pairs(overrides, [], short)]


def override_values(overrides: Sequence[str], *, short: Mapping[str, str]) -> list[tuple[str, str | None, str]]:
    """Return the dotted key of each override, its raw value or None, and its flag as typed.

    Raises ConfigError for what is no override.
    """
    problems: list[str] = []
    found = [(normal_key(key), raw, flag) for key, raw, flag in _pairs(overrides, problems, short)]
    if problems:
        raise failure(problems)
    return found


def normal_key(key: str) -> str:
    """Spell ``key`` as settings do, ``max_turns`` for ``max-turns``."""
    return key.replace("-", "_")


def _pairs(
    overrides: Sequence[str], problems: list[str], short: Mapping[str, str]
) -> Iterator[tuple[str, str | None, str]]:
    """Yield for each override its dotted key, its raw value or None, and its flag as typed."""
    i = 0
    while i < len(overrides):
        token = overrides[i]
        i += 1
        if not token.startswith("--") or token == "--":
            problems.append(f"unexpected argument {token!r}: overrides look like --engine.max_batch 8")
            continue
        flag, equals, raw = token.partition("=")
        key = flag[2:]
        value: str | None = raw if equals else None
        if not equals and i < len(overrides) and not overrides[i].startswith("--"):
            value = overrides[i]
            i += 1
        yield short.get(normal_key(key), key), value, flag


def _override(
    tree: dict[str, Any], origins: Origins, problems: list[str], key: str, raw: str | None, flag: str, without: Without
) -> None:
    normal = key.replace("-", "_")
    if (chosen := next((k for k in REGISTRIES if f"{normal}.".startswith(f"{k}.")), None)) is not None:
        override_choice(tree, origins, problems, chosen, normal, raw, flag)
        return
    setting = setting_of(key)
    if setting is None:
        if normal in sections() and normal:
            names = ", ".join(_names(normal, without))
            problems.append(f"{flag} is a section, not a setting: use --{normal}.NAME with one of {names}")
        else:
            problems.append(_unknown(key, flag, without))
        return
    if raw is None:
        if not setting.boolean:
            problems.append(f"{flag} needs a value: {setting.expects}{how_to_write(setting)}")
            return
        raw = "true"
    path = [*setting.key.split("."), *inner_path(key)]
    node = tree
    for name in path[:-1]:
        if not isinstance(node.get(name), dict):
            node[name] = {}  # a value in the way (env.kwargs.a = 1, then env.kwargs.a.b) gives way to the later word
        node = node[name]
    node[path[-1]] = value_of(raw, setting)
    origins[setting.key] = flag


# --- messages ----------------------------------------------------------------------------------------------------


def _names(section: str, without: Without) -> list[str]:
    return [name for name in sections()[section] if without(f"{section}.{name}" if section else name) is None]


def _unknown(key: str, origin: str, without: Without = _all) -> str:
    normal = key.replace("-", "_")
    near, (section, _, name) = nearest(normal, without=without), normal.rpartition(".")
    # A name that we have elsewhere, or nearly have in the very section, is no other trainer's.
    ours = {n for names in sections().values() for n in names} - {"n"}
    typo = section and difflib.get_close_matches(name, sections().get(section, ()), n=1, cutoff=0.85)
    if name not in ours and not typo and (meaning := meaning_of(normal, without=without)) is not None:
        hint = meaning
    elif near:
        hint = f"did you mean {either(near)}?"
    elif section in sections() and section:
        hint = f"settings of {section}: {', '.join(_names(section, without))}"
    else:
        parts = ", ".join(s for s in sections() if s and _names(s, without))
        hint = f"sections: {parts}; top level: {', '.join(_names('', without))}"
    return f"unknown setting {key} ({origin}): {hint}"


def _sentence(error: Any, origins: Origins) -> str:
    """Say one pydantic error in plain words."""
    if len(error["loc"]) > 1 and error["loc"][0] == "mixture":
        return sentence(error)
    key = ".".join(str(part) for part in error["loc"])
    while key and key not in settings() and key not in sections():
        key = key.rpartition(".")[0]  # an element of a list, or a branch of a union
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    setting = settings().get(key)
    if setting is None:
        return f"{key or 'settings'}: {error['msg']}"
    return mismatch(setting, error["input"], origins)
