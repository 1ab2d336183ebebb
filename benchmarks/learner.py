"""The update alone, without any generation: TorchLearner, TRL's GRPOTrainer, and a plain loop on transformers.

    python benchmarks/learner.py [--json benchmarks/results/learner.json]
    python benchmarks/learner.py --quick      # gradients, counts, and the memory of one case
    python benchmarks/learner.py --profile    # only: what our step on the longest case spends its time on

Forward, loss, backward and AdamW on given episodes: the same model folder, tokens, advantages, threads and precision
on every side, three lengths in groups of 4 and of 8. Each sample is a fresh process, in turns A B C. Before anything
is timed, the gradients of all sides must agree in fp32, on ragged rows of a small model and on a batch of the model
itself. The floor (``learner_floor.py``) is measured beside every turn of a case. TRL lives in the virtual environment
of ``trl_step.py``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from learner_cases import (
    CASES,
    LONG,
    QUICK,
    VOCABULARIES,
    Case,
    episodes,
    ragged,
    random_tokens,
    text_tokens,
    tiny_model,
)
from learner_floor import floor_seconds, least_tokens
from machine_load import Patience, do_parts, loads
from measure import paired_ratio, table
from measured_process import Side
from record import Check, Kept, write
from trl_step import environment, trl_python

HERE = Path(__file__).resolve().parent
LR, MICRO_BATCH, RANK = 1e-6, 8, 16
FLOOR, SPEED, MEMORY, LORA_MEMORY = 0.75, 3.0, 0.7, 0.5
AGREE = {"a small model, ragged rows": 1e-4, "the model, a batch of the benchmark": 1e-3}
"""The relative difference of two gradients in fp32."""
COUNTED = 0.1
"""What the norms of two gradients in the precision of the benchmark may differ by, relatively."""

SIDES = ("ours", "trl", "plain")
LEAN: dict[str, dict[str, Any]] = {
    "checkpointing": {"checkpointing": True},
    "lora": {"lora": RANK},
    "lora, checkpointing": {"lora": RANK, "checkpointing": True},
}
"""Settings that save memory, by what the record calls them; ours and TRL's are measured with each."""
FEW_ROWS = 2
"""Rows of a micro-batch of the longest case, with about as many tokens as our ``token_budget``."""
FROZEN = "trl, lora, frozen weights in bf16"
"""As ours has them; TRL's default is fp32."""

Asked = dict[str, Any]
Row = dict[str, Any]


class Sides:
    """Asks the sides, each time in a fresh process."""

    def __init__(self, trl: Path, threads: int, tokenizer: str, precision: str) -> None:
        self._python = {"trl": str(trl), "ours": sys.executable, "plain": sys.executable}
        self._threads, self._tokenizer, self.precision = threads, tokenizer, precision

    def ask(self, side: str, model: str, groups: list[Row], **more: Any) -> Row:
        """One sample of ``side``, which is the first word of a longer name."""
        name = side.partition(",")[0]
        command = [self._python[name], HERE / "learner_sides.py", name]
        asked = {
            "model": model, "tokenizer": self._tokenizer, "groups": groups, "threads": self._threads, "lr": LR,
            "steps": 1, "micro_batch": MICRO_BATCH, "precision": self.precision, "checkpointing": False, "lora": 0,
            "gradients": "", "dtype": "float32",
        }  # fmt: skip
        env = environment(self._threads)
        with (
            tempfile.TemporaryDirectory(prefix=f"areal-{name}-") as out,
            Side(side, command, env=env, memory=False) as one,
        ):
            found = one.ask(asked | {"out": str(Path(out) / "run")} | more)
        print(f"    {side}: {found['seconds']:.2f} s, {found['peak_pss_mib']:.0f} MiB", flush=True)
        return {"side": side, **found}

    def floor(self, model: str) -> Row:
        """The machine's rate of the model's products now."""
        command = [sys.executable, str(HERE / "learner_floor.py"), model, str(self._threads), self.precision]
        env = environment(self._threads)
        found: Row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)
        return found


def gradients_of_small_model(sides: Sides, names: Sequence[str] = SIDES) -> Row:
    """The difference of the gradients on ragged groups, which are padded on the other sides."""
    with tempfile.TemporaryDirectory(prefix="areal-small-") as folder:
        return gradient_difference(sides, str(tiny_model(Path(folder), 512)), ragged(512), names)


