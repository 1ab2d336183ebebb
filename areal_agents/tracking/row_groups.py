"""The layout of a shard: which episodes share a row group of the Parquet file, and how its columns are encoded.

A reader of one episode reads one row group, so that it takes milliseconds. Encodings keep the file from growing by it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from areal_agents.errors import ArealError
from areal_agents.types import Trajectory

GROUP_ENDS = 32_768
"""A row group ends with the training group with which it has so many tokens."""
AT_MOST = 262_144
"""It ends before the episode with which it would have more. An episode alone may be longer."""
_TOKENS = tuple(f"turns.list.element.{name}.list.element" for name in ("prompt_suffix", "ids", "logprobs"))


def row_groups(episodes: Sequence[Trajectory]) -> Iterator[tuple[int, int]]:
    """Yield the half-open range of episodes that each row group holds; one empty range for no episodes."""
    start, tokens = 0, 0
    for i, episode in enumerate(episodes):
        length = sum(len(turn.prompt_suffix) + len(turn.completion.ids) for turn in episode.turns)
        group_ended = i > start and episode.group != episodes[i - 1].group
        if (group_ended and tokens >= GROUP_ENDS) or (i > start and tokens + length > AT_MOST):
            yield start, i
            start, tokens = i, 0
        tokens += length
    yield start, len(episodes)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise ArealError, with path and reason, for what goes wrong while a shard is read."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise ArealError(f"{path} is no readable trajectory shard: {type(error).__name__}: {error}") from error


def encoding(schema: Any) -> dict[str, Any]:
    """Return the arguments of pyarrow's ``ParquetWriter`` for a file of ``schema``.

    Token ids and log-probabilities hardly repeat within a row group, and a dictionary would be as large as they are.
    Log-probabilities are split by bytes: sampled in float32, half of their bytes are zero.
    """
    dictionaries = [name for field in schema for name in _leaves(field.name, field.type) if name not in _TOKENS]
    return {"compression": "zstd", "use_dictionary": dictionaries, "use_byte_stream_split": [_TOKENS[-1]]}


def _leaves(prefix: str, kind: Any) -> Iterator[str]:
    """Yield the paths that Parquet gives the values of a column."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        yield from _leaves(f"{prefix}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{prefix}.{field.name}", field.type)
    else:
        yield prefix
