r"""Rewards for the form of what was written: 1 where it is right, else 0.

    one_box()                    exactly one \boxed{…} in the answer
    tags("think", "answer")      <think>…</think><answer>…</answer>, each once, in this order, nothing beside them
    sections("## Plan", "## Answer")   these lines, each once, in this order, none of them without a text below
    valid_calls()                every tool call could be read, and names a tool with arguments that fit

The first three look at the final message. With ``per_turn=True`` they look at every turn, and each of K turns that is
right earns 1/K.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, Verdict, boxed_all
from areal_agents.rewards.shaping.turns import Call, calls_of_turns, mean_of_turns, of_episode, turns_of, whole, written
from areal_agents.types import AssistantMessage

_TAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_NOT_VALID = ("malformed", "unknown_tool", "invalid_arguments")


class _Form:
    """A form that one message has or has not."""

    __name__: str

    def __init__(self, name: str, fits: Callable[[AssistantMessage], bool], *, per_turn: bool) -> None:
        self.__name__, self._fits, self._per_turn = name, fits, per_turn

    def __call__(self, episode: Episode) -> Verdict:
        turns = turns_of(episode)
        if self._per_turn and turns:
            return mean_of_turns(self.__name__, [float(self._fits(m)) for m in turns])
        # The final message of an episode without an answer was cut, or is no answer: it has no right form.
        return of_episode(self.__name__, float(bool(turns) and episode.answer is not None and self._fits(turns[-1])))


class one_box(_Form):
    r"""1 where the text after the reasoning has exactly one ``\boxed{…}`` that is closed and not empty."""

    def __init__(self, *, per_turn: bool = False) -> None:
        super().__init__("one_box", _has_one_box, per_turn=per_turn)


class tags(_Form):
    """1 where the message is these tagged parts, each once, in this order, none empty, with nothing beside them.

    ``alone=False`` allows text outside of them. All that the model wrote is looked at: a thought that the prompt
    opened, or that a server returned beside the text, counts as ``<think>``.
    """

    def __init__(self, *names: str, alone: bool = True, per_turn: bool = False) -> None:
        _require_distinct(names, "tags")
        for name in names:
            if not _TAG.fullmatch(name):
                raise ConfigError(f"tags: {name!r} is no name of a tag: write 'think' for <think>…</think>")
        self.names, self.alone = names, alone
        super().__init__(f"tags({','.join(names)})", self._tagged, per_turn=per_turn)

    def _tagged(self, message: AssistantMessage) -> bool:
        text, place, outside = written(message), 0, ""
        for name in self.names:
            opening, closing = f"<{name}>", f"</{name}>"
            if text.count(opening) != 1 or text.count(closing) != 1:
                return False
            start, end = text.find(opening), text.find(closing)
            if start < place or not text[start + len(opening) : end].strip():  # also where it closes before it opens
                return False
            outside += text[place:start]
            place = end + len(closing)
        return not self.alone or not (outside + text[place:]).strip()


class sections(_Form):
    """1 where the text after the reasoning has these lines, each once, in this order, each with a text below it.

    A line counts where it is the heading and nothing else but spaces. Text before the first one is allowed.
    """

    def __init__(self, *headings: str, per_turn: bool = False) -> None:
        _require_distinct(headings, "sections")
        for heading in headings:
            if heading != heading.strip() or not heading or "\n" in heading:
                raise ConfigError(f"sections: {heading!r} is no line, without spaces around it")
        self.headings = headings
        super().__init__("sections", self._divided, per_turn=per_turn)

    def _divided(self, message: AssistantMessage) -> bool:
        lines = [line.strip() for line in message.spoken.splitlines()]
        at = [k for k, line in enumerate(lines) if line in self.headings]
        if tuple(lines[k] for k in at) != self.headings:
            return False
        ends = [*at[1:], len(lines)]
        return all(any(lines[start + 1 : end]) for start, end in zip(at, ends, strict=True))


class valid_calls:
    """1 where every tool call of the episode could be read, named a tool, and had arguments that fit.

    What a tool then answered does not count (``tool_cost`` looks at that). With ``per_turn=True`` each of K turns
    without an invalid call earns 1/K. ``at_least`` is the number of calls without which nothing is earned.
    """

    __name__ = "valid_calls"

    def __init__(self, *, at_least: int = 0, per_turn: bool = False) -> None:
        self.at_least, self.per_turn = whole(at_least, "at_least", least=0), per_turn

    def __call__(self, episode: Episode) -> Verdict:
        turns = calls_of_turns(episode)
        enough = bool(turns) and sum(map(len, turns)) >= self.at_least
        scores = [float(enough and all(map(is_valid, calls))) for calls in turns]
        if self.per_turn and turns:
            return mean_of_turns(self.__name__, scores)
        return of_episode(self.__name__, float(enough and all(scores)))


def is_valid(call: Call) -> bool:
    """Say whether a call could be read, names a tool, and has arguments that fit."""
    asked, result = call
    return asked.status == "ok" and (result is None or result.status not in _NOT_VALID)


def _has_one_box(message: AssistantMessage) -> bool:
    found = boxed_all(message.spoken)
    return len(found) == 1 and bool(found[0].strip())


def _require_distinct(names: tuple[str, ...], what: str) -> None:
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{what}: name at least one, as texts")
    if len(set(names)) != len(names):
        raise ConfigError(f"{what}: {', '.join(names)} has a name twice")
