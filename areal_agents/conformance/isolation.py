"""Checks that episodes touch neither each other nor what was returned before (``areal_agents.conformance.check``).

The same task and seed must give the same episode beside other episodes, after its returned values were spoilt, and
beside an episode that was cancelled.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np

from areal_agents.conformance.contract import Subject
from areal_agents.conformance.scripted_episode import (
    AT_ONCE,
    ScriptedEpisode,
    ScriptName,
    plain,
    spoil,
    trace_difference,
)
from areal_agents.errors import ArealError, CheckError
from areal_agents.utils.outcomes import unheard

LOOP_TURNS = (1, 2, 3, 8)
SECONDS = (0.02, 0.2)
"""When a call is cancelled: after so many turns of the event loop, after so many seconds."""


async def isolation(subject: Subject) -> str:
    """Check that an episode is the same alone, a second time and together with others."""
    first = subject.sample()[0]
    alone = [await subject.alone(task) for task in subject.sample()]
    clumsy = (await subject.played(first, "clumsy")).trace
    again = await subject.played(first)
    found = trace_difference(alone[0], again.trace)
    if found:
        raise CheckError(
            f"the same task and seed give another episode after other episodes, {found}. State must live in the "
            "instance and be set anew by areset, never in the class or the module"
        )
    together = [subject.episode(task) for task in subject.sample()]
    error = await _rest(*together)
    for k, (episode, trace) in enumerate(zip(together, alone, strict=True)):
        _require_same(trace, episode, error, f"episode {k} of {len(alone)} differs when they run together", "")
    # The episodes of a group play one task, each in its own way: what is kept by the task's id is shared by them.
    twins = [subject.episode(first), subject.episode(first, "clumsy")]
    error = await _rest(*twins)
    for episode, trace in zip(twins, (alone[0], clumsy), strict=True):
        _require_same(trace, episode, error, "an episode differs beside another one of the same task", "")
    subject.at_once = AT_ONCE
    return f"{len(alone)} concurrent episodes equal one by one"


def _require_same(
    expected: list[Any], episode: ScriptedEpisode, error: ArealError | None, what: str, remedy: str
) -> None:
    """Raise CheckError where the episode is not the expected one.

    An episode that ended in ``error`` is compared as far as it went, and its error is a finding in any case.
    """
    found = trace_difference(expected[: len(episode.trace)] if error else expected, episode.trace)
    if found or error:
        raise CheckError(f"{what}, {found or error}{remedy}")


async def _rest(
    *episodes: ScriptedEpisode, before_turn: Callable[[ScriptedEpisode], None] = lambda episode: None
) -> ArealError | None:
    """Play ``episodes`` together, turn by turn to their ends, and close them.

    Return the error that stopped them, or None.
    """
    try:
        await asyncio.gather(*(e.open() for e in episodes if not e.trace))
        while running := [e for e in episodes if not e.ended]:
            for episode in running:
                before_turn(episode)
            await asyncio.gather(*(e.turn() for e in running))
    except ArealError as error:
        return error
    finally:
        for episode in episodes:
            await episode.close()
    return None


async def aliasing(subject: Subject) -> str:
    """Check that what was returned never changes afterwards, and that changing it changes nothing."""
    task = subject.sample()[0]
    names: tuple[ScriptName, ...] = ("main", "clumsy")
    for name in names:
        kept = await subject.played(task, name)
        for i, (entry, value) in enumerate(zip(kept.trace, kept.returned, strict=True)):
            found = trace_difference([entry], [{"call": entry["call"], "returned": plain(value)}])
            if found:
                raise CheckError(f"call {i} returned an object that changed later, {found}: return copies")
        spoilt = subject.episode(task, name)
        error = await _rest(spoilt, before_turn=lambda episode: spoil(episode.returned[-1]))
        what = "writing into what an earlier call returned changes the episode"
        _require_same(kept.trace, spoilt, error, what, ": return copies")
    return "returned values are copies"


async def global_rng(subject: Subject) -> str:
    """Check that playing an episode leaves the generators of random, numpy and torch alone."""
    import torch

    def states() -> dict[str, Any]:
        legacy = np.random.get_state(legacy=False)
        return {"random": random.getstate(), "numpy": plain(legacy), "torch": torch.get_rng_state().tolist()}

    old = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        # A state that no earlier episode can have left. An environment that seeds a generator always leaves the same
        # state, so from there nothing would seem to change.
        fresh = time.time_ns() % 2**32
        random.seed(fresh)
        np.random.seed(fresh)
        torch.manual_seed(fresh)
        before = states()
        await subject.played(subject.sample()[0])
        await subject.played(subject.sample()[0], "clumsy")
        touched = [name for name, state in states().items() if state != before[name]]
    finally:
        random.setstate(old[0])
        np.random.set_state(old[1])
        torch.set_rng_state(old[2])
    if touched:
        raise CheckError(f"an episode uses the global generator of {', '.join(touched)}: use self.np_random")
    return "random, numpy and torch untouched"


# ── cancellation ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def cancellation(subject: Subject) -> str:
    """Check that astep and areset end when they are cancelled.

    ``aclose`` must work then, and a neighbouring episode must notice nothing.
    """
    sample = subject.sample()
    expected = await subject.alone(sample[-1])
    # Whatever serves all episodes (a sandbox pool) exists by now.
    before = asyncio.all_tasks()
    moments: list[float] = [*LOOP_TURNS, *SECONDS]
    for moment in moments:
        for call in ("areset", "astep"):
            victim, neighbour = subject.episode(sample[0]), subject.episode(sample[-1])
            try:
                await neighbour.open()
                await _cancel(victim, call, moment)
                error = await _rest(neighbour)
            finally:
                await neighbour.close()
                await victim.close()
            _require_same(expected, neighbour, error, f"cancelling {call} of one episode changes another one", "")
    await _no_tasks_left(before)
    return f"areset and astep cancelled at {len(moments)} moments each"


async def _cancel(victim: ScriptedEpisode, call: str, moment: float) -> None:
    """Cancel ``call`` after ``moment``.

    An int counts turns of the event loop, a float counts seconds. The environment is called directly, because a host
    in between would take the cancellation and use turns of the loop.
    """
    env = victim.env
    if call == "areset":
        work = asyncio.ensure_future(_discard(env.areset(seed=victim.seed, options={"task": victim.task})))
    else:
        await victim.open()
        said = await victim.script.say(victim)
        work = asyncio.ensure_future(_discard(env.astep(said.message)))
    if isinstance(moment, int):
        for _ in range(moment):
            await asyncio.sleep(0)
    else:
        await asyncio.wait({work}, timeout=moment)
    work.cancel()
    unheard(work)
    grace = min(victim.step_timeout, 10.0)
    await asyncio.wait({work}, timeout=grace)
    if not work.done():
        raise CheckError(f"{call} did not end within {grace:g} s after it was cancelled: let CancelledError through")
    if not work.cancelled() and work.exception() is not None:
        raise CheckError(f"{call} raised {work.exception()!r} when it was cancelled: let CancelledError through")


async def _discard(call: Coroutine[Any, Any, object]) -> None:
    await call


async def _no_tasks_left(before: set[asyncio.Task[Any]]) -> None:
    for _ in range(100):
        left = {t for t in asyncio.all_tasks() - before if not _of_sandboxes(t)}
        if not left:
            return
        await asyncio.wait(left, timeout=0.02)
    names = sorted(getattr(t.get_coro(), "__qualname__", t.get_name()) for t in left)
    raise CheckError(f"after aclose {len(left)} tasks of the environment still run: {', '.join(names)}")


def _of_sandboxes(task: asyncio.Task[Any]) -> bool:
    """Say whether ``task`` belongs to a sandbox pool.

    A pool refills itself between episodes, so its tasks are not an episode's.
    """
    frame = getattr(task.get_coro(), "cr_frame", None)
    scope: Mapping[str, Any] = frame.f_globals if frame is not None else {}
    return str(scope.get("__name__", "")).startswith("areal_agents.sandboxes")
