"""Evaluations that are interrupted, killed or lose their backend, and go on: the numbers are those of one sitting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.errors import ArealError, ConfigError, TaskError
from areal_agents.evaluation.compare import compare
from areal_agents.evaluation.evaluate import evaluate
from areal_agents.evaluation.players import Server
from areal_agents.evaluation.unfinished import count_saved, fingerprint
from areal_agents.settings.config import EngineConfig, ModelConfig, RolloutConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import Task
from tests.chat_envs import Sums
from tests.chat_server import Answer, Hang, Json, Step, chat_server
from tests.small_disk import fill, small_disk
from tests.tiny_models import tiny_chat_model
from tests.unfinished import (
    ENV,
    SECONDS,
    Gate,
    answers,
    command,
    numbers,
    partial_of,
    read_until,
    started,
    uninterrupted,
    until_saved,
)


def test_ctrl_c_shows_what_there_is_and_resume_ends_it_with_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, gate = tmp_path / "out", Gate(3)
    with chat_server(gate) as server:
        with started(*command(out, server.url, "--concurrency", "2", "--json", str(tmp_path / "part.json"))) as process:
            until_saved(out, 3)
            process.send_signal(signal.SIGINT)
            said = read_until(process, "SIGINT: finishing the episodes that run, for at most 60 s. Once more stops at")
            gate.open.set()
            rest, errors = process.communicate(timeout=SECONDS)
        said += rest
        assert process.returncode == 130
        assert "note: partial: 5 of 8 attempts were played" in said
        assert f"{ENV}:test  0.600" in said  # tasks 0, 2 and 4 of 5
        assert errors == (
            f"stopped by SIGINT; 5 of 8 attempts are saved. Go on with:\n  areal-agents eval --resume {out}\n"
        )
        part = json.loads((tmp_path / "part.json").read_text())
        assert (part["n"], part["attempts"], part["unplayed"], part["pass_at_1"], part["infra_rate"]) == (
            5, 5, 3, 0.6, 0.0,
        )  # fmt: skip
        assert json.loads((out / "report.json").read_text()) == part

        # the partial folder is read as one, and says so
        assert len(list(read_records(out, kind="eval"))) == 5
        assert main(["replay", str(out), "--kind", "eval", "--episode", "test/0/0"]) == 0
        assert main(["replay", str(out), "--kind", "eval", "--list"]) == 0
        assert capsys.readouterr().err.count("is not complete: 5 of 8 attempts are saved") == 2

        assert main(["eval", "--resume", str(out)]) == 0
        resumed = capsys.readouterr()
        assert "5 of 8 attempts are played already" in resumed.out
        assert not resumed.err
        assert len(server.requests) == 8  # what was scored was not asked again
        assert numbers(out) == numbers(uninterrupted(tmp_path, server.url))
        assert main(["eval", "--resume", str(out)]) == 0  # nothing is missing
        assert len(server.requests) == 16
    assert [r.trajectory.id for r in read_records(out)] == [f"test/{i}/0" for i in range(8)]
    assert [p.name for p in (out / "trajectories" / "eval").iterdir()] == ["step-000000.parquet"]
    assert not any("complete" in note for note in compare(out, tmp_path / "whole").notes)


def test_a_killed_evaluation_goes_on_after_its_torn_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, gate = tmp_path / "out", Gate(4)
    with chat_server(gate) as server:
        with started(*command(out, server.url)) as process:
            until_saved(out, 4)
            process.kill()
            process.wait(SECONDS)
        gate.open.set()
        lines = out / "trajectories/eval/step-000000.jsonl"
        whole = lines.read_bytes()
        lines.write_bytes(whole + b'{"schema_version": 2, "kind": "ev')  # as a kill in the middle of a write leaves it
        with pytest.raises(ConfigError, match=r"already holds an evaluation.*goes on with `areal-agents eval --resume"):
            asyncio.run(evaluate(ENV, model="openai:m", server=Server(server.url), out=out))
        assert count_saved(out) == 4
        before = compare(out, out, common=True)
        assert any("is not complete: 4 of 8 attempts are saved" in note for note in before.notes)
        assert main(["rescore", str(out), "--kind", "eval", "--reward", ENV]) == 0
        assert "is not complete: 4 of 8 attempts are saved" in capsys.readouterr().err
        asked = len(server.requests)
        assert main(["eval", "--resume", str(out)]) == 0
        said = capsys.readouterr().out
        assert "the last line was cut short when the evaluation was killed: its episode is played again" in said
        assert len(server.requests) == asked + 4
        assert numbers(out) == numbers(uninterrupted(tmp_path, server.url))
    assert "torn_line_cut" in (out / "events.jsonl").read_text()


def test_a_server_that_dies_leaves_what_was_scored_and_one_message(tmp_path: Path) -> None:
    out, served = tmp_path / "out", 0

    def dying(body: Json) -> Step:
        nonlocal served
        served += 1
        return answers(body) if served <= 5 else Hang()

    limits = ["--rollout.max_retries", "0", "--rollout.failure_window", "4", "--rollout.failure_budget", "0.25"]
    limits += ["--engine.request_timeout", "3", "--concurrency", "2"]
    with contextlib.ExitStack() as serving:
        server = serving.enter_context(chat_server(dying))
        with started(*command(out, server.url, *limits)) as process:
            until_saved(out, 5)
            serving.close()
            _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    first, second, error = errors.splitlines()
    assert first == "5 of 8 attempts are saved. Once its cause is mended, go on with:"
    assert second == f"  areal-agents eval --resume {out}"
    assert error.startswith("error: 2 of the last 4 episode attempts failed, the budget is 1 (rollout.failure_budget")
    with chat_server(answers) as server:
        assert main(["eval", "--resume", str(out), "--url", server.url]) == 0  # it has moved
        assert len(server.requests) == 3
        assert numbers(out) == numbers(uninterrupted(tmp_path, server.url))


def test_the_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    gate = Gate(2)
    with chat_server(gate) as server, started(*command(out, server.url, "--concurrency", "2")) as process:
        until_saved(out, 2)
        process.send_signal(signal.SIGINT)
        read_until(process, "Once more stops at once")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
        gate.open.set()
    assert process.returncode == 130
    assert errors.startswith("stopped by SIGINT; 2 of 8 attempts are saved. Go on with:\n  areal-agents eval --resume ")
    assert count_saved(out) == 2


def test_ctrl_c_before_the_first_episode_ends_it_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with started(*command(tmp_path / "out", url)) as process:
            connection, _ = silent.accept()  # it asks whether the server is there
            with connection:
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, errors) == (130, "stopped by SIGINT; before an attempt was scored\n")
    assert not (tmp_path / "out" / "trajectories").exists()


def test_attempts_that_all_fail_are_an_error_and_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(lambda body: Answer({"error": {"message": "out of order"}}, 400)) as server:
        assert main(command(tmp_path / "out", server.url, "--k", "2", "--rollout.failure_budget", "1")) == 1
    said = capsys.readouterr()
    assert "95 % CI" not in said.out
    assert said.err.startswith(
        f"error: evaluation of {ENV}: infrastructure failed every attempt, so that there is nothing to score. First "
    )
    assert "out of order" in said.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_what_infrastructure_failed_is_played_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ill = True

    def sometimes(body: Json) -> Step:
        if ill and body["messages"][1]["content"].startswith("103+"):
            return Answer({"error": {"message": "not today"}}, 400)
        return answers(body)

    out = tmp_path / "out"
    with chat_server(sometimes) as server:
        assert main(command(out, server.url)) == 0
        assert numbers(out)["infra_rate"] == 0.125
        assert f"note: infrastructure failed 1 of 8 attempts: `eval --resume {out}` plays them again" in (
            capsys.readouterr().out
        )
        ill = False
        assert main(["eval", "--resume", str(out)]) == 0
        assert len(server.requests) == 9
        assert numbers(out) == numbers(uninterrupted(tmp_path, server.url))


def test_a_task_that_has_become_bad_does_not_stand_for_one_that_was_not_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight tasks seven were played, and one of these cannot be scored any more: one is left to play, of seven."""
    out = tmp_path / "out"

    def refuse(task: Task) -> None:
        if task.id == "test-0":
            raise TaskError("its answer was withdrawn")

    with chat_server(answers) as server:
        assert main(command(tmp_path / "whole", server.url)) == 0
        partial_of(tmp_path / "whole", out, 7)
        monkeypatch.setattr(Sums, "task_checks", lambda: (refuse,))
        asked = len(server.requests)
        assert main(["eval", "--resume", str(out)]) == 0, capsys.readouterr().err
        assert len(server.requests) == asked + 1
    assert "6 of 7 attempts are played already" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert (report["attempts"], report["unplayed"], list(report["left_out"])) == (7, 0, ["test-0"])
    assert report["pass_at_1"] == pytest.approx(3 / 7)  # 2, 4 and 6 of 1 to 7


