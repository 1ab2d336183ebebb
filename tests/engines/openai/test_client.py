"""OpenAIChat against a real server on loopback: retries, limits, errors and secrets."""

from __future__ import annotations

import asyncio
import json
import random
import traceback
from collections.abc import Awaitable
from typing import Any, TypeVar

import pytest

from areal_agents.chat_model import ContextLengthError, RequestRefused, refuse_training, remote_name
from areal_agents.engine import Sampling
from areal_agents.engines.openai.client import OpenAIChat
from areal_agents.engines.openai.rate_limit import Backoff, Clock, Pace, retry_after
from areal_agents.errors import ArealError, ConfigError, EngineError, ModelError
from areal_agents.tool import ToolSpec
from areal_agents.types import AssistantMessage, Text, ToolCall, system, user
from tests.chat_server import Answer, Behaviour, ChatServer, Drop, Hang, Step, call, chat_server, completion

T = TypeVar("T")
TOOL = ToolSpec("add", "Add.", {"type": "object", "properties": {"a": {"type": "integer"}}})
ASK = (system("be brief"), user("hi"))
SAMPLING = Sampling(9, temperature=0.5, top_p=0.9, seed=3)


class FakeTime:
    """Sleeping only moves it; what was slept is kept."""

    def __init__(self, wall: float = 1_700_000_000.0) -> None:
        self.now, self.start, self.slept = 0.0, wall, list[float]()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.start + self.now, self.sleep)


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(work, 120)

    return asyncio.run(bounded())


async def ask(server: ChatServer, time: FakeTime | None = None, **settings: Any) -> AssistantMessage:
    clock = (time or FakeTime()).clock()
    async with OpenAIChat("m", base_url=server.url, clock=clock, rng=random.Random(0), **settings) as chat:
        return await chat.chat(ASK, (TOOL,), SAMPLING)


def failure(behaviour: Behaviour, **settings: Any) -> ArealError:
    with chat_server(behaviour) as server, pytest.raises(ArealError) as caught:
        run(ask(server, **settings))
    return caught.value


# --- one request ---------------------------------------------------------------------------------------------------


def test_a_request_and_its_reply() -> None:
    said = completion("Let me see. ", finish="tool_calls", tokens=5, tool_calls=[call("add", '{"a": 1}', "call_Zz")])
    with chat_server([said]) as server:

        async def reply() -> Any:
            async with OpenAIChat("m", base_url=server.url + "/", stop=["###"], extra={"n": 1}) as chat:
                return await chat.reply(ASK, (TOOL,), SAMPLING)

        got = run(reply())
    assert (got.prompt_tokens, got.completion_tokens, got.model) == (7, 5, "scripted-1")
    raw = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert got.message == AssistantMessage(
        (Text(f"Let me see. {raw}"),), (ToolCall("call_Zz", "add", {"a": 1}, raw, format="api"),), "stop"
    )
    assert server.requests == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "add", "description": "Add.", "parameters": dict(TOOL.parameters)},
                }
            ],
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "stop": ["###"],
            "n": 1,
        }
    ]
    assert "authorization" not in server.headers[0]
    assert server.headers[0]["accept-encoding"] == "identity"


def test_sampling_that_a_server_cannot_do() -> None:
    chat = OpenAIChat("m", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=r"stop_ids = .* mean nothing to http://127\.0\.0\.1:9/v1/chat/completions"):
        run(chat.chat(ASK, (), Sampling(1, stop_ids=(2,))))


# --- retries -------------------------------------------------------------------------------------------------------


def test_retries_back_off_with_full_jitter_and_honour_retry_after() -> None:
    time = FakeTime(1_700_000_000.0)
    date = "Tue, 14 Nov 2023 22:13:40 GMT"  # 1_700_000_020
    script: list[Step] = [
        Answer({"error": {"message": "slow down"}}, 429, {"retry-after": "7"}),
        Answer(b"oops", 500),
        Answer(b"", 503, {"retry-after": date}),
        Answer(b"", 503, {"retry-after": "3600"}),
        Drop(),
        Answer(b"", 408),
        completion("done"),
    ]
    with chat_server(script) as server:
        assert run(ask(server, time, retry_after_cap=60)).text == "done"
    rng = random.Random(0)
    jitter = [rng.uniform(0, 0.5 * 2**attempt) for attempt in range(6)]
    first, second = 7 + jitter[0], jitter[1]
    assert time.slept == pytest.approx(
        [first, second, 20 - first - second + jitter[2], 60 + jitter[3], jitter[4], jitter[5]]
    )
    assert len({json.dumps(r) for r in server.requests}) == 1  # every try is the same request


def test_a_server_that_asks_for_no_pause_is_not_hammered() -> None:
    time = FakeTime(1_700_000_000.0)
    past = "Tue, 14 Nov 2023 22:13:19 GMT"
    told = [Answer(b"", 429, {"retry-after": "0"}), Answer(b"", 503, {"retry-after": past, "content-encoding": "gzip"})]
    with chat_server([*told, completion("done")]) as server:
        assert run(ask(server, time)).text == "done"
    jitter = random.Random(0)
    assert time.slept == [jitter.uniform(0, 0.5), jitter.uniform(0, 1.0)]


