"""The images that were pulled or built here, by when they were used last: those beyond a limit are removed.

Which they are is written to a file of this machine, one for each engine, so that an image of the user's own is never
taken for one of them: what the engine had before it was asked for here is not in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from areal_agents.errors import SandboxError
from areal_agents.sandboxes.docker_engine import Engine

FRESH: Final = 60.0
"""Seconds for which a use is not written again."""
Row = dict[str, Any]


def folder() -> Path:
    """Return where this user's records lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "areal-agents" / "docker-images"


class Kept:
    """What was pulled or built here on one engine."""

    def __init__(self, engine: Engine, limit: int) -> None:
        """Keep at most ``limit`` bytes, counted as if images shared nothing."""
        self._engine, self._limit = engine, limit
        self._written: dict[str, float] = {}
        self._told = False

    @property
    def _path(self) -> Path:
        return folder() / f"{hashlib.sha256(str(self._engine.info['ID']).encode()).hexdigest()[:16]}.json"

    async def took(self, name: str, found: dict[str, Any]) -> None:
        """Note an image that was just pulled or built, and remove those beyond the limit that were used longest ago."""
        with self._spoken(f"{name} stays until you remove it"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._rows() as rows:
                rows[name] = {"id": found["Id"], "size": int(found.get("Size", 0)), "used": time.time()}
            self._written[name] = time.monotonic()
            await self._trim(name)

    async def used(self, name: str) -> None:
        """Note that an image is used now, where it is one of these."""
        if time.monotonic() < self._written.get(name, -FRESH) + FRESH:
            return
        self._written[name] = time.monotonic()
        with self._spoken(f"it is not noted that {name} was used"):
            if self._path.exists():
                with self._rows() as rows:
                    if name in rows:
                        rows[name]["used"] = time.time()

    async def full(self, wanted: Collection[str]) -> bool:
        """Say whether the ``wanted`` ones among these take all that is allowed."""
        with self._spoken("it is not known how much the images here take"):
            if self._path.exists():
                with self._rows() as rows:
                    return bool(sum(row["size"] for name, row in rows.items() if name in wanted) >= self._limit)
        return False

    @contextlib.contextmanager
    def _spoken(self, what: str) -> Iterator[None]:
        """Say once that the record cannot be kept, because a disk is full, say: no session fails for that."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # unreadable, or not as we wrote it
            if not self._told:
                self._told = True
                print(f"docker: {what}: no record can be kept in {self._path}: {error!r}", file=sys.stderr, flush=True)

    async def _trim(self, newest: str) -> None:
        with self._rows() as rows:
            by_use = sorted(rows, key=lambda name: rows[name]["used"])
            whole, doomed = sum(row["size"] for row in rows.values()), []
            for name in by_use:
                if whole > self._limit and name != newest:
                    whole -= rows[name]["size"]
                    doomed.append((name, rows[name]["id"]))
        for name, ident in doomed:
            if await self._remove(name, ident):
                with self._rows() as rows:
                    rows.pop(name, None)

    async def _remove(self, name: str, ident: str) -> bool:
        """Remove an image. Returns False where the engine keeps it, because a container is made of it."""
        found = await self._engine.image(name)
        if found is not None and found["Id"] == ident:
            try:
                await self._engine.call("remove_image", name)
            except SandboxError:
                return False
            print(f"docker: removed {name}, which was used longest ago", file=sys.stderr, flush=True)
        return True  # gone, or another image of that name by now, which is the user's

    @contextlib.contextmanager
    def _rows(self) -> Iterator[dict[str, Row]]:
        """Hold the file, and write it where a row has changed."""
        path = self._path
        with path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = path.read_text() if path.exists() else "{}"
            rows: dict[str, Row] = json.loads(text)
            yield rows
            if (new := json.dumps(rows, sort_keys=True)) != text:
                path.with_suffix(".new").write_text(new)
                path.with_suffix(".new").replace(path)
