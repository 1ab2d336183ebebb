"""The commit point and the checkpoint's files: read back exactly, complete or not there, pruned by policy."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.errors import ArealError, CheckpointError, ConfigError
from areal_agents.evaluation.held_out import Sample
from areal_agents.evaluation.report import EvalReport
from areal_agents.rollout.buffer import BufferState, Ticket
from areal_agents.rollout.producer import OpenGroup, RolloutState
from areal_agents.rollout.tasks import StreamState, TaskStream
from areal_agents.settings.config import TrainConfig
from areal_agents.trainer.loop import train
from areal_agents.trainer.run_folder import Commit, RunFolder
from areal_agents.types import AssistantMessage, Completion, Group, Task, Trajectory, Turn
from tests.small_disk import fill, small_disk
from tests.tiny_models import tiny_chat_model

REPORT = EvalReport(
    "e",
    "test",
    "m",
    3,
    0.0,
    0,
    4,
    1,
    4,
    0.5,
    (0.25, 0.75),
    0.5,
    None,
    0.5,
    1.0,
    None,
    0.0,
    0.0,
    0.0,
    2.0,
    9.0,
    1.5,
    sample=Sample(4, 9, 0),
)


def task(i: int) -> Task:
    return Task.make(f"t{i}", split="train", seed=i, payload={"n": i, "deep": {"x": [1, 2.5, None]}})


def episode(order: int, index: int, version: int = 2) -> Trajectory:
    turn = Turn((1, 2), Completion((5,), (-0.1,), (version,), "stop"), AssistantMessage(()), 0.1)
    return Trajectory(f"g{order}/{index}", task(order), f"g{order}", (turn,), True, False, "answer")


def state() -> RolloutState:
    buffered = Group("g3", task(3), (episode(3, 0), episode(3, 1)), 1, 3, None, "b", 0.3)
    running = OpenGroup(Ticket(4, 2), task(4), {1: episode(4, 1), 0: None}, "a", 0.0)
    empty = OpenGroup(Ticket(5, 2), task(5), {})
    odd = Task.make("t7", split="train", seed=7, payload={"board": ((1, 2), (3,)), "by": {5: "int key"}})
    return RolloutState(
        BufferState(2, 6, 1, ("t9",), (running.ticket, empty.ticket), (buffered,), dropped_of=(("a", 1),)),
        (running, empty),
        StreamState(8, 6, (odd,), ("t1", "t7"), (task(2).content_hash, task(6).content_hash)),
        ("t1",),
    )


class FakeLearner:
    """Writes one file, or as much of it as the disk holds."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def save(self, path: Path) -> None:
        self.write(path)

    def write(self, path: Path) -> None:
        path.mkdir()
        (path / "learner.pt").write_text("weights")
        if self.error is not None:
            raise self.error


class FarLearner:
    """Writes on a disk of its own."""

    async def save(self, path: Path) -> None:
        return None


def save(folder: RunFolder, step: int, rollouts: RolloutState | None, error: Exception | None = None) -> str:
    learner: Any = FakeLearner(error)
    return asyncio.run(folder.save(step, learner, rollouts))


