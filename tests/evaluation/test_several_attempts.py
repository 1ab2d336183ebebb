"""pass@k and pass^k with their intervals: by hand, their coverage, and where they are shown, stored and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from areal_agents.cli.main import main
from areal_agents.evaluation.compare import Evaluation, compare
from areal_agents.evaluation.curves import panel, read_numbers
from areal_agents.evaluation.held_out import Sample
from areal_agents.evaluation.report import EvalReport, summarize
from areal_agents.evaluation.statistics import clustered_interval, pass_at_k, pass_hat_k
from areal_agents.trainer.evaluation import numbers
from areal_agents.trainer.run_folder import Commit
from areal_agents.types import AssistantMessage, Completion, Task, Text, Trajectory, Turn
from tests.chat_server import chat_server
from tests.unfinished import answers

PASS, FAIL = 1.0, 0.0


def report(*rows: Sequence[float | None], k: int | None = None, sample: Sample | None = None) -> EvalReport:
    tasks = [Task.make(f"t{i}", split="test", seed=i, payload={"i": i}) for i in range(len(rows))]
    results = [
        (task, [None if r is None else _attempt(task, r) for r in row]) for task, row in zip(tasks, rows, strict=True)
    ]
    return summarize(
        results, env="e", split="test", model="m", version=0, temperature=1.0, seed=0, seconds=1.0, k=k, sample=sample
    )


def _attempt(task: Task, reward: float) -> Trajectory:
    turn = Turn((1,), Completion((2,), (-1.0,), (0,), "stop"), AssistantMessage((Text("x"),)), reward)
    return Trajectory("e", task, "g", (turn,), True, False, "answer")


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's interval as its two roots of (p - rate)² = z² p (1 - p) / n."""
    z2, rate = 1.959964**2, successes / n
    a, b, c = 1 + z2 / n, 2 * rate + z2 / n, rate**2
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return (b - root) / (2 * a), (b + root) / (2 * a)


def evaluation(name: str, *rewards: Sequence[float]) -> Evaluation:
    return Evaluation(name, {("test", f"t{i}", f"hash of {i}"): list(r) for i, r in enumerate(rewards)})


# --- one evaluation ---------------------------------------------------------------------------------------------------


def test_each_task_counts_once() -> None:
    """Of 4 tasks with 2 attempts, 3 pass at least once and 1 passes always: Wilson's intervals of 3 and 1 of 4."""
    found = report([PASS, PASS], [PASS, FAIL], [FAIL, PASS], [FAIL, FAIL])
    assert (found.pass_at_k, found.pass_hat_k) == (0.75, 0.25)
    assert found.pass_at_k_ci95 == pytest.approx(wilson(3, 4), abs=1e-6)
    assert found.pass_hat_k_ci95 == pytest.approx(wilson(1, 4), abs=1e-6)
    assert found.pass_at_k_ci95 == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert found.pass_hat_k_ci95 == pytest.approx((0.0456, 0.6994), abs=1e-4)


@pytest.mark.parametrize(("reward", "rate", "interval"), [(FAIL, 0.0, (0.0, 0.4899)), (PASS, 1.0, (0.5101, 1.0))])
def test_at_0_and_1_the_interval_is_no_certainty(reward: float, rate: float, interval: tuple[float, float]) -> None:
    found = report(*[[reward] * 3] * 4)
    assert found.pass_at_k == found.pass_hat_k == rate
    assert found.pass_at_k_ci95 == found.pass_hat_k_ci95 == pytest.approx(interval, abs=1e-4)
    one = report([reward] * 3)
    assert one.pass_at_k_ci95 is not None  # of one task too: it could have been any rate but the opposite
    assert one.pass_at_k_ci95[1] - one.pass_at_k_ci95[0] > 0.7


def test_tasks_that_lack_attempts_are_not_in_them() -> None:
    found = report([PASS, PASS], [FAIL, FAIL], [PASS, None], [None, None])
    assert found.pass_at_k == 0.5
    assert found.pass_at_k_ci95 == pytest.approx(wilson(1, 2), abs=1e-6)
    none = report([PASS, None], k=2)
    assert (none.pass_at_k, none.pass_at_k_ci95, none.pass_hat_k_ci95) == (None, None, None)


def test_one_attempt_a_task_is_pass_at_1() -> None:
    found = report([PASS], [FAIL], [FAIL])
    assert (found.pass_at_k_ci95, found.pass_hat_k_ci95) == (found.ci95, found.ci95)
    assert "pass@" not in found.table().replace("pass@1", "")


