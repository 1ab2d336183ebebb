"""Checks of returned values, tasks, seeds and tokens (``areal_agents.conformance.check``).

Each check returns what it saw, or raises CheckError with the reason. Scripted episodes are compared call by call. The
same task and seed must give the same episode in another process.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium

from areal_agents.chat.options import ChatOptions
from areal_agents.conformance.scripted_episode import ScriptedEpisode, ScriptName, script_for, trace_difference
from areal_agents.errors import CheckError, TemplateError
from areal_agents.registry import EnvSpec
from areal_agents.types import Completion, Finish, Task, content_hash
from areal_agents.utils.short_text import short

if TYPE_CHECKING:
    from areal_agents.chat.format import ChatFormat

MAX_TASKS = 10_000
"""Tasks of a split that are looked at."""
PROCESS_TASKS = 256
"""Tasks of a split that are compared across processes."""
EPISODES = 4
"""Tasks of the sample. As many episodes run together."""


class Unaudited(Exception):
    """The check ran, but the environment offers nothing to measure against."""


class Skipped(Exception):
    """The check was not asked for."""


@dataclass
class Subject:
    """The environment under check, and what earlier checks already worked out."""

    spec: EnvSpec
    timeout: float
    tokenizer: str | Path | None
    chat: ChatOptions = field(default_factory=ChatOptions)
    tools: dict[str, bool] = field(default_factory=dict)
    """The tools that scripts were offered, and whether one of them called it as it must be called."""
    at_once: int = 1
    """Episodes that may play together where nothing is compared: more than one once they were seen to be isolated."""
    _sample: tuple[Task, ...] = ()
    _alone: dict[tuple[str, str], list[Any]] = field(default_factory=dict)
    _children: list[dict[str, Any]] = field(default_factory=list)

    def sample(self) -> tuple[Task, ...]:
        """Return the first tasks of the first split."""
        if not self._sample:
            self._sample = _first_tasks(self.spec, self.spec.splits[0], EPISODES)
        return self._sample

    def episode(self, task: Task, name: ScriptName = "main") -> ScriptedEpisode:
        """Make a new scripted episode.

        Its seed is the task's position in the sample.
        """
        seed = self.sample().index(task)
        return ScriptedEpisode(self.spec.make, task, seed, script_for(self.spec, task, name), self.timeout)

    async def played(self, task: Task, name: ScriptName = "main") -> ScriptedEpisode:
        """Play a new scripted episode to its end."""
        episode = self.episode(task, name)
        await episode.play()
        return episode

    async def alone(self, task: Task, name: ScriptName = "main") -> list[Any]:
        """Return the trace of the episode when nothing else happens.

        The episode is played at the first call only.
        """
        key = (task.id, name)
        if key not in self._alone:
            self._alone[key] = (await self.played(task, name)).trace
        return self._alone[key]

    def note_calls(self, episode: ScriptedEpisode) -> None:
        """Note which tools a played episode called."""
        called = {c.name for turn in episode.turns for c in turn.message.tool_calls if c.status == "ok"}
        for spec in episode.tools:
            self.tools[spec.name] = self.tools.get(spec.name, False) or spec.name in called

    def children(self) -> list[dict[str, Any]]:
        """Return what two processes with different PYTHONHASHSEED report of tasks and episodes."""
        if not self._children:
            self._children = _in_two_processes(self)
        return self._children


# ── the contract ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def contract(subject: Subject) -> str:
    """Check types and values of everything that tasks, areset, astep, afinish and aclose return."""
    spec, turns = subject.spec, 0
    if not spec.splits:
        raise CheckError(f"{spec.env_class().__name__}.splits is empty: name at least one split")
    for split in spec.splits:
        _first_tasks(spec, split, 1)
    if not 0.0 <= spec.audit.chance <= 1.0:
        raise CheckError(f"chance {spec.audit.chance} must lie in [0, 1]")
    if not isinstance(spec.env_class().reveals_gold, bool):
        raise CheckError(f"reveals_gold is {short(spec.env_class().reveals_gold)}: it must be True or False")
    idle = subject.episode(subject.sample()[0])
    await idle.close()  # aclose may be called without an areset
    await idle.close()
    names: tuple[ScriptName, ...] = ("main", "clumsy")
    for name in names:
        episode = await subject.played(subject.sample()[0], name)
        await episode.close()  # aclose may be called twice
        _shown(episode)
        turns += len(episode.turns)
    ended = subject.episode(subject.sample()[0], "clumsy")
    try:
        await ended.open()
        await ended.turn()
        if not ended.ended:
            await ended.finish("max_turns")
    finally:
        await ended.close()
    return f"{turns} turns, splits {', '.join(spec.splits)}"


def _first_tasks(spec: EnvSpec, split: str, count: int) -> tuple[Task, ...]:
    pool = spec.tasks(split)
    if len(pool) == 0:
        raise CheckError(f"tasks({split!r}) is empty")
    found = tuple(pool[i] for i in range(min(count, len(pool))))
    for task in found:
        if not isinstance(task, Task):
            raise CheckError(f"tasks({split!r}) holds a {type(task).__name__}, not a Task: use Task.make")
    return found


def _shown(episode: ScriptedEpisode) -> None:
    """Check the observations, beyond what the driver of every episode checks of returned values."""
    played = getattr(episode.env, "task", None)
    if not isinstance(played, Task) or (played.id, played.content_hash) != (episode.task.id, episode.task.content_hash):
        shown = short(played.id) if isinstance(played, Task) else "none"
        raise CheckError(
            f"areset was given the task {episode.task.id!r} and plays {shown}: play options['task'], which "
            "self.begin(seed, options) returns"
        )
    observations = [*(turn.observation for turn in episode.turns), episode.observation]
    first = observations[0]
    for k, observation in enumerate(observations):
        if not episode.env.observation_space.contains(observation):
            raise CheckError(f"observation {k} is not in observation_space {episode.env.observation_space}")
        if k and observation[: len(first)] == first:
            raise CheckError(f"observation {k} repeats the first one: return the new messages only, not the history")


async def gymnasium_checker(subject: Subject) -> str:
    """Run Gymnasium's own ``check_env``, with its warnings as errors."""
    from gymnasium.utils.env_checker import check_env

    spec = subject.spec
    made = gymnasium.envs.registration.EnvSpec(
        spec.id if spec.id in gymnasium.registry else "areal_check/Subject-v0",
        entry_point=spec.entry_point,
        kwargs=dict(spec.kwargs),
        disable_env_checker=True,
        order_enforce=False,
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        env = gymnasium.make(made).unwrapped
        try:
            check_env(env)
        except Exception as error:
            raise CheckError(f"check_env: {type(error).__name__}: {error}") from error
        finally:
            env.close()
    complaints = [str(w.message) for w in seen if "gymnasium" in w.filename or "WARN:" in str(w.message)]
    if complaints:
        raise CheckError(f"check_env warns: {complaints[0]}")
    return f"gymnasium {gymnasium.__version__} check_env"


# ── tasks and seeds ──────────────────────────────────────────────────────────────────────────────────────────────────


async def tasks(subject: Subject) -> str:
    """Check that ids are unique, hashes are those of the payloads, splits share no content and processes agree."""
    spec = subject.spec
    owner: dict[str, str] = {}
    counts: list[str] = []
    for split in spec.splits:
        pools = {None: MAX_TASKS, 0.0: PROCESS_TASKS, 1.0: PROCESS_TASKS}
        for difficulty, limit in pools.items():
            pool = spec.tasks(split, difficulty=difficulty)
            ids: set[str] = set()
            for i in range(min(len(pool), limit)):
                task = pool[i]
                if task.id in ids:
                    raise CheckError(f"split {split!r} has the task id {task.id!r} twice")
                ids.add(task.id)
                if task.content_hash != content_hash(task.payload):
                    raise CheckError(f"task {task.id}: content_hash is not that of its payload: use Task.make")
                if owner.setdefault(task.content_hash, split) != split:
                    raise CheckError(
                        f"task {task.id} of split {split!r} has the same content as one of {owner[task.content_hash]!r}"
                    )
            if difficulty is None:
                counts.append(f"{split} {len(ids)}")
    one, two = subject.children()
    for split in spec.splits:
        for i, (a, b) in enumerate(zip(one["tasks"][split], two["tasks"][split], strict=False)):
            if a != b:
                raise CheckError(
                    f"task {i} of split {split!r} differs between processes: {a} and {b} (PYTHONHASHSEED?)"
                )
        if len(one["tasks"][split]) != len(two["tasks"][split]):
            raise CheckError(f"split {split!r} has another number of tasks in another process")
    return f"disjoint by content hash: {', '.join(counts)}"


async def seeds(subject: Subject) -> str:
    """Check that the same tasks and seeds give the same episodes in two processes.

    The processes have different PYTHONHASHSEED.
    """
    one, two = subject.children()
    for i, (a, b) in enumerate(zip(one["traces"], two["traces"], strict=True)):
        failed = next((e["call"] for e in a if e["call"].startswith("failed")), None)
        if failed:
            raise CheckError(f"in a process of its own: {failed.removeprefix('failed: ')}")
        found = trace_difference(a, b)
        if found:
            raise CheckError(
                f"episode {i} differs between two processes with one seed, {found}. Draw from self.np_random or from "
                "the task's seed; never from hash(), set order, the clock or the global generators"
            )
    return f"{len(one['traces'])} episodes equal under PYTHONHASHSEED 1 and 2"


def _in_two_processes(subject: Subject) -> list[dict[str, Any]]:
    spec = subject.spec
    with tempfile.TemporaryDirectory(prefix="areal-check-") as folder:
        children = []
        for seed in ("1", "2"):
            answer = Path(folder) / f"{seed}.json"
            request = {
                "id": spec.id,
                "entry_point": spec.entry_point,
                "kwargs": base64.b64encode(pickle.dumps(dict(spec.kwargs))).decode(),
                "difficulty": spec.difficulty,
                "path": sys.path,
                "splits": list(spec.splits),
                "tasks": PROCESS_TASKS,
                "timeout": subject.timeout,
                "answer": str(answer),
            }
            child = subprocess.Popen(
                [sys.executable, "-m", "areal_agents.conformance.scripted_episode"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )  # fmt: skip
            children.append((child, json.dumps(request), answer))
        wait = partial(_answer, timeout=4 * subject.timeout + 60)
        with ThreadPoolExecutor(len(children)) as threads:  # each is sent its request at once, so both work meanwhile
            return list(threads.map(lambda child: wait(*child), children))


def _answer(child: subprocess.Popen[str], request: str, answer: Path, *, timeout: float) -> dict[str, Any]:
    try:
        _, errors = child.communicate(request, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        child.kill()
        child.communicate()
        raise CheckError(f"a scripted process did not end within {timeout:g} s") from error
    if child.returncode != 0:
        last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
        raise CheckError(f"a scripted process ended with code {child.returncode}: {last}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def tokens(subject: Subject) -> str:
    """Check that each prompt is exactly the one before it, the sampled ids and the new messages."""
    if subject.tokenizer is None:
        raise Skipped("no tokenizer was given")
    form = _chat_format(subject.tokenizer, subject.chat)
    turns = 0
    names: tuple[ScriptName, ...] = ("main", "clumsy")
    for name in names:
        for cut in (False, True):
            turns += await _prompts(subject, form, name, cut)
    if form.history == "template":
        return f"{turns} prompts with {subject.tokenizer}, whose template rewrites its past: each turn is a sample"
    return f"{turns} prefix-exact prompts with {subject.tokenizer}"


def _chat_format(tokenizer: str | Path, options: ChatOptions) -> ChatFormat:
    # Late imports: transformers is heavy, and the other checks do without it.
    from areal_agents.chat.format import ChatFormat
    from areal_agents.models import resolve

    folder = Path(tokenizer)
    return ChatFormat.load(folder if folder.is_dir() else resolve(str(tokenizer)), options)


def _stands_in(text: str, shown: str) -> bool:
    return text in shown or json.dumps(text, ensure_ascii=False)[1:-1] in shown


async def _prompts(subject: Subject, form: ChatFormat, name: ScriptName, cut: bool) -> int:
    """Play one episode in tokens and return how many turns it had.

    ``cut`` leaves out each turn's end, as the length limit does.
    """
    from areal_agents.chat.conversation import Conversation

    episode = subject.episode(subject.sample()[0], name)
    turns = 0
    try:
        await episode.open()
        talk = Conversation(form, episode.observation, episode.tools)
        while not episode.ended:
            prompt = talk.prompt.ids
            text = form.tokenizer.decode(list(prompt))
            missing = [t.name for t in episode.tools if t.name not in text]
            if missing:
                raise CheckError(f"the prompt does not name the tool {missing[0]!r}")
            await episode.turn()
            ids = form.encode_turn(episode.turns[-1].message.text, episode.tools, prompt)
            ids = ids[:-1] if cut and len(ids) > 1 else ids
            finish: Finish = "length" if cut else "stop"
            talk.add_completion(Completion(ids, (0.0,) * len(ids), (0,) * len(ids), finish))
            talk.add_observation(episode.observation)
            turns += 1
            if form.history == "append" and talk.prompt.ids[: len(prompt) + len(ids)] != prompt + ids:
                raise CheckError(f"turn {turns}: the next prompt does not extend the last one")
            shown = form.tokenizer.decode(list(talk.suffix))
            # A template may write a result as JSON text.
            lost = [m.text for m in episode.observation if not _stands_in(m.text.strip(), shown)]
            if lost:
                raise CheckError(f"turn {turns}: the chat template leaves out the message {lost[0]!r:.120}")
    except TemplateError as error:
        raise CheckError(f"turn {turns}: {error}") from error
    finally:
        await episode.close()
    return turns
