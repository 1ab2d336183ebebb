"""What is found out about a chat template, what is refused, and what a prompt is asked for itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat, end_ids
from areal_agents.chat.options import ChatOptions
from areal_agents.chat.template import ChatTemplate
from areal_agents.chat.thinking import thought_is_open
from areal_agents.errors import ModelError, TemplateError
from areal_agents.tool import ToolSpec
from areal_agents.types import Completion, Ids, Message, Text, system, tool_result, user
from tests import tiny_tokenizer as tiny_
from tests.tiny_tokenizer import CHATML, tiny

TOOL = ToolSpec("look", "Look.", {"type": "object", "properties": {}})
CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
LOOP = "{% for m in messages %}"
# The user's turn ends with what opens the answer; white space around the content, as Mistral writes it.
EMPTY_PROMPT = (
    LOOP + "{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|endoftext|>' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' <|im_end|>' }}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
# As Phi-3: without a generation prompt it writes an end of its own.
ENDS_WITHOUT_PROMPT = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
TRIMS = CHATML.replace("m.content +", "(m.content | trim) +")
# As DeepSeek: a thought is opened after a question, and not after a tool's result.
OPENS_AFTER_QUESTIONS = CHATML.replace(
    "assistant\n' }}{% endif %}",
    "assistant\n' }}{% if messages[-1].role != 'tool' %}{{ '<think>\n' }}{% endif %}{% endif %}",
)


def fmt(template: str = CHATML, **options: Any) -> ChatFormat:
    return ChatFormat(tiny(template), **options)


def done(ids: Ids, finish: Any = "stop") -> Completion:
    return Completion(ids, (-1.0,) * len(ids), (0,) * len(ids), finish)


def text_of(form: ChatFormat, ids: Ids) -> str:
    return str(form.tokenizer.decode(list(ids), skip_special_tokens=False))


def talked(form: ChatFormat, *turns: str) -> Conversation:
    """A conversation in which each turn is answered by a tool's result."""
    talk = Conversation(form, [user("U")], [TOOL])
    for turn in turns:
        talk.add_completion(done(form.encode_turn(turn)))
        talk.add_observation([Message("tool", (Text("seen"),))])
    return talk


# ── the generation prompt ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_generation_prompt_is_one() -> None:
    form = fmt(EMPTY_PROMPT)
    assert (form.facts.generation, form.history) == ("", "append")
    talk = Conversation(form, [user("U")])
    assert text_of(form, talk.prompt.ids) == "<|im_start|>U<|endoftext|>"
    ids = form.encode_turn("fox")
    talk.add_completion(done(ids))
    talk.add_observation([user("V")])
    # The space that the template writes before the turn's end is none of what was sampled, and none of what follows.
    assert text_of(form, talk.prompt.ids) == "<|im_start|>U<|endoftext|>fox<|im_end|><|im_start|>V<|endoftext|>"
    cut = form.suffix([user("V")], done(ids[:-1], "length"))
    assert text_of(form, cut) == "<|im_end|><|im_start|>V<|endoftext|>"


def test_an_end_that_a_template_writes_without_generation_prompt_is_no_part_of_turns() -> None:
    tokenizer = tiny(ENDS_WITHOUT_PROMPT)
    tokenizer.eos_token = "<|endoftext|>"
    form = ChatFormat(tokenizer)
    assert (form.facts.generation, form.history) == ("<|im_start|>assistant\n", "append")
    suffix = form.suffix([user("V")], done(form.encode_turn("x")))
    assert text_of(form, suffix) == "\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            tiny_.NO_GENERATION_PROMPT,
            "T4: the template ignores add_generation_prompt, and its assistant turns begin with "
            r"'<\|im_start\|>assistant\\n'",
        ),
        (
            CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>user\n'"),
            r"T4: the generation prompt ends with 'user\\n', but the template's assistant turns begin with "
            r"'assistant\\n' there",
        ),
        (  # as gpt-oss: the model itself would have to write the channel
            CHATML.replace("m.role + '\n'", "m.role + ('\n<|endoftext|>final' if m.role == 'assistant' else '\n')"),
            r"begin with '<\|endoftext\|>final' there",
        ),
    ],
)
def test_a_prompt_that_does_not_open_a_turn_is_refused(template: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason):
        fmt(template)


def test_a_template_that_wants_a_question_at_the_end_plays() -> None:
    form = fmt("{% if messages[-1].role == 'assistant' %}{{ raise_exception('no question') }}{% endif %}" + CHATML)
    assert text_of(form, form.suffix([user("V")], done((5,)))).startswith("<|im_end|>\n<|im_start|>user\nV")


