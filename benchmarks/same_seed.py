"""Two runs of one seed: how much of what they sample is the same, and what it costs to have all of it the same?

    python benchmarks/same_seed.py [--json benchmarks/results/same_seed.json]
    python benchmarks/same_seed.py --quick      # some minutes: one small evaluation in each mode

An evaluation and a ``sync`` training, each twice, in fp32 and bf16, with and without ``engine.deterministic``; and an
evaluation whose second run decodes 5 sequences at once instead of 48, which is what rounding alone can change. An
episode's tokens are those that it sampled, turn after turn. Two runs have a token in common as long as they have had
all tokens of the episode before it in common. The machine's load changes which requests share a batch, so it may
change the shares without ``deterministic``; it is no reason for a share with it to be below 1.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import Progress, table
from record import Check, Kept, write

from areal_agents import TrainConfig, evaluate, train
from areal_agents.settings.config import EngineConfig, RolloutConfig
from areal_agents.tracking.trajectories import read_records
from areal_agents.types import Ids

ENV, SEED = "areal/Arithmetic-v0", 3
MODES = [(precision, exact) for precision in ("fp32", "bf16") for exact in (False, True)]
OTHER_BATCH = "evaluation, 48 and 5 at once"
Sampled = dict[tuple[int, str], list[Ids]]


def sampled(out: Path, kind: str) -> Sampled:
    """The ids of every turn, by step and episode."""
    return {
        (r.step, r.trajectory.id): [t.completion.ids for t in r.trajectory.turns] for r in read_records(out, kind=kind)
    }


def shares(one: Sampled, two: Sampled) -> dict[str, Any]:
    """How much two runs have in common."""
    episodes = sorted(one.keys() | two.keys())
    same = sum(one.get(e) == two.get(e) for e in episodes)
    tokens = common = 0
    for episode in episodes:
        a, b = (tuple(i for ids in run.get(episode, []) for i in ids) for run in (one, two))
        tokens += max(len(a), len(b))
        common += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first = [(one.get(e) or [()])[0] == (two.get(e) or [()])[0] for e in episodes]
    return {
        "episodes": len(episodes), "same_episodes": round(same / len(episodes), 4),
        "same_tokens": round(common / tokens, 4), "same_first_turns": round(sum(first) / len(first), 4),
        "sampled_tokens": tokens,
    }  # fmt: skip


def evaluated(out: Path, precision: Any, exact: bool, n: int, k: int, max_batch: int) -> Sampled:
    asyncio.run(
        evaluate(
            ENV, model="smollm2", n=n, k=k, temperature=1.0, seed=SEED, out=out,
            engine=EngineConfig(precision=precision, deterministic=exact, max_batch=max_batch),
            rollout=RolloutConfig(max_turn_tokens=64),
        )
    )  # fmt: skip
    return sampled(out, "eval")


def trained(out: Path, precision: str, exact: bool, steps: int) -> Sampled:
    config = {
        "steps": steps, "seed": SEED, "out": str(out), "model": {"max_context": 512}, "env": {"id": ENV},
        "engine": {"precision": precision, "deterministic": exact}, "learner": {"precision": precision},
        "rollout": {"mode": "sync", "groups": 3, "group_size": 4, "max_turn_tokens": 64},
        "eval": {"n": 1, "baseline": False}, "checkpoint": {"every": 0},
    }  # fmt: skip
    asyncio.run(train(TrainConfig.model_validate(config), console=False))
    return sampled(out, "train")


def twice(what: str, precision: str, exact: bool, sizes: dict[str, int]) -> dict[str, Any]:
    """One sample: two runs of one seed."""
    runs, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="areal-same-seed-") as folder:
        for name in ("one", "two"):
            start, out = time.monotonic(), Path(folder) / name
            if what.startswith("evaluation"):
                batch = 5 if what == OTHER_BATCH and runs else 48
                runs.append(evaluated(out, precision, exact, sizes["n"], sizes["k"], batch))
            else:
                runs.append(trained(out, precision, exact, sizes["steps"]))
            seconds.append(round(time.monotonic() - start, 1))
    row = {"what": what, "precision": precision, "deterministic": exact}
    return row | shares(*runs) | {"seconds": seconds}


def checks(samples: list[dict[str, Any]]) -> list[Check]:
    """With ``deterministic`` everything is the same, without it most of an evaluation is."""
    found = []
    for s in samples:
        name = f"same episodes, {s['what']}, {s['precision']}" + (", deterministic" if s["deterministic"] else "")
        if s["deterministic"]:
            found.append(Check(name, s["same_episodes"], "== 1", s["same_episodes"] == 1.0))
        elif s["what"] == "evaluation":  # of the others there is nothing to promise
            found.append(Check(name, s["same_episodes"], ">= 0.5", s["same_episodes"] >= 0.5))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sizes = {"n": 4, "k": 2, "steps": 1} if options.quick else {"n": 16, "k": 4, "steps": 3}
    cases = [("evaluation", *mode) for mode in MODES]
    if not options.quick:
        cases += [(OTHER_BATCH, precision, False) for precision in ("fp32", "bf16")]
        cases += [("sync training", *mode) for mode in MODES]
    kept, progress, samples = Kept(options.json, sizes), Progress(len(cases)), []
    for case in cases:
        name = f"{case[0]}, {case[1]}, {'deterministic' if case[2] else 'default'}"
        samples.append(kept.part(name, lambda c=case: twice(*c, sizes)))
        progress(f"{name}: {samples[-1]['same_episodes']} of {samples[-1]['episodes']} episodes the same")
    print(table([{k: v for k, v in s.items() if k != "seconds"} for s in samples]))
    found = checks(samples)
    write(options.json, "same_seed", samples, found, sizes=sizes)
    kept.end()
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
