"""An environment with a backend: every step is a line sent to a server, and a line that comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from areal_agents.env import AgentEnv
from areal_agents.types import AssistantMessage, Info, Observation, StopReason, Task, user


class Backed(AgentEnv):
    """Two turns; right where the backend says yes. As clients of websockets do, it reads in a task of its own."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.reading: asyncio.Task[None] | None = None
        self.writer: asyncio.StreamWriter | None = None

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return [Task.make(f"{split}-{i}", split=split, seed=i, payload={"word": f"{split} {i}"}) for i in range(64)]

    async def areset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        self.begin(seed, options)
        self.turn = 0
        reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.lines: asyncio.Queue[str] = asyncio.Queue()
        self.reading = asyncio.create_task(self.read(reader))
        return (user(str(self.task.payload["word"])),), {}

    async def read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            self.lines.put_nowait(line.decode().strip())
        raise ConnectionError("the backend hung up")

    async def astep(self, action: AssistantMessage) -> tuple[Observation, float, bool, bool, Info]:
        assert self.writer is not None
        assert self.reading is not None
        self.turn += 1
        self.writer.write(b"step\n")
        line = asyncio.ensure_future(self.lines.get())
        await asyncio.wait({line, self.reading}, return_when=asyncio.FIRST_COMPLETED)
        if not line.done():
            line.cancel()
            raise ConnectionError("the backend is gone")
        reward = 0.5 if line.result() == "yes" else 0.0
        if self.turn == 2:
            return (), reward, True, False, {"stop_reason": "answer"}
        return (user("again"),), reward, False, False, {}

    async def afinish(self, reason: StopReason) -> tuple[float, Info]:
        return 0.0, {"stop_reason": reason}

    async def aclose(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.reading is not None:
            self.reading.cancel()
