"""The parsing, exit codes and errors of the command line.

The commands are in ``cli/commands.py``. They are parsed by tyro, and ``train``, ``demo`` and ``eval`` take the dotted
overrides of ``settings/loading.py`` besides, ``check`` those of ``env.kwargs``. The exit codes are:

    0      done
    1      an error or a failed check, with one message on standard error (--debug or AREAL_DEBUG=1: the traceback)
    2      wrong usage
    130    interrupted
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import tyro

from areal_agents.cli.commands import Command
from areal_agents.cli.common import UsageError, json_alone, require_writable
from areal_agents.errors import ArealError, Interrupted
from areal_agents.tracking.console import plain
from areal_agents.utils.files import is_full, unwritten

DESCRIPTION = """An agentic multi-turn RL gym and trainer for language models.

--version prints the version; --debug shows the traceback of an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code.

    Only tyro's own errors and ``--help`` raise SystemExit.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args or os.environ.get("AREAL_DEBUG", "") not in ("", "0")
    args = [a for a in args if a != "--debug"]
    if args[:1] == ["--version"]:
        print(f"areal-agents {_version()}")
        return 0
    usual = warnings.formatwarning
    warnings.formatwarning = _format_warning
    if os.getcwd() not in sys.path:  # "module:Class" of the folder one works in, as `python -m` finds it
        sys.path.append(os.getcwd())
    try:
        command, overrides = _parse(args)
        wanted = getattr(command, "json", False)
        if isinstance(wanted, Path) and str(wanted) != "-":
            require_writable(wanted)
        with json_alone() if wanted is True or str(wanted) == "-" else contextlib.nullcontext():
            code: int = command.run(overrides)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (`| head`) has gone; Python's flush at exit would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ArealError, ExceptionGroup) as error:
        deliberate = list(_leaves(error))
        if debug or not all(isinstance(e, ArealError) for e in deliberate):
            raise
        for message in dict.fromkeys(str(e) for e in deliberate):
            print(f"error: {plain(message)}", file=sys.stderr)  # it may quote what a model said
        return 1
    except OSError as error:
        said = _of_the_disk(error)
        if debug or said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = usual


def _of_the_disk(error: OSError) -> str | None:
    """Return the sentence for a full disk that nothing else has told of, or None for another error."""
    if is_full(error) and error.filename:
        return str(unwritten(Path(error.filename), error))
    if is_full(error):
        return f"{error.strerror}: free some space on the disks of --out and of the temporary files (TMPDIR)"
    if "No usable temporary directory" in str(error):
        return f"{error.strerror}: free some space there, or set TMPDIR to a folder with room"
    return None


def _parse(args: list[str]) -> tuple[Any, list[str]]:
    """Return the command, and the settings given on the command line of ``train``, ``demo``, ``eval`` or ``check``."""
    overrides: list[str] = []
    if args[:1] in (["train"], ["demo"], ["eval"]):
        from areal_agents.settings import evaluation
        from areal_agents.settings.describe import help_text
        from areal_agents.settings.loading import split_overrides

        evaluates = args[0] == "eval"
        own = ["--help", "--resume", *(["--show"] if args[0] == "train" else [])]
        options = [a for a in args if not evaluation.is_setting(a)] if evaluates else own
        args, overrides = split_overrides(args, keep=options)
        if "-h" in args or "--help" in args:
            try:
                _tyro([args[0], "--help"])
            except SystemExit:  # tyro ends the process after its help, and the settings' help belongs below it
                print(evaluation.help_text() if evaluates else help_text())
                raise
    elif args[:1] == ["check"]:
        from areal_agents.settings.loading import split_overrides

        args, overrides = split_overrides(args, keep=[a for a in args if not a.startswith("--env.")])
    return _tyro(args or ["--help"]), overrides


def _tyro(args: list[str]) -> Any:
    markers = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        return tyro.cli(Command, prog="areal-agents", description=DESCRIPTION, args=args, config=markers)
    except SystemExit as error:
        names = {get_args(kind)[0].__name__.lower() for kind in get_args(Command)}
        if error.code not in (0, None) and args[0] in names:
            print(f"what it takes: areal-agents {args[0]} --help", file=sys.stderr)  # tyro names the whole program's
        raise


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _version() -> str:
    try:
        return version("areal-agents")
    except PackageNotFoundError:
        return "(not installed)"


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {message}\n"
