"""Tree attention against transformers' own, per model family; the chunked head against autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from areal_agents.errors import ModelError
from areal_agents.learner import forward
from areal_agents.learner.forward import Decoder, Scores, load_model
from areal_agents.learner.packing import Ints, pack_rows
from areal_agents.learner.tree_attention import TREE
from tests.tiny_models import save_tiny, tiny_model


def rows_with_shared_prefixes(vocabulary: int = 96) -> list[Ints]:
    rng = np.random.default_rng(0)
    prompt, turn = rng.integers(0, vocabulary, 20), rng.integers(0, vocabulary, 18)
    tails = [rng.integers(0, vocabulary, n) for n in (1, 5, 9, 30)]
    return [np.concatenate([prompt, turn, t]) for t in tails[:2]] + [np.concatenate([prompt, t]) for t in tails[2:]]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_tree_attention_gives_the_models_own_hidden_states_and_gradients(kind: str) -> None:
    model, reference = tiny_model(kind), tiny_model(kind)
    decoder = Decoder(model, torch.float32)
    assert decoder.shared
    assert model.config._attn_implementation == TREE
    rows = rows_with_shared_prefixes()
    (pack,) = pack_rows(rows, token_budget=1000)
    assert [len(s.path) for s in pack.segments].count(2) == 2, "three levels: prompt, turn, tail"
    assert pack.tokens == 20 + 18 + 1 + 5 + 9 + 30
    hidden = decoder.hidden(pack)
    weights = torch.linspace(-1, 1, hidden.shape[1])
    loss = torch.zeros(())
    for i, at in zip(pack.rows, pack.at, strict=True):
        expected = reference.base_model(torch.from_numpy(rows[i])[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(hidden[at], expected, atol=1e-5, rtol=1e-4)
        loss = loss + ((hidden[at] - 2 * expected) @ weights).square().sum()
    torch.autograd.backward(loss)
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    # d/dx and d/dy of (x - 2y)² at x = y: the reference's gradient is -2 times ours.
    for name, parameter in reference.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            torch.testing.assert_close(-2 * ours[name], parameter.grad, atol=1e-5 * max(scale, 1.0), rtol=1e-3)


def test_the_padded_layout_gives_the_same_hidden_states() -> None:
    model = tiny_model()
    decoder = Decoder(model, torch.float32)
    rows = rows_with_shared_prefixes()
    (tree,) = pack_rows(rows, token_budget=1000)
    (padded,) = pack_rows(rows, token_budget=1000, shared=False)
    with torch.no_grad():
        shared = decoder.hidden(tree)
        model.set_attn_implementation("sdpa")
        plain = decoder.hidden(padded)
    places = dict(zip(tree.rows, tree.at, strict=True))
    for i, at in zip(padded.rows, padded.at, strict=True):
        torch.testing.assert_close(plain[at], shared[places[i]], atol=1e-5, rtol=1e-4)


def test_what_the_probe_copied_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    probe = Decoder._probe

    def probed(self: Decoder) -> None:
        probe(self)
        done.append("probed")

    monkeypatch.setattr(Decoder, "_probe", probed)
    monkeypatch.setattr(forward, "trim", lambda: done.append("given back"))
    assert Decoder(tiny_model(), torch.bfloat16).shared
    assert done == ["probed", "given back"]


def test_the_heads_first_gradient_is_the_products_own_and_further_ones_are_added() -> None:
    head, hidden = nn.Linear(2, 3, bias=True), torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    for expected in (1.0, 2.0, 3.0):
        Scores(hidden, head, torch.tensor([2, 0]), 1.0, torch.bfloat16).backward(torch.tensor([1.0, -2.0]))
        assert head.weight.grad is not None
        assert head.weight.grad.dtype == torch.float32
        if expected == 1.0:
            once = head.weight.grad.clone()
        torch.testing.assert_close(head.weight.grad, expected * once)
    assert head.bias.grad is not None
    torch.testing.assert_close(head.bias.grad.sum(), torch.zeros(()), atol=1e-5, rtol=0.0)


def test_a_sliding_window_keeps_the_padded_layout() -> None:
    decoder = Decoder(tiny_model("mistral", sliding_window=4), torch.float32)
    assert not decoder.shared
    assert decoder.model.config._attn_implementation == "sdpa"


def test_logits_that_are_not_a_linear_head_are_refused() -> None:
    config = transformers.CohereConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.25,
    )
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="computes its logits in a way"):
        Decoder(transformers.CohereForCausalLM(config).eval(), torch.float32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_and_their_folder_is(tmp_path: Path, number: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = number
        model.model.norm.weight[0] = number
    save_tiny(tmp_path / "broken", model)
    with pytest.raises(
        ModelError, match=r"no finite numbers .* in 2 tensors, first 'model\.layers\.1\.mlp\.up_proj"
    ) as it:
        Decoder(load_model(tmp_path / "broken"), torch.float32)
    assert str(tmp_path / "broken") in str(it.value)
    assert "computes its logits" not in str(it.value)


def test_a_model_that_overflows_is_not_blamed_on_its_weights() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(ModelError, match="no finite numbers, from weights that are"):
        Decoder(model, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_their_gradients_are_autograds(bias: bool, temperature: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 11, bias=bias)
    hidden, targets = torch.randn(6, 8, requires_grad=True), torch.tensor([0, 10, 3, 3, 7, 1])
    coefficients = torch.randn(6)
    expected = torch.log_softmax(head(hidden) / temperature, dim=-1)[torch.arange(6), targets]
    torch.autograd.backward((expected * coefficients).sum())
    wanted: dict[str, Any] = {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}
    head.zero_grad(set_to_none=True)
    grads = []
    for part in (slice(0, 4), slice(4, 6)):
        scores = Scores(hidden[part], head, targets[part], temperature, torch.float32)
        torch.testing.assert_close(scores.logprobs_T, expected[part].detach(), atol=1e-6, rtol=1e-5)
        grads.append(scores.backward(coefficients[part]))
    torch.testing.assert_close(torch.cat(grads), hidden.grad, atol=1e-6, rtol=1e-5)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], atol=1e-6, rtol=1e-5)


def test_scores_hand_worked() -> None:
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [float(np.log(3.0))]]))
    # Logits 0 and log 3: probabilities 1/4 and 3/4. At temperature 1/2 they are 1/10 and 9/10.
    ones = torch.ones(2, 1)
    found = Scores(ones, head, torch.tensor([0, 1]), 1.0, torch.float32).logprobs_T
    torch.testing.assert_close(found.exp(), torch.tensor([0.25, 0.75]))
    found = Scores(ones, head, torch.tensor([0, 1]), 0.5, torch.float32).logprobs_T
    torch.testing.assert_close(found.exp(), torch.tensor([0.1, 0.9]))


def test_bf16_scores_compute_the_targets_logit_in_fp32() -> None:
    torch.manual_seed(0)
    head, hidden, targets = nn.Linear(256, 50, bias=False), torch.randn(400, 256) * 4, torch.randint(0, 50, (400,))
    exact = torch.log_softmax(hidden.bfloat16().float() @ head.weight.detach().bfloat16().float().t(), -1)
    rounded = torch.log_softmax((hidden.bfloat16() @ head.weight.detach().bfloat16().t()).float(), -1)
    wanted, naive = (x.gather(1, targets[:, None])[:, 0] for x in (exact, rounded))
    found = Scores(hidden, head, targets, 1.0, torch.bfloat16).logprobs_T
    assert float((found - wanted).abs().mean()) < 0.8 * float((naive - wanted).abs().mean())
