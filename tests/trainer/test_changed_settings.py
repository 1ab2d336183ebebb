"""Settings that were wrong are found before anything is begun, and on resume what nothing has used may be put right."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_agents import settings
from areal_agents.cli.main import main
from areal_agents.env import Expert
from areal_agents.errors import ArealError, ConfigError
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.describe import settings as known_settings
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.loop import train
from areal_agents.trainer.preflight import require_runnable
from areal_agents.trainer.resume import begin, rate_change
from areal_agents.trainer.run import demonstrated
from areal_agents.trainer.run_folder import Commit, RunFolder
from areal_agents.types import Task
from tests.letters_env import Letters
from tests.trainer.test_resume import config
from tests.trainer.test_run_folder import REPORT


class ExpertLetters(Letters):
    def __init__(self, sandbox: str, words: int = 2) -> None:
        super().__init__()
        self.words = words

    @classmethod
    def expert(cls, task: Task) -> Expert | None:
        return None if task.seed == 3 else (text for text in ("abc", "abc"))  # type: ignore[return-value]


def changed(c: TrainConfig, dotted: str, value: Any) -> TrainConfig:
    tree = c.model_dump(mode="python")
    *sections, name = dotted.split(".")
    node = tree
    for section in sections:
        node = node[section]
    node[name] = value
    return TrainConfig.model_validate(tree)


# --- before anything is begun ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dotted", "value", "said"),
    [
        ("eval.split", "tets", r"no split 'tets' \(did you mean 'test'\?\)"),
        ("eval.n", 5, r"has 4 tasks, but eval\.n = 5"),
        ("env.split", "trian", "no split 'trian'"),
        ("env.kwargs", {"wrods": 3}, "does not take env.kwargs as they are: .*wrods"),
        ("env.difficulty", 2.0, "difficulty 2.0"),
        ("warm_start.demonstrations", 4, "has no expert"),
        ("learner.device", "cuda", "learner.device = 'cuda', but torch sees no GPU"),
    ],
)
@pytest.mark.parametrize("baseline", [True, False])
def test_a_setting_that_is_read_late_is_checked_first(
    tmp_path: Path, dotted: str, value: Any, said: str, baseline: bool
) -> None:
    c = changed(config(tmp_path, 2, eval={"baseline": baseline}), dotted, value)
    if dotted == "learner.device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ArealError, match=said):
        asyncio.run(train(c, console=False))
    assert not c.out.exists()


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    c = changed(config(tmp_path, 2), "out", tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match=r"out = .*file/run: this folder cannot be written \(Not a directory\)"):
        asyncio.run(train(c, console=False))


def test_the_expert_of_every_drawn_task_is_asked(tmp_path: Path) -> None:
    c = config(tmp_path, 2, env={"id": "tests.trainer.test_changed_settings:ExpertLetters", "kwargs": {"words": 3}})
    with pytest.raises(ConfigError, match=r"no expert for 1 of these tasks \(first: train-3\): write its expert"):
        require_runnable(changed(c, "warm_start.demonstrations", 8))  # an epoch: each task once
    shown = [t.id for t in demonstrated(ExpertLetters.tasks("train"), changed(c, "warm_start.demonstrations", 8))]
    assert sorted(shown) == [f"train-{i}" for i in range(8)]
    before = shown.index("train-3")
    assert before > 0, "the test needs a task before it"
    require_runnable(changed(c, "warm_start.demonstrations", before))


# --- which settings may change --------------------------------------------------------------------------------------


def test_a_refused_resume_is_not_told_to_go_on_in_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c = config(tmp_path, 2)
    c.out.mkdir()
    (c.out / "config.toml").write_text(settings.dump(c))
    RunFolder(c.out).commit(Commit(step=5))
    assert main(["train", str(c.out / "config.toml"), "--resume"]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"error: {c.out} has 5 steps behind it, but steps = 2: raise steps\n")
    assert "go on with" not in said


def resumed(c: TrainConfig, commit: Commit | None, dotted: str, value: Any) -> bool:
    """Whether a run of ``c`` with ``commit`` goes on with another value of ``dotted``."""
    c.out.mkdir(parents=True, exist_ok=True)
    (c.out / "config.toml").write_text(settings.dump(c))
    (c.out / "commit.json").unlink(missing_ok=True)
    with RunFolder(c.out) as folder:
        if commit is not None:
            folder.commit(commit)
        try:
            begin(folder, changed(c, dotted, value), resume=True)
            return True
        except ConfigError as error:
            said = str(error)
    assert f"  {dotted}" in said
    assert " used it" in said
    return False


NOTHING, EVALUATED = None, Commit(reports={"before": REPORT})
WARM = Commit(checkpoint="step-000000", warm_started=True)
STOPPED = Commit(checkpoint="step-000000")  # by a signal in its first step: with episodes, and without a warm start
STEPS = Commit(step=2, checkpoint="step-000002")
FINISHED = Commit(step=4, checkpoint="step-000004", reports={"after_rl": REPORT}, complete=True)


@pytest.mark.parametrize(
    ("dotted", "value", "may"),
    [
        # nothing, an evaluation, a warm start, the first step's episodes, steps
        ("eval.split", "train", (True, False, True, True, True)),
        ("eval.n", 3, (True, False, True, True, True)),
        ("eval.k", 2, (True, False, True, True, True)),
        ("eval.temperature", 0.5, (True, False, True, True, True)),
        ("warm_start.lr", 1e-3, (True, True, False, False, False)),
        ("env.split", "test", (True, True, False, False, False)),
        ("learner.betas", (0.8, 0.9), (True, True, False, False, False)),
        ("learner.minibatches", 2, (True, True, True, False, False)),
        ("algorithm.advantage", "grpo", (True, True, True, False, False)),
        ("algorithm.aggregation", "episode", (True, True, True, False, False)),
        ("rollout.groups", 3, (True, True, True, False, False)),
        ("rollout.max_turn_tokens", 5, (True, False, False, False, False)),
        ("env.kwargs", {"a": 1}, (True, False, False, False, False)),
        ("model.max_context", 96, (True, False, False, False, False)),
        ("seed", 3, (True, False, False, False, False)),
        ("learner.lr", 1e-4, (True, True, True, True, True)),
        ("engine.max_batch", 4, (True, True, True, True, True)),
    ],
)
def test_a_setting_may_change_until_something_committed_has_used_it(
    tmp_path: Path, dotted: str, value: Any, may: tuple[bool, ...]
) -> None:
    c = config(tmp_path, 4)
    found = tuple(resumed(c, commit, dotted, value) for commit in (NOTHING, EVALUATED, WARM, STOPPED, STEPS))
    assert found == may


def test_a_finished_run_that_gets_more_steps_measures_its_end_anew(tmp_path: Path) -> None:
    c = config(tmp_path, 4)
    assert not resumed(c, FINISHED, "eval.n", 3)
    longer = c.model_copy(update={"steps": 6, "eval": c.eval.model_copy(update={"n": 3})})
    (c.out / "commit.json").unlink()
    with RunFolder(c.out) as folder:
        folder.commit(FINISHED)
        (c.out / "model").mkdir()
        (c.out / "model" / "config.json").write_text("of step 4")
        _, changes = begin(folder, longer, resume=True)
    assert not (c.out / "model").exists()  # it is not the longer run's
    assert (c.out / "model-step-4" / "config.json").read_text() == "of step 4"
    assert list(json.loads((c.out / "reports.json").read_text())) == ["step_4"]
    assert changes == {"steps": (4, 6), "eval.n": (4, 3)}


def test_what_a_refusal_says(tmp_path: Path) -> None:
    c = config(tmp_path, 4)
    resumed(c, Commit(step=2, checkpoint="step-000002", reports={"before": REPORT}), "learner.lr", 1.0)
    with RunFolder(c.out) as folder, pytest.raises(ConfigError) as caught:
        begin(folder, changed(changed(c, "seed", 5), "eval.n", 3), resume=True)
    lines = str(caught.value).splitlines()
    assert "  eval.n was 4 and is 3 now; the evaluation 'before' used it" in lines
    assert "  seed was 0 and is 5 now; the evaluation 'before' and the checkpoint of step 2 used it" in lines


def test_every_setting_is_read_by_the_rule() -> None:
    assert len(known_settings()) > 60  # a setting that nobody thought of is used by all that is committed
    from areal_agents.trainer.resume import MAY_CHANGE, USED_BY

    for name in (*MAY_CHANGE, *USED_BY):
        assert any(key.startswith(name) for key in known_settings()), name


@pytest.mark.slow
def test_an_evaluation_that_could_not_be_made_is_put_right_after_all_steps(tmp_path: Path) -> None:
    """A run of an older version ended so: all steps done, then no split 'tets'."""
    c = config(tmp_path, 2, eval={"baseline": False})
    broken = changed(c, "eval.split", "tets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("areal_agents.trainer.loop.require_runnable", lambda config: None)
        with pytest.raises(ArealError, match="no split 'tets'"):
            asyncio.run(train(broken, console=False))
    result = asyncio.run(train(c, resume=True, console=False))
    assert result.reports["after_rl"].split == "test"
    assert len(read_metrics(c.out, kind="train")) == 2


# --- the learning rate ----------------------------------------------------------------------------------------------


def linear(tmp_path: Path, steps: int, **learner: Any) -> TrainConfig:
    return config(tmp_path, steps, learner={"lr": 5e-6, "schedule": "linear", **learner})


def test_more_steps_of_a_linear_schedule_raise_the_rate_again(tmp_path: Path) -> None:
    # 5e-6 · (1 − 3/4) = 1.25e-6 was the last of four steps; 5e-6 · (1 − 4/8) = 2.5e-6 is the fifth of eight.
    found = rate_change(linear(tmp_path, 8), {"steps": (4, 8)}, 4)
    assert found is not None
    assert found.step == 5
    assert (found.old, found.new) == pytest.approx((1.25e-6, 2.5e-6))
    assert found.text == (
        "steps = 8 (was 4): the learning rate changes; step 5 has 2.5e-06 where it had 1.25e-06, and the last step, 8, "
        "has 6.25e-07 (learner.schedule = 'linear')"
    )


@pytest.mark.parametrize(
    ("learner", "changes", "step", "rates"),
    [
        ({"schedule": "constant"}, {"steps": (4, 8)}, 4, None),
        ({"schedule": "constant"}, {"learner.lr": (1e-5, 5e-6)}, 4, (1e-5, 5e-6)),
        ({"schedule": "constant", "warmup_steps": 4}, {"learner.warmup_steps": (2, 4)}, 2, (5e-6, 3.75e-6)),
        ({"schedule": "linear"}, {"learner.schedule": ("constant", "linear")}, 4, (5e-6, 2.5e-6)),
        ({"schedule": "cosine"}, {"steps": (16, 8)}, 4, (5e-6 * 0.5 * (1 + 2**-0.5), 2.5e-6)),
        ({"schedule": "linear"}, {"engine.max_batch": (1, 2)}, 4, None),
        ({"schedule": "linear"}, {"steps": (4, 8)}, 8, None),  # nothing is left
    ],
)
def test_a_change_of_the_rate_is_found(
    tmp_path: Path, learner: dict[str, Any], changes: dict[str, Any], step: int, rates: tuple[float, float] | None
) -> None:
    found = rate_change(linear(tmp_path, 8, **learner), changes, step)
    assert (found and (found.old, found.new)) == (rates and pytest.approx(rates))


@pytest.mark.slow
def test_a_resumed_run_tells_the_change_of_the_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = linear(tmp_path, 2).model_copy(update={"env": config(tmp_path, 4).env})
    asyncio.run(train(c, console=False))
    asyncio.run(train(c.model_copy(update={"steps": 4}), resume=True))
    assert (
        "steps = 4 (was 2): the learning rate changes; step 4 has 1.25e-06 where it had 2.5e-06"
        in capsys.readouterr().out
    )
    events = [json.loads(line) for line in (c.out / "events.jsonl").read_text().splitlines()]
    told = [e for e in events if e["kind"] == "learning_rate_changed"]
    assert [(e["step"], e["old"], e["new"]) for e in told] == [(4, 2.5e-6, 1.25e-6)]
