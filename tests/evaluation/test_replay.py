"""Saved episodes played again: identical with real tools, and the first difference where something changed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents import settings
from areal_agents.chat.format import ChatFormat
from areal_agents.cli.main import main
from areal_agents.errors import ArealError, EnvError
from areal_agents.evaluation.replay import ReplayReport, replay
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.tracking.console import plain
from areal_agents.tracking.trajectories import Record
from areal_agents.types import AssistantMessage, Info, Observation, Text, user
from tests.conftest import require
from tests.letters_env import Letters
from tests.saved_runs import Mixed, call, content, evaluation_run, save, training_run

SHORT = ("the quick fox", "jumps", "over " * 9)


class Coin(Letters):
    """Deliberately nondeterministic: the second observation holds a number out of the system's own randomness."""

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = await super().astep(action)
        return (user(f"again {os.urandom(8).hex()}"),) if observation else (), reward, terminated, truncated, info


class Hanging(Letters):
    """A step that never returns, once the class is told to."""

    hangs = False

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        if self.hangs:
            await asyncio.Event().wait()
        return await super().astep(action)


class Changes(Letters):
    """What it returns, or how it closes, is changed once the class is told to."""

    change = ""

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        observation, reward, terminated, truncated, info = await super().astep(action)
        if self.change == "list" and not terminated:
            return [*observation], reward, terminated, truncated, info  # type: ignore[return-value]
        if self.change == "text" and terminated:
            return observation, "much", terminated, truncated, info  # type: ignore[return-value]
        if self.change == "credit" and terminated:
            info["turn_rewards"] = [1.0]
        return observation, reward, terminated, truncated, info

    async def aclose(self) -> None:
        if self.change == "close":
            raise OSError("not closed")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    out = tmp_path_factory.mktemp("replay") / "run"
    return out, training_run(out, steps=6)


