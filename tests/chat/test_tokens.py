"""The token rules T1, T2, T4, T5 and T7 as properties of ``Conversation`` and ``rows_of``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.algorithms.batch import rows_of
from areal_agents.chat.conversation import Conversation
from areal_agents.chat.format import ChatFormat
from areal_agents.errors import TemplateError
from areal_agents.types import (
    AssistantMessage,
    Completion,
    Finish,
    Ids,
    Message,
    Task,
    Text,
    Trajectory,
    Turn,
    system,
    user,
)
from tests import tiny_tokenizer as tiny_
from tests.tiny_tokenizer import SMOLLM2, tiny

FORM = ChatFormat(tiny())
THINKING = ChatFormat(tiny(tiny_.THINKING))
FORMS = [FORM, *([ChatFormat.load(SMOLLM2)] if SMOLLM2.is_dir() else [])]
END = FORM.stop_ids[0]

any_ids = st.lists(st.integers(0, 314), max_size=12).map(tuple)  # ordinary tokens, in any order
finishes = st.sampled_from(["stop", "length"])
# Harmless content: no control token's text, anything else.
contents = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda s: "<|" not in s)


def done(ids: Ids, finish: Finish = "stop", version: int = 0) -> Completion:
    return Completion(ids, tuple(-0.5 - i for i in range(len(ids))), (version,) * len(ids), finish)


def rendered(form: ChatFormat, messages: list[Message]) -> Ids:
    """The tokenizer's own ids of a whole conversation."""
    rows = [{"role": m.role, "content": m.text} for m in messages]
    text = form.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    return tuple(form.tokenizer(text, add_special_tokens=False)["input_ids"])


def said(text: str) -> Message:
    return Message("assistant", (Text(text),))


def ids_of(text: str) -> Ids:
    return tuple(FORM.tokenizer(text, add_special_tokens=False)["input_ids"])


# ── T1: next prompt = prompt ‖ sampled ‖ suffix ──────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(any_ids, finishes, contents), min_size=1, max_size=4))
def test_t1_each_prompt_extends_the_last_by_the_very_ids_that_were_sampled(
    turns: list[tuple[Ids, Finish, str]],
) -> None:
    talk = Conversation(FORM, [system("S"), user("U")])
    assert talk.parent is None
    assert talk.suffix == talk.prompt.ids
    for k, (body, finish, content) in enumerate(turns):
        sampled = (*body, END) if finish == "stop" else body
        before = talk.prompt.ids
        talk.add_completion(done(sampled, finish))
        talk.add_observation([user(content)])
        assert talk.prompt.ids == before + sampled + talk.suffix
        assert talk.parent == k


def test_t1_ids_that_do_not_survive_a_round_trip_are_kept() -> None:
    the = FORM.encode_turn(" the")[:-1]
    letters = tuple(FORM.encode_turn(c)[0] for c in " the")
    assert the != letters  # the merged token, and the same text spelt letter by letter
    assert FORM.tokenizer.decode(list(the)) == FORM.tokenizer.decode(list(letters))
    talk = Conversation(FORM, [user("U")])
    start = talk.prompt.ids
    assert talk.add_completion(done((*letters, END))).text == " the"
    talk.add_observation([user("V")])
    assert talk.prompt.ids[len(start) : len(start) + 5] == (*letters, END)


def test_prompt_before_the_observation_is_refused() -> None:
    talk = Conversation(FORM, [user("U")])
    with pytest.raises(ValueError, match="call add_completion first"):
        talk.add_observation([user("V")])
    talk.add_completion(done((END,)))
    with pytest.raises(ValueError, match="call add_observation"):
        _ = talk.prompt
    with pytest.raises(ValueError, match="call add_observation"):
        talk.add_completion(done((END,)))


# ── T2: the suffix is the difference of two renderings ───────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FORMS), contents, contents, st.sampled_from(["user", "tool", "system"]))
def test_t2_canonical_conversations_equal_their_whole_rendering(
    form: ChatFormat, question: str, answer: str, role: Any
) -> None:
    messages = [system("S"), user(question)]
    talk = Conversation(form, messages)
    assert talk.prompt.ids == rendered(form, messages)
    talk.add_completion(done(form.encode_turn("fox" + answer)))
    new = [Message(role, (Text(answer),)), user(question)]
    talk.add_observation(new)
    assert talk.prompt.ids == rendered(form, [*messages, said("fox" + answer), *new])


