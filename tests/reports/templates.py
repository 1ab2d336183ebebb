"""Chat templates of model families: what is rendered, kept, and trained."""

from __future__ import annotations

from typing import Any

from areal_agents.algorithms.batch import rows_of
from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.engines.cpu.architecture import SUPPORTED
from areal_agents.types import Completion, Task, Trajectory, Turn, system, tool_result, user
from tests.reports.envs import add
from tests.reports.place import Place, call_text, case

QWEN = ("<|im_start|>", "<|endoftext|>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|end_of_text|>")
MISTRAL = (
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)  # fmt: skip
MISTRAL_01 = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (  # as Phi-3-mini was published: the user turn's end opens the answer
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)


def sampled(fmt: ChatFormat, text: str, finish: Any = "stop") -> Completion:
    """``text`` as an engine would have sampled it, with its end where it stopped by itself."""
    ids = fmt.encode_turn(text) if finish == "stop" else fmt.encode_turn(text)[:-1]
    return Completion(ids, (-1.0,) * len(ids), (0,) * len(ids), finish)


def text_of(fmt: ChatFormat, ids: tuple[int, ...]) -> str:
    return str(fmt.tokenizer.decode(list(ids), skip_special_tokens=False))


def one_call_and_result(fmt: ChatFormat, said: str) -> tuple[Conversation, Completion]:
    """A conversation in which ``said`` called a tool and got 107."""
    talk = Conversation(fmt, [user("100+7?")], [add])
    done = sampled(fmt, said)
    message = talk.add_completion(done)
    assert [(c.name, c.status, dict(c.arguments)) for c in message.tool_calls] == [("add", "ok", {"a": 100, "b": 7})]
    talk.add_observation([tool_result("107", call=message.tool_calls[0])])
    return talk, done


@case("H1-02")
def past_thinking_is_kept(place: Place) -> None:
    """T1 under a template that drops past thinking: the next prompt is prompt, sampled ids, suffix."""
    fmt = ChatFormat(place.tokenizer("qwen3", *QWEN, end="<|im_end|>"), history="append")
    assert fmt.history == "append"
    said = "<think>\nadd them\n</think>\n\n" + call_text("add", '{"a": 100, "b": 7}')
    first = Conversation(fmt, [user("100+7?")], [add]).prompt.ids
    talk, done = one_call_and_result(fmt, said)
    assert talk.parent == 0
    assert talk.prompt.ids == first + done.ids + talk.suffix
    assert "add them" in text_of(fmt, talk.prompt.ids)
    assert "107" in text_of(fmt, talk.suffix)
    assert "107" not in text_of(fmt, first + done.ids)
    answer = sampled(fmt, "<think>\nread it\n</think>\n\n107")
    before = talk.prompt.ids
    talk.add_completion(answer)
    talk.add_observation([user("and 1+1?")])  # the template drops the thinking before the last user message
    assert talk.prompt.ids[: len(before) + len(answer.ids)] == before + answer.ids


@case("H1-03")
def the_newline_after_the_turns_end(place: Place) -> None:
    fmt = ChatFormat(place.tokenizer("qwen2_5", *QWEN, end="<|im_end|>"))
    talk, done = one_call_and_result(fmt, call_text("add", '{"a": 100, "b": 7}'))
    assert text_of(fmt, done.ids[-1:]) == "<|im_end|>"
    suffix = talk.suffix
    assert text_of(fmt, suffix).startswith("\n<|im_start|>user\n<tool_response>\n107\n</tool_response><|im_end|>\n")
    first = fmt.first_prompt([user("100+7?")], [add])
    wanted = fmt.tokenizer.apply_chat_template(
        [{"role": "user", "content": "100+7?"}], tools=[schema()], tokenize=True, add_generation_prompt=True,
        return_dict=False,
    )  # fmt: skip
    assert list(first) == list(wanted)
    row = trained([Turn(first, done, fmt.parse(done.ids, "stop")), answered(fmt, talk, "107")])
    newline = len(first) + len(done.ids)
    assert text_of(fmt, tuple(row.ids[newline : newline + 1])) == "\n"
    assert row.mask[newline - 1]
    assert not row.mask[newline : newline + len(suffix)].any()


@case("H1-06")
def llamas_bare_json(place: Place) -> None:
    fmt = ChatFormat(place.tokenizer("llama3_1", *LLAMA, end="<|eot_id|>", begin="<|begin_of_text|>"))
    prompt = text_of(fmt, fmt.first_prompt([system("Be brief."), user("100+7?")], [add]))
    assert '"name": "add"' in prompt
    assert '{"name": function name, "parameters": dictionary of argument name and its value}' in prompt
    assert "<tool_call>" not in prompt  # one format is told, and it is the one that is read
    message = fmt.parse(fmt.encode_turn('{"name": "add", "parameters": {"a": 100, "b": 7}}'), "stop")
    assert [(c.name, c.status, dict(c.arguments)) for c in message.tool_calls] == [("add", "ok", {"a": 100, "b": 7})]
    assert not fmt.parse(fmt.encode_turn("It is 107."), "stop").tool_calls


