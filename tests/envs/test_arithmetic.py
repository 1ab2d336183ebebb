from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

import areal_agents
from areal_agents.chat.toolcalls import parse_text
from areal_agents.envs.arithmetic import Arithmetic
from areal_agents.envs.procedural import split_of
from areal_agents.registry import Audit
from areal_agents.tools.python_repl import python_repl
from areal_agents.types import Task, content_hash
from tests.conftest import require
from tests.fake_sandbox import ScriptedBackend

ID = "areal/Arithmetic-v0"
DIFFICULTIES = (None, 0.0, 0.25, 0.75, 1.0)


def solved(task: Task) -> int:
    """Python's own value of the task's expression, which this repository wrote."""
    return int(eval(task.payload["expression"], {"__builtins__": {}}))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_splits_are_disjoint_and_tasks_are_sound(difficulty: float | None) -> None:
    spec = areal_agents.spec(ID)
    hashes = {}
    for split, size in (("train", 4096), ("test", 512)):
        tasks = spec.tasks(split, difficulty=difficulty)
        assert len(tasks) == size
        hashes[split] = {t.content_hash for t in tasks}
        assert len({t.id for t in tasks}) == size
        assert len(hashes[split]) >= 0.995 * size  # a problem may recur inside a split
        for task in tasks:
            assert task.split == split_of(task.content_hash) == split
            assert task.content_hash == content_hash(task.payload)
            assert int(task.payload["answer"]) == solved(task) >= 0
    assert not hashes["train"] & hashes["test"]


def test_splits_are_disjoint_across_difficulties() -> None:
    spec = areal_agents.spec(ID)
    seen: dict[str, set[str]] = {}
    for split in ("train", "test"):
        seen[split] = {t.content_hash for d in DIFFICULTIES for t in spec.tasks(split, difficulty=d)[:500]}
    assert not seen["train"] & seen["test"]


def test_problems_cannot_be_done_in_the_head_and_show_their_numbers() -> None:
    for task in areal_agents.spec(ID).tasks("train")[:500]:
        expression, question = task.payload["expression"], task.payload["question"]
        assert "*" in expression or "/" in expression
        numbers = "".join(c if c.isdigit() else " " for c in expression).split()
        assert 3 <= len(numbers) <= 4
        for number in numbers:
            assert len(number) >= 2
            assert number in question
        assert task.payload["answer"] not in question


def test_difficulty_scales_operations_and_digits() -> None:
    spec = areal_agents.spec(ID)

    def means(difficulty: float) -> tuple[float, int]:
        tasks = spec.tasks("train", difficulty=difficulty)[:300]
        digits = sum(c.isdigit() for t in tasks for c in t.payload["expression"]) / len(tasks)
        operations = max(sum(t.payload["expression"].count(o) for o in ("+", "-", "*", "//")) for t in tasks)
        return digits, operations

    (d0, o0), (d5, o5), (d10, o10) = means(0.0), means(0.5), means(1.0)
    assert d0 < d5 < d10
    assert (o0, o5, o10) == (2, 3, 4)


def test_tasks_are_the_same_in_every_process() -> None:
    code = (
        "import areal_agents; s = areal_agents.spec('areal/Arithmetic-v0'); "
        "print(*[t.content_hash for split in s.splits for t in s.tasks(split)[:20]])"
    )
    outputs = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed}
        root = Path(__file__).resolve().parents[2]
        outputs.add(subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True).stdout)
    spec = areal_agents.spec(ID)
    mine = " ".join(t.content_hash for split in spec.splits for t in spec.tasks(split)[:20]) + "\n"
    assert outputs == {mine.encode()}
    first = spec.tasks("train")[0]
    assert (first.id, first.payload["question"], first.payload["answer"]) == (
        "train-0.5-0",
        "Eva orders 2729 boxes of 33 nails, sells 3943 and throws 3276 away. How many nails are left?",
        "82838",
    )


def test_the_spec() -> None:
    spec = areal_agents.spec(ID)
    assert spec.env_class() is Arithmetic
    assert spec.splits == ("train", "test")
    assert spec.audit == Audit(chance=0.0, gold=True, expert=True)


def test_gymnasium_accepts_it() -> None:
    areal_agents.spec(ID)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ID).unwrapped)


def score(task: Task, *texts: str) -> float:
    async def main() -> float:
        env = Arithmetic(sandbox=ScriptedBackend())
        await env.areset(options={"task": task})
        try:
            return sum([(await env.astep(parse_text(text)))[1] for text in texts])
        finally:
            await env.aclose()

    return asyncio.run(main())


