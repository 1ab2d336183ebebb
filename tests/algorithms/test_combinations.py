"""The table of all pairs of losses and corrections: each is tried, or refused with its reason."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from itertools import product
from typing import Any, get_args

import pytest
import torch

from areal_agents import settings
from areal_agents.algorithms.advantages import opob
from areal_agents.algorithms.combinations import CAP, CLIP, IN_RATIO, TOKEN_MASK, WITHOUT_RATIO, Combination
from areal_agents.algorithms.objective import Aggregation, Denominators, PolicyObjective, Tokens
from areal_agents.algorithms.offpolicy import importance
from areal_agents.algorithms.offpolicy_stats import OffPolicyStats
from areal_agents.algorithms.registry import CORRECTIONS, LOSSES, MASKS, Choice
from areal_agents.errors import ConfigError
from areal_agents.settings.config import TrainConfig

WITH = {
    "bypass": Choice("bypass"),
    "decoupled": Choice("decoupled"),
    "unweighted": Choice("decoupled", {"scope": None}),
    "trajectory": Choice("decoupled", {"scope": "trajectory", "truncate": 2.0}),
    "kept": Choice("kept"),
    "log_linear": Choice("log_linear"),
    "importance": Choice("importance"),
}
ALWAYS, NEVER, MINIBATCHES, STALE, ON_POLICY = "always", "never", "two minibatches", "η of 2", "η of 0, one minibatch"
CLIPPED = (
    ALWAYS,
    ALWAYS,
    MINIBATCHES,
    ALWAYS,
    ALWAYS,
    STALE,
    NEVER,
)  # beside the ratio, or the default
RATIO = (ALWAYS, MINIBATCHES, MINIBATCHES, MINIBATCHES, ALWAYS, STALE, NEVER)
TABLE = {
    #            bypass, decoupled, unweighted, trajectory, kept, log_linear, importance
    "ppo": CLIPPED,
    "dppo_tv": CLIPPED,
    "gspo": RATIO,
    "gspo_token": RATIO,
    "cispo": RATIO,
    "sapo": RATIO,
    "gmpo": RATIO,
    "reinforce": (ON_POLICY, NEVER, NEVER, NEVER, NEVER, NEVER, ALWAYS),
}
REASONS = {
    ALWAYS: (),
    NEVER: ("count twice", "takes none", "identically 1"),
    MINIBATCHES: ("identically 1",),
    STALE: ("is 'bypass' for tokens of age 0 and 1",),
    ON_POLICY: ("nothing corrects for the older policy",),
}


def may(rule: str, minibatches: int, staleness: int) -> bool:
    match rule:
        case "always":
            return True
        case "never":
            return False
        case "two minibatches":
            return minibatches > 1
        case "η of 2":
            return staleness >= 2
        case _:
            return staleness == 0 and minibatches == 1


def test_the_table_has_every_loss_and_every_correction() -> None:
    assert set(TABLE) == set(LOSSES.builtin())
    assert {c.kind for c in WITH.values()} == set(CORRECTIONS.builtin())


@pytest.mark.parametrize("loss", TABLE)
def test_every_pair_is_allowed_and_works_or_is_refused_with_its_reason(loss: str) -> None:
    for (name, correction), rule in zip(WITH.items(), TABLE[loss], strict=True):
        for minibatches, staleness in product((1, 2), (0, 1, 2)):
            found = Combination(Choice(loss), correction, minibatches=minibatches, staleness=staleness).problems()
            where = (loss, name, minibatches, staleness, found)
            if may(rule, minibatches, staleness):
                assert not found, where
                continue
            assert found, where
            assert all(any(reason in p for reason in REASONS[rule]) for p in found), where
            assert all(": set " in p or "; leave it out" in p or "set learner" in p for p in found), where
        if rule != NEVER:
            # In turn, so that every mask meets every loss and every correction.
            turn = (list(TABLE).index(loss) + list(WITH).index(name)) % len(MASKS.builtin())
            aggregation = get_args(Aggregation)[turn % len(get_args(Aggregation))]
            try_it(Choice(loss), correction, Choice(MASKS.builtin()[turn]), aggregation)


def try_it(loss: Choice, correction: Choice, mask: Choice, aggregation: Any) -> None:
    """Compute the loss of three episodes, one of them over two rows, and see that something is learned."""
    policy = PolicyObjective(loss=loss, correction=correction, mask=mask, aggregation=aggregation, constant=8)
    torch.manual_seed(0)
    logprobs_T = (-1.0 - torch.rand(9)).requires_grad_()
    noise_T = 0.02 * torch.randn(9)
    tokens = Tokens(
        ids=torch.arange(9), behaviour=logprobs_T.detach() + noise_T,
        advantages=torch.tensor([1.0, 1.0, 0.5, -1.0, -1.0, 0.0, 2.0, -0.5, 1.0]),
        versions=torch.tensor([3, 3, 1, 2, 2, 2, 3, 3, 1]), turns=torch.tensor([0, 0, 1, 0, 0, 1, 0, 0, 2]),
        episodes=torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 0]), proximal=logprobs_T.detach() + 0.5 * noise_T,
    )  # fmt: skip
    stats = OffPolicyStats()
    value = policy(logprobs_T, tokens, Denominators(9, torch.tensor([4, 3, 2]), 3), stats, version=3)
    (gradient,) = torch.autograd.grad(value, logprobs_T)
    where = (loss.kind, correction, mask.kind, aggregation)
    assert gradient.isfinite().all(), where
    assert gradient.abs().sum() > 0.01, where
    # Near the policy everything pushes good tokens up and bad ones down: the first episode's and the second's.
    if loss.kind not in ("gspo", "gspo_token") or mask.kind == "none":
        assert float(gradient[0]) <= 0.0 <= float(gradient[3]), where
    assert stats.result()["tokens"] == 9.0


OPTIONS: list[tuple[Choice, Choice, str]] = [
    (Choice("ppo", {"clip_low": 1.5}), Choice("bypass"), "clip_low = 1.5 never acts, since no ratio"),
    (Choice("gspo", {"clip_low": 1.0}), Choice("bypass"), "clip_low = 1 never acts"),
    (Choice("ppo", {"clip_high": 4.0}), Choice("bypass"), "clip_high = 4 never acts, since algorithm.correction"),
    (Choice("ppo", {"clip_low": 0.5}), Choice("bypass"), "clip_low = 0.5 never acts"),
    (Choice("dppo_tv", {"truncate": 10.0}), Choice("bypass"), "loss.truncate = 10 never acts, since algorithm.corr"),
    (Choice("ppo", {"dual_clip": 1e6}), Choice("bypass"), "dual_clip = 1e.06 never acts"),
    (Choice("cispo", {"clip_high": 4.0}), Choice("bypass"), "clip_high = 4 never acts"),
    (Choice("ppo"), Choice("bypass", {"token_mask": (0.9, 1.1)}), "clip of 'ppo' .0.2, 0.2. never acts"),
    (Choice("ppo"), Choice("decoupled", {"truncate": 5.0}), "truncate = 5 never acts"),
    (Choice("reinforce"), Choice("importance", {"truncate": 9.0}), "truncate = 9 never acts"),
    (Choice("ppo"), Choice("decoupled", {"scope": None, "truncate": 2.0}), "scope = none has no weight"),
    (Choice("ppo"), Choice("kept", {"truncate": 5.0}), "truncate = 5 never acts"),
    (Choice("gspo"), Choice("kept", {"scope": None, "truncate": 2.0}), "scope = none has no weight"),
]


@pytest.mark.parametrize(("loss", "correction", "reason"), OPTIONS)
def test_a_bound_that_never_acts_is_refused(loss: Choice, correction: Choice, reason: str) -> None:
    (found,) = Combination(loss, correction, minibatches=2, staleness=2).problems()
    assert re.search(reason, found), found


ACTING: list[tuple[Choice, Choice]] = [
    (Choice("ppo", {"clip_high": 0.28}), Choice("bypass")),
    (Choice("ppo", {"clip_high": 4.0}), Choice("bypass", {"token_mask": None})),
    (Choice("ppo", {"dual_clip": None}), Choice("bypass")),
    (Choice("ppo", {"clip_high": 0.05, "clip_low": 0.05}), Choice("bypass", {"token_mask": (0.9, 1.1)})),
    (Choice("ppo"), Choice("bypass", {"token_mask": (0.5, 1.1)})),
    (Choice("ppo", {"clip_high": 4.0}), Choice("decoupled")),
    (Choice("cispo", {"clip_high": 4.0}), Choice("bypass", {"token_mask": None})),
    (Choice("gmpo", {"clip_low": 1.5}), Choice("bypass")),
    (Choice("dppo_tv", {"truncate": 3.0}), Choice("bypass")),
    (Choice("dppo_tv", {"truncate": 10.0}), Choice("decoupled")),
    (Choice("ppo"), Choice("decoupled", {"truncate": 5.0, "token_mask": None})),
    (Choice("ppo"), Choice("decoupled", {"truncate": 9.0, "scope": "trajectory"})),
    (Choice("ppo", {"clip_high": 4.0}), Choice("kept", {"scope": None, "decay": 0.5})),
]


@pytest.mark.parametrize(("loss", "correction"), ACTING)
def test_a_bound_that_acts_is_not(loss: Choice, correction: Choice) -> None:
    assert Combination(loss, correction, minibatches=2, staleness=2).problems() == []


def test_a_clip_beside_a_ratio_of_one_is_refused_by_its_name() -> None:
    (found,) = Combination(Choice("ppo", {"clip_high": 0.28}), Choice("decoupled")).problems()
    assert "algorithm.loss.clip_high would never act" in found
    assert Combination(Choice("ppo", {"clip_high": 0.28}), Choice("decoupled"), minibatches=4).problems() == []


def test_a_truncation_beside_a_ratio_of_one_is_refused_and_a_bound_on_probabilities_is_not() -> None:
    (found,) = Combination(Choice("dppo_tv", {"truncate": 2.0, "threshold": 0.1}), Choice("decoupled")).problems()
    assert ": algorithm.loss.truncate would never act" in found
    assert Combination(Choice("dppo_tv", {"threshold": 0.1}), Choice("decoupled")).problems() == []


def test_a_kept_policy_needs_no_second_minibatch() -> None:
    # π is not p at a batch's only step: the policy moved since, so a clip or a ratio of its own acts.
    for loss in (Choice("ppo", {"clip_high": 0.28}), Choice("gspo"), Choice("dppo_tv", {"truncate": 2.0})):
        assert Combination(loss, Choice("kept")).problems() == []
        assert Combination(loss, Choice("decoupled")).problems()


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2.0])
def test_an_average_needs_a_decay_between_0_and_1(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.correction\.decay"):
        settings.load(None, ["--algorithm.correction", "kept", "--algorithm.correction.decay", str(decay)])


def test_the_constant_belongs_to_its_aggregation() -> None:
    (found,) = Combination(Choice("ppo"), Choice("bypass"), aggregation="constant", episode_tokens=2560).problems()
    assert "needs algorithm.constant" in found
    assert "2560" in found
    (found,) = Combination(Choice("ppo"), Choice("bypass"), constant=100).problems()
    assert "is a setting of algorithm.aggregation = 'constant'" in found
    assert Combination(Choice("ppo"), Choice("bypass"), aggregation="constant", constant=100).problems() == []


def test_what_is_known_by_name_is_so() -> None:
    for kind in LOSSES.builtin():
        assert ("old_logprobs_T" not in LOSSES.takes(Choice(kind))) == (kind in WITHOUT_RATIO)
    assert set(LOSSES.builtin()) >= IN_RATIO
    for kind in CORRECTIONS.builtin():
        assert CORRECTIONS.options(Choice(kind))["token_mask"] == TOKEN_MASK
    assert LOSSES.options(Choice("ppo")).items() >= CLIP.items()


# --- where the settings are read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--algorithm.loss", "reinforce"], "set algorithm.correction.kind = 'importance'"),
        (["--algorithm.loss", "gspo", "--algorithm.correction", "decoupled"], "'gspo' would be 'reinforce'"),
        (["--algorithm.correction", "decoupled", "--algorithm.correction.scope", "none"], "nothing corrects"),
        (["--algorithm.correction", "log_linear"], "set rollout.max_staleness to 2 or more"),
        (["--algorithm.correction", "importance"], "would count twice"),
        (["--algorithm.aggregation", "constant"], "for example to the most tokens that an episode may sample, 2560"),
    ],
)
def test_the_settings_are_refused_with_what_to_set(flags: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings.load(None, flags)
    table: dict[str, Any] = {"algorithm": {"loss": "ppo", "correction": "importance"}}
    with pytest.raises(ValueError, match="count twice"):
        TrainConfig.model_validate(table)


@pytest.mark.parametrize(
    "flags",
    [
        ["--algorithm.loss", "reinforce", "--rollout.mode", "sync"],
        ["--algorithm.loss", "reinforce", "--algorithm.correction", "importance"],
        ["--algorithm.correction", "log_linear", "--rollout.max_staleness", "4"],
        ["--algorithm.loss", "gspo", "--algorithm.aggregation", "episode", "--algorithm.mask", "geometric"],
        ["--algorithm.aggregation", "constant", "--algorithm.constant", "2560"],
        ["--algorithm.correction", "decoupled", "--algorithm.correction.scope", "none", "--learner.minibatches", "4"],
    ],
)
def test_other_settings_are_not(flags: list[str]) -> None:
    settings.load(None, flags)


def scattered(logprobs_T: Any, episodes_T: Any, *, bound: float = 1.0) -> Any:
    """A loss that takes tokens' places without saying what it has to see."""
    raise AssertionError("never called")


