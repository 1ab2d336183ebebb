"""Held-out evaluation, its statistics, and episodes looked at once more."""
