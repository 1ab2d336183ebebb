"""Settings: what can be set (``config``), reading (``loading``) and writing it, and its help (``describe``)."""

from areal_agents.settings.describe import help_text
from areal_agents.settings.loading import find, load, shipped, split_overrides
from areal_agents.settings.writing import dump

__all__ = ["dump", "find", "help_text", "load", "shipped", "split_overrides"]
