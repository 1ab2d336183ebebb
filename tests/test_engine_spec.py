"""Seeds of engine processes."""

from __future__ import annotations

from areal_agents.engines.spec import process_seed


def test_no_two_processes_of_any_life_of_a_run_draw_the_same_numbers() -> None:
    lives = ("", "4", "12")  # a new run, and resumed at these steps
    seeds = {(s, i, n): process_seed(7, salt=s, index=i, nth=n) for s in lives for i in range(4) for n in range(20)}
    assert seeds["", 0, 0] == 7  # a run with one engine that never dies is seeded by the setting itself
    assert len(set(seeds.values())) == len(seeds) == 240
    assert seeds["4", 1, 2] == process_seed(7, salt="4", index=1, nth=2)
    assert seeds["4", 1, 2] != process_seed(8, salt="4", index=1, nth=2)
