"""The history of one episode in messages, and its rewriting where it comes near the model's context (``context.py``).

It is what ``history.py`` does with tokens. Sizes are those that the model's server reports. A rewritten history counts
as shorter in proportion to its characters, until the next report.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from areal_agents.chat_model import ChatReply
from areal_agents.context import ChatMessage, Context, Fold, Messages, Summary, applied, folded, kept_from, summed_up
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.history import (
    MISSING,
    UNKNOWN,
    UNUSED,
    count_none,
    count_rewritten,
    request_of,
    require_room,
    written,
)
from areal_agents.rollout.limits import Limits
from areal_agents.types import AssistantMessage, Observation, Rewritten


@dataclass(frozen=True, slots=True)
class NextMessages:
    """The messages to answer, and what is special about the answer. See ``history.Next``."""

    messages: Messages
    rewritten: Rewritten | None = None
    request: Observation | None = None
    most: int = 0


class ChatHistory:
    """The messages of one episode."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._messages: list[ChatMessage] = []
        self._opening = 0
        self._waiting = True  # for what the environment shows now
        self._summary: str | None = None
        self.tokens = 0
        """Of the last prompt and its reply, as reported."""

    async def next(self, episode: EpisodeDriver) -> NextMessages:
        """Return what the model answers next. Raises as ``LimitedHistory.next``."""
        rule, said = episode.context, list(self._messages)
        if self._waiting:
            self._messages += episode.observation
            self._waiting = False
        if not said:
            self._opening = len(self._messages)
            if rule is not None:
                require_room(rule, self._limits, None)
                count_none(episode)
        if rule is None or (self._summary is None and not self._is_near(rule)):
            return NextMessages(self._messages)
        if self._summary is None and isinstance(rule, Summary):
            return self._asked(rule, said, episode)
        return self._taken(await self._rewritten_by(rule, episode), episode)

    def keep(self, message: AssistantMessage, reply: ChatReply, episode: EpisodeDriver) -> None:
        """Add the model's message, and what its server reports."""
        self._messages.append(message)
        self._waiting = True
        if reply.prompt_tokens is not None:
            self.tokens = reply.prompt_tokens + (reply.completion_tokens or 0)
        elif episode.context is not None:
            episode.count(UNKNOWN)

    def keep_summary(self, message: AssistantMessage) -> AssistantMessage:
        """Take the summary that the model wrote, as ``History.keep_summary``."""
        self._summary = message.spoken
        return replace(message, tool_calls=())

    def _is_near(self, rule: Context) -> bool:
        return self.tokens + self._limits.max_turn_tokens > rule.at * self._limits.max_context

    def _asked(self, rule: Summary, said: Messages, episode: EpisodeDriver) -> NextMessages:
        """Ask for a summary of what was said before that is shown which is new, where there is room for one."""
        plain = NextMessages(self._messages)
        if kept_from(self._messages, self._opening, rule.keep) is None:
            return plain
        most, request = min(rule.max_tokens, self._limits.max_turn_tokens), request_of(rule)
        room = self._limits.room(used=self.tokens, spent=episode.tokens)
        if isinstance(room, str) or room < most:
            episode.count(MISSING)
            return plain
        return NextMessages([*said, *request], request=request, most=most)

    async def _rewritten_by(self, rule: Context, episode: EpisodeDriver) -> Rewritten | None:
        if isinstance(rule, Fold):
            return folded(rule, self._messages, self._opening)
        summary, self._summary = self._summary, None
        if summary is None and not isinstance(rule, Summary):
            start = kept_from(self._messages, self._opening, rule.keep)
            if start is not None:
                summary = await written(rule, self._messages[self._opening : start], episode)
        return None if summary is None else summed_up(self._messages, self._opening, rule.keep, summary)

    def _taken(self, rewritten: Rewritten | None, episode: EpisodeDriver) -> NextMessages:
        if rewritten is None:
            return NextMessages(self._messages)
        new = list(applied(rewritten, self._messages))
        before, after = _characters(self._messages), _characters(new)
        if after >= before:
            episode.count(UNUSED)
            return NextMessages(self._messages)
        left = self.tokens * after // before
        count_rewritten(episode, self.tokens - left)
        self._messages, self.tokens = new, left
        return NextMessages(new, rewritten)


def _characters(messages: Messages) -> int:
    return sum(len(m.text) for m in messages)
