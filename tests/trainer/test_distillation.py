"""Batches that a teacher gives credit to and whose rewards pay for a divergence, and a run that distils."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_agents.algorithms.batch import Batch
from areal_agents.algorithms.registry import Choice
from areal_agents.errors import ConfigError, ModelError
from areal_agents.learner.learner import TorchLearner
from areal_agents.settings.config import AlgorithmConfig, TrainConfig
from areal_agents.settings.critic import CriticConfig
from areal_agents.settings.kl import KlConfig
from areal_agents.settings.teacher import TeacherConfig
from areal_agents.tracking.tracker import read_metrics
from areal_agents.trainer.batches import batch_for, batch_of
from areal_agents.trainer.credit import credit_metrics
from areal_agents.trainer.loop import train
from areal_agents.trainer.preflight import require_runnable
from areal_agents.trainer.teacher import require_teacher
from areal_agents.types import AssistantMessage, Completion, Group, Ids, Task, Trajectory, Turn
from tests.learner.test_learner import learner, one_thread, run
from tests.learner.test_reference import nudged
from tests.tiny_models import forward_logprobs, save_tiny, tiny_chat_model, tiny_model
from tests.tiny_tokenizer import tiny
from tests.trainer.test_learning import config

__all__ = ["one_thread"]  # a fixture
TASK = Task.make("t", split="train", seed=0, payload={})
SHOWN: list[list[Ids]] = [[(1, 2, 3), (6, 7)], [(1, 2, 3), (6,), (7, 7)], [(5, 6)], [(5, 6)]]
SAID: list[list[Ids]] = [[(4, 5), (8,)], [(9, 10), (11, 12), (13,)], [(20, 21, 22)], [(30,)]]
REWARDS = [[0.5, 1.0], [0.25, 0.0, -1.0], [1.0], [0.0]]


def episode(i: int, *, cut: bool = False) -> Trajectory:
    """Number 1 forks: its last turn has turn 0 as its parent."""
    turns = []
    for k, (shown, said, reward) in enumerate(zip(SHOWN[i], SAID[i], REWARDS[i], strict=True)):
        mu = tuple(-1.0 - 0.1 * j - 0.01 * k for j in range(len(said)))
        parent = None if k == 0 else 0
        turns.append(
            Turn(shown, Completion(said, mu, (0,) * len(said), "stop"), AssistantMessage(()), reward, parent=parent)
        )
    return Trajectory(f"e{i}", TASK, "g", tuple(turns), not cut, cut, "max_turns" if cut else "answer")


EPISODES = [episode(0), episode(1), episode(2), episode(3, cut=True)]
GROUPS = [Group("g", TASK, (EPISODES[0], EPISODES[1]), 0, 0), Group("h", TASK, (EPISODES[2], EPISODES[3]), 0, 1)]


def slow(model: Any, temperature: float) -> list[list[list[float]]]:
    """log π of each sampled token, [T_k] a turn an episode: one forward of transformers for each token's own prefix."""
    out = []
    for i, t in enumerate(EPISODES):
        turns = []
        for k, turn in enumerate(t.turns):
            before = () if turn.parent is None else SHOWN[i][0] + SAID[i][0]
            ids = before + SHOWN[i][k] + SAID[i][k]
            turns.append(forward_logprobs(model, ids, temperature)[-len(SAID[i][k]) :].tolist())
        out.append(turns)
    return out


def advantages(batch: Batch, name: str = "") -> list[list[list[float]]]:
    out: list[list[list[float]]] = [[[] for _ in t.turns] for t in EPISODES]
    for row in batch.rows:
        numbers = row.columns[name] if name else row.advantages
        for k in set(row.turns[row.mask].tolist()):
            out[row.episode][k] = numbers[row.turns == k].tolist()
    return out


def saved(folder: Path, model: Any) -> Path:
    tiny().save_pretrained(folder)
    return save_tiny(folder, model)


def taught(folder: Path, **changes: Any) -> AlgorithmConfig:
    return AlgorithmConfig(teacher=TeacherConfig(model=str(folder), **changes))


@pytest.mark.parametrize("rewards", [True, False])
def test_each_tokens_advantage_is_that_of_a_slow_loop(tmp_path: Path, rewards: bool) -> None:
    """At the batch's temperature, from a teacher whose vocabulary is padded."""
    model, other = tiny_model(), nudged(tiny_model())
    other.resize_token_embeddings(104, mean_resizing=False)
    a = taught(saved(tmp_path / "teacher", other), coef=0.5, rewards=rewards)
    made = learner(model, tmp_path / "m", algorithm=a)
    batch = run(made, lambda it: batch_for(it, GROUPS, a, temperature=0.7))
    plain = advantages(batch_of(GROUPS, AlgorithmConfig(), 0, 0.7))
    # the padded rows are part of the teacher's softmax, in the slow loop too
    for i, of_episode in enumerate(slow(other, 0.7)):
        for k, of_turn in enumerate(of_episode):
            mu = EPISODES[i].turns[k].completion.logprobs
            want = [0.5 * (x - m) + (plain[i][k][0] if rewards else 0.0) for x, m in zip(of_turn, mu, strict=True)]
            assert advantages(batch)[i][k] == pytest.approx(want, abs=1e-5)
            assert advantages(batch, "teacher")[i][k] == pytest.approx(of_turn, abs=1e-5)
    assert max(abs(x) for e in advantages(batch) for t in e for x in t) > 0.1


