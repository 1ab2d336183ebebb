"""A new reward on saved episodes: the episode rebuilt exactly, the comparison by hand, failures never a zero."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat.toolcalls import parse_text
from areal_agents.cli.main import main
from areal_agents.errors import ArealError, ConfigError
from areal_agents.evaluation.rescore import answer_of, episode_of, load_reward, rescore, with_verdict
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.reward import Episode, Gate, Verdict, WeightedSum
from areal_agents.rollout.rebuilt import as_sampled
from areal_agents.settings.config import TrainConfig
from areal_agents.tool import ToolResult
from areal_agents.tracking.trajectories import Record, read_shard
from areal_agents.trainer.loop import train
from areal_agents.types import AssistantMessage, Completion, Task, Text, ToolCall, Trajectory, Turn
from tests.saved_runs import TASKS, Mixed, call, content, evaluation_run, record, save, training_run
from tests.tiny_models import tiny_chat_model

# --- rewards that the tests name on the command line -----------------------------------------------------------------


def turns_taken(episode: Episode) -> float:
    return float(episode.turns)


def broken_on_two(episode: Episode) -> float:
    if episode.task.id in ("t0", "t2"):
        raise KeyError(f"no key \x1b[31m [red]{episode.task.id}[/red]")
    return 1.0


def not_finite(episode: Episode) -> float:
    return math.nan


def per_turn(episode: Episode) -> Verdict:
    turns = tuple(float(k + 1) for k in range(episode.turns))
    return Verdict(sum(turns), {"a": 1.0}, turn_rewards=turns)


async def leaves_on_t0(episode: Episode) -> float:
    async def leave() -> None:
        raise SystemExit(0)

    if episode.task.id == "t0":
        raise SystemExit(0)
    asyncio.get_running_loop().create_task(leave()).add_done_callback(lambda done: done.exception())
    await asyncio.sleep(0)
    return 1.0


class Slow:
    """An async Reward that counts how many of its calls run at once."""

    def __init__(self) -> None:
        self.running = self.most = 0

    async def __call__(self, episode: Episode) -> Verdict:
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(5):
            await asyncio.sleep(0)
        self.running -= 1
        return Verdict(0.5)


summed = WeightedSum({"turns": (turns_taken, 0.5)})
gated = Gate({"correct": turns_taken})
NO_REWARD = 3


# --- the episode, rebuilt --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    out = tmp_path_factory.mktemp("rescore") / "run"
    return out, training_run(out, steps=6)


def test_the_runs_cover_every_ending_and_every_call_status(mixed: tuple[Path, list[Record]]) -> None:
    episodes = [r.trajectory for r in mixed[1]]
    assert {(t.stop_reason, t.truncated) for t in episodes} == {
        ("answer", False), ("max_turns", True), ("tokens", True)
    }  # fmt: skip
    statuses = {r.status for t in episodes for turn in t.turns for r in turn.tool_results}
    assert statuses == {"ok", "error", "malformed", "unknown_tool", "invalid_arguments"}
    assert any(r.truncated for t in episodes for turn in t.turns for r in turn.tool_results)


def test_the_runs_own_rubric_gives_every_reward_and_component_again(mixed: tuple[Path, list[Record]]) -> None:
    out, records = mixed
    run = SavedRun.open(out)
    done = asyncio.run(rescore(run.shards("train"), load_reward(run.env_id), answer=answer_of(run), keep=True))
    assert list(done.records) == records  # the fingerprint differs wherever an episode differs in anything
    assert not done.failures
    assert all(e.old_K == e.new_K for e in done.episodes)
    assert len({e.new for e in done.episodes}) == len({e.old for e in done.episodes}) > 10


def test_an_environments_own_answer_is_used_and_seen(mixed: tuple[Path, list[Record]]) -> None:
    out, records = mixed
    answer = answer_of(SavedRun.open(out))
    record = next(r for r in records if r.trajectory.stop_reason == "answer")
    assert (episode_of(record, answer).answer or "").startswith(f"{record.trajectory.task.id} ")
    ended = next(r for r in records if r.trajectory.stop_reason == "tokens")
    assert episode_of(ended, answer).answer is None


def test_calls_have_the_status_that_the_environment_was_given() -> None:
    message = parse_text(call("nobody") + '<tool_call>{"name": "echo", "arguments": 3}</tool_call>')
    first, second = message.tool_calls
    found = replace(message, tool_calls=(replace(first, status="unknown_tool"), second))
    turn = Turn((1,), Completion((2,), (-1.0,), (0,), "stop"), found)
    record = Record("train", 1, Trajectory("e", TASKS[0], "g0", (turn,), False, True, "max_turns"))
    (rebuilt,) = episode_of(record).messages
    assert isinstance(rebuilt, AssistantMessage)
    assert [c.status for c in rebuilt.tool_calls] == ["ok", "invalid_arguments"]


def test_a_call_that_was_read_with_its_tools_schema_stays_read() -> None:
    late = ToolCall("c", "f", {"x": "one"}, '{"name": "f", "input": "one"}', "invalid_arguments", None, "llama_json")
    broken = replace(late, arguments={}, problem='"x" is given twice')
    given = as_sampled(AssistantMessage((Text("…"),), (late, replace(late, status="unknown_tool"), broken)))
    assert [c.status for c in given.tool_calls] == ["ok", "ok", "invalid_arguments"]


def test_tool_results_carry_text_status_and_truncation(mixed: tuple[Path, list[Record]]) -> None:
    results = [r for record in mixed[1] for r in episode_of(record).tool_results]
    assert ToolResult("it failed", "error") in results
    assert ToolResult("aaaa", "ok") in results
    assert any(r.truncated and r.text.startswith("bbb") and len(r.text) <= 64 for r in results)


def test_a_training_run_rescores_and_replays_as_it_was(tmp_path: Path) -> None:
    """A tiny random model, asynchronous training, both evaluations: nothing here was made for these commands."""
    config = TrainConfig.model_validate(
        {
            "steps": 2,
            "out": tmp_path / "run",
            "model": {"path": str(tiny_chat_model(tmp_path / "model")), "max_context": 512},
            "env": {"id": "tests.saved_runs:Mixed"},
            "engine": {"precision": "fp32", "max_batch": 8},
            "rollout": {"groups": 2, "group_size": 2, "concurrency": 4, "max_turn_tokens": 6},
            "learner": {"lr": 1e-3, "precision": "fp32"},
            "eval": {"n": 2, "temperature": 1.0, "overlap": "tell"},
            "track": {"tensorboard": False},
        }
    )
    asyncio.run(train(config, console=False))
    for kind, count in (("train", 8), ("eval-before", 2), ("eval-after_rl", 2)):
        report = tmp_path / f"{kind}.json"
        argv = ["rescore", str(config.out), "--reward", config.env.id, "--kind", kind, "--json", str(report)]
        assert main(argv) == 0
        assert (read_json(report)["scored"], read_json(report)["changed"]) == (count, 0.0)
        first = next(SavedRun.open(config.out).records(kind))
        assert main(["replay", str(config.out), "--kind", kind, "--episode", first.trajectory.id]) == 0


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two steps, a group of two a step; tasks t0 and t2 in the first, t1 and t3 never."""
    out = tmp_path / "run"
    save(out, TrainConfig.model_validate({"out": out, "env": {"id": "tests.letters_env:Letters"}}), [
        record(0, 0, 0.0, 1.0), record(0, 1, 0.0), record(1, 0, 1.0, task=2, step=2), record(1, 1, 0.5, task=2, step=2),
        record(2, 0, 1.0, task=1, step=3), record(2, 1, 1.0, task=1, step=3),
    ])  # fmt: skip
    return out


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def test_the_command_reports_and_writes_new_episodes_only_where_told(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(small)
    new, report = tmp_path / "new.parquet", tmp_path / "deep" / "report.json"
    argv = [
        "rescore",
        str(small),
        "--reward",
        "tests.evaluation.test_rescore:per_turn",
        "--out",
        str(new),
        "--json",
        str(report),
    ]
    assert main(argv) == 0
    assert content(small) == before
    out = capsys.readouterr().out
    assert "6 episodes, 3 tasks, 3 groups; 0 failed" in out
    assert "advantages (turn_return) over 3 groups" in out
    written = {r.trajectory.id: r for r in read_shard(new)}
    assert [t.reward for t in written["g0/0"].trajectory.turns] == [1.0, 2.0]
    assert [dict(t.components) for t in written["g0/0"].trajectory.turns] == [{}, {"a": 1.0}]
    assert (written["g1/1"].kind, written["g1/1"].step) == ("train", 2)
    value = read_json(report)
    assert value["mean_old"] == pytest.approx(4.5 / 6)
    assert value["mean_new"] == pytest.approx((3 + 5 * 1) / 6)
    # g0: 1 and 0 becomes 3 and 1: the late turn was 1 (nobody else alive) and is 2. g1 loses its signal; g2 had none.
    assert value["advantages"]["signal_lost"] == 1
    assert value["failures"] == []


def test_json_alone_on_standard_output(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rescore", str(small), "--reward", "tests.evaluation.test_rescore:turns_taken", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scored"] == 6
    assert "6 episodes" in captured.err


@pytest.mark.parametrize(("steps", "count"), [("2", 2), ("2:", 4), (":2", 4), ("1:3", 6), ("3:9", 2), ("", 6)])
def test_steps(small: Path, tmp_path: Path, steps: str, count: int) -> None:
    report = tmp_path / "r.json"
    argv = ["rescore", str(small), "--reward", "tests.evaluation.test_rescore:turns_taken", "--steps", steps]
    assert main([*argv, "--json", str(report)]) == 0
    assert read_json(report)["scored"] == count


def test_a_failing_reward_is_counted_shown_and_never_a_zero(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    argv = ["rescore", str(small), "--reward", "tests.evaluation.test_rescore:broken_on_two", "--json", str(report)]
    assert main(argv) == 1
    value = read_json(report)
    assert (value["scored"], value["failed"], value["mean_new"]) == (2, 4, 1.0)
    assert (value["advantages"]["groups"], value["advantages"]["skipped"]) == (3, 2)
    assert value["failures"][0]["episode"] == "g0/0"
    err = capsys.readouterr().err
    assert "the reward failed on 4 of 6 episodes: 4 × KeyError" in err
    assert "first, on episode g0/0:" in err
    assert 'raise KeyError(f"no key' in err  # the traceback reaches the author's line
    assert "\x1b" not in err


def test_a_reward_that_ends_programs_fails_on_its_episode_alone(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rescore", str(small), "--reward", "tests.evaluation.test_rescore:leaves_on_t0"]) == 1
    captured = capsys.readouterr()
    assert "the reward failed on 2 of 6 episodes: 2 × RuntimeError" in captured.err
    assert "it called sys.exit(0)" in captured.err
    assert ": 4 episodes" in captured.out


def test_a_reward_that_cancels_the_task_it_runs_in_fails_on_each_episode(small: Path) -> None:
    async def cancels(episode: Episode) -> float:
        current = asyncio.current_task()
        assert current is not None
        current.cancel()
        await asyncio.sleep(0)
        return 1.0

    done = asyncio.run(rescore(SavedRun.open(small).shards("train"), cancels, concurrency=2))
    assert (len(done.failures), len(done.episodes)) == (6, 6)


def test_the_metrics_say_of_the_new_verdicts_status_alone() -> None:
    old = replace(record(0, 0, 1.0).trajectory, metrics={"unverifiable": 1.0, "env_seconds": 2.0})
    assert dict(with_verdict(old, Verdict(1.0)).metrics) == {"env_seconds": 2.0}
    late = with_verdict(old, Verdict(0.0, status="timeout"))
    assert dict(late.metrics) == {"env_seconds": 2.0, "verdict_timeout": 1.0}


def test_a_reward_that_fails_everywhere(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rescore", str(small), "--reward", "tests.evaluation.test_rescore:not_finite"]) == 1
    captured = capsys.readouterr()
    assert "6 × areal_agents.errors.RewardError" in captured.err
    assert "a reward is a finite number" in captured.err
    assert "mean" not in captured.out


@pytest.mark.parametrize("concurrency", [1, 4])
def test_async_rewards_run_together_and_within_the_bound(small: Path, concurrency: int) -> None:
    slow = Slow()
    done = asyncio.run(rescore(SavedRun.open(small).shards("train"), slow, concurrency=concurrency))
    assert slow.most == concurrency
    assert [e.id for e in done.episodes] == ["g0/0", "g0/1", "g1/0", "g1/1", "g2/0", "g2/1"]  # the files' order
    assert {e.new for e in done.episodes} == {0.5}


def test_evaluations_are_compared_without_advantages(tmp_path: Path) -> None:
    out, report = tmp_path / "eval", tmp_path / "r.json"
    records = evaluation_run(out)
    argv = ["rescore", str(out), "--kind", "eval", "--reward", "tests.saved_runs:Mixed", "--json", str(report)]
    assert main(argv) == 0
    value = read_json(report)
    assert (value["scored"], value["changed"], value["advantages"]) == (len(records), 0.0, None)
    assert value["spearman"] == pytest.approx(1.0)


def test_an_environment_that_is_gone_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    save(
        out, TrainConfig.model_validate({"env": {"id": "no_such_module:Gone"}}), [record(0, 0, 1.0), record(0, 1, 0.0)]
    )
    assert main(["rescore", str(out), "--reward", "tests.evaluation.test_rescore:turns_taken"]) == 0
    assert "no_such_module" in capsys.readouterr().err


def test_an_episode_without_a_turn_is_left_out_and_said_so(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "other"
    save(out, TrainConfig(), [record(0, 0), record(0, 1, 0.0), record(0, 2, 1.0)])
    assert main(["rescore", str(out), "--reward", "tests.evaluation.test_rescore:turns_taken"]) == 0
    assert "2 episodes, 1 tasks, 1 groups; 0 failed (1 without a turn)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--kind", "eval"], 1, "no episodes of kind 'eval'; there are train"),
        (["--steps", "7:9"], 1, "its steps are 1 to 3"),
        (["--steps", "3:1"], 2, "the last step is before the first"),
        (["--steps", "x"], 2, "write A:B"),
        (["--concurrency", "0"], 2, "must be at least 1"),
        (["--out", "x.json"], 2, "ends with .parquet"),
    ],
)
def test_wrong_usage(small: Path, argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rescore", str(small), "--reward", "tests.evaluation.test_rescore:turns_taken", *argv]) == code
    assert message in capsys.readouterr().err


def test_the_runs_own_files_cannot_be_named_as_output(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(small)
    for flag, name in (("--out", "trajectories/train/step-000001.parquet"), ("--json", "config.toml")):
        argv = ["rescore", str(small), "--reward", "tests.evaluation.test_rescore:turns_taken", flag, str(small / name)]
        assert main(argv) == 1
        assert "lies inside the run" in capsys.readouterr().err
    assert content(small) == before


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ArealError, match=r"neither config\.toml nor report\.json"):
        SavedRun.open(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ArealError, match="no evaluation's report"):
        SavedRun.open(tmp_path)


def test_a_broken_shard_is_named(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = small / "trajectories" / "train" / "step-000002.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    assert main(["rescore", str(small), "--reward", "tests.evaluation.test_rescore:turns_taken"]) == 1
    assert "step-000002.parquet is no readable trajectory shard" in capsys.readouterr().err
    assert main(["replay", str(small), "--episode", "g2/1"]) == 1
    assert "step-000002.parquet is no readable trajectory shard" in capsys.readouterr().err


# --- finding the reward ----------------------------------------------------------------------------------------------


def test_rewards_by_name() -> None:
    assert load_reward("tests.evaluation.test_rescore:turns_taken") is turns_taken
    assert load_reward("tests.evaluation.test_rescore:summed") is summed
    assert load_reward("tests.evaluation.test_rescore:gated") is gated
    assert load_reward("tests.saved_runs:Mixed") is Mixed.rubric
    episode = Episode(TASKS[0], (AssistantMessage((Text(r"\boxed{4}"),)),), r"\boxed{4}", (), "answer")
    task = Task.make("t", split="train", seed=0, payload={"answer": "4"})
    boxed: Any = load_reward("areal/Arithmetic-v0")
    assert boxed(replace(episode, task=task)) == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.evaluation.test_rescore:turns_takn", "did you mean 'turns_taken'"),
        ("tests.no_such_module:f", "importing 'tests.no_such_module' failed"),
        ("areal/Arithmetik-v0", "areal/Arithmetic-v0"),
        ("just_a_word", "package.module:function"),
        ("tests.evaluation.test_rescore:NO_REWARD", "a int is no reward"),
        ("tests.evaluation.test_rescore:Slow", "name an instance"),
        ("tests.letters_env:Letters", "has no rubric"),
    ],
)
def test_rewards_that_cannot_be_found(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_reward(name)
