"""Training with a group's reward: refused where it would be biased, else in the loop, the files, and resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_agents.errors import ConfigError, TaskError
from areal_agents.evaluation.evaluate import evaluate
from areal_agents.evaluation.rescore import load_reward, rescore
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.group_reward import group_reward
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards import agreement, majority
from areal_agents.rewards.shaping import kimi_length
from areal_agents.settings.config import EnvConfig, TrainConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.trainer.preflight import look_at_tasks, require_runnable
from areal_agents.types import AssistantMessage, Task
from tests.letters_env import Letters, share_of_letters
from tests.tiny_models import tiny_chat_model

HERE = "tests.trainer.test_group_reward"


def letters(episode: Episode) -> float:
    return sum(share_of_letters(m.text) for m in episode.messages if isinstance(m, AssistantMessage)) / 2


@group_reward(reads_others=True)
def ranks(episodes: Sequence[Episode]) -> list[Verdict]:
    """The share of the others that have fewer letters."""
    found = [letters(e) for e in episodes]
    beaten = [sum(x > y for y in found) / max(1, len(found) - 1) for x in found]
    return [Verdict(share, {"rank": share}) for share in beaten]


@group_reward(reads_others=False, adds=True)
def bonus(episodes: Sequence[Episode]) -> list[float]:
    return [0.5] * len(episodes)


votes, label = agreement("answer"), majority("answer")


class Ranked(Letters):
    group_rubric = ranks  # type: ignore[assignment]  # no method: it is read from the class


def of(**sections: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "steps": 2,
        "model": {"path": "smollm2", "max_context": 128},
        "env": {"id": "tests.letters_env:Letters"},
        "engine": {"precision": "fp32", "max_batch": 8},
        "rollout": {"groups": 2, "group_size": 4, "concurrency": 8, "max_turn_tokens": 6},
        "learner": {"lr": 1e-3, "precision": "fp32"},
        "eval": {"n": 2, "k": 2, "temperature": 1.0, "baseline": False},
        "algorithm": {"advantage": "grpo"},
        "track": {"tensorboard": False},
    }
    for name, value in sections.items():
        base[name] = base.get(name, {}) | value if isinstance(value, dict) else value
    return TrainConfig.model_validate(base)


@pytest.mark.parametrize(
    ("advantage", "name", "message"),
    [
        (
            "turn_return",
            "ranks",
            "'turn_return' compares an episode with the others .*'ranks' reads the other",
        ),
        ("turn_return", "label", "'majority' reads the other episodes"),
        ("turn_return", "votes", None),
        ("turn_return", "bonus", None),
        ("grpo", "ranks", None),
        ("grpo", "label", None),
        ({"kind": "grpo", "normalize": False}, "label", None),
        ("turn_return", "letters", "does not declare `adds` and `reads_others`"),
    ],
)
def test_a_reward_that_would_be_its_own_baseline_is_refused_before_anything_starts(
    tmp_path: Path, advantage: Any, name: str, message: str | None
) -> None:
    config = of(out=tmp_path / "run", algorithm={"advantage": advantage}, rollout={"group_reward": f"{HERE}:{name}"})
    if message is None:
        return require_runnable(config)
    with pytest.raises(ConfigError, match=message):
        asyncio.run(train(config, console=False))
    return None


@pytest.mark.parametrize("kind", ["grpo", "turn_return"])
def test_votes_in_groups_of_two_have_no_gradient_and_are_refused(kind: str) -> None:
    voted = {"group_reward": f"{HERE}:votes", "group_size": 2}
    with pytest.raises(ConfigError, match=r"rollout.group_size = 2: .* leave-one-out votes of 'agreement'.*3 or more"):
        require_runnable(of(algorithm={"advantage": kind}, rollout=voted))
    require_runnable(of(algorithm={"advantage": kind}, rollout=voted | {"group_size": 3}))
    require_runnable(of(algorithm={"advantage": kind}, rollout=voted | {"group_reward": f"{HERE}:bonus"}))


def test_the_environments_own_group_reward_is_looked_at_too(tmp_path: Path) -> None:
    env = {"id": f"{HERE}:Ranked"}
    with pytest.raises(ConfigError, match="'ranks' reads the other episodes"):
        require_runnable(of(env=env, algorithm={"advantage": "turn_return"}))
    require_runnable(of(env=env, algorithm={"advantage": "turn_return"}, rollout={"group_reward": f"{HERE}:bonus"}))
    with pytest.raises(ConfigError, match=r"eval.k = 1: the environment's group reward 'ranks'"):
        require_runnable(of(env=env, eval={"k": 1}))
    with pytest.raises(ConfigError, match=r"eval.k = 1: the environment's group reward 'ranks'"):
        asyncio.run(evaluate(f"{HERE}:Ranked", model=tmp_path, n=1, out=tmp_path / "out"))


class Solved:
    """Whether an answer has few letters; it finds the held-out tasks good and every odd training task bad."""

    def __call__(self, episode: Episode) -> bool:
        return share_of_letters(episode.answer or "") < 0.5

    def require_scorable(self, task: Task) -> None:
        if task.split == "train" and task.seed % 2:
            raise TaskError("odd")


solved = Solved()
shorter = kimi_length(solved, weight=0.5)


def test_the_tasks_are_looked_at_for_what_a_group_reward_asks_too() -> None:
    looks = asyncio.run(look_at_tasks(of(rollout={"group_reward": f"{HERE}:shorter", "max_bad_tasks": 1.0})))
    assert looks.parts[""].train.bad
    assert set(looks.parts[""].train.bad.values()) == {"odd"}
    assert not looks.parts[""].held_out.bad
    assert [*Shorter.task_checks()] == [solved.require_scorable]


class Shorter(Letters):
    group_rubric = shorter


@pytest.mark.slow
def test_kimis_lengths_are_added_in_the_loop(tmp_path: Path) -> None:
    """λ = 0.5 − (tokens − fewest) / (most − fewest) of what was sampled, half of it, beside the own reward."""
    config = of(
        out=tmp_path / "run", model={"path": str(tiny_chat_model(tmp_path / "model"))}, steps=1,
        rollout={"group_reward": f"{HERE}:shorter", "max_bad_tasks": 1.0, "max_turn_tokens": 24},
    )  # fmt: skip
    asyncio.run(train(config, console=False))
    episodes = [r.trajectory for r in read_records(tmp_path / "run", kind="train")]
    assert len(episodes) == 8
    assert not [t for t in episodes if "unverifiable" in t.metrics]
    for name in {t.group for t in episodes}:
        group = [t for t in episodes if t.group == name]
        tokens = [sum(len(turn.completion.ids) for turn in t.turns) for t in group]
        few, many = min(tokens), max(tokens)
        for t, n in zip(group, tokens, strict=True):
            own = sum(turn.own[0] for turn in t.turns)
            factor = 0.5 - (n - few) / (many - few) if many > few else 0.0
            answered = t.stop_reason == "answer" and not t.truncated
            right = share_of_letters(t.turns[-1].message.spoken if answered else "") < 0.5
            assert t.reward - own == pytest.approx(0.5 * (factor if right else min(0.0, factor)))


@pytest.mark.slow
def test_a_run_learns_from_its_groups_and_its_files_say_what_of_a_reward_is_whose(tmp_path: Path) -> None:
    model = str(tiny_chat_model(tmp_path / "model"))
    out = tmp_path / "run"
    config = of(out=out, model={"path": model}, rollout={"group_reward": f"{HERE}:ranks"}, checkpoint={"every": 1})
    result = asyncio.run(train(config, console=False))
    episodes = [r.trajectory for r in read_records(out, kind="train")]
    assert len(episodes) == 2 * 2 * 4
    for group in {t.group for t in episodes}:
        mine = [t for t in episodes if t.group == group]
        found = [sum(share_of_letters(turn.message.text) for turn in t.turns) / 2 for t in mine]
        assert [t.reward for t in mine] == [sum(x > y for y in found) / 3 for x in found]
        assert [sum(turn.own[0] for turn in t.turns) for t in mine] == pytest.approx(found)
        assert [t.turns[-1].components["group.rank"] for t in mine] == [t.reward for t in mine]
    evaluated = [r.trajectory for r in read_records(out, kind="eval-after_rl")]
    assert len(evaluated) == 2 * 2
    assert all(turn.own_reward is None for t in evaluated for turn in t.turns)  # held out, by the environment's own

    done = asyncio.run(rescore(SavedRun.open(out).shards("train"), load_reward(f"{HERE}:ranks"), keep=True))
    assert not done.failures
    assert [e.new_K for e in done.episodes] == [e.old_K for e in done.episodes]
    assert [r.trajectory for r in done.records] == episodes
    added = asyncio.run(rescore(SavedRun.open(out).shards("train"), bonus))
    own = [[turn.own[0] for turn in t.turns] for t in episodes]
    assert [list(e.new_K or ()) for e in added.episodes] == [[*rewards[:-1], rewards[-1] + 0.5] for rewards in own]

    report = asyncio.run(
        evaluate(
            EnvConfig(id=f"{HERE}:Ranked"), model=result.model, n=2, k=2, temperature=1.0, out=tmp_path / "eval",
            engine=config.engine, rollout=config.rollout.model_copy(update={"group_reward": ""}),
        )
    )  # fmt: skip
    held_out = [r.trajectory for r in read_records(tmp_path / "eval", kind="eval")]
    for task in {t.task.id for t in held_out}:
        first, second = (sum(share_of_letters(m.message.text) for m in t.turns) for t in held_out if t.task.id == task)
        assert [t.reward for t in held_out if t.task.id == task] == [float(first > second), float(second > first)]
    assert report.attempts == 4
