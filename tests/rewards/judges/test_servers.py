"""A panel against OpenAI-compatible servers over HTTP: up, down, silent, talking nonsense, and busy.

One with real vLLM is in tests/engines/vllm/test_server.py.
"""

from __future__ import annotations

import asyncio

import pytest

from areal_agents.engines.vllm.server import free_port
from areal_agents.errors import ConfigError, InfraError, ModelError
from areal_agents.reward import Verdict
from areal_agents.rewards import Budget, Panel, pointwise, ranked
from areal_agents.served_model import ServedModel
from tests.chat_server import Answer, Drop, Hang, Json, Step, chat_server, completion
from tests.rewards.judges.scripted import episode, honest, prefers


def judging(body: Json) -> Step:
    """Judges by model name."""
    prompt = body["messages"][0]["content"]
    match body["model"]:
        case "honest":
            return completion(honest(prompt), tokens=20)
        case "longer":
            return completion(prefers(len)(prompt), tokens=20)
        case "slow":
            return Hang()
        case "garbage":
            return completion("\x00".join(["quality=5"] * 99), tokens=20)
        case "silent":
            return completion(None)
        case "html":
            return Answer(b"<html>502</html>")
        case "drops":
            return Drop()
        case "refuses":
            return Answer({"error": {"message": "no system role"}}, 400)
    return Answer({"error": {"message": "no such model"}}, 404)


def score(panel: Panel, answer: str = "12") -> Verdict:
    return asyncio.run(pointwise(panel, "Is it right?")(episode(answer)))


def test_one_down_one_slow_one_that_returns_garbage() -> None:
    with chat_server(judging) as server:

        def at(model: str, url: str = server.url, deadline: float = 100.0) -> ServedModel:
            return ServedModel(model, url, max_retries=1, deadline=deadline)

        down = f"http://127.0.0.1:{free_port('127.0.0.1', 0)}/v1"
        judges = {
            "good": at("honest"),
            "down": at("honest", down),
            "slow": at("slow", deadline=0.5),
            "garbage": at("garbage"),
        }
        panel = Panel(judges, quorum=1, deadline=100.0)
        assert (score(panel).score, score(panel, "13").score) == (1.0, 0.0)
        found = score(panel, "twelve")
        assert found.components == {
            "judged": 0.0, "judge.good": 0.0, "agreement": 1.0, "judges": 1.0, "judges_failed": 3.0, "cut": 0.0,
        }  # fmt: skip
        assert panel.failed == {"down": 3, "slow": 3, "garbage": 3}
        with pytest.raises(InfraError) as failed:
            score(Panel(judges, quorum=2, deadline=100.0))
    told = str(failed.value)
    assert "1 of 4 judges answered, the quorum is 2" in told
    assert "model 'slow': no reply within 0.5 s" in told
    assert "garbage: its reply cannot be read" in told
    assert f"down: {down}/chat/completions, model 'honest': gave up after 2 tries" in told


@pytest.mark.parametrize("model", ["silent", "html", "drops", "refuses"])
def test_no_reply_of_a_server_is_a_score(model: str) -> None:
    with chat_server(judging) as server, pytest.raises(InfraError, match="0 of 1 judges answered"):
        score(Panel({"a": ServedModel(model, server.url, max_retries=0)}))


def test_wrong_settings_are_told_at_once_and_not_counted_as_failures() -> None:
    with chat_server(judging) as server:
        good = f"openai:honest@{server.url}"
        with pytest.raises(ModelError, match="no such model"):
            score(Panel([good, f"openai:unknown@{server.url}"]))
    refusal = Answer({"error": {"message": "bad key"}}, 401)
    with chat_server([refusal]) as server, pytest.raises(ConfigError, match="bad key"):
        score(Panel([f"openai:honest@{server.url}"]))


def test_a_busy_server_is_asked_again_within_the_deadline() -> None:
    steps = iter([Answer(b"", 429, {"retry-after": "0"}), Answer(b"", 503)])
    with chat_server(lambda body: next(steps, None) or judging(body)) as server:
        panel = Panel([f"openai:honest@{server.url}"], budget=Budget(calls=1, tokens=100))
        assert score(panel).score == 1.0
    assert len(server.requests) == 3
    assert (panel.spent.calls, panel.spent.tokens) == (1, 27)


def test_a_group_is_ranked_over_http() -> None:
    with chat_server(judging) as server:
        panel = Panel([f"openai:longer@{server.url}"], concurrency=2)
        verdicts = asyncio.run(ranked(panel, "Longer?")([episode(a) for a in ("a", "ccc", "bb", "ccc")]))
        assert [v.score for v in verdicts] == [
            0.0,
            pytest.approx(2.5 / 3),
            pytest.approx(1 / 3),
            pytest.approx(2.5 / 3),
        ]
    assert server.most_running <= 2
    assert len(server.requests) == 2 * 3  # six matches: two of them are another's, and one needs no judge


def test_text_arrives_as_it_was_sealed() -> None:
    with chat_server(judging) as server:
        assert score(Panel([f"openai:honest@{server.url}"]), "٣ 漢字 \ud800 <|im_end|>").score == 0.0
    assert "٣ 漢字 \ufffd < |im_end|>" in server.requests[0]["messages"][0]["content"]
