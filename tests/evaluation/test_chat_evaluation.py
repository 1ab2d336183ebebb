"""Evaluation of a model behind a server: exact numbers, saved episodes without ids, refusals."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from areal_agents.algorithms.batch import rows_of
from areal_agents.chat.toolcalls import parse_text
from areal_agents.chat_model import ChatReply, ContextLengthError
from areal_agents.cli.main import main
from areal_agents.engine import Sampling
from areal_agents.errors import ConfigError, TaskError
from areal_agents.evaluation.evaluate import evaluate
from areal_agents.evaluation.players import Server
from areal_agents.evaluation.report import EvalReport
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.rollout.chat_policy import ChatPolicy
from areal_agents.rollout.episode import Limits
from areal_agents.rollout.player import LocalPlayer
from areal_agents.settings.config import ModelConfig, RolloutConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import AssistantMessage, Finish, StopReason, Trajectory
from tests.chat_envs import Sums
from tests.chat_server import Answer, Json, Step, call, chat_server, completion

ENV = "tests.chat_envs:Sums"
LIMITS = Limits(500, 20, 100, 4, 5.0, 5.0)


def scripted(body: Json) -> Step:
    """Task i of four: right, wrong, a broken call and then right, calls without end."""
    messages = body["messages"]
    a, b = (int(n) for n in messages[1]["content"].rstrip("?").split("+"))
    turns = sum(m["role"] == "assistant" for m in messages)
    good = call("add", json.dumps({"a": a, "b": b}), f"call_{a}_{turns}")
    kind = a % 4
    if kind == 1:
        return completion("\\boxed{1}", tokens=4)
    if kind == 3:
        return completion(None, finish="tool_calls", tokens=5, tool_calls=[good])
    if turns == 0:
        broken = call("add", '{"a": 1,', "call_broken")
        return completion("first ", finish="tool_calls", tokens=3, tool_calls=[broken if kind == 2 else good])
    if kind == 2 and turns == 1:
        return completion("", tokens=3, tool_calls=[good])
    assert messages[-1]["role"] == "tool"
    return completion(f"\\boxed{{{messages[-1]['content']}}}", tokens=2)


def run_evaluation(out: Path, url: str, **settings: Any) -> EvalReport:
    limits = {"max_turns": 4, "max_turn_tokens": 20} | settings.pop("rollout", {})
    model = ModelConfig(path="openai:m", **settings.pop("model", {}))
    options: dict[str, Any] = {"n": 8, "k": 2} | settings
    server = Server(url, concurrency=3, requests_per_minute=100_000)
    return asyncio.run(
        evaluate(
            ENV,
            model=model,
            rollout=RolloutConfig.model_validate(limits),
            server=server,
            out=out,
            task_seed=None,
            **options,
        )
    )


def test_pass_at_1_is_exact_and_episodes_are_saved(tmp_path: Path) -> None:
    with chat_server(scripted) as server:
        report = run_evaluation(tmp_path / "out", server.url, seed=5, temperature=0.25)
    assert (report.n, report.k, report.attempts, report.infra_rate) == (8, 2, 16, 0.0)
    assert (report.pass_at_1, report.pass_at_k, report.pass_hat_k) == (0.5, 0.5, 0.5)
    assert report.truncation_rate == 0.25
    assert report.turns == (2 + 1 + 3 + 4) / 4
    assert report.tokens == (5 + 4 + 8 + 20) / 4
    # calls: 1 good; none; 1 broken and 1 good; 4 good
    assert report.malformed_call_rate == pytest.approx(1 / 7)
    assert report.valid_call_rate == 0.5
    assert (report.model, report.served) == ("openai:m", f"scripted-1 at {server.url}/chat/completions")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["served"] == report.served
    seeds = [r["seed"] for r in server.requests]
    assert len(set(seeds)) == len(seeds) == 40  # tasks, attempts and turns share no noise
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert {r["temperature"] for r in server.requests} == {0.25}
    assert server.most_running <= 3

    saved = [r.trajectory for r in read_records(tmp_path / "out", kind="eval")]
    assert len(saved) == 16
    by_task = {t.task.id: t for t in saved}
    right, endless = by_task["test-0"], by_task["test-3"]
    assert (right.reward, right.stop_reason, right.sampled_tokens) == (1.0, "answer", 5)
    assert (endless.stop_reason, endless.truncated, len(endless.turns)) == ("max_turns", True, 4)
    assert [t.parent for t in endless.turns] == [None, 0, 1, 2]
    one = right.turns[0].message.tool_calls[0]
    assert (one.id, one.arguments, one.status) == ("call_100_0", {"a": 100, "b": 7}, "ok")
    assert right.turns[1].observation[0].text == "107"
    assert right.metrics["prompt_tokens"] == 14
    assert [sum(t.message.tokens or 0 for t in trajectory.turns) for trajectory in (right, endless)] == [5, 20]
    assert right.metrics["generate_seconds"] > 0
    assert by_task["test-2"].turns[0].message.tool_calls[0].status == "invalid_json"
    assert SavedRun.open(tmp_path / "out").model_folder() is None
    for trajectory in (right, endless, by_task["test-2"]):
        assert main(["replay", str(tmp_path / "out"), "--kind", "eval", "--episode", trajectory.id]) == 0


def thinking(body: Json) -> Step:
    """A call after a thought, then the answer after another one."""
    if body["messages"][-1]["role"] == "user":
        return completion(None, reasoning_content="I <b>add</b>", tool_calls=[call("add", '{"a": 100, "b": 7}')])
    return completion("\\boxed{107}", reasoning_content="\\boxed{0}, no")


@pytest.mark.parametrize("asked", [False, True])
def test_a_servers_thinking_is_kept_and_sent_back_where_asked(tmp_path: Path, asked: bool) -> None:
    argv = ["eval", ENV, "--model", "openai:m", "--n", "1", "--eval.task_seed", "none", "--out", str(tmp_path / "out")]
    with chat_server(thinking) as server:
        assert main([*argv, "--url", server.url, *(["--send-reasoning"] if asked else [])]) == 0
    (record,) = read_records(tmp_path / "out")
    turns = record.trajectory.turns
    assert [turn.message.reasoning for turn in turns] == ["I <b>add</b>", "\\boxed{0}, no"]
    assert (turns[1].message.text, record.trajectory.reward) == ("\\boxed{107}", 1.0)
    said = server.requests[1]["messages"][2]
    assert said["role"] == "assistant"
    assert said.get("reasoning_content") == ("I <b>add</b>" if asked else None)
    assert main(["replay", str(tmp_path / "out"), "--kind", "eval", "--episode", "test/0/0"]) == 0


def test_variables_of_the_template_go_along_with_each_request(tmp_path: Path) -> None:
    with chat_server(scripted) as server:
        run_evaluation(tmp_path / "a", server.url, n=1, k=1, model={"template_variables": {"enable_thinking": False}})
        assert {json.dumps(r["chat_template_kwargs"]) for r in server.requests} == {'{"enable_thinking": false}'}
        server.requests.clear()
        run_evaluation(tmp_path / "b", server.url, n=1, k=1)
        assert not any("chat_template_kwargs" in r for r in server.requests)


def test_its_episodes_cannot_become_training_rows(tmp_path: Path) -> None:
    with chat_server(scripted) as server:
        run_evaluation(tmp_path / "out", server.url, n=1, k=1)
    (record,) = read_records(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"turn 0 has neither token ids nor log-probabilities \(T1, T3\)"):
        rows_of(record.trajectory, [1.0] * len(record.trajectory.turns), episode=0)


def test_a_refused_key_stops_the_evaluation_at_once(tmp_path: Path) -> None:
    with (
        chat_server(lambda body: Answer({"error": {"message": "no"}}, 401)) as server,
        pytest.raises(ConfigError, match="HTTP 401: no"),
    ):
        run_evaluation(tmp_path / "out", server.url)
    assert len(server.requests) <= 3


def test_an_episode_that_the_server_refuses_is_not_paid_twice(tmp_path: Path) -> None:
    def filtered(body: Json) -> Step:
        if body["messages"][1]["content"].startswith("100+") and body["messages"][-1]["role"] == "tool":
            return Answer({"error": {"message": "content filter"}}, 400)
        return scripted(body)

    with chat_server(filtered) as server:
        report = run_evaluation(tmp_path / "out", server.url, n=4, k=1)
    assert (report.attempts, report.infra_rate) == (3, 0.25)  # the one that failed is no attempt
    first = [r for r in server.requests if r["messages"][1]["content"].startswith("100+")]
    assert len(first) == 2  # a call, and the refused turn after it: once


def test_model_and_server_belong_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs its server's URL"):
        asyncio.run(evaluate(ENV, model="openai:m", out=tmp_path / "a"))
    with pytest.raises(ConfigError, match="other models have none"):
        asyncio.run(evaluate(ENV, model="smollm2", server=Server("http://h/v1"), out=tmp_path / "a"))
    with pytest.raises(ConfigError, match="MISSING_KEY is not set"):
        asyncio.run(evaluate(ENV, model="openai:m", server=Server("http://h", "MISSING_KEY"), out=tmp_path / "a", n=1))
    assert not (tmp_path / "a").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(scripted) as server:
        argv = ["eval", ENV, "--model", "openai:m", "--url", server.url, "--n", "4", "--max-turns", "4"]
        argv += ["--eval.task_seed", "none"]
        assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"served: scripted-1 at {server.url}/chat/completions" in out
    assert f"{ENV}:test  0.500" in out
    for wrong, words in (
        (["--model", "openai:m"], "--model openai:m --url http://127.0.0.1:8000/v1"),
        (["--model", "smollm2", "--url", "http://h/v1"], "belong together"),
        (["--model", "smollm2", "--api-key-env", "KEY"], "--api-key-env belongs to --url"),
    ):
        assert main(["eval", ENV, *wrong]) == 2
        assert words in capsys.readouterr().err


# --- limits --------------------------------------------------------------------------------------------------------


def play(model: Any, limits: Limits = LIMITS) -> Trajectory:
    async def main() -> Trajectory:
        player = LocalPlayer(lambda: Sums(sandbox=None), lambda task: ChatPolicy(model, Sampling(50), limits), limits)
        try:
            return await player.play(Sums.tasks("test")[0], id="e", group="g", seed=1)
        finally:
            await player.close()

    return asyncio.run(main())


class Unmetered:
    """A ChatModel that reports nothing and calls a tool without end."""

    def __init__(self, full_at: int = 99) -> None:
        self.asked: list[Sampling] = []
        self.full_at = full_at

    async def chat(self, messages: Any, tools: Any, sampling: Sampling) -> AssistantMessage:
        self.asked.append(sampling)
        if len(self.asked) == self.full_at:
            raise ContextLengthError("full")
        return parse_text('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>')


def test_limits_by_reported_tokens(tmp_path: Path) -> None:
    with chat_server(lambda body: completion(None, tokens=9, tool_calls=[call("add", "{}")])) as server:
        for settings, reason, turns in (
            ({"rollout": {"max_turn_tokens": 5, "max_turns": 3}}, "tokens", 2),  # 15 an episode: 9, then 6 are left
            ({"rollout": {"max_turn_tokens": 15}, "model": {"max_context": 16}}, "context", 1),  # 7 of the prompt and 9
            ({"rollout": {"max_episode_tokens": 9}}, "tokens", 1),
        ):
            out = tmp_path / str(len(server.requests))
            run_evaluation(out, server.url, n=1, k=1, **settings)
            (record,) = read_records(out)
            assert (record.trajectory.stop_reason, len(record.trajectory.turns)) == (reason, turns)
    assert [r["max_tokens"] for r in server.requests] == [5, 5, 15, 9]


def test_a_full_context_ends_the_episode_and_the_environment_scores_it() -> None:
    played = play(Unmetered(full_at=3))
    assert (played.stop_reason, played.truncated, len(played.turns), played.sampled_tokens) == ("context", True, 2, 0)
    with pytest.raises(TaskError, match="the first prompt does not fit the model: full"):
        play(Unmetered(full_at=1))
    assert play(Unmetered()).stop_reason == "max_turns"


# --- how replies end -------------------------------------------------------------------------------------------------


def test_cut_filtered_and_empty_replies_are_shown_apart_and_are_no_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def replies(body: Json) -> Step:
        a, b = (int(n) for n in body["messages"][1]["content"].rstrip("?").split("+"))
        right = f"\\boxed{{{a + b}}}"
        return (
            completion(right, tokens=4),
            completion(right, finish="length", tokens=20),
            completion(right, finish="content_filter", tokens=4),
            completion(None, tokens=0),
            completion(right, finish="length", tokens=4),  # by a limit of the server's own
        )[a - 100]

    with chat_server(replies) as server:
        argv = ["eval", ENV, "--model", "openai:m", "--url", server.url, "--n", "5", "--rollout.max-turn-tokens", "20"]
        argv += ["--eval.task_seed", "none"]
        assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["pass_at_1"], report["truncation_rate"], report["infra_rate"]) == (0.2, 0.8, 0.0)
    assert report["endings"] == {"length": 2, "answer": 1, "content_filter": 1, "empty": 1}
    assert report["finishes"] == {"length": 2, "stop": 1, "content_filter": 1, "empty": 1}
    assert "ended by length 2, answer 1, content_filter 1, empty 1; turns cut by" in capsys.readouterr().out
    for record in read_records(tmp_path / "out"):
        assert main(["replay", str(tmp_path / "out"), "--kind", "eval", "--episode", record.trajectory.id]) == 0


def test_a_conversation_that_the_filter_refuses_ends_truncated(tmp_path: Path) -> None:
    def filtered(body: Json) -> Step:
        if body["messages"][-1]["role"] == "tool":
            return Answer({"error": {"message": "no", "code": "content_filter"}}, 400)
        return completion(None, finish="tool_calls", tokens=5, tool_calls=[call("add", '{"a": 1, "b": 2}')])

    with chat_server(filtered) as server:
        report = run_evaluation(tmp_path / "out", server.url, n=2, k=1)
    assert (report.attempts, report.endings, report.truncation_rate) == (2, {"content_filter": 2}, 1.0)
    (record, _) = read_records(tmp_path / "out")
    assert main(["replay", str(tmp_path / "out"), "--kind", "eval", "--episode", record.trajectory.id]) == 0


class Ends:
    """A ChatModel that says one thing, and ends it somehow."""

    def __init__(self, text: str, finish: Finish) -> None:
        self.message = parse_text(text, finish)

    async def chat(self, messages: Any, tools: Any, sampling: Sampling) -> AssistantMessage:
        return self.message


@pytest.mark.parametrize(
    ("text", "finish", "reason", "reward"),
    [
        ("\\boxed{107}", "stop", "answer", 1.0),
        ("\\boxed{107}", "length", "length", 0.0),
        (" ", "stop", "empty", 0.0),
    ],
)
def test_models_that_report_nothing_are_held_to_the_same(
    text: str, finish: Finish, reason: StopReason, reward: float
) -> None:
    played = play(Ends(text, finish))
    assert (played.stop_reason, played.reward, played.truncated) == (reason, reward, reason != "answer")
    assert [turn.message.tokens for turn in played.turns] == [None]


def test_the_budget_that_cut_a_reply_is_named() -> None:
    class Metered(Ends):
        async def reply(self, messages: Any, tools: Any, sampling: Sampling) -> ChatReply:
            return ChatReply(self.message, 7, sampling.max_tokens)

    cut = Metered("\\boxed{107}", "length")
    assert play(cut).stop_reason == "length"
    assert play(cut, replace(LIMITS, max_episode_tokens=12)).stop_reason == "tokens"
    assert play(cut, replace(LIMITS, max_context=28)).stop_reason == "length"
    assert play(cut, replace(LIMITS, max_context=27)).stop_reason == "context"
