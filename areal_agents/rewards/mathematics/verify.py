"""The verdict on one answer, computed in this process.

``pool.py`` calls it in processes that can be killed: some inputs take long.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from areal_agents.rewards.mathematics import compare
from areal_agents.rewards.mathematics.canonical import words
from areal_agents.rewards.mathematics.choices import equal_choices, is_choice
from areal_agents.rewards.mathematics.dates import moment
from areal_agents.rewards.mathematics.errors import ParseError
from areal_agents.rewards.mathematics.extract import Slot, bare, extract, gold_answer
from areal_agents.rewards.mathematics.options import Options
from areal_agents.rewards.mathematics.verdict import MathVerdict
from areal_agents.rewards.mathematics.worked_out import worked_out

_GAP = re.compile(r"(?<=\d) +(?=[A-Za-z])")


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
        said, problem = [], str(error)
    if options.worked_out:
        said = [reading for reading in said if worked_out(reading)]
    errors = []
    for text in golds:
        wanted = gold_answer(text)
        if _tight(answer) in (_tight(wanted), _tight(bare(text))):
            return MathVerdict("ok")
        if options.dates:
            right_moment, said_moment = moment(wanted, options.date_order), moment(answer, options.date_order)
            if right_moment is None:
                errors.append(f"the gold answer {wanted[:80]!r} is no date and no time of day")
            elif said_moment is not None and right_moment.same(said_moment):
                return MathVerdict("ok")
            continue
        chosen = equal_choices(wanted, answer, options.choices, lambda a, b: _same(a, b, options))
        if chosen:
            return MathVerdict("ok")
        if chosen is False:
            problem = ""
            continue
        try:
            right = compare.readings(wanted, options)
        except ParseError as error:
            if not is_choice(wanted, options.choices):
                errors.append(f"the gold answer {wanted[:80]!r} cannot be read: {error}")
            continue
        if any(compare.equal_nodes(g, a, options) for g in right for a in said):
            return MathVerdict("ok")
    if len(errors) == len(golds):
        return MathVerdict("gold_error", errors[0])
    if problem:
        return MathVerdict("parse_error", f"the answer {answer[:80]!r} cannot be read: {problem}")
    return MathVerdict("wrong", f"{answer[:80]!r} is not {gold_answer(golds[0])[:80]!r}")


def _tight(text: str) -> str:
    """Write 5 m as 5m, whatever it is."""
    return _GAP.sub("", text)


def _same(gold: str, answer: str, options: Options) -> bool:
    if words(gold) == words(answer):
        return True
    try:
        left, right = compare.readings(bare(gold), options), compare.readings(bare(answer), options)
    except ParseError:
        return False
    return any(compare.equal_nodes(g, a, options) for g in left for a in right)


def look(gold: str | Sequence[str], options: Options) -> MathVerdict:
    """Say whether one of the gold answers can be read: ``ok``, or ``gold_error`` with the reason."""
    problem = "there is no gold answer"
    for text in [gold] if isinstance(gold, str) else gold:
        wanted = gold_answer(text)
        if options.dates:
            if moment(wanted, options.date_order):
                return MathVerdict("ok")
            problem = f"the gold answer {wanted[:80]!r} is no date and no time of day"
            continue
        if is_choice(wanted, options.choices):
            return MathVerdict("ok")
        try:
            compare.readings(wanted, options)
            return MathVerdict("ok")
        except ParseError as error:
            problem = f"the gold answer {wanted[:80]!r} cannot be read: {error}"
    return MathVerdict("gold_error", problem)
