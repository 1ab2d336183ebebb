"""Which interfaces of a network namespace count: made-up listings, and a real namespace where the kernel gives one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from areal_agents.sandboxes import network_look
from tests.sandboxes.test_backends import need

DEV = "Inter-|   Receive     |  Transmit\n face |bytes    packets|bytes    packets\n"
FALLBACKS = ("tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0", "dummy0")


@pytest.fixture
def listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /proc/net with lo, eth0 and what modules put into each namespace: only lo and eth0 are up."""
    names = ("lo", "eth0", *FALLBACKS)
    (tmp_path / "dev").write_text(DEV + "".join(f"{name:>6}: {'0 ' * 16}\n" for name in names))
    (tmp_path / "route").write_text("Iface\tDestination\tGateway \tFlags\neth0\t000000F0\t00000000\t0001\n")
    monkeypatch.setattr(network_look, "is_up", {name: name in ("lo", "eth0") for name in names}.__getitem__)
    monkeypatch.setattr(network_look, "has_address", {name: name in ("lo", "eth0") for name in names}.__getitem__)
    return tmp_path


def test_devices_that_modules_put_into_each_namespace_do_not_count(listing: Path) -> None:
    assert network_look.interfaces(str(listing)) == ["eth0", "lo"]  # and there is no table of IPv6


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("route", "tunl0\t00000000\t00000000\t0001\n"),
        ("if_inet6", "fe800000000000000000000000000001 03 40 20 80 tunl0\n"),
        ("ipv6_route", f"{'0' * 32} 00 {'0' * 32} 00 {'0' * 32} ffffffff 00000001 00000000 00200200    tunl0\n"),
    ],
)
def test_one_with_a_route_or_an_address_counts(listing: Path, table: str, line: str) -> None:
    with (listing / table).open("a") as file:
        file.write(line)
    assert network_look.interfaces(str(listing)) == ["eth0", "lo", "tunl0"]


@pytest.mark.parametrize("question", ["is_up", "has_address"])
def test_one_that_is_up_or_has_an_ipv4_address_counts(
    listing: Path, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    monkeypatch.setattr(network_look, question, lambda name: name == "gre0")
    assert "gre0" in network_look.interfaces(str(listing))


def test_what_the_kernel_does_not_tell_counts() -> None:
    assert network_look.is_up("no-such-device")
    assert not network_look.has_address("no-such-device")
    assert network_look.is_up("lo")


def test_a_real_namespace(tmp_path: Path) -> None:
    """A device is down, then has an address, then is up."""
    need(os.geteuid() == 0 and shutil.which("ip") and shutil.which("unshare"), "root, ip and unshare")
    look = f"{sys.executable} -I -S {tmp_path}/look.py"
    (tmp_path / "look.py").write_text(
        f"import json; own = {{}}; exec(open({network_look.__file__!r}).read(), own)\n"
        "print(json.dumps(own['interfaces']()))"
    )
    steps = ["ip link add own0 type bridge", look, "ip addr add 10.9.8.7/24 dev own0", look, "ip addr flush dev own0"]
    steps += [look, "ip link set own0 up", look]
    done = subprocess.run(
        ["unshare", "--net", "sh", "-ec", "; ".join(steps)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        need(None, f"a bridge in a namespace of its own: {done.stderr.strip()}")
    told = [set(json.loads(line)) - {"lo"} for line in done.stdout.splitlines()]
    assert told == [set(), {"own0"}, set(), {"own0"}]