def gradient_difference(sides: Sides, model: str, groups: list[Row], names: Sequence[str] = SIDES) -> Row:
    """How far the gradients of the other sides are from ours, in fp32, as a share of their norm."""
    import torch

    with tempfile.TemporaryDirectory(prefix="areal-gradients-") as folder:
        found: dict[str, dict[str, Any]] = {}
        trained: dict[str, int] = {}
        for side in names:
            path = Path(folder) / f"{side}.pt"
            answer = sides.ask(side, model, groups, precision="fp32", micro_batch=4, gradients=str(path))
            found[side], trained[side] = torch.load(path, weights_only=True), answer["trained"]
        own = found["ours"]
        norm = float(torch.cat([g.flatten() for g in own.values()]).norm())
        differ: dict[str, float] = {}
        for side, theirs in found.items():
            if theirs.keys() != own.keys():
                raise RuntimeError(f"{side} has gradients of {sorted(theirs.keys() ^ own.keys())} alone")
            apart = float(torch.cat([(theirs[n] - g).flatten() for n, g in own.items()]).norm())
            differ[side] = apart / norm
        return {"norm": norm, "relative_difference": differ, "trained": trained}


def compared(sides: Sides, model: str, case: Case, turn: int, steps: int) -> list[Row]:
    """One turn of a case: the floor, then each side."""
    groups = episodes(case, text_tokens(model), turn)
    measured = sides.floor(model)
    trained, least = case.rows * case.completion, least_tokens(groups)
    given = {
        "case": case.name, "turn": turn, "row_tokens": case.rows * (case.prompt + case.completion), "sampled": trained,
    }  # fmt: skip
    rows = []
    for side in SIDES:
        found = sides.ask(side, model, groups, steps=steps)
        own = floor_seconds(measured, tokens=found["tokens_forward"], scored=trained)
        own_cpu = floor_seconds(measured, tokens=found["tokens_forward"], scored=trained, of="cpu_seconds")
        floor = floor_seconds(measured, tokens=least, scored=trained)
        rows.append(given | found | {
            "least_tokens": least, "floor_seconds": round(floor, 4), "own_floor_seconds": round(own, 4),
            "share_of_floor": round(floor / found["seconds"], 3),
            "share_of_own_floor": round(own / found["seconds"], 3), "rates": measured,
            "share_of_own_floor_cpu": round(own_cpu / found["cpu_seconds"], 3),
        })  # fmt: skip
    return rows


def lean(sides: Sides, model: str, count: int) -> list[Row]:
    """Seconds and memory of settings that save memory, on the longest case with so many rows."""
    groups = episodes(replace(LONG, rows=count), text_tokens(model))
    rows = [
        sides.ask(f"{side}, {name}", model, groups, **changes)
        for name, changes in LEAN.items() for side in ("ours", "trl")
    ]  # fmt: skip
    rows.append(sides.ask(f"trl, {FEW_ROWS} rows a micro-batch", model, groups, micro_batch=FEW_ROWS))
    if sides.precision == "bf16":  # in fp32 ours keeps its frozen weights in fp32 as well
        rows.append(sides.ask(FROZEN, model, groups, lora=RANK, dtype="bfloat16"))
    return rows


def profiled(sides: Sides, model: str, count: int) -> None:
    """Print what our step on the longest case spends its time on."""
    found = sides.ask("ours", model, episodes(replace(LONG, rows=count), text_tokens(model)), profile=True)
    print(table([{"of the step": kind, "share": share} for kind, share in found["profile"].items()]))


