"""The folder of files: what each request leaves, by hand and by its command, and what is paid."""

from __future__ import annotations

import asyncio
import hashlib
from random import Random
from typing import Any

import pytest

from areal_agents import sandboxes
from areal_agents.envs import folder
from areal_agents.reward import Episode
from areal_agents.rollout.env_host import EnvHost
from areal_agents.rollout.episode import EpisodeDriver
from areal_agents.rollout.script import ScriptPolicy
from areal_agents.tool import call_text
from areal_agents.types import Task, Trajectory
from tests.conftest import require
from tests.envs.test_games import task_of

FILES = {
    "notes/a.txt": "x\n", "notes/b.txt": "y\n", "notes/c.rst": "z\n",
    "config/a.conf": "host = kilo\nport = 8000\nretries = 3\n",
    "config/b.conf": "host = kilo\nport = 80\nretries = 3\n",
    "tmp/a.tmp": "", "tmp/b.tmp": "x\n",
    "logs/a.log": "10:00 ERROR b\n09:00 WARN a\n08:00 ERROR WARN\n", "logs/b.log": "07:00 INFO ERROR\n",
    "data/a.csv": "id,city,item,count\n1,Cork,x,5\n2,Bergen,y,10\n", "data/b.csv": "id,city,item,count\n1,Cork,x,20\n",
    "inbox/a.mail": "from: Tom\ntopic: legal\n\nfrom: Ana\n", "inbox/b.mail": "from: Ana\ntopic: legal\n\nx\n",
    "inbox/c.mail": "from: Eva\ntopic: budget\n\nx\n", "inbox/d.mail": "from: Tom\ntopic: budget\n\ntopic: legal\n",
}  # fmt: skip


class First(Random):
    """Chooses the first of all."""

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def randint(self, a: int, b: int) -> int:
        return a


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (folder._renamed, {"notes/a.txt": None, "notes/b.txt": None, "notes/a.md": "x\n", "notes/b.md": "y\n"}),
        (folder._value, {"config/a.conf": "host = kilo\nport = 10000\nretries = 3\n"}),
        (
            folder._host,
            {
                "config/a.conf": "host = alpha\nport = 8000\nretries = 3\n",
                "config/b.conf": "host = alpha\nport = 80\nretries = 3\n",
            },
        ),
        (folder._emptied, {"tmp/a.tmp": None}),
        (folder._matching, {"found.txt": "08:00 ERROR WARN\n10:00 ERROR b\n"}),
        (folder._counted, {"lines.txt": "a.log 3\nb.log 1\n"}),
        (folder._summed, {"total.txt": "15\n"}),
        (folder._by_city, {"cities.csv": "Bergen,10\nCork,25\n"}),
        (
            folder._moved,
            {f"inbox/{name}.mail": None for name in "abcd"}
            | {f"topics/legal/{name}.mail": FILES[f"inbox/{name}.mail"] for name in "ab"}
            | {f"topics/budget/{name}.mail": FILES[f"inbox/{name}.mail"] for name in "cd"},
        ),
        (folder._senders, {"senders.txt": "Tom 2\nAna 1\nEva 1\n"}),
    ],
)
def test_what_each_request_leaves(kind: folder.Kind, changes: dict[str, str | None]) -> None:
    after = dict(FILES)
    kind(First(0), after)
    assert after == {path: text for path, text in (FILES | changes).items() if text is not None}


def built(*kinds: folder.Kind, files: dict[str, str] = FILES) -> Task:
    after, said, calls = dict(files), list[str](), list[Any]()
    for kind in kinds:
        text, (name, arguments) = kind(First(0), after)
        said.append(text)
        calls.append([name, arguments])
    return task_of({"requests": said, "files": files, "after": after, "calls": calls})


