"""The transformers engine against transformers' ``generate``: same model, bf16, threads and batch.

    python benchmarks/engine.py [--json benchmarks/results/engine.json]
    python benchmarks/engine.py --quick        # two minutes: equal tokens in fp32, the ratio at batch 8

Each side is a process of its own; they take turns (A B A B …), and the ratio is the median over turns of tokens/s.
Which cache is ``generate``'s best is found first. Tokens are those that were asked for: what ``generate`` computes
beyond a row's length, because another row is longer, is its cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measure import Progress, paired_ratio, summary, table
from measured_process import Side
from record import Check, write
from workload import CASES, HEADLINE, Case, Prompts, padded_tokens, request, targets

HERE = Path(__file__).resolve().parent
CACHES = ("dynamic", "static", "compiled")
GOAL = 1.5


def side(stack: ExitStack, name: str, model: str, precision: str, threads: int, *, memory: bool = False) -> Side:
    compiled = stack.enter_context(tempfile.TemporaryDirectory(prefix="areal-compiled-"))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_CACHE_DIR": compiled,
    }  # fmt: skip
    command = [sys.executable, HERE / "engine_sides.py", name, model, precision, str(threads)]
    return stack.enter_context(Side(name, command, env=environment, memory=memory))


def same_tokens(model: str, threads: int, prompts: Prompts) -> list[dict[str, Any]]:
    """fp32, greedy: both sides must sample the same tokens, row by row."""
    rows = []
    with ExitStack() as stack:
        ours = side(stack, "ours", model, "fp32", threads)
        theirs = side(stack, "generate", model, "fp32", threads)
        for case in (Case(8, "ragged"), Case(8, turns=2), Case(8, prompts="distinct")):
            asked = request(case, prompts, greedy=True, cache="dynamic", reuse=case.turns == 2)
            asked["lengths"] = [min(n, 24) for n in asked["lengths"]]
            a, b = ours.ask(asked)["ids"], theirs.ask(asked)["ids"]
            rows.append(
                {"case": case.name, "rows": len(a), "equal_rows": sum(x == y for x, y in zip(a, b, strict=True))}
            )
            print(f"fp32 greedy, {case.name}: {rows[-1]['equal_rows']} of {len(a)} rows equal", flush=True)
    return rows


def ask(one: Side, case: Case, prompts: Prompts, *, cache: str, reuse: bool) -> dict[str, Any]:
    """One sample, its sampled ids counted and left out."""
    asked = request(case, prompts, greedy=False, cache=cache, reuse=reuse)
    answer = one.ask(asked)
    expected = sum(asked["lengths"]) * case.turns
    if answer["tokens"] != expected:
        raise RuntimeError(f"{one.name} sampled {answer['tokens']} tokens, {expected} were asked for ({case.name})")
    return {"seconds": round(answer["seconds"], 4), "tokens_per_second": round(expected / answer["seconds"], 2)}


def best_cache(theirs: Side, prompts: Prompts, caches: tuple[str, ...], case: Case) -> dict[str, Any]:
    """Two samples of each setting of ``generate`` after a warm-up; the fastest, or why a setting does not work."""
    tried: dict[str, Any] = {}
    for cache in caches:
        try:
            runs = [ask(theirs, case, prompts, cache=cache, reuse=False) for _ in range(3)][1:]
        except RuntimeError as error:
            tried[cache] = {"error": str(error)[:500]}
            continue
        tried[cache] = {"tokens_per_second": max(run["tokens_per_second"] for run in runs)}
        print(f"generate, {cache} cache: {tried[cache]['tokens_per_second']:.0f} tokens/s", flush=True)
    works = [cache for cache in caches if "error" not in tried[cache]]
    fastest = max(works, key=lambda cache: tried[cache]["tokens_per_second"])
    return {"tried": tried, "fastest": fastest, "fastest_not_compiled": max(
        (c for c in works if c != "compiled"), key=lambda cache: tried[cache]["tokens_per_second"]
    )}  # fmt: skip


def compare(
    ours: Side, theirs: Side, case: Case, prompts: Prompts, *, cache: str, reuse: bool, turns: int
) -> dict[str, Any]:
    """``turns`` samples of each side, in turns, after a warm-up."""
    for one in (ours, theirs):
        ask(one, case, prompts, cache=cache, reuse=reuse)
    samples: dict[str, list[dict[str, Any]]] = {"ours": [], "generate": []}
    for _ in range(turns):
        for name, one in (("ours", ours), ("generate", theirs)):
            samples[name].append(ask(one, case, prompts, cache=cache, reuse=reuse))
    rates = {name: [s["tokens_per_second"] for s in runs] for name, runs in samples.items()}
    return {
        "case": case.name, "generate_computes_tokens": case.turns * padded_tokens(targets(case), case.batch),
        "tokens": case.turns * sum(targets(case)), "generate_cache": cache, "generate_reuses_kv": reuse,
        "samples": samples,
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "ratio": paired_ratio(rates["ours"], rates["generate"]),
    }  # fmt: skip


def peak_memory(model: str, threads: int, prompts: Prompts, cache: str) -> dict[str, float]:
    """Peak PSS of each side's processes over the headline case alone, in fresh processes, in MiB."""
    peaks = {}
    for name in ("ours", "generate"):
        with ExitStack() as stack:
            one = side(stack, name, model, "bf16", threads, memory=True)
            ask(one, HEADLINE, prompts, cache=cache, reuse=False)
            peaks[name] = one.memory.peak_mib()
    return peaks