def test_a_proxy_of_the_environment_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks4://127.0.0.1:1")

    async def require() -> None:
        async with OpenAIChat("m", base_url="http://192.0.2.1/v1") as chat:
            await chat.require_answer()

    with pytest.raises(ConfigError, match=r"a proxy that the environment names cannot be used \(.*socks4.*NO_PROXY"):
        run(require())


def test_it_gives_up_with_the_last_failure() -> None:
    error = failure([Answer(b"a", 500), Answer({"error": {"message": "out of memory"}}, 500)], max_retries=1)
    assert isinstance(error, EngineError)
    assert "/v1/chat/completions, model 'm': gave up after 2 tries. The last: HTTP 500: out of memory" in str(error)


def test_a_pause_that_ends_after_the_deadline_is_not_begun() -> None:
    time = FakeTime()
    with (
        chat_server([Answer(b"", 429, {"retry-after": "50"})]) as server,
        pytest.raises(EngineError, match=r"no reply within 40 s \(deadline\): HTTP 429"),
    ):
        run(ask(server, time, deadline=40))
    assert time.slept == []


def test_timeouts_are_retried_and_the_deadline_ends_them() -> None:
    with chat_server([Hang(), completion("late")]) as server:
        assert run(ask(server, timeout=0.1)).text == "late"
    error = failure([Hang()], timeout=30, deadline=0.1)
    assert "no reply within 0.1 s (deadline)" in str(error) or "gave up" in str(error)


def test_nobody_listens() -> None:
    with chat_server([]) as server:
        pass
    with pytest.raises(EngineError, match=r"gave up after 3 tries\. The last: ConnectError"):
        run(ask(server, max_retries=2))

    async def require() -> None:
        async with OpenAIChat("m", base_url=server.url) as chat:
            await chat.require_answer()

    with pytest.raises(EngineError, match="is the server up, and the URL right"):
        run(require())


def test_pure_pacing() -> None:
    assert retry_after("12", now=0) == 12
    assert retry_after("Tue, 14 Nov 2023 22:13:40 GMT", now=1_700_000_000) == 20
    assert retry_after("Tue, 14 Nov 2023 22:13:40 GMT", now=1_800_000_000) == 0
    for nonsense in (None, "", "soon", "-5", "1e3", "9" * 400, "Tue, 99 Nov 2023 99:13:40 GMT"):
        assert retry_after(nonsense, now=0) is None
    pauses = [Backoff(random.Random(i), 1.0, 8.0).pause(k) for i in range(50) for k in range(12)]
    assert 0 <= min(pauses) < 0.2
    assert 7.5 < max(pauses) <= 8
    assert Backoff(random.Random(0)).pause(10_000) <= 30


def test_requests_per_minute_and_concurrency() -> None:
    async def starts(per_minute: float, n: int) -> list[float]:
        time = FakeTime()
        pace = Pace(per_minute, time.clock())
        out = []
        for _ in range(n):
            assert await pace.turn(latest=1e9)
            out.append(time.now)
        assert not await pace.turn(latest=time.now)
        return out

    assert run(starts(30, 4)) == [0, 2, 4, 6]

    async def many(server: ChatServer, time: FakeTime) -> None:
        async with OpenAIChat("m", base_url=server.url, concurrency=2, clock=time.clock()) as chat:
            await asyncio.gather(*(chat.chat(ASK, (), SAMPLING) for _ in range(12)))

    with chat_server([completion("x")] * 12) as server:
        run(many(server, FakeTime()))
    assert len(server.requests) == 12
    assert server.most_running <= 2

    with chat_server([]) as server, pytest.raises(EngineError, match="requests_per_minute left no turn"):
        run(slow_pace(server))


