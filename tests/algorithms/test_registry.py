"""Algorithms by name: ours, those of an installed package, ``module:function``; and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_agents import settings
from areal_agents.algorithms import advantages, losses, offpolicy
from areal_agents.algorithms.episode_view import EpisodeView
from areal_agents.algorithms.estimator import Estimator, per_turn
from areal_agents.algorithms.objective import Denominators, PolicyObjective, Tokens
from areal_agents.algorithms.offpolicy_stats import OffPolicyStats
from areal_agents.algorithms.registry import ADVANTAGES, CORRECTIONS, LOSSES, REGISTRIES, Choice
from areal_agents.errors import ConfigError
from areal_agents.settings.catalogue import algorithms_text
from areal_agents.settings.config import AlgorithmConfig

PACKAGE = """
from typing import Annotated

import torch
from pydantic import Field

from areal_agents.algorithms.losses import LossTerms
from areal_agents.algorithms.offpolicy import Correction

def last_turn(group, *, scale: Annotated[float, Field(gt=0)] = 1.0, shift: float):
    return [torch.tensor([0.0] * (len(e.rewards_K) - 1) + [scale * e.rewards_K[-1] + shift]) for e in group]

def linear(logprobs_T, old_logprobs_T, advantages_T, *, factor: float = 1.0):
    return LossTerms(-factor * advantages_T * (logprobs_T - old_logprobs_T), torch.zeros_like(advantages_T).bool())

def both(proximal_T, logprobs_T):
    return Correction(torch.exp(proximal_T - logprobs_T.detach()), torch.ones_like(proximal_T).bool())

def one_too_many(group):
    return [torch.zeros(len(e.rewards_K) + 1) for e in group]

def untyped(group, *, gamma=1.0):
    return []

