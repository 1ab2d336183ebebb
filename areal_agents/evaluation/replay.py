"""The replay of a saved episode, with the same task, seed and messages in a fresh environment with real tools.

    record ─▶ areset(task, seed) ─▶ astep(recorded message) ─▶ … ─▶ afinish, where the runner had ended it
                   │                      │
                   └── compared with the record as it goes: observations, prompt ids, parsed calls, tool results,
                       ending, rewards, components

The recorded assistant messages are played however the environment answers. So only the first difference is sure to be
a cause, and later ones may follow from it. Where the record says that its history was rewritten, the environment's rule
is asked again. Turns count from 0, as in the files. Not covered: whether the engine would sample the same tokens again,
and whether the limits of the run would rewrite a history at the same turns.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from areal_agents.chat.format import ChatFormat
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError, RewardError
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver, Policy, Said
from areal_agents.rollout.history import PlayedHistory
from areal_agents.rollout.rebuilt import as_sampled
from areal_agents.sandbox import backends
from areal_agents.tracking.console import plain
from areal_agents.tracking.trajectories import Record
from areal_agents.types import AssistantMessage, Image, Message, Observation, StopReason, Text, ToolCall, Trajectory

What = Literal[
    "observation", "context", "prompt tokens", "parsing", "exception", "tool results", "state key", "ending", "reward",
    "outcome", "components",
]  # fmt: skip
_LIMITS: tuple[StopReason, ...] = ("context", "tokens")
_DIFF_LINES = 40
_LINE_CHARS = 200
_SHOWN_IDS = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that came out otherwise than recorded."""

    turn: int
    """The turn at which it showed, from 0."""
    what: What
    detail: str


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """The result of one replayed episode."""

    record: Record
    seed: int
    differences: tuple[Difference, ...]
    """In the order in which they showed. Empty where the replay was identical."""
    tokens_checked: bool
    """Whether prompts were rebuilt and completions parsed again. False where no tokenizer was given."""

    @property
    def identical(self) -> bool:
        return not self.differences

    def text(self) -> str:
        """Return the report as text for people, safe for a terminal."""
        t = self.record.trajectory
        head = f"episode {t.id} (task {t.task.id}, {self.record.kind}, step {self.record.step}), seed {self.seed}, "
        head += f"{len(t.turns)} turn{'' if len(t.turns) == 1 else 's'}: "
        note = "" if self.tokens_checked else "\nnot checked, for want of the model's tokenizer: prompt tokens, parsing"
        if any(turn.own_reward is not None for turn in t.turns):
            note += "\nnot replayed: the reward of its group, which `areal-agents rescore` computes again"
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

    An exception of the environment is a difference.

    Args:
        record: the saved episode.
        make_env: makes the environment.
        seed: the environment is reset with it.
        fmt: the run's chat format. With it, prompts are rebuilt and completions parsed again.
        step_timeout: seconds for one reset or step.
        max_turns: the runner's limit in the run, which tells its end by turns from the environment's own. None where
            nobody knows it.

    Raises:
        ArealError: a sandbox failed or a step hung, which says nothing about the episode.
    """
    recorded = record.trajectory
    playback = Playback(recorded, fmt, max_turns)
    host = EnvHost()
    episode = EpisodeDriver(
        make_env, recorded.task, playback, host, id=recorded.id, seed=seed, step_timeout=step_timeout
    )
    try:
        await _play(episode)
    finally:
        await host.close(backends().close_shared)
    found = [*playback.differences, *_differences(recorded, episode, playback)]
    found.sort(key=lambda d: d.turn)  # stable: within a turn, in the order of its events
    return ReplayReport(record, seed, tuple(found), fmt is not None)


class _RecordEnds(Exception):
    """The record has no further message, and the runner did not end it."""


class Playback(Policy):
    """A policy that says what a record says, whatever it is answered.

    It notes where it is shown something else.
    """

    def __init__(self, recorded: Trajectory, fmt: ChatFormat | None, max_turns: int | None) -> None:
        self.differences: list[Difference] = []
        self._recorded, self._fmt, self._max_turns = recorded, fmt, max_turns
        self._history: PlayedHistory | None = None

    async def say(self, episode: EpisodeDriver) -> Said | StopReason:
        k = len(episode.turns)
        if k == len(self._recorded.turns):
            if k == 0 or not self.ended_by_the_runner():  # without a turn there is nothing to score
                raise _RecordEnds
            return self._recorded.stop_reason
        turn = self._recorded.turns[k]
        message, tokens = as_sampled(turn.message), len(turn.completion.ids)
        # Which limit cut the last message stands in the record alone.
        last = k == self._recorded.last_step
        cut = self._recorded.stop_reason if last and self._recorded.stop_reason in _LIMITS else None
        request = turn.observation if turn.kind == "summary" else None
        if request is None and episode.observation != turn.observation:
            self._differ(k, "observation", _diff(_lines(turn.observation), _lines(episode.observation)))
        if self._fmt is None:
            played = turn.completion, turn.prompt_suffix, turn.parent, tokens, cut, turn.rewritten, request
            return Said(message, *played)
        self._history = self._history or PlayedHistory(self._fmt)
        conversation, other = await self._history.before(turn, episode)
        if other:
            self._differ(k, "context", _diff(*other))
        suffix, parent = conversation.suffix, conversation.parent
        if suffix != turn.prompt_suffix:
            self._differ(k, "prompt tokens", _ids_diff(turn.prompt_suffix, suffix))
        elif parent != turn.parent:
            self._differ(k, "prompt tokens", f"recorded as a child of turn {turn.parent}, not {parent}")
        parsed = replace(conversation.add_completion(turn.completion), tokens=message.tokens)
        if request is not None:
            parsed = self._history.keep_summary(parsed)
        if parsed != message:
            self._differ(k, "parsing", _diff(_said(message), _said(parsed)))
        return Said(parsed, turn.completion, suffix, parent, tokens, cut, turn.rewritten, request)

    def ended_by_the_runner(self) -> bool:
        """Say whether the runner ended the recorded episode, so that it has to end this one too.

        Environments end episodes for ``max_turns`` as well. Below the runner's limit it was the environment.
        """
        t, limit = self._recorded, self._max_turns
        if not t.truncated or t.terminated:
            return False
        return t.stop_reason in (*_LIMITS, "content_filter") or (
            t.stop_reason == "max_turns" and (limit is None or len(t.steps) >= limit)
        )

    def _differ(self, turn: int, what: What, detail: str) -> None:
        self.differences.append(Difference(turn, what, detail))


async def _play(episode: EpisodeDriver) -> None:
    """Play the episode, which keeps the environment's own faults.

    Raises every other ArealError.
    """
    try:
        with contextlib.suppress(_RecordEnds):
            await episode.play()
    except ArealError as error:
        if error not in episode.faults:
            raise
    if episode.close_error is not None and episode.close_error not in episode.faults:
        raise episode.close_error


def _differences(recorded: Trajectory, episode: EpisodeDriver, playback: Playback) -> Iterator[Difference]:
    """Yield what the environment did otherwise, besides what it showed before a message."""
    for k, (turn, now) in enumerate(zip(recorded.turns, episode.turns, strict=False)):
        if turn.tool_results != now.tool_results:
            texts = (list(map(str, t.tool_results)) for t in (turn, now))
            yield Difference(k, "tool results", _diff(*texts))
        if turn.state_key != now.state_key:
            yield Difference(k, "state key", f"recorded {turn.state_key}, replayed {now.state_key}")
    if len(episode.turns) == len(recorded.turns) and episode.observation != recorded.final_observation:
        # Noted at the last turn, because it followed that turn and no later turn shows it.
        last = max(0, len(recorded.turns) - 1)
        yield Difference(last, "observation", _diff(_lines(recorded.final_observation), _lines(episode.observation)))
    # An end that was not reached might have changed the rewards of all turns: they are then not compared.
    if all(fault is episode.close_error for fault in episode.faults):
        yield from _end_differences(recorded, episode, playback)
    for fault, k in episode.faults.items():
        cause = fault.__cause__
        trace = "".join(traceback.format_exception(cause)).splitlines() if cause is not None else []
        lines = [str(fault).partition("\n")[0], *trace[1 - _DIFF_LINES :]]
        yield Difference(k, "reward" if isinstance(fault, RewardError) else "exception", _cut(lines))


def _end_differences(recorded: Trajectory, episode: EpisodeDriver, playback: Playback) -> Iterator[Difference]:
    """Yield how the end came out otherwise, and the rewards, which it may have replaced."""
    last, reached = max(0, len(recorded.turns) - 1), max(0, len(episode.turns) - 1)
    before, after = (_ending(t.terminated, t.truncated, t.stop_reason) for t in (recorded, episode))
    if not episode.ended:
        if not recorded.turns and playback.ended_by_the_runner():
            return  # before the first turn, as it was recorded
        yield Difference(last, "ending", f"the record ends here ({recorded.stop_reason}); the environment goes on")
    elif reached < last:
        left = f"in the record it goes on for {last - reached} more turns"
        yield Difference(reached, "ending", f"the episode ends here ({episode.stop_reason}); {left}")
    elif before != after:
        yield Difference(last, "ending", f"recorded {before}, replayed {after}")
    elif recorded.outcome != episode.outcome:
        found = (json.dumps(o, indent=1, sort_keys=True).split("\n") for o in (recorded.outcome, episode.outcome))
        yield Difference(last, "outcome", _diff(*found))
    for k, (turn, now) in enumerate(zip(recorded.turns, episode.turns, strict=False)):
        # Rewards that the end replaced are known only there.
        shown = reached if episode.credited else k
        own, components = turn.own  # what the group's reward made of it cannot be replayed from one episode
        if own != now.reward:
            where = f"turn {k}: " if shown != k else ""
            yield Difference(shown, "reward", f"{where}recorded {own!r}, replayed {now.reward!r}")
        if dict(components) != dict(now.components):
            yield Difference(k, "components", _diff(_pairs(components), _pairs(now.components)))


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
    thought = ["[reasoning]", *message.reasoning.split("\n")] if message.reasoning else []
    return [f"[assistant finish={message.finish}]", *thought, *text.split("\n"), *map(_call_line, message.tool_calls)]


def _call_line(call: ToolCall) -> str:
    return f"call {call.id} {call.name!r} {dict(call.arguments)!r} {call.status} at tokens {call.token_span}"


def _pairs(values: Mapping[str, float]) -> list[str]:
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
    """Return a short unified diff."""
    lines = list(difflib.unified_diff(recorded, replayed, "recorded", "replayed", lineterm="", n=2))
    return _cut(lines) if lines else "the same text in other parts"


def _cut(lines: Sequence[str]) -> str:
    shown = [line if len(line) <= _LINE_CHARS else f"{line[:_LINE_CHARS]}…" for line in lines[:_DIFF_LINES]]
    more = [f"… {len(lines) - _DIFF_LINES} more lines"] if len(lines) > _DIFF_LINES else []
    return "\n".join([*shown, *more])