@pytest.mark.slow
def test_an_engines_evaluation_goes_on_with_the_same_model_alone(tmp_path: Path) -> None:
    model = tiny_chat_model(tmp_path / "model")

    def run(out: Path, folder: Path = model, *, resume: bool = False, **changes: Any) -> Any:
        options: dict[str, Any] = {"n": 4, "k": 2, "out": out, "resume": resume} | changes
        return asyncio.run(
            evaluate(
                "tests.letters_env:Letters",
                model=ModelConfig(path=str(folder), max_context=256),
                engine=EngineConfig(max_batch=changes.pop("max_batch", 2)),
                rollout=RolloutConfig(max_turn_tokens=6),
                **options,
            )
        )

    whole = run(tmp_path / "whole")
    part = tmp_path / "part"
    partial_of(tmp_path / "whole", part, 5)
    with pytest.raises(ConfigError, match=r"begun with other settings:\n  eval.n was 4 and is 3 now"):
        run(part, resume=True, n=3)
    with pytest.raises(ConfigError, match=r"eval.temperature was 0.0 and is 1.0 now"):
        run(part, resume=True, temperature=1.0)
    other = tiny_chat_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"was begun with another model than .*other is now"):
        run(part, other, resume=True)
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    again = run(part, moved, resume=True)
    left_out = {"seconds", "model"}
    assert {k: v for k, v in again.to_json().items() if k not in left_out} == {
        k: v for k, v in whole.to_json().items() if k not in left_out
    }
    a, b = ([r.trajectory for r in read_records(out)] for out in (tmp_path / "whole", part))
    assert [(t.id, t.reward, [turn.completion.ids for turn in t.turns]) for t in a] == [
        (t.id, t.reward, [turn.completion.ids for turn in t.turns]) for t in b
    ]