def misnamed(rewards):
    return []
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that brings an estimator, a loss and a correction, and a second one that is broken."""
    install(tmp_path, "acme_algo", PACKAGE, {
        "areal_agents.advantages": "last_turn = acme_algo:last_turn\nlong = acme_algo:one_too_many\n"
        "untyped = acme_algo:untyped\nmisnamed = acme_algo:misnamed\n",
        "areal_agents.losses": "linear = acme_algo:linear\n",
        "areal_agents.corrections": "both = acme_algo:both\n",
    })  # fmt: skip
    install(tmp_path, "acme_broken", "raise OSError('disk on fire')", {
        "areal_agents.advantages": "burning = acme_broken:f\n",
    })  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_algo", raising=False)


def install(folder: Path, name: str, code: str, groups: dict[str, str]) -> None:
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{lines}" for group, lines in groups.items()))


OURS = [
    "turn_return", "grpo", "dr_grpo", "rloo", "reinforce_pp", "remax", "opo", "opob", "pass_at_k", "maxrl", "kevin",
    "gigpo", "mt_grpo", "grpo_process", "gae", "turn_gae", "bilevel_gae",
]  # fmt: skip


def test_ours() -> None:
    assert ADVANTAGES.names() == OURS
    assert ADVANTAGES.function("grpo") is advantages.grpo
    assert ADVANTAGES.options(Choice("turn_return")) == {"gamma": 1.0}
    assert LOSSES.function("ppo") is losses.ppo
    assert LOSSES.options(Choice("ppo")) == {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
    assert CORRECTIONS.function("bypass") is offpolicy.bypass
    assert CORRECTIONS.takes(Choice("bypass")) == ("logprobs_T", "behaviour_T")
    assert CORRECTIONS.takes(Choice("decoupled")) == ("proximal_T", "behaviour_T", "episodes_T", "turns_T")
    assert CORRECTIONS.options(Choice("decoupled")) == {"scope": "token", "truncate": None, "token_mask": (0.5, 5.0)}


def test_every_parameter_of_ours_is_explained_and_has_a_default() -> None:
    for registry in REGISTRIES.values():
        for kind in registry.names():
            for name, info in registry.parameters(kind).model_fields.items():
                assert info.description, f"{registry.key}.{name} of {kind}"
                assert not info.is_required()


def test_choosing_ours_imports_nothing() -> None:
    code = (
        "import sys; from areal_agents import settings; "
        "settings.load(None, ['--algorithm.advantage', 'grpo']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == "False\n"


def test_equal_choices_are_equal_whether_a_default_was_said_or_not() -> None:
    said = settings.load(None, ["--algorithm.advantage.gamma", "1", "--algorithm.loss.clip_high", "0.3"])
    assert said.algorithm == AlgorithmConfig(loss=Choice("ppo", {"clip_high": 0.3}))


def test_a_name_takes_the_place_of_the_whole_table_and_a_kind_does_not(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[algorithm.advantage]\nkind = "grpo"\nnormalize = false\n')
    assert settings.load(file).algorithm.advantage == Choice("grpo", {"normalize": False})
    assert settings.load(file, ["--algorithm.advantage", "turn_return"]).algorithm.advantage == Choice("turn_return")
    with pytest.raises(ConfigError, match="normalize belongs to kind = 'grpo' or 'kevin' or"):
        settings.load(file, ["--algorithm.advantage.kind", "turn_return"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--algorithm.advantage", "otb"], r"algorithm.advantage.kind = 'otb': no such advantage estimator; there are "
         r"turn_return, grpo.* \(--algorithm.advantage\)"),
        (["--algorithm.advantage=gropo"], r"did you mean 'grpo'\? \(or give module:function\)"),
        (["--algorithm.advantage.gama", "1"], r"gama is no parameter of algorithm.advantage.kind = 'turn_return', "
         r"which has gamma: did you mean gamma\?"),
        (["--algorithm.advantage.gamma", "2"], r"algorithm.advantage.gamma = 2 \(--algorithm.advantage.gamma\): "
         r"expected a number, at least 0, at most 1"),
        (["--algorithm.advantage.gamma", "true"], r"algorithm.advantage.gamma = True"),
        (["--algorithm.advantage.gamma"], r"needs a value: a number"),
        (["--algorithm.advantage"], r"--algorithm.advantage needs a value: one of 'turn_return', 'grpo'"),
        (["--algorithm.correction.token_mask", "[2, 3]"], r"the bounds \[2.0, 3.0\] must enclose 1"),
        (["--algorithm.loss.dual_clip", "1"], r"algorithm.loss.dual_clip = 1 .*more than 1"),
        (["--algorithm.advantage", "math:sin"], r"an algorithm is a Python function"),
        (["--algorithm.advantage", "math:nothing"], r"math:nothing cannot be imported: AttributeError"),
        (["--algorithm.advantage", "nowhere:f"], r"nowhere:f cannot be imported: ModuleNotFoundError"),
        (["--algorithm.advantage", "math:pi"], r"is float pi: an algorithm is a Python function"),
    ],
)  # fmt: skip
def test_refused_when_the_settings_are_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(None, overrides)


@pytest.mark.usefixtures("package")
def test_a_package_brings_its_own() -> None:
    assert ADVANTAGES.names() == [*OURS, "burning", "last_turn", "long", "misnamed", "untyped"]
    c = settings.load(None, [
        "--algorithm.advantage", "last_turn", "--algorithm.advantage.shift", "0.5", "--algorithm.advantage.scale", "2",
        "--algorithm.loss", "linear", "--algorithm.correction", "both",
    ]).algorithm  # fmt: skip
    assert c.advantage == Choice("last_turn", {"scale": 2.0, "shift": 0.5})
    found = Estimator(c.advantage)([EpisodeView((1.0, 3.0)), EpisodeView((1.0,))])
    assert [per_turn(a) for a in found] == [[0.0, 6.5], [2.5]]
    assert CORRECTIONS.takes(c.correction) == ("proximal_T", "logprobs_T")
    assert "--algorithm.advantage.shift  (a number)" in algorithms_text()
    assert "disk on fire" in algorithms_text()


def test_the_list_of_algorithms() -> None:
    text = algorithms_text()
    assert "[algorithm.loss]\n  ppo          Compute the clipped PPO loss" in text
    assert "    --algorithm.correction.token_mask  (a list of 2 numbers, or none; default: [0.5, 5.0])\n" in text
    assert "2402.03300" not in text
    one = algorithms_text("grpo")
    assert one.startswith("[algorithm.advantage]\n  grpo\n  Compare each episode")
    assert "2402.03300" in one
    assert "turn_return" not in one
    with pytest.raises(ConfigError, match=r"there is no algorithm 'otb': there are turn_return, grpo, .*ppo, .*bypass"):
        algorithms_text("otb")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("last_turn", "algorithm.advantage.shift is missing: this algorithm has no default for it"),
        ("burning", "acme_broken:f cannot be imported: OSError: disk on fire"),
        ("untyped", "its parameter 'gamma' needs a type hint"),
        ("misnamed", r"takes \(rewards\): an algorithm of algorithm.advantage takes one of \(group, groups\)"),
    ],
)
def test_a_packages_mistakes_are_told_when_the_settings_are_read(kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(None, ["--algorithm.advantage", kind])


@pytest.mark.usefixtures("package")
def test_a_name_that_two_packages_use_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "acme_twin", PACKAGE, {"areal_agents.losses": "linear = acme_twin:linear\n"})
    with pytest.raises(ConfigError, match="several packages use that name: acme_algo:linear, acme_twin:linear"):
        settings.load(None, ["--algorithm.loss", "linear"])


@pytest.mark.usefixtures("package")
def test_ours_keep_their_names(tmp_path: Path) -> None:
    install(tmp_path, "acme_thief", PACKAGE, {"areal_agents.advantages": "grpo = acme_thief:last_turn\n"})
    with pytest.raises(ConfigError, match="acme_thief:last_turn uses a name of ours"):
        settings.load(None, ["--algorithm.advantage", "grpo"])


@pytest.mark.parametrize("value", [3, None, [1]])
def test_what_is_no_choice_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"(algorithm|advantage|Choice)"):
        AlgorithmConfig(advantage=value)


def test_bound_parameters_reach_the_function() -> None:
    one = torch.zeros(1)
    loss = LOSSES.bound(Choice("ppo", {"clip_high": 0.5}))(torch.ones(1), one, torch.ones(1))
    assert loss.loss_T.tolist() == [-1.5]


# --- foreign functions -----------------------------------------------------------------------------------------------

FOREIGN = """
from __future__ import annotations
import functools, math
from enum import Enum
from typing import TYPE_CHECKING, Any
import torch
from areal_agents.algorithms.losses import LossTerms
from areal_agents.algorithms.offpolicy import Correction
if TYPE_CHECKING:
    from nowhere import Group

