"""The tools that environments share."""

if __name__ != "areal_agents.tools":
    raise ImportError("import areal_agents.tools, not tools")