def by_vocabulary(sides: Sides) -> list[Row]:
    """Seconds and memory of one small model by the size of its vocabulary."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="areal-vocabulary-") as folder:
        for vocabulary in VOCABULARIES:
            model = str(tiny_model(Path(folder), vocabulary))
            groups = episodes(Case(64, 64, 8), random_tokens(vocabulary))
            rows += [{"vocabulary": vocabulary, **sides.ask(side, model, groups, steps=3)} for side in SIDES]
    return rows


def of(rows: Sequence[Row], case: str, side: str) -> list[Row]:
    return [r for r in rows if r["case"] == case and r["side"] == side]


def middle(rows: Sequence[Row], key: str) -> float:
    return statistics.median(float(r[key]) for r in rows)


def summarize(rows: Sequence[Row]) -> list[Row]:
    """A line a case and side, medians over the turns."""
    lines = []
    for case, side in dict.fromkeys((r["case"], r["side"]) for r in rows):
        mine = of(rows, case, side)
        seconds, first = middle(mine, "seconds"), mine[0]
        lines.append({
            "case": case, "side": side, "seconds": round(seconds, 2), "trained/s": round(first["trained"] / seconds),
            "row tokens/s": round(first["row_tokens"] / seconds), "computed": first["tokens_forward"],
            "least": first["least_tokens"], "peak PSS, MiB": round(middle(mine, "peak_pss_mib")),
            "of the floor": round(middle(mine, "share_of_floor"), 3),
            "of its own": round(middle(mine, "share_of_own_floor"), 3),
            "of its own, CPU": round(middle(mine, "share_of_own_floor_cpu"), 3),
        })  # fmt: skip
    return lines


def growth(rows: Sequence[Row], vocabularies: Sequence[Row]) -> list[Row]:
    """What 1,000 more tokens of rows cost each side, in groups of 8, and 1,000 more entries of the vocabulary."""
    lengths = [c.name for c in CASES if c.group == LONG.group]
    lines = []
    for side in SIDES:
        short, long = of(rows, lengths[0], side), of(rows, lengths[-1], side)
        small, large = ([r for r in vocabularies if r["side"] == side][i] for i in (0, -1))
        tokens = (long[0]["row_tokens"] - short[0]["row_tokens"]) / 1000
        entries = (large["vocabulary"] - small["vocabulary"]) / 1000
        lines.append({
            "side": side,
            "s per 1,000 tokens": round((middle(long, "seconds") - middle(short, "seconds")) / tokens, 3),
            "MiB per 1,000 tokens": round((middle(long, "peak_pss_mib") - middle(short, "peak_pss_mib")) / tokens, 1),
            "ms per 1,000 entries": round(1000 * (large["seconds"] - small["seconds"]) / entries, 3),
            "MiB per 1,000 entries": round((large["peak_pss_mib"] - small["peak_pss_mib"]) / entries, 2),
        })  # fmt: skip
    return lines


def agreement(found: Row, of_what: str) -> list[Check]:
    """All gradients are one gradient: else the sides do not compute the same, and the comparison is void."""
    worst, goal = max(found["relative_difference"].values()), AGREE[of_what]
    same = len({*found["trained"].values()}) == 1
    return [
        Check(f"gradients in fp32 of {of_what}, relative difference from ours", worst, f"<= {goal}", worst <= goal),
        Check(f"trained tokens of {of_what}", found["trained"], "equal", same),
    ]


def counts(rows: Sequence[Row]) -> list[Check]:
    """Every side trained on all tokens of the completions, and found a gradient as long as ours."""
    wrong = [f"{r['side']}, {r['case']}" for r in rows if r["trained"] != r["sampled"]]
    found = [Check("samples that trained on other tokens", wrong, "none", not wrong)]
    apart = 0.0
    for case in dict.fromkeys(r["case"] for r in rows):
        ours = of(rows, case, "ours")
        for side in SIDES[1:]:
            pairs = zip(ours, of(rows, case, side), strict=True)
            apart = max([apart, *(abs(t["grad_norm"][0] / o["grad_norm"][0] - 1) for o, t in pairs)])
    name = "norm of the gradient, relative difference from ours at most"
    return [*found, Check(name, round(apart, 4), f"<= {COUNTED}", apart <= COUNTED)]


def memory_checks(rows: Sequence[Row], lean_rows: Sequence[Row]) -> list[Check]:
    """Peak PSS of ours over TRL's at equal settings."""
    found = []

    def check(name: str, ours: float, theirs: float, goal: float | None) -> None:
        share = round(ours / theirs, 3)
        said, holds = ("(told, no goal)", True) if goal is None else (f"<= {goal}", share <= goal)
        found.append(Check(f"peak PSS over TRL's, {name}", share, said, holds))

    for case in dict.fromkeys(r["case"] for r in rows):
        ours, theirs = (middle(of(rows, case, side), "peak_pss_mib") for side in ("ours", "trl"))
        check(f"{case}, both without checkpointing", ours, theirs, MEMORY)
    if not lean_rows:
        return found
    peak = {r["side"]: float(r["peak_pss_mib"]) for r in lean_rows}
    check("longest case, both with checkpointing", peak["ours, checkpointing"], peak["trl, checkpointing"], MEMORY)
    check("longest case, LoRA on both sides", peak["ours, lora"], peak["trl, lora"], LORA_MEMORY)
    both = "lora, checkpointing"
    check("longest case, LoRA and checkpointing on both", peak[f"ours, {both}"], peak[f"trl, {both}"], LORA_MEMORY)
    check("longest case, our LoRA, all of TRL's weights", peak["ours, lora"],
          middle(of(rows, LONG.name, "trl"), "peak_pss_mib"), None)  # fmt: skip
    if FROZEN in peak:
        check("longest case, LoRA on both sides, TRL's frozen weights in bf16 too", peak["ours, lora"], peak[FROZEN],
              None)  # fmt: skip
    few = f"trl, {FEW_ROWS} rows a micro-batch"
    check(f"longest case, TRL with {FEW_ROWS} rows a micro-batch", middle(of(rows, LONG.name, "ours"), "peak_pss_mib"),
          peak[few], None)  # fmt: skip
    return found


