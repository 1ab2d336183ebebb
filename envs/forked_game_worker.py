"""The process in which one episode of a game of another package is played (``forked_game.py``).

{"make": [entry point, arguments], seed} ─▶ {}      {"reset": seed}, {"step": text} ─▶ {observation, reward, …}
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import resource
from typing import Any

import numpy as np

from areal_agents.process_env import checked_return, make_plain
from areal_agents.rewards.mathematics.worker import serve
from areal_agents.utils.faults import from_outside
from areal_agents.utils.short_text import described

ENTRY = "AREAL_AGENTS_GAME"
"""The environment variable with the entry point, whose module is imported before the first episode."""
MAX_REPLY = 16 << 20
"""Bytes of a reply."""
_game: Any = None


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Reply to one request: with ``error`` where the game's code raised or broke its contract."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return _answered(request)
        except (Exception, SystemExit) as error:  # noqa: BLE001  the boundary: the episode ends with it
            return {"error": described(error), "outside": from_outside(error)}


def _answered(request: dict[str, Any]) -> dict[str, Any]:
    global _game
    if "make" in request:
        os.setpgid(0, 0)  # what it starts ends with it
        entry, kwargs = request["make"]
        _seed_all(request["seed"])
        _game = make_plain(entry, kwargs)
        return {}
    if "reset" in request:
        _seed_all(request["reset"])
        returned = _game.reset(seed=request["reset"])
        reply = checked_return("reset", returned)
    else:
        returned = _game.step(request["step"])
        reply = checked_return("step", returned)
    for key in ("player", "components"):  # of a game of several players, and of its end
        if key in returned[-1] and getattr(_game, "tells", False):
            reply[key] = returned[-1][key]
    size = len(json.dumps(reply))
    if size > MAX_REPLY:
        raise ValueError(f"its reply has {size / (1 << 20):.1f} MiB as JSON, more than {MAX_REPLY >> 20} MiB")
    return reply


def _seed_all(seed: int) -> None:
    """Seed the global generators, for games that draw from them, whether or not they seed them themselves."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))


def _prepare() -> None:
    module, colon, _ = os.environ.get(ENTRY, "").partition(":")
    if colon:
        with contextlib.suppress(Exception):  # it is imported again where the game is made, and its error told
            importlib.import_module(module)


if __name__ == "__main__":
    serve(_prepare, answer, resource.RLIM_INFINITY)
