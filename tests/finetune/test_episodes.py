"""What is taken of a run's saved episodes: the tokens themselves, chosen by reward; pairs of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_agents.chat.format import ChatFormat
from areal_agents.chat.toolcalls import parse_text
from areal_agents.errors import ArealError, ConfigError
from areal_agents.finetune.episodes import run_examples, run_pairs
from areal_agents.finetune.examples import Limits
from areal_agents.tool import ToolSpec
from areal_agents.types import Completion, Image, Message, Task, Text, Turn, user
from tests.chat_families import family_tokenizer
from tests.finetune.world import dpo, fmt, record, run_folder, sft, targets, turn
from tests.saved_runs import Mixed, echo

LIMITS = Limits(256, 1000)
END = "<|im_end|>"


def chosen(folder: Path, **changes: Any) -> tuple[list[str], dict[str, int]]:
    """The answers that are imitated, and the counts of the others by a word of their reason."""
    found, tally = run_examples(folder, sft(folder, Path("m"), Path("o"), **changes), fmt(), LIMITS)
    assert tally.found == tally.taken + sum(tally.left_out.values())
    words = {word: n for reason, n in tally.left_out.items() for word in WORDS if word in reason}
    assert len(words) == len(tally.left_out), tally.left_out
    return [text.removesuffix(END) for e in found for text in targets(e.said)], words


WORDS = (
    "--min-reward", "--per-task", "same tokens", "infrastructure", "--max-context", "no turn", "images",
    "vocabulary",
)  # fmt: skip


def test_rewards_choose(tmp_path: Path) -> None:
    rows = [
        record("g0/0", turn("a", 1.0), task="t0"),
        record("g0/1", turn("b", 0.2), task="t0"),
        record("g0/2", turn("c", 0.7), task="t0"),
        record("g1/0", turn("d", 0.5), task="t1"),
        record("g1/1", turn("e", 0.1 + 0.2), task="t1"),
        record("g2/0", turn("f", 0.0), task="t2", step=2),
    ]
    run = run_folder(tmp_path / "run", rows)
    assert chosen(run) == (["a", "b", "c", "d", "e", "f"], {})
    assert chosen(run, min_reward=0.3) == (["a", "c", "d", "e"], {"--min-reward": 2})
    assert chosen(run, per_task=1) == (["a", "d", "f"], {"--per-task": 3})
    assert chosen(run, per_task=2) == (["a", "c", "d", "e", "f"], {"--per-task": 1})
    assert chosen(run, per_task=1, min_reward=0.6) == (["a"], {"--min-reward": 4, "--per-task": 1})
    assert chosen(run, last_step=1, per_task=1)[0] == ["a", "d"]
    assert chosen(run, first_step=2) == (["f"], {})
    assert chosen(run, min_reward=2.0) == ([], {"--min-reward": 6})


def test_the_seed_chooses_between_equals(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", [record(f"g0/{i}", turn(c, 1.0)) for i, c in enumerate("abcdef")])
    found = {tuple(chosen(run, per_task=2, seed=seed)[0]) for seed in range(8)}
    assert len(found) > 3
    assert chosen(run, per_task=2, seed=3) == chosen(run, per_task=2, seed=3)
    assert all(list(pair) == sorted(pair) for pair in found)  # in the order of the files


def test_one_answer_given_twice_counts_once(tmp_path: Path) -> None:
    rows = [record(f"g0/{i}", turn(c, 1.0)) for i, c in enumerate("aaab")] + [record("g1/0", turn("a", 1.0), task="u")]
    run = run_folder(tmp_path / "run", rows)
    assert chosen(run, per_task=2) == (["a", "b", "a"], {"same tokens": 2})


def test_the_kind_of_episodes(tmp_path: Path) -> None:
    rows = [record("g0/0", turn("a")), record("d/0", turn("b"), kind="demonstration")]
    run = run_folder(tmp_path / "run", rows)
    assert chosen(run)[0] == ["a"]
    assert chosen(run, kind="demonstration")[0] == ["b"]
    with pytest.raises(ArealError, match="no episodes of kind 'eval'; there are demonstration, train"):
        chosen(run, kind="eval")


def test_the_sampled_tokens_are_the_targets_whatever_their_text_would_encode_to(tmp_path: Path) -> None:
    odd = fmt().tokenizer.convert_tokens_to_ids(["t", "h", "e"])  # BPE would write one token
    assert len(fmt().encode_said("the")) == 2
    ids = (*odd, fmt().turn_end)
    done = replace(turn("the"), completion=Completion(ids, (-1.0,) * 4, (0,) * 4, "stop"))
    second = turn("so", asked="more", parent=0)
    run = run_folder(tmp_path / "run", [record("g0/0", done, second)])
    ((example,), _) = run_examples(run, sft(run, Path("m"), Path("o")), fmt(), LIMITS)
    (row,) = example.said.rows
    assert row.ids.tolist() == [*done.prompt_suffix, *ids, *second.prompt_suffix, *second.completion.ids]
    assert row.ids[row.mask].tolist() == [*ids, *second.completion.ids]
    ((last,), _) = run_examples(run, sft(run, Path("m"), Path("o"), turns="last"), fmt(), LIMITS)
    assert last.said.rows[0].ids[last.said.rows[0].mask].tolist() == list(second.completion.ids)


def test_a_cut_turn_has_no_end_to_learn(tmp_path: Path) -> None:
    ids = fmt().encode_said("brown")[:-1]
    cut = replace(turn("brown"), completion=Completion(ids, (-1.0,) * len(ids), (0,) * len(ids), "length"))
    cut = replace(cut, message=fmt().parse(ids, "length"))
    run = run_folder(tmp_path / "run", [record("g0/0", cut)])
    ((example,), _) = run_examples(run, sft(run, Path("m"), Path("o")), fmt(), LIMITS)
    assert example.said.rows[0].ids[example.said.rows[0].mask].tolist() == list(ids)


def test_what_cannot_train_is_counted(tmp_path: Path) -> None:
    image = Message("user", (Image("x.png"),))
    rows = [
        record("g0/0", turn("a")),
        record("g0/1", turn("b"), stop="error"),
        record("g0/4", turn("c", float("nan"))),
        record("g0/2"),
        record("g0/3", turn("fox " * 400)),
        record("g0/5", replace(turn("d"), observation=(image,))),
        record("g0/6", replace(turn("e"), prompt_suffix=(5, 1000))),
    ]
    counts = dict.fromkeys(("infrastructure", "no turn", "--max-context", "images", "vocabulary"), 1)
    assert chosen(run_folder(tmp_path / "run", rows)) == (["a"], counts | {"infrastructure": 2})


def test_another_tokenizers_tokens_are_refused(tmp_path: Path) -> None:
    foreign = replace(turn("the fox"), message=fmt().parse(fmt().encode_said("other words"), "stop"))
    run = run_folder(tmp_path / "run", [record("g0/0", foreign)])
    with pytest.raises(ConfigError, match=r"g0/0 was sampled with another tokenizer.*Give --model the run's own model"):
        chosen(run)


def served(text: str, asked: Message, **message: Any) -> Turn:
    """A turn of a chat server's model: a message, and no tokens."""
    return replace(
        turn("x"), prompt_suffix=(), completion=Completion((), (), (), "stop"), observation=(asked,),
        message=replace(parse_text(text), **message),
    )  # fmt: skip


