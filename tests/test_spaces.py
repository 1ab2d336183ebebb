from __future__ import annotations

import pytest

from areal_agents.spaces import ChatSpace, TextSpace
from areal_agents.types import AssistantMessage, Image, Message, Text, user


def test_text_space_holds_all_of_unicode() -> None:
    space = TextSpace()
    for text in ("", "a b\n\t!", "é漢字🙂\x00", "\U0010ffff"):
        assert text in space
    assert AssistantMessage((Text("hi"),)) in space
    for other in ("\ud800", 3, None, b"bytes", user("hi")):
        assert other not in space


def test_chat_space_holds_tuples_of_messages() -> None:
    space = ChatSpace()
    assert () in space
    assert (user("a"), Message("tool", (Text("b"), Image("c.png")), tool_call_id="1")) in space
    for other in ([user("a")], user("a"), (AssistantMessage((Text("a"),)),), (user("\ud800"),), "a"):
        assert other not in space
    assert (Message("robot", (Text("a"),)),) not in space  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [TextSpace, ChatSpace])
def test_samples_are_members_and_seeded(kind: type[TextSpace] | type[ChatSpace]) -> None:
    first, second, other = kind(seed=1), kind(seed=1), kind(seed=2)
    samples = [first.sample() for _ in range(200)]
    assert all(sample in first for sample in samples)
    assert [second.sample() for _ in range(200)] == samples
    assert [other.sample() for _ in range(200)] != samples
    assert any(any(ord(c) > 0xFFFF for c in str(sample)) for sample in samples)


def test_spaces_are_equal_by_kind() -> None:
    assert TextSpace(seed=1) == TextSpace(seed=2)
    assert ChatSpace() == ChatSpace()
    assert TextSpace() != ChatSpace()
    assert repr(ChatSpace()) == "ChatSpace()"
    assert ChatSpace().to_jsonable([(user("a"),)]) == [[{"role": "user", "content": "a"}]]
    assert TextSpace().to_jsonable([AssistantMessage((Text("a"),)), "b"]) == ["a", "b"]
