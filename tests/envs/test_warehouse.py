"""The warehouse's rules, tasks and signatures, with its service on this machine. tests/sandboxes plays it in docker."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest

from areal_agents import registry
from areal_agents.envs import warehouse, warehouse_inside
from areal_agents.errors import ConfigError
from areal_agents.reward import Episode
from areal_agents.rollout.player import prove_sandbox
from areal_agents.sandbox import ExecResult, Sandbox
from areal_agents.tool import call_text
from areal_agents.types import Task
from tests.envs.test_games import task_of
from tests.fake_sandbox import Script, ScriptedBackend

ITEMS = [["oak chair", 900, "A1", 4], ["pine box", 100, "A1", 0], *([f"tray {i}", 10, "B1", 1] for i in range(5))]
ORDERS = [
    [101, "Abel", "oak chair", 3, "open"],
    [102, "Abel", "oak chair", 2, "open"],
    [103, "Berg", "x", 1, "shipped"],
]
BEFORE: dict[str, Any] = {"items": ITEMS, "orders": ORDERS}


@contextlib.contextmanager
def served(key: str = warehouse.KEY) -> Iterator[str]:
    """Serve an empty warehouse, and give its URL."""

    class Handler(warehouse_inside.Handler):
        pass

    Handler.warehouse, Handler.key = warehouse_inside.Warehouse(), key.encode()
    server = warehouse_inside.Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Here:
    """Runs what is meant for the sandbox as a process of this machine, with the service at ``url``."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def exec(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout: float, max_output: int = 1 << 20
    ) -> ExecResult:
        there = stdin.replace(warehouse.URL.encode(), self._url.encode())
        done = await asyncio.to_thread(subprocess.run, [sys.executable, *argv[1:]], input=there, capture_output=True)
        return ExecResult("error" if done.returncode else "ok", done.returncode, done.stdout, done.stderr, 0.0)


