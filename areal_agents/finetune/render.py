"""Conversations of a data set as token rows, by the model's own chat template (T1 to T7).

    messages ─▶ prompt (template) ‖ what the assistant said, its end token ‖ suffix (template) ‖ …

The ids are those that a rollout would have shown and sampled: ``Conversation`` makes the prompts and the suffixes. The
mask is True on the assistant's own text and its end token. Where a template rewrites its past, each turn is a row.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from areal_agents.algorithms.batch import Row, rows_of
from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.chat.thinking import THINK, UNTHINK
from areal_agents.errors import TemplateError
from areal_agents.finetune.messages import RowRefused, Said, Spoken
from areal_agents.tool import ToolSpec
from areal_agents.types import Completion, Ids, Message, Task, Text, Trajectory, Turn

_NEAR_END = 16
"""Tokens at a prompt's end in which a closed thought stands."""


def render(fmt: ChatFormat, messages: Sequence[Spoken], tools: Sequence[ToolSpec] = ()) -> list[Row]:
    """Render a conversation as rows, whose masks are True on the assistant's turns that train.

    What follows the last of those turns is left out. Raises RowRefused where the template cannot show the messages, or
    nothing in them trains.
    """
    last = max((i for i, m in enumerate(messages) if isinstance(m, Said) and m.trains), default=None)
    if last is None:
        raise RowRefused("no message of the assistant trains: there is nothing to imitate")
    try:
        turns, trains = _turns(fmt, messages[: last + 1], tools)
    except TemplateError as error:
        raise RowRefused(str(error)) from error
    # An estimator's numbers are no use here: an advantage of 0 says that a turn is shown alone.
    rows = rows_of(_episode(turns), [float(t) for t in trains], episode=0)
    return trained_rows(rows)


def trained_rows(rows: Sequence[Row]) -> list[Row]:
    """Take the tokens out of the masks that have an advantage of 0, and the rows without a target.

    Raises RowRefused where a row's first token is a target, which nothing predicts.
    """
    for row in rows:
        row.mask[row.advantages == 0] = False
    kept = [row for row in rows if row.mask.any()]
    if any(row.mask[0] for row in kept):
        raise RowRefused("nothing stands before its first target, so nothing can predict it: put a message before it")
    return kept


def said_text(fmt: ChatFormat, said: Said) -> str:
    """Write what the assistant said as the model writes it: thinking, text, calls in the model's tool format."""
    body = fmt.tool_format.write_message(said.content, said.calls) if said.calls else said.content
    if said.reasoning is None:
        return body
    thought = said.reasoning.strip("\n")
    return f"{THINK}\n{thought}\n{UNTHINK}\n\n{body}"


def _turns(fmt: ChatFormat, messages: Sequence[Spoken], tools: Sequence[ToolSpec]) -> tuple[list[Turn], list[bool]]:
    """Return the assistant's turns, and which of them train."""
    opening, rest = _opening(_greeted(fmt, messages))
    if not opening:
        raise RowRefused(
            "it begins with a message of the assistant, which answers nothing: put a message before it, or give it "
            "weight 0, which shows it alone"
        )
    conversation = Conversation(fmt, opening, tools)
    turns: list[Turn] = []
    trains: list[bool] = []
    shown: Sequence[Message] = opening
    for said, following in rest:
        if turns:
            conversation.add_observation(shown)
        suffix, parent, prompt = conversation.suffix, conversation.parent, conversation.prompt.ids
        ids = _written(fmt, said, prompt, tools)
        completion = Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop")
        message = conversation.add_completion(completion)
        turns.append(Turn(suffix, completion, message, parent=parent, observation=tuple(shown)))
        trains.append(said.trains)
        shown = following
    return turns, trains


def _greeted(fmt: ChatFormat, messages: Sequence[Spoken]) -> list[Spoken]:
    """Return the messages, in which those of the assistant that begin them and do not train are history."""
    greeting = list(itertools.takewhile(lambda m: isinstance(m, Said) and not m.trains, messages))
    said = [said_text(fmt, m) for m in greeting if isinstance(m, Said)]
    return [*(Message("assistant", (Text(text),)) for text in said), *messages[len(greeting) :]]


def _opening(messages: Sequence[Spoken]) -> tuple[list[Message], list[tuple[Said, list[Message]]]]:
    """Return what stands before the assistant's first turn, and each turn with the messages that follow it."""
    before = list(itertools.takewhile(lambda m: isinstance(m, Message), messages))
    rest: list[tuple[Said, list[Message]]] = []
    for message in messages[len(before) :]:
        if isinstance(message, Said):
            rest.append((message, []))
        else:
            rest[-1][1].append(message)
    return [m for m in before if isinstance(m, Message)], rest


def _written(fmt: ChatFormat, said: Said, prompt: Ids, tools: Sequence[ToolSpec]) -> Ids:
    """Encode one turn. Raises RowRefused where its calls would not be read back as they are."""
    if said.reasoning is not None and fmt.tokenizer.decode(list(prompt[-_NEAR_END:])).rstrip().endswith(UNTHINK):
        if said.reasoning.strip():
            raise RowRefused(
                "it has reasoning, and the chat template's prompt ends with a closed thought: set the template's "
                "variable for thinking (--template-variables enable_thinking=true), or leave the reasoning out"
            )
        said = replace(said, reasoning=None)
    if said.hermes:
        return fmt.encode_turn(said_text(fmt, said), tools, prompt)
    ids = fmt.encode_said(said_text(fmt, said), prompt)
    if said.trains:
        _require_written(fmt, (said.content.lstrip().removeprefix(THINK), said.reasoning or ""), ids)
    if said.calls:
        known = {tool.name for tool in tools}
        read = [(c.name, dict(c.arguments), c.status) for c in fmt.parse(ids, "stop", prompt, tools).tool_calls]
        # Formats that write every value as text need the tool's schema to read it.
        same = [(n, a if n in known else None, s) for n, a, s in read]
        if same != [(n, dict(a) if n in known else None, "ok") for n, a in said.calls]:
            raise RowRefused(
                f"T7: the tool format {fmt.tool_format.name} would read other calls from this turn than the file has: "
                f"{[c[0] for c in said.calls]} became {[(c[0], c[2]) for c in read]}"
            )
    return ids


def _require_written(fmt: ChatFormat, texts: Sequence[str], ids: Ids) -> None:
    """Raise RowRefused where the tokenizer lost some of ``texts``. White space and Unicode's forms may differ."""
    found = _squeezed(fmt.tokenizer.decode(list(ids)))
    for text in texts:
        if (wanted := _squeezed(text)) not in found:
            lost = next((c for c in wanted if c not in found), wanted[:20])
            raise RowRefused(f"the model's tokenizer cannot write what the assistant says: {lost!r} is lost")


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _episode(turns: Sequence[Turn]) -> Trajectory:
    return Trajectory("", Task("", "", 0, {}, ""), "", tuple(turns), True, False, "answer")