class Mode(Enum):
    A = 1

def late_hint(group: Group, *, gamma: float = 1.0): return [torch.zeros(len(e.rewards_K)) for e in group]
def bad_hint(group, *, gamma: Group = 1.0): ...
def called_kind(group, *, kind: str = "grpo"): ...
def called_copy(group, *, copy: bool = True): ...
def infinite(group, *, bound: float = math.inf): ...
def wrong(group, *, scale: float = None): ...
def enum(group, *, mode: Mode = Mode.A): ...
def anything(group, *, x: Any = None): ...
def inside(group, *, pair: tuple[float | None, ...] = (None, 1.0)): ...
async def later(group): ...
def rows(group): yield
def any_names(*args, **kwargs): ...
def by_position(group, /): ...
part = functools.partial(late_hint)

def numbers(group): return [[0.0] * len(e.rewards_K) for e in group]
def too_long(group): return [torch.zeros(len(e.rewards_K) + 1) for e in group]
def nan(group): return [torch.full((len(e.rewards_K),), math.nan) for e in group]
def with_gradient(group): return [torch.zeros(len(e.rewards_K), dtype=torch.float64, requires_grad=True) for e in group]

def pair(logprobs_T, old_logprobs_T, advantages_T): return -logprobs_T, advantages_T > 9
def scalar(logprobs_T, old_logprobs_T, advantages_T): return LossTerms(-logprobs_T.mean(), advantages_T > 9)
def cut_off(logprobs_T, old_logprobs_T, advantages_T): return LossTerms(-logprobs_T.detach(), advantages_T > 9)
def no_policy(old_logprobs_T, advantages_T): ...
def both(group, groups): ...
def blind(logprobs_T, episodes_T): return LossTerms(-logprobs_T, episodes_T > 9)

