"""What an environment chooses to happen to the history of a conversation that comes near the model's context.

    messages ─▶ Fold ───────▶ old tool results become a short note each
             ─▶ RuleSummary ▶ old turns become a text that the environment's own function writes
             ─▶ Summary ────▶ old turns become a text that the policy writes, in a turn of its own that trains

    class MyEnv(ToolEnv):
        context = Fold(keep=2, at=0.8)

The runner does it (``rollout/history.py``) and says so in the turn that follows (``Turn.rewritten``). The environment
is told nothing, and its reward sees every message as it was. A rewritten history is a new root of the episode's tree of
turns (T5): its prompt is rendered from the messages, and what was sampled before trains where it was sampled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, get_args

from areal_agents.errors import ConfigError
from areal_agents.types import AssistantMessage, Image, Message, Rewritten, Role, Text, user
from areal_agents.utils.foreign import find_foreign
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import short

ChatMessage: TypeAlias = "Message | AssistantMessage"
Messages: TypeAlias = "Sequence[ChatMessage]"
REQUEST = (
    "The conversation is about to grow too long. Write a summary of it, from which alone you will go on: what the task "
    "asks for, what you found out (names, numbers and code exactly), what you tried that failed, and what to do next. "
    "Call no tool. What you called last will be shown to you after the summary."
)
"""What asks the policy for a summary, unless an environment says it otherwise."""
HEAD = "Summary of the conversation so far:\n\n"
"""Begins the user message in which a summary stands."""
EMPTY = "(nothing was written)"
"""Stands for a summary without a text, such as a thought that never ended."""


def note(characters: int) -> str:
    """Return the text that takes the place of a result of so many characters."""
    return f"[{characters:,} characters of this result were folded away]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """A rule: results that tools gave in older turns become a short note, which says how long they were."""

    keep: int = 2
    """The last turns whose results stay as they are, at least 1: the last one's were never seen."""
    at: float = 0.8
    """The share of ``model.max_context`` that the next prompt and a longest turn would have to exceed."""
    longer_than: int = 200
    """Results of at most so many characters stay as they are."""
    roles: tuple[Role, ...] = ("tool",)
    """Whose messages are folded. ``("tool", "user")`` is for environments that answer as a user, such as games."""

    def __post_init__(self) -> None:
        _require_whole("Fold", "keep", self.keep, least=1)
        _require_share("Fold", self.at)
        _require_whole("Fold", "longer_than", self.longer_than, least=len(note(10**12)))
        roles: object = self.roles
        known = set(get_args(Role)) - {"assistant"}
        if not isinstance(roles, list | tuple) or not roles or not known.issuperset(roles):
            raise ConfigError(f"Fold(roles={short(roles)}): name some of {', '.join(sorted(known))}, in a tuple")
        object.__setattr__(self, "roles", tuple(roles))  # TOML has lists


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSummary:
    """A rule: older turns become a text that a function of the environment's author writes."""

    write: Callable[[Messages], str | Awaitable[str]]
    """Is given the messages that go away, the last summary among them, and returns their summary. It may be async. It
    must be deterministic, as an environment is."""
    keep: int = 1
    """The last turns that stay as they are, at least 1."""
    at: float = 0.75
    """As ``Fold.at``."""

    def __post_init__(self) -> None:
        if not callable(self.write):
            raise ConfigError(f"RuleSummary(write={short(self.write)}): it must be a function of messages")
        _require_whole("RuleSummary", "keep", self.keep, least=1)
        _require_share("RuleSummary", self.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A turn of the policy: it is asked for a summary of the whole history, which takes the place of older turns.

    It is asked before it is shown what its last message led to, so that there is room for an answer.
    """

    prompt: str = REQUEST
    """Asks for it, as a user's message."""
    keep: int = 1
    """The last turns that stay as they are, at least 1."""
    at: float = 0.75
    """As ``Fold.at``. The rest of the context must have room for ``prompt`` and ``max_tokens``."""
    max_tokens: int = 256
    """The most tokens of a summary. ``rollout.max_turn_tokens`` bounds it too."""
    scripted: Callable[[Messages], str] | None = None
    """Writes the summary of a scripted demonstration, of the history that the policy would see. Without it, a
    demonstration that needs a summary is refused."""

    def __post_init__(self) -> None:
        prompt: object = self.prompt
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"Summary(prompt={short(prompt)}): it must be a text that asks for a summary")
        _require_whole("Summary", "keep", self.keep, least=1)
        _require_whole("Summary", "max_tokens", self.max_tokens, least=1)
        _require_share("Summary", self.at)
        if self.scripted is not None and not callable(self.scripted):
            raise ConfigError(f"Summary(scripted={short(self.scripted)}): it must be a function of messages")


