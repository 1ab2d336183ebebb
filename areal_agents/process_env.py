"""An AgentEnv around any synchronous ``gymnasium.Env`` over text, which runs in a child process that can be killed.

    class Guess(TextProcessEnv):
        entry_point = "textgames.guess:GuessEnv"        # or a Gymnasium id
        system_prompt = "Guess the number."

    astep ──one JSON line──▶ child: env.step(text) ──one JSON line──▶ (observation, reward, …)

A step that hangs or kills its process is an EnvError of one episode and never stops another. The child is a
convenience for code you trust. It has your user's rights and is no sandbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any, ClassVar

import gymnasium
import numpy as np

from areal_agents.env import AgentEnv, LazyTasks
from areal_agents.errors import EnvError
from areal_agents.types import AssistantMessage, Info, Observation, Task, system, user
from areal_agents.utils.faults import from_outside
from areal_agents.utils.parent import end_with_parent
from areal_agents.utils.real_number import finite
from areal_agents.utils.short_text import described, short

_MAX_LINE_BYTES = 16 << 20
_STDERR_TAIL_BYTES = 2000
KILLED = (-signal.SIGKILL, -signal.SIGTERM)
"""SIGKILL and SIGTERM: ends that somebody else gives a process, such as a machine that runs out of memory."""
_TEST_SEEDS_FROM = 1 << 30
"""Train seeds count from 0, those of every other split from here on, so that splits share no seed."""
_PLAIN_SECONDS = 3600.0
"""Of a plain environment, which cannot say how long a step may take: ``env.step_timeout`` says it, and is shorter."""


class TextProcessEnv(AgentEnv):
    """The base class of environments that wrap a ``gymnasium.Env`` in a child process.

    Subclass it and set ``entry_point``. Observations and actions of the wrapped environment are strings. A task is a
    seed that the wrapped environment is reset with.
    """

    entry_point: ClassVar[str]
    """``"module:Class"`` or a Gymnasium id; made with ``env_kwargs``, which must be JSON."""
    env_kwargs: ClassVar[Mapping[str, Any]] = {}
    system_prompt: ClassVar[str] = ""
    sizes: ClassVar[Mapping[str, int]] = {"train": 4096, "test": 512}
    """Tasks a split."""

    def __init__(self, *, step_timeout: float = 30.0, start_timeout: float = 60.0) -> None:
        """Make an environment, whose child starts at the first reset.

        Args:
            step_timeout: seconds for one reset or step.
            start_timeout: seconds for the child's start with its imports.
        """
        super().__init__()
        if not getattr(type(self), "entry_point", ""):
            raise EnvError(f'{type(self).__name__} has no `entry_point`: set it to "module:Class" or a Gymnasium id')
        self._step_timeout = self.step_seconds = step_timeout
        self._start_timeout = start_timeout
        self._kwargs: Mapping[str, Any] = self.env_kwargs
        self._child: asyncio.subprocess.Process | None = None
        self._group: asyncio.Task[None] | None = None
        self._stderr: IO[bytes] | None = None

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        names = [name for name in cls.sizes if name != "train"]
        first = 0 if split == "train" else _TEST_SEEDS_FROM * (1 + names.index(split))
        return LazyTasks(
            cls.sizes[split],
            lambda i: Task.make(f"{split}-{i}", split=split, seed=first + i, payload={"seed": first + i}),
        )

    def action_text(self, action: AssistantMessage) -> str:
        """Return what the wrapped environment gets of a message.

        By default that is its text after the reasoning.
        """
        return action.spoken

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        task = self.begin(seed, options)
        if self._child is None:
            await self._start()
        reply = await self._ask({"reset": task.payload["seed"]}, self._step_timeout)
        opening = (system(self.system_prompt),) if self.system_prompt else ()
        return (*opening, user(reply["observation"])), {}

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        if self._child is None:
            raise EnvError(f"{type(self).__name__}: no episode is running; call reset first")
        reply = await self._ask({"step": self.action_text(action)}, self._step_timeout)
        reward, terminated, truncated = reply["reward"], reply["terminated"], reply["truncated"]
        info: Info = {}
        if terminated or truncated:
            info["stop_reason"] = "answer" if terminated else "max_turns"
        return (user(reply["observation"]),), reward, terminated, truncated, info

    async def aclose(self) -> None:
        child, self._child = self._child, None
        stderr, self._stderr = self._stderr, None
        if child is not None:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # the session that it leads, its own children included
            if child.stdin is not None:
                child.stdin.close()
        if self._group is not None:  # also where another call has begun to close it
            await asyncio.wait({self._group})
        if stderr is not None:
            stderr.close()

    async def _start(self) -> None:
        if not hasattr(os, "killpg"):
            raise EnvError(
                f"{type(self).__name__} plays in a process group, which {sys.platform} lacks: use Linux or macOS"
            )
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed by aclose
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "areal_agents.process_env", self.entry_point, json.dumps(dict(self._kwargs)),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=self._stderr,
            start_new_session=True, limit=_MAX_LINE_BYTES,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        self._group = asyncio.create_task(_end_group(self._child))
        await self._ask(None, self._start_timeout)

    async def _ask(self, request: Mapping[str, Any] | None, timeout: float) -> dict[str, Any]:
        """Send a request and read the reply, or wait for the child's greeting where ``request`` is None.

        Any failure ends the child.
        """
        assert self._child is not None
        reader, writer = self._child.stdout, self._child.stdin
        assert reader is not None
        assert writer is not None
        answered = False
        try:
            async with asyncio.timeout(timeout):
                if request is not None:
                    writer.write(json.dumps(request).encode() + b"\n")
                    await writer.drain()
                line = await reader.readline()
            if not line:
                raise ConnectionResetError
            reply: dict[str, Any] = json.loads(line)
            if "error" in reply:
                failed = EnvError(f"{self.entry_point} failed: {reply['error']}")
                failed.blame = "outside" if reply["outside"] else "environment"
                raise failed
            answered = True
            return reply
        except TimeoutError as error:
            hung = EnvError(f"{self.entry_point} did not answer within {timeout:g} s and was killed")
            hung.blame = "hang"
            raise hung from error
        except ConnectionError:
            ended = EnvError(f"the process of {self.entry_point} ended{await self._last_words()}")
            if self._child.returncode in KILLED:
                ended.blame = "outside"
            raise ended from None  # the broken connection is this process's own
        except ValueError as error:  # no JSON, or a line over the limit
            raise EnvError(f"{self.entry_point} broke off: {error!r}{await self._last_words()}") from error
        finally:
            if not answered:  # a late answer would be taken for the next one's; cancellation ends here too
                await self.aclose()

    async def _last_words(self) -> str:
        child, stderr = self._child, self._stderr
        assert child is not None
        assert stderr is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await child.wait()
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _STDERR_TAIL_BYTES))
        tail = stderr.read().decode(errors="replace").strip()
        return f" with status {child.returncode}" + (f": {tail}" if tail else "")


@functools.cache
def wrapped(entry_point: str) -> type[TextProcessEnv]:
    """Return the ``TextProcessEnv`` of a plain ``gymnasium.Env`` over text, with the arguments of that class."""
    entry = entry_point

    class Plain(TextProcessEnv):
        """A plain ``gymnasium.Env``, as its own code has it."""

        entry_point = entry

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(step_timeout=_PLAIN_SECONDS)
            self._kwargs = kwargs

    Plain.__name__ = Plain.__qualname__ = entry_point.partition(":")[2]
    return Plain


async def _end_group(child: asyncio.subprocess.Process) -> None:
    """Wait for the child's end, and end what it leaves behind.

    At once, and nobody does it later: without members, the group's number may be given to another one.
    """
    await child.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


# The child

_RETURNS = {
    "reset": ("observation", "info"),
    "step": ("observation", "reward", "terminated", "truncated", "info"),
}


def make_plain(entry_point: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    """Make what an entry point names: a Gymnasium id, or a class or function of a module."""
    module, _, name = entry_point.partition(":")
    if not name.isidentifier():  # "module:namespace/Name-v0" too, which imports the module that registers it
        made: gymnasium.Env[Any, Any] = gymnasium.make(entry_point, **kwargs)
        return made
    found: gymnasium.Env[Any, Any] = getattr(importlib.import_module(module), name)(**kwargs)
    return found


def _serve(entry_point: str, kwargs: Mapping[str, Any], requests: IO[bytes], replies: IO[bytes]) -> None:
    def answer(reply: Mapping[str, Any]) -> None:
        line = json.dumps(reply).encode() + b"\n"
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(
                f"its reply has {len(line) / (1 << 20):.1f} MiB as JSON, and at most {_MAX_LINE_BYTES >> 20} MiB are "
                f"read ({', '.join(f'{k} {short(v)}' for k, v in reply.items())}): return a shorter observation"
            )
        replies.write(line)
        replies.flush()

    try:
        env = make_plain(entry_point, kwargs)
        answer({"ready": True})
        for line in requests:
            request = json.loads(line)
            if "reset" in request:
                answer(checked_return("reset", env.reset(seed=request["reset"])))
            else:
                answer(checked_return("step", env.step(request["step"])))
    except Exception as error:  # noqa: BLE001  the boundary: reported to the parent, which ends this process
        answer({"error": described(error), "outside": from_outside(error)})


def checked_return(call: str, returned: object) -> dict[str, Any]:
    """Return what ``reset`` or ``step`` returned as plain values by name.

    Raises TypeError where it is not what Gymnasium's contract says, and for a reward that is no finite number.
    """
    names = _RETURNS[call]
    if not isinstance(returned, tuple) or len(returned) != len(names):
        raise TypeError(f"{call} returned {short(returned)}, not ({', '.join(names)})")
    got = dict(zip(names, returned, strict=True))
    if not isinstance(got["observation"], str):
        raise TypeError(f"{call} returned the observation {short(got['observation'])}, which is not a text")
    if not isinstance(got.pop("info"), Mapping):
        raise TypeError(f"{call} returned info {short(returned[-1])}, which is not a dict")
    plain: dict[str, Any] = {"observation": str(got["observation"])}
    for flag in ("terminated", "truncated"):
        if flag in got:
            if not isinstance(got[flag], bool | np.bool_):
                raise TypeError(f"{call} returned {flag} = {short(got[flag])}, which is not a bool")
            plain[flag] = bool(got[flag])
    if "reward" in got:
        try:
            plain["reward"] = finite(got["reward"])
        except ValueError as wrong:
            raise TypeError(f"{call} returned the reward {short(got['reward'])}, which is {wrong}") from wrong
    return plain


def main() -> None:
    """Serve the environment named by the arguments over the original stdin and stdout."""
    end_with_parent()
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:  # what the environment reads must not be the requests
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what the environment prints must not mix with the replies
    _serve(sys.argv[1], json.loads(sys.argv[2]), requests, replies)


if __name__ == "__main__":
    main()