def test_a_masked_episode_gets_no_credit_and_an_unknown_token_none_from_there_on(tmp_path: Path) -> None:
    model = tiny_model()
    small = tiny_model(vocab_size=22)  # knows the ids under 22: not 22, nor 30
    a = taught(saved(tmp_path / "teacher", small), rewards=False)
    made = learner(model, tmp_path / "m", algorithm=a.model_copy(update={"overlong": "mask"}))

    async def both(it: TorchLearner) -> tuple[Batch, Batch]:
        masked = await batch_for(it, GROUPS, it.algorithm, temperature=1.0)
        return masked, await batch_for(it, GROUPS, a, temperature=1.0)

    masked, kept = run(made, both)
    found = advantages(kept)
    assert found[2][0][2] == 0.0
    assert 0.0 not in found[2][0][:2]
    assert np.isnan(advantages(kept, "teacher")[2][0]).tolist() == [False, False, True]
    assert np.isnan(advantages(kept, "teacher")[3][0]).tolist() == [True]
    small_too = taught(saved(tmp_path / "whole", nudged(model)), rewards=False)
    again = learner(model, tmp_path / "m", algorithm=small_too.model_copy(update={"overlong": "mask"}))
    masked = run(again, lambda it: batch_for(it, GROUPS, it.algorithm, temperature=1.0))
    assert advantages(masked)[3] == [[0.0]]
    assert 0.0 not in advantages(masked)[2][0]


