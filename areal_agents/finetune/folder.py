"""The folder of a fine-tuning, and what a training that goes on must find unchanged.

OUT/finetune.json       its settings, what was taken of its data, and the data's fingerprint
OUT/reference.npz       DPO: log π of every sequence under the starting model
OUT/commit.json         as in a training, with OUT/checkpoints/, OUT/metrics.jsonl, OUT/events.jsonl
OUT/model/              the trained model
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from areal_agents.errors import CheckpointError, ConfigError
from areal_agents.finetune.config import MAY_CHANGE, DpoConfig, Finetune, SftConfig
from areal_agents.finetune.data import Data
from areal_agents.finetune.examples import ItemT
from areal_agents.trainer.resume import refuse_evaluation, refuse_taken
from areal_agents.trainer.run_folder import Commit, RunFolder
from areal_agents.utils.files import atomic_file, save_whole, unwritable

SETTINGS = "finetune.json"
REFERENCE = "reference.npz"
_VERSION = 1


def read_settings(out: Path) -> SftConfig | DpoConfig:
    """Read the settings of the fine-tuning in ``out``.

    Raises ConfigError where there is none.
    """
    row = _read(out)
    if row is None:
        raise ConfigError(f"{out} holds no fine-tuning to go on with: name its folder as --out, or leave --resume out")
    try:
        found: SftConfig | DpoConfig = TypeAdapter(Finetune).validate_python(row["settings"])
    except (ValidationError, KeyError, TypeError) as error:
        raise ConfigError(f"{out / SETTINGS} cannot be read ({error}): put a copy back, or start anew") from error
    return found.model_copy(update={"out": out})


def begin(folder: RunFolder, config: SftConfig | DpoConfig, *, resume: bool) -> Commit | None:
    """Find where the training starts.

    Returns:
        The commit to go on from. None for a new one.

    Raises:
        ConfigError: the folder holds something else, or what it holds was begun with other settings.
    """
    out, row = folder.out, _read(folder.out) if resume else None
    refuse_evaluation(out)
    if row is None:
        refuse_taken(folder)
        return None
    old = _plain_settings(row, out)
    new = config.model_dump(mode="json")
    changed = [key for key in old | new if old.get(key) != new.get(key) and key not in MAY_CHANGE]
    if changed:
        lines = "\n".join(f"  {flag(key)} was {old.get(key)!r} and is {new.get(key)!r} now" for key in changed)
        raise ConfigError(
            f"{out} was begun with other settings:\n{lines}\ngo on with the same ones ({how_to_go_on(config)}), or "
            "choose another --out"
        )
    commit = folder.read_commit() or Commit()
    folder.clean(commit)
    return commit


def require_same_data(out: Path, config: SftConfig | DpoConfig, data: Data[ItemT]) -> None:
    """Raise ConfigError where a training that goes on would go on with other data than before."""
    row = _read(out)
    if row is None or row.get("fingerprint") != data.fingerprint:
        raise ConfigError(
            f"the data of {out} is no longer what it was begun with ({', '.join(config.data)}): put it back, or choose "
            "another --out. Of a run that still goes on, choose --steps"
        )


def write_settings(out: Path, config: SftConfig | DpoConfig, data: Data[ItemT]) -> None:
    """Write what the training is. Raises ArealError where the disk refuses."""
    row = {
        "version": _VERSION,
        "settings": config.model_dump(mode="json"),
        "fingerprint": data.fingerprint,
        "train": len(data.train),
        "holdout": len(data.holdout),
        "sources": [tally.to_json() for tally in data.tallies],
    }
    save_whole(out / SETTINGS, json.dumps(row, indent=2) + "\n")


def how_to_go_on(config: SftConfig | DpoConfig) -> str:
    """Return the command that goes on with a training."""
    return f"areal-agents {config.method} --out {shlex.quote(str(config.out))} --resume"


def flag(key: str) -> str:
    """Return the command line's name of a setting."""
    return "--" + key.replace("_", "-")


def save_reference(out: Path, sums_E: NDArray[np.float64], fingerprint: str) -> None:
    """Write the reference's log-probabilities. Raises ArealError where the disk refuses."""
    path = out / REFERENCE
    try:
        with atomic_file(path) as file:
            np.savez(file, sums=sums_E, fingerprint=np.asarray(fingerprint))
    except OSError as error:
        raise unwritable(path, error) from error


def read_reference(out: Path, size: int, fingerprint: str) -> NDArray[np.float64] | None:
    """Read the reference's log-probabilities, or None where they were not written yet.

    Raises CheckpointError for a file that is broken, or of other data.
    """
    path = out / REFERENCE
    if not path.exists():
        return None
    try:
        # Opened here: given the path, numpy leaves a broken file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            sums_E, of = np.asarray(file["sums"], np.float64), str(file["fingerprint"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): remove it and begin anew in another folder") from error
    if sums_E.shape != (size,) or of != fingerprint:
        raise CheckpointError(f"{path} is of other data: begin anew in another folder")
    return sums_E


def _read(out: Path) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out / SETTINGS} cannot be read ({error}): put a copy back, or start anew") from error
    if not isinstance(row, dict) or row.get("version") != _VERSION:
        raise ConfigError(f"{out / SETTINGS} is of another version of this package: start anew in another folder")
    return row


def _plain_settings(row: dict[str, Any], out: Path) -> dict[str, Any]:
    settings = row.get("settings")
    if not isinstance(settings, dict):
        raise ConfigError(f"{out / SETTINGS} has no settings: put a copy back, or start anew")
    return settings
