"""Search over a corpus: how long its index takes, and how long one search takes, alone and among others.

    python benchmarks/search.py [--passages 100000] --json benchmarks/results/search.json       # a minute

Passages are 100 words, drawn from 50,000 by Zipf's law, so that few words stand nearly everywhere and most
stand in few passages, as in a language. One passage in a thousand holds a pair of words of its own, and a search for
the pair must find it first. ``rare`` queries are such pairs; ``mixed`` ones 8 words as a text has them; ``common``
ones the 8 commonest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import record

from areal_agents.tools.search import Index
from areal_agents.tools.search_index import open_index

WORDS, LENGTH, PLANTED = 50_000, 100, 1000
CONCURRENT = (1, 8, 32)


def write_corpus(path: Path, passages: int, rng: random.Random) -> None:
    """Write the passages as JSON lines."""
    words, weights = vocabulary()
    with path.open("w") as file:
        for n in range(passages):
            text = rng.choices(words, cum_weights=weights, k=LENGTH)
            if n % PLANTED == 0:
                text[rng.randrange(LENGTH)] = pair(n)
            file.write(json.dumps({"id": f"p{n}", "text": " ".join(text)}) + "\n")


def vocabulary() -> tuple[list[str], list[float]]:
    """Return the words, the commonest first, with the sums of their weights."""
    return [f"w{n}x" for n in range(WORDS)], list(accumulate(1 / (n + 10) for n in range(WORDS)))


def pair(n: int) -> str:
    """Return the two words that passage ``n`` alone has."""
    return f"planted{n}a planted{n}b"


def queries(kind: str, passages: int, count: int, rng: random.Random) -> list[str]:
    """Return queries of one kind."""
    words, weights = vocabulary()
    if kind == "rare":
        return [pair(rng.randrange(0, passages, PLANTED)) for _ in range(count)]
    if kind == "mixed":
        return [" ".join(rng.choices(words, cum_weights=weights, k=8)) for _ in range(count)]
    return [" ".join(words[:8])] * count


async def measure(index: Index, asked: list[str], at_once: int) -> list[float]:
    """Return the milliseconds of each search, ``at_once`` of which run at any time."""
    slots, taken = asyncio.Semaphore(at_once), []

    async def one(query: str) -> None:
        async with slots:
            began = time.perf_counter()
            await asyncio.to_thread(index.search, query, 5)
            taken.append(1000 * (time.perf_counter() - began))

    await asyncio.gather(*(one(query) for query in asked))
    return sorted(taken)


def row(kind: str, at_once: int, taken: list[float], seconds: float) -> dict[str, Any]:
    """Return the percentiles of sorted times in ms, and the searches in a second."""

    def at(share: float) -> float:
        return round(taken[min(int(share * len(taken)), len(taken) - 1)], 1)

    return {
        "queries": kind, "concurrency": at_once, "n": len(taken), "p50_ms": at(0.5), "p95_ms": at(0.95),
        "p99_ms": at(0.99), "per_second": round(len(taken) / seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="2000 passages")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    args = parser.parse_args()
    passages, count = (2000, 20) if args.quick else (args.passages, 100)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cache = os.environ.get("AREAL_AGENTS_CACHE")
        os.environ["AREAL_AGENTS_CACHE"] = folder  # the index goes with the folder
        stack.callback(lambda: os.environ.__setitem__("AREAL_AGENTS_CACHE", cache) if cache else None)
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, passages, rng)
        began = time.perf_counter()
        path = open_index(corpus)
        built = round(time.perf_counter() - began, 1)
        began = time.perf_counter()
        open_index(corpus)
        again = round(1000 * (time.perf_counter() - began), 1)
        index = Index(path)
        planted = range(0, passages, PLANTED)
        found = sum(index.search(pair(n), 1).startswith(f"1. [p{n}]") for n in planted)
        samples = []
        for kind in ("rare", "mixed", "common"):
            for at_once in CONCURRENT:
                asked = queries(kind, passages, count, rng)
                began = time.perf_counter()
                taken = asyncio.run(measure(index, asked, at_once))
                samples.append(row(kind, at_once, taken, time.perf_counter() - began))
                print(samples[-1], flush=True)
        sizes = {"passages": passages, "corpus_mb": corpus.stat().st_size >> 20, "index_mb": path.stat().st_size >> 20}
    checks = [record.Check("planted passages found first", f"{found} of {len(planted)}", "all", found == len(planted))]
    more = {**sizes, "build_seconds": built, "second_open_ms": again}
    print(more)
    record.write(args.json, "search", samples, checks, **more)
    raise SystemExit(0 if all(check.holds for check in checks) else 1)


if __name__ == "__main__":
    main()
