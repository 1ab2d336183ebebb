"""The registries of algorithms by name.

They know ours, those of installed packages, and ``module:function``.

    algorithm.advantage    ADVANTAGES     a group's rewards ─▶ advantages, one tensor [K] an episode
    algorithm.loss         LOSSES         log π, log of the old policy, advantages ─▶ LossTerms, [T]
    algorithm.correction   CORRECTIONS    any of log π, log μ, log p ─▶ Correction, [T]
    algorithm.mask         MASKS          log π, log μ ─▶ what is kept, [T]

An algorithm is one function. Its keyword-only arguments are its parameters: their names, types and defaults are the
settings' names, types and defaults. A package makes its own known by an entry point of the registry's group:

    [project.entry-points."areal_agents.advantages"]
    clipped_return = "my_package:clipped_return"

Reading this file imports no algorithm, and so not torch. A function is imported when it is used or given a parameter.
"""

from __future__ import annotations

import difflib
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from areal_agents.algorithms.signature import Parameters, load_function, positional, read_parameters, require_signature
from areal_agents.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Choice:
    """One algorithm, by its name, with the parameters that are not its defaults."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Registry:
    """The algorithms that one setting chooses from."""

    def __init__(
        self,
        key: str,
        what: str,
        *,
        group: str,
        builtin: Mapping[str, str],
        given: tuple[str, ...],
        required: tuple[str, ...] = (),
        one: bool = False,
    ) -> None:
        """Declare a registry.

        Args:
            key: dotted name of the setting.
            what: what one algorithm of it is, for messages.
            group: entry points of this group are found by their names.
            builtin: ``module:function`` by name.
            given: the positional arguments that the trainer can pass, by name; an algorithm takes those that it names.
            required: those of them that every algorithm takes.
            one: whether an algorithm takes exactly one of them.
        """
        self.key, self.what, self.group = key, what, group
        self.given, self._required, self._one = given, required, one
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
        where = f"{self.key}.kind = {kind!r}"
        found = load_function(*self._place(kind), where)
        require_signature(found, where, key=self.key, given=self.given, required=self._required, one=self._one)
        return found

    def parameters(self, kind: str) -> type[Parameters]:
        """Read the parameters of ``kind`` off its signature, as a pydantic model.

        Raises ConfigError as ``function`` does.
        """
        return read_parameters(self.function(kind), f"{self.key}.kind = {kind!r}")

    def read(self, value: Any) -> Any:
        """Make a Choice of a name, or of a table with ``kind`` and parameters.

        What is neither is returned as it is: pydantic says what is wrong with it. Raises ValueError with every problem.
        """
        if isinstance(value, str):
            value = Choice(value)
        if isinstance(value, Mapping):
            if not isinstance(value.get("kind"), str):
                raise ValueError(f"{self.key} = {dict(value)!r} needs a kind: one of {', '.join(self.names())}")
            value = Choice(value["kind"], {str(k): v for k, v in value.items() if k != "kind"})
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
        return positional(self.function(choice.kind))

    def builtin(self) -> list[str]:
        """Return the names that are ours."""
        return list(self._builtin)

    def _place(self, kind: str) -> tuple[str, str]:
        """Find the module and the attribute of ``kind``.

        Raises ConfigError for an unknown name, or one that two packages use.
        """
        entries = {e.value: e for e in self._entry_points() if e.name == kind}
        if kind in self._builtin:
            if entries:
                raise ConfigError(
                    f"{self.key}.kind = {kind!r}: {', '.join(entries)} uses a name of ours: rename it there"
                )
            return _parted(self._builtin[kind])
        if len(entries) > 1:
            several = ", ".join(sorted(entries))
            raise ConfigError(f"{self.key}.kind = {kind!r}: several packages use that name: {several}")
        for entry in entries.values():
            return entry.module, entry.attr
        if ":" in kind:
            return _parted(kind)
        names = self.names()
        near = difflib.get_close_matches(kind, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"{self.key}.kind = {kind!r}: no such {self.what}; {hint} (or give module:function)")

    def _entry_points(self) -> list[importlib.metadata.EntryPoint]:
        return _installed(self.group, tuple(sys.path))


@functools.lru_cache(maxsize=64)
def _installed(group: str, path: tuple[str, ...]) -> list[importlib.metadata.EntryPoint]:
    """Read the entry points of a group in all packages on ``path``, once: a check of settings asks a hundred times."""
    return list(importlib.metadata.entry_points(group=group))


def _parted(place: str) -> tuple[str, str]:
    module, _, attribute = place.partition(":")
    return module, attribute


ADVANTAGES = Registry(
    "algorithm.advantage",
    "advantage estimator",
    group="areal_agents.advantages",
    builtin={
        "turn_return": "areal_agents.algorithms.turn_credit:turn_return",
        "grpo": "areal_agents.algorithms.advantages:grpo",
        "dr_grpo": "areal_agents.algorithms.advantages:dr_grpo",
        "rloo": "areal_agents.algorithms.advantages:rloo",
        "reinforce_pp": "areal_agents.algorithms.advantages:reinforce_pp",
        "remax": "areal_agents.algorithms.advantages:remax",
        "opo": "areal_agents.algorithms.advantages:opo",
        "opob": "areal_agents.algorithms.advantages:opob",
        "pass_at_k": "areal_agents.algorithms.advantages:pass_at_k",
        "maxrl": "areal_agents.algorithms.advantages:maxrl",
        "kevin": "areal_agents.algorithms.turn_credit:kevin",
        "gigpo": "areal_agents.algorithms.turn_credit:gigpo",
        "mt_grpo": "areal_agents.algorithms.turn_credit:mt_grpo",
        "grpo_process": "areal_agents.algorithms.turn_credit:grpo_process",
        "gae": "areal_agents.algorithms.value_advantages:gae",
        "turn_gae": "areal_agents.algorithms.value_advantages:turn_gae",
        "bilevel_gae": "areal_agents.algorithms.value_advantages:bilevel_gae",
    },
    given=("group", "groups"),
    one=True,
)
"""From the episodes of a group (or of all groups of a batch) to advantages: ``advantages.py``, ``turn_credit.py``."""

LOSSES = Registry(
    "algorithm.loss",
    "policy loss",
    group="areal_agents.losses",
    builtin={
        "ppo": "areal_agents.algorithms.losses:ppo",
        "gspo": "areal_agents.algorithms.sequence_losses:gspo",
        "gspo_token": "areal_agents.algorithms.sequence_losses:gspo_token",
        "cispo": "areal_agents.algorithms.losses:cispo",
        "sapo": "areal_agents.algorithms.losses:sapo",
        "gmpo": "areal_agents.algorithms.sequence_losses:gmpo",
        "dppo_tv": "areal_agents.algorithms.losses:dppo_tv",
        "reinforce": "areal_agents.algorithms.losses:reinforce",
    },
    given=("logprobs_T", "old_logprobs_T", "advantages_T", "behaviour_T", "episodes_T", "turns_T"),
    required=("logprobs_T",),
)
"""From log-probabilities and advantages to a loss a token: ``losses.py``."""

CORRECTIONS = Registry(
    "algorithm.correction",
    "off-policy correction",
    group="areal_agents.corrections",
    builtin={
        "bypass": "areal_agents.algorithms.offpolicy:bypass",
        "decoupled": "areal_agents.algorithms.offpolicy:decoupled",
        "kept": "areal_agents.algorithms.offpolicy:kept",
        "log_linear": "areal_agents.algorithms.offpolicy:log_linear",
        "importance": "areal_agents.algorithms.offpolicy:importance",
    },
    given=("logprobs_T", "behaviour_T", "proximal_T", "advantages_T", "ages_T", "episodes_T", "turns_T"),
)
"""From distances between policies to a weight a token: ``offpolicy.py``. One that takes ``proximal_T`` costs a forward
pass without gradient a batch, and the loss then takes its ratio to that policy instead of to the sampler."""

MASKS = Registry(
    "algorithm.mask",
    "off-policy mask",
    group="areal_agents.masks",
    builtin={
        "none": "areal_agents.algorithms.masks:none",
        "sequence": "areal_agents.algorithms.masks:sequence",
        "geometric": "areal_agents.algorithms.masks:geometric",
        "trust_region": "areal_agents.algorithms.masks:trust_region",
        "m2po": "areal_agents.algorithms.masks:m2po",
        "opsm": "areal_agents.algorithms.masks:opsm",
    },
    given=("logprobs_T", "behaviour_T", "advantages_T", "ages_T", "episodes_T", "turns_T", "noise_T"),
)
"""From the distance between the current policy and the sampler to what is kept, bool [T]: ``masks.py``. One that takes
``noise_T`` costs a forward pass without gradient once in a run, unless it says that it leaves it (``leaves_noise``)."""

NO_MASK = Choice("none")
READ_VALUES = ("gae", "turn_gae", "bilevel_gae")
"""The advantage estimators of ours that read a critic's values."""


def needs_critic(kind: str) -> bool:
    """Say whether the advantage estimator ``kind`` reads a critic's values.

    Ours are not imported for it. Raises ConfigError where another one cannot be.
    """
    if kind in ADVANTAGES.builtin():
        return kind in READ_VALUES
    return bool(getattr(ADVANTAGES.function(kind), "reads_values", False))


def kept_decay(correction: Choice) -> float | None:
    """Return β of the average of policies that the correction has kept as p, or None where nothing is kept.

    A correction declares it by ``offpolicy.keeps_proximal``. Raises ConfigError where it names no parameter of its own.
    """
    name = getattr(CORRECTIONS.function(correction.kind), "proximal_decay", None)
    if name is None:
        return None
    options = CORRECTIONS.options(correction)
    if name not in options:
        raise ConfigError(
            f"{CORRECTIONS.key}.kind = {correction.kind!r}: @keeps_proximal({name!r}) names none of its parameters, "
            f"which are {', '.join(options) or 'none'}"
        )
    return None if options[name] is None else float(options[name])


REGISTRIES = {r.key: r for r in (ADVANTAGES, LOSSES, CORRECTIONS, MASKS)}
"""By the setting that chooses."""
