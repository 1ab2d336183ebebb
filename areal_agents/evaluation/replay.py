"""A saved episode once more: the same task, seed and assistant messages, in a fresh environment with real tools.

    record ─▶ areset(task, seed) ─▶ astep(recorded message) ─▶ … ─▶ afinish, where the runner had ended it
                   │                      │
                   └── compared with the record as it goes: observations, prompt ids, parsed calls, tool results,
                       ending, rewards, components

The recorded messages are played however the environment answers, so only the first difference is sure to be a cause;
later ones may follow from it. Turns count from 0, as in the files. Not covered: whether the engine would sample the
same tokens again.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError
from areal_agents.evaluation.saved_run import as_sampled
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import outcomes_of
from areal_agents.tracking.console import plain
from areal_agents.tracking.trajectories import Record
from areal_agents.types import AssistantMessage, Image, Info, Message, Observation, Text, ToolCall, Turn

What = Literal[
    "observation",
    "prompt tokens",
    "parsing",
    "exception",
    "tool results",
    "state key",
    "ending",
    "reward",
    "components",
]
T = TypeVar("T")
_DIFF_LINES = 40
_LINE_CHARS = 200
_SHOWN_IDS = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that came out otherwise."""

    turn: int
    """The turn at which it showed, from 0."""
    what: What
    detail: str


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """One replayed episode."""

    record: Record
    seed: int
    differences: tuple[Difference, ...]
    """In the order in which they showed; empty: identical."""
    tokens_checked: bool
    """Whether prompts were rebuilt and completions parsed again; False where no tokenizer was given."""

    @property
    def identical(self) -> bool:
        return not self.differences

    def text(self) -> str:
        """For people; safe for a terminal."""
        t = self.record.trajectory
        head = f"episode {t.id} (task {t.task.id}, {self.record.kind}, step {self.record.step}), seed {self.seed}, "
        head += f"{len(t.turns)} turn{'' if len(t.turns) == 1 else 's'}: "
        note = "" if self.tokens_checked else "\nnot checked, for want of the model's tokenizer: prompt tokens, parsing"
        if self.identical:
            return plain(f"{head}identical{note}")
        first, *rest = self.differences
        lines = [f"{head}different", f"first difference, at turn {first.turn}: {first.what}", first.detail]
        if rest:
            lines.append("then: " + ", ".join(f"{d.what} (turn {d.turn})" for d in rest))
        return plain("\n".join(lines) + note)


async def replay(
    record: Record,
    make_env: Callable[[], AgentEnv],
    *,
    seed: int,
    fmt: ChatFormat | None = None,
    step_timeout: float = 60.0,
    max_turns: int | None = None,
) -> ReplayReport:
    """Play the record's messages in an environment of ``make_env`` and compare.

    ``fmt``: the run's chat format; with it, prompts are rebuilt and completions parsed again. ``step_timeout``:
    seconds for one reset or step. ``max_turns``: the runner's limit in the run, which tells its end by turns from the
    environment's own; None where nobody knows it. An exception of the environment is a difference; an ArealError (a
    sandbox that fails, a step that hangs) says nothing about the episode and is raised.
    """
    host = EnvHost()
    playback = _Playback(record, make_env, fmt, step_timeout, host, max_turns)
    try:
        await playback.play(seed)
    finally:
        try:
            await playback.close()
        finally:
            await host.close(_close_sandboxes)
    return ReplayReport(record, seed, tuple(playback.differences), fmt is not None)


async def _close_sandboxes() -> None:
    await importlib.import_module("areal_agents.sandboxes").close_shared()


class _Raised(Exception):
    """The environment raised; the difference is noted and the replay ends."""


@dataclass(slots=True)
class _Earned:
    """What the replay earned so far, one entry a turn."""

    rewards: list[float]
    components: list[dict[str, float]]
    credited: bool = False
    """The end replaced the rewards of all turns."""


