"""math-verify in a process of its own for ``benchmarks/verifier.py``."""

from __future__ import annotations

import time
from typing import Any

from measured_process import serve


def handle(asked: dict[str, Any]) -> dict[str, Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(), ExprExtractionConfig()]
    parse("$x$", targets)
    scores, ms = [], []
    start = time.perf_counter()
    for row in asked["rows"]:
        one = time.perf_counter()
        options = {"float_rounding": row["options"]["precision"]} if "precision" in row["options"] else {}
        gold, pred = (parse(row[key], targets) for key in ("gold", "pred"))
        scores.append(int(verify(gold, pred, **options)))
        ms.append(1000 * (time.perf_counter() - one))
    return {"scores": scores, "ms": ms, "wall": time.perf_counter() - start}


if __name__ == "__main__":
    serve(handle)
