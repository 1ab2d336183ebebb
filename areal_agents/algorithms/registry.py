"""The registries of algorithms by name.

They know ours, those of installed packages, and ``module:function``.

    algorithm.advantage    ADVANTAGES     a group's rewards ─▶ advantages, one tensor [K] an episode
    algorithm.loss         LOSSES         log π, log of the old policy, advantages ─▶ LossTerms, [T]
    algorithm.correction   CORRECTIONS    any of log π, log μ, log p ─▶ Correction, [T]

An algorithm is one function. Its keyword-only arguments are its parameters: their names, types and defaults are the
settings' names, types and defaults. A package makes its own known by an entry point of the registry's group:

    [project.entry-points."areal_agents.advantages"]
    clipped_return = "my_package:clipped_return"

Reading this file imports no algorithm, and so not torch. A function is imported when it is used or given a parameter.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from areal_agents.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Choice:
    """One algorithm, by its name, with the parameters that are not its defaults."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Parameters(BaseModel):
    """The base of every algorithm's parameters (see ``Registry.parameters``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Registry:
    """The algorithms that one setting chooses from."""

    def __init__(
        self, key: str, what: str, *, group: str, builtin: Mapping[str, str], given: tuple[str, ...], all_given: bool
    ) -> None:
        """Declare a registry.

        Args:
            key: dotted name of the setting.
            what: what one algorithm of it is, for messages.
            group: entry points of this group are found by their names.
            builtin: ``module:function`` by name.
            given: the positional arguments that the trainer passes, by name.
            all_given: an algorithm takes all of them; else it takes those that it names.
        """
        self.key, self.what, self.group = key, what, group
        self.given, self._all_given = given, all_given
        self._builtin = dict(builtin)

    def names(self) -> list[str]:
        """Return the known names: ours first, then those of installed packages.

        Imports nothing.
        """
        return [*self._builtin, *sorted({e.name for e in self._entry_points()} - self._builtin.keys())]

    def function(self, kind: str) -> Callable[..., Any]:
        """Import the algorithm ``kind``.

        Raises ConfigError where there is none, or none that fits this registry.
        """
        found: Any = _import(self._place(kind), f"{self.key}.kind = {kind!r}")
        self._require_signature(kind, found)
        algorithm: Callable[..., Any] = found
        return algorithm

    def parameters(self, kind: str) -> type[Parameters]:
        """Read the parameters of ``kind`` off its signature, as a pydantic model.

        Raises ConfigError as ``function`` does.
        """
        function = self.function(kind)
        hints = typing.get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {}
        for p in inspect.signature(function).parameters.values():
            if p.kind is p.KEYWORD_ONLY:
                fields[p.name] = (hints[p.name], ... if p.default is p.empty else p.default)
        return create_model(kind.replace(":", "."), __base__=Parameters, **fields)

    def read(self, value: Any) -> Any:
        """Make a Choice of a name, or of a table with ``kind`` and parameters.

        What is neither is returned as it is: pydantic says what is wrong with it. Raises ValueError with every problem.
        """
        if isinstance(value, str):
            value = Choice(value)
        if isinstance(value, Mapping):
            value = Choice(str(value.get("kind", "")), {k: v for k, v in value.items() if k != "kind"})
        if isinstance(value, Choice):
            try:
                self.require(value.kind)
                known = self.parameters(value.kind).model_fields if value.options else {}
            except ConfigError as error:
                raise ValueError(str(error)) from error
            if unknown := [name for name in value.options if name not in known]:
                raise ValueError("; ".join(self.unknown(value.kind, name) for name in unknown))
            try:
                return self.choose(value.kind, value.options)
            except ValidationError as error:
                problems = [f"{self.key}.{e['loc'][0]} = {e['input']!r}: {e['msg']}" for e in error.errors()]
                raise ValueError("; ".join(problems)) from error
        return value

    def require(self, kind: str) -> None:
        """Raise ConfigError where there is no ``kind``.

        What is not ours is imported, and must fit.
        """
        self._place(kind)
        if kind not in self._builtin:
            self.parameters(kind)

    def choose(self, kind: str, options: Mapping[str, Any]) -> Choice:
        """Make the choice of ``kind`` with ``options``.

        It keeps the options that are not the defaults, so that equal choices are equal. Ours without parameters are not
        imported: their defaults are right. Raises pydantic's ValidationError.
        """
        if options or kind not in self._builtin:
            model = self.parameters(kind)
            fields = model.model_fields
            options = {k: v for k, v in model.model_validate(dict(options)) if v != fields[k].default}
        return Choice(kind, options)

    def unknown(self, kind: str, parameter: str) -> str:
        """Write that ``kind`` has no ``parameter``, which parameters it has, and which kind has that one."""
        owners = [k for k in self._builtin if parameter in self.parameters(k).model_fields]
        own = list(self.parameters(kind).model_fields)
        known = ", ".join(own) or "none"
        if owners:
            hint = f"; {parameter} belongs to kind = {' or '.join(map(repr, owners))}"
        else:
            hint = "".join(f": did you mean {n}?" for n in difflib.get_close_matches(parameter, own, n=1))
        return f"{self.key}.{parameter} is no parameter of {self.key}.kind = {kind!r}, which has {known}{hint}"

    def options(self, choice: Choice) -> dict[str, Any]:
        """Return every parameter of ``choice``, defaults included.

        Raises ConfigError where one is wrong.
        """
        try:
            return dict(self.parameters(choice.kind).model_validate(dict(choice.options)))
        except ValidationError as error:
            raise ConfigError(f"{self.key}.kind = {choice.kind!r}: {error}") from error

    def table(self, choice: Choice) -> dict[str, Any]:
        """Return ``choice`` as the table that ``read`` reads, defaults included."""
        return {"kind": choice.kind, **self.options(choice)}

    def bound(self, choice: Choice) -> Callable[..., Any]:
        """Return the function of ``choice`` with its parameters bound."""
        function, options = self.function(choice.kind), self.options(choice)
        return lambda *args, **kwargs: function(*args, **kwargs, **options)

    def takes(self, choice: Choice) -> tuple[str, ...]:
        """Return the names in ``given`` that the function of ``choice`` takes, in its order."""
        return _positional(self.function(choice.kind))

    def _place(self, kind: str) -> str:
        """Find the ``module:function`` of ``kind``.

        Raises ConfigError for an unknown name, or one that two packages use.
        """
        places = sorted({e.value for e in self._entry_points() if e.name == kind})
        if kind in self._builtin:
            if places:
                raise ConfigError(
                    f"{self.key}.kind = {kind!r}: {', '.join(places)} uses a name of ours: rename it there"
                )
            return self._builtin[kind]
        if len(places) > 1:
            raise ConfigError(f"{self.key}.kind = {kind!r}: several packages use that name: {', '.join(places)}")
        if places:
            return places[0]
        if ":" in kind:
            return kind
        names = self.names()
        near = difflib.get_close_matches(kind, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"{self.key}.kind = {kind!r}: no such {self.what}; {hint} (or give module:function)")

    def _entry_points(self) -> list[importlib.metadata.EntryPoint]:
        return list(importlib.metadata.entry_points(group=self.group))

    def _require_signature(self, kind: str, found: Any) -> None:
        """Raise ConfigError unless ``found`` takes what the trainer passes, and every parameter has a type."""
        where = f"{self.key}.kind = {kind!r}"
        if not callable(found):
            raise ConfigError(f"{where} is {found!r}: an algorithm is a function")
        takes = _positional(found)
        if (takes != self.given) if self._all_given else not set(takes) <= set(self.given):
            how = "takes" if self._all_given else "takes some of"
            raise ConfigError(
                f"{where} takes ({', '.join(takes)}): an algorithm of {self.key} {how} ({', '.join(self.given)}), and "
                "its own parameters by keyword, after a *"
            )
        for p in inspect.signature(found).parameters.values():
            if p.kind is p.KEYWORD_ONLY and p.annotation is p.empty:
                raise ConfigError(f"{where}: its parameter {p.name!r} needs a type hint, which says what may be set")


def _positional(function: Callable[..., Any]) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds)


def _import(place: str, where: str) -> Any:
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(f"{where}: {place} cannot be imported: {type(error).__name__}: {error}") from error


ADVANTAGES = Registry(
    "algorithm.advantage",
    "advantage estimator",
    group="areal_agents.advantages",
    builtin={
        "turn_return": "areal_agents.algorithms.advantages:turn_return",
        "grpo": "areal_agents.algorithms.advantages:grpo",
    },
    given=("group",),
    all_given=True,
)
"""From a group's rewards to advantages: ``advantages.py``."""

LOSSES = Registry(
    "algorithm.loss",
    "policy loss",
    group="areal_agents.losses",
    builtin={"ppo": "areal_agents.algorithms.losses:ppo"},
    given=("logprobs_T", "old_logprobs_T", "advantages_T"),
    all_given=True,
)
"""From log-probabilities and advantages to a loss a token: ``losses.py``."""

CORRECTIONS = Registry(
    "algorithm.correction",
    "off-policy correction",
    group="areal_agents.corrections",
    builtin={
        "bypass": "areal_agents.algorithms.offpolicy:bypass",
        "decoupled": "areal_agents.algorithms.offpolicy:decoupled",
    },
    given=("logprobs_T", "behaviour_T", "proximal_T"),
    all_given=False,
)
"""From distances between policies to a weight a token: ``offpolicy.py``. One that takes ``proximal_T`` costs a forward
pass without gradient a batch, and the loss then takes its ratio to that policy instead of to the sampler."""

REGISTRIES = {r.key: r for r in (ADVANTAGES, LOSSES, CORRECTIONS)}
"""By the setting that chooses."""
