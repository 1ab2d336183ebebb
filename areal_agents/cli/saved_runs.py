"""The commands ``rescore`` and ``replay``, which read a saved run.

Each is a dataclass, as in ``cli/commands.py``.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from areal_agents.cli.common import UsageError, open_run, require_writable, write_json
from areal_agents.errors import ArealError

if TYPE_CHECKING:
    from areal_agents.engine import ChatModel
    from areal_agents.evaluation.rescore import AnyReward, Outcome
    from areal_agents.evaluation.saved_run import SavedRun


@dataclass
class Rescore:
    """Try a reward on a run's saved episodes: what changes in rewards, ranks, passes and advantage signs.

    ``areal-agents rescore runs/demo --reward my_rewards:brief``. Exit code 1 where the reward failed on an episode.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a training run or an evaluation."""
    reward: Annotated[str, tyro.conf.arg(metavar="PKG:FN")]
    """A function of an Episode, a Reward, a WeightedSum, a Gate, a GroupReward, or an environment (its rubrics)."""
    kind: str = "train"
    """Which episodes: ``train``, ``demonstration``, ``eval-before``, …; ``eval`` in an evaluation's folder."""
    steps: Annotated[str, tyro.conf.arg(metavar="A:B")] = ""
    """Only the steps A to B, both included; either may be left out."""
    pass_at: float = 1.0
    """An episode passes when its reward reaches this."""
    concurrency: int = 64
    """Most calls of an async reward at once."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the comparison as JSON here; ``-``: to standard output, and everything else to standard error."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.parquet")] = None
    """Also write the episodes with their new rewards here; the run's own files are never written."""

    def run(self, overrides: Sequence[str]) -> int:
        if self.concurrency < 1:
            raise UsageError(f"--concurrency is {self.concurrency}: it must be at least 1")
        first, last = step_range(self.steps)
        if self.out is not None and self.out.suffix != ".parquet":
            raise UsageError(f"--out is {self.out}: it must be a file whose name ends with .parquet")
        if self.out is not None:
            require_writable(self.out)
        report, code = self._run(first, last)
        if str(self.json) == "-":
            write_json(report, None)
        return code

    def _run(self, first: int, last: int | None) -> tuple[object, int]:
        """Return the report as JSON, and the exit code."""
        from areal_agents.evaluation.rescore import load_reward, refuse_inside

        run = open_run(self.folder)
        for path in (self.out, self.json):
            if path is not None and str(path) != "-":
                refuse_inside(path, run)
        reward = load_reward(self.reward)
        outcome = self._score(run, run.shards(self.kind, first=first, last=last), reward)
        failures = [{"episode": f.episode, "error": f.error} for f in outcome.failures]
        report = {"run": str(run.out), "kind": self.kind, "failures": failures} | self._compare(run, outcome, reward)
        if self.json is not None and str(self.json) != "-":
            write_json(report, self.json)
        if outcome.failures:
            from areal_agents.evaluation.reward_shift import failure_text

            print(failure_text(outcome), file=sys.stderr)
        return report, 1 if outcome.failures else 0

    def _score(self, run: SavedRun, paths: list[Path], reward: AnyReward) -> Outcome:
        from areal_agents.errors import RegistryError
        from areal_agents.evaluation.progress import Progress
        from areal_agents.evaluation.rescore import answer_of, plain_answer, rescore
        from areal_agents.evaluation.saved_run import episode_ids
        from areal_agents.tracking.trajectories import write_shard

        models: Mapping[str, ChatModel] = {}
        try:
            answer, models = answer_of(run), run.env_models
        except RegistryError as error:
            print(f"warning: {error}; the answer is taken to be the text after the reasoning", file=sys.stderr)
            answer = plain_answer
        total = sum(len(episode_ids(path)) for path in paths)
        progress = Progress(lambda line: print(line, file=sys.stderr, flush=True), label="rescoring")
        outcome = asyncio.run(
            rescore(
                paths,
                reward,
                answer=answer,
                models=models,
                concurrency=self.concurrency,
                keep=self.out is not None,
                progress=lambda done: progress(done, total),
            )
        )
        if self.out is not None:
            write_shard(self.out, outcome.records)
            print(f"{len(outcome.records)} episodes with their new rewards: {self.out}")
        return outcome

    def _compare(self, run: SavedRun, outcome: Outcome, reward: AnyReward) -> dict[str, object]:
        from areal_agents.evaluation.rescore import group_reward_among
        from areal_agents.evaluation.reward_shift import compare

        if len(outcome.failures) == len(outcome.episodes):
            return {"reward": self.reward, "scored": 0, "failed": len(outcome.failures), "skipped": outcome.skipped}
        algorithm = run.algorithm if self.kind == "train" else None
        if algorithm is not None and run.mixture:
            print("note: the run had several environments, so advantages are not compared", file=sys.stderr)
            algorithm = None
        group = group_reward_among(reward)
        shift = compare(outcome, reward=self.reward, algorithm=algorithm, pass_at=self.pass_at, group=group)
        print(shift.table())
        return shift.to_json()


