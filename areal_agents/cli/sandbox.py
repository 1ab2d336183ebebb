"""The command ``sandbox``, dataclasses as in ``cli/commands.py``."""

from __future__ import annotations

import asyncio
import importlib
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from areal_agents.cli.common import UsageError, json_alone, write_json
from areal_agents.errors import ArealError
from areal_agents.sandbox import Preparing, SandboxSpec, backends
from areal_agents.tracking.console import plain

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}


@dataclass
class SandboxExec:
    """Run a Python file in a sandbox, and print how it ended as JSON: ``sandbox exec bubblewrap x.py --timeout 5``.

    The exit code is 0 where the sandbox did its work, whatever the program did. What is no UTF-8 in its output is
    printed as ``\\xNN``.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A backend, as the setting env.sandbox: ``bubblewrap``, ``docker``, ``module:Class``."""
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py")]
    """The program. It runs in an empty folder that has only this file."""
    stdin: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """What it reads from its standard input; left out: nothing."""
    timeout: float = 10.0
    """Seconds until it is killed, by the clock and of CPU time."""
    memory: str = "512M"
    """Bytes that all its processes may hold, or with a unit: 512M, 2G."""
    max_output: str = "1M"
    """Bytes that it may print, beyond which it is killed."""
    image: str = ""
    """What it runs in, for sandboxes that have images."""

    def run(self, overrides: Sequence[str]) -> int:
        if not (math.isfinite(self.timeout) and 0 < self.timeout <= 86_400):
            raise UsageError(f"--timeout is {self.timeout}: it must be more than 0 and at most a day (86400)")
        memory, limit = _size("--memory", self.memory), _size("--max-output", self.max_output)
        try:
            self.file.name.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"{str(self.file)!r}: its name is no UTF-8") from error
        program, data = _read(self.file), b"" if self.stdin is None else _read(self.stdin)
        with json_alone():
            write_json(asyncio.run(self._exec(program, data, memory, limit)), None)
        return 0

    async def _exec(self, program: bytes, data: bytes, memory: int, limit: int) -> dict[str, Any]:
        spec = SandboxSpec(
            memory=memory, cpu_seconds=math.ceil(self.timeout), disk=min(memory // 8, 64 << 20), image=self.image
        )
        backend = backends().get(self.name)
        try:
            async with backend.session(spec) as sandbox:
                try:
                    await sandbox.write_file(f"/work/{self.file.name}", program)
                except OSError as error:
                    raise ArealError(f"cannot put {self.file} into the sandbox: {error.strerror}") from error
                argv = ["python3", f"./{self.file.name}"]
                done = await sandbox.exec(argv, stdin=data, timeout=self.timeout, max_output=limit)
        finally:
            await backend.aclose()
        texts = {"stdout": done.stdout, "stderr": done.stderr}
        return {
            "status": done.status,
            "exit_code": done.exit_code,
            **{name: text.decode("utf-8", "backslashreplace") for name, text in texts.items()},
            "seconds": round(done.seconds, 6),
        }


def _size(option: str, text: str) -> int:
    """Read a number of bytes such as 1000, 512K, 64M, 2G. Raises UsageError."""
    found = re.fullmatch(r"([0-9]{1,15})([KMG]?)(i?B)?", text.strip(), re.ASCII | re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise UsageError(f"{option} {text!r}: write a number of bytes, 1 or more, such as 1000000, 512M or 2G")
    return int(found[1]) << _UNITS[found[2].upper()]


def _read(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


@dataclass
class SandboxBuild:
    """Make the docker sandbox's image from this machine's Debian packages, and hand it to the engine."""

    name: Annotated[Literal["docker"], tyro.conf.Positional]
    """The sandbox that the image is for."""
    packages: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PACKAGE")] = ()
    """Debian packages, installed here, that code inside finds too: ``--packages python3-numpy``."""
    host: str = ""
    """Where the engine listens; left out: DOCKER_HOST, as for docker itself."""

    def run(self, overrides: Sequence[str]) -> int:
        image = importlib.import_module("areal_agents.sandboxes.docker_image")
        print(asyncio.run(image.build(self.packages, self.host)))
        return 0


@dataclass
class SandboxPrepare:
    """Pull images ahead, or build them from folders with a Dockerfile: ``sandbox prepare docker python:3.12 ./task``.

    Runs do it by themselves for the images that an environment names. One that cannot be had is an error.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """A sandbox that has images: ``docker``, ``docker?host=tcp://HOST:2376``."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Names of images, and paths of folders, which begin with a dot or a slash."""

    def run(self, overrides: Sequence[str]) -> int:
        asyncio.run(self._prepare())
        return 0

    async def _prepare(self) -> None:
        backend = backends().get(self.name)
        try:
            if not isinstance(backend, Preparing):
                raise UsageError(f"sandbox {self.name!r} has no images")
            await backend.prepare([SandboxSpec(image=image) for image in self.images])
        finally:
            await backend.aclose()


@dataclass
class SandboxList:
    """List the sandboxes that can be named, each with what its own probes say of it on this machine."""

    json: bool = False
    """Print JSON."""

    def run(self, overrides: Sequence[str]) -> int:
        rows = asyncio.run(_list())
        if self.json:
            write_json(rows, None)
            return 0
        width = max(len(row["name"]) for row in rows)
        for row in rows:
            print(plain(f"{row['name']:<{width}}  {row['problem'] or 'works, memory bounded by ' + row['memory']}"))
            for note in row["notes"]:
                print(plain(f"{'':<{width}}  {note}"))
        return 0


async def _list() -> list[dict[str, Any]]:
    rows = []
    for name in backends().names():
        row: dict[str, Any] = {"name": name, "problem": "", "memory": "", "notes": []}
        try:
            backend = backends().get(name)
            try:
                report = await backend.probe()
                row |= {"memory": report.memory_bound, "notes": list(report.notes)}
            finally:
                await backend.aclose()
        except ArealError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def check_sandbox(name: str, *, json: bool) -> int:
    """Attack a sandbox, print what it holds and what not, and return the exit code."""
    suite = importlib.import_module("areal_agents.sandboxes.suite")  # late: the core does not depend on a collection

    def tell(found: Any) -> None:
        if not json:
            print(plain(suite.line_of(found)), flush=True)

    report = asyncio.run(suite.check(name, tell))
    if json:
        write_json(report.to_json(), None)
    else:
        print(plain(report.summary()))
    return 0 if report.passed else 1


@dataclass
class Sandbox:
    """Try the sandboxes: list them, run a file in one. ``areal-agents check --sandbox NAME`` attacks one."""

    command: (
        Annotated[SandboxExec, tyro.conf.subcommand("exec")]
        | Annotated[SandboxList, tyro.conf.subcommand("list")]
        | Annotated[SandboxBuild, tyro.conf.subcommand("build")]
        | Annotated[SandboxPrepare, tyro.conf.subcommand("prepare")]
    )

    def run(self, overrides: Sequence[str]) -> int:
        return self.command.run(overrides)
