"""Publishing: the learner's weights in one of two buffers.

    weights ─▶ cast ─▶ one of two buffers (``WeightsBuffer``: memory, disk, broadcast) ─▶ WeightsRef

A buffer is filled again at the earliest when the context that handed it out has closed, and the two are filled in
turn: what was published last stays whole until the publish after the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from torch import Tensor, nn

from areal_agents.engine import WeightsRef
from areal_agents.weights.transports import WeightsBuffer


def master_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights by state-dict name, not copied; of tied tensors the first name alone."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            out[name] = tensor
    return out


class Publisher:
    """Hands out two buffers in turn. ``publish`` waits while both are out, until one of those contexts closes."""

    def __init__(
        self, buffers: Sequence[WeightsBuffer], run: Callable[[Callable[[], WeightsRef]], Awaitable[WeightsRef]]
    ) -> None:
        """run: does a blocking call in the thread that the weights belong to."""
        self._buffers, self._run = buffers, run
        self._free: asyncio.Queue[WeightsBuffer] = asyncio.Queue()
        for buffer in buffers:
            self._free.put_nowait(buffer)

    @asynccontextmanager
    async def publish(self, write: Callable[[WeightsBuffer], WeightsRef]) -> AsyncIterator[WeightsRef]:
        """The reference that ``write`` made by filling a buffer, which is not filled again while the context is open.

        Raises what ``write`` raises; the other buffer is untouched then.
        """
        buffer = await self._free.get()
        try:
            yield await self._run(lambda: write(buffer))
        finally:
            self._free.put_nowait(buffer)

    def close(self) -> None:
        """Free the buffers; a thread that reads shared memory already goes on with it."""
        for buffer in self._buffers:
            buffer.close()
