"""The command line: other systems, settings as JSON, packages that leave."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator

from tests.chat_server import Json, Step, call, chat_server, completion
from tests.reports.place import ENVS, Place, Said, case

WITHOUT_AFFINITY = "import os; del os.sched_getaffinity"


def process(*argv: object, first: str = "", path: str = "") -> Said:
    """``areal-agents`` in a process of its own, after ``first`` was executed in it; ``path`` is before PYTHONPATH."""
    program = f"{first}\nimport sys\nfrom areal_agents.cli.main import main\nsys.exit(main())"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in (path, *sys.path) if p)}
    done = subprocess.run(
        [sys.executable, "-c", program, *(str(a) for a in argv)], env=env, capture_output=True, text=True, timeout=300
    )
    return Said(done.stdout, done.stderr, done.returncode)


def answers(body: Json) -> Step:
    a = int(next(m for m in body["messages"] if m["role"] == "user")["content"].partition("+")[0])
    return completion(rf"\boxed{{{a + 7}}}", tokens=3)


@case("H1-71")
def a_system_without_affinities(place: Place) -> None:
    """A laptop evaluates a served model there; a training works, or says in a sentence why not."""
    with chat_server(answers) as server:
        said = process(
            "eval", f"{ENVS}:Sums", "--model", "openai:m", "--url", server.url, "--n", 2, "--out", place.run,
            first=WITHOUT_AFFINITY,
        )  # fmt: skip
    assert (said.code, place.report()["pass_at_1"]) == (0, 1.0), said
    assert "Traceback" not in said.text
    with without_affinities():
        local = place.cli(
            "eval", f"{ENVS}:Sums", "--model", place.tiny(), "--max-turn-tokens", 4, "--n", 1,
            "--out", place.folder / "local", code=None,
        )  # fmt: skip
        train = place.train("Sums", {"out": place.folder / "trained"}, code=None)
    for said in (local, train):
        assert said.code == 0 or said.err.startswith("error: "), said


@contextlib.contextmanager
def without_affinities() -> Iterator[None]:
    kept = os.sched_getaffinity
    del os.sched_getaffinity
    try:
        yield
    finally:
        os.sched_getaffinity = kept


@case("H1-74")
def a_table_as_json(place: Place) -> None:
    def calls(body: Json) -> Step:
        number = len(body["messages"])
        return completion(None, finish="tool_calls", tool_calls=[call("add", '{"a": 1, "b": 2}', f"call_{number}")])

    with chat_server(calls) as server:
        place.eval("Sums", {"model": "openai:m", "url": server.url, "n": 2, "env.kwargs": '{"max_turns": 2}'})
    assert [len(e.turns) for e in place.episodes("eval")] == [2, 2]


@case("H1-78")
def a_package_that_exits(place: Place) -> None:
    """It costs itself: the others are listed, and it is named with what it said."""
    info = place.folder / "acme-1.0.dist-info"
    info.mkdir()
    (place.folder / "acme_envs.py").write_text("import sys\nprint('hello')\nsys.exit('need key')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[areal_agents.envs]\nacme = acme_envs\n")
    said = process("envs", path=str(place.folder))
    assert (said.code, "areal/Arithmetic-v0" in said.out) == (0, True), said
    assert "acme" in said.err
    assert "need key" in said.err
    rows = process("envs", "--json", path=str(place.folder))
    found = json.loads(rows.out)  # nothing but JSON, whatever the package prints
    assert "areal/Arithmetic-v0" in [e["id"] for e in found["envs"]]
    assert any("need key" in e for e in found["load_errors"].values())
