"""Advantages that ``show`` and ``rescore`` compute again from what was saved are those that trained."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from areal_agents.algorithms.registry import Choice
from areal_agents.evaluation.look import advantages_of
from areal_agents.evaluation.rescore import Outcome, Rescored
from areal_agents.evaluation.reward_shift import advantage_shift, compare
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.settings.config import AlgorithmConfig, TrainConfig
from areal_agents.tracking.trajectories import Record
from areal_agents.trainer.batches import batch_of
from areal_agents.types import Group, Trajectory
from tests.saved_runs import TASKS, record, save


def step(number: int, *, scale: float = 1.0) -> list[Record]:
    """Two groups of one step: several turns, lengths, states, and one episode that a limit cut."""
    base = 10 * number
    rows = [
        (base, 0, (0.0, 0.5, 1.0), 3, "abc"), (base, 1, (0.25,), 1, "a"), (base, 2, (0.5, 0.0), 7, "ab"),
        (base + 1, 0, (1.0, 1.0), 2, "ab"), (base + 1, 1, (0.0, 0.25), 4, "ac"),
    ]  # fmt: skip
    found = []
    for group, i, rewards, tokens, keys in rows:
        r = record(group, i, *(x * scale for x in rewards), step=number, task=group % 2, tokens=tokens)
        turns = tuple(replace(t, state_key=k) for t, k in zip(r.trajectory.turns, keys, strict=True))
        t = replace(r.trajectory, turns=turns)
        if i == 2:
            t = replace(t, terminated=False, truncated=True, stop_reason="max_turns")
        found.append(replace(r, trajectory=t))
    return found


def greedy_of(records: list[Record]) -> list[Record]:
    groups = {r.trajectory.group: r for r in records}
    return [
        Record("greedy", r.step, replace(r.trajectory, id=f"{group}/greedy", turns=r.trajectory.turns[:1]))
        for group, r in groups.items()
    ]


def groups_of(records: list[Record]) -> list[Group]:
    found: dict[str, list[Trajectory]] = {}
    for r in records:
        found.setdefault(r.trajectory.group, []).append(r.trajectory)
    greedy = {r.trajectory.group: r.trajectory for r in greedy_of(records)}
    return [Group(id, TASKS[0], tuple(ts), 0, k, greedy[id]) for k, (id, ts) in enumerate(found.items())]


def trained(records: list[Record], algorithm: AlgorithmConfig) -> list[list[float]]:
    batch = batch_of(groups_of(records), algorithm, 0, 1.0)
    return [
        [float(row.advantages[row.turns == k][0]) for k in range(len(r.trajectory.turns))]
        for row, r in zip(batch.rows, records, strict=True)
    ]


ALGORITHMS = [
    *(AlgorithmConfig(advantage=Choice(kind)) for kind in (
        "turn_return", "grpo", "rloo", "reinforce_pp", "opo", "pass_at_k", "maxrl", "kevin", "gigpo", "mt_grpo",
        "grpo_process",
    )),
    AlgorithmConfig(advantage=Choice("reinforce_pp", {"weight": "token"})),
    AlgorithmConfig(advantage=Choice("grpo"), normalize="batch"),
    AlgorithmConfig(advantage=Choice("grpo"), overlong="mask"),
    AlgorithmConfig(advantage=Choice("turn_return"), overlong="mask", normalize="batch"),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, AlgorithmConfig(advantage=Choice("remax"))], ids=str)
def test_what_is_shown_is_what_trained(tmp_path: Path, algorithm: AlgorithmConfig) -> None:
    first, second = step(1), step(2, scale=3.0)
    records = [*first, *second, *greedy_of(first), *greedy_of(second)]
    save(tmp_path / "run", TrainConfig(out=tmp_path / "run", algorithm=algorithm), records)
    run = SavedRun.open(tmp_path / "run")
    for some in (first, second):
        for r, expected in zip(some, trained(some, algorithm), strict=True):
            found, why = advantages_of(run, r)
            assert why == ""
            assert found == pytest.approx(expected, abs=1e-6)
    assert any(x for r in trained(first, algorithm) for x in r)


WITH_CRITIC = AlgorithmConfig.model_validate({"advantage": "gae", "critic": {"kind": "trunk"}})


def test_what_cannot_be_shown_says_why(tmp_path: Path) -> None:
    records = step(1)
    config = TrainConfig(out=tmp_path / "run", algorithm=AlgorithmConfig(advantage=Choice("remax")))
    save(tmp_path / "run", config, records)  # the greedy episodes are gone
    found, why = advantages_of(SavedRun.open(tmp_path / "run"), records[0])
    assert found is None
    assert "advantages cannot be computed again" in why
    assert "no episodes of kind 'greedy'" in why
    save(tmp_path / "run", config.model_copy(update={"algorithm": WITH_CRITIC}), records)
    found, why = advantages_of(SavedRun.open(tmp_path / "run"), records[0])
    assert (found, "'gae' reads a critic's values, which are not saved" in why) == (None, True)
    off_policy = AlgorithmConfig(advantage=Choice("opob"))
    save(tmp_path / "run", config.model_copy(update={"algorithm": off_policy}), records)
    found, why = advantages_of(SavedRun.open(tmp_path / "run"), records[0])
    assert (found, "'opob' reads the log-probabilities of its step, which are not saved" in why) == (None, True)


def rescored(r: Record, new: tuple[float, ...]) -> Rescored:
    t = r.trajectory
    return Rescored(
        t.id, r.kind, r.step, t.group, t.task.id, tuple(len(x.completion.ids) for x in t.turns),
        tuple(x.reward for x in t.turns), new, "ok", tuple(x.state_key for x in t.turns), t.terminated, t.stop_reason,
    )  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_signs_are_those_that_trained_and_would_train(algorithm: AlgorithmConfig) -> None:
    """The new reward pays each episode's turns the other way round."""
    steps = [step(1), step(2, scale=3.0)]
    counted = dict.fromkeys(("total", "flipped", "to_zero", "from_zero"), 0)
    episodes = []
    for records in steps:
        turned = [
            replace(r, trajectory=replace(r.trajectory, turns=tuple(
                replace(t, reward=1.0 - s.reward)
                for t, s in zip(r.trajectory.turns, reversed(r.trajectory.turns), strict=True)
            )))
            for r in records
        ]  # fmt: skip
        if algorithm.advantage.kind == "maxrl":  # takes no reward below 0
            turned = [replace(r, trajectory=replace(r.trajectory, turns=tuple(
                replace(t, reward=abs(t.reward)) for t in r.trajectory.turns
            ))) for r in turned]  # fmt: skip
        for r, new, before, after in zip(
            records, turned, trained(records, algorithm), trained(turned, algorithm), strict=True
        ):
            episodes.append(rescored(r, tuple(t.reward for t in new.trajectory.turns)))
            for turn, a, b in zip(r.trajectory.turns, np.sign(before), np.sign(after), strict=True):
                n = len(turn.completion.ids)
                counted["total"] += n
                counted["flipped"] += n * int(a * b < 0)
                counted["to_zero"] += n * int(a != 0 and b == 0)
                counted["from_zero"] += n * int(a == 0 and b != 0)
    found = advantage_shift(episodes, algorithm)
    assert vars_of(found.tokens) == counted
    assert (found.groups, found.skipped) == (4, 0)
    assert counted["flipped"]


