"""The tools of any MCP server, over stdio or HTTP.

    mcp_tools(command=["mcp-server-time"]) ─▶ the server says what it offers ─▶ one ToolSpec each
                                                                                 │ call
    an episode's own server, or one for all ◀────────────────────────────────────┘

A server runs outside the sandbox, with what its author's machine gives it: it is trusted, and its arguments are not.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from areal_agents.errors import ArealError, ConfigError, EnvError
from areal_agents.tool import ToolResult, ToolSpec
from areal_agents.tool_outputs import MAX_KEPT_CHARS, cut_middle
from areal_agents.tool_resources import Resources
from areal_agents.tools.mcp_connection import (
    ALIVE_S,
    OPEN_S,
    Connection,
    McpServer,
    connected,
    forget,
    pairs,
    require_sdk,
    shared,
)
from areal_agents.utils.short_text import cut

_NAME: Final = re.compile(r"[^A-Za-z0-9_-]")


def mcp_tools(
    *,
    command: Sequence[str] = (),
    url: str = "",
    only: Sequence[str] | None = None,
    prefix: str = "",
    one_for_all: bool = False,
    seconds: float = 30.0,
    env: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    cwd: str | None = None,
    parallel: bool = False,
) -> tuple[ToolSpec, ...]:
    """Ask a server what it offers, and make a tool of each.

    Args:
        command: the program of a server over stdio, and its arguments.
        url: the address of a server over HTTP, in place of a command.
        only: names of the tools to take; None takes all.
        prefix: put before each name, where two servers offer the same one.
        one_for_all: all episodes of a process share one connection. By default each has its own, until it ends.
        seconds: of one call.
        env: variables of the program, besides PATH, HOME and the like.
        headers: of each request over HTTP.
        cwd: the program's folder.
        parallel: calls of one message may run at the same time.

    Raises:
        ConfigError: there is no SDK, no server, no such tool, or a tool that cannot be described.
    """
    require_sdk()
    if bool(command) == bool(url) or isinstance(command, str):
        raise ConfigError("mcp_tools needs either command=[PROGRAM, …] or url=…")
    if seconds <= 0:
        raise ConfigError(f"mcp_tools: seconds = {seconds} must be positive")
    server = McpServer(tuple(command), url, pairs(env or {}), pairs(headers or {}), cwd)
    settings = Settings(server, None if only is None else tuple(only), prefix, one_for_all, seconds, parallel)
    return _make(settings)


@dataclass(frozen=True, slots=True)
class Settings:
    """What ``mcp_tools`` was told."""

    server: McpServer
    only: tuple[str, ...] | None
    prefix: str
    one_for_all: bool
    seconds: float
    parallel: bool


@dataclass(frozen=True)
class McpTool(ToolSpec):
    """A tool whose arguments are checked by the schema that its server gave."""

    check: Callable[[Mapping[str, Any]], str | None] = lambda _: None

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any] | str:
        problem = _unsendable(arguments) or self.check(arguments)
        if problem is not None:
            return f"invalid arguments for {self.name!r}: {problem}. Expected: {self.signature()}"
        return {"arguments": dict(arguments)}


def _make(settings: Settings) -> tuple[ToolSpec, ...]:
    offered = {tool.name: tool for tool in _listed(settings.server)}
    wanted = list(offered) if settings.only is None else list(settings.only)
    if unknown := [name for name in wanted if name not in offered]:
        raise ConfigError(
            f"MCP server {settings.server.name!r} has no tool {unknown[0]!r}; it has {', '.join(offered) or 'none'}"
        )
    specs = [_spec(offered[name], settings) for name in wanted]
    if len({spec.name for spec in specs}) != len(specs):
        raise ConfigError(f"MCP server {settings.server.name!r} has two tools of one name: {', '.join(wanted)}")
    return tuple(specs)


@functools.cache
def _listed(server: McpServer) -> tuple[Any, ...]:
    """Ask a server what it offers, on a loop of its own: this one may be in use, or there may be none."""
    found: list[Any] = []

    async def ask() -> None:
        async with connected(server) as connection:
            async with asyncio.timeout(OPEN_S):
                found.extend(await connection.tools())

    def run() -> None:
        try:
            asyncio.run(ask())
        except Exception as error:  # noqa: BLE001  told below, in the thread that asked
            failed.append(error)

    failed: list[Exception] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        known = isinstance(failed[0], ArealError)
        raise ConfigError(str(failed[0]) if known else f"MCP server {server.name!r}: {failed[0]!r}") from failed[0]
    return tuple(found)


def _spec(tool: Any, settings: Settings) -> ToolSpec:
    name = _NAME.sub("_", settings.prefix + tool.name)[:64]
    schema = {key: value for key, value in tool.input_schema.items() if key not in ("$schema", "title")}
    call = functools.partial(_call, settings, tool.name)
    return McpTool(
        name=name,
        description=" ".join((tool.description or "").split()),
        parameters={"type": "object", **schema},
        timeout=settings.seconds + OPEN_S + ALIVE_S,
        parallel=settings.parallel,
        max_output_chars=8000,
        injected={"resources": "resources"},
        function=call,
        maker=(_make, (settings,)),
        check=_checker(name, schema),
    )


def _checker(name: str, schema: dict[str, Any]) -> Callable[[Mapping[str, Any]], str | None]:
    """Return the function that checks arguments, and says what is wrong with them."""
    from jsonschema import exceptions, validators

    if _leads_out(schema):
        raise ConfigError(f"MCP tool {name!r}: its schema refers to another document")
    base = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        base.check_schema(schema)
    except exceptions.SchemaError as error:
        raise ConfigError(f"MCP tool {name!r}: its schema is none: {cut(error.message, 300)}") from error
    # A pattern can take forever on a text that a model chose. The server looks at those itself.
    blind = (
        "pattern",
        "patternProperties",
        *(("additionalProperties", "unevaluatedProperties") * _has_patterns(schema)),
    )
    validator = validators.extend(base, dict.fromkeys(blind, lambda *_: None))(schema)

    def check(arguments: Mapping[str, Any]) -> str | None:
        wrong = exceptions.best_match(validator.iter_errors(dict(arguments)))
        if wrong is None:
            return None
        where = ".".join(map(str, wrong.absolute_path))
        return (f"{cut(where, 100)!r}: " if where else "") + cut(wrong.message, 300)

    return check


def _unsendable(arguments: Mapping[str, Any]) -> str | None:
    """Say why arguments are no JSON that can be sent: it would break the connection, not the call."""
    try:
        json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return "they have half of a surrogate pair"
    except (ValueError, RecursionError):
        return "they have a number or a depth that JSON lacks"
    return None


def _has_patterns(schema: Any) -> bool:
    """Say whether names of properties are matched, which further keywords then do too."""
    if isinstance(schema, dict):
        return "patternProperties" in schema or any(map(_has_patterns, schema.values()))
    return isinstance(schema, list) and any(map(_has_patterns, schema))


def _leads_out(schema: Any) -> bool:
    if isinstance(schema, dict):
        reference = schema.get("$ref", schema.get("$dynamicRef", "#"))
        if isinstance(reference, str) and not reference.startswith("#"):
            return True
        return any(map(_leads_out, schema.values()))
    return isinstance(schema, list) and any(map(_leads_out, schema))


async def _call(settings: Settings, name: str, *, arguments: dict[str, Any], resources: Resources) -> ToolResult:
    """Call a tool of the server."""
    connection: Connection | None = None
    try:
        if settings.one_for_all:
            connection = await shared(settings.server)
        else:
            key = ("mcp", settings.server)
            connection = await resources.get(key, functools.partial(connected, settings.server))
        done = await connection.call(name, arguments, settings.seconds)
    except EnvError as error:
        error.tool = name
        if settings.one_for_all and connection is not None:
            await forget(connection)
        raise
    if done is None:
        return ToolResult(f"error: stopped after {settings.seconds:g} s", "timeout")
    if isinstance(done, str):
        return ToolResult(f"error: {done}", "error")
    parts = [*map(_text, done.content), *_structured(done)]
    text, was_cut = cut_middle("\n".join(filter(None, parts)), MAX_KEPT_CHARS)
    if done.is_error:
        return ToolResult(f"error: {text or 'the server says no more'}", "error", was_cut)
    return ToolResult(text or "(no output)", truncated=was_cut)


def _structured(done: Any) -> list[str]:
    """Write a result's structured content, where no text has said it: servers are asked to say it as text too."""
    if done.structured_content is None or any(part.type == "text" and part.text.strip() for part in done.content):
        return []
    return [json.dumps(done.structured_content, ensure_ascii=False)]


def _text(part: Any) -> str:
    """Write one part of a result as text."""
    if part.type == "text":
        return str(part.text)
    if part.type == "resource":
        inner = getattr(part.resource, "text", None)
        return f"[{part.resource.uri}]\n{inner}" if isinstance(inner, str) else f"({part.resource.uri}: binary)"
    if part.type == "resource_link":
        return f"({part.name}: {part.uri})"
    return f"({'an' if part.type[0] in 'aeiou' else 'a'} {part.type} of {len(part.data) * 3 // 4} bytes, not shown)"
