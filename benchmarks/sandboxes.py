"""Calls of a sandbox: how many a second, how long each takes, and what is left behind.

    python benchmarks/sandboxes.py --json benchmarks/results/sandboxes.json --minutes 8   # again, until it is written
    python benchmarks/sandboxes.py --quick                                                # half a minute

A call is ``python3 -I -c CODE``. ``trivial`` prints, ``numeric`` imports numpy and sympy and uses both. Each is
measured in sessions that are open (``in a session``) and with a session of its own for each call (``a session each``),
at several concurrencies: plain subprocesses, unsafe_local, bubblewrap as it is, bubblewrap from a zygote that has both
imported, docker, and a bare exec of its engine in a container of the same image, which has neither module. The order
is turned around from round to round, so that a busy machine slows all sides alike.
The environment with numpy and sympy is ``bubblewrap?packages=numpy,sympy``, which the first run builds. The engine is
the one of DOCKER_HOST.

A record is made of parts (a round at a concurrency, a side's leak check), each with the load that others made. With
``--minutes`` no part begins later; the next run goes on. With ``--wait`` a part waits for a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine_load import Patience, do_parts, loads
from measure import paired_ratio, table
from record import ROOT, Check, Kept, write

sys.path.insert(0, str(ROOT))
from sandbox_leaks import adopt_orphans, grown, leak_check
from sandbox_sides import CODES, bare_exec, in_sessions, measure, percentile, plain, session_each

from areal_agents import sandboxes
from areal_agents.errors import SandboxUnavailable
from areal_agents.sandboxes.packages import ensure, requirements

PACKAGES = "numpy,sympy"
MORE_MIB = 16
RENEW = {"docker": 50}
"""Calls of a session of a leak check; 10 for the sides that are not named."""
ZYGOTE = f"bubblewrap?packages={PACKAGES}&preload={PACKAGES}"


def sides(docker: str, folder: Path) -> dict[str, str]:
    """Return the backends to measure, by what the record calls them."""
    found = {"unsafe_local": f"unsafe_local?python={folder}", "bubblewrap": f"bubblewrap?packages={PACKAGES}"}
    return found | {"zygote": ZYGOTE} | ({"docker": docker} if docker else {})


async def missing(docker: str) -> str:
    """Say why docker is not measured, or return ""."""
    if not docker:
        return "it was left out by --docker"
    backend = sandboxes.get(docker)
    try:
        await backend.probe()
    except SandboxUnavailable as error:
        return str(error)
    finally:
        await backend.aclose()
    return ""


async def one_round(names: dict[str, str], folder: Path, turn: int, at: int, seconds: float) -> list[dict[str, Any]]:
    """Measure every side once at one concurrency."""
    from areal_agents.sandboxes.docker_image import IMAGE

    backends = {side: sandboxes.get(name) for side, name in names.items()}
    work: list[tuple[str, str, str, Callable[[], Any]]] = []
    for code in CODES:
        python = str(folder / "bin" / "python3")
        work.append(("subprocess", "new process", code, lambda code=code, p=python: plain(p, code, at)))
        for side, backend in backends.items():
            if side == "docker" and code == "numeric":
                continue  # its image has neither
            work.append((side, "in a session", code, lambda code=code, b=backend: in_sessions(b, code, at)))
            if side == "zygote" or (code == "trivial" and side != "unsafe_local"):
                work.append((side, "a session each", code, lambda code=code, b=backend: session_each(b, code, at)))
    if "docker" in names:
        work.append(("docker exec", "bare", "trivial", lambda: bare_exec(IMAGE, "trivial", at)))
    rows = []
    try:
        for backend in backends.values():
            await backend.probe()
        for side, way, code, make in work if turn % 2 == 0 else work[::-1]:
            async with make() as call:
                found = await measure(call, at, seconds)
            rows.append({"side": side, "way": way, "code": code, "concurrency": at, "round": turn, **found})
            print(f"  {side} {way} {code} at {at}: {found['calls_per_second']} a second", flush=True)
    finally:
        for backend in backends.values():
            await backend.aclose()
    return rows


def pick(rows: list[dict[str, Any]], side: str, way: str, code: str, at: int, what: str) -> list[Any]:
    """Return a column of one kind of measurement, by rounds."""
    wanted = (side, way, code, at)
    found = [r for r in rows if (r["side"], r["way"], r["code"], r["concurrency"]) == wanted]
    return [r[what] for r in sorted(found, key=lambda r: r["round"])]


def pooled(rows: list[dict[str, Any]], share: float, *kind: Any) -> float:
    """Return a percentile over the calls of all rounds, in milliseconds."""
    return percentile([float(ms) for text in pick(rows, *kind, "ms") for ms in text.split()], share)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a line for each kind of measurement: the median rate of the rounds, percentiles over all calls."""
    kinds = dict.fromkeys((r["code"], r["side"], r["way"], r["concurrency"]) for r in rows)
    found = []
    for code, side, way, at in sorted(kinds):
        kind = (side, way, code, at)
        rates = sorted(pick(rows, *kind, "calls_per_second"))
        shares = {f"p{share}_ms": round(pooled(rows, share / 100, *kind), 1) for share in (50, 95, 99)}
        found.append({
            "code": code, "side": side, "way": way, "at": at, "n": sum(pick(rows, *kind, "n")),
            "calls_per_second": rates[len(rates) // 2], **shares,
        })  # fmt: skip
    return found


def while_busy(check: Check, parts: dict[str, Any]) -> Check:
    """Say what others did meanwhile where a goal of the time at a concurrency, the name's last word, is missed."""
    at = check.name.rpartition(" ")[2]
    shares = [
        p["others_busy_before"] for name, p in parts.items() if name.startswith("round") and name.endswith(f" {at}")
    ]
    if check.holds or check.reason or not shares:
        return check
    told = ", ".join(f"{share:.0%}" for share in shares)
    return replace(check, reason=f"others had {told} of the processors before these rounds")


def checks(rows: list[dict[str, Any]], leaks: dict[str, Any], concurrencies: list[int], no_docker: str) -> list[Check]:
    """Compare with the goals."""
    found = []
    for at in concurrencies:
        ours = pick(rows, "zygote", "in a session", "trivial", at, "calls_per_second")
        theirs = pick(rows, "subprocess", "new process", "trivial", at, "calls_per_second")
        ratio = paired_ratio(ours, theirs)
        found.append(Check(f"zygote/subprocess calls, trivial, at {at}", ratio, ">= 1", ratio >= 1))
    p50 = round(pooled(rows, 0.5, "zygote", "in a session", "numeric", concurrencies[0]), 2)
    found.append(Check(f"zygote p50 ms with numpy and sympy, at {concurrencies[0]}", p50, "<= 20", p50 <= 20))
    for at in concurrencies:
        name, goal = f"docker's warm session/bare exec, p50, at {at}", "<= 1.3"
        if no_docker:
            found.append(Check(name, None, goal, False, f"not measured: {no_docker}"))
            continue
        ours, theirs = (
            pick(rows, side, way, "trivial", at, "p50_ms")
            for side, way in (("docker", "in a session"), ("docker exec", "bare"))
        )
        ratio = paired_ratio(ours, theirs)
        found.append(Check(name, ratio, goal, ratio <= 1.3))
    for side, seen in leaks.items():
        more = grown(seen["before"], seen["after"])
        more |= {f"{name} while open": n for name, n in grown(seen["open_before"], seen["open_after"]).items()}
        kept = all(value <= (MORE_MIB if "memory" in name else 0) for name, value in more.items())
        goal = f"no more of any, and at most {MORE_MIB} MiB"
        name = f"{side}: left after {seen['calls']} calls in {seen['sessions']} sessions"
        new = sorted(
            {*seen["after"].get("mounts", ()), *seen["after"].get("cgroups", ())}
            - {*seen["before"].get("mounts", ()), *seen["before"].get("cgroups", ())}
        )
        found.append(Check(name, more, goal, kept, f"new: {', '.join(new)}" if new else ""))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short measurements, two concurrencies, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement (default: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind (default: 3)")
    parser.add_argument("--leak", type=int, default=10_000, help="calls of each leak check (default: 10000)")
    parser.add_argument("--docker", default="docker", help='the docker backend (default: docker), "" for none')
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no part later; the next run goes on")
    parser.add_argument("--wait", type=float, default=0.0, help="minutes to wait for a quiet machine, in all")
    args = parser.parse_args()
    args.concurrency = [1, 8] if args.quick else [1, 2, 8, 32]
    if args.quick:
        args.seconds, args.rounds, args.leak = 0.3, 1, 64
    return args


def main() -> int:
    args = parse()
    adopt_orphans()
    folder = ensure(requirements(PACKAGES))
    no_docker = asyncio.run(missing(args.docker))
    names = sides("" if no_docker else args.docker, folder)
    settings = {name: getattr(args, name) for name in ("seconds", "rounds", "leak", "concurrency")}
    kept, patience = Kept(args.json, {**settings, "sides": list(names)}), Patience(60 * args.wait)
    # Leaks first: what they count does not depend on the load, and the machine may be quieter later.
    work: dict[str, Callable[[], Any]] = {}
    for side, name in names.items():
        renew = RENEW.get(side, 10)
        work[f"leaks of {side}"] = lambda name=name, renew=renew: asyncio.run(leak_check(name, args.leak, renew))
    for turn in range(args.rounds):
        for at in args.concurrency:
            work[f"round {turn} at {at}"] = lambda turn=turn, at=at: asyncio.run(
                one_round(names, folder, turn, at, args.seconds)
            )
    parts = do_parts(work, kept, patience, args.minutes)
    if parts is None:
        return 2
    rows = [row for name, part in parts.items() if name.startswith("round") for row in part["found"]]
    leaks = {side: parts[f"leaks of {side}"]["found"] for side in names}
    lines, found = summary(rows), checks(rows, leaks, args.concurrency, no_docker)
    found = [while_busy(check, parts) for check in found]
    print(table(lines))
    write(args.json, "sandboxes", rows, found, summary=lines, leaks=leaks, loads=loads(parts), not_measured=no_docker)
    kept.end()
    return 0 if all(check.holds for check in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
