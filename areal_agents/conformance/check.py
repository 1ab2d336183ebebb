"""The run of all checks on one environment, as in ``areal-agents check ENV_ID``.

    contract ─▶ gymnasium, tasks, rng, tokens, golds, hidden, reward   (skipped where the contract itself is broken)
             └▶ seeds ─▶ isolation ─▶ aliasing, cancellation   (compare episodes, so they need the one before)

Each check gives one result with its reason. Everything runs on a thread of its own, so an environment that blocks it
is reported, not waited for.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from areal_agents import registry
from areal_agents.chat.options import ChatOptions
from areal_agents.conformance import contract, golds, isolation, revealed, reward_audit
from areal_agents.conformance.contract import Subject
from areal_agents.errors import ArealError
from areal_agents.sandbox import backends
from areal_agents.utils.exits import no_exit
from areal_agents.utils.short_text import described, text_of

Status = Literal["passed", "failed", "unaudited", "skipped"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check, with the reason in ``detail``."""

    name: str
    status: Status
    detail: str
    bad_tasks: Mapping[str, str] = field(default_factory=dict)
    """Ids of tasks that no answer could score, each with the reason."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The results of all checks on one environment.

    ``unaudited`` and ``skipped`` are shown, but only ``failed`` fails the report.
    """

    env_id: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        return all(r.status != "failed" for r in self.results)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"env", "passed", "checks": [{"name", "status", "detail"}]}``.

        A check that found bad tasks has ``bad_tasks`` too: their ids, each with the reason.
        """
        checks = [
            {"name": r.name, "status": r.status, "detail": r.detail}
            | ({"bad_tasks": dict(r.bad_tasks)} if r.bad_tasks else {})
            for r in self.results
        ]
        return {"env": self.env_id, "passed": self.passed, "checks": checks}

    def __str__(self) -> str:
        marks = {"passed": "ok", "failed": "FAILED"}
        lines = [f"  {marks.get(r.status, r.status):<9} {r.name:<12} {r.detail}" for r in self.results]
        return "\n".join([f"{self.env_id}: {'passed' if self.passed else 'FAILED'}", *lines])


CheckFunction = Callable[[Subject], Awaitable[str]]
CHECKS: Mapping[str, tuple[CheckFunction, tuple[str, ...]]] = {
    "contract": (contract.contract, ()),
    "gymnasium": (contract.gymnasium_checker, ("contract",)),
    "tasks": (contract.tasks, ("contract",)),
    "seeds": (contract.seeds, ("contract",)),
    "isolation": (isolation.isolation, ("contract", "seeds")),
    "aliasing": (isolation.aliasing, ("contract", "seeds", "isolation")),
    "rng": (isolation.global_rng, ("contract",)),
    "cancellation": (isolation.cancellation, ("contract", "seeds", "isolation")),
    "tokens": (contract.tokens, ("contract",)),
    "golds": (golds.golds, ("contract",)),
    "hidden": (revealed.hidden, ("contract",)),
    "reward": (reward_audit.reward, ("contract",)),
}
"""Name → the check, and the checks that must have passed before it says anything."""


def check(
    env_id: str,
    *,
    tokenizer: str | Path | None = "smollm2",
    chat: ChatOptions | None = None,
    timeout: float = 60.0,
    kwargs: Mapping[str, Any] | None = None,
    difficulty: float | None = None,
    report: Callable[[CheckResult], None] | None = None,
) -> CheckReport:
    """Run every check on one environment.

    Args:
        env_id: the environment's id, or ``"module:Class"``.
        tokenizer: a model name or folder for the token check. None skips that check.
        chat: how the token check makes prompts. None leaves it to the chat template.
        timeout: seconds for one call into the environment. One check gets ten times as much.
        kwargs: keyword arguments of the environment, over the registered ones.
        difficulty: of the tasks that are played, in [0, 1]. None is the environment's default.
        report: is called with each result as it is found.

    Raises:
        RegistryError: the environment cannot be found. Nothing else is raised.
    """
    spec = replace(registry.spec(env_id).with_kwargs(kwargs or {}), difficulty=difficulty)
    subject = Subject(spec, timeout, tokenizer, chat or ChatOptions())
    found: queue.SimpleQueue[CheckResult] = queue.SimpleQueue()
    abandoned = threading.Event()
    worker = threading.Thread(target=_run_all, args=(subject, found, abandoned), name="areal-agents-check", daemon=True)
    worker.start()
    results: list[CheckResult] = []
    blocked = ""
    for name in CHECKS:
        if blocked:
            result = CheckResult(name, "skipped", f"{blocked} blocked the thread")
        else:
            try:
                result = found.get(timeout=10 * timeout)
            except queue.Empty:  # no thread can be ended from outside: it is left to the process, as a daemon
                blocked = name
                abandoned.set()
                detail = f"blocked its thread for more than {10 * timeout:g} s: use `await` instead of blocking calls"
                result = CheckResult(name, "failed", detail)
        results.append(result)
        if report is not None:
            report(result)
    if not blocked:
        worker.join(timeout)
    return CheckReport(env_id, tuple(results))


def _run_all(subject: Subject, found: queue.SimpleQueue[CheckResult], abandoned: threading.Event) -> None:
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    statuses: dict[str, Status] = {}
    try:
        for name, (run, needs) in CHECKS.items():
            if abandoned.is_set():
                break
            broken = [n for n in needs if statuses[n] != "passed"]
            if broken:
                result = CheckResult(name, "skipped", f"needs {broken[0]}")
            else:
                try:
                    result = loop.run_until_complete(_run(name, run, subject))
                except (SystemExit, KeyboardInterrupt) as error:  # of a callback, which asyncio lets through
                    result = CheckResult(name, "failed", f"a callback of the event loop raised {described(error)}")
            statuses[name] = result.status
            found.put(result)
        loop.run_until_complete(_clear_up())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _run(name: str, run: CheckFunction, subject: Subject) -> CheckResult:
    try:
        with no_exit():
            return CheckResult(name, "passed", await run(subject))
    except contract.Unaudited as reason:
        return CheckResult(name, "unaudited", str(reason))
    except contract.Skipped as reason:
        return CheckResult(name, "skipped", str(reason))
    except golds.BadTasks as error:
        return CheckResult(name, "failed", text_of(error), error.tasks)
    except ArealError as error:
        return CheckResult(name, "failed", text_of(error))
    except Exception as error:  # noqa: BLE001  the author's own code: whatever it raises is the finding
        return CheckResult(name, "failed", described(error))


async def _clear_up() -> None:
    """Close sandboxes, cancel what an environment left behind and give it a moment to end."""
    await backends().close_shared()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=1.0)
