"""The training loop's own parts: batches, metrics, warm start, the folder, and the split of the cores."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from areal_agents.algorithms.registry import Choice
from areal_agents.engines.local import engine_threads, threads_of
from areal_agents.env import Expert
from areal_agents.errors import ConfigError, EnvError, ModelError, RegistryError
from areal_agents.rollout.demonstrations import demonstration_rows, require_all
from areal_agents.settings.config import AlgorithmConfig, EngineConfig, TrainConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.backend import slow_formats
from areal_agents.trainer.batches import batch_of
from areal_agents.trainer.loop import train
from areal_agents.trainer.resume import refuse_taken
from areal_agents.trainer.rollout_metrics import rollout_metrics
from areal_agents.trainer.run_folder import RunFolder
from areal_agents.types import AssistantMessage, Completion, Group, Task, Trajectory, Turn
from tests.letters_env import Letters
from tests.tiny_models import tiny_chat_model

TASK = Task.make("t", split="train", seed=0, payload={})


def episode(*rewards: float, tokens: int = 3) -> Trajectory:
    turns = tuple(
        Turn((9, 9), Completion((5,) * tokens, (-1.0,) * tokens, (2,) * tokens, "stop"), AssistantMessage(()), r,
             parent=None if k == 0 else k - 1)
        for k, r in enumerate(rewards)
    )  # fmt: skip
    return Trajectory("e", TASK, "g", turns, True, False, "answer")


def group(*episodes: Trajectory) -> Group:
    return Group("g", TASK, episodes, 0, 0)


def test_a_batch_has_one_advantage_a_turn_and_counts_every_episode() -> None:
    # returns: episode 0 is 0 + 1 at turn 0 and 1 at turn 1; episode 1 ends after turn 0 with 0.5.
    # turn 0: 1 - 0.5 and 0.5 - 1; turn 1: nobody else is alive, baseline 0: 1.
    batch = batch_of([group(episode(0.0, 1.0), episode(0.5))], AlgorithmConfig(), 4, 0.7)
    assert (batch.episodes, batch.version, batch.temperature, len(batch.rows)) == (2, 4, 0.7, 2)
    first, second = batch.rows
    assert first.advantages[first.mask].tolist() == [0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
    assert second.advantages[second.mask].tolist() == [-0.5, -0.5, -0.5]
    assert [r.episode for r in batch.rows] == [0, 1]


def test_grpo_normalises_over_the_group() -> None:
    batch = batch_of(
        [group(episode(1.0), episode(0.0))], AlgorithmConfig(advantage=Choice("grpo", {"normalize": False})), 0, 1.0
    )
    assert [r.advantages[r.mask][0] for r in batch.rows] == [0.5, -0.5]


def test_metrics_are_means_over_episodes_never_over_turns() -> None:
    # four turns of reward 0 and one turn of reward 1: the mean over turns would be 0.2
    metrics = rollout_metrics([group(episode(0.0, 0.0, 0.0, 0.0), episode(1.0))], 3)
    assert (metrics["age"], metrics["age_max"]) == (1.0, 1.0)  # every token is of version 2
    assert metrics["reward"] == 0.5
    assert metrics["turns"] == 2.5
    assert metrics["groups_with_signal"] == 1.0
    assert metrics["sampled_tokens"] == 15.0


@pytest.mark.parametrize("rewards", [[0.7] * 3, [0.1 + 0.2, 0.3], [0.95] * 7])
def test_equal_rewards_are_no_signal(rewards: list[float]) -> None:
    groups = [group(*(episode(r) for r in rewards))]
    for choice in (Choice("turn_return"), Choice("grpo"), Choice("grpo", {"normalize": False})):
        batch = batch_of(groups, AlgorithmConfig(advantage=choice), 0, 1.0)
        assert not any(row.advantages.any() for row in batch.rows)
    assert rollout_metrics(groups, 3)["groups_with_signal"] == 0.0


def test_ten_tenths_solve_a_group() -> None:
    # 0.1 ten times is 0.9999999999999999.
    metrics = rollout_metrics([group(episode(*[0.1] * 10), episode(1.0)), group(episode(0.999), episode(1.0))], 3)
    assert (metrics["groups_solved"], metrics["groups_with_signal"]) == (0.5, 0.5)


def test_a_demonstration_without_reward_is_refused() -> None:
    assert demonstration_rows([episode(0.0, 1.0)])[0].mask.sum() == 6
    with pytest.raises(ConfigError, match="1 of 2 demonstrations earned no reward"):
        demonstration_rows([episode(1.0), episode(0.0)])


def test_a_missing_demonstration_is_refused() -> None:
    assert require_all([episode(1.0)], None) == [episode(1.0)]
    with pytest.raises(ConfigError, match=r"1 of 2 demonstrations failed: it broke\. Fix .* = 0") as caught:
        require_all([episode(1.0), None], EnvError("it broke"))
    assert isinstance(caught.value.__cause__, EnvError)


class ForgetsOne(Letters):
    """Its expert fails at one task of eight."""

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield "abc"
        if task.seed == 3:
            raise KeyError("gold")
        yield "abc"


@pytest.mark.slow
def test_an_expert_that_fails_at_one_task_stops_the_run(tmp_path: Path) -> None:
    tree = {
        "steps": 1, "out": tmp_path / "run", "env": {"id": "tests.trainer.test_loop:ForgetsOne"},
        "model": {"path": str(tiny_chat_model(tmp_path / "m")), "max_context": 128},
        "engine": {"precision": "fp32"}, "learner": {"precision": "fp32"},
        "rollout": {"groups": 1, "group_size": 2, "concurrency": 2, "max_turn_tokens": 8},
        "warm_start": {"demonstrations": 8}, "eval": {"n": 2, "baseline": False},
    }  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"1 of 8 demonstrations failed: the expert of task train-3 raised KeyError: 'gold'\. Fix"
    ):
        asyncio.run(train(TrainConfig.model_validate(tree), console=False))
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(r["task"], r["retried"]) for r in rows if r["kind"] == "episode_failed"] == [("train-3", False)]


def test_engines_and_learner_have_all_cores_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.engines.local.available_cores", lambda: 16)
    assert [engine_threads(EngineConfig(threads=n, replicas=r)) for n, r in ((0, 1), (0, 4), (6, 4), (0, 32))] == [
        16, 4, 1, 1,
    ]  # fmt: skip
    assert (threads_of("learner.threads", 0), threads_of("learner.threads", 3)) == (16, 3)
    with pytest.raises(ConfigError, match=r"learner\.threads = 17 exceeds the 16 cores of this process"):
        threads_of("learner.threads", 17)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    refuse_taken(RunFolder(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="holds another run"):
        refuse_taken(RunFolder(tmp_path / "run"))


def test_wrong_names_fail_before_anything_is_loaded(tmp_path: Path) -> None:
    bad_env = TrainConfig.model_validate({"out": tmp_path / "a", "env": {"id": "areal/Arithmetik-v0"}})
    with pytest.raises(RegistryError, match="areal/Arithmetic-v0"):
        asyncio.run(train(bad_env, console=False))
    bad_model = TrainConfig.model_validate(
        {
            "out": tmp_path / "b", "env": {"id": "tests.letters_env:Letters"}, "eval": {"n": 8},
            "model": {"path": str(tmp_path / "none")},
        }
    )  # fmt: skip
    with pytest.raises(ModelError):
        asyncio.run(train(bad_model, console=False))
    assert not (tmp_path / "a").exists()  # the next attempt, with the right name, may use the same folder


@pytest.mark.slow
def test_without_a_baseline_only_the_end_is_evaluated(tmp_path: Path) -> None:
    tree = {
        "steps": 1, "out": tmp_path / "run", "env": {"id": "tests.test_docs:Spelled"},
        "model": {"path": str(tiny_chat_model(tmp_path / "m")), "max_context": 128},
        "engine": {"precision": "fp32"}, "learner": {"precision": "fp32"},
        "rollout": {"groups": 1, "group_size": 2, "concurrency": 2, "max_turn_tokens": 4},
        "warm_start": {"demonstrations": 2}, "eval": {"n": 2, "baseline": False},
    }  # fmt: skip
    result = asyncio.run(train(TrainConfig.model_validate(tree), console=False))
    assert set(result.reports) == {"after_rl"}
    assert "before" not in result.table()


def test_formats_that_a_processor_lacks_are_named_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.utils.precision.cpu_flags", lambda: frozenset({"avx2"}))

    def slow(engine: str, learner: str, **cluster: object) -> list[str]:
        tree = {"engine": {"precision": engine}, "learner": {"precision": learner, "device": "cpu"}}
        return slow_formats(TrainConfig.model_validate(tree | {"cluster": cluster}))

    assert slow("bf16", "bf16") == ["engine.precision", "learner.precision"]
    assert slow("fp32", "bf16") == ["learner.precision"]
    assert slow("auto", "auto") == []
    on_ray = {"backend": "ray", "engine_gpus": 1, "learner_gpus": 1}
    tree = {"engine": {"kind": "vllm", "precision": "bf16"}, "learner": {"precision": "bf16"}, "cluster": on_ray}
    assert slow_formats(TrainConfig.model_validate(tree)) == []
    assert slow("bf16", "bf16", backend="ray") == ["engine.precision"]  # the learner's node is another one


@pytest.mark.slow
def test_a_format_that_the_processor_computes_in_software_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("areal_agents.utils.precision.cpu_flags", lambda: frozenset({"avx2"}))
    tree = {
        "steps": 1, "out": tmp_path / "run", "env": {"id": "tests.test_docs:Spelled"},
        "model": {"path": str(tiny_chat_model(tmp_path / "m")), "max_context": 128},
        "engine": {"precision": "bf16"}, "learner": {"precision": "bf16", "device": "cpu"},
        "rollout": {"groups": 1, "group_size": 2, "concurrency": 2, "max_turn_tokens": 4},
        "eval": {"n": 2, "baseline": False},
    }  # fmt: skip
    asyncio.run(train(TrainConfig.model_validate(tree)))
    said = capsys.readouterr().out
    assert said.count("note: engine.precision and learner.precision are bf16, which this processor computes in") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [r["settings"] for r in rows if r["kind"] == "slow_format"]
    assert told == [["engine.precision", "learner.precision"]]


@pytest.mark.slow
def test_the_demos_whole_path_on_few_tasks(tmp_path: Path, smollm2: Path) -> None:
    """Real model, real sandbox, warm start, two asynchronous steps, evaluations, and the files they leave."""
    config = TrainConfig.model_validate(
        {
            "steps": 2,
            "out": tmp_path / "run",
            "rollout": {"groups": 1, "group_size": 4, "concurrency": 4, "max_turn_tokens": 64},
            "warm_start": {"demonstrations": 16, "batch": 2, "lr": 5e-5},
            "eval": {"n": 4},
        }
    )
    result = asyncio.run(train(config, console=False))
    assert set(result.reports) == {"before", "warm_start", "after_rl"}
    assert result.reports["before"].valid_call_rate == 0.0
    assert result.reports["warm_start"].valid_call_rate >= 0.5
    rows = read_metrics(tmp_path / "run", kind="train")
    assert [r["step"] for r in rows] == [1, 2]
    assert all(r["age_max"] <= 1 for r in rows)
    saved = [r.trajectory for r in read_records(tmp_path / "run", kind="train")]
    assert len(saved) == 8  # two groups of four
    assert {t.task.split for t in saved} == {"train"}
    held_out = [r.trajectory for r in read_records(tmp_path / "run", kind="eval-after_rl")]
    assert {t.task.split for t in held_out} == {"test"}
    assert not {t.task.content_hash for t in held_out} & {t.task.content_hash for t in saved}
    assert (result.model / "model.safetensors").is_file()
