"""Fixtures that several test files share, and which tests run where."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["fixtures_atlas", "fixtures_tiny", "fixtures_pictures", "fixtures_refusals"]

#: Published data sets, too large for the repository: tests of the real files need them there.
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def no_picture_is_left_open() -> Iterator[None]:
    """Some tests ask which pictures are open; a test that draws need not think of them."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes, unless asked for, and what needs data that are not here."""
    slow = os.environ.get("UNIFIED_EDIT_SLOW") == "1"
    gemma = bool(os.environ.get("UNIFIED_EDIT_GEMMA"))

    def stays(item: pytest.Item) -> bool:
        there = all(
            (DATA / name).exists() for mark in item.iter_markers("data") for name in mark.args
        )
        asked_for = {"slow": slow, "gemma": gemma}
        return there and all(
            asked or item.get_closest_marker(name) is None for name, asked in asked_for.items()
        )

    left_out = [item for item in items if not stays(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if stays(item)]
