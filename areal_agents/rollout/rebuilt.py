"""The Episode that a reward saw, rebuilt from the finished trajectory.

A group's reward sees its episodes so, wherever they were played, and ``evaluation/rescore.py`` those of a saved run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast, get_args

from areal_agents.chat.tool_formats import tool_format
from areal_agents.env import AgentEnv
from areal_agents.errors import RewardError
from areal_agents.reward import Episode
from areal_agents.tool import ToolResult
from areal_agents.toolenv import SUBMITTED, ToolEnv
from areal_agents.types import AssistantMessage, Cut, Message, ToolCall, Trajectory, Turn

_FOUND_LATE = ("unknown_tool", "invalid_arguments")
SeededAnswer = Callable[[Trajectory, int], str]
"""Returns what a rubric gets to see of a trajectory's final message, where the environment was reset with that seed."""


class NotSaved:
    """The state of an episode that was rebuilt from what is saved, which nobody can look at."""

    def _refuse(self, *_: object) -> Any:
        raise RewardError(
            "an episode that is rebuilt has no `state`: let tools pay as they act (reward_turn), or read "
            "`episode.messages` and `episode.tool_results`"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy and pickle
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __iter__ = __len__ = __bool__ = __contains__ = __eq__ = __call__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def spoken_answer(trajectory: Trajectory, seed: int) -> str:
    """Return the text after the reasoning, as ``ToolEnv.answer`` does by default."""
    return _last(trajectory).message.spoken


def answer_reader(cls: type[AgentEnv], make_env: Callable[[], AgentEnv]) -> SeededAnswer:
    """Return the function that reads the answer from a final message as the environment does.

    An environment that overrides ``ToolEnv.answer`` is made once and asked. It needs no sandbox for that.
    """
    if not issubclass(cls, ToolEnv) or cls.answer is ToolEnv.answer:
        return spoken_answer
    made: list[ToolEnv] = []

    def answer(trajectory: Trajectory, seed: int) -> str:
        if not made:
            made.append(cast(ToolEnv, make_env()))
        made[0].begin(seed, {"task": trajectory.task})
        return made[0].answer(as_sampled(_last(trajectory).message))

    return answer


def rebuilt(trajectory: Trajectory, answer: Callable[[Trajectory], str]) -> Episode:
    """Rebuild the Episode that the environment's rubric saw when the episode ended. It sees no summaries."""
    steps = [trajectory.turns[k] for k in trajectory.steps]
    shown = [*(turn.observation for turn in steps), trajectory.final_observation]
    messages: list[Message | AssistantMessage] = []
    results: list[ToolResult] = []
    for k, turn in enumerate(steps):
        messages += [*turn.observation, as_sampled(turn.message)]
        texts = {m.tool_call_id: m.text for m in shown[k + 1] if m.role == "tool"}
        for call, outcome in zip(turn.message.tool_calls, turn.tool_results, strict=False):
            results.append(ToolResult(texts.get(call.id, ""), cast(Any, outcome.status), outcome.truncated))
    messages += trajectory.final_observation
    reason, final = trajectory.stop_reason, None
    if (cut := _cut_answer(trajectory)) is not None:
        reason = "answer" if trajectory.terminated else cut  # an environment does not see which limit it was
    if trajectory.final_observation and steps[-1].tool_results:  # a tool ended it
        last = trajectory.final_observation[-1]
        final = last.text if last.name == SUBMITTED and reason == "answer" else None
    elif reason == "answer":
        final = answer(trajectory)
    return Episode(
        trajectory.task, tuple(messages), final, tuple(results), reason, state=NotSaved(), outcome=trajectory.outcome
    )


def _last(trajectory: Trajectory) -> Turn:
    """Return the last turn that the environment saw."""
    return trajectory.turns[trajectory.last_step]


def _cut_answer(trajectory: Trajectory) -> Cut | None:
    """Return why the last message ended early, where the episode ended by it."""
    last = _last(trajectory)
    by_limit = trajectory.truncated and trajectory.stop_reason in ("context", "tokens", *get_args(Cut))
    answered = bool(trajectory.final_observation or last.tool_results)  # then it was a turn as any other
    return last.message.cut([call.name for call in last.message.tool_calls]) if by_limit and not answered else None


def as_sampled(message: AssistantMessage) -> AssistantMessage:
    """Return ``message`` as the environment got it.

    Its calls have the status that their text alone gives them. The saved message says besides which calls the
    environment refused (``rollout/env_results.py``).
    """
    return replace(message, tool_calls=tuple(_as_sampled(call) for call in message.tool_calls))


def _as_sampled(call: ToolCall) -> ToolCall:
    if call.status not in _FOUND_LATE or call.problem:  # only the text itself gives a call a problem
        return call
    if call.status == "unknown_tool" or call.arguments:  # such a call was read
        return replace(call, status="ok")
    block = tool_format(call.format).read_raw(call.raw)  # shards of earlier versions hold no problems
    return replace(call, status=block.status) if block else call
