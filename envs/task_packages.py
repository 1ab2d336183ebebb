"""Packages whose tasks an adapter plays: found, of the version that was looked through, or refused with what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from areal_agents.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TaskPackage:
    """A package that a user installs, as it is on PyPI."""

    distribution: str
    version: str
    """The one whose tasks were all replayed. Another may have other tasks, other mistakes and another grading."""
    module: str
    imports: tuple[str, ...] = ()
    """Modules of other packages that it imports where it is used."""
    others: tuple[str, ...] = ()
    """The packages on PyPI that have them."""

    @property
    def command(self) -> str:
        """Return what installs it, without the packages that only its own programs need."""
        alone = f"pip install --no-deps {self.distribution}=={self.version}"
        return f"pip install {' '.join(self.others)} && {alone}" if self.others else alone

    def require(self, who: str) -> None:
        """Raise ConfigError, with the command that helps, where it cannot be used.

        ``who`` begins the message. Nothing is imported and nothing is downloaded.
        """
        needed = f"{who} needs {self.distribution} {self.version}"
        if importlib.util.find_spec(self.module) is None:
            raise ConfigError(f"{needed}, which is not installed: {self.command}")
        try:
            found = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            found = "of an unknown version"
        if found != self.version:
            raise ConfigError(f"{needed}, and what is installed is {found}: {self.command}")
        if missing := [name for name in self.imports if importlib.util.find_spec(name) is None]:
            raise ConfigError(f"{needed} with the module {missing[0]!r}, which is not installed: {self.command}")
