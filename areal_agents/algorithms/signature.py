"""Reading an algorithm's signature: what it takes, and its parameters as a pydantic model.

The functions are foreign code. Whatever is wrong with one is a ConfigError that names it.
"""

from __future__ import annotations

import functools
import inspect
import math
import typing
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.errors import PydanticUserError

from areal_agents.errors import ConfigError
from areal_agents.utils.foreign import import_foreign


class Parameters(BaseModel):
    """The base of every algorithm's parameters (see ``read_parameters``)."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )


def load_function(module: str, attribute: str, where: str) -> Callable[..., Any]:
    """Import ``attribute`` of ``module``, which must be a plain function.

    ``where`` begins the message of the ConfigError.
    """
    try:
        found: Any = functools.reduce(getattr, attribute.split("."), import_foreign(module))
    except Exception as error:
        raise ConfigError(
            f"{where}: {module}:{attribute} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    plain = inspect.unwrap(found) if callable(found) else found
    if not isinstance(plain, FunctionType):
        raise ConfigError(f"{where} is {type(found).__name__} {attribute}: an algorithm is a Python function")
    if inspect.iscoroutinefunction(plain) or inspect.isgeneratorfunction(plain) or inspect.isasyncgenfunction(plain):
        raise ConfigError(f"{where}: an algorithm is a plain function that returns its result; {attribute} is not one")
    return cast("Callable[..., Any]", found)


def positional(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments that the trainer passes, in their order."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)


def require_signature(
    function: Callable[..., Any],
    where: str,
    *,
    key: str,
    given: tuple[str, ...],
    required: tuple[str, ...] = (),
    one: bool = False,
) -> None:
    """Raise ConfigError unless the trainer can call ``function``.

    Args:
        function: the algorithm.
        where: begins the message.
        key: the setting that chooses it.
        given: the arguments that the trainer can pass, by name. It passes those that the function names.
        required: those of them that the function must take.
        one: the function takes exactly one of them.
    """
    takes = positional(function)
    fits = bool(takes) and set(required) <= set(takes) <= set(given) and (not one or len(takes) == 1)
    if not fits:
        how = "takes one of" if one else "takes some of"
        needed = f" ({', '.join(required)} always)" if required else ""
        raise ConfigError(
            f"{where} takes ({', '.join(takes)}): an algorithm of {key} {how} ({', '.join(given)}){needed}, and "
            "its own parameters by keyword, after a *"
        )
    for p in inspect.signature(function).parameters.values():
        if p.kind not in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD):
            raise ConfigError(f"{where}: {p} is an argument by position alone or of any name: name each one")
        if p.kind is p.KEYWORD_ONLY and p.annotation is p.empty:
            raise ConfigError(f"{where}: its parameter {p.name!r} needs a type hint, which says what may be set")
        if p.kind is p.KEYWORD_ONLY and (p.name == "kind" or hasattr(BaseModel, p.name)):
            raise ConfigError(f"{where}: a parameter cannot be called {p.name!r}: rename it")


def read_parameters(function: Callable[..., Any], where: str) -> type[Parameters]:
    """Make a pydantic model of the parameters of ``function``: its keyword-only arguments.

    Raises ConfigError for a hint that cannot be read, and for a default that the hint does not allow or that a file
    cannot hold. ``where`` begins its message.
    """
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    annotations = {p.name: p.annotation for p in own}
    try:
        holder = type("holder", (), {"__annotations__": annotations})
        namespace = cast("FunctionType", inspect.unwrap(function)).__globals__
        hints = typing.get_type_hints(holder, globalns=namespace, include_extras=True)
        fields: dict[str, Any] = {p.name: (hints[p.name], ... if p.default is p.empty else p.default) for p in own}
        model = create_model("Parameters", __base__=Parameters, **fields)
    except (NameError, TypeError, ValueError, AttributeError, SyntaxError, PydanticUserError) as error:
        raise ConfigError(f"{where}: its type hints cannot be read: {type(error).__name__}: {error}") from error
    for p in own:
        if hints[p.name] is Any or (hints[p.name] is not Any and model.model_fields[p.name].alias is not None):
            raise ConfigError(f"{where}: its parameter {p.name!r} needs a type hint that says what may be set")
        if p.default is not p.empty:
            _require_default(model, p.name, p.default, where)
    return model


def _require_default(model: type[Parameters], name: str, default: Any, where: str) -> None:
    """Raise ConfigError unless the default is a value that could be set, and that config.toml can hold."""
    info = model.model_fields[name]
    fields: dict[str, Any] = {name: (info.annotation, info)}
    alone = create_model("Parameter", __base__=Parameters, **fields)
    try:
        value = getattr(alone(), name)
    except ValidationError as error:
        told = error.errors()[0]["msg"]
        raise ConfigError(f"{where}: the default {name} = {default!r} could not be set: {told}") from error
    if not _is_plain(default, top=True) or value != default:
        raise ConfigError(
            f"{where}: the default {name} = {default!r} cannot be written in a file: use a number, a text, a boolean, "
            "None, or a tuple of these without None"
        )


def _is_plain(value: Any, *, top: bool) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(v, top=False) for v in value)
    if type(value) is float:
        return math.isfinite(value)
    return type(value) in (bool, int, str) or (top and value is None)
