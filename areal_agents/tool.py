"""The tool contract: a typed function becomes a JSON schema, and only checked arguments reach it.

    @tool(timeout=5)
    async def python(code: str, *, sandbox: Sandbox) -> str:
        \"\"\"Run Python code and return what it prints.\"\"\"

    class Cave(ToolEnv):
        @tool()
        async def go(self, direction: str) -> str:
            \"\"\"Walk through a door.\"\"\"

``self`` and keyword-only parameters named ``sandbox``, ``models``, ``env`` or ``state`` are *injected* by the
environment (``tool_parameters.py``), and so are those of the types ``Outputs`` and ``Resources``: they never appear in
the schema and a model cannot set them.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, Literal, TypeVar, get_args, overload

from pydantic import BaseModel, ValidationError

from areal_agents.errors import EnvError, InfraError, RewardError, SandboxUnavailable, TaskError
from areal_agents.tool_outputs import cut_middle as cut_middle
from areal_agents.tool_parameters import Kind, read_parameters, type_text

ToolFunction = Callable[..., Awaitable[object]]
ToolStatus = Literal["ok", "error", "timeout", "sandbox_failed", "malformed", "unknown_tool", "invalid_arguments"]
F = TypeVar("F", bound=ToolFunction)

_JSON_KEYWORDS_DROPPED = ("title", "additionalProperties")


class ToolError(Exception):
    """An error that a tool raises on purpose.

    The model sees its message as the call's result. It is not a failure of the run.
    """


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The end of one call, and what the model sees of it."""

    text: str
    status: ToolStatus = "ok"
    truncated: bool = False
    """Whether the middle of ``text`` was cut out."""


