"""The mathematics verifier against math-verify: who errs how often, and how fast.

    python benchmarks/verifier.py --json benchmarks/results/verifier.json        # about 3 minutes, and an installation
    python benchmarks/verifier.py --quick                                        # some seconds; no other verifier

Both get the same rows: ../shared/data/math_cases.jsonl, by slot, and mutated pairs (rewrites by SymPy that stay equal,
and changes that do not). A set of hostile answers is for ours alone.
math-verify lives in a virtual environment of its own (``--venv``, made on the first run). It
gets the LaTeX and expression targets of its documentation, and runs in one process, as it has no pool of processes.
Ours runs in its pool of processes, with one and with two workers. A worst case is compared with the deadline.
A record is made of parts (a verifier on a set), each with the load that others made; a run that is cut goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sympy
from machine_load import Patience, do_parts, loads
from measure import table
from measured_process import Side
from record import ROOT, Check, Kept, write

sys.path.insert(0, str(ROOT))
from tests.rewards.mathematics.hostile import HOSTILE

HERE = Path(__file__).resolve().parent
CASES = ROOT.parent / "shared" / "data" / "math_cases.jsonl"
DEADLINE = 5.0
PAIRS = 1500


def pairs(n: int) -> list[dict[str, Any]]:
    """Mutated pairs: of three, one is a rewrite that stays equal and two are changes that do not."""
    import random

    x, y = sympy.symbols("x y")

    def grown(draw: random.Random, depth: int) -> Any:
        if not depth:
            return draw.choice(
                [x, y, sympy.Integer(draw.randint(-9, 9)), sympy.Rational(draw.randint(1, 9), 7), sympy.pi]
            )
        a, b = grown(draw, depth - 1), grown(draw, depth - 1)
        return draw.choice(
            [lambda: a + b, lambda: a * b, lambda: a**2, lambda: sympy.sqrt(2) * a, lambda: sympy.sin(a)]
        )()

    rows: list[dict[str, Any]] = []
    seed = 0
    while len(rows) < n:
        draw = random.Random(seed)
        seed += 1
        found = grown(draw, draw.randint(1, 3))
        if found.has(sympy.zoo, sympy.nan) or found == 0:
            continue
        rewrite = draw.choice([sympy.expand, sympy.together, sympy.factor])
        for changed, expected in (
            (rewrite(found), 1), (found + sympy.Rational(1, draw.randint(2, 50)), 0),
            (found * sympy.Rational(51, 50), 0),
        ):  # fmt: skip
            gold, pred = f"${sympy.latex(found)}$", f"${sympy.latex(changed)}$"
            rows.append({"gold": gold, "pred": pred, "expected": expected, "slot": "answer", "options": {}})
    return rows[:n]


def hostile() -> list[dict[str, Any]]:
    """Answers made to hang, grow or run something, for ours alone: math-verify's process has no limits."""
    return [{"gold": "5", "pred": text, "expected": 0, "slot": "answer", "options": {}} for text in HOSTILE]


