"""Weights by a collective broadcast from the learner to every engine.

NCCL broadcasts between GPUs, Gloo between CPUs.

    sender (one a version)                              receiver (an engine's process)
    TCPStore on HOST:PORT ◀── ticket, join ──────────── connect
    enough joined, or the grace is over ── call ──────▶ here                          who is dead falls out here
    ranks of those that are here ──────── answer ─────▶ process group of this round
    the flat buffer, bucket by bucket ═══ broadcast ══▶ the flat buffer, its checksum

Every delivery is a *round* with a process group of its own. The group is formed beside the default one, which in a vLLM
process belongs to vLLM. Whoever comes later (a restarted engine, a new one, one whose round failed) gets a round of its
own from the same buffer, for as long as the sender holds this version.

Waits for / unblocked by: the sender waits for joins, and is unblocked by a join or ``close``. A round waits for its
members, and is unblocked by their answers, the end of a connection or the round's deadline. A receiver waits for its
round, and is unblocked by the sender's answer or its own deadline. A member that dies ends the round for all. They ask
again (``attempts``), and the next round is formed without it.

Whoever reaches HOST:PORT can read the weights. Use it inside a trusted network, as torch.distributed itself.
**NCCL between two GPUs was not run.** The rounds, the deadlines and the packing are those that run with Gloo.
"""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # not in its __all__

from areal_agents.engine import WeightsRef
from areal_agents.errors import ConfigError, EngineError
from areal_agents.weights.base import LoadedWeights, check, checksum, fill, layout, views
from areal_agents.weights.process_group import Broadcaster, BroadcastGroup, broadcast, open_group

_POLL = 0.02
"""Seconds between two looks at the store. A wait in it that meets its deadline prints to stderr, a look does not."""
_CONNECT_SECONDS = 5.0
_SLOWEST = 25e6


@dataclass(frozen=True, slots=True)
class RoundLimits:
    """The limits of a round, in seconds where they are times."""

    grace: float = 5.0
    """After the first join, while the other engines are expected."""
    call: float = 5.0
    """From the call to the answer of a member."""
    transfer: float = 0.0
    """From the ranks to the last byte, for all members. 0 means 30 s and a second for every 25 MB."""
    bucket: int = 64 << 20
    """Bytes of one broadcast. Large enough for a network, small enough for staging on a GPU."""

    def round(self, nbytes: int) -> float:
        """Return the deadline of a round for ``nbytes``, in seconds."""
        return self.transfer or 30.0 + nbytes / _SLOWEST


