from __future__ import annotations

import contextlib
import gzip
import time
import zlib
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_agents.tool import ToolError
from areal_agents.tools.page_packing import Unpacker


def raw(data: bytes) -> bytes:
    """Deflate without a frame, as some servers send it."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def unpack(pieces: Iterable[bytes], limit: int = 1000) -> tuple[bytes, bool, str]:
    unpacker, out = Unpacker(limit), b""
    for piece in pieces:
        out += unpacker.take(piece)
    return out, unpacker.whole, unpacker.over


ONE, TWO = gzip.compress(b"one", mtime=0), gzip.compress(b"two", mtime=0)
ZEROS = b"\0" * 20


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("data", "out", "whole", "over"),
    [
        (b"", b"", True, ""),
        (ONE, b"one", True, ""),
        (zlib.compress(b"one"), b"one", True, ""),
        (raw(b"one" * 50), b"one" * 50, True, ""),
        (ONE + TWO + ONE, b"onetwoone", True, ""),
        (ONE + ZEROS, b"one", True, ""),
        (ONE + ZEROS + TWO, b"onetwo", True, ""),
        (ONE + b"junk", b"one", True, "what follows the packed page was not read"),
        (ONE + TWO[:12], b"onet", False, ""),
        (ONE[:-1], b"one", False, ""),
    ],
    ids=["none", "gzip", "zlib", "raw", "parts", "padded", "padded parts", "junk", "half a part", "a byte less"],
)
def test_packed_pages(data: bytes, out: bytes, whole: bool, over: str, size: int) -> None:
    assert unpack(data[at : at + size] for at in range(0, len(data), size)) == (out, whole, over)


def test_no_more_is_unpacked_than_the_limit_and_one() -> None:
    assert unpack([gzip.compress(b"x" * 999) + gzip.compress(b"y" * (1 << 20))])[0] == b"x" * 999 + b"yy"
    bomb = gzip.compress(b"\0" * (50 << 20), 1)
    assert unpack([bomb] * 3)[0] == b"\0" * 1001


def test_parts_without_content_come_to_an_end() -> None:
    empty = gzip.compress(b"")
    assert unpack([empty * 1000, ZEROS]) == (b"", True, "")
    start = time.process_time()
    with pytest.raises(ToolError, match="more than 1000 parts"):
        unpack([empty * 100_000])
    assert time.process_time() - start < 30


def test_what_is_not_packed_is_told() -> None:
    for data in (b"<html>", b"\x1f\x8b\x08\x20" + b"\xff" * 50, ONE + b"\x1f\x8bjunk" + b"\xff" * 50):
        with pytest.raises(ToolError, match="packed wrongly"):
            unpack([data])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=40) | st.sampled_from([ONE, TWO, ONE[:9], raw(b"one"), b"\0"]), max_size=8))
def test_any_bytes_are_unpacked_or_refused(pieces: list[bytes]) -> None:
    with contextlib.suppress(ToolError):
        assert len(unpack(pieces, limit=10)[0]) <= 11
