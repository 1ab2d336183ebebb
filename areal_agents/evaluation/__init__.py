"""Held-out evaluation, its statistics, and second looks at saved episodes."""
