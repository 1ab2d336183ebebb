"""The growing and shrinking of a run while it trains.

It changes the numbers of engines, of rollout workers and of episodes at once. What is changed becomes part of the
run's settings (``config.toml``), so a resumed run goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any

from pydantic import ValidationError

from areal_agents import settings
from areal_agents.errors import ArealError, ConfigError
from areal_agents.settings.config import TrainConfig
from areal_agents.settings.section import Count, Section
from areal_agents.trainer.control import answer_requests
from areal_agents.trainer.run import Run


class NewSizes(Section):
    """The sizes that are asked for.

    None stays as it is.
    """

    replicas: Count | None = None
    """``engine.replicas``; on Ray only."""
    rollout_workers: Count | None = None
    """``cluster.rollout_workers``; on Ray only."""
    concurrency: Count | None = None
    """``rollout.concurrency``."""


@contextlib.asynccontextmanager
async def answering(run: Run) -> AsyncIterator[None]:
    """Let whoever sees the run's folder resize it meanwhile."""
    answers = answer_requests(run.config.out, partial(answer_resize, run), event=run.tracker.event)
    task = asyncio.create_task(answers, name="control")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def sizes(config: TrainConfig) -> dict[str, int]:
    """Return the sizes of a run, by the names of ``NewSizes``."""
    return {
        "replicas": config.engine.replicas,
        "rollout_workers": config.cluster.rollout_workers,
        "concurrency": config.rollout.concurrency,
    }


async def answer_resize(run: Run, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do what ``NewSizes`` in ``request`` asks, and return the sizes ``before`` and ``after``.

    Fewer episodes start before engines and workers go, and more only once they are there. A part that fails is undone.
    The parts before it stay done and recorded. Raises ConfigError, and what growth raises.
    """
    try:
        asked = NewSizes.model_validate(request)
    except ValidationError as error:
        raise ConfigError(f"this is no size of a run: {error}") from error
    before = sizes(run.config)
    _require(run, asked)
    fewer = asked.concurrency is not None and asked.concurrency < before["concurrency"]
    if fewer:
        _episodes(run, asked)
    elastic = run.backend.elastic
    if asked.replicas is not None and elastic is not None:
        try:
            await elastic.set_replicas(asked.replicas)
        except ArealError:
            await elastic.set_replicas(before["replicas"])  # growth keeps those that started
            raise
        _record(run, "engine", replicas=asked.replicas)
    if asked.rollout_workers is not None and elastic is not None:
        await elastic.set_rollout_workers(asked.rollout_workers)
        _record(run, "cluster", rollout_workers=asked.rollout_workers)
    if not fewer:
        _episodes(run, asked)
    after = sizes(run.config)
    run.tracker.event("resized", **after)
    run.tracker.message("resized: " + ", ".join(f"{name} {n}" for name, n in after.items()))
    return {"before": before, "after": after}


def _require(run: Run, asked: NewSizes) -> None:
    """Raise ConfigError for sizes that this run cannot have."""
    elastic, wanted = run.backend.elastic, sizes(run.config) | asked.model_dump(exclude_none=True)
    if elastic is None and (asked.replicas is not None or asked.rollout_workers is not None):
        raise ConfigError(
            "cluster.backend = 'local' has this machine's cores and no others, so its engines and environments stay as "
            "they are: only the concurrency can change. Run on cluster.backend = 'ray' to add and remove them"
        )
    least = run.config.rollout.group_size
    if wanted["concurrency"] < least:
        raise ConfigError(f"concurrency = {wanted['concurrency']} cannot hold one group of {least} episodes: raise it")
    if elastic is not None and wanted["concurrency"] > wanted["rollout_workers"] * elastic.places:
        raise ConfigError(
            f"{wanted['concurrency']} episodes at once do not fit on {wanted['rollout_workers']} rollout workers of "
            f"{elastic.places} places each: ask for {-(-wanted['concurrency'] // elastic.places)} workers, or for "
            "fewer episodes at once"
        )


def _episodes(run: Run, asked: NewSizes) -> None:
    if asked.concurrency is not None:
        if run.rollouts is not None:
            run.rollouts.set_concurrency(asked.concurrency)
        _record(run, "rollout", concurrency=asked.concurrency)


def _record(run: Run, section: str, **values: int) -> None:
    """Write ``values`` into the settings of ``run``, here and on the disk."""
    changed = getattr(run.config, section).model_copy(update=values)
    run.config = run.config.model_copy(update={section: changed})
    run.folder.write_settings(settings.dump(run.config))