def asked(url: str, kind: str, body: object = "") -> dict[str, Any]:
    return asyncio.run(warehouse.asked(cast("Sandbox", Here(url)), kind, body))


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
    request = urllib.request.Request(url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def facts(rows: Any) -> set[tuple[Any, ...]]:
    return {(kind, *row) for kind in ("items", "orders") for row in rows[kind]}


def test_a_client_reads_pages_and_changes_what_it_may() -> None:
    with served() as url:
        assert asked(url, "load", BEFORE) == {"loaded": True, "problem": ""}
        with urllib.request.urlopen(url) as answer:
            assert answer.read().decode() == warehouse_inside.ABOUT
            assert "Date" not in answer.headers
        status, page = ask(url, "GET", "/items?page=2")
        assert (status, [i["name"] for i in page["items"]], page["pages"]) == (200, ["tray 3", "tray 4"], 2)
        chair = {"id": 1, "version": 1, "name": "oak chair", "price": 900, "shelf": "A1", "stock": 4}
        assert ask(url, "GET", "/items?name=oak%20chair")[1]["items"] == [chair] == [ask(url, "GET", "/items/1")[1]]
        assert ask(url, "GET", "/items?shelf=Z9")[1] == {"items": [], "page": 1, "pages": 1}
        for method, path, body, found in (
            ("PATCH", "/items/1", {"version": 1, "price": 950}, chair | {"version": 2, "price": 950}),
            ("PATCH", "/items/1", {"version": 1, "price": 1}, "the item's version is 2: read it again"),
            ("PATCH", "/items/1", {"version": 2}, "give a price, a shelf or a stock"),
            ("PATCH", "/items/1", {"version": 2, "stock": -1}, "stock must be a whole number from 0"),
            ("PATCH", "/items/1", {"version": 2, "name": "x"},
             "unknown field; there are: version, price, shelf, stock"),
            ("DELETE", "/items/1", None, "order 101 asks for it and is open"),
            ("DELETE", "/items/2", None, {"deleted": 2}),
            ("POST", "/orders/101/ship", None, {"number": 101, "customer": "Abel", "item": "oak chair", "count": 3,
                                                "status": "shipped"}),
            ("POST", "/orders/102/ship", None, "the stock does not suffice"),
            ("POST", "/orders/103/ship", None, "the order is shipped"),
            ("POST", "/items", {"name": "oak chair", "price": 1, "shelf": "A1", "stock": 1},
             "there is an item of this name"),
            ("POST", "/items", {"name": "x'; --", "price": 1, "shelf": "A1", "stock": 1},
             "name must be a text of 1 to 40 letters, digits and spaces"),
            ("GET", "/items/2", None, "there is nothing with this id"),
            ("GET", "/items?colour=red", None, "unknown filter; there are: page, name, shelf"),
            ("GET", "/items?page=0", None, "page must be a number from 1"),
            *((method, path, None, "this is not done here: GET / lists what is")
              for method, path in (("PUT", "/items/1"), ("POST", "/orders"), ("OPTIONS", "/items"), ("FOO", "/"))),
            ("GET", "/else", None, "there is no such address: GET / lists them"),
            ("POST", "/items", b"[1]", "the body is no JSON object"), ("POST", "/items", b"{", "the body is no JSON"),
            ("POST", "/items", b"[" * 50_000, "the body is no JSON"), ("POST", "/items", b"1" * 70_000, None),
        ):  # fmt: skip
            if found is None:
                with pytest.raises((urllib.error.URLError, ConnectionError, ValueError)):
                    raise_for(ask(url, method, path, body))
            else:
                assert ask(url, method, path, body)[1] == found, (method, path)
        state = asked(url, "state")
        assert state == {
            "items": [["oak chair", 950, "A1", 1], *ITEMS[2:]],
            "orders": [[*ORDERS[0][:4], "shipped"], *ORDERS[1:]], "problem": "",
        }  # fmt: skip


def raise_for(answer: tuple[int, Any]) -> None:
    if answer[0] >= 400:
        raise ConnectionError(answer)


@pytest.mark.parametrize(
    ("sent", "first", "body"),
    [
        (b"PUT /items/1 HTTP/1.0\r\n\r\n", "HTTP/1.0 404 Not Found", "there is nothing with this id"),
        (b"FOO / HTTP/1.0\r\n\r\n", "HTTP/1.0 501 Not Implemented", "this is not done here: GET / lists what is"),
        (b"GET /".ljust(65537, b"x"), "HTTP/1.0 414 ", "this is no request"),
        (b"HEAD / HTTP/1.0\r\n\r\n", "HTTP/1.0 404 Not Found", None),
    ],
)
def test_no_answer_has_a_date_nor_a_page_of_html(sent: bytes, first: str, body: str | None) -> None:
    with served() as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        client.sendall(sent)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b"")).decode()
    head, _, said = answer.partition("\r\n\r\n")
    lines = head.split("\r\n")
    assert lines[0].startswith(first)
    assert [line.partition(":")[0] for line in lines[1:]] == ["Content-Type", "Content-Length"]
    assert said == ("" if body is None else json.dumps({"error": body}) + "\n")


def test_the_state_is_the_environments_alone_and_nobody_else_can_say_what_it_is() -> None:
    with served() as url:
        assert asked(url, "load", BEFORE)["problem"] == ""
        assert asked(url, "load", {"items": [], "orders": []})["problem"] == "it was not answered (error)"  # once
        for headers in ({}, {"X-Sign": "0" * 64}, {"X-Sign": "é", "X-Nonce": "1"}):
            for path in ("/state", "/load"):
                assert ask(url, "POST", path, BEFORE, **headers)[0] in (403, 404)
        assert facts(asked(url, "state")) == facts(BEFORE)
    with served("another key") as url:
        assert asked(url, "load", BEFORE)["problem"] == "it was not answered (error)"
    with served("") as url:
        assert ask(url, "POST", "/state", "", **{"X-Sign": warehouse_inside.sign(b"", "state", "", '""')})[0] == 403
    forged = ForgedService()
    assert (
        asyncio.run(warehouse.asked(cast("Sandbox", forged), "state"))["problem"] == "the answer is not the service's"
    )
    assert asked("http://127.0.0.1:9", "state") == {"problem": "it was not answered (error)"}


class ForgedService:
    """A sandbox whose code has answered in the service's place."""

    async def exec(self, argv: Sequence[str], **_: Any) -> ExecResult:
        return ExecResult("ok", 0, json.dumps([json.dumps(BEFORE), "0" * 64]).encode(), b"", 0.0)


