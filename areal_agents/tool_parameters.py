"""The parameters of a tool's function: which the model gives, and which the environment passes.

    self, *, env      the environment that the episode plays in
    *, state          its ``state``, which is the episode's own
    *, sandbox        the episode's sandbox, also by the annotation ``Sandbox``
    *, models         the environment's models by name, also by the annotation ``Mapping[str, ChatModel]``
    *, x: Outputs     the episode's long outputs (``tool_outputs.py``), by the annotation alone
    *, x: Resources   what the episode's tools keep open (``tool_resources.py``), by the annotation alone

What the environment passes is keyword-only (but for ``self``), in no schema, and nothing that a model can set.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.errors import PydanticUserError

from areal_agents.sandbox import Sandbox
from areal_agents.tool_outputs import Outputs
from areal_agents.tool_resources import Resources
from areal_agents.utils.short_text import cut

Kind = Literal["sandbox", "models", "env", "state", "outputs", "resources"]
"""What an environment passes."""
_NAMED: tuple[str, ...] = ("sandbox", "models", "env", "state")
"""Kinds that a parameter's name alone asks for."""
_TYPED: Mapping[str, Kind] = {"Sandbox": "sandbox", "Outputs": "outputs", "Resources": "resources"}
"""Kinds that a parameter's type asks for."""
MOST_CHOICES = 12
"""Choices of a parameter that an error text shows."""


def read_parameters(
    function: Callable[..., Any], tool_name: str, notes: Mapping[str, str]
) -> tuple[dict[str, Kind], type[BaseModel]]:
    """Tell the parameters of ``function`` apart.

    Args:
        function: the tool's.
        tool_name: names the tool in errors.
        notes: a description of a parameter, by its name.

    Returns:
        What the environment passes, by parameter, and a model of what the model gives.

    Raises:
        TypeError: a parameter that is none of both, with the tool and its name.
    """
    injected: dict[str, Kind] = {}
    fields: dict[str, Any] = {}
    for position, parameter in enumerate(inspect.signature(function).parameters.values()):
        if position == 0 and parameter.name == "self" and parameter.annotation is parameter.empty:
            injected["self"] = "env"
            continue
        if position == 0 and parameter.name == "cls" and parameter.annotation is parameter.empty:
            raise TypeError(f"tool {tool_name!r}: a tool acts on an episode: write `self`, and leave @classmethod out")
        kind = _kind(parameter, function, tool_name)
        if kind is not None:
            injected[parameter.name] = kind
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        annotation = _annotation(parameter, function, tool_name)
        fields[parameter.name] = (annotation, Field(default, description=notes.get(parameter.name)))
    return injected, _model(tool_name, fields)


def type_text(schema: Mapping[str, Any], named: Mapping[str, Any], depth: int = 0) -> str:
    """Write the type of a parameter's schema, such as ``"north" | "south"`` or ``array of string``.

    ``named`` has the schemas that others refer to.
    """
    if "$ref" in schema and depth < 5:
        return type_text(named.get(str(schema["$ref"]).rpartition("/")[2], {}), named, depth + 1)
    choices = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if choices:
        shown = [json.dumps(value, ensure_ascii=False) for value in choices[:MOST_CHOICES]]
        return " | ".join([*shown, *["…"] * (len(choices) > MOST_CHOICES)])
    if "anyOf" in schema and depth < 5:
        return " | ".join(dict.fromkeys(type_text(inner, named, depth + 1) for inner in schema["anyOf"]))
    if schema.get("type") == "array" and schema.get("items") and depth < 5:
        inner = type_text(schema["items"], named, depth + 1)
        return f"array of ({inner})" if " | " in inner else f"array of {inner}"
    return str(schema.get("type", "any"))


