"""Two hosts with a Ray node each: network namespaces joined by a cable of their own, the second with its own /dev/shm.

Neither reaches anything but the other. They share the disk, as nodes of a cluster share a file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import missing, require
from tests.processes import MARKER, marked, wait_gone

_NETWORK = "10.213.77"
PORT = 6379


@dataclass
class Hosts:
    """``address``: of the Ray whose head is on host 0. Every process has ``mark``."""

    mark: str
    temporary: Path
    prefixes: tuple[list[str], list[str]]
    """What puts a command on host 0 and on host 1."""
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    address: str = f"{_NETWORK}.1:{PORT}"

    @property
    def environment(self) -> dict[str, str]:
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.mark}  # whatever this user's Rays do otherwise
        return {**os.environ, MARKER: self.mark, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": self.address, **token}

    def start(self, host: int, cpus: int) -> None:
        """A Ray node on ``host``, the head first; it declares 8 of the resource ``host0`` or ``host1``."""
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.temporary}"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        ray += [f"--node-ip-address={_NETWORK}.{host + 1}", f"--object-store-memory={10**8}"]
        ray.append(f"--resources={json.dumps({f'host{host}': 8})}")
        with (self.temporary / f"node-{host}.log").open("wb") as log:
            self.nodes.append(
                subprocess.Popen(
                    [*self.prefixes[host], *ray, *([f"--address={self.address}"] if host else head)],
                    env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )
            )  # fmt: skip
        self._wait_for(host)

    def _wait_for(self, host: int) -> None:
        log, end = self.temporary / f"node-{host}.log", time.monotonic() + 60
        while "Ray runtime started" not in (text := log.read_text(errors="replace")):
            assert self.nodes[host].poll() is None, text
            assert time.monotonic() < end, text
            time.sleep(0.05)

    def network(self, pid: int) -> int:
        """0 or 1: the host that ``pid`` is on."""
        networks = [os.readlink(f"/proc/{node.pid}/ns/net") for node in self.nodes]
        return networks.index(os.readlink(f"/proc/{pid}/ns/net"))

    def kill(self, host: int) -> None:
        """End every process of ``host`` at once."""
        network = os.readlink(f"/proc/{self.nodes[host].pid}/ns/net")
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/net") == network:
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def two_hosts(mark: str, *, cpus: tuple[int, int]) -> Iterator[Hosts]:
    """Two hosts with Ray; ends with nothing left of them. Needs root."""
    require("module:ray", "ip", "unshare")
    if os.geteuid() != 0:
        missing("network namespaces need root")
    a, b = names = (f"areal-a-{os.getpid()}", f"areal-b-{os.getpid()}")
    separate = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"', "sh"]
    with contextlib.ExitStack() as stack:
        for name in names:
            if error := _refused("netns", "add", name):
                missing(f"network namespaces cannot be made here: {error}")
            stack.callback(_ip, "netns", "del", name)
        _ip("link", "add", "cable", "netns", a, "type", "veth", "peer", "name", "cable", "netns", b)
        for number, name in enumerate(names, start=1):
            _ip("-n", name, "addr", "add", f"{_NETWORK}.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True)))
        hosts = Hosts(mark, temporary, (["ip", "netns", "exec", a], ["ip", "netns", "exec", b, *separate]))
        stack.callback(_end, hosts)
        for host in (0, 1):
            hosts.start(host, cpus[host])
        yield hosts


def _end(hosts: Hosts) -> None:
    for node in reversed(hosts.nodes):
        node.terminate()
    for node in hosts.nodes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(20)
    for pid in wait_gone(marked(hosts.mark), 10):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for node in hosts.nodes:
        node.wait()


def _ip(*arguments: str) -> None:
    error = _refused(*arguments)
    assert not error, f"ip {' '.join(arguments)}: {error}"


def _refused(*arguments: str) -> str:
    """What ``ip`` says against it; nothing where it is done."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"
