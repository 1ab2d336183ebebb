"""What shaping rewards read of an episode, turn by turn, and the verdict that they return."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, Verdict
from areal_agents.tool import ToolResult
from areal_agents.types import AssistantMessage, ToolCall
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import short

Unit = Literal["tokens", "characters"]
Call = tuple[ToolCall, ToolResult | None]
"""A call and its result, which is None where the environment did not run it."""


def turns_of(episode: Episode) -> tuple[AssistantMessage, ...]:
    """Return the policy's messages."""
    return tuple(m for m in episode.messages if isinstance(m, AssistantMessage))


def written(message: AssistantMessage) -> str:
    """Return all that the model wrote in a turn: the thought, the text and the calls.

    A thought that the prompt opened, or that a server returned beside the text, stands in ``<think>`` tags.
    """
    if message.reasoning:
        return f"<think>{message.reasoning}</think>{message.text}"
    return f"<think>{message.text}" if message.in_thought else message.text


def calls_of_turns(episode: Episode) -> list[list[Call]]:
    """Return each turn's calls with their results. Results stand in the order of the calls, over all turns."""
    results = iter(episode.tool_results)
    return [[(call, next(results, None)) for call in message.tool_calls] for message in turns_of(episode)]


def lengths_of(episode: Episode, unit: Unit) -> tuple[int, ...] | None:
    """Return the length of each turn, or None where its tokens are not known (``AssistantMessage.tokens``)."""
    turns = turns_of(episode)
    if unit == "characters":
        return tuple(len(m.text) + len(m.reasoning) for m in turns)
    known = tuple(m.tokens for m in turns if m.tokens is not None)
    return known if len(known) == len(turns) else None


def of_episode(name: str, score: float) -> Verdict:
    """Return a score that belongs to the episode as a whole."""
    return Verdict(score, {name: score})


def of_turns(name: str, rewards: Sequence[float]) -> Verdict:
    """Return one reward a turn. The score is their sum."""
    score = math.fsum(rewards)
    return Verdict(score, {name: score}, turn_rewards=tuple(rewards) or None)


def mean_of_turns(name: str, scores: Sequence[float]) -> Verdict:
    """Return one reward a turn, each a K-th of its score, so that the sum is the mean over the K turns."""
    return of_turns(name, [score / len(scores) for score in scores])


def number(value: object, name: str, *, least: float | None = None) -> float:
    """Return an option as a float. Raises ConfigError for one that is not finite, or is less than ``least``."""
    try:
        found = finite(value)
    except ValueError as error:
        raise ConfigError(f"{name} = {short(value)} is no finite number") from error
    if least is not None and found < least:
        raise ConfigError(f"{name} = {found:g} is under {least:g}")
    return found


def whole(value: object, name: str, *, least: int) -> int:
    """Return an option as an int. Raises ConfigError for anything but a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} = {short(value)} is no whole number of at least {least}")
    return value


def require_unit(unit: str, units: Sequence[str]) -> None:
    """Raise ConfigError for a unit that there is not."""
    if unit not in units:
        raise ConfigError(f"unit = {short(unit)}: use {' or '.join(map(repr, units))}")
