"""Names and addresses of fetch: look-ups that hang, and which addresses are public."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from areal_agents.errors import EnvError
from areal_agents.tool import ToolResult
from areal_agents.tools import fetch as fetch_module
from areal_agents.tools.fetch import fetch_tool, is_public
from tests.tools.sessions import call, play
from tests.tools.test_fetch import port

__all__ = ["port"]


@pytest.fixture
def slow_resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts look-ups of names that begin with "slow", which are answered at the test's end, and those at one time."""
    end, seen, lock, real = threading.Event(), {"now": 0, "most": 0, "all": 0}, threading.Lock(), socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **options: Any) -> Any:
        if not host.startswith("slow"):
            return real("127.0.0.1", *args, **options)
        with lock:
            seen["now"] += 1
            seen["all"] += 1
            seen["most"] = max(seen["most"], seen["now"])
        end.wait(600)
        with lock:
            seen["now"] -= 1
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    fetch_module._threads.cache_clear()
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield seen
    end.set()
    fetch_module._threads(os.getpid()).shutdown()
    fetch_module._threads.cache_clear()


def test_a_resolver_that_hangs_takes_no_thread_of_others(slow_resolver: dict[str, int]) -> None:
    async def whole() -> None:
        looks = [asyncio.ensure_future(fetch_module.resolve(f"slow{n}.test", 80)) for n in range(40)]
        while slow_resolver["now"] < fetch_module.LOOKUPS:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert await asyncio.gather(*(asyncio.to_thread(str, n) for n in range(40))) == [str(n) for n in range(40)]
        for look in looks:
            look.cancel()
        await asyncio.wait(looks)

    asyncio.run(whole())
    # Those that nobody waits for are not begun.
    assert slow_resolver == {"now": fetch_module.LOOKUPS, "most": fetch_module.LOOKUPS, "all": fetch_module.LOOKUPS}


def test_a_name_that_is_not_looked_up_in_time_is_told_and_not_the_models_doing(slow_resolver: dict[str, int]) -> None:
    options: dict[str, Any] = {"seconds": 0.4}
    with pytest.raises(EnvError, match=r"fetch: slow\.test was not looked up within 0\.2 s") as caught:
        play((fetch_tool(["slow.test"], **options),), call("fetch", url="https://slow.test/"))
    assert caught.value.blame == "outside"
    (result,) = play((fetch_tool(["*.test"], **options),), call("fetch", url="https://slow.test/"))
    assert result == ToolResult("error: slow.test was not looked up within 0.2 s", "error")  # the model chose it


def test_other_names_are_looked_up_beside_those_that_hang(
    port: int, slow_resolver: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_module, "LOOKUP_S", 3.0)
    hosts = [f"fine.test:{port}", "*.test"]
    tools = (fetch_tool(hosts, private=hosts, seconds=20),)
    slow = [call("fetch", url=f"https://slow{n}.test/") for n in range(fetch_module.LOOKUPS - 1)]
    results = play(tools, [*slow, call("fetch", url=f"http://fine.test:{port}/json")])
    assert results[-1].text == '{"a": 1}'
    assert {result.text.partition("was")[2] for result in results[:-1]} == {" not looked up within 3 s"}


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.0.1", False), ("100.64.0.1", False), ("169.254.169.254", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("fec0::1", False), ("ff02::1", False),
        ("::ffff:10.0.0.1", False), ("::ffff:93.184.216.34", True), ("::10.0.0.1", False), ("64:ff9b::a00:1", False),
        ("2002:a00:1::1", False), ("2001:0:1::1", False), ("2001:db8::1", False), ("", False), ("x", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
