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
from areal_agents.utils.short_text import described

Compared = Literal["passed", "wrong", "checker_error"]


_PROBES: tuple[Any, ...] = ("", "areal", "0\n", "1 2 3 4 5 6 7 8 9 10\n" * 4)
"""Outputs of a program that differ in all that a checker could look at."""
_VALUES: tuple[Any, ...] = ("", 0, 1.5, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], {})
"""Values of a function."""


async def compare(problem: Problem, test: CodeTest, output: str) -> Compared:
    """Say whether an output passes, by the problem's checker where it has one.

    ``checker_error`` stands for a checker that raised, took too long or said neither yes nor no: the output is not
    verified. An error of this package (an InfraError, a TaskError) is the checker's way to say whose failure it is, and
    is raised.
    """
    if problem.checker is None:
        return "passed" if problem.passes(test, output) else "wrong"
    said: Any = output
    if test.arguments is not None:
        try:
            said = json.loads(output)
        except (ValueError, RecursionError):
            return "wrong"
    answers: dict[str, Compared] = {"passed": "passed", "wrong": "wrong"}
    return answers.get(await _asked(problem, test, said), "checker_error")


async def fault(problem: Problem, test: CodeTest) -> str:
    """Return why the problem's checker can decide nothing, or an empty text.

    One that fails in the same words on what is expected and on outputs of all kinds does not fail because of them.
    """
    if problem.checker is None:
        return ""
    first = await _asked(problem, test, test.expected)
    if first in ("passed", "wrong"):
        return ""
    probes = _PROBES if test.arguments is None else _VALUES
    others = await asyncio.gather(*(_asked(problem, test, said) for said in probes))
    return first if {*others} == {first} else ""


async def _asked(problem: Problem, test: CodeTest, said: Any) -> str:
    """Return ``passed``, ``wrong``, or what the checker failed with."""
    given = (test.stdin if test.arguments is None else list(test.arguments), test.expected, said)
    try:
        async with asyncio.timeout(problem.checker_seconds) as scope:
            answer = await _in_thread(lambda: problem.checker(*given))  # type: ignore[misc]
            if inspect.isawaitable(answer):
                answer = await answer
    except ArealError:
        raise
    except TimeoutError as error:
        return f"took more than {problem.checker_seconds:g} s" if scope.expired() else f"raised {described(error)}"
    except Exception as error:  # noqa: BLE001  a boundary: the author's code, on what a model made for it
        return f"raised {described(error)}"
    try:
        return {0.0: "wrong", 1.0: "passed"}[finite(answer)]
    except Exception:  # noqa: BLE001  it may be anything
        return f"returned {type(answer).__name__} that says neither yes nor no"


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
