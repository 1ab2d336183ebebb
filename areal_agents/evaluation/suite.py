"""A suite: a named and versioned list of evaluations, as a TOML file says it.

    name = "mine"
    version = 1

    [[entries]]
    env = "areal/Hanoi-v0"
    difficulty = 0.0
    n = 64
    k = 2
    seeds = [0, 100]
    sampling = { temperature = 0.7, max_turn_tokens = 64 }

What decides the numbers stands in the file, so that two people who name one suite mean the same.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.resources
import itertools
import re
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from areal_agents import registry
from areal_agents.errors import ArealError, ConfigError
from areal_agents.settings.config import RolloutConfig
from areal_agents.settings.describe import either
from areal_agents.settings.section import Count, Fraction, Section
from areal_agents.utils.foreign import contained
from areal_agents.utils.short_text import described

SUITE_GROUP = "areal_agents.suites"
"""The entry points of suites that other packages have."""
MEAN = "mean"
"""What the mean over the entries is called, so that no entry may be."""
_ROLLOUT = RolloutConfig()
_NAME = re.compile(r"[\w.+-][\w.+ -]*")


class SuiteSampling(Section):
    """How the turns of an entry are sampled."""

    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy."""
    max_turn_tokens: Count = _ROLLOUT.max_turn_tokens
    """Most tokens the model may sample in one turn."""
    max_episode_tokens: int | None = Field(default=None, ge=1)
    """Most tokens in one episode; none: what ``max_turns`` full turns have."""


class SuiteEntry(Section):
    """One line of a suite: an environment, which of its tasks, and how they are played."""

    env: str = Field(min_length=1)
    """A registered id or ``module:Class``."""
    name: str = ""
    """What the table calls it; the environment's own name where none is given."""
    split: str = "test"
    """The environment's split."""
    difficulty: Fraction | None = None
    """The environment's default where none is given."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the environment."""
    n: Count
    """Tasks."""
    task_seed: int | None = Field(default=0, ge=0)
    """Which tasks: a sample of the split. none: its first ``n``."""
    k: Count = 1
    """Attempts a task, of each seed."""
    seeds: tuple[int, ...] = (0,)
    """Of environments and sampling. Each is one evaluation; their attempts count together."""
    max_turns: Count = _ROLLOUT.max_turns
    """The runner's own limit on turns."""
    sampling: SuiteSampling = SuiteSampling()
    overlap: str = "refuse"
    """What to do where the environment's training split has one of the tasks: ``refuse``, or ``tell``."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = {k: None if v == "none" and k in ("task_seed", "difficulty") else v for k, v in data.items()}
        if not data.get("name") and isinstance(data.get("env"), str):
            data["name"] = re.split(r"[/:]", data["env"])[-1]
        return data

    @field_validator("name")
    @classmethod
    def _short(cls, name: str) -> str:
        if name == MEAN or _NAME.fullmatch(name) is None or len(name) > 60:
            raise ValueError(f"write at most 60 letters, digits, dots, dashes and spaces, and not {MEAN!r}")
        return name

    @field_validator("overlap")
    @classmethod
    def _known(cls, overlap: str) -> str:
        if overlap not in ("refuse", "tell"):
            raise ValueError("it is 'refuse' or 'tell'")
        return overlap

    @model_validator(mode="after")
    def _apart(self) -> SuiteEntry:
        """Attempt i of seed s plays with seed s + i: seeds that are near share attempts, which count as one."""
        seeds = sorted(self.seeds)
        if not seeds or seeds[0] < 0:
            raise ValueError("seeds are one or more whole numbers from 0 on")
        for low, high in itertools.pairwise(seeds):
            if high - low < self.k:
                raise ValueError(
                    f"seeds {low} and {high} with k = {self.k} share attempts (attempt i of seed s is played with "
                    f"s + i): put them at least {self.k} apart"
                )
        return self


class Suite(Section):
    """A named and versioned list of evaluations."""

    name: str
    version: Count
    """Raised with every change that moves numbers."""
    description: str = ""
    entries: tuple[SuiteEntry, ...] = Field(min_length=1)

    @field_validator("name")
    @classmethod
    def _short(cls, name: str) -> str:
        if _NAME.fullmatch(name) is None or len(name) > 60:
            raise ValueError("write at most 60 letters, digits, dots, dashes and spaces")
        return name

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        twice = [name for name, count in Counter(e.name for e in self.entries).items() if count > 1]
        if twice:
            raise ValueError(f"several entries are called {either(twice)}: give each a name of its own")
        return self

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"

    def entry(self, name: str) -> SuiteEntry:
        """Return the entry called ``name``. Raises ConfigError, with the nearest names, where there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        names = [e.name for e in self.entries]
        near = _near(name, names)
        said = f"did you mean {either(near)}?" if near else f"it has {', '.join(names)}"
        raise ConfigError(f"suite {self} has no entry {name!r}: {said}")


def shipped_suites() -> dict[str, Path]:
    """Return the suites that come with the package, by name."""
    root = importlib.resources.files("areal_agents.configs") / "suites"
    return {f.name.removesuffix(".toml"): Path(str(f)) for f in root.iterdir() if f.name.endswith(".toml")}