@pytest.fixture
def drift(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda kind: monkeypatch.setattr(Mixed, "drift", kind)


def again(out: Path, record: Record, *, tokens: bool = True, **kwargs: Any) -> ReplayReport:
    run = SavedRun.open(out)
    folder = run.model_folder()
    assert folder is not None
    fmt = ChatFormat.load(folder) if tokens else None
    return asyncio.run(replay(record, run.make_env, seed=run.env_seed(record), fmt=fmt, **kwargs))


def first(report: ReplayReport) -> tuple[int, str]:
    return report.differences[0].turn, report.differences[0].what


def a_record(records: list[Record], turns: int, reason: str = "answer") -> Record:
    """Return the first such record whose rewards the end did not replace."""
    return next(
        r for r in records if len(r.trajectory.turns) == turns and r.trajectory.stop_reason == reason
        and not any(turn.reward for turn in r.trajectory.turns[:-1])
    )  # fmt: skip


def test_a_record_without_a_turn_has_nothing_to_differ(mixed: tuple[Path, list[Record]]) -> None:
    out, records = mixed
    first_seen = records[0].trajectory.turns[0].observation
    cut = replace(
        records[0].trajectory, turns=(), terminated=False, truncated=True, stop_reason="context",
        final_observation=first_seen,
    )  # fmt: skip
    assert again(out, replace(records[0], trajectory=cut)).identical
    answered = replace(cut, truncated=False, stop_reason="answer")
    assert first(again(out, replace(records[0], trajectory=answered))) == (0, "ending")


def test_another_outcome_is_a_difference(mixed: tuple[Path, list[Record]]) -> None:
    out, records = mixed
    record = a_record(records, 1)
    other = replace(record.trajectory, outcome={"files": {"a": "1"}})
    (difference,) = again(out, replace(record, trajectory=other)).differences
    assert (difference.turn, difference.what) == (0, "outcome")
    assert '-  "a": "1"' in difference.detail


# --- identical -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [True, False])
def test_every_kind_of_ending_and_call_replays_identically(mixed: tuple[Path, list[Record]], tokens: bool) -> None:
    out, records = mixed
    assert {r.trajectory.stop_reason for r in records} == {"answer", "max_turns", "tokens"}
    before = content(out)
    for record in records:
        report = again(out, record, tokens=tokens)
        assert report.identical, report.text()
        assert report.text().endswith("identical") == tokens
    assert content(out) == before


def test_an_environment_with_step_rewards(tmp_path: Path) -> None:
    records = training_run(tmp_path / "run", "tests.letters_env:Letters", said=SHORT, steps=1)
    for record in records:
        assert again(tmp_path / "run", record).identical
    assert {len(r.trajectory.turns) for r in records} == {2}


def test_the_real_sandbox(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("bwrap")
    out = tmp_path / "run"
    said = (
        call("python", code="print(6*7)"), call("python", code="open('a','a').write('x'); print(open('a').read())"),
        call("python", code="1/0"), r"\boxed{42}", call("python", wrong="x"),
    )  # fmt: skip
    records = training_run(out, "areal/Arithmetic-v0", said=said, steps=1, group_size=6, groups=1)
    ran = {r.status for record in records for t in record.trajectory.turns for r in t.tool_results}
    assert "ok" in ran
    for record in records[:3]:
        assert main(["replay", str(out), "--episode", record.trajectory.id]) == 0
    assert capsys.readouterr().out.count("identical") == 3


@pytest.mark.parametrize("weak", ["unsafe_local", "areal_agents.sandboxes.unsafe_local:UnsafeLocalBackend"])
def test_a_folder_cannot_choose_to_run_its_code_uncontained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weak: str
) -> None:
    """It may be somebody else's. Whoever replays it may."""
    out = tmp_path / "run"
    said = (call("python", code="print(6*7)"), r"\boxed{42}")
    records = training_run(out, "areal/Arithmetic-v0", said=said, steps=1, group_size=2, groups=1)
    config = (out / "config.toml").read_text()
    assert "bubblewrap" in config
    (out / "config.toml").write_text(config.replace("bubblewrap", weak))
    assert main(["replay", str(out), "--episode", records[0].trajectory.id]) == 2
    assert f"was run in the sandbox {weak!r}" in capsys.readouterr().err
    assert main(["replay", str(out), "--episode", records[0].trajectory.id, "--sandbox", weak]) == 0


def test_what_an_evaluation_leaves(tmp_path: Path) -> None:
    records = evaluation_run(tmp_path / "eval")
    assert {SavedRun.open(tmp_path / "eval").env_seed(r) for r in records} == {11, 12}
    for record in records:
        assert again(tmp_path / "eval", record).identical


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_the_seed_matters_and_is_the_runs_own(mixed: tuple[Path, list[Record]]) -> None:
    out, records = mixed
    run = SavedRun.open(out)
    seeds = {r.trajectory.group: run.env_seed(r) for r in records}
    assert len(set(seeds.values())) == len(seeds) == 12
    report = asyncio.run(replay(records[0], run.make_env, seed=run.env_seed(records[0]) + 1))
    assert first(report) == (0, "observation")
    assert "number" in report.differences[0].detail


def test_seeds_of_retried_attempts_and_of_unknown_ids(mixed: tuple[Path, list[Record]]) -> None:
    run, record = SavedRun.open(mixed[0]), mixed[1][0]
    t = record.trajectory
    held_out = Record("eval-before", 0, replace(t, id="eval-before/3/2~1", group="eval-before/3"))
    assert run.env_seed(held_out) == run.seed + 2
    retried = Record("train", 1, replace(t, id=f"{t.id}~2"))
    assert run.env_seed(retried) == run.env_seed(record)
    with pytest.raises(ArealError, match="--seed"):
        run.env_seed(Record("train", 1, replace(t, group="mine")))


# --- differences -----------------------------------------------------------------------------------------------------


def test_a_nondeterministic_environment_is_caught_at_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    (record, *_) = training_run(out, "tests.evaluation.test_replay:Coin", said=SHORT, steps=1)
    report = again(out, record)
    assert first(report) == (1, "observation")
    assert [d.what for d in report.differences] == ["observation", "prompt tokens"]
    shown = record.trajectory.turns[1].observation[0].text
    assert f"-{shown}" in report.differences[0].detail.splitlines()
    assert any(line.startswith("+again ") for line in report.differences[0].detail.splitlines())
    assert main(["replay", str(out), "--episode", record.trajectory.id]) == 1
    assert "first difference, at turn 1: observation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "what", "turn"),
    [("raise", "exception", 1), ("end", "ending", 1), ("key", "state key", 2)],  # a key is shown by the turn after it
)
def test_what_changed_is_named_with_its_turn(
    mixed: tuple[Path, list[Record]], drift: Callable[[str], None], kind: str, what: str, turn: int
) -> None:
    drift(kind)
    report = again(mixed[0], a_record(mixed[1], 3))
    assert first(report) == (turn, what)


