"""Evaluation: what counts as scored, valid and malformed; the table; tasks that are not there."""

from __future__ import annotations

import asyncio
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.cli.main import main
from areal_agents.errors import (
    ConfigError,
    FailureBudgetError,
    InfraError,
    RegistryError,
    RewardError,
    SandboxUnavailable,
    TemplateError,
)
from areal_agents.evaluation.evaluate import evaluate, evaluation_config, until_stopped
from areal_agents.evaluation.held_out import held_out
from areal_agents.evaluation.players import KeptEngines
from areal_agents.evaluation.progress import Progress
from areal_agents.evaluation.report import EvalReport, Lost, compare_table, summarize
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.settings.config import EngineConfig, EnvConfig, EvalConfig, ModelConfig, RolloutConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import (
    AssistantMessage,
    CallStatus,
    Completion,
    Info,
    Observation,
    Task,
    Text,
    ToolCall,
    Trajectory,
    Turn,
)
from tests.letters_env import Letters
from tests.tiny_models import tiny_chat_model
from tests.tiny_tokenizer import SWITCH, tiny


class Stuck(Letters):
    """A step never ends."""

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        await asyncio.Event().wait()
        raise AssertionError


def attempt(reward: float, *statuses: CallStatus, truncated: bool = False) -> Trajectory:
    calls = tuple(ToolCall(f"c{i}", "t", {}, "", s) for i, s in enumerate(statuses))
    turn = Turn((1,), Completion((2, 3), (-1.0, -1.0), (0, 0), "stop"), AssistantMessage((Text("x"),), calls), reward)
    return Trajectory("e", _task(0), "g", (turn,), not truncated, truncated, "answer")


def _task(i: int) -> Task:
    return Task.make(f"t{i}", split="test", seed=i, payload={"i": i})


def report(*rows: list[Trajectory | None]) -> EvalReport:
    results = [(_task(i), row) for i, row in enumerate(rows)]
    return summarize(results, env="e", split="test", model="m", version=3, temperature=0.0, seed=0, seconds=1.0)


def test_rates_by_hand() -> None:
    r = report(
        [attempt(1.0, "ok"), attempt(0.0, "ok", "invalid_json")],
        [attempt(1.5, "ok", "ok"), attempt(1.0)],
        [attempt(0.0, "unknown_tool", truncated=True), None],
    )
    assert (r.n, r.k, r.attempts) == (3, 2, 5)
    assert r.pass_at_1 == pytest.approx(3 / 5)
    assert r.infra_rate == pytest.approx(1 / 6)
    # the third task lost an attempt: pass@2 and pass^2 are over the first two tasks, (1 of 2) and (2 of 2)
    assert r.pass_at_k == 1.0
    assert r.pass_hat_k == 0.5
    assert r.valid_call_rate == pytest.approx(2 / 5)  # one call and all of them valid
    assert r.accuracy_given_valid == 1.0
    assert r.malformed_call_rate == pytest.approx(2 / 6)
    assert r.truncation_rate == pytest.approx(1 / 5)
    assert r.reward == pytest.approx(3.5 / 5)
    assert r.tokens == 2.0
    assert r.ci95[0] < 0.6 < r.ci95[1]


def test_an_infrastructure_failure_is_no_wrong_answer() -> None:
    assert report([attempt(1.0)], [None]).pass_at_1 == 1.0
    assert report([attempt(1.0), None]).pass_at_k is None
    with pytest.raises(InfraError, match="infrastructure failed every attempt, so that there is nothing to score"):
        report([None], [None])


def test_a_reward_that_fails_now_and_then_is_said_and_is_no_infrastructure() -> None:
    rows: list[tuple[Task, list[Trajectory | None]]] = [
        (_task(0), [attempt(1.0), None, attempt(0.0), None]),
        (_task(1), [attempt(1.0)] * 4),
    ]
    made = summarize(
        rows, env="e", split="test", model="m", version=0, temperature=1.0, seed=0, seconds=1.0,
        lost=Lost(
            own=[(_task(0).id, RewardError("reward 'r' returned nan")), ("gone", RewardError("another task's"))],
            left_out={"gone": "no score"},
        ),
    )  # fmt: skip
    assert (made.failed, made.attempts) == (1, 6)
    assert made.infra_rate == pytest.approx(1 / 7)
    assert made.notes() == ["1 of 8 attempts failed, in no rate: RewardError: reward 'r' returned nan"]
    assert "1 of 8 attempts failed, in no rate: RewardError: reward 'r' returned nan" in made.table()
    with pytest.raises(InfraError, match="e: its own reward or environment failed every attempt"):
        summarize(
            [(_task(0), [None])], env="e", split="test", model="m", version=0, temperature=1.0, seed=0, seconds=1.0,
            lost=Lost(own=[(_task(0).id, RewardError("nan"))]),
        )  # fmt: skip
    # The reward failed attempts at a task that is left out, and infrastructure the one that counts.
    with pytest.raises(InfraError, match="e: infrastructure failed every attempt"):
        summarize(
            [(_task(0), [None])], env="e", split="test", model="m", version=0, temperature=1.0, seed=0, seconds=1.0,
            lost=Lost(own=[("gone", RewardError("nan"))], left_out={"gone": "no score"}),
        )  # fmt: skip


