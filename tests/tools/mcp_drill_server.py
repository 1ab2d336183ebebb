"""An MCP server over stdio whose tools die, hang and answer oddly. It starts fast: the standard library alone."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

lock = threading.Lock()
calls = 0


def describe(name: str, text: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"name": name, "description": text, "inputSchema": {"$schema": "x", "title": "T", **schema}}


NUMBER = {"type": "integer"}
TOOLS = [
    describe("add", "Add two numbers.\n\nOver several lines.", {"a": NUMBER, "b": NUMBER}, ["a"]),
    describe("count", "Count this server's calls.", {}, []),
    describe("die", "End the server.", {}, []),
    describe("wait", "Wait, and let others be served.", {"seconds": {"type": "number"}}, []),
    describe("freeze", "Wait, and let nobody be served.", {"seconds": {"type": "number"}}, []),
    describe("fail", "Fail.", {}, []),
    describe("refuse", "Answer with an error of the protocol.", {}, []),
    describe("garble", "Answer with what is no result.", {}, []),
    describe("parts", "Answer in parts.", {}, []),
    describe(
        "structured", "Answer with what is no text.", {"parts": {"type": "array"}, "fails": {"type": "boolean"}}, []
    ),
    describe("echo", "Say it again.", {"text": {"type": "string", "pattern": "^(a+)+$|.*"}}, ["text"]),
    describe("secret", "Read a variable of the server's environment.", {"name": {"type": "string"}}, ["name"]),
    describe("odd.name", "Have a name that models cannot write.", {}, []),
]


def say(message: dict[str, Any]) -> None:
    with lock:
        sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        sys.stdout.flush()


def text(value: str, *, error: bool = False) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": value}], "isError": error}


def run(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    global calls
    if name == "add":
        return text(str(arguments["a"] + arguments.get("b", 1)))
    if name == "count":
        calls += 1
        return text(f"{calls} of {os.getpid()}")
    if name == "die":
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)
    if name == "wait":
        time.sleep(arguments["seconds"])
    if name == "fail":
        return text("no such city", error=True)
    if name == "garble":
        return {"content": "nonsense"}
    if name == "parts":
        image = {"type": "image", "data": "AAAA", "mimeType": "image/png"}
        inner = {"type": "resource", "resource": {"uri": "file:///a", "text": "inside"}}
        return {"content": [{"type": "text", "text": "one"}, image, inner]}
    if name == "structured":
        content = arguments.get("parts", [])
        value = {"city": "Zürich", "degrees": [1, 2.5]}
        return {"content": content, "structuredContent": value, "isError": arguments.get("fails", False)}
    if name == "echo":
        return text(arguments["text"])
    if name == "secret":
        return text(os.environ.get(arguments["name"], "(none)"))
    return text("done")


def answer(request: dict[str, Any]) -> None:
    method, ident, parameters = request["method"], request["id"], request.get("params", {})
    if method == "initialize":
        info = {"name": "drill", "version": "1"}
        result: dict[str, Any] = {
            "protocolVersion": parameters["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info
        }  # fmt: skip
    elif method == "tools/list":
        result = {"tools": TOOLS}
    elif method == "tools/call" and parameters["name"] != "refuse":
        result = run(parameters["name"], parameters.get("arguments", {}))
    else:
        code = -32602 if method == "tools/call" else -32601
        say({"id": ident, "error": {"code": code, "message": f"refused: {method}"}})
        return
    say({"id": ident, "result": result})


if __name__ == "__main__":
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        if message.get("params", {}).get("name") == "freeze":
            time.sleep(message["params"]["arguments"]["seconds"])
        threading.Thread(target=answer, args=(message,), daemon=True).start()
