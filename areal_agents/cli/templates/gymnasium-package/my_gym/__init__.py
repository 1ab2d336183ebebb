"""The environments of this package.

Importing it registers them. Nothing else is imported before it is needed.
"""

from areal_agents import register

register("my_gym/Guess-v0", "my_gym.env:Guess", description="find a number by higher and lower")
