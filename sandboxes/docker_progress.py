"""Images pulled and built by an engine, with progress on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import SandboxError, SandboxUnavailable
from areal_agents.sandboxes.docker_engine import LABEL, Engine

EVERY: Final = 2.0
"""Seconds between two lines."""
_SAID: Final = 12
"""Lines of a build's output that its error shows."""


async def pull(engine: Engine, name: str) -> dict[str, Any]:
    """Pull an image. Raises SandboxUnavailable."""
    import docker

    layers: dict[str, tuple[int, int]] = {}
    tell = _teller(f"docker: pulling {name}")

    def row(row: dict[str, Any]) -> None:
        detail = row.get("progressDetail") or {}
        if row.get("id") and detail.get("total"):
            layers[row["id"]] = (int(detail.get("current", 0)), int(detail["total"]))
        if layers:
            done, whole = (sum(sizes) >> 20 for sizes in zip(*layers.values(), strict=True))
            tell(f"{done} of {whole} MB")

    repository, tag = docker.utils.parse_repository_tag(name)
    try:
        await engine.follow("pull", row, repository, tag=tag or "latest")
    except SandboxError as error:
        remedy = f"Pull, build or load it first: docker pull {name}."
        raise SandboxUnavailable("docker", f"image {name!r} cannot be had: {error}", remedy) from error
    return await _made(engine, name)


async def build(engine: Engine, folder: Path, tag: str) -> dict[str, Any]:
    """Build the image of a folder's Dockerfile. Raises SandboxUnavailable with the end of what the build said."""
    said: list[str] = []
    tell = _teller(f"docker: building {folder}")

    def row(row: dict[str, Any]) -> None:
        for line in str(row.get("stream", "")).splitlines():
            if line.strip():
                said.append(line)
                del said[:-_SAID]
                tell(line[:200], at_once=line.startswith("Step "))

    try:
        await engine.follow("build", row, path=str(folder), tag=tag, rm=True, forcerm=True, labels={LABEL: "1"})
    except SandboxError as error:
        told = "\n".join([str(error), *said])
        problem = f"the image of {folder} cannot be built: {told}"
        raise SandboxUnavailable("docker", problem, f"Mend its Dockerfile; try: docker build {folder}.") from error
    return await _made(engine, tag)


async def _made(engine: Engine, name: str) -> dict[str, Any]:
    found = await engine.image(name)
    if found is None:
        raise SandboxUnavailable("docker", f"image {name!r} is not there after it was made", "See the engine's log.")
    return found


def _teller(what: str) -> Callable[..., None]:
    """Return a function that prints a line at once the first time, and then every few seconds."""
    shown = -EVERY

    def tell(line: str, *, at_once: bool = False) -> None:
        nonlocal shown
        now = time.monotonic()
        if at_once or now >= shown + EVERY:
            shown = now
            print(f"{what}: {line}", file=sys.stderr, flush=True)

    return tell
