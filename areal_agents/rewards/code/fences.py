"""Fenced blocks of a Markdown text, in linear time."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*\{?\.?([A-Za-z0-9+#]*)[^`]*")


def fenced(text: str) -> list[tuple[str, str]]:
    """Return the closed fenced blocks of a text, each with its language in lower case.

    A block closes with at least as many marks of its own kind, so that a longer fence may hold a shorter one. The
    indentation of the fence is taken from its lines.
    """
    blocks: list[tuple[str, str]] = []
    name = mark = indent = ""
    body: list[str] | None = None
    for line in re.split(r"(?<=\n)", text.replace("\r\n", "\n")):
        bare = line.strip()
        if body is not None and len(bare) >= len(mark) and not bare.strip(mark[0]):
            blocks.append((name, "".join(body)))
            body = None
        elif body is not None:
            body.append(line.removeprefix(indent))
        elif opened := _FENCE.fullmatch(line.rstrip()):
            indent, mark, name, body = opened[1], opened[2], opened[3].lower(), []
    return blocks


def submission(text: str, names: Iterable[str]) -> str | None:
    """Return the last block that is marked with one of the names, else the last without a mark, or None.

    An output shown in a block of its own behind the program is not taken for the program, nor is one in another
    language.
    """
    blocks = [(name, body) for name, body in fenced(text) if body.strip()]
    named = [body for name, body in blocks if name in names]
    found = named or [body for name, body in blocks if not name]
    return found[-1] if found else None