def installed_suites() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return the suites of installed packages, by name: the entry points of ``areal_agents.suites``.

    An entry point is named as its suite is, and its value is the package (a folder) that holds ``NAME.toml``.
    """
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for entry in importlib.metadata.entry_points(group=SUITE_GROUP):
        others = found.setdefault(entry.name, [])
        if all((other.value, _owner(other)) != (entry.value, _owner(entry)) for other in others):
            others.append(entry)
    return found


def _named(text: str) -> tuple[Path, bool]:
    """Return the file of the suite called ``text``, and whether it is an installed package's.

    Raises ConfigError where there is no such suite, or two packages have one.
    """
    shipped, installed = shipped_suites(), installed_suites()
    entries = installed.get(text, [])
    if text in shipped:
        if entries:
            said = f"the suite {text!r} of {_owner(entries[0])} is not played, but the shipped one: rename it"
            warnings.warn(said, stacklevel=3)
        return shipped[text], False
    if not entries:
        raise ConfigError(_unknown(text, [*shipped, *installed]))
    if len(entries) > 1:  # two people who name one suite mean the same
        raise ConfigError(f"{' and '.join(map(_owner, entries))} each have a suite {text!r}: rename all but one")
    return _file_of(entries[0]), True


def _owner(entry: importlib.metadata.EntryPoint) -> str:
    return "an unknown distribution" if entry.dist is None else entry.dist.name


def _file_of(entry: importlib.metadata.EntryPoint) -> Path:
    """Return the file of an installed suite. Raises ConfigError where its package cannot be imported or lacks it."""
    where = f"suite {entry.name!r} of {_owner(entry)}"
    try:
        with contained():
            path = Path(str(importlib.resources.files(entry.value) / f"{entry.name}.toml"))
    except Exception as error:  # a boundary: the author's package may raise anything
        raise ConfigError(
            f"{where}: {entry.value!r} cannot be imported as a package ({described(error)}). The entry point's value "
            f"is the one that holds {entry.name}.toml"
        ) from error
    if not path.is_file():
        raise ConfigError(f"{where}: the package {entry.value!r} has no file {entry.name}.toml")
    return path


def is_suite(text: str) -> bool:
    """Say whether what ``eval`` was given is a suite and no environment.

    A suite is a ``.toml`` file or a name; an environment's id has a slash, and ``module:Class`` a colon.
    """
    return text.endswith(".toml") or (bool(text) and not set("/:\\") & set(text))


def load_suite(text: str) -> Suite:
    """Read a suite, which is a ``.toml`` file, or the name of a shipped or an installed one.

    Raises ConfigError with every problem of the file, or with the nearest names where there is no such suite.
    """
    known = shipped_suites()
    path, foreign = Path(text).expanduser(), False
    if text.endswith(".toml") and not path.is_file() and path.parent == Path() and path.stem in known:
        path = known[path.stem]
    elif not text.endswith(".toml"):
        path, foreign = _named(text)
    if not path.is_file():
        near = _near(path.name, [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else [])
        said = f"did you mean {either([str(path.parent / n) for n in near])}?" if near else _shipped(known)
        raise ConfigError(f"no such suite: {text}. {said[0].upper()}{said[1:]}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    try:
        suite = Suite.model_validate(table)
        if foreign and suite.name != text:
            raise ConfigError(f"suite {path}: its name is {suite.name!r}, and its entry point's {text!r}: write one")
        return suite
    except ValidationError as error:
        problems = [_sentence(e) for e in error.errors()]
        if len(problems) == 1:
            raise ConfigError(f"suite {path}: {problems[0]}") from None
        listed = "".join(f"\n  - {p}" for p in problems)
        raise ConfigError(f"suite {path}: {len(problems)} problems:{listed}") from None


def _sentence(error: Any) -> str:
    """Write one of pydantic's errors with the place that a reader of the file knows."""
    place, kind = list(error["loc"]), error["type"]
    where = ""
    for part in place:
        where += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if where else str(part)
    if kind == "extra_forbidden":
        kinds: dict[int, type[Section]] = {0: Suite, 2: SuiteEntry}
        cls = kinds.get(len(place) - 1, SuiteSampling)
        near = _near(str(place[-1]), list(cls.model_fields))
        hint = f"did you mean {either(near)}?" if near else f"it may have {', '.join(cls.model_fields)}"
        return f"unknown key {where}: {hint}"
    if kind == "missing":
        return f"{where} is missing"
    said = str(error["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(error["input"], Mapping) else f" = {error['input']!r}"
    return f"{where}{given}: {said[0].lower()}{said[1:]}" if where else said


def _near(wrong: str, known: list[str]) -> list[str]:
    by_lower = {name.lower(): name for name in known}
    return [by_lower[n] for n in difflib.get_close_matches(wrong.lower(), by_lower, n=3, cutoff=0.6)]


def _shipped(known: Iterable[str]) -> str:
    return f"known suites: {', '.join(sorted(known))}"


def _unknown(text: str, known: Sequence[str]) -> str:
    """Say that ``text`` names neither a suite nor an environment, and what it may have meant."""
    near = _near(text, list(known))
    own = {re.split(r"[/:]", spec.id)[-1]: spec.id for spec in _environments()}
    near += [id for id in _environments_near(text, own) if id not in near]
    said = f" (did you mean {either(near)}?)" if near else ""
    return (
        f"unknown suite {text!r}{said}; {_shipped(known)}. A suite is one of these names or a .toml file; an "
        "environment's id has a slash (areal/Arithmetic-v0) or is module:Class (`areal-agents envs` lists them)"
    )


def _environments_near(text: str, own: Mapping[str, str]) -> list[str]:
    bare = {re.sub(r"-v\d+$", "", name): id for name, id in own.items()}
    by_name = {**bare, **own, **{id: id for id in own.values()}}
    return list(dict.fromkeys(by_name[name] for name in _near(text, list(by_name))))


def _environments() -> list[registry.EnvSpec]:
    try:
        return registry.specs()
    except ArealError:  # what is wrong with somebody's package is no answer to a typo
        return []
