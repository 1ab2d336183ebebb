"""Repetition, script and the cost of tool calls."""

from __future__ import annotations

import random
from typing import Any

import pytest

from areal_agents.errors import ConfigError
from areal_agents.rewards.shaping import repetition, script, tool_cost
from areal_agents.rewards.shaping.repetition import repeated
from areal_agents.rewards.shaping.script import SCRIPTS, script_of
from areal_agents.tool import ToolResult
from tests.rewards.shaping.episodes import call, episode, say


def naive(units: str, n: int) -> list[bool]:
    """Algorithm 1 of 2502.03373, as it is written there."""
    marked, seen = [False] * len(units), set()
    for j in range(len(units) - n + 1):
        if units[j : j + n] in seen:
            for t in range(j, j + n):
                marked[t] = True
        seen.add(units[j : j + n])
    return marked


def test_repeated_units_are_those_of_the_paper() -> None:
    assert repeated("abcabd", 2) == [False, False, False, True, True, False]
    assert repeated("aaaa", 2) == [False, True, True, True]  # occurrences may overlap
    assert repeated("abc", 4) == [False] * 3
    assert repeated("", 2) == []
    draw = random.Random(0)
    for n in range(2, 9):
        for _ in range(60):
            text = "".join(draw.choices("ab", k=draw.randrange(30)))
            assert repeated(text, n) == naive(text, n), (text, n)


def test_repetition_is_the_share_of_repeated_words() -> None:
    # "a b c a b c d": the second "a b c" holds the 2-grams (a, b) and (b, c): 3 of 7 words
    assert repetition(2)(episode("a b c a b c d")).score == pytest.approx(-3 / 7)
    assert repetition(4)(episode("a b c a b c d")).score == 0.0
    assert repetition(2)(episode("")).score == repetition(2)(episode()).score == 0.0


def test_a_turn_repeats_what_an_earlier_one_said() -> None:
    found = repetition(2, per_turn=True)(episode("a b", "c a", "b a b"))
    # "a b" again in turn 2; nothing spans two turns, so "… a | b …" is none
    assert found.turn_rewards == pytest.approx((0.0, 0.0, -2 / 7))
    assert found.score == pytest.approx(-2 / 7)


def test_an_end_of_a_turn_is_no_unit_that_repeats() -> None:
    assert repetition(2)(episode("x y", "z y", "z w", "x")).score == 0.0


def test_a_call_that_was_not_run_failed_where_it_could_not_be_read() -> None:
    calls = say("", call("f", "unclosed"), call("f"))
    assert tool_cost(per_failed=0.5)(episode(calls)).score == -0.5


def test_characters_for_scripts_without_spaces() -> None:
    assert repetition(2, unit="characters")(episode("好的好的")).score == -0.5
    assert repetition(2)(episode("好的好的")).score == 0.0


def test_a_megabyte_takes_no_long_time() -> None:
    assert repetition(100_000, unit="characters")(episode("ab" * 500_000)).score < -0.99


@pytest.mark.parametrize(
    ("scripts", "text", "share"),
    [
        (("latin",), "Ünïcode, naïve 12 %", 1.0),
        (("latin",), "da да", 0.5),
        (("cyrillic",), "да da!", 0.5),
        (("han", "hiragana", "katakana"), "東京タワーは々", 1.0),
        (("han",), "答案 is 12", 0.5),
        (("hangul",), "한국어", 1.0),
        (("greek",), "αβγ", 1.0),
        (("latin",), "αβγd", 0.25),
        (("latin",), "ＡＢ 𝐀", 1.0),  # compatibility forms
        (("latin",), "12 + 3 = 15 😀", 1.0),  # no letter, so none of another script
        (("latin",), "", 1.0),
        (("devanagari",), "हिन्दी", 1.0),
        (("latin",), "ᚠᚢ", 0.0),  # runes are in no list, and letters all the same
    ],
)
def test_script(scripts: tuple[str, ...], text: str, share: float) -> None:
    assert script(*scripts)(episode(text)).score == share


def test_allowed_scripts_count_neither_way() -> None:
    assert script("han", allowed=["latin"])(episode("答案 is да")).score == 0.5
    assert script("han", allowed="latin")(episode("is")).score == 1.0


def test_script_of_turns() -> None:
    found = script("latin", per_turn=True)(episode("aaaa", "да"))
    assert (found.score, found.turn_rewards) == (0.5, (0.5, 0.0))
    assert script("latin")(episode("aaaa", "да")).score == pytest.approx(4 / 6)


def test_every_script_has_letters() -> None:
    found = {script_of(chr(c)) for c in range(0x10000) if not 0xD800 <= c < 0xE000}
    assert found == {None, "other", *SCRIPTS}


def test_tool_cost() -> None:
    ok, failed = ToolResult("4"), ToolResult("no", "timeout")
    talk = episode(
        say("", call("add"), call("search")), say("", call("", "invalid_json")), "12", results=(ok, failed, failed)
    )
    every = {"per_call": 0.5, "per_failed": 2.0, "per_name": {"search": 4.0}}
    assert tool_cost(**every)(talk).score == -(0.5 + 0.5 + 4.0 + 2.0 + 0.5 + 2.0)  # type: ignore[arg-type]
    found = tool_cost(**every, per_turn=True)(talk)  # type: ignore[arg-type]
    assert (found.score, found.turn_rewards) == (-9.5, (-7.0, -2.5, 0.0))
    assert tool_cost(per_call=1)(episode("12")).score == 0.0
    assert str(tool_cost(per_call=1)(episode("12")).score) == "0.0"
    # a call that the environment did not run counts as made, not as failed
    assert tool_cost(per_call=1.0, per_failed=8.0)(episode(say("", call("add")), ended=False)).score == -1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: tool_cost(), lambda: tool_cost(per_call=float("inf")), lambda: tool_cost(per_name={"a": "b"}),  # type: ignore[dict-item]
        lambda: repetition(1), lambda: repetition(2, unit="tokens"),  # type: ignore[arg-type]
        lambda: script(), lambda: script("english"), lambda: script("latin", allowed=["latin"]),
        lambda: script("latin", allowed=["roman"]), lambda: script(["latin"]), lambda: tool_cost(per_name=["a"]),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_wrong_options_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError):
        make()
