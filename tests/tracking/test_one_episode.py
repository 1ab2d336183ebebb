"""One episode out of a shard: the right one, and nothing read besides its row group."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from areal_agents.errors import ArealError
from areal_agents.tracking import row_groups
from areal_agents.tracking.journal import Journal
from areal_agents.tracking.one_episode import Earned, Summary, read_earned, read_episode, read_summaries
from areal_agents.tracking.trajectories import Record, write_shard
from tests.saved_runs import record

ODD = "g\ud800/é"


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    monkeypatch.setattr(row_groups, "GROUP_ENDS", 1)
    found = [record(group, i, 0.5, 0.25 * i, task=group) for group in range(4) for i in range(2)]
    first, last = found[5].trajectory.turns
    turns = (replace(first, state_key="a"), replace(last, state_key=ODD))
    odd = replace(found[5].trajectory, id=ODD, turns=turns, terminated=False, truncated=True, stop_reason="max_turns")
    found[5] = replace(found[5], trajectory=odd)
    found[6] = replace(found[6], trajectory=replace(found[6].trajectory, turns=()))
    return found


def test_every_episode_is_found_in_every_kind_of_file(tmp_path: Path, records: list[Record]) -> None:
    new, one, lines = (tmp_path / f"step-{i:06}.parquet" for i in range(3))
    write_shard(new, records)
    pq.write_table(pq.read_table(new), one)  # as files were written before: one row group
    with Journal(lines.with_suffix(".jsonl")) as journal:
        for r in records:
            journal.append(r, elapsed=1.0)
    assert (pq.ParquetFile(new).num_row_groups, pq.ParquetFile(one).num_row_groups) == (4, 1)
    for path in (new, one, lines.with_suffix(".jsonl")):
        assert [read_episode(path, r.trajectory.id) for r in records] == records
        assert read_episode(path, "g9/9") is None
        assert [s.id for s in read_summaries(path)] == [r.trajectory.id for r in records]
        assert [(e.id, e.rewards_K, e.tokens_K) for e in read_earned(path, "g2")] == [
            ("g2/0", (0.5, 0.0), (3, 3)), (ODD, (0.5, 0.25), (3, 3))
        ]  # fmt: skip
        assert read_earned(path, "g7") == []
        assert read_earned(path) == [Earned.of(r.trajectory) for r in records]
    content = records[3].trajectory.task.content_hash
    assert read_summaries(new)[3] == Summary("g1/1", "g1", "t1", 1, 0.75, "answer", None, 2, 0, 0, 6, content)


def test_only_its_row_group_is_read(tmp_path: Path, records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.parquet"
    write_shard(path, records)
    read: list[tuple[int, bool]] = []
    usual = pq.ParquetFile.read_row_group

    def noted(self: Any, i: int, columns: Any = None, **options: Any) -> Any:
        read.append((i, columns is None))
        return usual(self, i, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    assert read_episode(path, "g3/0") == records[6]
    # The ids of row group 2 reach from "g2/0" to a surrogate's mark: they may hold it, and are looked through.
    assert read in ([(3, False), (3, True)], [(2, False), (3, False), (3, True)])
    read.clear()
    assert read_episode(path, "a") is None
    assert read == []


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (None, b"PAR1 nothing\n", json.dumps({"schema_version": 9}).encode() + b"\n"):
        if content is not None:
            path.write_bytes(content)
        for read in (lambda: read_episode(path, "g0/0"), lambda: read_summaries(path)):
            with pytest.raises(ArealError, match=r"x\.(parquet|jsonl)"):
                read()
