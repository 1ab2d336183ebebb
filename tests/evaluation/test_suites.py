"""Suites: what a file may say, what is played once, and what a kill costs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from areal_agents.errors import ConfigError
from areal_agents.evaluation.suite import is_suite, load_suite, shipped_suites
from areal_agents.evaluation.unfinished import count_saved, read_episodes
from areal_agents.tracking.trajectories import read_records
from tests.chat_envs import Sums
from tests.chat_server import chat_server
from tests.tiny_models import tiny_chat_model
from tests.unfinished import answers, started, until_saved

LETTERS = """
name = "letters"
version = 3

[[entries]]
name = "greedy"
env = "tests.letters_env:Letters"
n = 4
overlap = "tell"
sampling = { max_turn_tokens = 8 }

[[entries]]
name = "often"
env = "tests.letters_env:Letters"
n = 8
k = 2
seeds = [0, 2]
sampling = { temperature = 1.0, max_turn_tokens = 40 }
"""
SUMS = """
name = "sums"
version = 1
[[entries]]
env = "tests.chat_envs:Sums"
n = 8
overlap = "tell"
"""


class Broken(Sums):
    def prompt(self, task: Any) -> str:
        raise RuntimeError("no prompt")


def written(path: Path, text: str = LETTERS) -> Path:
    path.write_text(text)
    return path


def test_shipped_suites_are_whole() -> None:
    from areal_agents.evaluation.suite_cells import chosen_of

    assert set(shipped_suites()) == {"full", "quick"}
    assert [e.name for e in load_suite("quick").entries] == ["arithmetic", "assistant", "hidden-number", "doors"]
    assert load_suite("quick.toml") == load_suite("quick")
    assert len(chosen_of(load_suite("quick"))) == 4
    full = load_suite("full")
    assert len(full.entries) == 15
    assert {(e.n, e.k, e.seeds) for e in full.entries} == {(128, 1, (0, 1, 2))}


@pytest.mark.parametrize(
    ("text", "suite"),
    [
        ("quick", True),
        ("mine.toml", True),
        ("a/b.toml", True),
        ("areal/Hanoi-v0", False),
        ("a.b:C", False),
        ("", False),
    ],
)
def test_what_is_a_suite(text: str, suite: bool) -> None:
    assert is_suite(text) is suite


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("n = 4", "m = 4", "2 problems:\n  - entries[1].n is missing\n  - unknown key entries[1].m: it may have env"),
        ("n = 4", "n = 4\nsplitt = 'x'", "unknown key entries[1].splitt: did you mean split?"),
        ("version = 3", "version = 0", "version = 0: input should be greater than or equal to 1"),
        ('"greedy"', '"often"', "several entries are called often: give each a name of its own"),
        ('"greedy"', '"mean"', "entries[1].name = 'mean': write at most 60 letters, digits, dots, dashes and spaces"),
        ('"greedy"', '"a=b"', "entries[1].name = 'a=b': write at most 60 letters"),
        ("[0, 2]", "[0, 1]", "seeds 0 and 1 with k = 2 share attempts"),
        ("[0, 2]", "[]", "seeds are one or more whole numbers from 0 on"),
        ("temperature = 1.0", "temperatur = 1.0", "entries[2].sampling.temperatur: did you mean temperature?"),
        ('"tell"', '"tel"', "entries[1].overlap = 'tel': it is 'refuse' or 'tell'"),
        ("version = 3", "version = ", "is not valid TOML"),
    ],
)  # fmt: skip
def test_wrong_files_say_where(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in LETTERS
    path = written(tmp_path / "s.toml", LETTERS.replace(old, new))
    with pytest.raises(ConfigError) as error:
        load_suite(str(path))
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["quik", "--model", "m"], 1, "unknown suite 'quik' (did you mean quick?); known suites: full, quick"),
        (["Hanoi", "--model", "m"], 1, "did you mean areal/Hanoi-v0?"),
        (["nowhere.toml", "--model", "m"], 1, "no such suite: nowhere.toml. Known suites: full, quick"),
        (["quick"], 2, "--model is missing: name the models to evaluate on quick"),
        (["quick", "--model", "a", "--model", "a"], 2, "--model a is given twice"),
        (["quick", "--model", "a", "--n", "3"], 2, "--n is what a suite says of each entry"),
        (["quick", "--model", "a", "--env.kwargs.x=1"], 2, "--env.kwargs.x is what a suite says of each entry"),
        (["quick", "--model", "a", "--seed", "1"], 2, "--seed is what a suite says of each entry"),
        (["quick", "--model", "a", "--learner.lr", "1"], 1, "--learner.lr means nothing for an evaluation"),
        (["quick", "--model", "a", "--fail-below", "dors=0.5"], 1, "no entry 'dors': did you mean doors?"),
        (["quick", "--model", "a", "--fail-below", "doors=2"], 2, "write a rate from 0 to 1, or ENTRY=RATE"),
        (["quick", "--model", "a", "--fail-below", "nan"], 2, "write a rate from 0 to 1, or ENTRY=RATE"),
        (["quick", "--model", "openai:a"], 2, "--model openai:MODEL and --url URL belong together"),
        (["quick", "--model", "a", "--resume", "x", "--out", "y"], 2, "--resume OUT names the folder: leave out --out"),
        (["areal/Hanoi-v0", "--model", "a", "--fail-below", "x=0.5"], 2, "only a suite has entries"),
    ],
)  # fmt: skip
def test_wrong_commands(argv: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *argv]) == code
    assert said in capsys.readouterr().err


def test_entries_that_cannot_be_played_are_told_before_anything_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = LETTERS.replace("n = 4", "n = 40").replace("n = 8\n", "n = 8\nsplit = 'tset'\nkwargs = { }\n")
    tiny = tiny_chat_model(tmp_path / "tiny")
    path, out = written(tmp_path / "s.toml", wrong), tmp_path / "out"
    assert main(["eval", str(path), "--model", str(tiny), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "greedy: tests.letters_env:Letters:test has 8 tasks, but eval.n = 40" in said
    assert "often: tests.letters_env:Letters has no split 'tset'" in said
    assert not out.exists()


def install(folder: Path, name: str, value: str, owner: str = "acme", text: str = "", code: str = "") -> None:
    """Install a package that has one suite."""
    package = folder / value.replace(".", "/")
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(code)
    if text:
        (package / f"{name}.toml").write_text(text)
    info = folder / f"{owner}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {owner}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[areal_agents.suites]\n{name} = {value}\n")


MINE = 'name = "acme-hard"\nversion = 2\n[[entries]]\nenv = "areal/Hanoi-v0"\nn = 4\n'


def test_a_suite_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "acme-hard", "acme_suites_whole", text=MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    suite = load_suite("acme-hard")
    assert (str(suite), suite.entries[0].env) == ("acme-hard v2", "areal/Hanoi-v0")
    with pytest.raises(ConfigError, match=r"unknown suite 'acme-hart' \(did you mean acme-hard\?\); known suites: "):
        load_suite("acme-hart")


@pytest.mark.parametrize(
    ("value", "text", "code", "said"),
    [
        ("acme_suites_empty", "", "", "suite 'acme-hard' of acme: the package 'acme_suites_empty' has no file acme-ha"),
        ("acme_suites_raises", MINE, "raise OSError('no disk')", "cannot be imported as a package (OSError: no disk)"),
        ("acme_suites_exits", MINE, "import sys; sys.exit(3)", "(RuntimeError: it called sys.exit(3))"),
        (
            "acme_suites_other",
            MINE.replace("acme-hard", "acme"),
            "",
            "its name is 'acme', and its entry point's 'acme",
        ),
        ("acme_suites_wrong", "name = ", "", "is not valid TOML"),
    ],
)
def test_an_installed_suite_that_cannot_be_read(
    value: str, text: str, code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "acme-hard", value, text=text, code=code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_suite("acme-hard")
    assert load_suite("quick").name == "quick"  # a broken package costs only itself


def test_a_name_that_two_packages_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "a", "twice", "acme_suites_a", "acme")
    install(tmp_path / "b", "twice", "acme_suites_b", "bcme")
    install(tmp_path / "c", "quick", "acme_suites_c", "ccme")
    for name in "abc":
        monkeypatch.syspath_prepend(str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"[ab]cme and [ab]cme each have a suite 'twice': rename all but one"):
        load_suite("twice")
    with pytest.warns(UserWarning, match="the suite 'quick' of ccme is not played, but the shipped one"):
        assert len(load_suite("quick").entries) == 4


def rows(out: Path) -> dict[Path, list[Any]]:
    """The episodes of each cell, in a form that tells every difference."""
    return {
        cell: [(r.trajectory.id, r.trajectory.reward, r.trajectory.turns) for r in read_records(cell, kind="eval")]
        for cell in sorted((out / "cells").iterdir())
    }


def test_killed_and_resumed_each_attempt_is_played_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny, suite, out = tiny_chat_model(tmp_path / "tiny"), written(tmp_path / "s.toml"), tmp_path / "out"
    command = ["eval", str(suite), "--model", str(tiny), "--engine.max_batch", "1", "--engine.threads", "1"]
    command += ["--out", str(out)]
    with started(*command) as process:
        assert process.stdout is not None
        cells: list[Path] = []
        for line in process.stdout:
            if line.startswith("often, seed 0"):
                break
        while len(cells) < 2:
            cells = sorted((out / "cells").iterdir())
        second = next(c for c in cells if not (c / "report.json").exists())
        until_saved(second, 3)
        process.kill()
        process.communicate()
    before, saved = rows(out), count_saved(second)
    assert 3 <= saved < 16
    first = next(c for c in cells if c != second)
    report = (first / "report.json").read_text()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"greedy, {tiny}: 4 tasks, played already" in said
    assert f"{saved} of 16 attempts are played already" in said
    after = rows(out)
    assert [len(found) for found in after.values()].count(16) == 2
    for cell, found in after.items():
        assert len({id for id, _, _ in found}) == len(found)
        kept = {id: row for id, *row in found}
        assert all(kept[id] == row for id, *row in before.get(cell, []))
    assert (first / "report.json").read_text() == report
    board = json.loads((out / "letters-v3" / "leaderboard.json").read_text())
    assert board["complete"]
    assert [(s["entry"], s["n"], s["attempts"]) for s in board["scores"]] == [("greedy", 4, 4), ("often", 8, 32)]
    assert main(["eval", "--resume", str(out)]) == 2
    assert "holds suites: the command that began one goes on with it" in capsys.readouterr().err
    # Once more: nothing is played, whatever the suite is called.
    again = written(tmp_path / "t.toml", LETTERS.replace('"letters"', '"other"').replace('"greedy"', '"renamed"'))
    assert main(["eval", str(again), *command[2:], "--fail-below", "renamed=1", "mean=0"]) == 1
    captured = capsys.readouterr()
    assert captured.out.count("played already") == 3
    assert f"error: renamed, {tiny}: pass@1 0.000 is below 1" in captured.err
    assert "mean" not in captured.err
    assert rows(out) == after


def test_two_models_on_kept_engines_and_on_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (tiny_chat_model(tmp_path / name, seed=seed) for seed, name in enumerate(["one", "two"]))
    suite, out = written(tmp_path / "s.toml", SUMS), tmp_path / "out"
    models = ["--model", str(one), "--model", str(two), "--model", "openai:m"]
    with chat_server(answers) as server:
        asked = ["eval", str(suite), *models, "--url", server.url, "--out", str(out), "--rollout.max-retries=0"]
        assert main([*asked, "--json", str(tmp_path / "board.json"), "--fail-below", "0.25"]) == 1
        captured = capsys.readouterr()
        board = json.loads((tmp_path / "board.json").read_text())
        assert [s["pass_at_1"] for s in board["scores"]] == [0.0, 0.0, 0.5]
        assert captured.err.count("is below 0.25") == 2
        # Holm over two: McNemar's exact p of 4 gained and none lost is 2/16.
        assert [(d["difference"], d["p_value"], d["p_holm"]) for d in board["differences"]] == [
            (0.0, 1.0, 1.0), (0.5, 0.125, 0.25),
        ]  # fmt: skip
        assert not any(d["shown"] for d in board["differences"])
    assert len(list((out / "cells").iterdir())) == 3
    same = ["--model", str(one), "--model", f"{one}/"]
    assert main(["eval", str(suite), *same, "--out", str(out)]) == 1
    assert "are one model: give it once" in capsys.readouterr().err


def test_an_entry_that_fails_does_not_take_the_others_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = '[[entries]]\nenv = "tests.evaluation.test_suites:Broken"\nn = 2\noverlap = "tell"\n'
    suite, out = written(tmp_path / "s.toml", SUMS + broken), tmp_path / "out"
    with chat_server(answers) as server:
        asked = ["eval", str(suite), "--model", "openai:m", "--url", server.url, "--out", str(out)]
        assert main([*asked, "--fail-below", "Sums=0.5"]) == 1
    captured = capsys.readouterr()
    assert "Broken" in captured.err
    board = json.loads((out / "sums-v1" / "leaderboard.json").read_text())
    assert not board["complete"]
    assert [s["pass_at_1"] for s in board["scores"]] == [0.5, None]
    assert board["means"][0]["pass_at_1"] is None
    cell = next(c for c in (out / "cells").iterdir() if "Sums" in c.name)
    assert len(read_episodes(cell)[0]) == 8