class _Playback:
    """The state of one replay. Every call into the environment goes through ``_env``."""

    def __init__(
        self, record: Record, make_env: Callable[[], AgentEnv], fmt: ChatFormat | None, timeout: float, host: EnvHost,
        max_turns: int | None,
    ) -> None:  # fmt: skip
        self.trajectory = record.trajectory
        self.differences: list[Difference] = []
        self._make_env, self._fmt, self._timeout, self._host = make_env, fmt, timeout, host
        self._max_turns = max_turns
        self._environment: AgentEnv | None = None
        self._conversation: Conversation | None = None
        self._earned = _Earned([], [])

    async def play(self, seed: int) -> None:
        try:
            observation = await self._open(seed)
            for k, turn in enumerate(self.trajectory.turns):
                self._compare_shown(k, turn, observation)
                message = self._message(k, turn)
                observation, ended = await self._step(k, turn, message)
                if ended:
                    break
                if self._conversation is not None and k + 1 < len(self.trajectory.turns):
                    self._conversation.add_observation(observation)
        except _Raised:
            pass

    async def close(self) -> None:
        environment = self._environment
        if environment is not None:
            last = max(0, len(self._earned.rewards) - 1)
            with contextlib.suppress(_Raised):
                await self._env(last, environment.aclose, "close")

    async def _open(self, seed: int) -> Observation:
        async def create() -> tuple[Observation, Info]:
            self._environment = self._make_env()
            return await self._environment.areset(seed=seed, options={"task": self.trajectory.task})

        observation, _ = await self._env(0, create, "reset")
        assert self._environment is not None
        if self._fmt is not None:
            self._conversation = Conversation(self._fmt, observation, self._environment.tools)
        return observation

    def _compare_shown(self, k: int, turn: Turn, observation: Observation) -> None:
        if observation != turn.observation:
            self._differ(k, "observation", _diff(_lines(turn.observation), _lines(observation)))
        conversation = self._conversation
        if conversation is None:
            return
        if conversation.suffix != turn.prompt_suffix:
            self._differ(k, "prompt tokens", _ids_diff(turn.prompt_suffix, conversation.suffix))
        elif conversation.parent != turn.parent:
            self._differ(k, "prompt tokens", f"recorded as a child of turn {turn.parent}, not {conversation.parent}")

    def _message(self, k: int, turn: Turn) -> AssistantMessage:
        """The action: what the recorded ids say, or the recorded message where nothing can read them."""
        recorded = as_sampled(turn.message)
        if self._conversation is None:
            return recorded
        parsed = self._conversation.add_completion(turn.completion)
        if parsed != recorded:
            self._differ(k, "parsing", _diff(_said(recorded), _said(parsed)))
        return parsed

    async def _step(self, k: int, turn: Turn, message: AssistantMessage) -> tuple[Observation, bool]:
        """One turn; True where the replay ends with it."""
        environment, last = self._env_of(), k == len(self.trajectory.turns) - 1
        observation, reward, terminated, truncated, info = await self._env(
            k, lambda: environment.astep(message), "step"
        )
        if outcomes_of(info) != turn.tool_results:
            self._differ(k, "tool results", _diff(list(map(str, turn.tool_results)), list(map(str, outcomes_of(info)))))
        if last and observation != self.trajectory.final_observation:
            # Noted at this turn: it is what followed it, and no later turn shows it.
            self._differ(k, "observation", _diff(_lines(self.trajectory.final_observation), _lines(observation)))
        self._earned.rewards.append(self._number(k, reward))
        self._earned.components.append({name: self._number(k, x) for name, x in info.get("components", {}).items()})
        ended = bool(terminated or truncated)
        if ended and not last:
            reason = info.get("stop_reason", "answer" if terminated else "max_turns")
            left = len(self.trajectory.turns) - k - 1
            self._differ(
                k, "ending", f"the episode ends here ({reason}); in the record it goes on for {left} more turns"
            )
            self._compare_rewards(k)
        elif last:
            await self._end(k, bool(terminated), bool(truncated), info)
            self._compare_rewards(k)
        if turn.state_key is not None or "state_key" in info:
            self._expect(k, "state key", turn.state_key, info.get("state_key"))
        return observation, ended

    async def _end(self, k: int, terminated: bool, truncated: bool, info: Info) -> None:
        """The recorded end: the environment's own, or the runner's, which asks it for the reward of what exists."""
        t, environment = self.trajectory, self._env_of()
        if terminated or truncated:
            reason = info.get("stop_reason", "answer" if terminated else "max_turns")
        elif self._ended_by_the_runner():
            extra, info = await self._env(k, lambda: environment.afinish(t.stop_reason), "finish")
            self._earned.rewards[k] += self._number(k, extra)
            self._earned.components[k] |= {n: self._number(k, x) for n, x in info.get("components", {}).items()}
            truncated, reason = True, t.stop_reason
        else:
            self._differ(k, "ending", f"the record ends here ({t.stop_reason}); the environment goes on")
            return
        self._expect(
            k, "ending", _ending(t.terminated, t.truncated, t.stop_reason), _ending(terminated, truncated, reason)
        )
        credit = info.get("turn_rewards")
        if credit is not None:
            self._earned.rewards, self._earned.credited = [self._number(k, x) for x in credit], True

    def _ended_by_the_runner(self) -> bool:
        t, limit = self.trajectory, self._max_turns
        if not t.truncated or t.terminated:
            return False
        return t.stop_reason in ("context", "tokens") or (
            t.stop_reason == "max_turns" and (limit is None or len(t.turns) >= limit)
        )

    def _compare_rewards(self, last: int) -> None:
        """Turn by turn. Known only now: an end may replace the rewards of all turns."""
        turns, earned = self.trajectory.turns[: last + 1], self._earned
        if len(earned.rewards) != len(turns):
            self._differ(last, "reward", f"{len(earned.rewards)} turn rewards for {len(turns)} turns")
            return
        for k, turn in enumerate(turns):
            shown = last if earned.credited else k
            where = f"turn {k}: " if shown != k else ""
            if turn.reward != earned.rewards[k]:
                self._differ(shown, "reward", f"{where}recorded {turn.reward!r}, replayed {earned.rewards[k]!r}")
            if dict(turn.components) != earned.components[k]:
                self._differ(k, "components", _diff(_pairs(dict(turn.components)), _pairs(earned.components[k])))
        self.differences.sort(key=lambda d: d.turn)  # stable: within a turn, in the order of its events

    def _number(self, k: int, value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            self._differ(k, "exception", f"the reward or component {value!r} is not a number")
            raise _Raised from error

    def _expect(self, k: int, what: What, recorded: object, replayed: object) -> None:
        if recorded != replayed:
            self._differ(k, what, f"recorded {recorded}, replayed {replayed}")

    def _differ(self, turn: int, what: What, detail: str) -> None:
        self.differences.append(Difference(turn, what, detail))

    def _env_of(self) -> AgentEnv:
        assert self._environment is not None
        return self._environment

    async def _env(self, k: int, make: Callable[[], Awaitable[T]], what: str) -> T:
        """Call into the environment. The boundary at which an author's exception becomes a difference."""
        label = f"{what} of task {self.trajectory.task.id}"
        try:
            return await self._host.call(make, timeout=self._timeout, what=label)
        except ArealError:
            raise
        except Exception as error:  # third-party code: noted with its traceback
            trace = "".join(traceback.format_exception(error)).splitlines()[-_DIFF_LINES:]
            self._differ(k, "exception", f"{label} raised:\n" + _cut(trace))
            raise _Raised from error


def _ending(terminated: bool, truncated: bool, reason: str) -> str:
    how = [name for name, yes in (("terminated", terminated), ("truncated", truncated)) if yes]
    return f"{' and '.join(how) or 'not ended'} ({reason})"


# --- differences as text -------------------------------------------------------------------------------------------


def _lines(observation: Observation) -> list[str]:
    return [line for message in observation for line in _message_lines(message)]


def _message_lines(message: Message) -> list[str]:
    named = [f"{k}={v}" for k, v in (("name", message.name), ("call", message.tool_call_id)) if v is not None]
    text = "".join(p.text if isinstance(p, Text) else f"[image {p.ref}]" for p in message.parts)
    return [f"[{' '.join([message.role, *named])}]", *text.split("\n")]


def _said(message: AssistantMessage) -> list[str]:
    text = "".join(f"[image {p.ref}]" if isinstance(p, Image) else p.text for p in message.parts)
    return [f"[assistant finish={message.finish}]", *text.split("\n"), *map(_call_line, message.tool_calls)]


def _call_line(call: ToolCall) -> str:
    return f"call {call.id} {call.name!r} {dict(call.arguments)!r} {call.status} at tokens {call.token_span}"


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{name} = {value!r}" for name, value in sorted(values.items())]


def _ids_diff(recorded: Sequence[int], rebuilt: Sequence[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(recorded, rebuilt, strict=False)) if a != b), None)
    at = min(len(recorded), len(rebuilt)) if at is None else at
    first = max(0, at - 2)
    return (
        f"from id {at} on: recorded {list(recorded[first : first + _SHOWN_IDS])} of {len(recorded)}, rebuilt "
        f"{list(rebuilt[first : first + _SHOWN_IDS])} of {len(rebuilt)} (shown from id {first})"
    )


def _diff(recorded: list[str], replayed: list[str]) -> str:
    """A short unified diff."""
    lines = list(difflib.unified_diff(recorded, replayed, "recorded", "replayed", lineterm="", n=2))
    return _cut(lines) if lines else "the same text in other parts"


def _cut(lines: Sequence[str]) -> str:
    shown = [line if len(line) <= _LINE_CHARS else f"{line[:_LINE_CHARS]}…" for line in lines[:_DIFF_LINES]]
    more = [f"… {len(lines) - _DIFF_LINES} more lines"] if len(lines) > _DIFF_LINES else []
    return "\n".join([*shown, *more])
