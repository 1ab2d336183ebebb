"""The environment ``my_env/Boxes-v0``.

The model follows a trail of boxes with a tool, then answers with the code at its end.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence

from areal_agents import Message, Task, ToolEnv, ToolError, tool

from . import boxes
from .rubric import rubric
from .tasks import tasks_of

DEFAULT_HOPS = 2


@tool(timeout=2, parallel=True)
async def open_box(label: str) -> str:
    """Open a box and read the note in it."""
    found = boxes.note(label.strip())
    if found is None:  # shown to the model: say what would have been right
        raise ToolError(f"there is no box {label[:40]!r}: labels look like {boxes.KINDS[-1]}-0123")
    return found


class Boxes(ToolEnv):
    """Each turn opens boxes or answers. The difficulty, in [0, 1], is the length of the trail: one to three boxes."""

    system_prompt = r"Open boxes until you find the code, then answer \boxed{code}."
    tools = (open_box,)
    rubric = rubric
    max_turns = 5

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        return tasks_of(split, DEFAULT_HOPS if difficulty is None else 1 + round(2 * difficulty))

    def prompt(self, task: Task) -> str:
        return f"Start at box {task.payload['trail'][0]}. Which code is at the end of its trail?"

    @classmethod
    def expert(cls, task: Task) -> Generator[str, tuple[Message, ...], None]:
        """Demonstrate ``task`` for the warm start.

        The demonstration acts on what it observes, as the model shall.
        """
        label = task.payload["trail"][0]
        observation = yield open_call(label)
        while named := boxes.LABEL.search(observation[-1].text):
            observation = yield open_call(named.group())
        code = "".join(c for c in observation[-1].text if c.isdigit())
        yield rf"\boxed{{{code}}}"

    @classmethod
    def gold(cls, task: Task) -> str:
        """Return an answer that deserves the full reward, which the reward audit tries."""
        return rf"\boxed{{{task.payload['answer']}}}"


def open_call(label: str) -> str:
    """Return the text of a call of ``open_box``."""
    return f"<tool_call>{json.dumps({'name': 'open_box', 'arguments': {'label': label}})}</tool_call>"