def test_the_table_shows_what_is_not_known_as_a_dash() -> None:
    text = compare_table({"before": report([attempt(0.0)]), "after": report([attempt(1.0, "ok")])})
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == ""
    assert lines[2].startswith("before")
    assert "–" in lines[2].split()
    assert "1.000" in lines[3]


def test_the_table_has_what_several_attempts_say_and_a_word_where_they_are_the_same() -> None:
    pair = report([attempt(1.0), attempt(0.0)], [attempt(1.0), attempt(1.0)])
    head, _, row, note = pair.table().splitlines()
    assert head.split() == [
        "pass@1",
        "95",
        "%",
        "CI",
        "pass@2",
        "95",
        "%",
        "CI",
        "pass^2",
        "95",
        "%",
        "CI",
        "n",
        "valid",
        "calls",
        "pass",
        "|",
        "valid",
        "truncated",
        "infra",
    ]
    assert row.split()[:1] + row.split()[3:6:2] + row.split()[7:8] == ["e:test", "1.000", "0.500", "2"]
    assert note == (
        "note: all 2 attempts at a task are the same at temperature 0, but for what its environment draws from its "
        "seed: pass@2 and pass^2 say nothing more than pass@1 (--temperature 1, or --k 1)"
    )
    warm = replace(pair, temperature=1.0)
    assert "note" not in warm.table()
    one = report([attempt(1.0)])
    assert "pass^" not in one.table()
    assert "note" not in one.table()
    mixed = compare_table({"one": one, "warm": warm}).splitlines()
    assert "pass@k" in mixed[0]
    assert mixed[3].split()[3:6:2] == ["1.000", "0.500"]


def test_an_interrupted_report_says_so() -> None:
    results: list[tuple[Task, list[Trajectory | None]]] = [(_task(0), [attempt(1.0), None]), (_task(1), [attempt(0.0)])]
    part = summarize(
        results, env="e", split="test", model="m", version=0, temperature=1.0, seed=0, seconds=1.0, planned=8
    )
    assert (part.n, part.attempts, part.unplayed) == (2, 2, 5)
    assert part.infra_rate == pytest.approx(1 / 3)
    assert part.table().endswith("note: partial: 3 of 8 attempts were played, at 2 tasks with a score")


def test_an_interrupted_report_is_of_the_attempts_that_were_asked_for() -> None:
    results: list[tuple[Task, list[Trajectory | None]]] = [(_task(0), [attempt(1.0), attempt(0.0)])]
    part = summarize(
        results, env="e", split="test", model="m", version=0, temperature=1.0, seed=0, seconds=1.0, k=4, planned=4
    )
    assert (part.k, part.pass_at_k, part.unplayed) == (4, None, 2)  # no pass@2 in a column of its own


def test_more_tasks_than_there_are() -> None:
    spec = registry.spec("tests.letters_env:Letters")
    assert len(held_out(spec, EvalConfig(n=8), difficulty=None, tell=print)[0]) == 8
    with pytest.raises(ConfigError, match=r"test has 8 tasks, but eval\.n = 9"):
        held_out(spec, EvalConfig(n=9), difficulty=None, tell=print)


def test_progress_is_not_chatty() -> None:
    lines: list[str] = []
    progress = Progress(lines.append, every=0.0)
    progress(1, 4)
    progress(4, 4)
    assert len(lines) == 1
    assert lines[0].startswith("evaluating: 1/4 episodes, ETA")


@pytest.mark.slow
def test_a_real_engine_leaves_report_and_trajectories(tmp_path: Path) -> None:
    model = tiny_chat_model(tmp_path / "model")
    out = tmp_path / "out"
    r = asyncio.run(
        evaluate(
            EnvConfig(id="tests.letters_env:Letters", step_timeout=33.0, split="nowhere"),
            model=ModelConfig(path=str(model), max_context=256),
            n=4,
            k=2,
            temperature=1.0,
            out=out,
            engine=EngineConfig(replicas=2, max_batch=2, transport="disk"),
            rollout=RolloutConfig(max_turn_tokens=6, groups=3),
        )
    )
    assert (r.n, r.k, r.attempts, r.infra_rate) == (4, 2, 8, 0.0)
    saved = [r.trajectory for r in read_records(out, kind="eval")]
    assert len(saved) == 8
    assert json.loads((out / "report.json").read_text())["attempts"] == 8
    assert sum(t.reward for t in saved) / 8 == pytest.approx(r.reward)
    assert max(t.sampled_tokens for t in saved) <= 12  # two turns of six
    table = tomllib.loads((out / "config.toml").read_text())
    assert (table["eval"], table["env"]["step_timeout"]) == (
        {"split": "test", "n": 4, "task_seed": 0, "k": 2, "temperature": 1.0}, 33.0,
    )  # fmt: skip
    assert not {"algorithm", "learner", "steps"} & set(table)
    assert not {"groups", "transport", "split"} & {*table["rollout"], *table["engine"], *table["env"]}
    run = SavedRun.open(out)
    assert (run.env_id, run.model, run.step_timeout, run.max_turns, run.algorithm) == (
        "tests.letters_env:Letters", str(model), 33.0, 16, None,
    )  # fmt: skip


