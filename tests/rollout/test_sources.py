"""Where tasks come from: which environment a group plays, what its curriculum may know, and going on from a state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from areal_agents.errors import TaskError
from areal_agents.rollout.buffer import Buffer
from areal_agents.rollout.curriculum import Curriculum, curriculum_of
from areal_agents.rollout.producer import RolloutState
from areal_agents.rollout.shares import Shares
from areal_agents.rollout.sources import Drawn, EnvTasks, Source, stream_seed
from areal_agents.rollout.task_lists import Joined, Some, joined, some
from areal_agents.rollout.tasks import StreamState, TaskStream
from areal_agents.settings.curriculum import CurriculumConfig
from areal_agents.trainer.rollout_state import write_rollouts
from areal_agents.trainer.run_folder import Commit, RunFolder
from areal_agents.types import Group, Task
from tests.trainer.test_loop import episode

B = 2
NONE = CurriculumConfig()
LEVELS = CurriculumConfig(kind="level", window=4, level_step=0.5)


def tasks(env: str, level: float | None, n: int = 20) -> list[Task]:
    """Ids are the same in every environment, and say which level they are of."""
    return [
        Task.make(f"{level}/{i}", split="train", seed=i, payload={"env": env, "level": level, "i": i}) for i in range(n)
    ]


def curriculum(settings: CurriculumConfig, label: str) -> Curriculum | None:
    return curriculum_of(settings, difficulty=0.0, seed=0, label=label)


def source(
    settings: CurriculumConfig = NONE, labels: Sequence[str] = ("a", "b"), weights: Sequence[float] = (2.0, 1.0),
    staleness: int = 0,
) -> Source:  # fmt: skip
    def env(label: str) -> EnvTasks:
        def stream(level: float | None) -> TaskStream:
            return TaskStream(tasks(label, level), seed=stream_seed(0, label, level))

        return EnvTasks(stream, label=label, curriculum=curriculum(settings, label))

    return Source([env(label) for label in labels], Shares(weights, seed=0), groups=B, staleness=staleness)


def ended(drawn: Drawn, order: int, passed: int, n: int = 4) -> Group:
    episodes = tuple(episode(1.0 if i < passed else 0.0) for i in range(n))
    return Group(f"g{order}", drawn.task, episodes, 0, order, None, drawn.env, drawn.level)


def test_each_environment_has_its_share_and_its_own_tasks() -> None:
    found = source()
    drawn = [found.draw(order) for order in range(12)]
    assert [d.env for d in drawn] == ["a", "b", "a"] * 4
    assert all(d.task.payload["env"] == d.env for d in drawn)
    assert len({(d.env, d.task.id) for d in drawn}) == 12  # no task twice within an epoch
    assert found.begun(12) == {"a": 8, "b": 4}
    a, b = ([d.task.payload["i"] for d in drawn if d.env == label] for label in "ab")
    assert a[:4] != b  # orders of their own, although seed and sizes are the same


def test_one_environment_draws_as_its_stream_alone() -> None:
    stream = TaskStream(tasks("", None), seed=3)
    found = Source.of(TaskStream(tasks("", None), seed=3))
    assert [found.draw(i) for i in range(30)] == [Drawn(stream.next()) for _ in range(30)]
    assert found.state() == stream.state()
    assert stream_seed(3, "", None) == 3


def test_tasks_that_are_queued_again_or_left_out_are_so_in_their_own_environment() -> None:
    found = source()
    a, b = found.draw(0), found.draw(1)
    assert found.requeue(a)
    assert found.requeue(a) is False
    assert found.draw(2) == a
    same_id = next(d for order in range(3, 200) if (d := found.draw(order)).env == "b" and d.task.id != b.task.id)
    found.leave_out(Drawn(same_id.task, "b"), "broken")
    rest = [found.draw(order) for order in range(200, 320)]
    assert (same_id.task.id, "a") in {(d.task.id, d.env) for d in rest}
    assert (same_id.task.id, "b") not in {(d.task.id, d.env) for d in rest}
    assert found.left_out == found.state().bad == 1


def test_a_task_that_is_queued_again_is_played_although_its_level_was_left(tmp_path: Path) -> None:
    """The level rises to 0.5 meanwhile, and never falls: the task's second chance must not wait for that."""
    found = source(LEVELS, ("a",), (1.0,))
    lost, other, bad = (found.draw(order) for order in range(3))
    assert {d.level for d in (lost, other, bad)} == {0.0}
    assert found.requeue(lost)
    assert found.requeue(bad)
    found.leave_out(bad, "broken")  # another group of it said so
    found.consume([ended(other, 1, 4)])
    resumed = source(LEVELS, ("a",), (1.0,))
    resumed.restore(saved(found, tmp_path))
    for each in (found, resumed):
        assert each.draw(3) == lost  # at its own level
        assert each.draw(4).level == 0.5
        assert each.requeue(lost) is False


