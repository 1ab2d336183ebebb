"""Conversations of a file as rows: what is masked, for every chat template handed over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from areal_agents.algorithms.batch import Row
from areal_agents.chat.format import ChatFormat
from areal_agents.finetune.messages import RowRefused, read_messages, read_tools
from areal_agents.finetune.render import render
from tests.chat_families import FAMILIES, family_tokenizer
from tests.tiny_tokenizer import CHATML, NO_SYSTEM, OPENS_THINKING, THINKING, tiny

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look.",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "n": {"type": "integer"}}},
        },
    }
]
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"at": "left", "n": 3}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief. </s>"},
    {"role": "user", "content": "Look at both sides <|im_end|>."},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "name": "look", "content": "seen <|eot_id|>"},
    {"role": "assistant", "content": "It is <|im_end|> empty, 漢字 and \u00e9."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Bye"},
]


CLOSE = "\n</think>\n\n"
CLOSES = {"qwen3_5_think": (CLOSE, CLOSE, CLOSE), "deepseekv3": (CLOSE, "", CLOSE)}
"""What stands before each of the three answers where the prompt opens a thought."""


@pytest.fixture(scope="module")
def templates(shared_data: Path) -> Path:
    return shared_data / "chat_templates"


@cache
def family(smollm2: Path, templates: Path, name: str) -> ChatFormat:
    return ChatFormat(family_tokenizer(smollm2, templates, name), merge_system=True)


def spans(row: Row) -> Iterator[np.ndarray[Any, Any]]:
    at = np.flatnonzero(row.mask)
    yield from np.split(row.ids[at], np.flatnonzero(np.diff(at) > 1) + 1)


def masked(fmt: ChatFormat, rows: list[Row]) -> list[str]:
    return [fmt.tokenizer.decode(ids) for row in rows for ids in spans(row)]


def said(fmt: ChatFormat, content: str, calls: list[Any], *, thought: str = "") -> str:
    text = fmt.tool_format.write_message(content, calls) if calls else content
    return thought + text + fmt.text_of(fmt.turn_end)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_is_what_the_assistant_said_and_its_end(name: str, smollm2: Path, templates: Path) -> None:
    fmt = family(smollm2, templates, name)
    rows = render(fmt, read_messages(TALK), read_tools(TOOLS))
    # A prompt that opens a thought has it closed first, since the file says nothing of any.
    close = CLOSES.get(name, ("", "", ""))
    expected = [
        said(fmt, "I look.", [("look", {"at": "left", "n": 3})], thought=close[0]),
        said(fmt, TALK[4]["content"], [], thought=close[1]),
        said(fmt, "Bye", [], thought=close[2]),
    ]
    assert masked(fmt, rows) == expected
    assert all(row.ids[row.mask][-1] == fmt.turn_end for row in rows)
    assert len(rows) == (3 if fmt.history == "template" else 1)


CONTROL = ("<|im_end|>", "</s>", "<|eot_id|>", "[/INST]", "<end_of_turn>", "<｜Assistant｜>", "<tool_response>", "\n\n")
TEXTS = st.lists(st.one_of(st.text('ab Z9\n\t"\\{<|>é漢🙂', max_size=9), st.sampled_from(CONTROL)), max_size=4).map(
    "".join
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS, min_size=3, max_size=3))
def test_whatever_is_said_is_masked_exactly(name: str, texts: list[str], smollm2: Path, templates: Path) -> None:
    assume(all(text.strip() for text in texts))
    fmt = family(smollm2, templates, name)
    roles = ("user", "assistant", "user", "assistant")
    talk = [{"role": role, "content": t} for role, t in zip(roles, (texts[0], *texts), strict=True)]
    thought = "" if name not in CLOSES or "</think>" in "".join(texts) else CLOSE
    end = fmt.text_of(fmt.turn_end)
    assert masked(fmt, render(fmt, read_messages(talk))) == [thought + text + end for text in (texts[0], texts[2])]


def test_text_that_the_tokenizer_cannot_write_is_refused(smollm2: Path, templates: Path) -> None:
    fmt = family(smollm2, templates, "qwen3")  # its vocabulary lacks some bytes
    talk = [{"role": "user", "content": "a \U00040000"}, {"role": "assistant", "content": "b \U00040000"}]
    with pytest.raises(RowRefused, match="the model's tokenizer cannot write"):
        render(fmt, read_messages(talk))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_what_the_template_itself_renders(name: str, smollm2: Path, templates: Path) -> None:
    fmt = family(smollm2, templates, name)
    plain = [m for m in TALK if m["role"] in ("user", "assistant") and "tool_calls" not in m][:3]
    plain = [{"role": "user", "content": "Hi"}, *plain[1:2], {"role": "user", "content": "So?"}, TALK[6]]
    row = render(fmt, read_messages(plain))[-1]
    whole = fmt.template.render(plain)
    # White space around content is the template's affair; what follows the last end token is no target.
    squeezed = [re.sub(r"\s+|<think>\s*</think>", "", text) for text in (fmt.tokenizer.decode(row.ids), whole)]
    assert squeezed[1].startswith(squeezed[0])
    assert len(squeezed[1]) - len(squeezed[0]) < 25


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "llama3", "deepseekv3"])
def test_reasoning_is_written_as_a_thought(name: str, smollm2: Path, templates: Path) -> None:
    fmt = family(smollm2, templates, name)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "reasoning_content": "why\nnot"}]
    row = render(fmt, read_messages(talk))[0]
    end = fmt.text_of(fmt.turn_end)
    assert fmt.tokenizer.decode(row.ids).endswith(f"<think>\nwhy\nnot\n</think>\n\nYo{end}")
    opens = name in ("qwen3_5_think", "deepseekv3")
    assert masked(fmt, [row]) == [("" if opens else "<think>\n") + f"why\nnot\n</think>\n\nYo{end}"]


def test_a_prompt_that_closes_the_thought_takes_no_reasoning(smollm2: Path, templates: Path) -> None:
    fmt = family(smollm2, templates, "qwen3_5_nothink")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "reasoning_content": "why"}]
    with pytest.raises(RowRefused, match=r"prompt ends with a closed thought.*enable_thinking"):
        render(fmt, read_messages(talk))
    talk[1]["reasoning_content"] = ""
    assert masked(fmt, render(fmt, read_messages(talk))) == ["Yo<|im_end|>"]


def test_empty_reasoning_is_an_empty_thought(smollm2: Path, templates: Path) -> None:
    fmt = family(smollm2, templates, "qwen3")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "reasoning_content": ""}]
    row = render(fmt, read_messages(talk))[0]
    assert masked(fmt, [row]) == ["<think>\n\n</think>\n\nYo<|im_end|>"]
    assert fmt.tokenizer.decode(row.ids) + "\n" == fmt.template.render(
        [talk[0], {"role": "assistant", "content": "Yo"}]
    )


def test_messages_of_weight_0_are_shown_and_not_learned() -> None:
    fmt = ChatFormat(tiny(CHATML))
    talk = [m | ({"weight": 0} if m["content"] == "I look." else {}) for m in TALK]
    (row,) = render(fmt, read_messages(talk), read_tools(TOOLS))
    assert "I look." in fmt.tokenizer.decode(row.ids)
    assert masked(fmt, [row]) == [f"{TALK[4]['content']}<|im_end|>", "Bye<|im_end|>"]


def test_a_template_that_drops_thoughts_gives_a_row_a_turn() -> None:
    fmt = ChatFormat(tiny(THINKING))
    talk = [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": "hm"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "reasoning": "so"},
    ]  # fmt: skip
    first, second = render(fmt, read_messages(talk))
    assert masked(fmt, [first]) == ["<think>\nhm\n</think>\n\nb<|im_end|>"]
    assert masked(fmt, [second]) == ["<think>\nso\n</think>\n\nd<|im_end|>"]
    assert "hm" not in fmt.tokenizer.decode(second.ids)
    (kept,) = render(ChatFormat(tiny(THINKING), history="append"), read_messages(talk))
    assert "hm" in fmt.tokenizer.decode(kept.ids)
    assert len(masked(fmt, [kept])) == 2


def test_what_follows_the_last_target_is_left_out() -> None:
    fmt = ChatFormat(tiny(CHATML))
    talk = [*TALK, {"role": "user", "content": "never learned"}, {"role": "assistant", "content": "no", "weight": 0}]
    (row,) = render(fmt, read_messages(talk), read_tools(TOOLS))
    assert fmt.tokenizer.decode(row.ids).endswith("Bye<|im_end|>")


def test_two_messages_of_the_assistant_in_a_row() -> None:
    fmt = ChatFormat(tiny(CHATML))
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    (row,) = render(fmt, read_messages(talk))
    assert fmt.tokenizer.decode(row.ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>"
    )
    assert masked(fmt, [row]) == ["b<|im_end|>", "c<|im_end|>"]


def test_a_greeting_is_shown_or_refused() -> None:
    fmt = ChatFormat(tiny(CHATML))
    said = (("assistant", "hi"), ("user", "a"), ("assistant", "b"))
    talk: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    with pytest.raises(RowRefused, match="begins with a message of the assistant"):
        render(fmt, read_messages(talk))
    (row,) = render(fmt, read_messages([talk[0] | {"weight": 0}, *talk[1:]]))
    assert fmt.tokenizer.decode(row.ids).startswith("<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\na")
    assert masked(fmt, [row]) == ["b<|im_end|>"]


def test_an_opened_thought_that_the_file_closes_itself() -> None:
    fmt = ChatFormat(tiny(OPENS_THINKING))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}]
    assert masked(fmt, render(fmt, read_messages(talk))) == ["hm\n</think>\n\nb<|im_end|>"]


def test_what_a_template_cannot_show_is_refused_with_the_reason() -> None:
    with pytest.raises(RowRefused, match="merge_system"):
        render(ChatFormat(tiny(NO_SYSTEM)), read_messages(TALK), read_tools(TOOLS))
    with pytest.raises(RowRefused, match="nothing to imitate"):
        render(ChatFormat(tiny(CHATML)), read_messages(TALK[:2]))


def test_calls_that_would_be_read_as_others_are_refused(smollm2: Path, templates: Path) -> None:
    fmt = family(smollm2, templates, "qwen3_5_nothink")
    broken = {"function": {"name": "look", "arguments": {"at": "</parameter>\n<parameter=n>\n4"}}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [broken]}]
    with pytest.raises(RowRefused, match="T7: the tool format qwen_xml would read other calls"):
        render(fmt, read_messages(talk), read_tools(TOOLS))
