"""The command ``plot``, a dataclass as in ``cli/commands.py``: learning curves of runs as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from areal_agents.cli.common import UsageError, require_writable


@dataclass
class Plot:
    """Draw learning curves of runs with their 95 % intervals: ``areal-agents plot runs/a runs/b --out curves.svg``.

    Without --metric: the mean reward in training, and pass@1 on held-out tasks. An evaluation is a level line.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…")]
    """Folders of training runs or evaluations; a run may still go on."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("curves.png")
    """The picture, .png or .svg; one that is there is replaced."""
    metric: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME…")] = ()
    """Metrics to draw instead, a panel each: ``--metric loss off_policy/ess valid_call_rate``."""

    def run(self, overrides: Sequence[str]) -> int:
        if not self.folders:
            raise UsageError("name the folder of a run, such as runs/demo")
        if self.out.suffix.lower() not in (".png", ".svg"):
            raise UsageError(f"--out is {self.out}: the name of a picture ends with .png or .svg")
        require_writable(self.out)
        from areal_agents.evaluation.curves import first_panel, panel, read_numbers
        from areal_agents.tracking.plot import plot_runs

        runs = read_numbers(self.folders)
        panels = [first_panel(runs)] if not self.metric else []
        for metric in dict.fromkeys(self.metric):
            drawn, lacking = panel(runs, metric)
            panels.append(drawn)
            if lacking:
                print(f"note: {', '.join(lacking)} has no {metric}: not in that panel", file=sys.stderr)
        print(plot_runs(panels, self.out))
        return 0
