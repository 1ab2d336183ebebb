"""Guards against ``sys.exit`` in somebody else's code, which must end neither an event loop nor the process.

    SystemExit, KeyboardInterrupt or another BaseException ─▶ RuntimeError("it called sys.exit(3)")

Asyncio raises SystemExit and KeyboardInterrupt of any task out of the whole event loop. So it is not enough to catch
them where a call is awaited: a call may start tasks of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from areal_agents.utils.short_text import described, short


@contextmanager
def no_exit() -> Iterator[None]:
    """Raise RuntimeError in place of an exception that is no Exception.

    A cancellation passes.
    """
    try:
        yield
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise _as_error(error) from error


def _as_error(error: BaseException) -> RuntimeError:
    if isinstance(error, SystemExit):
        return RuntimeError(f"it called sys.exit({short(error.code)})")
    return RuntimeError(f"it raised {described(error)}")


def guard_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Let every new task of ``loop`` run under ``no_exit``."""
    loop.set_task_factory(_guarded_task)


@contextmanager
def guarded_tasks() -> Iterator[None]:
    """Let every task that the running loop gets meanwhile run under ``no_exit``."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    guard_tasks(loop)
    try:
        yield
    finally:
        loop.set_task_factory(before)


def _guarded_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(_Guarded(coroutine), loop=loop, **options)


class _Guarded(Coroutine[Any, Any, Any]):
    """A coroutine under ``no_exit``.

    It has the name and the frame of the coroutine inside it, because whoever lists tasks looks for these.
    """

    def __init__(self, inner: Coroutine[Any, Any, Any]) -> None:
        self._inner = inner

    def send(self, value: Any) -> Any:
        try:  # as no_exit, whose generator is half of what a short step costs
            return self._inner.send(value)
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException as error:
            raise _as_error(error) from error

    def throw(self, *error: Any) -> Any:
        if isinstance(error[0], GeneratorExit) or error[0] is GeneratorExit:  # whoever throws it in gets it back
            return self._inner.throw(*error)
        with no_exit():
            return self._inner.throw(*error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
