"""A cost for tool calls: each call, each failed call, and calls by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from areal_agents.errors import ConfigError
from areal_agents.reward import Episode, Verdict
from areal_agents.rewards.shaping.turns import Call, calls_of_turns, number, of_episode, of_turns
from areal_agents.utils.short_text import short


class tool_cost:
    """Minus what the episode's tool calls cost.

        R = −Σ_calls (per_call + per_name[name] + per_failed where the call failed)

        tool_cost(per_call=0.01, per_failed=0.05, per_name={"search": 0.1})

    A call failed where it could not be read, does not fit a tool, or did not end with the status ``ok``. Costs may be
    negative, which pays for calls: a policy finds that soon. With ``per_turn=True`` each turn bears the cost of its own
    calls, else the last turn bears them all.
    """

    __name__ = "tool_cost"

    def __init__(
        self,
        *,
        per_call: float = 0.0,
        per_failed: float = 0.0,
        per_name: Mapping[str, float] = MappingProxyType({}),
        per_turn: bool = False,
    ) -> None:
        """Choose the costs.

        Args:
            per_call: of every call.
            per_failed: of a failed call, besides.
            per_name: of a call by its tool's name, besides.
            per_turn: give each turn the cost of its own calls.

        Raises:
            ConfigError: a cost is no finite number, or there is none.
        """
        self.per_call, self.per_failed = number(per_call, "per_call"), number(per_failed, "per_failed")
        if not isinstance(per_name, Mapping):
            raise ConfigError(f"per_name = {short(per_name)}: give costs by the tool's name")
        self.per_name = {name: number(x, f"per_name[{name!r}]") for name, x in per_name.items()}
        if not (self.per_call or self.per_failed or any(self.per_name.values())):
            raise ConfigError("tool_cost: every cost is 0: set per_call, per_failed or per_name")
        self.per_turn = per_turn

    def __call__(self, episode: Episode) -> Verdict:
        costs = [0.0 - sum(map(self._cost, calls)) for calls in calls_of_turns(episode)]
        return of_turns(self.__name__, costs) if self.per_turn else of_episode(self.__name__, float(sum(costs)))

    def _cost(self, call: Call) -> float:
        asked, result = call
        failed = asked.status != "ok" or (result is not None and result.status != "ok")
        return self.per_call + self.per_name.get(asked.name, 0.0) + (self.per_failed if failed else 0.0)
