"""Attacks on the host through the files that it writes into a sandbox and reads out of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path

from areal_agents.sandboxes.subject import SPEC, Subject, held, run, tried, value


async def links(subject: Subject) -> str:
    code = """
import json, os, sys
target = sys.argv[1]
os.symlink(target, "link")
os.symlink(os.path.dirname(target), "folder")
os.symlink("/", "up")
os.symlink("/proc/1/root", "root")
made = ["link", "folder", "up", "root"]
for source in (target, "/etc/passwd", "/etc/hostname", "/usr/bin/env"):
    try:
        os.link(source, "hard" + str(len(made)))
        made.append(source)
    except OSError:
        pass
print(json.dumps(made))
"""
    with tempfile.TemporaryDirectory(prefix="areal-attack-") as folder:
        secret, canary = os.urandom(16).hex(), Path(folder, "canary")
        canary.write_text(secret)
        Path(folder).chmod(0o755)
        name = str(canary)
        async with subject.session(SPEC) as sandbox:
            made = await value(sandbox, code, name)
            tried(made[:4] == ["link", "folder", "up", "root"], made)
            held(len(made) == 4, f"hard links to {made[4:]}")
            paths = ["link", f"folder/{canary.name}", f"up{name}", f"root{name}"]
            for path in paths:
                with contextlib.suppress(OSError, ValueError):
                    held(secret.encode() not in await sandbox.read_file(path, 1000), f"read through {path}")
                with contextlib.suppress(OSError, ValueError):
                    await sandbox.write_file(path, b"overwritten")
                held(canary.read_text() == secret, f"written through {path}")
            held(secret.encode() not in await sandbox.snapshot(), "the secret is in a snapshot")
        await _swapped(subject, canary, secret)
    return f"{len(paths)} symlinks followed by neither upload, download nor snapshot, also while they are swapped"


async def _swapped(subject: Subject, canary: Path, secret: str) -> None:
    """Swap a folder for a symlink to the host's, again and again, while the host reads and writes below it."""
    code = """
import os, sys
os.mkdir("real"); os.symlink(sys.argv[1], "fake")
open("real/canary", "w").close()
swaps = 0
while True:
    for name in ("real", "fake"):
        os.rename(name, "d")
        swaps += 1
        if swaps % 100 == 0:
            os.write(1, b".")
        os.rename("d", name)
"""
    hits = 0
    async with subject.session(SPEC) as sandbox:
        process = await sandbox.spawn(["python3", "-I", "-c", code, str(canary.parent)])
        tried(await process.recv(1, timeout=30), "no swap was made")
        for _ in range(40):
            with contextlib.suppress(OSError):
                hits += 1
                await sandbox.write_file("d/canary", b"overwritten")
                held(secret.encode() not in await sandbox.read_file("d/canary", 1000), "read through a swap")
            held(canary.read_text() == secret, "written through a swap")
        tried(await process.recv(1, timeout=30), "no swap was made meanwhile")
        await process.kill()


async def odd_files(subject: Subject) -> str:
    code = """
import os, socket
os.mkfifo("pipe")
socket.socket(socket.AF_UNIX).bind("socket")
with open("sparse", "wb") as file:
    file.truncate(8 << 20)
path = "deep"
for _ in range(200):
    os.mkdir(path)
    path += "/d"
os.mkdir("closed", 0)
os.chmod("/work", 0o500)
print(len(os.listdir(".")))
"""
    async with subject.session(SPEC) as sandbox:
        done = await run(sandbox, code)
        tried(done.stdout == b"5\n", done)
        for path in ("pipe", "socket", "closed/x"):
            try:
                async with asyncio.timeout(20):
                    read = await sandbox.read_file(path, 10)
            except TimeoutError:
                held(False, f"reading {path} hangs")
            except (OSError, ValueError):
                pass
            else:
                held(False, f"{path} was read: {read!r}")
        try:
            await sandbox.read_file("sparse", 1 << 20)
        except OSError:
            pass
        else:
            held(False, "8 MB were read where 1 MB is allowed")
    return "a pipe, a socket, a sparse file, closed and deep folders: refused, none hangs"
