"""A call that is quoted in another call's argument is text, in every format within every other, and never runs."""

from __future__ import annotations

import itertools

import pytest

from areal_agents.chat.tool_formats import FORMATS, ToolFormat
from areal_agents.chat.toolcalls import blocks_of

SCHEMA = {"type": "object", "properties": {"code": {"type": "string"}}}
TOOLS = {"python": SCHEMA, "rm": SCHEMA}
STYLES = [style for form in FORMATS.values() for style in form.styles()]


def run(text: str, form: ToolFormat, *, thinking: bool = False) -> list[str]:
    return [b.name for b in blocks_of(text, form, TOOLS, thinking=thinking) if b.status == "ok"]


@pytest.mark.parametrize("form", STYLES, ids=[f"{i}-{s.name}" for i, s in enumerate(STYLES)])
def test_what_another_calls_argument_quotes_does_not_run(form: ToolFormat) -> None:
    for other, given in itertools.product(STYLES, ({}, {"code": "print(1)"})):
        inner = form.write_calls([("rm", given)])
        quoting = [inner, f"x = 1\n{inner}\ny", f"{inner}\n{inner}"]
        for code in quoting:
            call = ("python", {"code": code})
            for text in (
                other.write_calls([call]),
                other.write_message("I do it.", [call]),
                other.write_calls([("python", {"code": "x"}), call]),
            ):
                assert "rm" not in run(text, form), (other.name, text)


@pytest.mark.parametrize("form", STYLES, ids=[f"{i}-{s.name}" for i, s in enumerate(STYLES)])
def test_what_is_no_quotation_runs(form: ToolFormat) -> None:
    calls = [("rm", {"code": "print(1)"}), ("python", {"code": 'a <b> "c" {d} [e]'})]
    assert run(form.write_calls(calls[:1]), form) == ["rm"]
    assert run(form.write_calls(calls), form) == ["rm", "python"]
    assert run(form.write_message("I do it.", calls[:1]), form) == ["rm"]
    for other in STYLES:  # its own call, whatever that quotes: the outer one is what was meant
        quoted = ("python", {"code": f"print({other.write_calls([('rm', {'code': 'x'})])!r})"})
        assert "rm" not in run(form.write_calls([quoted]), form), other.name


def test_a_broken_call_of_another_format_hides_what_it_quotes_too() -> None:
    deepseek, hermes = FORMATS["deepseek"], FORMATS["hermes"]
    inner = deepseek.write_calls([("rm", {})])
    assert run(inner, deepseek) == ["rm"]
    broken = '<tool_call>{"name": "python", "arguments": {"code": "\\x ' + inner
    for text in (broken + '"}}</tool_call>', broken + '"}}', broken):
        assert run(text, deepseek) == [], text
        (block,) = [b for b in blocks_of(text, deepseek, TOOLS) if b.start]
        assert block.problem == "the call stands inside an argument of another call, where it is text"
        assert text[block.start : block.end] == inner
    # Prose that names a tag, and a call beside another format's, begin no argument.
    assert run(f"A <tool_call> would do. {inner}", deepseek) == ["rm"]
    assert run(hermes.write_calls([("python", {"code": "x"})]) + inner, deepseek) == ["rm"]
    assert run("<parameter=x>never closed\n" + hermes.write_calls([("rm", {})]), hermes) == ["rm"]


def test_a_thought_quotes_too() -> None:
    for form in STYLES:
        call = form.write_calls([("rm", {})])
        assert run(f"<think>{call}</think>done", form) == []
        assert run(f"<think>{call}", form) == []
        assert run(f"{call}</think>done", form, thinking=True) == []
