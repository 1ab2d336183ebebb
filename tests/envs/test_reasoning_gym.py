"""reasoning-gym's generators: what is left out is found by trying or reading, and the rest keeps the contract."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import json
import random
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import pytest

from areal_agents import registry
from areal_agents.envs import reasoning_gym_env
from areal_agents.envs.reasoning_gym_env import MAX_CHARS, ReasoningGym, Solved, said
from areal_agents.envs.reasoning_gym_lists import EXACT, EXCLUDED, INCLUDED, SUMS
from areal_agents.envs.reasoning_gym_worker import is_sum, split_of
from areal_agents.envs.worker_pool import WorkerPool
from areal_agents.errors import ConfigError, EnvError, TaskError
from areal_agents.reward import Episode, Verdict
from areal_agents.types import Task
from tests.conftest import require


@pytest.fixture(scope="module", autouse=True)
def _package() -> None:
    require("module:reasoning_gym")


@pytest.fixture(scope="module")
def datasets() -> dict[str, tuple[type, type]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        from reasoning_gym.factory import DATASETS

    return dict(DATASETS)


def tasks(split: str = "test", **more: Any) -> Any:
    return registry.spec("areal/ReasoningGym-v0").env_class().tasks(split, **more)


def scored(task: Task, answer: str | None, *, partial: bool = False) -> Verdict:
    episode = Episode(task, (), None if answer is None else f"So <answer>{answer}</answer>", (), "answer")
    return asyncio.run(Solved(partial=partial)(episode))


def test_every_generator_is_listed_once(datasets: dict[str, Any]) -> None:
    assert sorted([*INCLUDED, *EXCLUDED]) == sorted(datasets)
    assert len(datasets) == 106  # with a mixture of the others
    assert set(EXACT) | set(SUMS) < set(INCLUDED)


def evaluates(cls: type) -> bool:
    """Say whether code of a class gives something called ``answer`` to what runs Python code."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    run = ("eval", "exec", "parse_expr", "sympify")
    named = [c for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) in run]
    return any(isinstance(n, ast.Name) and n.id == "answer" for c in named for a in c.args for n in ast.walk(a))


def test_scorers_that_evaluate_an_answer_never_see_one(datasets: dict[str, Any]) -> None:
    found = {name for name, (cls, _) in datasets.items() if evaluates(cls)}
    asked = {name for name, reason in EXCLUDED.items() if "parse_expr" in reason}
    assert found == asked | set(EXACT) | set(SUMS)
    assert len(found) == 9


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("game_of_life_halting", "perhaps"),
        ("coin_flip", "0"),
        ("puzzle24", "1 * 2 * 3 * 4"),
        ("propositional_logic", ""),
    ],
)
def test_scorers_that_pay_without_skill_are_left_out(datasets: dict[str, Any], name: str, answer: str) -> None:
    make, config = datasets[name]
    entries = make(config=config(seed=3, size=12))
    said = [answer or entry["metadata"]["premises"][0] for entry in entries]
    earned = [entries.score_answer(text, entry) for text, entry in zip(said, entries, strict=True)]
    assert fmean(earned) > (0.9 if answer else 0.5)
    assert name in EXCLUDED or name in SUMS


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("14/(1*1) + 59 - 1 + 59", True),
        (" (59 + 59) + 14 - 1*1*1\n", True),
        ("--59 + 59 + 14 - 1 * 1 / 1", True),
        ("131", False),
        ("14 + 59 + 59 - 1", False),  # not all of them
        ("14 + 59 + 59 - 1 + 0 * 1 * 1", False),
        ("14 + 59 + 59 - 1 ** 1 ** 1", False),
        ("14 + 59 + 59 - 1.0 * 1 * 1", False),
        ("14 + 59 + 59 - 1 * 1 * True", False),
        ("14 + 59 + 59 / (1 - 1) * 1", False),
        ("__import__('os').getpid() + 14 + 59 + 59 - 1 * 1 * 1", False),
        ("14 + 59 + 59 - 1 * 1 * 1 = 131", False),
        ("(" * 5000, False),
        ("9" * 10_000, False),
        ("", False),
    ],
)
def test_a_sum_is_read_exactly_and_not_evaluated(text: str, right: bool) -> None:
    assert is_sum(text, [1, 59, 1, 1, 59, 14], 131) is right


