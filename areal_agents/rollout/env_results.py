"""The check of what an environment's calls return, against the contract of ``env.py`` and before anything uses it.

    areset, astep, afinish ─▶ read ─▶ Returned, which shares no list or dictionary with the environment

A wrong shape, type or word is an EnvError. A reward that is no finite number is a RewardError. Both name the call. The
values are the author's own objects, so even looking at them may raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from areal_agents.context import Context, Fold, RuleSummary, Summary
from areal_agents.env import AgentEnv
from areal_agents.errors import EnvError, RewardError
from areal_agents.reward import Verdict
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Image, Message, Observation, Role, StopReason, Text, ToolOutcome
from areal_agents.utils.json_value import json_copy
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import described, short

Call = Literal["areset", "astep", "afinish", "aclose"]
RETURNS: Mapping[Call, tuple[str, ...]] = {
    "areset": ("observation", "info"),
    "astep": ("observation", "reward", "terminated", "truncated", "info"),
    "afinish": ("reward", "info"),
}
"""What the calls return, in order. What ``aclose`` returns is not looked at."""
_ROLES: tuple[str, ...] = get_args(Role)
_PARTS = (Text, Image)
_REASONS: tuple[str, ...] = get_args(StopReason)
VERDICT_METRICS = {"unverifiable": "unverifiable", "timeout": "verdict_timeout"}
"""Metrics of an episode by ``info["verdict_status"]``."""


def status_metrics(verdict: Verdict) -> dict[str, float]:
    """Return what an episode's metrics say of a verdict's status: nothing where it is ``ok``."""
    return {} if verdict.status == "ok" else {VERDICT_METRICS[verdict.status]: 1.0}


@dataclass(frozen=True, slots=True)
class Returned:
    """The checked values that one call returned.

    A part that the call does not have is empty.
    """

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

    outcome: Any = None
    """What was found at the end, where the environment says so."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the episode so far: ``unverifiable`` or ``verdict_timeout`` where the verdict says so, ``sandbox_replays``."""

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


@contextmanager
def _reading(what: str, where: str) -> Iterator[None]:
    """Let whatever the author's objects raise while they are read be an EnvError."""
    try:
        yield
    except (EnvError, RewardError):
        raise
    except Exception as error:
        raise EnvError(f"{where}: reading {what} raised {described(error)}") from error


def read_tools(env: AgentEnv, where: str) -> tuple[ToolSpec, ...]:
    """Return the environment's tools.

    Raises EnvError where they are no sequence of tools.
    """
    with _reading("tools", where):
        tools: object = env.tools
        if not isinstance(tools, Sequence) or not all(isinstance(t, ToolSpec) for t in tools):
            raise EnvError(f"{where}: tools is {short(tools)}, which is not a sequence of tools: see @tool")
        return tuple(tools)


def read_scores_cut(env: AgentEnv, where: str) -> bool:
    """Return the environment's ``scores_cut_messages``.

    Raises EnvError where it is no bool.
    """
    with _reading("scores_cut_messages", where):
        scores: object = env.scores_cut_messages
        if not isinstance(scores, bool):
            raise EnvError(f"{where}: scores_cut_messages is {short(scores)}: it must be True or False")
        return scores


def read_seconds(env: AgentEnv, where: str) -> float:
    """Return how many seconds a step of the environment may take by its nature.

    Raises EnvError where that is no number of seconds.
    """
    with _reading("step_seconds", where):
        declared: object = env.step_seconds
        try:
            seconds = finite(declared)
        except ValueError:
            seconds = -1.0
        if seconds < 0:
            raise EnvError(f"{where}: step_seconds is {short(declared)}, which is no number of seconds")
        return seconds


def read_context(env: AgentEnv, where: str) -> Context | None:
    """Return what the environment lets happen to long histories.

    Raises EnvError where that is no rule of ``context.py``.
    """
    with _reading("context", where):
        context: object = env.context
        if context is not None and not isinstance(context, Fold | RuleSummary | Summary):
            raise EnvError(
                f"{where}: context is {short(context)}: it says what happens to long histories, so it must be Fold(…), "
                "RuleSummary(…), Summary(…) or None; call anything else otherwise"
            )
        return context


def read(call: Call, result: object, where: str, turns: int) -> Returned:
    """Check the ``result`` of ``call`` and copy what counts.

    Args:
        call: the call that returned.
        result: what it returned.
        where: names the call in errors.
        turns: of the episode, with the one that the call ends.

    Raises:
        EnvError: the result breaks the contract.
        RewardError: a reward or component is not a number or not finite, or ``turn_rewards`` has not one entry a turn.
    """
    if call == "aclose":
        return Returned()
    with _reading("what it returned", where):
        return _read(call, result, where, turns)


def _read(call: Call, result: object, where: str, turns: int) -> Returned:
    names = RETURNS[call]
    if not isinstance(result, tuple) or len(result) != len(names):
        raise EnvError(f"{where} returned {short(result)}, not ({', '.join(names)})")
    got: dict[str, Any] = dict(zip(names, result, strict=True))
    flags = got.get("terminated", False), got.get("truncated", False)
    if not all(isinstance(x, bool | np.bool_) for x in flags):
        shown = [short(x) for x in flags]
        raise EnvError(f"{where} returned terminated {shown[0]} and truncated {shown[1]}: both must be bool")
    observation = got.get("observation", ())
    if not isinstance(observation, tuple) or not all(isinstance(m, Message) for m in observation):
        raise EnvError(f"{where} returned the observation {short(observation)}: it must be a tuple of Message")
    for message in observation:
        _read_message(message, where)
    reward = _finite(got.get("reward", 0.0), "the reward", where)
    at_end = call == "afinish" or any(flags)
    found = replace(
        _read_info(got["info"], where, turns if at_end else None),
        observation=observation, reward=reward, terminated=bool(flags[0]), truncated=bool(flags[1]),
    )  # fmt: skip
    if call == "areset" and not observation:
        raise EnvError(f"{where}: the first observation is empty: the model would have nothing to answer")
    return found


