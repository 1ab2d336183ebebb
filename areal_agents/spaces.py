"""Gymnasium spaces for conversations: tuples of messages as observations, any Unicode text as actions.

Gymnasium's own ``Text`` rejects spaces and punctuation by default and cannot hold all of Unicode.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gymnasium.spaces import Space

from areal_agents.chat.message_json import messages_to_json
from areal_agents.types import AssistantMessage, Image, Message, Observation, Text

_SAMPLE_MAX_CHARS = 48
_SURROGATES = range(0xD800, 0xE000)
_ROLES = ("system", "user", "assistant", "tool")


class TextSpace(Space["AssistantMessage | str"]):
    """Every string without lone surrogates (what UTF-8 can carry).

    An AssistantMessage belongs to it too.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """Draw a short random text.

        One character in four comes from all of Unicode, the others are printable ASCII.
        """
        return _random_text(self)

    def contains(self, x: Any) -> bool:
        return isinstance(x, AssistantMessage) or (isinstance(x, str) and _encodable(x))

    def to_jsonable(self, sample_n: Iterable[AssistantMessage | str]) -> list[Any]:
        return [x if isinstance(x, str) else x.text for x in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextSpace)

    __hash__ = None  # type: ignore[assignment]  # spaces hold a generator: mutable

    def __repr__(self) -> str:
        return "TextSpace()"


class ChatSpace(Space[Observation]):
    """Tuples of Messages, the empty tuple included."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__(shape=None, dtype=None, seed=seed)

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> Observation:
        """Draw one to three messages of random text."""
        count = int(self.np_random.integers(1, 4))
        return tuple(Message("user", (Text(_random_text(self)),)) for _ in range(count))

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(
            isinstance(m, Message)
            and m.role in _ROLES
            and isinstance(m.parts, tuple)
            and all((isinstance(p, Text) and _encodable(p.text)) or isinstance(p, Image) for p in m.parts)
            for m in x
        )

    def to_jsonable(self, sample_n: Iterable[Observation]) -> list[Any]:
        return [messages_to_json(x) for x in sample_n]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatSpace)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "ChatSpace()"


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _random_text(space: Space[Any]) -> str:
    rng = space.np_random
    chars = []
    for _ in range(int(rng.integers(1, _SAMPLE_MAX_CHARS + 1))):
        code = int(rng.integers(0x110000)) if rng.random() < 0.25 else int(rng.integers(0x20, 0x7F))
        chars.append(chr(code if code not in _SURROGATES else 0xFFFD))
    return "".join(chars)
