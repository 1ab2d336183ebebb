"""The conformance checker: a good environment passes, and each broken one fails in the check that is about it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.chat.options import ChatOptions
from areal_agents.conformance import reward_audit
from areal_agents.conformance.check import CHECKS, CheckReport, CheckResult, check
from areal_agents.conformance.contract import Subject
from areal_agents.conformance.scripted_episode import (
    ScriptedEpisode,
    difference,
    in_turns,
    plain,
    repeat,
    spoil,
    trace_difference,
)
from areal_agents.env import Expert
from areal_agents.errors import CheckError, RegistryError
from areal_agents.reward import Episode, WeightedSum
from areal_agents.rewards.shaping import overlong
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Task
from tests import checked_envs, tiny_tokenizer
from tests.tiny_tokenizer import tiny


def run(name: str, *, timeout: float = 20.0, tokenizer: Path | None = None) -> CheckReport:
    return check(f"tests.checked_envs:{name}", tokenizer=tokenizer, timeout=timeout)


def by_name(report: CheckReport) -> dict[str, CheckResult]:
    return {r.name: r for r in report.results}


def statuses(report: CheckReport) -> dict[str, str]:
    return {r.name: r.status for r in report.results}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path)
    return tmp_path


def test_a_good_environment_passes_everything(tokenizer: Path) -> None:
    told: list[CheckResult] = []
    report = check("tests.checked_envs:Good", tokenizer=tokenizer, report=told.append)
    assert statuses(report) == dict.fromkeys(CHECKS, "passed"), str(report)
    assert report.passed
    assert tuple(told) == report.results
    found = by_name(report)
    assert found["tasks"].detail == "disjoint by content hash: train 8, test 8"
    assert found["reward"].detail.startswith("8 gold answers and 4 expert episodes earn 1; empty 0.00, junk 0.00")
    assert json.loads(json.dumps(report.to_json()))["checks"][0] == {
        "name": "contract",
        "status": "passed",
        "detail": "5 turns, splits train, test",
    }
    assert str(report).startswith("tests.checked_envs:Good: passed\n  ok        contract")


@pytest.mark.parametrize(
    ("env", "failing", "reason"),
    [
        ("IgnoresSeed", "seeds", "episode 0 differs between two processes with one seed, call 1 (astep), observation"),
        ("HashSeedDependent", "seeds", "call 0 (areset), observation[0].parts[0].text: 'Double"),
        ("HashSeedTasks", "tasks", "task 0 of split 'train' differs between processes"),
        ("OverlappingSplits", "tasks", "task test-100 of split 'test' has the same content as one of 'train'"),
        ("AliasesHistory", "aliasing", "call 1 returned an object that changed later, call 0 (astep), info.history[1]"),
        ("ReadsBackItsInfo", "aliasing", "writing into what an earlier call returned changes the episode, call 2"),
        ("LeaksBetweenEpisodes", "isolation", "give another episode after other episodes, call 0 (areset)"),
        ("SharesState", "isolation", "episode 0 of 4 differs when they run together, call 1 (astep), observation"),
        ("SeedsGlobally", "rng", "uses the global generator of random: use self.np_random"),
        ("TakesAnyAnswer", "reward", "the policy 'junk' earns 0.875 on 8 tasks of 'test'; declared chance is 0"),
        ("FindsTheAnswerAnywhere", "reward", "the policy 'several' earns 1.000"),
        ("RewardsSilence", "reward", "the policy 'empty' earns 1.000"),
        ("WrongGold", "reward", "8 of 8 gold answers earn less than 1 (0 on task test-200, 0 on task test-201, 0 on"),
        ("RewardsNan", "contract", "returned the reward nan, which is not finite"),
        ("RewardsText", "contract", "returned the reward '1.0', which is not a number"),
        ("Raises", "contract", "astep (task train-100, turn 0) raised KeyError: 'no reply'"),
        ("Exits", "contract", "called sys.exit(3)"),
        ("ExitsInATask", "contract", "astep (task train-100, turn 0) raised RuntimeError: it called sys.exit(3)"),
        ("ExitsWhenMade", "contract", "making the environment raised RuntimeError: it called sys.exit(4)"),
        ("ExitsInACallback", "contract", "a callback of the event loop raised SystemExit: 6"),
        ("ExpertExits", "contract", "the expert of task train-100 raised RuntimeError: it called sys.exit(0)"),
        ("GoldExits", "contract", "it called sys.exit(5)"),
        ("RewardsHuge", "contract", "the reward a whole number of about 5000 digits, which is not finite"),
        ("SaysNothingFirst", "contract", "the first observation is empty: the model would have nothing to answer"),
        ("RepeatsHistory", "contract", "observation 1 repeats the first one: return the new messages only"),
        ("ReturnsLists", "contract", "it must be a tuple of Message"),
        ("LeavesTasksBehind", "cancellation", "tasks of the environment still run: forever"),
        ("CancelBreaksNeighbours", "cancellation", "cancelling astep of one episode changes another one, call 1"),
        ("SkipsBegin", "gymnasium", "check_env:"),
    ],
)
def test_each_broken_environment_fails_where_it_is_broken(env: str, failing: str, reason: str) -> None:
    report = run(env)
    assert not report.passed
    found = by_name(report)[failing]
    assert (found.status, reason in found.detail) == ("failed", True), str(report)
    # gymnasium's own determinism checks see unseeded and leaking environments too.
    others = {r.name for r in report.results if r.status == "failed"} - {failing, "gymnasium"}
    assert others == set(), str(report)


def test_a_broken_contract_skips_the_rest() -> None:
    report = run("RewardsNan")
    assert [r.detail for r in report.results[1:]] == ["needs contract"] * (len(CHECKS) - 1)


def test_a_hanging_environment_is_reported() -> None:
    found = by_name(run("Hangs", timeout=1.0))["contract"]
    assert (found.status, found.detail) == ("failed", "astep (task train-100, turn 0) did not return within 1 s")


def test_ignoring_cancellation_is_reported() -> None:
    report = run("HangsOnCancel", timeout=2.0)
    found = by_name(report)["cancellation"]
    assert found.status == "failed", str(report)
    assert found.detail.startswith("astep did not end within 2 s after it was cancelled")
    assert [r.name for r in report.results if r.status == "failed"] == ["cancellation"]


def test_a_blocking_environment_is_abandoned() -> None:
    checked_envs.RELEASE.clear()
    try:
        report = run("Blocks", timeout=0.2)
    finally:
        checked_envs.RELEASE.set()
    assert by_name(report)["contract"].detail.startswith("blocked its thread for more than 2 s")
    assert {r.detail for r in report.results[1:]} == {"contract blocked the thread"}


def test_without_gold_and_expert_it_is_unaudited() -> None:
    report = run("Unaudited")
    found = by_name(report)["reward"]
    assert found.status == "unaudited", str(report)
    assert found.detail.startswith("no gold() and no expert()")
    assert report.passed


def compares(episode: Episode) -> bool:
    return bool(episode.answer == episode.task.payload["answer"])


class Compared(ToolEnv):
    rubric = WeightedSum({"correct": compares, "length": overlong(64, cache=8)})  # whose tokens no script knows

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{k}", split=split, seed=k, payload={"answer": f"{split} {k}"}) for k in range(4)]

    @classmethod
    def gold(cls, task: Task) -> str:
        return str(task.payload["answer"])

    def prompt(self, task: Task) -> str:
        return "Which task is it?"


def test_a_reward_that_blocks_the_event_loop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(registry.spec("tests.conformance.test_check:Compared"), 20.0, None)
    said = asyncio.run(reward_audit.reward(subject))
    assert "blocked" not in said
    monkeypatch.setattr(reward_audit, "BLOCKED_SECONDS", 0.0)  # whatever a reward takes is too long
    said = asyncio.run(reward_audit.reward(subject))
    assert re.search(r"; the reward 'correct' blocked the event loop for \d+ ms, and with it every other episode", said)
    assert "@reward_function(timeout=…)" in said


def test_no_tokenizer_skips_the_token_check() -> None:
    found = by_name(run("Unaudited"))["tokens"]
    assert (found.status, found.detail) == ("skipped", "no tokenizer was given")


def test_token_check(tmp_path: Path) -> None:
    tiny(tiny_tokenizer.NO_TOOL_ROLE).save_pretrained(tmp_path)
    found = by_name(run("TwoUserMessages", tokenizer=tmp_path))["tokens"]
    assert found.status == "passed"  # they become one
    assert by_name(run("ShowsOneTool", tokenizer=tmp_path))["tokens"].status == "passed"
    tiny(tiny_tokenizer.NO_SYSTEM).save_pretrained(tmp_path)
    found = by_name(run("SystemFirst", tokenizer=tmp_path))["tokens"]
    assert found.status == "failed"
    assert "cannot show one (System role not supported): set model.merge_system = true" in found.detail
    merged = check("tests.checked_envs:SystemFirst", tokenizer=tmp_path, chat=ChatOptions(merge_system=True))
    assert by_name(merged)["tokens"].status == "passed"
    tiny(tiny_tokenizer.THINKING).save_pretrained(tmp_path)
    assert "each turn is a sample" in by_name(run("Good", tokenizer=tmp_path))["tokens"].detail


def test_a_missing_model_fails_the_token_check() -> None:
    report = check("tests.checked_envs:Good", tokenizer="smollm3", timeout=120.0)
    assert "did you mean 'smollm2'" in by_name(report)["tokens"].detail
    assert not report.passed


def test_an_unknown_environment_raises() -> None:
    with pytest.raises(RegistryError, match="unknown environment"):
        check("areal/Arithmetics-v0")


def test_plain_values_and_their_differences() -> None:
    assert plain({"b": {3, 1}, "a": (1.0, float("nan"))}) == {"a": [1.0, "nan"], "b": [1, 3]}
    assert plain(object()) == "object"
    assert difference({"a": [1, 2]}, {"a": [1, 3]}) == "a[1]: 2 and 3"
    assert difference({"a": 1}, {}) == "a: 1 and '(absent)'"
    assert difference([1], [True]) == "[0]: 1 and True"
    assert difference([1], [1]) is None
    assert trace_difference([], [{"call": "astep", "returned": []}]) == "call 0: the end and astep"


def test_spoil_reaches_nested_containers() -> None:
    inner: list[Any] = [1]
    value: Any = ({"a": {"b": inner}}, 3)
    spoil(value)
    assert inner == ["spoiled"]
    assert value == ({"spoiled": True}, 3)


@pytest.mark.slow
def test_the_built_in_environment_passes(tokenizer: Path) -> None:
    report = check("areal/Arithmetic-v0", tokenizer=tokenizer)
    assert statuses(report) == dict.fromkeys(CHECKS, "passed"), str(report)


def test_tasks_that_no_answer_could_score_are_named() -> None:
    report = check("tests.checked_envs:BadGolds", tokenizer=None)
    found = by_name(report)["golds"]
    assert found.status == "failed"
    assert found.detail.startswith(
        "2 tasks cannot be scored, looked at train 8, test 8:\n  test-2: task 'test-2': the gold"
    )
    assert "test-5: " in found.detail
    row = next(row for row in report.to_json()["checks"] if row["name"] == "golds")
    assert list(row["bad_tasks"]) == ["test-2", "test-5"]
    assert "cannot be read" in row["bad_tasks"]["test-2"]


def test_nothing_is_looked_at_where_nothing_says_what_a_task_must_have() -> None:
    report = check("tests.letters_env:Letters", tokenizer=None)
    assert by_name(report)["golds"].status == "skipped"


def test_tools_that_no_script_called_are_named() -> None:
    report = check("tests.checked_envs:Stateful", tokenizer=None)
    assert report.passed, str(report)
    said = by_name(report)["reward"].detail
    assert said.startswith("4 expert episodes (up to 1.1) earn 1; ")
    assert said.endswith("; no script ever called the tools drop, rest: let expert() use them")


def test_bad_experts_are_counted() -> None:
    report = check("tests.checked_envs:StatefulWithoutPay", tokenizer=None)
    assert by_name(report)["reward"].detail == (
        "2 of 4 expert episodes earn less than 1 (0.1 on task test-1, 0.1 on task test-3): the reward or expert() is "
        "wrong"
    )


class Steep(checked_envs.Stateful):
    """Its expert wins on the default level alone."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        first = (0 if split == "test" else 100) + (1000 if difficulty == 1 else 0)
        return [Task.make(f"{split}-{n}", split=split, seed=n, payload={"n": n}) for n in range(first, first + 8)]

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        return super().expert(task) if task.payload["n"] < 1000 else _gives_up()


