"""The verdict on one answer, computed in this process.

``pool.py`` calls it in processes that can be killed: some inputs take long.
"""

from __future__ import annotations

from collections.abc import Sequence

from areal_agents.rewards.mathematics import compare
from areal_agents.rewards.mathematics.choices import choice
from areal_agents.rewards.mathematics.dates import when
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.extract import Slot, bare, extract, gold_answer
from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verdict import MathVerdict


def verify(
    gold: str | Sequence[str], pred: str, *, slot: Slot = "answer", options: Options | None = None
) -> MathVerdict:
    """Compare the answer in a slot of ``pred`` with one or several gold answers.

    Args:
        gold: the right answer, or several of which one suffices.
        pred: what the model wrote.
        slot: where in it the answer stands.
        options: what counts as equal beyond exact mathematics.
    """
    options = options or Options()
    golds = [gold] if isinstance(gold, str) else list(gold)
    answer = extract(pred, slot)
    if answer is None:
        return MathVerdict("no_answer", f"nothing in the slot {slot!r}")
    try:
        said = compare.readings(answer, options)
        problem = ""
    except ParseError as error:
        said, problem = [], "" if choice(answer) is not None else str(error)
    errors = []
    for text in golds:
        wanted = gold_answer(text)
        if answer in (wanted, bare(text)):
            return MathVerdict("ok")
        if options.dates:
            right_time = when(wanted)
            if right_time is None:
                errors.append(f"the gold answer {wanted[:80]!r} is no date and no time of day")
            elif right_time == when(answer):
                return MathVerdict("ok")
            continue
        if _same_choice(wanted, answer, options):
            return MathVerdict("ok")
        if choice(wanted) is not None and choice(answer) is not None:
            continue
        try:
            right = compare.readings(wanted, options)
        except ParseError as error:
            if choice(wanted) is not None:
                continue
            errors.append(f"the gold answer {wanted[:80]!r} cannot be read: {error}")
            continue
        if any(compare.equal_nodes(g, a, options) for g in right for a in said):
            return MathVerdict("ok")
    if len(errors) == len(golds):
        return MathVerdict("gold_error", errors[0])
    if problem:
        return MathVerdict("parse_error", f"the answer {answer[:80]!r} cannot be read: {problem}")
    return MathVerdict("wrong", f"{answer[:80]!r} is not {gold_answer(golds[0])[:80]!r}")


def _same_choice(gold: str, answer: str, options: Options) -> bool:
    """Say whether one of the two is a choice that the other one names, by its letter or by its text."""
    left, right = choice(gold), choice(answer)
    if left is None and right is None:
        return False
    if left is not None and right is not None:
        return left[0] == right[0] and (not left[1] or not right[1] or _same(left[1], right[1], options))
    mine, other = (left, answer) if left is not None else (right, gold)
    return mine is not None and bool(mine[1]) and _same(mine[1], other, options)


def _same(gold: str, answer: str, options: Options) -> bool:
    try:
        left, right = compare.readings(bare(gold), options), compare.readings(bare(answer), options)
    except ParseError:
        return False
    return any(compare.equal_nodes(g, a, options) for g in left for a in right)
