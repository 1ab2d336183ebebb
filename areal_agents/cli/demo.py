"""The demo, which trains the embedded model to use a Python tool and shows what it learned.

    areal-agents demo [--seed 0] [--out runs/demo] [--SECTION.NAME VALUE …]

It evaluates on held-out tasks, warm-starts on scripted demonstrations, trains by asynchronous RL, evaluates again, and
leaves ``summary.json`` and ``learning_curve.png`` in the run's folder.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal_agents import settings
from areal_agents.errors import ConfigError
from areal_agents.evaluation.report import EvalReport
from areal_agents.models import resolve
from areal_agents.tracking.plot import HeldOut, plot
from areal_agents.trainer.loop import RunResult, train
from areal_agents.trainer.preflight import require_runnable
from areal_agents.trainer.run_folder import RunFolder
from areal_agents.utils.files import save_whole
from areal_agents.utils.packages import require_package

NAMES = {"before": "before", "warm_start": "after warm start", "after_rl": "after RL"}


def demo(overrides: Sequence[str] = (), *, resume: bool = False) -> dict[str, Any]:
    """Run the demo and return its summary.

    ``overrides`` are settings, as on the command line of ``train``. An earlier demo's folder is replaced, or gone on
    with (``resume``). Any other run in the way is refused.
    """
    started = float(os.environ.get("AREAL_DEMO_START", time.time()))
    setup = time.time() - started
    config = settings.load("demo", overrides)
    require_package("matplotlib", "the demo's plot")
    require_runnable(config)
    resolve(config.model.path)  # both before an earlier demo is removed
    claim(config.out, resume=resume)
    result = asyncio.run(train(config, resume=resume))
    summary = summarize_run(result, setup=setup, total=time.time() - started)
    save_whole(result.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    curve = plot(result.out, _points(result.reports, config.steps), title="areal/Arithmetic-v0, SmolLM2-135M-Instruct")
    print(report(result, summary, curve))
    return summary


def claim(out: Path, *, resume: bool) -> None:
    """Make ``out`` this demo's folder.

    It is a new folder, or an earlier demo's, which is emptied unless ``resume``. Raises ConfigError where it holds
    anything else, or where a process is writing it.
    """
    marker = out / ".demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ConfigError(f"{out} is no demo's folder and not empty: choose another --out, or remove it")
    with RunFolder(out):  # its lock file stays: a process that opened it a moment ago holds the same one
        if not resume:
            for path in out.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        marker.touch()


def summarize_run(result: RunResult, *, setup: float, total: float) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Rates are in [0, 1], times in seconds.
    """
    reports = result.reports
    return {
        "n": reports["after_rl"].n,
        "held_out": {name: r.pass_at_1 for name, r in reports.items()},
        "ci95": {name: list(r.ci95) for name, r in reports.items()},
        "valid_call_rate": {name: r.valid_call_rate for name, r in reports.items()},
        "accuracy_given_valid_call": {name: r.accuracy_given_valid for name, r in reports.items()},
        "seconds": {"setup": round(setup, 1), "total": round(total, 1)},
    }


def report(result: RunResult, summary: dict[str, Any], curve: Path) -> str:
    """Write what the demo prints at its end."""
    reports = {NAMES.get(label, label): report for label, report in result.reports.items()}
    named = RunResult(result.out, result.model, reports, result.seconds)
    out = result.out
    return f"""
Held-out tasks (n = {summary["n"]}, greedy, never seen in training)

{named.table()}

pass | valid is the accuracy of the episodes whose tool calls were all valid: the skill without the format.
Finished in {summary["seconds"]["total"] / 60:.1f} minutes, {summary["seconds"]["setup"] / 60:.1f} of them set-up.

metrics       {out / "metrics.jsonl"}  and  tensorboard --logdir {out / "tensorboard"}
trajectories  {out / "trajectories"}
model         {result.model}
plot          {curve}

Next:
  areal-agents eval areal/Arithmetic-v0 --model {result.model} --k 4 --temperature 1
  areal-agents train demo --out runs/mine --rollout.group_size 12 --learner.lr 2e-6
  README.md shows how to register an environment of your own in under 30 lines."""


def _points(reports: dict[str, EvalReport], steps: int) -> list[HeldOut]:
    where = {"before": 0, "warm_start": 0, "after_rl": steps}
    where |= {label: int(label.removeprefix("step_")) for label in reports if label.startswith("step_")}
    return [HeldOut(NAMES.get(k, k), where[k], r.pass_at_1, *r.ci95) for k, r in reports.items()]
