"""The columns of a trajectory file, and the versions of them."""

from __future__ import annotations

import functools
from typing import Any

SCHEMA_VERSION = 3
"""In the column ``schema_version`` and in the file's metadata; 1 was one JSON object a line.

Files of version 2 are read too. In them a turn's ``state_key`` is that of the state that followed it, and no message
says whether it began in a thought.
"""
READ = ("2", str(SCHEMA_VERSION))
"""The versions that are read, as the metadata have them."""
VERSION_KEY = b"areal_agents.schema_version"


@functools.cache
def schema() -> Any:
    """Return the columns of a trajectory file, with the version in its metadata."""
    import pyarrow as pa

    def struct(**fields: Any) -> Any:
        return pa.struct(list(fields.items()))

    text, ids = pa.string(), pa.list_(pa.int32())
    message = struct(role=text, text=text, parts=text, tool_call_id=text, name=text)
    call = struct(
        id=text, name=text, arguments=text, raw=text, status=text, token_start=pa.int32(), token_end=pa.int32(),
        format=text, problem=text,
    )  # fmt: skip
    turn = struct(
        prompt_suffix=ids, ids=ids, logprobs=pa.list_(pa.float64()), versions=ids, finish=text, text=text, parts=text,
        message_finish=text, in_thought=pa.bool_(), reasoning=text, message_tokens=pa.int64(),
        tool_calls=pa.list_(call), reward=pa.float64(), components=text, parent=pa.int32(),
        observation=pa.list_(message), state_key=text,
        tool_results=pa.list_(struct(status=text, truncated=pa.bool_())), own_reward=pa.float64(), own_components=text,
        kind=text, rewritten=text,
    )  # fmt: skip
    row = struct(
        schema_version=pa.int32(), kind=text, step=pa.int64(), id=text, group=text, task_id=text, task_split=text,
        task_seed=pa.int64(), content_hash=text, task_payload=text, reward=pa.float64(), terminated=pa.bool_(),
        truncated=pa.bool_(), stop_reason=text, error=text, n_turns=pa.int32(), n_tool_calls=pa.int32(),
        n_valid_tool_calls=pa.int32(), sampled_tokens=pa.int64(), min_version=pa.int32(), max_version=pa.int32(),
        metrics=text, turns=pa.list_(turn), final_observation=pa.list_(message),
        tail=struct(ids=ids, parent=pa.int32()), outcome=text,
    )  # fmt: skip
    return pa.schema(list(row), metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()})