def test_a_learner_without_a_teacher_or_a_reference_says_so(tmp_path: Path) -> None:
    made = learner(tiny_model(), tmp_path / "m")

    async def ask(it: TorchLearner) -> None:
        batch = batch_of(GROUPS, AlgorithmConfig(), 0, 1.0)
        with pytest.raises(ConfigError, match=r"no teacher to ask: set algorithm\.teacher\.model"):
            await it.teacher(batch)
        with pytest.raises(ConfigError, match=r"no reference policy to ask: set algorithm\.kl\.coef"):
            await it.reference(batch)

    run(made, ask)
    with pytest.raises(ModelError, match="does not exist"):
        learner(tiny_model(), tmp_path / "m", algorithm=taught(tmp_path / "nowhere"))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_rewards_pay_for_the_divergence_before_the_estimator(tmp_path: Path, kind: Any) -> None:
    model = tiny_model()
    a = AlgorithmConfig(
        advantage=Choice("grpo", {"normalize": False}), kl=KlConfig(coef=0.3, place="reward", estimator=kind)
    )
    made = learner(model, tmp_path / "m", algorithm=a)

    async def job(it: TorchLearner) -> Any:
        batch = await batch_for(it, GROUPS, a, temperature=0.7)
        with pytest.raises(ValueError, match="the batch has no log π of the reference policy"):
            await it.step(batch_of(GROUPS, a, 0, 0.7))
        return batch, await it.step(batch)

    batch, metrics = run(made, job)
    returns, gaps = [], []
    for t, of_episode in zip(EPISODES, slow(model, 0.7), strict=True):
        total = 0.0
        for turn, ref in zip(t.turns, of_episode, strict=True):
            for m, r in zip(turn.completion.logprobs, ref, strict=True):
                gaps.append(m - r)
                k3 = math.exp(r - m) - 1 + m - r
                total -= 0.3 * {"k1": m - r, "k2": (m - r) ** 2 / 2, "k3": k3}[kind]
            total += turn.reward
        returns.append(total)
    found = advantages(batch)
    for i, j in ((0, 1), (2, 3)):
        mean = (returns[i] + returns[j]) / 2
        for turn_of in found[i]:
            assert turn_of == pytest.approx([returns[i] - mean] * len(turn_of), abs=1e-4)
    assert metrics["kl_reference"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert metrics["kl_reference_k3"] == pytest.approx(sum(math.exp(-g) - 1 + g for g in gaps) / len(gaps), abs=1e-4)
    assert metrics["kl_coef"] == 0.3
    assert metrics["tokens_forward"] > 2 * 15, "the reference's tokens count"
    assert [t.reward for t in EPISODES] == [1.5, -0.75, 1.0, 0.0], "what is saved is the environment's"


def test_pay_and_a_critic_go_together_and_the_coefficient_adapts(tmp_path: Path) -> None:
    model = tiny_model()
    a = AlgorithmConfig(
        advantage=Choice("gae"), critic=CriticConfig(kind="trunk"),
        kl=KlConfig(coef=0.5, place="reward", target=1e-3, horizon=4),
    )  # fmt: skip
    assert a.kl.estimator == "k1"
    made = learner(model, tmp_path / "m", algorithm=a)

    async def job(it: TorchLearner) -> list[Any]:
        batch = await batch_for(it, GROUPS, a, temperature=1.0)
        metrics = await it.step(batch)
        _, coef = await it.reference(batch)
        await it.save(tmp_path / "saved")
        return [batch, metrics, coef]

    batch, metrics, coef = run(made, job)
    raw, ref = 0.5, slow(model, 1.0)[0]
    paid = [0.5 * (m - r) for m, r in zip(EPISODES[0].turns[0].completion.logprobs, ref[0], strict=True)]
    value = advantages(batch, "values")[0][0]
    after = 1.0 - 0.5 * (EPISODES[0].turns[1].completion.logprobs[0] - ref[1][0])
    want = [-paid[0] - paid[1] + raw + after - value[0], -paid[1] + raw + after - value[1]]
    assert advantages(batch)[0][0] == pytest.approx(want, abs=1e-4)
    up = 1.0 + 0.2 * (1 if metrics["kl_reference"] > 1e-3 else -1)
    assert coef == pytest.approx(0.5 * up)

    async def resumed(it: TorchLearner) -> float:
        await it.load(tmp_path / "saved")
        return (await it.reference(Batch(batch.rows, batch.episodes, 1, 1.0)))[1]

    assert run(learner(model, tmp_path / "m", algorithm=a), resumed) == pytest.approx(0.5 * up)
    assert "groups_without_signal" not in credit_metrics(GROUPS, a)


def test_one_teacher_and_pay_together(tmp_path: Path) -> None:
    """Both are asked for one batch, and the credit comes on top of what the paid rewards give."""
    model, other = tiny_model(), nudged(tiny_model())
    folder = saved(tmp_path / "teacher", other)
    kl = KlConfig(coef=0.3, place="reward")
    both = AlgorithmConfig(kl=kl, teacher=TeacherConfig(model=str(folder)))
    made = learner(model, tmp_path / "m", algorithm=both)

    async def job(it: TorchLearner) -> Any:
        paid = await batch_for(it, GROUPS, AlgorithmConfig(kl=kl), temperature=1.0)
        return paid, await batch_for(it, GROUPS, both, temperature=1.0)

    paid, found = run(made, job)
    for row, plain in zip(found.rows, paid.rows, strict=True):
        gap = (row.columns["teacher"] - row.logprobs)[row.mask]
        assert row.advantages[row.mask] == pytest.approx(plain.advantages[plain.mask] + gap, abs=1e-5)
        assert np.array_equal(row.columns["reference"], plain.columns["reference"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": {"kl": {"place": "reward"}}}, r"place = 'reward' does nothing while algorithm\.kl\.coef is 0"),
    (
        {"algorithm": {"kl": {"place": "reward", "coef": 0.1, "estimator": "k3_unbiased"}}},
        "corrects the gradient of a term in the loss",
    ),
    (
        {"algorithm": {"kl": {"place": "reward", "coef": 0.1}}, "rollout": {"dynamic_sampling": True}},
        "what their tokens pay gives every group one",
    ),
    ({"algorithm": {"teacher": {"coef": 0.5}}}, r"algorithm\.teacher\.coef = 0\.5 without a teacher"),
    ({"algorithm": {"teacher": {"url": "http://x/v1"}}}, r"algorithm\.teacher\.url = .* without a teacher"),
    ({"algorithm": {"teacher": {"model": "t", "timeout": 3}}}, r"timeout = 3\.0 is a server's"),
    ({"algorithm": {"teacher": {"model": "t", "tokenizer": "f"}}}, r"tokenizer = 'f' is a server's"),
    (
        {"algorithm": {"teacher": {"model": "t", "url": "http://x/v1"}}, "rollout": {"temperature": 0.7}},
        r"rollout\.temperature = 0\.7: a server's log-probabilities of prompts are at temperature 1",
    ),
    (
        {"algorithm": {"teacher": {"model": "t", "rewards": False}}, "rollout": {"dynamic_sampling": True}},
        "the teacher gives every group one",
    ),
    (
        {"algorithm": {"teacher": {"model": "t", "rewards": False}, "kl": {"place": "reward", "coef": 0.1}}},
        r"leaves the rewards out, and algorithm\.kl\.place = 'reward' changes nothing else",
    ),
    (
        {"algorithm": {"teacher": {"model": "t", "rewards": False}, "advantage": "gae", "critic": {"kind": "trunk"}}},
        "the critic has nothing to value",
    ),
    (
        {"algorithm": {"teacher": {"model": "t", "rewards": False}, "normalize": "batch"}},
        "normalises nothing else",
    ),
    (
        {"algorithm": {"teacher": {"model": "t", "rewards": False}, "advantage": "remax"}},
        "plays greedy episodes, and with",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "why"), REFUSED, ids=[w[:24] for _, w in REFUSED])
def test_what_cannot_do_what_it_says_is_refused(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        require_runnable(
            TrainConfig.model_validate({"env": {"id": "tests.letters_env:Letters"}, "eval": {"n": 8}, **tree})
        )


def test_what_may_be_combined() -> None:
    for algorithm in (
        {"teacher": {"model": "t"}, "kl": {"coef": 0.1}, "entropy": 0.01},
        {"teacher": {"model": "t", "rewards": False}, "kl": {"coef": 0.1, "estimator": "k3"}},
        {"teacher": {"model": "t", "url": "http://x/v1"}, "advantage": "gae", "critic": {"kind": "own"}},
        {"kl": {"place": "reward", "coef": 0.1, "estimator": "k3", "target": 0.1, "refresh": 5}},
    ):
        TrainConfig.model_validate({"algorithm": algorithm})
    mixed = {"algorithm": {"teacher": {"model": "t"}}, "rollout": {"dynamic_sampling": True}}
    TrainConfig.model_validate(mixed)  # by the rewards alone


def letters_teacher(folder: Path) -> Path:
    """The tiny student's own kind, trained by cross-entropy to answer in letters whatever it is shown."""
    tiny_chat_model(folder, seed=5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    letters = [tokenizer.encode(c, add_special_tokens=False)[0] for c in "abcdefghijklmnopqrstuvwxyz"]
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.zeros(len(tokenizer)).index_fill(0, torch.tensor(letters), 1 / len(letters))
    for _ in range(60):
        ids = torch.randint(0, len(tokenizer), (8, 24), generator=rng)
        loss = -(torch.log_softmax(model(ids).logits, -1) * target).sum(-1).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def distilling(tmp_path: Path, *, steps: int, **teacher: Any) -> TrainConfig:
    c = config(tmp_path)
    folder = tmp_path / "teacher"
    if not folder.exists():
        letters_teacher(folder)
    tree = c.model_dump(mode="json") | {"steps": steps}
    tree["algorithm"] = {"teacher": {"model": str(folder), **teacher}}
    tree["learner"]["lr"] = 1e-2
    tree["eval"] |= {"baseline": False, "n": 2}
    return TrainConfig.model_validate(tree)


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_alone_and_a_run_goes_on(tmp_path: Path) -> None:
    c = distilling(tmp_path, steps=6, rewards=False)
    asyncio.run(train(c, console=False))
    c = c.model_copy(update={"steps": 13})
    asyncio.run(train(c, resume=True, console=False))
    rows = read_metrics(c.out, kind="train")
    assert [r["step"] for r in rows] == list(range(1, 14))
    first, last = rows[:3], rows[-3:]
    assert sum(r["teacher_kl"] for r in last) < 0.5 * sum(r["teacher_kl"] for r in first)
    assert sum(r["reward"] for r in last) - sum(r["reward"] for r in first) > 3 * 0.2
    assert {"teacher_kl/turn_0", "teacher_kl/turn_1", "teacher_unscored"} <= rows[0].keys()
    assert rows[0]["teacher_unscored"] == 0.0
    assert "groups_without_signal" not in rows[0]
    changed = TrainConfig.model_validate({**c.model_dump(), "algorithm": {}})
    with pytest.raises(ConfigError, match=r"algorithm\.teacher\.model was .*; step 13 used it"):
        asyncio.run(train(changed, resume=True, console=False))


def test_a_teacher_of_another_tokenizer_or_a_short_context_is_refused_first(tmp_path: Path) -> None:
    c = distilling(tmp_path, steps=1)
    asyncio.run(require_teacher(c))
    folder = tmp_path / "teacher"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"1 tokens differ, as '<extra>', which is no token of the student and id"):
        asyncio.run(train(c, console=False))
    assert not c.out.exists(), "nothing was begun"
    AutoTokenizer.from_pretrained(c.model.path).save_pretrained(folder)
    longer = c.model_copy(update={"model": c.model.model_copy(update={"max_context": 513})})
    with pytest.raises(ConfigError, match=r"has a context of 512 tokens, under model\.max_context = 513"):
        asyncio.run(require_teacher(longer))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"algorithm\.teacher\.model: no tokenizer in"):
        asyncio.run(require_teacher(c))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"algorithm\.teacher\.model: .* lacks a tokenizer"):
        asyncio.run(require_teacher(c))
