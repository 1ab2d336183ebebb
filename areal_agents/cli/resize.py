"""The command ``resize``, a dataclass as in ``cli/commands.py``."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from areal_agents.cli.common import UsageError
from areal_agents.errors import ArealError

NAMES = {"replicas": "engines", "rollout_workers": "rollout workers", "concurrency": "episodes at once"}


@dataclass
class Resize:
    """Grow or shrink a run while it trains: ``areal-agents resize runs/mine --replicas 4 --concurrency 96``.

    Returns once it is done: new engines serve the current weights, removed ones have finished their turns. The run's
    config.toml has the new sizes; resume with that file to go on with them.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run that is training; it may be on another machine that shares it."""
    replicas: int | None = None
    """Engines from now on; on Ray only."""
    rollout_workers: int | None = None
    """Rollout workers from now on; on Ray only."""
    concurrency: int | None = None
    """Most episodes at once from now on. More engines help only with enough of them."""

    def run(self, overrides: Sequence[str]) -> int:
        asked = {name: value for name in NAMES if (value := getattr(self, name)) is not None}
        if not asked:
            raise UsageError("name at least one of --replicas, --rollout-workers and --concurrency")
        for name, value in asked.items():
            if value < 1:
                raise UsageError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        if not (self.folder / "config.toml").is_file():
            raise UsageError(f"{self.folder} holds no run: name the folder that `train` was given as --out")
        if _finished(self.folder):
            raise ArealError(
                f"the run in {self.folder} is finished: there is nothing to resize. More steps: areal-agents train "
                f"{self.folder / 'config.toml'} --resume --steps N"
            )
        from areal_agents.trainer.control import ask

        answer = asyncio.run(ask(self.folder, asked, message=lambda line: print(line, file=sys.stderr, flush=True)))
        for name, what in NAMES.items():
            print(f"{what}: {answer['before'][name]} before, {answer['after'][name]} now")
        return 0


def _finished(folder: Path) -> bool:
    """Say whether the run's commit says that nothing is left to do. One that cannot be read says nothing."""
    try:
        commit = json.loads((folder / "commit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(commit, dict) and commit.get("complete") is True
