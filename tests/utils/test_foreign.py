"""Somebody else's module costs only itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_agents.utils.foreign import import_foreign


@pytest.mark.parametrize(
    ("code", "error", "said"),
    [
        ("import sys\nsys.exit('need key')", RuntimeError, r"it called sys.exit\('need key'\)"),
        ("raise SystemExit", RuntimeError, r"it called sys.exit\(None\)"),
        (
            "import pytest\npytest.skip('no key', allow_module_level=True)",
            RuntimeError,
            "it raised Skipped: .*no key",
        ),
        ("raise OSError('disk on fire')", OSError, "disk on fire"),
        ("def broken(:", SyntaxError, "."),
        ("import acme_nothing_of_this_name", ModuleNotFoundError, "acme_nothing_of_this_name"),
        ("raise KeyboardInterrupt", KeyboardInterrupt, None),  # Ctrl-C is the user's
    ],
)
def test_an_import_ends_in_an_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[BaseException], said: str | None
) -> None:
    (tmp_path / "acme_foreign.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=said):
        import_foreign("acme_foreign")


def test_a_module_that_works_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_works.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_foreign("acme_works").value == 3