def test_a_checkpoint_reads_back_exactly(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        assert folder.read_commit() is None
        name = save(folder, 2, state())
        commit = Commit(2, name, True, {"metrics": 17, "shards": []}, {"before": REPORT}, {"EnvError": 3})
        folder.commit(commit)
        assert folder.read_commit() == commit
        assert folder.read_rollouts(commit) == state()
        assert (folder.learner_folder(commit) / "learner.pt").read_text() == "weights"
        assert json.loads((tmp_path / "reports.json").read_text())["before"]["pass_at_1"] == 0.5
        none = Commit(3, save(folder, 3, None))
        assert folder.read_rollouts(none) is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_failed_save_is_named_and_leaves_what_was_committed(tmp_path: Path, error: Exception) -> None:
    with RunFolder(tmp_path) as folder:
        commit = Commit(1, save(folder, 1, state()))
        folder.commit(commit)
        with pytest.raises(
            CheckpointError, match=r"step 2 cannot be saved: .*go on with --resume.* committed before is whole"
        ):
            save(folder, 2, state(), error)
        assert [f.name for f in folder.checkpoints.iterdir()] == ["step-000001"]
        assert folder.read_commit() == commit
        assert folder.read_rollouts(commit) == state()


def test_what_was_never_committed_is_removed(tmp_path: Path) -> None:
    with RunFolder(tmp_path, keep=5) as folder:
        for step in (0, 1, 2):
            name = save(folder, step, None)
            if step < 2:
                folder.commit(Commit(step, name))
        (folder.checkpoints / ".step-000003.tmp-12").mkdir()
        commit = folder.read_commit()
        assert commit is not None
        folder.clean(commit)
        assert sorted(f.name for f in folder.checkpoints.iterdir()) == ["step-000000", "step-000001"]
        folder.clean(Commit())  # nothing committed: a checkpoint of step 0 does not count either
        assert not list(folder.checkpoints.iterdir())


def test_pruning_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    with RunFolder(tmp_path, keep=2, keep_every=3) as folder:
        for step in range(8):
            folder.commit(Commit(step, save(folder, step, None)))
        left = sorted(f.name for f in folder.checkpoints.iterdir())
    assert left == ["step-000003", "step-000006", "step-000007"]


def test_a_commit_that_cannot_be_understood_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        cases = {"{": "cannot be read", '{"schema_version": 9}': "schema_version 9", "[]": "schema_version None"}
        for text, message in cases.items():
            (tmp_path / "commit.json").write_text(text)
            with pytest.raises(CheckpointError, match=message):
                folder.read_commit()


def test_a_task_stream_goes_on_where_it_was() -> None:
    tasks = [task(i) for i in range(5)]
    stream = TaskStream(tasks, seed=3)
    drawn = [stream.next() for _ in range(7)]  # into the second epoch
    assert sorted(t.id for t in drawn[:5]) == ["t0", "t1", "t2", "t3", "t4"]
    assert stream.requeue(drawn[6])
    other = TaskStream(tasks, seed=3)
    other.restore(stream.state())
    assert other.next() == drawn[6]
    assert not other.requeue(drawn[6])  # its second chance is spent, also after a resume
    stream.next()
    assert [other.next() for _ in range(12)] == [stream.next() for _ in range(12)]
    with pytest.raises(ConfigError, match="has 4 tasks, the checkpoint was made with 5"):
        TaskStream(tasks[:4], seed=3).restore(stream.state())
    edited = [Task.make(t.id, split="train", seed=t.seed, payload={**t.payload, "n": -1}) for t in tasks]
    with pytest.raises(ConfigError, match="are not those that the checkpoint was made with"):
        TaskStream(edited, seed=3).restore(stream.state())


def test_checkpoints_without_their_commit_are_never_swept_away(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.commit(Commit(1, save(folder, 1, None)))
        (tmp_path / "commit.json").unlink()
        with pytest.raises(CheckpointError, match=r"holds checkpoints but no commit\.json"):
            folder.read_commit()
        assert [f.name for f in folder.checkpoints.iterdir()] == ["step-000001"]


def test_a_checkpoint_that_the_learner_wrote_elsewhere_is_none(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.commit(Commit(1, save(folder, 1, None)))
        far: Any = FarLearner()
        with pytest.raises(CheckpointError, match="`out` must lie on a file system that is shared") as raised:
            asyncio.run(folder.save(2, far, None))
        assert "Free some space" not in str(raised.value)
        assert sorted(f.name for f in folder.checkpoints.iterdir()) == ["step-000001"]


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    with pytest.raises(ConfigError, match="no such model"), RunFolder(out):  # noqa: PT012
        (out / "events.jsonl").write_text("{}\n")
        (out / "tensorboard").mkdir()
        raise ConfigError("no such model")
    assert not (tmp_path / "runs").exists()


def test_a_start_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("mine")
    with pytest.raises(ConfigError), RunFolder(tmp_path):  # noqa: PT012
        (tmp_path / "notes").write_text("of somebody else, meanwhile")
        raise ConfigError("no such model")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["events.jsonl", "notes"]


def test_a_run_that_has_begun_keeps_its_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError), RunFolder(tmp_path / "run") as folder:  # noqa: PT012
        folder.write_settings("")
        raise CheckpointError("a full disk")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["config.toml", "lock"]


def test_a_lock_whose_file_was_removed_holds_nobody_off(tmp_path: Path) -> None:
    """A start that fails removes its lock file: whoever opened it a moment before must take the new one."""
    with RunFolder(tmp_path):
        (tmp_path / "lock").unlink()
        with RunFolder(tmp_path):
            assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_full_disk_is_one_sentence_already_at_the_lock(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        fill(disk)
        for out in (disk / "run", disk):
            with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\): free some space"):
                RunFolder(out).__enter__()
        assert sorted(f.name for f in disk.iterdir()) == ["ballast"]


def test_a_disk_without_files_left_says_so_at_the_lock(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", inodes=2) as disk:
        with pytest.raises(ConfigError, match=r"remove some files .*has room for 1.0 MB, but for no more files\), or"):
            RunFolder(disk / "run").__enter__()
        assert list(disk.iterdir()) == []


def test_settings_that_a_full_disk_refuses_say_what_to_do(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, RunFolder(disk / "run") as folder:
        fill(disk)
        with pytest.raises(CheckpointError, match=r"config.toml cannot be written \(No space .*: free .*resume"):
            folder.write_settings("a = 1")


def test_a_checkpoint_that_does_not_fit_says_how_much_it_takes(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, RunFolder(disk / "run") as folder:
        folder.require_room(50_000, checkpoint=True)  # 0.6 MB, and 0.1 MB of the model
        fill(disk, room=200_000)
        with pytest.raises(CheckpointError) as caught:
            save(folder, 2, None, OSError(28, "No space left on device"))
        assert "cannot be written (No space left on device): free about 0.6 MB on that disk (0." in str(caught.value)
        with pytest.raises(ConfigError, match=r"0.2 MB are free there, and a checkpoint and .* about 0.7"):
            folder.require_room(50_000, checkpoint=True)
        with pytest.raises(ConfigError, match=r"and the trained model take about 0.4 MB: free some space"):
            folder.require_room(200_000, checkpoint=False)
        folder.require_room(50_000, checkpoint=False)


def test_a_run_that_cannot_fit_ends_before_its_engine_starts_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_chat_model(tmp_path / "model")
    with small_disk(tmp_path / "disk") as disk:
        config = TrainConfig.model_validate(
            {"out": disk / "run", "model": {"path": str(model)}, "env": {"id": "tests.letters_env:Letters"},
             "eval": {"n": 4}}
        )  # fmt: skip
        with pytest.raises(ConfigError, match=r"MB are free there, and a checkpoint and .* take about 1.3"):
            asyncio.run(train(config, console=False))
        assert list(disk.iterdir()) == []


def test_only_a_folder_of_nobody_elses_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised: list[ArealError] = []

    async def train(config: TrainConfig, *, resume: bool) -> None:
        raise raised[-1]

    monkeypatch.setattr("areal_agents.trainer.loop.train", train)
    (tmp_path / "commit.json").write_text("{}")
    for error, hints in ((ConfigError("it is in use by process 7"), 0), (ArealError("it ended"), 1)):
        raised.append(error)
        assert main(["train", "--out", str(tmp_path)]) == 1
        assert capsys.readouterr().err.count("go on with: areal-agents train ") == hints
