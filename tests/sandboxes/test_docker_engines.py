"""Engines that are reached or set up in another way than the one of the other tests: by ssh, with mapped users."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_agents.errors import ConfigError, SandboxError, SandboxUnavailable
from areal_agents.sandbox import SandboxSpec
from areal_agents.sandboxes import docker_image
from areal_agents.sandboxes.docker_backend import DockerBackend
from areal_agents.sandboxes.docker_tunnel import Tunnel
from areal_agents.sandboxes.subject import run
from tests.sandboxes.engines import containers, play
from tests.sandboxes.test_backends import need
from tests.sandboxes.test_docker_services import ask, web


@pytest.fixture
def ssh_host(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An ssh server on the loopback with a key of its own, beside the tests' engine; yields its address."""
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    socket_path = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    here = sshd is not None and os.geteuid() == 0 and socket_path.startswith("unix://")
    need(here, "sshd (openssh-server), root, and an engine on a unix socket")
    assert sshd is not None
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": tmp_path / "host", "PidFile": "none", "UsePAM": "no",
        "AuthorizedKeysFile": tmp_path / "user.pub", "StrictModes": "no", "PermitRootLogin": "prohibit-password",
    }  # fmt: skip
    (tmp_path / "sshd").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    (tmp_path / "client").write_text(
        f"IdentityFile {tmp_path}/user\nUserKnownHostsFile {tmp_path}/known\nStrictHostKeyChecking accept-new\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/client "$@"\n')
    (tmp_path / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", str(tmp_path / "sshd")], stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            try:
                socket.create_connection(("127.0.0.1", port), 5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        yield f"ssh://root@127.0.0.1:{port}{socket_path.removeprefix('unix://')}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.docker
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the SDK's, of a socket that is no more
def test_an_engine_by_ssh(engine: Any, ssh_host: str) -> None:
    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec()) as sandbox:
            assert (await run(sandbox, "print(1)")).stdout == b"1\n"
            tunnel = backend._engine._tunnel
            assert tunnel is not None
            assert tunnel._process is not None
            os.kill(tunnel._process.pid, signal.SIGKILL)  # the way is gone, and with it what came by it
            with pytest.raises(SandboxError, match="Open a new session"):
                await run(sandbox, "import time; time.sleep(600)", timeout=600)
        async with backend.session(SandboxSpec()) as sandbox:  # and is made anew
            assert (await run(sandbox, "print(2)")).stdout == b"2\n"

    play(calls, host=ssh_host)
    gc.collect()  # here, and not in a test that does not expect the warning
    assert containers(engine) == []
    assert not list(Path("/tmp").glob("areal-ssh-*"))

    async def refused(backend: DockerBackend) -> None:
        with pytest.raises(SandboxUnavailable, match=r"no engine answers at ssh://.*/nowhere"):
            await backend.probe()

    play(refused, host=ssh_host.partition("/tmp/")[0] + "/nowhere")


def test_an_ssh_host_that_does_not_answer() -> None:
    async def refused(backend: DockerBackend) -> None:
        with pytest.raises(SandboxUnavailable, match=r"no engine is reached at ssh://127.0.0.1:9: .*ssh HOST docker"):
            await backend.probe()

    pytest.importorskip("docker")
    play(refused, host="ssh://127.0.0.1:9")


@pytest.mark.parametrize("url", ["ssh://", "ssh://-oProxyCommand=x", "ssh://-x@host", "ssh://a:b@host", "ssh://h:x"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="the engine's address"):
        Tunnel(url)


@pytest.fixture
def mapped_users(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second engine, with root of its containers mapped to a plain user of the host."""
    dockerd = shutil.which("dockerd", path=f"{os.environ['PATH']}:/usr/sbin")
    mappable = os.environ.get("CI") == "true" or "dockremap:" in Path("/etc/subuid").read_text()  # else it adds a user
    if dockerd is None or os.geteuid() != 0 or not mappable:
        pytest.skip("needs dockerd, root, and the user dockremap of dockerd --userns-remap=default")
    room = Path(tempfile.mkdtemp(prefix="areal-docker."))
    room.chmod(0o711)  # for the mapped root
    off = [f"--{name}=false" for name in ("iptables", "ip6tables", "ip-forward", "ip-masq")]
    places = [f"--data-root={room}/data", f"--exec-root={room}/exec", f"--pidfile={room}/pid", f"-H=unix://{room}/sock"]
    with (room / "log").open("wb") as log:
        command = [dockerd, "--userns-remap=default", "--bridge=none", *off, *places]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{room}/sock")
        for _ in range(600):
            with socket.socket(socket.AF_UNIX) as client:
                if client.connect_ex(f"{room}/sock") == 0:
                    break
            assert process.poll() is None, (room / "log").read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(room, ignore_errors=True)


@pytest.mark.docker
def test_an_engine_with_mapped_users(mapped_users: None) -> None:
    asyncio.run(docker_image.build())

    async def calls(backend: DockerBackend) -> None:
        async with backend.session(SandboxSpec(services=(web(),))) as sandbox:
            assert await ask(sandbox, "import os; print(os.getuid())") == "0\n"
            outside = int((await ask(sandbox, "print(open('/proc/self/uid_map').read().split()[1])")).strip())
            assert outside > 0  # root inside is nobody of the host
        assert "name=userns" in backend._engine.info["SecurityOptions"]

    play(calls)
