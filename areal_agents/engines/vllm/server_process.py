"""The process behind ``areal-agents serve``: vLLM's own server, and the two things that it lacks.

    python -m areal_agents.engines.vllm.server_process ARGUMENTS

Arguments that vLLM refuses are one sentence in the file ``REFUSED`` instead of a usage of three hundred lines. And a
message that may hold no call (``tool_choice = "none"``) ends where one would begin.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

REFUSED = "AREAL_SERVE_REFUSED"
"""The environment variable with the path of the file that says which argument vLLM refuses."""
CALLS_BEGIN = "AREAL_SERVE_CALLS_BEGIN"
"""The environment variable with what begins a call, as JSON: ``{"stop": [text, …], "stop_token_ids": [id, …]}``."""
MIDDLEWARE = "areal_agents.engines.vllm.server_process.NoCalls"
WRONG_USAGE = 2
"""The exit code for arguments that vLLM refuses."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class NoCalls:
    """An ASGI application around vLLM's, which lets no message with ``tool_choice = "none"`` begin a call.

    The texts and ids that begin one are added to the request's ``stop`` and ``stop_token_ids``, and are not shown: the
    message ends before them, and ``stop_reason`` names what it ended at.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._begins: dict[str, list[Any]] = json.loads(os.environ.get(CALLS_BEGIN, "{}"))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/chat/completions"):
            return await self._app(scope, receive, send)
        body = b""
        while True:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        body = without_calls(body, self._begins)
        length = [(b"content-length", str(len(body)).encode())]
        headers = [header for header in scope["headers"] if header[0].lower() != b"content-length"]
        sent = False

        async def changed() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self._app({**scope, "headers": headers + length}, changed, send)


def without_calls(body: bytes, begins: dict[str, list[Any]]) -> bytes:
    """Return the request ``body``, which ends at what begins a call where it wants none.

    A body that cannot be understood is left to vLLM, which says what is wrong with it.
    """
    try:
        request = json.loads(body)
        if not isinstance(request, dict) or request.get("tool_choice") != "none":
            return body
        for key, more in begins.items():
            given = request.get(key) or []
            request[key] = list(dict.fromkeys([*([given] if isinstance(given, str) else given), *more]))
    except (ValueError, TypeError, RecursionError):
        return body
    request["include_stop_str_in_output"] = False
    return json.dumps(request).encode()


def sentence(message: str, options: list[str]) -> str:
    """Return what the argument parser says, with the nearest of ``options`` for an argument that is none."""
    unknown = re.search(r"unrecognized arguments: (--[\w.-]+)", message)
    near = difflib.get_close_matches(unknown[1], options, n=1, cutoff=0.7) if unknown else []
    return message + (f"; did you mean {near[0]}?" if near else "")


def main() -> None:
    """Read the arguments with vLLM's own parser, then be its server."""
    from vllm.entrypoints.launchers.api_server.entry import main as serve
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]  # vLLM is not installed where types are checked
        def error(self, message: str) -> NoReturn:
            refuse(sentence(message, [name for action in self._actions for name in action.option_strings]))

    make_arg_parser(Parser()).parse_args()
    try:
        serve()
    except ValidationError as error:  # a value that only vLLM's configuration looks at
        refuse("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))


def refuse(said: str) -> NoReturn:
    """End the process, which cannot serve with its arguments."""
    Path(os.environ[REFUSED]).write_text(said, encoding="utf-8")
    sys.exit(WRONG_USAGE)


if __name__ == "__main__":
    main()