def test_the_table_shows_the_intervals() -> None:
    head, _, row, said = report(
        [PASS, PASS], [PASS, FAIL], [FAIL, PASS], [FAIL, FAIL], sample=Sample(4, 9, 0)
    ).table().splitlines()  # fmt: skip
    assert [c.strip() for c in head.split("  ") if c.strip()][:6] == [
        "pass@1", "95 % CI", "pass@2", "95 % CI", "pass^2", "95 % CI",
    ]  # fmt: skip
    assert row.split()[3:7] == ["0.750", "0.301–0.954", "0.250", "0.046–0.699"]
    assert said == "tasks: 4 of 9 tasks, sampled with eval.task_seed = 0"
    assert report([PASS, None], [PASS, FAIL]).table().splitlines()[2].split()[3:7] == [
        "1.000", "0.207–1.000", "0.000", "0.000–0.793",
    ]  # fmt: skip


@pytest.mark.parametrize("rate", ["at least once", "always"])
def test_the_interval_covers_the_rate_of_all_tasks(rate: str) -> None:
    """30 tasks drawn from a population of Beta(1/2, 1) difficulty, 4 attempts each, 4000 times."""
    rng, k, n = np.random.default_rng(0), 4, 30
    p = rng.beta(0.5, 1.0, size=(4000, n))
    passed = rng.random((4000, n)) < (1 - (1 - p) ** k if rate == "at least once" else p**k)
    # E[1 - (1 - p)^4] and E[p^4] for Beta(1/2, 1): 1 - Π (1 + i)/(3/2 + i), Π (1/2 + i)/(3/2 + i) = 1/9, i = 0 … 3
    truth = 1 - math.prod((1 + i) / (1.5 + i) for i in range(4)) if rate == "at least once" else 1 / 9
    intervals = [clustered_interval([int(x) for x in row], [1] * n) for row in passed]
    covered = sum(low <= truth <= high for low, high in intervals) / len(intervals)
    assert 0.93 < covered < 0.98


# --- where they go ----------------------------------------------------------------------------------------------------


def test_what_is_committed_reads_back_as_it_was() -> None:
    made = report([PASS, PASS], [PASS, FAIL], sample=Sample(2, 9, 0))
    commit = Commit(step=3, reports={"after_rl": made})
    back = Commit.from_json(json.loads(json.dumps(commit.to_json()))).reports["after_rl"]
    assert back == made
    assert (type(back.ci95), type(back.pass_at_k_ci95), type(back.sample)) == (tuple, tuple, Sample)
    row = made.to_json()
    for name in ("pass_at_k_ci95", "pass_hat_k_ci95", "sample"):
        del row[name]
    old = EvalReport.from_json(row)  # of an earlier version
    assert (old.pass_at_k, old.pass_at_k_ci95, old.sample) == (1.0, None, Sample(2, None, None))
    assert old.table().splitlines()[2].split()[3:7] == ["1.000", "–", "0.500", "–"]


def test_metrics_have_the_ends_of_the_intervals() -> None:
    row = numbers(report([PASS, PASS], [PASS, FAIL]))
    assert row["pass_at_k_ci95_high"] == 1.0
    assert row["pass_hat_k_ci95_low"] == pytest.approx(0.0945, abs=1e-4)
    none = numbers(report([PASS, None], k=2))
    assert not {"pass_at_k", "pass_at_k_ci95_low", "pass_hat_k_ci95_high"} & none.keys()


