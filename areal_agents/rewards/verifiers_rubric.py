"""``verifiers_rubric``: the reward functions of a rubric of the verifiers package, as one of our rubrics.

    rubric = verifiers_rubric(vf.Rubric(funcs=[exact, brief], weights=[1.0, 0.1]))
    rubric = verifiers_rubric([exact, brief], [1.0, 0.1])       # the functions alone: the package is not needed

A function is given what it names of ``prompt``, ``completion``, ``answer``, ``state``, ``info``, ``task``, ``parser``,
the rubric's own objects and the fields of the task's payload, as verifiers' ``Rubric`` does (read: 0.1.14). Messages
are read as ``message["content"]`` and as ``message.content``: both are in use. Three things differ. What a function
raises is raised, where verifiers takes it for 0. A last message that was cut is no answer: its content is empty. And
``state`` has only what is known here: another key is an error.

Functions of a whole group are refused; ``group_rubric`` is for those. So are the tasks of ``verifiers.v1``, all that
there is from 0.4 on, which score themselves on a trace of its own runtime.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin

from areal_agents.chat.message_json import messages_to_json
from areal_agents.errors import ConfigError, RewardError
from areal_agents.reward import Episode, RewardLike, WeightedSum
from areal_agents.rewards.plain_function import reward_function
from areal_agents.types import AssistantMessage, Message
from areal_agents.utils.short_text import short

_GROUP = frozenset({"states", "prompts", "completions", "answers", "tasks", "infos"})
"""Parameters by which verifiers tells a function of a group."""


def verifiers_rubric(
    rubric: object, weights: Sequence[float] | None = None, *, answer: str = "answer", timeout: float = 30.0
) -> WeightedSum:
    """Make a rubric of verifiers' reward functions, each a part of its own by its name.

    Args:
        rubric: a ``Rubric`` or ``RubricGroup`` of verifiers before 0.4, or a list of its reward functions.
        weights: of a list. None is 1 for each. A weight of 0 makes a metric.
        answer: the key of the task's payload that functions get as ``answer``.
        timeout: seconds for one call. Sync functions run on threads.

    Raises:
        ConfigError: there is no function, one is of a group, or it is another kind of rubric.
    """
    found = list(_functions(rubric, weights))
    if not found:
        raise ConfigError(f"{short(rubric)} has no reward function")
    parts: dict[str, tuple[RewardLike, float]] = {}
    for function, weight, objects in found:
        name = str(getattr(function, "__name__", type(function).__name__))
        if _is_of_group(function):
            raise ConfigError(f"{name!r} scores a whole group: give the environment a group_rubric for that")
        free = next(f"{name}{n}" for n in ("", *(f"_{i}" for i in range(2, 100))) if f"{name}{n}" not in parts)
        parts[free] = (reward_function(timeout=timeout)(_Part(function, objects, answer)), weight)
    return WeightedSum(parts)


def _functions(
    rubric: Any, weights: Sequence[float] | None
) -> Sequence[tuple[Callable[..., Any], float, Mapping[str, Any]]]:
    """Return the functions, their weights, and the objects that they may name."""
    if isinstance(rubric, list | tuple):
        given: Any = [1.0] * len(rubric) if weights is None else list(weights)
        objects: Mapping[str, Any] = {}
    elif weights is not None:
        raise ConfigError("weights go with a list of functions: a Rubric has its own")
    elif isinstance(getattr(rubric, "rubrics", None), list):
        return [part for inner in (*rubric.rubrics, _Own(rubric)) for part in _functions(inner, None)]
    else:
        objects = dict(getattr(rubric, "class_objects", None) or {})
        given = getattr(rubric, "weights", None)
        rubric = getattr(rubric, "funcs", None)
        if not isinstance(rubric, list) or not isinstance(given, list):
            raise ConfigError(
                "verifiers_rubric takes a Rubric of verifiers before 0.4, which has funcs and weights, or a list of "
                "functions: tasks of verifiers.v1 score themselves on a trace of its runtime"
            )
    if len(given) != len(rubric) or not all(callable(f) for f in rubric):
        raise ConfigError(f"there are {len(rubric)} reward functions ({short(rubric)}) and {len(given)} weights")
    return [(function, float(weight), objects) for function, weight in zip(rubric, given, strict=True)]


class _Own:
    """What a group of rubrics has of its own, beside the rubrics in it."""

    def __init__(self, rubric: Any) -> None:
        self.funcs, self.weights, self.class_objects = rubric.funcs, rubric.weights, rubric.class_objects


class _Part:
    """One reward function, called with an episode."""

    def __init__(self, function: Callable[..., Any], objects: Mapping[str, Any], answer: str) -> None:
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))
        self._function, self._objects, self._answer = function, objects, answer

    def __call__(self, episode: Episode) -> Any:
        state = _state(episode, self._answer)
        offered = {**state["task"], **state, **self._objects, "state": state}
        parameters = inspect.signature(self._function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return self._function(**offered)
        named = [p for p in parameters if p.kind is not p.VAR_POSITIONAL]
        missing = [p.name for p in named if p.name not in offered and p.default is p.empty]
        if missing:
            raise RewardError(
                f"the reward function {self.__name__!r} wants {', '.join(missing)}, and there are {', '.join(offered)}"
            )
        return self._function(**{p.name: offered[p.name] for p in named if p.name in offered})


def _state(episode: Episode, answer: str) -> dict[str, Any]:
    """Return what verifiers' functions see of an episode, as new dictionaries and lists."""
    messages = list(episode.messages)
    first = next((i for i, m in enumerate(messages) if isinstance(m, AssistantMessage)), len(messages))
    payload = json.loads(json.dumps(dict(episode.task.payload)))
    info = payload.get("info", {})
    return {
        "prompt": [_row(m, cut=False) for m in messages[:first]],
        "completion": [_row(m, cut=m is messages[-1] and episode.answer is None) for m in messages[first:]],
        "answer": payload.get(answer, ""),
        "info": info,
        "task": payload,
        "is_completed": True,
        "is_truncated": episode.stop_reason != "answer",
        "stop_condition": episode.stop_reason,
    }


class _Row(dict[str, Any]):
    """A message or a call as a dictionary whose values are attributes too. A field that it may have is None."""

    def __getattr__(self, name: str) -> Any:
        if name not in self and name not in ("content", "reasoning_content", "thinking_blocks", "tool_calls"):
            raise AttributeError(f"the message has {', '.join(self)}, and no {name!r}")
        return self.get(name)


def _row(message: Message | AssistantMessage, *, cut: bool) -> _Row:
    """Write a message as a server's dictionary. A call has its name and its arguments as servers and verifiers do."""
    if isinstance(message, Message):
        return _Row(messages_to_json([message])[0])
    text = message.text
    for call in message.tool_calls:
        text = text.replace(call.raw, "", 1)
    row = _Row(role="assistant", content="" if cut and message.finish != "stop" else text.strip())
    if message.reasoning:
        row["reasoning_content"] = message.reasoning
    if message.tool_calls:
        called = [(c.id, _Row(name=c.name, arguments=json.dumps(dict(c.arguments)))) for c in message.tool_calls]
        row["tool_calls"] = [_Row(id=id, type="function", function=named, **named) for id, named in called]
    return row


def _is_of_group(function: Callable[..., Any]) -> bool:
    signature = inspect.signature(function)
    returned = signature.return_annotation
    return bool(_GROUP & set(signature.parameters)) or returned is list or get_origin(returned) is list
