"""Examples and pairs from the saved episodes of runs: their own sampled tokens, never encoded again (T1).

Rejection fine-tuning imitates the episodes that earned most: ``--min-reward`` and ``--per-task``. Preferences are
between the best and the worst episode of a group, whose prompt is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from areal_agents.algorithms.batch import Row, rows_of
from areal_agents.chat.format import ChatFormat
from areal_agents.errors import ConfigError
from areal_agents.evaluation.look import kinds_of
from areal_agents.evaluation.saved_run import SavedRun
from areal_agents.finetune.config import DpoConfig, FinetuneConfig, SftConfig
from areal_agents.finetune.examples import Example, Limits, Pair, Sequences, Tally, guarded, last_turn
from areal_agents.finetune.messages import RowRefused
from areal_agents.finetune.render import trained_rows
from areal_agents.finetune.served import ServedEpisodes
from areal_agents.tracking.trajectories import Record, read_shard
from areal_agents.types import Image, Trajectory, Turn
from areal_agents.utils.tolerance import reaches


@dataclass(frozen=True)
class _Played:
    """An episode that can be trained on."""

    task: str
    group: tuple[int, str]
    prompt: bytes
    reward: float
    said: Sequences


def run_examples(path: Path, config: SftConfig, fmt: ChatFormat, limits: Limits) -> tuple[list[Example], Tally]:
    """Choose episodes of a run to imitate.

    Raises ConfigError where the run was sampled with another tokenizer, and ArealError where it cannot be read.
    """
    tally = Tally(str(path), "episodes")
    played = list(_played(path, config, fmt, limits, tally, min_reward=config.min_reward, last=config.turns == "last"))
    kept = _distinct(played, tally)
    if config.per_task is not None:
        kept = _best(kept, config.per_task, config.seed, tally)
    tally.taken = len(kept)
    return [Example(p.task, p.said, p.reward) for p in kept], tally


def run_pairs(path: Path, config: DpoConfig, fmt: ChatFormat, limits: Limits) -> tuple[list[Pair], Tally]:
    """Pair the episodes of each group of a run, the best with the worst.

    Raises what ``run_examples`` does.
    """
    tally = Tally(str(path), "groups")
    groups: dict[tuple[int, str], list[_Played]] = {}
    for episode in _played(path, config, fmt, limits, tally):
        groups.setdefault(episode.group, []).append(episode)
    found: list[Pair] = []
    tally.found = len(groups)
    for number, group in enumerate(groups.values()):
        made = _pairs(group, config, np.random.default_rng([config.seed, 2, number]))
        if not made:
            tally.leave_out(_name(group), f"no two rewards of the group differ by --min-gap {config.min_gap:g}")
        for chosen, rejected in made:
            if chosen.prompt != rejected.prompt:
                tally.leave_out(chosen.said.name, "the group's episodes have different prompts")
            elif chosen.said.key == rejected.said.key:
                tally.leave_out(chosen.said.name, "chosen and rejected are the same tokens")
            else:
                found.append(Pair(chosen.task, chosen.said, rejected.said))
    tally.taken = len(found)
    return found, tally


def _played(
    path: Path, config: FinetuneConfig, fmt: ChatFormat, limits: Limits, tally: Tally, *,
    min_reward: float | None = None, last: bool = False,
) -> Iterator[_Played]:  # fmt: skip
    """Yield the episodes that can be trained on, and count the others."""
    run = SavedRun.open(path)
    served = ServedEpisodes(run, fmt)
    for record in _records(run, config):
        tally.count(limits)
        t, name = record.trajectory, f"{path} step {record.step}, {record.trajectory.id}"
        if t.stop_reason == "error" or t.reward != t.reward:
            tally.leave_out(name, "the infrastructure failed, so it has no reward")
        elif min_reward is not None and not reaches(t.reward, min_reward):
            tally.leave_out(name, f"its reward is below --min-reward {min_reward:g}")
        elif (said := guarded(tally, name, partial(_rows, t, fmt, served, last=last), limits)) is not None:
            first = said.rows[0]
            prompt = first.ids[: int(first.mask.argmax())].tobytes()
            yield _Played(t.task.id, (record.step, t.group), prompt, t.reward, said)
    tally.rendered = served.rendered


def _records(run: SavedRun, config: FinetuneConfig) -> Iterator[Record]:
    kind = config.kind or kinds_of(run)[0]
    for shard in run.shards(kind, first=config.first_step, last=config.last_step):
        yield from read_shard(shard)


def _rows(t: Trajectory, fmt: ChatFormat, served: ServedEpisodes, *, last: bool) -> list[Row]:
    """Return the rows of an episode.

    Raises RowRefused where it has none, and ConfigError where another tokenizer's tokens are in it.
    """
    if not t.turns:
        raise RowRefused("it has no turn")
    for turn in t.turns:
        if any(isinstance(part, Image) for message in turn.observation for part in message.parts):
            raise RowRefused("its prompts have images: the learner reads text alone")
        _require_own_tokens(t, turn, fmt)
    played = [bool(turn.prompt_suffix or turn.completion.ids) for turn in t.turns]
    if any(played) and not all(played):
        raise RowRefused("some of it has tokens and some has none")
    if not any(played) and any(turn.rewritten for turn in t.turns):
        raise RowRefused("its history was rewritten (context), and a server's model played it: there are no prompts")
    rows = trained_rows(rows_of(t, [1.0] * len(played), episode=0)) if all(played) else served.rows(t)
    return last_turn(rows) if last else rows


def _require_own_tokens(t: Trajectory, turn: Turn, fmt: ChatFormat) -> None:
    ids = list(turn.completion.ids)
    if not ids:
        return
    decode = fmt.tokenizer.backend_tokenizer.decode
    if turn.message.text not in (decode(ids, skip_special_tokens=False), decode(ids[:-1], skip_special_tokens=False)):
        raise ConfigError(
            f"episode {t.id} was sampled with another tokenizer: its tokens read {decode(ids)[:60]!r} here, and were "
            f"{turn.message.text[:60]!r}. Give --model the run's own model, or one with the same tokenizer"
        )


def _distinct(played: Sequence[_Played], tally: Tally) -> list[_Played]:
    """Leave out what has the tokens of an earlier episode of its task."""
    seen: set[tuple[str, bytes]] = set()
    kept: list[_Played] = []
    for episode in played:
        if (key := (episode.task, episode.said.key)) in seen:
            tally.leave_out(episode.said.name, "it has the same tokens as another episode of its task")
        else:
            seen.add(key)
            kept.append(episode)
    return kept


def _best(played: Sequence[_Played], count: int, seed: int, tally: Tally) -> list[_Played]:
    """Keep the best ``count`` episodes of each task, in the order of the files. The seed chooses between equal ones."""
    order = np.random.default_rng([seed, 3]).permutation(len(played))
    taken: dict[str, int] = {}
    kept: set[int] = set()
    for i in sorted(order.tolist(), key=lambda i: -played[i].reward):
        task = played[i].task
        if taken.setdefault(task, 0) < count:
            taken[task] += 1
            kept.add(i)
        else:
            tally.leave_out(played[i].said.name, f"its task has --per-task {count} that earned as much or more")
    return [episode for i, episode in enumerate(played) if i in kept]


def _pairs(group: Sequence[_Played], config: DpoConfig, rng: np.random.Generator) -> list[tuple[_Played, _Played]]:
    """Pair best and worst, then second best and second worst, while their rewards differ enough."""
    order = sorted(rng.permutation(len(group)).tolist(), key=lambda i: -group[i].reward)
    found: list[tuple[_Played, _Played]] = []
    for high, low in zip(order, reversed(order), strict=True):
        chosen, rejected = group[high], group[low]
        if len(found) == config.pairs or not reaches(chosen.reward - rejected.reward, config.min_gap):
            break
        found.append((chosen, rejected))
    return found


def _name(group: Sequence[_Played]) -> str:
    return f"the group of {group[0].said.name}"
