"""Messages as the rows that a chat template renders, in roles that it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from areal_agents.chat.message_json import messages_to_json
from areal_agents.chat.template_facts import TemplateFacts
from areal_agents.errors import TemplateError
from areal_agents.types import AssistantMessage, Message

ChatMessage = Message | AssistantMessage
Row = dict[str, Any]


class RowMaker:
    """The translation of messages into rows for one template.

    Tool results travel as user messages where the template does not know role ``tool``. A system message and the
    section with the tools go to the first user message where it knows no system role. User messages in a row become
    one where it wants the roles to alternate.
    """

    def __init__(self, facts: TemplateFacts, *, merge_system: bool) -> None:
        self._facts, self.merge_system = facts, merge_system

    def conversation(self, messages: Sequence[ChatMessage], section: str = "") -> list[Row]:
        """Return the rows of a whole conversation, with a ``section`` that describes the tools.

        Raises TemplateError where a system message cannot be shown.
        """
        rows = self._in_known_roles(messages)
        if section and not self._facts.system_refusal:
            rows = _with_section(rows, section)
            section = ""
        return self._finished(rows, section)

    def following(self, messages: Sequence[ChatMessage]) -> list[Row]:
        """Return the rows of messages that follow an assistant's.

        Raises TemplateError where a system message cannot be shown.
        """
        return self._finished(self._in_known_roles(messages), "")

    def _finished(self, rows: list[Row], section: str) -> list[Row]:
        if self._facts.system_refusal:
            rows = self._without_system(rows, section)
        return _alternating(rows) if self._facts.alternates else rows

    def _in_known_roles(self, messages: Sequence[ChatMessage]) -> list[Row]:
        rows: list[Row] = []
        wrapped = False
        for message in messages:
            if isinstance(message, AssistantMessage):
                row = messages_to_json([Message("assistant", message.parts)])[0]
            else:
                row = messages_to_json([message])[0]
            wrap = row["role"] == "tool" and not self._facts.tool_role
            if wrap:
                row = {"role": "user", "content": f"<tool_response>\n{row['content']}\n</tool_response>"}
            if wrap and wrapped:  # one user message for all results: such templates want alternating roles
                rows[-1]["content"] += "\n" + row["content"]
            else:
                rows.append(row)
            wrapped = wrap
        return rows

    def _without_system(self, rows: list[Row], section: str) -> list[Row]:
        """Put system messages, and then ``section``, at the start of the user message that follows them."""
        out: list[Row] = []
        waiting: list[str] = []
        for row in rows:
            if row["role"] == "system":
                if not self.merge_system:
                    raise TemplateError(
                        "the environment sends a system message, and the chat template cannot show one "
                        f"({self._facts.system_refusal}): set model.merge_system = true, which puts it at the start "
                        "of the user message, or leave it out of the environment"
                    )
                waiting.append(str(row["content"]))
            elif row["role"] == "user":
                texts, waiting = [*waiting, *([section] if section else [])], []
                section = ""
                out.append({**row, "content": _joined([*texts, row["content"]])})
            else:
                out.append(row)
        if texts := [*waiting, *([section] if section else [])]:
            out.append({"role": "user", "content": _joined(texts)})
        return out


def _with_section(rows: list[Row], section: str) -> list[Row]:
    if rows and rows[0]["role"] == "system":
        first = {**rows[0], "content": f"{rows[0]['content']}\n\n{section}"}
        return [first, *rows[1:]]
    return [{"role": "system", "content": section}, *rows]


def _alternating(rows: list[Row]) -> list[Row]:
    out: list[Row] = []
    for row in rows:
        if out and row["role"] == out[-1]["role"] == "user":
            out[-1] = {**out[-1], "content": _joined([out[-1]["content"], row["content"]])}
        else:
            out.append(row)
    return out


def _joined(contents: Sequence[Any]) -> Any:
    """Join contents, a blank line between two texts. A content with images is a list of parts, and so is the whole."""
    if all(isinstance(c, str) for c in contents):
        return "\n\n".join(contents)
    parts: list[Any] = []
    for k, content in enumerate(contents):
        between = "\n\n" if k else ""
        if isinstance(content, str):
            parts.append({"type": "text", "text": between + content})
        else:
            parts += [{"type": "text", "text": between}] if between else []
            parts += content
    return parts
