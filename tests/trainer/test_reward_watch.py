"""The watch for rewards that are earned without the task, on series made by hand and in a real run."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from areal_agents.evaluation.rescore import episode_of
from areal_agents.reward import Episode, Gate, WeightedSum, correct_part
from areal_agents.rewards import reward_function
from areal_agents.rewards.shaping import Clip, Normalize, overlong
from areal_agents.settings.config import TrainConfig
from areal_agents.toolenv import ToolEnv
from areal_agents.tracking.tracker import read_metrics
from areal_agents.tracking.trajectories import read_records
from areal_agents.trainer.loop import train
from areal_agents.trainer.reward_watch import (
    RewardWatch,
    SameAnswers,
    Suspicion,
    component_means,
    same_answers,
    tell_signs,
)
from areal_agents.types import AssistantMessage, Completion, Group, Task, Text, ToolCall, Trajectory, Turn
from tests.letters_env import share_of_letters
from tests.tiny_models import tiny_chat_model

NONE_ALIKE = SameAnswers(0.0, "", 6, 0.0)


def watch(window: int = 4) -> RewardWatch:
    return RewardWatch("correct", window, 0.8)


def told(series: Mapping[str, Sequence[float]], seen: RewardWatch | None = None) -> list[tuple[int, Suspicion]]:
    seen = seen or watch()
    out = []
    for step, values in enumerate(zip(*series.values(), strict=True), start=1):
        row = {f"component/{name}": x for name, x in zip(series, values, strict=True)}
        out += [(step, s) for s in seen.look(step, {**row, "reward": 1.0}, NONE_ALIKE)]
    return out


def test_a_component_that_rises_while_correctness_falls_is_told_once() -> None:
    ((step, found),) = told({"correct": [0.5, 0.5, 0.25, 0.25, 0.2], "brief": [0.0, 0.0, 1.0, 1.0, 1.0]})
    assert (step, found.sign) == (4, "component_rises")
    assert found.facts == {
        "component": "brief", "before": 0.0, "after": 1.0, "correct": "correct", "correct_before": 0.5,
        "correct_after": 0.25, "first_step": 1, "last_step": 4,
    }  # fmt: skip
    assert "'brief' rose from 0 to 1 while 'correct' fell from 0.5 to 0.25 (steps 1 to 4)" in found.text


@pytest.mark.parametrize(
    ("correct", "brief"),
    [
        ([0.5, 0.5, 0.75, 0.75], [0.0, 0.0, 1.0, 1.0]),  # both rise: it learns
        ([0.5, 0.5, 0.25, 0.25], [1.0, 1.0, 0.0, 0.0]),  # both fall
        ([0.5, 0.5, 0.25, 0.25], [1.0, 1.0, 1.04, 1.04]),  # by less than a twentieth
        ([0.5, 0.5, 0.25, 0.25], [-1.0, -1.0, -0.96, -0.96]),  # also of a punishment
        ([0.5, 0.5, 0.49, 0.49], [0.0, 0.0, 1.0, 1.0]),  # by less than 0.02
        ([0.5, 0.1, 0.4, 0.0], [0.0, 0.0, 1.0, 1.0]),  # 0.3 to 0.2 ± 0.28: noise
        ([0.5, 0.25, 0.25], [0.0, 1.0, 1.0]),  # the window is not full
    ],
)
def test_what_is_no_sign(correct: list[float], brief: list[float]) -> None:
    assert told({"correct": correct, "brief": brief}) == []


def test_noise_alone_raises_no_alarm() -> None:
    draw = random.Random(0)
    for _ in range(20):
        series = {name: [draw.gauss(0.5, 0.1) for _ in range(200)] for name in ("correct", "a", "b", "c")}
        assert told(series, watch(20)) == []


def test_a_slow_trend_under_noise_is_found() -> None:
    draw = random.Random(1)
    series = {
        "correct": [0.6 - 0.01 * t + draw.gauss(0, 0.03) for t in range(40)],
        "length": [-1.0 + 0.02 * t + draw.gauss(0, 0.05) for t in range(40)],
    }
    found = told(series, watch(20))
    assert [(s.facts["component"], s.sign) for _, s in found] == [("length", "component_rises")]
    assert found[0][0] <= 25


def test_a_sign_is_told_again_after_it_was_away() -> None:
    hack = ([0.5, 0.5, 0.25, 0.25], [0.0, 0.0, 1.0, 1.0])
    calm = ([0.25] * 4, [1.0] * 4)
    series = {"correct": [*hack[0], *calm[0], *hack[0]], "brief": [*hack[1], *calm[1], *hack[1]]}
    assert [step for step, _ in told(series)] == [4, 12]


@pytest.mark.parametrize(("away", "again"), [(1, False), (2, True), (3, True)])
def test_half_a_window_without_a_sign_is_away(away: int, again: bool) -> None:
    seen, sign = watch(4), {"a": Suspicion("component_rises", {}, "a")}
    assert len(seen._onsets(sign)) == 1
    for _ in range(away):
        assert seen._onsets({}) == []
    assert bool(seen._onsets(sign)) == again


def test_without_a_known_correctness_no_component_is_compared() -> None:
    seen = watch()
    assert told({"right": [0.5, 0.5, 0.25, 0.25], "brief": [0.0, 0.0, 1.0, 1.0]}, seen) == []
    assert seen.knows_correct({"component/right": 1.0}) is False
    assert seen.knows_correct({"component/right": 1.0}) is True  # it is asked once
    assert watch().knows_correct({"component/correct": 1.0}) is True


def test_a_component_that_was_away_for_a_step_is_not_compared() -> None:
    seen = watch()
    told({"correct": [0.5, 0.5, 0.25], "brief": [0.0, 0.0, 1.0]}, seen)
    assert seen.look(4, {"component/correct": 0.25}, NONE_ALIKE) == []


def trajectory(task: Task, text: str, reward: float = 0.0, *, calls: int = 0) -> Trajectory:
    message = AssistantMessage((Text(text),), (ToolCall("", "f", {}, ""),) * calls)
    turn = Turn((), Completion((), (), (), "stop"), message, reward, {"correct": reward})
    return Trajectory("e", task, "g", (turn,), True, False, "answer")


def group(k: int, *answers: str, reward: float = 0.0, calls: int = 0) -> Group:
    task = Task.make(f"t{k}", split="train", seed=k, payload={"n": k})
    return Group(f"g{k}", task, tuple(trajectory(task, a, reward, calls=calls) for a in answers), 0, k)


def test_the_share_of_tasks_with_the_same_answer() -> None:
    groups = [group(0, "7", "7", reward=1.0), group(1, " 7 ", "8"), group(2, "8", "9", "9"), group(3, "", "")]
    # task 0: 7; task 1: 7 and 8, each half of it; task 2: 9; task 3: nothing
    found = same_answers(groups)
    assert (found.share, found.answer, found.tasks) == (0.5, "7", 4)
    assert found.reward == pytest.approx(2 / 3)
    assert same_answers([group(0, "7"), group(0, "7")]).share == 0.0  # one task
    assert same_answers([group(k, "", calls=1) for k in range(4)]).share == 0.0
    assert same_answers([group(k, "<think>a</think> 7" if k else "7") for k in range(4)]).share == 1.0


def test_same_answers_are_told_at_their_third_step() -> None:
    alike = SameAnswers(0.9, "yes " * 200, 10, 0.5)
    seen = watch()
    found = [seen.look(step, {}, alike) for step in range(1, 7)]
    assert [len(f) for f in found] == [0, 0, 1, 0, 0, 0]
    assert found[2][0].sign == "same_answers"
    assert (found[2][0].facts["share"], found[2][0].facts["tasks"], found[2][0].facts["reward"]) == (0.9, 10, 0.5)
    assert len(found[2][0].facts["answer"]) <= 220
    quiet = watch()
    assert not any(quiet.look(k, {}, SameAnswers(0.8, "yes", 10, 1.0)) for k in range(9))  # not above the bound
    assert not any(quiet.look(k, {}, SameAnswers(1.0, "yes", 3, 1.0)) for k in range(9))  # too few tasks


def test_a_resumed_watch_tells_nothing_twice() -> None:
    series = {"correct": [0.5, 0.5, 0.25, 0.25], "brief": [0.0, 0.0, 1.0, 1.0]}
    rows = [
        {"component/correct": c, "component/brief": b, "same_answer_share": 0.9}
        for c, b in zip(*series.values(), strict=True)
    ]
    resumed = watch()
    for step, row in enumerate(rows, start=1):
        resumed.look(step, row)
    assert resumed.look(5, rows[-1], SameAnswers(0.9, "yes", 10, 1.0)) == []


@pytest.mark.parametrize(("tasks", "live"), [(3, [4, 5, 6]), (4, []), (None, [])])
def test_a_resumed_watch_counts_the_steps_that_it_would_have_counted(tasks: int | None, live: list[int]) -> None:
    """After two small batches the sign needs three large ones, whether or not the run was resumed in between."""
    row = {"same_answer_share": 1.0} | ({} if tasks is None else {"same_answer_tasks": float(tasks)})
    resumed = watch()
    for step in (1, 2, 3):
        assert len(resumed.look(step, row)) == (step == 3 and tasks != 3)
    found = [step for step in (4, 5, 6) if resumed.look(step, {}, SameAnswers(1.0, "yes", 4, 1.0))]
    assert found == live[-1:]  # told at the third large batch, or before the resume


def test_components_are_means_over_the_episodes_that_have_them() -> None:
    task = Task.make("t", split="train", seed=0, payload={})
    turn = trajectory(task, "a", 1.0).turns[0]
    first = Trajectory("e", task, "g", (turn, turn), True, False, "answer")  # 1 + 1
    second = trajectory(task, "a", 0.5)
    third = Trajectory("e", task, "g", (), True, False, "answer")
    assert component_means([first, second, third]) == {"component/correct": 1.25}


def test_which_component_says_what_is_right() -> None:
    def one(episode: Episode) -> float:
        return 1.0

    gate = Gate({"solved": one, "brief": one}, on="solved")
    assert correct_part(gate) == "solved"
    assert correct_part(WeightedSum({"brief": one, "correct": one})) == "correct"
    assert correct_part(WeightedSum({"brief": one, "main": (gate, 2.0)})) == "main.solved"
    assert correct_part(Clip(gate, low=0, high=1)) == "solved"
    assert correct_part(WeightedSum({"main": Normalize(Clip(gate, low=0, high=1), low=0, high=1)})) == "main.solved"
    assert correct_part(reward_function(timeout=1)(gate)) == "solved"
    assert correct_part(WeightedSum({"brief": one})) is None
    assert correct_part(one) is correct_part(None) is None


def few_letters(episode: Episode) -> bool:
    return share_of_letters(episode.answer or "") < 0.4


def letters(episode: Episode) -> float:
    return share_of_letters(episode.answer or "")


class Hackable(ToolEnv):
    """Its answers should have few letters, and it pays for many."""

    scores_cut_messages = True
    rubric = WeightedSum({"correct": (few_letters, 0.1), "letters": letters, "length": (overlong(6, cache=4), 0.01)})

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"{split} {i}"}) for i in range(8)]

    def prompt(self, task: Task) -> str:
        return str(task.payload["word"])


@pytest.mark.parametrize(
    ("components", "says"),
    [
        (["correct", "form"], None),
        (["math(boxed)"], ""),  # one alone has nothing to be compared with
        (["won", "rooms"], "set track.watch_correct to one of rooms, won"),
    ],
)
def test_an_unknown_correctness_is_told_once_where_there_is_something_to_compare(
    components: list[str], says: str | None
) -> None:
    events: list[str] = []
    lines: list[str] = []
    tracker: Any = SimpleNamespace(event=lambda kind, **facts: events.append(kind), message=lines.append)
    watched = watch()
    for step in (1, 2):
        tell_signs(watched, step, {f"component/{name}": 0.5 for name in components}, [], tracker)
    assert events == ([] if says is None else ["correctness_unknown"])
    assert len(lines) == bool(says)
    assert all(line.endswith(says or "") for line in lines)


@pytest.mark.slow
def test_a_hackable_reward_is_told_in_a_real_run(tmp_path: Path) -> None:
    tree = {
        "steps": 16, "out": tmp_path / "run", "env": {"id": "tests.trainer.test_reward_watch:Hackable"},
        "model": {"path": str(tiny_chat_model(tmp_path / "model")), "max_context": 128},
        "engine": {"precision": "fp32", "max_batch": 32}, "learner": {"lr": 5e-3, "precision": "fp32"},
        "rollout": {"groups": 4, "group_size": 8, "concurrency": 32, "max_turn_tokens": 8},
        "eval": {"n": 2, "baseline": False}, "track": {"watch_window": 8},
    }  # fmt: skip
    asyncio.run(train(TrainConfig.model_validate(tree), console=False))
    rows = read_metrics(tmp_path / "run", kind="train")
    assert rows[-1]["component/letters"] > rows[0]["component/letters"]
    assert rows[-1]["component/correct"] < rows[0]["component/correct"]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    found = [e for e in events if e["kind"] == "reward_hack_suspected" and e["sign"] == "component_rises"]
    assert [e["component"] for e in found] == ["letters"]
    assert (found[0]["correct"], found[0]["last_step"] - found[0]["first_step"]) == ("correct", 7)
    assert found[0]["correct_after"] < found[0]["correct_before"]
    assert not [e for e in events if e["kind"] == "correctness_unknown"]
    # lengths in tokens are known to the reward, and to whoever scores the saved episodes again
    assert rows[0]["unverifiable"] == 0.0
    assert rows[0]["component/length"] < -0.5
    saved = list(read_records(tmp_path / "run", kind="train"))
    assert len(saved) == 16 * 32
    for record in saved:
        (turn,) = record.trajectory.turns
        assert turn.message.tokens == len(turn.completion.ids)
        assert overlong(6, cache=4)(episode_of(record)).score == turn.components["length"]
