"""Messages as plain dictionaries, for files and chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from areal_agents.types import Message, Text


def messages_to_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Turn messages into plain dictionaries, for files and chat templates.

    Images become ``{"type": "image", "ref": …}`` parts.
    """
    out: list[dict[str, Any]] = []
    for message in messages:
        only_text = all(isinstance(p, Text) for p in message.parts)
        content: Any = (
            message.text
            if only_text
            else [
                {"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image", "ref": p.ref}
                for p in message.parts
            ]
        )
        row: dict[str, Any] = {"role": message.role, "content": content}
        if message.tool_call_id is not None:
            row["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            row["name"] = message.name
        out.append(row)
    return out
