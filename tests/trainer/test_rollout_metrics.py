"""The metrics of each environment of a mixture, by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.shares import Shares
from areal_agents.rollout.sources import EnvTasks, Source
from areal_agents.rollout.tasks import TaskStream
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.parts import parts_of
from areal_agents.trainer.rollout_metrics import env_metrics
from areal_agents.types import Completion, Group, Trajectory, Turn
from tests.trainer.test_loop import TASK, episode, group

MIXTURE = [{"id": "areal/Nim-v0", "label": "a", "weight": 2}, {"id": "areal/Nim-v0", "label": "b", "weight": 1}]
PARTS = parts_of(TrainConfig.model_validate({"env": MIXTURE}))


def aged(trajectory: Trajectory, *versions: int) -> Trajectory:
    def turn(t: Turn) -> Turn:
        n = len(versions)
        return replace(t, completion=Completion((5,) * n, (-1.0,) * n, versions, "stop"))

    return replace(trajectory, turns=tuple(map(turn, trajectory.turns)))


def source() -> Source:
    envs = [EnvTasks(lambda level: TaskStream([TASK], seed=0), label=label) for label in "ab"]
    return Source(envs, Shares([2.0, 1.0], seed=0), groups=2)


def test_each_environment_by_hand() -> None:
    buffer = Buffer(groups=2, group_size=2, max_staleness=2, concurrency=12, on_exceed="drop")
    for _ in range(6):  # a b a a b a
        buffer.admit()
    buffer.dropped_of.update({"a": 1})
    rollouts: Any = SimpleNamespace(buffer=buffer, tasks=source())
    groups = [
        replace(group(aged(episode(1.0), 3, 3, 2), aged(episode(0.0), 1)), env="a", order=0),
        replace(group(aged(episode(0.5), 3, 3), aged(episode(0.5), 3, 3)), env="b", order=1),
    ]
    found = env_metrics(PARTS, groups, 3, rollouts, passes=0.5)
    a, b = ({k.removeprefix(f"env/{x}/"): v for k, v in found.items() if k.startswith(f"env/{x}/")} for x in "ab")
    assert len(a) + len(b) == len(found)
    assert (a["reward"], a["pass_rate"], a["episodes"], a["episode_tokens"]) == (0.5, 0.5, 2.0, 2.0)
    assert (b["reward"], b["pass_rate"], b["episodes"], b["episode_tokens"]) == (0.5, 1.0, 2.0, 2.0)
    assert {k: v for k, v in a.items() if k.startswith("age")} == {
        "age": 0.75, "age_max": 2.0, "age_share/0": 0.5, "age_share/1": 0.25, "age_share/2": 0.25,
    }  # fmt: skip
    assert (a["groups"], a["groups_begun"], a["dropped_share"]) == (1.0, 4.0, 0.25)
    assert (b["groups"], b["groups_begun"], b["dropped_share"]) == (1.0, 2.0, 0.0)
    assert (a["groups_with_signal"], b["groups_with_signal"]) == (1.0, 0.0)
    only = env_metrics(PARTS, groups[:1], 3, rollouts, passes=1.0)
    assert {k: v for k, v in only.items() if k.startswith("env/b/")} == {
        "env/b/groups": 0.0, "env/b/groups_begun": 2.0, "env/b/dropped_share": 0.0,
    }  # fmt: skip


def test_one_environment_without_a_curriculum_has_no_more_metrics() -> None:
    rollouts: Any = SimpleNamespace(
        buffer=Buffer(groups=2, group_size=2, max_staleness=0, concurrency=4),
        tasks=Source.of(TaskStream([TASK], seed=0)),
    )
    assert env_metrics(parts_of(TrainConfig()), [group(episode(1.0))], 3, rollouts, passes=1.0) == {}


def test_dropped_groups_are_counted_by_environment_and_kept() -> None:
    buffer = Buffer(groups=1, group_size=2, max_staleness=1, concurrency=12, on_exceed="drop")
    tickets = [buffer.admit(), buffer.admit()]
    for ticket, env, version in zip(tickets, "ab", (0, 3), strict=True):
        episodes = tuple(aged(episode(1.0), version) for _ in range(2))
        buffer.complete(Group(f"g{ticket.order}", TASK, episodes, 0, ticket.order, env=env))
    buffer.version = 3
    assert buffer.take() is not None  # the first is too old: version 0 at version 3
    assert dict(buffer.dropped_of) == {"a": 1}
    again = Buffer(groups=1, group_size=2, max_staleness=1, concurrency=12)
    again.restore(buffer.state())
    assert (again.dropped_of, again.dropped) == (buffer.dropped_of, ["t"])
    assert again.state().dropped_of == (("a", 1),)