def worker_step_ms(ours: Side, prompts: Prompts) -> float:
    """Milliseconds a decode step takes in the worker at the headline's batch: scheduling and framing included.

    The difference between completions of 40 and of 8 tokens, so that the prefill cancels.
    """
    seconds: dict[int, float] = {}
    for n in (8, 40):
        asked = request(HEADLINE, prompts, greedy=False)
        asked["lengths"] = [n] * HEADLINE.batch
        seconds[n] = min(ours.ask(asked)["seconds"] for _ in range(3))
    return round(1000 * (seconds[40] - seconds[8]) / 32, 2)


def run_profile(model: str, threads: int) -> dict[str, Any]:
    """Where a decode step's time goes, and its floors (``engine_profile.py``, a process of its own)."""
    command = [sys.executable, str(HERE / "engine_profile.py"), model, str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(out)
    return found


def checks(compared: list[dict[str, Any]], equal: list[dict[str, Any]], *, goal: bool) -> list[Check]:
    """The goals; timing ones only where ``goal``."""
    different = sum(row["rows"] - row["equal_rows"] for row in equal)
    found = [Check("rows whose fp32 greedy tokens differ", different, "== 0", different == 0)]
    for row in compared:
        if goal and row["case"] == HEADLINE.name:
            name = f"tokens/s over generate's ({row['generate_cache']} cache), {row['case']}"
            found.append(Check(name, row["ratio"], f">= {GOAL}", row["ratio"] >= GOAL))
        else:
            found.append(Check(f"tokens/s over generate's, {row['case']}", row["ratio"], "> 1", row["ratio"] > 1))
    return found


def cases_of(quick: bool) -> list[tuple[Case, bool]]:
    """(case, whether ``generate`` reuses its KV), smallest batches first: the engine restarts at a new batch size."""
    if quick:
        return [(Case(8), False)]
    ordered = sorted(CASES, key=lambda case: case.batch)
    return [(case, reuse) for case in ordered for reuse in ([False, True] if case.turns == 2 else [False])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5, help="samples of each side")
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=list(CACHES), help="settings of generate to try")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    from areal_agents.models import resolve

    model = str(resolve(options.model))
    prompts, quick = Prompts(model), options.quick
    equal = same_tokens(model, options.threads, prompts)
    cases = cases_of(quick)
    compared = []
    with ExitStack() as stack:
        ours = side(stack, "ours", model, "bf16", options.threads)
        theirs = side(stack, "generate", model, "bf16", options.threads)
        caches = ("dynamic",) if quick else tuple(options.caches)
        cache = best_cache(theirs, prompts, caches, Case(8) if quick else HEADLINE)
        turns = 2 if quick else options.turns
        progress = Progress(len(cases))
        for case, reuse in cases:
            # A compiled forward pass compiles again for every shape (minutes): it is compared where it was tried.
            chosen = cache["fastest"] if case == HEADLINE else cache["fastest_not_compiled"]
            row = compare(ours, theirs, case, prompts, cache="dynamic" if reuse else chosen, reuse=reuse, turns=turns)
            compared.append(row)
            progress(f"{case.name}{', generate reuses KV' * reuse}: {row['ratio']:.2f} x generate")
        worker = None if quick else worker_step_ms(ours, prompts)
    memory = {} if quick else peak_memory(model, options.threads, prompts, cache["fastest_not_compiled"])
    print(table([
        {"case": r["case"], "KV reused": r["generate_reuses_kv"], "ours": r["tokens_per_second"]["ours"]["median"],
         "generate": r["tokens_per_second"]["generate"]["median"], "ratio": r["ratio"]} for r in compared
    ]))  # fmt: skip
    found = checks(compared, equal, goal=not quick)
    more = {} if quick else {"profile": run_profile(model, options.threads) | {"worker_step_ms": worker}}
    write(options.json, "engine", compared, found, equal_tokens=equal, generate_settings=cache,
          peak_pss_mib=memory, threads=options.threads, **more)  # fmt: skip
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
