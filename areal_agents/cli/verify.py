"""The command ``verify``, a dataclass as in ``cli/commands.py``."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from areal_agents.cli.common import UsageError
from areal_agents.errors import ArealError
from areal_agents.utils.files import is_full, unwritten

_AHEAD = 64
"""Rows for each worker that are read before the first of them is verified."""


@dataclass
class Verify:
    """Compare answers with gold ones: ``areal-agents verify math --jsonl answers.jsonl --out verdicts.jsonl``.

    A row is {"gold": TEXT or [TEXT, …], "pred": TEXT, "slot": "answer", "options": {…}}. Rows come out in the same
    order, each with score (0 or 1), status, detail and elapsed_ms. A row that is broken gets a verdict of its own.
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

    def run(self, overrides: Sequence[str]) -> int:
        if self.workers < 0:
            raise UsageError(f"--workers is {self.workers}: it must be at least 1, or 0 for one for each core")
        if self.out.exists():
            raise UsageError(f"{self.out} exists: name another file, or remove it")
        counts = asyncio.run(self._verify())
        print(", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "no rows", file=sys.stderr)
        return 0

    async def _verify(self) -> dict[str, int]:
        import os

        from areal_agents.rewards.mathematics.pool import MathPool

        workers = self.workers or os.cpu_count() or 1
        pool = MathPool(workers, deadline=self.deadline)
        counts: dict[str, int] = {}
        partial = self.out.with_name(f"{self.out.name}.partial")
        try:
            total = sum(1 for _ in _rows(self.jsonl))
            start, done = time.monotonic(), 0
            with partial.open("w", encoding="utf-8", errors="backslashreplace") as out:  # half a character
                rows = _rows(self.jsonl)
                while chunk := [row for row, _ in zip(rows, range(_AHEAD * workers), strict=False)]:
                    for row in await asyncio.gather(*(_verdict(pool, line) for line in chunk)):
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")
                        counts[row["status"]] = counts.get(row["status"], 0) + 1
                    done += len(chunk)
                    spent = time.monotonic() - start
                    print(
                        f"\r{done}/{total} rows, about {spent / done * (total - done):.0f} s left ",
                        end="",
                        file=sys.stderr,
                    )
            partial.rename(self.out)
        except OSError as error:
            if is_full(error):
                raise unwritten(self.out, error) from error
            raise ArealError(f"cannot read {self.jsonl} or write {self.out}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
            pool.close()
            print(file=sys.stderr)
        return counts


def _rows(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            if line.strip():
                yield line


async def _verdict(pool: Any, line: str) -> dict[str, Any]:
    from areal_agents.rewards.mathematics.options import Options

    try:
        line.encode()
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {"score": 0, "status": "parse_error", "detail": f"the row is no JSON: {error}", "elapsed_ms": 0.0}
    if not isinstance(row, dict):
        return {"row": row, "score": 0, "status": "parse_error", "detail": "the row is no object", "elapsed_ms": 0.0}
    try:
        gold, pred = row["gold"], row["pred"]
        texts = gold if isinstance(gold, list) else [gold]
        if not texts or not all(isinstance(x, str) for x in (*texts, pred)):
            raise ValueError("gold and pred are texts")
        found = await pool.verify(
            gold, pred, slot=row.get("slot", "answer"), options=Options.of(row.get("options") or {})
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        return {**row, "score": 0, "status": "parse_error", "detail": detail, "elapsed_ms": 0.0}
    return {**row, "score": found.score, "status": found.status, "detail": found.detail, "elapsed_ms": found.elapsed_ms}