def test_another_model_behind_the_server_is_refused(tmp_path: Path) -> None:
    name = "one"

    def named(body: Json) -> Step:
        step = answers(body)
        assert isinstance(step, Answer)
        step.body["model"] = name
        return step

    with chat_server(named) as server:
        assert main(command(tmp_path / "whole", server.url)) == 0
        partial_of(tmp_path / "whole", tmp_path / "part", 5)
        name = "two"
        with pytest.raises(ConfigError, match=r"answers as 'two', and answered as 'one' when the evaluation was begun"):
            asyncio.run(
                evaluate(
                    ENV, model="openai:m", server=Server(server.url), n=8, out=tmp_path / "part", resume=True
                )
            )  # fmt: skip


def test_a_broken_line_and_a_changed_task_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server(answers) as server:
        assert main(command(tmp_path / "whole", server.url)) == 0
        part = tmp_path / "part"
        partial_of(tmp_path / "whole", part, 2)
        lines = part / "trajectories/eval/step-000000.jsonl"
        text = lines.read_text()
        lines.write_text(text.replace("test-1", "test-x"))
        assert main(["eval", "--resume", str(part)]) == 1
        assert "task 1 was 'test-x' when it was played, and now it is 'test-1'" in capsys.readouterr().err
        lines.write_text("{}\n" + text)
        told = r"step-000000.jsonl, line 1, is no episode of this package \(KeyError: 'schema_version'\): remove that"
        with pytest.raises(ArealError, match=told):
            count_saved(part)
        for garbage in (b"\xff\xfe\n", b"[]\n", b"null\n", b"\n", b'{"schema_version": 3}\n', b"x" * 100_000 + b"\n"):
            first, rest = text.encode().splitlines(keepends=True)
            lines.write_bytes(first + garbage + rest)
            assert main(["eval", "--resume", str(part)]) == 1
            said = capsys.readouterr().err
            assert f"{lines}, line 2, is no episode of this package" in said, garbage
            assert "remove that line, and its episode is played again by --resume" in said
        assert "Go on with" not in said  # it would meet the same line
        asked = len(server.requests)
        lines.write_bytes(first)  # as it says
        assert main(["eval", "--resume", str(part)]) == 0
        assert len(server.requests) == asked + 7
        assert numbers(part) == numbers(tmp_path / "whole")
        assert main(["eval", "--resume", str(tmp_path / "nothing")]) == 2
        assert "holds no evaluation to go on with" in capsys.readouterr().err
        fresh = [a for a in command("", server.url) if a not in ("--out", "")]
        assert main([*fresh, "--resume", str(tmp_path / "fresh")]) == 0  # a job script can always pass it
        assert main(["eval", "--resume", str(part), "--out", "x"]) == 2


def test_what_is_no_evaluation_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("lock", "holds a training run"), ("report.json", "already holds an evaluation or a run")):
        out = tmp_path / name
        out.mkdir()
        (out / "config.toml").write_text("[env]\nid = 'tests.chat_envs:Sums'\n[model]\npath = 'openai:m'\n")
        (out / name).write_text("{}")
        assert main(["eval", "--resume", str(out), "--url", "http://127.0.0.1:9/v1", "--n", "4"]) == 1
        assert text in capsys.readouterr().err
        assert (out / name).read_text() == "{}"


@pytest.mark.parametrize("room", [0, 3 << 12])
def test_a_full_disk_is_one_message_and_resume_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], room: int
) -> None:
    """At the first file, and at a later episode."""
    with small_disk(tmp_path / "disk") as disk, chat_server(answers) as server:
        out = disk / "out"
        ballast = fill(disk, room)
        assert main(command(out, server.url)) == 1
        said = capsys.readouterr().err
        assert said.count("cannot be written (No space left on device)") == 1, said
        assert main([*command(out, server.url)[:8], "--resume", str(out)]) == 1
        said = capsys.readouterr().err
        assert said.count("cannot be written (No space left on device)") == 1, said
        ballast.unlink()
        assert main([*command(out, server.url)[:8], "--resume", str(out)]) == 0
        assert json.loads((out / "report.json").read_text())["attempts"] == 8


def test_the_fingerprint_sees_a_weight_and_not_a_readme(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(3 << 20))
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert fingerprint(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(bytes([1]) * (3 << 20))
    assert fingerprint(tmp_path) != first
