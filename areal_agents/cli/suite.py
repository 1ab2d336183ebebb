"""What ``eval`` does with a suite, and its ``--power``."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from areal_agents.cli.common import UsageError
from areal_agents.tracking.console import plain

if TYPE_CHECKING:
    from areal_agents.cli.eval import Eval
    from areal_agents.settings.config import TrainConfig

OUT = Path("runs/suites")
_OF_THE_SUITE = ("env.id", "env.difficulty", "env.kwargs", "eval.", "rollout.max_turn", "rollout.max_episode", "seed")
"""Settings, or how they begin, that a suite decides."""


def limits_of(given: Sequence[str]) -> dict[str, float]:
    """Read ``--fail-below``: the least pass@1 by entry, with an empty name for all. Raises UsageError."""
    found: dict[str, float] = {}
    for text in given:
        name, _, rate = text.rpartition("=")
        try:
            value = float(rate)
        except ValueError:
            value = math.nan
        if not 0.0 <= value <= 1.0 or (not name and "=" in text):
            raise UsageError(f"--fail-below {text}: write a rate from 0 to 1, or ENTRY=RATE")
        if name in found:
            raise UsageError(f"--fail-below {text}: {name or 'the rate of all'} is given twice")
        found[name] = value
    return found


def play(command: Eval, overrides: Sequence[str]) -> tuple[Any, int]:
    """Play the suite of ``command``; return the leaderboard as JSON, and the exit code.

    Raises UsageError for options that a suite does not take, and ArealError as ``play_suite``.
    """
    from areal_agents.evaluation.leaderboard_tables import as_text, save
    from areal_agents.evaluation.suite import MEAN, load_suite

    suite, limits = load_suite(command.env), limits_of(command.fail_below)
    for name in limits:
        if name not in ("", MEAN):
            suite.entry(name)
    models, base, out = _settings(command, overrides)
    server = _server(command, models)
    from areal_agents.evaluation.suite_run import SuiteInterrupted, play_suite

    stopped = None
    try:
        board = asyncio.run(play_suite(suite, models, base=base, out=out, server=server))
    except SuiteInterrupted as error:
        board, stopped = error.leaderboard, error
    folder = out / f"{suite.name}-v{suite.version}"
    save(board, folder)
    print(f"\n{as_text(board)}")
    print(f"files: {folder}")
    if stopped is not None:
        print(stopped, file=sys.stderr)
        return board.to_json(), 130
    below = board.below(limits)
    for line in below:
        print(f"error: {plain(line)}", file=sys.stderr)
    broken = [s for s in board.scores if s.error]
    for score in broken:
        print(f"error: {plain(f'{score.entry}, {score.model}: {score.error}')}", file=sys.stderr)
    return board.to_json(), 1 if below or broken else 0


def _settings(command: Eval, overrides: Sequence[str]) -> tuple[list[str], TrainConfig, Path]:
    """Return the models, the settings that a suite leaves open, and the folder."""
    from areal_agents.settings.evaluation import SHORT, load_evaluation
    from areal_agents.settings.loading import override_values

    if command.common:
        raise UsageError("--common belongs to --compare A B")
    models: list[str] = []
    rest: list[str] = []
    out = command.resume
    for key, raw, flag in override_values(overrides, short=SHORT):
        if key == "model.path":
            if not raw:
                raise UsageError(f"{flag} needs a model")
            models.append(raw)
        elif key == "out":
            if command.resume is not None:
                raise UsageError("--resume OUT names the folder: leave out --out")
            if not raw:
                raise UsageError("--out needs a folder")
            out = Path(raw)
        elif key.startswith(_OF_THE_SUITE):
            raise UsageError(f"{flag} is what a suite says of each entry: copy its file and change the copy")
        else:
            rest += [flag] if raw is None else [f"{flag}={raw}"]
    if not models:
        raise UsageError(f"--model is missing: name the models to evaluate on {command.env}, for example smollm2")
    if twice := next((m for m in models if models.count(m) > 1), None):
        raise UsageError(f"--model {twice} is given twice")
    remote = all(m.startswith("openai:") for m in models)
    base, unused = load_evaluation(command.config or None, rest, served=remote)
    if command.config:
        said = [f"{name}.{key}" for name in ("env", "eval", "rollout") for key in getattr(base, name).model_fields_set]
        unused += sorted(key for key in said if key.startswith(_OF_THE_SUITE))
    if unused and command.config:
        print(f"of {command.config}, a suite does not use {', '.join(unused)}", file=sys.stderr)
    return models, base, out or OUT


def _server(command: Eval, models: Sequence[str]) -> Any:
    from areal_agents.chat_model import REMOTE

    command.require_server_options()
    remote = [m for m in models if m.startswith(REMOTE)]
    if bool(remote) != bool(command.url):
        raise UsageError(f"--model {REMOTE}MODEL and --url URL belong together")
    if not command.url:
        return None
    from areal_agents.evaluation.players import Server

    return Server(**command.server())


def ask_power(command: Eval, overrides: Sequence[str]) -> tuple[Any, int]:
    """Say how many tasks show the difference of ``--power``; return that as JSON, and 0. Raises UsageError."""
    from areal_agents.evaluation.power import tasks_needed
    from areal_agents.settings.evaluation import SHORT
    from areal_agents.settings.loading import override_values

    k: int | None = None
    for key, raw, flag in override_values(overrides, short=SHORT):
        if key != "eval.k":
            raise UsageError(f"--power plays nothing: leave out {flag}")
        if raw is None or not raw.isdecimal() or not int(raw):
            raise UsageError(f"{flag} {raw}: it is a whole number from 1 on")
        k = int(raw)
    others = {"ENV_ID": command.env, "--config": command.config, "--resume": command.resume, "--url": command.url,
              "--fail-below": command.fail_below}  # fmt: skip
    if first := next((name for name, given in others.items() if given), None):
        raise UsageError(f"--power plays nothing: leave out {first}")
    if command.earlier and command.compare:
        raise UsageError("--earlier and --compare both say where the variance is from: give one of them")
    if command.pass_ is not None and (command.earlier or command.compare):
        raise UsageError("--pass is a guess, and an earlier evaluation says it: leave out --pass")
    assert command.power is not None
    if not 0.0 < command.power < 1.0:
        raise UsageError(f"--power {command.power:g}: a difference of pass@1 lies between 0 and 1, such as 0.03")
    if command.pass_ is not None and not 0.0 < command.pass_ < 1.0:
        raise UsageError(f"--pass {command.pass_:g}: it lies between 0 and 1")
    sources = command.compare or ((command.earlier,) if command.earlier else ())
    answer = tasks_needed(
        command.power, k=k, rate=0.5 if command.pass_ is None else command.pass_, earlier=sources,
        common=command.common,
    )  # fmt: skip
    print(plain(str(answer)))
    return answer.to_json(), 0
