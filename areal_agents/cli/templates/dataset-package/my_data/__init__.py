"""The environments of this package.

Importing it registers them. Nothing else is imported before it is needed.
"""

from areal_agents import register

register("my_data/Measures-v0", "my_data.env:Measures", description="questions of a file, about old measures")
