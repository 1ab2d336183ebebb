"""A machine with one other busy process: how much longer do evaluation, training and the tests take beside it?

    python benchmarks/busy.py [--rounds 2] [--json benchmarks/results/busy.json]     # about 20 minutes on two cores
    python benchmarks/busy.py --quick                                                # one short evaluation each way

The other process is one endless loop of Python, with the same priority. On two cores it leaves three quarters of the
machine at best, so a time of 1.33 times the idle one is the floor for work that can use both. ``spinning`` is the
same work with libgomp's own default (GOMP_SPINCOUNT=300000), which users had before ``utils/openmp.py``; it is cut at
``--limit`` times the idle time.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import Progress, table
from measured_process import tree
from record import ROOT, Check, Kept, write

GOAL = 2.2
ENV = "areal/Arithmetic-v0"
SPIN = {"GOMP_SPINCOUNT": "300000"}
CLI = ("-m", "areal_agents")
TESTS = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/trainer/test_loop.py")
SMALL = "train demo --eval.baseline false --eval.n 4 --warm_start.demonstrations 16"
TRAIN = f"{SMALL} --steps 2 --rollout.groups 2 --rollout.group_size 4 --rollout.concurrency 16"


def evaluate(n: int) -> list[str]:
    return [*CLI, "eval", ENV, "--model", "smollm2", "--n", str(n)]


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """One process that computes without end."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds(command: Sequence[str], *, out: str = "", limit: float | None = None, **environment: str) -> float | None:
    """Wall clock of one command, or None where it was cut at ``limit`` seconds.

    out: the option that takes an empty folder of its own.
    """
    with tempfile.TemporaryDirectory(prefix="areal-busy-") as folder, open(Path(folder) / "log", "w+") as log:
        where = [out, str(Path(folder) / "out")] if out else []
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command, *where], cwd=ROOT, env=os.environ | environment, stdout=log, stderr=log
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            for member in tree(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, 9)
            process.wait()
            return None
        taken = time.perf_counter() - start
        if code:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{log.read()[-4000:]}")
        return round(taken, 2)


def works(*, quick: bool) -> dict[str, dict[str, Any]]:
    """What is timed, by name."""
    if quick:
        return {"eval": {"command": evaluate(4), "out": "--out"}}
    return {
        "eval": {"command": evaluate(24), "out": "--out"},
        "train": {"command": [*CLI, *TRAIN.split()], "out": "--out"},
        "tests": {"command": [*TESTS, "-k", "not whole_path"]},
    }


def turn(work: dict[str, Any], limit: float, *, spinning: bool) -> dict[str, Any]:
    """The work on the idle machine, then beside the busy process; with ``spinning`` once more as it was before."""
    idle = seconds(**work)
    assert idle is not None
    with busy_process():
        found: dict[str, Any] = {"idle": idle, "busy": seconds(**work)}
        if spinning:
            cut = limit * idle
            found |= {"spinning": seconds(**work, limit=cut, **SPIN), "spinning_limit": round(cut, 1)}
    return found


def checks(samples: dict[str, list[dict[str, Any]]]) -> list[Check]:
    found = []
    for name, rows in samples.items():
        ratio = round(statistics.median(row["busy"] / row["idle"] for row in rows), 2)
        found.append(Check(f"{name}: beside one busy process over idle", ratio, f"<= {GOAL}", ratio <= GOAL))
    return found


def rows_of(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a work, medians over the rounds."""
    rows = []
    for name, turns in samples.items():
        spun = [t.get("spinning") for t in turns if "spinning" in t]
        limits = [t["spinning_limit"] for t in turns if "spinning" in t]
        rows.append({
            "work": name,
            "idle s": statistics.median(t["idle"] for t in turns),
            "busy s": statistics.median(t["busy"] for t in turns),
            "ratio": round(statistics.median(t["busy"] / t["idle"] for t in turns), 2),
            "busy, spinning s": "" if not spun else f"more than {limits[0]}" if None in spun else spun[0],
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=float, default=6.0, help="times the idle time, for what spins")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    chosen = works(quick=options.quick)
    progress = Progress(rounds * len(chosen))
    kept = Kept(options.json, {"rounds": rounds, "limit": options.limit})
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for i in range(rounds):
        for name, work in chosen.items():
            spinning = i == 0 and name == "eval" and not options.quick
            found = kept.part(f"{name} {i}", lambda w=work, s=spinning: turn(w, options.limit, spinning=s))
            samples[name].append(found)
            progress(f"{name}: {found}")
    print(table(rows_of(samples)))
    found = checks(samples)
    flat = [{"work": name, **row} for name, rows in samples.items() for row in rows]
    write(options.json, "busy", flat, found)
    kept.end()
    return 0 if all(check.holds for check in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
