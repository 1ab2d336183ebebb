"""The command ``show``, a dataclass as in ``cli/commands.py``: saved episodes, to read in a terminal."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from areal_agents.cli.common import UsageError, open_run, write_json

if TYPE_CHECKING:
    from areal_agents.evaluation.look import Place
    from areal_agents.evaluation.saved_run import SavedRun
    from areal_agents.evaluation.transcript import Line
    from areal_agents.tracking.trajectories import Record

_STYLES = {"title": "bold", "head": "bold cyan", "quiet": "dim", "good": "green", "bad": "red"}


@dataclass
class Show:
    """Read saved episodes: messages, calls, results, rewards, advantages and how they ended.

    ``areal-agents show runs/demo`` lists episodes; ``--episode g0/3``, ``--worst 3`` or ``--step 5`` shows them whole.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a training run or an evaluation; it may still go on."""
    episode: Annotated[str, tyro.conf.arg(metavar="ID")] = ""
    """Show this episode."""
    worst: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Show the N episodes with the lowest rewards; of equal ones, the latest."""
    step: Annotated[int | None, tyro.conf.arg(metavar="S")] = None
    """Show the episodes of this step; with --worst or --list, only this step's."""
    kind: str = ""
    """Which episodes: ``train``, ``demonstration``, ``eval-before``, …; ``eval`` in an evaluation's folder."""
    list: bool = False
    """List the episodes instead: a line each."""
    limit: int = 20
    """At most so many episodes; 0: all."""
    full: bool = False
    """Show long texts whole, instead of cutting their middle out."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the episodes as JSON here; ``-``: to standard output, and everything else to standard error."""

    def run(self, overrides: Sequence[str]) -> int:
        self._require_usage()
        from areal_agents.evaluation import look

        run = open_run(self.folder)
        kinds = [self.kind] if self.kind else look.kinds_of(run)
        if self.episode:
            return self._show(run, [look.find(run, self.episode, kinds)], 1)
        kind = kinds[0] if self.kind or self.step is None else self._kind_with_step(run, kinds)
        if self.worst is not None:
            places = look.worst(run, kind, self.step, self.worst)
            return self._list(run, kind, places) if self.list else self._show(run, map(look.read, places), len(places))
        places = look.listed(run, kind, self.step)
        if self.list or self.step is None:
            return self._list(run, kind, places)
        return self._show(run, map(look.read, self._limited(places)), len(places))

    def _require_usage(self) -> None:
        chosen = {"--worst": self.worst is not None, "--step": self.step is not None, "--list": self.list}
        if self.episode and (more := next((flag for flag, yes in chosen.items() if yes), None)):
            raise UsageError(f"--episode ID shows that one episode: leave out {more}")
        if self.worst is not None and self.worst < 1:
            raise UsageError(f"--worst is {self.worst}: it must be at least 1")
        if self.step is not None and self.step < 0:
            raise UsageError(f"--step is {self.step}: it must be at least 0")
        if self.limit < 0:
            raise UsageError(f"--limit is {self.limit}: it must be at least 0 (0 shows all)")

    def _kind_with_step(self, run: SavedRun, kinds: Sequence[str]) -> str:
        """Return the first kind that has episodes of the step; the first one of all, which says what it has, else."""
        from areal_agents.tracking.trajectories import shards, step_of

        return next((k for k in kinds if self.step in [step_of(path) for path in shards(run.out, k)]), kinds[0])

    def _limited(self, places: Sequence[Place]) -> Sequence[Place]:
        return places[: self.limit] if self.limit else places

    def _list(self, run: SavedRun, kind: str, places: Sequence[Place]) -> int:
        from areal_agents.evaluation.look import kinds_of, steps_text
        from areal_agents.evaluation.saved_run import columns
        from areal_agents.evaluation.transcript import line

        shown = [summary for _, summary in self._limited(places)]
        print(f"{run.out}: {kind}, {steps_text(run, kind)}")
        rows = [["episode", "step", "task", "reward", "turns", "valid calls", "tokens", "ended"]]
        for s in shown:
            calls = f"{s.n_valid_tool_calls} of {s.n_tool_calls}"
            cells = (s.id, s.step, s.task_id, f"{s.reward:.4g}", s.n_turns, calls, s.sampled_tokens, s.stop_reason)
            rows.append([line(str(cell), chars=80) for cell in cells])
        print(columns(rows))
        if len(shown) < len(places):
            print(f"{len(shown)} of {len(places)} episodes; --limit 0 lists all")
        if others := [k for k in kinds_of(run) if k != kind]:
            print(f"other kinds (--kind): {', '.join(others)}")
        if shown:
            command = f"areal-agents show {shlex.quote(str(run.out))}"
            print(f"read one:   {command} --episode {line(shlex.quote(shown[0].id))}")
            print(f"the worst:  {command}{'' if kind == kinds_of(run)[0] else f' --kind {kind}'} --worst 3")
        if self.json is not None:
            import dataclasses

            rows_json = [dataclasses.asdict(s) | {"kind": kind} for s in shown]
            write_json({"run": str(run.out), "episodes": rows_json}, None if str(self.json) == "-" else self.json)
        return 0

    def _show(self, run: SavedRun, records: Iterable[Record], total: int) -> int:
        from areal_agents.evaluation.look import advantages_of
        from areal_agents.evaluation.transcript import TEXT_CHARS, transcript, transcript_json

        printed: list[dict[str, Any]] = []
        shown = 0
        for n, record in enumerate(records):
            advantages, note = advantages_of(run, record)
            if n:
                print("\n" + "─" * 40 + "\n")
            print_lines(transcript(record, advantages, note=note, chars=None if self.full else TEXT_CHARS))
            printed += [transcript_json(record, advantages)] if self.json is not None else []
            sys.stdout.flush()
            shown = n + 1
        if not shown:
            print(f"{run.out}: the shard of that step holds no episode")
        elif shown < total:
            print(f"\n{shown} of {total} episodes; --limit 0 shows all, --list lists them")
        if self.json is not None:
            write_json({"run": str(run.out), "episodes": printed}, None if str(self.json) == "-" else self.json)
        return 0


def print_lines(lines: Iterable[Line]) -> None:
    """Print lines; in colours, and wrapped below their indentation, on a terminal alone (NO_COLOR: no colours)."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, color_system=None if os.environ.get("NO_COLOR") else "auto")
    for style, text in lines:
        rows = [text]
        if console.is_terminal and len(text) >= console.width // 2:
            indent = min(len(text) - len(text.lstrip(" ")), console.width // 2)
            wrapped = Text(text[indent:]).wrap(console, console.width - indent, overflow="fold")
            rows = [" " * indent + row.plain for row in wrapped]
        for row in rows:
            console.print(Text(row, _STYLES.get(style, "")), soft_wrap=True)
