"""Evaluations: what an interruption leaves, what repeats, what a server says beside its answer."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

from tests.chat_server import Answer, Json, Step, call, chat_server, completion
from tests.reports.commands import answers
from tests.reports.place import ENVS, Place, case


@case("H1-45")
def what_was_scored_is_kept(place: Place) -> None:
    """After Ctrl-C, and after the backend died, at 60 of 100 episodes."""
    interrupted = Place(place.folder / "interrupted", place.shared, place.smollm2, place.templates)
    reached, go = threading.Event(), threading.Event()

    def later(body: Json) -> Step:
        reached.set()
        go.wait(120)
        return answers(body)

    with chat_server(after_60(later)) as server:
        argv = [sys.executable, "-u", "-m", "areal_agents", *command(interrupted, server.url)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                assert reached.wait(120)
                wait_for_60(interrupted, process)
                process.send_signal(signal.SIGINT)  # once: what runs is finished
                heard = next(line for line in process.stdout if "SIGINT" in line)
                go.set()
                out, err = process.communicate(timeout=120)
            finally:
                process.kill()
    assert process.returncode == 130, (heard, out, err)
    assert "pass@1" in out  # the table of what there is
    assert "areal-agents eval --resume" in err
    goes_on(interrupted)

    died = Place(place.folder / "died", place.shared, place.smollm2, place.templates)
    with chat_server(after_60(lambda body: Answer({"error": {"message": "gone"}}, 401))) as server:
        said = died.cli(*command(died, server.url), code=1)
    assert "gone" in said.err
    goes_on(died)


def after_60(then: Callable[[Json], Step]) -> Callable[[Json], Step]:
    """Answers 60 requests, and leaves all others to ``then``."""
    lock, count = threading.Lock(), 0

    def behave(body: Json) -> Step:
        nonlocal count
        with lock:
            count += 1
            mine = count <= 60
        return answers(body) if mine else then(body)

    return behave


def wait_for_60(place: Place, process: subprocess.Popen[str]) -> None:
    """Wait until what was answered is on the disk: it is written as it is scored."""
    for _ in range(600):
        with contextlib.suppress(OSError, ValueError):
            if len(place.episodes("eval")) >= 60:
                return
        assert process.poll() is None, process.communicate()
        threading.Event().wait(0.1)
    raise AssertionError(f"{len(place.episodes('eval'))} of 60 scored episodes are on the disk")


def command(place: Place, url: str) -> list[str]:
    argv = ["eval", f"{ENVS}:Hundred", "--model", "openai:m", "--url", url, "--n", "100", "--concurrency", "4"]
    return [*argv, "--out", str(place.run)]


def goes_on(place: Place) -> None:
    """``eval --resume`` plays what is left, once, and reports all."""
    kept = {e.task.id for e in place.episodes("eval")}
    assert 60 - 4 <= len(kept) <= 60 + 4  # four are played at once
    with chat_server(answers) as server:
        said = place.cli("eval", "--resume", place.run, "--url", server.url)
    assert len(server.requests) == 100 - len(kept)
    report = place.report()
    assert (report["n"], report["attempts"], report["pass_at_1"]) == (100, 100, 1.0)
    assert len({e.task.id for e in place.episodes("eval")}) == len(place.episodes("eval")) == 100
    assert "1.000" in said.out


@case("H1-47")
def four_attempts_without_randomness(place: Place) -> None:
    four: dict[str, object] = {"model": place.tiny(), "n": 2, "k": 4, "max_turn_tokens": 4}
    said = place.eval("Sums", four)
    assert re.search(r"temperature 0.*(same|equal|identical)|(same|equal|identical).*temperature", said.text, re.DOTALL)
    assert "pass@4" in said.out
    assert "pass^4" in said.out
    warm = Place(place.folder / "warm", place.shared, place.smollm2, place.templates)
    other = warm.eval("Sums", four | {"temperature": 1.0})
    assert not re.search(r"temperature 0", other.text)
    assert "pass^4" in other.out


@case("H1-51")
def reasoning_beside_a_call(place: Place) -> None:
    def thinks(body: Json) -> Step:
        if body["messages"][-1]["role"] != "tool":
            one = call("add", '{"a": 1000, "b": 7}')
            return completion(None, finish="tool_calls", tool_calls=[one], reasoning_content="I had better add them.")
        return completion(r"\boxed{1007}", reasoning_content="The tool has said it.")

    with chat_server(thinks) as server:
        place.eval("Sums", {"model": "openai:m", "url": server.url, "n": 1, "eval.task_seed": "none"})
    (episode,) = place.episodes("eval")
    assert "I had better add them." in repr(episode.turns[0])
    assert "The tool has said it." in repr(episode.turns[1])
    assert episode.reward == 1.0
    assert "I had better" not in repr(server.requests[1])  # servers refuse it unless they ask for it
