"""Comparing two evaluations: statistics by hand, pairing, refusals, files and the command."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from areal_agents.cli.main import main
from areal_agents.errors import ArealError, ConfigError
from areal_agents.evaluation.compare import Comparison, Evaluation, compare, load
from areal_agents.evaluation.paired import pass_interval
from areal_agents.tracking.trajectories import Record, shard_path, write_shard
from areal_agents.types import AssistantMessage, Completion, Task, Trajectory, Turn


def evaluation(name: str, rewards: Mapping[str, Sequence[float]], *, env: str | None = None) -> Evaluation:
    return Evaluation(name, {("test", id, f"hash of {id}"): list(r) for id, r in rewards.items()}, env)


def once(name: str, rewards: Sequence[float]) -> Evaluation:
    """One attempt a task; tasks t0, t1, …"""
    return evaluation(name, {f"t{i}": [r] for i, r in enumerate(rewards)})


def write(out: Path, kind: str, rewards: Mapping[str, Sequence[float]], *, split: str = "test", n: int = 0) -> None:
    """A shard of one-turn episodes; ``n`` is in the tasks' payload, so it changes their content."""
    records = []
    for id, attempts in rewards.items():
        task = Task.make(id, split=split, seed=0, payload={"id": id, "n": n})
        for i, reward in enumerate(attempts):
            turn = Turn((1,), Completion((5,), (-1.0,), (0,), "stop"), AssistantMessage(()), reward)
            records.append(Record(kind, 0, Trajectory(f"{kind}/{id}/{i}", task, id, (turn,), True, False, "answer")))
    write_shard(shard_path(out, kind, 0), records)


# ── statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_attempt_a_task_by_hand() -> None:
    # differences 1, 1, 1, 0, -1: mean 0.4, variance (3 · 0.36 + 0.16 + 1.96) / 4 = 0.8, t(4) = 2.7764
    found = compare(once("a", [0, 0, 0, 1, 1]), once("b", [1, 1, 1, 1, 0]))
    half = 2.7764451 * math.sqrt(0.8 / 5)
    assert (found.n, found.attempts) == (5, (1, 1))
    assert (found.pass_at_1.a, found.pass_at_1.b) == (0.4, 0.8)
    assert found.pass_at_1.difference == pytest.approx(0.4)
    assert found.pass_at_1.ci95 == pytest.approx((0.4 - half, 1.0))  # 1.51 is beyond the bound
    assert found.reward.ci95 == pytest.approx((0.4 - half, 0.4 + half))
    assert (found.gained, found.lost, found.ties) == (("t0", "t1", "t2"), ("t4",), 1)
    assert found.p_value == 2 * (1 + 4) / 16  # one loss or none among four flips, both tails


def test_attempts_are_averaged_before_tasks_are_paired() -> None:
    a = evaluation("a", {"x": [1, 0, 0, 0], "y": [0, 0, 0, 0], "z": [1, 1, 1, 1]})
    b = evaluation("b", {"x": [1, 1, 1, 0], "y": [1, 0, 0, 0], "z": [0, 1, 1, 1]})
    found = compare(a, b)
    # differences 1/2, 1/4, -1/4: mean 1/6, variance ((1/3)² + (1/12)² + (5/12)²) / 2 = 7/48, t(2) = 4.3027
    half = 4.3026527 * math.sqrt(7 / 48 / 3)
    assert found.pass_at_1.a == pytest.approx(5 / 12)
    assert found.pass_at_1.b == pytest.approx(7 / 12)
    assert found.pass_at_1.ci95 == pytest.approx((1 / 6 - half, min(1.0, 1 / 6 + half)))
    assert (found.gained, found.lost, found.ties, found.attempts) == (("x", "y"), ("z",), 0, (4, 4))
    assert found.p_value == 0.75  # of the 8 sums of ±2 ±1 ±1, six are at least 2 away from 0


