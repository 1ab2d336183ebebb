"""Several environments in one run: shares, evaluations, metrics and advantages of each, and going on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ArealError, ConfigError
from areal_agents.evaluation.compare import compare
from areal_agents.evaluation.curves import read_numbers
from areal_agents.evaluation.look import advantages_of
from areal_agents.evaluation.report import EvalReport
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.evaluation.statistics import mean_of_intervals
from areal_agents.rollout.shares import Shares
from areal_agents.settings.config import AlgorithmConfig, TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.batches import batch_of
from areal_agents.trainer.loop import RunResult, train
from areal_agents.trainer.parts import mean_numbers, parts_of
from areal_agents.trainer.preflight import look_at_tasks, require_runnable
from areal_agents.types import Task
from tests.tiny_models import tiny_chat_model
from tests.trainer.mixed_envs import Hundred, Letters
from tests.trainer.test_loop import episode, group

HERE, ENVS = __name__, "tests.trainer.mixed_envs"
STEPS, B, G = 4, 3, 3
MIXTURE: list[dict[str, Any]] = [
    {"id": f"{ENVS}:Letters", "weight": 2, "label": "a"}, {"id": f"{ENVS}:Hundred", "label": "b"},
]  # fmt: skip


def config(folder: Path, name: str, *, steps: int = STEPS, **changes: Any) -> TrainConfig:
    if not (folder / "model").exists():
        tiny_chat_model(folder / "model")
    tree: dict[str, Any] = {
        "steps": steps, "out": folder / name, "env": MIXTURE,
        "model": {"path": str(folder / "model"), "max_context": 128},
        "engine": {"precision": "fp32", "max_batch": 9, "deterministic": True},
        "learner": {"precision": "fp32", "lr": 3e-3},
        "algorithm": {"advantage": {"kind": "reinforce_pp"}, "normalize": "batch"},
        "rollout": {"mode": "sync", "groups": B, "group_size": G, "concurrency": B * G, "max_turn_tokens": 6},
        "eval": {"n": 3, "temperature": 1.0}, "checkpoint": {"every": 1}, "track": {"tensorboard": False},
    }  # fmt: skip
    return TrainConfig.model_validate(tree | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixture")


@pytest.fixture(scope="module")
def whole(folder: Path) -> RunResult:
    return asyncio.run(train(config(folder, "whole"), console=False))


def played(out: Path) -> dict[tuple[int, str], Any]:
    """Task, environment and tokens of every training episode."""
    return {
        (r.step, r.trajectory.id): (r.trajectory.task, [t.completion.ids for t in r.trajectory.turns])
        for r in read_records(out, kind="train")
    }


def test_groups_have_their_shares(whole: RunResult) -> None:
    run, shares = SavedRun.open(whole.out), Shares([2.0, 1.0], seed=0)
    records = list(read_records(whole.out, kind="train"))
    groups = {(r.step, r.trajectory.group, r.trajectory.task.payload["word"].split()[0]) for r in records}
    by_env = Counter(env for _, _, env in groups)
    assert by_env == {"letters": STEPS * B * 2 // 3, "hundred": STEPS * B // 3}
    for step, group_id, env in groups:
        place = shares.at(int(group_id.removeprefix("g")))
        assert env == ("letters", "hundred")[place]
        assert run.env_of("train", group_id) == ("a", "b")[place]
        assert (step - 1) * B <= int(group_id.removeprefix("g")) < step * B  # in sync mode


def test_each_environment_has_its_metrics(whole: RunResult) -> None:
    rows = read_metrics(whole.out, kind="train")
    records = list(read_records(whole.out, kind="train"))
    for row in rows:
        own = {"a": [], "b": []}  # type: ignore[var-annotated]
        for r in (r for r in records if r.step == row["step"]):
            own["a" if r.trajectory.task.payload["word"].startswith("letters") else "b"].append(r.trajectory)
        for label, episodes in own.items():
            mean = sum(t.reward for t in episodes) / len(episodes)
            assert row[f"env/{label}/reward"] == pytest.approx(mean)
            assert row[f"env/{label}/pass_rate"] == sum(t.reward >= 1 for t in episodes) / len(episodes)
            assert row[f"env/{label}/episodes"] == len(episodes)
            assert row[f"env/{label}/episode_tokens"] == sum(t.sampled_tokens for t in episodes) / len(episodes)
            assert row[f"env/{label}/age_share/0"] == 1.0
            assert row[f"env/{label}/dropped_share"] == 0.0
            assert 0 <= row[f"env/{label}/truncation_rate"] <= 1
        assert (row["env/a/groups"], row["env/b/groups"]) == (2, 1)
        assert row["env/a/groups_begun"] == 2 * row["env/b/groups_begun"]
        assert row["reward"] == pytest.approx((2 * row["env/a/reward"] + row["env/b/reward"]) / 3)


def test_each_environment_is_evaluated_and_the_mean_is_told(whole: RunResult) -> None:
    assert list(whole.reports) == ["before.a", "before.b", "after_rl.a", "after_rl.b"]
    assert (whole.reports["before.a"].env, whole.reports["before.b"].env) == (f"{ENVS}:Letters", f"{ENVS}:Hundred")
    for label in ("before", "after_rl"):
        a, b = (whole.reports[f"{label}.{name}"] for name in "ab")
        (row,) = read_metrics(whole.out, kind=f"eval/{label}")
        assert row["pass_at_1"] == pytest.approx((2 * a.pass_at_1 + b.pass_at_1) / 3)
        assert row["pass_at_1_macro"] == pytest.approx((a.pass_at_1 + b.pass_at_1) / 2)
        assert row["reward"] == pytest.approx((2 * a.reward + b.reward) / 3)
        assert (row["n"], row["step"]) == (6, 0 if label == "before" else STEPS)
        assert len(list(read_records(whole.out, kind=f"eval-{label}.a"))) == 3
        assert f"mean, {label}: pass@1 {row['pass_at_1']:.3f}" in whole.table()
    (drawn,) = read_numbers([whole.out])
    assert [row["kind"] for row in drawn.held_out] == ["eval/before", "eval/after_rl"]  # one point a step
    found = compare_labels(whole.out, "before.a", "after_rl.a")
    assert found.n == 3
    with pytest.raises(ConfigError, match="before"):
        compare_labels(whole.out, "before.c", "after_rl.a")


def compare_labels(out: Path, one: str, two: str) -> Any:
    return compare(f"{out}:{one}", f"{out}:{two}")


def test_the_means_by_hand() -> None:
    parts = parts_of(TrainConfig.model_validate({"env": MIXTURE}))
    a, b = (report(0.5, (0.3, 0.7), 1.0), report(0.2, (0.1, 0.5), 7.0))
    found = mean_numbers(parts, [a, b])
    assert found["pass_at_1"] == pytest.approx(0.4)
    assert found["pass_at_1_macro"] == pytest.approx(0.35)
    assert [found["reward"], found["reward_macro"], found["n"]] == pytest.approx([3.0, 4.0, 20])
    macro, (low, high) = mean_of_intervals([0.5, 0.2], [(0.3, 0.7), (0.1, 0.5)])
    assert (found["pass_at_1_macro"], found["ci95_macro_low"], found["ci95_macro_high"]) == (macro, low, high)
    # By weights: 2/3 and 1/3 of the distances 0.2 and 0.1 below, 0.2 and 0.3 above.
    assert found["ci95_low"] == pytest.approx(0.4 - ((0.4 / 3) ** 2 + (0.1 / 3) ** 2) ** 0.5)
    assert found["ci95_high"] == pytest.approx(0.4 + ((0.4 / 3) ** 2 + (0.3 / 3) ** 2) ** 0.5)


def report(rate: float, ci95: tuple[float, float], reward: float) -> EvalReport:
    return EvalReport(
        "e", "test", "m", 0, 0.0, 0, 10, 1, 10, pass_at_1=rate, ci95=ci95, pass_at_k=None, pass_hat_k=None,
        reward=reward, valid_call_rate=0.0, accuracy_given_valid=None, malformed_call_rate=0.0, truncation_rate=0.0,
        infra_rate=0.0, turns=1.0, tokens=1.0, seconds=1.0,
    )  # fmt: skip


def test_a_run_that_is_cut_and_goes_on_is_the_run_that_was_never_cut(folder: Path, whole: RunResult) -> None:
    asyncio.run(train(config(folder, "cut", steps=2), console=False))
    result = asyncio.run(train(config(folder, "cut"), resume=True, console=False))
    assert played(result.out) == played(whole.out)
    assert set(result.reports) == {*whole.reports, "step_2.a", "step_2.b"}
    same = ("pass_at_1", "reward", "n")
    for label in whole.reports:
        assert [getattr(result.reports[label], n) for n in same] == [getattr(whole.reports[label], n) for n in same]
    kept = read_metrics(result.out, kind="eval/step_2")
    assert [row["step"] for row in kept] == [2]
    assert "pass_at_1_macro" in kept[0]
    assert len(list(read_records(result.out, kind="eval-step_2.b"))) == 3
    loaded = settings.load(result.out / "config.toml")
    assert loaded == config(folder, "cut")
    other = config(folder, "cut", steps=5, env=[MIXTURE[0] | {"weight": 3}, MIXTURE[1]])
    with pytest.raises(ConfigError, match=r"env\.a\.weight was 2\.0 and is 3\.0 now; .* the checkpoint of step 4"):
        asyncio.run(train(other, resume=True, console=False))
    slower = config(folder, "cut", env=[MIXTURE[0] | {"step_timeout": 90.0}, MIXTURE[1]])
    assert asyncio.run(train(slower, resume=True, console=False)).reports == result.reports  # that may change


def test_saved_episodes_are_those_of_their_environment(whole: RunResult) -> None:
    run = SavedRun.open(whole.out)
    records = [r for r in read_records(whole.out, kind="train") if r.step == 2]
    for record in records:
        own = run.of(record)
        name = record.trajectory.task.payload["word"].split()[0]
        assert own.spec.env_class().__name__.lower() == name
        found, why = advantages_of(run, record)
        assert (len(found or []), why) == (1, "")
    evaluated = next(iter(read_records(whole.out, kind="eval-before.b")))
    assert run.of(evaluated).spec.env_class() is Hundred
    with pytest.raises(ArealError, match=r"has several environments \(a, b\)"):
        run.spec  # noqa: B018
    by_step: dict[str, list[float]] = {"a": [], "b": []}
    for record in records:
        by_step[run.env_of("train", record.trajectory.group)] += advantages_of(run, record)[0] or []
    for advantages in by_step.values():  # each environment of the step is normalised by itself
        assert sum(advantages) == pytest.approx(0.0, abs=1.0)
        assert max(map(abs, advantages), default=0.0) < 5.0


@pytest.mark.parametrize("more", [{}, {"normalize": "batch"}])
@pytest.mark.parametrize("kind", ["reinforce_pp", "grpo"])
def test_advantages_are_those_of_each_environment_as_a_batch_of_its_own(kind: str, more: Mapping[str, Any]) -> None:
    algorithm = AlgorithmConfig(advantage=Choice(kind), **more)
    small = [group(episode(0.0), episode(1.0)), group(episode(1.0), episode(1.0))]
    large = [group(episode(0.0), episode(300.0)), group(episode(100.0), episode(0.0))]

    def advantages(groups: Sequence[Any]) -> list[list[float]]:
        return [row.advantages[row.mask].tolist() for row in batch_of(groups, algorithm, 0, 1.0).rows]

    a, b = ([replace(g, env=env) for g in groups] for groups, env in ((small, "a"), (large, "b")))
    alone = advantages(small), advantages(large)
    assert advantages([a[0], b[0], b[1], a[1]]) == [*alone[0][:2], *alone[1], *alone[0][2:]]
    together = advantages([small[0], large[0], large[1], small[1]])
    assert (together != advantages([a[0], b[0], b[1], a[1]])) is (kind == "reinforce_pp" or bool(more))


# --- what is refused, and what is looked at --------------------------------------------------------------------------


class Leaked(Letters):
    """Its training tasks hold two that the other environment is evaluated on."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        held = Hundred.tasks("test")
        own = super().tasks(split, difficulty=difficulty)
        if split == "test":
            return own
        leaks = [replace(held[0], id="leak-0", split="train"), replace(held[1], id="leak-1", split="train")]
        return [*own, *leaks]


