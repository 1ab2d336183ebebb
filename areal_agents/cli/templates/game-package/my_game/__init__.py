"""The environments of this package.

Importing it registers them. Nothing else is imported before it is needed.
"""

from areal_agents import register

register("my_game/Cellar-v0", "my_game.env:Cellar", description="find the key, open the vault, keep out of the pit")