def test_a_servers_episodes_are_rendered_with_the_environments_tools(
    tmp_path: Path, smollm2: Path, shared_data: Path
) -> None:
    call = '<tool_call>{"name": "echo", "arguments": {"text": "a"}}</tool_call>'
    result = Message("tool", (Text("aaaa"),), "call_0", "echo")
    first = served(f"I call.{call}", user("go"), reasoning="why")
    rows = [
        record("g0/0", first, served("done", result), kind="eval"),
        record("g0/1", first, served("cut", result, finish="length"), kind="eval"),
        record("g0/2", replace(turn("x"), completion=Completion((), (), (), "stop")), first, kind="eval"),
        record("g0/3", served(call, user("go"), tool_calls=(replace(first.message.tool_calls[0], format="glm"),)),
               kind="eval"),
    ]  # fmt: skip
    run = run_folder(tmp_path / "run", rows, env="tests.saved_runs:Mixed")
    form = ChatFormat(family_tokenizer(smollm2, shared_data / "chat_templates", "qwen3_5_think"), history="append")
    found, tally = run_examples(run, sft(run, Path("m"), Path("o")), form, Limits(2000, 100_000))
    assert (tally.taken, tally.rendered) == (2, 2)
    assert [word for reason in tally.left_out for word in ("has tokens and", "format glm") if word in reason] == [
        "has tokens and", "format glm",
    ]  # fmt: skip
    (row,) = found[0].said.rows
    whole = form.tokenizer.decode(row.ids)
    assert '"name": "echo"' in whole
    said = "I call.<tool_call>\n<function=echo>\n<parameter=text>\na\n</parameter>\n</function>\n</tool_call><|im_end|>"
    assert form.tokenizer.decode(row.ids[row.mask]) == f"why\n</think>\n\n{said}\n</think>\n\ndone<|im_end|>"
    assert form.tokenizer.decode(found[1].said.rows[0].ids[found[1].said.rows[0].mask]) == f"why\n</think>\n\n{said}"
    with pytest.raises(ConfigError, match=r"its environment, which has the tools, cannot be made"):
        chosen(run_folder(tmp_path / "other", [record("g0/0", first)], env="nowhere:Env"))