def test_a_task_that_is_queued_again_comes_before_one_that_a_curriculum_chooses() -> None:
    settings = CurriculumConfig(kind="learnability", explore=1e-9)
    found = source(settings, ("a",), (1.0,))
    first, lost = found.draw(0), found.draw(1)
    found.consume([ended(first, 0, 2)])
    assert found.requeue(lost)
    assert [found.draw(order).task.id for order in (2, 3, 4)] == [lost.task.id, first.task.id, first.task.id]


def test_an_environment_without_a_task_left_says_so() -> None:
    found = Source([EnvTasks(lambda level: TaskStream(tasks("a", level, 1), seed=0))], Shares([1.0], seed=0))
    found.leave_out(found.draw(0), "broken")
    with pytest.raises(TaskError, match="none of the split's 1 tasks"):
        found.draw(1)


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_group_knows_of_the_batches_that_are_over_whenever_it_is_begun(staleness: int) -> None:
    """B = 2, so group n knows of ⌊n/2⌋ − η batches. A group of 4 passed episodes of the level that is raises it."""
    found = source(LEVELS, ("a",), (1.0,), staleness)
    ahead = 2 * (staleness + 1)  # all that the bound admits before the first batch
    begun = [found.draw(order) for order in range(ahead)]
    for batch in range(4):
        pair = [begun[2 * batch], begun[2 * batch + 1]]
        found.consume([ended(d, 2 * batch + i, 4) for i, d in enumerate(pair)])
        begun += [found.draw(order) for order in (len(begun), len(begun) + 1)]
    expected = [0.0] * 2 + [0.5] * 2 + [1.0] * 6
    if staleness:  # groups 2 to 5 were begun at level 0, which says nothing of level 0.5; the batch of 6 and 7 does
        expected = [0.0] * 6 + [0.5] * 6 + [1.0] * 2
    assert [d.level for d in begun] == expected


def test_what_is_over_earlier_than_a_group_may_know_changes_nothing() -> None:
    slow, fast = source(LEVELS, ("a",), (1.0,), 1), source(LEVELS, ("a",), (1.0,), 1)
    early = [slow.draw(order) for order in range(4)]
    assert [fast.draw(order) for order in range(2)] == early[:2]
    batch = [ended(d, order, 4) for order, d in enumerate(early[:2])]
    fast.consume(batch)  # before its groups 2 and 3 are begun, after those of the other
    slow.consume(batch)
    assert [fast.draw(order) for order in (2, 3)] == early[2:]
    assert [fast.draw(order) for order in (4, 5)] == [slow.draw(order) for order in (4, 5)]
    assert fast.draw(6).level == 0.5


def test_groups_that_are_replaced_teach_with_the_next_batch() -> None:
    found = source(LEVELS, ("a",), (1.0,))
    first = [found.draw(order) for order in range(3)]
    found.give_up(ended(first[1], 1, 4))  # always passed: no signal
    found.consume([ended(first[0], 0, 0, n=1), ended(first[2], 2, 0)])
    assert found.draw(3).level == 0.5  # in the order of the groups: a failure, then 4 passes: 4 of 5 fill the window
    assert found.metrics()["a"]["level_episodes"] == 0.0


