"""The history of one episode in tokens, and its rewriting where it comes near the model's context (``context.py``).

    what the environment shows ─▶ LimitedHistory.next ─▶ the conversation to answer in
                                       │
                                       ├── room enough ─▶ as it is
                                       ├── Fold, RuleSummary ─▶ restarted with the rewritten messages
                                       └── Summary ─▶ a branch that asks for a summary, before what is shown now;
                                                      its answer (``keep_summary``) restarts the conversation

Whether a history is near the limit follows from counts of tokens alone, so that an episode played again is rewritten
at the same turns. A rewritten history whose prompt is not shorter is not taken.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass, replace

from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.context import (
    Context,
    Fold,
    Messages,
    RuleSummary,
    Summary,
    applied,
    folded,
    kept_from,
    summed_up,
)
from areal_agents.errors import ConfigError, EnvError
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.limits import Limits
from areal_agents.types import AssistantMessage, Observation, Rewritten, Turn, user
from areal_agents.utils.short_text import cut, short

FOLDS, SUMMARIES, REMOVED = "context_folds", "context_summaries", "context_tokens_removed"
"""Metrics of an episode: histories folded, histories summed up, and tokens by which prompts became shorter."""
UNUSED, MISSING, UNKNOWN = "context_not_shorter", "context_summaries_missing", "context_unknown"
"""Metrics of an episode: rewritten histories that were not taken, summaries for which there was no room, and replies of
a server that does not say how many tokens its prompts have."""
COUNTED = (FOLDS, SUMMARIES, REMOVED, UNUSED, MISSING, UNKNOWN)
"""The metrics that an episode has where its environment has a rule."""


Others = tuple[list[str], list[str]]
"""A rewritten history as it was recorded, and as the environment's rule makes it now, as lines of text."""


@dataclass(frozen=True, slots=True)
class Next:
    """The conversation to answer in, and what is special about the answer."""

    conversation: Conversation
    rewritten: Rewritten | None = None
    """As ``Turn.rewritten``."""
    request: Observation | None = None
    """What asks for a summary, where the answer is to be one."""
    most: int = 0
    """The most tokens of a summary."""


class History:
    """The conversation of one episode, with what rewrites it."""

    def __init__(self, fmt: ChatFormat) -> None:
        self._fmt = fmt
        self._conversation: Conversation | None = None
        self._opening = 0
        self._summary: str | None = None

    @property
    def conversation(self) -> Conversation:
        assert self._conversation is not None, "nothing was shown yet"
        return self._conversation

    def show(self, episode: EpisodeDriver) -> Conversation:
        """Add what the episode shows now, where it was not added yet."""
        if self._conversation is None:
            self._conversation = Conversation(self._fmt, episode.observation, episode.tools)
            self._opening = len(episode.observation)
        elif self._conversation.waiting:
            self._conversation.add_observation(episode.observation)
        return self._conversation

    def keep_summary(self, message: AssistantMessage) -> AssistantMessage:
        """Take the summary that the policy wrote, with which the next conversation begins.

        Returns it without the calls in it, which nobody runs.
        """
        self._summary = message.spoken
        return replace(message, tool_calls=())

    def _asking(self, request: Observation) -> Conversation:
        """Return a branch that asks for a summary behind the last turn, before what was shown since."""
        branch = self.conversation.fork(self.conversation.last)
        branch.add_observation(request)
        return branch

    def _restarted(self, rewritten: Rewritten) -> Conversation:
        return self.conversation.restart(applied(rewritten, self.conversation.messages))

    async def _rewritten_by(self, rule: Context, episode: EpisodeDriver) -> Rewritten | None:
        """Return what ``rule`` makes of the history, or None where there is nothing to rewrite."""
        messages = self.conversation.messages
        if isinstance(rule, Fold):
            return folded(rule, messages, self._opening)
        if isinstance(rule, Summary):
            summary, self._summary = self._summary, None
            return None if summary is None else summed_up(messages, self._opening, rule.keep, summary)
        start = kept_from(messages, self._opening, rule.keep)
        if start is None:
            return None
        text = await written(rule, messages[self._opening : start], episode)
        return summed_up(messages, self._opening, rule.keep, text)