def test_plots_have_the_intervals(tmp_path: Path) -> None:
    made = report([PASS, PASS], [PASS, FAIL])
    rows = [{"kind": "eval/before", "step": 0, "time": 0.0, **numbers(made)}]
    for name in ("run", "eval"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval" / "report.json").write_text(json.dumps(made.to_json()))
    run, alone = panel(read_numbers([tmp_path / "run", tmp_path / "eval"]), "pass_hat_k")[0].curves
    assert alone.level is not None
    for point in (run.held_out[0], alone.level):
        assert point.value == 0.5
        assert (point.low, point.high) == pytest.approx(wilson(1, 2), abs=1e-6)


def test_the_command_shows_and_stores_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(answers) as server:
        argv = ["eval", "tests.chat_envs:Sums", "--model", "openai:m", "--url", server.url, "--n", "8", "--k", "2"]
        assert main([*argv, "--temperature", "1", "--out", str(tmp_path / "e")]) == 0
    found = json.loads((tmp_path / "e" / "report.json").read_text())
    assert (found["pass_at_k"], found["pass_hat_k"]) == (0.5, 0.5)  # 100, 102, 104 and 106 are right, always
    assert found["pass_at_k_ci95"] == pytest.approx(wilson(4, 8), abs=1e-6)
    assert capsys.readouterr().out.split().count("0.215–0.785") == 3
    assert EvalReport.from_json(found).pass_at_k_ci95 == tuple(found["pass_at_k_ci95"])


# --- two evaluations --------------------------------------------------------------------------------------------------


def test_two_of_as_many_attempts_are_compared_by_hand() -> None:
    a = evaluation("a", [FAIL, FAIL], [FAIL, FAIL], [PASS, FAIL], [PASS, PASS])
    b = evaluation("b", [PASS, FAIL], [PASS, PASS], [PASS, FAIL], [FAIL, PASS])
    found = compare(a, b)
    assert (found.k, found.pass_at_k is not None, found.pass_hat_k is not None) == (2, True, True)
    assert found.pass_at_k is not None
    assert found.pass_hat_k is not None
    # pass@2: 0 0 1 1 and 1 1 1 1, differences 1 1 0 0; pass^2: 0 0 0 1 and 0 1 0 0, differences 0 1 0 -1
    assert (found.pass_at_k.a, found.pass_at_k.b, found.pass_at_k.difference) == (0.5, 1.0, 0.5)
    assert (found.pass_hat_k.a, found.pass_hat_k.b, found.pass_hat_k.difference) == (0.25, 0.25, 0.0)
    assert (found.pass_at_k.p_value, found.pass_hat_k.p_value) == (0.5, 1.0)  # two flips: both up 1/4, twice
    # t(3) = 3.1824, deviation of 1 1 0 0: sqrt(1/3); at most 1 is possible, and 0 is not rejected
    assert found.pass_at_k.ci95 == pytest.approx((min(0.0, 0.5 - 3.18245 * math.sqrt(1 / 12)), 1.0), abs=1e-4)
    lines = {line.split()[0]: line.split()[1:4] for line in found.table().splitlines() if line.startswith("pass")}
    assert lines["pass@2"] == ["0.500", "1.000", "+0.500"]
    assert lines["pass^2"] == ["0.250", "0.250", "+0.000"]
    assert found.to_json()["pass_at_k"]["ci95"][1] == 1.0


def test_of_unequal_numbers_the_fewer_count() -> None:
    """Of 4 attempts with 1 and 3 successes, pass@2 is 1/2 and 1, pass^2 is 0 and 1/2."""
    a = evaluation("a", [PASS, FAIL, FAIL, FAIL], [PASS, PASS, PASS, FAIL])
    b = evaluation("b", [PASS, FAIL], [PASS, PASS])
    found = compare(a, b)
    assert found.attempts == (4, 2)
    assert found.pass_at_k is not None
    assert found.pass_hat_k is not None
    assert (found.k, found.pass_at_k.a, found.pass_at_k.b) == (2, 0.75, 1.0)
    assert (found.pass_hat_k.a, found.pass_hat_k.b) == (0.25, 0.5)
    assert (pass_at_k(4, 1, 2), pass_hat_k(4, 3, 2)) == (Fraction(1, 2), Fraction(1, 2))


def test_equal_sides_are_no_certainty() -> None:
    """No difference in 4 tasks: at most 1 - 0.025^(1/4) of all tasks differ, by at most 1."""
    same = [evaluation(name, *[[PASS, FAIL]] * 4) for name in "ab"]
    found = compare(*same)
    bound = 1 - 0.025**0.25
    assert found.pass_at_k is not None
    assert found.pass_at_k.ci95 == pytest.approx((-bound, bound))


def test_what_lacks_attempts_is_left_out_and_said() -> None:
    a = evaluation("a", [PASS, PASS], [PASS])
    found = compare(a, evaluation("b", [FAIL, FAIL], [PASS, PASS]))
    assert found.pass_at_k is not None
    assert (found.pass_at_k.a, found.pass_at_k.b) == (1.0, 0.0)
    assert "pass@2 and pass^2 are over the 1 tasks with 2 attempts on both sides" in found.notes
    none = compare(a, evaluation("b", [PASS], [PASS, PASS]))
    assert (none.k, none.pass_at_k) == (2, None)
    assert "pass@2 and pass^2 are not known: there is no task with 2 attempts on both sides" in none.notes
    one = compare(evaluation("a", [PASS], [FAIL]), evaluation("b", [PASS], [PASS]))
    assert (one.k, one.pass_at_k, one.pass_hat_k) == (1, None, None)
    assert "pass@1" in one.table()
    assert "pass^" not in one.table()