def mixed(*envs: Mapping[str, Any], **more: Any) -> TrainConfig:
    tree = {"env": list(envs), "model": {"path": "tiny"}, "eval": {"n": 4}} | more
    return TrainConfig.model_validate(tree)


def test_held_out_tasks_of_every_environment_are_compared_with_the_training_tasks_of_each() -> None:
    leaked, hundred = {"id": f"{HERE}:Leaked"}, {"id": f"{ENVS}:Hundred"}
    every = {"n": 12, "overlap": "tell"}
    looks = asyncio.run(look_at_tasks(mixed(leaked, hundred, eval=every)))
    found = {(o.train, o.held_out): [pair[:2] for pair in o.pairs] for o in looks.overlaps}
    names = f"{HERE}:Leaked", f"{ENVS}:Hundred"
    train, test = ({n: f"{n}:{split} ({n.split(':')[1]})" for n in names} for split in ("train", "test"))
    assert found == {
        (train[names[0]], test[names[0]]): [],
        (train[names[0]], test[names[1]]): [("leak-0", "test-0-0"), ("leak-1", "test-0-1")],
        (train[names[1]], test[names[0]]): [],
        (train[names[1]], test[names[1]]): [],
    }
    with pytest.raises(ConfigError, match=r"test \(Hundred\) are not held out: .*train \(Leaked\) has them"):
        asyncio.run(look_at_tasks(mixed(leaked, hundred, eval={"n": 12})))


