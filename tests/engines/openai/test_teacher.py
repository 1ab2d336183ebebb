"""A teacher behind a server: what it is asked, when it is asked again, and how it fails; its tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from areal_agents.algorithms.batch import Row
from areal_agents.engines.openai.teacher import ServedTeacher
from areal_agents.errors import ConfigError, EngineError
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.teacher import TeacherConfig
from areal_agents.trainer.teacher import difference, require_teacher
from tests.chat_server import Answer, Drop, Hang, Json, Step, chat_server
from tests.tiny_models import tiny_chat_model
from tests.tiny_tokenizer import tiny


def row(*ids: int, sampled: int) -> Row:
    mask = np.arange(len(ids)) >= len(ids) - sampled
    zeros = np.zeros(len(ids), np.float32)
    return Row(np.array(ids), mask, zeros, np.zeros(len(ids), np.int64), np.where(mask, 0, -1), zeros, 0)


def scored(body: Json, number: Callable[[int], float] = lambda id: -id / 100) -> Answer:
    """As vLLM answers: nothing for the first token, and each next one's number by its id."""
    ids = body["prompt"]
    entries = [None, *({str(i): {"logprob": number(i), "rank": 1, "decoded_token": "x"}} for i in ids[1:])]
    return Answer({"choices": [{"text": "", "prompt_logprobs": entries}]})


def asked(behaviour: Any, *rows: Row, known: int = 1000, **settings: Any) -> tuple[list[Any], Any]:
    with chat_server(behaviour) as server:
        teacher = ServedTeacher(TeacherConfig(model="big", url=server.url, **settings), known=known)
        return asyncio.run(teacher.logprobs(rows)), server


def says(number: str) -> Answer:
    """An answer for one token, whose number stands there as it is."""
    return Answer(f'{{"choices": [{{"prompt_logprobs": [null, {{"2": {{"logprob": {number}}}}}]}}]}}'.encode())


def test_each_sampled_token_gets_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret")
    found, server = asked(scored, row(1, 2, 3, 4, sampled=2), row(9, 8, sampled=1), api_key_env="TEACHER_KEY")
    assert found[0].tolist() == pytest.approx([0, 0, -0.03, -0.04])
    assert found[1].tolist() == pytest.approx([0, -0.08])
    assert sorted(r["prompt"] for r in server.requests) == [[1, 2, 3, 4], [9, 8]]
    body = server.requests[0]
    assert (body["model"], body["prompt_logprobs"], body["max_tokens"]) == ("big", 0, 1)
    assert {h["authorization"] for h in server.headers} == {"Bearer secret"}


def test_an_id_of_padding_and_a_token_of_no_probability_have_no_number() -> None:
    found, server = asked(
        lambda body: scored(body, lambda id: -9999.0 if id == 5 else -1.0),
        row(1, 2, 70, 4, sampled=3), row(1, 70, 3, sampled=1), row(1, 5, 6, sampled=2),
        row(3, 63, 64, 4, 65, sampled=4), known=64,
    )  # fmt: skip
    assert np.isnan(found[0]).tolist() == [False, False, True, True]
    assert np.isnan(found[1]).tolist() == [False, False, True]
    assert np.isnan(found[2]).tolist() == [False, True, False]
    assert np.isnan(found[3]).tolist() == [False, False, True, True, True], "from the first such id on"
    asked_for = sorted(r["prompt"] for r in server.requests)
    assert asked_for == [[1, 2], [1, 5, 6], [3, 63]], "nothing to ask of the second row"


