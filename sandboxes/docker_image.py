"""The recipe of the docker backend's own image, made of this machine's Debian packages. No registry is asked.

It holds what is installed here of the packages below and of what they depend on: a Python, a shell, the usual commands.
``areal-agents sandbox build docker`` hands it to the engine. On another system build it from the Dockerfile beside this
file. Code may run in any other image, ``docker?image=NAME``: this one then gives pid 1 its Python.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from areal_agents.errors import SandboxUnavailable

IMAGE: Final = "areal-agents-sandbox:1"
PACKAGES: Final = (
    "python3",
    "bash",
    "coreutils",
    "findutils",
    "grep",
    "sed",
    "mawk",
    "tar",
    "diffutils",
    "gzip",
    "libc-bin",
)
LEFT_OUT: Final = ("debconf", "debianutils", "dpkg", "perl-base", "install-info", "base-files")
"""Nothing inside installs packages."""
_UNUSED: Final = re.compile(
    r"/usr/share/(doc|man|info|locale|lintian|bug|menu|python3/dist)/|/var/|/etc/(?!alternatives/)"
)
_LINKS: Final = {"usr/bin/sh": "bash", "usr/bin/awk": "mawk"}
"""What maintainer scripts make."""
_FOLDERS: Final = ("dev", "etc", "proc", "sys", "tmp", "work", "home", "root", "run", "var", "var/tmp", "opt")
_FILES: Final = {
    "etc/passwd": b"root:x:0:0::/:/bin/false\nsandbox:x:1000:1000::/work:/bin/sh\n",
    "etc/group": b"root:x:0:\nsandbox:x:1000:\n",
    "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files\n",
}


async def build(packages: Iterable[str] = (), host: str = "") -> str:
    """Make the image from this machine's packages, hand it to an engine, and return its name.

    Args:
        packages: Debian packages, installed here, that it gets besides.
        host: where the engine listens; "" leaves it to DOCKER_HOST.

    Raises:
        SandboxUnavailable: where there is no engine, or the image cannot be made here.
    """
    from areal_agents.sandboxes.docker_engine import Engine

    engine = Engine(host)
    try:
        await engine.connect()
        data = await asyncio.to_thread(root_file_system, tuple(packages))
        repository, _, tag = IMAGE.partition(":")
        await engine.call("import_image_from_data", data, repository=repository, tag=tag)
    finally:
        await engine.aclose()
    return IMAGE


def root_file_system(extra: Iterable[str] = ()) -> bytes:
    """Return the image's root file system as a tar.

    ``extra`` are Debian packages, installed here, that the image gets besides. Raises SandboxUnavailable where this is
    no Debian, or one of the packages is not installed.
    """
    if shutil.which("dpkg-query") is None:
        raise _unavailable("this is no Debian or Ubuntu: dpkg-query was not found")
    packages = _closure([*PACKAGES, *extra])
    listed = subprocess.run(["dpkg-query", "-L", *packages], capture_output=True, text=True, check=True).stdout
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for folder in _FOLDERS:
            archive.addfile(_entry(folder, tarfile.DIRTYPE))
        for name in ("bin", "sbin", "lib", "lib64"):
            archive.addfile(_entry(name, tarfile.SYMTYPE, f"usr/{name}"))
        for name, data in _FILES.items():
            member = _entry(name, tarfile.REGTYPE)
            member.mode, member.size = 0o644, len(data)
            archive.addfile(member, io.BytesIO(data))
        seen = {*_LINKS, *_FOLDERS, *_FILES}
        for name, target in _LINKS.items():
            archive.addfile(_entry(name, tarfile.SYMTYPE, target))
        for path in _with_bytecode(sorted({*listed.splitlines()})):
            _add(archive, path, seen)
    return sink.getvalue()


def _closure(names: Iterable[str]) -> list[str]:
    """Return packages and what they depend on, as far as it is installed. Raises SandboxUnavailable."""
    form = "${Package}\t${db:Status-Status}\t${Pre-Depends}, ${Depends}\t${Provides}\n"
    rows = subprocess.run(["dpkg-query", "-W", "-f", form], capture_output=True, text=True, check=True).stdout
    needs: dict[str, list[list[str]]] = {}
    provided: dict[str, str] = {}
    for row in rows.splitlines():
        name, status, depends, provides = row.split("\t")
        if status == "installed":
            needs[name] = [re.findall(r"(?:^|\|)\s*([a-z0-9.+-]+)", choice) for choice in depends.split(",")]
            provided |= dict.fromkeys(re.findall(r"[a-z][a-z0-9.+-]+", provides), name)
    missing = [name for name in names if name not in needs]
    if missing:
        raise _unavailable(f"these packages are not installed here: {', '.join(missing)}")
    found: dict[str, None] = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found and name not in LEFT_OUT:
            found[name] = None
            for choices in needs[name]:
                installed = [c if c in needs else provided[c] for c in choices if c in needs or c in provided]
                todo += installed[:1]
    return list(found)


def _with_bytecode(paths: list[str]) -> Iterator[str]:
    """Yield each path, and the bytecode beside a Python file: a read-only image could not keep it."""
    for path in paths:
        yield path
        if path.endswith(".py"):
            cache = Path(path).parent / "__pycache__"
            yield from (str(file) for file in cache.glob(f"{Path(path).stem}.*.pyc"))


def _add(archive: tarfile.TarFile, path: str, seen: set[str]) -> None:
    """Add what is installed at ``path``, owned by root, with no bit that gives another user's rights."""
    if not os.path.lexists(path) or _UNUSED.match(path):
        return
    # Where /bin is a link to /usr/bin, packages list the one and the file lies in the other.
    name = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)).lstrip("/")
    if not name or name in seen or f"/{name}" in ("/bin", "/sbin", "/lib", "/lib64"):
        return
    seen.add(name)
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        archive.addfile(_entry(name, tarfile.SYMTYPE, os.readlink(path)))
    elif stat.S_ISDIR(status.st_mode):
        archive.addfile(_entry(name, tarfile.DIRTYPE))
    elif stat.S_ISREG(status.st_mode):
        member = _entry(name, tarfile.REGTYPE)
        member.mode, member.size, member.mtime = (
            0o755 if status.st_mode & 0o111 else 0o644,
            status.st_size,
            int(status.st_mtime),
        )
        with open(path, "rb") as file:
            archive.addfile(member, file)


def _entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname = kind, 0o755, target
    return member


def _unavailable(problem: str) -> SandboxUnavailable:
    remedy = f"Build it from its Dockerfile instead: docker build -t {IMAGE} {Path(__file__).parent}."
    return SandboxUnavailable("docker", f"its image cannot be made from this machine's packages: {problem}", remedy)
