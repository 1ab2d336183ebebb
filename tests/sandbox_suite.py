"""What tests of sandboxes share: the package's own checks, and Python by the path that the host's has."""

from __future__ import annotations

from areal_agents.sandboxes.subject import SPEC, raised, run, value

__all__ = ["PYTHON", "SPEC", "raised", "run", "value"]

PYTHON = "/usr/bin/python3"
