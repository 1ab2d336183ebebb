"""Texts in every format, read by hand: what is a call, what its arguments are, and which status a broken one has."""

from __future__ import annotations

from typing import Any

import pytest

from areal_agents.chat.tool_formats import FORMATS, tool_format
from areal_agents.chat.tool_formats.json_calls import MAX_CALLS

SCHEMAS: dict[str, Any] = {
    "f": {
        "type": "object",
        "properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "b": {"type": "boolean"}, "o": {}},
    },
    "g": {"type": "object", "properties": {}},
}
Found = list[tuple[str, str, dict[str, Any]]]
CALLS, CALL, SEP = "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"
END, ENDS = "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"


def read(name: str, text: str, **kwargs: Any) -> Found:
    blocks = FORMATS[name].find_blocks(text, tools=SCHEMAS, **kwargs)
    end = 0
    for block in blocks:
        assert end <= block.start < block.end <= len(text)
        end = block.end
    return [(b.status, b.name, dict(b.arguments)) for b in blocks]


def ok(name: str = "f", **arguments: Any) -> tuple[str, str, dict[str, Any]]:
    return ("ok", name, arguments)


def bad(status: str = "invalid_json", name: str = "") -> tuple[str, str, dict[str, Any]]:
    return (status, name, {})


XML = "<tool_call>\n<function=f>\n<parameter=s>\n%s\n</parameter>\n</function>\n</tool_call>"
GLM = "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>"
V3 = f'{CALLS}{CALL}function{SEP}f\n```json\n{{"s": "%s"}}\n```{END}{ENDS}'
V31 = f'{CALLS}{CALL}f{SEP}{{"s": "%s"}}{END}{ENDS}'

