"""What a chat template is like, found out once from its renderings of dummy conversations.

    dummy conversations ──ChatTemplate──▶ texts ──▶ TemplateFacts, or TemplateError where T1 to T4 cannot hold

What differs from prompt to prompt is not here: whether a prompt opens ``<think>`` is asked of the prompt
(``ChatFormat.opens_thought``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from areal_agents.chat.options import History
from areal_agents.chat.template import ChatTemplate
from areal_agents.chat.thinking import THINK, UNTHINK, thought_is_open
from areal_agents.errors import TemplateError

MARK = "Zq7 sentinel"
"""Letters, a digit and a space: no template trims or rewrites it."""
_ASKED = "Zq7 question"
_INSTRUCTION = "Zq7 instruction"
_SYSTEM: dict[str, Any] = {"role": "system", "content": _INSTRUCTION}
_USER: dict[str, Any] = {"role": "user", "content": "U."}
_NEXT: dict[str, Any] = {"role": "user", "content": "V."}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "zq7_tool", "description": "", "parameters": {"type": "object", "properties": {}}},
}
Rows = Sequence[dict[str, Any]]


def said(content: str) -> dict[str, Any]:
    """Return a row in which the assistant says ``content``."""
    return {"role": "assistant", "content": content}


def result(content: str) -> dict[str, Any]:
    """Return a row with a tool's result."""
    return {"role": "tool", "content": content, "name": "t", "tool_call_id": "call_0"}


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """What a chat template does with roles, turns and its own past."""

    system_refusal: str
    """Why it shows no system message, in its own words where it has some. Empty where it shows one."""
    head: tuple[dict[str, Any], ...]
    """The beginning of a conversation that it can render: a system message, if it knows any, and a user's."""
    dummy: tuple[dict[str, Any], ...]
    """The beginning of a conversation of which nothing stands behind an assistant's turn that follows it."""
    begun: str
    """The text before an assistant's content in a conversation that begins with ``dummy``."""
    before: str
    """The text before an assistant's content, in a conversation that begins with ``head``."""
    after: str
    """The text after an assistant's content that a user's message follows."""
    generation: str
    """What the generation prompt adds to a conversation that ends with a user's message; may be empty."""
    renders_tools: bool
    """It renders ``tools``."""
    tool_role: bool
    """It renders the role ``tool``."""
    tool_frame: str
    """A conversation with a tool's result. Empty without that role."""
    alternates: bool
    """It refuses two user messages in a row."""
    rewrites: str
    """What it renders differently once more messages follow. Empty where it keeps its past as it was."""
    moves_tools: bool
    """A later user message takes the tools' section away from where it stood."""

    @property
    def history(self) -> History:
        """The mode that the template itself keeps to."""
        return "template" if self.rewrites else "append"


def look_at(template: ChatTemplate, added: Collection[str]) -> TemplateFacts:
    """Find out what ``template`` is like.

    ``added`` are the texts of the tokenizer's added tokens. Raises TemplateError where turns have no token at their
    end, or the generation prompt does not begin one.
    """
    refusal = _system_refusal(template)
    head = (_USER,) if refusal else (_SYSTEM, _USER)
    before, after = _assistant_frame(template, head, added)
    dummy = _dummy(template, head)
    generation = _generation(template, head, added)
    tool_frame = _tool_frame(template, head, added)
    renders_tools = "zq7_tool" in _rendered(template, head, tools=[_TOOL])
    return TemplateFacts(
        system_refusal=refusal,
        head=head,
        dummy=dummy,
        begun=template.render([*dummy, said(MARK), _NEXT], generate=True).partition(MARK)[0],
        before=before,
        after=after,
        generation=generation,
        renders_tools=renders_tools,
        tool_role=bool(tool_frame),
        tool_frame=tool_frame,
        alternates=not _rendered(template, [*head, said("A."), _NEXT, _NEXT]),
        rewrites=_rewrites(template, head, tool_role=bool(tool_frame)),
        moves_tools=renders_tools and _moves_tools(template, head),
    )


def _rendered(template: ChatTemplate, rows: Rows, *, tools: Any = None, generate: bool = False) -> str:
    """Render ``rows``, or return empty text where the template refuses them."""
    try:
        return template.render(rows, tools=tools, generate=generate)
    except TemplateError:
        return ""


def _system_refusal(template: ChatTemplate) -> str:
    rows = [{"role": "system", "content": MARK}, _USER]
    try:
        return "" if MARK in template.render(rows) else "it leaves the message out"
    except TemplateError as error:
        return str(error.__cause__)


