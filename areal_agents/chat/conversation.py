"""The append-only token history of one episode, and the tree that its forks make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from areal_agents.chat.format import ChatFormat, ChatMessage, ToolLike
from areal_agents.types import AssistantMessage, Completion, Ids, Image, Message, Prompt


class Conversation:
    """The append-only token history of one episode (T1), and the tree that forks of it make (T5).

    Turns are numbered in the order in which they are sampled, over all forks of one conversation. The numbers are
    indices into ``Trajectory.turns``.

    For each turn, read ``prompt``, ``suffix`` and ``parent``, generate, and call ``add_completion``. Then call
    ``add_observation`` before the next ``prompt``.

    With ``history="template"`` every prompt is rendered anew: ``parent`` is None and ``suffix`` is the whole prompt.
    """

    def __init__(self, fmt: ChatFormat, messages: Sequence[Message], tools: Sequence[ToolLike] = ()) -> None:
        self.fmt = fmt
        self._tools = tuple(tools)
        self._turns: list[_Node] = []  # shared by all forks
        self._start(tuple(messages))

    def _start(self, messages: tuple[ChatMessage, ...]) -> None:
        self._messages = messages
        self._last = -1  # the turn that waits for an observation
        self._context: Ids = ()
        self._parent: int | None = None
        self._suffix: Ids | None = self.fmt.first_prompt(messages, self._tools)

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """Everything said so far, for people and for templates that rewrite their past."""
        return self._messages

    @property
    def waiting(self) -> bool:
        """Whether the last turn has no observation yet, so that there is no next prompt."""
        return self._suffix is None

    @property
    def last(self) -> int:
        """The turn that was said last in this conversation, -1 where it begins with the history that it was given."""
        return self._last

    @property
    def suffix(self) -> Ids:
        """The ids shown since the parent turn's last sampled token.

        They are the whole prompt where ``parent`` is None.
        """
        if self._suffix is None:
            raise ValueError("the last turn has no observation yet: call add_observation before the next prompt")
        return self._suffix

    @property
    def parent(self) -> int | None:
        """The turn whose context the next one extends, as in ``Turn.parent``."""
        return self._parent

    @property
    def prompt(self) -> Prompt:
        """The prompt to generate from now."""
        media = [p for m in self._messages for p in m.parts if isinstance(p, Image)]
        return Prompt(self._context + self.suffix, tuple(media))

    def add_completion(self, completion: Completion) -> AssistantMessage:
        """Append the sampled turn, and return what it says.

        It becomes the turn with the next index.
        """
        suffix = self.suffix
        message = self.fmt.parse(completion.ids, completion.finish, self._context + suffix, self._tools)
        self._turns.append(_Node(self._messages, self._context, self._parent, suffix, completion, message))
        self._after(len(self._turns) - 1)
        return message

    def add_observation(self, messages: Sequence[Message]) -> None:
        """Append what the environment answered.

        Raises ValueError where no sampled turn waits for an answer.
        """
        if self._suffix is not None or not self._turns:
            raise ValueError("an observation follows a completion: call add_completion first")
        self._messages += tuple(messages)
        if self.fmt.history == "template":
            self._context, self._parent = (), None
            self._suffix = self.fmt.first_prompt(self._messages, self._tools)
        else:
            self._suffix = self.fmt.suffix(messages, self._turns[self._last].completion)

    def fork(self, turn: int, *, resample: bool = False) -> Conversation:
        """Start another conversation that shares the history of ``turn`` (an index over all forks).

        By default the history ends right after the turn's completion, and ``add_observation`` comes next. The fork's
        next turn then has ``parent == turn``. With ``resample=True`` the history ends right before the completion. The
        prompt and the suffix are then the same, so the fork's next turn is a sibling of ``turn``.

        This conversation is unchanged. The built-in episode asks for a summary in a fork. Agents that branch need them
        too.
        """
        if not 0 <= turn < len(self._turns):
            raise ValueError(f"turn {turn} does not exist: this conversation has {len(self._turns)} turns")
        out = self._empty()
        if resample:
            node = self._turns[turn]
            out._messages, out._context = node.messages, node.context
            out._parent, out._suffix = node.parent, node.suffix
        else:
            out._after(turn)
        return out

    def restart(self, messages: Sequence[ChatMessage]) -> Conversation:
        """Start a fork with an edited or summarised history.

        Its next turn is a new root, a whole prompt (T5).
        """
        out = self._empty()
        out._start(tuple(messages))
        return out

    def _empty(self) -> Conversation:
        out = object.__new__(Conversation)
        out.fmt, out._tools, out._turns = self.fmt, self._tools, self._turns
        return out

    def _after(self, turn: int) -> None:
        node = self._turns[turn]
        self._messages = (*node.messages, node.message)
        self._context = node.context + node.suffix + node.completion.ids
        self._last = self._parent = turn
        self._suffix = None


@dataclass(frozen=True, slots=True)
class _Node:
    """One sampled turn and the state of its conversation right before it."""

    messages: tuple[ChatMessage, ...]
    context: Ids
    parent: int | None
    suffix: Ids
    completion: Completion
    message: AssistantMessage