def test_a_function_that_would_see_pieces_of_a_sequence_is_refused_when_the_settings_are_read() -> None:
    with pytest.raises(ConfigError, match="needs all tokens of an episode at once: declare it with"):
        settings.load(None, ["--algorithm.loss", "tests.algorithms.test_combinations:scattered"])


def test_the_settings_are_read_without_torch() -> None:
    code = (
        "import sys; from areal_agents import settings; "
        "settings.load(None, ['--algorithm.loss', 'gspo', '--algorithm.mask', 'm2po']); print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("own", "weight", "said"),
    [
        ({}, {}, None), ({"truncate": 5.0}, {"truncate": 5.0}, None), ({"truncate": None}, {"truncate": None}, None),
        ({}, {"truncate": 2.0}, None), ({}, {"truncate": 5.0}, "= 2 caps .* algorithm.correction.truncate = 5 those"),
        ({"truncate": 5.0}, {}, "= 5 caps .* algorithm.correction.truncate = 2 those"),
        ({}, {"truncate": None}, "= 2 caps .* algorithm.correction.truncate = none those"),
    ],
)  # fmt: skip
def test_opob_has_its_least_variance_for_the_weights_of_the_gradient(
    own: dict[str, Any], weight: dict[str, Any], said: str | None
) -> None:
    correction = Choice("importance", {"scope": "trajectory", "token_mask": None, **weight})
    found = Combination(Choice("reinforce"), correction, advantage=Choice("opob", own), staleness=2).problems()
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0])
    assert Combination(Choice("reinforce"), correction, advantage=Choice("grpo"), staleness=2).problems() == []
    of_tokens = Choice("importance", {"truncate": 3.0})  # no cap on the weight of a trajectory
    assert Combination(Choice("reinforce"), of_tokens, advantage=Choice("opob", own), staleness=2).problems() == []


def test_the_cap_that_both_have_by_default() -> None:
    caps = {inspect.signature(f).parameters["truncate"].default for f in (opob, importance)}
    assert caps == {CAP}
