"""The publisher, which writes the learner's weights into one of two buffers.

    weights ─▶ cast ─▶ one of two buffers (``WeightsBuffer``: memory, disk, broadcast) ─▶ WeightsRef

A buffer is filled again at the earliest when the context that handed it out has closed. The two are filled in turn, so
what was published last stays whole until the publish after the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from torch import Tensor, nn

from areal_agents.engine import WeightsRef
from areal_agents.weights.transports import WeightsBuffer


def master_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by state-dict name, not copied.

    Of tied tensors it has the first name alone.
    """
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            out[name] = tensor
    return out


class Publisher:
    """Two buffers that are handed out in turn.

    ``publish`` waits while both are out, until one of those contexts closes.
    """

    def __init__(
        self, buffers: Sequence[WeightsBuffer], run: Callable[[Callable[[], WeightsRef]], Awaitable[WeightsRef]]
    ) -> None:
        """Hand out ``buffers``.

        ``run`` does a blocking call in the thread that the weights belong to.
        """
        self._buffers, self._run = buffers, run
        self._free: asyncio.Queue[WeightsBuffer] = asyncio.Queue()
        for buffer in buffers:
            self._free.put_nowait(buffer)

    @asynccontextmanager
    async def publish(self, write: Callable[[WeightsBuffer], WeightsRef]) -> AsyncIterator[WeightsRef]:
        """Let ``write`` fill a buffer, and yield the reference that it made.

        The buffer is not filled again while the context is open. Raises what ``write`` raises, and then the other
        buffer is untouched.
        """
        buffer = await self._free.get()
        try:
            yield await self._run(lambda: write(buffer))
        finally:
            self._free.put_nowait(buffer)

    def close(self) -> None:
        """Free the buffers.

        A thread that reads shared memory already goes on with it.
        """
        for buffer in self._buffers:
            buffer.close()