@dataclass(frozen=True)
class ToolSpec:
    """A tool: what the model is told about it, and the function behind it.

    ``parameters`` is a JSON schema of an object, compact because it is part of every prompt. ``timeout`` is in seconds
    of wall clock for one call. A spec pickles by reference, so its function must be importable.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    timeout: float = 5.0
    parallel: bool = False
    """Whether calls of one message may run at the same time."""
    max_output_chars: int = 4000
    injected: Mapping[str, Kind] = field(default_factory=dict)
    """Injected parameters: the function's parameter name → what the environment passes."""
    function: ToolFunction | None = field(default=None, repr=False, compare=False)
    """None: a tool that is only described (a remote model's tool)."""
    arguments_model: type[BaseModel] | None = field(default=None, repr=False, compare=False)
    maker: tuple[Callable[..., Any], tuple[Any, ...]] | None = field(default=None, repr=False, compare=False)
    """A function and the arguments with which it makes this tool, and perhaps others: see ``made_by``."""

    def __reduce__(self) -> tuple[Callable[..., ToolSpec], tuple[Any, ...]]:
        if self.maker is not None:
            return _made_again, (*self.maker, self.name)
        if self.function is None:
            return ToolSpec, (self.name, self.description, dict(self.parameters))
        return _by_reference, (self.function.__module__, self.function.__qualname__)

    @property
    def needs_sandbox(self) -> bool:
        """Whether a sandbox is injected into its calls."""
        return "sandbox" in self.injected.values()

    @property
    def acts(self) -> bool:
        """Whether it can change the episode's state, so that a second run of a call would act twice."""
        return "env" in self.injected.values() or "state" in self.injected.values()

    def __get__(self, instance: object | None, owner: type | None = None) -> Any:
        """Return a method's function bound to its environment, so that methods call each other, else the spec."""
        if instance is None or self.function is None or "self" not in self.injected:
            return self
        return self.function.__get__(instance)

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any] | str:
        """Check arguments.

        Returns them, leniently converted (``"3"`` → ``3``), or the error text for the model.
        """
        if self.arguments_model is None:
            return dict(arguments)
        try:
            checked = self.arguments_model.model_validate(dict(arguments))
        except ValidationError as error:
            problems = "; ".join(_problem(e) for e in error.errors(include_url=False))
            return f"invalid arguments for {self.name!r}: {problems}. Expected: {self.signature()}"
        return {name: getattr(checked, name) for name in type(checked).model_fields}

    def signature(self) -> str:
        """Write the signature that an error text shows, such as ``python(code: string)``."""
        properties = self.parameters.get("properties", {})
        required, named = self.parameters.get("required", []), self.parameters.get("$defs", {})
        shown = (
            f"{name}{'' if name in required else '?'}: {type_text(schema, named)}"
            for name, schema in properties.items()
        )
        return f"{self.name}({', '.join(shown)})"

    async def invoke(self, arguments: Mapping[str, Any], injected: Mapping[str, Any] | None = None) -> ToolResult:
        """Run the function on checked arguments, and cut what the model sees to ``max_output_chars``."""
        result = await self.run(arguments, injected)
        text, cut = cut_middle(result.text, self.max_output_chars)
        return ToolResult(text, result.status, result.truncated or cut)

    async def run(self, arguments: Mapping[str, Any], injected: Mapping[str, Any] | None = None) -> ToolResult:
        """Run the function on checked arguments, and return all that it said.

        ``injected`` maps each ``Kind`` (``"sandbox"``, ``"models"``, …) to what the environment passes. A timeout and a
        ToolError are results. InfraError (SandboxError among them) passes through; any other exception is the author's
        bug and becomes EnvError.
        """
        if self.function is None:
            raise EnvError(f"tool {self.name!r} has no function: it can be described to a model but not called")
        offered = injected or {}
        missing = [kind for kind in self.injected.values() if kind not in offered]
        if missing:
            raise EnvError(f"tool {self.name!r} needs {', '.join(missing)}, which the environment does not provide")
        extra = {parameter: offered[kind] for parameter, kind in self.injected.items()}
        clock = asyncio.timeout(self.timeout)
        try:
            async with clock:
                value = await self.function(**arguments, **extra)
        except TimeoutError as error:
            # Not this clock but the tool's own code timed out: the author's bug, and nothing the model did.
            if not clock.expired():
                raise EnvError(f"tool {self.name!r} raised {error!r}") from error
            return ToolResult(f"the call ran longer than {self.timeout:g} s and was stopped", "timeout")
        except ToolError as error:
            return ToolResult(str(error) or "the tool reported an error", "error")
        except (InfraError, SandboxUnavailable, RewardError, TaskError):
            raise
        except Exception as error:
            raise EnvError(f"tool {self.name!r} raised {error!r} on {_short(arguments)}") from error
        if not isinstance(value, ToolResult):
            return ToolResult(_text(value))
        if not isinstance(value.text, str) or value.status not in get_args(ToolStatus):
            raise EnvError(
                f"tool {self.name!r} returned {_short(value)}: its text must be a text, its status a ToolStatus"
            )
        return value

    async def __call__(self, *args: Any, **kwargs: Any) -> object:
        """Call the undecorated function, so that tools can call each other."""
        if self.function is None:
            raise EnvError(f"tool {self.name!r} has no function: it can be described to a model but not called")
        return await self.function(*args, **kwargs)


