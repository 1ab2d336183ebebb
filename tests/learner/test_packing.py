"""Micro-batches: the budget, that nothing is lost, and that a prefix is stored once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_agents.learner import packing
from areal_agents.learner.packing import PACK_COST, Ints, Pack, Segment, pack_rows


def ids(*tokens: int) -> Ints:
    return np.asarray(tokens, np.int64)


# Few distinct tokens and many rows: prefixes of every length coincide, rows repeat and end inside each other.
row_sets = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda r: ids(*r)), min_size=1, max_size=12
)


def context(pack: Pack, place: int) -> list[int]:
    """The flat positions that the token at ``place`` attends to, itself included, by the segments' definition."""
    own = next(s for s in pack.segments if s.start <= place < s.stop)
    path = [pack.segments[p] for p in own.path]
    return [i for s in path for i in range(s.start, s.stop)] + list(range(own.start, place + 1))


@given(row_sets, st.integers(1, 40), st.booleans(), st.integers(1, 5))
def test_every_row_is_in_exactly_one_pack_within_the_budget(
    rows: list[Ints], budget: int, shared: bool, min_shared: int
) -> None:
    packs = pack_rows(rows, token_budget=budget, shared=shared, min_shared=min_shared)
    assert sorted(i for p in packs for i in p.rows) == list(range(len(rows)))
    for pack in packs:
        assert pack.tokens == pack.shape[0] * pack.shape[1] == len(pack.ids) == len(pack.positions)
        assert pack.tokens <= budget or len(pack.rows) == 1
        assert len(pack.at) == len(pack.rows)
        for i, at in zip(pack.rows, pack.at, strict=True):
            np.testing.assert_array_equal(pack.ids[at], rows[i])
            np.testing.assert_array_equal(pack.positions[at], np.arange(len(rows[i])))


@given(row_sets, st.integers(1, 5))
def test_a_token_attends_to_exactly_its_rows_tokens_before_it(rows: list[Ints], min_shared: int) -> None:
    for pack in pack_rows(rows, token_budget=200, min_shared=min_shared):
        stops = [0, *(s.stop for s in pack.segments)]
        assert [s.start for s in pack.segments] == stops[:-1], "segments follow each other"
        for at in pack.at:
            for t in range(len(at)):
                assert context(pack, int(at[t])) == at[: t + 1].tolist()


@given(row_sets)
def test_with_free_sharing_each_distinct_prefix_is_stored_once(rows: list[Ints]) -> None:
    prefixes = {tuple(r[: t + 1].tolist()) for r in rows for t in range(len(r))}
    (pack,) = pack_rows(rows, token_budget=1000, min_shared=1)
    assert pack.tokens == len(prefixes)


def test_a_group_shares_its_prompt() -> None:
    prompt = list(range(100, 120))
    rows = [ids(*prompt, 1, 2, 3), ids(*prompt, 1, 2, 4), ids(*prompt, 5)]
    (pack,) = pack_rows(rows, token_budget=100, min_shared=16)
    # The run (1, 2) is too short to share: 20 + 3 + 3 + 1.
    assert pack.shape == (1, 27)
    assert pack.segments == (
        Segment(0, 20, ()), Segment(20, 23, (0,)), Segment(23, 26, (0,)), Segment(26, 27, (0,)),
    )  # fmt: skip
    np.testing.assert_array_equal(pack.positions[20:], [20, 21, 22, 20, 21, 22, 20])


def test_a_group_over_the_budget_is_cut_between_rows_and_prompts_of_others_are_not_mixed() -> None:
    a, b = list(range(100, 120)), list(range(200, 220))
    rows = [ids(*p, *range(k, k + 10)) for k in range(4) for p in (a, b)]
    packs = pack_rows(rows, token_budget=45, min_shared=16)
    assert [sorted(p.rows) for p in packs] == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert [p.tokens for p in packs] == [40, 40, 40, 40]


