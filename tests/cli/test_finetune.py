"""The commands ``sft`` and ``dpo``: what they take, what they refuse, and how they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from areal_agents.cli.finetune import Dpo, Sft
from areal_agents.cli.main import main
from areal_agents.finetune.config import DpoConfig, SftConfig
from areal_agents.finetune.folder import read_settings
from areal_agents.tracking.tracker import read_metrics
from tests.finetune.world import chat, jsonl, record, run_folder, turn
from tests.tiny_models import tiny_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("tiny") / "model")


def test_rejection_fine_tuning_of_a_run(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", [record(f"g0/{i}", turn(c, i / 4)) for i, c in enumerate("abcde")])
    out = tmp_path / "out"
    words = ["sft", str(run), "--model", str(model), "--out", str(out), "--min-reward", "0.4", "--per-task", "2"]
    assert main([*words, "--max-context", "256", "--epochs", "2", "--precision", "fp32"]) == 0
    said = capsys.readouterr().out
    assert f"{run}: 2 examples of 5 episodes" in said
    assert "left out 2, the first" in said
    assert "rewards of what is imitated: 0.75 to 1, mean 0.875" in said
    assert f"files: {out}    trained model: {out / 'model'}" in said
    found = read_settings(out)
    assert isinstance(found, SftConfig)
    assert (found.min_reward, found.per_task, found.lr, found.epochs) == (0.4, 2, 2e-5, 2)
    assert len(read_metrics(out, kind="sft")) == 2
    assert (out / "tensorboard").is_dir()


def test_preferences_of_a_run_and_of_a_file(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run", [record(f"g0/{i}", turn(c, i / 4)) for i, c in enumerate("abcde")])
    ask = {"role": "user", "content": "x"}
    both = [[ask, {"role": "assistant", "content": c}] for c in "yz"]
    file = jsonl(tmp_path / "p.jsonl", {"chosen": both[0], "rejected": both[1]})
    out = tmp_path / "out"
    words = ["dpo", str(run), str(file), "--model", str(model), "--out", str(out), "--max-context", "256"]
    assert main([*words, "--pairs", "2", "--beta", "0.2", "--precision", "fp32", "--steps", ":1"]) == 0
    assert f"{run}: 2 pairs of 1 groups" in capsys.readouterr().out
    found = read_settings(out)
    assert isinstance(found, DpoConfig)
    assert (found.beta, found.lr, found.first_step, found.last_step) == (0.2, 1e-6, 0, 1)
    assert main(["dpo", "--out", str(out), "--resume"]) == 0
    assert main(["sft", "--out", str(out), "--resume"]) == 2
    assert "holds a dpo training: go on with it by `areal-agents dpo`" in capsys.readouterr().err


def test_the_defaults_of_the_help_are_those_of_the_settings() -> None:
    seen = 0
    for command, config in ((Sft, SftConfig), (Dpo, DpoConfig)):
        for name, hint in get_type_hints(command, include_extras=True).items():
            told = getattr(next(iter(getattr(hint, "__metadata__", ())), None), "help_behavior_hint", None)
            if told in (None, "(required)") or name in ("kind", "steps"):
                continue
            said = str(told).removeprefix("(default: ").removesuffix(")")
            said = {
                "none": "None" if name != "wandb" else "",
                "2e-5; of dpo 1e-6": ("2e-05", "1e-06")[command is Dpo],
            }.get(said, said)
            default = config.model_fields[name].default
            assert said == (f"{default:g}" if isinstance(default, float) else str(default)), name
            seen += 1
    assert seen > 40


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--lr", "0"], "--lr is 0.0: it must be greater than 0"),
        (["--epochs", "0"], "--epochs is 0: it must be greater than or equal to 1"),
        (["--holdout", "1"], "--holdout is 1.0: it must be less than 1"),
        (["--batch", "-1", "--seed", "-2"], "--seed is -2: it must be greater than or equal to 0"),
        (["--steps", "5:2"], "--steps is '5:2': the last step is before the first"),
        (["--min-reward", "nan"], "--min-reward is nan: it must be a finite number"),
        (["--lora-alpha", "8"], "--lora-alpha and --lora-targets are of adapters: set --lora-rank"),
        (["--template-variables", "x"], "--template-variables 'x': write NAME=VALUE"),
    ],
)
def test_values_out_of_range(more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sft", "d.jsonl", "--model", "smollm2", "--out", str(tmp_path / "out")]
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["sft", "d.jsonl", "--model", "m"], "--out is missing", 2),
        (["sft", "--model", "m", "--out", "o"], "name the data: folders of runs, or JSONL files", 2),
        (["dpo", "d.jsonl", "--out", "o"], "--model is missing: name the model to start from", 2),
        (["sft", "--out", "o", "--resume"], "o holds no fine-tuning to go on with", 1),
        (["sft", "d.jsonl", "--model", "no/such/place", "--out", "o"], "model folder no/such/place does not exist", 1),
    ],
)
def test_what_is_missing(
    words: list[str], said: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_settings_that_changed_are_refused_when_it_goes_on(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = jsonl(tmp_path / "d.jsonl", chat("a", "b")), tmp_path / "out"
    words = ["sft", str(data), "--model", str(model), "--out", str(out), "--max-context", "256", "--lr", "1e-3"]
    assert main(words) == 0
    assert main(words) == 1
    assert "go on with it by --resume" in capsys.readouterr().err
    assert main(["sft", "--out", str(out), "--resume", "--lr", "2e-5"]) == 1  # the default, but not what it was
    assert "--lr was 0.001 and is 2e-05 now" in capsys.readouterr().err
    assert main([*words, "--resume", "--threads", "1"]) == 0
    moved = out.rename(tmp_path / "moved")
    assert main(["sft", "--out", str(moved), "--resume"]) == 0
    assert json.loads((moved / "commit.json").read_text())["complete"] is True