@overload
def tool(function: ToolFunction, /) -> ToolSpec: ...
@overload
def tool(
    *, timeout: float = ..., parallel: bool = ..., max_output_chars: int = ..., name: str | None = ...
) -> Callable[[ToolFunction], ToolSpec]: ...
def tool(
    function: ToolFunction | None = None,
    /,
    *,
    timeout: float = 5.0,
    parallel: bool = False,
    max_output_chars: int = 4000,
    name: str | None = None,
) -> ToolSpec | Callable[[ToolFunction], ToolSpec]:
    """Turn an async function into a ToolSpec, as ``@tool`` or ``@tool(timeout=2)``.

    The schema comes from the type hints. The description comes from the docstring's first paragraph, a parameter's
    description from its line in a Google-style ``Args:`` section.

    Args:
        function: the function, where ``@tool`` stands without parentheses.
        timeout: seconds of wall clock for one call.
        parallel: calls of one message may run at the same time.
        max_output_chars: a longer result loses its middle.
        name: what the model calls it; None takes the function's name.

    Raises:
        TypeError: where the function cannot be a tool: not async, a positional-only or variadic parameter, a parameter
            without a type.
        ValueError: for a timeout or a ``max_output_chars`` that is too small.
    """
    if timeout <= 0 or max_output_chars < 64:
        raise ValueError(f"tool: timeout = {timeout} must be > 0 and max_output_chars = {max_output_chars} >= 64")

    def decorate(function: ToolFunction) -> ToolSpec:
        if isinstance(function, classmethod | staticmethod):
            raise TypeError(f"tool {function.__name__!r} is a {type(function).__name__}: leave that decorator out")
        tool_name = name or function.__name__
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"tool {tool_name!r} must be an `async def`: a blocking tool would stop every episode")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", tool_name):
            raise TypeError(f"tool name {tool_name!r} must match [A-Za-z0-9_-]{{1,64}}")
        summary, notes = _docstring(function)
        injected, model = read_parameters(function, tool_name, notes)
        if parallel and {"env", "state"} & set(injected.values()) and "sandbox" in injected.values():
            raise TypeError(
                f"tool {tool_name!r} acts on the episode and in its sandbox, so it cannot be parallel: where the "
                "sandbox is lost, what it did there is done again, in order"
            )
        parameters = {"type": "object", **_compact(model.model_json_schema())}
        return ToolSpec(tool_name, summary, parameters, timeout, parallel, max_output_chars, injected, function, model)

    if function is None:
        return decorate
    if not callable(function) and not isinstance(function, classmethod | staticmethod):
        raise TypeError(f"tool({_short(function)}): write @tool(name=…, timeout=…)")
    return decorate(function)


