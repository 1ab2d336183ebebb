"""Does an environment keep its contract? The checks of ``areal-agents check``."""
