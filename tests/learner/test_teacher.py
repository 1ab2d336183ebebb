"""The part of a row that a teacher of a smaller vocabulary knows."""

from __future__ import annotations

import numpy as np

from areal_agents.algorithms.batch import Row
from areal_agents.learner.teacher import known_part, placed


def row(*ids: int, sampled: int) -> Row:
    mask = np.arange(len(ids)) >= len(ids) - sampled
    numbers = np.arange(len(ids), dtype=np.float32)
    turns = np.where(mask, 0, -1)
    return Row(np.array(ids), mask, numbers, np.zeros(len(ids), np.int64), turns, numbers, 0, {"more": numbers})


def test_it_ends_before_the_first_unknown_id() -> None:
    whole = row(3, 63, 64, 4, 65, sampled=4)
    head = known_part(whole, 64)
    assert head.ids.tolist() == [3, 63]
    assert [len(x) for x in (head.mask, head.logprobs, head.versions, head.turns, head.advantages)] == [2] * 5
    assert head.columns["more"].tolist() == [0.0, 1.0]
    found = placed(whole, np.array([7.0, -1.5], np.float32))
    assert found[:2].tolist() == [0.0, -1.5], "what was shown has no number"
    assert np.isnan(found).tolist() == [False, False, True, True, True]
    assert known_part(whole, 66) is whole
    shown = known_part(row(64, 1, sampled=1), 64)
    assert len(shown) == 0