def test_a_run_with_a_broken_environment_is_refused_before_it_begins(tmp_path: Path) -> None:
    letters = {"id": f"{ENVS}:Letters"}
    for env, message in (
        ({"id": f"{ENVS}:Nothing"}, "has no class 'Nothing'"),
        ({"id": f"{ENVS}:Hundred", "split": "rain"}, "has no split 'rain'"),
        ({"id": f"{ENVS}:Hundred", "kwargs": {"a": 1}}, "does not take env.kwargs"),
        ({"id": f"{ENVS}:Hundred", "difficulty": 1.5}, "must lie in"),
    ):
        with pytest.raises(ArealError, match=message):
            require_runnable(config(tmp_path, "run", env=[letters, env]))
    with pytest.raises(ConfigError, match=r"mixed_envs:Letters:test has 12 tasks, but eval\.n = 13"):
        require_runnable(config(tmp_path, "run", env=[letters, {"id": f"{ENVS}:Hundred"}], eval={"n": 13}))
    with pytest.raises(ConfigError, match=r"warm_start\.demonstrations = 1: .*Hundred has no expert for 1"):
        require_runnable(
            config(tmp_path, "run", env=[{"id": "areal/Arithmetic-v0", "weight": 2}, {"id": f"{ENVS}:Hundred"}],
                   warm_start={"demonstrations": 3})
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_mixture_are_in_its_folder(whole: RunResult) -> None:
    text = (whole.out / "config.toml").read_text()
    assert text.count("[[env]]") == 2
    assert "\n[env]" not in text
    commit = json.loads((whole.out / "commit.json").read_text())
    assert commit["complete"] is True
    stream = json.loads((whole.out / "checkpoints" / commit["checkpoint"] / "rollouts.json").read_text())["stream"]
    assert list(stream["parts"]) == ["a", "b"]
