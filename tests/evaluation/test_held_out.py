"""Which held-out tasks are played: the sample by hand, its shares, what reports and folders say of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest

from areal_agents import registry
from areal_agents.cli.main import main
from areal_agents.env import LazyTasks
from areal_agents.errors import ConfigError
from areal_agents.evaluation.compare import compare
from areal_agents.evaluation.evaluate import evaluate
from areal_agents.evaluation.held_out import Sample, as_begun, chosen_indices, held_out, settings_of
from areal_agents.settings.config import EvalConfig, TrainConfig
from areal_agents.settings.writing import dump
from areal_agents.types import Task
from tests.chat_server import chat_server
from tests.letters_env import Letters
from tests.unfinished import answers


class Mixture(Letters):
    """32 tasks of one kind, then 32 of another."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [_task(f"{kind}-{i}", split, i) for kind in ("a", "b") for i in range(32)]


class Broken(Letters):
    """Task 5 of 8 cannot be made."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        def make(i: int) -> Task:
            if i == 5:
                raise ValueError("no row")
            return _task(f"t{i}", split, i)

        return LazyTasks(8, make)


def _task(id: str, split: str, seed: int) -> Task:
    return Task.make(id, split=split, seed=seed, payload={"word": id})


def chosen(e: EvalConfig) -> list[str]:
    tasks, _ = held_out(registry.spec("tests.evaluation.test_held_out:Mixture"), e, difficulty=None, tell=print)
    return [task.id for task in tasks]


def test_the_sample_is_the_smallest_draws_in_the_splits_order() -> None:
    rng = Random(0)
    assert [round(rng.random(), 3) for _ in range(8)] == [0.844, 0.758, 0.421, 0.259, 0.511, 0.405, 0.784, 0.303]
    assert chosen_indices(8, 3, seed=0) == [3, 5, 7]
    assert chosen_indices(8, 4, seed=0) == [2, 3, 5, 7]  # holds the smaller one
    assert chosen_indices(8, 8, seed=0) == list(range(8))
    assert chosen_indices(8, 3, seed=None) == [0, 1, 2]
    assert chosen_indices(8, 3, seed=1) != [3, 5, 7]


def test_every_task_is_as_likely_as_every_other() -> None:
    drawn = [chosen_indices(10, 3, seed=seed) for seed in range(4000)]
    shares = [sum(i in indices for indices in drawn) / 4000 for i in range(10)]
    assert all(abs(share - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5 for share in shares)


def test_a_mixture_gets_its_shares() -> None:
    assert chosen(EvalConfig(n=32, task_seed=None)) == [f"a-{i}" for i in range(32)]
    sampled = chosen(EvalConfig(n=32))
    assert 10 <= sum(id.startswith("a") for id in sampled) <= 22  # 16 ± 2.1 standard deviations of 2.8
    assert sampled == chosen(EvalConfig(n=32, temperature=1.0))
    assert set(chosen(EvalConfig(n=16))) < set(sampled)
    counts = [sum(id.startswith("a") for id in chosen(EvalConfig(n=32, task_seed=s))) for s in range(200)]
    assert sum(counts) / 200 == pytest.approx(16, abs=1)


def test_a_task_that_cannot_be_made_is_named_by_its_place_in_the_split() -> None:
    told: dict[str, str] = {}
    spec = registry.spec("tests.evaluation.test_held_out:Broken")
    tasks, sample = held_out(spec, EvalConfig(n=3), difficulty=None, tell=told.__setitem__)
    assert [task.id for task in tasks] == ["t3", "t7"]
    assert list(told) == ["task 5 of the split"]
    assert sample == Sample(3, 8, 0)


@pytest.mark.parametrize(
    ("sample", "text"),
    [
        (Sample(3, 8, 0), "3 of 8 tasks, sampled with eval.task_seed = 0"),
        (Sample(3, 8, None), "the first 3 tasks of the split, of 8"),
        (Sample(3, None, None), "the first 3 tasks of the split"),
        (Sample(8, 8, 4), "all 8 tasks of the split"),
    ],
)
def test_a_sample_says_what_it_is(sample: Sample, text: str) -> None:
    assert str(sample) == text


def test_a_report_without_a_sample_is_of_the_first_tasks() -> None:
    assert Sample.of_report({"n": 5, "left_out": {"x": "bad"}}) == Sample(6, None, None)
    assert Sample.of_report({"n": 5, "sample": {"n": 6, "of": 9, "seed": 2}}) == Sample(6, 9, 2)


def test_settings_from_before_the_choice_keep_the_first_tasks(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path, eval=EvalConfig(n=3))
    written = dump(config)
    (tmp_path / "config.toml").write_text(written.replace("task_seed = 0\n", ""))
    assert "task_seed" not in (tmp_path / "config.toml").read_text()
    assert settings_of(tmp_path).eval.task_seed is None
    assert as_begun(config, tmp_path).eval.task_seed is None
    other = TrainConfig(out=tmp_path, eval=EvalConfig(n=3, task_seed=7))
    assert as_begun(other, tmp_path) == other  # its own choice stays, and is refused as any other change is
    (tmp_path / "config.toml").write_text(written)
    assert settings_of(tmp_path).eval.task_seed == as_begun(config, tmp_path).eval.task_seed == 0
    assert as_begun(config, tmp_path / "none") == config


def test_the_command_plays_and_says_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tasks whatever the model, the seed and the number of attempts; other ones with another task_seed."""

    def played(name: str, *more: str) -> tuple[object, str]:
        with chat_server(answers) as server:
            argv = ["eval", "tests.chat_envs:Sums", "--model", f"openai:{name}", "--url", server.url, "--n", "3"]
            assert main([*argv, "--out", str(tmp_path / name), *more]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert report["n"] == 3
        return report["sample"], capsys.readouterr().out

    sample, said = played("one")
    assert sample == {"n": 3, "of": 8, "seed": 0}
    assert "\ntasks: 3 of 8 tasks, sampled with eval.task_seed = 0\n" in said
    played("two", "--seed", "5", "--k", "2", "--temperature", "1")
    assert compare(tmp_path / "one", tmp_path / "two").left_out == (0, 0)
    _, said = played("first", "--eval.task_seed", "none")
    assert "\ntasks: the first 3 tasks of the split, of 8\n" in said
    with pytest.raises(ConfigError) as refused:
        compare(tmp_path / "one", tmp_path / "first")
    assert f"{tmp_path / 'first'} has the first 3 tasks of the split, of 8" in str(refused.value)
    assert f"{tmp_path / 'one'} has 3 of 8 tasks, sampled with eval.task_seed = 0" in str(refused.value)


def test_an_evaluation_from_before_the_choice_goes_on_with_its_tasks(tmp_path: Path) -> None:
    with chat_server(answers) as server:
        argv = ["eval", "tests.chat_envs:Sums", "--model", "openai:m", "--url", server.url, "--n", "3"]
        argv += ["--out", str(tmp_path / "old"), "--eval.task_seed", "none"]
        assert main(argv) == 0
        settings = tmp_path / "old" / "config.toml"
        settings.write_text(settings.read_text().replace('task_seed = "none"\n', ""))
        assert main(["eval", "--resume", str(tmp_path / "old")]) == 0
    report = json.loads((tmp_path / "old" / "report.json").read_text())
    assert report["sample"] == {"n": 3, "of": 8, "seed": None}


def test_python_takes_the_seed_of_the_tasks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 64 tasks, but eval\.n = 65"):
        asyncio.run(
            evaluate("tests.evaluation.test_held_out:Mixture", model="none", n=65, task_seed=None, out=tmp_path / "x")
        )
    assert not (tmp_path / "x").exists()
