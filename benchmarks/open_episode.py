"""One episode out of a shard of many: how long its reading takes, and what the file weighs.

    python benchmarks/open_episode.py [--episodes 256] [--tokens 20000]          # half a minute

The episodes are random, in groups of eight. ``one row group`` is the file as pyarrow writes it by itself, and reading
one of its episodes reads them all. Token ids are drawn from 32,000 ones evenly, which compresses worse than text does.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from areal_agents.tracking.one_episode import read_episode, read_summaries
from areal_agents.tracking.trajectories import Record, read_shard, write_shard
from areal_agents.types import AssistantMessage, Completion, Message, Task, Text, Trajectory, Turn

GROUP_SIZE, TURNS = 8, 10


def episode(group: int, i: int, tokens: int, rng: random.Random) -> Record:
    """Make an episode of ``tokens`` tokens, half of them sampled."""
    words = [rng.randbytes(4).hex() for _ in range(1000)]
    half = tokens // TURNS // 2

    def turn(k: int) -> Turn:
        ids, shown = (tuple(rng.choices(range(32_000), k=half)) for _ in range(2))
        logprobs = tuple(float(np.float32(-rng.expovariate(2.0))) for _ in ids)
        said, seen = (Text(" ".join(rng.choices(words, k=half // 2))) for _ in range(2))
        return Turn(
            shown, Completion(ids, logprobs, (3,) * half, "stop"), AssistantMessage((said,)), 0.1,
            parent=None if k == 0 else k - 1, observation=(Message("tool", (seen,), "c0", "search"),),
        )  # fmt: skip

    task = Task.make(f"t{group}", split="train", seed=group, payload={"n": group})
    turns = tuple(turn(k) for k in range(TURNS))
    return Record("train", 1, Trajectory(f"g{group}/{i}", task, f"g{group}", turns, True, False, "answer"))


def milliseconds(call: Callable[[], object]) -> float:
    """Return the shortest time of five calls, which a busy machine disturbs least."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        assert call()
        taken.append(1000 * (time.perf_counter() - began))
    return round(min(taken), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args()
    rng = random.Random(0)
    records = [episode(*divmod(n, GROUP_SIZE), args.tokens, rng) for n in range(args.episodes)]
    wanted = records[len(records) * 2 // 3].trajectory.id
    with tempfile.TemporaryDirectory() as folder:
        new, one = Path(folder) / "step-000001.parquet", Path(folder) / "step-000002.parquet"
        write_shard(new, records)
        pq.write_table(pq.read_table(new), one, compression="zstd")
        assert read_episode(new, wanted) == read_episode(one, wanted)
        for name, path in (("one row group", one), ("as it is written", new)):
            row = {
                "file": name,
                "row groups": pq.ParquetFile(path).num_row_groups,
                "megabytes": round(path.stat().st_size / 1e6, 1),
                "one episode, ms": milliseconds(lambda path=path: read_episode(path, wanted)),
                "list of all, ms": milliseconds(lambda path=path: read_summaries(path)),
                "all, s": round(milliseconds(lambda path=path: read_shard(path)) / 1000, 1),
            }
            print(json.dumps(row))


if __name__ == "__main__":
    main()
