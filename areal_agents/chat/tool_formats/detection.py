"""Which tool-call format a chat template writes, found from what it renders for an assistant message with calls.

    calls ──template──▶ text ──each format──▶ calls?      the format that reads the same calls back is the template's

A template is asked with values of several types, and with two calls where it takes two. Most take a call's arguments as
an object, some as JSON text. Some write only the markup, and take the calls as the message's content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_agents.chat.tool_formats import AUTO, DEFAULT, FORMATS, Schemas, ToolFormat, named_format
from areal_agents.chat.tool_formats.base import Call, Source, visible_start
from areal_agents.errors import TemplateError

Render = Callable[[Sequence[Mapping[str, Any]]], str]
"""Renders rows without a generation prompt, and raises TemplateError."""

_FIRST: Call = ("zq7_first", {"text": "zq7 words", "count": 31, "flag": True, "items": [1, 2]})
_SECOND: Call = ("zq7_second", {"text": "zq7 others"})
_TYPES = {"text": "string", "count": "integer", "flag": "boolean", "items": "array"}
_PARAMETERS = {"type": "object", "properties": {name: {"type": kind} for name, kind in _TYPES.items()}}
_SCHEMAS: Schemas = {_FIRST[0]: _PARAMETERS, _SECOND[0]: _PARAMETERS}


@dataclass(frozen=True, slots=True)
class Written:
    """What a template writes for calls."""

    format: ToolFormat | None
    """The format that reads it. None where none does, or where the template writes nothing of them."""
    sample: str = ""
    """The rendering of one call. Empty where the template writes nothing of them."""


def written_format(render: Render, before: Sequence[Mapping[str, Any]], opening: str, tail: str) -> Written:
    """Find the format in which a template writes calls.

    Args:
        render: the template.
        before: messages that an assistant message may follow.
        opening: the rendering of them, up to the assistant's content.
        tail: the token that ends the assistant's turn.
    """
    base = render(before)
    head = opening[_common(base, opening) :]
    ones = list(_renderings(render, before, [_FIRST]))
    if not ones:
        return _markup_alone(render, before, base, head, tail)
    bodies = [_body(one, base, head, tail) for one in ones]
    pairs = [_body(two, base, head, tail) for two in _renderings(render, before, [_FIRST, _SECOND])]
    for body in bodies:  # a template that takes text writes an object as Python does, which no format reads
        fitting = [style for style in _styles() if _reads(style, body, [_FIRST])]
        if pairs:
            fitting = [s for s in fitting if any(_reads(s, pair, [_FIRST, _SECOND]) for pair in pairs)]
        if fitting:
            return Written(_closest(fitting, body), body)
    return Written(None, bodies[0])


def chosen_format(written: Written, asked: str, *, renders_tools: bool) -> ToolFormat:
    """Return the format that is parsed, which is the one that the model is told.

    Args:
        written: what the template writes for calls.
        asked: the setting ``model.tool_format``.
        renders_tools: the template describes tools itself.

    Raises:
        TemplateError: no format of that name, or a template that describes tools and writes calls that no format reads.
    """
    if asked == AUTO:
        if written.format is None and written.sample and renders_tools:
            raise TemplateError(
                f"T7: the template describes tools and writes calls as {written.sample[:120]!r}, which no tool format "
                f"reads: set model.tool_format to one of {', '.join(FORMATS)} (tools are then described in that "
                "format, in the system message), or use another template"
            )
        return written.format or DEFAULT
    named = named_format(asked)
    return written.format if written.format is not None and written.format.name == asked else named


def verify(form: ToolFormat) -> None:
    """Check that a format reads what it writes itself. Raises TemplateError."""
    if not _reads(form, form.write_calls([_FIRST, _SECOND]), [_FIRST, _SECOND]):
        raise TemplateError(f"T7: the tool format {form.name} does not read what it writes")


def _markup_alone(render: Render, before: Sequence[Mapping[str, Any]], base: str, head: str, tail: str) -> Written:
    """Look for a template that writes a format's opening markup for calls, and takes the rest as content."""
    found: list[tuple[ToolFormat, str]] = []
    for style in _styles():
        text = style.write_calls([_FIRST])
        opener = next((o for o in style.openers if text.startswith(o)), None)
        if opener is None:
            continue
        row = {"role": "assistant", "content": text.removeprefix(opener), "tool_calls": [_entry(_FIRST, as_text=False)]}
        try:
            body = _body(render([*before, row]), base, head, tail)
        except TemplateError:
            continue
        if body.strip().startswith(opener) and _reads(style, body, [_FIRST]):
            found.append((style, body))
    exact = [(style, body) for style, body in found if style.write_calls([_FIRST]) == body.strip()]
    return Written(*exact[0]) if exact else Written(None)


def _renderings(render: Render, before: Sequence[Mapping[str, Any]], calls: Sequence[Call]) -> Iterator[str]:
    """Yield what the template writes for ``calls``, where it writes all of their names and texts."""
    for content in ("", None):
        for as_text in (False, True):
            entries = [_entry(call, as_text=as_text) for call in calls]
            try:
                text = render([*before, {"role": "assistant", "content": content, "tool_calls": entries}])
            except TemplateError:
                continue
            if all(name in text and str(arguments["text"]) in text for name, arguments in calls):
                yield text


def _entry(call: Call, *, as_text: bool) -> dict[str, Any]:
    name, arguments = call
    given = json.dumps(arguments) if as_text else dict(arguments)
    id = f"{name[-6:]}zq7".replace("_", "0")  # nine letters and digits: Mistral's templates insist
    return {"id": id, "type": "function", "function": {"name": name, "arguments": given}}


def _body(rendered: str, base: str, head: str, tail: str) -> str:
    """Cut an assistant message's content out of a rendered conversation, ``base`` being the part before it."""
    body = rendered[_common(base, rendered) :]
    for start in (head, head.rstrip()):
        if body.startswith(start):
            body = body[len(start) :]
            break
    end = body.rfind(tail.strip()) if tail.strip() else -1
    return body[:end] if end >= 0 else body


def _styles() -> Iterator[ToolFormat]:
    for form in FORMATS.values():
        yield from form.styles()


def _reads(form: ToolFormat, text: str, calls: Sequence[Call]) -> bool:
    blocks = form.find_blocks(text, tools=_SCHEMAS)
    return [(b.status, b.name, b.arguments) for b in blocks] == [("ok", name, given) for name, given in calls]


def _common(one: str, two: str) -> int:
    """Return how many characters two texts share at their beginning."""
    pairs = zip(one, two, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def _closest(fitting: Sequence[ToolFormat], body: str) -> ToolFormat | None:
    """Return the format that would write ``body`` itself, or most of its beginning."""

    bare = body[visible_start(Source(body, {}), thinking=False) :].rstrip()

    def common(form: ToolFormat) -> tuple[int, int]:
        text = form.write_calls([_FIRST])
        squeezed = ("".join(t.split()) for t in (text, bare))
        return _common(*squeezed), _common(text, bare)

    return max(fitting, key=common) if fitting else None
