"""The verifier's process with a reading that raises what nobody expects of it."""

from __future__ import annotations

from typing import Any

from areal_agents.rewards.mathematics import compare, worker

_usual = compare.readings


def readings(text: str, options: Any) -> Any:
    if "zeta" in text:
        raise ZeroDivisionError(f"of {text}")
    return _usual(text, options)


if __name__ == "__main__":
    compare.readings = readings
    worker.main()