def vars_of(tokens: object) -> dict[str, int]:
    return {name: getattr(tokens, name) for name in ("total", "flipped", "to_zero", "from_zero")}


def test_a_group_that_the_reward_failed_on_is_in_no_batch() -> None:
    records = step(1)
    kept = [rescored(r, (1.0,) * len(r.trajectory.turns)) for r in records]
    algorithm = AlgorithmConfig(advantage=Choice("reinforce_pp"))
    broken = [replace(kept[0], new_K=None, status="failed"), *kept[1:]]
    assert advantage_shift(broken, algorithm).skipped == 1
    assert advantage_shift(broken, algorithm).tokens == advantage_shift(kept[3:], algorithm).tokens


def test_what_no_reward_says_is_told_and_the_rest_is_compared() -> None:
    episodes = tuple(rescored(r, tuple(-1.0 for _ in r.trajectory.turns)) for r in step(1))
    for kind, why in (
        ("remax", "'remax' compares with greedy episodes"), ("gae", "'gae' compares with a critic's values"),
        ("maxrl", "returns must be ≥ 0"), ("opob", "'opob' reads the log-probabilities of its step"),
    ):  # fmt: skip
        algorithm = WITH_CRITIC if kind == "gae" else AlgorithmConfig(advantage=Choice(kind))
        shift = compare(Outcome(episodes, (), 0, ()), reward="r", algorithm=algorithm)
        assert shift.advantages is None
        assert why in shift.no_advantages
        assert f"advantages cannot be compared: {shift.no_advantages}" in shift.table()
        assert math.isfinite(shift.mean_new)
