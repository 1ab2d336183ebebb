"""One whole synchronous GRPO step, generation and update, against TRL's GRPOTrainer.

    python benchmarks/trl_step.py [--json benchmarks/results/trl_step.json]
    python benchmarks/trl_step.py --quick      # small steps, one turn, no goals on time

Same model folder, four questions × eight completions of at most 64 tokens, temperature 1, bf16 products, two threads.
Each turn is a fresh process of each side: one warm-up step, then the measured ones, from one step's end to the next.
Completions end where the model ends them, on both sides; the tokens sampled are recorded beside the seconds.
TRL lives in a virtual environment of its own, made here. Which of TRL's settings is fastest is found first; beside it
TRL's own defaults are measured, and beside our defaults our setting that saves memory. Ours and TRL's fastest setting
are also measured behind long instructions: prompts of more than four times the completions' length.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Progress, summary, table
from measured_process import Side
from record import Check, write
from text_envs import LONG_SYSTEM, SYSTEM, SingleTurn, messages, questions

HERE = Path(__file__).resolve().parent
PROMPTS, GROUP, TOKENS, LR = 4, 8, 64, 1e-6
REQUIREMENTS = ("torch==2.13.0", "trl==1.16.*", "peft==0.21.*")
SPEED, MEMORY = 2.0, 0.8
LONG, LONG_SPEED, LONG_PROMPT = ", long prompts", 3.0, 4
"""The end of a side's name, its goal, and how many times as long as a completion a prompt is at least."""
SAVING = {"gradient_checkpointing": True}

# dtype float32: fp32 master weights under bf16 autocast, as ours. dtype bfloat16: weights and moments in bf16 too.
# TRL's own defaults are the first: checkpointing on, eight rows a micro-batch.
CANDIDATES = (
    {"dtype": "float32", "gradient_checkpointing": True, "micro_batch": 8},
    {"dtype": "float32", "gradient_checkpointing": False, "micro_batch": 8},
    {"dtype": "float32", "gradient_checkpointing": False, "micro_batch": 32},
    {"dtype": "bfloat16", "gradient_checkpointing": False, "micro_batch": 8},
    {"dtype": "bfloat16", "gradient_checkpointing": False, "micro_batch": 32},
)


def trl_python(venv: Path) -> Path:
    """The interpreter of TRL's environment; made and filled where it is not there."""
    python, stamp = venv / "bin" / "python", venv / ".trl_step"
    if stamp.exists() and stamp.read_text().split() == list(REQUIREMENTS):
        return python
    print(f"making {venv} with {', '.join(REQUIREMENTS)} (minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    stamp.write_text("\n".join(REQUIREMENTS))
    return python


def environment(threads: int) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")])),
    }  # fmt: skip


def steps_of(answer: dict[str, Any]) -> list[dict[str, float]]:
    """The measured steps: all but the first, each from the end of the one before to its own."""
    ends, tokens = answer["step_ends"], answer["tokens"]
    return [
        {"seconds": round(ends[i] - ends[i - 1], 3), "tokens": tokens[i]} for i in range(1, len(ends))
    ]  # fmt: skip


def run(name: str, python: Path | str, asked: dict[str, Any], threads: int) -> dict[str, Any]:
    """One turn of one side in a fresh process: its measured steps and its peak memory."""
    command = [python, HERE / "trl_sides.py", name]
    env = environment(threads)
    with tempfile.TemporaryDirectory(prefix=f"areal-{name}-") as out, Side(name, command, env=env) as side:
        answer = side.ask(asked | {"out": str(Path(out) / "run")})
        ends = answer["step_ends"]
        if len(ends) != asked["steps"] or not all(g > 0 for g in answer["grad_norm"]):
            raise RuntimeError(f"side {name} made {len(ends)} of {asked['steps']} steps: {answer}")
        return {
            "side": name, "steps": steps_of(answer), "peak_pss_mib": side.memory.peak_mib(),
            "peak_pss_mib_measured_steps": side.memory.peak_mib(ends[0], ends[-1]), **answer,
        }  # fmt: skip


def median_seconds(sample: dict[str, Any]) -> float:
    return statistics.median(float(step["seconds"]) for step in sample["steps"])


def explore(python: Path, asked: dict[str, Any], threads: int, progress: Progress) -> list[dict[str, Any]]:
    """One measured step of each of TRL's candidates, fastest first."""
    found = []
    for settings in CANDIDATES:
        sample = run("trl", python, asked | {"steps": 2, "settings": settings}, threads)
        found.append(sample)
        progress(f"TRL {settings}: {median_seconds(sample):.1f} s, {sample['peak_pss_mib']:.0f} MiB")
    return sorted(found, key=median_seconds)


def opening(instructions: str, environment: str) -> dict[str, Any]:
    """What a side is asked about prompts."""
    return {"env": environment, "messages": [messages(q, instructions) for q in questions("train", SingleTurn.count)]}


def shortest_prompt(model: str, asked: dict[str, Any]) -> int:
    """The tokens of the shortest of the prompts."""
    from areal_agents.chat.format import ChatFormat
    from areal_agents.types import system, user

    fmt = ChatFormat.load(Path(model))
    return min(len(fmt.first_prompt([system(a["content"]), user(b["content"])])) for a, b in asked["messages"])