def test_pairing_sees_what_two_separate_intervals_cannot() -> None:
    # 300 of 512 against 330 of 512, and no task is lost: unpaired, these intervals overlap by far.
    found = compare(once("a", [1] * 300 + [0] * 212), once("b", [1] * 330 + [0] * 182))
    low, high = found.pass_at_1.ci95 or (0, 0)
    assert 0.03 < low < 30 / 512 < high < 0.09
    assert found.p_value == pytest.approx(2 / 2**30)
    assert found.verdict() == f"B passes more often: between {100 * low:.1f} and {100 * high:.1f} points more"


def test_a_difference_is_claimed_only_where_the_test_agrees() -> None:
    # five lost of sixteen: t's interval is -0.568 to -0.057, but five coins fall alike in 1 of 16 throws
    found = compare(once("a", [1] * 5 + [0] * 11), once("b", [0] * 16))
    assert found.p_value == found.pass_at_1.p_value == found.reward.p_value == 0.0625
    assert found.pass_at_1.ci95 == pytest.approx((-0.5676, 0.0), abs=1e-4)
    assert found.reward.ci95 == found.pass_at_1.ci95
    assert found.verdict() == "no difference shown: anything from -56.8 to +0.0 points fits these tasks"
    assert "the t interval alone leaves out 0, the test does not (p = 0.0625): it is widened to 0" in found.notes
    other = compare(once("b", [0] * 16), once("a", [1] * 5 + [0] * 11))
    assert other.verdict() == "no difference shown: anything from +0.0 to +56.8 points fits these tasks"
    six = compare(once("a", [1] * 6 + [0] * 10), once("b", [0] * 16))  # 1 of 32 throws
    assert six.p_value == 0.03125
    assert six.verdict() == "B passes less often: between 9.2 and 64.1 points less"


@pytest.mark.parametrize("n", range(1, 41))
def test_no_number_of_flips_is_claimed_against_the_test(n: int) -> None:
    for gained in range(n + 1):
        for lost in {0, 1, 2, 5} & set(range(n - gained + 1)):
            b = [1] * gained + [0] * (n - gained)
            found = compare(once("a", [0] * (n - lost) + [1] * lost), once("b", b))
            low, high = found.pass_at_1.ci95 or (0.0, 0.0)
            assert found.p_value < 0.05 or low <= 0.0 <= high
            assert (found.p_value < 0.05 and not low <= 0.0 <= high) == found.verdict().startswith("B passes")


def test_reward_and_pass_are_apart() -> None:
    found = compare(once("a", [0.0, 0.2, 1.0]), once("b", [0.5, 0.2, 1.3]))
    assert found.pass_at_1.difference == 0.0  # 0.5 is no pass, and 1.3 is no more than one
    assert found.reward.difference == pytest.approx(0.8 / 3)
    assert found.ties == 3


def test_no_difference_is_not_certainty() -> None:
    found = compare(once("a", [1, 0]), once("b", [1, 0]))
    q = 1 - 0.025 ** (1 / 2)  # 0.842: two tasks say next to nothing
    assert found.pass_at_1.ci95 == pytest.approx((-q, q))
    assert found.reward.ci95 is None
    assert found.p_value == 1.0
    assert not found.within(0.5)
    assert any("2 tasks are few" in note for note in found.notes)
    assert any("exact binomial bound" in note for note in found.notes)
    all_won = compare(once("a", [0] * 40), once("b", [1] * 40))
    assert all_won.pass_at_1.ci95 == pytest.approx((1 - 2 * (1 - 0.025 ** (1 / 40)), 1.0))


def test_within_a_margin_at_512_tasks() -> None:
    a = [1] * 256 + [0] * 256
    flips = [0] * 6 + [1] * 250 + [1] * 8 + [0] * 248  # 6 lost, 8 gained: +0.4 points, half width 1.4
    assert compare(once("a", a), once("b", flips)).within(0.05)
    assert not compare(once("a", a), once("b", flips)).within(0.01)
    assert compare(once("a", a), once("b", a)).within(0.05)
    worse = [0] * 40 + [1] * 216 + [1] * 20 + [0] * 236  # -3.9 points, half width 3
    assert not compare(once("a", a), once("b", worse)).within(0.05)
    few = compare(once("a", a[240:272]), once("b", a[240:272]))  # equal, but 32 tasks cannot show it
    assert not few.within(0.05)


