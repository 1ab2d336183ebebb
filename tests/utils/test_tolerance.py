"""The tolerance of rewards, by hand."""

from __future__ import annotations

from areal_agents.utils.tolerance import TOLERANCE, all_same, reaches, rounding_of


def test_rounding_makes_no_difference() -> None:
    assert all_same([0.1 + 0.2, 0.3])
    assert all_same([sum([0.1] * 10), 1.0])
    assert all_same([1e6, 1e6 + 1e-4])
    assert all_same([])
    assert rounding_of() == 1e-9
    assert rounding_of(-1e6, 3.0) == 1e-3
    assert all_same([0.5])
    assert reaches(sum([0.1] * 10), 1.0)  # 0.9999999999999999
    assert reaches(0.1 * 3 / 0.3 - 1e-12, 1.0)
    assert reaches(sum([0.1] * 1000), 100.0)  # 99.9999999999986


def test_a_difference_makes_one() -> None:
    assert not all_same([0.0, 1e-8])
    assert not all_same([0.5, 0.5, 0.500001])
    assert not all_same([1e6, 1e6 + 0.01])
    assert not reaches(0.999999, 1.0)
    assert reaches(1.0 - TOLERANCE)
    assert not reaches(1.0 - TOLERANCE - 1e-12)