@dataclass
class Replay:
    """Play a saved episode again, with real tools, and report the first difference; 0 identical, 1 different.

    ``areal-agents replay runs/demo --list``, then ``areal-agents replay runs/demo --episode g0/3``.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a training run or an evaluation."""
    episode: Annotated[str, tyro.conf.arg(metavar="ID")] = ""
    """The episode, by its id."""
    kind: str = "train"
    """Which episodes: ``train``, ``demonstration``, ``eval-before``, …; ``eval`` in an evaluation's folder."""
    sandbox: str = ""
    """Another sandbox backend than the run's."""
    seed: int | None = None
    """Another environment seed than the run's."""
    list: bool = False
    """List episodes instead."""
    task: str = ""
    """With --list: only this task's."""
    limit: int = 50
    """With --list: at most so many; 0: all."""

    def run(self, overrides: Sequence[str]) -> int:
        if self.list == bool(self.episode):
            raise UsageError("name one episode with --episode ID, or list them with --list")
        if self.limit < 0:
            raise UsageError(f"--limit is {self.limit}: it must be at least 0 (0 lists all)")
        run = open_run(self.folder)
        return self._list(run) if self.list else self._replay(run)

    def _list(self, run: SavedRun) -> int:
        from areal_agents.evaluation.saved_run import columns
        from areal_agents.tracking.console import plain

        rows = [["episode", "step", "task", "reward", "turns", "ended"]]
        found = 0
        for record in run.records(self.kind):
            t = record.trajectory
            if self.task and t.task.id != self.task:
                continue
            found += 1
            if not self.limit or found <= self.limit:
                cells = (t.id, record.step, t.task.id, f"{t.reward:.4g}", len(t.turns), t.stop_reason)
                rows.append([plain(str(cell)).replace("\n", "\\n") for cell in cells])
        if not found:
            raise ArealError(f"{run.out} has no {self.kind!r} episode of task {self.task!r}: --list shows the tasks")
        print(columns(rows))
        if found >= len(rows):
            print(f"{len(rows) - 1} of {found} episodes; --limit 0 lists all")
        return 0

    def _replay(self, run: SavedRun) -> int:
        from areal_agents.chat.format import ChatFormat
        from areal_agents.evaluation.replay import replay
        from areal_agents.rollout.player import prove_sandbox

        record = run.episode(self.kind, self.episode)
        run = run.of(record)
        seed = run.env_seed(record) if self.seed is None else self.seed
        sandbox = self.sandbox or run.sandbox
        if not self.sandbox and sandbox != "bubblewrap":  # the folder may be somebody else's, and its code a model's
            raise UsageError(
                f"{run.out} was run in the sandbox {sandbox!r}, which is not taken from a folder's word: name one, "
                f"--sandbox bubblewrap, or --sandbox {shlex.quote(sandbox)} where that may run the recorded code here"
            )
        folder = run.model_folder()
        spec = run.spec

        async def play() -> int:
            await prove_sandbox(spec, sandbox)
            report = await replay(
                record,
                lambda: run.make_env(sandbox=sandbox),
                seed=seed,
                fmt=None if folder is None else ChatFormat.load(folder, run.chat),
                step_timeout=run.step_timeout,
                max_turns=run.max_turns,
            )
            print(report.text())
            return 0 if report.identical else 1

        return asyncio.run(play())


def step_range(text: str) -> tuple[int, int | None]:
    """Return the first and the last step of ``A:B``, ``A:``, ``:B`` or one step.

    The last one is None where it is left out. Raises UsageError.
    """
    match = re.fullmatch(r"(\d*):(\d*)|(\d+)", text)
    if not text:
        return 0, None
    if match is None:
        raise UsageError(f"--steps is {text!r}: write A:B, both included, such as 10:20, 10: or :20")
    if match[3]:
        return int(match[3]), int(match[3])
    first, last = int(match[1] or 0), int(match[2]) if match[2] else None
    if last is not None and last < first:
        raise UsageError(f"--steps is {text!r}: the last step is before the first")
    return first, last
