"""The run of all checks and attacks on one backend, as in ``areal-agents check --sandbox NAME``.

It imports nothing heavy, and runs without pytest: as a program it prints the report as JSON,
``python -m areal_agents.sandboxes.suite bubblewrap``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from areal_agents.errors import ArealError
from areal_agents.sandbox import ProbeReport, SandboxBackend
from areal_agents.sandboxes import get
from areal_agents.sandboxes.attacks import ATTACKS, Attack
from areal_agents.sandboxes.conformance import ALONE, CONFORMANCE
from areal_agents.sandboxes.subject import Check, NotContained, NotTried, Subject

DEADLINE: Final = 300.0
"""Seconds for one check. Only a hang takes so long."""

Status = Literal["passed", "failed", "contained", "NOT CONTAINED", "not tried", "skipped"]
GOOD: Final = ("passed", "contained")


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one check or attack."""

    name: str
    what: str
    status: Status
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """What came of all of them. ``passed`` where the contract holds and every attack ran and was contained."""

    sandbox: str
    probe: ProbeReport
    contract: tuple[Finding, ...]
    attacks: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(found.status in GOOD for found in (*self.contract, *self.attacks))

    def to_json(self) -> dict[str, Any]:
        """Return everything, with the backend's own probes."""
        return {
            "sandbox": self.sandbox,
            "passed": self.passed,
            **{k: v for k, v in asdict(self).items() if k != "sandbox"},
        }

    def summary(self) -> str:
        """Return what the lines of the findings come to."""
        bad = [found for found in (*self.contract, *self.attacks) if found.status not in GOOD]
        held = sum(found.status == "contained" for found in self.attacks)
        lines = [
            f"{self.sandbox}: {'FAILED' if bad else 'passed'}, {held} of {len(self.attacks)} attacks contained, "
            f"memory bounded by {self.probe.memory_bound or 'it does not say what'}"
        ]
        lines += [f"note: {note}" for note in self.probe.notes]
        return "\n".join(lines)


def line_of(found: Finding) -> str:
    """Return one line about a finding, with its detail cut."""
    detail = found.detail if len(found.detail) <= 300 else found.detail[:300] + "…"
    words = " ".join(detail.split())
    return f"  {found.status:<13} {found.name:<18} {found.what}{': ' + words if words else ''}"


async def check(name: str, report: Callable[[Finding], None] | None = None) -> SuiteReport:
    """Run every check and attack on the backend ``name``.

    Args:
        name: as ``sandboxes.get`` takes it.
        report: is called with each finding as it is made.

    Raises:
        RegistryError: there is no such backend.
        SandboxUnavailable: its own probe failed.
        ArealError: Python runs without assertions.
    """
    if not __debug__:
        raise ArealError("python -O removes the checks: run without it")
    backend = get(name)
    try:
        probe = await backend.probe()
    finally:
        await backend.aclose()
    tell = report or (lambda found: None)
    contract, attacks = [], dict[str, Finding]()
    bench = _Bench(name, probe)
    try:
        for function in CONFORMANCE:
            title = function.__name__.replace("_", " ")
            contract.append(await bench.conform(title, function, alone=function in ALONE))
            tell(contract[-1])
        for attack in ATTACKS:
            missing = [need for need in attack.needs if attacks[need].status != "contained"]
            if missing:
                found = Finding(attack.name, attack.what, "skipped", f"not safe to try: see {', '.join(missing)}")
            else:
                found = await bench.attack(attack)
            attacks[attack.name] = found
            tell(found)
    finally:
        await bench.close()
    return SuiteReport(name, probe, tuple(contract), tuple(attacks.values()))


class _Bench:
    """The backend that checks are run on: one after the other on the same, and a new one after each that failed."""

    def __init__(self, name: str, probe: ProbeReport) -> None:
        self._name, self._probe = name, probe
        self._backend: SandboxBackend | None = None

    async def _call(self, call: Callable[[Subject], Awaitable[Any]]) -> Any:
        if self._backend is None:
            self._backend = get(self._name)
        async with asyncio.timeout(DEADLINE):
            return await call(Subject(self._backend, lambda: get(self._name), self._probe.memory_bound))

    async def conform(self, title: str, function: Check, *, alone: bool) -> Finding:
        """Run a check of the contract, on a backend of its own where it needs that."""
        start = time.monotonic()
        if alone:
            await self.close()
        try:
            await self._call(function)
        except Exception as error:  # noqa: BLE001  (a boundary: whatever a backend raises is what was found)
            await self.close()
            return Finding("contract", title, "failed", _last(error), time.monotonic() - start)
        if alone:
            await self.close()
        return Finding("contract", title, "passed", "", time.monotonic() - start)

    async def attack(self, attack: Attack) -> Finding:
        """Run an attack."""
        start = time.monotonic()
        status: Status
        try:
            status, detail = "contained", await self._call(attack.run)
        except NotContained as error:
            status, detail = "NOT CONTAINED", str(error)
        except NotTried as error:
            status, detail = "not tried", str(error)
        except Exception as error:  # noqa: BLE001  (as above)
            status, detail = "not tried", _last(error)
        if status != "contained":
            await self.close()
        return Finding(attack.name, attack.what, status, detail, time.monotonic() - start)

    async def close(self) -> None:
        """Close the backend. The next check gets another one."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.aclose()


def _last(error: BaseException) -> str:
    """Return the error and the last lines that it went through."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"it hangs: no end after {DEADLINE:g} s"
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__}: {error!s:.600} ({where})"


if __name__ == "__main__":
    print(json.dumps(asyncio.run(check(sys.argv[1])).to_json()))
