"""The playing of a suite: each cell that is not finished, model after model, on one set of engines a model.

    suite ─▶ entries' tasks ─▶ held out? ─▶ for each model: engines ─▶ for each entry and seed: evaluate ─▶ leaderboard

Whatever ends it costs the episodes that were running. The same command goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from areal_agents.chat_model import remote_name
from areal_agents.errors import ArealError, ConfigError, Interrupted
from areal_agents.evaluation.evaluate import until_stopped
from areal_agents.evaluation.leaderboard import Leaderboard, leaderboard_of
from areal_agents.evaluation.overlap import find_overlap
from areal_agents.evaluation.players import KeptEngines, Server
from areal_agents.evaluation.suite import Suite
from areal_agents.evaluation.suite_cells import Cell, Chosen, cells_of, chosen_of, identity_of
from areal_agents.settings.config import TrainConfig

TRAIN = "train"
"""The split that trainings draw from, by its usual name."""


class SuiteInterrupted(Interrupted):
    """A signal stopped the suite.

    ``leaderboard`` is about what was finished until then.
    """

    def __init__(self, message: str, leaderboard: Leaderboard) -> None:
        super().__init__(message)
        self.leaderboard = leaderboard


async def play_suite(
    suite: Suite,
    models: Sequence[str],
    *,
    base: TrainConfig,
    out: Path,
    server: Server | None = None,
    say: Callable[[str], None] = print,
) -> Leaderboard:
    """Play what of a suite is not played yet, and compare the models.

    An entry that cannot be played for a model is noted, and the others go on.

    Args:
        suite: what to play.
        models: names or folders, or ``openai:MODEL``, which ``server`` serves. The others are compared with the first.
        base: settings of model, engine, sandbox and failures, which the suite leaves to who plays it.
        out: the folder of the cells and the leaderboards.
        server: where served models are.
        say: is told what is played.

    Returns:
        The leaderboard.

    Raises:
        ConfigError: an entry that does not fit, a model given twice, or a training task among the held-out ones.
        ModelError: a model that is not there.
        SuiteInterrupted: by a signal, with what was scored on the disk.
    """
    identities = [identity_of(model, server) for model in models]
    for i, who in enumerate(identities):
        if twin := next((w for w in identities[:i] if w.fingerprint == who.fingerprint), None):
            raise ConfigError(f"{twin.name} and {who.name} are one model: give it once")
    chosen = chosen_of(suite)
    await _require_held_out(suite, chosen, say)
    cells = {who.name: [c for one in chosen for c in cells_of(one, who, base=base, out=out)] for who in identities}
    running = _Running(say, server)
    try:
        for who in identities:
            async with KeptEngines() as kept:
                for cell in cells[who.name]:
                    await running.play(cell, kept)
    except Interrupted as error:
        board = leaderboard_of(suite, models, cells, running.failed)
        raise SuiteInterrupted(f"{str(error).split('. Go on with', 1)[0]}. The same command goes on", board) from error
    return leaderboard_of(suite, models, cells, running.failed)


async def _require_held_out(suite: Suite, chosen: Sequence[Chosen], say: Callable[[str], None]) -> None:
    """Raise ConfigError where the split ``train`` of an entry's environment has tasks that the entry plays."""
    problems = []
    for entry, spec, tasks in ((c.entry, c.spec, c.tasks) for c in chosen):
        if entry.split == TRAIN or TRAIN not in spec.splits:
            continue
        names = f"{spec.id}:{TRAIN}", f"{entry.name} ({spec.id}:{entry.split})"
        train = spec.tasks(TRAIN, difficulty=entry.difficulty)
        found = await asyncio.to_thread(find_overlap, train, tasks, names=names, seed=0)
        if found.pairs and entry.overlap == "refuse":
            problems.append(str(found))
        elif found.pairs or found.seen < found.of:
            say(str(found))
    if problems:
        listed = "\n".join(problems)
        raise ConfigError(
            f"suite {suite}: {listed}\nTake them out of one of the two, or let the entry say overlap = 'tell'"
        )


@dataclass
class _Running:
    """A suite while it is played."""

    say: Callable[[str], None]
    server: Server | None
    failed: dict[Path, str] = field(default_factory=dict)
    """By its folder, why a cell could not be played."""

    async def play(self, cell: Cell, kept: KeptEngines) -> None:
        """Play a cell, unless it is finished."""
        entry = cell.entry
        seed = f", seed {cell.seed}" if len(entry.seeds) > 1 else ""
        attempts = f" × {entry.k} attempts" if entry.k > 1 else ""
        label = f"{entry.name}{seed}, {cell.model}: {entry.n} tasks{attempts}"
        try:
            if cell.finished():
                self.say(f"{label}, played already")
                return
            self.say(label)
            server = self.server if remote_name(cell.model) is not None else None
            cell.out.parent.mkdir(parents=True, exist_ok=True)
            report = await until_stopped(cell.config, server, resume=True, kept=kept)
            self.say(report.line(entry.name))
        except Interrupted:
            raise
        except ArealError as error:
            self.failed[cell.out] = str(error)
            self.say(f"{entry.name}, {cell.model}: {error}")
            await kept.close()  # whatever is the matter with them, the next cell starts with engines of its own
