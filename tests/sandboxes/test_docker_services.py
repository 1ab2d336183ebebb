"""Services beside a session, on a real engine: they serve, they are contained, and they go with their session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandbox import Sandbox, SandboxSpec, Service
from areal_agents.sandboxes import docker_backend, docker_services
from areal_agents.sandboxes.docker_backend import DockerBackend
from areal_agents.sandboxes.docker_image import IMAGE
from areal_agents.sandboxes.subject import run
from tests.sandboxes.engines import containers, networks, play
from tests.sandboxes.test_backends import ROOT

SERVER = """
import http.server, io, contextlib, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # what code does that has taken over the service
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                exec(self.rfile.read(int(self.headers["Content-Length"])), {})
            except BaseException as error:
                print(repr(error))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(said.getvalue().encode())
    def log_message(self, *args):
        pass
print("about to serve", flush=True)
http.server.ThreadingHTTPServer(("", 8000), Handler).serve_forever()
"""
ASK = """
import sys, urllib.request
answer = urllib.request.urlopen(f"http://{sys.argv[1]}:8000", data=sys.stdin.buffer.read(), timeout=60)
print(answer.read().decode(), end="")
"""
REACH = """
import json, socket, sys
def attempt(host, port):
    try:
        socket.create_connection((host, port), 4).close()
        return "connected"
    except OSError as error:
        return str(error)
def ask(server):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(4)
        query = b"\\x12\\x34\\x01\\0\\0\\1\\0\\0\\0\\0\\0\\0\\4leak\\7example\\3com\\0\\0\\1\\0\\1"
        try:
            s.sendto(query, (server, 53))
            return int.from_bytes(s.recv(512)[6:8], "big")
        except OSError as error:
            return str(error)
def shout(server):
    sent = 0
    past_routes = [(1, socket.SO_BINDTODEVICE, b"eth0"), (1, socket.SO_DONTROUTE, 1)]
    for options in ([], [(1, socket.SO_BROADCAST, 1)], past_routes):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try:
                for option in options:
                    s.setsockopt(*option)
                sent += s.sendto(b"leak", (server, 53))
            except OSError:
                pass
    return sent
def abstract(name):
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect("\\0" + name)
            return "connected"
        except OSError as error:
            return str(error)
import concurrent.futures
def all(wanted, name, servers):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        tcp = [pool.submit(attempt, *one) for one in wanted]
        dns = [pool.submit(ask, one) for one in servers]
        shouted = sum(map(shout, [*servers, "224.0.0.1", "255.255.255.255"]))
        answers = {"tcp": [t.result() for t in tcp], "dns": [d.result() for d in dns], "abstract": abstract(name)}
        return {**answers, "shouted": shouted}
"""

READY = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 8000))'"
HOG = """
import subprocess, sys
print(subprocess.run([sys.executable, "-c", "b = bytearray(300 << 20)"]).returncode)
"""
GREEDY = """
import contextlib, time, urllib.request
with contextlib.suppress(OSError):
    urllib.request.urlopen("http://web:8000", data=b"bytearray(300 << 20)", timeout=600)
time.sleep(600)
"""
FORKS = """
import os, time
n = 0
try:
    while n < 200:
        os.fork() or (time.sleep(30), os._exit(0))
        n += 1
except OSError:
    pass