def test_t2_the_suffix_does_not_depend_on_the_conversation() -> None:
    alone = Conversation(FORM, [user("U")])
    longer = Conversation(FORM, [system("S"), user("much more"), said("A"), user("U")])
    for talk in (alone, longer):
        talk.add_completion(done((5, 6, END)))
        talk.add_observation([user("next")])
    assert alone.suffix == longer.suffix == ids_of("\n<|im_start|>user\nnext<|im_end|>\n<|im_start|>assistant\n")


def test_t2_a_message_that_the_template_shows_elsewhere_is_refused() -> None:
    hoists = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}" + tiny_.CHATML.replace(
        "for m in messages", "for m in messages if m.role != 'system'"
    )
    form = ChatFormat(tiny(hoists))
    assert form.history == "append"
    with pytest.raises(TemplateError, match="T2: the template renders earlier messages differently"):
        form.suffix([system("now obey")], done((END,)))
    with pytest.raises(TemplateError, match="T2: the template does not show a system message where it stands"):
        ChatFormat(tiny("{{ messages | length }}" + hoists), history="append").suffix([system("obey")], done((END,)))


def test_t2_append_keeps_the_past_whatever_the_template_would_make_of_it() -> None:
    counts = "{{ messages | length }}" + tiny_.CHATML
    assert ChatFormat(tiny(counts)).history == "template"
    suffix = ChatFormat(tiny(counts), history="append").suffix([user("V")], done((END,)))
    assert suffix == ids_of("\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n")


# ── T4: turn ends ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sampled", "finish", "start"),
    [
        ((5, END), "stop", "\n"),  # the newline that the template writes after the turn's end
        ((5,), "length", "<|im_end|>\n"),  # the missing end is put in
        ((5, END), "length", "\n"),  # the end was the last token that fitted
        ((END,), "stop", "\n"),
        ((), "length", "<|im_end|>\n"),
        ((END, 5), "length", "<|im_end|>\n"),
    ],
)
def test_t4_suffix_after_each_kind_of_end(sampled: Ids, finish: Finish, start: str) -> None:
    suffix = FORM.suffix([user("V")], done(sampled, finish))
    assert suffix == ids_of(start + "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n")


def test_t4_another_stop_id_is_followed_by_the_turns_own_end() -> None:
    tokenizer = tiny()
    tokenizer.eos_token = "<|endoftext|>"
    form = ChatFormat(tokenizer)
    end, eos = form.stop_ids
    assert form.suffix([user("V")], done((5, eos)))[0] == end
    assert form.parse((5, eos), "stop").text == form.parse((5, end), "stop").text


def test_t4_the_inserted_end_does_not_train() -> None:
    talk = Conversation(FORM, [user("U")])
    turns = [grow(talk, (5, 6), "length"), grow(talk, (7, END), "stop")]
    (row,) = rows_of(episode(turns), [1.0, 2.0], episode=0)
    first = len(turns[0].prompt_suffix)
    assert row.ids[first : first + 3].tolist() == [5, 6, END]
    assert row.mask[first : first + 3].tolist() == [True, True, False]
    assert row.ids[row.mask].tolist() == [5, 6, 7, END]  # a sampled end trains although pad has the same id
    assert row.advantages[row.mask].tolist() == [1.0, 1.0, 2.0, 2.0]


# ── T5: trees ────────────────────────────────────────────────────────────────────────────────────────────────────────


def grow(talk: Conversation, ids: Ids, finish: Finish = "stop", answer: bool = True) -> Turn:
    suffix, parent = talk.suffix, talk.parent
    completion = done(ids, finish)
    message = talk.add_completion(completion)
    if answer:
        talk.add_observation([user("V")])
    return Turn(suffix, completion, message, parent=parent)


def episode(turns: list[Turn]) -> Trajectory:
    task = Task.make("t", split="train", seed=0, payload={})
    return Trajectory("e", task, "g", tuple(turns), True, False, "answer")


def test_t5_fork_after_and_resample() -> None:
    talk = Conversation(FORM, [user("U")])
    turns = [grow(talk, (5, END)), grow(talk, (6, END))]
    after = talk.fork(0)
    after.add_observation([user("W")])
    turns.append(grow(after, (7, END)))
    again = talk.fork(1, resample=True)
    assert again.prompt == Conversation.fork(talk, 1, resample=True).prompt
    turns.append(grow(again, (8, END)))
    assert [t.parent for t in turns] == [None, 0, 0, 0]
    assert turns[3].prompt_suffix == turns[1].prompt_suffix != turns[2].prompt_suffix
    assert talk.parent == 1  # the conversation that was forked goes on as before
    rows = rows_of(episode(turns), [1.0] * 4, episode=0)
    assert [r.ids[r.mask].tolist() for r in rows] == [[5, END, 6, END], [7, END], [8, END]]
    assert rows[1].ids.tolist() == [*turns[0].prompt_suffix, 5, END, *turns[2].prompt_suffix, 7, END]
    with pytest.raises(ValueError, match="turn 4 does not exist"):
        talk.fork(4)


