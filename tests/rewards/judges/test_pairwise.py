"""Comparisons by judges: both orders, ties where the verdict flips, and a group's ranking."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from areal_agents.errors import ConfigError, EngineError, InfraError
from areal_agents.reward import Verdict
from areal_agents.rewards import Panel, pairwise, ranked
from areal_agents.rewards.judges.pairwise import _pairs
from tests.rewards.judges.scripted import Scripted, episode, prefers, slot, tag_of


def first(prompt: str) -> str:
    """Whatever stands first."""
    return f"BETTER {tag_of(prompt)}: FIRST"


def fails(prompt: str) -> str:
    raise EngineError("down")


LONGER, SHORTER = prefers(len), prefers(lambda text: -len(text))


def compared(panel: Panel, answer: str | None, reference: str = "12") -> Verdict:
    return asyncio.run(pairwise(panel, "Better?", reference="reference")(episode(answer, reference=reference)))


def test_both_orders_are_asked_and_a_flip_is_a_tie() -> None:
    longer, biased = Scripted(LONGER), Scripted(first)
    found = compared(Panel({"longer": longer, "biased": biased}, aggregate="mean"), "twelve")
    assert [(slot(p, "FIRST"), slot(p, "SECOND")) for p in longer.prompts] == [("twelve", "12"), ("12", "twelve")]
    assert found.score == 0.75
    assert found.components == {
        "preferred": 0.75, "flipped": 1.0, "cut": 0.0, "judge.longer": 1.0, "judge.biased": 0.5, "agreement": 0.5,
        "judges": 2.0, "judges_failed": 0.0,
    }  # fmt: skip
    assert compared(Panel({"longer": longer}), "1").score == 0.0
    assert compared(Panel({"longer": longer}), "13").score == 0.5


def test_a_tie_in_one_order_alone_is_a_tie() -> None:
    def wavers(prompt: str) -> str:
        return LONGER(prompt) if slot(prompt, "FIRST") == "twelve" else f"BETTER {tag_of(prompt)}: TIE"

    found = compared(Panel({"a": Scripted(wavers)}), "twelve")
    assert (found.score, found.components["flipped"]) == (0.5, 1.0)


@pytest.mark.parametrize(("how", "score"), [("median", 1.0), ("vote", 1.0), ("mean", 2 / 3)])
def test_judges_are_aggregated(how: Any, score: float) -> None:
    panel = Panel({"a": Scripted(LONGER), "b": Scripted(LONGER), "c": Scripted(SHORTER)}, aggregate=how)
    assert compared(panel, "twelve").score == pytest.approx(score)


def test_a_vote_of_one_winner_and_ties_is_won() -> None:
    panel = Panel({"a": Scripted(LONGER), "b": Scripted(first), "c": Scripted(first)}, aggregate="vote")
    assert compared(panel, "twelve").score == 1.0


def test_a_judge_that_fails_in_one_order_has_failed() -> None:
    def half(prompt: str) -> str:
        return LONGER(prompt) if slot(prompt, "FIRST") == "twelve" else "I cannot say."

    found = compared(Panel({"half": Scripted(half), "b": Scripted(LONGER)}), "twelve")
    assert (found.score, found.components["judges"], found.components["judges_failed"]) == (1.0, 1.0, 1.0)
    with pytest.raises(InfraError, match=r"0 of 1 judges answered.*half: its reply cannot be read"):
        compared(Panel({"half": Scripted(half)}), "twelve")


@pytest.mark.parametrize("word", ["first", "1", "FIRST or SECOND", "", "X", "FIRST\nSo be it."])
def test_other_words_are_no_verdict(word: str) -> None:
    panel = Panel({"a": Scripted(lambda prompt: f"BETTER {tag_of(prompt)}: {word}")})
    with pytest.raises(InfraError, match="cannot be read"):
        compared(panel, "twelve")


def test_no_answer_loses_without_a_judge() -> None:
    model = Scripted(LONGER)
    found = compared(Panel({"a": model}), None)
    assert (found.score, found.components["no_answer"], model.prompts) == (0.0, 1.0, [])


# --- groups --------------------------------------------------------------------------------------------------------


def group(panel: Panel, *answers: str | None, opponents: int | None = None) -> Sequence[Verdict]:
    return asyncio.run(ranked(panel, "Better?", opponents=opponents)([episode(a) for a in answers]))


def test_a_group_is_ranked_by_its_matches() -> None:
    """Lengths 1, 2, 2 and 3: 0 wins; 1 win and a tie twice; 3 wins; each of three matches."""
    model = Scripted(LONGER)
    found = group(Panel({"a": model}), "a", "bb", "cc", "ddd")
    assert [v.score for v in found] == pytest.approx([0.0, 0.5, 0.5, 1.0])
    assert [v.components["matches"] for v in found] == [3.0] * 4
    assert len(model.prompts) == 2 * 6
    assert sum(v.score for v in found) == pytest.approx(2.0)


def test_equal_answers_and_missing_ones_ask_nobody() -> None:
    model = Scripted(LONGER)
    found = group(Panel({"a": model}), "x", "x", None, "x", None)
    assert model.prompts == []
    assert [v.score for v in found] == [0.75, 0.75, 0.125, 0.75, 0.125]
    assert [v.components["no_answer"] for v in found] == [0, 0, 1, 0, 1]


def test_flips_and_failures_are_counted_where_they_are() -> None:
    found = group(Panel({"a": Scripted(first), "b": Scripted(fails)}), "a", "bb", "a")
    assert [v.score for v in found] == [0.5] * 3
    assert [(v.components["flipped"], v.components["judges_failed"]) for v in found] == [(1, 1), (2, 2), (1, 1)]


def test_opponents_in_a_ring() -> None:
    model = Scripted(LONGER)
    found = group(Panel({"a": model}), "a", "bb", "ccc", "dddd", "eeeee", opponents=1)
    assert [v.score for v in found] == [0.0, 0.5, 0.5, 0.5, 1.0]
    assert len(model.prompts) == 2 * 5
    for n in range(7):
        assert len(_pairs(n, None)) == n * (n - 1) // 2
    assert _pairs(4, 1) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert _pairs(4, 9) == _pairs(4, None)
    assert group(Panel({"a": model}), "alone")[0].score == 0.5


def test_too_few_judges_fail_the_group_and_its_replies_are_kept() -> None:
    """A retry asks only what had no answer."""
    broken = [True]

    def sometimes(prompt: str) -> str:
        if broken[0] and "cc" in (slot(prompt, "FIRST"), slot(prompt, "SECOND")):
            raise EngineError("down")
        return LONGER(prompt)

    model = Scripted(sometimes)
    reward = ranked(Panel({"a": model}, concurrency=1), "Better?")
    episodes = [episode("a"), episode("bbb"), episode("cc")]
    with pytest.raises(InfraError, match="down"):
        asyncio.run(reward(episodes))
    broken[0] = False
    model.prompts.clear()
    assert [v.score for v in asyncio.run(reward(episodes))] == [0.0, 1.0, 0.5]
    assert len(model.prompts) == 4


def test_what_it_declares() -> None:
    reward = ranked(Panel({"a": Scripted(first)}, deadline=7.0), "Better?")
    assert (reward.adds, reward.reads_others, reward.seconds) == (False, True, 28.0)
    with pytest.raises(ConfigError, match="opponents = 0"):
        ranked(Panel(["a"]), "Better?", opponents=0)
    with pytest.raises(ConfigError, match="there is no reference"):
        ranked(Panel(["a"]), "Better?", reference="gold")