def checks(samples: list[dict[str, Any]], *, goal: bool) -> list[Check]:
    """Speed and memory, medians over turns; sampled tokens must be comparable."""
    by = {name: [s for s in samples if s["side"] == name] for name in dict.fromkeys(s["side"] for s in samples)}
    tokens = {n: statistics.mean(step["tokens"] for s in runs for step in s["steps"]) for n, runs in by.items()}
    memory = {n: statistics.median(s["peak_pss_mib_measured_steps"] for s in runs) for n, runs in by.items()}

    def faster(ours: str, trl: str) -> float:
        pairs = zip(by[ours], by[trl], strict=True)
        return round(statistics.median(median_seconds(t) / median_seconds(o) for o, t in pairs), 3)

    def comparable(more: str) -> Check:
        volume = round(tokens["ours" + more] / tokens["trl" + more], 3)
        return Check(f"tokens sampled a step, ours over TRL's{more}", volume, "0.9 to 1.1", 0.9 <= volume <= 1.1)

    speed = faster("ours", "trl")
    found = [
        comparable(""),
        Check("TRL's weights changed", True, "all runs", all(s["settings"]["weights_changed"] for s in by["trl"])),
    ]
    if not goal:
        return [*found, Check("seconds of TRL's step over ours", speed, "> 1", speed > 1)]
    for ours in ("ours", "ours, saving memory"):
        for trl in ("trl", "trl, its defaults"):
            if ours not in by or trl not in by:
                continue
            name = f"({ours}; {'its fastest setting' if trl == 'trl' else 'its defaults'})"
            speed, share = faster(ours, trl), round(memory[ours] / memory[trl], 3)
            found += [
                Check(f"seconds of TRL's step over ours {name}", speed, f">= {SPEED}", speed >= SPEED),
                Check(f"peak PSS over TRL's, measured steps {name}", share, f"<= {MEMORY}", share <= MEMORY),
            ]
    if "ours" + LONG in by:
        speed = faster("ours" + LONG, "trl" + LONG)
        name = f"seconds of TRL's step over ours{LONG}, G = {GROUP}"
        found += [comparable(LONG), Check(name, speed, f">= {LONG_SPEED}", speed >= LONG_SPEED)]
    return found


def report(samples: list[dict[str, Any]]) -> str:
    rows = []
    for name in dict.fromkeys(s["side"] for s in samples):
        mine = [s for s in samples if s["side"] == name]
        seconds = summary([step["seconds"] for s in mine for step in s["steps"]])
        tokens = [step["tokens"] for s in mine for step in s["steps"]]
        rate = statistics.median(step["tokens"] / step["seconds"] for s in mine for step in s["steps"])
        rows.append({
            "side": name, "steps": seconds["n"], "seconds": seconds["median"], "min": seconds["min"],
            "max": seconds["max"], "tokens a step": round(statistics.mean(tokens)), "tokens/s": round(rate, 1),
            "peak MiB": statistics.median(s["peak_pss_mib_measured_steps"] for s in mine),
            "with load and save": statistics.median(s["peak_pss_mib"] for s in mine),
        })  # fmt: skip
    return table(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--venv", type=Path, default=Path("/tmp/trl-venv"), help="TRL's virtual environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2, help="processes of each side")
    parser.add_argument("--steps", type=int, default=2, help="measured steps a process")
    parser.add_argument("--candidate", type=int, choices=range(len(CANDIDATES)), help="TRL's settings; none are tried")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    from areal_agents.models import resolve

    python = trl_python(options.venv)
    quick = options.quick
    prompts, group, tokens = (2, 4, 16) if quick else (PROMPTS, GROUP, TOKENS)
    turns, steps = (1, 1) if quick else (options.turns, options.steps)
    asked = {
        "model": str(resolve(options.model)), "prompts": prompts, "group": group, "tokens": tokens, "lr": LR,
        "seed": 0, **opening(SYSTEM, "text_envs:SingleTurn"), "steps": steps + 1, "threads": options.threads,
    }  # fmt: skip
    long = opening(LONG_SYSTEM, "text_envs:LongPrompt")
    if (length := shortest_prompt(asked["model"], long)) < LONG_PROMPT * tokens:
        raise SystemExit(f"a long prompt has {length} tokens, less than {LONG_PROMPT} times {tokens}")
    given = 1 if quick and options.candidate is None else options.candidate
    progress = Progress((len(CANDIDATES) if given is None else 0) + (2 if quick else 6) * turns)
    tried = explore(python, asked, options.threads, progress) if given is None else []
    settings = tried[0]["settings"] if given is None else CANDIDATES[given]
    chosen = {key: settings[key] for key in CANDIDATES[0]}
    sides: list[tuple[str, Path | str, dict[str, Any]]] = [
        ("ours", sys.executable, {}), ("trl", python, {"settings": chosen}),
    ]  # fmt: skip
    if not quick:
        sides += [
            ("ours, saving memory", sys.executable, {"learner": SAVING}),
            ("trl, its defaults", python, {"settings": CANDIDATES[0]}),
            ("ours" + LONG, sys.executable, long),
            ("trl" + LONG, python, {"settings": chosen} | long),
        ]
    samples = []
    for turn in range(turns):
        for name, interpreter, more in sides:
            sample = run(name.partition(",")[0], interpreter, asked | {"seed": turn} | more, options.threads)
            samples.append(sample | {"turn": turn, "side": name})
            progress(
                f"{name}: {median_seconds(sample):.1f} s a step, peak {sample['peak_pss_mib_measured_steps']:.0f} MiB"
            )
    print(report(samples))
    found = checks(samples, goal=not quick)
    write(options.json, "trl_step", samples, found, trl_candidates=tried, trl_settings=chosen,
          prompts=prompts, group=group, max_tokens=tokens, threads=options.threads,
          long_prompt_tokens=length)  # fmt: skip
    return 0 if all(c.holds for c in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
