from __future__ import annotations

from typing import Any

import pytest

from areal_agents.errors import ConfigError
from areal_agents.rewards.shaping import one_box, sections, tags, valid_calls
from areal_agents.tool import ToolResult
from areal_agents.types import AssistantMessage, Text
from tests.rewards.shaping.episodes import call, episode, say


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (r"so \boxed{12}", 1.0),
        ("12", 0.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{12", 0.0),
        (r"\boxed{12} = \boxed{12}", 0.0),  # twice the same is not once
        (r"<think>\boxed{3}</think>\boxed{12}", 1.0),
        (r"<think>\boxed{12}</think>12", 0.0),
    ],
)
def test_one_box(text: str, score: float) -> None:
    assert one_box()(episode(text)).score == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>12</answer>", 1.0),
        ("\n<think>\na\n</think>\n\n<answer>12</answer>\n", 1.0),
        ("<answer>12</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>12</answer> bye", 0.0),
        ("hi <think>a</think><answer>12</answer>", 0.0),
        ("<think>a</think> so <answer>12</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think> </think><answer>12</answer>", 0.0),
        ("<think>a<answer>12</answer></think>", 0.0),
        ("<think>a</think><answer>12", 0.0),
        ("</think>a<think><answer>12</answer>", 0.0),
        ("<think>a</think><answer>1</answer><answer>12</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_tags_in_order_and_nothing_beside(text: str, score: float) -> None:
    assert tags("think", "answer")(episode(text)).score == score


def test_tags_may_stand_in_a_text() -> None:
    assert tags("answer", alone=False)(episode("so <answer>12</answer>, I think")).score == 1.0
    assert tags("a", "b", alone=False)(episode("<b>1</b> <a>2</a>")).score == 0.0


def test_a_thought_that_the_prompt_opened_or_a_server_returned_is_one() -> None:
    reward = tags("think", "answer")
    assert reward(episode(say("a</think><answer>12</answer>", in_thought=True))).score == 1.0
    served = AssistantMessage((Text("<answer>12</answer>"),), reasoning="a")
    assert reward(episode(served)).score == 1.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("## Plan\nadd\n## Answer\n12", 1.0),
        ("Well:\n  ## Plan  \nadd\n\n## Answer\n\n12\n", 1.0),
        ("## Answer\n12\n## Plan\nadd", 0.0),
        ("## Plan\n## Answer\n12", 0.0),
        ("## Plan\nadd\n## Answer\n", 0.0),
        ("## Plan\nadd\n## Plan\nadd\n## Answer\n12", 0.0),
        ("## Plan add\n## Answer 12", 0.0),
        ("## Plan\nadd", 0.0),
        ("<think>## Plan\nadd\n## Answer\n12</think>", 0.0),
    ],
)
def test_sections(text: str, score: float) -> None:
    assert sections("## Plan", "## Answer")(episode(text)).score == score


def test_an_episode_without_an_answer_has_no_form() -> None:
    assert one_box()(episode(r"\boxed{12}", ended=False)).score == 0.0
    assert one_box()(episode()).score == 0.0


def test_each_turn_earns_its_part_of_the_mean() -> None:
    found = one_box(per_turn=True)(episode(r"\boxed{1}", "no", r"\boxed{2}", "no"))
    assert (found.score, found.turn_rewards) == (0.5, (0.25, 0.0, 0.25, 0.0))
    seven = one_box(per_turn=True)(episode(*[r"\boxed{1}"] * 7))
    assert seven.score == 1.0  # seven sevenths reach a gate's threshold of 1


def test_valid_calls() -> None:
    ok, failed, unknown = ToolResult("4"), ToolResult("no", "error"), ToolResult("no tool", "unknown_tool")
    turns = (say("", call("add"), call("add")), say("", call("add")), "12")
    assert valid_calls()(episode(*turns, results=(ok, failed, ok))).score == 1.0  # the tool's own failure is no form
    assert valid_calls()(episode(*turns, results=(ok, ok, unknown))).score == 0.0
    found = valid_calls(per_turn=True)(episode(*turns[:2], "1", "12", results=(ok, ok, unknown)))
    assert (found.score, found.turn_rewards) == (0.75, (0.25, 0.0, 0.25, 0.25))
    assert valid_calls()(episode(say("", call("", "invalid_json")), "12")).score == 0.0
    assert [valid_calls(at_least=n)(episode("12")).score for n in (0, 1)] == [1.0, 0.0]
    assert [valid_calls(at_least=n)(episode(*turns, results=(ok, ok, ok))).score for n in (3, 4)] == [1.0, 0.0]
    assert valid_calls(at_least=1, per_turn=True)(episode("12")).turn_rewards == (0.0,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tags(), lambda: tags("a", "a"), lambda: tags("<a>"), lambda: tags("a b"), lambda: sections(),
        lambda: sections("a\nb"), lambda: sections(" a"), lambda: sections(""), lambda: valid_calls(at_least=-1),
        lambda: valid_calls(at_least=True),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
