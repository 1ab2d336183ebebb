"""Long outputs of tools: what a model sees of one, and how it reads on.

    text ─▶ short enough ─▶ shown whole
         └▶ too long ─▶ head, notice, tail ─▶ kept until the episode ends, where the environment lists ``read_output``

What is kept is bounded, by output and by episode. The oldest outputs make room for new ones.
"""

from __future__ import annotations

from typing import Final

MAX_KEPT_CHARS: Final = 256 << 10
"""Of one output. The middle of a longer one is gone."""
MAX_EPISODE_CHARS: Final = 1 << 20
"""Of all outputs that an episode keeps."""


class Outputs:
    """The outputs of one episode that were too long to show, by number from 1 on."""

    def __init__(self, reader: str = "read_output") -> None:
        """Name the tool that reads on, as notices do."""
        self.reader = reader
        self._kept: dict[int, str] = {}
        self._last = 0

    def show(self, text: str, limit: int) -> tuple[str, bool]:
        """Cut ``text`` as ``cut_middle`` does, keep it whole, and say in the notice how to read on."""
        if len(text) <= limit:
            return text, False
        self._last += 1
        self._kept[self._last] = cut_middle(text, MAX_KEPT_CHARS)[0]
        while sum(map(len, self._kept.values())) > MAX_EPISODE_CHARS:
            del self._kept[next(iter(self._kept))]
        return cut_middle(text, limit, f"{self.reader}(output={self._last}, start={{}})")

    def get(self, number: int) -> str | None:
        """Return an output, or None where there is none of that number any more."""
        return self._kept.get(number)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the outputs that are kept."""
        return tuple(self._kept)

    def clear(self) -> None:
        """Forget all outputs, and begin to count anew."""
        self._kept.clear()
        self._last = 0


def cut_middle(text: str, limit: int, call: str = "") -> tuple[str, bool]:
    """Cut ``text`` to at most ``limit`` characters, and say whether that was needed.

    Head and tail stay, the middle becomes a notice. The notice names ``call``, which reads on from ``{}`` on.
    """
    if len(text) <= limit:
        return text, False
    cut = f"{len(text) - limit} of {len(text)} characters cut"
    notice = f"\n[... {cut} ...]\n"
    if call:
        forms = (f"\n[... {cut}; {call} reads on ...]\n", f"\n[... {call} ...]\n")
        form = next((form for form in forms if len(form) + len(str(limit)) <= limit // 2), forms[-1])
        notice = form.format((limit - len(form) - len(str(limit))) // 2)  # at or a little before what was cut
    keep = max(limit - len(notice), 0)
    head = keep - keep // 2
    return text[:head] + notice + text[len(text) - keep // 2 :], True
