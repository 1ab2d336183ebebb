"""``make demo`` on a clean clone, once a seed: how much does RL alone add, and how long does all of it take?

    python benchmarks/demo.py [--seeds 0 1 2] [--json benchmarks/results/demo.json]
    python benchmarks/demo.py --quick        # a minute or two: two steps on few tasks in this checkout

A full run clones the committed tree, with an empty model cache: set-up, model download and conversion are in the
total. pip's own download cache is used as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, Check, write

QUICK = (
    "--steps 2 --eval.n 8 --warm_start.demonstrations 16 --rollout.groups 1 --rollout.group_size 4 "
    "--rollout.concurrency 8"
)


def run(seed: int, *, quick: bool) -> dict[str, Any]:
    """One demo; its summary, with the wall clock around everything."""
    with tempfile.TemporaryDirectory(prefix="areal-demo-") as temporary:
        clone = Path(temporary) / "clone"
        out = Path(temporary) / "run"
        environment = dict(os.environ)
        start = time.time()
        if quick:
            clone = ROOT
        else:
            subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
            environment["AREAL_AGENTS_CACHE"] = str(Path(temporary) / "cache")
        arguments = f"--seed {seed} --out {out} {QUICK if quick else ''}"
        subprocess.run(["make", "-C", str(clone), "demo", f"DEMO_ARGS={arguments}"], check=True, env=environment)
        summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in metrics if row["kind"] == "train"]
        return summary | {
            "seed": seed,
            "wall_seconds": round(time.time() - start, 1),
            "training_reward": [row["reward"] for row in steps],
            "step_seconds": [round(row["step_seconds"], 2) for row in steps],
            "age_max": max(row["age_max"] for row in steps),
        }


def checks(samples: list[dict[str, Any]]) -> list[Check]:
    """The goals, over every seed."""
    gain = min(s["held_out"]["after_rl"] - s["held_out"]["warm_start"] for s in samples)
    start = max(s["held_out"]["warm_start"] for s in samples)
    end = min(s["held_out"]["after_rl"] for s in samples)
    slowest = max(s["wall_seconds"] for s in samples)
    n = min(s["n"] for s in samples)
    return [
        Check("seeds", len(samples), ">= 3", len(samples) >= 3),
        Check("held-out tasks", n, "== 128", n == 128),
        Check("pass@1 gained through RL alone, worst seed", round(gain, 4), ">= 0.30", gain >= 0.30),
        Check("pass@1 after the warm start, highest seed", round(start, 4), "< 0.5", start < 0.5),
        Check("pass@1 after RL, worst seed", round(end, 4), ">= 0.85", end >= 0.85),
        Check("minutes including set-up, slowest seed", round(slowest / 60, 2), "< 15", slowest < 900),
    ]


def quick_checks(samples: list[dict[str, Any]]) -> list[Check]:
    """What must hold whatever the timing and the luck."""
    (s,) = samples
    return [
        Check("learner steps", len(s["step_seconds"]), "== 2", len(s["step_seconds"]) == 2),
        Check("oldest token trained on, in versions", s["age_max"], "<= 1", s["age_max"] <= 1),
        Check("valid calls rise by the warm start", s["valid_call_rate"], "before <= warm_start",
              s["valid_call_rate"]["before"] <= s["valid_call_rate"]["warm_start"]),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    samples = [run(seed, quick=options.quick) for seed in (options.seeds[:1] if options.quick else options.seeds)]
    found = quick_checks(samples) if options.quick else checks(samples)
    write(options.json, "demo", samples, found)
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