def _assistant_frame(template: ChatTemplate, head: Rows, added: Collection[str]) -> tuple[str, str]:
    text = template.render([*head, said(MARK), _NEXT])
    if text.count(MARK) != 1:
        raise TemplateError(
            f"T2: the template renders assistant content {text.count(MARK)} times, not once and verbatim: use a "
            "template that does"
        )
    before, after = text.split(MARK)
    if not after.lstrip().startswith(tuple(added) or ("\0",)):
        raise TemplateError(
            f"T4: after assistant content the template writes {after[:20]!r}, which starts with no special token: "
            "turns must end on a token id; use a template that ends them with one"
        )
    return before, after


def _dummy(template: ChatTemplate, head: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return ``head``, without its system message where the template shows that in a later user's message (Mistral)."""
    later = template.render([*head, said(MARK), _NEXT], generate=True).partition(MARK)[2]
    return (_USER,) if _INSTRUCTION in later else head


def _generation(template: ChatTemplate, head: Rows, added: Collection[str]) -> str:
    """Return what follows the last message in a prompt.

    It is not the difference to a rendering without generation prompt, at whose end some templates write more.
    """
    rows = [*head[:-1], {"role": "user", "content": _ASKED}]
    prompt, plain, answered = (
        text.rpartition(_ASKED)[2]
        for text in (
            template.render(rows, generate=True),
            template.render(rows),
            template.render([*rows, said(MARK), _NEXT]),
        )
    )
    _require_opening(answered.partition(MARK)[0], prompt, added, ignored=prompt == plain)
    return prompt[_shared(added, prompt, plain, answered) :]  # the message's own end is in every rendering


def _require_opening(before: str, prompt: str, added: Collection[str], *, ignored: bool) -> None:
    """Refuse a prompt that leaves out what an assistant's turn begins with.

    Both are the texts after the last message's content. The generation prompt may be empty, where that message's end
    opens the answer. White space and thinking tags may differ.
    """
    same = _shared(added, before, prompt)
    lacks = before[same:]
    if not re.sub(rf"{THINK}|{UNTHINK}|\s+", "", lacks):
        return
    if ignored:
        raise TemplateError(
            f"T4: the template ignores add_generation_prompt, and its assistant turns begin with {lacks!r}: use a "
            "template that supports it"
        )
    raise TemplateError(
        f"T4: the generation prompt ends with {prompt[same:] or prompt[-20:]!r}, but the template's assistant turns "
        f"begin with {lacks!r} there: use a template whose generation prompt opens the turn"
    )


def _shared(added: Collection[str], *texts: str) -> int:
    """Return how many characters ``texts`` share at their beginning, in whole control tokens."""
    cut = re.compile("|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or r"\Z")
    same = 0
    while same < min(map(len, texts)) and len({t[same] for t in texts}) == 1:
        same += 1
    for text in texts:
        for token in cut.finditer(text):
            if token.start() < same < token.end():
                same = token.start()
    return same


def _tool_frame(template: ChatTemplate, head: Rows, added: Collection[str]) -> str:
    """Render a tool's result, or return empty text where results have to travel in a user's message."""
    rows = [*head, said("A."), result(MARK)]
    answered = _rendered(template, [*rows, said(_ASKED)])
    prompt = _rendered(template, rows, generate=True)
    if MARK not in prompt or MARK not in answered:
        return ""
    before = answered.rpartition(MARK)[2].partition(_ASKED)[0]
    try:
        _require_opening(before, prompt.rpartition(MARK)[2], added, ignored=False)
    except TemplateError:
        return ""
    return answered


def _rewrites(template: ChatTemplate, head: Rows, *, tool_role: bool) -> str:
    """Find out whether the template rewrites its past, and what.

    It does where a past turn, thinking included, does not render as its prompt, its text and the suffix did. White
    space around the content is none of the past's text.
    """
    past = template.render(head, generate=True)
    opening = "" if thought_is_open(past) else f"{THINK}\n"
    contents = {"earlier turns": MARK, "earlier thinking": f"{opening}why\n{UNTHINK}\n\n{MARK}"}
    followers = [_NEXT, result("R.")] if tool_role else [_NEXT]
    for what, content in contents.items():
        for follower in followers:
            text = template.render([*head, said(content), follower], generate=True)
            at = text.find(content)
            if at < 0 or text[:at].rstrip() != past.rstrip():
                return what
    return ""


def _moves_tools(template: ChatTemplate, head: Rows) -> bool:
    first = _rendered(template, head, tools=[_TOOL])
    later = _rendered(template, [*head, said(MARK), _NEXT], tools=[_TOOL])
    return "zq7_tool" in first and "zq7_tool" not in later.partition(MARK)[0]
