"""Unpacking of a page that comes in pieces, from a server that may send a bomb."""

from __future__ import annotations

import zlib
from typing import Any, Final

from areal_agents.tool import ToolError

PACKED: Final = ("gzip", "x-gzip", "deflate")
MAX_PARTS: Final = 1000
"""Packed files one after the other in one page. Each costs a new start, however little it holds."""
_PIECE: Final = 4096
"""Bytes that are unpacked at a time: zlib copies what follows a part's end, once a part."""


class Unpacker:
    """Packed data, of one part or of several, that grows up to a limit and no further."""

    def __init__(self, limit: int) -> None:
        self._left = limit + 1
        self._inner: Any = None
        self._start = b""
        self._parts = 0
        self.over = ""
        """What comes now is not read: why."""

    @property
    def whole(self) -> bool:
        """Whether what came ends where a part does."""
        return self._inner is None and not self._start

    def take(self, data: bytes) -> bytes:
        """Unpack what came. Raises ToolError where it is no packed data."""
        out = bytearray()
        try:
            for at in range(0, len(data), _PIECE):
                piece = data[at : at + _PIECE]
                while piece and self._left > 0 and not self.over:
                    piece = self._unpack(piece, out)
        except zlib.error:
            raise ToolError("error: the page is packed wrongly") from None
        return bytes(out)

    def _unpack(self, piece: bytes, out: bytearray) -> bytes:
        """Unpack up to the end of a part, and return what is behind it."""
        if self._inner is None:
            piece, self._start = self._start + piece, b""
            if self._parts:
                piece = piece.lstrip(b"\0")  # padding
            if len(piece) < 2:
                self._start = piece
                return b""
            if self._parts and piece[:2] != b"\x1f\x8b":
                self.over = "what follows the packed page was not read"
                return b""
            self._parts += 1
            if self._parts > MAX_PARTS:
                raise ToolError(f"error: the page is packed in more than {MAX_PARTS} parts")
            # Some servers send what `deflate` names, and others leave its frame of six bytes out.
            framed = piece[:2] == b"\x1f\x8b" or (piece[0] & 15 == 8 and int.from_bytes(piece[:2]) % 31 == 0)
            self._inner = zlib.decompressobj(wbits=47 if framed else -15)
        done = self._inner.decompress(piece, self._left)
        out += done
        self._left -= len(done)
        if not self._inner.eof:
            return b""
        rest: bytes = self._inner.unused_data
        self._inner = None
        return rest
