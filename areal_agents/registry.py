"""The registry of environments, which are found by their ids.

    areal_agents.register("acme/Shop-v0", entry_point="acme_envs.shop:Shop")
    env = areal_agents.make("acme/Shop-v0")

The built-in collection (``areal``) is registered when ``areal_agents`` is imported. Any other id's namespace decides
where it is looked up, once it is asked for. First comes what is registered already. Then come the entry points of the
group ``areal_agents.envs`` whose *name is the namespace* and whose value is a module that calls ``register`` when
imported:

    [project.entry-points."areal_agents.envs"]
    acme = "acme_envs"

A package that fails to import is kept in ``load_errors`` and warned about when its namespace is asked for.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from areal_agents.errors import ArealError, ConfigError, RegistryError, SandboxUnavailable
from areal_agents.sandbox import SandboxBackend, backends
from areal_agents.utils.exits import no_exit
from areal_agents.utils.foreign import contained, import_foreign
from areal_agents.utils.short_text import described, short, text_of
from areal_agents.utils.sync import run_sync

if TYPE_CHECKING:
    from areal_agents.env import AgentEnv, Expert
    from areal_agents.types import Task

ENTRY_POINT_GROUP = "areal_agents.envs"
_ID = re.compile(r"(?P<namespace>[A-Za-z0-9_.-]+)/(?P<name>[A-Za-z0-9_.-]+)-v(?P<version>[0-9]+)")
_ENTRY_POINT = re.compile(r"(?P<module>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<cls>[A-Za-z_]\w*)")


@dataclass(frozen=True, slots=True)
class Audit:
    """The facts about an environment that the reward audit relies on."""

    chance: float
    """Mean reward allowed to a policy without skill at the difficulty that is played (the audit adds 0.05)."""
    gold: bool
    """Whether the environment can state an answer that deserves reward 1. Otherwise it is shown as unaudited."""
    expert: bool
    """Whether it scripts demonstrations."""


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """One environment, with all that is needed to find and make it."""

    id: str
    entry_point: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    declared_splits: tuple[str, ...] | None = None
    description: str = ""
    difficulty: float | None = None
    """The difficulty of ``tasks`` where none is named. None is the environment's default."""
    needs: str = ""
    """A module that the user installs, without which the environment has no tasks. Empty where nothing is needed."""
    sandbox: str = ""
    """The one sandbox backend that can play it. Empty where others can, or none is needed."""

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def lacks(self) -> str:
        """Say why it cannot be played on this machine, or return "". The sandbox that it needs is probed."""
        if not self.installed:
            return f"it needs {self.needs}, which is not installed"
        if self.sandbox:
            try:
                run_sync(_probe(self.sandbox))
            except SandboxUnavailable as error:
                return text_of(error)
        return ""

    def env_class(self) -> type[AgentEnv]:
        """Import the class.

        A plain ``gymnasium.Env`` over text is wrapped in a ``TextProcessEnv``. Raises RegistryError with the reason
        where that fails.
        """
        from areal_agents.env import AgentEnv

        module_name, _, class_name = self.entry_point.partition(":")
        try:
            found = getattr(import_foreign(module_name), class_name, None)
        except Exception as error:
            raise RegistryError(f"{self.id}: importing {module_name!r} failed: {error!r}") from error
        if found is None:
            raise RegistryError(f"{self.id}: module {module_name!r} has no class {class_name!r}")
        if isinstance(found, type) and issubclass(found, AgentEnv):
            return found
        import gymnasium

        if isinstance(found, type) and issubclass(found, gymnasium.Env) and found is not gymnasium.Env:
            # By name: a room above this one, and nobody else needs it.
            wrapped: type[AgentEnv] = importlib.import_module("areal_agents.process_env").wrapped(self.entry_point)
            return wrapped
        raise RegistryError(
            f"{self.id}: {self.entry_point!r} is no AgentEnv, and no gymnasium.Env over text either: name such a class"
        )

    def make(self, **kwargs: Any) -> AgentEnv:
        """Make a new instance.

        ``kwargs`` override the registered ones. Raises RegistryError for a wrong argument.
        """
        cls = self.env_class()
        merged = {**self.kwargs, **kwargs}
        try:
            with contained():
                return cls(**merged)
        except TypeError as error:
            raise RegistryError(f"{self.id}: {cls.__name__}({', '.join(sorted(merged))}) failed: {error}") from error

    @property
    def splits(self) -> tuple[str, ...]:
        return self.declared_splits if self.declared_splits is not None else self.env_class().splits

    def tasks(self, split: str, *, difficulty: float | None = None) -> Sequence[Task]:
        """Return the tasks of one split.

        Raises RegistryError for a split that the environment does not have, and for tasks that cannot be used. Raises
        ConfigError for a difficulty outside [0, 1].
        """
        if split not in self.splits:
            raise RegistryError(
                f"{self.id} has no split {split!r}{_hint(split, self.splits)}; its splits are {', '.join(self.splits)}"
            )
        difficulty = self.difficulty if difficulty is None else difficulty
        if difficulty is not None and not 0.0 <= difficulty <= 1.0:
            raise ConfigError(f"difficulty {difficulty} of {self.id} must lie in [0, 1]")
        return tasks_of(self.env_class(), self.id, split, difficulty, self.kwargs)

    def with_kwargs(self, given: Mapping[str, Any]) -> EnvSpec:
        """Return the same environment, whose registered arguments ``given`` overrides."""
        return replace(self, kwargs={**self.kwargs, **given})

    def require_arguments(self, given: Mapping[str, Any]) -> None:
        """Raise RegistryError where the class does not take the arguments ``given``, over the registered ones."""
        cls = self.env_class()
        signature, merged = inspect.signature(cls), {**self.kwargs, **given}
        if takes(cls, "sandbox"):  # a run gives it where nobody else does
            merged.setdefault("sandbox", None)
        try:
            signature.bind(**merged)
        except TypeError as error:
            spelt = {name: name.replace("-", "_") for name in merged if "-" in name}
            hint = "".join(f"; write {new} for {old}" for old, new in spelt.items() if new in signature.parameters)
            raise RegistryError(
                f"{self.id}: {cls.__name__} does not take env.kwargs as they are: {error}{hint}"
            ) from error

    def expert(self, task: Task) -> Expert | None:
        """Return a fresh scripted demonstration of ``task``, or None."""
        return self.env_class().expert(task)

    def gold(self, task: Task) -> str | None:
        """Return an answer to ``task`` that deserves reward 1, or None."""
        return self.env_class().gold(task)

    @property
    def audit(self) -> Audit:
        from areal_agents.env import AgentEnv

        cls = self.env_class()
        gold, expert = (getattr(cls, n).__func__ is not getattr(AgentEnv, n).__func__ for n in ("gold", "expert"))
        return Audit(_chance(cls.chance, self.difficulty, self.id), gold, expert)


