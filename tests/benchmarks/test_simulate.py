"""The simulation's rates, its grid and its report."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simulated import benchmarks_on_path, case, module

__all__ = ["benchmarks_on_path"]


def test_the_rate_is_linear_between_measured_points_and_flat_beyond() -> None:
    measured = module("simulate_model").MEASURED
    assert [measured.rate(n) for n in (0, 1, 8, 20, 64, 100)] == [0, 56, 292, 390.5, 574, 574]
    each = [measured.rate(n) / n for n in range(1, 65)]
    assert all(a >= b for a, b in itertools.pairwise(each))


def test_a_trace_replaces_what_it_names_and_refuses_what_it_cannot(tmp_path: Path) -> None:
    model = module("simulate_model")
    path = tmp_path / "trace.json"
    path.write_text('{"rates": [[1, 10], [4, 20]], "update_seconds": 2}')
    read = model.Calibration.read(path)
    assert (read.rate(1), read.rate(4), read.update_seconds, read.learner_rate) == (10, 20, 2, 212)
    path.write_text('{"rate": 3}')
    with pytest.raises(ValueError, match=r"unknown \['rate'\]"):
        model.Calibration.read(path)
    path.write_text('{"rates": [[1, 10], [2, 30]]}')
    with pytest.raises(ValueError, match="ever smaller slopes"):
        model.Calibration.read(path)


def test_episodes_have_the_mean_and_the_cap_and_depend_on_the_seed_alone() -> None:
    model = module("simulate_model")
    one, two = (model.Workload(case(sigma=1.0, seed=s, group_size=16), model.MEASURED) for s in (0, 1))
    lengths = [n for order in range(1024) for n in one.lengths(order)]
    assert max(lengths) == 8 * 1024
    # E[min(X, 8)] of a log-normal of mean 1: Φ(ln 8 − 1/2) + 8·(1 − Φ(ln 8 + 1/2)) = 0.9828
    assert sum(lengths) / len(lengths) == pytest.approx(0.9828 * 1024, rel=0.02)
    assert one.lengths(1500) == model.Workload(case(seed=0, group_size=16), model.MEASURED).lengths(1500)
    assert one.lengths(0) != two.lengths(0)
    assert [one.turns(n) for n in (1, 512, 513, 8192)] == [1, 1, 2, 16]


def sample(engines: int, eta: int, mode: str, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "engines": engines, "sigma": 1.0, "eta": eta, "on_exceed": mode, "seed": 0, "trained_tokens_s": rate,
        "consumed_tokens_s": rate, "trained_share": rate / 100, "consumed_share": rate / 100, "generated_share": 1.0,
        "masked_share": 0.0, "dropped_share": 0.0, "learner_idle": 0.1, "engine_idle": 0.0, "age_mean": 1.0,
        "age_max": eta, **more,
    }  # fmt: skip


def test_rows_compare_with_the_sync_run_of_the_same_seed() -> None:
    simulate = module("simulate")
    samples = [sample(4, 0, "wait", 30), sample(4, 8, "mask", 96)]
    samples += [s | {"seed": 1, "trained_tokens_s": s["trained_tokens_s"] * 2} for s in samples]
    row = simulate.summarize(samples)[1]
    assert (row["over sync"], row["trained/limit"], row["on_exceed"]) == (3.2, 0.96, "mask")
    assert simulate.summarize(samples)[0]["on_exceed"] == "sync"
    assert [c.holds for c in simulate.limit_checks(samples)] == [True, True]
    late = simulate.limit_checks([sample(4, 8, "mask", 94)])
    assert not late[0].holds
    assert "learner idle 10.0%" in late[0].reason
    assert not simulate.age_checks([sample(4, 2, "drop", 1, age_max=3)])[0].holds


def test_the_shape_is_compared_over_the_unbounded_run() -> None:
    simulate = module("simulate")
    samples = [
        sample(64, eta, "mask" if eta else "wait", rate) | {"sigma": sigma}
        for eta, rate in {0: 30, 1: 60, 2: 80, 4: 90, 8: 95, 16: 99, simulate.ANY: 100}.items()
        for sigma in (0.5, 1.0)
    ]
    samples.append(sample(64, 1, "wait", 10, learner_idle=0.9))  # other modes are no part of the curve
    rows = simulate.shape(samples)
    assert [row["ours"] for row in rows if row["σ"] == 1] == [0.3, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0]
    assert rows[2]["AReaL"] == 0.899  # 356.6 / 396.8
    assert rows[2]["gain, ours"] == round(50 / 70, 3)
    found = simulate.shape_checks(rows, 2.0)[:4]
    assert [(c.value, c.holds) for c in found] == [(-0.01, True), (0.099, True), (0.714, True), (0.857, True)]
    rows[3]["ours"] = 0.7
    fall, gap, *_ = simulate.shape_checks(rows, 2.0)
    assert (fall.holds, gap.holds) == (False, False)
    assert "the learner waits 10% of the time" in gap.reason
    rows[3]["ours"] = 1.0
    assert "the oldest token is 4" in simulate.shape_checks(rows, 2.0)[1].reason


def test_the_grid_has_every_combination_once() -> None:
    simulate = module("simulate")
    asked = simulate.argparse.Namespace(fill=2.0, balance=1.0, split=0.75, measured_learner=False)
    cases = simulate.grid(simulate.SIZES, module("simulate_model").MEASURED, asked)
    assert len(set(cases)) == len(cases) == (3 + 2 + 1 + 1) * 2 * (1 + 4 * 3)
    assert {c.engines for c in cases} == {4, 64, 512, 4096}
    assert all(c.groups * c.group_size == 2 * c.engines * c.slots for c in cases)


def test_the_measured_learner_runs_on_the_devices_that_do_not_generate() -> None:
    simulate, calibration = module("simulate"), module("simulate_model").MEASURED
    asked = simulate.argparse.Namespace(fill=2.0, balance=1.0, split=0.75, measured_learner=True)
    found = simulate.case_of(simulate.SIZES[0], calibration, asked, sigma=1.0, eta=1, on_exceed="wait", seed=0)
    # one learner device for three engines of 489 tokens/s at 32 sequences
    assert found.balance == pytest.approx(212 / 3 / 489)
    assert found.groups == 2 * 4 * 32 / 16


def test_the_script_takes_quick_json_and_trace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--help"])
    with pytest.raises(SystemExit) as ended:
        module("simulate").main()
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    assert all(option in usage for option in ("--quick", "--json FILE", "--trace FILE"))
