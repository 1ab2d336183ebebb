"""Draw the pictures of docs/ from the records of ``credit.py`` and ``staleness.py``, with nothing but what they hold.

python benchmarks/figures.py [--only credit] [--results benchmarks/results] [--out docs]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Record = dict[str, Any]


def credit(record: Record) -> Figure:
    """Draw the episodes of each fresh seed, a row a method and a panel a world; hollow where it did not get there."""
    worlds = list(dict.fromkeys(row["world"] for row in record["rows"]))
    figure, panels = plt.subplots(1, len(worlds), figsize=(10, 3.6), sharey=True, layout="constrained")
    for axes, world in zip(panels, worlds, strict=True):
        rows = [row for row in record["rows"] if row["world"] == world]
        for height, row in enumerate(rows):
            dense = world == "a reward a turn"
            runs = [s for s in record["samples"] if s["method"] == row["method"] and s["dense"] == dense]
            for reached, face in ((True, "tab:blue"), (False, "none")):
                at = [s["episodes"] for s in runs if s["reached"] == reached]
                axes.scatter(at, [height] * len(at), s=22, facecolors=face, edgecolors="tab:blue", alpha=0.7)
            axes.scatter([row["episodes"]], [height], marker="|", s=260, color="black", linewidths=1.5)
        axes.set(title=world, xlabel="episodes until the threshold", xlim=(0, None))
        axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    return figure


def staleness(record: Record) -> Figure:
    """Draw the score of each method over η with the interval of its deficit, and beside it the shares with AReaL's."""
    figure, (scores, shares) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for color, method in enumerate(dict.fromkeys(row["method"] for row in record["rows"])):
        rows = [row for row in record["rows"] if row["method"] == method]
        etas, values = range(len(rows)), [row["score"] for row in rows]
        # the deficit to the method's own fresh score: a larger one is a smaller score
        error = [
            [row["high"] - row["deficit"] for row in rows],
            [row["deficit"] - row["low"] for row in rows],
        ]
        scores.errorbar(etas, values, yerr=error, marker="o", ms=4, capsize=2, color=f"C{color}", label=method)
        shape = [row for row in record["in_shape"] if row["method"] == method]
        shares.plot(etas, [row["of fresh"] for row in shape], marker="o", ms=4, color=f"C{color}", label=method)
        published = [(at, row["AReaL of fresh"]) for at, row in enumerate(shape) if row["AReaL of fresh"] is not None]
        if published:
            at, theirs = zip(*published, strict=True)
            shares.plot(at, theirs, "--", marker="x", color=f"C{color}", label=f"{method}, AReaL's table")
        for axes in (scores, shares):
            axes.set_xticks(etas, [str(row["eta"]) for row in rows])
    scores.set(xlabel="η, the bound of staleness", ylabel="final score, points")
    shares.set(xlabel="η, the bound of staleness", ylabel="share of the score at η = 0")
    for axes in (scores, shares):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


DRAWN: dict[str, Callable[[Record], Figure]] = {"credit": credit, "staleness": staleness}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(DRAWN), help="draw this one")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    options = parser.parse_args()
    for name in options.only or DRAWN:
        figure = DRAWN[name](json.loads((options.results / f"{name}.json").read_text()))
        figure.savefig(options.out / f"{name}.png", dpi=110)
        plt.close(figure)
        print(options.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
