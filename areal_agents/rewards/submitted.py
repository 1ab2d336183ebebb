"""What the last call of a tool submitted, for rewards that read an answer from there."""

from __future__ import annotations

from areal_agents.errors import ConfigError
from areal_agents.reward import Episode
from areal_agents.tool import ToolResult
from areal_agents.types import AssistantMessage, ToolCall


def submitted(episode: Episode, tool: str, argument: str, kinds: tuple[type, ...] = (str,)) -> str | None:
    """Return the last call's argument as a text, or None where there is none.

    Args:
        episode: whose calls are looked at, the last that could be read first.
        tool: the tool's name.
        argument: the argument's name. Empty is the only one whose value is of ``kinds``.
        kinds: what a value may be.

    Raises:
        ConfigError: no argument is named, and the tool took several.
    """
    found = _last(episode, tool)
    if found is None:
        return None
    call, result = found
    values = {k: v for k, v in call.arguments.items() if isinstance(v, kinds) and not isinstance(v, bool)}
    if argument:
        return str(values[argument]) if argument in values else None
    if len(values) > 1:
        if result is not None and result.status == "ok":  # else the model has made an argument up
            raise ConfigError(
                f"the tool {tool!r} took several arguments that may be the answer ({', '.join(values)}): name it to "
                f"the reward, argument={next(iter(values))!r} say"
            )
        return None
    return next((str(v) for v in values.values()), None)


def _last(episode: Episode, tool: str) -> tuple[ToolCall, ToolResult | None] | None:
    calls = [c for m in episode.messages if isinstance(m, AssistantMessage) for c in m.tool_calls]
    results = [*episode.tool_results, *[None] * len(calls)]  # the last turn's may have none
    asked = [pair for pair in zip(calls, results, strict=False) if pair[0].name == tool and pair[0].status == "ok"]
    return asked[-1] if asked else None
