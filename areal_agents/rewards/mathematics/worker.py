"""The process that forks the verifier's workers, and what a worker does until its socket ends.

One JSON line in, {gold, pred, slot, options, seconds}, without ``pred`` to look at a gold answer; one out,
{status, detail}, with ``raised`` where an unexpected exception was. A worker's memory is bounded, and so is the
processor time of each answer: it ends by itself where nobody can kill it any more.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from math import ceil
from typing import Any

from areal_agents.rewards.mathematics.fork_server import ENDED_HERE, FORK, NUMBER, READY, number
from areal_agents.tracking.console import plain
from areal_agents.utils.parent import end_with_parent
from areal_agents.utils.short_text import cut, described

MEMORY = 1 << 30
"""Bytes of address space."""
_DYING_SECONDS = 1.0
"""For the end of a worker whose socket is closed already."""
_told: set[str] = set()
"""The kinds of unexpected exceptions that stand on stderr already."""


Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""What a worker replies to a request. Both are JSON."""


def main() -> None:
    serve(_prepare, answer, MEMORY)


def _prepare() -> None:
    from areal_agents.rewards.mathematics.verify import verify

    verify("x+1", r"\sqrt{2}")  # imports and first uses are not the first answer's


def serve(prepare: Callable[[], None], answer: Answer, memory: int) -> None:
    """Fork workers as the host's ``ForkServer`` asks, until the host is gone.

    Args:
        prepare: imports what the workers share.
        answer: replies to a request, in a worker. A request names the ``seconds`` that it may take.
        memory: bytes of a worker's address space.
    """
    control = socket.socket(fileno=os.dup(0))
    with open(os.devnull, "rb") as nothing:  # what reads from here would take the host's messages
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # a library that prints
    prepare()
    gc.freeze()  # a collection in a worker would copy what it shares with the others
    control.sendall(number(READY))
    workers: set[int] = set()
    while True:
        message, passed, _, _ = socket.recv_fds(control, NUMBER, 1, socket.MSG_WAITALL)
        if len(message) < NUMBER:  # the host is gone
            return
        asked = int.from_bytes(message, "big", signed=True)
        if asked == FORK:
            reply = _fork(passed[0], control, lambda asked: _work(asked, answer, memory))
            workers |= {reply} if reply > 0 else set()
        else:
            reply = ENDED_HERE
            if abs(asked) in workers:
                workers.remove(abs(asked))
                reply = _end(abs(asked), _DYING_SECONDS if asked < 0 else 0.0)
        control.sendall(number(reply))


def _end(worker: int, seconds: float) -> int:
    """End a worker, and return how it had ended by itself within so many seconds, or ``ENDED_HERE``."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            break
        time.sleep(0.002)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    return ENDED_HERE


def _fork(worker_socket: int, control: socket.socket, work: Callable[[socket.socket], None]) -> int:
    """Return the number of a new worker, or the system's error below zero."""
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        pid = -(error.errno or 1)
    if pid == 0:
        try:
            control.close()
            end_with_parent()
            if os.getppid() == server:  # else it ended before this process asked to end with it
                work(socket.socket(fileno=worker_socket))
        except BaseException:  # noqa: BLE001  a forked process must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(worker_socket)
    return pid


def _work(asked: socket.socket, answer: Answer, memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with asked.makefile("rw", encoding="utf-8", newline="\n") as lines:
        for line in lines:
            request = json.loads(line)
            spent = resource.getrusage(resource.RUSAGE_SELF)
            limit = ceil(spent.ru_utime + spent.ru_stime + 2 * request["seconds"]) + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            lines.write(json.dumps(answer(request)) + "\n")
            lines.flush()


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Verify one request, and say what is wrong with it where it is none."""
    from areal_agents.rewards.mathematics.options import Options
    from areal_agents.rewards.mathematics.verify import look, verify

    try:
        options = Options.of(request.get("options") or {})
        gold, pred = request["gold"], request["pred"]
        found = look(gold, options) if pred is None else verify(gold, pred, slot=request["slot"], options=options)
    except MemoryError:
        return {"status": "timeout", "detail": f"it took more than {MEMORY >> 20} MiB"}
    except RecursionError:
        return {"status": "parse_error", "detail": "it nests too deep"}
    except Exception as error:  # noqa: BLE001  a boundary: SymPy raises errors of any kind, and the worker goes on
        _tell(error)
        status = "parse_error"
        if request.get("pred") is None or answer({**request, "pred": None})["status"] == "gold_error":
            status = "gold_error"  # whatever was answered to it
        detail = f"the verifier raised {cut(described(error), 300)}"
        return {"status": status, "detail": detail, "raised": type(error).__name__}
    return {"status": found.status, "detail": found.detail}


def _tell(error: Exception) -> None:
    """Write where an exception came from, once of each kind: a model may write a thousand such answers, and in them."""
    kind = type(error).__name__
    if kind not in _told:
        _told.add(kind)
        with contextlib.suppress(OSError):  # nobody listens: the answer says it too
            sys.stderr.write(plain(cut("".join(traceback.format_exception(error)), 10_000)) + "\n")


if __name__ == "__main__":
    main()
