"""The settings as a flat table, and the help and hints that are made from it.

A setting has a dotted key, accepted values in words, a default and a meaning. ``nearest`` finds the keys that a typo
may have meant. Everything here is read off the pydantic models of ``settings/config.py``. Nothing is declared twice.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic.fields import FieldInfo

from areal_agents.algorithms.registry import REGISTRIES, Choice, Registry
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.section import Section


@dataclass(frozen=True, slots=True)
class Setting:
    """One leaf of ``TrainConfig``."""

    key: str
    info: FieldInfo

    @property
    def section(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def optional(self) -> bool:
        return type(None) in members(self.info.annotation)

    @property
    def free(self) -> bool:
        """True for a table with keys of the user's choice."""
        return get_origin(self.info.annotation) is dict

    @property
    def registry(self) -> Registry | None:
        """The registry that the setting chooses an algorithm from. None for a plain value.

        The algorithm's parameters are set below the setting.
        """
        return REGISTRIES.get(self.key)

    @property
    def textual(self) -> bool:
        """True where a command-line value is taken as it stands, and never read as a number or list."""
        kinds = [m for m in members(self.info.annotation) if m is not type(None)]
        return self.registry is not None or all(m in (str, Path) or get_origin(m) is Literal for m in kinds)

    @property
    def boolean(self) -> bool:
        return bool in members(self.info.annotation)

    @property
    def default(self) -> Any:
        return self.info.get_default(call_default_factory=True)

    @property
    def expects(self) -> str:
        """The accepted values in words: ``a whole number, at least 1``."""
        if self.registry is not None:
            return f"one of {', '.join(map(repr, self.registry.names()))}, or module:function"
        return _expects(self.info.annotation, self.info.metadata)


def members(annotation: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or any other annotation alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _expects(annotation: Any, metadata: Sequence[Any]) -> str:
    bounds: list[str] = []
    for item in metadata:
        match item:
            case at.Ge(ge):
                bounds.append(f"at least {ge:g}")
            case at.Gt(gt):
                bounds.append(f"more than {gt:g}")
            case at.Le(le):
                bounds.append(f"at most {le:g}")
            case at.Lt(lt):
                bounds.append(f"less than {lt:g}")
    words = [_words(member) for member in members(annotation) if member is not type(None)]
    text = ", ".join([" or ".join(words), *bounds])
    return f"{text}, or none" if type(None) in members(annotation) else text


def _words(annotation: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    if annotation in names:
        return names[annotation]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(args[0])
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(a) for a in args)
    if origin is tuple:
        return "a list" if Ellipsis in args else f"a list of {len(args)} numbers"
    return "a table" if origin is dict else str(annotation)


@cache
def settings() -> Mapping[str, Setting]:
    """Return every setting by its dotted key, in the order they are declared."""
    return {s.key: s for s in _walk(TrainConfig, "")}


def _walk(model: type[Section], prefix: str) -> Iterator[Setting]:
    nested: list[tuple[type[Section], str]] = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            nested.append((info.annotation, f"{prefix}{name}."))
        elif prefix + name != "mixture":  # tables of a file, which no one flag sets (settings/mixture.py)
            yield Setting(prefix + name, info)
    for section, path in nested:
        yield from _walk(section, path)


def parameters(key: str, kind: str) -> Mapping[str, Setting]:
    """Return the parameters of algorithm ``kind`` of the setting ``key``, by name.

    Raises ConfigError for an unknown algorithm.
    """
    fields = REGISTRIES[key].parameters(kind).model_fields
    return {name: Setting(f"{key}.{name}", info) for name, info in fields.items()}


@cache
def sections() -> Mapping[str, tuple[str, ...]]:
    """Return the names of each section's settings.

    The top level is the section ``""``.
    """
    out: dict[str, tuple[str, ...]] = {}
    for s in settings().values():
        out[s.section] = (*out.get(s.section, ()), s.name)
    return out


def nearest(key: str, *, without: Callable[[str], object] = lambda key: None) -> list[str]:
    """Return at most three settings that ``key`` may have meant, none of those that ``without`` says are not there.

    For a name that no setting has, near names of algorithms' parameters come first. Else it is the same name in other
    sections. Else it is near names in the same section and near paths, and at last near names in any section.
    """
    section, _, name = key.rpartition(".")
    there = {k: s for k, s in settings().items() if not without(k)}
    if name not in {s.name for s in there.values()}:
        owned = {k.rpartition(".")[2]: k for k in reversed(_parameter_keys()) if not without(k)}
        if found := difflib.get_close_matches(name, owned, n=3, cutoff=0.8):
            return [owned[n] for n in found]
    same = sorted((s.key for s in there.values() if s.name == name), key=lambda k: k.count("."))
    if same:
        if section and section not in sections():  # a misspelt section: the nearest path is the likeliest
            same.sort(key=lambda k: -difflib.SequenceMatcher(None, k, key).ratio())
        return same[:3]
    here = difflib.get_close_matches(name, [s.name for s in there.values() if s.section == section], n=3)
    paths = difflib.get_close_matches(key, there, n=3, cutoff=0.75)
    found = list(dict.fromkeys([*(f"{section}.{n}" if section else n for n in here), *paths]))
    if not found:
        names = difflib.get_close_matches(name, [s.name for s in there.values()])
        found = [s.key for n in dict.fromkeys(names) for s in there.values() if s.name == n]
    return found[:3]


@cache
def _parameter_keys() -> tuple[str, ...]:
    """Return the dotted keys of the parameters of our algorithms."""
    keys: dict[str, None] = {}
    for key, registry in REGISTRIES.items():
        for kind in registry.builtin():  # a package may be broken, and a typo is no reason to import it
            keys |= dict.fromkeys(s.key for s in parameters(key, kind).values())
    return tuple(keys)


def either(names: Sequence[str]) -> str:
    """Write ``names`` as ``a, b or c``."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def help_text(
    *,
    leave_out: Callable[[str], object] = lambda key: None,
    short: Mapping[str, str] = MappingProxyType({}),
    defaults: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Write every setting with its accepted values, default and meaning, grouped by section.

    Args:
        leave_out: says of a key whether it is not shown.
        short: keys of settings by their other names.
        defaults: what is shown in a default's place, by key.
    """
    lines = ["settings (in the TOML file, or on the command line as --SECTION.NAME VALUE):"]
    also = {key: f", --{name.replace('_', '-')}" for name, key in short.items()}
    for section, names in sections().items():
        shown = [s for n in names if not leave_out((s := settings()[f"{section}.{n}" if section else n]).key)]
        lines += ["", f"[{section}]" if section else "top level"] if shown else []
        for setting in shown:
            lines += help_lines(setting, also.get(setting.key, ""), defaults.get(setting.key))
            if setting.registry is not None:
                lines.append(f"      Parameters, as --{setting.key}.NAME: see `areal-agents algorithms`.")
    return "\n".join(lines)


def help_lines(setting: Setting, also: str = "", instead: str | None = None) -> list[str]:
    """Write the help of one setting, as lines.

    ``also`` is its other name. ``instead`` is shown in its default's place.
    """
    default = "" if setting.info.is_required() else f"; default: {instead or shown_default(setting.default)}"
    first = f"  --{setting.key}{also}  ({setting.expects}{default})"
    return [first, *(f"      {line}" for line in (setting.info.description or "").splitlines())]


def shown_default(value: Any) -> str:
    """Write a default as help and the catalogue show it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case tuple():
            return str(list(value))
        case Choice():
            return value.kind
    return str(value)
