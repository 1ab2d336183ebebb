"""A backend that dies under many episodes at once is one message, whatever was waiting for it."""

from __future__ import annotations

import contextlib
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from areal_agents.evaluation.unfinished import count_saved
from tests.chat_server import chat_server, completion
from tests.tiny_models import tiny_chat_model

SECONDS = 600.0
NOISE = ("never retrieved", "never awaited", "Traceback", "destroyed", "unclosed")


class Backend:
    """Answers ``alive`` lines. With the next one it waits for ``together`` more, then all connections end for good."""

    def __init__(self, alive: int, together: int) -> None:
        self.left, self.waiting, self.lock = alive, together, threading.Lock()
        self.dead = threading.Event()

    @contextlib.contextmanager
    def serving(self) -> Iterator[int]:
        backend = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while not backend.dead.is_set() and self.rfile.readline():
                    with backend.lock:
                        backend.left -= 1
                        late = backend.left < 0
                        backend.waiting -= late
                        if backend.waiting <= 0:
                            backend.dead.set()
                    if late:
                        backend.dead.wait(SECONDS)
                        return
                    self.wfile.write(b"yes\n" if backend.left % 2 else b"no\n")

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        with Server(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            try:
                yield server.server_address[1]
            finally:
                self.dead.set()
                server.shutdown()
                thread.join()


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "default", "-m", "areal_agents", *argv], capture_output=True, text=True,
        timeout=SECONDS, env=os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONASYNCIODEBUG": "0"},
    )  # fmt: skip


def the_one_message(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    for words in NOISE:
        assert words not in done.stderr, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return message


def test_of_an_evaluation(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with chat_server(lambda body: completion("abc")) as server, Backend(20, 16).serving() as port:
        done = run(
            "eval", "tests.backend_env:Backed", "--model", "openai:m", "--url", server.url, "--n", "64",
            "--env.kwargs.port", str(port), "--out", str(out), "--rollout.failure_window", "16",
        )  # fmt: skip
    message = the_one_message(done)
    assert "episode attempts failed, the budget is 4" in message
    assert "the backend is gone" in message
    assert 1 <= count_saved(out) < 64


@pytest.mark.slow
def test_of_a_training(tmp_path: Path) -> None:
    model = tiny_chat_model(tmp_path / "model")
    with Backend(12, 2).serving() as port:
        done = run(
            "train", "--env.id", "tests.backend_env:Backed", "--env.kwargs.port", str(port), "--model.path",
            str(model), "--model.max_context", "256", "--rollout.max_turn_tokens", "6", "--rollout.groups", "2",
            "--rollout.group_size", "2", "--rollout.concurrency", "4", "--rollout.failure_window", "16", "--steps",
            "8", "--eval.baseline", "false", "--eval.n", "8",
            "--warm_start.demonstrations", "0", "--engine.precision", "fp32",
            "--track.tensorboard", "false", "--out", str(tmp_path / "out"),
        )  # fmt: skip
    assert "the backend is gone" in the_one_message(done)
