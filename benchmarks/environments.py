"""Environments: scripted episodes a second, and a thousand episodes at a time on one process.

    python benchmarks/environments.py --json benchmarks/results/environments.json      # about 6 minutes
    python benchmarks/environments.py --quick                                         # a minute: counts alone

Every environment of the box plays its expert, one episode at a time and 32 at a time, in its sandbox where its tools
need one. Then a thousand episodes play at once, each turn of which calls a tool that waits 50 ms. The ideal is what the
waiting alone takes: turns × 50 ms. It is measured with a policy that answers at once, and with one that takes 450 ms
for a turn, as a model does (the ideal is then turns × 500 ms). Gymnasium's SyncVectorEnv and AsyncVectorEnv wait for as
long in a plain environment over numbers. The first takes the waits one after the other, the second has a process an
environment, so both play fewer episodes, and are compared by what they play in a second. Each sample is a process of
its own, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from machine_load import Patience, do_parts, loads
from measure import table
from measured_process import Side
from record import Check, Kept, write

HERE = Path(__file__).resolve().parent
TOOL, THINK = 0.05, 0.45
GOAL = 0.9
AT_ONCE = (1, 32)
SIZES = (125, 250, 500)
"""Fewer episodes at a time, with a policy that answers at once: up to where the goal holds."""
NOT_TIMED = ("areal/Questions-v0",)
"""One turn that says a file's solution: nothing of an environment is in it."""
Row = dict[str, Any]


def ask(script: str, asked: Row) -> Row:
    """Ask a fresh process, and return what it measured with the memory that it took."""
    with Side(str(asked["side"]), [sys.executable, HERE / script]) as side:
        return side.ask(asked) | {"peak_pss_mib": side.memory.peak_mib()}


def environments() -> tuple[list[str], dict[str, str]]:
    """Return the ids of the environments that are timed, and why others cannot be played here."""
    from areal_agents import registry
    from areal_agents.errors import ArealError

    found, left_out = [], {}
    for spec in registry.specs():
        if spec.id.startswith("areal/") and spec.id not in NOT_TIMED:
            if why := spec.lacks():
                left_out[spec.id] = why
                continue
            try:
                spec.tasks(spec.splits[-1])
                found.append(spec.id)
            except ArealError as error:
                left_out[spec.id] = str(error)
    return found, left_out


def ours(episodes: int, turns: int, think: float) -> Row:
    asked = {"side": "ours", "episodes": episodes, "turns": turns, "tool_seconds": TOOL, "think_seconds": think}
    return ask("environments_sides.py", asked)


def vector(side: str, episodes: int, turns: int) -> Row:
    found = ask("environments_vector.py", {"side": side, "episodes": episodes, "turns": turns, "tool_seconds": TOOL})
    return found | {"share_of_ideal": turns * TOOL / found["seconds"]}


def turn(quick: bool) -> list[Row]:
    """Return one sample of each side."""
    many, turns = (1000, 4) if quick else (1000, 20)
    rows = [ours(many, turns, 0.0), ours(many, 2 if quick else 10, THINK)]
    rows += [] if quick else [ours(size, turns, 0.0) for size in SIZES]
    rows += [vector("sync", 4 if quick else 10, turns), vector("async", 8 if quick else 64, turns)]
    return [row | {"episodes_per_second": row["episodes"] / row["seconds"]} for row in rows]


def scripted(id: str, at_once: int, seconds: float, sandbox: str) -> Row:
    from areal_agents import registry

    own = registry.spec(id).sandbox or sandbox
    asked = {"side": "box", "env": id, "at_once": at_once, "seconds": seconds, "sandbox": own}
    return ask("environments_sides.py", asked)


def work_of(*, quick: bool, turns: int, seconds: float, sandbox: str) -> dict[str, Callable[[], Any]]:
    """Return the parts of the record by name."""
    work: dict[str, Callable[[], Any]] = {f"turn {i}": partial(turn, quick) for i in range(turns)}
    ids, _ = environments()
    for id in ids[:3] if quick else ids:
        for at_once in AT_ONCE[-1:] if quick else AT_ONCE:
            work[f"{id}, {at_once} at a time"] = partial(scripted, id, at_once, seconds, sandbox)
    return work


