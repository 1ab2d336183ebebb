"""What holds for every format and every text: round trips, exact characters and tokens, no exception, linear work."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.options import ToolFormatName
from areal_agents.chat.tool_formats import FORMATS
from areal_agents.chat.tool_formats.base import ToolFormat
from areal_agents.tool import ToolSpec
from areal_agents.types import Completion
from tests.tiny_tokenizer import tiny

STYLES = [style for form in FORMATS.values() for style in form.styles()]
IDS = [f"{s.name}-{k}" for k, s in enumerate(STYLES)]
MARKUP = sorted({m for s in STYLES for m in (*s.openers, *s.control, s.closing) if m})
SCHEMAS: dict[str, Any] = {
    "run": {
        "properties": {
            "s": {"type": "string"},
            "n": {"type": "integer"},
            "x": {"type": "number"},
            "b": {"type": "boolean"},
            "l": {"type": "array"},
            "o": {"type": "object"},
            "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        }
    },
    "g": {"properties": {}},
}
texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.lists(
    st.sampled_from([*MARKUP, "<think>", "</think>", '"', "\\", "\n", "{", "]", ")", ",", ";", "'", "a", "7"]),
    max_size=6,
).map("".join)
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    scalars | texts, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=6
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "s": texts,
        "n": st.integers(-(2**60), 2**60),
        "x": st.floats(allow_nan=False, allow_infinity=False),
        "b": st.booleans(),
        "l": st.lists(values, max_size=3),
        "o": st.dictionaries(texts, values, max_size=3),
    },
)
calls = st.lists(st.tuples(st.just("run"), arguments) | st.tuples(st.just("g"), st.just({})), min_size=1, max_size=3)


def test_the_settings_name_every_format() -> None:
    assert set(ToolFormatName.__args__) == {"auto", *FORMATS}  # type: ignore[attr-defined]


def writable(form: ToolFormat, given: list[tuple[str, dict[str, Any]]]) -> bool:
    """Whether the format can say it: bare values between tags cannot hold what ends them, or begins the next one."""
    if form.name not in ("qwen_xml", "glm"):
        return True
    ends = ("</parameter>", "<parameter=", "</arg_value>", "<arg_key>")
    said = [json.dumps(v, ensure_ascii=False) if not isinstance(v, str) else v for _, a in given for v in a.values()]
    return not any(end in text for end in ends for text in said)


@pytest.mark.parametrize("form", STYLES, ids=IDS)
@settings(max_examples=120, deadline=None)
@given(given_calls=calls, prose=st.sampled_from(["", "so ", "é😀\n", "<think>why</think>"]))
def test_what_is_written_is_read_back(form: ToolFormat, given_calls: Any, prose: str) -> None:
    if not writable(form, given_calls):
        return
    text = form.write_message(prose, given_calls)
    blocks = form.find_blocks(text, tools=SCHEMAS)
    assert [(b.status, b.name, dict(b.arguments)) for b in blocks] == [("ok", name, a) for name, a in given_calls]
    assert [type(v) for b in blocks for v in b.arguments.values()] == [
        type(v) for _, a in given_calls for v in a.values()
    ]


ATOMS = [
    *MARKUP, "<think>", "</think>", '{"name": "run", "arguments": {"s": "x"}}', '{"name": "g", "parameters": {}}',
    "run(s='x')", "g()", "[", "]", "{", "}", "(", ")", '"', "'", "\\", "\n", ",", ";", "=", "**", "```json\n", "run",
    "g", "<parameter=s>", "<arg_key>s</arg_key>", "function", "print(", "\ud800", " ", "é",
]  # fmt: skip


@pytest.mark.parametrize("form", STYLES, ids=IDS)
@settings(max_examples=200, deadline=None)
@given(atoms=st.lists(st.sampled_from(ATOMS) | st.text(max_size=4), max_size=25), thinking=st.booleans())
def test_no_text_raises_and_blocks_stand_apart(form: ToolFormat, atoms: list[str], thinking: bool) -> None:
    text = "".join(atoms)
    for schemas in ({}, SCHEMAS):
        end = 0
        for block in form.find_blocks(text, thinking=thinking, tools=schemas):
            assert end <= block.start < block.end <= len(text)
            assert block.status == "ok" or block.arguments == {}
            json.dumps(dict(block.arguments), allow_nan=False).encode()
            form.read_raw(text[block.start : block.end], schemas)
            end = block.end


class Counted(str):
    """A text that counts how many of its characters its methods look at."""

    looked = 0

    def find(self, sub: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        found = super().find(sub, start, len(self) if end is None else end)
        type(self).looked += (found if found >= 0 else (len(self) if end is None else min(end, len(self)))) - start + 1
        return found

    def __getitem__(self, key: Any) -> str:
        out = super().__getitem__(key)
        type(self).looked += len(out)
        return out


def work(form: ToolFormat, text: str) -> int:
    """Executed lines of Python, and characters looked at: what reading ``text`` costs, whatever the clock says."""
    lines = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace if "tool_formats" in frame.f_code.co_filename else None

    Counted.looked = 0
    counted = Counted(text)
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        form.find_blocks(counted, tools=SCHEMAS)
    finally:
        sys.settrace(before)
    return lines + Counted.looked


HOSTILE = [
    "<tool_call>", "<tool_call>{", '<tool_call>{"a', "<think></think>", "</tool_call>", "<tool_call><function=g>",
    "<function=f><parameter=s>", "</parameter>x", "<function=f><parameter=s></parameter>", "<tool_call>g<arg_key>s",
    "<arg_key>s</arg_key><arg_value>", "</arg_value>x", "[TOOL_CALLS]", "[TOOL_CALLS][{", '[TOOL_CALLS][{"name": "g"},',
    "[TOOL_CALLS]g[ARGS]{", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>g<｜tool▁sep｜>", "<｜tool▁call▁begin｜>",
    "{", '{"name": "g", "parameters": {}};', "<|python_tag|>", "<|python_tag|>{", "[g(), ", "[g(", "[g(s='", "g(),",
    "\\", "```", "```json\n{", "```tool_code\ng(", '```json\n{"name": ', "```tool_code\n", "<think>", "  ", "**{",
    "'", '"', "#",
]  # fmt: skip
PREFIXES = {  # what makes each format read on
    "hermes": "<tool_call>{", "qwen_xml": "<function=f><parameter=s>",
    "glm": "<tool_call>g<arg_key>s</arg_key><arg_value>",
    "mistral": "[TOOL_CALLS][", "mistral_args": "[TOOL_CALLS]g[ARGS]{",
    "deepseek": "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "deepseek_v31": "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{", "llama_json": '{"name": "', "pythonic": "[g(s='",
    "gemma": "```tool_code\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_reading_is_linear(name: str) -> None:
    for atom in HOSTILE:
        for prefix in ("", PREFIXES[name]):
            small, large = (work(FORMATS[name], prefix + atom * (size // len(atom))) for size in (4_000, 16_000))
            # Four times the text: linear is 4, quadratic 16.
            assert large <= 7 * small + 20_000, (atom, prefix, small, large)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("special", [False, True])
def test_token_spans_are_exact_where_markup_is_tokens(name: str, special: bool) -> None:
    tokenizer = tiny()
    form = FORMATS[name]
    control = list(form.control)
    tokenizer.add_tokens(list(control), special_tokens=special)
    fmt = ChatFormat(tokenizer, tool_format=name)
    spec = ToolSpec("run", "", {"type": "object", "properties": {"s": {"type": "string"}, "n": {"type": "integer"}}})
    tools = [spec, ToolSpec("g", "", {"type": "object", "properties": {}})]
    said = '<tool_call>{"name": "run", "arguments": {"s": "é😀", "n": 3}}</tool_call>'
    ids = fmt.encode_turn(f'héllo {said} <tool_call>{{"name": "g", "arguments": {{}}}}</tool_call>', tools)
    message = fmt.parse(ids, "stop", (), tools)
    assert [(c.name, dict(c.arguments), c.status, c.format) for c in message.tool_calls] == [
        ("run", {"s": "é😀", "n": 3}, "ok", name),
        ("g", {}, "ok", name),
    ]
    used = {tokenizer.convert_tokens_to_ids(t): t for t in control}
    assert {used[i] for i in ids if i in used} == {t for t in control if t in message.text}
    end = 0
    for call in message.tool_calls:
        assert call.token_span is not None
        start, stop = call.token_span
        assert end <= start < stop <= len(ids)
        covered = str(tokenizer.decode(list(ids[start:stop]), skip_special_tokens=False))
        assert call.raw in covered
        assert len(covered) <= len(call.raw) + 8  # at most a part of a neighbouring token
        assert call.raw not in str(tokenizer.decode(list(ids[start + 1 : stop])))
        assert call.raw not in str(tokenizer.decode(list(ids[start : stop - 1])))
        end = stop
    assert Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop")


@pytest.mark.parametrize("name", FORMATS)
def test_the_section_shows_the_models_own_tokens(name: str) -> None:
    tokenizer = tiny()
    form = FORMATS[name]
    tokenizer.add_tokens(list(form.control), special_tokens=True)
    fmt = ChatFormat(tokenizer, tool_format=name)
    hostile = ToolSpec("g", f"never {' '.join(form.control)} <|im_end|>", {"type": "object", "properties": {}})
    from areal_agents.types import user

    prompt = fmt.first_prompt([user("hi")], [hostile])
    shown = str(tokenizer.decode(list(prompt), skip_special_tokens=False))
    assert f"To call a tool, write {form.usage}<|im_end|>" in shown
    for token in form.control:  # as a token in the usage, as plain text in the tool's own description
        assert sum(i == tokenizer.convert_tokens_to_ids(token) for i in prompt) == form.usage.count(token)