class BroadcastWeights:
    """One version in the memory of the learner's process, sent to whoever asks."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        backend: Broadcaster,
        *,
        host: str = "127.0.0.1",
        receivers: Callable[[], int] | None = None,
        limits: RoundLimits | None = None,
    ) -> None:
        """Allocate the buffer.

        ``fill`` opens the port.

        Args:
            tensors: names and shapes of what ``fill`` will get.
            dtype: the format that they are cast to.
            backend: nccl or gloo.
            host: this machine's address as engines reach it. It listens there alone.
            receivers: how many processes will ask for a version (an engine of tensor_parallel n counts n times).
                ``fill`` calls it. A round begins when that many have joined. With None every round waits for its
                grace period.
            limits: the limits of a round.

        Raises:
            ConfigError: this PyTorch has no such backend.
        """
        if not (dist.is_nccl_available() and torch.cuda.is_available() if backend == "nccl" else _has_gloo()):
            needs = "a PyTorch with NCCL and a GPU" if backend == "nccl" else "a PyTorch with Gloo"
            raise ConfigError(f'transport = "{backend}" needs {needs}, and this process has none: set "disk" or "shm"')
        self.manifest, self.nbytes = layout(tensors.items(), dtype)
        self._backend, self._host, self._receivers = backend, host, receivers
        self._limits = limits or RoundLimits()
        self._buffer = torch.zeros(self.nbytes, dtype=torch.uint8, pin_memory=backend == "nccl")
        self._tensors = views(self._buffer, self.manifest)
        self._sender: Sender | None = None

    def fill(self, tensors: Mapping[str, Tensor], version: int) -> WeightsRef:
        """Copy (and cast) ``tensors`` in, offer them on a port of their own and return the reference to them.

        The version held before is withdrawn, and its running round cut off. Raises EngineError where no port can be
        opened.
        """
        self._withdraw()
        fill(self._tensors, tensors)
        found = checksum(self._buffer.numpy().data)
        expected = self._receivers() if self._receivers is not None else None
        self._sender = Sender(self._buffer, found, self._backend, self._host, expected, self._limits)
        return WeightsRef(
            version, self._sender.locator, self.manifest, found, self.nbytes, transport=self._backend
        )  # fmt: skip

    @property
    def failures(self) -> list[str]:
        """The reasons why rounds of the version held failed, oldest first."""
        return [] if self._sender is None else list(self._sender.failures)

    def close(self) -> None:
        """Withdraw the version held, within seconds.

        May be called twice.
        """
        self._withdraw()

    def _withdraw(self) -> None:
        if self._sender is not None:
            self._sender.stop()
            self._sender = None


class Sender:
    """A thread that offers one version on a port until ``stop``, one round after the other."""

    def __init__(
        self, buffer: Tensor, checksum: str, backend: Broadcaster, host: str, expected: int | None, limits: RoundLimits
    ) -> None:
        """Open the port and start the thread.

        Args:
            buffer: the weights, flat bytes.
            checksum: the checksum of ``buffer``, by which receivers know the version.
            backend: nccl or gloo.
            host: the address of this machine to listen on.
            expected: receivers of this version, None where unknown.
            limits: the limits of a round.

        Raises:
            EngineError: ``host`` is not an address of this machine.
        """
        self.failures: deque[str] = deque(maxlen=100)
        self.rounds = 0
        self._buffer, self._backend, self._host = buffer, backend, host
        self._expected, self._limits, self._served = expected, limits, 0
        self._seconds = limits.round(buffer.numel())
        self._known = 0
        self._open: set[int] = set()
        self._stopping = threading.Event()
        self._group: BroadcastGroup | None = None
        try:
            listening = socket.create_server((host, 0), family=_family(host))
        except OSError as error:
            raise EngineError(
                f"weights cannot be offered on {host}: {error.strerror}. Name an address of the learner's machine"
            ) from error
        port = int(listening.getsockname()[1])
        self.locator = f"{backend}://{host}:{port}"
        self._store: Store = TCPStore(
            host, port, None, True, timeout=timedelta(seconds=self._seconds), wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )  # fmt: skip
        # A receiver may wait for one round of others, and then for its own.
        patience = 2 * (self._seconds + limits.call + limits.grace)
        offer = {"checksum": checksum, "patience": patience, "call": limits.call, "bucket": limits.bucket}
        self._store.set("offer", json.dumps(offer))
        self._thread = threading.Thread(target=self._serve, name="weights-sender", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close the port, and cut off a running round.

        A round that is just being formed ends by its own deadline. Whoever is in it finds a wrong checksum.
        """
        self._stopping.set()
        group = self._group
        if group is not None:
            # The sending thread may be blocked in its broadcast, and NCCL's abort in one that only starts.
            threading.Thread(target=group.abort, name="weights-cut-off", daemon=True).start()
        self._thread.join(_CONNECT_SECONDS)

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                if members := self._call(self._gather()):
                    self.rounds += 1
                    self._round(self.rounds, members)
            except RuntimeError as error:  # of the group or the store: who still wants the weights asks again
                if not self._stopping.wait(_POLL):
                    self.failures.append(_line(error))
        del self._store  # closes the port: who comes now finds it gone

    def _gather(self) -> list[int]:
        """Return the tickets of the next round, once all expected ones have joined or the grace period is over."""
        members = self._joined()
        if not members:
            self._stopping.wait(_POLL)
            return []
        end = time.monotonic() + self._limits.grace
        while len(members) < self._wanted() and time.monotonic() < end:
            if self._stopping.wait(_POLL):
                return []
            members += self._joined()
        return members

    def _wanted(self) -> float:
        """Return the number of members with whom a round is complete.

        One that was served already may come again alone, such as a restarted engine.
        """
        return math.inf if self._expected is None else max(1, self._expected - self._served)

    def _joined(self) -> list[int]:
        """Return the tickets that joined since the last call."""
        known = self._store.add("tickets", 0)
        self._open.update(range(self._known + 1, known + 1))
        self._known = known
        new = [n for n in sorted(self._open) if self._store.check([f"join/{n}"])]
        self._open.difference_update(new)  # a ticket whose owner died before it joined stays behind
        return new

    def _call(self, tickets: list[int]) -> list[int]:
        """Call the owners of ``tickets`` and return the tickets that still answer.

        A member that is dead already must not be in the round, which it would end for all.
        """
        for n in tickets:
            self._store.set(f"call/{n}", "")
        end, here = time.monotonic() + self._limits.call, []
        for n in tickets:
            if _wait(self._store, f"here/{n}", end):
                here.append(n)
            else:
                reason = f"receiver {n} joined and did not answer a call within {self._limits.call:g} s"
                self._store.set(f"answer/{n}", json.dumps({"error": reason}))
                self.failures.append(reason)
        return here

    def _round(self, number: int, tickets: list[int]) -> None:
        world = len(tickets) + 1
        for rank, n in enumerate(tickets, 1):
            answer = {"round": number, "rank": rank, "world": world, "seconds": self._seconds}
            self._store.set(f"answer/{n}", json.dumps(answer))
        end = time.monotonic() + self._seconds
        store = PrefixStore(f"round/{number}", self._store)
        with open_group(self._backend, store, 0, world, self._seconds, self._host) as group:
            self._group = group
            try:
                if not self._stopping.is_set():
                    broadcast(group, self._buffer, self._limits.bucket, end, self._stopping)
            finally:
                self._group = None
        self._served += len(tickets)


