"""Tokens per second of ``vllm``, bare ``AsyncLLM``, ``transformers`` and ``generate``, and what a weight update costs.

    python benchmarks/engines.py [--json benchmarks/results/engines.json]      # needs `make vllm`; an hour or more
    python benchmarks/engines.py --quick                                       # vllm and AsyncLLM at concurrency 8

Two-turn episodes that share their system prompt: 32 tokens, a tool's answer, 32 tokens. Each side is a process of its
own with the same cores; they take turns (A B C D A B …), and a ratio is the median of the ratios within one turn. One
side is asked at a time; the others wait. An update in the middle of a full batch costs what its episodes take longer
than without. A run that is cut goes on with the parts that it has finished (FILE.partial.json).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from measure import Progress, paired_ratio, summary, table
from measured_process import Side
from record import Check, Kept, write
from workload import Case, Prompts, request

HERE = Path(__file__).resolve().parent
SIDES = ("vllm", "async_llm", "transformers", "generate")
CONCURRENCY = (1, 8, 32, 64)
UPDATES = [(mode, kv) for mode in ("inflight", "interrupt", "drain") for kv in ("recompute", "keep")]
GOAL = 0.95
Samples = dict[str, list[dict[str, Any]]]


def start(stack: ExitStack, name: str, model: str, precision: str, threads: int) -> Side:
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if name in ("transformers", "generate"):  # vLLM's are its own setting
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, HERE / "engines_sides.py", name, model, precision, str(threads)]
    return stack.enter_context(Side(name, command, env=environment, memory=False))


def ask(one: Side, case: Case, prompts: Prompts, **more: Any) -> dict[str, Any]:
    """One sample, its tokens counted."""
    asked = request(case, prompts, greedy=False, cache="dynamic", reuse=False, **more)
    answer = one.ask(asked)
    expected = sum(asked["lengths"]) * case.turns
    if answer["tokens"] != expected:
        raise RuntimeError(f"{one.name} sampled {answer['tokens']} tokens, {expected} were asked for ({case.name})")
    answer.pop("ids", None)
    return answer | {"tokens_per_second": round(expected / answer["seconds"], 2)}


def compare(sides: dict[str, Side], batch: int, prompts: Prompts, turns: int) -> dict[str, Any]:
    """``turns`` samples of every side, in turns, after a warm-up."""
    case = Case(batch, turns=2)
    for one in sides.values():
        ask(one, case, prompts)
    samples: Samples = {name: [] for name in sides}
    for _ in range(turns):
        for name, one in sides.items():
            samples[name].append(ask(one, case, prompts))
    rates = {name: [s["tokens_per_second"] for s in runs] for name, runs in samples.items()}
    return {
        "concurrency": batch, "samples": samples,
        "tokens_per_second": {name: summary(values) for name, values in rates.items()},
        "ratio": {
            f"vllm / {n}": paired_ratio(rates["vllm"], rates[n]) for n in rates if n != "vllm" and "vllm" in rates
        },
    }  # fmt: skip


def update_cost(one: Side, prompts: Prompts, turns: int, batch: int = 32) -> list[dict[str, Any]]:
    """What an update a third into a batch costs, for each mode and KV policy; in each turn one batch has none."""
    case = Case(batch, turns=2)
    typical = statistics.median(ask(one, case, prompts)["seconds"] for _ in range(2))
    plain: list[dict[str, Any]] = []
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {how: [] for how in UPDATES}
    for _ in range(turns):
        plain.append(ask(one, case, prompts))
        for (mode, kv), updated in samples.items():
            updated.append(ask(one, case, prompts, update={"mode": mode, "kv": kv, "after": typical / 3}))
    rows = []
    for (mode, kv), updated in samples.items():
        rows.append({
            "engine": one.name, "mode": mode, "kv": kv,
            "lost_seconds": summary([u["seconds"] - p["seconds"] for u, p in zip(updated, plain, strict=True)]),
            "stopped_seconds": summary([u["stopped_seconds"] for u in updated]),
            "update_seconds": summary([u["update_seconds"] for u in updated]),
            "tokens_recomputed": summary([u["tokens_recomputed"] for u in updated]),
            "plain": plain, "updated": updated,
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the processor has it"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=5, help="samples of each side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    from areal_agents.models import resolve
    from areal_agents.utils.precision import resolve_precision

    model = str(resolve(options.model))
    precision = "bf16" if resolve_precision(options.precision).itemsize == 2 else "fp32"
    prompts = Prompts(model)
    names = ["vllm", "async_llm"] if options.quick else options.sides
    batches, turns = ((8,), 3) if options.quick else (CONCURRENCY, options.turns)
    updating = () if options.quick else tuple(n for n in ("vllm", "transformers") if n in names)
    progress = Progress(len(batches) + len(updating))
    settings = {"precision": precision, "threads": options.threads, "turns": turns, "sides": names}
    kept = Kept(options.json, settings)
    rows, updates = [], []
    with ExitStack() as stack:
        sides = {n: start(stack, n, model, precision, options.threads) for n in names}
        for batch in batches:
            rows.append(kept.part(f"concurrency {batch}", partial(compare, sides, batch, prompts, turns)))
            progress(f"concurrency {batch}: {rows[-1]['ratio']}")
        for name in updating:
            updates += kept.part(f"updates of {name}", partial(update_cost, sides[name], prompts, 3))
            progress(f"updates of {name}")
    print(
        table(
            [{"concurrency": r["concurrency"]} | {n: r["tokens_per_second"][n]["median"] for n in names} for r in rows]
        )
    )
    if updates:
        columns = ("lost_seconds", "stopped_seconds", "update_seconds", "tokens_recomputed")
        print(
            table([{k: u[k] for k in ("engine", "mode", "kv")} | {c: u[c]["median"] for c in columns} for u in updates])
        )
    checks = []
    for row in rows:
        if (ratio := row["ratio"].get("vllm / async_llm")) is None:
            continue
        checks.append(
            Check(f"tokens/s over AsyncLLM's at concurrency {row['concurrency']}", ratio, f">= {GOAL}", ratio >= GOAL)
        )
    write(options.json, "engines", rows, checks, updates=updates, **settings)
    kept.end()
    return 0 if all(c.holds for c in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