@case("H1-08")
def an_empty_generation_prompt(place: Place) -> None:
    """It is one; and an episode of a call can be played under it."""
    assert "mistral" in SUPPORTED
    end = {"end": "</s>", "begin": "<s>"}
    for tokenizer, ending in (
        (place.tokenizer(MISTRAL_01, *MISTRAL, **end), "[/INST]"),
        (place.tokenizer("mistral_tools", *MISTRAL, **end), "[/INST]"),
        (place.tokenizer(PHI_3, "<|user|>", "<|assistant|>", end="<|end|>", begin="<s>"), "<|assistant|>\n"),
        (place.tokenizer("phi3", "<|user|>", "<|assistant|>", "<|system|>", end="<|end|>"), "<|assistant|>\n"),
    ):
        fmt = ChatFormat(tokenizer)
        first = fmt.first_prompt([user("100+7?")], [add])
        assert text_of(fmt, first).endswith(ending)
        assert '"add"' in text_of(fmt, first) or "'add'" in text_of(fmt, first)
        done = sampled(fmt, "It is 107.")
        assert done.ids[-1] in fmt.stop_ids
        suffix = fmt.suffix([user("and 1+1?")], done)
        assert text_of(fmt, suffix).endswith(ending)
        assert "and 1+1?" in text_of(fmt, suffix)
        assert "It is" not in text_of(fmt, suffix)
    folder = place.model("mistral", place.tokenizer("mistral_tools", *MISTRAL, **end), kind="mistral")
    place.eval("Sums", {"model": folder, "n": 2, "max_turn_tokens": 4})
    assert place.report()["attempts"] == 2


@case("H1-09")
def no_system_role(place: Place) -> None:
    for name in ("gemma", "gemma3"):
        fmt = ChatFormat(
            place.tokenizer(name, "<start_of_turn>", "<end_of_turn>", "<start_of_image>", end="<eos>", begin="<bos>")
        )
        text = text_of(fmt, fmt.first_prompt([user("100+7?")], [add]))
        assert text.startswith("<bos><start_of_turn>user\n"), text
        assert text.endswith("<end_of_turn>\n<start_of_turn>model\n")
        assert text.count("<start_of_turn>") == 2
        assert '"add"' in text
        assert "100+7?" in text
        assert fmt.tokenizer.convert_tokens_to_ids("<end_of_turn>") in fmt.stop_ids
    folder = place.model(
        "gemma", place.tokenizer("gemma", "<start_of_turn>", "<end_of_turn>", end="<eos>", begin="<bos>")
    )
    place.eval("Sums", {"model": folder, "n": 2, "max_turn_tokens": 4})
    assert place.report()["attempts"] == 2


@case("H1-12")
def a_turn_that_was_cut(place: Place) -> None:
    """Its end is added to the next prompt, and does not train."""
    fmt = ChatFormat(place.tokenizer("qwen2_5", *QWEN, end="<|im_end|>"))
    talk = Conversation(fmt, [user("100+7?")], [add])
    first, done = talk.prompt.ids, sampled(fmt, "Let me think about", "length")
    message = talk.add_completion(done)
    talk.add_observation([user("go on")])
    assert text_of(fmt, talk.suffix) == "<|im_end|>\n<|im_start|>user\ngo on<|im_end|>\n<|im_start|>assistant\n"
    row = trained([Turn(first, done, message), answered(fmt, talk, "107")])
    cut = len(first) + len(done.ids)
    assert text_of(fmt, (row.ids[cut],)) == "<|im_end|>"
    assert not row.mask[cut]
    assert row.mask[len(first) : cut].all()


@case("H1-13")
def thinking_is_turned_off(place: Place) -> None:
    """By a setting for the template's own variables, in the prompts that the model is shown."""
    tokenizer = place.tokenizer("qwen3", *QWEN, end="<|im_end|>")
    folder = place.model("qwen3", tokenizer)
    seen = {}
    for thinking in ("true", "false"):
        there = Place(place.folder / thinking, place.shared, place.smollm2, place.templates)
        off = {"model.template_variables.enable_thinking": thinking}
        there.eval("Sums", {"model": folder, "n": 1, "max_turn_tokens": 4} | off)
        (episode,) = there.episodes("eval")
        seen[thinking] = str(tokenizer.decode(list(episode.turns[0].prompt_suffix)))
    assert seen["true"].endswith("<|im_start|>assistant\n")
    assert seen["false"].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def schema() -> dict[str, Any]:
    function = {"name": add.name, "description": add.description, "parameters": dict(add.parameters)}
    return {"type": "function", "function": function}


def answered(fmt: ChatFormat, talk: Conversation, text: str) -> Turn:
    """The next turn of ``talk``, which says ``text``."""
    suffix, parent, done = talk.suffix, talk.parent, sampled(fmt, text)
    return Turn(suffix, done, talk.add_completion(done), parent=parent)


def trained(turns: list[Turn]) -> Any:
    """The one training row of an episode of ``turns``."""
    task = Task.make("t", split="train", seed=0, payload={})
    (row,) = rows_of(Trajectory("e", task, "g", tuple(turns), True, False, "answer"), [1.0] * len(turns), episode=0)
    return row
