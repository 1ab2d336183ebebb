"""One saved episode as lines for a terminal, or as JSON.

    Record + advantages ─▶ transcript ─▶ (style, text)*        a heading a message, its text indented below it
                       └─▶ transcript_json

Text of models and tools is hostile. Control characters become escapes, and every line of it is indented, so that none
can pass for a heading of ours. Turns count from 0, as in the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from areal_agents.chat.message_json import messages_to_json
from areal_agents.tracking.console import plain
from areal_agents.tracking.trajectories import Record
from areal_agents.types import Image, Message, Part, Rewritten, ToolCall, Trajectory, Turn

Style = Literal["title", "head", "text", "quiet", "good", "bad"]
Line = tuple[Style, str]
TEXT_CHARS = 2_000
"""Characters of one text that are shown unless all are asked for."""
_NAME_CHARS = 200
_VERDICTS = {"unverifiable": "unverifiable", "verdict_timeouts": "timed out", "verdict_timeout": "timed out"}


def transcript(
    record: Record, advantages: Sequence[float] | None, *, note: str = "", chars: int | None = TEXT_CHARS
) -> Iterator[Line]:
    """Yield an episode line by line.

    Args:
        record: the saved episode.
        advantages: one number a turn; None where nothing trained on them.
        note: why there are no advantages, where that needs saying.
        chars: characters of one text that are shown; longer ones are cut in the middle. None shows all.
    """
    t = record.trajectory
    yield from _head(record, note)
    for k, turn in enumerate(t.turns):
        if turn.rewritten is not None:
            yield from _rewritten(turn.rewritten, chars)
        yield from _messages(turn.observation, chars)
        yield "text", ""
        gained = [f"reward {turn.reward:.4g}"] + ([] if advantages is None else [f"advantage {advantages[k]:+.4g}"])
        cut = [] if turn.message.finish == "stop" else [f"cut: {turn.message.finish}"]
        length = [_count(len(turn.completion.ids), "token")] if turn.completion.ids else []
        what = f"assistant, turn {k}" + (", a summary" if turn.kind == "summary" else "")
        yield "head", "  ".join([what, *gained, *length, *cut])
        yield from _said(turn, chars)
    yield from _messages(t.final_observation, chars)
    yield "text", ""
    yield "head", f"end  {_ending(t)}  reward {t.reward:.4g}"


def transcript_json(record: Record, advantages: Sequence[float] | None) -> dict[str, Any]:
    """Return an episode as JSON, without its tokens."""
    t = record.trajectory
    return {
        "id": t.id, "kind": record.kind, "step": record.step, "group": t.group, "task": t.task.id,
        "split": t.task.split, "payload": t.task.payload, "reward": t.reward, "terminated": t.terminated,
        "truncated": t.truncated, "stop_reason": t.stop_reason, "error": t.error, "metrics": dict(t.metrics),
        "turns": [_turn_json(turn, None if advantages is None else advantages[k]) for k, turn in enumerate(t.turns)],
        "final_observation": messages_to_json(t.final_observation), "outcome": t.outcome,
    }  # fmt: skip


def _turn_json(turn: Turn, advantage: float | None) -> dict[str, Any]:
    said = turn.message
    calls = [{"id": c.id, "name": c.name, "arguments": c.arguments, "status": c.status, "problem": c.problem,
              "raw": c.raw} for c in said.tool_calls]  # fmt: skip
    return {
        "observation": messages_to_json(turn.observation), "text": said.text, "reasoning": said.reasoning,
        "finish": said.finish, "tokens": len(turn.completion.ids), "tool_calls": calls,
        "tool_results": [{"status": r.status, "truncated": r.truncated} for r in turn.tool_results],
        "reward": turn.reward, "components": dict(turn.components), "advantage": advantage, "parent": turn.parent,
        "kind": turn.kind, "rewritten": None if turn.rewritten is None else _rewritten_json(turn.rewritten),
    }  # fmt: skip


def _rewritten_json(rewritten: Rewritten) -> list[Any]:
    return [entry if isinstance(entry, int) else messages_to_json([entry])[0] for entry in rewritten]


# --- parts -------------------------------------------------------------------------------------------------------


def _head(record: Record, note: str) -> Iterator[Line]:
    t = record.trajectory
    where = f"{record.kind}, step {record.step}" if record.kind == "train" else record.kind
    yield "title", f"episode {line(t.id)}  {line(where)}  task {line(t.task.id)} ({line(t.task.split)})"
    total = f"reward {t.reward:.4g}"
    if len(t.turns) > 1:
        total += " = " + " + ".join(f"{turn.reward:.4g}" for turn in t.turns).replace("+ -", "- ")
    versions = sorted({v for turn in t.turns for v in turn.completion.versions})
    policy = f"policy {versions[0]}" + (f" to {versions[-1]}" if len(versions) > 1 else "") if versions else ""
    counts = [_count(len(t.turns), "turn"), _count(t.sampled_tokens, "sampled token"), policy]
    yield "quiet", "  ".join([total, _ending(t), *filter(None, counts), f"group {line(t.group)}"])
    verdicts = dict.fromkeys(said for name, said in _VERDICTS.items() if t.metrics.get(name))
    if verdicts:
        yield "bad", f"verdict: {', '.join(verdicts)}"
    if t.metrics:
        yield "quiet", f"metrics: {_pairs(t.metrics)}"
    if note:
        yield "quiet", line(note, chars=None)
    if t.error is not None:
        yield "bad", f"error: {line(t.error, chars=None)}"


def _said(turn: Turn, chars: int | None) -> Iterator[Line]:
    """Yield a message of the model: thinking, text and calls. A call that was read stands once, as we read it."""
    text = _text(turn.message.parts)
    for call in turn.message.tool_calls:
        if call.status not in ("invalid_json", "unclosed", "missing_name") and call.raw:
            text = text.replace(call.raw, "", 1)
    if turn.message.reasoning:
        yield "quiet", "  reasoning"
        yield from _block(turn.message.reasoning, chars, style="quiet")
    if text.strip() or not turn.message.tool_calls:
        yield from _block(text, chars)
    for i, call in enumerate(turn.message.tool_calls):
        # Outcomes stand one a call; an environment may leave them out, or report others.
        outcome = turn.tool_results[i] if len(turn.tool_results) == len(turn.message.tool_calls) else None
        status = call.status if call.status != "ok" or outcome is None else outcome.status
        cut = ", its text cut" if outcome is not None and outcome.truncated else ""
        problem = f": {line(call.problem)}" if call.problem else ""
        yield (
            "good" if status == "ok" else "bad",
            f"  call {line(call.name) or '(no name)'}  {line(status)}{cut}{problem}",
        )
        yield from _arguments(call, chars)
    if turn.components:
        yield "quiet", f"  components: {_pairs(turn.components)}"


def _arguments(call: ToolCall, chars: int | None) -> Iterator[Line]:
    for name, value in call.arguments.items():
        text = value if isinstance(value, str) else repr(value)
        if "\n" in text or len(text) > _NAME_CHARS:
            yield "text", f"    {line(str(name))}:"
            yield from _block(text, chars, indent=6)
        else:
            yield "text", f"    {line(str(name))}: {line(text)}"


def _messages(messages: Sequence[Message], chars: int | None) -> Iterator[Line]:
    for message in messages:
        name = f" {line(message.name)}" if message.name else ""
        yield "text", ""
        yield "head", f"{message.role}{name}"
        yield from _block(_text(message.parts), chars)


def _rewritten(rewritten: Rewritten, chars: int | None) -> Iterator[Line]:
    """Yield what took the place of the history: how many messages, and those that are new."""
    new = [entry for entry in rewritten if not isinstance(entry, int)]
    # The last message is what the turn answers, which always stays.
    before = 1 + max((entry for entry in rewritten if isinstance(entry, int)), default=-1)
    yield "text", ""
    yield "head", f"history rewritten  {_count(before, 'message')} became {len(rewritten)}, {len(new)} of them new"
    yield from _messages(new, chars)


def _block(text: str, chars: int | None, *, indent: int = 4, style: Style = "text") -> Iterator[Line]:
    """Yield a text of somebody else's, indented, with its middle left out where it is longer than ``chars``."""
    parts, left_out = [text], 0
    if chars is not None and len(text) > chars:
        half = chars // 2
        parts, left_out = [text[:half], text[len(text) - half :]], len(text) - 2 * half
    for i, part in enumerate(parts):
        if i:
            yield "quiet", f"  [… {left_out:,} of {len(text):,} characters left out: --full shows them …]"
        for row in plain(part).split("\n"):
            yield style, f"{' ' * indent}{row}".rstrip(" ")


def _text(parts: Sequence[Part]) -> str:
    return "".join(f"[image {p.ref}]" if isinstance(p, Image) else p.text for p in parts)


def line(text: str, *, chars: int | None = _NAME_CHARS) -> str:
    """Make ``text`` safe for a place within a line of ours: no control character, no newline, and no great length."""
    safe = plain(text).replace("\n", "\\n")
    return safe if chars is None or len(safe) <= chars else f"{safe[:chars]}…"


def _ending(t: Trajectory) -> str:
    how = [name for name, yes in (("terminated", t.terminated), ("truncated", t.truncated)) if yes]
    return f"{t.stop_reason} ({' and '.join(how) or 'not ended'})"


def _pairs(values: Mapping[str, float]) -> str:
    return ", ".join(f"{line(name)} {value:.4g}" for name, value in sorted(values.items()))


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
