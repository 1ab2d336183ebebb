"""A setting that is refused leaves no folder that refuses its correction, whichever command and however late it is."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.reward import boxed_number
from areal_agents.toolenv import ToolEnv
from areal_agents.types import Message, Task
from tests.chat_server import Answer, Json, chat_server
from tests.tiny_models import tiny_chat_model
from tests.unfinished import answers

LETTERS = "tests.letters_env:Letters"
BOTH: dict[str, tuple[list[str], str]] = {
    "a value": (["--eval.k", "-1"], "eval.k = -1 (--eval.k): expected a whole number"),
    "two values": (["--rollout.max_turn_tokens", "128"], "must be under model.max_context = 128"),
    "no environment": (["--env.id", "tests.letters_env:Lettres"], "has no class 'Lettres'"),
    "no such id": (["--env.id", "no/Such-v0"], "unknown environment 'no/Such-v0'"),
    "its argument": (["--env.kwargs.nothing", "1"], "unexpected keyword argument 'nothing'"),
    "no split": (["--eval.split", "tets"], "has no split 'tets' (did you mean 'test'?)"),
    "too few tasks": (["--eval.n", "99"], "has 8 tasks, but eval.n = 99: lower it"),
    "no gold": (["--env.id", "tests.cli.test_refused_settings:NoGold", "--eval.n", "8"], "'many' is no number"),
    "no sandbox": (["--env.id", "areal/Arithmetic-v0", "--env.sandbox", "nosuch"], "nosuch"),
    "no model": (["--model.path", "./nothing"], "does not exist"),
    "no tokenizer": (["--model.path", "{no tokenizer}"], "it lacks a tokenizer"),
    "a template's variable": (["--model.template_variables.x", "1"], "the chat template reads no such variable"),
    "too long": (["--model.max_context", "100000"], "this model has 512 positions: set it to 512 or less"),
    "too little memory": (["--engine.kv_tokens", "8"], "engine.kv_tokens = 8: set it to 8 or less"),
    "cores": (["--engine.threads", "4096"], "engine.threads = 4096 exceeds the"),
    "no vLLM": (["--engine.kind", "vllm"], "engine.kind = 'vllm' needs vLLM"),
}
EVAL = {"broken weights": (["--model.path", "{broken weights}"], "header too small")}
TRAIN: dict[str, tuple[list[str], str]] = {
    "no Ray": (["--cluster.backend", "ray"], "cluster.backend = 'ray' needs Ray, which is not installed"),
    "no GPU": (["--learner.device", "cuda"], "torch sees no GPU here"),
    "the learner's cores": (["--learner.threads", "4096"], "learner.threads = 4096 exceeds the"),
    "no judge": (["--rollout.group_reward", "no.such:thing"], "rollout.group_reward = 'no.such:thing'"),
    "no loss": (["--algorithm.loss", "no.such:thing"], "no.such:thing cannot be imported"),
    "no expert": (["--warm_start.demonstrations", "3"], "has no expert for 3 of these tasks"),
}


class NoGold(ToolEnv):
    rubric = boxed_number()

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [
            Task.make(f"{split}-{i}", split=split, seed=i, payload={"answer": "many", "of": split}) for i in range(8)
        ]

    def prompt(self, task: Task) -> str:
        return "How many?"


class PoorExpert(NoGold):
    """Its demonstrations earn nothing."""

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"answer": "7", "of": split}) for i in range(8)]

    @classmethod
    def expert(cls, task: Task) -> Generator[str, tuple[Message, ...], None]:
        yield r"\boxed{8}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tiny_chat_model(root / "whole")
    for name in ("no tokenizer", "broken weights"):
        shutil.copytree(root / "whole", root / name)
    (root / "no tokenizer" / "tokenizer.json").unlink()
    for path in (root / "broken weights").glob("*.safetensors"):
        path.write_bytes(b"xx")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("ray", "vllm") else usual(name))


def command(name: str, models: dict[str, Path], out: Path, more: Sequence[str] = ()) -> list[str]:
    """The command with its settings, those of ``more`` in the place of its own."""
    said: dict[str, str] = {
        "--env.id": LETTERS, "--model.path": str(models["whole"]), "--model.max_context": "128",
        "--engine.precision": "fp32", "--eval.n": "2", "--rollout.max_turn_tokens": "4", "--out": str(out),
    }  # fmt: skip
    if name == "train":
        said |= {
            "--steps": "1", "--rollout.groups": "1", "--rollout.group_size": "2", "--rollout.concurrency": "2",
            "--learner.precision": "fp32", "--track.tensorboard": "false", "--eval.baseline": "false",
        }  # fmt: skip
    said |= dict(zip(more[::2], more[1::2], strict=True))
    return [name, *(str(word).format_map(models) for pair in said.items() for word in pair)]


@pytest.mark.parametrize(
    ("name", "fault"), [*(("eval", f) for f in (*BOTH, *EVAL)), *(("train", f) for f in (*BOTH, *TRAIN))]
)  # fmt: skip
def test_a_refused_setting_leaves_nothing_in_the_way(
    name: str, fault: str, models: dict[str, Path], tmp_path: Path, without_extras: None,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(__file__).parents[2])
    wrong, message = (BOTH | EVAL | TRAIN)[fault]
    out = tmp_path / "deep" / "run"
    assert main(command(name, models, out, wrong)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()


@pytest.mark.slow
def test_the_corrected_command_runs_where_the_wrong_one_failed(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Demonstrations that earn nothing are found after the start: then there are settings, and events that say why."""
    poor = ["--env.id", "tests.cli.test_refused_settings:PoorExpert", "--warm_start.demonstrations", "2"]
    assert main(command("train", models, tmp_path / "run", poor)) == 1
    assert "or set warm_start.demonstrations = 0" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.toml", "events.jsonl", "lock"]
    assert main(command("train", models, tmp_path / "run")) == 0
    assert main(command("train", models, tmp_path / "run")) == 1
    assert "holds another run: go on with it by --resume" in capsys.readouterr().err


