if __name__ != "areal_agents.envs":
    raise ImportError("import areal_agents.envs, not envs")