@pytest.mark.parametrize(
    "settings",
    [CurriculumConfig(), LEVELS, CurriculumConfig(kind="learnability", explore=0.3),
     CurriculumConfig(kind="learnability", by="level", level_step=0.5)],
    ids=["none", "level", "task", "by level"],
)  # fmt: skip
def test_a_source_goes_on_from_its_files_as_if_it_had_not_stopped(settings: CurriculumConfig, tmp_path: Path) -> None:
    def live(of: Source, batches: range) -> list[Drawn]:
        drawn = []
        for batch in batches:
            pair = [of.draw(order) for order in (2 * batch, 2 * batch + 1)]
            of.give_up(ended(pair[0], 2 * batch, batch % 5))
            of.consume([ended(d, 2 * batch + i, (batch * 3 + i) % 5) for i, d in enumerate(pair)])
            drawn += pair
        return drawn

    whole = source(settings, staleness=1)
    everything = live(whole, range(20))
    first, second = source(settings, staleness=1), source(settings, staleness=1)
    begun = live(first, range(9))
    again = first.draw(18)
    assert first.requeue(again)
    second.restore(saved(first, tmp_path))
    assert second.state() == first.state()
    assert second.draw(19) == first.draw(19)
    third = source(settings, staleness=1)
    live(fresh := source(settings, staleness=1), range(9))
    third.restore(saved(fresh, tmp_path))
    assert begun + live(third, range(9, 20)) == everything
    assert third.metrics() == whole.metrics()


def saved(of: Source, folder: Path) -> StreamState:
    """The state through the files of a checkpoint."""
    out = folder / "checkpoints" / "c"
    out.mkdir(parents=True, exist_ok=True)
    buffer = Buffer(groups=B, group_size=2, max_staleness=1, concurrency=4)
    write_rollouts(out, RolloutState(buffer.state(), (), of.state(), ()))
    found = RunFolder(folder).read_rollouts(Commit(checkpoint="c"))
    assert found is not None
    return found.tasks


def test_a_task_whose_learnability_is_high_comes_again_before_the_epoch_is_over() -> None:
    settings = CurriculumConfig(kind="learnability", explore=1e-9)
    found = source(settings, ("a",), (1.0,))
    first = [found.draw(order) for order in range(2)]
    found.consume([ended(first[0], 0, 2), ended(first[1], 1, 4)])
    later = [found.draw(order).task.id for order in range(2, 200)]
    assert set(later) == {first[0].task.id, first[1].task.id}
    assert later.count(first[0].task.id) > later.count(first[1].task.id)
    found.leave_out(first[0], "broken")
    rest = [found.draw(order).task.id for order in range(200, 400)]
    assert first[0].task.id not in rest
    assert len(set(rest)) > 10  # where its turn comes, the next task of the split is played


def test_tasks_in_several_sequences() -> None:
    parts = [tasks("a", 0.0, 3), [], tasks("a", 1.0, 2)]
    every = joined(parts)
    assert isinstance(every, list)
    lazy = Joined(parts)
    assert list(lazy) == every == [*parts[0], *parts[2]]
    assert (len(lazy), lazy[-1], lazy[3:5][0]) == (5, parts[2][1], parts[2][0])
    with pytest.raises(IndexError):
        lazy[5]
    assert joined([parts[0]]) is parts[0]
    chosen = Some(lazy, [4, 0])
    assert (list(chosen), list(chosen[1:])) == ([parts[2][1], parts[0][0]], [parts[0][0]])
    assert some(parts[0], [2, 0]) == [parts[0][2], parts[0][0]]
    assert isinstance(some(lazy, [0]), Some)
    assert isinstance(joined([lazy, parts[0]]), Joined)
