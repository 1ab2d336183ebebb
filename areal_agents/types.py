"""The values that flow through the system: frozen, picklable, free of torch.

    Task ─▶ Message* ─▶ Prompt ─▶ Completion ─▶ AssistantMessage ─▶ Turn* ─▶ Trajectory

Token ids are plain ``tuple[int, ...]``. ``logprobs`` are natural logarithms at the sampler's temperature.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Cut = Literal[
    "length",  # a limit on tokens cut it
    "content_filter",  # a server's filter cut or withheld it
    "empty",  # a server sent neither text nor calls
]
"""Why a message ended early."""
Finish = Literal["stop", Cut]
"""How a message ended: by the model itself (``stop``), or early."""
CallStatus = Literal["ok", "invalid_json", "unclosed", "missing_name", "unknown_tool", "invalid_arguments"]
StopReason = Literal[
    "answer",  # the environment ended the task (answered, won, lost)
    "max_turns",  # the environment's or runner's limit on turns
    "context",  # the next prompt would not fit the model's context
    "tokens",  # the episode's token budget is spent
    "length",  # the limit on one turn's tokens cut the last message
    "content_filter",  # a server's filter cut or withheld the last message, or refused the conversation
    "empty",  # a server's last message had neither text nor calls
    "time_budget",  # a time limit the environment itself declares
    "error",  # infrastructure failed; `Trajectory.error` says how
]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """A text part of a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """An image part of a message."""

    ref: str
    """A locator (path or URL); the pixels never travel inside a message."""


