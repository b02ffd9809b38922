"""Progress bars can be silenced, for notebooks whose outputs are compared."""

from __future__ import annotations

from unified_edit.model.progress import VARIABLE, progress


def test_silent_when_told(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "0")
    with progress("working", 3) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_shown_after_a_second(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with progress("working", 3) as bar:
        assert not bar.disable
        assert bar.delay == 1.0
