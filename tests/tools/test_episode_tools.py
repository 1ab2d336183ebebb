"""submit, think, ask_user and read_output, in an environment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents import Task, ToolEnv, tool
from areal_agents.errors import EnvError
from areal_agents.reward import Episode
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.rebuilt import rebuilt
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.tool import ToolError, ToolResult
from areal_agents.tool_outputs import MAX_EPISODE_CHARS, MAX_KEPT_CHARS, Outputs
from areal_agents.tool_resources import Resources
from areal_agents.toolenv import SUBMITTED
from areal_agents.tools.ask_user import ask_user
from areal_agents.tools.read_output import read_output
from areal_agents.tools.submit import submit
from areal_agents.tools.think import think
from areal_agents.types import AssistantMessage, Text, ToolCall, Trajectory
from tests.tools.sessions import call, play


@tool(max_output_chars=200, parallel=True)
async def count(to: int) -> str:
    """Count."""
    await asyncio.sleep(0.01 if to < 2000 else 0)  # the longer ones end first
    return " ".join(map(str, range(to)))


def right(episode: Episode) -> float:
    return float(episode.answer == "42")


class Asked(ToolEnv):
    tools = (submit, think, ask_user, read_output, count)
    rubric = right

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make("t", split=split, seed=0, payload={})]

    def prompt(self, task: Task) -> str:
        return "?"

    async def answer_user(self, question: str) -> Any:
        if question == "number":
            return 42
        if question == "silence":
            raise ToolError("the user does not answer")
        return question.upper()


TASK = Asked.tasks("test")[0]


def message(*calls: ToolCall) -> AssistantMessage:
    return AssistantMessage((), tool_calls=calls)


def steps(*messages: AssistantMessage) -> list[tuple[Any, ...]]:
    async def main() -> list[tuple[Any, ...]]:
        env = Asked(sandbox=None)
        try:
            await env.areset(seed=0, options={"task": TASK})
            return [await env.astep(m) for m in messages]
        finally:
            await env.aclose()

    return asyncio.run(main())


def test_submit_ends_the_episode_with_its_answer() -> None:
    one, late = call("submit", answer="42"), call("submit", answer="43")
    observation, reward, terminated, truncated, info = steps(message(call("think", thought="hm"), one, late))[0]
    assert (reward, terminated, truncated, info["stop_reason"]) == (1.0, True, False, "answer")
    assert [m.text for m in observation] == [
        "(noted)", "submitted", "error: the episode had ended, so this call was not run", "42"
    ]  # fmt: skip
    assert observation[-1].name == SUBMITTED
    assert steps(message(late, one))[0][1] == 0.0
    assert [s[1] for s in steps(message(call("think", thought="42")), AssistantMessage((Text("42"),)))] == [0.0, 1.0]
    nothing = steps(message(call("submit", answer="")))[0]
    assert (nothing[1], nothing[2], nothing[0][-1].text) == (0.0, True, "")


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_submitted_answer_is_rebuilt_from_what_is_saved(reward: float, tmp_path: Path) -> None:
    said = "42" if reward else "43 é"

    async def main() -> Trajectory:
        host = EnvHost()
        text = json.dumps({"name": "submit", "arguments": {"answer": said}})
        said_by_script = iter([f"<tool_call>{text}</tool_call>"])
        script = ScriptPolicy(lambda first: (t for t in said_by_script), TASK)  # type: ignore[arg-type,return-value]
        episode = EpisodeDriver(lambda: Asked(sandbox=None), TASK, script, host, "e", 0, 60.0, max_turns=3)
        try:
            await episode.play()
        finally:
            await host.close()
        return episode.trajectory("g")

    saved = asyncio.run(main())
    assert saved.reward == reward
    episode = rebuilt(saved, lambda _: "the text of a message")
    assert (episode.answer, episode.stop_reason) == (said, "answer")


def test_the_user_is_the_environments() -> None:
    shouted, silent, long = play(
        Asked.tools, call("ask_user", question="which?"), call("ask_user", question="silence"),
        call("ask_user", question="x" * 10_001), env=Asked(sandbox=None),
    )  # fmt: skip
    assert shouted == ToolResult("WHICH?")
    assert silent == ToolResult("the user does not answer", "error")
    assert long.text == "error: the question has 10001 characters, more than 10000"
    with pytest.raises(EnvError, match="answer_user returned 42, which is not a text"):
        play(Asked.tools, call("ask_user", question="number"), env=Asked(sandbox=None))
    with pytest.raises(EnvError, match="must implement `async def answer_user"):
        play((ask_user,), call("ask_user", question="?"), env=object())
    with pytest.raises(EnvError, match="has no end_episode"):
        play((submit,), call("submit", answer="?"), env=object())


def test_long_outputs_are_read_on_in_the_order_of_their_calls() -> None:
    short, long, longer, first, second, far, unknown, huge = play(
        (count, read_output),
        [call("count", to=10), call("count", to=1999), call("count", to=3000)],
        call("read_output", output=1, start=59),
        call("read_output", output=2, start=13_880),
        call("read_output", output=1, start=10**6),
        call("read_output", output=3),
        call("read_output", output=-(10**5000)),
    )
    assert short == ToolResult("0 1 2 3 4 5 6 7 8 9")
    whole = " ".join(map(str, range(1999)))
    assert long.truncated
    assert "read_output(output=1, start=5" in long.text
    assert len(long.text) == 200
    assert "read_output(output=2, start=5" in longer.text
    assert first.text == f"[characters 59 to 3559 of {len(whole)}; go on with start=3559]\n{whole[59:3559]}"
    assert second.text == "[characters 13880 to 13889 of 13889]\n2998 2999"
    assert far.text == f"error: start must be from 0 to {len(whole) - 1}, the output's last character"
    assert unknown.text == "error: there is no output 3; outputs that can be read on: 1, 2"
    assert huge.text.startswith("error: there is no output of that number;")


def test_without_the_reader_nothing_is_kept() -> None:
    (long,) = play((count,), call("count", to=1999))
    assert "characters cut ...]" in long.text


def test_what_is_kept_is_bounded() -> None:
    outputs = Outputs()
    for n in range(20):
        outputs.show(str(n) * (MAX_KEPT_CHARS + 5000), 100)
        assert sum(len(outputs.get(k) or "") for k in outputs.numbers) <= MAX_EPISODE_CHARS
    assert outputs.numbers == tuple(range(21 - MAX_EPISODE_CHARS // MAX_KEPT_CHARS, 21))
    assert "characters cut" in (outputs.get(20) or "")


@given(st.text(max_size=400), st.integers(64, 300))
def test_a_cut_output_never_hides_anything(text: str, limit: int) -> None:
    outputs = Outputs()
    shown, cut = outputs.show(text, limit)
    assert cut == (len(text) > limit)
    assert len(shown) <= max(limit, len(text) if not cut else 64)
    if cut:
        found = re.search(r"start=(\d+)", shown)
        assert found is not None
        start = int(found.group(1))
        head = shown[: shown.index("\n[... ")] if not text.startswith("\n[... ") else ""
        assert start <= max(len(head), limit)
        assert outputs.get(1) == text


def test_resources_open_once_and_close_in_reverse() -> None:
    log: list[str] = []

    @contextlib.asynccontextmanager
    async def resource(name: str) -> AsyncIterator[str]:
        log.append(f"open {name}")
        if name == "bad":
            raise EnvError("no")
        await asyncio.sleep(0)
        yield name
        log.append(f"close {name}")

    @tool(parallel=True)
    async def use(name: str, *, kept: Resources) -> str:
        """Use."""
        return await kept.get(name, lambda: resource(name))

    got = play((use,), [call("use", name="a"), call("use", name="a"), call("use", name="b")], call("use", name="a"))
    assert [r.text for r in got] == ["a", "a", "b", "a"]
    assert log == ["open a", "open b", "close b", "close a"]
    assert "kept" not in use.parameters["properties"]
    log.clear()
    with pytest.raises(EnvError):
        play((use,), call("use", name="a"), call("use", name="bad"))
    assert log == ["open a", "open bad", "close a"]


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["answer", "thought", "question", "output", "start", "to", "env", "outputs", "self"])


@settings(deadline=None)
@given(st.sampled_from(["submit", "think", "ask_user", "read_output"]), st.dictionaries(NAMES, ANY, max_size=3))
def test_any_arguments_are_answered(name: str, arguments: dict[str, Any]) -> None:
    asyncio.run(_answered(name, arguments))


async def _answered(name: str, arguments: dict[str, Any]) -> None:
    env = Asked(sandbox=None)
    await env.areset(seed=0, options={"task": TASK})
    if arguments.get("question") == "number":
        return
    observation, *_ = await env.astep(message(call(name, **arguments)))
    assert len(observation) in (1, 2)
    await env.aclose()