def test_notes_on_what_weakens_the_numbers() -> None:
    solid = compare(once("a", [0, 1] * 40), once("b", [1, 1] * 30 + [0, 0] * 10))
    assert solid.notes == ()
    rough = compare(once("a", [0] * 40), once("b", [1] * 3 + [0] * 37))
    assert rough.notes == ("only 3 tasks differ: the interval has the bounds of what none showed; the test is exact",)
    a = evaluation("a", {f"t{i}": [i % 2, 1] for i in range(40)}, env="x/A-v0")
    b = evaluation("b", {f"t{i}": [1] if i == 3 else [1, i % 3 > 0] for i in range(40)}, env="x/A-v1")
    uneven, fewer, environments = compare(a, b).notes
    assert fewer == "pass@2 and pass^2 are over the 39 tasks with 2 attempts on both sides"
    assert uneven.startswith("1 times a task lacks attempts")
    assert environments == "the environments differ: x/A-v0 and x/A-v1"


# ── which tasks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_other_tasks_are_refused_or_left_out() -> None:
    a = evaluation("a", {"x": [1], "y": [0], "z": [1]})
    b = evaluation("b", {"y": [1], "x": [1]})
    with pytest.raises(ConfigError, match="a has 3 tasks, b has 2, and 2 are in both: --common compares those"):
        compare(a, b)
    found = compare(a, b, common=True)
    assert (found.n, found.left_out, found.gained, found.pass_at_1.a) == (2, (1, 0), ("y",), 0.5)
    assert "left out, not in both: 1 tasks of A, 0 of B" in found.table()


def test_equal_ids_with_other_content_are_not_the_same_task(tmp_path: Path) -> None:
    write(tmp_path / "a", "eval", {"x": [1.0], "y": [1.0]}, n=1)
    write(tmp_path / "b", "eval", {"x": [1.0], "y": [1.0]}, n=2)
    with pytest.raises(ConfigError, match=r"0 are in both; 2 have one id but different content.*: evaluate both on"):
        compare(tmp_path / "a", tmp_path / "b", common=True)