def test_a_group_that_fits_is_not_cut_to_fill_the_pack_before_it() -> None:
    a, b = list(range(100, 120)), list(range(200, 220))
    rows = [ids(*p, *range(10 * k, 10 * k + 10)) for k in range(3) for p in (a, b)]
    # Each group is 20 + 3·10. Filled up to 70, a pack would hold one row of b, whose prompt came again: 120 in all.
    packs = pack_rows(rows, token_budget=80, min_shared=16)
    assert [(sorted(p.rows), p.tokens) for p in packs] == [([0, 2, 4], 50), ([1, 3, 5], 50)]
    # Three groups of 16 + 3·10: two packs with a prompt of 16 twice cost less than three packs without.
    rows = [ids(*range(s, s + 16), *range(10 * k, 10 * k + 10)) for s in (100, 200, 300) for k in range(3)]
    packs = pack_rows(rows, token_budget=90, min_shared=16)
    assert (len(packs), sum(p.tokens for p in packs)) == (2, 3 * 46 + 16)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda r: ids(*r)), min_size=1, max_size=6),
       st.integers(1, 30))  # fmt: skip
def test_no_other_cuts_compute_fewer_tokens(rows: list[Ints], budget: int) -> None:
    packs = pack_rows(rows, token_budget=budget, min_shared=1)
    order = sorted(range(len(rows)), key=lambda i: rows[i].tolist())
    costs = []
    for n in range(len(rows)):
        for cuts in combinations(range(1, len(rows)), n):
            runs = [order[a:b] for a, b in pairwise((0, *cuts, len(rows)))]
            prefixes = [{tuple(rows[i][: t + 1].tolist()) for i in run for t in range(len(rows[i]))} for run in runs]
            if all(len(p) <= budget or len(run) == 1 for p, run in zip(prefixes, runs, strict=True)):
                costs.append(sum(len(p) + PACK_COST for p in prefixes))
    assert sum(p.tokens + PACK_COST for p in packs) == min(costs)


def test_the_padded_layout_puts_rows_of_like_length_together() -> None:
    rows = [ids(1, 2, 3, 4, 5, 6), ids(1), ids(7, 8, 9, 1, 2), ids(2, 2)]
    packs = pack_rows(rows, token_budget=12, shared=False)
    assert [p.rows for p in packs] == [(1, 3), (2, 0)]
    assert [p.shape for p in packs] == [(2, 2), (2, 6)]
    np.testing.assert_array_equal(packs[0].ids, [1, 0, 2, 2])


def test_no_rows_and_empty_rows() -> None:
    assert pack_rows([], token_budget=10) == []
    with pytest.raises(ValueError, match="without tokens"):
        pack_rows([ids(1), ids()], token_budget=10)


def test_rows_that_leave_a_common_path_one_after_the_other_make_a_deep_tree() -> None:
    rows = [ids(*range(n), 10_000) for n in range(20, 1120)]
    (pack,) = pack_rows(rows, token_budget=10**6, min_shared=1)
    assert pack.tokens == 1119 + len(rows), "the common path once, and each row's last token"
    assert max(len(s.path) for s in pack.segments) == len(rows) - 1


def test_a_pack_of_many_rows_takes_few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows that begin alike, by less than is shared, are more tokens than a pack was cut for: how many fit is tried.
    tried: list[int] = []
    make = packing._tree_pack

    def counted(rows: Sequence[Ints], chosen: Sequence[int], min_shared: int) -> Pack:
        tried.append(len(chosen))
        return make(rows, chosen, min_shared)

    monkeypatch.setattr(packing, "_tree_pack", counted)
    rng = np.random.default_rng(0)
    prompt, begun = rng.integers(0, 1000, 100), rng.integers(0, 1000, 15)
    rows = [np.concatenate([prompt, begun[: k % 16], rng.integers(1000, 2000, 5)]) for k in range(512)]
    packs = pack_rows(rows, token_budget=4000)
    assert [p.tokens <= 4000 for p in packs] == [True] * len(packs)
    assert len(packs) <= 3
    assert max(len(p.rows) for p in packs) > 200
    assert len(tried) < 20 * len(packs)