def ours(rows: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Verdicts, milliseconds of each row, and the wall clock of all at once."""
    from areal_agents.rewards.mathematics.options import Options
    from areal_agents.rewards.mathematics.pool import MathPool

    async def work() -> dict[str, Any]:
        pool = MathPool(workers, deadline=DEADLINE)
        await asyncio.gather(*(pool.verify(f"{i}", f"{i}") for i in range(8 * workers)))  # they are up
        start = time.perf_counter()
        found = await asyncio.gather(*(
            pool.verify(r["gold"], r["pred"], slot=r["slot"], options=Options.of(r["options"])) for r in rows
        ))  # fmt: skip
        wall = time.perf_counter() - start
        pool.close()
        return {"scores": [v.score for v in found], "ms": [v.elapsed_ms for v in found], "wall": wall}

    return asyncio.run(work())


def theirs(rows: list[dict[str, Any]], venv: Path) -> dict[str, Any]:
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "math-verify[antlr4_13_2]==0.9.0"], check=True)
    with Side("math-verify", [python, HERE / "verifier_side.py"], memory=False) as side:
        return side.ask({"rows": rows})


def rates(rows: list[dict[str, Any]], scores: list[int]) -> dict[str, float]:
    """Shares of wrong answers that were accepted, and of right ones that were not."""
    wrong = [s for r, s in zip(rows, scores, strict=True) if not r["expected"]]
    right = [s for r, s in zip(rows, scores, strict=True) if r["expected"]]
    return {
        "false_positive": round(sum(wrong) / len(wrong), 4),
        "false_negative": round(1 - sum(right) / len(right), 4) if right else 0.0,
    }


def quantile(values: list[float], q: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(q * len(values)))], 2)


def side_row(name: str, set_name: str, rows: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    return {
        "verifier": name, "rows": set_name, "n": len(rows), **rates(rows, found["scores"]),
        "per_second": round(len(rows) / found["wall"], 1), "p50_ms": quantile(found["ms"], 0.5),
        "p99_ms": quantile(found["ms"], 0.99), "worst_ms": round(max(found["ms"]), 1),
        "ms": " ".join(f"{ms:.2f}" for ms in found["ms"]),
    }  # fmt: skip


def checks(samples: list[dict[str, Any]]) -> list[Check]:
    by = {(s["verifier"], s["rows"]): s for s in samples}
    found = []
    for rows in sorted({s["rows"] for s in samples}):
        mine, other = by["ours, 1 worker", rows], by.get(("math-verify", rows))
        worst = max(s["worst_ms"] for s in samples if s["rows"] == rows and s["verifier"] != "math-verify")
        limit = 1000 * DEADLINE + 200
        found.append(Check(f"{rows}: worst case, ms", worst, f"<= {limit:g}", worst <= limit))
        if rows == "hostile":
            accepted = mine["false_positive"]
            found.append(Check("hostile: share accepted", accepted, "0", accepted == 0))
        if other is None:
            continue
        for rate in ("false_positive", "false_negative"):
            goal = other[rate] / 2
            found.append(Check(f"{rows}: {rate} rate", mine[rate], f"<= {goal:g}, half of theirs", mine[rate] <= goal))
        goal = other["per_second"]
        found.append(
            Check(f"{rows}: answers/s, one process", mine["per_second"], f">= {goal}", mine["per_second"] >= goal)
        )
    return found


def parts_of(sets: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return what is to be measured: each verifier on each set."""
    work: dict[str, Callable[[], Any]] = {}
    for name, rows in sets.items():
        for workers in (1,) if options.quick else (1, 2):
            label = f"ours, {workers} worker{'s' * (workers > 1)}"
            work[f"{label}: {name}"] = lambda label=label, name=name, rows=rows, workers=workers: side_row(
                label, name, rows, ours(rows, workers)
            )
        if not options.quick and name != "hostile":
            work[f"math-verify: {name}"] = lambda name=name, rows=rows: side_row(
                "math-verify", name, rows, theirs(rows, options.venv)
            )
    return work


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--venv", type=Path, default=Path("/tmp/math-verify-venv"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no part later; the next run goes on")
    parser.add_argument("--wait", type=float, default=0.0, help="minutes to wait for a quiet machine, in all")
    options = parser.parse_args()
    sets = {"pairs": pairs(60 if options.quick else PAIRS), "hostile": hostile()}
    if CASES.exists():
        sets["cases"] = [json.loads(line) for line in CASES.read_text().splitlines()]
    else:
        print(f"{CASES} is not there: mutated pairs alone")
    settings = {"rows": {name: len(rows) for name, rows in sets.items()}, "quick": options.quick}
    kept = Kept(options.json, settings)
    parts = do_parts(parts_of(sets, options), kept, Patience(60 * options.wait), options.minutes)
    if parts is None:
        return 2
    samples = [part["found"] for part in parts.values()]
    print(table([{name: value for name, value in row.items() if name != "ms"} for row in samples]))
    found = checks(samples)
    write(options.json, "verifier", samples, found, deadline=DEADLINE, loads=loads(parts))
    kept.end()
    return 0 if all(check.holds for check in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
