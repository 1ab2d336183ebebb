"""Models that are named by where they are served: in settings, in other processes, on one event loop after another."""

from __future__ import annotations

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest

from areal_agents.chat_model import MeteredChatModel
from areal_agents.cli.main import main
from areal_agents.engine import Sampling
from areal_agents.errors import ConfigError, InfraError
from areal_agents.evaluation.evaluate import evaluate
from areal_agents.evaluation.players import Server
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.reward import Episode
from areal_agents.rewards import Budget, Panel, pointwise
from areal_agents.served_model import ServedModel, chat_model, chat_models
from areal_agents.settings.config import EnvConfig, RolloutConfig
from areal_agents.tool import tool
from areal_agents.toolenv import ToolEnv
from areal_agents.types import AssistantMessage, Task, ToolCall, user
from tests.chat_envs import Sums
from tests.chat_server import Answer, Json, chat_server, completion
from tests.rewards.judges.scripted import Scripted, gives

URL = "http://127.0.0.1:9/v1"
HELLO = (user("hello"),)


def say(model: Any) -> Any:
    return model.chat(HELLO, (), Sampling(5))


def test_names() -> None:
    model = ServedModel.parse(f"openai:org/Qwen@fp8@{URL}")
    assert (model.model, model.url, str(model)) == ("org/Qwen@fp8", URL, f"openai:org/Qwen@fp8@{URL}")
    assert isinstance(model, MeteredChatModel)
    assert chat_model(model) is model
    table = {"model": "m", "url": URL, "timeout": 3, "extra": {"a": [1]}}
    assert chat_models({"judge": table}) == {"judge": ServedModel("m", URL, timeout=3, extra={"a": [1]})}
    assert pickle.loads(pickle.dumps(chat_model(table))) == chat_model(table)
    assert len({ServedModel("m", URL), ServedModel("m", URL), ServedModel("m", URL, timeout=3)}) == 2


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("m", "write openai:MODEL@http"),
        ("openai:m", "write openai:MODEL@http"),
        ("openai:@http://h/v1", "write openai:MODEL@http"),
        (f"m@{URL}", "write openai:MODEL@http"),
        ({"url": URL}, "lacks model"),
        ({"model": "", "url": URL}, "needs the name"),
        ({"model": "m", "url": "h:1"}, "http://HOST:PORT/v1"),
        ({"model": "m", "url": URL, "concurency": 2}, "unknown option 'concurency'"),
        ({"model": "m", "url": URL, "rng": 1}, "unknown option 'rng'"),
        ({"model": "m", "url": URL, "extra": {"a": object()}}, "JSON values"),
        ({"model": "m", "url": URL, "concurrency": 0}, "concurrency is 0"),
        ({"model": "m", "url": URL, "timeout": "soon"}, "openai:m@"),
        (None, "no chat model"),
    ],
)
def test_what_names_no_model(named: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        chat_model(named)


def test_it_is_used_on_one_loop_after_another_and_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda body: completion(body["messages"][0]["content"])) as server:
        model = ServedModel("m", server.url, api_key_env="JUDGE_KEY")
        with pytest.raises(ConfigError, match="JUDGE_KEY is not set"):
            asyncio.run(say(model))
        monkeypatch.setenv("JUDGE_KEY", "sk-1")
        for _ in range(2):
            assert asyncio.run(say(model)).text == "hello"

        async def twice() -> None:
            await say(model)
            await asyncio.gather(say(model), say(model))

        asyncio.run(twice())
    assert len(server.requests) == 5
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-1"}


def test_equal_models_share_their_limits() -> None:
    with chat_server(lambda body: completion("yes")) as server:

        async def run(*models: ServedModel) -> None:
            await asyncio.gather(*(say(model) for model in models for _ in range(6)))

        asyncio.run(run(ServedModel("m", server.url, concurrency=1), ServedModel("m", server.url, concurrency=1)))
    assert (len(server.requests), server.most_running) == (12, 1)


# --- through an environment ----------------------------------------------------------------------------------------


@tool()
async def ask(question: str, *, models: dict[str, Any]) -> str:
    """Ask the oracle."""
    reply: AssistantMessage = await models["judge"].chat((user(question),), (), Sampling(5))
    return reply.text


