"""The images of one engine: described, pulled, built from a folder, and kept by use.

An image is a name, or the path of a folder with a Dockerfile: ``./tasks/a``, ``/srv/tasks/a``. A folder's image is
named after what lies in it, so that it is built once.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import ConfigError, SandboxUnavailable
from areal_agents.sandboxes import docker_mounts, launch
from areal_agents.sandboxes.docker_engine import LABEL, OWNER, Engine, owner
from areal_agents.sandboxes.docker_image import IMAGE
from areal_agents.sandboxes.docker_kept import Kept
from areal_agents.sandboxes.docker_mounts import PYTHON_AT
from areal_agents.sandboxes.docker_progress import build, pull
from areal_agents.sandboxes.docker_seccomp import machine

BUILD: Final = "Make it: areal-agents sandbox build docker."
BUILT: Final = "areal-agents-built"
"""The repository of what is built from folders; the tag says what lies in the folder."""
AT_ONCE: Final = 4
"""Images pulled or built at one time."""
_TRIPLETS: Final = {
    "x86_64": ("x86_64-linux-gnu", "ld-linux-x86-64.so.2"),
    "aarch64": ("aarch64-linux-gnu", "ld-linux-aarch64.so.1"),
}
_PRELOAD: Final = "/etc/ld.so.preload"
"""A file of an image that the loader of pid 1 would obey."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a container needs to know of its image."""

    name: str
    ident: str
    """Its id. A name may be given to another image meanwhile, of which nothing here would hold."""
    start: tuple[str, ...]
    """The Python of pid 1."""
    binds: tuple[str, ...]
    variables: Mapping[str, str]
    """Of the image itself. Programs get them, and pid 1 does not."""
    removed: tuple[str, ...]
    """The names of those."""
    masked: tuple[str, ...]
    """Files that look empty inside; () leaves them to the engine."""
    volumes: tuple[str, ...]
    command: tuple[str, ...]
    folder: str
    user: str


def is_folder(name: str) -> bool:
    """Say whether an image is given as a folder: no name of an image begins as a path does."""
    return name.startswith(("/", "./", "../", "~/")) or name in (".", "..", "~")


