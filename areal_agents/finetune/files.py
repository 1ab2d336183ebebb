"""Examples and pairs from JSONL files, one conversation a line.

    imitation     {"messages": […], "tools": […]}     {"prompt": …, "completion": …}
    preferences   {"prompt": …, "chosen": …, "rejected": …}     {"chosen": […], "rejected": […]}, one beginning

A text in place of messages is one message: the user's in ``prompt``, the assistant's elsewhere. What stands in a prompt
does not train. Lines that are no JSON object are refused with the file, others cost themselves alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from areal_agents.algorithms.batch import Row
from areal_agents.chat.format import ChatFormat
from areal_agents.errors import ConfigError
from areal_agents.finetune.config import DpoConfig, SftConfig
from areal_agents.finetune.examples import Example, Limits, Pair, Sequences, Tally, guarded, last_turn
from areal_agents.finetune.messages import (
    RowRefused,
    Said,
    Spoken,
    read_messages,
    read_tools,
    spoken_of,
    unused_fields,
    unused_tool_fields,
)
from areal_agents.finetune.render import render
from areal_agents.utils.short_text import short

_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")
_READ = frozenset({*_COLUMNS, "tools", "chat_template_kwargs"})


def file_examples(path: Path, config: SftConfig, fmt: ChatFormat, limits: Limits) -> tuple[list[Example], Tally]:
    """Read the conversations of a file. Raises ConfigError for a file that cannot be read."""
    tally, found = Tally(str(path), "lines"), []
    for name, row in _lines(path):
        tally.count(limits)
        said = guarded(tally, name, partial(_imitated, row, config, fmt, tally), limits)
        if said is not None:
            found.append(Example(_prompt_of(said.rows), said))
    tally.taken = len(found)
    return found, tally


def file_pairs(path: Path, config: DpoConfig, fmt: ChatFormat, limits: Limits) -> tuple[list[Pair], Tally]:
    """Read the pairs of a file. Raises ConfigError for a file that cannot be read."""
    tally, found = Tally(str(path), "lines"), []
    for name, row in _lines(path):
        tally.count(limits)
        try:
            sides, tools = _sides(row), read_tools(row.get("tools"))
            _note_unused(row, tally)
        except RowRefused as error:
            tally.leave_out(name, str(error))
            continue
        made: list[Sequences] = []
        for side, messages in zip(("chosen", "rejected"), sides, strict=True):
            said = guarded(tally, f"{name}, {side}", partial(render, fmt, messages, tools), limits)
            if said is None:
                break
            made.append(said)
        else:
            chosen, rejected = made
            if chosen.key == rejected.key:
                tally.leave_out(name, "chosen and rejected are the same tokens")
            else:
                found.append(Pair(_prompt_of(chosen.rows), chosen, rejected))
    tally.taken = len(found)
    return found, tally


def _lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}, line {number}, is no JSON: {error}. Write one object a line") from error
                if not isinstance(row, dict):
                    raise ConfigError(f"{path}, line {number}, is {short(row)}: write one object a line")
                yield f"{path}:{number}", row
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}: name a JSONL file in UTF-8, or a run's folder") from error


def _imitated(row: Mapping[str, Any], config: SftConfig, fmt: ChatFormat, tally: Tally) -> list[Row]:
    messages = _conversation(row)
    _note_unused(row, tally)
    rows = render(fmt, messages, read_tools(row.get("tools")))
    return last_turn(rows) if config.turns == "last" else rows


def _conversation(row: Mapping[str, Any]) -> list[Spoken]:
    _refuse_other_variables(row)
    if "messages" in row and "completion" in row:
        raise RowRefused("it has both messages and completion: one of them is too many")
    if "messages" in row:
        return read_messages(row["messages"])
    if "completion" in row:
        prompt = [] if row.get("prompt") in (None, "", []) else read_messages(
            spoken_of(row["prompt"], "user"), trains=False
        )  # fmt: skip
        return [*prompt, *read_messages(spoken_of(row["completion"], "assistant"))]
    hint = ""
    if "chosen" in row:
        hint = "; pairs of chosen and rejected are trained on by `areal-agents dpo`"
    elif "conversations" in row:
        hint = "; ShareGPT's conversations have to be written as messages with role and content"
    raise RowRefused(f"it has neither messages nor completion, but {short(sorted(map(str, row)))}{hint}")


def _sides(row: Mapping[str, Any]) -> tuple[list[Spoken], list[Spoken]]:
    """Return the whole conversation with the better end, and with the worse one."""
    _refuse_other_variables(row)
    if lacks := [name for name in ("chosen", "rejected") if name not in row]:
        hint = "; conversations without pairs are imitated by `areal-agents sft`" if "messages" in row else ""
        raise RowRefused(f"it has no {' and no '.join(lacks)}{hint}")
    ends = [list(spoken_of(row[name], "assistant")) for name in ("chosen", "rejected")]
    if row.get("prompt") in (None, "", []):
        same = 0
        while same < min(map(len, ends)) and ends[0][same] == ends[1][same]:
            same += 1
        prompt, ends = ends[0][:same], [end[same:] for end in ends]
    else:
        prompt = list(spoken_of(row["prompt"], "user"))
        if all(end[: len(prompt)] == prompt for end in ends):  # many data sets say it twice
            ends = [end[len(prompt) :] for end in ends]
    if not all(ends):
        raise RowRefused("one of chosen and rejected is empty behind what both begin with: nothing tells them apart")
    before = read_messages(prompt, trains=False) if prompt else []
    read = [read_messages(end) for end in ends]
    if not all(isinstance(end[0], Said) for end in read):
        raise RowRefused("chosen and rejected do not both begin with an answer to the same prompt")
    chosen, rejected = ([*before, *end] for end in read)
    return chosen, rejected


def _refuse_other_variables(row: Mapping[str, Any]) -> None:
    if row.get("chat_template_kwargs"):
        raise RowRefused("it has chat_template_kwargs of its own: all rows are rendered alike, by --template-variables")


def _note_unused(row: Mapping[str, Any], tally: Tally) -> None:
    tally.unused |= {str(name) for name in row if name not in _READ} | unused_tool_fields(row.get("tools"))
    for name in _COLUMNS:
        tally.unused |= unused_fields(row.get(name))


def _prompt_of(rows: Sequence[Row]) -> str:
    """Return a name of what stands before the first target, which lines of one question share, of all files."""
    first = rows[0]
    return f"file/{hashlib.sha256(first.ids[: int(first.mask.argmax())].tobytes()).hexdigest()[:16]}"