def skilless(task: Task, others: list[Task]) -> dict[str, str]:
    """What policies without skill say."""
    p = task.payload
    return {
        "empty": "",
        "junk": "asdf 7 ;; {} qwer",
        "echo": p["question"],
        "number": "987654",
        "no number": "nan",
        "several": f"{others[0].payload['answer']}\n{p['answer']}\n{others[1].payload['answer']}",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", INCLUDED)
def test_a_gold_answer_earns_1_and_no_skill_little(name: str) -> None:
    pool = tasks("train", generators=name)
    some = [pool[i] for i in range(3)]
    if name in ("boxnet", "rush_hour"):
        assert {ReasoningGym.gold(task) for task in some} == {None}
    else:
        assert [scored(task, task.payload["answer"]).score for task in some] == [1.0] * 3
    earned: dict[str, list[float]] = {}
    for i, task in enumerate(some):
        others = [t for t in some if t is not task]
        for policy, answer in skilless(task, others).items():
            if answer.strip() != str(task.payload["answer"]).strip():
                earned.setdefault(policy, []).append(scored(task, answer).score)
        other = others[i % 2].payload["answer"]
        if other not in (None, task.payload["answer"]):
            earned.setdefault("constant", []).append(scored(task, other).score)
    assert {policy: fmean(scores) for policy, scores in earned.items() if any(scores)} == {}


HASHED = ("isomorphic_strings", "ransom_note")
"""Generators that draw from sets of texts, whose order is another in each process."""


def drawn(pool: WorkerPool, names: Sequence[str], difficulty: float | None = None) -> dict[str, str]:
    request = {"do": "make", "difficulty": difficulty, "config": "{}", "split": "train", "salt": "a"}
    return {name: json.dumps(pool.ask({**request, "generator": name}, 60)) for name in names}


@contextlib.contextmanager
def elsewhere(hash_seed: str) -> Iterator[WorkerPool]:
    """Processes of their own."""
    environment = {"PYTHONHASHSEED": hash_seed}
    pool = WorkerPool("areal_agents.envs.reasoning_gym_worker", "it", workers=1, environment=environment)
    try:
        yield pool
    finally:
        pool.close()


@pytest.mark.slow
def test_a_task_is_the_same_in_every_process() -> None:
    first = drawn(reasoning_gym_env._pool(), INCLUDED)
    with elsewhere("0") as pool:
        again = drawn(pool, INCLUDED)
    assert [name for name in INCLUDED if first[name] != again[name]] == []
    assert [name for name in INCLUDED if "question" not in first[name]] == []
    with elsewhere("7") as pool:  # so the pool sets PYTHONHASHSEED
        other = drawn(pool, HASHED)
    assert [name for name in HASHED if first[name] == other[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_every_generator_has_tasks_at_every_difficulty(difficulty: float) -> None:
    made = drawn(reasoning_gym_env._pool(), INCLUDED, difficulty)
    assert [name for name in INCLUDED if "question" not in made[name]] == []


def test_no_question_is_in_two_splits() -> None:
    """Even of a generator with few questions, at any difficulty."""
    for split in ("train", "validation", "test"):
        for difficulty in (None, 0.0, 1.0):
            pool = tasks(split, generators="count_bits", difficulty=difficulty)
            assert {split_of(pool[i].payload["question"]) for i in range(6)} == {split}
    assert split_of("What  IS it?\n") == split_of("what is it?")
    assert [len(tasks(split)) for split in ("train", "validation", "test")] == [4096, 256, 512]


def test_the_difficulty_moves_a_generators_own_levels() -> None:
    def terms(difficulty: float | None) -> float:
        pool = tasks(generators="chain_sum", difficulty=difficulty)
        return fmean(len(pool[i].payload["question"]) for i in range(20))

    assert terms(0.0) < terms(1.0)
    assert tasks(generators="chain_sum", difficulty=0.5)[0].id == "test-0.5-chain_sum-0"
    assert tasks(generators="gsm_symbolic", difficulty=0.5)[0].payload["difficulty"] == 0.5  # it has no levels


def test_generators_take_turns_and_settings_are_passed_on() -> None:
    pool = tasks(generators="chain_sum, spell_backward")
    assert [pool[i].payload["generator"] for i in range(4)] == ["chain_sum", "spell_backward"] * 2
    assert {tasks()[i].payload["generator"] for i in (0, 1)} == set(INCLUDED[:2])
    words = tasks(generators=["spell_backward"], config={"min_word_len": 9, "max_word_len": 9})
    assert {len(words[i].payload["answer"]) for i in range(5)} == {9}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"generators": "simple_integration"},
            "does not play reasoning-gym's 'simple_integration': its scorer gives the answer to SymPy",
        ),
        ({"generators": "chain_sun"}, "knows no generator 'chain_sun'; there are ab, acre"),
        ({"config": {"min_terms": 2}}, "is for one generator, and there are 99"),
        ({"generators": "chain_sum", "config": {"seed": 1}}, "seed and size are the tasks' own"),
        ({"generators": "chain_sum", "config": {"min_terms": object()}}, "is no JSON"),
    ],
)
def test_what_cannot_be_played_is_refused_at_once(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ReasoningGym(**arguments)
    with pytest.raises(ConfigError, match=said):
        tasks(**arguments)


def test_settings_that_a_generator_does_not_take_are_refused() -> None:
    for config in ({"no_such": 1}, {"min_terms": -5}):
        with pytest.raises(ConfigError, match="'chain_sum' does not take config"):
            tasks(generators="chain_sum", config=config)[0]
    with pytest.raises(ConfigError, match="has no split 'dev': its splits are train, validation, test"):
        tasks("dev")


def test_without_the_package_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_agents.utils.packages.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'areal-agents\[reasoning-gym\]'"):
        tasks()


def test_the_answer_is_read_from_its_slot_alone() -> None:
    assert said("6 <answer> 42\n</answer> .") == "42"
    assert said("<answer>42</answer> <answer>42</answer>") == "42"
    assert said("<answer>41</answer> <answer>42</answer>") is None
    assert said("42") is said("<answer>42") is None
    task = tasks(generators="chain_sum")[0]
    gold = task.payload["answer"]
    for text in (
        None,
        gold,
        f"<answer>{gold}</answer><answer>0.5</answer>",
        f"<answer>{gold}{' ' * MAX_CHARS}x</answer>",
    ):
        verdict = asyncio.run(Solved()(Episode(task, (), text, (), "answer")))
        assert (verdict.score, verdict.status) == (0.0, "ok")


def test_partial_credit_is_paid_where_it_is_asked_for() -> None:
    pool = tasks(generators="time_intervals", config={"task_types": ["date"]})
    task = next(pool[i] for i in range(20) if not pool[i].payload["answer"].startswith("100 "))
    days = int(task.payload["answer"].split()[0])
    near = f"{days + 1} days"
    own = scored(task, near).components["own_score"]
    assert own == pytest.approx(0.99)  # 1 - 1/100: the hundred days are the generator's own setting
    assert scored(task, near).score == 0.0
    assert scored(task, near, partial=True).score == own
    assert (scored(task, "soon").score, scored(task, "soon").components["correct"]) == (0.0, 0.0)


def test_texts_that_a_scorer_cannot_read_or_end_with_earn_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = tasks(generators="prime_factorization")[0]
    assert scored(factors, "two × three") == Verdict(0.0, {"correct": 0.0}, status="unverifiable")
    monkeypatch.setattr(reasoning_gym_env, "SCORE_SECONDS", 1.0)
    cube = tasks(generators="rubiks_cube")[0]
    assert scored(cube, "R9999999") == Verdict(0.0, {"correct": 0.0}, status="timeout")
    assert scored(cube, "R" * 99).score == 0.0
    assert scored(cube, cube.payload["answer"]).score == 1.0  # another process took its place


@pytest.mark.parametrize("answer", ["nan", "NaN", "-nan", "(nan)", "nan + nani", "1 + n ani"])
def test_what_is_no_number_is_no_answer(answer: str) -> None:
    """The generator's scorer takes min(1, exp(-nan)), which is 1."""
    assert scored(tasks(generators="complex_arithmetic")[0], answer).score == 0.0


def test_a_task_of_another_version_is_said_to_be_one() -> None:
    task = tasks(generators="chain_sum")[0]
    changed = Task.make("old", split="test", seed=0, payload={**task.payload, "question": "1 + 1?"})
    with pytest.raises(TaskError, match="another version of reasoning-gym made it"):
        scored(changed, "2")


def test_the_hosts_generators_are_left_alone() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    for name in ("list_functions", "pool_matrix"):  # which draw from the global ones
        assert scored(tasks(generators=name)[9], "x").score == 0.0
    assert random.random() == expected


def test_a_generator_that_fails_or_is_late_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasoning_gym_env, "MAKE_SECONDS", 1e-4)
    with pytest.raises(EnvError, match=r"'rearc' at difficulty None: reasoning-gym did not answer within 0\.0001 s"):
        tasks("validation", generators="rearc")[251]