def _chance(declared: float | Mapping[float | None, float], difficulty: float | None, id: str) -> float:
    """Return the chance that an environment declares for a difficulty.

    Raises RegistryError where it declares none for it.
    """
    if not isinstance(declared, Mapping):
        return declared
    if difficulty in declared:
        return declared[difficulty]
    levels = sorted(level for level in declared if level is not None)
    below, above = [x for x in levels if difficulty and x <= difficulty], [x for x in levels if x >= (difficulty or 0)]
    if difficulty is None or not below or not above:
        raise RegistryError(f"{id}: chance names no level {difficulty}: it has {', '.join(map(str, declared))}")
    low, high = below[-1], above[0]
    return declared[low] + (declared[high] - declared[low]) * (difficulty - low) / (high - low)


def takes(cls: type, name: str) -> bool:
    """Say whether a class is made with an argument ``name``: its own, or its base's where it hands ``**kwargs`` on."""
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = inspect.signature(init).parameters
        if name in parameters or not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return name in parameters
    return False


async def _probe(sandbox: str) -> None:
    """Raise SandboxUnavailable where a backend cannot be used here."""
    backend: SandboxBackend = backends().get(sandbox)
    try:
        await backend.probe()
    finally:
        await backend.aclose()


def tasks_of(
    cls: type[AgentEnv], id: str, split: str, difficulty: float | None, kwargs: Mapping[str, Any] = MappingProxyType({})
) -> Sequence[Task]:
    """Ask ``cls`` for the tasks of ``split``, with those of ``kwargs`` that its ``tasks`` names.

    Raises RegistryError, with the class and what is wrong, where it gives anything but a sequence of distinct tasks.
    The items of a list are looked at here, those of another sequence where they are used.
    """
    where = f"{id}: {cls.__name__}.tasks({split!r})"
    try:
        signature = inspect.signature(cls.tasks)
        given = {n: v for n, v in kwargs.items() if n in signature.parameters and n not in ("split", "difficulty")}
        signature.bind(split, difficulty=difficulty, **given)
    except TypeError as error:
        raise RegistryError(
            f"{where} cannot be asked: {error}; write `def tasks(cls, split, *, difficulty=None)` under @classmethod"
        ) from error
    try:
        with no_exit():
            found = cls.tasks(split, difficulty=difficulty, **given)
    except ArealError:
        raise
    except Exception as error:  # the author's own code
        raise RegistryError(f"{where} raised {described(error)}") from error
    if isinstance(found, str | bytes | Mapping) or not all(hasattr(found, n) for n in ("__len__", "__getitem__")):
        if inspect.iscoroutine(found):
            found.close()  # never awaited, which Python would warn of
        raise RegistryError(f"{where} returned a {type(found).__name__}: return a list of Task, or LazyTasks")
    if isinstance(found, list | tuple):
        require_distinct(found, where)
    return found


