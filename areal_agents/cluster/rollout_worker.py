"""A rollout worker, a process of its own for the environments and sandboxes of many episodes.

    play ─▶ LocalPlayer (one a PlayerSpec) ─▶ EpisodeDriver ─▶ EnvHost: environment, sandbox
                                                     └─▶ engine handle ─▶ engines, wherever they are

The worker may be on another node than the engines and the driver. Only task, trajectory and token ids travel.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_agents.chat.format import ChatFormat
from areal_agents.cluster.remote_errors import Failure
from areal_agents.cluster.watched_actor import process_here
from areal_agents.engine import Engine
from areal_agents.errors import ArealError, InfraError
from areal_agents.registry import EnvSpec
from areal_agents.rollout.player import LocalPlayer, PlayerSpec, prove_sandbox
from areal_agents.types import Task, Trajectory

Events = list[tuple[str, dict[str, Any]]]
"""Events on the worker, each one the kind and fields of an ``event(kind, **fields)`` that the driver repeats."""
_REMEMBERED = 1024


@dataclass(frozen=True, slots=True)
class Played:
    """The end of one attempt, and what happened on the worker meanwhile."""

    result: Trajectory | Failure
    events: Events


class RolloutWorker:
    """An async Ray actor that plays episodes.

    ``engine`` is a picklable handle that works in this process.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._formats: dict[tuple[Path, str], ChatFormat] = {}
        self._players: dict[int, asyncio.Task[LocalPlayer]] = {}
        self._attempts: dict[int, asyncio.Task[Trajectory]] = {}
        self._cancelled: deque[int] = deque(maxlen=_REMEMBERED)
        self._events: Events = []

    async def start(self, env: EnvSpec, sandbox: str) -> tuple[str, int] | Failure:
        """Prove the sandbox of ``env`` on this node.

        Returns node and process id, or SandboxUnavailable as a ``Failure``.
        """
        try:
            await prove_sandbox(env, sandbox)
        except ArealError as error:
            return Failure.of(error)
        return process_here()

    async def ping(self) -> Events:
        """Answer between two events of the loop, with what happened since the last answer of any kind."""
        return self._drain()

    async def play(
        self, ticket: int, player: int, spec: PlayerSpec, task: Task, id: str, group: str, seed: int
    ) -> Played:
        """Make one attempt at one episode.

        Args:
            ticket: the number of the attempt, by which ``cancel`` ends it.
            player: the number of the player that plays it.
            spec: how to build that player, at its first use.
            task: the task of the episode.
            id: the attempt's own id, which is also the engine's session.
            group: id of the group that the attempt belongs to.
            seed: the seed of the environment.
        """
        if ticket in self._cancelled:
            return self._played(Failure.of(InfraError("the episode was cancelled")))
        attempt = asyncio.create_task(self._play(player, spec, task, id, group, seed), name=id)
        self._attempts[ticket] = attempt
        try:
            await asyncio.wait({attempt})
        finally:
            del self._attempts[ticket]
        if attempt.cancelled():
            return self._played(Failure.of(InfraError("the episode was cancelled")))
        try:
            return self._played(attempt.result())
        except ArealError as error:
            return self._played(Failure.of(error))

    async def _play(self, player: int, spec: PlayerSpec, task: Task, id: str, group: str, seed: int) -> Trajectory:
        if player not in self._players:
            # In a thread, because it imports the environment and reads the tokenizer while others play.
            self._players[player] = asyncio.create_task(asyncio.to_thread(self._build, spec), name=f"player-{player}")
        try:
            # Other attempts wait for the same player. This one's cancellation must not end its building.
            built = await asyncio.shield(self._players[player])
        except ArealError:
            self._players.pop(player, None)  # another attempt may find a file that this one missed
            raise
        return await built.play(task, id=id, group=group, seed=seed)

    def _build(self, spec: PlayerSpec) -> LocalPlayer:
        key = (spec.model, repr(spec.chat))
        if key not in self._formats:
            self._formats[key] = ChatFormat.load(spec.model, spec.chat)
        return spec.build(self._engine, fmt=self._formats[key], event=self._event)

    async def cancel(self, ticket: int) -> None:
        """Cancel an attempt and wait for its end.

        Then its environment is closed and its request to the engine aborted.
        """
        attempt = self._attempts.get(ticket)
        if attempt is None:  # over already; or it overtook ``play``
            self._cancelled.append(ticket)
            return
        attempt.cancel()
        await asyncio.wait({attempt})

    async def end_player(self, player: int) -> Events:
        """Close a player with its environments' host and its sandboxes."""
        built = self._players.pop(player, None)
        if built is not None:
            await asyncio.wait({built})
            if not built.cancelled() and built.exception() is None:
                await built.result().close()
        return self._drain()

    async def close(self) -> Events:
        """Cancel every attempt and close every player."""
        running = list(self._attempts.values())
        for attempt in running:
            attempt.cancel()
        if running:
            await asyncio.wait(running)
        await asyncio.gather(*(self.end_player(player) for player in list(self._players)))
        return self._drain()

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append((kind, fields))

    def _drain(self) -> Events:
        events, self._events = self._events, []
        return events

    def _played(self, result: Trajectory | Failure) -> Played:
        return Played(result, self._drain())