def speed_checks(rows: Sequence[Row]) -> list[Check]:
    """The share of the floor, and TRL's seconds over ours where prompts are long and groups large."""
    found = []
    for case in CASES:
        share = round(middle(of(rows, case.name, "ours"), "share_of_floor"), 3)
        found.append(Check(f"share of the floor, {case.name}", share, f">= {FLOOR}", share >= FLOOR))
    for case in CASES:
        trl, plain, ours = ([r["seconds"] for r in of(rows, case.name, s)] for s in ("trl", "plain", "ours"))
        ratio = paired_ratio(trl, ours)
        large = case.group >= 8 and case.prompt >= 4 * case.completion
        goal, holds = (f">= {SPEED}", ratio >= SPEED) if large else ("> 1", ratio > 1)
        found.append(Check(f"seconds of TRL's update over ours, {case.name}", ratio, goal, holds))
        ratio = paired_ratio(plain, ours)
        found.append(Check(f"seconds of the plain loop's update over ours, {case.name}", ratio, "> 1", ratio > 1))
    return found


def work_of(
    sides: Sides, model: str, *, turns: int, steps: int, count: int, quick: bool
) -> dict[str, Callable[[], Any]]:
    """The parts of the record by name, after the gradients, with ``count`` rows a case."""
    if quick:
        return {"turn 0": partial(compared, sides, model, QUICK, 0, 1)}
    work: dict[str, Callable[[], Any]] = {
        f"{case.name}, turn {turn}": partial(compared, sides, model, replace(case, rows=count), turn, steps)
        for turn in range(turns) for case in CASES
    }  # fmt: skip
    return work | {"saving memory": partial(lean, sides, model, count), "vocabulary": partial(by_vocabulary, sides)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--venv", type=Path, default=Path("/tmp/trl-venv"), help="TRL's virtual environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the processor has it"
    )
    parser.add_argument("--turns", type=int, default=2, help="processes of each side and case")
    parser.add_argument("--steps", type=int, default=1, help="measured steps a process")
    parser.add_argument("--rows", type=int, choices=(8, 16, 32), default=16, help="rows of a case")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no part later; the next run goes on. 0: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    from areal_agents.models import resolve
    from areal_agents.utils.precision import number_format

    model, quick = str(resolve(options.model)), options.quick
    precision = number_format(options.precision)
    if options.profile:
        profiled(Sides(Path(), options.threads, model, precision), model, options.rows)
        return 0
    sides = Sides(trl_python(options.venv), options.threads, model, precision)
    sizes = {
        "model": model, "turns": options.turns, "steps": options.steps, "quick": quick, "precision": precision,
        "rows": options.rows,
    }  # fmt: skip
    kept = Kept(options.json, sizes | {"threads": options.threads})
    small, own = AGREE
    gradients = {
        small: kept.part("gradients", lambda: gradients_of_small_model(sides)),
        own: kept.part(own, lambda: gradient_difference(sides, model, episodes(QUICK, text_tokens(model)))),
    }
    found = [check for of_what, differ in gradients.items() for check in agreement(differ, of_what)]
    if not all(check.holds for check in found):
        write(None, "learner", [], found)
        print("The sides do not compute the same: nothing else is measured.")
        return 1
    work = work_of(sides, model, turns=options.turns, steps=options.steps, count=options.rows, quick=quick)
    parts = do_parts(work, kept, Patience(0.0 if quick else 120.0), options.minutes)
    if parts is None:
        return 2
    rows = [row for name, part in parts.items() if "turn" in name for row in part["found"]]
    lean_rows, vocabularies = ([] if quick else parts[name]["found"] for name in ("saving memory", "vocabulary"))
    print(table(summarize(rows)))
    found += [*counts(rows), *memory_checks(rows, lean_rows), *([] if quick else speed_checks(rows))]
    grown = [] if quick else growth(rows, vocabularies)
    print(table(grown))
    write(options.json, "learner", rows, found, gradients=gradients, summary=summarize(rows), growth=grown,
          saving_memory=lean_rows, by_vocabulary=vocabularies, loads=loads(parts), threads=options.threads,
          precision=precision, rows_a_case=options.rows, learning_rate=LR, micro_batch=MICRO_BATCH,
          lora_rank=RANK)  # fmt: skip
    kept.end()
    return 0 if all(check.holds for check in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
