"""An OpenAI-compatible server on loopback that answers by script: a list of steps, or a function of the request."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """One HTTP answer; ``body`` is JSON unless it is bytes."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Drop:
    """Close the connection without a word."""


class Hang:
    """Say nothing until the client gives up."""


Step = Answer | Drop | Hang
Behaviour = Sequence[Step] | Callable[[Json], Step]


@dataclass
class ChatServer:
    """What came in, in order of arrival."""

    url: str
    requests: list[Json] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


def completion(content: str | None = "", *, finish: str = "stop", tokens: int | None = None, **message: Any) -> Answer:
    """A chat completion; ``tokens``: how many the model sampled, None leaves the usage out."""
    body: Json = {
        "object": "chat.completion",
        "model": "scripted-1",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish,
                "message": {"role": "assistant", "content": content, **message},
            }
        ],
    }
    if tokens is not None:
        body["usage"] = {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens}
    return Answer(body)


def call(name: str, arguments: str, id: str = "call_x9") -> Json:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@contextlib.contextmanager
def chat_server(behaviour: Behaviour) -> Iterator[ChatServer]:
    """Serve ``behaviour``; a script that is used up answers 500 to all further requests, which fails the test."""
    lock, released = threading.Lock(), threading.Event()
    steps = None if callable(behaviour) else list(behaviour)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(Answer({"data": []}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                state.requests.append(body)
                state.headers.append({k.lower(): v for k, v in self.headers.items()})
                state.running += 1
                state.most_running = max(state.most_running, state.running)
                if steps is not None:
                    step: Step = steps.pop(0) if steps else Answer("the script is used up", 500)
            if callable(behaviour):
                step = behaviour(body)
            try:
                if isinstance(step, Answer):
                    self._send(step)
                    return
                if isinstance(step, Hang):
                    released.wait(30)
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
            finally:
                with lock:
                    state.running -= 1

        def _send(self, answer: Answer) -> None:
            raw = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            with contextlib.suppress(OSError):  # the client may have left
                self.send_response(answer.status)
                for name, value in ({"content-length": str(len(raw))} | answer.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None: ...

    with Server(("127.0.0.1", 0), Handler) as server:
        state = ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield state
        finally:
            released.set()
            server.shutdown()
            thread.join(10)
