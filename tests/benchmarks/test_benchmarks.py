"""The benchmarks' own arithmetic, their processes and records, by hand-worked numbers; no timings."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from areal_agents.evaluation import compare
from tests.simulated import BENCHMARKS, benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]
SCRIPTS = (
    "engine", "trl_step", "demo", "demo_engines", "engines", "mismatch", "async", "gpu", "busy", "verifier",
    "same_seed", "sandboxes", "search", "credit", "staleness", "demo_algorithms", "learner", "environments",
    "train_environments",
)  # fmt: skip
RECORD = {"benchmark", "commit", "machine", "samples", "checks"}


def test_a_summary_has_the_median_and_the_spread() -> None:
    # sorted 1 2 4 8: median 3, spread (8 - 1) / 3
    assert module("measure").summary([4.0, 1.0, 8.0, 2.0]) == {
        "n": 4, "median": 3.0, "min": 1.0, "max": 8.0, "spread": 2.3333,
    }  # fmt: skip


def test_a_ratio_pairs_the_samples_of_one_turn() -> None:
    # turn 2 ran ten times slower on both sides: ratios 2, 2, 3; unpaired medians would give 20 / 10 too, means not
    assert module("measure").paired_ratio([20.0, 2.0, 30.0], [10.0, 1.0, 10.0]) == 2.0
    with pytest.raises(ValueError, match="2 and 1 samples"):
        module("measure").paired_ratio([1.0, 2.0], [1.0])


def test_covered_time_counts_overlaps_once_and_stays_inside_the_window() -> None:
    covered = module("measure").covered
    # inside [10, 20]: 10-12 (of 8-12), 11-14 adds 2, 13-13.5 nothing, 16-18 two, 19-25 one: 2 + 2 + 2 + 1
    assert covered([(11, 14), (8, 12), (16, 18), (13, 13.5), (19, 25), (1, 2)], 10, 20) == 7
    assert covered([], 10, 20) == 0


def test_a_histogram_is_sorted_and_has_text_keys() -> None:
    assert list(module("measure").histogram([2, 0, 10, 0]).items()) == [("0", 2), ("2", 1), ("10", 1)]


def test_padding_runs_every_batch_to_its_longest() -> None:
    workload = module("workload")
    # batches of two: (3, 5) costs 10, (2, 9) 18, (4,) 4
    assert workload.padded_tokens([3, 5, 2, 9, 4], 2) == 32
    lengths = workload.targets(workload.Case(32, "ragged"))
    assert (len(lengths), max(lengths), sum(lengths)) == (64, 128, 2 * sum(workload.LONG_TAILED))
    assert sorted(workload.LONG_TAILED)[15:17] == [20, 21]  # the median that the docstring states
    assert sum(workload.LONG_TAILED) / 32 == 29.25


def test_every_case_has_a_name_of_its_own_and_the_headline_is_among_them() -> None:
    workload = module("workload")
    names = [case.name for case in workload.CASES]
    assert len(set(names)) == len(names)
    assert workload.HEADLINE.name == "batch 32, equal, 1 turn, shared prefix"
    assert workload.HEADLINE in workload.CASES


def test_the_engine_goal_applies_to_the_headline_alone() -> None:
    engine, headline = module("engine"), module("workload").HEADLINE.name
    rows = [
        {"case": headline, "generate_cache": "static", "ratio": 1.49},
        {"case": "another", "generate_cache": "static", "ratio": 1.2},
    ]
    found = engine.checks(rows, [{"rows": 8, "equal_rows": 8}], goal=True)
    assert [(c.goal, c.holds) for c in found] == [("== 0", True), (">= 1.5", False), ("> 1", True)]
    found = engine.checks(rows, [{"rows": 8, "equal_rows": 7}], goal=False)
    assert [c.holds for c in found] == [False, True, True]


def trl_sample(side: str, seconds: float, mib: float) -> dict[str, Any]:
    return {
        "side": side, "steps": [{"seconds": seconds, "tokens": 2000.0}],
        "peak_pss_mib_measured_steps": mib,
        "settings": {"weights_changed": True},
    }  # fmt: skip


def test_a_step_lasts_from_the_end_of_the_one_before_and_the_first_is_a_warm_up() -> None:
    steps = module("trl_step").steps_of({"step_ends": [100.0, 112.5, 120.0], "tokens": [9, 10, 11]})
    assert steps == [{"seconds": 12.5, "tokens": 10}, {"seconds": 7.5, "tokens": 11}]


def test_trl_goals_are_ratios_within_a_turn() -> None:
    trl_step = module("trl_step")
    # ratios 24/10, 40/25: median 2.0; memory 3000/4000
    samples = [
        trl_sample("ours", 10, 3000), trl_sample("trl", 24, 4000),
        trl_sample("ours", 25, 3000), trl_sample("trl", 40, 4000),
    ]  # fmt: skip
    found = {c.name: (c.value, c.holds) for c in trl_step.checks(samples, goal=True)}
    assert found["seconds of TRL's step over ours (ours; its fastest setting)"] == (2.0, True)
    assert found["peak PSS over TRL's, measured steps (ours; its fastest setting)"] == (0.75, True)
    samples[0]["steps"][0]["tokens"] = 1000.0  # ours sampled a quarter less: not comparable
    assert not trl_step.checks(samples, goal=True)[0].holds


def async_sample(staleness: int, wall: float, ages: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "max_staleness": staleness, "wall_seconds": wall, "engine_idle_seconds": wall / 4, "updates": 2,
        "learner_idle_seconds": wall / 2, "age_histogram": ages, "age_max": max(map(int, ages)), **more,
    }  # fmt: skip


def test_async_checks_hold_the_bound_and_compare_wall_clocks_of_one_round() -> None:
    script = importlib.import_module("async")  # no import statement can name it
    samples = [
        async_sample(0, 100, {"0": 10}), async_sample(1, 80, {"0": 6, "1": 4}),
        async_sample(0, 200, {"0": 10}), async_sample(1, 100, {"0": 9, "1": 1}),
    ]  # fmt: skip
    row = script.summarize(samples)[1]
    assert (row["speed-up"], row["ages"], row["engine idle"]) == (1.62, "0:75% 1:25%", "25%")
    assert all(c.holds for c in script.checks(samples, 2, timing=True))
    assert not all(c.holds for c in script.checks([async_sample(1, 9, {"2": 1})], 2, timing=False))
    assert not all(c.holds for c in script.checks(samples, 3, timing=False))


def test_demos_are_compared_task_by_task_over_the_attempts_of_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo_engines = module("demo_engines")
    assert len({demo_engines.folder(name, seed) for name in demo_engines.RUNS for seed in (0, 1)}) == 6
    passed = {"transformers-0": (1, 1), "transformers-1": (1, 0), "vllm-0": (1, 0), "vllm-1": (1, 1)}

    def load(source: str) -> compare.Evaluation:
        run, label = Path(source.partition(":")[0]).name, source.partition(":")[2]
        assert label == "after_rl"
        return compare.Evaluation(run, {("test", f"t{i}", f"h{i}"): [float(p)] for i, p in enumerate(passed[run])})

    monkeypatch.setattr(compare, "load", load)
    alone, both = (demo_engines.compared(tmp_path, "vllm", seeds) for seeds in ([0], [0, 1]))
    # task 0: 1 and 1 on each side; task 1: 1 against 0 with seed 0, half against half with both
    assert (alone["pass_at_1"]["difference"], alone["lost"], alone["attempts"]) == (-0.5, ("t1",), (1, 1))
    assert (both["pass_at_1"]["difference"], both["ties"], both["attempts"]) == (0.0, 2, (2, 2))
    many = both | {"within": True, "pass_at_1": {"ci95": (-0.01234, 0.02)}, "n": 512}
    (check,) = demo_engines.checks([many])
    assert (check.value, check.goal, check.holds) == ([-1.23, 2.0], "inside ±5 points", True)
    assert "seeds 0, 1, n = 512" in check.name
    assert not demo_engines.checks([alone])[0].holds
    (check,) = demo_engines.checks([many | {"within": False, "pass_at_1": {"ci95": None}}])
    assert (check.value, check.holds, check.reason) == (None, False, "the comparison has no interval")


def test_an_algorithm_is_compared_with_the_warm_start_that_the_first_run_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = module("demo_algorithms")
    assert len({script.folder(name) for name in (*script.RUNS, script.WARM)}) == 5
    passed = {"grpo:before": (0, 0, 1), "grpo-adapters:after_rl": (1, 1, 1)}

    def load(source: str) -> compare.Evaluation:
        found = passed[Path(source).name]
        return compare.Evaluation(source, {("test", f"t{i}", f"h{i}"): [float(p)] for i, p in enumerate(found)})

    monkeypatch.setattr(compare, "load", load)
    found = script.compared(tmp_path, "grpo, adapters")
    assert (found["run"], found["n"], round(found["pass_at_1"]["difference"], 4)) == ("grpo, adapters", 3, 0.6667)
    for ci95, value, holds in (((0.001, 0.5), [0.1, 50.0], True), ((0.0, 0.5), [0.0, 50.0], False)):
        check = script.gained(found | {"pass_at_1": {"ci95": ci95}})
        assert (check.value, check.holds, check.reason) == (value, holds, "")
    check = script.gained(found | {"pass_at_1": {"ci95": None}})
    assert (check.value, check.holds, check.reason) == (None, False, "the comparison has no interval")


def test_the_long_tail_is_deterministic_and_within_its_bounds() -> None:
    envs = module("text_envs")
    turns = [envs.turns_of(seed) for seed in range(2000)]
    assert turns == [envs.turns_of(seed) for seed in range(2000)]
    assert (min(turns), max(turns)) == (1, envs.MOST_TURNS)
    assert sorted(turns)[1000] in (2, 3)
    assert sum(t >= 8 for t in turns) / 2000 == pytest.approx(0.08, abs=0.04)
    assert all(0.1 <= envs.tool_seconds(seed, 1) <= 0.5 for seed in range(200))
    assert envs.share_of("eeab") == 0.5
    assert envs.share_of("") == 0.0


CHILD = """
import sys; sys.path.insert(0, {path!r})
from measured_process import serve
def handle(asked):
    print("a stray line")
    if asked.get("die"): raise SystemExit(3)
    return {{"double": 2 * asked["x"]}}
