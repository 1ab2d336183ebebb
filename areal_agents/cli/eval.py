"""The command ``eval``, a dataclass as in ``cli/commands.py``.

Its settings are those of ``settings/evaluation.py``.
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from areal_agents.cli.common import UsageError, write_json
from areal_agents.cli.suite import ask_power, limits_of, play
from areal_agents.tracking.console import plain

if TYPE_CHECKING:
    from areal_agents.settings.config import TrainConfig


@dataclass
class Eval:
    """Evaluate a model on an environment's held-out tasks: pass@1, pass@k, pass^k with 95 % intervals.

    ``areal-agents eval ENV_ID --model M --n 64 --engine.kind vllm``: the settings are those of ``train``, listed below.

    Or compare two finished evaluations: ``areal-agents eval --compare runs/demo:before runs/demo:after_rl``.

    Or play a suite, a list of evaluations, and compare models: ``areal-agents eval quick --model M --model M2``.

    Or ask how many tasks show a difference: ``areal-agents eval --power 0.03``.
    """

    env: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID[:SPLIT]|SUITE")] = ""
    """Environment id or module:Class, with the split ``test`` where none is given; or a suite, a name or .toml file."""
    config: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """TOML file with settings, of a training too; what only a training uses is left out."""
    url: Annotated[str, tyro.conf.arg(metavar="URL")] = ""
    """Of an OpenAI-compatible server that serves MODEL, up to /v1: ``--model openai:MODEL --url http://HOST:8000/v1``."""
    api_key_env: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """With --url: the environment variable that holds the server's key; without it no key is sent."""
    concurrency: int | None = None
    """With --url: most requests at once; 16 where none is given."""
    requests_per_minute: float | None = None
    """With --url: most requests started in a minute, retries included."""
    send_reasoning: bool = False
    """With --url: send the thinking that the server returned with a turn (reasoning_content) back with it."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """Go on with the evaluation in folder OUT, which was interrupted or killed; start it there where there is none."""
    compare: Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="A B")] = None
    """Compare B with A, task by task: folders that ``eval`` wrote, or RUN:LABEL (runs/demo:after_rl). No ENV_ID."""
    fail_below: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[ENTRY=]RATE …")] = ()
    """Exit with 1 where pass@1 is below RATE: of the entry of a suite, of ``mean``, or of everything."""
    power: Annotated[float | None, tyro.conf.arg(metavar="DIFFERENCE")] = None
    """Say how many tasks show a DIFFERENCE of pass@1 between two models, with --k attempts each. Plays nothing."""
    pass_: Annotated[float | None, tyro.conf.arg(name="pass", metavar="RATE")] = None
    """With --power: the pass@1 to expect; 0.5, which needs most tasks, where none is given."""
    earlier: Annotated[str, tyro.conf.arg(metavar="A")] = ""
    """With --power: take the variance from evaluation A. --compare A B takes it from the differences of two."""
    common: bool = False
    """With --compare: leave out the tasks that are not in both, instead of refusing."""
    save_pass_rates: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write how often each task was passed here, for ``curriculum.pass_rates`` of a training (docs/curriculum.md)."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report as JSON here; ``-``: to standard output, and everything else to standard error."""

    def run(self, overrides: Sequence[str]) -> int:
        report, code = self._report(overrides)
        if self.json is not None:
            write_json(report, None if str(self.json) == "-" else self.json)
        return code

    def _report(self, overrides: Sequence[str]) -> tuple[Any, int]:
        """Return the report as JSON, and the exit code."""
        from areal_agents.evaluation.suite import is_suite

        if self.save_pass_rates is not None and (self.power is not None or self.compare or is_suite(self.env)):
            raise UsageError("--save-pass-rates FILE is of one evaluation: areal-agents eval ENV_ID --model MODEL")
        if self.power is not None:
            return ask_power(self, overrides)
        if self.pass_ is not None or self.earlier:
            raise UsageError("--pass and --earlier belong to --power DIFFERENCE")
        if is_suite(self.env) and self.compare is None:
            return play(self, overrides)
        if self.compare is None:
            return self._evaluate(overrides)
        given = [self.env and "ENV_ID", self.config and "--config", self.resume and "--resume", *overrides]
        given += ["--fail-below"] if self.fail_below else []
        if first := next(filter(None, given), None):
            raise UsageError(f"--compare reads two finished evaluations and plays nothing: leave out {first}")
        from areal_agents.evaluation.compare import compare

        comparison = compare(*self.compare, common=self.common)
        print(plain(comparison.table()))
        return comparison.to_json(), 0

    def _evaluate(self, overrides: Sequence[str]) -> tuple[Any, int]:
        from areal_agents import registry
        from areal_agents.errors import ArealError

        limits = limits_of(self.fail_below)
        if named := next(filter(None, limits), None):
            raise UsageError(f"--fail-below {named}={limits[named]:g}: only a suite has entries; write a rate alone")
        config = self.settings(overrides)
        if (rates := self.save_pass_rates) is not None and not rates.absolute().parent.is_dir():
            raise UsageError(f"--save-pass-rates {rates}: there is no folder {rates.parent}")
        registry.spec(config.env.id)  # a typo is answered before torch is imported
        from areal_agents.evaluation.evaluate import evaluate
        from areal_agents.evaluation.unfinished import EvaluationInterrupted

        more: dict[str, Any] = {"resume": True} if self.resume else {}
        if self.server():
            from areal_agents.evaluation.players import Server

            more["server"] = Server(**self.server())
        e, stopped = config.eval, None
        try:
            report = asyncio.run(
                evaluate(
                    config.env, model=config.model, split=e.split, n=e.n, task_seed=e.task_seed, k=e.k,
                    temperature=e.temperature, seed=config.seed, out=config.out, engine=config.engine,
                    rollout=config.rollout, **more,
                )
            )  # fmt: skip
        except EvaluationInterrupted as error:
            report, stopped = error.report, error
        except ArealError as error:
            for note in getattr(error, "__notes__", ()):
                print(note, file=sys.stderr)
            raise
        print(report.table())
        if "server" in more:
            print(f"served: {plain(report.served)}")
        if report.infra_rate and stopped is None:
            total = round(report.attempts / (1.0 - report.infra_rate))
            print(
                f"note: infrastructure failed {total - report.attempts} of {total} attempts: "
                f"`eval --resume {config.out}` plays them again"
            )
        print(f"files: {config.out}")
        if stopped is not None:
            print(stopped, file=sys.stderr)
            if self.save_pass_rates is not None:
                print(f"{self.save_pass_rates} is written once all attempts are scored", file=sys.stderr)
            return report.to_json(), 130
        if self.save_pass_rates is not None:
            from areal_agents.evaluation.pass_rates import save_pass_rates

            spec = registry.spec(config.env.id).with_kwargs(config.env.kwargs)
            print(save_pass_rates(self.save_pass_rates, config, spec))
        if limits and (below := report.below(limits[""])):
            print(f"error: {below}", file=sys.stderr)
            return report.to_json(), 1
        return report.to_json(), 0

    def server(self) -> dict[str, Any]:
        """Return the fields of ``Server``, which are those of the evaluation to go on with where none are given.

        Empty for a model that no server serves.
        """
        given = {
            "url": self.url,
            "api_key_env": self.api_key_env,
            "concurrency": self.concurrency,
            "requests_per_minute": self.requests_per_minute,
            "send_reasoning": self.send_reasoning,
        }
        earlier: dict[str, Any] = {}
        if self.resume is not None:
            from areal_agents.settings.evaluation import server_of

            earlier = server_of(self.resume)
        found = earlier | {name: value for name, value in given.items() if value}
        return found if "url" in found else {}

    def settings(self, overrides: Sequence[str]) -> TrainConfig:
        """Read the settings.

        Raises UsageError for options that are missing or contradict each other, and ConfigError for wrong settings.
        """
        from areal_agents.settings.evaluation import load_evaluation

        env_id, split = split_of(self.env)
        named = ["--env.id", env_id] if env_id else []
        named += ["--eval.split", split] if split else []
        base = self.config or None
        if self.resume is not None:
            if any(o.partition("=")[0] == "--out" for o in overrides):
                raise UsageError("--resume OUT names the folder: leave out --out")
            named += ["--out", str(self.resume)]
            if (self.resume / "config.toml").is_file():
                base = base or str(self.resume / "config.toml")
            elif (self.resume / "cells").is_dir():
                raise UsageError(f"{self.resume} holds suites: the command that began one goes on with it")
            elif not (env_id or base or any(o.partition("=")[0] == "--env.id" for o in overrides)):
                raise UsageError(f"{self.resume} holds no evaluation to go on with: name another folder, or ENV_ID")
        config, unused = load_evaluation(base, [*named, *overrides], served=bool(self.server()))
        if env_id and config.env.id != env_id:
            raise UsageError(f"ENV_ID is {env_id} and --env.id {config.env.id}: give one of them")
        if split and config.eval.split != split:
            raise UsageError(f"ENV_ID names the split {split} and --eval.split {config.eval.split}: give one of them")
        self._require_usage(config)
        if unused and self.config:
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
        if model.startswith(REMOTE) != bool(self.server()):
            raise UsageError(
                f"--model {REMOTE}MODEL and --url URL belong together, for example "
                f"--model {REMOTE}{model.removeprefix(REMOTE)} --url http://127.0.0.1:8000/v1"
            )
        if self.common:
            raise UsageError("--common belongs to --compare A B")
        self.require_server_options()

    def require_server_options(self) -> None:
        """Raise UsageError for options of a server that there is not, or that are out of range."""
        if self.api_key_env and not self.server():
            raise UsageError("--api-key-env belongs to --url")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"--concurrency is {self.concurrency}: it must be at least 1")
        if self.requests_per_minute is not None and not 0 < self.requests_per_minute < math.inf:
            raise UsageError(f"--requests-per-minute is {self.requests_per_minute:g}: it must be more than 0")


def split_of(env: str) -> tuple[str, str]:
    """Return the id and the split of ``ns/Name-v0[:split]`` or ``module:Class[:split]``.

    The split is empty where none is given.
    """
    match = re.fullmatch(r"(?P<id>[^:]*-v\d+|[^:]+:[^:]+)(:(?P<split>[^:]+))?", env)
    if match is None:
        return env, ""  # the registry says what is wrong with it
    return match["id"], match["split"] or ""