class LimitedHistory(History):
    """The history of an episode that is being played, rewritten where it comes near the limit."""

    def __init__(self, fmt: ChatFormat, limits: Limits) -> None:
        super().__init__(fmt)
        self._limits = limits

    async def next(self, episode: EpisodeDriver) -> Next:
        """Return where the policy answers next.

        Raises:
            TemplateError: the template cannot show it.
            ConfigError: the environment's rule cannot keep to the limits.
            EnvError: the environment's own function fails.
        """
        rule = episode.context
        if rule is not None and self._conversation is None:
            require_room(rule, self._limits, self._fmt)
            count_none(episode)
        conversation = self.show(episode)
        if rule is None or (self._summary is None and not self._is_near(rule)):
            return Next(conversation)
        if self._summary is None and isinstance(rule, Summary):
            return self._asked(rule, episode)
        return self._taken(await self._rewritten_by(rule, episode), episode)

    def _is_near(self, rule: Context) -> bool:
        wanted = len(self.conversation.prompt.ids) + self._limits.max_turn_tokens
        return wanted > rule.at * self._limits.max_context

    def _asked(self, rule: Summary, episode: EpisodeDriver) -> Next:
        """Return the branch that asks for a summary, or the history as it is where a summary could not help."""
        plain = Next(self.conversation)
        empty = summed_up(self.conversation.messages, self._opening, rule.keep, "")
        if empty is None:
            return plain
        branch, shortest = self._asking(request_of(rule)), self._restarted(empty)
        most = min(rule.max_tokens, self._limits.max_turn_tokens)
        room = self._limits.room(used=len(branch.prompt.ids), spent=episode.tokens)
        after = self._limits.room(used=len(shortest.prompt.ids), spent=episode.tokens + most)
        if isinstance(room, str) or room < most or isinstance(after, str):
            episode.count(MISSING)
            return plain
        return Next(branch, request=request_of(rule), most=most)

    def _taken(self, rewritten: Rewritten | None, episode: EpisodeDriver) -> Next:
        before = self.conversation
        if rewritten is None:
            return Next(before)
        after = self._restarted(rewritten)
        removed = len(before.prompt.ids) - len(after.prompt.ids)
        if removed <= 0:
            episode.count(UNUSED)
            return Next(before)
        count_rewritten(episode, removed)
        self._conversation = after
        return Next(after, rewritten)


class PlayedHistory(History):
    """The history of a recorded episode that is played again, rewritten where the record says so."""

    async def before(self, turn: Turn, episode: EpisodeDriver) -> tuple[Conversation, Others | None]:
        """Return the conversation in which ``turn`` was said, and where the environment's rule says otherwise now.

        The second is None where it does not.
        """
        rule = episode.context
        self.show(episode)
        if turn.kind == "summary":
            now = request_of(rule) if isinstance(rule, Summary) else ()
            return self._asking(turn.observation), _others(turn.observation, now)
        if turn.rewritten is None:
            return self.conversation, None
        found = None if rule is None else await self._rewritten_by(rule, episode)
        with contextlib.suppress(ValueError):  # the environment shows other messages: a difference in any case
            self._conversation = self._restarted(turn.rewritten)
        return self.conversation, _others(turn.rewritten, found or ())


def _others(recorded: Rewritten, now: Rewritten) -> Others | None:
    return None if recorded == now else (_lines(recorded), _lines(now))


def _lines(rewritten: Rewritten) -> list[str]:
    return [f"message {e}" if isinstance(e, int) else f"[{e.role}] {e.text}" for e in rewritten]


async def written(rule: RuleSummary, old: Messages, episode: EpisodeDriver) -> str:
    """Return the text that the author's function makes of messages.

    Raises EnvError where it fails, or returns no text.
    """

    async def write() -> object:
        found = rule.write(old)
        return await found if inspect.isawaitable(found) else found

    turn = len(episode.turns)
    where = f"RuleSummary.write (task {cut(episode.task.id, 120)}, turn {turn})"
    text = await episode.ask(write, where)
    if not isinstance(text, str):
        raise episode.fault(EnvError(f"{where} returned {short(text)}, which is not a text"), turn)
    return text


def request_of(rule: Summary) -> Observation:
    """Return the message that asks for a summary."""
    return (user(rule.prompt),)


def count_none(episode: EpisodeDriver) -> None:
    """Give an episode the metrics of what is rewritten, all 0."""
    for name in COUNTED:
        episode.count(name, 0.0)


def count_rewritten(episode: EpisodeDriver, removed: int) -> None:
    """Count one rewritten history, whose prompt has ``removed`` tokens less."""
    episode.count(FOLDS if isinstance(episode.context, Fold) else SUMMARIES)
    episode.count(REMOVED, removed)


def require_room(rule: Context, limits: Limits, fmt: ChatFormat | None) -> None:
    """Raise ConfigError for limits under which ``rule`` would rewrite every history, or has no room for a summary.

    Without ``fmt`` nobody knows how long its request is.
    """
    limit, turn = limits.max_context, limits.max_turn_tokens
    name = type(rule).__name__
    if rule.at * limit <= turn:
        raise ConfigError(
            f"{name}(at={rule.at:g}) of model.max_context = {limit} is less than the longest turn, "
            f"rollout.max_turn_tokens = {turn}: every history would be rewritten. Raise the context, or `at`"
        )
    if isinstance(rule, Summary) and fmt is not None:
        asked, most = len(fmt.first_prompt(request_of(rule))), min(rule.max_tokens, turn)
        if asked + most > limit - rule.at * limit:
            raise ConfigError(
                f"Summary(at={rule.at:g}) leaves {limit - int(rule.at * limit)} of model.max_context = {limit} tokens, "
                f"which have no room for its prompt ({asked}) and its max_tokens ({most}): lower one of the three"
            )
