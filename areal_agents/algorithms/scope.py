"""The scope of a loss or a correction: which tokens it has to see at once.

A token's loss may depend on that token alone (PPO), on all sampled tokens of its episode (a sequence-level ratio), or
on all of its minibatch (a bound on a mean). The learner calls a function on as few tokens as its scope allows: the
wider the scope, the more is computed twice (``learner/passes.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from areal_agents.algorithms.signature import positional
from areal_agents.errors import ConfigError

Scope = Literal["token", "episode", "minibatch"]
"""From the narrowest to the widest."""
F = TypeVar("F", bound=Callable[..., Any])
_PLACES = {"episodes_T", "turns_T"}


def sees(scope: Scope, *, alone: Mapping[str, Sequence[Any]] | None = None) -> Callable[[F], F]:
    """Make a decorator that declares the scope of a loss, a correction or a mask. Without it, it is ``token``.

    ``episode``: it is called with all sampled tokens of an episode at once, over all its rows, perhaps with those of
    other episodes. ``minibatch``: with all sampled tokens of a minibatch. ``alone`` names values of its parameters with
    which it takes each token alone, and its scope is ``token`` after all.
    """

    def declare(function: F) -> F:
        function.sees, function.alone = scope, alone or {}  # type: ignore[attr-defined]
        return function

    return declare


def scope_of(function: Callable[..., Any], where: str, options: Mapping[str, Any] | None = None) -> Scope:
    """Return the declared scope of ``function`` with the parameters ``options``.

    Raises ConfigError, which ``where`` begins, for an unknown scope, and where it takes tokens' places in their
    episodes but is called with some of an episode's tokens only.
    """
    scope: Scope = getattr(function, "sees", "token")
    alone: Mapping[str, Sequence[Any]] = getattr(function, "alone", {})
    if any(name in (options or {}) and (options or {})[name] in values for name, values in alone.items()):
        return "token"
    if scope not in get_args(Scope):
        raise ConfigError(f"{where}: @sees({scope!r}) must be one of {', '.join(map(repr, get_args(Scope)))}")
    if scope == "token" and (places := sorted(_PLACES & set(positional(function)))):
        raise ConfigError(
            f"{where} takes {' and '.join(places)}, so it needs all tokens of an episode at once: declare it with "
            '@sees("episode") or @sees("minibatch") (areal_agents.algorithms.scope)'
        )
    return scope


def widest(*scopes: Scope) -> Scope:
    """Return the widest of some scopes."""
    return max(scopes, key=get_args(Scope).index)