print(n)
"""


def web(name: str = "web", **given: Any) -> Service:
    return Service(**{"name": name, "image": IMAGE, "port": 8000, "command": ("python3", "-c", SERVER), **given})


async def ask(sandbox: Sandbox, code: str, name: str = "web") -> str:
    """Run code inside a service, and return what it prints."""
    done = await sandbox.exec(["python3", "-c", ASK, name], stdin=code.encode(), timeout=60)
    assert done.status == "ok", done
    return done.stdout.decode()


@contextlib.contextmanager
def listeners() -> Iterator[tuple[int, str, list[str]]]:
    """Listen on the host: TCP and DNS on every address, an abstract socket. Yields what has come in, too."""
    seen: list[str] = []
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket(type=socket.SOCK_DGRAM) as dns:
        tcp.bind(("0.0.0.0", 0))
        unix.bind("")
        dns.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        dns.bind(("0.0.0.0", 53))
        for listener in (tcp, unix):
            listener.listen()

        def take(what: str, receive: Any) -> None:
            with contextlib.suppress(OSError):
                while True:
                    receive()
                    seen.append(what)

        receivers = {"tcp": lambda: tcp.accept()[0].close(), "unix": unix.accept, "dns": lambda: dns.recvfrom(512)}
        for what, receive in receivers.items():
            threading.Thread(target=take, args=(what, receive), daemon=True).start()
        yield tcp.getsockname()[1], unix.getsockname()[1:].decode(), seen
        for one in (tcp, unix, dns):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.mark.docker
def test_a_session_and_its_services_reach_each_other_and_nothing_else(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        spec = SandboxSpec(
            services=(web(), web("api-2", environment={"GREETING": "hello"}, port=0, ready=("sh", "-c", READY)))
        )
        async with backend.session(spec) as sandbox, backend.session(SandboxSpec(services=(web(),))) as other:
            assert await ask(sandbox, "import os; print(os.environ['GREETING'], os.environ['HOSTNAME'])", "api-2") == (
                "hello api-2\n"
            )
            code = "import urllib.request as u; print(u.urlopen('http://api-2:8000', data=b'print(7)').read())"
            assert await ask(sandbox, code) == "b'7\\n'\n"  # from one service to the other
            theirs = (await run(other, "import socket; print(socket.gethostbyname('web'))")).stdout.decode().strip()
            mine = (await run(sandbox, "import socket; print(socket.gethostbyname('web'))")).stdout.decode().strip()
            assert theirs != mine
            gateway = mine.rpartition(".")[0] + f".{int(mine.rpartition('.')[2]) - 1}"
            with listeners() as (port, abstract, seen):
                socket.create_connection(("127.0.0.1", port), 5).close()
                with socket.socket(type=socket.SOCK_DGRAM) as dns:
                    dns.sendto(b"x", ("127.0.0.1", 53))
                while len(seen) < 2:  # noqa: ASYNC110  they listen, on threads
                    await asyncio.sleep(0.01)
                hosts = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), 0, socket.AF_INET)]
                with socket.socket(type=socket.SOCK_DGRAM) as s, contextlib.suppress(OSError):
                    s.connect(("8.8.8.8", 9))  # which sends nothing
                    hosts.append(s.getsockname()[0])
                places = [(host, port) for host in ("127.0.0.1", gateway, *hosts)] + [(theirs, 8000), ("1.1.1.1", 53)]
                servers = ["127.0.0.11", gateway, *hosts]
                attack = REACH + f"print(json.dumps(all({places}, {abstract!r}, {servers})))"
                for told in (
                    json.loads((await run(sandbox, attack)).stdout),
                    json.loads(await ask(sandbox, attack)),
                ):
                    assert len(told["tcp"]) == len(places)
                    assert "connected" not in (*told["tcp"], told["abstract"]), told
                    assert told["shouted"] >= 4 * (3 + len(servers))
                    assert all(answer == 0 or isinstance(answer, str) for answer in told["dns"]), told
                assert sorted(seen) == ["dns", "tcp"]  # our own two alone

    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])


@pytest.mark.docker
def test_a_host_that_takes_datagrams_is_told_of_once(
    engine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not docker_services._deafen("f" * 64)  # on no machine of ours
    monkeypatch.setattr(docker_services, "_deafen", lambda network: False)

    async def calls(backend: DockerBackend) -> None:
        for _ in range(2):
            async with backend.session(SandboxSpec(services=(web(),))) as sandbox:
                assert (await run(sandbox, "print(1)")).stdout == b"1\n"

    play(calls)
    assert capsys.readouterr().err.count("net.ipv4.conf.default.rp_filter=1") == 1


@pytest.mark.docker
def test_a_service_is_contained(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        service = web(memory=128 << 20, disk=8 << 20, processes=24, cpus=0.5, writable=("/srv/data",), start_seconds=60)
        async with backend.session(SandboxSpec(services=(service,))) as sandbox:
            for path in ("/usr/x", "/dev/x", "/sys/fs/cgroup/x", "/proc/sys/kernel/core_pattern"):
                assert "Read-only" in await ask(sandbox, f"open({path!r}, 'w')"), path
            masked = (
                "import os; print([open(p).read() for p in ('/proc/keys', '/proc/timer_list') if os.path.exists(p)])"
            )
            assert set(json.loads((await ask(sandbox, masked)).replace("'", '"'))) <= {""}
            assert await ask(sandbox, "open('/srv/data/x', 'w').write('x'); print(1)") == "1\n"
            assert "No space left" in await ask(sandbox, "open('/srv/data/y', 'wb').write(bytes(9 << 20))")
            assert int(await ask(sandbox, FORKS)) <= 32
            assert "Resource temporarily unavailable" in await ask(sandbox, HOG)  # no place is left for it
            caps = int(await ask(sandbox, "print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])"), 16)
            assert caps == sum(1 << bit for bit in (0, 1, 3, 5, 6, 7, 10))
            for path, mode in (("fd/1", "wb"), ("mem", "rb"), ("environ", "rb")):  # pid 1 is ours
                assert "PermissionError" in await ask(sandbox, f"open('/proc/1/{path}', {mode!r}).read()"), path
            made = next(c for c in containers(engine) if c.attrs["Config"]["Hostname"] == "web")
            settings = made.attrs["HostConfig"]
            assert (settings["Memory"], settings["MemorySwap"], settings["NanoCpus"]) == (
                128 << 20,
                128 << 20,
                500_000_000,
            )
            assert settings["PidsLimit"] <= 24 + 9
            assert (settings["ReadonlyRootfs"], settings["CapDrop"], settings["Privileged"]) == (True, ["ALL"], False)
            assert "no-new-privileges:true" in settings["SecurityOpt"]

    play(calls)


@pytest.mark.docker
def test_a_service_is_what_its_image_says(engine: Any, tmp_path: Path) -> None:
    show = "pwd; id -u; echo $WHO $HOME; echo x > /data/sub/x && echo y > /run/y && echo z > /opt/new/z && echo wrote; "
    show += "echo w > /data/no || exec python3 -m http.server 8000"
    lines = [f"FROM {IMAGE}", "RUN mkdir -p /data/sub && echo app:x:1234:77::/home/app:/bin/sh >> /etc/passwd"]
    lines += ["RUN mv /etc/passwd /usr/users && ln -s ../opt/users /etc/passwd && ln -s /usr/users /opt/users"]
    lines += ["USER app", "WORKDIR /data", "VOLUME /data/sub/", "ENV WHO=me", f"CMD {json.dumps(['sh', '-c', show])}"]
    (tmp_path / "Dockerfile").write_text("\n".join(lines))
    engine.images.build(path=str(tmp_path), tag="areal-test-app:1", rm=True)

    async def calls(backend: DockerBackend) -> None:
        given: Any = {"image": "areal-test-app:1", "command": (), "writable": ("/opt/new",)}
        async with backend.session(SandboxSpec(services=(web(**given),))) as sandbox:
            await run(sandbox, "")
            for made in containers(engine):
                if made.attrs["Config"]["Hostname"] == "web":
                    made.kill()
            with pytest.raises(
                SandboxError, match=r"(?s)printed: /data\n1234\nme /home/app\nwrote\n.*/data/no: Read-only"
            ):
                await run(sandbox, "import time; time.sleep(600)", timeout=600)
        for user, message in (("no-one", "has no user 'no-one'"), ("0:0", "printed: /data\n0\n")):
            service = web(**given, user=user, ready=("false",), start_seconds=2)
            async with backend.session(SandboxSpec(services=(service,))) as sandbox:
                with pytest.raises((SandboxError, SandboxUnavailable), match=message):
                    await run(sandbox, "")

    try:
        play(calls)
    finally:
        engine.images.remove("areal-test-app:1", force=True)


@pytest.mark.docker
def test_a_service_whose_memory_is_full_loses_a_process_and_not_the_host_memory(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(services=(web(memory=96 << 20),))) as sandbox:
            assert await ask(sandbox, HOG) == "-9\n"
            assert await ask(sandbox, "print(1)") == "1\n"

    play(calls)


@pytest.mark.docker
def test_the_end_of_a_service_is_the_sandboxs_failure(engine: Any) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(services=(web(),))) as sandbox:
            late = asyncio.ensure_future(run(sandbox, "import time; time.sleep(600)", timeout=600))
            process = await sandbox.spawn(["python3", "-c", ASK, "web"])
            await process.send(b"import os; os._exit(3)")
            for made in containers(engine):
                if made.attrs["Config"]["Hostname"] == "web":
                    made.kill()
            with pytest.raises(SandboxError, match=r"because its service 'web' was lost .*about to serve"):
                await late
            with pytest.raises(SandboxError, match=r"service 'web' was lost"):
                await run(sandbox, "")
        async with backend.session(SandboxSpec(services=(web(),))) as sandbox:
            code = "import threading, os; threading.Timer(0.2, os._exit, [3]).start()"
            assert await ask(sandbox, code) == ""
            with pytest.raises(SandboxError, match=r"service 'web' ended at [\d:]+ UTC with exit code 3 \(it"):
                await run(sandbox, "import time; time.sleep(600)", timeout=600)
        async with backend.session(SandboxSpec(services=(web(memory=64 << 20),))) as sandbox:
            with pytest.raises(SandboxError, match=r"'web' ended at .* code -9, because its memory of 64 MiB was"):
                await run(sandbox, GREEDY, timeout=600)

    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])


@pytest.mark.docker
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"command": ("sh", "-c", "echo no licence; exit 4")}, SandboxError, "exit code 4 .*no licence.*before it had"),
        ({"command": ("no-such-program",)}, SandboxError, "exit code 127 .*no-such-program"),
        ({"port": 9, "start_seconds": 1}, SandboxError, "'web' did not start within 1 s .*about to serve"),
        ({"ready": ("false",), "start_seconds": 1}, SandboxError, "within 1 s, and 'false' ended with 1 "),
        ({"ready": ("no-ready",), "start_seconds": 2}, SandboxError, "'no-ready' ended with 127: .*No such file"),
        ({"command": ("printf", r"\033]0;owned\007")}, SandboxError, r"it printed: \\x1b\]0;owned\\x07\), before"),
        ({"image": "areal-test/none:1"}, SandboxUnavailable, "image 'areal-test/none:1' cannot be had"),
    ],
)
def test_a_service_that_does_not_start(engine: Any, given: Any, error: type[Exception], message: str) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(services=(web("db"), web(**given)))) as sandbox:
            with pytest.raises(error, match=message):
                await run(sandbox, "")

    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])


@pytest.mark.docker
def test_the_pool_keeps_sessions_with_their_services_and_no_state(engine: Any) -> None:
    spec = SandboxSpec(services=(web(),))

    async def calls(backend: DockerBackend) -> None:
        for _ in range(2):
            async with backend.session(spec) as sandbox:
                assert (
                    await ask(sandbox, "import os; print(os.path.exists('/tmp/mark')); open('/tmp/mark', 'w')")
                    == "False\n"
                )
            (key,) = backend._pool._warm
            (warm,) = await asyncio.gather(*backend._pool._warm[key])
        for made in containers(engine):
            if made.attrs["Config"]["Hostname"] == "web":
                made.kill()
        while warm.alive:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        async with backend.session(spec) as sandbox:
            assert await ask(sandbox, "print(2)") == "2\n"

    play(calls, pool=1)
    assert (containers(engine), networks(engine)) == ([], [])


_HOST = """
import asyncio
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes.docker_backend import DockerBackend
from tests.sandboxes.test_docker_services import web

async def main():
    backend = DockerBackend(pool=0)
    async with backend.session(SandboxSpec(services=(web(),))) as sandbox:
        await sandbox.exec(["/bin/true"], timeout=60)
        print("runs", flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.docker
def test_services_of_a_killed_run_end_at_once_and_are_removed_by_the_next(engine: Any) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOST], cwd=ROOT, stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        assert host.stdout.readline() == b"runs\n"
        host.send_signal(signal.SIGKILL)
    left = containers(engine)
    assert (len(left), len(networks(engine))) == (2, 1)
    for container in left:
        if container.status == "running":
            assert container.wait(timeout=60)["StatusCode"] in (0, 137)

    async def calls(backend: DockerBackend) -> None:
        await backend.probe()

    docker_backend._reports.clear()
    play(calls)
    assert (containers(engine), networks(engine)) == ([], [])