def _gives_up() -> Expert:
    yield "Too hard."


def test_a_level_is_checked_by_its_difficulty() -> None:
    hard = by_name(check("tests.conformance.test_check:Steep", tokenizer=None, difficulty=1))
    assert hard["seeds"].status == "passed"  # the other processes play the same level
    assert hard["reward"].detail.startswith("4 of 4 expert episodes earn less than 1 (0 on task test-1000, 0 on task")
    outside = by_name(check("tests.conformance.test_check:Steep", tokenizer=None, difficulty=2))["contract"]
    assert outside.detail == "difficulty 2 of tests.conformance.test_check:Steep must lie in [0, 1]"


class Long(Steep):
    """A game of sixteen turns."""

    max_turns = 20

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        return _patient(task)


def _patient(task: Task) -> Expert:
    for _ in range(15):
        yield '<tool_call>{"name": "rest", "arguments": {}}</tool_call>'
    yield checked_envs.call("pay", task)


def test_an_episode_that_another_ones_failure_cancels_while_it_closes_is_closed() -> None:
    done: list[str] = []
    closing = asyncio.Event()

    class Slow(Steep):
        async def aclose(self) -> None:
            closing.set()
            for _ in range(20):  # the other one fails meanwhile, and this one is cancelled
                await asyncio.sleep(0)
            await super().aclose()
            done.append("closed")

    async def plays() -> None:
        task = Slow.tasks("test")[0]
        await ScriptedEpisode(Slow, task, 0, repeat(""), 60.0, 1).play()

    async def fails() -> None:
        await closing.wait()
        raise CheckError("a finding")

    async def main() -> None:
        with pytest.raises(CheckError, match="a finding"):
            await in_turns([plays, fails], 2)
        assert done == ["closed"]  # here, and not when the loop ends

    asyncio.run(main())


def test_a_long_game_is_played_to_its_end_by_the_audit() -> None:
    subject = Subject(registry.spec("tests.conformance.test_check:Long"), 60.0, None)
    assert asyncio.run(reward_audit.reward(subject)).startswith("4 expert episodes earn 1; empty 0.00")