# ── thoughts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "opened", "is_open"),
    [
        ("", False, False),
        ("", True, True),
        ("why", True, True),
        ("why</think>so", True, False),
        ("<think>why", False, True),
        ("<think>a</think>b<think>c", False, True),
        ("<think>a</think>b", True, False),
        ("a</think><think>b</think>", True, False),
    ],
)
def test_a_thought_is_open(text: str, opened: bool, is_open: bool) -> None:
    assert thought_is_open(text, opened=opened) == is_open


def test_each_prompt_is_asked_whether_it_opens_a_thought() -> None:
    form = fmt(OPENS_AFTER_QUESTIONS, history="append")
    talk = Conversation(form, [user("U")], [TOOL])
    first = talk.add_completion(done(form.encode_turn(CALL + "</think>" + CALL)))
    assert (len(first.tool_calls), first.in_thought) == (1, True)
    talk.add_observation([tool_result("seen", call=first.tool_calls[0])])
    second = talk.add_completion(done(form.encode_turn(CALL)))
    assert (len(second.tool_calls), second.in_thought) == (1, False)
    talk.add_observation([user("and now?")])
    third = talk.add_completion(done(form.encode_turn(CALL)))
    assert (third.tool_calls, third.in_thought) == ((), True)


def test_content_opens_no_thought() -> None:
    plain = (
        LOOP + "{{ m.role + ': ' + m.content + '\n' + ('<|im_end|>' if m.role == 'assistant' else '') }}{% endfor %}"
    )
    plain += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    for template in (CHATML, plain, EMPTY_PROMPT):
        form = fmt(template)
        for content in ("<think>", "a <think> b", "x" * 300 + "<think>"):
            assert not form.opens_thought(form.first_prompt([user(content)]))
    prefilled = fmt(CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\nOkay, ' }}{% endif %}"))
    assert prefilled.opens_thought(prefilled.first_prompt([user("U")]))
    closed = fmt(tiny_.SWITCH, template_variables={"enable_thinking": False})
    assert not closed.opens_thought(closed.first_prompt([user("U")]))


# ── the model's own control tokens ───────────────────────────────────────────────────────────────────────────────────


def test_thinking_tags_that_are_special_tokens_stay_tokens_where_the_model_says_them() -> None:
    tokenizer = tiny(tiny_.OPENS_THINKING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    form = ChatFormat(tokenizer)
    begin, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    prompt = form.first_prompt([user("<think>")])
    assert prompt.count(begin) == 1  # the template's; the user's is plain text
    assert form.opens_thought(prompt)
    ids = form.encode_turn("why</think><|im_start|>")
    assert (ids.count(end), ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>"))) == (1, 0)
    assert form.parse(ids, "stop", prompt).text == "why</think><|im_start|>"


# ── stop ids ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("given", "found"), [(7, (7,)), ([7, 300, 7], (7, 300, 7)), (None, ()), ([], ())])
def test_end_ids_of_the_generation_config(given: Any, found: Ids, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given, "pad_token_id": 9}))
    assert end_ids(tmp_path) == found
    tiny().save_pretrained(tmp_path)
    form = ChatFormat.load(tmp_path)
    assert form.stop_ids == tuple(dict.fromkeys((form.turn_end, *found)))


def test_without_generation_config_there_are_none(tmp_path: Path) -> None:
    assert end_ids(tmp_path) == ()


@pytest.mark.parametrize(
    "text", ["{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, true]}', "[1]", '{"eos_token_id": -1}']
)
def test_a_broken_generation_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        end_ids(tmp_path)


def test_a_further_end_id_ends_a_turn_and_the_templates_own_follows() -> None:
    form = fmt(end_ids=[7])
    assert form.stop_ids == (form.turn_end, 7)
    assert form.parse((5, 7), "stop").text == form.parse((5, form.turn_end), "stop").text
    talk = Conversation(form, [user("U")])
    talk.add_completion(done((5, 7)))
    talk.add_observation([user("V")])
    assert talk.prompt.ids.count(form.turn_end) == 3  # the user's, the one put in, the user's
    assert talk.suffix[0] == form.turn_end


def test_an_end_of_two_tokens_is_not_written_twice() -> None:
    """As Command R: the response's end, then the turn's, and a model that leaves out the first."""
    tokenizer = tiny(
        CHATML.replace("'<|im_end|>'", "('<|im_end|>' if m.role == 'assistant' else '') + '<|endoftext|>'")
    )
    tokenizer.eos_token = "<|endoftext|>"
    form = ChatFormat(tokenizer)
    end, eos = form.stop_ids
    rest = "\n<|im_start|>user\nV<|endoftext|>\n<|im_start|>assistant\n"
    assert text_of(form, form.suffix([user("V")], done((5, end)))) == "<|endoftext|>" + rest
    assert text_of(form, form.suffix([user("V")], done((5, eos)))) == rest
    assert text_of(form, form.suffix([user("V")], done((5,), "length"))) == "<|im_end|><|endoftext|>" + rest


# ── roles ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("template", "reason"),
    [(tiny_.NO_SYSTEM, "System role not supported"), (tiny_.DROPS_SYSTEM, "it leaves the message out")],
)
def test_without_system_role(template: str, reason: str) -> None:
    form = fmt(template)
    assert form.facts.system_refusal == reason
    text = text_of(form, form.first_prompt([user("U")], [TOOL]))
    assert text.startswith('<|im_start|>user\n<tools>\n{"name": "look"')
    assert "</tool_call>\n\nU<|im_end|>" in text
    assert "<tools>" not in text_of(form, form.first_prompt([user("U")]))
    with pytest.raises(TemplateError, match=rf"\({reason}\): set model\.merge_system = true"):
        form.first_prompt([system("S"), user("U")])
    with pytest.raises(TemplateError, match=r"set model\.merge_system = true"):
        form.suffix([system("S"), user("U")], done((5,)))
    merged = fmt(template, merge_system=True)
    assert "<|im_start|>user\nS\n\nU<|im_end|>" in text_of(merged, merged.first_prompt([system("S"), user("U")]))
    text = text_of(merged, merged.first_prompt([system("S"), user("U")], [TOOL]))
    assert text.startswith("<|im_start|>user\nS\n\n<tools>\n")
    assert "</tool_call>\n\nU<|im_end|>" in text
    assert "user\nS\n\nV<|im_end|>" in text_of(merged, merged.suffix([system("S"), user("V")], done((5,))))
    assert "user\nS<|im_end|>" in text_of(merged, merged.suffix([system("S")], done((5,))))


def test_a_template_with_a_system_role_is_never_merged() -> None:
    messages = [system("S"), user("U")]
    assert fmt(merge_system=True).first_prompt(messages, [TOOL]) == fmt().first_prompt(messages, [TOOL])


def test_user_messages_in_a_row_become_one_where_roles_must_alternate() -> None:
    form = fmt(tiny_.NO_TOOL_ROLE)
    assert form.facts.alternates
    suffix = form.suffix([Message("tool", (Text("1"),)), user("Go on.")], done(form.encode_turn("x")))
    assert text_of(form, suffix) == (
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n\nGo on.<|im_end|><|im_start|>assistant\n"
    )
    assert text_of(fmt(), fmt().first_prompt([user("a"), user("b")])).count("user\n") == 2


# ── the past ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("template", [tiny_.THINKING, TRIMS, OPENS_AFTER_QUESTIONS, EMPTY_PROMPT, tiny_.NO_SYSTEM])
def test_append_extends_what_was_sampled_whatever_the_template_rewrites(template: str) -> None:
    form = fmt(template, history="append")
    said = ["<think>\nwhy\n</think>\n\n" + CALL, "  \n spaces at both ends \n ", "<think>never closed"]
    talk = Conversation(form, [user("U")], [TOOL])
    for k, text in enumerate(said):
        before, ids = talk.prompt.ids, form.encode_turn(text)
        talk.add_completion(done(ids))
        talk.add_observation([user(f"V{k}")] if k else [Message("tool", (Text("seen"),))])
        assert talk.prompt.ids == before + ids + talk.suffix
        assert talk.suffix[0] not in form.stop_ids
    whole = text_of(form, talk.prompt.ids)
    assert all(text in whole for text in said)


@pytest.mark.parametrize(
    ("template", "history", "rewrites"),
    [
        (CHATML, "append", ""),
        (TRIMS, "append", ""),
        (EMPTY_PROMPT, "append", ""),
        (tiny_.THINKING, "template", "earlier thinking"),
        (tiny_.OPENS_THINKING, "template", "earlier turns"),
    ],
)
def test_auto_asks_the_template(template: str, history: str, rewrites: str) -> None:
    form = fmt(template, history="auto")
    assert (form.history, form.facts.rewrites) == (history, rewrites)
    assert fmt(template, history="append").history == "append"
    assert fmt(template, history="template").history == "template"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(TemplateError, match="history 'keep' is unknown"):
        fmt(history="keep")


# ── the template's variables ─────────────────────────────────────────────────────────────────────────────────────────


def test_variables_reach_every_rendering(tmp_path: Path) -> None:
    form = fmt(tiny_.SWITCH, template_variables={"enable_thinking": False})
    ending = "assistant\n<think>\n\n</think>\n\n"
    assert text_of(form, form.first_prompt([user("U")])).endswith(ending)
    assert text_of(form, form.suffix([user("V")], done((5,)))).endswith(ending)
    assert text_of(fmt(tiny_.SWITCH), fmt(tiny_.SWITCH).first_prompt([user("U")])).endswith("assistant\n")
    tiny(tiny_.SWITCH).save_pretrained(tmp_path)
    loaded = ChatFormat.load(tmp_path, ChatOptions(template_variables={"enable_thinking": False}))
    assert loaded.first_prompt([user("U")]) == form.first_prompt([user("U")])


@pytest.mark.parametrize(
    ("template", "name", "reason"),
    [
        (tiny_.SWITCH, "enable_thinkin", r"did you mean enable_thinking\? it reads enable_thinking"),
        (CHATML, "enable_thinking", "reads no such variable: it reads none"),
        (CHATML, "messages", "reads no such variable"),
        (CHATML, "add_generation_prompt", "reads no such variable"),
        (ENDS_WITHOUT_PROMPT, "eos_token", "reads no such variable"),
        ("{% set own = 1 %}" + CHATML, "own", "reads no such variable"),
        (CHATML, "m", "reads no such variable"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(template: str, name: str, reason: str) -> None:
    with pytest.raises(TemplateError, match=rf"model\.template_variables\.{name}: .*{reason}"):
        fmt(template, template_variables={name: True})


def test_what_a_template_reads() -> None:
    source = (
        "{% if not date is defined %}{% set date = 'today' %}{% endif %}{{ date }}{{ strftime_now('%Y') }}"
        "{% macro show(text) %}{% if text is undefined %}{% else %}{{ text }}{% endif %}{% endmacro %}"
        "{% for m in messages %}{% set body = m.content %}{% generation %}{{ show(body) }}{% endgeneration %}"
        "{% if loop.first %}{% continue %}{% endif %}{{ style.name }}{% endfor %}{{ bos_token }}{{ tools }}"
    )
    source += "{% set deep = deep | default(true) %}{% if not lang %}{% set lang = 'en' %}{% endif %}{{ deep ~ lang }}"
    source += "{% macro call(x) %}{{ caller(x) }}{% endmacro %}{% call(y) call(1) %}{{ y ~ z }}{% endcall %}"
    template = ChatTemplate(tiny(source))
    assert template.reads == ("date", "deep", "lang", "style", "z")
    assert template.lacks == ["bos_token"]


def test_of_several_templates_one_is_used_in_every_rendering() -> None:
    tokenizer = tiny()
    tokenizer.chat_template = {"default": CHATML, "tool_use": tiny_.NO_TOOL_ROLE}
    form = ChatFormat(tokenizer)
    for tools in ((), (TOOL,)):
        assert "\n<|im_start|>" not in text_of(form, form.first_prompt([user("U")], tools))
    assert "<tool_response>" in text_of(form, form.suffix([Message("tool", (Text("1"),))], done((5,))))
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(TemplateError, match="the chat templates rag, and none is called default"):
        ChatFormat(tokenizer)


def test_a_broken_template_says_so() -> None:
    with pytest.raises(TemplateError, match="no valid Jinja: line 1"):
        fmt("{% for m in messages %}")
    with pytest.raises(TemplateError, match=r"the tokenizer has no bos_token: set it"):
        fmt("{{ bos_token + '' }}" + CHATML)


def test_a_system_message_that_moves_to_later_messages_stays_where_it_was_shown() -> None:
    """As Mistral 0.3, which writes it into the last user message."""
    moves = (
        "{% set ns = namespace(text='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.text = m.content %}{% else %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ (ns.text if loop.last and m.role == 'user' else '') + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert fmt(moves).history == "template"
    form = fmt(moves, history="append")
    talk = Conversation(form, [system("S"), user("U")])
    assert text_of(form, talk.prompt.ids) == "<|im_start|>user\nSU<|im_end|><|im_start|>assistant\n"
    talk.add_completion(done(form.encode_turn("x")))
    talk.add_observation([user("V")])
    assert text_of(form, talk.suffix) == "<|im_start|>user\nV<|im_end|><|im_start|>assistant\n"