def require_distinct(tasks: Iterable[object], where: str) -> None:
    """Raise RegistryError where something in ``tasks`` is no Task, or two have one id, by which results are counted.

    ``where`` begins the message.
    """
    from areal_agents.types import Task

    seen: set[str] = set()
    for task in tasks:
        if not isinstance(task, Task):
            raise RegistryError(f"{where} holds {short(task)}, which is no Task: use Task.make")
        if task.id in seen:
            raise RegistryError(f"{where} has two tasks with the id {task.id!r}: give each task an id of its own")
        seen.add(task.id)


_specs: dict[str, EnvSpec] = {}
_loaded: set[str] = set()
_load_errors: dict[str, BaseException] = {}
load_errors: Mapping[str, BaseException] = MappingProxyType(_load_errors)
"""Entry points that failed to load: ``"name = module (distribution)"`` → the error."""


def register(
    id: str,
    entry_point: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    splits: Sequence[str] | None = None,
    description: str = "",
    needs: str = "",
    sandbox: str = "",
) -> EnvSpec:
    """Register an environment here and with Gymnasium, so that ``gymnasium.make(id)`` works too.

    Registering the same environment again does nothing.

    Args:
        id: ``"namespace/Name-v0"``.
        entry_point: ``"package.module:Class"``, imported at first use.
        kwargs: arguments of the class, which ``make`` may override.
        splits: names of the task splits. None means the class's own.
        description: one line for lists of environments.
        needs: a module that the user installs, without which there are no tasks: ``check --all`` leaves it out then.
        sandbox: the one backend that can play it: ``check --all`` leaves it out where that cannot be used.

    Raises:
        RegistryError: ``id`` or ``entry_point`` is malformed, or another environment has that id.
    """
    if _ID.fullmatch(id) is None:
        raise RegistryError(f'environment id {id!r} must read "namespace/Name-v0"')
    if _ENTRY_POINT.fullmatch(entry_point) is None:
        raise RegistryError(f'{id}: entry point {entry_point!r} must read "package.module:Class"')
    named = None if splits is None else tuple(splits)
    new = EnvSpec(id, entry_point, dict(kwargs or {}), named, description, needs=needs, sandbox=sandbox)
    if id in _specs:
        if _specs[id] != new:
            taken = _specs[id].entry_point
            raise RegistryError(f"{id} is registered already, as {taken!r}: choose another name or version")
        return new
    import gymnasium

    # Gymnasium's own wrappers expect array-like data; `check` runs its checker on purpose.
    gymnasium.register(
        id, entry_point=entry_point, kwargs=dict(new.kwargs), disable_env_checker=True, order_enforce=False
    )
    _specs[id] = new
    return new


def spec(id: str) -> EnvSpec:
    """Find the environment called ``id``, or the class named by ``"module:Class"``.

    Raises RegistryError for an unknown id.
    """
    if id in _specs:
        return _specs[id]
    if _ENTRY_POINT.fullmatch(id):
        return EnvSpec(id, id)
    match = _ID.fullmatch(id)
    if match:
        _load(match["namespace"], warn=True)
        if id in _specs:
            return _specs[id]
    else:
        _load_all()
    known = [s.id for s in specs()]
    raise RegistryError(
        f"unknown environment {id!r}{_hint(id, known)}; `areal-agents envs` lists what there is "
        '(or give "package.module:Class")'
    )


def make(id: str, **kwargs: Any) -> AgentEnv:
    """Make a new instance of the environment ``id``.

    ``kwargs`` override the registered ones. Raises RegistryError for an unknown id or a wrong argument.
    """
    return spec(id).make(**kwargs)


def specs() -> list[EnvSpec]:
    """Return every environment that can be found, sorted by id.

    Loads all entry points.
    """
    _load_all()
    return [_specs[id] for id in sorted(_specs)]


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    return importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)


def _load_all() -> None:
    for namespace in sorted({entry.name for entry in _entry_points()}):
        _load(namespace, warn=False)


def _load(namespace: str, *, warn: bool) -> None:
    if namespace not in _loaded:
        _loaded.add(namespace)
        for entry in _entry_points():
            if entry.name == namespace:
                _load_entry_point(entry)
    if warn:
        for label, error in _load_errors.items():
            if label.split(" = ")[0] == namespace:
                warnings.warn(f"the environments of {label} could not be loaded: {error!r}", stacklevel=3)


def _load_entry_point(entry: importlib.metadata.EntryPoint) -> None:
    distribution = entry.dist.name if entry.dist is not None else "unknown distribution"
    try:
        with contained():
            entry.load()
    except Exception as error:  # noqa: BLE001  a boundary: a broken package must not break the others
        _load_errors[f"{entry.name} = {entry.value} ({distribution})"] = error


def _hint(wrong: str, known: Iterable[str]) -> str:
    """Write `` (did you mean …?)`` where a known name is near, else nothing."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(wrong.lower(), by_lower, n=1, cutoff=0.5)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
