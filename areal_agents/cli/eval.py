"""The command ``eval``, a dataclass as in ``cli/commands.py``.

Its settings are those of ``settings/evaluation.py``.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from areal_agents.cli.common import UsageError, write_json
from areal_agents.tracking.console import plain

if TYPE_CHECKING:
    from areal_agents.settings.config import TrainConfig


@dataclass
class Eval:
    """Evaluate a model on an environment's held-out tasks: pass@1, pass@k, pass^k with 95 % intervals.

    ``areal-agents eval ENV_ID --model M --n 64 --engine.kind vllm``: the settings are those of ``train``, listed below.

    Or compare two finished evaluations: ``areal-agents eval --compare runs/demo:before runs/demo:after_rl``.
    """

    env: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID[:SPLIT]")] = ""
    """Environment id or module:Class; the split is ``test`` where none is given."""
    config: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """TOML file with settings, of a training too; what only a training uses is left out."""
    url: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """Of an OpenAI-compatible server that serves MODEL, up to /v1: ``--model openai:MODEL --url http://HOST:8000/v1``."""
    api_key_env: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """With --url: the environment variable that holds the server's key; without it no key is sent."""
    concurrency: int = 16
    """With --url: most requests at once."""
    requests_per_minute: float | None = None
    """With --url: most requests started in a minute, retries included."""
    compare: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="A B")] = None
    """Compare B with A, task by task: folders that ``eval`` wrote, or RUN:LABEL (runs/demo:after_rl). No ENV_ID."""
    common: bool = False
    """With --compare: leave out the tasks that are not in both, instead of refusing."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report as JSON here; ``-``: to standard output, and everything else to standard error."""

    def run(self, overrides: Sequence[str]) -> int:
        report = self._report(overrides)
        if self.json is not None:
            write_json(report, None if str(self.json) == "-" else self.json)
        return 0

    def _report(self, overrides: Sequence[str]) -> Any:
        if self.compare is None:
            return self._evaluate(overrides)
        given = [self.env and "ENV_ID", self.config and "--config", *overrides]
        if first := next(filter(None, given), None):
            raise UsageError(f"--compare reads two finished evaluations and plays nothing: leave out {first}")
        from areal_agents.evaluation.compare import compare

        comparison = compare(*self.compare, common=self.common)
        print(plain(comparison.table()))
        return comparison.to_json()

    def _evaluate(self, overrides: Sequence[str]) -> Any:
        from areal_agents import registry

        config = self.settings(overrides)
        registry.spec(config.env.id)  # a typo is answered before torch is imported
        from areal_agents.evaluation.evaluate import evaluate

        served: dict[str, Any] = {}
        if self.url:
            from areal_agents.evaluation.players import Server

            served["server"] = Server(self.url, self.api_key_env or None, self.concurrency, self.requests_per_minute)
        e = config.eval
        report = asyncio.run(
            evaluate(
                config.env, model=config.model, split=e.split, n=e.n, k=e.k, temperature=e.temperature,
                seed=config.seed, out=config.out, engine=config.engine, rollout=config.rollout, **served,
            )
        )  # fmt: skip
        print(report.table())
        if served:
            print(f"served: {plain(report.served)}")
        print(f"files: {config.out}")
        return report.to_json()

    def settings(self, overrides: Sequence[str]) -> TrainConfig:
        """Read the settings.

        Raises UsageError for options that are missing or contradict each other, and ConfigError for wrong settings.
        """
        from areal_agents.settings.evaluation import load_evaluation

        env_id, split = split_of(self.env)
        named = ["--env.id", env_id] if env_id else []
        named += ["--eval.split", split] if split else []
        config, unused = load_evaluation(self.config or None, [*named, *overrides], served=bool(self.url))
        if env_id and config.env.id != env_id:
            raise UsageError(f"ENV_ID is {env_id} and --env.id {config.env.id}: give one of them")
        if split and config.eval.split != split:
            raise UsageError(f"ENV_ID names the split {split} and --eval.split {config.eval.split}: give one of them")
        self._require_usage(config)
        if unused:
            print(f"of {self.config}, an evaluation does not use {', '.join(unused)}", file=sys.stderr)
        return config

    def _require_usage(self, config: TrainConfig) -> None:
        from areal_agents.chat_model import REMOTE

        model = config.model.path
        if "id" not in config.env.model_fields_set:
            raise UsageError(
                "name an environment (`areal-agents envs` lists them), or compare two evaluations: --compare A B"
            )
        if "path" not in config.model.model_fields_set:
            raise UsageError(f"--model is missing: name the model to evaluate on {config.env.id}, for example smollm2")
        if model.startswith(REMOTE) != bool(self.url):
            raise UsageError(
                f"--model {REMOTE}MODEL and --url URL belong together, for example "
                f"--model {REMOTE}{model.removeprefix(REMOTE)} --url http://127.0.0.1:8000/v1"
            )
        if self.api_key_env and not self.url:
            raise UsageError("--api-key-env belongs to --url")
        if self.common:
            raise UsageError("--common belongs to --compare A B")
        if self.concurrency < 1:
            raise UsageError(f"--concurrency is {self.concurrency}: it must be at least 1")


def split_of(env: str) -> tuple[str, str]:
    """Return the id and the split of ``ns/Name-v0[:split]`` or ``module:Class[:split]``.

    The split is empty where none is given.
    """
    match = re.fullmatch(r"(?P<id>[^:]*-v\d+|[^:]+:[^:]+)(:(?P<split>[^:]+))?", env)
    if match is None:
        return env, ""  # the registry says what is wrong with it
    return match["id"], match["split"] or ""