def _model(tool_name: str, fields: Mapping[str, Any]) -> type[BaseModel]:
    """Make the model of the arguments, or name the parameter that no JSON value can be."""

    def make(some: Mapping[str, Any]) -> type[BaseModel]:
        made = create_model(tool_name, __config__=ConfigDict(extra="forbid"), **some)
        made.model_json_schema()
        return cast(type[BaseModel], made)

    try:
        return make(fields)
    except (PydanticUserError, NameError, TypeError):
        for name, (annotation, default) in fields.items():
            try:
                make({name: (annotation, default)})
            except (PydanticUserError, NameError, TypeError) as error:
                shown = annotation.__name__ if isinstance(annotation, type) else str(annotation)
                raise TypeError(
                    f"tool {tool_name!r}: parameter {name!r} is a {cut(shown, 100)}, which no JSON value of a model "
                    f"can be; an environment passes what is keyword-only and called {', '.join(_NAMED)}"
                ) from error
        raise


def _kind(parameter: inspect.Parameter, function: Callable[..., Any], tool_name: str) -> Kind | None:
    """Return what the environment passes for ``parameter``, or None where the model gives it."""
    named = parameter.name in _NAMED
    kind = cast(Kind, parameter.name) if named else _kind_of_annotation(parameter)
    if kind is None:
        return None
    who = f"tool {tool_name!r}: parameter {parameter.name!r}"
    plain = named and parameter.annotation is not parameter.empty and _plain(_resolved(parameter, function))
    if parameter.kind is not parameter.KEYWORD_ONLY:
        if plain:  # the name of an American state, say
            return None
        raise TypeError(
            f"{who} is what the environment passes, so it must be keyword-only: write `*, {parameter.name}`. What the "
            "model shall give has another name"
        )
    if plain and kind in ("env", "state"):
        raise TypeError(
            f"{who} is keyword-only, so the environment would pass its {kind}, but the type is what a model gives: put "
            "it before the `*`, or choose another name"
        )
    return kind


def _kind_of_annotation(parameter: inspect.Parameter) -> Kind | None:
    # The annotation may be a name imported under TYPE_CHECKING only: its text decides then.
    text = parameter.annotation if isinstance(parameter.annotation, str) else ""
    for kind in (Sandbox, Outputs, Resources):
        if parameter.annotation is kind or text.rpartition(".")[2] == kind.__name__:
            return _TYPED[kind.__name__]
    if re.fullmatch(r"(\w+\.)*(Mapping|dict)\[str, *(\w+\.)*ChatModel\]", text or str(parameter.annotation)):
        return "models"
    return None


def _plain(annotation: Any) -> bool:
    """Say whether a model gives such values by nature: texts, numbers, choices, and lists of them."""
    origin = get_origin(annotation)
    if origin is Literal:
        return True
    if origin in (typing.Union, types.UnionType, typing.Annotated, list, tuple):
        return all(_plain(inner) for inner in get_args(annotation)[: 1 if origin is typing.Annotated else None])
    if annotation in (str, int, float, bool, type(None), ...):
        return True
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _resolved(parameter: inspect.Parameter, function: Callable[..., Any]) -> Any:
    """Return the annotation as an object, or its text where it names what is not there."""
    holder = SimpleNamespace(__annotations__={parameter.name: parameter.annotation})
    namespace = getattr(function, "__globals__", {})
    try:
        return typing.get_type_hints(holder, globalns=namespace, include_extras=True)[parameter.name]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return parameter.annotation


def _annotation(parameter: inspect.Parameter, function: Callable[..., Any], tool_name: str) -> Any:
    if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        raise TypeError(f"tool {tool_name!r}: parameter {parameter} must be an ordinary named parameter")
    if parameter.annotation is parameter.empty:
        raise TypeError(f"tool {tool_name!r}: parameter {parameter.name!r} needs a type hint")
    found = _resolved(parameter, function)
    if isinstance(found, str):
        raise TypeError(
            f"tool {tool_name!r}: parameter {parameter.name!r} has the type hint {cut(found, 100)!r}, which names "
            "nothing that the module can see while it is imported"
        )
    return found