def test_t5_restart_is_a_new_root_and_counts_on() -> None:
    talk = Conversation(FORM, [user("U")])
    turns = [grow(talk, (5, END))]
    short = talk.restart([system("summary"), user("go on")])
    turns.append(grow(short, (6, END)))
    turns.append(grow(short, (7, END)))
    assert [t.parent for t in turns] == [None, None, 1]
    assert turns[1].prompt_suffix == FORM.first_prompt([system("summary"), user("go on")])
    rows = rows_of(episode(turns), [1.0] * 3, episode=0)
    assert [r.ids[r.mask].tolist() for r in rows] == [[5, END], [6, END, 7, END]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_t5_each_sampled_token_trains_exactly_once(data: st.DataObject) -> None:
    talks = [Conversation(FORM, [user("U")])]
    turns: list[Turn] = []
    prompts: list[Ids] = []
    for k in range(data.draw(st.integers(1, 8))):
        talk = data.draw(st.sampled_from(talks))
        branch: bool = data.draw(st.booleans())
        if turns and branch:
            turn = data.draw(st.integers(0, len(turns) - 1))
            kind = data.draw(st.sampled_from(["after", "resample", "restart"]))
            if kind == "restart":
                talk = talk.restart([user("summary")])
            else:
                talk = talk.fork(turn, resample=kind == "resample")
                if kind == "after":
                    talk.add_observation([user("W")])
            talks.append(talk)
        prompts.append(talk.prompt.ids)
        turns.append(grow(talk, (k, END)))
    rows = rows_of(episode(turns), [float(k) for k in range(len(turns))], episode=3)
    trained = sorted(int(i) for r in rows for i in r.turns[r.mask])
    assert trained == sorted(2 * list(range(len(turns))))
    for row in rows:
        for k in set(row.turns[row.mask].tolist()):
            where = row.turns == k
            start = int(where.argmax())
            assert row.ids[where].tolist() == [k, END]
            assert tuple(row.ids[:start].tolist()) == prompts[k]  # the very context it was sampled in
            assert row.advantages[where].tolist() == [float(k)] * 2


# ── history = "template" ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_that_rewrites_its_past_makes_each_turn_its_own_sample() -> None:
    talk = Conversation(THINKING, [user("U")])
    thought = "<think>\nwhy\n</think>\n\nfox"
    turns = [grow(talk, THINKING.encode_turn(thought)), grow(talk, THINKING.encode_turn("dog"))]
    assert THINKING.history == "template"
    assert [t.parent for t in turns] == [None, None]
    assert turns[1].prompt_suffix == rendered(THINKING, [user("U"), said("fox"), user("V")])
    assert talk.messages[1] == AssistantMessage((Text(thought),), (), "stop")
    rows = rows_of(episode(turns), [1.0, 1.0], episode=0)
    assert [tuple(r.ids[r.mask].tolist()) for r in rows] == [t.completion.ids for t in turns]
    fork = talk.fork(0)
    fork.add_observation([user("V")])
    assert fork.prompt.ids == turns[1].prompt_suffix


def test_append_can_be_chosen_to_keep_past_thinking() -> None:
    form = ChatFormat(tiny(tiny_.THINKING), history="append")
    talk = Conversation(form, [user("U")])
    ids = form.encode_turn("<think>\nwhy\n</think>\n\nfox")
    start = talk.prompt.ids
    grow(talk, ids)
    assert talk.parent == 0
    assert talk.prompt.ids[: len(start) + len(ids)] == start + ids


# ── T7: spans are inside the completion's own ids ────────────────────────────────────────────────────────────────────


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["fox ", '<tool_call>{"name": "f"}</tool_call>', "<tool_call>{</tool_call>", "é😀"]), max_size=6
    )
)
def test_t7_spans_are_ordered_and_cover_their_raw_text(parts: list[str]) -> None:
    ids = FORM.encode_turn("".join(parts))
    calls = FORM.parse(ids, "stop").tool_calls
    assert [c.status for c in calls] == ["ok" if "name" in p else "invalid_json" for p in parts if "tool" in p]
    last = 0
    for call in calls:
        assert call.token_span is not None
        start, stop = call.token_span
        assert last <= start < stop < len(ids)
        assert call.raw in FORM.tokenizer.decode(list(ids[start:stop]))
        last = start