Part = Text | Image


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as it stood in the model's output.

    ``arguments`` is empty where ``status`` says that they could not be read.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]
    raw: str
    status: CallStatus = "ok"
    token_span: tuple[int, int] | None = None
    """Half-open range of the block inside the completion's ids; None for text that was never tokens."""
    format: str = "hermes"
    """The name of the tool format that ``raw`` is written in (``chat/tool_formats``), which error texts name too."""
    problem: str = ""
    """What was wrong with it, in words for the model. Empty where ``status`` says enough."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message that the environment shows the model.

    With role ``assistant`` it is one that the environment showed as history.
    """

    role: Role
    parts: tuple[Part, ...]
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The text parts, joined, without images."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """One turn of the model: the Gymnasium action."""

    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Finish = "stop"
    in_thought: bool = False
    """Whether the prompt had opened ``<think>``, so that the text begins inside a thought."""
    reasoning: str = ""
    """The thinking that a server returned beside the text. It is kept, and is never part of the answer."""
    tokens: int | None = field(default=None, compare=False, repr=False)
    """Sampled tokens, its end included. None where nobody counted them: scripts, servers that do not say."""

    @property
    def text(self) -> str:
        """The whole text as sampled, tool-call blocks included."""
        return "".join(p.text for p in self.parts if isinstance(p, Text))

    @property
    def spoken(self) -> str:
        """The text after the reasoning, without a thought that is left open."""
        return without_reasoning(self.text, in_thought=self.in_thought)

    def cut(self, tools: Collection[str]) -> Cut | None:
        """Return why the message ended early, or None where it did not or has a whole call of a tool.

        ``tools`` are names. What such a call asks for is whole, whatever was cut after it.
        """
        whole = any(call.status == "ok" and call.name in tools for call in self.tool_calls)
        return None if whole or self.finish == "stop" else self.finish


def without_reasoning(text: str, *, in_thought: bool = False) -> str:
    """Return ``text`` after its last ``</think>``, without what follows a ``<think>`` that is left open.

    ``in_thought`` says that the text begins inside a thought.
    """
    _, closed, rest = text.rpartition("</think>")
    return "" if in_thought and not closed else rest.partition("<think>")[0]


Observation = tuple[Message, ...]
Info = dict[str, Any]


def system(text: str) -> Message:
    """Make a system message of one text part."""
    return Message("system", (Text(text),))


def user(text: str) -> Message:
    """Make a user message of one text part."""
    return Message("user", (Text(text),))


def tool_result(text: str, *, call: ToolCall) -> Message:
    """Make the result of one tool call, as the model will see it."""
    return Message("tool", (Text(text),), tool_call_id=call.id, name=call.name or None)


def content_hash(payload: Mapping[str, Any]) -> str:
    """Compute SHA-256 over canonical JSON, so that equal payloads hash equal in every process.

    Raises TypeError on non-JSON values.
    """
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any, place: str) -> Any:
    """Return ``value`` with Python's own numbers for NumPy's, and with lists and dictionaries of its own.

    Raises TypeError for what JSON lacks. ``place`` says where in the payload it stands.
    """
    if isinstance(value, Mapping):
        return {key: _plain(inner, f"{place}[{key!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(inner, f"{place}[{i}]") for i, inner in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{place} is {value}")
    if value is None or isinstance(value, str | int | float):
        return value
    hint = {"ndarray": ": use .tolist()", "set": ": use sorted(…)", "bytes": ": decode it"}
    raise TypeError(f"{place} is a {type(value).__name__}{hint.get(type(value).__name__, '')}")


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to do.

    The gold answer stays inside ``payload`` and never reaches an observation.
    """

    id: str
    split: str
    seed: int
    payload: Mapping[str, Any]
    content_hash: str

    @classmethod
    def make(cls, id: str, *, split: str, seed: int, payload: Mapping[str, Any]) -> Task:
        """Make a task, whose hash is computed from ``payload``.

        Args:
            id: name of the task.
            split: the split that it belongs to.
            seed: the task's own seed.
            payload: what the environment knows of it, the gold answer included; JSON values.

        Raises:
            TypeError: for a payload that is not JSON, with the task and the place. NumPy's numbers become Python's.
        """
        if not isinstance(id, str) or not isinstance(split, str):
            raise TypeError(f"task {id!r} of split {split!r}: id and split are texts")
        if not isinstance(payload, Mapping):
            raise TypeError(f"the payload of task {id!r} is a {type(payload).__name__}: it must be a dictionary")
        try:
            plain = _plain(payload, "payload")
            return cls(id, split, operator.index(seed), plain, content_hash(plain))
        except (TypeError, ValueError) as error:
            raise TypeError(f"task {id!r} is not JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class Prompt:
    """The token ids to sample from, and their images."""

    ids: Ids
    media: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens that an engine sampled: three parallel sequences, one entry a token."""

    ids: Ids
    logprobs: tuple[float, ...]
    """log μ(token) under the distribution it was truly sampled from, at the sampler's temperature (T3, T8)."""
    versions: tuple[int, ...]
    """The policy version whose weights produced each token."""
    finish: Finish

    def __post_init__(self) -> None:
        if not len(self.ids) == len(self.logprobs) == len(self.versions):
            raise ValueError(
                f"Completion: {len(self.ids)} ids, {len(self.logprobs)} logprobs and {len(self.versions)} versions "
                "must be equally many"
            )


@dataclass(frozen=True, slots=True)
class ToolOutcome:
    """The end of one tool call, as the environment reported it.

    Its text is the tool message that answers the call.
    """

    status: str
    """``ToolResult.status``: ok, error, timeout, …"""
    truncated: bool = False
    """Whether the middle of the result's text was cut out."""


TurnKind = Literal["step", "summary"]
Rewritten = tuple[int | Message, ...]
"""A history that took another one's place. A number is the index of a message of the old one, which was kept."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One Gymnasium step: the tokens shown since the last turn, the tokens sampled, and what they earned.

    A summary (``kind``) is a turn without a step.
    """

    prompt_suffix: Ids
    """Ids between the parent's last sampled token and this turn's first; the whole prompt where ``parent`` is None."""
    completion: Completion
    message: AssistantMessage
    reward: float = 0.0
    components: Mapping[str, float] = field(default_factory=dict)
    parent: int | None = None
    """Index of the turn whose context this one extends; None: ``prompt_suffix`` is a whole prompt (T5)."""
    observation: Observation = ()
    """The messages that were new in this turn's prompt; kept for people and for rescoring."""
    state_key: str | None = None
    """Of the state that ``observation`` showed. Equal keys mark equal states across a group (anchor states)."""
    tool_results: tuple[ToolOutcome, ...] = ()
    """One a tool call of ``message``, in order; empty where none ran."""
    own_reward: float | None = None
    """What the episode by itself had earned, where a group's reward made ``reward`` another number. Else None."""
    own_components: Mapping[str, float] | None = None
    """The same of ``components``, which then hold the group's besides, as ``group.NAME``."""
    kind: TurnKind = "step"
    """``summary``: the policy summed its history up, asked by the runner with ``observation``. The environment saw
    nothing of it, so its reward is 0."""
    rewritten: Rewritten | None = None
    """What took the place of the history right before ``observation`` was answered; None where it stayed."""

    @property
    def own(self) -> tuple[float, Mapping[str, float]]:
        """Reward and components as the episode by itself earned them, without its group's reward."""
        reward = self.reward if self.own_reward is None else self.own_reward
        return reward, self.components if self.own_components is None else self.own_components


def steps_of(turns: Sequence[Turn]) -> tuple[int, ...]:
    """Return the indices of the turns that are steps of the environment."""
    return tuple(k for k, turn in enumerate(turns) if turn.kind == "step")


@dataclass(frozen=True, slots=True)
class Tail:
    """The prompt that the next turn would have had, where a limit cut the episode: there a critic says what was left.

    None of it was sampled.
    """

    ids: Ids
    """As ``Turn.prompt_suffix``."""
    parent: int | None
    """As ``Turn.parent``."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One finished episode."""

    id: str
    task: Task
    group: str
    turns: tuple[Turn, ...]
    terminated: bool
    truncated: bool
    stop_reason: StopReason
    final_observation: Observation = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Anything worth averaging (tool seconds, retries, …); never used for training."""
    error: str | None = None
    tail: Tail | None = None
    """None where the task ended, where no further turn had room, and where no token ids are known."""
    outcome: Any = None
    """What was found at the end, as JSON has it (``Episode.outcome``)."""

    @property
    def reward(self) -> float:
        """The undiscounted sum over turns."""
        return float(sum(t.reward for t in self.turns))

    @property
    def steps(self) -> tuple[int, ...]:
        """The indices of the turns that the environment saw: all but summaries."""
        return steps_of(self.turns)

    @property
    def last_step(self) -> int:
        """The index of the last turn that the environment saw, -1 where there is none."""
        return max(self.steps, default=-1)

    def over_turns(self, rewards: Sequence[float]) -> tuple[float, ...]:
        """Return one number a turn, of one a step: a summary has 0."""
        given = dict(zip(self.steps, rewards, strict=True))
        return tuple(given.get(k, 0.0) for k in range(len(self.turns)))

    @property
    def sampled_tokens(self) -> int:
        """The number of sampled tokens.

        Without token ids (``rollout/chat_policy.py``) it is what the model's server reported, or 0.
        """
        ids = sum(len(t.completion.ids) for t in self.turns)
        return ids or int(self.metrics.get("completion_tokens", 0))

    @property
    def min_version(self) -> int:
        """The oldest policy that sampled any of its tokens.

        It is 0 for an episode without tokens.
        """
        return min((v for t in self.turns for v in t.completion.versions), default=0)


@dataclass(frozen=True, slots=True)
class Group:
    """G episodes of one task with one seed: the unit that advantages, admission and batches count in."""

    id: str
    task: Task
    trajectories: tuple[Trajectory, ...]
    admitted_version: int
    order: int
    """Position in the sequence of admissions."""
    greedy: Trajectory | None = None
    """One more episode, sampled at temperature 0, where the estimator compares with it. It trains nothing."""
    env: str = ""
    """The label of its environment. Empty where the run has one environment."""
    level: float | None = None
    """The difficulty that a curriculum chose for it."""