@pytest.mark.slow
def test_a_format_that_the_processor_computes_in_software_is_told_when_engines_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("areal_agents.utils.precision.cpu_flags", lambda: frozenset({"avx2"}))
    model = ModelConfig(path=str(tiny_chat_model(tmp_path / "model")), max_context=256)

    async def two_cells() -> None:
        async with KeptEngines() as kept:
            for name in ("a", "b"):
                config = evaluation_config(
                    EnvConfig(id="tests.letters_env:Letters"), model, EvalConfig(n=1), seed=0, out=tmp_path / name,
                    engine=EngineConfig(precision="bf16", max_batch=2), rollout=RolloutConfig(max_turn_tokens=4),
                )  # fmt: skip
                await until_stopped(config, None, resume=True, kept=kept)

    asyncio.run(two_cells())
    assert capsys.readouterr().out.count("note: engine.precision is bf16, which this processor computes in") == 1
    assert (tmp_path / "a" / "events.jsonl").read_text().count('"slow_format"') == 1
    assert not (tmp_path / "b" / "events.jsonl").exists()


@pytest.mark.slow
def test_variables_of_the_template_and_the_mode_of_the_past_reach_prompts_and_replays(tmp_path: Path) -> None:
    model, out = tiny_chat_model(tmp_path / "model"), tmp_path / "out"
    tokenizer = tiny(SWITCH)
    tokenizer.save_pretrained(model)

    def run(**changes: Any) -> EvalReport:
        return asyncio.run(
            evaluate(
                EnvConfig(id="tests.letters_env:Letters"), n=1, k=1, temperature=1.0, out=out,
                model=ModelConfig(path=str(model), max_context=256, **changes),
                rollout=RolloutConfig(max_turn_tokens=6),
            )
        )  # fmt: skip

    with pytest.raises(TemplateError, match=r"enable_thinkin: .* did you mean enable_thinking\?"):
        run(template_variables={"enable_thinkin": False})
    run(template_variables={"enable_thinking": False}, history="template")
    (record,) = read_records(out, kind="eval")
    assert len(record.trajectory.turns) == 2
    for turn in record.trajectory.turns:
        assert turn.parent is None
        assert tokenizer.decode(list(turn.prompt_suffix)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert main(["replay", str(out), "--kind", "eval", "--episode", record.trajectory.id]) == 0


def test_settings_are_checked_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout.max_turn_tokens = 160 must be under model.max_context = 99"):
        asyncio.run(evaluate("a/B-v0", model=ModelConfig(path="m", max_context=99), out=tmp_path))
    with pytest.raises(ValueError, match="n"):
        asyncio.run(evaluate("a/B-v0", model="m", n=0, out=tmp_path))


@pytest.mark.slow
def test_a_spent_failure_budget_stops_it(tmp_path: Path) -> None:
    """A step that takes longer than it may is an infrastructure error, of which the window forgives one."""
    model = tiny_chat_model(tmp_path / "model")
    env = EnvConfig(id="tests.evaluation.test_evaluate:Stuck", step_timeout=0.2)
    rollout = RolloutConfig(max_turn_tokens=6, max_retries=0, failure_window=4, failure_budget=0.25)
    with pytest.raises(FailureBudgetError, match=r"2 of the last \d episode attempts failed"):
        asyncio.run(evaluate(env, model=str(model), n=4, out=tmp_path / "out", rollout=rollout))


@pytest.mark.parametrize("name", ["report.json", "trajectories/eval/step-000000.parquet", "metrics.jsonl"])
def test_a_folder_that_is_used_already_is_refused_before_anything_is_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    message = (
        rf"{tmp_path} already holds an evaluation or a run \({name.split('/')[0]}\): choose another --out, or remove"
    )
    with pytest.raises(ConfigError, match=message):
        asyncio.run(evaluate("tests.letters_env:Letters", model="no/such/folder", out=tmp_path))
    assert (tmp_path / name).read_text() == "x"


def test_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="areal/Arithmetic-v0"):
        asyncio.run(evaluate("areal/Arithmetc-v0", model="smollm2", out=tmp_path))
    with pytest.raises(RegistryError, match="no split 'tset'"):
        asyncio.run(evaluate("tests.letters_env:Letters", split="tset", model="smollm2", out=tmp_path))


def test_a_missing_sandbox_stops_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.sandboxes.launch._PATH", str(tmp_path))
    monkeypatch.setattr("areal_agents.sandboxes.bubblewrap._reports", {})
    with pytest.raises(SandboxUnavailable, match="bubblewrap"):
        asyncio.run(evaluate("areal/Arithmetic-v0", model="no/such/folder", out=tmp_path / "out"))
