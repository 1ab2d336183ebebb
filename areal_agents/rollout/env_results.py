"""The check of what an environment's calls return, against the contract of ``env.py`` and before anything uses it.

    areset, astep, afinish ─▶ read ─▶ Returned, which shares no list or dictionary with the environment

A wrong shape, type or word is an EnvError. A reward that is no finite number is a RewardError. Both name the call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from areal_agents.errors import EnvError, RewardError
from areal_agents.types import AssistantMessage, Message, Observation, StopReason, ToolOutcome

Call = Literal["areset", "astep", "afinish", "aclose"]
RETURNS: Mapping[Call, tuple[str, ...]] = {
    "areset": ("observation", "info"),
    "astep": ("observation", "reward", "terminated", "truncated", "info"),
    "afinish": ("reward", "info"),
}
"""What the calls return, in order. What ``aclose`` returns is not looked at."""


@dataclass(frozen=True, slots=True)
class Returned:
    """The checked values that one call returned.

    A part that the call does not have is empty.
    """

    where: str
    """The call, for messages about it."""
    observation: Observation = ()
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    stop_reason: StopReason | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    turn_rewards: tuple[float, ...] | None = None
    state_key: str | None = None
    tool_results: tuple[ToolOutcome, ...] = ()
    """How the turn's tool calls ended. Empty where the environment gives records of another shape, as it may."""

    @property
    def ending(self) -> StopReason:
        """Why the episode ended, where it did."""
        return self.stop_reason or ("answer" if self.terminated else "max_turns")

    def marked(self, message: AssistantMessage) -> AssistantMessage:
        """Return ``message`` with what the environment found out about its calls (T7).

        A call that named an unknown tool or had invalid arguments gets that status.
        """
        found = [r.status for r in self.tool_results]
        if len(found) != len(message.tool_calls):
            return message
        calls = tuple(
            replace(call, status=status)  # type: ignore[arg-type]  # one of the two
            if call.status == "ok" and status in ("unknown_tool", "invalid_arguments")
            else call
            for call, status in zip(message.tool_calls, found, strict=True)
        )
        return replace(message, tool_calls=calls)


def read(call: Call, result: object, where: str) -> Returned:
    """Check the ``result`` of ``call`` and copy what counts.

    Raises:
        EnvError: the result breaks the contract.
        RewardError: a reward or component is not a number, or not finite.
    """
    if call == "aclose":
        return Returned(where)
    names = RETURNS[call]
    if not isinstance(result, tuple) or len(result) != len(names):
        raise EnvError(f"{where} returned {short(result)}, not ({', '.join(names)})")
    got: dict[str, Any] = dict(zip(names, result, strict=True))
    flags = got.get("terminated", False), got.get("truncated", False)
    if not all(isinstance(x, bool | np.bool_) for x in flags):
        raise EnvError(f"{where} returned terminated {flags[0]!r} and truncated {flags[1]!r}: both must be bool")
    observation = got.get("observation", ())
    if not isinstance(observation, tuple) or not all(isinstance(m, Message) for m in observation):
        raise EnvError(f"{where} returned the observation {short(observation)}: it must be a tuple of Message")
    reward = _finite(got.get("reward", 0.0), "the reward", where)
    return replace(
        _read_info(got["info"], where),
        observation=observation, reward=reward, terminated=bool(flags[0]), truncated=bool(flags[1]),
    )  # fmt: skip


def _read_info(info: Any, where: str) -> Returned:
    if not isinstance(info, dict) or not all(isinstance(k, str) for k in info):
        raise EnvError(f"{where} returned info {short(info)}, which is not a dict with text keys")
    reason, key = info.get("stop_reason"), info.get("state_key")
    components, rewards = info.get("components", {}), info.get("turn_rewards")
    if "stop_reason" in info and reason not in get_args(StopReason):
        raise EnvError(f"{where}: info['stop_reason'] is {short(reason)}: use {', '.join(get_args(StopReason))}")
    if not isinstance(key, str | None):
        raise EnvError(f"{where}: info['state_key'] is {short(key)}, which is not a text")
    if not isinstance(components, Mapping):
        raise EnvError(f"{where}: info['components'] is {short(components)}, which is not a dict of numbers")
    try:
        turn_rewards = None if rewards is None else tuple(rewards)
    except TypeError as error:
        raise EnvError(f"{where}: info['turn_rewards'] is {short(rewards)}: give one number a turn") from error
    records = info.get("tool_results", ())
    if not isinstance(records, list | tuple) or not all(isinstance(r, Mapping) and "status" in r for r in records):
        records = ()
    return Returned(
        where,
        stop_reason=reason,
        components={name: _finite(x, f"the component {name!r}", where) for name, x in components.items()},
        turn_rewards=turn_rewards and tuple(_finite(x, "the turn reward", where) for x in turn_rewards),
        state_key=key,
        tool_results=tuple(ToolOutcome(str(r["status"]), bool(r.get("truncated", False))) for r in records),
    )


def _finite(value: Any, name: str, where: str) -> float:
    """Return ``value`` as a float.

    Raises RewardError where it is no finite number. A text is never a number.
    """
    number: float | None = None
    if hasattr(type(value), "__float__"):  # float() would read a text
        with suppress(TypeError, ValueError, OverflowError, RuntimeError):  # huge integers, tensors of several numbers
            number = float(value)
    if number is None:
        raise RewardError(f"{where} returned {name} {short(value)}, which is not a number")
    if not math.isfinite(number):
        raise RewardError(f"{where} returned {name} {number}, which is not finite")
    return number


def short(value: object) -> str:
    """Return the start of ``value``'s text form, for a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + "…"