def test_another_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "eval", {"x": [1.0]})
    write(tmp_path / "b", "eval", {"x": [1.0]}, split="train")
    with pytest.raises(ConfigError, match=r"a is on split test, .*b on train: evaluate both on one"):
        compare(tmp_path / "a", tmp_path / "b", common=True)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A training run with two evaluations, and an evaluation of its own beside it."""
    out = tmp_path / "run"
    write(out, "train", {"x": [0.0], "w": [0.0]}, split="train")
    write(out, "eval-before", {"x": [0.0], "y": [0.0], "z": [1.0]})
    write(out, "eval-after_rl", {"x": [1.0], "y": [1.0], "z": [1.0]})
    (out / "config.toml").write_text('[env]\nid = "x/A-v0"\n')
    write(tmp_path / "eval", "eval", {"x": [1.0, 0.0], "y": [1.0, 1.0], "z": [0.0, 0.0]})
    (tmp_path / "eval" / "report.json").write_text('{"env": "x/B-v0"}')
    return out


def test_an_evaluation_of_a_run_and_one_of_its_own(run: Path) -> None:
    before = load(f"{run}:before")
    assert before.name == f"{run}:before"
    assert before.env == "x/A-v0"
    assert [(key[0], key[1], list(r)) for key, r in before.rewards.items()] == [
        ("test", "x", [0.0]), ("test", "y", [0.0]), ("test", "z", [1.0]),
    ]  # fmt: skip
    own = load(run.parent / "eval")
    assert own.env == "x/B-v0"
    assert [list(r) for r in own.rewards.values()] == [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    found = compare(f"{run}:before", run.parent / "eval")
    assert (found.gained, found.lost, found.attempts) == (("x", "y"), ("z",), (1, 2))
    assert found.pass_at_1.difference == pytest.approx((0.5 + 1 - 1) / 3)


def test_what_is_no_evaluation_is_named(run: Path, tmp_path: Path) -> None:
    known = f"{run}:after_rl, {run}:before"
    with pytest.raises(ConfigError, match=f"is a training run: name one of its evaluations, {known}"):
        load(run)
    with pytest.raises(ConfigError, match=f"{run} has no evaluation 'after'; it has {known}"):
        load(f"{run}:after")
    with pytest.raises(ConfigError, match=r"no such evaluation: nowhere\. Name a folder"):
        load("nowhere")
    with pytest.raises(ConfigError, match="no such evaluation: nowhere:before"):
        load("nowhere:before")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty holds no evaluation"):
        load(tmp_path / "empty")
    shard_path(run, "eval-before", 0).write_bytes(b"torn")
    with pytest.raises(ArealError, match="no readable trajectory shard"):
        load(f"{run}:before")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--compare", f"{run}:before", f"{run}:after_rl"]) == 0
    # differences 1, 1, 0: mean 2/3, variance 1/3, half width 4.303 · 1/3 = 1.434
    assert capsys.readouterr().out.splitlines() == [
        f"A: {run}:before    B: {run}:after_rl",
        "3 tasks, 1 and 1 attempts a task, paired by task",
        "",
        "        A      B      B - A   95 % CI",
        "──────────────────────────────────────────────",
        "pass@1  0.333  1.000  +0.667  -0.768 to +1.000",
        "reward  0.333  1.000  +0.667  -0.768 to +2.101",
        "",
        "tasks: 2 gained, 0 lost, 1 the same    p = 0.5 (exact McNemar test)",
        "gained: x, y",
        "no difference shown: anything from -76.8 to +100.0 points fits these tasks",
        "note: 3 tasks are few: the interval assumes 30 or more; evaluate more with --n",
    ]


def test_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["eval", "--compare", f"{run}:before", f"{run}:after_rl", "--json"]
    assert main([*argv, "-"]) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["n"], row["gained"], row["lost"], row["ties"]) == (3, ["x", "y"], [], 1)
    assert row["pass_at_1"]["difference"] == pytest.approx(2 / 3)
    assert captured.err.startswith("A: ")
    assert main([*argv, str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text()) == row


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name an environment (`areal-agents envs` lists them), or compare two evaluations: --compare A B"),
        (["a/B-v0"], "--model is missing: name the model to evaluate on a/B-v0"),
        (["a/B-v0", "--compare", "x", "y"], "--compare reads two finished evaluations and plays nothing: leave out EN"),
        (["--model", "m", "--compare", "x", "y"], "--compare reads two finished evaluations and plays nothing: leave "),
        (["a/B-v0", "--model", "m", "--common"], "--common belongs to --compare A B"),
    ],
)
def test_usage(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_different_tasks_on_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.parent / "other"
    write(other, "eval", {"x": [1.0], "q": [1.0]})
    argv = ["eval", "--compare", f"{run}:before", str(other)]
    assert main(argv) == 1
    assert capsys.readouterr().err.endswith("has 2, and 1 are in both: --common compares those\n")
    assert main([*argv, "--common"]) == 0
    assert "left out, not in both: 2 tasks of A, 1 of B" in capsys.readouterr().out


def test_long_lists_are_cut() -> None:
    found: Comparison = compare(once("a", [0] * 25), once("b", [1] * 25))
    (line,) = [line for line in found.table().splitlines() if line.startswith("gained: ")]
    assert line.endswith("t19 and 5 more (--json lists all)")


@pytest.mark.parametrize(("n", "rate"), [(50, 0.07), (100, 0.03), (128, 0.03), (128, 0.1), (512, 0.01)])
def test_the_interval_of_a_few_gained_tasks_covers_their_rate(n: int, rate: float) -> None:
    """By enumeration of how many of n tasks are gained. Student's t alone holds 84 to 90 % of the first three."""
    covered, before = 0.0, 0.0
    for gained in range(n + 1):
        low, high = pass_interval([1.0] * gained + [0.0] * (n - gained), [1] * n)
        chance = math.comb(n, gained) * rate**gained * (1 - rate) ** (n - gained)
        covered += chance * (low <= rate <= high)
        if gained < 20:
            assert high > before, "who gained more may have a larger rate"
            before = high
    assert covered >= 0.93
