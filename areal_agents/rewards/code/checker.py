"""A problem's own checker: a function of its author's, sync or async, that may be slow or raise on odd output."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import threading
from collections.abc import Callable
from typing import Any, Literal

from areal_agents.errors import ArealError
from areal_agents.rewards.code.problem import CodeTest, Problem
from areal_agents.utils.real_number import finite

Compared = Literal["passed", "wrong", "checker_error"]


async def compare(problem: Problem, test: CodeTest, output: str) -> Compared:
    """Say whether an output passes, by the problem's checker where it has one.

    ``checker_error`` stands for a checker that raised, took too long or said neither yes nor no: the output is not
    verified. An error of this package (an InfraError, a TaskError) is the checker's way to say whose failure it is, and
    is raised.
    """
    if problem.checker is None:
        return "passed" if problem.passes(test, output) else "wrong"
    given: tuple[Any, ...] = (test.stdin, test.expected, output)
    if test.arguments is not None:
        try:
            given = (list(test.arguments), test.expected, json.loads(output))
        except (ValueError, RecursionError):
            return "wrong"
    try:
        async with asyncio.timeout(problem.checker_seconds):
            said = await _in_thread(lambda: problem.checker(*given))  # type: ignore[misc]
            if inspect.isawaitable(said):
                said = await said
        return "passed" if {0.0: False, 1.0: True}[finite(said)] else "wrong"
    except ArealError:
        raise
    except Exception:  # noqa: BLE001  a boundary: the author's code, on what a model made for it
        return "checker_error"


async def _in_thread(call: Callable[[], Any]) -> Any:
    """Call in a thread that nobody waits for: one that never ends must not hold the process at its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def finish(value: Any, error: BaseException | None) -> None:
        if done.done():
            if inspect.iscoroutine(value):
                value.close()
        elif error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def run() -> None:
        value, failed = None, None
        try:
            value = call()
        except Exception as error:  # noqa: BLE001  raised where it is awaited
            failed = RuntimeError(repr(error)) if isinstance(error, StopIteration) else error
        except BaseException as error:  # noqa: BLE001  sys.exit of a checker is its failure, not the thread's
            failed = RuntimeError(repr(error))
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(finish, value, failed)

    threading.Thread(target=run, daemon=True, name="checker").start()
    return await done
