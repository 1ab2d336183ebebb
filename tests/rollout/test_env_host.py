"""The environments' loop: failures that nobody waits for any more are no news."""

from __future__ import annotations

import asyncio
import gc

import pytest

from areal_agents.errors import EnvError
from areal_agents.rollout.env_host import EnvHost


class BackendDied(Exception):
    pass


def test_a_call_that_fails_while_it_is_cancelled_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        host, begun, loop = EnvHost(), asyncio.Event(), asyncio.get_running_loop()

        async def stubborn() -> None:
            try:
                loop.call_soon_threadsafe(begun.set)
                await asyncio.Event().wait()
            finally:
                raise BackendDied

        call = asyncio.create_task(host.call(stubborn, timeout=60.0, what="astep"))
        await begun.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await host.close()

    asyncio.run(main())
    gc.collect()
    assert not caplog.records


def test_calls_that_fail_together_raise_once_each_and_report_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """One of many failures ends the run: the others come in the moment in which their callers are cancelled."""

    async def main() -> int:
        host = EnvHost()
        dead = asyncio.Event()

        async def astep() -> None:
            await dead.wait()
            raise BackendDied

        async def die() -> None:
            dead.set()

        async def all_of_them() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(200):
                    group.create_task(host.call(astep, timeout=60.0, what="astep"))
                await asyncio.sleep(0)
                await host.call(die, timeout=60.0, what="die")

        with pytest.raises(ExceptionGroup) as caught:
            await all_of_them()
        await host.close()
        assert all(isinstance(error, BackendDied) for error in caught.value.exceptions)
        return len(caught.value.exceptions)

    assert 1 <= asyncio.run(main()) <= 200
    gc.collect()
    assert not caplog.records


def test_what_an_environments_own_task_raises_is_an_event(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[str, dict[str, object]]] = []

    async def main() -> None:
        host = EnvHost(lambda kind, **fields: seen.append((kind, fields)))

        async def leaves_a_task() -> None:
            async def reader() -> None:
                raise BackendDied("hung up")

            await asyncio.wait({asyncio.create_task(reader())})  # and asks for no result

        await host.call(leaves_a_task, timeout=60.0, what="astep")
        gc.collect()
        await host.close()

    asyncio.run(main())
    ((kind, fields),) = seen
    assert (kind, fields["message"]) == ("env_task_failed", "Task exception was never retrieved")
    assert "hung up" in str(fields["error"])
    assert not caplog.records


def test_results_errors_and_a_call_that_cancels_itself_arrive() -> None:
    async def seven() -> int:
        return 7

    async def fails() -> int:
        raise BackendDied("gone")

    async def cancels() -> int:
        raise asyncio.CancelledError

    async def main() -> None:
        host = EnvHost()
        assert await host.call(seven, timeout=60.0, what="a") == 7
        with pytest.raises(BackendDied, match="gone"):
            await host.call(fails, timeout=60.0, what="b")
        with pytest.raises(EnvError, match="c was cancelled by its own environment"):
            await host.call(cancels, timeout=60.0, what="c")
        await host.close()

    asyncio.run(main())