def name_of(row: Row) -> str:
    """Return what a side of the comparison is called."""
    if row["side"] != "ours":
        return {"sync": "SyncVectorEnv", "async": "AsyncVectorEnv"}[row["side"]]
    return "ours" if not row["think_seconds"] else f"ours, {1000 * row['think_seconds']:.0f} ms a thought"


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Return the medians of each side and size."""
    kinds = list(dict.fromkeys((name_of(row), row["episodes"]) for row in rows))
    found = []
    for name, episodes in kinds:
        own = [row for row in rows if (name_of(row), row["episodes"]) == (name, episodes)]

        def middle(key: str, own: list[Row] = own, digits: int = 3) -> Any:
            values = [row[key] for row in own if key in row]
            return round(statistics.median(values), digits) if values else "–"

        found.append({
            "side": name, "episodes": episodes, "turns": own[0]["turns"], "share of ideal": middle("share_of_ideal"),
            "turns/s": middle("turns_per_second"), "episodes/s": middle("episodes_per_second"),
            "lag p99 ms, environments": middle("environments_lag_ms_p99"), "players": middle("players_lag_ms_p99"),
            "PSS MiB": middle("peak_pss_mib"),
        })  # fmt: skip
    return found


def checks(rows: Sequence[Row], box: Sequence[Row], *, timing: bool) -> list[Check]:
    """Return the goals: counts always, times where they are asked for."""
    own = [row for row in rows if row["side"] == "ours"]
    lost = sum(row["episodes"] - min(row["whole"], row["different_episodes"]) for row in own)
    unsolved = sum(row["episodes"] - row["solved"] for row in box)
    found = [
        Check("episodes of the concurrent runs that are lost or not whole", lost, "== 0", lost == 0),
        Check("scripted episodes that earn less than 1", unsolved, "== 0", unsolved == 0),
    ]
    if not timing:
        return found
    medians = {(row["side"], row["episodes"]): row for row in summarize(rows)}
    for (side, episodes), row in medians.items():
        if side.startswith("ours") and episodes == 1000:
            share = row["share of ideal"]
            seconds = TOOL + (0.0 if side == "ours" else THINK)
            why = "" if share >= GOAL else (
                f"at {row['turns/s']:.0f} turns a second the processor is the limit: the ideal asks for "
                f"{episodes / seconds:.0f}, {1e6 * seconds / episodes:.0f} µs of one core a turn"
            )  # fmt: skip
            found.append(
                Check(f"share of the ideal, {episodes} episodes ({side})", share, f">= {GOAL}", share >= GOAL, why)
            )
    theirs = max(row["episodes/s"] for (side, _), row in medians.items() if not side.startswith("ours"))
    ratio = round(medians["ours", 1000]["episodes/s"] / theirs, 2)
    found.append(Check("episodes a second over the faster vector environment's", ratio, "> 1", ratio > 1))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="counts, and three environments")
    parser.add_argument("--turns", type=int, default=3, help="samples of each side")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each environment and concurrency")
    parser.add_argument("--sandbox", default="bubblewrap")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no part later; the next run goes on. 0: all")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    quick = options.quick
    sizes = {"quick": quick, "turns": 1 if quick else options.turns, "seconds": 0.5 if quick else options.seconds}
    kept = Kept(options.json, sizes | {"sandbox": options.sandbox})
    parts = do_parts(
        work_of(**sizes, sandbox=options.sandbox), kept, Patience(0.0 if quick else 120.0), options.minutes
    )
    if parts is None:
        return 2
    rows = [row for name, part in parts.items() if name.startswith("turn") for row in part["found"]]
    box = [part["found"] for name, part in parts.items() if not name.startswith("turn")]
    print(table(summarize(rows)))
    print(table([
        {"env": row["env"], "at once": row["at_once"], "episodes/s": round(row["episodes_per_second"], 1),
         "turns/s": round(row["turns_per_second"], 1), "solved": f"{row['solved']} of {row['episodes']}"}
        for row in box
    ]))  # fmt: skip
    found = checks(rows, box, timing=not quick)
    write(options.json, "environments", rows + box, found, summary=summarize(rows), loads=loads(parts),
          left_out=environments()[1], tool_seconds=TOOL, think_seconds=THINK, **sizes)  # fmt: skip
    kept.end()
    return 0 if all(check.holds for check in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
