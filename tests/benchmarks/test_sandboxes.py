"""The sandboxes' benchmark: its arithmetic by hand, what it counts as left behind, and that it goes on when cut."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.sandbox import Sandbox, SandboxSpec
from areal_agents.sandboxes.unsafe_local import UnsafeLocalBackend
from tests.sandboxes.test_backends import need
from tests.simulated import BENCHMARKS, benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]
HERE = "tests.benchmarks.test_sandboxes"
SIDES = [
    ("subprocess", "new process", "trivial"),
    ("zygote", "in a session", "trivial"),
    ("zygote", "in a session", "numeric"),
    ("docker", "in a session", "trivial"),
    ("docker exec", "bare", "trivial"),
]


def rows(rates: dict[tuple[str, str, str], list[tuple[float, str]]]) -> list[dict[str, Any]]:
    """Rows of rounds at a concurrency of 1: calls a second, and the milliseconds of each call as text."""
    found = []
    for (side, way, code), turns in rates.items():
        for turn, (rate, ms) in enumerate(turns):
            took = sorted(map(float, ms.split()))
            found.append({
                "side": side, "way": way, "code": code, "concurrency": 1, "round": turn, "n": len(took),
                "calls_per_second": rate, "p50_ms": took[(len(took) - 1) // 2], "ms": ms,
            })  # fmt: skip
    return found


def test_percentiles_by_hand() -> None:
    percentile = module("sandbox_sides").percentile
    ten = [float(n) for n in range(10, 0, -1)]  # half of ten are 5 values, 95 % need all ten
    assert [percentile(ten, share) for share in (0.5, 0.95, 0.99)] == [5, 10, 10]
    hundred = [float(n) for n in range(1, 101)]
    assert [percentile(hundred, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert percentile([7.0], 0.5) == 7


def test_calls_go_on_for_the_time_and_each_place_makes_one() -> None:
    at_once = most = made = 0

    async def call() -> None:
        nonlocal at_once, most, made
        at_once, made = at_once + 1, made + 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1

    found = asyncio.run(module("sandbox_sides").measure(call, 4, 0.0))
    assert (found["n"], made, most) == (4, 4, 4)
    assert len(found["ms"].split()) == 4
    made = 0
    found = asyncio.run(module("sandbox_sides").measure(call, 2, 0.05))
    assert found["n"] == made > 2


def test_percentiles_are_of_all_rounds_and_rates_are_paired_within_one() -> None:
    sandboxes = module("sandboxes")
    # rates 30/10, 20/40, 90/30: median 3. docker 26/20, 13/10, 5/10: median 1.3, which is still good
    measured = rows({
        SIDES[0]: [(10, "1"), (40, "1"), (30, "1")],
        SIDES[1]: [(30, "1"), (20, "1"), (90, "1")],
        SIDES[2]: [(1, "10 30"), (1, "20"), (1, "21 22")],
        SIDES[3]: [(1, "26"), (1, "13"), (1, "5")],
        SIDES[4]: [(1, "20"), (1, "10"), (1, "10")],
    })  # fmt: skip
    seen = {"calls": 5, "sessions": 2, "before": {"processes": 3, "cgroups": ["a"], "memory_mib": 10}}
    seen |= {"after": {"processes": 3, "cgroups": ["a"], "memory_mib": 26}}
    seen |= {"open_before": {"memory_mib": 5}, "open_after": {"memory_mib": 5}}
    one, p50, docker, leak = sandboxes.checks(measured, {"x": seen}, [1], "")
    assert (one.value, one.holds) == (3.0, True)
    assert (p50.value, p50.holds) == (21.0, False)  # 10 20 21 22 30
    assert (docker.value, docker.holds) == (1.3, True)
    assert leak.holds
    assert leak.value == {"processes": 0, "cgroups": 0, "memory_mib": 16, "memory_mib while open": 0}
    (line,) = [row for row in sandboxes.summary(measured) if row["code"] == "numeric"]
    assert (line["n"], line["p50_ms"], line["p99_ms"]) == (5, 21.0, 30.0)


@pytest.mark.parametrize(
    ("where", "what", "value"),
    [
        ("after", "processes", 4), ("after", "cgroups", ["b"]), ("after", "memory_mib", 27),
        ("open_after", "descriptors", 8), ("open_after", "memory_mib", 50),
    ],
)  # fmt: skip
def test_whatever_is_left_fails_the_check(where: str, what: str, value: object) -> None:
    start = {"processes": 3, "cgroups": ["a"], "memory_mib": 10}
    opened = {"descriptors": 7, "memory_mib": 30}
    seen: dict[str, Any] = {"calls": 5, "sessions": 2, "before": start, "after": dict(start)}
    seen |= {"open_before": opened, "open_after": dict(opened)}
    measured = rows({side: [(1, "1")] for side in SIDES})
    assert module("sandboxes").checks(measured, {"x": seen}, [1], "")[-1].holds
    seen[where][what] = value
    assert not module("sandboxes").checks(measured, {"x": seen}, [1], "")[-1].holds


def test_docker_that_is_not_there_is_a_goal_missed_with_its_reason() -> None:
    measured = rows({side: [(1, "1")] for side in SIDES[:3]})
    missed = [c for c in module("sandboxes").checks(measured, {}, [1], "no engine answers") if not c.holds]
    assert [(c.value, c.reason) for c in missed] == [(None, "not measured: no engine answers")]


def test_a_goal_that_is_missed_says_what_others_did_meanwhile() -> None:
    sandboxes, check = module("sandboxes"), module("record").Check
    parts = {name: {"others_busy_before": share} for name, share in
             (("round 0 at 2", 0.5), ("round 1 at 2", 0.75), ("round 0 at 32", 0.1), ("leaks of x", 1.0))}  # fmt: skip
    missed = sandboxes.while_busy(check("zygote/subprocess calls, trivial, at 2", 0.9, ">= 1", False), parts)
    assert missed.reason == "others had 50%, 75% of the processors before these rounds"
    for kept in (
        check("x, at 2", 1.0, ">= 1", True),
        check("x, at 2", None, "", False, "its own"),
        check("l", 1, "", False),
    ):
        assert sandboxes.while_busy(kept, parts) == kept


def test_the_share_of_the_processors_that_was_used() -> None:
    load = module("machine_load")
    # user nice system idle iowait irq softirq steal: 10 + 5 + 5 + 0 used, 60 + 20 idle
    before, after = "cpu  0 0 0 0 0 0 0 0 9 9\ncpu0", "cpu  10 0 5 60 20 0 0 5 99 9\ncpu0"
    assert load.busy_share(before, after) == 0.2
    assert load.busy_share(before, before) == 0.0
    patience = load.Patience(0)
    told = load.under_load(patience, lambda: "found")
    assert told["found"] == "found"
    assert 0 <= told["others_busy_before"] <= 1


class Leaky(UnsafeLocalBackend):
    """A sandbox that leaves things behind."""

    name = "leaky"

    @contextlib.asynccontextmanager
    async def session(self, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        tempfile.mkdtemp()
        left.append(os.dup(0))
        processes.append(subprocess.Popen(["/bin/sleep", "600"]))  # noqa: ASYNC220
        async with super().session(spec) as sandbox:
            yield sandbox


left: list[int] = []
processes: list[subprocess.Popen[bytes]] = []


def test_what_a_sandbox_leaves_is_counted() -> None:
    need(os.access("/usr/bin/prlimit", os.X_OK), "prlimit: apt-get install util-linux")
    leaks = module("sandbox_leaks")
    mine = sys.modules[HERE]
    try:
        found = asyncio.run(leaks.leak_check(f"{HERE}:Leaky", 24, 1))
        more = leaks.grown(found["before"], found["after"])
        # Eight workers: 4 keep a session and 4 open one a call. 16 calls make the same number as before each time.
        counted = len(mine.left)
        assert more["processes"] == more["descriptors"] == more["folders"] > 0
        assert more["processes"] < counted
        open_more = leaks.grown(found["open_before"], found["open_after"])
        assert open_more["processes"] == found["sessions"] > 8
    finally:
        for process in mine.processes:
            process.kill()
            process.wait()
        for descriptor in mine.left:
            os.close(descriptor)
    found = asyncio.run(leaks.leak_check("unsafe_local", 24, 3))
    clean = leaks.grown(found["before"], found["after"])
    assert {name: clean[name] for name in ("processes", "descriptors", "folders")} == {
        "processes": 0, "descriptors": 0, "folders": 0,
    }  # fmt: skip
    # Sessions held over more calls leave nothing more either. A process's memory is never the same to the MiB.
    held = leaks.grown(found["open_before"], found["open_after"])
    assert {name: n for name, n in held.items() if name != "memory_mib" and n} == {}


def test_a_record_is_made_of_parts_over_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load, record, path, made = module("machine_load"), module("record"), tmp_path / "x.json", list[str]()

    def do(name: str) -> str:
        made.append(name)
        return name.upper()

    def run() -> Any:
        work = {name: lambda name=name: do(name) for name in "abc"}
        clock = iter(range(0, 10_000, 40)).__next__  # each look at it is 40 seconds later
        return load.do_parts(work, record.Kept(path, {}), load.Patience(0), 1.0, clock)

    assert run() is None  # begun at 0, a at 40, b would be at 80
    assert "1 of 3 parts are kept: run this again." in capsys.readouterr().out
    assert run() is None
    parts = run()
    assert made == ["a", "b", "c"]
    assert {name: part["found"] for name, part in parts.items()} == {"a": "A", "b": "B", "c": "C"}
    assert load.loads(parts)["c"].keys() == {"others_busy_before", "load_before", "load_after", "seconds"}


def test_a_part_runs_in_short_on_real_sides(tmp_path: Path) -> None:
    """Plain processes and unsafe_local, without packages: what every machine with Linux has."""
    need(os.access("/usr/bin/prlimit", os.X_OK), "prlimit: apt-get install util-linux")
    sides = module("sandbox_sides")

    async def whole() -> list[int]:
        backend, counts = UnsafeLocalBackend(), []
        for make in (
            sides.plain(sys.executable, "trivial", 2),
            sides.in_sessions(backend, "trivial", 2),
            sides.session_each(backend, "trivial", 2),
        ):
            async with make as call:
                counts.append((await sides.measure(call, 2, 0.0))["n"])
        await backend.aclose()
        return counts

    assert asyncio.run(whole()) == [2, 2, 2]
    assert (BENCHMARKS / "sandboxes.py").exists()
