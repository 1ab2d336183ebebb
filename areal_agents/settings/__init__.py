"""Settings: what can be set (``config``), reading it (``loading``), and its help (``describe``)."""

from areal_agents.settings.loading import dump, find, help_text, load, shipped, split_overrides

__all__ = ["dump", "find", "help_text", "load", "shipped", "split_overrides"]
