"""Whole fine-tunings of a tiny model: what they learn, leave behind, refuse, and how they go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from areal_agents.chat.format import ChatFormat
from areal_agents.errors import ArealError, CheckpointError, ConfigError, Interrupted
from areal_agents.evaluation.curves import first_panel, read_numbers
from areal_agents.finetune.config import DpoConfig, SftConfig
from areal_agents.finetune.data import load_examples
from areal_agents.finetune.learner import FinetuneLearner
from areal_agents.finetune.run import FinetuneResult, _Run, batch_of, finetune
from areal_agents.learner.forward import load_model
from areal_agents.tracking.tracker import read_metrics
from areal_agents.types import user
from tests import doc_blocks
from tests.finetune.world import chat, dpo, jsonl, record, run_folder, sft, turn
from tests.learner_data import row_logprobs
from tests.tiny_models import tiny_chat_model

TALK = [("the quick", "brown fox"), ("jumps over", "the lazy dog"), ("lazy", "dog"), ("fox", "quick"), ("dog", "over")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("tiny") / "model")


def done(config: SftConfig | DpoConfig, **more: Any) -> FinetuneResult:
    return asyncio.run(finetune(config, console=False, **more))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@contextlib.contextmanager
def stopped_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process gets a SIGINT when that many steps are done. It may hear of it one step later."""
    usual = FinetuneLearner._stepped

    def stepped(self: FinetuneLearner, *args: Any) -> dict[str, float]:
        found = usual(self, *args)
        if self.version == steps:
            signal.raise_signal(signal.SIGINT)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneLearner, "_stepped", stepped)
        yield


@torch.no_grad()
def answer(folder: Path, question: str) -> str:
    fmt, model = ChatFormat.load(folder), load_model(folder)
    ids = list(fmt.first_prompt([user(question)]))
    start = len(ids)
    while len(ids) < start + 12 and ids[-1] not in fmt.stop_ids:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(fmt.tokenizer.decode(ids[start:]))


