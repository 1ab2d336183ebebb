from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from areal_agents import registry, settings
from areal_agents.cli.main import main
from areal_agents.errors import EngineError, RegistryError
from areal_agents.settings.config import TrainConfig
from tests.cli.recorder import Recorder


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600).stdout


@pytest.mark.parametrize(
    "argv", [["--help"], ["envs"], ["train", "--help"], ["train", "--lerner.lr", "1"], ["model", "list"]]
)
def test_light_commands_import_nothing_heavy(argv: list[str]) -> None:
    code = f"""
import sys
from areal_agents.cli.main import main
try:
    main({argv!r})
except SystemExit:
    pass
print("heavy:", sorted({{"torch", "transformers", "tensorboard", "matplotlib", "accelerate"}} & set(sys.modules)))
"""
    assert run_python(code).splitlines()[-1] == "heavy: []"


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "areal_agents", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert done.stdout.startswith("areal-agents 0.")


def test_train_passes_file_and_overrides(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.toml"
    path.write_text("steps = 3\n")
    argv = ["train", "--learner.lr", "2e-6", str(path), "--rollout.mode=sync", "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    (config,) = recorder.calls
    assert (config.steps, config.learner.lr, config.rollout.mode, config.out) == (3, 2e-6, "sync", tmp_path / "run")
    assert (
        capsys.readouterr().out == f"TABLE\nfiles: {tmp_path / 'run'}    trained model: {tmp_path / 'run' / 'model'}\n"
    )
    assert main(["train", "--seed", "4"]) == 0
    assert recorder.calls[1] == TrainConfig(seed=4)


def test_show_prints_what_a_preset_stands_for_and_trains_nothing(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--algorithm", "gspo", "--learner.lr", "3e-6", "--show"]) == 0
    shown = capsys.readouterr().out
    asked = settings.load(None, ["--algorithm", "gspo", "--learner.lr", "3e-6"])
    (tmp_path / "shown.toml").write_text(shown)
    assert settings.load(tmp_path / "shown.toml") == asked
    assert 'kind = "gspo"' in shown
    assert not recorder.calls
    assert main(["train", "--show", "--resume"]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["train", "--show", "--algorithm", "gspo2"]) == 1


def test_train_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "CONFIG" in out
    assert "--rollout.max_staleness  (a whole number, at least 0; default: 1)" in out


def test_eval_json_alone_on_standard_output(
    recorder: Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "areal/Arithmetic-v0", "--model", "m", "--out", str(tmp_path), "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"pass_at_1": 0.5, "pass_at_k": None}
    assert captured.err == f"progress\nTABLE\nfiles: {tmp_path}\n"
    assert recorder.calls[0][1]["split"] == "test"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "a/B-v0"], "error: --model is missing"),
        (["check"], "error: name an environment"),
        (
            ["check", "a/B-v0", "a/C-v0", "--env.kwargs.n", "3"],
            "error: --env.kwargs.n is an argument of one environment",
        ),
        (["check", "--all", "--env.kwargs.n=3"], "error: --env.kwargs.n=3 is an argument of one environment"),
        (["check", "--model", "m", "--env.kwargs.n", "3"], "error: --model checks a model: leave out --env.kwargs.n"),
    ],
)
def test_usage_errors_are_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    "argv",
    [
        ["evl"],
        ["eval", "a/B-v0", "c"],
        ["train", "a", "b"],
        ["model"],
        ["eval", "x", "--modl", "m"],
    ],
)
def test_parser_errors_are_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "nowhere.toml"], "error: no such configuration: nowhere.toml."),
        (["train", "--lerner.lr", "3"], "error: unknown setting lerner.lr (--lerner.lr): did you mean learner.lr"),
        (["model", "pull", "smolm2"], "error: no embedded model 'smolm2': did you mean 'smollm2'?\n"),
        (["check", "areal/Arithmetik-v0"], "error: unknown environment 'areal/Arithmetik-v0' (did you mean 'areal/Ari"),
        (
            ["check", "areal/Questions-v0", "--env.kwargs.paht", "q"],
            "error: areal/Questions-v0: Questions does not take",
        ),
        (["eval", "areal/Arithmetik-v0", "--model", "smollm2"], "error: unknown environment 'areal/Arithmetik-v0'"),
    ],
)
def test_errors_are_one_message(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert err.startswith(message)
    assert "Traceback" not in err


def test_debug_shows_the_traceback(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder.error = EngineError("gone")
    assert main(["train"]) == 1
    with pytest.raises(EngineError, match="gone"):
        main(["train", "--debug"])
    monkeypatch.setenv("AREAL_DEBUG", "1")
    with pytest.raises(EngineError, match="gone"):
        main(["train"])


def test_groups_of_errors(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.error = ExceptionGroup(
        "g", [EngineError("one"), ExceptionGroup("h", [RegistryError("two"), EngineError("one")])]
    )
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "error: one\nerror: two\n"
    recorder.error = ExceptionGroup("g", [EngineError("one"), ZeroDivisionError("a bug")])
    with pytest.raises(ExceptionGroup):  # a bug is never reduced to a message
        main(["train"])


def test_interrupt_is_130(recorder: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    recorder.error = KeyboardInterrupt()
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    asyncio.set_event_loop(None)


def test_envs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "load_errors", {"acme = acme_envs (acme)": ImportError("no module acme_envs")})
    assert main(["envs"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("areal/Arithmetic-v0  ")
    assert captured.err == "could not load acme = acme_envs (acme): ImportError: no module acme_envs\n"
    assert main(["envs", "--json"]) == 0
    listing = json.loads(capsys.readouterr().out)
    assert "areal/Arithmetic-v0" in [row["id"] for row in listing["envs"]]
    assert listing["load_errors"] == {"acme = acme_envs (acme)": "ImportError: no module acme_envs"}


def test_check_reports_and_sets_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import areal_agents.conformance.check as module
    from areal_agents.chat.options import ChatOptions
    from areal_agents.conformance.check import CheckReport, CheckResult

    def check(
        env_id: str, *, tokenizer: str | None, chat: ChatOptions, kwargs: dict[str, Any], difficulty: None
    ) -> CheckReport:
        given.append(kwargs)
        status: Any = "passed" if env_id == "a/Good-v0" else "failed"
        return CheckReport(env_id, (CheckResult("seeds", status, f"tokenizer {tokenizer}"),))

    given: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "check", check)
    assert main(["check", "a/Good-v0", "--tokenizer", "none"]) == 0
    assert "tokenizer None" in capsys.readouterr().out
    assert main(["check", "a/Good-v0", "a/Bad-v0", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [(r["env"], r["passed"]) for r in rows] == [("a/Good-v0", True), ("a/Bad-v0", False)]
    assert main(["check", "a/Good-v0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["env"] == "a/Good-v0"
    assert given == [{}] * 4
    own = ["check", "areal/Questions-v0", "--env.kwargs.test_path=none.jsonl", "--tokenizer", "none"]
    assert main([*own, "--env.kwargs.path", "q.jsonl", "--json", "--env.kwargs.verify", "{precision = 2}"]) == 1
    assert given[4] == {"test_path": "none.jsonl", "path": "q.jsonl", "verify": {"precision": 2}}
    assert main(["check", "--env.kwargs", "{path = 'q.jsonl'}", "areal/Questions-v0"]) == 1
    assert given[5] == {"path": "q.jsonl"}
    assert main(["check", "--env.kwargs.test-path", "q.jsonl", "areal/Questions-v0"]) == 1
    assert given[6] == {"test_path": "q.jsonl"}
    assert main(["check", "--env.kwargs", '{"test-path": "q.jsonl"}', "areal/Questions-v0"]) == 1
    assert "'test-path'; write test_path for test-path" in capsys.readouterr().err


def test_check_all_leaves_out_and_names_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import areal_agents.conformance.check as module
    from areal_agents import registry
    from areal_agents.conformance.check import CheckReport

    checked: list[str] = []

    def check(id: str, **_: Any) -> CheckReport:
        checked.append(id)
        return CheckReport(id, ())

    monkeypatch.setattr(module, "check", check)
    there = registry.EnvSpec("a/There-v0", "x:Y")
    lacks = registry.EnvSpec("a/Lacks-v0", "x:Y", needs="no_such_package")
    monkeypatch.setattr(registry, "specs", lambda: [there, lacks])
    assert main(["check", "--all"]) == 0
    assert checked == ["a/There-v0"]
    assert capsys.readouterr().err == "a/Lacks-v0 is left out: it needs no_such_package, which is not installed\n"
    assert main(["check", "--all", "a/Lacks-v0"]) == 0  # named, it is checked, and says what is missing
    assert checked[1:] == ["a/Lacks-v0", "a/There-v0"]


def test_check_takes_arguments_and_level_of_an_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import areal_agents.conformance.check as module
    from areal_agents.conformance.check import CheckReport

    asked: list[tuple[Any, Any]] = []

    def check(env_id: str, *, kwargs: Any, difficulty: Any, **rest: Any) -> CheckReport:
        asked.append((kwargs, difficulty))
        return CheckReport(env_id, ())

    monkeypatch.setattr(module, "check", check)
    mine = ["check", "areal/Questions-v0"]
    assert main([*mine, "--env.kwargs.test-path", "", "--env.kwargs", '{"path": "a"}', "--difficulty", "1"]) == 0
    assert main([*mine, "--env.difficulty", "0.5"]) == 0
    assert asked == [({"test_path": "", "path": "a"}, 1.0), ({}, 0.5)]
    for words, code, says in (
        ([*mine, "--env.kwargs.pai", "1"], 1, "Questions does not take env.kwargs as they are: got an unexpected"),
        ([*mine, "--env.split", "x"], 2, "check takes --env.kwargs and --env.difficulty, not --env.split"),
        ([*mine, "--env.difficulty", "0", "--difficulty", "1"], 2, "--difficulty 1.0 and --env.difficulty 0.0: give"),
        ([*mine, "areal/Arithmetic-v0", "--env.kwargs.path", "a"], 2, ".path is an argument of one environment"),
        (["check", "--model", "smollm2", "--difficulty", "1"], 2, "leave out --difficulty"),
    ):
        assert main(words) == code
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*mine, "--level", "1"])
    assert capsys.readouterr().err.endswith("what it takes: areal-agents check --help\n")
    assert len(asked) == 2


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m areal_agents envs --json | true"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