def test_it_is_asked_again_and_no_more_than_so_often_and_never_by_more_than_concurrency() -> None:
    steps: list[Step] = [Answer("busy", 503), Drop(), Answer("slow down", 429, {"retry-after": "0"})]

    def behaviour(body: Json) -> Step:
        return steps.pop(0) if steps else scored(body)

    found, server = asked(behaviour, *(row(1, i, sampled=1) for i in range(2, 12)), concurrency=2)
    assert [f[1] for f in found] == pytest.approx([-i / 100 for i in range(2, 12)])
    assert len(server.requests) == 13
    assert server.most_running <= 2
    with pytest.raises(EngineError, match=r"the teacher 'big' at http.* failed 3 times, at last with: 503"):
        asked([Answer("busy", 503)] * 3, row(1, 2, sampled=1), max_retries=2)
    with pytest.raises(EngineError, match=r"failed 1 times, at last with: no answer within 0\.2 s"):
        asked([Hang()], row(1, 2, sampled=1), max_retries=0, timeout=0.2)


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (Answer("no such model", 404), EngineError, r"refuses http.*completions: 404"),
        (Answer("key", 401), ConfigError, r"refuses the key: 401 .*algorithm\.teacher\.api_key_env"),
        (Answer(b"<html>"), EngineError, "something else than JSON"),
        (Answer({"choices": [{"text": ""}]}), EngineError, "returned no log-probabilities of the prompt"),
        (Answer({"choices": []}), EngineError, "returned no log-probabilities of the prompt"),
        (Answer({"choices": [{"prompt_logprobs": [None]}]}), EngineError, "returned no log-probabilities"),
        (
            Answer({"choices": [{"prompt_logprobs": [None, {"7": {"logprob": -1.0}}]}]}),
            EngineError, "gave token 2 of a prompt no log-probability",
        ),
        (
            Answer({"choices": [{"prompt_logprobs": [None, {"2": {"logprob": 3.5}}]}]}),
            EngineError, r"says 3\.5 of a token, which is no log-probability: serve it with --logprobs-mode",
        ),
        (says("0.5"), EngineError, r"says 0\.5 of a token"),
        (says("NaN"), EngineError, "says nan of a token, which is no log-probability"),
        (says("1" + "0" * 400), EngineError, "says a whole number of about 40. digits of a token|says 10000"),
        (says("false"), EngineError, "gave token 2 of a prompt no log-probability"),
        (says('"-1.5"'), EngineError, "gave token 2 of a prompt no log-probability"),
        (Answer({"choices": [{"prompt_logprobs": [None, {"2": -1.0}]}]}), EngineError, "gave token 2 of a prompt no"),
        (Answer(b"[" * 200_000), EngineError, "something else than JSON"),
        (Answer(b"x", 200, {"content-encoding": "gzip"}), EngineError, "sent a compressed answer"),
        (Answer(b"", 302, {"location": "http://127.0.0.1:9/"}), EngineError, "refuses http.*completions: 302"),
    ],
)  # fmt: skip
def test_what_another_try_would_not_change_ends_it_at_once(answer: Answer, error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        asked([answer], row(1, 2, sampled=1))


def test_log_0_in_every_form_is_a_token_without_a_number() -> None:
    for number in ("-9999.0", "-Infinity", "-1" + "0" * 400):
        found, _ = asked([says(number)], row(1, 2, sampled=1), max_retries=0)
        assert np.isnan(found[0]).tolist() == [False, True]


@pytest.mark.parametrize("status", [400, 401, 503])
def test_the_key_and_the_query_are_in_no_message(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-secret")
    with chat_server([Answer("I do not know sk-secret", status)]) as server:
        settings: dict[str, Any] = {"model": "big", "api_key_env": "TEACHER_KEY", "max_retries": 0}
        teacher = ServedTeacher(TeacherConfig(url=f"{server.url}?code=hidden", **settings), known=9)
        with pytest.raises((EngineError, ConfigError), match=rf"{status} .I do not know \*\*\*") as told:
            asyncio.run(teacher.logprobs([row(1, 2, sampled=1)]))
    assert "secret" not in str(told.value)
    assert "hidden" not in str(told.value)


def test_the_query_follows_every_path() -> None:
    teacher = ServedTeacher(TeacherConfig(model="big", url="http://h/a/v1/?version=3"), known=9)
    assert str(teacher.url("completions")) == "http://h/a/v1/completions?version=3"
    assert str(teacher.tokenize_url) == "http://h/a/tokenize?version=3"
    assert teacher.root == "http://h/a/v1"


def test_an_answer_that_drips_is_ended_by_the_timeout_of_a_request() -> None:
    """Each byte comes in time, and the whole never does."""

    async def ask() -> None:
        left = asyncio.Event()

        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1000)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while not writer.is_closing():
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            writer.close()
            left.set()

        async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            config = TeacherConfig(model="big", url=url, timeout=0.3, max_retries=0)
            with pytest.raises(EngineError, match=r"at last with: no answer within 0\.3 s"):
                await asyncio.wait_for(ServedTeacher(config, known=9).logprobs([row(1, 2, sampled=1)]), 60)
            await asyncio.wait_for(left.wait(), 60)

    asyncio.run(ask())


def test_a_proxy_is_not_asked_for_this_host_and_a_broken_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://x")
    found, _ = asked(scored, row(9, 8, sampled=1))
    assert found[0].tolist() == pytest.approx([0, -0.08])
    with pytest.raises(ConfigError, match="a proxy that the environment names cannot be used"):
        ServedTeacher(TeacherConfig(model="big", url="http://teacher.invalid/v1"), known=9).client()


class Teacher:
    """A scripted server that tokenizes with a real tokenizer, or has nothing to ask."""

    def __init__(self, tokenizer: Any | None, answers: Callable[[Json], Answer] = scored) -> None:
        self.tokenizer, self.answers = tokenizer, answers

    def __call__(self, body: Json) -> Step:
        if "prompt_logprobs" in body:
            return self.answers(body)
        if self.tokenizer is None:
            return Answer({"detail": "Not Found"}, 404)
        assert body["add_special_tokens"] is False
        ids = self.tokenizer.encode(body["prompt"], add_special_tokens=False)
        return Answer({"tokens": ids, "count": len(ids), "max_model_len": 999})


def check(tmp_path: Path, teacher: Teacher, **settings: Any) -> None:
    student = tmp_path / "student"
    if not student.exists():
        tiny_chat_model(student)
    with chat_server(teacher) as server:
        tree = {"model": "big", "url": server.url} | settings
        config = {"model": {"path": str(student), "max_context": 256}, "algorithm": {"teacher": tree}}
        asyncio.run(require_teacher(TrainConfig.model_validate(config)))


def test_a_servers_tokenizer_is_the_students_or_it_is_refused(tmp_path: Path) -> None:
    check(tmp_path, Teacher(tiny()))
    other = tiny()
    other.add_tokens(["zebra"])  # the ids of all words but one are the same
    other.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "student")
    with pytest.raises(ConfigError, match=r"has another tokenizer than the student: .*becomes"):
        check(tmp_path, Teacher(tiny()))
    with pytest.raises(ConfigError, match=r"no /tokenize to ask, .*algorithm\.teacher\.tokenizer"):
        check(tmp_path, Teacher(None))
    check(tmp_path, Teacher(None), tokenizer=str(tmp_path / "other"))
    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"algorithm\.teacher\.tokenizer: .*'zebra', which is id \d+ of the student"):
        check(tmp_path, Teacher(None), tokenizer=str(tmp_path / "plain"))


def test_a_server_that_cannot_score_or_is_not_there_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="returned no log-probabilities of the prompt"):
        check(tmp_path, Teacher(tiny(), lambda body: Answer({"choices": [{"text": "a"}]})))
    with pytest.raises(ConfigError, match="does not answer: ConnectError"):
        check(tmp_path, Teacher(tiny()), url="http://127.0.0.1:9/v1")


def test_differences_of_tokenizers() -> None:
    assert difference(tiny(), tiny()) is None
    renamed = tiny()
    renamed.eos_token = "<|im_start|>"  # what ends a text is no difference to a scorer
    assert difference(tiny(), renamed) is None
    more = tiny()
    more.add_tokens(["in"])
    assert "1 tokens differ, as 'in', which is no token of the student" in (difference(tiny(), more) or "")
    split = tiny()  # the same tokens under the same ids, and words are cut at digits and spaces otherwise
    split.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("o", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert "becomes" in (difference(tiny(), split) or "")
    plain, special = tiny(), tiny()
    word = next(t for t in plain.get_vocab() if t.isalpha() and len(t) > 2)
    special.add_tokens([word])
    assert f"{word!r} is a special token of one alone" in (difference(plain, special) or "")
