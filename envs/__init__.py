"""The environments of this package, registered by their ids."""

if __name__ != "areal_agents.envs":
    raise ImportError("import areal_agents.envs, not envs")

from areal_agents.registry import register

register(
    "areal/Arithmetic-v0",
    "areal_agents.envs.arithmetic:Arithmetic",
    description="multi-step word problems with large numbers, solved with a Python tool",
)
register(
    "areal/Questions-v0",
    "areal_agents.envs.questions:Questions",
    description="questions of your own JSONL file (env.kwargs.path), verified as mathematics; a sample without one",
)
register(
    "areal/HiddenNumber-v0",
    "areal_agents.envs.hidden_number:HiddenNumber",
    description="find a number by guesses that are answered higher or lower; every guess is paid",
)
