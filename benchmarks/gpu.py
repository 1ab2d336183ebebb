"""Everything of the learner that only a GPU can show: attention, a step, weights, process groups, the publish probe.

    python benchmarks/gpu.py --json FILE                      # at most ten minutes on one card of 80 GB
    python benchmarks/gpu.py --json FILE --quick              # about five: fewer models and sizes
    python benchmarks/gpu.py --device cpu --tiny --quick      # every part on a CPU, within a minute; measures nothing

It needs torch >= 2.11, transformers >= 5.17, numpy, safetensors, pydantic and gymnasium, and no network, vLLM or
installation of this package: models are drawn at random in the shapes of Qwen2.5 0.5B, 1.5B and 3B. Each part is a
process of its own with a time limit (``gpu_parts.py``). One that fails or is late is recorded with its reason and the
rows that it had, and the others go on. Out of memory is a result. The record has every row, and the card, driver,
versions and commit (``--commit`` where there is no git). Exit code 0: all goals hold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_parts import Outcome, Part, Row, Settings, run
from gpu_summary import checks, summarize
from record import commit, write

PARTS = (
    Part("card", "gpu_card.py", 45),
    Part("attention", "gpu_attention.py", 110),
    Part("step", "gpu_step.py", 230),
    Part("groups", "gpu_groups.py", 70),
    Part("weights", "gpu_weights.py", 60),
    Part("probe", "gpu_probe.py", 45),
)
SECONDS = 560.0
"""For all parts, the sum of their limits: a call on a lent machine ends after 600."""


def run_parts(parts: Sequence[Part], settings: Settings, *, seconds: float) -> list[Outcome]:
    """Run ``parts`` one after the other for at most ``seconds`` together."""
    end = time.monotonic() + seconds
    found: list[Outcome] = []
    for part in parts:
        left = end - time.monotonic()
        if left < 1:
            found.append(Outcome(part.name, "timed out", f"no time was left of {seconds:.0f} s", 0.0, []))
        else:
            found.append(run(part, settings, seconds=min(part.seconds, left)))
        print(f"{part.name}: {found[-1].status} after {found[-1].seconds} s. {found[-1].reason}", flush=True)
    return found


def card_of(found: Sequence[Outcome]) -> Row:
    """Return the row about the card, empty where that part failed."""
    return next((row for outcome in found for row in outcome.rows if row.get("what") == "card"), {})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: shows that every part runs, measures nothing")
    parser.add_argument("--quick", action="store_true", help="fewer models and sizes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--only", choices=[part.name for part in PARTS], action="append", help="this part alone")
    parser.add_argument("--commit", help="what to record as the commit; default: what git says")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    settings = Settings(options.device, options.tiny, options.quick)
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    found = run_parts(parts, settings, seconds=options.seconds)
    print(summarize(found))
    samples: list[dict[str, Any]] = [{"part": o.name, **row} for o in found for row in o.rows]
    held = checks(found, on_gpu=options.device == "cuda")
    write(
        options.json, "gpu", samples, held, settings=asdict(settings), card=card_of(found),
        commit=options.commit or commit(),
        parts=[{name: value for name, value in asdict(o).items() if name != "rows"} for o in found],
    )  # fmt: skip
    return 0 if all(check.holds for check in held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
