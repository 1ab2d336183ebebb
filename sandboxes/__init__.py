if __name__ != "areal_agents.sandboxes":
    raise ImportError("import areal_agents.sandboxes, not sandboxes")
