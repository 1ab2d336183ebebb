"""Requests to a run, as files: answered, refused, withdrawn, and what silence means."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from areal_agents.errors import ArealError, ConfigError
from areal_agents.trainer import control
from areal_agents.trainer.control import answer_requests, ask
from tests.processes import until

Handler = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(control, "_LOOK_SECONDS", 0.01)


@contextlib.asynccontextmanager
async def answering(out: Path, handle: Handler) -> AsyncIterator[list[dict[str, Any]]]:
    """A run that answers; yields the events it was told."""
    told: list[dict[str, Any]] = []
    work = answer_requests(out, handle, event=lambda kind, **fields: told.append({"kind": kind, **fields}))
    task = asyncio.create_task(work)
    try:
        yield told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def silent(line: str) -> None:
    """Nobody reads it."""


def files(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "control").iterdir())


async def double(request: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"twice": 2 * request["n"]}


def test_requests_are_answered_one_by_one_and_leave_no_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with answering(tmp_path, double) as told:
            asked = [ask(tmp_path, {"n": n}, message=silent) for n in (1, 2)]
            assert sorted(a["twice"] for a in await asyncio.gather(*asked)) == [2, 4]
        assert told == []
        assert files(tmp_path) == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "said"), [(ConfigError("no 7 engines"), "^no 7 engines$"), (KeyError("x"), "^KeyError: 'x'$")]
)
def test_an_error_reaches_who_asked_and_the_event_log_and_the_next_request_is_served(
    tmp_path: Path, error: Exception, said: str
) -> None:
    async def handle(request: Mapping[str, Any]) -> Mapping[str, Any]:
        if request["n"] == 7:
            raise error
        return await double(request)

    async def main() -> None:
        async with answering(tmp_path, handle) as told:
            with pytest.raises(ArealError, match=said):
                await ask(tmp_path, {"n": 7}, message=silent)
            assert [t["kind"] for t in told] == ["request_failed"]
            assert (await ask(tmp_path, {"n": 8}, message=silent))["twice"] == 16

    asyncio.run(main())


def test_without_a_run_the_request_is_withdrawn(tmp_path: Path) -> None:
    with pytest.raises(ArealError, match=r"no sign of life for 0\.2 s|no run in .* for 0\.2 s"):
        asyncio.run(ask(tmp_path, {}, silent_seconds=0.2, message=silent))
    assert files(tmp_path) == []


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArealError, match=r"missing/control/.* cannot be written"):
        asyncio.run(ask(tmp_path / "missing", {}, message=silent))


def test_work_that_takes_longer_than_silence_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats = 0

    def touch(reply: Path, n: int) -> None:
        nonlocal beats
        beats += 1
        touched(reply, n)

    async def slow(request: Mapping[str, Any]) -> Mapping[str, Any]:
        await until(lambda: beats >= 15)
        return {}

    clock = SimpleNamespace(monotonic=lambda: float(beats), time_ns=lambda: 1)  # one second a beat, on any machine
    touched = control._touch
    monkeypatch.setattr(control, "_touch", touch)
    monkeypatch.setattr(control, "time", clock)
    lines: list[str] = []

    async def main() -> None:
        async with answering(tmp_path, slow):
            assert await ask(tmp_path, {}, silent_seconds=5, message=lines.append) == {}
        assert len(lines) == 1  # one every 10 s

    asyncio.run(main())


def test_who_waits_behind_another_hears_signs_of_life(tmp_path: Path) -> None:
    released = asyncio.Event()

    async def first_waits(request: Mapping[str, Any]) -> Mapping[str, Any]:
        if request["n"] == 1:
            await released.wait()
        return await double(request)

    async def main() -> None:
        async with answering(tmp_path, first_waits):
            first = asyncio.create_task(ask(tmp_path, {"n": 1}, message=silent))
            await until(lambda: bool(list(tmp_path.glob("control/*.reply"))))
            second = asyncio.create_task(ask(tmp_path, {"n": 2}, message=silent))
            await until(lambda: len(list(tmp_path.glob("control/*.reply"))) == 2)  # nobody works on the second yet
            released.set()
            assert [a["twice"] for a in (await first, await second)] == [2, 4]

    asyncio.run(main())


def test_a_run_that_ends_says_so(tmp_path: Path) -> None:
    begun = asyncio.Event()

    async def never(request: Mapping[str, Any]) -> Mapping[str, Any]:
        begun.set()
        await asyncio.Event().wait()
        return {}

    async def main() -> None:
        async with answering(tmp_path, never):
            asked = asyncio.create_task(ask(tmp_path, {}, message=silent))
            await begun.wait()
        with pytest.raises(ArealError, match="the run ended before"):
            await asked
        assert files(tmp_path) == []

    asyncio.run(main())


def test_what_a_dead_process_asked_is_not_done_and_one_who_still_asks_is_heard(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def note(request: Mapping[str, Any]) -> Mapping[str, Any]:
        seen.append(request["n"])
        return {}

    async def main() -> None:
        (tmp_path / "control").mkdir()
        (tmp_path / "control" / "1-1.request").write_text('{"n": 1}')
        asked = asyncio.create_task(ask(tmp_path, {"n": 2}, message=silent))
        await until(lambda: len(files(tmp_path)) == 2)
        async with answering(tmp_path, note):
            await asked
        assert seen == [2]

    asyncio.run(main())


def test_a_cancelled_request_is_withdrawn(tmp_path: Path) -> None:
    async def main() -> None:
        asked = asyncio.create_task(ask(tmp_path, {}, message=silent))
        await until(lambda: bool(list(tmp_path.glob("control/*.request"))))
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert files(tmp_path) == []

    asyncio.run(main())
