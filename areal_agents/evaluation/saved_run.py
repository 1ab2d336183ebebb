"""A finished run as its files tell it, with its environment, seeds, model and episodes.

    RUN/config.toml      its settings
    RUN/report.json      of an evaluation alone (``areal-agents eval``), as evaluation.json
    RUN/trajectories/    its episodes

It serves what reads runs and never writes them: ``evaluation/rescore.py`` and ``evaluation/replay.py``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from areal_agents import models, registry, settings
from areal_agents.chat.options import ChatOptions
from areal_agents.engine import ChatModel
from areal_agents.env import AgentEnv
from areal_agents.errors import ArealError
from areal_agents.evaluation.attempts import attempt_seed
from areal_agents.registry import EnvSpec
from areal_agents.rollout.player import env_maker
from areal_agents.rollout.producer import group_seed
from areal_agents.rollout.shares import Shares
from areal_agents.served_model import models_of
from areal_agents.settings.config import AlgorithmConfig, MixedEnv
from areal_agents.tracking.exact_json import from_utf8
from areal_agents.tracking.one_episode import read_episode
from areal_agents.tracking.trajectories import Record, read_shard, shards, step_of

_TRAIN_GROUP = re.compile(r"g(\d+)")
_ATTEMPT = re.compile(r".*/(\d+)(?:~\d+)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SavedRun:
    """One run as its files describe it."""

    out: Path
    env_id: str
    seed: int
    model: str
    sandbox: str = "bubblewrap"
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    step_timeout: float = 60.0
    """Seconds for one reset or step."""
    max_turns: int | None = None
    """The runner's own limit on turns. None where only a report is left, which does not say it."""
    algorithm: AlgorithmConfig | None = None
    """None for an evaluation, which trains nothing."""
    chat: ChatOptions = field(default_factory=ChatOptions)
    """How the run's prompts were made."""
    mixture: tuple[MixedEnv, ...] = ()
    """Where the run had several environments: these. ``of_env`` and ``of`` choose one."""

    @classmethod
    def open(cls, out: Path) -> SavedRun:
        """Open the run in folder ``out``.

        Raises:
            ArealError: the folder holds no run.
            ConfigError: the run's settings are broken.
        """
        if (out / "config.toml").is_file():
            c = settings.load(out / "config.toml")
            evaluated = any((out / name).is_file() for name in ("report.json", "evaluation.json"))
            algorithm = None if evaluated else c.algorithm
            return cls(
                out, c.env.id, c.seed, c.model.path, c.env.sandbox, c.env.kwargs, c.env.step_timeout,
                c.rollout.max_turns, algorithm, c.model.chat, c.mixture,
            )  # fmt: skip
        try:
            row = json.loads((out / "report.json").read_text(encoding="utf-8"))
            return cls(out, str(row["env"]), int(row["seed"]), str(row["model"]))
        except FileNotFoundError as error:
            raise ArealError(
                f"{out} holds neither config.toml nor report.json: name the folder of a run, such as runs/demo"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArealError(f"{out / 'report.json'} is no evaluation's report: {error!r}") from error

    @property
    def spec(self) -> EnvSpec:
        """The run's environment. Raises RegistryError, and ArealError where it had several."""
        if self.mixture:
            labels = ", ".join(e.label for e in self.mixture)
            raise ArealError(f"{self.out} has several environments ({labels}), and this is asked of one alone")
        return registry.spec(self.env_id).with_kwargs(self.env_kwargs)

    def env_of(self, kind: str, group: str) -> str:
        """Return the label of the environment of a group of episodes. Empty where the run had one environment.

        Of an evaluation and a demonstration, ``group`` or ``kind`` has it. Of a training it follows from the group's
        number. Raises ArealError for a group that this package does not name.
        """
        if not self.mixture:
            return ""
        labels = [e.label for e in self.mixture]
        if kind in ("train", "greedy") and (found := _TRAIN_GROUP.fullmatch(group)):
            return labels[Shares([e.weight for e in self.mixture], seed=self.seed).at(int(found[1]))]
        said = (kind if "." in kind else group.partition("/")[0]).rpartition(".")[2]
        if said not in labels:
            raise ArealError(f"which environment of {self.out} the group {group!r} was of cannot be told from its id")
        return said

    def of(self, record: Record) -> SavedRun:
        """Return the run as if the environment of an episode were its only one."""
        label = self.env_of(record.kind, record.trajectory.group)
        return next((self.of_env(e) for e in self.mixture if e.label == label), self)

    def of_env(self, env: MixedEnv) -> SavedRun:
        """Return the run as if ``env`` were its only environment."""
        return replace(
            self, env_id=env.id, sandbox=env.sandbox, env_kwargs=env.kwargs, step_timeout=env.step_timeout, mixture=()
        )

    @property
    def env_models(self) -> dict[str, ChatModel]:
        """The models that the run's environments were made with, by name.

        Raises:
            RegistryError: there is no such environment.
            ConfigError: one of them is no model.
        """
        found: dict[str, ChatModel] = {}
        for one in map(self.of_env, self.mixture) if self.mixture else (self,):
            found |= models_of({**one.spec.kwargs, **one.env_kwargs})
        return found

    def make_env(self, *, sandbox: str | None = None) -> AgentEnv:
        """Make a new environment as the run made its own, with ``sandbox`` in place of the run's where it is given.

        Raises RegistryError.
        """
        spec, kwargs = self.spec, dict(self.env_kwargs)
        if sandbox and "sandbox" in kwargs:
            kwargs["sandbox"] = sandbox
        return env_maker(spec, sandbox=sandbox or self.sandbox, kwargs=kwargs)()

    def env_seed(self, record: Record) -> int:
        """Return the seed that the episode's environment was reset with.

        It follows from the run's seed and the ids. Raises ArealError for ids that this package does not give.
        """
        trajectory = record.trajectory
        if record.kind == "train" and (group := _TRAIN_GROUP.fullmatch(trajectory.group)):
            return group_seed(self.seed, int(group[1]))
        if record.kind != "train" and (attempt := _ATTEMPT.fullmatch(trajectory.id)):
            return attempt_seed(self.seed, int(attempt[1]))
        raise ArealError(
            f"the seed of episode {trajectory.id!r} (group {trajectory.group!r}) cannot be told from its ids: name it "
            "with --seed"
        )

    def shards(self, kind: str, *, first: int = 0, last: int | None = None) -> list[Path]:
        """Return the shards of ``kind`` of the steps ``first`` to ``last``, both included.

        Raises ArealError where there are none.
        """
        found = shards(self.out, kind)
        if not found:
            kinds = sorted({path.parent.name for path in shards(self.out)})
            there = f"there are {', '.join(kinds)}: name one with --kind" if kinds else "it has no episodes at all"
            raise ArealError(f"{self.out} has no episodes of kind {kind!r}; {there}")
        chosen = [path for path in found if first <= step_of(path) and (last is None or step_of(path) <= last)]
        if not chosen:
            raise ArealError(
                f"{self.out} has no {kind!r} episodes of the steps {first} to {'the last' if last is None else last}: "
                f"its steps are {step_of(found[0])} to {step_of(found[-1])}"
            )
        return chosen

    def records(self, kind: str) -> Iterator[Record]:
        """Yield every episode of ``kind``, reading one shard at a time.

        Raises ArealError.
        """
        for path in self.shards(kind):
            yield from read_shard(path)

    def episode(self, kind: str, id: str) -> Record:
        """Read the episode called ``id``.

        Raises ArealError, with near ids, where there is none.
        """
        seen: list[str] = []
        for path in self.shards(kind):
            if (found := read_episode(path, id)) is not None:
                return found
            seen += episode_ids(path)
        near = difflib.get_close_matches(id, seen, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--list lists them, --kind chooses another kind"
        raise ArealError(f"{self.out} has no {kind!r} episode {id!r} among {len(seen)}: {hint}")

    def model_folder(self) -> Path | None:
        """Return a local folder with the run's tokenizer, or None.

        Nothing is downloaded.
        """
        local = Path(self.model).expanduser()
        cached = models.cache_dir() / "models" / self.model
        known = [cached] if self.model in models.EMBEDDED else [local]
        return next((f for f in [*known, self.out / "model"] if (f / "tokenizer.json").is_file()), None)


def episode_ids(shard: Path) -> list[str]:
    """Return the ids of a shard's episodes, in order, without reading their tokens.

    Raises ArealError for a broken file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard) as file:
            return [from_utf8(id) for id in file.read(columns=["id"])["id"].to_pylist()]
    except (OSError, KeyError, pa.ArrowException):
        return [record.trajectory.id for record in read_shard(shard)]  # which says what is wrong with it


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay out ``rows`` as lines with aligned columns.

    The first row is the head.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "─" * max(map(len, lines)), *lines[1:]])
