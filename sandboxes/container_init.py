"""Process 1 of a container: it starts what the host asks for, carries its streams, and kills what is left.

What ``supervisor`` is to bubblewrap, over the two pipes that an engine attaches, so that the engine may be another
machine. It cannot be signalled or read from inside. Sent as text, so it imports only the standard library and what is
sent with it. Frames are a kind, an id, the number of bytes that follow, and those:

    host → here   START  a request, JSON         here → host   READY  what it finds, JSON
                  DATA   bytes of its stdin                    OUT, ERR  what it printed
                  END    of its stdin                          TOOK  how many bytes of stdin it took
                  KILL                                         EXIT  how it ended, JSON
                  MORE   how many bytes it may print           BEGAN  processes killed for memory before it
                  LOOK   does it still run?                    ALIVE  whether it does

Nobody sends more than the other side has allowed: what is under way is bounded on both.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import struct
import time
from typing import Any

from areal_agents.sandboxes import process_gate, supervisor, work_files

FRAME = struct.Struct("!BiI")
START, DATA, END, KILL, MORE, LOOK = 1, 2, 3, 4, 5, 6
READY, OUT, ERR, TOOK, EXIT, BEGAN, ALIVE = 11, 12, 13, 14, 15, 16, 17
CHUNK = 1 << 16
FOLDERS = ("/work", *work_files.SCRATCH)
COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")


def oom_kills() -> int:
    """Count the processes of this container that the kernel has killed for memory."""
    for path in COUNTERS:
        with contextlib.suppress(OSError, ValueError), open(path) as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def mounts() -> list[tuple[str, str, bool]]:
    """Return what is mounted, in its order: where, the kind of file system, and whether it can be written."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            place, options = before.split()[4:6]
            kind, _, more = (*after.split(), "", "")[:3]
            found.append((place, kind, "ro" not in options.split(",") + more.split(",")))
    return found


class Job:
    """One request with its streams."""

    def __init__(self, ident: int, asked: dict[str, Any], stdin: int, outputs: dict[int, int]) -> None:
        self.ident, self.pid = ident, 0
        self.spawned = bool(asked["spawn"])
        self.stdin, self.outputs = stdin, outputs
        self.pending, self.ended = bytearray(), False
        self.credit = int(asked["credit"])
        """Bytes that may still be sent. A run that wants more than its limit has too much output."""
        self.deadline = time.monotonic() + float(asked["timeout"])
        self.cause = "exit"
        self.code: int | None = None
        self.over = False
        self.kills = oom_kills()


