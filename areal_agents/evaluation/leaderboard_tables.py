"""The tables of a leaderboard: as text, Markdown and HTML.

Names of models and entries are other people's: each format writes them so that they are nothing but text.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_agents.evaluation.leaderboard import Difference, Leaderboard, Score
from areal_agents.evaluation.suite import MEAN
from areal_agents.tracking.console import plain
from areal_agents.utils.files import save_whole, unwritable
from areal_agents.utils.short_text import cut

METHOD = (
    "pass@1 with 95 % intervals clustered by task, copies of which are one; pass@k and pass^k by the unbiased "
    "estimators. The mean counts each entry the same, and its interval is about these entries' tasks. Differences are "
    "paired by task (sign-flip test), and their p has Holm's correction over models and entries."
)
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()|~^])")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:left}"
    "td:not(:first-child){font-variant-numeric:tabular-nums}tr.mean{font-weight:600}"
)


@dataclass(frozen=True, slots=True)
class Table:
    """One table, whose first row is its head."""

    title: str
    rows: tuple[tuple[str, ...], ...]


def tables_of(board: Leaderboard) -> list[Table]:
    """Return the tables: pass@1, pass@k, pass^k, rewards, and the differences to the first model."""
    named = [("pass@1", "pass_at_1", "ci95")]
    if any(e.k > 1 for e in board.suite.entries):
        named += [("pass@k", "pass_at_k", "pass_at_k_ci95"), ("pass^k", "pass_hat_k", "pass_hat_k_ci95")]
    found = [_scores(board, *names) for names in named]
    found.append(_scores(board, "mean reward", "reward", ""))
    pairs = [*board.differences, *board.mean_differences]
    if pairs:
        head = ("entry", "model", "difference", "95 % CI", "p", "p (Holm)", "tasks", "")
        title = f"pass@1, difference to {board.models[0]}"
        found.append(Table(title, (head, *map(_row, pairs))))
    return found


def _scores(board: Leaderboard, title: str, name: str, interval: str) -> Table:
    rows = [("entry", "tasks × k", *board.models)]
    for entry in board.suite.entries:
        if name.endswith("_k") and entry.k == 1:
            continue
        of_models = [board.score(entry.name, m) for m in board.models]
        different = max(s.n for s in of_models)
        some = f" ({different} different)" if any(s.copies for s in of_models) else ""
        size = f"{entry.n}{some} × {entry.k}" + (f", {len(entry.seeds)} seeds" if len(entry.seeds) > 1 else "")
        rows.append((entry.name, size, *(_value(s, name, interval) for s in of_models)))
    means = [board.score(MEAN, m) for m in board.models]
    if len(board.suite.entries) > 1 and any(getattr(s, name) is not None for s in means):
        rows.append((MEAN, "", *(_value(s, name, interval) for s in means)))
    return Table(title, tuple(rows))


def _value(score: Score, name: str, interval: str) -> str:
    value = getattr(score, name)
    if score.error:
        return "failed"
    if value is None:
        return "–"
    ends = getattr(score, interval) if interval else None
    text = f"{value:.3f}" + (f" ({ends[0]:.2f}–{ends[1]:.2f})" if ends else "")
    return text if score.complete else f"{text} partial"


def _row(d: Difference) -> tuple[str, ...]:
    ends = "–" if d.ci95 is None else f"{d.ci95[0]:+.3f} to {d.ci95[1]:+.3f}"
    verdict = ("better" if d.difference > 0 else "worse") if d.shown else "not shown"
    return (
        d.entry, d.model, f"{d.difference:+.3f}", ends, f"{d.p_value:.3g}", f"{d.p_holm:.3g}", str(d.n), verdict,
    )  # fmt: skip


def as_text(board: Leaderboard) -> str:
    """Return the leaderboard for a terminal."""
    parts = [plain(f"suite {board.suite}: {_state(board)}").replace("\n", " ")]
    for table in tables_of(board):
        rows = [tuple(plain(cell).replace("\n", " ") for cell in row) for row in table.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        parts.append("\n".join([plain(table.title), lines[0], "─" * max(map(len, lines)), *lines[1:]]))
    if board.notes:
        parts.append("\n".join(f"note: {cut(plain(note), 400)}" for note in board.notes))
    return "\n\n".join(parts)


def as_markdown(board: Leaderboard) -> str:
    """Return the leaderboard as Markdown."""
    parts = [f"# {_markdown(str(board.suite))}", _markdown(_state(board))]
    for table in tables_of(board):
        head, *rows = [[_markdown(cell) for cell in row] for row in table.rows]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
        parts += [f"## {_markdown(table.title)}", "\n".join(lines)]
    if board.notes:
        parts.append("\n".join(f"- {_markdown(note)}" for note in board.notes))
    return "\n\n".join([*parts, _markdown(METHOD)]) + "\n"


def as_html(board: Leaderboard) -> str:
    """Return the leaderboard as one HTML page, which loads nothing."""
    title = html.escape(str(board.suite))
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(plain(_state(board)))}</p>"]
    for table in tables_of(board):
        head, *rows = table.rows
        lines = [f"<h2>{_cell(table.title)}</h2>", "<table>", _html_row(head, "th")]
        parts.append("\n".join([*lines, *(_html_row(row, "td") for row in rows), "</table>"]))
    if board.notes:
        parts.append("<ul>" + "".join(f"<li>{_cell(note)}</li>" for note in board.notes) + "</ul>")
    parts.append(f"<p>{html.escape(METHOD)}</p>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html_row(row: Sequence[str], tag: str) -> str:
    kind = ' class="mean"' if row[0] == MEAN else ""
    return f"<tr{kind}>" + "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in row) + "</tr>"


def _cell(text: str) -> str:
    return html.escape(plain(text)).replace("\n", "<br>")


def _markdown(text: str) -> str:
    return html.escape(_MARKDOWN.sub(r"\\\1", plain(text)), quote=False).replace("\n", " ")


def _state(board: Leaderboard) -> str:
    said = board.suite.description or f"{len(board.suite.entries)} entries"
    return said if board.complete else f"{said}; not complete"


def save(board: Leaderboard, folder: Path) -> None:
    """Write the leaderboard as leaderboard.txt, .md, .html and .json. Raises ArealError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    save_whole(folder / "leaderboard.json", json.dumps(board.to_json(), indent=2, default=str) + "\n")
    for ending, text in (("txt", as_text(board) + "\n"), ("md", as_markdown(board)), ("html", as_html(board))):
        save_whole(folder / f"leaderboard.{ending}", text)
