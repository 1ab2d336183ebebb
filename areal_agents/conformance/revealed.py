"""The check of ``conformance.check`` that gold answers stand in nothing that a policy sees for nothing.

    first messages · tools' descriptions and schemas · answers to calls that are the same for every task
                                    │
        the same place in nearly every task: behind "answer: ", at the end of a text ─▶ a copier needs no skill

An answer may be among much that is shown: one of four choices, a word of a text to read. It is revealed where one rule
finds it, whatever the task says. An environment whose task it is to copy says so with ``reveals_gold = True``.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from random import Random

from areal_agents.chat.toolcalls import parse_text
from areal_agents.conformance.contract import Skipped, Subject
from areal_agents.conformance.random_calls import random_arguments
from areal_agents.conformance.scripted_episode import ScriptedEpisode, in_turns, repeat
from areal_agents.errors import CheckError
from areal_agents.rollout.script import Script
from areal_agents.tool import ToolSpec, call_text
from areal_agents.types import Observation, Task
from areal_agents.utils.short_text import short

TASKS = 12
"""Tasks of the first split that are looked at."""
FEWEST = 3
"""Tasks that a place must have been seen in."""
SANDBOX_TASKS = 4
"""Tasks in which tools that need a sandbox are called: a session each."""
SHARE = 0.9
"""Of the tasks, whose answer one rule must find."""
DOMINANT = 0.8
"""An answer that is this share of all is known without any look."""
_LENGTHS = (16, 12, 8, 4)
"""Characters beside an answer that a rule may go by."""
_KEYS = ("answer", "gold", "label", "solution")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_FENCED = re.compile(r"```[\w+-]*\n(.*?)\n?```", re.DOTALL)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_SAYINGS = ('<tool_call>{"name": "no_such_tool", "arguments": {}}</tool_call>', "<tool_call>{", "I do not know.", "no")
"""What ends most episodes comes last."""
_ANY_WORDS = ("a", "b", "all", "0", "1", "2", "3", "help", "answer", "solution", "hint")
_DRAWS = 3
"""Calls of each tool with arguments that have nothing to do with the task."""

Place = tuple[str, str]
"""Where beside the answer a rule looks, and the text that stands there."""
Texts = Mapping[str, str]
"""What was shown, by where that was."""


async def hidden(subject: Subject) -> str:
    """Check that no rule that knows nothing of a task finds its answer in what is shown before it does anything for it.

    Raises:
        CheckError: one does, with the place.
        Skipped: no answers are known, or the environment says that it reveals them.
    """
    spec = subject.spec
    if spec.env_class().reveals_gold:
        raise Skipped("the environment says that it reveals its answers (reveals_gold)")
    pool = spec.tasks(spec.splits[0])
    known = [(t, found) for t in (pool[i] for i in range(min(len(pool), TASKS))) if (found := answers(t, spec.gold(t)))]
    if len({found[0] for _, found in known}) < 2:
        raise Skipped("fewer than two different answers are known: no gold(), and none in the payloads")
    looks = [partial(_shown, subject, task, seed) for seed, (task, _) in enumerate(known)]
    shown = await in_turns(looks, subject.at_once)
    for where in dict.fromkeys(name for texts in shown for name in texts):
        rows = [(texts[where], found) for texts, (_, found) in zip(shown, known, strict=True) if where in texts]
        rule = copier(rows) if len(rows) >= FEWEST else None
        if rule is not None:
            example = rows[0][1][0]
            raise CheckError(
                f"the gold answer stands in {where}, {rule}, so that copying it needs no skill (for example "
                f"{short(example)}): take it out, or declare `reveals_gold = True` where the task is to copy it"
            )
    return f"{len(known)} gold answers stand at no fixed place of {len(shown[0])} texts that are shown for nothing"


def answers(task: Task, gold: str | None) -> tuple[str, ...]:
    """Return how a task's answer may be written, the barest first: what a gold answer's markup holds, and all of it."""
    found: list[str] = []
    if gold is not None:
        for pattern in (_BOXED, _TAGGED, _FENCED):
            found += [text.strip() for text in pattern.findall(gold)[-1:]]
        for call in parse_text(gold).tool_calls:
            found += [str(value) for value in call.arguments.values() if isinstance(value, str | int | float)]
        found += [] if found else [gold.strip()]
    named = {str(name).casefold(): value for name, value in task.payload.items()}
    plain = (named[key] for key in _KEYS if key in named)
    found += [str(value).strip() for value in plain if isinstance(value, str | int | float)]
    bare = [re.sub(r"(?<=\d),(?=\d{3}\b)", "", text) for text in found]
    return tuple(dict.fromkeys(text for text in (*bare, *found) if text))


def copier(rows: Sequence[tuple[str, Sequence[str]]]) -> str | None:
    """Return the rule, in words, that finds nearly every row's answer in its text, or None.

    Args:
        rows: a text, and how its answer may be written.
    """
    found: dict[Place, list[str]] = defaultdict(list)
    for text, written in rows:
        places: dict[Place, str] = {}
        for answer in written:
            for place in _places(text, answer):
                places.setdefault(place, answer)
        for place, answer in places.items():
            found[place].append(answer)
    for place in sorted(found, key=lambda place: -len(place[1])):
        said = found[place]
        if len(said) >= SHARE * len(rows) and max(Counter(said).values()) <= DOMINANT * len(said):
            where, beside = place
            return f"{where} {beside!r}" if beside else where
    return None


def _places(text: str, answer: str) -> Iterator[Place]:
    """Yield the rules that find ``answer`` in ``text``."""
    begins, ends = (r"(?<!\w)" if answer[0].isalnum() else ""), (r"(?!\w)" if answer[-1].isalnum() else "")
    text = text.strip()
    for match in re.finditer(begins + re.escape(answer) + ends, text, re.IGNORECASE):
        start, end = match.span()
        if start == 0:
            yield "at its beginning", ""
        if len(text) - end <= 1 and not text[end:].isalnum():
            yield "at its end", ""
        for n in _LENGTHS:
            before, behind = text[max(0, start - n) : start], text[end : end + n]
            if len(before) == n:
                if text.find(before) + n == start:
                    yield "first behind", before
                if text.rfind(before) + n == start:
                    yield "last behind", before
            if len(behind) == n:
                if text.find(behind) == end:
                    yield "first before", behind
                if text.rfind(behind) == end:
                    yield "last before", behind


async def _shown(subject: Subject, task: Task, seed: int) -> Texts:
    """Return all that a policy is shown which knows nothing of the task."""
    said = await _played(subject, task, seed, repeat(*_SAYINGS), len(_SAYINGS))
    texts = {**_opening(said), **_replies(said)}
    for tool in said.tools:
        if not tool.needs_sandbox or seed < SANDBOX_TASKS:
            calls = _calls_of(tool)
            texts |= _replies(await _played(subject, task, seed, repeat(*calls), len(calls)))
    return {where: text for where, text in texts.items() if text}


async def _played(subject: Subject, task: Task, seed: int, script: Script, turns: int) -> ScriptedEpisode:
    episode = ScriptedEpisode(subject.spec.make, task, seed, script, subject.timeout, turns)
    await episode.play()
    return episode


def _replies(episode: ScriptedEpisode) -> dict[str, str]:
    """Return what was answered to each message, by what the message was."""
    replies = [*(turn.observation for turn in episode.turns[1:]), episode.observation]
    return {
        f"the reply to {short(turn.message.text)}": "\n".join(message.text for message in reply)
        for turn, reply in zip(episode.turns, replies, strict=True)
    }


def _opening(episode: ScriptedEpisode) -> dict[str, str]:
    first: Observation = episode.turns[0].observation
    found = {f"the {message.role} message that is shown first": message.text for message in reversed(first)}
    for tool in episode.tools:
        found[f"the description of the tool {tool.name!r}"] = tool.description
        found[f"the schema of the tool {tool.name!r}"] = json.dumps(dict(tool.parameters), ensure_ascii=False)
    return found


def _calls_of(tool: ToolSpec) -> list[str]:
    """Write calls of a tool that are the same for every task: without arguments, with wrong ones, and with some."""
    rng = Random(tool.name)
    drawn = [random_arguments(tool, _ANY_WORDS, rng) for _ in range(_DRAWS)]
    return [call_text(tool.name, **arguments) for arguments in ({}, {"no_such_parameter": "x"}, *drawn)]
