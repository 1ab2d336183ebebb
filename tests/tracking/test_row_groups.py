"""Which episodes share a row group, worked by hand, and the encodings of a real file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from areal_agents.tracking import row_groups
from areal_agents.tracking.trajectories import read_shard, write_shard
from tests.saved_runs import record


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "GROUP_ENDS", 10)
    monkeypatch.setattr(row_groups, "AT_MOST", 25)


@pytest.mark.parametrize(
    ("episodes", "expected"),
    [  # (group, tokens) of each episode
        ([], [(0, 0)]),
        ([(0, 99)], [(0, 1)]),
        ([(0, 4), (0, 4), (1, 4)], [(0, 3)]),  # 8 < 10 at the group's end: they share
        ([(0, 5), (0, 5), (1, 5), (1, 4), (2, 1)], [(0, 2), (2, 5)]),  # 10 ends it; 9 does not
        ([(0, 9), (0, 9), (0, 7), (0, 1)], [(0, 3), (3, 4)]),  # 25 is the most, within a group too
        ([(0, 30), (0, 2), (1, 30)], [(0, 1), (1, 2), (2, 3)]),  # alone it may be longer
    ],
)
def test_row_groups(episodes: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    # `record` shows one token and samples the rest, in one turn.
    made = [record(group, i, 0.0, tokens=tokens - 1).trajectory for i, (group, tokens) in enumerate(episodes)]
    assert list(row_groups.row_groups(made)) == expected


def test_a_file_has_them_and_reads_back_in_order(tmp_path: Path) -> None:
    records = [record(group, i, 0.5, 0.25, tokens=3) for group in range(3) for i in range(2)]
    records[0] = replace(records[0], trajectory=replace(records[0].trajectory, turns=()))
    write_shard(tmp_path / "x.parquet", records)
    with pq.ParquetFile(tmp_path / "x.parquet") as file:
        # Two turns of one token shown and three sampled are 8 tokens: 0 + 8 is too few for a group to end with.
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        first = file.metadata.row_group(0)
        leaf = {c.path_in_schema: c.encodings for c in map(first.column, range(first.num_columns))}
    assert sizes == [4, 2]
    assert read_shard(tmp_path / "x.parquet") == records
    ids, logprobs = (leaf[f"turns.list.element.{name}.list.element"] for name in ("ids", "logprobs"))
    assert "BYTE_STREAM_SPLIT" in logprobs
    assert not any("DICTIONARY" in name for name in (*ids, *logprobs))
    assert any("DICTIONARY" in name for name in leaf["turns.list.element.text"])
