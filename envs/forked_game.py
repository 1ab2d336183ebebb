"""An AgentEnv around a game of another package, each episode of which is played in a process of its own.

    areset ──▶ a process forked by one that has imported the game ──one JSON line──▶ game.reset(seed=…)
    astep  ──one JSON line──▶ game.step(text) ──one JSON line──▶ (observation, reward, terminated, truncated)

So a game may block, seed the generators of the whole process, print, leak or hang: it does so to itself. The processes
start in milliseconds, with PYTHONHASHSEED set. They have the user's rights and are no sandbox.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

from areal_agents.context import ContextLike, context_of
from areal_agents.env import AgentEnv
from areal_agents.envs.forked_game_worker import ENTRY, MAX_REPLY
from areal_agents.errors import ConfigError, EnvError
from areal_agents.process_env import KILLED
from areal_agents.rewards.mathematics.fork_server import Forked, ForkServer
from areal_agents.types import AssistantMessage, Info, Observation, Task, system, user

MAKE_SECONDS = 60.0
TEST_SEEDS_FROM = 1 << 30
"""Training seeds count from 0, those of the test split from here on, so that the splits share no seed."""


class ForkedGame(AgentEnv):
    """The base class of adapters to games over text. A task's payload has a ``seed``, with which the game is reset."""

    sizes: ClassVar[Mapping[str, int]] = {"train": 4096, "test": 512}

    def __init__(
        self,
        entry: str,
        arguments: Mapping[str, Any],
        *,
        system_prompt: str = "",
        max_turns: int | None = None,
        step_timeout: float = 30.0,
        context: ContextLike | None = None,
    ) -> None:
        """Make an environment, whose process starts at each reset.

        Args:
            entry: a Gymnasium id, or ``"module:name"`` of a class or function.
            arguments: of it, which must be JSON.
            system_prompt: shown before the first observation. Empty is none.
            max_turns: after which an episode is truncated, besides the game's own limit.
            step_timeout: seconds for one reset or step.
            context: as ``ToolEnv`` has it. A game's boards are shown as a user: ``Fold(roles=("user",))``.

        Raises:
            ConfigError: an argument is out of range, or no JSON.
        """
        super().__init__()
        if context is not None:
            self.context = context_of(context)
        if max_turns is not None and max_turns < 1:
            raise ConfigError(f"max_turns = {max_turns} must be at least 1")
        try:
            self._arguments: dict[str, Any] = json.loads(json.dumps(dict(arguments), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the arguments of {entry!r} are no JSON: {error}") from error
        self._entry, self._system_prompt, self._max_turns = entry, system_prompt, max_turns
        self._step_timeout = self.step_seconds = step_timeout
        self._session: Session | None = None
        self._turns = 0

    def require_own(self, task: Task) -> None:
        """Raise TaskError where ``task`` belongs to another game. Here any task may be played."""

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        task = self.begin(seed, options)
        await self.aclose()
        self.require_own(task)
        self._turns = 0
        self._session = await Session.start(self._entry)
        seed = task.payload["seed"]
        await self._ask({"make": [self._entry, self._arguments], "seed": seed}, MAKE_SECONDS)
        reply = await self._settled(await self._ask({"reset": seed}, self._step_timeout))
        opening = (system(self._system_prompt),) if self._system_prompt else ()
        return (*opening, user(reply["observation"])), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        self._turns += 1
        return self._stepped(await self._settled(await self._ask({"step": action.spoken}, self._step_timeout)))

    async def _settled(self, reply: dict[str, Any]) -> dict[str, Any]:
        """Return what the agent sees after a reply: the same, where nobody else plays."""
        return reply

    def _stepped(self, reply: Mapping[str, Any]) -> tuple[Observation, float, bool, bool, Info]:
        """Return what a turn of the agent led to. The last observation is shown too."""
        terminated, truncated = reply["terminated"], reply["truncated"]
        if self._max_turns is not None and self._turns >= self._max_turns and not terminated:
            truncated = True
        info: Info = {}
        if terminated or truncated:
            info["stop_reason"] = "answer" if terminated else "max_turns"
        if "components" in reply:
            info["components"] = dict(reply["components"])
        return (user(reply["observation"]),), reply["reward"], terminated, truncated, info

    async def aclose(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.end()

    async def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Ask the episode's process. Any failure ends it."""
        if self._session is None:
            raise EnvError(f"{type(self).__name__}: no episode is running; call reset first")
        answered = False
        try:
            reply = await self._session.ask(request, seconds)
            if "error" in reply:
                failed = EnvError(f"{self._entry} failed: {reply['error']}")
                failed.blame = "outside" if reply["outside"] else "environment"
                raise failed
            answered = True
            return reply
        finally:
            if not answered:
                await self.aclose()


class Session:
    """The process of one episode. It belongs to one event loop."""

    def __init__(self, server: ForkServer, forked: Forked, entry: str) -> None:
        self._server, self._forked, self._entry = server, forked, entry
        self._ended = False
        self._read = b""
        forked.socket.setblocking(False)

    @classmethod
    async def start(cls, entry: str) -> Session:
        """Fork a process. The first one of an entry point waits for its import."""
        server = _server(entry)
        starting = _threads.submit(server.fork)
        try:
            return cls(server, await asyncio.wrap_future(starting), entry)
        except asyncio.CancelledError:
            starting.add_done_callback(lambda done: _end_unwanted(server, done))
            raise

    async def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises EnvError where there is none within ``seconds``, or the process ended. One that was killed, as by a
        machine without memory, is not to blame.
        """
        loop, mine = asyncio.get_running_loop(), self._forked.socket
        try:
            async with asyncio.timeout(seconds):
                await loop.sock_sendall(mine, json.dumps({**request, "seconds": seconds}).encode() + b"\n")
                while b"\n" not in self._read:
                    chunk = await loop.sock_recv(mine, 1 << 16)
                    if not chunk:
                        raise ConnectionResetError
                    self._read += chunk
                    if len(self._read) > 2 * MAX_REPLY:
                        raise EnvError(f"{self._entry} broke off: its reply is too long")
        except TimeoutError as error:
            hung = EnvError(f"{self._entry} did not answer within {seconds:g} s and was ended")
            hung.blame = "hang"
            raise hung from error
        except OSError:
            status = await self._end(hung_up=True)
            how = "hung up" if status is None else f"ended with status {status}"
            ended = EnvError(f"{self._entry} broke off: its process {how} (what it said stands on stderr)")
            if status in KILLED:
                ended.blame = "outside"
            raise ended from None  # the broken connection is this process's own
        line, _, self._read = self._read.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        return reply

    async def end(self) -> None:
        """End the process, and what it has started."""
        if not self._ended:
            await self._end(hung_up=False)

    async def _end(self, *, hung_up: bool) -> int | None:
        """End the process, and return its exit status where it had ended before, as ``ForkServer.end`` does."""
        self._ended = True
        return await asyncio.shield(asyncio.wrap_future(_threads.submit(self._ended_group, hung_up)))

    def _ended_group(self, hung_up: bool) -> int | None:
        status = self._server.end(self._forked, hung_up=True) if hung_up else None  # before it is killed, to know how
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._forked.pid, signal.SIGKILL)
        return status if hung_up else self._server.end(self._forked)


_threads = ThreadPoolExecutor(2, thread_name_prefix="games")
_servers: dict[tuple[int, str], ForkServer] = {}
_guard = threading.Lock()


def _server(entry: str) -> ForkServer:
    """Return the process that forks the episodes of an entry point. It imports from where this one does."""
    key = os.getpid(), entry
    with _guard:
        if key not in _servers:
            path = os.pathsep.join(p or os.getcwd() for p in sys.path)
            environment = {ENTRY: entry, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
            server = _servers[key] = ForkServer("areal_agents.envs.forked_game_worker", entry, environment)
            atexit.register(server.close)
        return _servers[key]


def _end_unwanted(server: ForkServer, done: Future[Forked]) -> None:
    if not done.cancelled() and done.exception() is None:
        server.end(done.result())