Context: TypeAlias = "Fold | RuleSummary | Summary"
ContextLike: TypeAlias = "Context | Mapping[str, Any]"
_KINDS: Mapping[str, type] = {"fold": Fold, "rule_summary": RuleSummary, "summary": Summary}
_FUNCTIONS = ("write", "scripted")


def context_of(given: object) -> Context | None:
    """Return the rule that ``given`` is or describes, as keyword arguments of environments do.

    A mapping names its ``kind`` and the fields of that class: ``{kind = "fold", keep = 1}``. Functions are named as
    ``package.module:function``. ``{kind = "none"}`` is no rule, in place of a class's own.

    Raises ConfigError.
    """
    if isinstance(given, Fold | RuleSummary | Summary):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"context is {short(given)}: give Fold(…), Summary(…), RuleSummary(…) or {{kind = …}}")
    fields = dict(given)
    kind = fields.pop("kind", None)
    if kind == "none" and not fields:
        return None
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ConfigError(f"context.kind is {short(kind)}: there are {', '.join(_KINDS)}, and none")
    known = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise ConfigError(f"context.{name}: {kind} has {', '.join(known)}")
    for name in _FUNCTIONS:
        if isinstance(named := fields.get(name), str):
            if ":" not in named:
                raise ConfigError(f'context.{name}: write "package.module:function"')
            fields[name] = find_foreign(named, f"context.{name}")
    if kind == "rule_summary" and "write" not in fields:
        raise ConfigError('context.write is missing: name the function, as "package.module:function"')
    made: Context = cls(**fields)
    return made


# --- what a rule makes of a history -------------------------------------------------------------------------------


def kept_from(messages: Messages, opening: int, keep: int) -> int | None:
    """Return the index from which on the last ``keep`` turns stand, or None where nothing older is there.

    Args:
        messages: the history, with what the next turn will answer.
        opening: how many messages the episode began with. They always stay.
        keep: how many turns.
    """
    said = [i for i, m in enumerate(messages) if i >= opening and isinstance(m, AssistantMessage)]
    return None if len(said) <= keep else said[-keep]


def folded(rule: Fold, messages: Messages, opening: int) -> Rewritten | None:
    """Return the history with its old results folded, or None where there are none. See ``kept_from``."""
    start = kept_from(messages, opening, rule.keep)
    if start is None:
        return None
    out = tuple(
        _folded(m) if opening <= i < start and isinstance(m, Message) and _is_long(rule, m) else i
        for i, m in enumerate(messages)
    )
    return out if any(isinstance(entry, Message) for entry in out) else None


def summed_up(messages: Messages, opening: int, keep: int, text: str) -> Rewritten | None:
    """Return the history with ``text`` in the place of older turns, or None where there are none. See ``kept_from``."""
    start = kept_from(messages, opening, keep)
    if start is None:
        return None
    return (*range(opening), user(HEAD + (text.strip() or EMPTY)), *range(start, len(messages)))


def applied(rewritten: Rewritten, messages: Messages) -> tuple[ChatMessage, ...]:
    """Return the messages of a rewritten history. ``messages`` are those of the old one.

    Raises ValueError for an index that the old one does not have.
    """
    if any(isinstance(entry, int) and not 0 <= entry < len(messages) for entry in rewritten):
        raise ValueError(f"a rewritten history keeps messages that a history of {len(messages)} does not have")
    return tuple(messages[entry] if isinstance(entry, int) else entry for entry in rewritten)


def _is_long(rule: Fold, message: Message) -> bool:
    has_image = any(isinstance(part, Image) for part in message.parts)
    return message.role in rule.roles and (has_image or len(message.text) > rule.longer_than)


def _folded(message: Message) -> Message:
    return replace(message, parts=(Text(note(len(message.text))),))


def _require_whole(cls: str, name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{cls}({name}={short(value)}): it must be a whole number of at least {least}")


def _require_share(cls: str, value: object) -> None:
    try:
        share = finite(value)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"{cls}(at={short(value)}): it must be a share of the context, above 0 and at most 1")