def answers(unanswered: set[int]) -> Script:
    """Play sandboxes with the service beside them, which does not say its state in these sessions."""

    def said(session: int, code: str) -> str:
        if not code.startswith("{"):
            return ""
        request = json.loads(code)
        if request["url"].endswith("/state") and session in unanswered:
            return ""
        text = json.dumps(BEFORE if request["url"].endswith("/state") else {"loaded": True})
        sign = warehouse_inside.sign(warehouse.KEY.encode(), "answer", request["headers"]["X-Nonce"], text)
        return json.dumps([text, sign])

    return said


@pytest.mark.parametrize(
    ("unanswered", "sessions", "reward", "problem"),
    [
        (set(), 2, 1.0, ""),
        ({1, 3}, 4, 1.0, ""),
        ({1, 2, 3, 4}, 4, 0.0, "it was not answered (ok)"),
    ],
)
def test_a_state_that_is_not_said_is_asked_for_beside_a_fresh_service(
    unanswered: set[int], sessions: int, reward: float, problem: str
) -> None:
    """A service that hangs by itself costs no reward, and one that the model's calls silence each time costs it."""
    before = BEFORE | {"items": [["oak chair", 900, "A1", 5], *ITEMS[1:]]}
    task = task_of({"requests": ["…"], "before": before, "after": BEFORE, "programs": []})
    box = ScriptedBackend(answers(unanswered))
    env = warehouse.Warehouse(sandbox=box)
    for _ in range(2):  # each episode is given its own doubt
        env.reset(seed=0, options={"task": task})
        env.step(call_text("python", code="print()"))
        _, got, over, _, info = env.step("Done.")
        assert (got, over, info["outcome"]["problem"]) == (reward, True, problem)
    assert box.opened == sessions
    env.close()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_the_experts_programs_leave_what_was_worked_out_by_hand(level: float) -> None:
    kinds = set[str]()
    for task in warehouse.Warehouse.tasks("train", difficulty=level)[:12]:
        payload = task.payload
        assert len(payload["requests"]) == round(4**level)
        kinds |= {request.split()[0] + request.split()[-1] for request in payload["requests"]}
        with served() as url:
            asked(url, "load", payload["before"])
            for program in payload["programs"]:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec((warehouse.HELPERS + program).replace(warehouse.URL, url), {})
            assert facts(asked(url, "state")) == facts(payload["after"]) != facts(payload["before"]), payload[
                "requests"
            ]
    assert len(kinds) > 3


def scored(task: Task, rows: Any, problem: str = "", answer: str | None = "done") -> dict[str, float]:
    outcome = {**rows, "problem": problem}
    return dict(warehouse.left(Episode(task, (), answer, (), "answer", {}, None, outcome)).components)


def test_the_wanted_state_alone_is_paid() -> None:
    after = {"items": [["oak chair", 950, "A1", 4], *ITEMS[1:]], "orders": [[*ORDERS[0][:4], "cancelled"], *ORDERS[1:]]}
    task = task_of({"requests": ["…"], "before": BEFORE, "after": after, "programs": []})
    assert scored(task, after) == {"correct": 1.0, "changes": 1.0, "others": 0.0}
    assert scored(task, after, answer=None)["correct"] == 0.0  # it never said that it is done
    assert scored(task, BEFORE) == {"correct": 0.0, "changes": 0.0, "others": 0.0}
    assert scored(task, BEFORE | {"items": after["items"]}) == {"correct": 0.0, "changes": 0.5, "others": 0.0}
    assert scored(task, after | {"items": after["items"][:-1]}) == {"correct": 0.0, "changes": 1.0, "others": 1.0}
    assert scored(task, {"items": [], "orders": []}, "it was not answered (timeout)")["correct"] == 0.0


def test_the_splits_share_no_warehouse() -> None:
    tasks = {split: warehouse.Warehouse.tasks(split)[:40] for split in ("train", "test")}
    first = {split: {json.dumps(t.payload["before"]) for t in found} for split, found in tasks.items()}
    assert not first["train"] & first["test"]
    assert len(first["train"]) == len(first["test"]) == 40


def test_a_backend_without_services_is_refused_before_a_run_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = registry.spec("areal/Warehouse-v0")
    with pytest.raises(
        ConfigError, match="sandbox 'unsafe_local' has no services, and 'warehouse' is asked for: use dock"
    ):
        asyncio.run(prove_sandbox(spec, "unsafe_local"))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    assert "sandbox 'docker' is unavailable: " in spec.lacks()
    assert replace(spec, sandbox="").lacks() == ""