def test_the_gold_answer_earns_all_and_guesses_nothing() -> None:
    spec = areal_agents.spec(ID)
    for task in spec.tasks("test")[:40]:
        gold = spec.gold(task)
        assert gold is not None
        assert score(task, gold) == 1.0
        answer = task.payload["answer"]
        assert score(task, f"Thus it is {gold}.") == 1.0
        assert score(task, rf"\boxed{{{int(answer):,}.0}}") == 1.0
        for text in (
            "", "junk", task.payload["question"], answer, r"\boxed{0}", rf"\boxed{{{answer} or 1}}",
            rf"{gold} \boxed{{1}}", rf"\boxed{{1}} {gold}", rf"\boxed{{{int(answer) + 1}}}",
            rf"<think>{gold}</think>", rf"\boxed{{{task.payload['expression']}}}",
        ):  # fmt: skip
            assert score(task, text) == 0.0, text


class InSession(Arithmetic):
    """The same task with a Python that lives across turns."""

    tools = (python_repl,)


def demonstrate(task: Task, sandbox: Any, make: type[Arithmetic] = Arithmetic) -> tuple[list[str], float]:
    """The expert's texts and the reward they earn."""

    async def main() -> tuple[list[str], float]:
        env = make(sandbox=sandbox)
        expert = areal_agents.spec(ID).expert(task)
        assert expert is not None
        await env.areset(options={"task": task})
        texts, total, over = [next(expert)], 0.0, False
        try:
            while not over:
                observation, reward, terminated, truncated, _ = await env.astep(parse_text(texts[-1]))
                total, over = total + reward, terminated or truncated
                if not over:
                    texts.append(expert.send(observation))
        finally:
            await env.aclose()
            if hasattr(sandbox, "aclose"):
                await sandbox.aclose()
        return texts, total

    return asyncio.run(main())


def test_the_expert_answers_what_it_observed() -> None:
    task = areal_agents.spec(ID).tasks("train")[0]
    texts, total = demonstrate(task, ScriptedBackend(lambda session, code: "12\n"))
    assert texts == [
        '<tool_call>{"name": "python", "arguments": {"code": "print(2729*33-3943-3276)"}}</tool_call>',
        r"\boxed{12}",
    ]
    assert total == 0.0  # the scripted result is wrong, and so is what the expert reports


def test_the_expert_earns_all_in_the_real_sandbox() -> None:
    require("bwrap")
    from areal_agents import sandboxes

    for difficulty in (0.0, 1.0):
        for task in areal_agents.spec(ID).tasks("train", difficulty=difficulty)[:8]:
            texts, total = demonstrate(task, sandboxes.get("bubblewrap"))
            assert total == 1.0, texts


def test_a_zygote_and_a_session_pay_what_a_call_in_bubblewrap_pays() -> None:
    require("bwrap")
    from areal_agents import sandboxes

    for task in areal_agents.spec(ID).tasks("test")[:3]:
        wanted = demonstrate(task, sandboxes.get("bubblewrap"))
        assert wanted[1] == 1.0
        assert demonstrate(task, sandboxes.get("bubblewrap?preload=math")) == wanted
        assert demonstrate(task, sandboxes.get("bubblewrap"), InSession) == wanted


def test_the_facade_plays_an_episode_in_the_real_sandbox() -> None:
    require("bwrap")
    areal_agents.spec(ID)
    env = gymnasium.make(ID).unwrapped
    task = areal_agents.spec(ID).tasks("test")[0]
    env.reset(seed=0, options={"task": task})
    code = f"print({task.payload['expression']})"
    observation, reward, terminated, _, _ = env.step(
        f'<tool_call>{{"name": "python", "arguments": {{"code": "{code}"}}}}</tool_call>'
    )
    assert (observation[0].text, reward, terminated) == (task.payload["answer"], 0.0, False)
    assert env.step(rf"\boxed{{{observation[0].text}}}")[1:3] == (1.0, True)
    env.close()


def test_the_prompt_is_short(smollm2: Path) -> None:
    from areal_agents.chat.format import ChatFormat

    fmt = ChatFormat.load(smollm2)
    env = Arithmetic(sandbox=None)
    for difficulty in (None, 1.0):
        for task in areal_agents.spec(ID).tasks("train", difficulty=difficulty)[:100]:
            opening, _ = asyncio.run(env.areset(options={"task": task}))
            assert len(fmt.first_prompt(opening, env.tools)) <= 170
            assert len(fmt.encode_turn(env.prompt(task))) <= 60
