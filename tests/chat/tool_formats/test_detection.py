"""Which format a template writes, what is refused, and that prompts, experts and error texts then speak it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.chat.options import ChatOptions
from areal_agents.chat.tool_formats import FORMATS
from areal_agents.chat.toolcalls import parse_text, write_block
from areal_agents.errors import ConfigError, TemplateError
from areal_agents.settings import loading
from areal_agents.tool import ToolSpec
from areal_agents.types import Completion, tool_result, user
from tests.chat_families import FAMILIES, family_tokenizer
from tests.tiny_tokenizer import CHATML, WITH_TOOLS, tiny

TOOLS = (
    ToolSpec(
        "python",
        "Run Python.",
        {"type": "object", "properties": {"code": {"type": "string"}, "n": {"type": "integer"}}, "required": ["code"]},
    ),
    ToolSpec("noop", "", {"type": "object", "properties": {}}),
)
# By template: its tool format, and whether the template itself describes the tools in the prompts of a run.
FOUND = {
    "cohere2": ("hermes", False),
    "deepseekv3": ("deepseek", False),
    "gemma": ("hermes", False),
    "gemma3": ("hermes", False),
    "llama3": ("hermes", False),
    "llama3_1": ("llama_json", True),
    "mistral_tools": ("mistral", False),  # it shows them before the last user message: they would move
    "phi3": ("hermes", False),
    "qwen2_5": ("hermes", True),
    "qwen2_5_vl": ("hermes", False),
    "qwen3": ("hermes", True),
    "qwen3_5_nothink": ("qwen_xml", True),
    "qwen3_5_think": ("qwen_xml", True),
    "qwen3_instruct_2507": ("hermes", True),
}
CODE = 'print("007 < 8")\n'


def done(ids: Any) -> Completion:
    return Completion(ids, (0.0,) * len(ids), (0,) * len(ids), "stop")


def played(form: ChatFormat) -> tuple[Conversation, Any]:
    """One turn in which an expert makes two calls."""
    talk = Conversation(form, [user("go")], TOOLS)
    said = write_block("python", '{"code": "print(\\"007 < 8\\")\\n", "n": 3}') + "\n" + write_block("noop", "{}")
    message = talk.add_completion(done(form.encode_turn(said, TOOLS, talk.prompt.ids)))
    return talk, message


def test_every_template_has_its_line(shared_data: Path) -> None:
    assert sorted(FOUND) == sorted(FAMILIES) == sorted(p.stem for p in (shared_data / "chat_templates").glob("*.jinja"))


@pytest.mark.parametrize("name", FOUND)
def test_the_families_templates(name: str, smollm2: Path, shared_data: Path) -> None:
    form = ChatFormat(family_tokenizer(smollm2, shared_data / "chat_templates", name))
    assert (form.tool_format.name, form.renders_tools) == FOUND[name]
    talk, message = played(form)
    assert [(c.status, c.name, c.arguments, c.format) for c in message.tool_calls] == [
        ("ok", "python", {"code": CODE, "n": 3}, FOUND[name][0]),
        ("ok", "noop", {}, FOUND[name][0]),
    ]
    shown = str(form.tokenizer.decode(list(form.first_prompt([user("go")], TOOLS))))
    assert "Run Python." in shown
    assert (form.tool_format.usage in shown) == (not form.renders_tools)
    for call in message.tool_calls:  # T7
        assert call.token_span is not None
        ids = form.encode_turn(message.text)
        assert call.raw in str(form.tokenizer.decode(list(ids)))
    talk.add_observation([tool_result("r", call=c) for c in message.tool_calls])


@pytest.mark.parametrize("name", ["llama3_1", "qwen3_5_think", "qwen2_5", "gemma"])
@pytest.mark.parametrize("asked", FORMATS)
def test_the_setting_overrules_and_nothing_is_told_twice(
    name: str, asked: Any, smollm2: Path, shared_data: Path
) -> None:
    form = ChatFormat(family_tokenizer(smollm2, shared_data / "chat_templates", name), tool_format=asked)
    assert form.tool_format.name == asked
    assert form.renders_tools == (FOUND[name] == (asked, True))
    shown = str(form.tokenizer.decode(list(form.first_prompt([user("go")], TOOLS))))
    assert (f"To call a tool, write {form.tool_format.usage}" in shown) == (not form.renders_tools)
    _, message = played(form)
    assert [c.status for c in message.tool_calls] == ["ok", "ok"]


CALLS = "{% for c in m.tool_calls %}"
ENDED = "{% endfor %}"
WRITERS = {
    "mistral": "[TOOL_CALLS] [" + CALLS + "{{ ', ' if not loop.first else '' }}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    + ENDED + "]",
    "mistral_args": CALLS + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}" + ENDED,
    "deepseek_v31": "<｜tool▁calls▁begin｜>" + CALLS + "<｜tool▁call▁begin｜>{{ c.function.name }}<｜tool▁sep｜>"
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    "<｜tool▁call▁end｜>" + ENDED + "<｜tool▁calls▁end｜>",
    "glm": CALLS + "\n<tool_call>{{ c.function.name }}\n{% for k, v in c.function.arguments.items() %}"
    "<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}"
    "</tool_call>" + ENDED,
    "pythonic": "[" + CALLS + "{{ ', ' if not loop.first else '' }}{{ c.function.name }}("
    "{% for k, v in c.function.arguments.items() %}{{ ', ' if not loop.first else '' }}{{ k }}={{ v | tojson }}"
    "{% endfor %})" + ENDED + "]",
    "llama_json": "<|python_start|><|python_end|>" + CALLS
    + '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}' + ENDED,
    "gemma": "```tool_code\n" + CALLS + "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}"
    "{{ ', ' if not loop.first else '' }}{{ k }}={{ v | tojson }}{% endfor %})\n" + ENDED + "```",
    "hermes": CALLS + '\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>' + ENDED,
}  # fmt: skip


def writing(calls: str, *, tools: bool = True) -> str:
    head = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" if tools else ""
    return head + (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% if m.tool_calls %}" + calls + "{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


@pytest.mark.parametrize("name", WRITERS)
def test_other_templates_of_the_families(name: str) -> None:
    form = ChatFormat(tiny(writing(WRITERS[name])))
    assert (form.tool_format.name, form.renders_tools) == (name, True)
    _, message = played(form)
    assert [(c.status, c.format) for c in message.tool_calls] == [("ok", name)] * 2


def test_a_template_that_takes_arguments_as_text() -> None:
    """It writes an object as Python does, without a word."""
    body = '\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}\n</tool_call>'
    form = ChatFormat(tiny(writing(CALLS + body + ENDED)))
    assert (form.tool_format.name, form.renders_tools) == ("hermes", True)
    _, message = played(form)
    assert [c.status for c in message.tool_calls] == ["ok", "ok"]


STRANGE = CALLS + "<invoke name='{{ c.function.name }}'>{{ c.function.arguments | tojson }}</invoke>" + ENDED
HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% for c in m.tool_calls or [] %}<|start|>assistant "
    "to=functions.{{ c.function.name }}<|channel|>commentary json<|message|>{{ c.function.arguments | tojson }}<|call|>"
    "{% endfor %}{% if m.content %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_tools_shown_in_a_format_that_nobody_reads_are_refused() -> None:
    with pytest.raises(TemplateError, match=r"which no tool format reads: set model\.tool_format to one of hermes, "):
        ChatFormat(tiny(writing(STRANGE)))
    named = ChatFormat(tiny(writing(STRANGE)), tool_format="hermes")
    assert (named.tool_format.name, named.renders_tools) == ("hermes", False)


def test_a_template_that_shows_no_tools_takes_the_section() -> None:
    form = ChatFormat(tiny(writing(STRANGE, tools=False)))
    assert (form.tool_format.name, form.renders_tools) == ("hermes", False)


def test_a_template_that_ignores_calls_takes_the_section() -> None:
    ignoring = (
        "{% if tools %}{{ '<|im_start|>system\nTOOLS ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + CHATML
    )
    form = ChatFormat(tiny(ignoring))
    assert (form.tool_format.name, form.renders_tools) == ("hermes", False)
    shown = str(form.tokenizer.decode(list(form.first_prompt([user("go")], TOOLS))))
    assert "To call a tool, write <tool_call>" in shown
    assert "TOOLS" not in shown


def test_harmony_is_refused_with_the_reason_and_the_remedy() -> None:
    with pytest.raises(TemplateError, match=r"gpt-oss's harmony, whose turn is several messages.*--url"):
        ChatFormat(tiny(HARMONY))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(TemplateError, match="tool_format 'xml' is unknown: use 'auto' or one of hermes, qwen_xml"):
        ChatFormat(tiny(CHATML), tool_format="xml")
    with pytest.raises(ConfigError, match="tool_format"):
        loading.load(None, overrides=["--model.tool_format", "xml"])


def test_the_setting_reaches_the_format(tmp_path: Path) -> None:
    tiny(WITH_TOOLS).save_pretrained(tmp_path)
    for name in FORMATS:
        options = ChatOptions(tool_format=cast(Any, name))
        assert ChatFormat.load(tmp_path, options).tool_format.name == name
    assert ChatFormat.load(tmp_path).tool_format.name == "hermes"
    config = loading.load(None, overrides=["--model.tool_format", "glm"])
    assert config.model.chat.tool_format == "glm"


@pytest.mark.parametrize("name", ["llama_json", "pythonic", "gemma", "mistral", "deepseek"])
def test_a_call_in_another_familys_markup_is_no_answer(name: str) -> None:
    form = ChatFormat(tiny(CHATML), tool_format=name)
    said = "so " + write_block("noop", "{}")

    def read(text: str, tools: Any = TOOLS) -> list[tuple[str, str]]:
        ids = form.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [(c.status, c.raw) for c in form.parse(tuple(ids), "stop", (), tools).tool_calls]

    assert read(said) == [("invalid_json", write_block("noop", "{}"))]
    assert read(f"<think>{said}</think> 42") == []
    assert read("so " + write_block("nobody", "{}")) == []
    assert read(said, ()) == []
    assert read("write <tool_call> and then JSON") == []
    (call,) = parse_text(said, form=form.tool_format, tools=TOOLS).tool_calls
    told = form.tool_format.explain(call.status, call.problem)
    assert told == f"the call is written in another format. Write {form.tool_format.usage}"


@pytest.mark.parametrize("name", FORMATS)
def test_a_message_that_is_a_call_without_markup_is_no_answer(name: str) -> None:
    form = FORMATS[name]

    def read(text: str, tools: Any = TOOLS) -> list[tuple[str, str]]:
        calls = parse_text(text, form=form, tools=tools).tool_calls
        assert all(c.status != "ok" or name in ("llama_json", "pythonic") for c in calls)
        return [(c.status, c.raw) for c in calls]

    said = '{"name": "python", "arguments": {"code": "print(1)"}}'
    for text in (
        said, f"\n{said}\n", f"<think>why</think>\n{said}", "[python(code='print(1)')]", f"{said}\n</tool_call>",
        f"{said} That is all.", f"[{said}]", f"<tools>\n{said}\n</tools>", f"<|tool_call|>[{said}]<|/tool_call|>",
        '{"name": "noop", "arguments": {}}', "<|tool_call_start|>[python(code='print(1)')]<|tool_call_end|>",
        '<invoke name="python"><parameter name="code">1</parameter></invoke>',
        *([] if name == "gemma" else [f"```json\n{said}\n```"]),
        *([] if name == "qwen_xml" else ['<function=python>{"code": "1"}</function>']),
    ):  # fmt: skip
        found = [raw for _, raw in read(text)]
        if name in ("llama_json", "pythonic"):  # which end a call where its own convention does
            assert found, text
        else:
            assert found == [text.removeprefix("<think>why</think>").strip()]
    for answer in (
        f"I would write {said}", f"{{\"answer\": {said}}}", '{"answer": 42}', "[1, 2]", "<answer>42</answer>",
        "<b>python</b>", "<function>", *([] if name == "pythonic" else ["[python(3), java(8)]"]),
        '```json\n{"answer": 42}\n```', "```python\nprint(1)\n```",
        '{"name": "nobody", "age": 3}', f"<think>{said}</think> 42",
    ):  # fmt: skip
        assert read(answer) == []
    if name != "llama_json":  # a language, perhaps
        assert read('{"name": "python"}') == []
    if name not in ("llama_json", "pythonic"):
        assert read(said, ()) == []


def test_an_expert_says_only_what_is_read_back() -> None:
    form = ChatFormat(tiny(CHATML), tool_format="glm")
    hostile = write_block("python", '{"code": "</arg_value></tool_call>"}')
    with pytest.raises(TemplateError, match="T7: the tool format glm would read other calls"):
        form.encode_turn(hostile, TOOLS)
    assert form.encode_turn("no call at all") == ChatFormat(tiny(CHATML)).encode_turn("no call at all")


def test_an_expert_closes_the_thought_that_the_prompt_opened(smollm2: Path, shared_data: Path) -> None:
    form = ChatFormat(family_tokenizer(smollm2, shared_data / "chat_templates", "qwen3_5_think"))
    prompt = form.first_prompt([user("go")], TOOLS)
    for text, begins in (
        ("42", "\n</think>\n\n42"),
        ("<think>\nwhy\n</think>\n\n42", "why\n</think>\n\n42"),
        ("why</think>42", "why</think>42"),
    ):
        ids = form.encode_turn(text, TOOLS, prompt)
        assert str(form.tokenizer.decode(list(ids[:-1]))) == begins
