"""Evaluations judged by task, and what rescoring and replaying make of a group's reward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.errors import InfraError, TaskError
from areal_agents.evaluation.attempts import Place, run_attempts
from areal_agents.evaluation.replay import replay
from areal_agents.evaluation.rescore import RunReward, load_reward, rescore
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.group_reward import declaration, group_reward, with_group_verdict
from areal_agents.reward import Episode, Verdict
from areal_agents.rollout.group_judge import GroupJudge, NamedGroupReward
from areal_agents.rollout.player import LocalPlayer
from areal_agents.rollout.rebuilt import spoken_answer
from areal_agents.rollout.retries import EpisodeRunner, FailureBudget
from areal_agents.settings.config import TrainConfig
from areal_agents.tracking.trajectories import Record, read_shard, write_shard
from areal_agents.types import Task, Trajectory
from tests.rollout.test_producer import SAY, TASKS
from tests.saved_runs import Mixed, content, record, save, training_run
from tests.scripted import LIMITS, Script, ScriptedEnv, ScriptedPolicy

HERE = "tests.evaluation.test_group_rewards"


@group_reward(reads_others=True)
def places(episodes: Sequence[Episode]) -> list[Verdict]:
    return [Verdict(float(i), {"place": float(i)}) for i in range(len(episodes))]


@group_reward(reads_others=False, adds=True)
def bonus(episodes: Sequence[Episode]) -> list[float]:
    return [10.0] * len(episodes)


@group_reward(reads_others=True)
def fails_on_t1(episodes: Sequence[Episode]) -> list[float]:
    if episodes[0].task.id == "t1":
        raise KeyError("t1")
    return [1.0] * len(episodes)


class MixedRanked(Mixed):
    group_rubric = staticmethod(places)


# --- evaluation ------------------------------------------------------------------------------------------------------

Rows = list[tuple[Task, list[Trajectory | None]]]


def away(k: int) -> None:
    raise InfraError("the engine is away")


def attempts(
    reward: Any, *, k: int = 2, saved: dict[Place, Trajectory] | None = None, lost: bool = False
) -> tuple[Rows, EpisodeRunner, Script]:
    async def play() -> tuple[Rows, EpisodeRunner, Script]:
        script = Script(on_step=away if lost else lambda k: None)
        judge = GroupJudge(NamedGroupReward(reward, declaration(reward, "it"), "it"), spoken_answer, timeout=60.0)
        player = LocalPlayer(lambda: ScriptedEnv(script), lambda task: ScriptedPolicy(SAY), LIMITS)
        runner = EpisodeRunner(player, FailureBudget(window=32, share=1.0), max_retries=1, group_judge=judge)
        try:
            rows = await run_attempts(runner, TASKS[:3], k=k, concurrency=4, seed=5, label="test", saved=saved or {})
        finally:
            await runner.close()
        return rows, runner, script

    return asyncio.run(play())


def rewards(rows: Rows) -> list[list[float | None]]:
    return [[None if t is None else t.reward for t in tries] for _, tries in rows]


def test_the_attempts_at_a_task_are_judged_together() -> None:
    rows, _, _ = attempts(places, k=3)
    assert rewards(rows) == [[0.0, 1.0, 2.0]] * 3
    assert [[t.turns[-1].own[0] for t in tries if t] for _, tries in rows] == [[1.0] * 3] * 3


def test_a_task_that_cannot_be_judged_has_no_score_and_is_no_zero() -> None:
    @group_reward(reads_others=True)
    def picky(episodes: Sequence[Episode]) -> list[float]:
        if episodes[0].task.id == "task-0":
            raise InfraError("away")
        if episodes[0].task.id == "task-1":
            raise TaskError("no gold")
        return [1.0] * len(episodes)

    rows, runner, _ = attempts(picky)
    assert rewards(rows) == [[None, None], [None, None], [1.0, 1.0]]
    assert list(runner.left_out) == ["task-1"]
    assert runner.budget.kinds == {"InfraError": 2}


def test_an_attempt_that_lost_its_siblings_has_no_score_where_attempts_are_compared() -> None:
    played, _, _ = attempts(bonus)
    own = {(i, j): with_own(t) for i, (_, tries) in enumerate(played) for j, t in enumerate(tries) if t is not None}
    assert rewards(attempts(places, k=2, saved=own)[0]) == [[0.0, 1.0]] * 3  # nothing is left to play
    assert rewards(attempts(places, k=3, saved=own, lost=True)[0]) == [[0.0, 1.0, None]] * 3
    alone = {place: t for place, t in own.items() if place[1] == 0}
    assert rewards(attempts(places, k=2, saved=alone, lost=True)[0]) == [[None, None]] * 3
    assert rewards(attempts(bonus, k=2, saved=alone, lost=True)[0]) == [[11.0, None]] * 3


def test_a_later_sitting_judges_what_an_earlier_one_played() -> None:
    played, _, _ = attempts(bonus)
    own = {(i, j): with_own(t) for i, (_, tries) in enumerate(played) for j, t in enumerate(tries) if t is not None}
    rows, _, script = attempts(places, saved=own)  # all was played, nothing judged
    assert (rewards(rows), script.made) == ([[0.0, 1.0]] * 3, 0)
    del own[1, 0]
    rows, _, script = attempts(places, saved=own)
    assert (rewards(rows), script.made) == ([[0.0, 1.0]] * 3, 1)
    judged = {(i, j): t for i, (_, tries) in enumerate(rows) for j, t in enumerate(tries) if t is not None}

    @group_reward(reads_others=True)
    def never(episodes: Sequence[Episode]) -> list[float]:
        raise AssertionError("asked again")

    assert rewards(attempts(never, saved=judged)[0]) == [[0.0, 1.0]] * 3


def with_own(t: Trajectory) -> Trajectory:
    """The episode as it was before its group's reward."""

    turns = [replace(x, reward=x.own[0], components=x.own[1], own_reward=None, own_components=None) for x in t.turns]
    return replace(t, turns=tuple(turns))


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_whose_is_written_and_read_back(tmp_path: Path) -> None:
    plain = record(0, 0, 0.1, 0.2)
    judged = Record("train", 1, with_group_verdict(plain.trajectory, Verdict(0.7, {"place": 1.0}), adds=True))
    write_shard(tmp_path / "step-000001.parquet", [plain, judged])
    assert read_shard(tmp_path / "step-000001.parquet") == [plain, judged]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two groups, their episodes written out of order."""
    records = [record(0, 2, 0.2), record(0, 0, 0.0), record(1, 0, 0.5, 0.5, task=1), record(0, 1, 0.1)]
    records.append(record(1, 1, 1.0, task=1))
    config = TrainConfig.model_validate({"out": tmp_path / "run", "env": {"id": "tests.saved_runs:Mixed"}})
    save(tmp_path / "run", config, records)
    return tmp_path / "run"


def test_a_group_reward_rescores_whole_groups_in_the_order_of_their_ids(small: Path) -> None:
    paths = SavedRun.open(small).shards("train")
    done = asyncio.run(rescore(paths, load_reward(f"{HERE}:places"), keep=True))
    assert {e.id: e.new_K for e in done.episodes} == {
        "g0/0": (0.0,), "g0/1": (1.0,), "g0/2": (2.0,), "g1/0": (0.0, 0.0), "g1/1": (1.0,),
    }  # fmt: skip
    assert [e.id for e in done.episodes] == ["g0/2", "g0/0", "g1/0", "g0/1", "g1/1"]  # as in the file
    assert [r.trajectory.turns[-1].own_reward for r in done.records] == [0.2, 0.0, 0.5, 0.1, 1.0]
    added = asyncio.run(rescore(paths, bonus))
    assert [e.new for e in added.episodes] == pytest.approx([10.2, 10.0, 11.0, 10.1, 11.0])
    both = asyncio.run(rescore(paths, RunReward(lambda episode: 3.0, bonus)))
    assert [e.new for e in both.episodes] == [13.0] * 5


def test_an_environments_rubrics_are_both_taken() -> None:
    assert load_reward(f"{HERE}:MixedRanked") == RunReward(Mixed.rubric, places)
    assert load_reward("tests.saved_runs:Mixed") is Mixed.rubric


def test_a_group_that_the_reward_fails_on_is_counted_and_no_zero(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(small)
    done = asyncio.run(rescore(SavedRun.open(small).shards("train"), fails_on_t1))
    assert sorted(f.episode for f in done.failures) == ["g1/0", "g1/1"]
    assert {e.id: e.new_K for e in done.episodes if e.new_K} == {"g0/0": (1.0,), "g0/1": (1.0,), "g0/2": (1.0,)}
    assert main(["rescore", str(small), "--reward", f"{HERE}:fails_on_t1"]) == 1
    assert "the reward failed on 2 of 5 episodes: 2 × KeyError" in capsys.readouterr().err
    assert main(["rescore", str(small), "--reward", f"{HERE}:places", "--out", str(small.parent / "new.parquet")]) == 0
    assert [r.trajectory.reward for r in read_shard(small.parent / "new.parquet")] == [2.0, 0.0, 0.0, 1.0, 1.0]
    assert content(small) == before


def test_a_group_reward_that_training_refuses_is_told(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rescore", str(small), "--reward", f"{HERE}:places"]) == 0
    out = capsys.readouterr().out
    assert "a training refuses it: algorithm.advantage.kind = 'turn_return' compares an episode with the others" in out
    assert main(["rescore", str(small), "--reward", f"{HERE}:bonus"]) == 0
    assert "refuses" not in capsys.readouterr().out


def test_a_doubtful_verdict_of_the_group_stands_in_the_metrics(small: Path) -> None:
    @group_reward(reads_others=True)
    def doubtful(episodes: Sequence[Episode]) -> list[Verdict]:
        return [Verdict(0.0, status="unverifiable") for _ in episodes]

    done = asyncio.run(rescore(SavedRun.open(small).shards("train"), doubtful, keep=True))
    assert [e.status for e in done.episodes] == ["unverifiable"] * 5
    assert [r.trajectory.metrics.get("unverifiable") for r in done.records] == [1.0] * 5


def test_replay_compares_what_the_episode_itself_earned(tmp_path: Path) -> None:
    run = training_run(tmp_path / "run", steps=1)
    judged = with_group_verdict(run[0].trajectory, Verdict(9.0, {"place": 1.0}), adds=False)
    saved = SavedRun.open(tmp_path / "run")
    report = asyncio.run(replay(Record("train", 1, judged), saved.make_env, seed=saved.env_seed(run[0])))
    assert report.identical
    assert "not replayed: the reward of its group" in report.text()
    alone = asyncio.run(replay(run[0], saved.make_env, seed=saved.env_seed(run[0])))
    assert "not replayed" not in alone.text()
