"""A panel: who is asked, what counts as an answer, how scores become one, and what it may cost."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from areal_agents.engine import Sampling
from areal_agents.errors import ConfigError, EngineError, InfraError, TaskError
from areal_agents.reward import Gate, Verdict, judge
from areal_agents.rewards import Budget, Panel, pointwise
from areal_agents.rewards.judges.aggregate import aggregated, agreement
from areal_agents.served_model import ServedModel
from tests.rewards.judges.scripted import Scripted, episode, gives, honest, knows, slot, tag_of, until

URL = "http://127.0.0.1:9/v1"


def asked(panel: Panel, said: str | None = "12", **shown: Any) -> Verdict:
    return asyncio.run(judge(pointwise(panel, "Is it right?", **shown), episode(said)))


def line(text: str) -> Callable[[str], str]:
    return lambda prompt: "Because.\n" + text.replace("TAG", tag_of(prompt))


def fails(prompt: str) -> str:
    raise EngineError("the server is on fire")


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "passes", "score"), [("median", 0.5, 0.75), ("mean", 0.5, 0.583), ("vote", 0.5, 1.0), ("vote", 1.0, 0.0)]
)
def test_three_judges(how: Any, passes: float, score: float) -> None:
    """1, 4 and 5 of 5 are 0, 0.75 and 1: their gaps are 0.75, 1 and 0.25."""
    panel = Panel({n: Scripted(gives(int(n))) for n in "145"}, aggregate=how, passes=passes)
    found = asked(panel)
    assert found.score == pytest.approx(score, abs=1e-3)
    assert found.status == "ok"
    assert found.components == {
        "judged": found.score, "judge.1": 0.0, "judge.4": 0.75, "judge.5": 1.0, "agreement": pytest.approx(1 / 3),
        "judges": 3.0, "judges_failed": 0.0, "cut": 0.0,
    }  # fmt: skip


def test_aggregation() -> None:
    assert aggregated([0.0, 1.0], "vote", passes=0.5) == 0.5
    assert aggregated([0.5, 0.5, 1.0], "vote") == 1.0
    assert aggregated([0.5, 0.0, 0.5], "vote") == 0.0
    assert aggregated([0.5, 0.5], "vote") == 0.5
    assert aggregated([0.0, 0.25, 0.75, 1.0], "median") == 0.5
    assert agreement([0.3]) == 1.0
    with pytest.raises(ConfigError, match="unknown aggregation 'max'"):
        aggregated([1.0], "max")  # type: ignore[arg-type]


def test_criteria_are_weighted_on_the_scale() -> None:
    """(3 · (8 − 0) + 1 · (5 − 0)) / (4 · 10)."""
    panel = Panel({"a": Scripted(line("SCORES TAG: right=8, short=5"))})
    criteria: Mapping[str, Any] = {"right": ("Is it right?", 3.0), "short": "Is it short?"}
    reward = pointwise(panel, criteria, scale=(0, 10))
    assert asyncio.run(reward(episode("12"))).score == pytest.approx(29 / 40)


@pytest.mark.parametrize(
    "text",
    [
        "SCORES TAG: quality=5\nThat is all.",
        "SCORES TAG: quality=6",
        "SCORES TAG: quality=0",
        "SCORES TAG: quality=4.5",
        "SCORES TAG: quality=5/5",
        "SCORES TAG: quality=N",
        "SCORES TAG: right=5",
        "SCORES TAG: quality=5 quality=5",
        "SCORES TAG: quality=5 right=5",
        "SCORES TAG:",
        "SCORES: quality=5",
        "SCORES 00000000: quality=5",
        "SCORES TAG: quality=1\nNo.\nSCORES TAG: quality=5",
        "I give SCORES TAG: quality=5",
        "quality=5",
        "",
    ],
)
def test_what_cannot_be_read_is_a_failure_and_asked_again_once(text: str) -> None:
    model = Scripted(line(text))
    panel = Panel({"a": model, "b": Scripted(gives(5))})
    found = asked(panel)
    assert (found.score, found.components["judges_failed"], len(model.prompts)) == (1.0, 1.0, 2)
    assert "judge.a" not in found.components
    assert panel.failed == {"a": 1}
    assert "Write the line alone" not in model.prompts[0]
    assert "Write the line alone" in model.prompts[1]
    assert tag_of(model.prompts[0]) != tag_of(model.prompts[1])


def test_what_is_read() -> None:
    for text in (
        "**SCORES TAG: quality=5**  ",
        "`SCORES TAG: quality=5`\n\n",
        "SCORES TAG: quality=5\n\nSCORES TAG: quality=5",
    ):
        assert asked(Panel({"a": Scripted(line(text))})).score == 1.0
    assert asked(Panel({"a": Scripted(gives(5), thoughts="<think>SCORES x: quality=1</think>")})).score == 1.0
    with pytest.raises(InfraError, match="a: its reply cannot be read: it was cut"):
        asked(Panel({"a": Scripted(gives(5), finish="length")}))


def test_the_second_reply_counts() -> None:
    model = Scripted(lambda prompt: gives(4)(prompt) if "Write the line alone" in prompt else "Hm.")
    assert asked(Panel({"a": model})).score == 0.75


def test_no_answer_is_the_lowest_score_and_asks_nobody() -> None:
    model = Scripted(honest)
    for answer in (None, "", " \n", "<think>12"):
        found = asked(Panel({"a": model}), answer)
        assert (found.score, found.components) == (0.0, {"judged": 0.0, "no_answer": 1.0})
    assert model.prompts == []


# --- failures ----------------------------------------------------------------------------------------------------


def test_one_judge_may_fail_and_two_may_not() -> None:
    one = asked(Panel({"a": Scripted(fails), "b": Scripted(gives(5)), "c": Scripted(gives(3))}, aggregate="mean"))
    assert (one.score, one.components["judges"], one.components["judges_failed"]) == (0.75, 2.0, 1.0)
    with pytest.raises(InfraError, match="1 of 3 judges answered, the quorum is 2: a: the server is on fire; b: "):
        asked(Panel({"a": Scripted(fails), "b": Scripted(fails), "c": Scripted(gives(3))}))
    assert asked(Panel({"a": Scripted(fails), "b": Scripted(fails), "c": Scripted(gives(3))}, quorum=1)).score == 0.5


class Never:
    """A judge that says nothing, until it is cancelled."""

    def __init__(self) -> None:
        self.running = self.cancelled = 0

    async def chat(self, *_: Any) -> Any:
        self.running += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


def test_a_late_judge_fails_alone() -> None:
    never = Never()
    found = asked(Panel({"late": never, "b": Scripted(gives(2))}, deadline=0.5))
    assert (found.score, found.components["judges_failed"]) == (0.25, 1.0)
    assert (never.running, never.cancelled) == (1, 1)


def test_cancelling_ends_the_requests() -> None:
    async def run() -> Never:
        never = Never()
        task = asyncio.create_task(pointwise(Panel({"a": never, "b": never}), "Right?")(episode("12")))
        await until(lambda: never.running == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return never

    assert asyncio.run(run()).cancelled == 2


def test_so_many_requests_run_at_once() -> None:
    class Busy:
        now = most = 0

        async def chat(self, messages: Any, tools: Any, sampling: Sampling) -> Any:
            Busy.now += 1
            Busy.most = max(Busy.most, Busy.now)
            for _ in range(20):
                await asyncio.sleep(0)
            Busy.now -= 1
            return await Scripted(gives(3)).chat(messages, tools, sampling)

    async def run() -> None:
        reward = pointwise(Panel({"a": Busy(), "b": Busy()}, concurrency=3), "Right?")
        await asyncio.gather(*(reward(episode(str(i))) for i in range(10)))

    asyncio.run(run())
    assert Busy.most == 3


# --- cache and budget --------------------------------------------------------------------------------------------


def test_equal_answers_are_judged_once_even_at_the_same_time() -> None:
    model, other = Scripted(honest), Scripted(honest)
    panel = Panel({"a": model, "b": other}, cached=6)
    right, wordy = pointwise(panel, "Right?"), pointwise(panel, "Wordy?")

    async def run() -> None:
        await asyncio.gather(*(right(episode("12")) for _ in range(5)))
        await right(episode("12", id="another"))  # the same question
        assert (len(model.prompts), len(other.prompts)) == (1, 1)
        await wordy(episode("12"))
        await right(episode("13"))
        assert len(model.prompts) == 3
        await right(episode("14"))  # replies of two judges: eight, and the oldest two are forgotten
        await right(episode("13"))
        assert len(model.prompts) == 4
        await right(episode("12"))
        assert len(model.prompts) == 5

    asyncio.run(run())
    assert panel.spent.calls == 10


def test_a_name_that_means_another_model_is_asked_anew() -> None:
    panel = Panel(["judge"])
    reward = pointwise(panel, "Right?")
    first, second = Scripted(gives(2)), Scripted(gives(4))
    found = [
        asyncio.run(reward(replace(episode("12"), models={"judge": model}))).score for model in (first, second, first)
    ]
    assert found == [0.25, 0.75, 0.25]
    assert (len(first.prompts), len(second.prompts)) == (1, 1)


def test_a_failure_is_not_kept_but_is_shared_by_those_who_wait() -> None:
    model = Scripted(fails)
    reward = pointwise(Panel({"a": model}), "Right?")

    async def run() -> None:
        found = await asyncio.gather(*(reward(episode("12")) for _ in range(6)), return_exceptions=True)
        assert all(isinstance(error, InfraError) for error in found)
        assert len(model.prompts) == 1
        with pytest.raises(InfraError):
            await reward(episode("12"))
        assert len(model.prompts) == 2

    asyncio.run(run())


def test_a_cancelled_episode_does_not_take_those_with_the_same_answer_along() -> None:
    entered: list[asyncio.Event] = []

    class Slow:
        async def chat(self, messages: Any, tools: Any, sampling: Sampling) -> Any:
            entered.append(asyncio.Event())
            if len(entered) == 1:
                await entered[0].wait()
            return await Scripted(gives(5)).chat(messages, tools, sampling)

    async def run() -> float:
        reward = pointwise(Panel({"a": Slow()}), "Right?")
        first = asyncio.create_task(reward(episode("12")))
        await until(lambda: entered)
        second = asyncio.create_task(reward(episode("12")))
        await asyncio.sleep(0)
        first.cancel()
        found: Verdict = await second
        return found.score

    assert asyncio.run(run()) == 1.0
    assert len(entered) == 2


def test_the_budget_is_kept_and_told() -> None:
    model = Scripted(honest)
    panel = Panel({"a": model}, budget=Budget(calls=2))
    assert asked(panel).score == 1.0
    assert asked(panel).score == 1.0  # from the cache
    assert asked(panel, "13").score == 0.0
    with pytest.raises(ConfigError, match=r"budget of 2 calls is spent: 2 calls and 40 tokens were used"):
        asked(panel, "14")
    assert len(model.prompts) == 2
    assert asked(panel, "13").score == 0.0

    tokens = Panel({"a": Scripted(honest)}, budget=Budget(tokens=30))
    asked(tokens)
    asked(tokens, "13")
    with pytest.raises(ConfigError, match="budget of 30 tokens is spent: 2 calls and 40 tokens"):
        asked(tokens, "14")
    with pytest.raises(ConfigError, match="judge 'a' does not report its tokens"):
        asked(Panel({"a": Scripted(honest, tokens=None)}, budget=Budget(tokens=30)))
    with pytest.raises(ConfigError, match="at least 1"):
        Budget(calls=0)


# --- names -------------------------------------------------------------------------------------------------------


def test_judges_are_named() -> None:
    named = Panel(["first", f"openai:org/q@2@{URL}", {"model": "m", "url": URL, "timeout": 3.0}, Scripted(honest)])
    assert named.labels == ("first", "org/q@2", "m", "judge4")
    assert named.quorum == 3
    assert Panel({"x": "first"}).labels == ("x",)


@pytest.mark.parametrize(
    ("judges", "settings", "told"),
    [
        ([], {}, "a list of judges"),
        ("judge", {}, "a list of judges"),
        (["a", "a"], {}, "two judges are called 'a'"),
        (["http://x/v1"], {}, "write openai:MODEL@URL"),
        (["openai:m"], {}, "openai:MODEL@http"),
        ([{"model": "m"}], {}, "lacks url"),
        ([{"model": "m", "url": URL, "timeuot": 1}], {}, "unknown option 'timeuot'"),
        ([{"model": "m", "url": URL, "timeout": 0}], {}, "timeout is 0"),
        ([{"model": "m", "url": "http://user:pw@x/v1"}], {}, "holds a password"),
        ([3], {}, "no chat model"),
        (["a"], {"quorum": 2}, "quorum = 2 of 1 judges"),
        (["a"], {"quorum": 0}, "quorum = 0 of 1 judges"),
        (["a"], {"aggregate": "best"}, "unknown aggregation 'best'"),
        (["a"], {"deadline": 0}, "deadline = 0"),
        (["a"], {"concurrency": 0}, "concurrency = 0"),
        (["a"], {"passes": 0.0}, "passes = 0.0"),
    ],
)
def test_what_is_refused(judges: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Panel(judges, **settings)


@pytest.mark.parametrize(
    ("criteria", "settings", "told"),
    [
        ({}, {}, "at least one criterion"),
        ({"a b": "x"}, {}, "criterion 'a b'"),
        ({"a": ""}, {}, "criterion 'a'"),
        ({"a": ("x", 0.0)}, {}, "weight of criterion 'a'"),
        ("x", {"scale": (5, 1)}, "scale"),
        ("x", {"scale": (1, 3, 5)}, "scale"),
        ("x", {"scale": 5}, "scale"),
        ("x", {"max_chars": 5}, "max_chars = 5"),
        ("x", {"refrence": "r"}, "unknown argument 'refrence'"),
    ],
)
def test_which_criteria_are_refused(criteria: Any, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        pointwise(Panel(["a"]), criteria, **settings)


def test_a_name_that_the_environment_lacks() -> None:
    with pytest.raises(ConfigError, match="judge 'a' is the model 'a' of the environment, which was made with none"):
        asked(Panel(["a"]))


def test_a_task_without_the_reference_is_the_tasks_failure() -> None:
    with pytest.raises(TaskError, match=r"task 't': payload\['gold'\] = None is no text"):
        asked(Panel({"a": Scripted(honest)}), reference="gold")


def test_what_judges_see() -> None:
    model = Scripted(honest)
    panel = Panel({"a": model})
    found = asked(panel, "12" + "x" * 500, max_chars=100)
    assert found.components["cut"] == 1.0
    assert "Of ANSWER, 402 characters in the middle are not shown." in model.prompts[0]
    asked(panel, "It is.", question=lambda e: e.task.id, answer=lambda e: f"<think>!</think>{e.answer}12")
    assert (slot(model.prompts[1], "QUESTION"), slot(model.prompts[1], "ANSWER")) == ("t", "It is.12")


def test_a_panel_is_a_value() -> None:
    """Without its counts: those are a process's own."""
    panel = Panel({"x": f"openai:m@{URL}", "y": "named"}, quorum=1, aggregate="vote", budget=Budget(calls=3))
    panel.spent.calls = 3
    copy = pickle.loads(pickle.dumps(pointwise(panel, "Right?"))).panel
    assert (copy.labels, copy.quorum, copy.aggregate, copy.spent.calls) == (panel.labels, 1, "vote", 0)
    assert pickle.loads(pickle.dumps(ServedModel("m", URL, timeout=3.0))) == ServedModel("m", URL, timeout=3.0)


def test_it_is_a_reward_like_others() -> None:
    rubric = Gate(
        {"correct": lambda e: e.answer == "12", "style": (pointwise(Panel({"a": Scripted(gives(3))}), "?"), 0.1)}
    )
    found = asyncio.run(judge(rubric, episode("12")))
    assert found.score == pytest.approx(1.05)
    assert found.components["style"] == 0.5
    assert found.components["style.judge.a"] == 0.5


def test_the_honest_judge_is_honest() -> None:
    model = Scripted(honest)
    assert asked(Panel({"a": model}), " 12\n").score == 1.0
    assert knows(model.prompts[0]) == 5
