"""The benchmark of the learner's update: its episodes, its floor, its goals, and that two sides have one gradient."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.simulated import benchmarks_on_path, module

__all__ = ["benchmarks_on_path"]

SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip


def test_the_floor_counts_every_weight_of_a_linear_layer_once_a_token() -> None:
    floor = module("learner_floor")
    body, head = floor.linears(SMOLLM2)
    # a layer: q and o 576², k and v 576·192 each, gate, up and down 576·1536 each
    assert floor.weights(body) == 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert floor.weights([head]) == 576 * 49152
    rates = {"body_seconds_a_token": 0.002, "head_seconds_a_token": 0.001, "body_cpu_seconds_a_token": 0.004}
    assert floor.floor_seconds(rates, tokens=100, scored=50) == pytest.approx(0.2 + 0.05)
    rates["head_cpu_seconds_a_token"] = 0.002
    assert floor.floor_seconds(rates, tokens=100, scored=50, of="cpu_seconds") == pytest.approx(0.4 + 0.1)
    assert all(seconds > 0 for seconds in floor.seconds_a_token([(2, 8, 16)], (4,), "fp32"))


def test_a_prompt_must_be_computed_once_a_group() -> None:
    cases, floor = module("learner_cases"), module("learner_floor")
    case = cases.Case(192, 48, 8)
    tokens = cases.random_tokens(500)
    groups = cases.episodes(case, tokens)
    assert [len(g["completions"]) for g in groups] == [8, 8]
    assert {len(c) for g in groups for c in g["completions"]} == {48}
    assert floor.least_tokens(groups) == 2 * (192 + 8 * 48)
    assert sum(groups[0]["advantages"]) == 0
    assert groups == cases.episodes(case, tokens)
    assert groups != cases.episodes(case, tokens, seed=1)
    assert len({c.name for c in cases.CASES}) == 6
    assert cases.Case(320, 80, 8) == cases.LONG


def test_prompts_are_padded_on_the_left_and_completions_on_the_right() -> None:
    found = module("learner_sides").padded([
        {"prompt": [7], "completions": [[1, 2], [3]], "advantages": [0.5, -0.5]},
        {"prompt": [8, 9], "completions": [[4]], "advantages": [1.0]},
    ])  # fmt: skip
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "prompt_ids": [[0, 7], [0, 7], [8, 9]], "prompt_mask": [[0, 1], [0, 1], [1, 1]],
        "completion_ids": [[1, 2], [3, 0], [4, 0]], "completion_mask": [[1, 1], [1, 0], [1, 0]],
        "advantages": [0.5, -0.5, 1.0],
    }  # fmt: skip


def test_a_warm_up_is_short_and_the_measured_steps_alone_are_told() -> None:
    sides = module("learner_sides")
    short = sides.cut([{"prompt": list(range(20)), "completions": [[1] * 3, [2] * 40], "advantages": [1.0, -1.0]}])
    assert short == [{"prompt": list(range(16)), "completions": [[1] * 3, [2] * 16], "advantages": [1.0, -1.0]}]
    meter = sides.Meter()
    meter.steps = [
        {"seconds": s, "cpu_seconds": 2 * s, "peak_pss_mib": m, "peak_rss_mib": m + 1}
        for s, m in ((9, 900), (2, 50), (4, 70))
    ]
    assert meter.answer(trained=3) == {
        "steps": meter.steps[1:], "seconds": 3, "cpu_seconds": 6, "peak_pss_mib": 70, "peak_rss_mib": 71, "trained": 3,
    }  # fmt: skip
    assert sides.figure("VmPeak:  5 kB\nVmHWM:  2048 kB\n", "VmHWM") == 2.0


def test_a_profile_parts_operations_by_kind() -> None:
    import torch

    sides = module("learner_sides")
    x = torch.ones(600, 600)
    found = sides.by_kind(lambda: x @ x)
    assert found["products"] > 0.5
    assert found["attention"] == found["AdamW"] == 0.0
    assert sum(found.values()) == pytest.approx(1.0, abs=0.002)
    q = torch.ones(1, 4, 200, 64)
    found = sides.by_kind(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert found["attention"] > 0.5
    assert found["products"] == 0.0


def test_our_gradient_is_the_plain_loop_s_and_another_batch_s_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = module("learner")
    sides = learner.Sides(tmp_path, 1, "", "fp32")
    asks, told = sides.ask, dict[str, Any]()

    def recorded(side: str, *asked: Any, **more: Any) -> Any:
        told[side] = asks(side, *asked, **more)
        shutil.copy(more["gradients"], tmp_path / side)
        return told[side]

    monkeypatch.setattr(sides, "ask", recorded)
    found = learner.gradients_of_small_model(sides, ("ours", "plain"))
    assert found["trained"] == {"ours": 128, "plain": 128}
    assert found["norm"] > 0
    small, own = learner.AGREE
    assert all(c.holds for c in learner.agreement(found, small))
    # ours computes each prompt once, and the log-probabilities of the sampler are no part of a step
    least = module("learner_floor").least_tokens(module("learner_cases").ragged(512))
    assert told["ours"]["tokens_forward"] == least == 40 + 66 + 25 + 62
    assert told["plain"]["tokens_forward"] == 8 * (40 + 32)

    def other(side: str, model: str, groups: list[dict[str, Any]], **more: Any) -> Any:
        if side == "ours":  # nothing of its batch is another, and it said already what its gradient is
            shutil.copy(tmp_path / side, more["gradients"])
            return told[side]
        groups[0]["advantages"][0] = -1.4
        return asks(side, model, groups, **more)

    monkeypatch.setattr(sides, "ask", other)
    found = learner.gradients_of_small_model(sides, ("ours", "plain"))
    assert found["relative_difference"]["plain"] > 1e-3
    assert not learner.agreement(found, small)[0].holds
    assert not learner.agreement(found, own)[0].holds


def row(case: Any, side: str, seconds: float, mib: float, **more: Any) -> dict[str, Any]:
    return {
        "case": case.name, "side": side, "turn": 0, "seconds": seconds, "peak_pss_mib": mib, "grad_norm": [2.0],
        "trained": case.rows * case.completion, "sampled": case.rows * case.completion,
        "row_tokens": case.rows * (case.prompt + case.completion),
        "tokens_forward": 1, "least_tokens": 1, "share_of_floor": 0.74, "share_of_own_floor": 0.8, **more,
    }  # fmt: skip


def rows_of(ours: float, trl: float) -> list[dict[str, Any]]:
    seconds, mib = {"ours": ours, "trl": trl, "plain": 5.0}, {"ours": 700.0, "trl": 1000.0, "plain": 900.0}
    return [row(c, side, seconds[side], mib[side]) for c in module("learner_cases").CASES for side in seconds]


def test_the_goals_are_those_of_the_issue() -> None:
    learner = module("learner")
    found = {c.name: c for c in learner.speed_checks(rows_of(2.0, 5.9))}
    assert not found["share of the floor, 64 + 64, G = 4"].holds
    # 2.95 times: enough where prompts are short or groups small, too little where both are large
    by_case = {n.partition("ours, ")[2]: c for n, c in found.items() if n.startswith("seconds of TRL's")}
    assert {n: (c.value, c.goal, c.holds) for n, c in by_case.items() if not c.holds} == {
        "160 + 40, G = 8": (2.95, ">= 3.0", False), "320 + 80, G = 8": (2.95, ">= 3.0", False),
    }  # fmt: skip
    lean = [
        {"side": f"{side}, {name}", "peak_pss_mib": mib}
        for name in learner.LEAN for side, mib in (("ours", 510.0), ("trl", 1000.0))
    ]  # fmt: skip
    lean.append({"side": "trl, 2 rows a micro-batch", "peak_pss_mib": 400.0})
    lean.append({"side": "trl, lora, frozen weights in bf16", "peak_pss_mib": 850.0})
    checks = {
        c.name.partition("TRL's, ")[2]: (c.value, c.goal, c.holds) for c in learner.memory_checks(rows_of(1, 2), lean)
    }
    assert checks["320 + 80, G = 8, both without checkpointing"] == (0.7, "<= 0.7", True)
    assert checks["longest case, both with checkpointing"] == (0.51, "<= 0.7", True)
    assert checks["longest case, LoRA on both sides"] == (0.51, "<= 0.5", False)
    assert checks["longest case, our LoRA, all of TRL's weights"] == (0.51, "(told, no goal)", True)
    frozen = "longest case, LoRA on both sides, TRL's frozen weights in bf16 too"
    assert checks[frozen] == (0.6, "(told, no goal)", True)
    assert checks["longest case, TRL with 2 rows a micro-batch"] == (1.75, "(told, no goal)", True)


def test_counts_and_norms_must_agree() -> None:
    learner, cases = module("learner"), module("learner_cases")
    assert all(c.holds for c in learner.counts(rows_of(1, 2)))
    rows = rows_of(1, 2)
    rows[1]["grad_norm"] = [2.3]  # 15 % longer than ours
    rows[-1]["trained"] -= 1
    wrong, apart = learner.counts(rows)
    assert (wrong.value, wrong.holds) == ([f"plain, {cases.LONG.name}"], False)
    assert (apart.value, apart.holds) == (0.15, False)


def test_growth_is_what_a_thousand_more_cost() -> None:
    learner, cases = module("learner"), module("learner_cases")
    rows = rows_of(1, 2)
    for r in rows:
        if r["case"] == cases.LONG.name:
            r |= {"seconds": r["seconds"] + 4.352, "peak_pss_mib": r["peak_pss_mib"] + 435.2}
    sizes = [
        {"side": side, "vocabulary": v, "seconds": 1 + v / 1e6, "peak_pss_mib": v / 100}
        for v in cases.VOCABULARIES for side in learner.SIDES
    ]  # fmt: skip
    # 16 rows of 400 and of 128 tokens: 4,352 more tokens
    assert learner.growth(rows, sizes)[0] == {
        "side": "ours", "s per 1,000 tokens": 1.0, "MiB per 1,000 tokens": 100.0,
        "ms per 1,000 entries": 1.0, "MiB per 1,000 entries": 10.0,
    }  # fmt: skip


def test_long_prompts_have_a_goal_of_their_own() -> None:
    trl_step = module("trl_step")
    samples = [
        {"side": side + more, "steps": [{"seconds": s, "tokens": 2000.0}], "peak_pss_mib_measured_steps": 1000.0,
         "settings": {"weights_changed": True}}
        for side, s in (("ours", 10.0), ("trl", 29.0)) for more in ("", trl_step.LONG)
    ]  # fmt: skip
    found = {c.name: (c.value, c.holds) for c in trl_step.checks(samples, goal=True)}
    assert found["seconds of TRL's step over ours (ours; its fastest setting)"] == (2.9, True)
    assert found["seconds of TRL's step over ours, long prompts, G = 8"] == (2.9, False)
    assert found["tokens sampled a step, ours over TRL's, long prompts"] == (1.0, True)