class Images:
    """The images that the sessions of one backend use."""

    def __init__(self, engine: Engine, limit: int) -> None:
        """Use an engine, on which what was pulled and built here may take ``limit`` bytes."""
        self._engine = engine
        self._kept = Kept(engine, limit)
        self._known: dict[str, asyncio.Task[Image]] = {}
        self._accounts: dict[tuple[str, str], tuple[int, int]] = {}

    async def look(self, name: str) -> Image:
        """Describe an image, which is pulled or built where the engine has none of that name.

        Raises SandboxUnavailable and ConfigError.
        """
        task = self._known.get(name)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._known[name] = asyncio.ensure_future(self._describe(name))
        found = await asyncio.shield(task)
        await self._kept.used(found.name)
        return found

    def require_session(self, name: str) -> None:
        """Raise SandboxUnavailable for an image that was looked at, and whose volumes hide what a session needs."""
        task = self._known.get(name)
        if task is not None and task.done() and not task.cancelled() and task.exception() is None:
            docker_mounts.require_session(name, task.result().volumes)

    def forget(self, name: str) -> None:
        """Look at an image anew when it is asked for next: the engine has it no more."""
        self._known.pop(name, None)

    async def prepare(self, names: Iterable[str]) -> None:
        """Have images ready ahead of their first sessions, as far as there is room for them.

        Raises SandboxUnavailable with the images that cannot be had.
        """
        wanted = list(dict.fromkeys(names))
        failed: dict[str, SandboxUnavailable | ConfigError] = {}
        full: list[str] = []
        gate = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with gate:
                try:
                    if await self._later(name, wanted):
                        full.append(name)
                    else:
                        await self.look(name)
                except (SandboxUnavailable, ConfigError) as error:
                    failed[name] = error

        async with asyncio.TaskGroup() as group:
            for name in wanted:
                group.create_task(one(name))
        if len(failed) == 1:
            raise next(iter(failed.values()))
        if failed:
            first = [failed[name] for name in wanted if name in failed][:5]
            told = "; ".join(error.probe if isinstance(error, SandboxUnavailable) else str(error) for error in first)
            raise SandboxUnavailable(
                "docker", f"{len(failed)} of {len(wanted)} images cannot be had: {told}", "Pull or build them first."
            )
        if full:
            print(
                f"docker: {len(full)} of {len(wanted)} images are not pulled ahead: the others take all that "
                "docker?image_cache=… allows. Each is pulled at its first session.",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    async def account(self, image: Image, user: str) -> tuple[int, int]:
        """Return the numbers of a user, ``NAME``, ``NAME:GROUP`` or numbers, of an image. Raises SandboxUnavailable."""
        name, _, group = user.partition(":")
        if name.isdigit() and (group or "0").isdigit():
            return int(name), int(group or 0)
        key = (image.ident, user)
        if key not in self._accounts:
            rows = await self._engine.files(image.ident, ("/etc/passwd", "/etc/group"))
            users, groups = ([line.split(":") for line in text.splitlines() if line.count(":") >= 3] for text in rows)
            known = {row[0]: (int(row[2]), int(row[3])) for row in users if row[2].isdigit() and row[3].isdigit()}
            gids = {row[0]: int(row[2]) for row in groups if row[2].isdigit()}
            uid, gid = (int(name), 0) if name.isdigit() else known.get(name, (-1, -1))
            if group:
                gid = int(group) if group.isdigit() else gids.get(group, -1)
            if min(uid, gid) < 0:
                raise SandboxUnavailable(
                    "docker", f"image {image.name!r} has no user {user!r}", "Name one, or numbers."
                )
            self._accounts[key] = (uid, gid)
        return self._accounts[key]

    async def _later(self, name: str, wanted: Sequence[str]) -> bool:
        """Say whether an image is left to its first session, for want of room. Its registry must have it."""
        if name in self._known or is_folder(name) or not await self._kept.full(wanted):
            return False
        if await self._engine.image(name) is not None:
            return False
        await self._engine.require_in_registry(name)
        return True

    async def _get(self, name: str) -> tuple[str, dict[str, Any]]:
        """Return the engine's name of an image and what it says of it, and make or fetch it where it has none."""
        if not is_folder(name):
            if (found := await self._engine.image(name)) is not None:
                return name, found
            found = await pull(self._engine, name)
            await self._kept.took(name, found)
            return name, found
        folder, mark = await asyncio.to_thread(_read, name)
        tag = f"{BUILT}:{mark}"
        found = await self._engine.image(tag)
        if found is None:
            found = await build(self._engine, folder, tag)
            await self._kept.took(tag, found)
        return tag, found

    async def _describe(self, name: str) -> Image:
        own = await self._engine.image(IMAGE)
        if own is None:
            raise SandboxUnavailable("docker", f"the engine has no image {IMAGE!r}", BUILD)
        tag, found = (name, own) if name == IMAGE else await self._get(name)
        config = found.get("Config") or {}
        variables = dict(entry.partition("=")[::2] for entry in config.get("Env") or [])
        told = {
            "name": tag,
            "ident": found["Id"],
            "removed": tuple(variables),
            "volumes": docker_mounts.volumes(name, config.get("Volumes") or ()),
            "command": (*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())),
            "folder": config.get("WorkingDir") or "/",
            "user": config.get("User") or "",
        }
        if name == IMAGE:
            path = {"PATH": launch.ENVIRONMENT["PATH"]}
            return Image(**told, start=("/usr/bin/python3",), binds=(), variables=path, masked=())
        if (found["Os"], found["Architecture"]) != (own["Os"], own["Architecture"]):
            raise SandboxUnavailable(
                "docker", f"image {name!r} is for {found['Os']} on {found['Architecture']}", "Take another image."
            )
        triplet, loader = _TRIPLETS[machine(self._engine.info["Architecture"])]
        volume = f"areal-agents-python-{own['Id'].removeprefix('sha256:')[:16]}"
        masked = (*await self._fill(volume), _PRELOAD)
        libraries = f"{PYTHON_AT}/lib/{triplet}"
        start = (f"{libraries}/{loader}", "--library-path", libraries, f"{PYTHON_AT}/bin/python3")
        variables = {"PATH": "/usr/local/bin:/usr/bin:/bin"} | variables
        return Image(**told, start=start, binds=(f"{volume}:{PYTHON_AT}:ro",), variables=variables, masked=masked)

    async def _fill(self, volume: str) -> tuple[str, ...]:
        """Make the volume with pid 1's Python: an empty one gets what the image has where it is mounted.

        Returns the files that the engine masks by itself.
        """
        config = self._engine.host_config(binds=[f"{volume}:/usr"])
        made = await self._engine.call(
            "create_container", IMAGE, ["/bin/true"], host_config=config, labels={LABEL: "1", OWNER: owner()}
        )
        told = await self._engine.call("inspect_container", made["Id"])
        await self._engine.call("remove_container", made["Id"], force=True)
        return tuple(told["HostConfig"].get("MaskedPaths") or ())


def _read(name: str) -> tuple[Path, str]:
    """Return a folder, and a name for what lies in it without what its .dockerignore leaves out."""
    import docker

    folder = Path(name).expanduser().resolve()
    if not (folder / "Dockerfile").is_file():
        raise ConfigError(f"image {name!r}: {folder} has no Dockerfile. The name of an image begins with no dot or /.")
    ignored = folder / ".dockerignore"
    patterns = ignored.read_text().splitlines() if ignored.exists() else []
    patterns = [line.strip() for line in patterns if line.strip() and not line.startswith("#")]
    whole = hashlib.sha256()
    for name in sorted(docker.utils.exclude_paths(str(folder), patterns, dockerfile="Dockerfile")):
        path = folder / name
        status = path.lstat()
        data = b""
        if stat.S_ISLNK(status.st_mode):
            data = os.readlink(path).encode()
        elif stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                data = hashlib.file_digest(file, "sha256").digest()
        for part in (name.encode(), f"{status.st_mode:o}".encode(), data):
            whole.update(len(part).to_bytes(8, "big") + part)
    return folder, whole.hexdigest()[:16]
