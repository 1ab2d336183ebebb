from __future__ import annotations

import sys
import types

import pytest

from tests.cli.recorder import Recorder


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for name, home in {"train": "areal_agents.trainer.loop", "evaluate": "areal_agents.evaluation.evaluate"}.items():
        module = types.ModuleType(home)
        setattr(module, name, getattr(recorder, name))
        monkeypatch.setitem(sys.modules, home, module)
    return recorder