serve(handle)
"""


def test_a_side_answers_reports_failures_and_leaves_nothing_behind() -> None:
    side = module("measured_process")
    with side.Side("child", [sys.executable, "-c", CHILD.format(path=str(BENCHMARKS))]) as child:
        assert child.ask({"x": 21}) == {"double": 42}
        pid = child.memory._pid
        with pytest.raises(RuntimeError, match=r"(?s)side child failed: KeyError.*a stray line"):
            child.ask({})
        assert child.ask({"x": 1}) == {"double": 2}  # a failed request is not the end
        with pytest.raises(RuntimeError, match="ended with code 3"):
            child.ask({"die": True})
    assert not Path(f"/proc/{pid}").exists()


def test_memory_is_the_proportional_share_of_the_whole_tree() -> None:
    side = module("measured_process")
    assert side.pss_of("Rss:  9000 kB\nPss:  2048 kB\nPss_Dirty:  1 kB\n") == 2048
    assert side.pss_of("") == 0
    assert side.pss_mib(os.getpid()) > 10
    assert os.getpid() in side.tree(os.getpid())


def test_a_record_holds_the_commit_the_machine_and_the_goals(tmp_path: Path) -> None:
    record = module("record")
    path = tmp_path / "x.json"
    record.write(path, "x", [{"s": 1}], [record.Check("a", 2, ">= 1", True)], floor={"ms": 3})
    row = json.loads(path.read_text())
    assert row.keys() == RECORD | {"floor"}
    assert row["checks"] == [{"name": "a", "value": 2, "goal": ">= 1", "holds": True, "reason": ""}]


def test_a_record_takes_the_place_of_another_one_at_once(tmp_path: Path) -> None:
    """Whoever is killed while it is written, or reads it meanwhile, has the earlier one."""
    save, path = module("record").save, tmp_path / "new" / "x.json"
    save(path, {"a": 1})
    with path.open() as before:
        save(path, {"b": 2})
        assert json.loads(before.read()) == {"a": 1}
    assert json.loads(path.read_text()) == {"b": 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_benchmark_that_is_cut_goes_on_with_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, path, done = module("record"), tmp_path / "x.json", []

    def work(name: str) -> str:
        done.append(name)
        return name.upper()

    def run(names: str, **settings: Any) -> list[str]:
        kept = record.Kept(path, settings)
        return [kept.part(name, lambda name=name: work(name)) for name in names]

    assert run("ab", turns=3) == ["A", "B"]
    assert run("abc", turns=3) == ["A", "B", "C"]
    assert done == ["a", "b", "c"]
    assert run("a", turns=5) == ["A"]  # other settings: measured again
    assert done == ["a", "b", "c", "a"]
    record.Kept(path, {"turns": 5}).end()
    assert not list(tmp_path.iterdir())
    assert record.Kept(None, {}).part("d", lambda: 4) == 4


def test_committed_records_have_the_schema() -> None:
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        row = json.loads(path.read_text())
        assert row.keys() >= RECORD, path.name
        assert row["benchmark"] == path.stem
        assert row["samples"], path.name
        assert all({"name", "value", "goal", "holds"} <= check.keys() for check in row["checks"]), path.name


def test_what_two_runs_have_in_common_by_hand() -> None:
    # a: the same 3 tokens. b: 2 of 4 until the runs part, though a later token is equal again. c: one run alone has it.
    one = {(0, "a"): [(1, 2), (3,)], (0, "b"): [(1, 2), (3, 4)], (0, "c"): [(5,)]}
    two = {(0, "a"): [(1, 2), (3,)], (0, "b"): [(1, 2), (9, 4)]}
    found = module("same_seed").shares(one, two)
    assert found == {
        "episodes": 3, "same_episodes": 0.3333, "same_tokens": 0.625, "same_first_turns": 0.6667, "sampled_tokens": 8,
    }  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_takes_quick_and_json(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0
    usage = capsys.readouterr().out
    assert "--quick" in usage
    assert "--json FILE" in usage
