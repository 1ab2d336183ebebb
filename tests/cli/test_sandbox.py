from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from areal_agents.cli.main import main
from tests.sandboxes.test_backends import bwrap

__all__ = ["bwrap"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["sandbox", *argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("bwrap")
def test_exec_prints_how_a_file_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, given = tmp_path / "a b.py", tmp_path / "given"
    given.write_bytes(b"abc")
    program.write_text(
        "import os, sys\nprint(sys.stdin.read(), sys.argv, os.listdir())\n"
        "sys.stdout.buffer.write(b'\\xff\\x1b[31m')\nraise SystemExit(3)"
    )
    done = run(capsys, "exec", "bubblewrap", str(program), "--stdin", str(given), "--memory", "256M")
    assert done.pop("seconds") > 0
    assert done == {
        "status": "error",
        "exit_code": 3,
        "stdout": "abc ['./a b.py'] ['a b.py']\n\\xff\x1b[31m",
        "stderr": "",
    }
    program.write_text("while True: print('x' * 99)")
    done = run(capsys, "exec", "bubblewrap", str(program), "--max-output", "1k")
    assert (done["status"], done["exit_code"], len(done["stdout"])) == ("output_limit", None, 1024)
    program.write_text("print('here', flush=True)\nwhile True: pass")
    done = run(capsys, "exec", "bubblewrap", str(program), "--timeout", "1")
    assert (done["status"], done["exit_code"], done["stdout"]) == ("timeout", None, "here\n")
    program.write_text("block = bytearray(400 << 20)\nfor i in range(0, len(block), 4096): block[i] = 1")
    assert run(capsys, "exec", "bubblewrap", str(program), "--memory", "256M")["status"] in ("oom", "error")


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["exec", "bubblewarp", "FILE"], 1, "Did you mean 'bubblewrap'"),
        (["exec", "bubblewrap", "missing.py"], 2, "cannot read missing.py: No such file"),
        (["exec", "bubblewrap", "."], 2, "Is a directory"),
        (["exec", "bubblewrap", "FILE", "--stdin", "missing"], 2, "cannot read missing"),
        (["exec", "bubblewrap", "FILE", "--timeout", "nan"], 2, "--timeout is nan"),
        (["exec", "bubblewrap", "FILE", "--timeout", "0"], 2, "--timeout is 0"),
        (["exec", "bubblewrap", "FILE", "--memory", "12X"], 2, "--memory '12X'"),
        (["exec", "bubblewrap", "FILE", "--memory", "0"], 2, "--memory '0'"),
        (["exec", "bubblewrap", "FILE", "--memory", "20M"], 1, "leaves no room"),
    ],
)
@pytest.mark.usefixtures("bwrap")
def test_exec_refuses(
    argv: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "x.py"
    program.write_text("print(1)")
    assert main(["sandbox", *(str(program) if word == "FILE" else word for word in argv)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.usefixtures("bwrap")
def test_list_says_what_works(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in run(capsys, "list", "--json")}
    assert rows["bubblewrap"]["problem"] == ""
    assert rows["unsafe_local"]["notes"] == ["No isolation of any kind."]
    assert main(["sandbox", "list"]) == 0
    assert "works, memory bounded by" in capsys.readouterr().out
