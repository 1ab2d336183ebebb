"""Leaderboards: hand-worked means, Holm's correction, and tables that hostile names cannot break."""

from __future__ import annotations

import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from areal_agents.errors import RewardError
from areal_agents.evaluation.leaderboard import Leaderboard, Rewards, Score, _difference, _mean_difference
from areal_agents.evaluation.leaderboard_tables import as_html, as_markdown, as_text, save
from areal_agents.evaluation.report import Lost, summarize
from areal_agents.evaluation.statistics import holm, mean_of_intervals, wilson_interval
from areal_agents.evaluation.suite import Suite
from areal_agents.types import AssistantMessage, Completion, Task, Trajectory, Turn


def test_holm() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.04, and none below a smaller p's: 0.06.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.025]) == [0.025]
    assert holm([0.01, 0.01]) == [0.02, 0.02]
    assert holm([]) == []


def test_wilson() -> None:
    # 5 of 10: (0.5 + 0.19207) / 1.38415 = 0.5, ± 1.95996 / 1.38415 · √(0.025 + 0.0096036) = 0.26341.
    assert wilson_interval(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.16113), abs=1e-5)


def test_the_interval_of_a_mean() -> None:
    mean, (low, high) = mean_of_intervals([0.5, 0.9], [(0.2, 0.7), (0.5, 0.9)])
    # Below √(0.3² + 0.4²) / 2 = 0.25, above √(0.2² + 0) / 2 = 0.1.
    assert (mean, low, high) == pytest.approx((0.7, 0.45, 0.8))
    assert mean_of_intervals([0.5], [(0.2, 0.7)]) == (0.5, (0.2, 0.7))


def rewards(entry: str, passed: str) -> Rewards:
    return {("test", f"{entry}-{i}", str(i)): [float(p)] for i, p in enumerate(passed)}


def test_the_difference_of_the_means() -> None:
    pairs = [(rewards("a", "0000"), rewards("a", "1111")), (rewards("b", "01"), rewards("b", "01"))]
    own = [_difference("m", name, *pair) for name, pair in zip("ab", pairs, strict=True)]
    assert [(d.difference, d.p_value, d.n) for d in own] == [(1.0, 0.125, 4), (0.0, 1.0, 2)]
    mean = _mean_difference("m", own, pairs)
    assert (mean.difference, mean.p_value, mean.n) == (0.5, 0.125, 6)  # four tasks of weight 1/4 flip: 2 of 16
    assert mean.ci95 is not None
    assert mean.ci95[0] <= 0.0 <= mean.ci95[1] <= 1.0  # the test does not reject, so neither does the interval
    # An entry of one task weighs as much as one of four, against it: |4/4 - 1| = 0 is nothing to reject.
    against = [pairs[0], (rewards("b", "1"), rewards("b", "0"))]
    level = _mean_difference("m", own, against)
    assert level.p_value == 1.0


HOSTILE = "<script>alert(1)</script>|`x`*[a](javascript:b)\x1b[31m\n# evil"


def board(model: str = HOSTILE, note: str = HOSTILE) -> Leaderboard:
    entries = [{"name": name, "env": "areal/Hanoi-v0", "n": 4} for name in ("one", "two")]
    suite = Suite.model_validate({"name": "s", "version": 1, "description": HOSTILE, "entries": entries})
    score = Score(model, "one", 4, 4, 1, 0.5, (0.15, 0.85), reward=0.5, complete=True)
    scores = [replace(score, model=m, entry=e) for e in ("one", "two") for m in ("first", model)]
    means = [replace(score, model=m, entry="mean") for m in ("first", model)]
    pairs = [(rewards("a", "0000000000"), rewards("a", "1111111111"))]
    difference = replace(_difference(model, "one", *pairs[0]), p_holm=0.004)
    return Leaderboard(suite, ("first", model), tuple(scores), tuple(means), (difference,), (), (note,))


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    page, tags = as_html(board()), Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.found <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "table", "tr", "th", "td", "ul", "li", "br",
    }  # fmt: skip
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page + as_text(board()) + as_markdown(board())
    lines = as_markdown(board()).splitlines()
    assert not [line for line in lines if line.startswith("# evil") or "<script" in line or "](javascript" in line]
    assert {line.replace(r"\|", "").count("|") for line in lines if "0.500" in line} == {5}
    save(board(), tmp_path / "deep")
    names = {p.name for p in (tmp_path / "deep").iterdir()}
    assert names == {f"leaderboard.{e}" for e in ("txt", "md", "html", "json")}


def test_the_text() -> None:
    text = as_text(board(model="second", note="a note"))
    assert "one    4 × 1      0.500 (0.15–0.85)  0.500 (0.15–0.85)" in text
    # Ten of ten gained: 2/1024; the interval is Clopper and Pearson's of none that differ otherwise.
    assert "one    second  +1.000      +0.383 to +1.000  0.00195  0.004     10     better" in text
    assert text.endswith("note: a note")


def test_what_is_below() -> None:
    plain = board(model="second")
    assert plain.below({"": 0.5, "mean": 0.5}) == []
    assert plain.below({"one": 0.51}) == [
        "one, first: pass@1 0.500 is below 0.51", "one, second: pass@1 0.500 is below 0.51",
    ]  # fmt: skip
    assert len(plain.below({"": 0.6})) == 4
    part = replace(plain, scores=(replace(plain.scores[0], complete=False), *plain.scores[1:]))
    assert part.below({"": 0.1}) == ["one, first: not complete, so not known to reach 0.1"]
    assert not math.isnan(plain.score("mean", "first").pass_at_1 or math.nan)


def test_attempts_without_a_score_do_not_lift_a_model_over_a_limit() -> None:
    """Two of four passed, and one more failed for itself: 2 of 5 if it had not passed; of the mean (2/5 + 2/4) / 2."""
    plain = board(model="second")
    lost = replace(plain, scores=(replace(plain.scores[0], unscored=1, failed=1), *plain.scores[1:]))
    assert lost.below({"": 0.4, "mean": 0.45}) == []
    assert lost.below({"": 0.41}) == [
        "one, first: pass@1 0.500 is of 4 of 5 attempts, and with 1 that have no score it is not known to reach 0.41"
    ]
    assert lost.below({"mean": 0.46}) == ["mean, first: 1 attempts have no score, so it is not known to reach 0.46"]
    task = Task.make("a", split="test", seed=0, payload={})
    turn = Turn((1,), Completion((2,), (-1.0,), (0,), "stop"), AssistantMessage(()), 1.0)
    played = Trajectory("x", task, "g", (turn,), True, False, "answer")
    # Of four attempts two passed, infrastructure failed one, and the reward itself one.
    found = summarize(
        [(task, [played, played, None, None])], env="e", split="test", model="m", version=0, temperature=0.0, seed=0,
        seconds=0.0, lost=Lost(own=[("a", RewardError("broken"))]),
    )  # fmt: skip
    assert (found.pass_at_1, found.attempts, found.failed, found.unscored) == (1.0, 2, 1, 2)
    assert found.below(0.5) == ""
    assert found.below(0.51) == (
        "pass@1 1.000 is of 2 of 4 attempts, and with 2 that have no score it is not known to reach 0.51"
    )
    assert replace(found, pass_at_1=0.5).below(0.51) == "pass@1 0.500 is below 0.51"