class OwnTools(Mixed):
    """Each task has its tools by itself, and the class has none."""

    tools: Sequence[ToolSpec] = ()  # type: ignore[assignment]  # Mixed has one

    def tools_of(self, task: Task) -> tuple[ToolSpec, ...]:
        return (echo,) if task.id == "with" else ()


def test_a_servers_episodes_are_rendered_with_the_tools_of_their_tasks(
    tmp_path: Path, smollm2: Path, shared_data: Path
) -> None:
    said = served("done", user("go"))
    rows = [record("g0/0", said, task="with", kind="eval"), record("g0/1", said, task="without", kind="eval")]
    run = run_folder(tmp_path / "run", rows, env="tests.finetune.test_episodes:OwnTools")
    form = ChatFormat(family_tokenizer(smollm2, shared_data / "chat_templates", "qwen3_5_think"), history="append")
    found, _ = run_examples(run, sft(run, Path("m"), Path("o")), form, Limits(2000, 100_000))
    assert ['"name": "echo"' in form.tokenizer.decode(example.said.rows[0].ids) for example in found] == [True, False]


def pairs(folder: Path, **changes: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    found, tally = run_pairs(folder, dpo(folder, Path("m"), Path("o"), **changes), fmt(), LIMITS)
    return [(targets(p.chosen)[0][0], targets(p.rejected)[0][0]) for p in found], dict(tally.left_out)


def test_pairs_are_the_best_and_the_worst_of_a_group(tmp_path: Path) -> None:
    rows = [
        *(record(f"g0/{i}", turn(c, r)) for i, (c, r) in enumerate([("a", 0.5), ("b", 1.0), ("c", 0.0), ("d", 0.9)])),
        *(record(f"g1/{i}", turn(c, r)) for i, (c, r) in enumerate([("e", 0.5), ("f", 0.55)])),
        record("g2/0", turn("g", 1.0)),
    ]
    run = run_folder(tmp_path / "run", rows)
    small = "no two rewards of the group differ by --min-gap N.N"
    assert pairs(run) == ([("b", "c")], {small: 2})
    assert pairs(run, min_gap=0.05) == ([("b", "c"), ("f", "e")], {small: 1})
    assert pairs(run, pairs=9)[0] == [("b", "c"), ("d", "a")]
    assert pairs(run, pairs=9, min_gap=0.5)[0] == [("b", "c")]


def test_equal_rewards_are_paired_by_the_seed(tmp_path: Path) -> None:
    rows = [record(f"g0/{i}", turn(c, float(c in "abc"))) for i, c in enumerate("abcdef")]
    run = run_folder(tmp_path / "run", rows)
    found = [pairs(run, seed=seed)[0][0] for seed in range(12)]
    assert all(one in "abc" and other in "def" for one, other in found)
    assert len(set(found)) > 4
    assert pairs(run, seed=5) == pairs(run, seed=5)


def test_pairs_need_one_prompt(tmp_path: Path) -> None:
    rows = [record("g0/0", turn("a", 1.0)), record("g0/1", turn("b", 0.0, asked="other"))]
    assert pairs(run_folder(tmp_path / "run", rows)) == ([], {"the group's episodes have different prompts": 1})


def test_the_same_tokens_are_no_pair(tmp_path: Path) -> None:
    """A reward of chance differs, and the loss of such a pair has no gradient."""
    rows = [record(f"g0/{i}", turn(c, r)) for i, (c, r) in enumerate((("a", 1.0), ("b", 0.5), ("c", 0.4), ("a", 0.0)))]
    found = pairs(run_folder(tmp_path / "run", rows), pairs=2)
    assert found == ([("b", "c")], {"chosen and rejected are the same tokens": 1})


def test_the_tally_says_what_happened(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", [record(f"g0/{i}", turn(c, i / 2)) for i, c in enumerate("abc")])
    _, tally = run_examples(run, sft(run, Path("m"), Path("o"), min_reward=0.5), fmt(), LIMITS)
    assert tally.lines("examples") == [
        f"{run}: 2 examples of 3 episodes",
        f"  left out 1, the first {run} step 1, g0/0: its reward is below --min-reward 0.5",
    ]
    assert np.sum(list(tally.left_out.values())) == 1