class Init(supervisor.Supervisor):
    """The loop of pid 1."""

    def __init__(self) -> None:
        self.unused = socket.socketpair()
        super().__init__(self.unused[0])
        self.poll = self.gates.poll
        self.jobs: dict[int, Job] = {}
        self.heard = bytearray()

    def serve(self) -> None:
        os.set_blocking(0, False)
        self.poll.register(0, select.POLLIN)
        self.poll.register(self.wake, select.POLLIN)
        found = {
            "mounts": mounts(),
            "folders": {name: os.path.realpath(name) for name in FOLDERS},
            "hard": process_gate.hard_limits(("CPU", "NPROC", "FSIZE", "NOFILE")),
        }
        self.say(READY, 0, json.dumps(found).encode())
        while True:
            ready = dict(self.poll.poll(self.wait()))
            if self.wake in ready:
                os.read(self.wake, 4096)
                self.reap()
            if 0 in ready and not self.hear():
                return
            for job in tuple(self.jobs.values()):
                self.carry(job, ready)

    def wait(self) -> float | None:
        """Milliseconds until the next deadline."""
        deadlines = [job.deadline for job in self.jobs.values() if not job.spawned and job.cause == "exit"]
        return max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None

    def say(self, kind: int, ident: int, data: bytes = b"") -> None:
        view = memoryview(FRAME.pack(kind, ident, len(data)) + data)
        while view:
            view = view[os.write(1, view) :]

    def hear(self) -> bool:
        """Do what the host asks. Returns False when it has gone."""
        try:
            data = os.read(0, 1 << 20)
        except BlockingIOError:
            return True
        self.heard += data
        while len(self.heard) >= FRAME.size:
            kind, ident, size = FRAME.unpack_from(self.heard)
            if len(self.heard) < FRAME.size + size:
                break
            payload = bytes(self.heard[FRAME.size : FRAME.size + size])
            del self.heard[: FRAME.size + size]
            self.obey(kind, ident, payload)
        return bool(data)

    def obey(self, kind: int, ident: int, payload: bytes) -> None:
        job = self.jobs.get(ident)
        if kind == START:
            self.begin(ident, json.loads(payload))
        elif kind == LOOK:
            self.reap()  # what ended before it was asked
            self.say(ALIVE, ident, bytes([ident in self.jobs and not self.jobs[ident].over]))
        elif job is None:
            return
        elif kind == DATA:
            job.pending += payload
        elif kind == END:
            job.ended = True
        elif kind == MORE:
            job.credit += int.from_bytes(payload, "big")
        elif kind == KILL:
            self.kill(job, "killed")

    def begin(self, ident: int, asked: dict[str, Any]) -> None:
        request = {**asked["request"], "alone": False}
        if "inherit" in request:
            request["env"] = {n: os.environ[n] for n in request["inherit"] if n in os.environ} | request["env"]
        source, sink = os.pipe()
        out, out_write = os.pipe()
        err, err_write = (-1, out_write) if asked["spawn"] else os.pipe()
        job = Job(ident, asked, sink, {out: OUT} | ({err: ERR} if err >= 0 else {}))
        self.jobs[ident] = job
        self.say(BEGAN, ident, job.kills.to_bytes(8, "big"))
        for descriptor in (sink, *job.outputs):
            os.set_blocking(descriptor, False)
        try:
            job.pid = os.fork()
        except OSError:  # live processes have taken every place
            job.cause = "lost"
            self.ended(ident, 0)
        if job.pid == 0 and job.cause != "lost":
            code = 125
            try:
                code = supervisor.child(request, [source, out_write, err_write], self.unused[1])
            finally:
                os._exit(code)
        for descriptor in {source, out_write, err_write}:
            os.close(descriptor)
        if job.cause != "lost":
            (self.spawned if job.spawned else self.running)[job.pid] = ident

    def kill(self, job: Job, cause: str) -> None:
        if job.cause == "exit":
            job.cause = cause
        self.silence(job)
        if self.running.get(job.pid, self.spawned.get(job.pid)) == job.ident:
            os.kill(job.pid, signal.SIGKILL)
        self.settle(job)

    def ended(self, ident: int, code: int) -> None:
        job = self.jobs[ident]
        job.code, job.over = code, True
        self.settle(job)

    def carry(self, job: Job, ready: dict[int, int]) -> None:
        """Move what can be moved of a job's streams, and watch for what can be moved next."""
        if not job.spawned and job.cause == "exit" and not job.over and time.monotonic() >= job.deadline:
            self.kill(job, "timeout")
        self.feed(job)
        for descriptor in tuple(job.outputs):
            if descriptor in ready:
                self.read(job, descriptor)
        self.settle(job)
        for descriptor in job.outputs:
            # One that cannot take more is not watched, its end neither.
            self.watch(descriptor, select.POLLIN if job.credit > 0 else None)
        if job.stdin >= 0:
            self.watch(job.stdin, select.POLLOUT if job.pending else None)

    def watch(self, descriptor: int, events: int | None) -> None:
        if events is None:
            with contextlib.suppress(KeyError):
                self.poll.unregister(descriptor)
        else:
            self.poll.register(descriptor, events)

    def feed(self, job: Job) -> None:
        took = 0
        while job.pending and job.stdin >= 0:
            try:
                wrote = os.write(job.stdin, job.pending[:CHUNK])
            except BlockingIOError:
                break
            except OSError:  # what a process does not read is its own business
                self.close(job.stdin)
                job.stdin = -1
                break
            del job.pending[:wrote]
            took += wrote
        if job.stdin < 0 and job.pending:
            took += len(job.pending)
            job.pending.clear()
        if took:
            self.say(TOOK, job.ident, took.to_bytes(4, "big"))
        if job.ended and not job.pending and job.stdin >= 0:
            self.close(job.stdin)
            job.stdin = -1

    def read(self, job: Job, descriptor: int) -> bool:
        """Send on what a process printed. Returns False when there is nothing more for now."""
        if job.credit <= 0:
            return False
        try:
            data = os.read(descriptor, CHUNK if not job.spawned else min(CHUNK, job.credit))
        except BlockingIOError:
            return False
        if not data:
            del job.outputs[descriptor]
            self.close(descriptor)
            return False
        kind, room = job.outputs[descriptor], job.credit - (0 if job.spawned else 1)
        job.credit -= len(data)
        if data[:room]:
            self.say(kind, job.ident, data[:room])
        if not job.spawned and len(data) > room:
            self.kill(job, "output_limit")
            return False
        return True

    def settle(self, job: Job) -> None:
        """Report a job whose process is gone and whose output has been sent."""
        if not job.over or job.ident not in self.jobs:
            return
        for descriptor in tuple(job.outputs):
            while descriptor in job.outputs and self.read(job, descriptor):
                pass
        if job.spawned and job.outputs and job.credit <= 0 and job.cause == "exit":
            return  # there may be more, for which the host has not asked yet
        if self.jobs.pop(job.ident, None) is None:
            return
        self.silence(job)
        if job.stdin >= 0:
            self.close(job.stdin)
            job.stdin = -1
        told = {"cause": job.cause, "code": job.code, "oom": oom_kills() > job.kills}
        self.say(EXIT, job.ident, json.dumps(told).encode())

    def silence(self, job: Job) -> None:
        for descriptor in tuple(job.outputs):
            del job.outputs[descriptor]
            self.close(descriptor)

    def close(self, descriptor: int) -> None:
        self.watch(descriptor, None)
        os.close(descriptor)


class ServiceInit(Init):
    """The loop of pid 1 beside a service, whose daemons go on when a program that looks at it has ended."""

    def sweep(self) -> None:
        """Kill nothing."""


def main() -> None:
    supervisor.prctl_dumpable(0)
    Init().serve()


def serve_service() -> None:
    supervisor.prctl_dumpable(0)
    ServiceInit().serve()