CASES: list[tuple[str, str, Found]] = [
    # hermes
    ("hermes", 'a <tool_call>{"name": "f", "arguments": {"s": "x"}}</tool_call> b', [ok(s="x")]),
    ("hermes", '<tool_call>{bad <think> <tool_call>{"name": "g"}</tool_call></think>', [bad("unclosed")]),
    (
        "hermes",
        '<tool_call>{bad <think>x</think> <tool_call>{"name": "g"}</tool_call>',
        [bad("unclosed"), ok("g")],
    ),
    ("hermes", '{"name": "f", "arguments": {}}', []),
    # qwen_xml
    ("qwen_xml", XML % "x", [ok(s="x")]),
    ("qwen_xml", "why\n" + XML % "x" + "\n" + XML % "y", [ok(s="x"), ok(s="y")]),
    ("qwen_xml", XML % "007", [ok(s="007")]),
    ("qwen_xml", XML % "true", [ok(s="true")]),
    ("qwen_xml", XML % "\nindented\n", [ok(s="\nindented\n")]),
    ("qwen_xml", XML % "a</parameter>b", [ok(s="a</parameter>b")]),
    ("qwen_xml", XML % "a</tool_call>b</function>", [ok(s="a</tool_call>b</function>")]),
    ("qwen_xml", XML % "<think>", [ok(s="<think>")]),
    ("qwen_xml", XML % "é 😀 中", [ok(s="é 😀 中")]),
    ("qwen_xml", XML.replace("=s>", "=n>") % "3", [ok(n=3)]),
    ("qwen_xml", XML.replace("=s>", "=n>") % "three", [ok(n="three")]),
    ("qwen_xml", XML.replace("=s>", "=b>") % "True", [ok(b=True)]),
    ("qwen_xml", "<function=g></function>", [ok("g")]),
    ("qwen_xml", "<function=g>\n</function>\n</tool_call>", [ok("g")]),
    ("qwen_xml", "<tool_call>\n<function=g>\n</function>\n<function=g>\n</function>\n</tool_call>", [ok("g"), ok("g")]),
    ("qwen_xml", "<tool_call>\n<function=f>\n<parameter=s>\nx", [bad("unclosed")]),
    ("qwen_xml", "<tool_call>\n<function=f>\n<parameter=s>\nx\n</parameter>\n</function>", [bad("unclosed")]),
    ("qwen_xml", "<tool_call>\n<function=f>\n<parameter=s>\nx\n</function>\n</tool_call>", [bad()]),
    ("qwen_xml", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [bad()]),
    ("qwen_xml", "<tool_call>\n<function=>\n</function>\n</tool_call>", [bad("missing_name")]),
    ("qwen_xml", "<tool_call>", [bad("unclosed")]),
    (
        "qwen_xml",
        "<function=f><parameter=s>a</parameter><parameter=s>b</parameter></function>",
        [bad("invalid_arguments", "f")],
    ),
    ("qwen_xml", "<tool_call>{bad</tool_call>" + XML % "x", [bad(), ok(s="x")]),
    ("qwen_xml", "<tool_call><think>" + XML % "x" + "</think>", [bad("unclosed")]),
    # a value that lost its closing tag takes nothing of the next parameter or call with it
    ("qwen_xml", "<function=f><parameter=s>a<parameter=n>3</parameter></function>", [bad()]),
    ("qwen_xml", "<function=f><parameter=s>a</s><parameter=n>3</parameter></function>" + XML % "x", [bad(), ok(s="x")]),
    ("qwen_xml", (XML % "a").replace("</parameter>", "</parameter/>") + XML % "x", [bad(), ok(s="x")]),
    ("qwen_xml", (XML % "a").replace("</parameter>", "") + XML % "x", [bad(), ok(s="x")]),
    ("glm", (GLM % "a").replace("</arg_value>", "") + GLM % "x", [bad(), ok(s="x")]),
    ("glm", "<tool_call>f<arg_key>s</arg_key><arg_value>a<arg_key>n</arg_key><arg_value>3</arg_value></tool_call>",
     [bad()]),
    ("glm", "<tool_call>f<arg_key>s</arg_key>a</arg_value></tool_call>", [bad()]),
    ("qwen_xml", XML % "</think>", [ok(s="</think>")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"s": "</think>"}}</tool_call>', [ok(s="</think>")]),
    ("llama_json", '{"name": "f", "parameters": {"s": "</think>"}}', [ok(s="</think>")]),
    ("pythonic", '[f(s="</think>")]', [ok(s="</think>")]),
    ("llama_json", 'so <|python_tag|>{"name": "f", "parameters": {"s": "</think>"}}', [ok(s="</think>")]),
    ("pythonic", 'so <|python_start|>[f(s="</think>")]<|python_end|>', [ok(s="</think>")]),
    # glm
    ("glm", GLM % "x", [ok(s="x")]),
    ("glm", "<tool_call>f<arg_key>s</arg_key><arg_value>x</arg_value></tool_call>", [ok(s="x")]),
    ("glm", GLM % "  two\nlines  ", [ok(s="  two\nlines  ")]),
    ("glm", GLM % "a</arg_value>b</tool_call>", [ok(s="a</arg_value>b</tool_call>")]),
    ("glm", GLM.replace(">s<", ">n<") % "3", [ok(n=3)]),
    ("glm", "<tool_call>g\n</tool_call> and <tool_call>g</tool_call>", [ok("g"), ok("g")]),
    ("glm", "<tool_call>\n</tool_call>", [bad("missing_name")]),
    ("glm", "<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>x", [bad("unclosed")]),
    ("glm", "<tool_call>f\n<arg_key>s</arg_key>\n</tool_call>", [bad()]),
    ("glm", '<tool_call>{"name": "f"}</tool_call>', [bad()]),
    # mistral
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"s": "x"}}]', [ok(s="x")]),
    ("mistral", 'so [TOOL_CALLS] [{"name": "g", "arguments": {}, "id": "abc123def"}] then', [ok("g")]),
    ("mistral", '[TOOL_CALLS][{"name": "g"}, {"name": "f", "arguments": {"s": "]"}}]', [ok("g"), ok(s="]")]),
    ("mistral", '[TOOL_CALLS][{"name": "g"}, {bad}, {"name": "g"}]', [ok("g"), bad(), ok("g")]),
    ("mistral", '[TOOL_CALLS][{"name": "g"}, {"name": "f", "argu', [ok("g"), bad("unclosed")]),
    ("mistral", "[TOOL_CALLS][]", [bad()]),
    ("mistral", "[TOOL_CALLS] no", [bad()]),
    ("mistral", "[TOOL_CALLS]", [bad("unclosed")]),
    ("mistral", '[TOOL_CALLS][{"arguments": {}}]', [bad("missing_name")]),
    ("mistral", '[TOOL_CALLS][{bad <think>[TOOL_CALLS][{"name": "g"}]', [bad()]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"s": "x"}', [ok(s="x")]),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"s": "x"}[TOOL_CALLS]g[ARGS]{}', [ok(s="x"), ok("g")]),
    ("mistral_args", '[TOOL_CALLS]f[CALL_ID]abc123def[ARGS]{"s": "[TOOL_CALLS]"}', [ok(s="[TOOL_CALLS]")]),
    ("mistral_args", '[TOOL_CALLS]f{"s": "x"}', [ok(s="x")]),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"s": "x', [bad("unclosed")]),
    ("mistral_args", "[TOOL_CALLS]f[ARGS]{bad}[TOOL_CALLS]g[ARGS]{}", [bad(), ok("g")]),
    ("mistral_args", "[TOOL_CALLS]f[ARGS][1]", [bad()]),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"s": "x"}, g[ARGS]{} then', [ok(s="x"), ok("g")]),
    ("mistral_args", '[TOOL_CALLS]f{"s": "x"}g{}', [ok(s="x"), ok("g")]),
    ("mistral_args", '[TOOL_CALLS]f[ARGS]{"s": "x"} so {"a": 1}', [ok(s="x")]),
    ("mistral_args", '[TOOL_CALLS]g[ARGS]{}f[ARGS]{"s": ', [ok("g"), bad("unclosed")]),
    ("mistral", '[TOOL_CALLS]{"name": "g"}; {"name": "f", "arguments": {"s": "x"}}', [ok("g"), ok(s="x")]),
    # deepseek
    ("deepseek", "so " + V3 % "x", [ok(s="x")]),
    ("deepseek", V31 % "x", [ok(s="x")]),
    ("deepseek", V3 % END, [ok(s=END)]),
    (
        "deepseek",
        f"{CALLS}{CALL}function{SEP}g\n```json\n{{}}\n```{END}\n{CALL}function{SEP}g\n```json\n{{}}\n```{END}{ENDS}",
        [ok("g"), ok("g")],
    ),
    ("deepseek", f"{CALLS}{CALL}function{SEP}g\n```json\n{{bad\n```{END}{CALL}g{SEP}{{}}{END}{ENDS}", [bad(), ok("g")]),
    ("deepseek", f'{CALLS}{CALL}function{SEP}f\n```json\n{{"s": "x', [bad("unclosed")]),
    ("deepseek", f"{CALLS}", [bad("unclosed")]),
    ("deepseek", f"{CALLS}nothing{ENDS}", [bad()]),
    ("deepseek", f"{CALLS}{CALL}function{SEP}\n```json\n{{}}\n```{END}{ENDS}", [bad("missing_name")]),
    ("deepseek", f"{CALL}g{SEP}{{}}{END}", [ok("g")]),
    ("deepseek_v31", V31 % "x" + " then", [ok(s="x")]),
    ("deepseek_v31", f"{CALLS}{CALL}g{SEP}{END}{ENDS}", [bad()]),
    ("deepseek_v31", f"{CALLS}{CALL}function{SEP}{{}}{END}{ENDS}", [ok("function")]),
    # llama_json
    ("llama_json", '{"name": "f", "parameters": {"s": "x"}}', [ok(s="x")]),
    ("llama_json", '\n<|python_tag|>{"name": "f", "parameters": {"s": "x"}}', [ok(s="x")]),
    ("llama_json", '{"type": "function", "name": "f", "parameters": {"s": "x"}}', [ok(s="x")]),
    ("llama_json", '{"type": "function", "function": {"name": "f", "parameters": {"s": "x"}}}', [ok(s="x")]),
    ("llama_json", '{"name": "g", "parameters": {}}; {"name": "f", "parameters": {"s": ";{"}}', [ok("g"), ok(s=";{")]),
    ("llama_json", '{"name": "g", "parameters": {}}\n{"name": "g", "parameters": {}}', [ok("g"), ok("g")]),
    ("llama_json", '<think>{"name": "g"}</think>\n{"name": "g", "parameters": null}', [ok("g")]),
    ("llama_json", 'Let me look. <|python_tag|>{"name": "g", "parameters": {}}', [ok("g")]),
    ("llama_json", 'I would write {"name": "f", "parameters": {"s": "x"}} here.', []),
    ("llama_json", '{"answer": 42}', []),
    ("llama_json", '{"name": "Ada", "age": 36}', []),
    ("llama_json", '[{"a": 1}]', []),
    ("llama_json", "[1, 2, 3]", []),
    ("llama_json", "```json\n{\"answer\": 1}\n```", []),
    ("llama_json", '```json\n{"name": "f", "parameters": {"s": "x"}}\n```', [bad()]),
    ("llama_json", '[{"name": "g", "parameters": {}}]', [bad()]),
    ("llama_json", '{"name": "f", "parameters": {"s": "x"}} That is all.', [ok(s="x")]),
    ("llama_json", '{"name": "unknown", "parameters": {"s": "x"}} That is all.', [bad(name="unknown")]),
    ("llama_json", '{"name": "f", "parameters": {"s": "x"', [bad("unclosed")]),
    ("llama_json", '{"name": "f", "parameters": {"s": "x"', [bad("unclosed")]),
    ("llama_json", "{'name': 'f', 'parameters': {}}", [bad()]),
    ("llama_json", '{"name": "g", "parameters": {bad}}; {"name": "g", "parameters": {}}', [bad(), ok("g")]),
    ("llama_json", '{"parameters": {"s": "x"}}', [bad("missing_name")]),
    ("llama_json", "<|python_tag|>print(1)", [bad()]),
    ("llama_json", '<|python_tag|>{"name": "g", "parameters": {}}<|eom_id|>', [ok("g")]),
    ("llama_json", '{"name": "g", "parameters": {}}<|eom_id|>', [ok("g")]),
    ("llama_json", "<|python_tag|>", [bad("unclosed")]),
    ("llama_json", '{"name": "f", "parameters": {bad <think>{"name": "g", "parameters": {}}', [bad("unclosed")]),
    ("llama_json", '[1] then <|python_tag|>{"name": "g", "parameters": {}}', [ok("g")]),
    ("llama_json", '{"answer": 1} <|python_tag|>{"name": "g", "parameters": {}}', [ok("g")]),
    ("llama_json", '{"name": "f", "parameters": {"s": "<|python_tag|>{}"}}', [ok(s="<|python_tag|>{}")]),
    ("llama_json", '<|python_start|><|python_end|>{"name": "g", "parameters": {}}', [ok("g")]),
    # pythonic
    ("pythonic", '[f(s="x", n=3)]', [ok(s="x", n=3)]),
    ("pythonic", "[f(s='it\\'s', b=True, o=None), g()]", [ok(s="it's", b=True, o=None), ok("g")]),
    ("pythonic", '[f(o={"a": [1, -2.5, (True, null)]})]', [ok(o={"a": [1, -2.5, [True, None]]})]),
    ("pythonic", '[f(s="""two\nlines "quoted" """)]', [ok(s='two\nlines "quoted" ')]),
    ("pythonic", '[f(s="raw\nnewline")]', [ok(s="raw\nnewline")]),
    ("pythonic", '[f(s="é \\u00e9 \\ud83d\\ude00 \\d")]', [ok(s="é é 😀 \\d")]),
    ("pythonic", '[f(s="\\ud800")]', [bad()]),
    ("pythonic", '[f(s=")], g(")]', [ok(s=")], g(")]),
    ("pythonic", "<think>[g()]</think>[g()]", [ok("g")]),
    ("pythonic", "so <|python_start|>[g()]<|python_end|>", [ok("g")]),
    ("pythonic", "[1] then <|python_start|>[g()]<|python_end|>", [ok("g")]),
    ("pythonic", "f(x) is <|python_tag|>[g()]", [bad()]),
    ("pythonic", '[f(s="<|python_start|>[g()]")]', [ok(s="<|python_start|>[g()]")]),
    ("pythonic", "[f(1)]", [bad("invalid_arguments", "f")]),
    ("pythonic", "[f(s='a', s='b')]", [bad("invalid_arguments", "f")]),
    ("pythonic", "[f(s=x), g()]", [bad(), ok("g")]),
    ("pythonic", "[f(s=open('x').read())]", [bad()]),
    ("pythonic", "[f(s=1+1)]", [bad()]),
    ("pythonic", '[f(s="x', [bad("unclosed")]),
    ("pythonic", "[g(), ", [ok("g"), bad("unclosed")]),
    ("pythonic", "[g()] and more", [ok("g")]),
    ("pythonic", "f(s='x')", [bad()]),
    ("pythonic", "Call [g()] now", []),
    ("pythonic", "[1, 2, 3]", []),
    ("pythonic", "[sin(x), cos(x)]", []),
    ("pythonic", "the list [f(s=1)]", []),
    ("pythonic", "```python\n[f(s='x')]\n```", [bad()]),
    ("pythonic", "[f(n=" + "[" * 40 + "]" * 40 + ")]", [bad()]),
    ("pythonic", "[f(n=1e999)]", [bad()]),
    ("pythonic", "[f(n=" + "9" * 5000 + ")]", [bad()]),
    # gemma
    ("gemma", 'so\n```tool_code\nf(s="x")\n```\nthen', [ok(s="x")]),
    ("gemma", '```tool_code\nprint(f(s="x"))\n```', [ok(s="x")]),
    ("gemma", '```tool_code\nf(s="a```b")\ng()\n```', [ok(s="a```b"), ok("g")]),
    ("gemma", "```tool_code\n[g(), g()]\n```", [ok("g"), ok("g")]),
    ("gemma", '```json\n{"name": "f", "parameters": {"s": "x"}}\n```', [ok(s="x")]),
    ("gemma", '```json\n[{"name": "g", "parameters": {}}, {"name": "g", "arguments": {}}]\n```', [ok("g"), ok("g")]),
    ("gemma", '```tool_call\n{"name": "f", "args": {"s": "x"}}\n```', [ok(s="x")]),
    ("gemma", '```json\n{"answer": 1}\n```', []),
    ("gemma", "```python\nf(s='x')\n```", []),
    ("gemma", "```\nplain\n``` and ```tool_code\ng()\n```", [ok("g")]),
    ("gemma", '```json\n{"name": "f", "parameters": {bad}}\n```', [bad()]),
    ("gemma", '```tool_code\nf(s="x', [bad("unclosed")]),
    ("gemma", "```tool_code\n```", [bad()]),
    ("gemma", "```tool_code\nx = 3\n```", [bad()]),
    ("gemma", "<think>```tool_code\ng()\n```</think>", []),
    ("gemma", "f(s='x')", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_what_is_read(name: str, text: str, expected: Found) -> None:
    assert read(name, text) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_thoughts_hide_calls(name: str) -> None:
    call = FORMATS[name].write_calls([("g", {})])
    assert read(name, call) == [ok("g")]
    assert read(name, f"<think>{call}</think>{call}") == [ok("g")]
    assert read(name, f"<think>{call}") == []
    assert read(name, f"{call}</think>{call}", thinking=True) == [ok("g")]
    assert read(name, call, thinking=True) == []
    assert read(name, f"so {call} or</think>\n{call}") == [ok("g")]
    assert read(name, f"so {call} or</think>\nno") == []


@pytest.mark.parametrize("name", FORMATS)
def test_calls_beyond_the_cap_are_not_read(name: str) -> None:
    text = FORMATS[name].write_calls([("g", {})] * (MAX_CALLS + 2))
    statuses = [status for status, _, _ in read(name, text)]
    assert statuses[:MAX_CALLS] == ["ok"] * MAX_CALLS
    assert set(statuses[MAX_CALLS:]) == {"invalid_json"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_block_alone_reads_as_it_did(name: str) -> None:
    form = FORMATS[name]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("f", {"s": "a ] ) } \" ' ``` b", "n": 3}),
        ("g", {}),
        ("f", {"b": True}),
    ]
    text = form.write_message("so", calls)
    blocks = form.find_blocks(text, tools=SCHEMAS)
    assert [(b.name, b.arguments) for b in blocks] == calls
    for block, (called, arguments) in zip(blocks, calls, strict=True):
        alone = form.read_raw(text[block.start : block.end], SCHEMAS)
        assert alone is not None
        assert (alone.status, alone.name, alone.arguments) == ("ok", called, arguments)


@pytest.mark.parametrize("name", [*FORMATS, "api"])
def test_what_an_error_says_names_the_formats_own_markup(name: str) -> None:
    form = tool_format(name)
    for status in ("unclosed", "missing_name", "invalid_json"):
        text = form.explain(status)
        assert text.endswith(form.hint)
        assert ("<tool_call>" in text) == (name in ("hermes", "qwen_xml", "glm"))
    assert form.explain("invalid_json", "why").startswith("why. ")


@pytest.mark.parametrize("name", FORMATS)
def test_the_usage_shown_is_no_call_of_a_tool(name: str) -> None:
    section = FORMATS[name].section([{"name": "f", "description": "", "parameters": SCHEMAS["f"]}])
    assert section.startswith('<tools>\n{"name": "f"')
    assert section.endswith(f"To call a tool, write {FORMATS[name].usage}")