def test_a_model_imitates_what_it_is_shown(tmp_path: Path, model: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", *(chat(*pair) for pair in TALK[:3]))
    result = done(sft(data, model, tmp_path / "out", epochs=60, batch=3, lr=5e-3))
    rows = read_metrics(result.out, kind="sft")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["loss"] == pytest.approx(math.log(len(ChatFormat.load(model).tokenizer)), rel=0.1)
    assert rows[-1]["loss"] < 0.1
    for question, said in TALK[:3]:
        assert answer(result.model, question) == f"{said}<|im_end|>"
    assert (result.steps, result.holdout, result.table()) == (60, (), "60 steps; nothing was held out")
    settings = json.loads((result.out / "finetune.json").read_text())
    assert (settings["train"], settings["sources"][0]["taken"]) == (3, 3)


def test_the_first_loss_is_that_of_a_plain_forward(tmp_path: Path, model: Path) -> None:
    run = run_folder(tmp_path / "run", [record(f"g0/{i}", turn(c, 1.0)) for i, c in enumerate(("fox", "the dog"))])
    result = done(sft(run, model, tmp_path / "out", batch=2))
    plain, fmt = load_model(model), ChatFormat.load(model)
    from areal_agents.finetune.episodes import run_examples
    from areal_agents.finetune.examples import Limits

    found, _ = run_examples(run, sft(run, model, tmp_path), fmt, Limits(256, 1000))
    total = -sum(float(row_logprobs(plain, row, 1.0).detach().sum()) for e in found for row in e.said.rows)
    (row,) = read_metrics(result.out, kind="sft")
    assert row["loss"] == pytest.approx(total / sum(e.said.tokens for e in found), rel=1e-5)


def test_the_held_out_loss_is_measured_and_not_learned(tmp_path: Path, model: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", *(chat(*pair) for pair in TALK), chat(*TALK[0]))  # one question twice
    result = done(sft(data, model, tmp_path / "out", epochs=4, batch=2, holdout=0.2, lr=3e-3, eval_every=3))
    settings = json.loads((result.out / "finetune.json").read_text())
    assert (settings["train"], settings["holdout"]) in ((5, 1), (4, 2))
    steps = 4 * math.ceil(settings["train"] / 2)
    assert [step for step, _ in result.holdout] == sorted({0, *range(3, steps + 1, 3), steps})
    assert result.table().splitlines()[0] == "step  held-out loss"
    assert read_metrics(result.out, kind="sft")[-1]["loss"] < result.holdout[0][1]["loss"]
    curve = first_panel(read_numbers([result.out])).curves[0]
    assert [p.value for p in curve.held_out] == [values["loss"] for _, values in result.holdout]
    assert [p.value for p in curve.training] == [row["loss"] for row in read_metrics(result.out, kind="sft")]
    again = done(sft(data, model, tmp_path / "other", epochs=4, batch=2, holdout=0.2, lr=3e-3, seed=5))
    assert again.holdout[0] != result.holdout[0]


def test_the_held_out_loss_is_a_mean_over_its_targets(tmp_path: Path, model: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", *(chat(*pair) for pair in TALK))
    config = sft(data, model, tmp_path / "out", batch=8, holdout=0.4)
    plain, held = load_model(model), load_examples(config, model).holdout
    total = -sum(float(row_logprobs(plain, row, 1.0).detach().sum()) for e in held for row in e.said.rows)
    step, found = done(config).holdout[0]
    assert (step, len(held)) == (0, 2)
    assert found["loss"] == pytest.approx(total / sum(e.said.tokens for e in held), rel=1e-5)


def test_a_format_that_the_processor_computes_in_software_is_told(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("areal_agents.utils.precision.cpu_flags", lambda: frozenset({"avx2"}))
    data = jsonl(tmp_path / "d.jsonl", chat(*TALK[0]))
    for precision, times in (("bf16", 1), ("auto", 0)):
        config = sft(data, model, tmp_path / precision, precision=precision, device="cpu")
        asyncio.run(finetune(config))
        assert capsys.readouterr().out.count("note: --precision is bf16, which this processor computes in") == times
        events = (tmp_path / precision / "events.jsonl").read_text()
        assert events.count('"kind": "slow_format"') == times


def test_a_stop_before_the_first_step_measures_once(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jsonl(tmp_path / "d.jsonl", *(chat(*pair) for pair in TALK))
    config = sft(data, model, tmp_path / "out", holdout=0.4)
    usual = _Run._measure

    async def measured(self: _Run) -> None:
        await usual(self)
        signal.raise_signal(signal.SIGINT)
        while not self.stop.requested:  # noqa: ASYNC110  # the signal is heard by the loop
            await asyncio.sleep(0)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_measure", measured)
        with pytest.raises(Interrupted, match="step 0 is saved"):
            done(config)
    assert [step for step, _ in done(config, resume=True).holdout] == [0, 1]


def test_preferences_are_learned(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": q, "chosen": a, "rejected": b} for (q, a), (_, b) in pairwise(TALK)]
    data = jsonl(tmp_path / "d.jsonl", *rows)
    result = done(dpo(data, model, tmp_path / "out", epochs=15, batch=3, lr=5e-3, holdout=0.25))
    found = read_metrics(result.out, kind="dpo")
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert found[0]["margin"] == pytest.approx(0.0, abs=1e-4)
    assert found[-1]["loss"] < 0.2
    documented = doc_blocks.first_cells(doc_blocks.section("docs/sft.md", "Metrics, stop, go on"))
    assert sorted(documented) == sorted(found[0].keys() - {"kind", "step", "time"})
    assert (found[-1]["accuracy"], found[-1]["margin"] > 1) == (1.0, True)
    assert set(result.holdout[0][1]) == {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected"}
    assert result.holdout[0][1]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_going_on_is_as_if_never_stopped(
    method: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "sft":
        data, make = jsonl(tmp_path / "d.jsonl", *(chat(*pair) for pair in TALK)), sft
    else:
        rows = [{"prompt": q, "chosen": a, "rejected": b} for (q, a), (_, b) in pairwise(TALK)]
        data, make = jsonl(tmp_path / "d.jsonl", *rows), dpo  # type: ignore[assignment]
    same = {"epochs": 4, "batch": 2, "holdout": 0.3, "lr": 1e-3, "schedule": "cosine", "warmup_steps": 2, "threads": 1}
    whole = done(make(data, model, tmp_path / "whole", **same))
    rates = [row["lr"] for row in read_metrics(whole.out, kind=method)]
    said = rf"step [34] is saved.*\n  areal-agents {method} --out"
    with stopped_after(3, monkeypatch), pytest.raises(Interrupted, match=said):
        done(make(data, model, tmp_path / "parts", **same))
    parts = done(make(data, model, tmp_path / "parts", **same, save_every=1), resume=True)
    for name, tensor in weights(whole.model).items():
        assert torch.equal(weights(parts.model)[name], tensor), name
    done_share = [math.pi * x / (len(rates) - 2) for x in range(len(rates) - 2)]
    assert rates == pytest.approx([5e-4, 1e-3, *(1e-3 * (1 + math.cos(x)) / 2 for x in done_share)])
    for kind in (method, "holdout"):
        a, b = (
            [{k: row.get(k) for k in ("step", "loss", "margin", "lr")} for row in read_metrics(r.out, kind=kind)]
            for r in (whole, parts)
        )
        assert a == b
    assert done(make(data, model, tmp_path / "parts", **same), resume=True).holdout == parts.holdout  # nothing is left


@pytest.mark.parametrize("make", [sft, dpo])
def test_adapters_learn_too_and_go_on(make: Any, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": q, "completion": a, "chosen": a, "rejected": b} for (q, a), (_, b) in pairwise(TALK)]
    data = jsonl(tmp_path / "d.jsonl", *rows)
    same = {"epochs": 30, "batch": 4, "lr": 2e-2, "lora_rank": 4, "lora_targets": ("q_proj", "down_proj"), "threads": 1}
    whole = done(make(data, model, tmp_path / "whole", **same))
    losses = [row["loss"] for row in read_metrics(whole.out, kind=make.__name__)]
    assert losses[-1] < 0.9 * losses[0]
    base, trained = weights(model), weights(whole.model)
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, base[name].to(tensor.dtype))}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"q_proj", "down_proj"}
    assert (whole.model / "adapter" / "adapter_config.json").is_file()
    with stopped_after(7, monkeypatch), pytest.raises(Interrupted):
        done(make(data, model, tmp_path / "parts", **same))
    parts = done(make(data, model, tmp_path / "parts", **same), resume=True)
    assert all(torch.equal(weights(parts.model)[name], tensor) for name, tensor in trained.items())


def test_a_start_that_failed_leaves_nothing(tmp_path: Path, model: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", {"text": "x"}, chat("a", "b" * 600))
    with pytest.raises(ConfigError) as refused:
        done(sft(data, model, tmp_path / "out"))
    assert "there is nothing to train on" in str(refused.value)
    assert "neither messages nor completion" in str(refused.value)
    assert "more than --max-context 256" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_is_refused(tmp_path: Path, model: Path) -> None:
    data = jsonl(tmp_path / "d.jsonl", *(chat(*pair) for pair in TALK))
    out = tmp_path / "out"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": []}\n{"mess\n')
    many: list[tuple[SftConfig | DpoConfig, str]] = [
        (sft(tmp_path / "none.jsonl", model, out), "none.jsonl does not exist: name a run's folder, or a JSONL file"),
        (sft(tmp_path, model, out), r"holds neither config.toml nor report.json"),
        (sft(broken, model, out), "broken.jsonl, line 2, is no JSON"),
        (sft(data, model, out, max_context=513), "--max-context is 513.*takes 512 tokens at most"),
        (sft(data, model, out, holdout=0.99), "--holdout is 0.99, and the data has 5 tasks: nothing would be left"),
        (sft(data, model, out, warmup_steps=9), "--warmup-steps is 9, and the training has 1 steps"),
        (sft(data, model, out, threads=9999), "--threads = 9999 exceeds the .* cores of this process"),
        (sft(data, model, out, min_reward=1.0), "--min-reward chooses among a run's episodes, and .*d.jsonl is no run"),
        (sft(data, model, out, per_task=2), "--per-task chooses among a run's episodes"),
        (sft(data, model, out, last_step=3), "--steps chooses among a run's episodes"),
        (dpo(data, model, out, pairs=2), "--pairs chooses among a run's episodes"),
        (dpo(data, model, out), "it has no chosen and no rejected.*areal-agents sft"),
    ]
    for config, said in many:
        with pytest.raises(ArealError, match=said):
            done(config)
        assert not out.exists(), said


def test_a_folder_that_holds_a_training(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(tmp_path / "d.jsonl", *(chat(*pair) for pair in TALK))
    config = sft(data, model, tmp_path / "out", epochs=5)
    with stopped_after(1, monkeypatch), pytest.raises(Interrupted):
        done(config)
    with pytest.raises(ConfigError, match="holds another run: go on with it by --resume"):
        done(config)
    with pytest.raises(ConfigError, match=r"--lr was 2e-05 and is 0.001 now\n.*areal-agents sft --out .* --resume"):
        done(config.model_copy(update={"lr": 1e-3}), resume=True)
    jsonl(data, chat("other", "data"))
    with pytest.raises(ConfigError, match="no longer what it was begun with"):
        done(config, resume=True)


def test_a_reference_of_other_data_is_refused(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jsonl(tmp_path / "d.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    config = dpo(data, model, tmp_path / "out", epochs=3)
    with stopped_after(1, monkeypatch), pytest.raises(Interrupted):
        done(config)
    whole = (tmp_path / "out" / "reference.npz").read_bytes()
    for broken in (b"no", b"", whole[: len(whole) // 2], whole.replace(b"NUMPY", b"NUMBY")):
        (tmp_path / "out" / "reference.npz").write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"reference.npz cannot be read"):
            done(config, resume=True)


def test_settings_of_adapters_are_refused_when_they_are_read(tmp_path: Path, model: Path) -> None:
    for settings, said in (
        ({"lora_targets": ("q_proj",)}, "set --lora-rank"),
        ({"lora_alpha": 8.0}, "set --lora-rank"),
    ):
        with pytest.raises(ValueError, match=said):
            sft(tmp_path, model, tmp_path, **settings)
    with pytest.raises(ValueError, match="--lora-targets has an empty name"):
        sft(tmp_path, model, tmp_path, lora_rank=4, lora_targets=("q_proj", ""))


def test_an_epoch_visits_everything_once() -> None:
    items = list(range(10))
    epochs = [[i for step in range(4 * e, 4 * e + 4) for i in batch_of(items, step, batch=3, seed=1)] for e in (0, 1)]
    assert [sorted(e) for e in epochs] == [items, items]
    assert epochs[0] != epochs[1]
    assert [len(batch_of(items, step, batch=3, seed=1)) for step in range(5)] == [3, 3, 3, 1, 3]
