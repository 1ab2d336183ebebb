"""``areal/Folder-v0``: work on the files of a folder with a shell, graded by the files that are left."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, Final

from areal_agents.env import Expert
from areal_agents.envs.procedural import drawn_tasks
from areal_agents.reward import Episode, Verdict
from areal_agents.sandbox import Sandbox
from areal_agents.tool import call_text
from areal_agents.toolenv import ToolEnv
from areal_agents.tools.bash import bash
from areal_agents.tools.files import FILE_TOOLS
from areal_agents.tools.tree import read_tree, write_tree
from areal_agents.types import Task

DEFAULT_DIFFICULTY = 0.5
SIZES: Final = {"train": 2048, "test": 256}
_WORDS: Final = (
    "amber", "brook", "cedar", "delta", "ember", "flint", "grove", "heath", "iris", "jade", "kelp", "lotus", "maple",
    "north", "onyx", "pearl", "quartz", "ridge", "slate", "thorn", "umber", "vale", "willow", "yarrow",
)  # fmt: skip
_CITIES = ("Bergen", "Cork", "Dover", "Essen", "Faro", "Gent")
_NAMES = ("Ana", "Ben", "Eva", "Leo", "Mia", "Tom")
_TOPICS = ("budget", "hiring", "launch", "legal", "travel")
_HOSTS = ("alpha", "bravo", "delta", "kilo", "oscar")
Files = dict[str, str]
"""Path → content, which ends every line with a newline."""
Step = tuple[str, tuple[str, dict[str, str]]]
"""What is asked, and the call that does it."""


def _renamed(rng: Random, files: Files) -> Step:
    new = rng.choice(("md", "text", "note"))
    for path in _in(files, "notes/", ".txt"):
        files[f"{path.removesuffix('.txt')}.{new}"] = files.pop(path)
    text = f"Rename every .txt file in notes so that it ends with .{new} instead."
    return text, _shell(f'for f in notes/*.txt; do mv "$f" "${{f%.txt}}.{new}"; done')


def _value(rng: Random, files: Files) -> Step:
    path = rng.choice(_in(files, "config/"))
    key = rng.choice(("port", "retries"))
    old = next(line for line in files[path].splitlines() if line.startswith(f"{key} = "))
    new = f"{key} = {rng.randint(10_000, 60_000) if key == 'port' else rng.randint(11, 99)}"
    files[path] = files[path].replace(f"{old}\n", f"{new}\n")
    call = ("edit_file", {"path": path, "old": f"{old}\n", "new": f"{new}\n"})
    return f"In {path} set {key} to {new.split()[-1]}.", call


def _host(rng: Random, files: Files) -> Step:
    paths = _in(files, "config/")
    old = files[rng.choice(paths)].splitlines()[0].removeprefix("host = ")
    new = rng.choice([host for host in _HOSTS if host != old])
    for path in paths:
        files[path] = files[path].replace(f"host = {old}\n", f"host = {new}\n")
    text = f"Wherever a file in config has the host {old}, make it {new}."
    return text, _shell(f"sed -i 's/^host = {old}$/host = {new}/' config/*.conf")


def _emptied(rng: Random, files: Files) -> Step:
    for path in _in(files, "tmp/"):
        if not files[path]:
            del files[path]
    return "Delete the empty files in tmp, and only those.", _shell("find tmp -type f -empty -delete")


def _matching(rng: Random, files: Files) -> Step:
    path, level = rng.choice(_in(files, "logs/")), rng.choice(("ERROR", "WARN"))
    found = sorted(line for line in files[path].splitlines() if line.split()[1] == level)
    files["found.txt"] = _lines(found)
    text = f"Write the lines of {path} whose level is {level} into found.txt, sorted as sort does."
    return text, _shell(f"grep ' {level} ' {path} | sort > found.txt")


def _counted(rng: Random, files: Files) -> Step:
    paths = _in(files, "logs/")
    files["lines.txt"] = _lines(f"{path.removeprefix('logs/')} {len(files[path].splitlines())}" for path in paths)
    text = "Write into lines.txt how many lines each file in logs has: a line 'NAME COUNT' for each, names sorted."
    command = '(cd logs && for f in *; do echo "$f $(wc -l < "$f")"; done) > lines.txt'
    return text, _shell(command)


def _summed(rng: Random, files: Files) -> Step:
    path = rng.choice(_in(files, "data/"))
    files["total.txt"] = f"{sum(count for _, count in _rows(files[path]))}\n"
    command = f"awk -F, 'NR > 1 {{ s += $4 }} END {{ print s }}' {path} > total.txt"
    return f"Write the sum of the column count of {path} into total.txt.", _shell(command)


def _by_city(rng: Random, files: Files) -> Step:
    sums: dict[str, int] = {}
    for path in _in(files, "data/"):
        for city, count in _rows(files[path]):
            sums[city] = sums.get(city, 0) + count
    files["cities.csv"] = _lines(f"{city},{sums[city]}" for city in sorted(sums))
    text = "Add up the counts of each city over all files in data: a line 'CITY,SUM' for each in cities.csv, sorted."
    command = "awk -F, 'FNR > 1 { s[$2] += $4 } END { for (c in s) print c \",\" s[c] }' data/*.csv | sort > cities.csv"
    return text, _shell(command)


def _moved(rng: Random, files: Files) -> Step:
    for path in _in(files, "inbox/"):
        topic = files[path].splitlines()[1].removeprefix("topic: ")
        files[f"topics/{topic}/{path.removeprefix('inbox/')}"] = files.pop(path)
    text = "Move each file in inbox into the folder topics/TOPIC, by the topic that its second line says."
    command = 'for f in inbox/*; do t=$(sed -n "2s/^topic: //p" "$f"); mkdir -p "topics/$t"; mv "$f" "topics/$t/"; done'
    return text, _shell(command)


def _senders(rng: Random, files: Files) -> Step:
    counts: dict[str, int] = {}
    for path in _in(files, "inbox/"):
        name = files[path].splitlines()[0].removeprefix("from: ")
        counts[name] = counts.get(name, 0) + 1
    files["senders.txt"] = _lines(f"{name} {counts[name]}" for name in sorted(counts, key=lambda n: (-counts[n], n)))
    text = (
        "Write into senders.txt how many files in inbox are from whom, as their first lines say: a line 'NAME COUNT' "
        "for each, the most first, equal ones by name."
    )
    command = (
        "for f in inbox/*; do sed -n '1s/^from: //p' \"$f\"; done | sort | uniq -c | sort -k1,1nr -k2 "
        "| awk '{ print $2, $1 }' > senders.txt"
    )
    return text, _shell(command)


Kind = Callable[[Random, Files], Step]
LEVELS: Final[tuple[Mapping[str, tuple[Kind, ...]], ...]] = (
    {"notes": (_renamed,), "config": (_value, _host), "tmp": (_emptied,)},
    {
        "notes": (_renamed,), "config": (_host,), "tmp": (_emptied,), "logs": (_matching, _counted),
        "data": (_summed,), "inbox": (_moved,),
    },
    {"config": (_host,), "logs": (_matching, _counted), "data": (_summed, _by_city), "inbox": (_moved, _senders)},
)  # fmt: skip
"""Folder → what may be asked of its files. The steps of a task are on different folders, so their order is free."""


def left(episode: Episode) -> Verdict:
    """Pay 1 for exactly the right files, where the agent said that it is done."""
    payload, tree = episode.task.payload, episode.outcome
    before, wanted = (_facts(payload[name]) for name in ("files", "after"))
    found = set(tree["files"].items()) | set(tree["others"].items())
    asked = wanted ^ before
    done = 0.0 if tree["problem"] else len(asked & (found ^ before)) / len(asked)
    right = float(found == wanted and not tree["problem"] and episode.answer is not None)
    return Verdict(right, {"correct": right, "changes": done, "others": float(len((found ^ before) - asked))})


class Folder(ToolEnv):
    """Work on the files of a folder: rename, move, edit, filter, count and add up.

    An agent must learn to look before it acts, to put commands together, and to leave everything else as it is. The
    reward is 1 where the folder holds in the end exactly the files that it should, with their contents, whatever the
    way. The share of the changes that are there is a component. ``difficulty``: one step at 0, two at 0.5 (the
    default), four at 1, which has reports over several files.
    """

    system_prompt = (
        "You work in a folder of files, with a shell and tools for files. Do what is asked and nothing else: each file "
        "that is left counts. Every line of a file ends with a newline. When all is done, say so."
    )
    tools = (bash, *FILE_TOOLS)
    rubric = left
    max_turns = 16

    @classmethod
    def tasks(cls, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        level = DEFAULT_DIFFICULTY if difficulty is None else float(difficulty)
        return drawn_tasks("areal/Folder-v0", split, level, lambda rng: _drawn(rng, level), SIZES)

    async def prepare(self, sandbox: Sandbox) -> None:
        await write_tree(sandbox, self.task.payload["files"])

    async def inspect(self, sandbox: Sandbox) -> Any:
        return await read_tree(sandbox, max_files=1000)

    def prompt(self, task: Task) -> str:
        return "\n".join(task.payload["requests"])

    @classmethod
    def expert(cls, task: Task) -> Expert:
        yield call_text("list_files", depth=2)
        for name, arguments in task.payload["calls"]:
            yield call_text(name, **arguments)
        yield "All is done."


def _drawn(rng: Random, level: float) -> dict[str, Any]:
    """Draw a folder and steps on it, and work out by hand what they leave."""
    files = _folder(rng)
    kinds = LEVELS[min(2, int(3 * level))]
    after, requests, calls = dict(files), list[str](), list[Any]()
    for folder in rng.sample(sorted(kinds), min(round(4**level), len(kinds))):
        text, (name, arguments) = rng.choice(kinds[folder])(rng, after)
        requests.append(text)
        calls.append([name, arguments])
    return {"requests": requests, "files": files, "after": after, "calls": calls}


def _folder(rng: Random) -> Files:
    """Draw the files of a folder, with those that no step is about among them."""
    words = rng.sample(_WORDS, len(_WORDS))
    files: Files = {"README": f"The files of {words[0]}.\n"}
    for i, word in enumerate(words[:6]):
        files[f"notes/{word}.{'txt' if i < rng.randint(3, 5) else 'rst'}"] = _lines(_said(rng) for _ in range(3))
    for word in words[6:9]:
        values = {"host": rng.choice(_HOSTS), "port": rng.randint(1000, 9999), "retries": rng.randint(1, 9)}
        files[f"config/{word}.conf"] = _lines(f"{key} = {value}" for key, value in values.items())
    for i, word in enumerate(words[9:14]):
        files[f"tmp/{word}.tmp"] = "" if i % 2 else _lines([_said(rng)])
    for word in words[14:17]:
        path = f"logs/{word}.log"
        levels = ["ERROR", "WARN", *rng.choices(("ERROR", "WARN", "INFO"), k=rng.randint(3, 9))]
        stamps = (f"{rng.randrange(24):02}:{rng.randrange(60):02}" for _ in levels)
        files[path] = _lines(f"{at} {level} {_said(rng)}" for at, level in zip(stamps, levels, strict=True))
    for word in words[17:19]:
        rows = [f"{rng.choice(_CITIES)},{rng.choice(_WORDS)},{rng.randint(1, 400)}" for _ in range(rng.randint(5, 10))]
        files[f"data/{word}.csv"] = _lines(["id,city,item,count", *(f"{i},{row}" for i, row in enumerate(rows, 1))])
    for word in words[19:]:
        head = [f"from: {rng.choice(_NAMES)}", f"topic: {rng.choice(_TOPICS)}", ""]
        files[f"inbox/{word}.mail"] = _lines([*head, _said(rng)])
    return files


def _said(rng: Random) -> str:
    return " ".join(rng.sample(_WORDS, 3))


def _lines(lines: Any) -> str:
    return "".join(f"{line}\n" for line in lines)


def _in(files: Files, folder: str, suffix: str = "") -> list[str]:
    return sorted(path for path in files if path.startswith(folder) and path.endswith(suffix))


def _rows(csv: str) -> list[tuple[str, int]]:
    """Return city and count of each row."""
    cells = [line.split(",") for line in csv.splitlines()[1:]]
    return [(row[1], int(row[3])) for row in cells]


def _shell(command: str) -> tuple[str, dict[str, str]]:
    return "bash", {"command": command}


def _facts(files: Mapping[str, str]) -> set[tuple[str, str]]:
    return {(path, hashlib.sha256(content.encode()).hexdigest()) for path, content in files.items()}
