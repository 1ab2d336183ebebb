"""The reward that an episode earns, and the components that explain it.

Change it here, then see what it would have done to a finished run before training again:

    areal-agents rescore runs/first --reward my_env.rubric:rubric

`areal-agents check my_env/Boxes-v0` plays policies without skill against it: none of them may earn anything, while the
gold answer and the expert must earn exactly 1.
"""

from __future__ import annotations

from areal_agents import AssistantMessage, Episode, Verdict, boxed_number

PARTIAL_CREDIT = 0.0
"""Most that an episode without the right answer can earn, in [0, 1): this times the share of the trail it followed."""

correct = boxed_number("answer")


def rubric(episode: Episode) -> Verdict:
    r"""Return 1 for the right ``\boxed{code}``, else partial credit.

    Components are logged. The score is trained on.
    """
    solved, share = correct(episode), followed(episode)
    return Verdict(max(solved, PARTIAL_CREDIT * share), {"correct": solved, "followed": share})


def followed(episode: Episode) -> float:
    """Return the share of the trail's boxes that were opened.

    The same box again counts once. Other boxes do not count.
    """
    trail = set(episode.task.payload["trail"])
    said = [m for m in episode.messages if isinstance(m, AssistantMessage)]
    opened = {
        str(call.arguments.get("label", "")).strip()
        for message in said
        for call in message.tool_calls
        if call.status == "ok" and call.name == "open_box"
    }
    return len(trail & opened) / len(trail)