class Judged(ToolEnv):
    tasks, prompt = Sums.tasks, Sums.prompt
    tools = (ask,)
    rubric = pointwise(Panel(["judge"]), "Is it right?", reference="answer")


def test_tools_and_the_rubric_get_the_environments_models() -> None:
    judge = Scripted(lambda prompt: gives(4)(prompt) if "with the tag" in prompt else "so it is")
    env = Judged(models={"judge": judge})

    async def play() -> tuple[str, float, dict[str, Any]]:
        await env.areset(seed=0, options={"task": Judged.tasks("test")[0]})
        call = ToolCall("1", "ask", {"question": "107?"}, "")
        observation, *_ = await env.astep(AssistantMessage((), (call,)))
        _, reward, *_, info = await env.astep(AssistantMessage(user("107").parts))
        return observation[0].text, reward, info

    text, reward, info = asyncio.run(play())
    assert (text, reward, info["components"]["judge.judge"]) == ("so it is", 0.75, 0.75)


def test_an_episode_travels_without_its_models() -> None:
    episode = Episode(Task.make("t", split="s", seed=0, payload={}), HELLO, "x", (), "answer", {"judge": Scripted(str)})
    copy = pickle.loads(pickle.dumps(episode))
    assert (copy, copy.models) == (episode, {})
    assert "Scripted" not in repr(episode)


def test_an_environment_refuses_what_is_no_model() -> None:
    with pytest.raises(ConfigError, match="write openai:MODEL@http"):
        Judged(models={"judge": "qwen"})


class JudgedOnServer(ToolEnv):
    rubric = pointwise(Panel(["judge"]), "Is it right?", reference="answer")
    tasks, prompt = Sums.tasks, Sums.prompt


def test_a_name_in_the_settings_reaches_evaluation_and_rescoring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The settings hold texts alone, so they reach processes and saved runs as they are."""

    def served(body: Json) -> Answer:
        prompt = body["messages"][-1]["content"]
        return completion(gives(2)(prompt) if body["model"] == "judge" else "107", tokens=3)

    with chat_server(served) as server:
        name = "tests.test_served_model:JudgedOnServer"
        env = EnvConfig(id=name, kwargs={"models": {"judge": f"openai:judge@{server.url}"}})
        report = asyncio.run(
            evaluate(
                env, model="openai:policy", server=Server(server.url), n=2, out=tmp_path / "run",
                rollout=RolloutConfig(max_turns=2),
            )
        )  # fmt: skip
        assert (report.attempts, report.reward) == (2, 0.25)
        assert SavedRun.open(tmp_path / "run").env_models == {"judge": ServedModel("judge", server.url)}
        assert main(["rescore", str(tmp_path / "run"), "--reward", name, "--kind", "eval"]) == 0
    assert "failed" not in capsys.readouterr().err
    assert len(server.requests) == 2 + 2  # the same question and answer, judged once


class Thrifty(JudgedOnServer):
    rubric = pointwise(Panel(["judge"], budget=Budget(calls=1)), "Is it right?")


def test_a_spent_budget_ends_an_evaluation_and_lost_judges_are_infrastructure(tmp_path: Path) -> None:
    def served(body: Json) -> Answer:
        if body["model"] == "policy":
            return completion("107", tokens=3)
        return completion(gives(2)(body["messages"][-1]["content"])) if body["model"] == "judge" else Answer(b"", 500)

    def run(name: str, judge: str) -> Any:
        models = {"judge": {"model": judge, "url": server.url, "max_retries": 0}}
        rollout = RolloutConfig(max_turns=2, max_retries=1, failure_budget=1.0)
        return evaluate(
            EnvConfig(id=f"tests.test_served_model:{name}", kwargs={"models": models}), model="openai:policy",
            server=Server(server.url), n=2, out=tmp_path / judge, rollout=rollout,
        )  # fmt: skip

    with chat_server(served) as server:
        with pytest.raises(ConfigError, match="the judges' budget of 1 calls is spent: 1 calls"):
            asyncio.run(run("Thrifty", "judge"))
        with pytest.raises(InfraError, match=r"nothing to score\. First failure: 0 of 1 judges answered"):
            asyncio.run(run("JudgedOnServer", "lost"))
    assert sum(body["model"] == "lost" for body in server.requests) == 4  # two episodes, each retried once
