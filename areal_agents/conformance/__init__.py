"""The checks of ``areal-agents check``, which find out whether an environment keeps its contract."""
