"""The settings of a run.

``config`` says what can be set, ``loading`` reads it, ``writing`` writes it, and ``describe`` makes its help.
"""

from areal_agents.settings.describe import help_text
from areal_agents.settings.loading import find, load, shipped, split_overrides
from areal_agents.settings.writing import dump

__all__ = ["dump", "find", "help_text", "load", "shipped", "split_overrides"]
