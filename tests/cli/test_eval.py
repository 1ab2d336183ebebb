"""The command ``eval``: what its settings and its options become, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.eval import split_of
from areal_agents.cli.main import main
from areal_agents.evaluation.players import Server
from areal_agents.settings.config import EngineConfig, EnvConfig, ModelConfig, RolloutConfig
from areal_agents.settings.describe import settings
from areal_agents.settings.evaluation import SHORT, training_only
from tests.cli.recorder import Recorder

ENV = "areal/Arithmetic-v0"


def called(recorder: Recorder, *argv: str) -> tuple[EnvConfig, dict[str, Any]]:
    """What ``evaluate`` was called with."""
    assert main(["eval", *argv]) == 0
    env, options = recorder.calls.pop()
    return env, options


def test_short_names_and_settings_are_the_same(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "deep" / "report.json"
    short = ["--model", "m", "--n", "4", "--k=2", "--temperature", "0.5", "--max-turn-tokens", "9", "--max-turns", "5"]
    short += ["--max-context", "99", "--difficulty", "0.5", "--sandbox", "s"]
    out = ["--seed", "3", "--out", str(tmp_path)]
    env, options = called(recorder, f"{ENV}:held_out", *short, *out, "--json", str(report))
    assert env == EnvConfig(id=ENV, difficulty=0.5, sandbox="s")
    assert options == {
        "model": ModelConfig(path="m", max_context=99), "split": "held_out", "n": 4, "k": 2, "temperature": 0.5,
        "task_seed": 0,
        "seed": 3, "out": tmp_path, "engine": EngineConfig(), "rollout": RolloutConfig(max_turn_tokens=9, max_turns=5),
    }  # fmt: skip
    assert json.loads(report.read_text()) == {"pass_at_1": 0.5, "pass_at_k": None}
    assert capsys.readouterr().out == f"progress\nTABLE\nfiles: {tmp_path}\n"
    words = [w.partition("=") for w in " ".join(short).replace("--k=2", "--k 2").split()]
    long = [f"--{SHORT[w[2:].replace('-', '_')]}" if w.startswith("--") else w for w, _, _ in words]
    assert called(recorder, "--env.id", ENV, "--eval.split=held_out", *long, *out) == (env, options)
    assert called(recorder, f"{ENV}:held_out", *long, *short, *out) == (env, options)  # twice the same is no conflict


def test_every_section_that_means_something(recorder: Recorder) -> None:
    argv = ["--engine.kind", "vllm", "--engine.max_batch", "64", "--env.step_timeout", "30", "--env.kwargs.x", "-1"]
    argv += ["--rollout.failure-window", "8", "--engine.request_timeout=9"]
    env, options = called(recorder, ENV, "--model", "m", *argv)
    assert env == EnvConfig(id=ENV, step_timeout=30, kwargs={"x": -1})
    assert options["engine"] == EngineConfig(kind="vllm", max_batch=64, request_timeout=9)
    assert options["rollout"] == RolloutConfig(failure_window=8)
    assert (options["split"], options["n"]) == ("test", 128)
    assert re.fullmatch(r"runs/eval-\d{8}-\d{6}", str(options["out"]))


def test_a_file_of_a_training(recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        f"out = 'runs/x'\nsteps = 3\n[env]\nid = '{ENV}'\nsplit = 'train'\ndifficulty = 0.25\n[eval]\nn = 7\n"
        "[learner]\nlr = 1e-5\n[rollout]\ngroups = 2\nmax_turns = 3\n"
    )
    env, options = called(recorder, "--config", str(path), "--model", "m", "--n", "5")
    assert (env.id, env.difficulty, options["split"], options["n"]) == (ENV, 0.25, "test", 5)
    assert options["rollout"].max_turns == 3
    assert str(options["out"]).startswith("runs/eval-")
    said = f"of {path}, an evaluation does not use env.split, learner.lr, rollout.groups, steps, out\n"
    assert capsys.readouterr().err == said
    path.write_text("[lerner]\nlr = 1\n")
    assert main(["eval", ENV, "--config", str(path), "--model", "m"]) == 1
    assert capsys.readouterr().err.startswith(f"error: unknown setting lerner.lr ({path}): did you mean learner.lr")


def test_a_served_model(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [ENV, "--model", "openai:m", "--url", "http://h/v1", "--concurrency", "3"]
    _, options = called(recorder, *argv, "--engine.request_timeout", "5")
    assert options["server"] == Server("http://h/v1", None, 3, None)
    assert options["engine"] == EngineConfig(request_timeout=5)
    assert "served: a at b\n" in capsys.readouterr().out
    assert main(["eval", *argv, "--engine.max_batch", "4"]) == 1
    assert capsys.readouterr().err == (
        "error: --engine.max_batch means nothing for an evaluation: the model is served at its URL, no engine is "
        "started\n"
    )
    assert main(["eval", *argv, "--concurrency", "0"]) == 2
    assert capsys.readouterr().err == "error: --concurrency is 0: it must be at least 1\n"
    for wrong in ("0", "-1", "nan", "inf"):  # 0 is no "none given"
        assert main(["eval", *argv, "--requests-per-minute", wrong]) == 2
        assert capsys.readouterr().err == f"error: --requests-per-minute is {wrong}: it must be more than 0\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n", "0"], "eval.n = 0 (--n): expected a whole number, at least 1"),
        (["--temperature", "-1"], "eval.temperature = -1 (--temperature): expected a number, at least 0"),
        (["--n", "4", "--eval.n", "8"], "--n 4 and --eval.n 8 are one setting, eval.n: give one of them"),
        (["--lerner.lr", "3"], "unknown setting lerner.lr (--lerner.lr): sections: model, env, engine, rollout, eval;"),
        (["--engine.max-batc", "3"], "unknown setting engine.max-batc (--engine.max-batc): did you mean engine.max_b"),
        (["--rollout", "3"], "--rollout is a section, not a setting"),
        (["--learner.lr", "3"], "--learner.lr means nothing for an evaluation: it trains nothing"),
        (["--steps=3"], "--steps means nothing for an evaluation: it takes no learner steps (--n is its number of tas"),
        (["--env.split", "train"], "--env.split means nothing for an evaluation: its split is eval.split, or ENV_ID:S"),
        (["--engine.update-mode", "drain"], "--engine.update-mode means nothing for an evaluation: its weights stay"),
        (["--cluster.backend", "ray"], "--cluster.backend means nothing for an evaluation: it runs on this machine"),
        (
            ["--rollout.groups", "3", "--track.wandb", "x"],
            "2 problems in the settings:\n  - --rollout.groups means nothing for an evaluation: it makes no batches\n"
            "  - --track.wandb means nothing",
        ),
    ],
)
def test_settings_that_are_refused(
    argv: list[str], message: str, recorder: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", ENV, "--model", "m", *argv]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not recorder.calls


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([ENV, "--env.id", "a/B-v0"], f"ENV_ID is {ENV} and --env.id a/B-v0: give one of them"),
        ([f"{ENV}:test", "--eval.split", "x"], "ENV_ID names the split test and --eval.split x: give one of them"),
        ([ENV, "--compare", "a", "b"], "--compare reads two finished evaluations and plays nothing: leave out ENV_ID"),
        (["--compare", "a", "b", "--n", "3"], "--compare reads two finished evaluations and plays nothing: leave out "),
        (["--compare", "a", "b", "--config", "demo"], "--compare reads two finished evaluations and plays nothing: le"),
        ([ENV, "--url", "http://h/v1"], "--model openai:MODEL and --url URL belong together"),
    ],
)
def test_usage_that_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "m", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_help_lists_the_settings_it_takes_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--compare A B" in out
    listed = re.findall(r"^  --([\w.]+)", out.partition("settings (")[2], re.MULTILINE)
    assert listed == [key for key in settings() if training_only(key) is None]
    assert {"engine.max_batch", "env.step_timeout", "rollout.failure_window", "seed"} <= set(listed)
    assert not {"steps", "rollout.groups", "engine.kv"} & set(listed)
    assert not [key for key in listed if key.startswith(("algorithm.", "learner.", "checkpoint.", "cluster."))]
    assert "  --eval.n, --n  (a whole number, at least 1; default: 128)\n      Tasks." in out
    assert "--out  (a path; default: runs/eval-TIME)" in out


@pytest.mark.parametrize(
    ("env", "parts"),
    [
        ("areal/Arithmetic-v0", ("areal/Arithmetic-v0", "")),
        ("areal/Arithmetic-v0:train", ("areal/Arithmetic-v0", "train")),
        ("pkg.mod:Class", ("pkg.mod:Class", "")),
        ("pkg.mod:Class:train", ("pkg.mod:Class", "train")),
        ("nonsense", ("nonsense", "")),
    ],
)
def test_split_of(env: str, parts: tuple[str, str]) -> None:
    assert split_of(env) == parts
