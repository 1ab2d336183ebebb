"""Rewards: which values are numbers, what equal ones train, and which tokens do."""

from __future__ import annotations

import math
from typing import Any

import pytest

from areal_agents.algorithms.batch import rows_of
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, per_turn
from areal_agents.algorithms.registry import ADVANTAGES, READ_VALUES, Choice
from areal_agents.env import AgentEnv
from areal_agents.errors import RewardError
from areal_agents.reward import Episode, judge
from areal_agents.tracking.tracker import read_metrics
from areal_agents.types import Task
from tests.chat_server import Json, Step, chat_server, completion
from tests.reports.envs import Kinds, KindsOfStep, numbers
from tests.reports.place import Place, case, run


@case("H1-27")
def no_number_no_training(place: Place) -> None:
    """The error says which task; a run on such rewards makes no step."""
    episode = Episode(Task.make("train-9", split="train", seed=0, payload={}), (), "1", (), "answer")
    for value in (float("nan"), float("inf"), -math.inf, None, "1.0", b"1"):
        with pytest.raises(RewardError, match="train-9"):
            run(judge(returning(value), episode))
    said = place.train("NotANumber", code=1)
    assert not (place.run / "metrics.jsonl").exists() or not read_metrics(place.run, kind="train")
    assert "train-" in said.err
    assert "nan" in said.err


@case("H1-28")
def every_kind_of_number(place: Place) -> None:
    """A rubric's and a step's alike."""
    for kind in numbers():
        for env in (Kinds(kind=kind, sandbox=None), KindsOfStep(kind=kind)):
            rewards, total = played(env)
            assert total == (1.0 if isinstance(env, Kinds) else 3.0), (kind, rewards)
            assert all(type(r) is float for r in rewards)


def returning(value: object) -> Any:
    """A reward that returns ``value``."""
    return lambda episode: value


def played(env: AgentEnv) -> tuple[list[float], float]:
    """The rewards of an episode's turns as training gets them, and their sum."""
    from areal_agents.rollout.env_host import EnvHost
    from areal_agents.rollout.episode import EpisodeDriver
    from areal_agents.rollout.script import ScriptPolicy

    task = type(env).tasks("train")[0]

    def says(shown: object):  # type: ignore[no-untyped-def]
        while True:
            yield r"\boxed{107}"

    async def episode() -> list[float]:
        host = EnvHost()
        try:
            driver = EpisodeDriver(lambda: env, task, ScriptPolicy(says, task), host, "e", 0, 60.0, max_turns=3)
            await driver.play()
            return [t.reward for t in driver.trajectory("g").turns]
        finally:
            await host.close()

    rewards = run(episode())
    return rewards, sum(rewards)


@case("H1-30")
def equal_rewards_train_nothing(place: Place) -> None:
    """Exactly nothing, also where sums of equal rewards differ by a rounding."""
    groups: list[list[tuple[float, ...]]] = [
        [(0.7,)] * 3, [(0.95,)] * 7, [(0.1 + 0.2,), (0.3,)], [(0.7, 0.7, 0.7)] * 3, [(0.0,)] * 4, [(1.0,)] * 8,
        [(1e-9,)] * 5, [(-2.5,)] * 6,
    ]  # fmt: skip
    equal_returns: list[list[tuple[float, ...]]] = [[(0.1, 0.2), (0.3,)], [(1 / 3, 2 / 3), (2 / 3, 1 / 3), (1.0,)]]
    choices = [
        Choice("turn_return", {"gamma": 0.9}), Choice("grpo", {"normalize": False}),
        *(Choice(kind) for kind in ADVANTAGES.builtin() if kind not in READ_VALUES),
    ]  # fmt: skip
    of_returns = {"grpo", "dr_grpo", "rloo", "reinforce_pp", "opo", "opob", "pass_at_k", "maxrl"}
    for choice in choices:
        for group in groups + (equal_returns if choice.kind in of_returns else []):
            if choice.kind == "maxrl" and min(map(sum, group)) < 0:
                continue  # refused
            if choice.kind == "kevin" and len(group[0]) > 1:
                continue  # compares late turns with early ones
            views = [EpisodeView(r, greedy_return=sum(group[0]), log_ratio=0.1 * i) for i, r in enumerate(group)]
            found = Estimator(choice)(views)
            assert not any(any(per_turn(a)) for a in found), (choice, group, found)
    place.train("Even", {"rollout.group_size": 3})
    (row,) = read_metrics(place.run, kind="train")
    assert (row["loss"], row["grad_norm"], row["groups_with_signal"]) == (0.0, 0.0, 0.0)


@case("H1-32")
def an_answer_that_was_cut(place: Place) -> None:
    """By the turn's limit, and by a server's."""
    place.eval("Sums", {"model": place.tiny(), "n": 4, "max_turn_tokens": 8})
    for episode in place.episodes("eval"):
        assert episode.turns[-1].completion.finish == "length"
        assert (episode.terminated, episode.truncated) == (False, True)
        assert episode.stop_reason != "answer"
    assert place.report()["truncation_rate"] == 1.0

    def cut(body: Json) -> Step:
        a = int(body["messages"][-1]["content"].partition("+")[0])
        return completion(rf"\boxed{{{a + 7}}} and", finish="length" if a % 2 else "stop", tokens=8)

    there = Place(place.folder / "served", place.shared, place.smollm2, place.templates)
    with chat_server(cut) as server:
        said = there.eval("Sums", {"model": "openai:m", "url": server.url, "n": 4, "eval.task_seed": "none"})
    assert there.report()["truncation_rate"] == 0.5
    assert there.report()["pass_at_1"] == 0.5  # what was cut is no answer, even where it holds one
    assert "truncated" in said.out


@case("H1-33")
def the_end_token_trains_though_it_pads(place: Place) -> None:
    tokenizer = place.tokenizer("qwen2_5", "<|im_start|>", end="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    model = place.model("padded", tokenizer)
    place.train("Sums", {"model.path": model, "warm_start.demonstrations": 2})
    for episode in place.episodes("demonstration"):
        (row,) = rows_of(episode, [1.0] * len(episode.turns), episode=0)
        prompt = len(episode.turns[0].prompt_suffix)
        assert row.ids[-1] == tokenizer.pad_token_id
        assert row.mask[prompt:].all()
        assert not row.mask[:prompt].any()