async def slow_pace(server: ChatServer) -> None:
    time = FakeTime()
    chat = OpenAIChat("m", base_url=server.url, requests_per_minute=1, deadline=30, clock=time.clock())
    async with chat:
        assert await chat._pace.turn(0)
        await chat.chat(ASK, (), SAMPLING)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (Answer({"error": {"message": "bad key"}}, 401), ConfigError, ["HTTP 401: bad key", "--api-key-env"]),
        (Answer({"detail": "Not Found"}, 404), ModelError, ["HTTP 404: Not Found", "/v1/models lists the models"]),
        (Answer({"error": {"message": "?", "code": "context_length_exceeded"}}, 400), ContextLengthError, ["HTTP 400"]),
        (Answer({"message": "This model's maximum context length is 9 tokens"}, 400), ContextLengthError, ["9 tokens"]),
        (Answer({"error": {"message": "top_k is unknown"}}, 400), RequestRefused, ["top_k is unknown", "refused"]),
        (Answer({"error": {"message": "pay", "code": "insufficient_quota"}}, 429), ConfigError, ["no quota left"]),
        (Answer(b"", 307, {"location": "http://127.0.0.2/x?key=1"}), ConfigError, ["redirect to 'http://127.0.0.2/x'"]),
        (Answer(b"<html>"), EngineError, ["the reply is no JSON ('<html>')", "ending in /v1"]),
        (Answer(b"[" * 100_000), EngineError, ["the reply is no JSON"]),
        (Answer({"choices": []}), EngineError, ["no chat completion: the body has no choices"]),
        (Answer({"error": {"message": "late refusal"}}), EngineError, ["late refusal"]),
        (Answer({"choices": [{"message": 3}]}), EngineError, ["choices[0].message is no JSON object"]),
        (Answer(b"x", 200, {"content-encoding": "gzip"}), EngineError, ["compressed"]),
        (Answer(b" " * 5000), EngineError, ["longer than 4096 bytes (max_response_bytes)"]),
    ],
)
def test_what_no_retry_helps_is_told_at_once(answer: Answer, kind: type[ArealError], words: list[str]) -> None:
    error = failure([answer], max_response_bytes=4096 if answer.body == b" " * 5000 else 1 << 20)
    assert type(error) is kind
    for word in [*words, "/v1/chat/completions", "'m'"]:
        assert word in str(error)


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("the request exceeds the available context size. try increasing it", 400),
        ("Context size has been exceeded.", 500),
        ("The input (5000 tokens) is longer than the model's context length (4096 tokens).", 400),
        ("Requested input length 300000 exceeds maximum input length 163839", 400),
        ("Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8193. Given: 9000", 422),
        ("The input token count (1048577) exceeds the maximum number of tokens allowed (1048576).", 400),
        ("Input is too long for requested model.", 400),
        ("too many tokens: total number of tokens in the prompt cannot exceed 4081", 400),
        ("This model's maximum prompt length is 131072 but the request contains 140000 tokens.", 400),
        ("The decoder prompt (length 5001) is longer than the maximum model length of 4096.", 400),
        ("Please reduce the length of the messages or completion.", 413),
    ],
)
def test_a_full_context_in_the_words_of_servers(said: str, status: int) -> None:
    assert type(failure([Answer({"error": {"message": said}}, status)])) is ContextLengthError


@pytest.mark.parametrize(
    "said",
    [
        "max_tokens is too large: 5000. This model supports at most 4096 completion tokens",
        "max_output_tokens exceeds the maximum",
        "image input is too large",
        "The input contains invalid characters",
        "messages: at least one message is required",
    ],
)
def test_other_refusals_are_no_full_context(said: str) -> None:
    assert type(failure([Answer({"error": {"message": said}}, 400)])) is RequestRefused


def test_a_huge_error_body_is_read_in_part_and_cut_in_the_message() -> None:
    error = failure([Answer(b"y" * 1_000_000, 400)])
    assert len(str(error)) < 600


def test_the_key_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    echo = Answer({"error": {"message": "the key sk-very-secret is wrong"}}, 401)
    with chat_server([echo]) as server, pytest.raises(ConfigError) as caught:
        run(ask(server, api_key_env="MY_KEY"))
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    assert "the key *** is wrong: check the key in MY_KEY" in str(caught.value)
    told = "".join(traceback.format_exception(caught.value))
    assert "sk-very" not in told
    assert "sk-very" not in repr(OpenAIChat("m", base_url=server.url, api_key_env="MY_KEY"))


@pytest.mark.parametrize("value", ["", "two words", "new\nline", "schlüssel"])
def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="environment variable MY_KEY") as caught:
        OpenAIChat("m", base_url="http://127.0.0.1/v1", api_key_env="MY_KEY")
    assert not value or value not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000/v1", "ftp://host/v1", "http://", "http://me:secret@host/v1", "http://h:port/v1"]
)
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="server's URL") as caught:
        OpenAIChat("m", base_url=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("setting", ["timeout", "deadline", "concurrency", "requests_per_minute"])
def test_settings_out_of_range(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is 0"):
        OpenAIChat("m", base_url="http://h/v1", **{setting: 0})  # type: ignore[arg-type]


def test_after_closing() -> None:
    async def use() -> None:
        async with OpenAIChat("m", base_url="http://127.0.0.1:9/v1") as chat:
            pass
        await chat.close()
        await chat.chat(ASK, (), SAMPLING)

    with pytest.raises(EngineError, match="closed"):
        run(use())


def test_training_is_refused_with_the_reason() -> None:
    assert remote_name("openai:org/m") == "org/m"
    assert remote_name("smollm2") is None
    with pytest.raises(ConfigError, match="names no model"):
        remote_name("openai:")
    with pytest.raises(ConfigError, match=r"openai:m cannot be trained: .*token ids \(T1\).*log-probability.*\(T3\)"):
        refuse_training("openai:m")