def test_a_server_that_is_not_there_refuses_or_is_another_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"  # bound, and nobody listens
        argv = ["eval", "tests.chat_envs:Sums", "--model", "openai:m", "--n", "2", "--out", str(tmp_path / "a" / "e")]
        assert main([*argv, "--url", gone]) == 1
        assert main([*argv, "--url", gone, "--api-key-env", "NO_SUCH_KEY"]) == 1
        assert "NO_SUCH_KEY is not set" in capsys.readouterr().err
    with chat_server(lambda body: Answer({"error": {"message": "no such model"}}, 404)) as server:
        assert main([*argv, "--url", server.url]) == 1
    assert not (tmp_path / "a").exists()
    with chat_server(answers) as server:
        assert main([*argv, "--url", server.url]) == 0
        capsys.readouterr()
        assert main([*argv, "--url", server.url]) == 1
        assert "already holds an evaluation or a run (report.json)" in capsys.readouterr().err
        again = ["eval", "--env.id", "tests.chat_envs:Sums", "--model", "openai:m", "--n", "2"]  # of a job script
        again += ["--resume", str(tmp_path / "b" / "e")]
        assert main([*again, "--url", gone]) == 1
        assert main([*again, "--url", server.url]) == 0


def test_what_was_in_the_folder_stays(tmp_path: Path, models: dict[str, Path]) -> None:
    for name in ("eval", "train"):
        out = tmp_path / name
        out.mkdir()
        (out / "notes").write_text("mine")
        for fault in ("no model", "too long"):
            assert main(command(name, models, out, BOTH[fault][0])) == 1
        assert [path.name for path in out.iterdir()] == ["notes"]


def test_a_training_takes_the_folder_of_an_evaluation_that_failed(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(body: Json) -> Any:
        return Answer({"error": {"message": "no quota"}}, 401)

    with chat_server(refuse) as server:
        argv = ["eval", "tests.chat_envs:Sums", "--model", "openai:m", "--n", "2", "--out", str(tmp_path / "e")]
        assert main([*argv, "--url", server.url]) == 1
    capsys.readouterr()
    assert main(command("train", models, tmp_path / "e", ["--model.path", "./nothing"])) == 1
    assert "does not exist" in capsys.readouterr().err


def test_other_commands_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "2bad", "--into", "deep/er"]) == 1
    assert main(["demo", "--out", "demo", "--eval.n", "99999"]) == 1
    assert main(["demo", "--out", "demo", "--model.path", "./nothing"]) == 1
    assert main(["rescore", "nowhere", "--reward", "a:b", "--out", "deep/x.parquet"]) == 1
    assert main(["plot", "nowhere", "--out", "deep/x.png"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_cannot_begin_keeps_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "demo"
    out.mkdir()
    for name in (".demo", "summary.json"):
        (out / name).write_text(json.dumps({}))
    assert main(["demo", "--out", "demo", "--model.path", "./nothing"]) == 1
    assert sorted(path.name for path in out.iterdir()) == [".demo", "summary.json"]
