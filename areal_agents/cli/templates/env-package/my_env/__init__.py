"""The environments of this package.

Importing it registers them. Nothing else is imported before it is needed.
"""

from areal_agents import register

register("my_env/Boxes-v0", "my_env.env:Boxes", description="follow a trail of boxes to the code at its end")
