"""The shared cases: answers of a public verifier's own tests, and probes of what verifiers get wrong."""

from __future__ import annotations

import json
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