def test_changed_tool_results(mixed: tuple[Path, list[Record]], drift: Callable[[str], None]) -> None:
    record = next(r for r in mixed[1] if len(r.trajectory.turns) > 1 and r.trajectory.turns[1].tool_results)
    drift("status")
    report = again(mixed[0], record)
    assert first(report) == (1, "tool results")
    assert "+ToolOutcome(status='timeout'" in report.differences[0].detail


def test_changed_rewards_and_components(mixed: tuple[Path, list[Record]], drift: Callable[[str], None]) -> None:
    outcome = next(  # scored once, at its end: no turn rewards replace what the steps paid
        r for r in mixed[1] if len(r.trajectory.turns) == 2 and r.trajectory.turns[0].reward == 0.0
        and r.trajectory.stop_reason == "answer"
    )  # fmt: skip
    drift("reward")
    report = again(mixed[0], outcome)
    assert [(d.turn, d.what) for d in report.differences] == [(1, "reward")]
    recorded = outcome.trajectory.turns[1].reward
    assert report.differences[0].detail == f"recorded {recorded!r}, replayed {recorded + 0.125!r}"
    drift("components")
    report = again(mixed[0], outcome)
    assert [(d.turn, d.what) for d in report.differences] == [(1, "components")]
    assert "+score = -1.0" in report.differences[0].detail


def test_credit_given_at_the_end_shows_at_the_end(mixed: tuple[Path, list[Record]]) -> None:
    out, records = mixed
    credited = next(r for r in records if len(r.trajectory.turns) == 3 and r.trajectory.turns[0].reward > 0)
    t = credited.trajectory
    turns = (replace(t.turns[0], reward=9.0), *t.turns[1:])
    report = again(out, replace(credited, trajectory=replace(t, turns=turns)))
    assert [(d.turn, d.what) for d in report.differences] == [(2, "reward")]
    assert report.differences[0].detail.startswith("turn 0: recorded 9.0, replayed ")


def test_a_record_that_ends_too_early_or_otherwise(mixed: tuple[Path, list[Record]]) -> None:
    record = a_record(mixed[1], 3)
    t = record.trajectory
    cut = replace(t, turns=t.turns[:2], final_observation=t.turns[2].observation)
    report = again(mixed[0], replace(record, trajectory=cut))
    assert first(report) == (1, "ending")
    assert "the environment goes on" in report.differences[0].detail
    truncated = replace(t, terminated=False, truncated=True, stop_reason="max_turns")
    report = again(mixed[0], replace(record, trajectory=truncated))
    assert first(report) == (2, "ending")
    assert report.differences[0].detail == "recorded truncated (max_turns), replayed terminated (answer)"


def test_an_environment_that_lost_its_own_limit_is_not_taken_for_the_runners(mixed: tuple[Path, list[Record]]) -> None:
    record = a_record(mixed[1], 3)
    t = record.trajectory
    cut = replace(t, turns=t.turns[:2], final_observation=t.turns[2].observation, terminated=False, truncated=True)
    ended = replace(record, trajectory=replace(cut, stop_reason="max_turns"))
    report = again(mixed[0], ended, max_turns=16)  # the runner allowed 16: two turns were the environment's own limit
    assert first(report) == (1, "ending")
    assert "the environment goes on" in report.differences[0].detail
    assert not any(d.what == "ending" for d in again(mixed[0], ended, max_turns=2).differences)
    other = replace(record, trajectory=replace(cut, stop_reason="time_budget"))
    assert first(again(mixed[0], other)) == (1, "ending")


def test_prompt_tokens_and_parsing_are_checked_against_the_ids(mixed: tuple[Path, list[Record]]) -> None:
    out, records = mixed
    record = a_record(records, 3)
    t = record.trajectory
    other = replace(t.turns[1], prompt_suffix=(*t.turns[1].prompt_suffix[:3], 7, 7))
    report = again(out, replace(record, trajectory=replace(t, turns=(t.turns[0], other, t.turns[2]))))
    assert [(d.turn, d.what) for d in report.differences] == [(1, "prompt tokens")]
    assert report.differences[0].detail.startswith("from id 3 on: recorded ")
    said = replace(t.turns[0], message=replace(t.turns[0].message, tool_calls=()))
    report = again(out, replace(record, trajectory=replace(t, turns=(said, *t.turns[1:]))))
    assert first(report) == (0, "parsing")
    orphan = replace(t.turns[1], parent=None)
    report = again(out, replace(record, trajectory=replace(t, turns=(t.turns[0], orphan, t.turns[2]))))
    assert first(report) == (1, "prompt tokens")