def call_text(name: str, /, **arguments: Any) -> str:
    """Write a call as an expert's or a script's text has it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def class_tools(cls: type, root: type) -> tuple[Sequence[ToolSpec], object]:
    """Return the tools of an environment's class: those that it lists, then those that its body defines.

    A subclass inherits both. Its own list replaces the inherited one, an attribute of its own replaces a tool defined
    under that name (None takes it away).

    Args:
        cls: the class, whose own ``tools`` are as its author wrote them.
        root: the base class of all environments, whose bodies and those above are not looked at.

    Returns:
        All tools, and what was listed. Where that is no sequence (a property, say), it stays as it is.

    Raises:
        TypeError: a method hides a tool without being one, or a tool hides what every environment has; a decorator
            stands above ``@tool``; None is said of a tool that is listed.
    """
    bodies = [body for body in cls.__mro__ if body not in root.__mro__]
    listed: object = next(
        (b.__dict__.get("_listed_tools", b.__dict__["tools"]) for b in bodies if "tools" in b.__dict__), ()
    )
    names = {t.name for t in listed if isinstance(t, ToolSpec)} if isinstance(listed, list | tuple) else set()
    defined: dict[str, ToolSpec] = {}
    for body in reversed(bodies):
        for name, value in vars(body).items():
            _require_undecorated(body, name, value)
            if isinstance(value, ToolSpec):
                _require_free(cls, body, name, root)
                defined[name] = value
            elif value is None and name in names and name not in defined:
                raise TypeError(
                    f"{body.__name__}.{name} = None takes a method away, but {name!r} is listed: set `tools` without it"
                )
            elif name in defined:
                if value is not None:
                    raise TypeError(f"{body.__name__}.{name} hides a tool: put @tool() on it, or set it to None")
                del defined[name]
    if not isinstance(listed, list | tuple) or not defined:
        return listed, listed  # type: ignore[return-value]  # the author's own, which is checked when it is used
    return (*listed, *(spec for spec in defined.values() if all(spec is not other for other in listed))), listed


def _require_undecorated(body: type, name: str, value: object) -> None:
    """Raise TypeError where a decorator above ``@tool`` keeps the tool from being found."""
    inner: object = None
    if isinstance(value, classmethod | staticmethod):
        inner = value.__func__
    elif isinstance(value, property):
        inner = value.fget
    elif isinstance(value, FunctionType):
        inner = getattr(value, "__wrapped__", None)
    if isinstance(inner, ToolSpec):
        what = type(value).__name__ if not isinstance(value, FunctionType) else "a decorator"
        raise TypeError(f"{body.__name__}.{name}: {what} stands above @tool: leave it out, or put it below")


def _require_free(cls: type, body: type, name: str, root: type) -> None:
    """Raise TypeError where the tool ``body.name`` hides what the environment ``cls`` has by nature under that name."""
    package = __name__.partition(".")[0]
    for base in cls.__mro__[cls.__mro__.index(body) + 1 :]:
        ours = base in root.__mro__ or base.__module__.partition(".")[0] == package
        declared = name in vars(base) or name in vars(base).get("__annotations__", {})
        if ours and declared and not isinstance(vars(base).get(name), ToolSpec):
            raise TypeError(
                f"{body.__name__}.{name} hides {base.__name__}.{name}, which an episode needs: give the method another "
                f"name, and the model its own by @tool(name={name!r})"
            )


def made_by(maker: Callable[..., Any], *args: Any) -> Callable[[ToolSpec], ToolSpec]:
    """Return a function that marks a tool as made by ``maker(*args)``, so that it pickles.

    A tool with settings (a database, a list of hosts) is made by a function, and has no name to be found by. ``maker``
    returns the tool, or several of which one has its name. It and its arguments must pickle.
    """
    return lambda spec: replace(spec, maker=(maker, args))


def _made_again(maker: Callable[..., Any], args: tuple[Any, ...], name: str) -> ToolSpec:
    made = maker(*args)
    for spec in (made,) if isinstance(made, ToolSpec) else made:
        if isinstance(spec, ToolSpec) and spec.name == name:
            return spec
    raise TypeError(f"{maker!r} makes no tool {name!r} here")


def _by_reference(module: str, qualname: str) -> ToolSpec:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, ToolSpec):
        raise TypeError(f"{module}:{qualname} is not a tool: only tools defined at a module's top level pickle")
    return found


def _docstring(function: ToolFunction) -> tuple[str, dict[str, str]]:
    """Read the first paragraph, and the descriptions of an ``Args:`` section."""
    text = inspect.cleandoc(function.__doc__ or "")
    summary = " ".join(text.split("\n\n")[0].split())
    if summary.startswith("Args:"):
        summary = ""
    notes: dict[str, str] = {}
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, re.MULTILINE)
    current = ""
    for line in section.group(1).splitlines() if section else ():
        entry = re.match(r"\s+(\w+)(?: \([^)]*\))?:\s*(.*)", line)
        if entry:
            current = entry.group(1)
            notes[current] = entry.group(2).strip()
        elif current and line.strip():
            notes[current] += " " + line.strip()
    return summary, notes


def _compact(schema: Any, *, inside_properties: bool = False) -> Any:
    """Drop the keywords of a schema that tell a model nothing.

    A *parameter* called ``title`` stays.
    """
    if isinstance(schema, list):
        return [_compact(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _compact(value, inside_properties=key in ("properties", "$defs") and not inside_properties)
        for key, value in schema.items()
        if inside_properties or key not in _JSON_KEYWORDS_DROPPED or isinstance(value, dict)
    }


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "arguments"
    if error["type"] == "extra_forbidden":
        return f"{where!r} is not a parameter"
    if error["type"] == "missing":
        return f"{where!r} is missing"
    return f"{where!r}: {error['msg']}"


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
