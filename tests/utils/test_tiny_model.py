from __future__ import annotations

from pathlib import Path

import torch

from areal_agents.chat.format import ChatFormat
from areal_agents.learner.forward import load_model
from areal_agents.types import user
from areal_agents.utils.tiny_model import tiny_model


def test_it_is_a_model_that_can_be_talked_to(tmp_path: Path) -> None:
    fmt = ChatFormat.load(tiny_model(tmp_path / "model"))
    assert fmt.history == "append"
    model = load_model(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) < 150_000
    text = "naïve 猫 <|im_end|>"
    ids = fmt.first_prompt((user(text),))
    assert fmt.tokenizer.decode(list(ids)) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(fmt.stop_ids[0]) == 1  # the one in the text is text
    assert max(ids) < model.config.vocab_size


def test_the_seed_decides_the_weights_and_touches_no_other_generator(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (load_model(tiny_model(tmp_path / str(i), seed=seed)) for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))