def receive(ref: WeightsRef, *, verify: bool = True, attempts: int = 3) -> LoadedWeights:
    """Join a round of ``ref`` and return its tensors, in this process's memory.

    nccl stages one bucket after the other on the current CUDA device, because an engine there has no room for a second
    model.

    Args:
        ref: the version to receive.
        verify: whether to compare the checksum.
        attempts: rounds to ask for. A round fails for all when one of its members dies in it.

    Raises:
        EngineError: the sender is gone or holds another version, or no round came to its end before its deadline.
    """
    backend: Broadcaster = "nccl" if ref.transport == "nccl" else "gloo"
    if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
        raise EngineError(f"weights v{ref.version} come by nccl, but this engine has no GPU: set another transport")
    buffer = torch.empty(ref.nbytes, dtype=torch.uint8, pin_memory=backend == "nccl")
    for attempt in range(1, attempts + 1):
        try:
            _receive(ref, backend, buffer)
            break
        except RuntimeError as error:  # the group's or the store's
            if attempt == attempts:
                reason = _line(error)
                raise EngineError(
                    f"weights v{ref.version} did not arrive from {ref.locator} in {attempts} rounds: {reason}"
                ) from error
    if verify:
        check(ref, buffer.numpy().data)
    return LoadedWeights(ref, buffer)


def _receive(ref: WeightsRef, backend: Broadcaster, buffer: Tensor) -> None:
    """Receive the weights in one round.

    Raises EngineError where another round would not help, and RuntimeError where it may.
    """
    host, _, port = ref.locator.partition("://")[2].rpartition(":")
    try:  # TCPStore would try a closed port for the whole of its timeout
        with socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS) as probe:
            ours = str(probe.getsockname()[0])
    except OSError as error:
        raise EngineError(
            f"weights v{ref.version} at {ref.locator} are gone: {error.strerror or error}. The learner must be "
            "reachable there from every engine"
        ) from error
    store = TCPStore(host, int(port), None, False, timeout=timedelta(seconds=_CONNECT_SECONDS), wait_for_workers=False)
    offer = json.loads(store.get("offer"))
    if offer["checksum"] != ref.checksum:
        raise EngineError(f"weights v{ref.version}: checksum {offer['checksum']}, expected {ref.checksum}, offered "
                          f"at {ref.locator}: they were replaced")  # fmt: skip
    ticket = store.add("tickets", 1)
    store.set(f"join/{ticket}", "")
    if not _wait(store, f"call/{ticket}", time.monotonic() + offer["patience"]):
        raise RuntimeError(f"no round began within {offer['patience']:.0f} s")
    store.set(f"here/{ticket}", "")
    if not _wait(store, f"answer/{ticket}", time.monotonic() + offer["call"] + _CONNECT_SECONDS):
        raise RuntimeError("the sender called and gave no ranks")
    answer = json.loads(store.get(f"answer/{ticket}"))
    if "error" in answer:
        raise RuntimeError(answer["error"])
    seconds = float(answer["seconds"])
    end = time.monotonic() + seconds
    inside = PrefixStore(f"round/{answer['round']}", store)
    with open_group(backend, inside, int(answer["rank"]), int(answer["world"]), seconds, ours) as group:
        broadcast(group, buffer, int(offer["bucket"]), end)


def _wait(store: Store, key: str, end: float) -> bool:
    """Wait for ``key``, and say whether it was set before the monotonic clock showed ``end``."""
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL / 4)
    return True


def _line(error: RuntimeError) -> str:
    """Return the first line of an error's text, for PyTorch appends C++ frames to some of them."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _has_gloo() -> bool:
    return dist.is_available() and dist.is_gloo_available()


def _family(host: str) -> socket.AddressFamily:
    return socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
