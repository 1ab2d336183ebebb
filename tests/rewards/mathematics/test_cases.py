"""The shared cases: answers of a public verifier's own tests, and probes of what verifiers get wrong."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verify import verify

DISPUTED = {
    "$10455$": r"its box holds 255, an interest, and the right sum stands in a later sentence: a box is the answer",
}
"""By gold answer, with the reason. They count as wrong."""


def test_at_least_99_percent_and_every_probe(shared_data: Path) -> None:
    rows = [json.loads(line) for line in (shared_data / "math_cases.jsonl").read_text().splitlines()]
    wrong = []
    for row in rows:
        found = verify(row["gold"], row["pred"], slot=row["slot"], options=Options.of(row["options"]))
        if found.score != row["expected"]:
            wrong.append((row, found))
    assert len(wrong) <= 0.01 * len(rows), wrong
    assert [row["gold"] for row, _ in wrong] == list(DISPUTED)
    assert not [row for row, _ in wrong if row["source"] == "probe"]


@pytest.mark.parametrize("slot", ["answer", "boxed", "final_line", "text"])
def test_every_gold_answer_is_itself(shared_data: Path, slot: str) -> None:
    for line in (shared_data / "math_cases.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["slot"] == slot == "answer":
            assert verify(row["gold"], row["gold"]).status == "ok", row["gold"]


def table() -> list[tuple[str, ...]]:
    """Return the rows of the page's table of options: option, gold, answer, verdict without and with it."""
    page = (Path(__file__).parents[3] / "docs" / "verify-mathematics.md").read_text()
    page = page.partition("## Options")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.count(" | ") == 5]
    return [(r[0].split("`")[1], r[2].strip("`"), r[3].strip("`"), r[4], r[5].strip(" |")) for r in rows[1:]]


@pytest.mark.parametrize(("option", "gold", "answer", "without", "with_it"), table())
def test_the_table_of_options_is_right(option: str, gold: str, answer: str, without: str, with_it: str) -> None:
    call = ast.parse(f"f({option})", mode="eval").body
    assert isinstance(call, ast.Call)
    options = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in call.keywords}
    for given, expected in (({}, without), (options, with_it)):
        found = verify(gold, answer, options=Options.of(given))
        assert ("ok" if found.score else "wrong") == expected, found


def test_every_option_has_a_row() -> None:
    named = {name for row in table() for name in re.findall(r"(\w+)=", row[0])}
    assert named == {field.name for field in fields(Options)}
