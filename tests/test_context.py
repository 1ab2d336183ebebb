"""What an environment may choose to happen to a long history, and what each rule makes of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from areal_agents.context import EMPTY, HEAD, Fold, RuleSummary, Summary, applied, context_of, folded, note, summed_up
from areal_agents.errors import ConfigError
from areal_agents.types import AssistantMessage, Image, Message, Text, ToolCall, system, tool_result, user

CALL = ToolCall("c0", "page", {}, "<tool_call></tool_call>")
LONG, SHORT = "x" * 300, "y" * 200


def said(text: str) -> AssistantMessage:
    return AssistantMessage((Text(text),))


HISTORY = (
    system("s"), user("t"), said("a"), tool_result(LONG, call=CALL),  # 0 to 3
    said("b"), tool_result(SHORT, call=CALL), tool_result(LONG, call=CALL),  # 4 to 6
    said("c"), tool_result(LONG, call=CALL),  # 7, 8
)  # fmt: skip
FOLDED = Message("tool", (Text("[300 characters of this result were folded away]"),), "c0", "page")


def summarize(messages: Sequence[Any]) -> str:
    return f"{len(messages)} messages"


# --- folding ---------------------------------------------------------------------------------------------------------


def test_results_of_older_turns_become_a_note_and_the_last_ones_stay() -> None:
    assert folded(Fold(keep=1), HISTORY, 2) == (0, 1, 2, FOLDED, 4, 5, FOLDED, 7, 8)
    assert folded(Fold(keep=2), HISTORY, 2) == (0, 1, 2, FOLDED, 4, 5, 6, 7, 8), "a turn's results stay together"
    assert folded(Fold(keep=3), HISTORY, 2) is None
    assert note(12_345) == "[12,345 characters of this result were folded away]"


def test_what_was_folded_is_not_folded_again() -> None:
    once = folded(Fold(keep=1), HISTORY, 2)
    assert once is not None
    again = applied(once, HISTORY)
    assert again[3] == FOLDED
    assert folded(Fold(keep=1), again, 2) is None
    more = (*again, said("d"), tool_result(LONG, call=CALL))
    assert folded(Fold(keep=1), more, 2) == (*range(8), FOLDED, 9, 10)


def test_only_long_messages_of_the_roles_asked_for_are_folded() -> None:
    game = (user(LONG), said("a"), user(LONG), said("b"), user(LONG))
    assert folded(Fold(keep=1), game, 1) is None
    assert folded(Fold(keep=1, roles=("tool", "user")), game, 1) == (0, 1, user(note(300)), 3, 4)
    assert folded(Fold(keep=1, longer_than=300), HISTORY, 2) is None
    assert folded(Fold(keep=1, longer_than=199), HISTORY, 2) != folded(Fold(keep=1), HISTORY, 2)
    picture = (user("t"), said("a"), Message("tool", (Image("f"), Text("q"))), said("b"), user("u"))
    assert folded(Fold(keep=1), picture, 1) == (0, 1, Message("tool", (Text(note(1)),)), 3, 4)


def test_the_opening_stays_and_what_the_model_said() -> None:
    shown = (user(LONG), Message("assistant", (Text(LONG),)), Message("tool", (Text(LONG),)), user("t"))
    assert folded(Fold(keep=1), (*shown, said(LONG), user("u"), said("b"), user("v")), 4) is None


# --- summaries -------------------------------------------------------------------------------------------------------


def test_a_summary_takes_the_place_of_older_turns_and_of_the_last_summary() -> None:
    once = summed_up(HISTORY, 2, 1, " three turns\n")
    assert once == (0, 1, user(f"{HEAD}three turns"), 7, 8)
    assert summed_up(HISTORY, 2, 2, "x") == (0, 1, user(f"{HEAD}x"), 4, 5, 6, 7, 8)
    assert summed_up(HISTORY, 2, 3, "x") is None
    assert once is not None
    again = (*applied(once, HISTORY), said("d"), user("v"))
    assert applied(summed_up(again, 2, 1, "four") or (), again) == (
        *HISTORY[:2], user(f"{HEAD}four"), said("d"), user("v"),
    )  # fmt: skip
    assert summed_up(HISTORY, 2, 1, " \n") == (0, 1, user(HEAD + EMPTY), 7, 8)


def test_a_rewritten_history_belongs_to_the_one_that_it_was_made_of() -> None:
    with pytest.raises(ValueError, match="a history of 3 does not have"):
        applied((0, user("x"), 8), HISTORY[:3])


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Fold(keep=0), r"Fold\(keep=0\): it must be a whole number of at least 1"),
        (lambda: Fold(keep=True), r"Fold\(keep=True\)"),
        (lambda: Fold(at=0.0), r"Fold\(at=0.0\): it must be a share of the context, above 0 and at most 1"),
        (lambda: Fold(at=1.5), r"Fold\(at=1.5\)"),
        (lambda: Fold(at=float("nan")), r"Fold\(at=nan\)"),
        (lambda: Fold(longer_than=5), r"Fold\(longer_than=5\)"),
        (lambda: Fold(roles=("assistant",)), r"name some of system, tool, user"),
        (lambda: Fold(roles=()), r"Fold\(roles=\(\)\)"),
        (lambda: Fold(roles="tool"), r"Fold\(roles='tool'\)"),  # type: ignore[arg-type]
        (lambda: Summary(prompt=" "), r"Summary\(prompt=' '\): it must be a text that asks for a summary"),
        (lambda: Summary(max_tokens=0), r"Summary\(max_tokens=0\)"),
        (lambda: Summary(scripted="x"), r"Summary\(scripted='x'\)"),  # type: ignore[arg-type]
        (lambda: RuleSummary(write=3), r"RuleSummary\(write=3\)"),  # type: ignore[arg-type]
    ],
)
def test_a_rule_that_cannot_be_is_refused_at_once(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_rule_is_described_as_settings_do() -> None:
    assert context_of({"kind": "fold", "keep": 1, "roles": ["tool", "user"]}) == Fold(keep=1, roles=("tool", "user"))
    assert context_of({"kind": "summary", "max_tokens": 64}) == Summary(max_tokens=64)
    assert context_of({"kind": "none"}) is None
    named = context_of({"kind": "rule_summary", "write": "tests.test_context:summarize"})
    assert isinstance(named, RuleSummary)
    assert named.write is summarize
    assert context_of(Fold()) == Fold()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "folds"}, "context.kind is 'folds': there are fold, rule_summary, summary, and none"),
        ({}, "context.kind is None"),
        ({"kind": ["fold"]}, "context.kind is"),
        ("fold", "context is 'fold': give Fold"),
        ({"kind": "fold", "keeps": 1}, "context.keeps: fold has keep, at, longer_than, roles"),
        ({"kind": "none", "keep": 1}, "context.kind is 'none'"),
        ({"kind": "fold", "keep": "1"}, r"Fold\(keep='1'\)"),
        ({"kind": "rule_summary"}, "context.write is missing"),
        ({"kind": "rule_summary", "write": "summarize"}, 'context.write: write "package.module:function"'),
        ({"kind": "rule_summary", "write": "tests.test_context:summarise"}, "did you mean 'summarize'"),
    ],
)
def test_a_wrong_description_is_refused_with_what_there_is(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        context_of(given)
