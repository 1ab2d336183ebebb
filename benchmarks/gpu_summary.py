"""What the rows of gpu.py's parts say: tables to read, and the goals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gpu_parts import Outcome, Row, is_attention
from measure import table
from record import Check

KERNEL_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
"""Bounds on the relative error of attention alone. A mask that is off by one key errs by some tenths."""
GRADIENT_RATIO = 1.5
"""Bound on the error of the tree's bf16 gradient, as a multiple of transformers' own."""
FP32_GRADIENT = 1e-3
FP32_PROBE = 1e-3
"""Bound on |Δ log p| in fp32: what an engine's ``Prover`` holds it to."""


def rows_of(found: Sequence[Outcome], part: str, **wanted: Any) -> list[Row]:
    """Return the rows of ``part`` whose values are those ``wanted``."""
    rows = [row for outcome in found if outcome.name == part for row in outcome.rows]
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def peak_tflops(found: Sequence[Outcome]) -> tuple[float | None, str]:
    """Return what MFU is a share of: the card's peak by its data sheet, else the product that it reached."""
    for row in rows_of(found, "card", what="card"):
        if row["peak_tflops"]:
            return float(row["peak_tflops"]), "the data sheet"
    for row in rows_of(found, "card", what="bf16 product"):
        return float(row["tflops"]), "the product measured here"
    return None, "not known"


def summarize(found: Sequence[Outcome]) -> str:
    """Return the tables of all parts; a part that gave no row of a kind has no table of it."""
    peak, source = peak_tflops(found)

    def mfu(row: Row) -> str:
        return f"{100 * row['tflops'] / peak:.1f}" if peak and "tflops" in row else "-"

    def names(row: Row) -> str:
        return ", ".join(name for name, *_ in attention_kernels(row))[:100] or "-"

    def busy(row: Row) -> str:
        return f"{100 * row['kernel_seconds'] / row['seconds']:.0f}" if row.get("kernel_seconds") else "-"

    def cells(row: Row, *keys: str) -> dict[str, Any]:
        return {key: row.get(key, "-") for key in keys}

    sections: list[tuple[str, list[dict[str, Any]]]] = [
        ("card", rows_of(found, "card", what="card")),
        ("attention alone, relative errors", [
            cells(r, "format", "heads", "head_dim", "output_error", "gradient_errors")
            for r in rows_of(found, "attention", what="kernel")
        ]),
        ("gradient, relative errors against fp32 without a tree", rows_of(found, "attention", what="gradient")),
        (f"one pack, forward and backward; MFU as a share of {source}", [
            cells(r, "model", "tokens", "rows", "fits", "seconds", "tokens_per_s", "tflops", "peak_gib")
            | {"MFU %": mfu(r), "kernels %": busy(r), "attention": names(r)}
            for r in rows_of(found, "attention", what="pack")
        ]),
        ("a step of two packs", [
            cells(r, "model", "gradient_checkpointing", "chunk", "pack", "fits", "seconds", "tokens_per_s", "tflops",
                  "peak_gib") | {"MFU %": mfu(r)}
            for r in rows_of(found, "step", what="step")
        ]),
        ("largest pack that fits", rows_of(found, "step", what="largest pack")),
        ("weights", [
            cells(r, "model", "what", "seconds", "gb_per_s", "first_seconds", "check_seconds", "equal")
            for r in rows_of(found, "weights") if r["what"] != "handed to another process"
        ]),
        ("weights handed to another process", rows_of(found, "weights", what="handed to another process")),
        ("process groups, seconds", [
            cells(r, "case", "rank", "outcome", "deadline", "after", "made", "sent", "ended", "seconds", "raised",
                  "failed")
            for r in rows_of(found, "groups")
        ]),
        ("publish probe, |Δ log p| of a bf16 forward, nats", rows_of(found, "probe", what="version")),
        ("publish probe, device against processor in fp32", rows_of(found, "probe", what="fp32")),
        ("publish probe, cost", rows_of(found, "probe", what="cost")),
        ("parts", [cells(vars(o), "name", "status", "seconds") for o in found]),
    ]  # fmt: skip
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections if rows)


def attention_kernels(row: Row) -> list[list[Any]]:
    """Return the kernels of ``row`` that compute attention, by their names."""
    return [kernel for kernel in row.get("kernels", []) if is_attention(kernel[0])]


def checks(found: Sequence[Outcome], *, on_gpu: bool) -> list[Check]:
    """Return the goals. Those of a part without rows are not met: nothing was shown."""
    held = [Check(f"part {o.name}", o.status, "done", o.status == "done", o.reason.splitlines()[0] if o.reason else "")
            for o in found]  # fmt: skip
    ran = {o.name for o in found}

    def add(part: str, name: str, rows: Iterable[Row], error: Callable[[Row], float], bound: float, goal: str) -> None:
        values = [error(row) for row in rows]
        worst = max(values, default=math.inf)
        if part in ran:  # JSON has no infinity
            value = worst if math.isfinite(worst) else None
            held.append(Check(name, value, goal, worst <= bound, "" if values else "no row says it"))

    for kind, bound in KERNEL_ERROR.items():
        add("attention", f"error of attention, {kind}", rows_of(found, "attention", what="kernel", format=kind),
            lambda r: max(r["output_error"], *r["gradient_errors"]), bound, f"<= {bound:g}")  # fmt: skip
    gradients = rows_of(found, "attention", what="gradient")
    add("attention", "error of the gradient in fp32", gradients, lambda r: r["fp32_tree"], FP32_GRADIENT,
        f"<= {FP32_GRADIENT:g}")  # fmt: skip
    add("attention", "error of the gradient in bf16 over transformers' own", gradients,
        lambda r: round(r["bf16_tree"] / r["bf16_transformers"], 2), GRADIENT_RATIO,
        f"<= {GRADIENT_RATIO:g}")  # fmt: skip
    packs = rows_of(found, "attention", what="pack", fits=True)
    if on_gpu:
        add("attention", "packs whose attention is not flash attention's", packs,
            lambda r: float(not any("flash" in k[0].lower() for k in r["kernels"])), 0, "== 0")  # fmt: skip
    add("attention", "packs without the tree layout", packs, lambda r: float(not r["tree_chosen"]), 0, "== 0")
    add("step", "steps without a finite gradient", rows_of(found, "step", what="step", fits=True),
        lambda r: r["skipped"], 0, "== 0")  # fmt: skip
    arrived = [r for r in rows_of(found, "weights") if "equal" in r]
    add("weights", "weights that arrived changed", arrived, lambda r: float(not r["equal"]), 0, "== 0")
    gone = [r for case in ("missing", "lost") for r in rows_of(found, "groups", case=case)]
    add("groups", "seconds of a missing member over the deadline", gone,
        lambda r: r["after"] / r["deadline"] if r["outcome"] == "raised" else math.inf, 1.5, "<= 1.5")  # fmt: skip
    alone = [r for case in ("alone", "alone again") for r in rows_of(found, "groups", case=case)]
    add("groups", "groups of one that failed", alone, lambda r: float(not r.get("equal")), 0, "== 0")
    add("probe", "versions that the prover refused", rows_of(found, "probe", what="version"),
        lambda r: float(bool(r["refused"])), 0, "== 0")  # fmt: skip
    add("probe", "max |Δ log p| of the probe, device against processor", rows_of(found, "probe", what="fp32"),
        lambda r: r["max"], FP32_PROBE, f"<= {FP32_PROBE:g}")  # fmt: skip
    return held