def _read_message(message: Message, where: str) -> None:
    """Check what is inside a message, which dataclasses leave to whoever makes them."""
    if wrong := _wrong_in(message):
        raise EnvError(f"{where} returned the message {short(message)}: {wrong}")


def _wrong_in(message: Message) -> str:
    if message.role not in _ROLES:
        return f"its role must be one of {', '.join(_ROLES)}"
    if not isinstance(message.parts, tuple) or not all(isinstance(p, _PARTS) for p in message.parts):
        return "its parts must be a tuple of Text and Image"
    for part in message.parts:
        text = part.text if isinstance(part, Text) else part.ref
        if not isinstance(text, str):
            return f"{short(text)} in it is not a text"
    for name, value in (("tool_call_id", message.tool_call_id), ("name", message.name)):
        if value is not None and not isinstance(value, str):
            return f"its {name} must be a text or None"
    return ""


def _read_info(info: Any, where: str, turns: int | None) -> Returned:
    """Check ``info``.

    ``turns`` is how many there are where the episode ends here, else None.
    """
    if not isinstance(info, dict) or not all(isinstance(k, str) for k in info):
        raise EnvError(f"{where} returned info {short(info)}, which is not a dict with text keys")
    reason, key = info.get("stop_reason"), info.get("state_key")
    components = info.get("components", {})
    if "stop_reason" in info and not (isinstance(reason, str) and reason in _REASONS):
        raise EnvError(f"{where}: info['stop_reason'] is {short(reason)}: use {', '.join(_REASONS)}")
    if not isinstance(key, str | None):
        raise EnvError(f"{where}: info['state_key'] is {short(key)}, which is not a text")
    if not isinstance(components, Mapping) or not all(isinstance(name, str) for name in components):
        raise EnvError(f"{where}: info['components'] is {short(components)}, which is not a dict of numbers by name")
    records = info.get("tool_results", ())
    if not isinstance(records, list | tuple) or not all(isinstance(r, Mapping) and "status" in r for r in records):
        records = ()
    return Returned(
        stop_reason=reason,
        components={name: _component(name, x, where) for name, x in components.items()},
        turn_rewards=_read_turn_rewards(info.get("turn_rewards"), where, turns),
        state_key=key,
        tool_results=tuple(ToolOutcome(str(r["status"]), bool(r.get("truncated", False))) for r in records),
        outcome=None if turns is None else _read_outcome(info.get("outcome"), where),
        metrics=_read_metrics(info, where),
    )


def _read_outcome(outcome: object, where: str) -> Any:
    try:
        return json_copy(outcome)
    except ValueError as wrong:
        raise EnvError(f"{where}: info['outcome'] is {short(outcome)}, {wrong}") from wrong


def _read_metrics(info: Mapping[str, Any], where: str) -> dict[str, float]:
    status, replays = info.get("verdict_status"), info.get("sandbox_replays")
    found: dict[str, float] = {}
    if status is not None and not (isinstance(status, str) and status in ("ok", *VERDICT_METRICS)):
        raise EnvError(f"{where}: info['verdict_status'] is {short(status)}: use ok, unverifiable or timeout")
    if status in VERDICT_METRICS:
        found[VERDICT_METRICS[status]] = 1.0
    if replays is None:
        return found
    try:
        count = finite(replays)
    except ValueError:
        count = -1.0
    if count < 0 or count != int(count):
        raise EnvError(f"{where}: info['sandbox_replays'] is {short(replays)}, which is no number of sandboxes")
    return found | ({"sandbox_replays": count} if count else {})


def _read_turn_rewards(rewards: Any, where: str, turns: int | None) -> tuple[float, ...] | None:
    if rewards is None:
        return None
    if not isinstance(rewards, list | tuple) and not (isinstance(rewards, np.ndarray) and rewards.ndim == 1):
        raise EnvError(
            f"{where}: info['turn_rewards'] is {short(rewards)}: give a list, a tuple or a 1-d array with one number a "
            "turn"
        )
    if turns is not None and len(rewards) != turns:
        raise RewardError(f"{where}: turn_rewards has {len(rewards)} entries for {turns} turns")
    return tuple(_finite(x, "the turn reward", where) for x in rewards)


def _component(name: str, value: Any, where: str) -> float:
    try:
        return finite(value)
    except ValueError:
        return _finite(value, f"the component {short(name)}", where)


def _finite(value: Any, name: str, where: str) -> float:
    """Return ``value`` as a float.

    Raises RewardError where it is no finite number (``utils/real_number.py``).
    """
    try:
        return finite(value)
    except ValueError as wrong:
        hint = ": one number a turn goes into info['turn_rewards']" if isinstance(value, list | tuple) else ""
        raise RewardError(f"{where} returned {name} {short(value)}, which is {wrong}{hint}") from wrong
