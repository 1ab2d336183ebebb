"""The run's metrics for W&B, an extra: ``pip install 'areal-agents[wandb]'``.

``step`` is the axis of every metric. W&B's own step is the row's number in metrics.jsonl, so a row has one place there,
also where an offline run is synced in parts. WANDB_MODE, WANDB_DIR, WANDB_NAME and WANDB_RUN_GROUP are honoured.

**Resuming.** W&B never forgets a row it has. Where a resumed run lost no row, it goes on in the same W&B run. Where
rows were cut back, that W&B run keeps them, as a record of what happened. A new one of the same group,
NAME-resumed-at-STEP, then starts with all the rows that remain. So the newest run of the group always holds exactly
metrics.jsonl. ``OUT/wandb.json`` says which run that is.

**Failing.** W&B is called on a thread of its own. Its first failure is one message and one event. After it this run
sends nothing more, and training goes on. The next resume starts a new W&B run, with all rows.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_agents.errors import ConfigError
from areal_agents.tracking.tensorboard import Point
from areal_agents.utils.files import write_atomically
from areal_agents.utils.packages import require_package

PATIENCE = 60.0
"""Seconds that starting a W&B run, and at the end uploading the rest, may take."""


def require_wandb() -> None:
    """Raise ConfigError, with the command that helps, where the wandb package is not installed."""
    require_package("wandb", "track.wandb", "leave it empty")


class WandbLog:
    """The log of one W&B run, which a thread of its own sends."""

    def __init__(
        self,
        out: Path,
        project: str,
        *,
        config: Mapping[str, Any],
        rows: Sequence[Point],
        go_on: bool,
        started: Callable[[str], None],
        failed: Callable[[str], None],
    ) -> None:
        """Start the thread, and queue the rows that the W&B run lacks.

        Args:
            out: the run's folder.
            project: ``project`` or ``entity/project``.
            config: the run's settings, for W&B to show.
            rows: those that metrics.jsonl holds.
            go_on: the W&B run of ``OUT/wandb.json`` has the same rows.
            started: called with the run's address, on another thread.
            failed: called once with a reason, on another thread.
        """
        self._file = out / "wandb.json"
        self._out = out
        self._entity, _, self._project = project.rpartition("/")
        self._config = dict(config)
        self._started, self._failed = started, failed
        self._queue: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        last = self._last()
        # Rows of a session without W&B, or lost with a killed one, are missing there: then all are sent to a new run.
        self._same = go_on and last.get("project") == project and bool(last.get("id")) and last.get("rows") == len(rows)
        self._id: str = last["id"] if self._same else secrets.token_hex(4)
        name = os.environ.get("WANDB_NAME") or out.resolve().name
        step = max((step for _, step, _, _ in rows), default=0)
        self._name = last["name"] if self._same else f"{name}-resumed-at-{step}" if rows else name
        self._group: str = last.get("group") or os.environ.get("WANDB_RUN_GROUP") or f"{name}-{self._id}"
        self._row = len(rows) if self._same else 0
        self._state = {"project": project, "id": self._id, "name": self._name, "group": self._group}
        for point in () if self._same else rows:
            self._queue.put(point)
        self._thread = threading.Thread(target=self._work, name="areal-wandb", daemon=True)
        self._thread.start()

    def log(self, point: Point) -> None:
        """Send one row, and never wait or raise.

        After a failure it does nothing.
        """
        if self._thread.is_alive():
            self._queue.put(point)

    def close(self) -> None:
        """Send what is left, and end W&B's process and threads.

        Gives up after a while.
        """
        self._queue.put(None)
        self._thread.join(3 * PATIENCE)  # W&B's own limits end it sooner
        if self._thread.is_alive():
            self._failed(f"it did not finish within {3 * PATIENCE:.0f} s")

    def _work(self) -> None:
        try:
            self._save({**self._state, "rows": self._row})
            self._run()
        except Exception as error:  # noqa: BLE001 - reported; W&B is no reason to stop training
            self._failed(f"{type(error).__name__}: {error}")
            try:
                # Without an id the next resume starts a new W&B run. This one lacks rows.
                self._save({**self._state, "id": ""})
            except OSError:
                return  # the run's own files say so too

    def _run(self) -> None:
        import wandb

        owned = wandb.run is None  # else the process has a W&B of its own, which stays
        settings = wandb.Settings(
            silent=True, console="off", reinit="create_new", init_timeout=PATIENCE, finish_timeout=PATIENCE
        )
        try:
            online = wandb.setup(wandb.Settings(silent=True)).settings.mode in ("online", "shared")
            if online and not wandb.login(prompt=False, verify=False):  # never a question that nobody answers
                raise ConfigError("it has no API key: run `wandb login`, or set WANDB_MODE=offline")
            run = wandb.init(
                entity=self._entity or None, project=self._project, id=self._id, resume="allow", name=self._name,
                group=self._group, config=self._config, dir=os.environ.get("WANDB_DIR") or str(self._out),
                settings=settings,
            )  # fmt: skip
            try:
                run.define_metric("step")
                run.define_metric("*", step_metric="step")
                self._started(run.url or f"{run.settings.mode}, {run.dir}")
                while (point := self._queue.get()) is not None:
                    kind, step, wall_time, values = point
                    row = {"step": step, "_timestamp": wall_time, **{f"{kind}/{k}": v for k, v in values.items()}}
                    run.log(row, step=self._row, commit=True)
                    self._row += 1
                    self._save({**self._state, "rows": self._row})
            finally:
                run.finish()
        finally:
            if owned:
                wandb.teardown()

    def _last(self) -> dict[str, Any]:
        try:
            state = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _save(self, state: Mapping[str, str | int]) -> None:
        write_atomically(self._file, json.dumps(state) + "\n")
