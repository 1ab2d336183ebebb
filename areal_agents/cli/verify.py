"""The command ``verify``, a dataclass as in ``cli/commands.py``."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import tyro

from areal_agents.cli.common import UsageError
from areal_agents.errors import ArealError, Interrupted
from areal_agents.utils.files import unwritten

_AHEAD = 64
"""Rows for each worker that are read before the first of them is verified."""


@dataclass
class Verify:
    """Compare answers with gold ones: ``areal-agents verify math --jsonl answers.jsonl --out verdicts.jsonl``.

    A row is {"gold": TEXT or [TEXT, …], "pred": TEXT, "slot": "answer", "options": {…}}. Rows come out in the same
    order, each with score (0 or 1), status, detail and elapsed_ms. A row that is broken gets a verdict of its own.
    What is interrupted is kept in OUT.partial, and --resume goes on with it.
    """

    what: Annotated[Literal["math"], tyro.conf.Positional]
    """What the answers are."""
    jsonl: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The rows."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Where the rows with their verdicts go. An existing file is not overwritten."""
    workers: int = 0
    """Processes. 0: one for each core."""
    deadline: float = 5.0
    """Seconds for one row."""
    resume: bool = False
    """Keep the verdicts of an interrupted call with the same files; begin where there are none."""

    def run(self, overrides: Sequence[str]) -> int:
        if self.workers < 0:
            raise UsageError(f"--workers is {self.workers}: it must be at least 1, or 0 for one for each core")
        if self.out.exists():
            raise UsageError(f"{self.out} exists: name another file, or remove it")
        if not self.resume and self._partial.exists():
            raise UsageError(f"{self._partial} is of an interrupted call: go on with --resume, or remove it")
        with self._written() as out:
            try:
                counts = asyncio.run(self._verify(out))
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted: {self._partial} keeps what is verified; go on with --resume") from None
            out.flush()
            os.fsync(out.fileno())
            self._partial.rename(self.out)
        print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "no rows", file=sys.stderr)
        return 0

    @property
    def _partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    @contextlib.contextmanager
    def _written(self) -> Iterator[BinaryIO]:
        """Open what is written, say where it cannot be, and leave nothing where nothing was verified."""
        try:
            with self._partial.open("ab+") as out:
                yield out
        except OSError as error:
            raise unwritten(self._partial, error) from error
        finally:
            with contextlib.suppress(OSError):
                if not self._partial.stat().st_size:
                    self._partial.unlink()

    async def _verify(self, out: BinaryIO) -> dict[str, int]:
        from areal_agents.rewards.mathematics.pool import MathPool

        total = sum(1 for _ in _rows(self.jsonl)) if self.jsonl.is_file() else None  # a pipe is read once
        workers = self.workers or os.cpu_count() or 1
        pool = MathPool(workers, deadline=self.deadline)
        rows = _rows(self.jsonl)
        try:
            counts = self._kept(out, rows)
            start, before = time.monotonic(), sum(counts.values())
            done = before
            while chunk := list(itertools.islice(rows, _AHEAD * workers)):
                for row in await asyncio.gather(*(_verdict(pool, number, line) for number, line in chunk)):
                    out.write(_line(row))
                    counts[row["status"]] = counts.get(row["status"], 0) + 1
                out.flush()
                done += len(chunk)
                _tell(done, total, (time.monotonic() - start) / (done - before))
        finally:
            pool.close()
            print(file=sys.stderr)
        return counts

    def _kept(self, out: BinaryIO, rows: Iterator[tuple[int, str]]) -> dict[str, int]:
        """Take the rows whose verdicts are there already, and return how many have which status.

        Raises ArealError where they are those of other rows.
        """
        counts: dict[str, int] = {}
        end = 0
        out.seek(0)
        for line in out:
            if not line.endswith(b"\n"):  # it was being written
                break
            number, given = next(rows, (0, ""))
            verdict = json.loads(line)
            row, _ = _read(number, given)
            if not number or any(verdict.get(name) != row[name] for name in row.keys() - _VERDICT):
                raise ArealError(f"{self._partial} has verdicts on other rows than {self.jsonl}: remove it")
            counts[verdict["status"]] = counts.get(verdict["status"], 0) + 1
            end += len(line)
        out.truncate(end)
        out.seek(0, os.SEEK_END)
        return counts


_VERDICT = {"score", "status", "detail", "elapsed_ms"}


def _tell(done: int, total: int | None, seconds_a_row: float) -> None:
    rest = "" if total is None else f"/{total} rows, about {seconds_a_row * (total - done):.0f} s left"
    print(f"\r{done}{rest or ' rows'} ", end="", file=sys.stderr)


def _rows(path: Path) -> Iterator[tuple[int, str]]:
    """Read the rows with the numbers of their lines."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ArealError(f"cannot read {path}: {error.strerror}") from error


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")  # half a character


def _read(number: int, line: str) -> tuple[dict[str, Any], str]:
    """Return what of a row is repeated beside its verdict, and why it is no row, or an empty text."""
    try:
        line.encode()
        row = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return {"line": number}, f"the row is no JSON: {error}"
    return (row, "") if isinstance(row, dict) else ({"row": row}, "the row is no object")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


async def _verdict(pool: Any, number: int, line: str) -> dict[str, Any]:
    from areal_agents.rewards.mathematics.options import Options

    row, problem = _read(number, line)
    try:
        if problem:
            raise ValueError(problem)
        gold, pred, options = row["gold"], row["pred"], row.get("options")
        texts = gold if isinstance(gold, list) else [gold]
        if not texts or not all(isinstance(x, str) for x in (*texts, pred)):
            raise ValueError("gold and pred are texts")
        if not isinstance(options, dict | None):
            raise ValueError(f"options are no table, but {options!r:.80}")
        found = await pool.verify(gold, pred, slot=row.get("slot", "answer"), options=Options.of(options or {}))
    except (KeyError, ValueError, TypeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        return {**row, "score": 0, "status": "parse_error", "detail": detail, "elapsed_ms": 0.0}
    return {**row, "score": found.score, "status": found.status, "detail": found.detail, "elapsed_ms": found.elapsed_ms}
