"""The list of planted faults must fit the source, or it proves nothing when it is run."""

from __future__ import annotations

import mutations
import pytest


@pytest.mark.parametrize("fault", mutations.FAULTS, ids=lambda fault: fault.what)
def test_the_fault_can_be_planted(fault):
    source = (mutations.ROOT / "unified_edit" / fault.module).read_text(encoding="utf-8")
    assert source.count(fault.right) == 1
    assert fault.wrong not in ("", fault.right)
    for name in fault.tests:
        assert not name.endswith(".py") or (mutations.ROOT / name).exists()


@pytest.mark.parametrize(
    "name", sorted({c for names in mutations.CHAPTERS.values() for c in names})
)
def test_chapters_that_must_notice_are_there(name):
    assert (mutations.ROOT / "book" / f"{name}.ipynb").exists()