def attached(logprobs_T, behaviour_T): return Correction(torch.exp(logprobs_T - behaviour_T), behaviour_T < 9)
def one_weight(behaviour_T): return Correction(torch.ones(1), behaviour_T < 9)
def masked_nan(behaviour_T): return Correction(torch.full_like(behaviour_T, math.nan), behaviour_T > 9)
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_algo.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_algo", raising=False)


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("advantage", "bad_hint", "its type hints cannot be read: NameError"),
        ("advantage", "called_kind", "a parameter cannot be called 'kind': rename it"),
        ("advantage", "called_copy", "a parameter cannot be called 'copy': rename it"),
        ("advantage", "infinite", "the default bound = inf could not be set: Input should be a finite number"),
        ("advantage", "wrong", "the default scale = None could not be set: Input should be a valid number"),
        ("advantage", "enum", "the default mode = .* cannot be written in a file"),
        ("advantage", "anything", "'x' needs a type hint that says what may be set"),
        ("advantage", "inside", "the default pair = .* cannot be written in a file"),
        ("advantage", "later", "a plain function that returns its result"),
        ("advantage", "rows", "a plain function that returns its result"),
        ("advantage", "any_names", r"takes \(args, kwargs\)"),
        ("advantage", "by_position", "is an argument by position alone"),
        ("advantage", "part", "is partial part: an algorithm is a Python function"),
        ("advantage", "Mode", "an algorithm is a Python function"),
        ("advantage", "both", r"takes \(group, groups\): .* takes one of \(group, groups\)"),
        ("loss", "no_policy", r"takes \(old_logprobs_T, advantages_T\): .* \(logprobs_T always\)"),
    ],
)
def test_what_a_signature_shows_is_refused_when_the_settings_are_read(key: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.load(None, [f"--algorithm.{key}", f"foreign_algo:{name}"])


@pytest.mark.usefixtures("foreign")
def test_a_hint_that_is_not_needed_may_be_unknown() -> None:
    choice = settings.load(None, ["--algorithm.advantage=foreign_algo:late_hint"]).algorithm.advantage
    assert [per_turn(a) for a in Estimator(choice)([EpisodeView((1.0,))])] == [[0.0]]


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("numbers", "expected a list of tensors, one an episode"),
        ("too_long", r"advantages of shapes \[\(3,\), \(2,\)\]: expected one number a turn, \[\(2,\), \(1,\)\]"),
        ("nan", "returned an advantage that is not finite"),
    ],
)
def test_an_estimator_that_returns_something_else_is_refused_on_its_trial(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Estimator(Choice(f"foreign_algo:{name}"))


@pytest.mark.usefixtures("foreign")
def test_advantages_become_plain_float32() -> None:
    (found,) = Estimator(Choice("foreign_algo:with_gradient"))([EpisodeView((1.0,))])
    assert isinstance(found, Tensor)
    assert (found.dtype, found.requires_grad) == (torch.float32, False)


def objective(loss: str = "ppo", correction: str = "bypass") -> PolicyObjective:
    return PolicyObjective(loss=Choice(loss), correction=Choice(correction), aggregation="token")


@pytest.mark.usefixtures("foreign")
@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"loss": "foreign_algo:pair"}, "returned tuple: expected LossTerms"),
        ({"loss": "foreign_algo:scalar"}, r"returned loss_T = a tensor \[\] of torch.float32: expected numbers"),
        ({"loss": "foreign_algo:cut_off"}, "without a gradient: nothing would be learned"),
        ({"loss": "foreign_algo:blind"}, r'declare it with @sees\("episode"\)'),
        ({"correction": "foreign_algo:one_weight"}, r"returned weight_T = a tensor \[1\]"),
    ],
)
def test_a_loss_or_correction_that_returns_something_else_is_refused_on_its_trial(
    chosen: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        objective(**chosen)


def gradient(made: PolicyObjective, ratios: list[float]) -> list[float]:
    """Of the mean loss over tokens with π/μ = ``ratios``, A = 1 and log μ = −1."""
    n = len(ratios)
    behaviour_T = torch.full((n,), -1.0)
    logprobs_T = (behaviour_T + torch.tensor(ratios).log()).requires_grad_()
    zeros_T = torch.zeros(n, dtype=torch.int64)
    tokens = Tokens(zeros_T, behaviour_T, torch.ones(n), zeros_T, zeros_T, zeros_T, behaviour_T)
    made(logprobs_T, tokens, Denominators(n, torch.tensor([n]), 1), OffPolicyStats(), version=0).backward()  # type: ignore[no-untyped-call]
    assert logprobs_T.grad is not None
    return logprobs_T.grad.tolist()


@pytest.mark.usefixtures("foreign")
def test_a_weight_carries_no_gradient_and_a_masked_token_adds_nothing() -> None:
    # ppo with A = 1 and r = 1: dL/dlogπ = −r·A = −1, times the weight 1, over 2 tokens
    assert gradient(objective(correction="foreign_algo:attached"), [1.0, 1.0]) == pytest.approx([-0.5, -0.5])
    assert gradient(objective(correction="foreign_algo:masked_nan"), [1.0, 1.0]) == [0.0, 0.0]


def test_the_default_mask_drops_what_is_five_times_likelier() -> None:
    # ratios 0.4 and 6 lie outside [0.5, 5]; r = 1.5 is clipped at 1.2 (A > 0); r = 1 is not
    assert gradient(objective(), [0.4, 6.0, 1.5, 1.0]) == pytest.approx([0.0, 0.0, 0.0, -0.25])


def test_a_table_without_a_kind_keeps_the_defaults_kind(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[algorithm.advantage]\ngamma = 0.5\n")
    assert settings.load(tmp_path / "a.toml").algorithm.advantage == Choice("turn_return", {"gamma": 0.5})


def test_python_reads_what_it_writes() -> None:
    made = AlgorithmConfig(advantage=Choice("grpo", {"normalize": False}), correction=Choice("decoupled"))
    table = made.model_dump()
    assert table["advantage"] == {"kind": "grpo", "normalize": False}
    assert table["correction"] == {"kind": "decoupled", "scope": "token", "truncate": None, "token_mask": (0.5, 5.0)}
    assert AlgorithmConfig.model_validate(table) == made
    assert AlgorithmConfig.model_validate_json(made.model_dump_json()) == made
    for wrong in ({"gamma": 1.0}, {"kind": 3}):
        with pytest.raises(ValueError, match="needs a kind: one of turn_return, grpo"):
            AlgorithmConfig.model_validate({"advantage": wrong})


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0"])
def test_a_clip_is_positive_and_finite(value: str) -> None:
    with pytest.raises(ConfigError, match=r"algorithm.loss.clip_low = .*: expected a number, more than 0"):
        settings.load(None, ["--algorithm.loss.clip-low", value])
    with pytest.raises(ConfigError, match="clip_low"):
        LOSSES.options(Choice("ppo", {"clip_low": float(value)}))


def test_a_name_does_not_erase_an_earlier_flag() -> None:
    with pytest.raises(ConfigError, match=r"--algorithm.advantage takes the place of the whole table, --algorithm"):
        settings.load(None, ["--algorithm.advantage.normalize=false", "--algorithm.advantage=grpo"])


@pytest.mark.usefixtures("package")
def test_a_package_that_takes_the_defaults_name_is_refused_at_once(tmp_path: Path) -> None:
    install(tmp_path, "acme_default", PACKAGE, {"areal_agents.losses": "ppo = acme_default:linear\n"})
    with pytest.raises(ConfigError, match="acme_default:linear uses a name of ours"):
        settings.load(None)


@pytest.mark.usefixtures("package")
def test_a_package_that_exits_costs_only_itself(tmp_path: Path) -> None:
    install(tmp_path, "acme_exit", "import sys\nsys.exit(0)", {"areal_agents.losses": "leaving = acme_exit:f\n"})
    assert "acme_exit:f cannot be imported: RuntimeError: it called sys.exit(0)" in algorithms_text()
    with pytest.raises(ConfigError, match=r"acme_exit:f cannot be imported: RuntimeError: it called sys\.exit\(0\)"):
        settings.load(None, ["--algorithm.loss", "leaving"])
    with pytest.raises(ConfigError, match=r"unknown setting learner.lrr .*did you mean learner.lr\b"):
        settings.load(None, ["--learner.lrr", "3"])


@pytest.mark.usefixtures("package")
def test_an_entry_point_may_name_a_method(tmp_path: Path) -> None:
    code = "import torch\nclass A:\n  @staticmethod\n  def f(group):\n"
    code += "    return [torch.ones(len(e.rewards_K)) for e in group]"
    install(tmp_path, "acme_method", code, {"areal_agents.advantages": "method = acme_method:A.f\n"})
    (found,) = Estimator(Choice("method"))([EpisodeView((1.0, 2.0))])
    assert per_turn(found) == [1.0, 1.0]