def driven(task: Task, *texts: str) -> Trajectory:
    require("bwrap")

    async def main() -> Trajectory:
        host = EnvHost()
        expert = (lambda first: folder.Folder.expert(task)) if not texts else (lambda first: (t for t in texts))
        policy = ScriptPolicy(expert, task)  # type: ignore[arg-type]
        episode = EpisodeDriver(folder.Folder, task, policy, host, "e", 0, 120.0)
        try:
            await episode.play()
        finally:
            await host.close(sandboxes.close_shared)
        return episode.trajectory("g")

    return asyncio.run(main())


K = folder


@pytest.mark.parametrize(
    "kinds",
    [
        (K._renamed, K._value, K._emptied, K._matching, K._summed, K._moved),
        (K._host, K._counted, K._by_city, K._senders),
    ],
)
@pytest.mark.parametrize("drawn", [False, True])
def test_the_commands_leave_what_was_worked_out(kinds: tuple[folder.Kind, ...], drawn: bool) -> None:
    files = folder._folder(Random(7)) if drawn else FILES
    trajectory = driven(built(*kinds, files=files))
    assert trajectory.reward == 1.0, trajectory.outcome
    assert {r.status for turn in trajectory.turns for r in turn.tool_results} == {"ok"}


def test_links_in_place_of_files_and_what_tools_leave() -> None:
    task = built(K._emptied)
    link = call_text("bash", command="rm tmp/a.tmp; mv notes/a.txt /tmp/a; ln -s /tmp/a notes/a.txt")
    trajectory = driven(task, link, "Done.")
    assert trajectory.reward == 0.0
    assert trajectory.outcome["others"] == {"notes/a.txt": "link"}
    # Nothing but the request's own change: looking, searching and a shell leave no files of their own.
    looks = [
        call_text("read_file", path="README"), call_text("search_files", text="x"), call_text("list_files"),
        call_text("bash", command="history; cd tmp; python3 -c 'print(1)'; rm a.tmp"),
    ]  # fmt: skip
    assert driven(task, *looks, "Done.").reward == 1.0


def judged(task: Task, files: dict[str, str], answer: str | None = "Done.", **more: Any) -> dict[str, float]:
    hashes = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in files.items()}
    outcome = {"files": hashes, "others": {}, "problem": ""} | more
    verdict = folder.left(Episode(task, (), answer, (), "answer", outcome=outcome))
    assert verdict.score == verdict.components["correct"]
    return dict(verdict.components)


def test_exactly_the_right_files_are_paid() -> None:
    task = built(K._renamed, K._summed)  # five changes: two names gone, two new, a new file
    after = dict(task.payload["after"])
    right = {"correct": 1.0, "changes": 1.0, "others": 0.0}
    assert judged(task, after) == right
    assert judged(task, after, answer=None) == right | {"correct": 0.0}
    assert judged(task, after, problem="too many entries") == {"correct": 0.0, "changes": 0.0, "others": 0.0}
    assert judged(task, after, others={"pipe": "special"}) == right | {"correct": 0.0, "others": 1.0}
    assert judged(task, after | {"new": ""}) == right | {"correct": 0.0, "others": 1.0}
    # a wrong sum: four of five, and one thing more that nobody asked for
    assert judged(task, after | {"total.txt": "15"}) == {"correct": 0.0, "changes": 0.8, "others": 1.0}
    assert judged(task, FILES) == {"correct": 0.0, "changes": 0.0, "others": 0.0}
    assert judged(task, {})["correct"] == 0.0


@pytest.mark.parametrize(("level", "steps"), [(0.0, 1), (0.5, 2), (1.0, 4)])
def test_levels_have_more_and_longer_steps(level: float, steps: int) -> None:
    for task in folder.Folder.tasks("test", difficulty=level)[:40]:
        p = task.payload
        assert len(p["requests"]) == len(set(p["requests"])) == steps
        assert p["after"] != p["files"]
        assert "README" in p["after"]
        assert all(text == "" or text.endswith("\n") for text in p["files"].values())
