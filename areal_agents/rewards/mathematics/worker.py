"""A process that verifies answers until its standard input ends.

One JSON line in, {gold, pred, slot, options, seconds}, without ``pred`` to look at a gold
answer; one out, {status, detail}. Its memory is bounded, and so is the
processor time of each answer: it ends by itself where its parent can no longer kill it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from math import ceil
from typing import Any

MEMORY = 1 << 30
"""Bytes of address space."""


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not break a reply
    from areal_agents.rewards.mathematics.verify import verify

    verify("x+1", r"\sqrt{2}")  # imports and first uses are not the first answer's
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _reply(out, {"status": "ready", "detail": ""})
    for line in sys.stdin:
        request = json.loads(line)
        spent = resource.getrusage(resource.RUSAGE_SELF)
        limit = ceil(spent.ru_utime + spent.ru_stime + 2 * request["seconds"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        _reply(out, answer(request))


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Verify one request, and say what is wrong with it where it is none."""
    from areal_agents.rewards.mathematics.options import Options
    from areal_agents.rewards.mathematics.verify import look, verify

    try:
        options = Options.of(request.get("options") or {})
        gold, pred = request["gold"], request["pred"]
        found = look(gold, options) if pred is None else verify(gold, pred, slot=request["slot"], options=options)
    except MemoryError:
        return {"status": "timeout", "detail": f"it took more than {MEMORY >> 20} MiB"}
    except RecursionError:
        return {"status": "parse_error", "detail": "it nests too deep"}
    return {"status": found.status, "detail": found.detail}


def _reply(out: Any, row: dict[str, str]) -> None:
    out.write(json.dumps(row) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