@pytest.mark.parametrize(
    ("change", "turn", "what", "detail"),
    [
        ("list", 0, "exception", "it must be a tuple of Message"),
        ("text", 1, "reward", "returned the reward 'much', which is not a number"),
        ("credit", 1, "reward", "turn_rewards has 1 entries for 2 turns"),
        ("close", 1, "exception", "raised OSError: not closed"),
    ],
)
def test_what_breaks_the_contract_is_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, turn: int, what: str, detail: str
) -> None:
    (record, *_) = training_run(tmp_path / "run", "tests.evaluation.test_replay:Changes", said=SHORT, steps=1)
    monkeypatch.setattr(Changes, "change", change)
    report = again(tmp_path / "run", record)
    assert [(d.turn, d.what) for d in report.differences] == [(turn, what)]
    assert detail in report.differences[0].detail


def test_a_hanging_step_is_an_error_and_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record, *_) = training_run(tmp_path / "run", "tests.evaluation.test_replay:Hanging", said=SHORT, steps=1)
    monkeypatch.setattr(Hanging, "hangs", True)
    with pytest.raises(EnvError, match="did not return within"):
        again(tmp_path / "run", record, step_timeout=0.2)


# --- the command -----------------------------------------------------------------------------------------------------


def test_list(mixed: tuple[Path, list[Record]], capsys: pytest.CaptureFixture[str]) -> None:
    out, records = mixed
    assert main(["replay", str(out), "--list", "--limit", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["episode", "step", "task", "reward", "turns", "ended"]
    t = records[0].trajectory
    assert lines[2].split() == [t.id, "1", t.task.id, f"{t.reward:.4g}", str(len(t.turns)), t.stop_reason]
    assert len(lines) == 2 + len(records)
    assert main(["replay", str(out), "--list", "--task", t.task.id, "--limit", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    same = sum(r.trajectory.task.id == t.task.id for r in records)
    assert lines[4:] == [f"2 of {same} episodes; --limit 0 lists all"]
    assert {line.split()[2] for line in lines[2:4]} == {t.task.id}
    assert main(["replay", str(out), "--list", "--task", "none"]) == 1


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        ([], 2, "--episode ID"),
        (["--list", "--episode", "g0/0"], 2, "--episode ID"),
        (["--list", "--limit", "-1"], 2, "at least 0"),
        (["--episode", "g0/9"], 1, "did you mean g0/"),
        (["--episode", "g0/0", "--kind", "eval-before"], 1, "there are train"),
    ],
)
def test_wrong_usage(
    mixed: tuple[Path, list[Record]], argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(mixed[0]), *argv]) == code
    assert message in capsys.readouterr().err


def test_hostile_text_is_escaped(
    mixed: tuple[Path, list[Record]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, records = mixed
    config = settings.load(out / "config.toml")
    record = a_record(records, 2)
    t = record.trajectory
    evil = "\x1b]0;owned\x07\x1b[2J[red]\u202etxt\ud800\r"
    seen = replace(t.turns[1], observation=(user(evil),), message=replace(t.turns[1].message, parts=(Text(evil),)))
    bad = replace(t, turns=(t.turns[0], seen), task=replace(t.task, id=f"x{evil}\ny"))
    save(tmp_path / "evil", config, [replace(record, trajectory=bad)])
    assert main(["replay", str(tmp_path / "evil"), "--episode", t.id]) == 1
    assert main(["replay", str(tmp_path / "evil"), "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "-\\x1b]0;owned\\x07\\x1b[2J[red]\\u202etxt\\ud800\\r" in shown


def test_without_the_models_tokenizer_the_rest_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    (record, *_) = training_run(out, said=SHORT, steps=1)
    (tmp_path / "run-tokenizer").rename(tmp_path / "elsewhere")
    assert main(["replay", str(out), "--episode", record.trajectory.id]) == 0
    assert "not checked, for want of the model's tokenizer" in capsys.readouterr().out
    (tmp_path / "elsewhere").rename(out / "model")  # the trained model's folder has it too
    assert main(["replay", str(out), "--episode", record.trajectory.id]) == 0
    assert "not checked" not in capsys.readouterr().out


def test_plain_keeps_words_and_newlines() -> None:
    assert plain("a [b] é 数\n█") == "a [b] é 数\n█"
    assert plain("\x1b\t\r\x00\u200b") == "\\x1b\\t\\r\\x00\\u200b"
