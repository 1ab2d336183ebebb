"""Hand-worked numbers and plain loops of ``areal_agents.algorithms.masks``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from areal_agents.algorithms.masks import geometric, m2po, none, opsm, sequence, trust_region
from areal_agents.algorithms.objective import Denominators, PolicyObjective, Tokens
from areal_agents.algorithms.offpolicy_stats import OffPolicyStats
from areal_agents.algorithms.registry import Choice
from areal_agents.algorithms.scope import sees
from areal_agents.errors import ConfigError

BOUNDED: list[Callable[..., Tensor]] = [sequence, geometric, trust_region]
# Episode 0: turn 0 has u = 2 and 0.9, turn 1 has 1.5 (product 2.7). Episode 1: 0.8 and 1 (product 0.8).
RATIOS = [2.0, 0.8, 0.9, 1.5, 1.0]
EPISODES, TURNS = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 0])


def pair(ratios: Sequence[float]) -> tuple[Tensor, Tensor]:
    b_T = torch.linspace(-3.0, -0.5, len(ratios), dtype=torch.float64)
    return b_T + torch.tensor(ratios, dtype=torch.float64).log(), b_T


def test_none_keeps_everything() -> None:
    assert none(torch.tensor([-1e9, 0.0])).tolist() == [True, True]


def test_sequence_by_hand() -> None:
    given_: Any = (*pair(RATIOS), EPISODES, TURNS)
    # [0.5, 2]: ∏u of episode 0 is 2.7, outside. By turn: 1.8, 1.5 and 0.8, all inside.
    assert sequence(*given_).tolist() == [False, True, False, False, True]
    assert sequence(*given_, scope="turn").tolist() == [True] * 5
    assert sequence(*given_, bounds=(0.0, 3.0)).tolist() == [True] * 5
    assert sequence(*given_, bounds=(0.9, 3.0)).tolist() == [True, False, True, True, False]


def test_geometric_by_hand() -> None:
    given_: Any = (*pair(RATIOS), EPISODES, TURNS)
    # Means of log u: episode 0: log 2.7 / 3 = 0.3311; episode 1: log 0.8 / 2 = −0.1116.
    # Fixed [0.75, 1.35]: log in [−0.288, 0.300]: episode 0 is out.
    assert geometric(*given_, bounds=(0.75, 1.35), shrink=False).tolist() == [False, True, False, False, True]
    # c = log 1.9 = 0.6419. By √3: 0.3706 keeps episode 0. c = log 1.75 = 0.5596: 0.3231 does not.
    assert geometric(*given_, bounds=(0.5, 1.9)).tolist() == [True] * 5
    assert geometric(*given_, bounds=(0.5, 1.75)).tolist() == [False, True, False, False, True]
    # log 0.84 / √2 = −0.1233 keeps episode 1, log 0.86 / √2 = −0.1066 does not.
    assert geometric(*given_, bounds=(0.84, 1.9)).tolist() == [True] * 5
    assert geometric(*given_, bounds=(0.86, 1.9)).tolist() == [True, False, True, True, False]


def test_the_measured_noise_widens_the_bounds_of_geometric_and_never_narrows_them() -> None:
    # Means of log u: 0.3311 of 3 tokens, −0.1116 of 2. c = 4m: m = 0.1 gives 0.4/√3 = 0.231 and −0.4/√2 = −0.283.
    def kept(noise: float, **options: Any) -> list[bool]:
        u_T, sampler_T = pair(RATIOS)
        found: list[bool] = geometric(u_T, sampler_T, EPISODES, TURNS, torch.full((5,), noise), **options).tolist()
        return found

    for noise, expected in ((0.0, [False] * 5), (0.1, [False, True, False, False, True]), (0.2, [True] * 5)):
        assert kept(noise, bounds=(0.99, 1.01)) == expected, noise
        assert kept(noise, bounds=(0.99, 1.01), measured=False) == [False] * 5
        assert kept(noise, bounds=(0.99, 1.01), shrink=False) == [False] * 5
    assert kept(1e-7, bounds=(0.5, 1.9)) == [True] * 5
    u_T, sampler_T = pair(RATIOS)
    with pytest.raises(ValueError, match="one length"):
        geometric(u_T, sampler_T, EPISODES, TURNS, torch.zeros(4))


def test_bounds_that_shrink_treat_all_lengths_alike_and_fixed_ones_do_not() -> None:
    # On policy, log u is noise of mean |log u| = 0.036, as bf16 gives it. 400 sequences of each length.
    torch.manual_seed(0)
    shares: dict[str, list[float]] = {"shrink": [], "fixed": [], "product": []}
    for length in (10, 400):
        noise_T = torch.randn(400 * length, dtype=torch.float64) * 0.036 * math.sqrt(math.pi / 2)
        episodes_T = torch.arange(400).repeat_interleave(length)
        given_: Any = (noise_T, torch.zeros_like(noise_T), episodes_T, episodes_T)
        shares["shrink"].append(1 - geometric(*given_).double().mean().item())
        shares["fixed"].append(1 - geometric(*given_, bounds=(0.99, 1.01), shrink=False).double().mean().item())
        shares["product"].append(1 - sequence(*given_).double().mean().item())
    assert max(shares["shrink"]) < 0.01
    assert shares["fixed"][0] > 0.4
    assert shares["fixed"][1] < 0.01
    assert shares["product"][0] < 0.01
    assert shares["product"][1] > 0.4


def test_trust_region_by_hand() -> None:
    given_: Any = (*pair(RATIOS), EPISODES, TURNS)
    # [0.7, 1.8]: u = 2 is outside and takes its episode with it, or its turn.
    assert trust_region(*given_, bounds=(0.7, 1.8)).tolist() == [False, True, False, False, True]
    assert trust_region(*given_, bounds=(0.7, 1.8), scope="turn").tolist() == [False, True, False, True, True]
    assert trust_region(*given_).tolist() == [True] * 5


def test_m2po_by_hand() -> None:
    # (log u)² = 0.16, 0.01, 0.04, 0.0025 with log u = 0.4, −0.1, 0.2, 0.05: mean 0.0531 > 0.04. Without the largest:
    # 0.0175. With τ = 0.007 the next goes too: 0.00625. With τ = 0.001 even the smallest does.
    b_T = torch.zeros(4, dtype=torch.float64)
    logs_T = torch.tensor([0.4, -0.1, 0.2, 0.05], dtype=torch.float64)
    assert m2po(logs_T, b_T).tolist() == [False, True, True, True]
    assert m2po(logs_T, b_T, threshold=0.06).tolist() == [True] * 4
    assert m2po(logs_T, b_T, threshold=0.007).tolist() == [False, True, False, True]
    assert m2po(logs_T, b_T, threshold=0.001).tolist() == [False] * 4
    assert m2po(b_T[:0], b_T[:0]).tolist() == []


def test_opsm_by_hand() -> None:
    # Mean of log μ/π: episode 0: −0.3311 (the policy likes it more); episode 1: 0.1116 > 0.03: its bad tokens go.
    given_: Any = pair(RATIOS)
    mask: Callable[..., Tensor] = opsm
    a_T = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    assert mask(*given_, a_T, EPISODES, TURNS).tolist() == [True, False, True, True, True]
    assert mask(*given_, a_T, EPISODES, TURNS, delta=0.2).tolist() == [True] * 5
    # A token without an advantage is not punished: a KL term or an entropy bonus keeps it.
    assert mask(*given_, torch.zeros(5), EPISODES, TURNS).tolist() == [True] * 5
    # By turn: (0, 0): −0.2939; (0, 1): −0.4055; (1, 0): 0.1116. The last is the whole episode.
    assert mask(*given_, a_T, EPISODES, TURNS, scope="turn").tolist() == [True, False, True, True, True]


tokens_of = st.lists(
    st.tuples(st.floats(-1.0, 1.0), st.floats(-2.0, 2.0), st.integers(0, 2), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(tokens_of, st.sampled_from(["turn", "trajectory"]))
def test_masks_equal_the_loops(tokens: list[tuple[float, float, int, int]], scope: Any) -> None:
    logs_T = torch.tensor([x for x, _, _, _ in tokens], dtype=torch.float64)
    b_T, a_T = torch.zeros_like(logs_T), torch.tensor([a for _, a, _, _ in tokens], dtype=torch.float64)
    index: Any = (torch.tensor([e for _, _, e, _ in tokens]), torch.tensor([k for _, _, _, k in tokens]))
    low, high = math.log(0.6), math.log(1.9)
    expected: dict[str, list[bool]] = {"sequence": [], "geometric": [], "trust_region": [], "opsm": []}
    for _, a, episode, turn in tokens:
        own = [x for x, _, e, k in tokens if e == episode and (scope == "trajectory" or k == turn)]
        mean, by = sum(own) / len(own), math.sqrt(len(own))
        expected["sequence"].append(low <= sum(own) <= high)
        expected["geometric"].append(low / by <= mean <= high / by)
        expected["trust_region"].append(all(low <= x <= high for x in own))
        expected["opsm"].append(not (a < 0 and -mean > 0.1))
    for f in BOUNDED:
        assert f(logs_T, b_T, *index, bounds=(0.6, 1.9), scope=scope).tolist() == expected[f.__name__]
    assert opsm(logs_T, b_T, a_T, *index, delta=0.1, scope=scope).tolist() == expected["opsm"]
    # M2PO: drop the largest until the mean of the rest is at most τ.
    left = sorted(range(len(tokens)), key=lambda i: tokens[i][0] ** 2)
    while left and sum(tokens[i][0] ** 2 for i in left) / len(left) > 0.04:
        left.pop()
    kept = m2po(logs_T, b_T)
    assert int(kept.sum()) == len(left)
    if left and not kept.all():
        assert float(logs_T[kept].square().max()) <= float(logs_T[~kept].square().min())


def test_bad_parameters_and_shapes_are_refused() -> None:
    two, index = torch.zeros(2), torch.zeros(2, dtype=torch.long)
    for f in BOUNDED:
        with pytest.raises(ValueError, match="must enclose 1"):
            f(two, two, index, index, bounds=(1.1, 2.0))
        with pytest.raises(ValueError, match="1-D"):
            f(two, torch.zeros(1), index, index)
        with pytest.raises(ValueError, match="turns_T must say"):
            f(two, two, index, index[:1], scope="turn")
    with pytest.raises(ValueError, match="threshold"):
        m2po(two, two, threshold=0.0)
    with pytest.raises(ValueError, match="delta"):
        opsm(two, two, two, index, index, delta=0.0)


def test_no_mask_carries_a_gradient_and_extremes_stay_finite() -> None:
    logprobs_T = torch.tensor([0.0, -500.0, -1.0]).requires_grad_()
    b_T, index = torch.tensor([-500.0, 0.0, -1.0]), torch.tensor([0, 1, 2])
    for f in BOUNDED:
        assert f(logprobs_T, b_T, index, index).tolist() == [False, False, True]
    assert m2po(logprobs_T, b_T).tolist() == [False, False, True]
    assert opsm(logprobs_T, b_T, -torch.ones(3), index, index).tolist() == [True, False, True]


def later(turns_T: Tensor, episodes_T: Tensor, *, first: int = 1) -> Tensor:
    return turns_T >= first


def weights(behaviour_T: Tensor) -> Tensor:
    return behaviour_T.exp()


def test_a_mask_of_ones_own_is_called_and_held_to_booleans() -> None:
    here = "tests.algorithms.test_masks"
    sees("episode")(later)
    made = PolicyObjective(
        loss=Choice("ppo"), correction=Choice("bypass"), mask=Choice(f"{here}:later", {"first": 2}), aggregation="token"
    )
    assert made.scope == "episode"
    logprobs_T = torch.full((3,), -1.0).requires_grad_()
    tokens = Tokens(
        ids=torch.arange(3), behaviour=torch.full((3,), -1.0), advantages=torch.ones(3), versions=torch.zeros(3).long(),
        turns=torch.tensor([1, 2, 3]), episodes=torch.zeros(3).long(), proximal=torch.zeros(3),
    )  # fmt: skip
    stats = OffPolicyStats()
    value = made(logprobs_T, tokens, Denominators(3, torch.tensor([3]), 1), stats, version=0)
    (gradient,) = torch.autograd.grad(value, logprobs_T)
    assert gradient.tolist() == pytest.approx([0.0, -1 / 3, -1 / 3])
    assert stats.result()["masked_share/by_mask"] == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match=r"algorithm.mask.kind = .*returned kept_T = .*float32: expected booleans"):
        PolicyObjective(
            loss=Choice("ppo"), correction=Choice("bypass"), mask=Choice(f"{here}:weights"), aggregation="token"
        )
