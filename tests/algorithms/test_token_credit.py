"""Pay for leaving a reference, and credit from a teacher: hand-worked numbers, and what they are on average."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from areal_agents.algorithms.batch import Batch, rows_of
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Advantages
from areal_agents.algorithms.token_credit import TEACHER, penalties, taught, teacher_metrics
from areal_agents.algorithms.value_advantages import bilevel_gae, gae, turn_gae
from areal_agents.types import AssistantMessage, Completion, Task, Trajectory, Turn

TASK = Task.make("t", split="train", seed=0, payload={})
HALF, QUARTER = math.log(0.5), math.log(0.25)


def turn(mu: tuple[float, ...], reward: float, parent: int | None) -> Turn:
    ids = tuple(range(len(mu)))
    return Turn((7,), Completion(ids, mu, (0,) * len(mu), "stop"), AssistantMessage(()), reward, parent=parent)


EPISODE = Trajectory("e", TASK, "g", (turn((HALF, HALF), 1.0, None), turn((QUARTER,), 2.0, 0)), True, False, "answer")


@pytest.mark.parametrize(
    ("kind", "of_half", "of_quarter"),
    [
        ("k1", math.log(2), -math.log(2)),  # log(0.5/0.25), log(0.25/0.5)
        ("k2", math.log(2) ** 2 / 2, math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2), 2 - 1 - math.log(2)),  # ref/μ − 1 + l
    ],
)
def test_each_token_pays_its_estimate(kind: str, of_half: float, of_quarter: float) -> None:
    paid = penalties(kind, EPISODE, [[QUARTER, HALF], [HALF]])  # type: ignore[arg-type]
    assert paid[0] == pytest.approx([of_half, 0.0], abs=1e-9)
    assert paid[1] == pytest.approx([of_quarter], abs=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_what_is_paid_is_the_divergence_on_average(kind: str) -> None:
    mu, ref = [0.7, 0.2, 0.1], [0.3, 0.3, 0.4]
    said = replace(EPISODE, turns=(turn(tuple(map(math.log, mu)), 0.0, None),))
    (paid,) = penalties(kind, said, [list(map(math.log, ref))])  # type: ignore[arg-type]
    divergence = sum(m * math.log(m / r) for m, r in zip(mu, ref, strict=True))
    assert sum(m * p for m, p in zip(mu, paid, strict=True)) == pytest.approx(divergence, abs=1e-6)


def test_the_reward_of_k1_alone_has_the_gradient_of_the_divergence() -> None:
    """Enumerated over three tokens: E[−k·∇log π] at π = μ, against −∇KL(π‖ref)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    log_pi = torch.log_softmax(logits, -1)
    divergence = (log_pi.exp() * (log_pi - ref)).sum()
    (want,) = torch.autograd.grad(-divergence, logits, retain_graph=True)
    said = replace(EPISODE, turns=(turn(tuple(log_pi.tolist()), 0.0, None),))
    gradients = {}
    for kind in ("k1", "k3"):
        (paid,) = penalties(kind, said, [ref.tolist()])
        surrogate = (log_pi.exp().detach() * -torch.tensor(paid, dtype=torch.float64) * log_pi).sum()
        (gradients[kind],) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    assert torch.allclose(gradients["k1"], want, atol=1e-6)
    assert not torch.allclose(gradients["k3"], want, atol=1e-2)


def test_a_view_pays_by_turn_and_token_gae_by_token() -> None:
    view = EpisodeView((1.0, 2.0), tokens_K=(2, 1), values_K=((0.5, 0.25), (1.0,)))
    paying = view.paying([[0.1, 0.2], [0.4]])
    assert paying.rewards_K == pytest.approx((0.7, 1.6))
    assert paying.token_rewards(0) == pytest.approx([-0.1, 0.8])
    assert paying.token_rewards(1) == pytest.approx([1.6])
    (found,) = gae([paying])
    # G − V: the first token's own pay is behind the second
    assert found[0].tolist() == pytest.approx([-0.1 + 0.8 + 1.6 - 0.5, 0.8 + 1.6 - 0.25])
    assert found[1].tolist() == pytest.approx([1.6 - 1.0])
    (by_turn,) = turn_gae([paying], gamma=1.0, lam=1.0)
    assert by_turn.tolist() == pytest.approx([0.7 + 1.6 - 0.5, 1.6 - 1.0])
    (inside,) = bilevel_gae([paying], turn_gamma=1.0)  # by turn: its pay comes with the turn's last token
    assert inside[0].tolist() == pytest.approx([0.7 + 1.6 - 0.5, 0.7 + 1.6 - 0.25])
    (free,) = gae([view])
    assert free[0].tolist() == pytest.approx([3.0 - 0.5, 3.0 - 0.25])


def test_pay_of_a_turn_without_a_token_and_pay_that_does_not_fit() -> None:
    view = EpisodeView((1.0, 2.0, 0.5), tokens_K=(2, 0, 1), values_K=((0.0, 0.0), (), (0.0,)))
    paying = view.paying([[0.1, 0.2], [], [0.0]])
    assert paying.rewards_K == pytest.approx((0.7, 2.0, 0.5))
    assert paying.token_rewards(1) == []
    (found,) = gae([paying])
    assert found[0].tolist() == pytest.approx([3.2, 3.3])
    with pytest.raises(ValueError, match=r"pay of \[1, 0, 1\] tokens"):
        view.paying([[0.1], [], [0.0]])


@pytest.mark.parametrize(
    "advantages", [torch.tensor([1.0, -1.0]), (torch.tensor([1.0, 1.0]), torch.tensor([-1.0]))], ids=["turn", "token"]
)
def test_the_teachers_credit_is_added_to_each_token(advantages: Advantages) -> None:
    found = taught(advantages, EPISODE, [[QUARTER, HALF], [HALF]], 2.0)
    assert found[0] == pytest.approx([1 - 2 * math.log(2), 1.0])
    assert found[1] == pytest.approx([-1 + 2 * math.log(2)])
    assert taught(advantages, EPISODE, [[math.nan, -math.inf], [HALF]], 2.0)[0] == [1.0, 1.0]


def batch(teacher: list[list[float]]) -> Batch:
    return Batch(tuple(rows_of(EPISODE, [0.0, 0.0], episode=0, columns={TEACHER: teacher})), 1, 0, 1.0)


def test_metrics_of_the_teacher() -> None:
    found = teacher_metrics(batch([[QUARTER, QUARTER], [HALF]]))
    assert found == pytest.approx(
        {
            "teacher_unscored": 0.0, "teacher_kl": math.log(2) / 3,
            "teacher_kl/turn_0": math.log(2), "teacher_kl/turn_1": -math.log(2),
        }
    )  # fmt: skip
    found = teacher_metrics(batch([[QUARTER, math.nan], [math.nan]]))
    assert found == pytest.approx(
        {"teacher_unscored": 2 / 3, "teacher_kl": math.log(2), "teacher_kl/turn_0": math.log(2)}
    )
    assert teacher_metrics(batch([[math.nan] * 2, [math.nan]])) == {"teacher_unscored": 1.0}
    assert teacher_metrics(Batch(tuple(rows_of(EPISODE, [0.0, 0.0], episode=0)), 1, 0, 1.0)) == {}
    assert np.isnan(batch([[math.nan] * 2, [0.0]]).rows[0].columns[TEACHER]).sum() == 2
